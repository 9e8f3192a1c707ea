"""The strategies reach every edge that they promise, keep within their limits, and shrink to small cases."""

import functools
import inspect
import math
import subprocess
import sys

import numpy as np
import oracles
import pytest
from edges import EDGES, PARTS, kernel_of, params, sizes_of
from hypothesis import Phase, find, given, seed, settings
from hypothesis import strategies as st

import refimpl
from refimpl.testing import strategies

EXAMPLES = 600
LEAST = 3  # cases at each edge
RESULTS = {"return_indices", "return_logsumexp", "need_weights", "average_weights"}  # options that only add results

each_op = pytest.mark.parametrize("op", strategies.EVERY_OP)
each_kind_of_op = pytest.mark.parametrize("op", ["conv", "max_pool", "multi_head_attention", "merge_attention"])


def draw(strategy, count=50):
    """Return so many cases, the same ones every time."""
    found = []
    runs = max(1, count // 60)  # the cases of one run resemble one another
    for number in range(runs):

        @seed(number)
        @settings(max_examples=count // runs, database=None, phases=[Phase.generate], deadline=None)
        @given(strategy)
        def collect(case):
            found.append(case)

        collect()
    return found


@functools.cache
def cases(op):
    return draw(strategies.EVERY_OP[op](), EXAMPLES)


def flat(tree):
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [item for part in tree for item in flat(part)] if isinstance(tree, tuple) else [tree]


def arrays(case):
    return [a for a in flat((case.arrays, case.options)) if isinstance(a, np.ndarray)]


def floats(case):
    return [a for a in arrays(case) if a.dtype.kind not in "biu"]


def call(case):
    """Return the (first) result of a case, and its gradients."""
    out = case.f(*case.arrays, **case.options)
    out = out[0] if isinstance(out, tuple) else out
    dout = np.random.default_rng(0).integers(-2, 3, size=out.shape).astype(out.dtype)
    return out, [a for a in flat(case.f_backward(dout, *case.arrays, **case.options)) if a is not None]


@functools.cache
def counts(op):
    """Return how many cases lie at each edge."""
    found = dict.fromkeys(EDGES[op], 0)
    for case in cases(op):
        for edge, rule in EDGES[op].items():
            found[edge] += bool(rule(case))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("op", "edge"), [(op, edge) for op, edges in EDGES.items() for edge in edges])
def test_reaches_the_edge(op, edge):
    assert counts(op)[edge] >= LEAST, f"{counts(op)[edge]} of {EXAMPLES} cases"


BY_OPTION = {
    "conv": ("stride > kernel", "dilation > 1", "asymmetric pads", "reflect padding", "bias"),
    "conv_transpose": ("stride > kernel", "output padding", "same that extends", "elements that are cropped away"),
    "max_pool": ("overhanging windows", "stride as an int", "asymmetric pads"),
    "avg_pool": ("count_include_pad=False", "divisor_override < 0", "overhang, of which padding counts"),
    "lp_pool": ("ceil_mode that drops a window", "dilation > size"),
    "max_unpool": ("output below the default", "asymmetric pads"),
    "scaled_dot_product_attention": ("queries that see nothing", "bias with -inf", "dropout", "offset < 0", "sink"),
    "attention_weights": ("queries that see nothing", "window", "some keys are padding", "softcap"),
    "multi_head_attention": ("keys added to none", "bias_k alone", "grouped heads without projections", "sink"),
}


@pytest.mark.parametrize("op", BY_OPTION)
def test_counts_nothing_where_the_limits_allow_nothing(op):
    found = draw(strategies.EVERY_OP[op](options=()))
    for edge in BY_OPTION[op]:
        assert not any(EDGES[op][edge](case) for case in found), edge
    assert all(case.options.keys() <= {"num_heads"} for case in found)


@each_op
def test_every_case_is_valid_and_finite(op):
    for case in cases(op)[::3]:
        assert case.f is getattr(refimpl, op)
        assert case.f_backward is getattr(refimpl, f"{op}_backward")
        out, gradients = call(case)
        assert out.dtype == np.float64
        assert all(np.isfinite(a).all() for a in [out, *gradients])


def test_every_op_has_a_strategy():
    ops = {name for name in refimpl.__all__ if inspect.isfunction(getattr(refimpl, name))}
    assert set(strategies.EVERY_OP) == {name for name in ops if not name.endswith("_backward")} == set(EDGES)
    for name, strategy in strategies.EVERY_OP.items():
        assert strategy is getattr(strategies, name)
        assert name in strategies.__all__
        for parameter in inspect.signature(strategy).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.name in strategy.__doc__


def options_of(op):
    """Return the names of the options of an op that a strategy draws."""
    parameters = inspect.signature(getattr(refimpl, op)).parameters.values()
    names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - RESULTS - {"num_heads"}
    return names | {"conv": {"bias"}, "conv_transpose": {"bias"}, "multi_head_attention": PARTS}.get(op, set())


def given_options(case):
    """Return the options that a case has, those among its arrays included."""
    names = set(case.options) - {"num_heads"}
    if case.f in (refimpl.conv, refimpl.conv_transpose) and case.arrays[2] is not None:
        names.add("bias")
    if case.f is refimpl.multi_head_attention:
        names |= params(case).keys() & PARTS
    return names


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in strategies.EVERY_OP for name in sorted(options_of(op))])
def test_options_limit_the_options(op, name):
    names = {"dropout_mask", name} if name == "dropout_p" else {name}
    assert set().union(*map(given_options, draw(strategies.EVERY_OP[op](options=names), 20))) == names


def test_dropout_p_comes_with_a_mask():
    assert not any(map(given_options, draw(strategies.scaled_dot_product_attention(options=["dropout_p"]))))


SLIDING = ["conv", "conv_transpose", "max_pool", "avg_pool", "lp_pool", "max_unpool"]
ADAPTIVE = ["adaptive_avg_pool", "adaptive_max_pool"]
ATTENTION = ["scaled_dot_product_attention", "attention_weights"]
MULTI_HEAD = ["multi_head_attention"]


def first_two(axis):
    return lambda case: {a.shape[axis] for a in case.arrays[:2]}


def leading(case):
    return {case.arrays[0].shape[: case.arrays[0].ndim - len(sizes_of(case))]}


LIMITS = [  # ops, parameters, and what must come out: a set from each case, and their union
    ([*SLIDING, *ADAPTIVE], {"ranks": (4, 1)}, lambda case: {len(sizes_of(case))}, {1, 4}),
    ([*SLIDING, *ADAPTIVE], {"sizes": (8, 5)}, lambda case: set(sizes_of(case)), {5, 8}),
    (SLIDING, {"kernels": (5, 2), "sizes": (6,)}, lambda case: set(kernel_of(case)), {2, 5}),
    ([*SLIDING[2:], *ADAPTIVE], {"batches": ((1, 2), (3,))}, leading, {(1, 2), (3,)}),
    (SLIDING[:2], {"channels": (3,), "options": ()}, lambda case: set(case.arrays[1].shape[:2]), {3}),
    (SLIDING[:2], {"batches": ((7,), (5,))}, lambda case: {case.arrays[0].shape[0]}, {7, 5}),
    (["lp_pool"], {"norm_types": (7, 2)}, lambda case: {case.arrays[1]}, {7, 2}),
    (ADAPTIVE, {"outputs": (4, 3)}, lambda case: set(kernel_of(case)), {4, 3, None}),
    ([*ATTENTION, *MULTI_HEAD], {"lengths": (4, 7)}, first_two(-2), {4, 7}),
    (ATTENTION, {"features": (8,)}, first_two(-1), {8}),
    (ATTENTION[:1], {"value_features": (8, 9)}, lambda case: {case.arrays[2].shape[-1]}, {8, 9}),
    (ATTENTION, {"heads": ((4, 2),), "batches": ((),)}, first_two(0), {4, 2}),
    (ATTENTION, {"batches": (None,)}, lambda case: {a.ndim for a in case.arrays}, {2}),
    (ATTENTION, {"batches": ((3,),), "broadcast": False}, lambda case: {a.shape[:-3] for a in case.arrays}, {(3,)}),
    (MULTI_HEAD, {"heads": ((4, 2),)}, lambda case: {case.options["num_heads"]}, {4}),
    (MULTI_HEAD, {"heads": ((4, 2),), "features": (3,), "projections": ("none",)}, first_two(-1), {12, 6}),
    (MULTI_HEAD, {"projections": ("packed",)}, lambda case: {"in_proj_weight" in params(case)}, {True}),
    (MULTI_HEAD, {"batches": ((2, 2),), "broadcast": False}, lambda case: {case.arrays[0].shape[:-2]}, {(2, 2)}),
    (["merge_attention"], {"parts": (5,)}, lambda case: {len(a) for a in case.arrays}, {5}),
    (["merge_attention"], {"lengths": (5,), "features": (6,)}, lambda case: {case.arrays[0].shape[-2:]}, {(5, 6)}),
    (["merge_attention"], {"batches": ((2, 2),)}, lambda case: {case.arrays[1].shape[1:-1]}, {(2, 2)}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "number"), [(op, number) for number, (ops, *_) in enumerate(LIMITS) for op in ops])
def test_parameters_limit_the_shapes(op, number):
    _, limits, read, allowed = LIMITS[number]
    found = draw(strategies.EVERY_OP[op](**limits), 30)
    assert set().union(*map(read, found)) == allowed
    for case in found[::8]:
        call(case)


def test_without_broadcasting_every_array_has_all_dimensions():
    options = ["bias", "mask", "query_lengths", "key_lengths"]
    for case in draw(strategies.scaled_dot_product_attention(options=options, broadcast=False, batches=((2, 3), (2,)))):
        query, key, value = case.arrays
        batch = query.shape[:-3]
        assert key.shape[:-3] == value.shape[:-3] == batch
        assert {case.options[name].shape for name in options[:2] if name in case.options} <= {
            (*query.shape[:-1], key.shape[-2])
        }
        assert {case.options[name].shape for name in options[2:] if name in case.options} <= {batch}


@each_op
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("bfloat16",)], ids=str)
def test_dtypes_limit_the_dtypes(op, dtypes):
    if "bfloat16" in dtypes:
        pytest.importorskip("ml_dtypes")
    seen = set()
    for case in draw(strategies.EVERY_OP[op](dtypes=dtypes), 40):
        dtype = case.arrays[0].dtype
        seen.add(dtype.name)
        for a in floats(case)[: 1 if op == "merge_attention" else None]:
            assert a.dtype == dtype
        if op == "merge_attention":
            assert case.arrays[1].dtype == np.float32
        assert all(a.dtype == dtype for a in call(case)[:1])
    assert seen == set(dtypes)


@pytest.mark.parametrize("op", ["max_pool", "adaptive_max_pool", "max_unpool"])
@pytest.mark.parametrize("values", ["distinct", "extreme", "normal"])
@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_some_ops_take_integers(op, values, dtype):
    found = draw(strategies.EVERY_OP[op](dtypes=[dtype], values=values), 40)
    assert {case.arrays[0].dtype for case in found} == {np.dtype(dtype)}
    assert {case.f(*case.arrays, **case.options).dtype for case in found} == {np.dtype(dtype)}
    if values == "extreme":
        assert {np.iinfo(dtype).min, np.iinfo(dtype).max} <= set(np.concatenate([c.arrays[0].ravel() for c in found]))


def numbers(op, **limits):
    """Return the numbers in all floating arrays of many cases, but for the -inf that mean something."""
    found = np.concatenate([a.ravel() for case in draw(strategies.EVERY_OP[op](**limits)) for a in floats(case)])
    return found if limits["values"] == "nonfinite" else found[found != -np.inf]


@each_kind_of_op
def test_integers_are_whole_and_small(op):
    assert set(numbers(op, values="integers")) == set(range(-4, 5))


@each_kind_of_op
def test_nonzero_values_are_far_from_zero(op):
    found = np.abs(numbers(op, values="nonzero"))
    assert 0.5 <= found.min() < found.max() <= 2


@each_kind_of_op
def test_nonfinite_values_are_drawn_where_they_are_asked_for(op):
    found = numbers(op, values="nonfinite")
    assert np.isnan(found).any()
    assert {np.inf, -np.inf} <= set(found[np.isinf(found)])
    assert np.isfinite(found).any()


@pytest.mark.parametrize("op", ["max_pool", "adaptive_max_pool"])
def test_maxima_have_no_ties_in_any_layout_or_dtype(op):
    for case in draw(strategies.EVERY_OP[op](layouts=strategies.LAYOUTS, dtypes=["float16"]), 100):
        planes = case.arrays[0].astype(np.float64).reshape(-1, int(np.prod(sizes_of(case))))
        assert (np.diff(np.sort(planes, axis=-1), axis=-1) >= 0.125).all()


def test_maxima_of_whole_numbers_tie():
    tied = 0
    for case in draw(strategies.max_pool(values="integers", options=(), batches=((),), kernels=(3, 2)), 100):
        x, kernel = case.arrays
        _, _, windows = oracles.window_elements(x.shape, kernel, kernel, 0, 1)
        held = [[x[place] for _, place in window] for window in windows.values()]
        tied += any(window.count(max(window)) > 1 for window in held)
    assert tied >= LEAST


def test_averages_of_whole_numbers_divide_exactly():
    for case in draw(strategies.avg_pool(values="integers")):
        out = 4 * case.f(*case.arrays, **case.options)
        assert (out == np.round(out)).all()


@pytest.mark.parametrize(("op", "dtype"), [*((op, "float64") for op in strategies.EVERY_OP), ("conv", "float16")])
def test_extreme_values_are_extreme_and_do_not_overflow(op, dtype):
    found = draw(strategies.EVERY_OP[op](values="extreme", dtypes=[dtype]))
    values = np.concatenate([a.ravel() for case in found for a in floats(case)])
    values = values[np.isfinite(values)]
    assert {0.0, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal} <= set(np.abs(values))
    assert np.signbit(values[values == 0]).any()
    assert values.max() >= (1e49 if dtype == "float64" else 8)
    assert not any(np.isnan(call(case)[0]).any() for case in found)


LAYOUTS = {
    "contiguous": lambda a: a.flags.c_contiguous and a.flags.writeable,
    "transposed": lambda a: a.flags.f_contiguous and not a.flags.c_contiguous,
    "strided": lambda a: min(a.strides) > 0 and a.base is not None and a.base.size > a.size,
    "reversed": lambda a: min(a.strides) < 0,
    "broadcast": lambda a: 0 in a.strides and not a.flags.writeable,
    "readonly": lambda a: a.flags.c_contiguous and not a.flags.writeable,
}


def in_layout(op, layouts, count):
    """Return all arrays of many cases in which the layouts differ; every case must be valid."""
    found = draw(strategies.EVERY_OP[op](layouts=layouts, values="normal"), count)
    for case in found[::3]:
        call(case)
    return [a for case in found for a in arrays(case) if sum(n > 1 for n in a.shape) > 1 and a.size]


@each_op
def test_layouts_may_be_several(op):
    found = in_layout(op, strategies.LAYOUTS, 150)
    for layout, rule in LAYOUTS.items():
        assert any(map(rule, found)), layout


@pytest.mark.parametrize("op", ["conv", "multi_head_attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_limit_the_layouts(op, layout):
    found = [a for a in in_layout(op, [layout], 50) if layout != "broadcast" or len(a) > 1]
    assert len(found) >= LEAST
    assert all(map(LAYOUTS[layout], found))


BAD = [
    ("conv", {"options": ["strides"]}, "options must be among stride, padding, .*, bias; got 'strides'"),
    ("conv", {"options": ["return_indices"]}, "options must be among .*; got 'return_indices'"),
    ("conv", {"values": "random"}, "values must be among normal, .*; got 'random'"),
    ("conv", {"layouts": ["c"]}, "layouts must be among contiguous, .*; got 'c'"),
    ("conv", {"layouts": []}, "layouts must have at least 1 entry; got none"),
    ("conv", {"dtypes": []}, "dtypes must have at least 1 entry; got none"),
    ("conv", {"dtypes": ["int64"]}, "dtypes must be float64, float32, float16 or bfloat16; got 'int64'"),
    ("conv", {"ranks": []}, "ranks must have at least 1 entry; got none"),
    ("conv", {"ranks": [0]}, "ranks must be ints of at least 1; got 0"),
    ("conv", {"sizes": [2, 0]}, "sizes must be ints of at least 1; got 0"),
    ("conv", {"sizes": [2.5]}, "sizes must be ints of at least 1; got 2.5"),
    ("conv", {"kernels": [True]}, "kernels must be ints of at least 1; got True"),
    ("conv", {"channels": [0]}, "channels must be ints of at least 1; got 0"),
    ("conv", {"batches": []}, "batches must have at least 1 entry; got none"),
    ("conv", {"batches": [(1, 2)]}, r"batches must have at most 1 dimension; got \(1, 2\)"),
    ("conv", {"kernels": [5, 4], "sizes": [3]}, r"kernels must hold one that fits into the .* size, 3; got \(5, 4\)"),
    ("max_pool", {"dtypes": ["bool"]}, "dtypes must be float64, float32, float16, bfloat16 or of integers; got 'bool'"),
    ("multi_head_attention", {"projections": ["all"]}, "projections must be among none, packed, separate; got 'all'"),
    ("multi_head_attention", {"batches": [None]}, "batches must be tuples; got None"),
    ("scaled_dot_product_attention", {"features": [0]}, "features must be ints of at least 1; got 0"),
    ("scaled_dot_product_attention", {"heads": [(3, 2)]}, r"heads must be pairs .* of the second; got \(3, 2\)"),
    ("attention_weights", {"options": ["dropout_mask"]}, "options must be among .*; got 'dropout_mask'"),
    ("merge_attention", {"parts": [-1]}, "parts must be ints of at least 0; got -1"),
    ("adaptive_avg_pool", {"outputs": []}, "outputs must have at least 1 entry; got none"),
    ("lp_pool", {"norm_types": []}, "norm_types must have at least 1 entry; got none"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "limits", "message"), BAD)
def test_bad_parameters_raise_at_once(op, limits, message):
    with pytest.raises(ValueError, match=rf"^strategies\.{op}: {message}$"):
        strategies.EVERY_OP[op](**limits)


@pytest.mark.parametrize("op", [op for op in strategies.EVERY_OP if options_of(op)])
def test_unknown_options_raise(op):
    with pytest.raises(ValueError, match=rf"^strategies\.{op}: options must be among .*; got 'no_such'$"):
        strategies.EVERY_OP[op](options=["no_such"])


def smallest(strategy, rule):
    """Return what Hypothesis shrinks a case to for which a rule holds."""
    quick = settings(max_examples=500, database=None, derandomize=True, deadline=None)
    return find(strategy, rule, settings=quick)


@each_op
def test_shrinks_to_the_smallest_call(op):
    # The very first case, the simplest, is positive: what is interesting at once is not shrunk.
    case = smallest(strategies.EVERY_OP[op](), lambda case: case.arrays[0].size > 0 and case.arrays[0].flat[0] < 0)
    assert max(a.size for a in case.arrays if isinstance(a, np.ndarray)) <= 2
    assert case.options.keys() <= {"num_heads"}


SMALLEST = [
    ("conv", "windows in padding alone", 4),
    ("conv", "several channels in each of several groups", 4),
    ("max_pool", "overhanging windows", 4),
    ("scaled_dot_product_attention", "queries that see nothing beside some that see", 4),
    ("multi_head_attention", "keys added beside a bias", 3),
    ("merge_attention", "an empty part beside a full one", 4),
]


@pytest.mark.parametrize(("op", "edge", "size"), SMALLEST)
def test_shrinks_to_a_small_case_at_an_edge(op, edge, size):
    case = smallest(strategies.EVERY_OP[op](), EDGES[op][edge])
    assert max(a.size for a in arrays(case)) <= size
    assert len(case.options.keys() - {"num_heads"}) <= 3


def test_cast_changes_floating_arrays_alone():
    case = next(c for c in cases("scaled_dot_product_attention") if {"bias", "mask", "key_lengths"} <= c.options.keys())
    cast = case.cast(np.float16)
    assert {a.dtype for a in (*cast.arrays, cast.options["bias"])} == {np.dtype(np.float16)}
    assert cast.options["mask"] is case.options["mask"]
    assert cast.options["key_lengths"] is case.options["key_lengths"]
    assert case.arrays[0].dtype == np.float64


def test_cast_keeps_logsumexps_in_float32():
    case = cases("merge_attention")[0]
    assert [a.dtype for a in case.cast(np.float16).arrays] == [np.float16, np.float32]
    assert [a.dtype for a in case.cast(np.float32).arrays] == [np.float32, np.float32]


def test_arrays_and_options_come_first():
    found, options = cases("conv")[0][:2]
    refimpl.conv(*found, **options)


def test_hypothesis_is_imported_by_this_module_alone():
    code = "import sys, refimpl.testing; print('hypothesis' in sys.modules); "
    code += "from refimpl.testing import strategies; print('hypothesis' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert printed.split() == ["False", "True"]


@given(data=st.data())
def test_lists_of_what_may_be_drawn(data):
    case = data.draw(
        strategies.conv(ranks=(2,), sizes=(9,), strides=(5,), channels=(1,), dilations=(4,), kernels=(1, 2))
    )
    assert np.atleast_1d(case.options.get("stride", 5)).tolist() in ([5], [5, 5])
    assert np.atleast_1d(case.options.get("dilation", 4)).tolist() in ([4], [4, 4])
    query, key, _ = data.draw(strategies.scaled_dot_product_attention(lengths=(2,), keys=(7, 8))).arrays
    assert query.shape[-2] == 2
    assert key.shape[-2] in (7, 8)


@given(data=st.data())
def test_a_case_has_a_gradient_of_its_result(data):
    case = data.draw(strategies.max_pool(dtypes=("float32",)))
    out = case.f(*case.arrays, **case.options)
    assert case.dout().shape == out.shape
    assert case.dout().dtype == np.float32
    assert not out.size or (case.dout() != case.dout(1)).any()
    assert case.f_backward(case.dout(), *case.arrays, **case.options).shape == case.arrays[0].shape


@given(
    strategies.scaled_dot_product_attention(
        options=("bias", "mask", "is_causal", "window", "scale"), exclusive=(("bias", "mask", "is_causal"),),
        windows=((7, 0), (None, 3)), scales=(0.125, 3.0),
    )
)  # fmt: skip
def test_options_that_exclude_each_other_and_their_values(case):
    assert sum(name in case.options for name in ("bias", "mask", "is_causal")) <= 1
    assert tuple(case.options.get("window", (7, 0))) in ((7, 0), (None, 3))
    assert case.options.get("scale", 3.0) in (0.125, 3.0)


@pytest.mark.parametrize(
    ("parameter", "value", "rule"),
    [
        ("exclusive", (("bias", "maks"),), "exclusive must be among"),
        ("windows", (), "windows must have at least 1 entry"),
        ("windows", ((1, -2),), r"left \+ right of at least 0"),
        ("windows", ((1,),), "windows must be pairs"),
        ("scales", (math.inf,), "scales must be finite"),
    ],
)
@pytest.mark.parametrize("op", ["scaled_dot_product_attention", "attention_weights", "multi_head_attention"])
def test_wrong_choices(op, parameter, value, rule):
    with pytest.raises(ValueError, match=rf"^strategies.{op}: .*{rule}"):
        strategies.EVERY_OP[op](**{parameter: value})
