"""float16 and bfloat16: computed in float32 and rounded once, at the end."""

import ml_dtypes
import numpy as np
import pytest
from samples import normal

import refimpl
from refimpl import scaled_dot_product_attention as attention
from refimpl import scaled_dot_product_attention_backward as attention_backward

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
each_half = pytest.mark.parametrize("half", HALVES, ids=lambda dtype: dtype.name)


@pytest.fixture
def holder(backend):
    """Every backend that has half types."""
    if backend.name == "array-api-strict":
        pytest.skip("array-api-strict has no half types")
    return backend


def positive(*shape, seed=0):
    """Return numbers from 1 to 2, of which no sum cancels."""
    return np.random.default_rng([seed, *shape]).uniform(1.0, 2.0, size=shape)


def calls(numbers):
    """Return `{name: (f, arrays, options, options of the backward alone)}`, with arrays from `numbers(*shape)`.

    What is float32 already stays so: logsumexps and their gradients.
    """
    x, indices = numbers(2, 4, 5, 6), np.random.default_rng(0).permutation(4 * 6).reshape(4, 6)[:2, :3]
    weight, bias = numbers(6, 2, 3, 2), numbers(6)
    mask = np.random.default_rng(1).random((2, 1, 5, 6)) < 0.7
    scores = {"bias": numbers(4, 5, 6), "mask": mask, "is_causal": True, "query_offset": 1, "sink": numbers(4)}
    scores |= {"softcap": 3.0, "key_lengths": np.array([6, 4]), "query_lengths": np.array([4, 5])}
    dropout = {"dropout_mask": np.random.default_rng(2).random((4, 5, 6)) < 0.7, "dropout_p": 0.25}
    query, key, value = numbers(2, 4, 5, 3), numbers(2, 2, 6, 3), numbers(1, 2, 6, 2)
    logsumexp = {"dlogsumexp": numbers(2, 4, 5).astype(np.float32)}
    zero = {"add_zero_attn": True}
    tokens = (numbers(2, 5, 8), numbers(2, 6, 8), numbers(2, 6, 8))
    packed = {"in_proj_weight": numbers(24, 8), "in_proj_bias": numbers(24), "bias_k": numbers(1, 1, 8)}
    packed |= {"bias_v": numbers(1, 1, 8), "out_proj.weight": numbers(8, 8), "out_proj.bias": numbers(8)}
    return {
        "conv": (refimpl.conv, (x, weight, bias), {"padding": 1, "stride": 2, "groups": 2}, {}),
        "conv reflect": (refimpl.conv, (x, weight), {"padding": 1, "groups": 2, "padding_mode": "reflect"}, {}),
        "conv_transpose": (refimpl.conv_transpose, (x, numbers(4, 3, 3, 2), bias), {"stride": 2, "groups": 2}, {}),
        "max_pool": (refimpl.max_pool, (x, 3), {"padding": 1, "stride": 2}, {}),
        "avg_pool": (refimpl.avg_pool, (x, 3), {"padding": 1, "stride": 2}, {}),
        "lp_pool": (refimpl.lp_pool, (x, 3, 3), {"padding": 1, "stride": 2}, {}),
        "adaptive_avg_pool": (refimpl.adaptive_avg_pool, (x, (3, 4)), {}, {}),
        "adaptive_max_pool": (refimpl.adaptive_max_pool, (x, (3, 4)), {}, {}),
        "max_unpool": (refimpl.max_unpool, (numbers(2, 3), indices, (2, 2)), {}, {}),
        "attention": (attention, (query, key, value), scores | dropout, logsumexp),
        "attention_weights": (refimpl.attention_weights, (query, key), scores, logsumexp),
        "heads": (refimpl.multi_head_attention, tokens, {"num_heads": 4} | scores | dropout, {}),
        "packed": (refimpl.multi_head_attention, (*tokens, packed), {"num_heads": 4, **zero} | scores, {}),
        "merge_attention": (
            refimpl.merge_attention,
            (numbers(3, 2, 5, 4), numbers(3, 2, 5).astype(np.float32)),
            {},
            {"dlogsumexp": numbers(2, 5).astype(np.float32)},
        ),
    }  # fmt: skip


EXTRA = {
    "max_pool": "return_indices", "adaptive_max_pool": "return_indices", "attention": "return_logsumexp",
    "attention_weights": "return_logsumexp", "heads": "need_weights", "packed": "need_weights",
}  # fmt: skip
CALLS, POSITIVE = calls(normal), calls(positive)
each_call = pytest.mark.parametrize("name", CALLS)


def cast(tree, **dtypes):
    """Return the tree with its arrays in other dtypes: `float64=half` makes half types of those that are float64."""
    if isinstance(tree, dict):
        return {key: cast(value, **dtypes) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(cast(value, **dtypes) for value in tree)
    if not isinstance(tree, np.ndarray) or tree.dtype.name not in dtypes:
        return tree
    with np.errstate(over="ignore"):
        return tree.astype(dtypes[tree.dtype.name])


def widened(tree, dtype=np.float32):
    return cast(tree, float16=dtype, bfloat16=dtype, float32=dtype)


def fetched(array):
    """Return a NumPy array; the guarded ones are NumPy's, whose DLPack has no bfloat16."""
    return np.asarray(array.view(np.ndarray)) if isinstance(array, np.ndarray) else refimpl.backend.to_numpy(array)


def flat(result):
    if isinstance(result, dict):
        result = tuple(result.values())
    return [item for part in result for item in flat(part)] if isinstance(result, tuple) else [result]


def backward(f):
    return getattr(refimpl, f"{f.__name__}_backward")


def both(name, dout, arrays, options, more):
    """Return all that the op and its backward give."""
    f, extra = CALLS[name][0], {EXTRA[name]: True} if name in EXTRA else {}
    return flat((f(*arrays, **options, **extra), backward(f)(dout, *arrays, **options, **more)))


@pytest.mark.slow_on_standins
@each_half
@each_call
def test_the_result_is_that_of_float32_rounded_once(holder, half, name):
    """Bit for bit, forward and backward; a logsumexp and its gradient are float32, and as they would be there."""
    f, *arguments = CALLS[name]
    arguments = cast(tuple(arguments), float64=half)
    out = flat(f(*arguments[0], **arguments[1]))[0]
    dout = normal(*out.shape).astype(half)
    with refimpl.backend.limits(tile_bytes=300):  # several tiles, whose sums are float32
        expected = both(name, *holder.arrays(widened((dout, *arguments))))
        actual = both(name, *holder.arrays((dout, *arguments)))
    kept = {"attention": [1], "attention_weights": [1], "merge_attention": [1, 3]}.get(name, [])
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None)
        if e is not None:
            a, due = fetched(a), fetched(e) if place in kept else cast(fetched(e), float32=half)
            assert a.dtype == due.dtype
            assert a.tobytes() == due.tobytes()


def unit(exact, half):
    """Return the distance between neighbours of a half type at these numbers."""
    return np.exp2(np.floor(np.log2(np.abs(exact))) - (10 if half == np.float16 else 7))


CANCELLING = ("dquery", "dkey", "dbias", "dsink", "dparams", "dlogsumexps")


@each_half
@each_call
def test_within_one_unit_of_the_exact_answer(half, name):
    """Of what does not cancel: every result of positive numbers, and the gradients that are sums of such."""
    f, *arguments = POSITIVE[name]
    arrays, options = cast(tuple(arguments[:2]), float64=half)
    dout = positive(*flat(f(*arrays, **options))[0].shape).astype(half)
    results = []
    for do, given, opts in ((dout, arrays, options), widened((dout, arrays, options), np.float64)):
        grads = backward(f)(do, *given, **opts)
        fields = grads._asdict() if hasattr(grads, "_fields") else {"dx": grads}
        kept = [
            grad
            for field, grad in fields.items()
            if grad is not None and not (field in CANCELLING and "attention" in f.__name__)
        ]
        results.append([flat(f(*given, **opts))[0], *kept])
    for actual, exact in zip(*results, strict=True):
        assert actual.dtype == half
        actual, zero = actual.astype(np.float64), exact == 0
        assert (actual[zero] == 0).all()
        assert (np.abs(actual - exact)[~zero] <= 0.51 * unit(exact[~zero], half)).all()


MANY = 100_000
SIXTEENTHS = np.full((1, 1, MANY), 2.0**-4)
LONG = {
    "avg_pool": (lambda ones: refimpl.avg_pool(ones, MANY), (np.ones((1, 1, MANY)),), 1.0),
    "adaptive_avg_pool": (lambda ones: refimpl.adaptive_avg_pool(ones, 1), (np.ones((1, 1, MANY)),), 1.0),
    "lp_pool": (lambda x: refimpl.lp_pool(x, 1, MANY), (SIXTEENTHS,), MANY / 16),
    "conv": (refimpl.conv, (np.ones((1, 1, MANY)), SIXTEENTHS), MANY / 16),
    "conv of channels": (refimpl.conv, (np.ones((1, MANY, 1)), SIXTEENTHS.reshape(1, MANY, 1)), MANY / 16),
    "dweight": (
        lambda dout, x: refimpl.conv_backward(dout, x, x[:, :, :1]).dweight,
        (SIXTEENTHS, np.ones((1, 1, MANY))),
        MANY / 16,
    ),
    "dbias of conv": (
        lambda dout, x, bias: refimpl.conv_backward(dout, x, x[:, :, :1], bias).dbias,
        (SIXTEENTHS, np.ones((1, 1, MANY)), np.ones(1)),
        MANY / 16,
    ),
    "values": (attention, (np.ones((1, 2)), np.ones((MANY, 2)), np.ones((MANY, 1))), 1.0),
    "dvalue": (
        lambda dout, query, key, value: attention_backward(dout, query, key, value).dvalue,
        (SIXTEENTHS.reshape(MANY, 1), np.ones((MANY, 2)), np.ones((1, 2)), np.ones((1, 1))),
        MANY / 16,
    ),
    "scores": (
        lambda query, key, value: attention(query, key, value, scale=1.0, return_logsumexp=True)[1],
        (np.ones((1, MANY)), SIXTEENTHS[0], np.ones((1, 1))),
        MANY / 16,
    ),
    "dbias of attention": (
        lambda dweights, query, key, bias: (
            refimpl.attention_weights_backward(dweights, query, key, bias=bias, sink=bias[0]).dbias
        ),
        (np.full((MANY, 1), 2.0**-3), np.ones((MANY, 1)), np.zeros((1, 1)), np.zeros((1, 1))),
        MANY / 32,
    ),
}


@each_half
@pytest.mark.parametrize("name", LONG)
def test_a_hundred_thousand_terms(half, name):
    """In a half type, adding 1 stops at 2048 or at 256."""
    f, arrays, expected = LONG[name]
    out = f(*cast(arrays, float64=half))
    due = np.full(out.shape, expected, np.float32).astype(out.dtype).astype(np.float64)
    np.testing.assert_allclose(out.astype(np.float64), due, rtol=1e-6 if out.dtype == np.float32 else 0.0)


LARGE = {
    "avg_pool": (lambda x: refimpl.avg_pool(x, 4), (np.full((1, 1, 4), 60000.0),), 60000.0),
    "adaptive_avg_pool": (lambda x: refimpl.adaptive_avg_pool(x, 1), (np.full((1, 1, 4), 60000.0),), 60000.0),
    "lp_pool": (lambda x: refimpl.lp_pool(x, 2, 2), (np.array([[[30000.0, 40000.0]]]),), 50000.0),
    "dx of lp_pool": (
        lambda x: refimpl.lp_pool_backward(x[..., :1], x, 2, 2)[..., :1],
        (np.array([[[30000.0, 40000.0]]]),),
        18000.0,
    ),
    "conv": (refimpl.conv, (np.array([[[6e4, 6e4, 6e4, 1.0]]]), np.array([[[1.0, 1.0, -2.0, 1.0]]])), 1.0),
    "conv_transpose": (
        refimpl.conv_transpose,
        (np.array([[[6e4], [6e4], [1.0]]]), np.array([[[2.0]], [[-2.0]], [[1.0]]])),
        1.0,
    ),
    "scores": (
        lambda query, key, value: attention(query, key, value, scale=2.0**-16),
        (np.array([[512.0]]), np.array([[512.0], [0.0]]), np.array([[2.0], [0.0]])),
        2 / (1 + np.exp(-4.0)),
    ),
    "projections": (
        lambda tokens, weight, out: refimpl.multi_head_attention(
            tokens, tokens, tokens, {"in_proj_weight": weight, "out_proj.weight": out}, num_heads=1, scale=0.0
        ),
        (np.array([[1024.0]]), np.full((3, 1), 1024.0), np.array([[2.0**-10]])),
        1024.0,
    ),
    "values": (attention, (np.ones((1, 1)), np.ones((4, 1)), np.full((4, 1), 60000.0)), 60000.0),
    "dropout": (
        lambda query, key, value, keep: attention(query, key, value, dropout_mask=keep > 0, dropout_p=0.75),
        (np.ones((1, 1)), np.ones((4, 1)), np.full((4, 1), 60000.0), np.array([[1.0, 0.0, 0.0, 0.0]])),
        60000.0,
    ),
}  # fmt: skip


@each_half
@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_on_the_way_does_not_overflow(half, name):
    """The result fits into float16, whose largest number is 65504."""
    f, arrays, expected = LARGE[name]
    arrays = cast(arrays, float64=half)
    exact = f(*widened(arrays, np.float64))
    np.testing.assert_allclose(exact, np.full(exact.shape, expected), rtol=1e-2)
    np.testing.assert_array_equal(widened(f(*arrays)), widened(exact.astype(half)))


def test_merging_of_large_outputs_does_not_overflow():
    outs, logsumexps = np.full((3, 1, 1), 60000.0, dtype=np.float16), np.zeros((3, 1), dtype=np.float32)
    out, logsumexp = refimpl.merge_attention(outs, logsumexps)
    assert out.tolist() == [[60000.0]]
    np.testing.assert_allclose(logsumexp, [np.log(3)], rtol=1e-6)


TOO_LARGE = {
    "conv": lambda big, two: refimpl.conv(big, two),
    "conv_transpose": lambda big, two: refimpl.conv_transpose(big, two),
    "dx of conv": lambda big, two: refimpl.conv_backward(big[..., :1], big, two).dx,
    "dweight of conv": lambda big, two: refimpl.conv_backward(big[..., :1], two, two).dweight,
    "avg_pool": lambda big, _: refimpl.avg_pool(big, 2, divisor_override=1),
    "dx of avg_pool": lambda big, _: refimpl.avg_pool_backward(
        big, big[..., [0, 0, 0]], 2, stride=1, divisor_override=1
    ),
    "lp_pool": lambda big, _: refimpl.lp_pool(big, 1, 2),
    "dvalue": lambda big, two: attention_backward(big[0].T, two[0].T, two[0, :, :1], two[0, :, :1]).dvalue,
    "out_proj": lambda big, two: refimpl.multi_head_attention(
        *[big[0, :, :1]] * 3,
        {"in_proj_weight": np.ones((3, 1), big.dtype), "out_proj.weight": two[0, :, :1]},
        num_heads=1,
        scale=0.0,
    ),
}


@each_half
@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_result_that_does_not_fit_is_infinite_and_no_warning(half, name):
    """pytest turns warnings into errors, and so would NumPy here."""
    big = np.full((1, 1, 2), float(ml_dtypes.finfo(half).max)).astype(half)
    with np.errstate(all="raise"):
        result = TOO_LARGE[name](big, np.full((1, 1, 2), 2.0).astype(half))
    assert result.dtype == half
    assert np.isposinf(widened(result)).any()
    assert not np.isnan(widened(result)).any()


@pytest.mark.slow_on_standins
@each_half
@pytest.mark.parametrize("f", [refimpl.max_pool, refimpl.adaptive_max_pool])
def test_maxima_are_exact(holder, half, f):
    """Of all that a half type can hold: every number that there is, among them NaN and the infinities."""
    x = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).view(half)[None, None]
    size = 5 if f is refimpl.max_pool else 900
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float32)
        if holder.flushes_subnormals:  # those of float16 are normal numbers of float32
            x = np.where(np.abs(wide) < np.finfo(np.float32).tiny, np.zeros((), half), x)
            wide = x.astype(np.float32)
    out, indices = f(holder.array(x), size, return_indices=True)
    expected, due = f(wide, size, return_indices=True)
    out = fetched(out)
    assert out.dtype == half
    np.testing.assert_array_equal(fetched(indices), due)
    np.testing.assert_array_equal(out.astype(np.float32), expected)


@each_half
def test_unpooling_is_exact(holder, half):
    x = np.arange(1 << 16).astype(np.uint16).view(half)[None, None]
    at = np.random.default_rng(0).permutation(2 << 16)[: 1 << 16][None, None]
    out = fetched(refimpl.max_unpool(*holder.arrays((x, at)), 2))
    np.testing.assert_array_equal(out[0, 0, at[0, 0]].astype(np.float32), x[0, 0].astype(np.float32))
    assert np.count_nonzero(np.isnan(out.astype(np.float32))) == np.count_nonzero(np.isnan(x.astype(np.float32)))


@each_half
@pytest.mark.parametrize("tile_bytes", [1, 500, 1 << 22])
def test_sums_over_tiles_are_rounded_once(half, tile_bytes):
    """Whole numbers, whose sums float32 holds, so that a rounding after each tile would show."""
    dout, x = (np.random.default_rng(seed).integers(1, 8, size=(64, 2, 9)) for seed in (0, 1))
    with refimpl.backend.limits(tile_bytes=tile_bytes):
        grads = refimpl.conv_backward(dout[..., :7].astype(half), x.astype(half), np.ones((2, 2, 3), dtype=half))
    dweight = np.array(
        [[[np.sum(dout[:, j, :7] * x[:, i, k : k + 7]) for k in range(3)] for i in range(2)] for j in range(2)]
    )
    assert (dweight.astype(half) != dweight).any()
    np.testing.assert_array_equal(grads.dweight, dweight.astype(half))


@each_half
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hidden_pairs_never_matter(holder, half, value):
    mask = np.random.default_rng(0).random((3, 5)) < 0.6
    mask[1], mask[:, 2] = False, False
    results = []
    for hidden in (0.0, value):
        query, key, values, dout = (normal(2, n, 4) for n in (3, 5, 5, 3))
        query[:, 1], dout[:, 1], key[:, 2], values[:, 2] = (hidden,) * 4
        dout, *arrays = holder.arrays(cast((dout, query, key, values), float64=half))
        options = {"mask": holder.array(mask)}
        result = (attention(*arrays, **options), *attention_backward(dout, *arrays, **options)[:3])
        results.append([fetched(array) for array in result])
    for clean, dirty in zip(*results, strict=True):
        assert np.isfinite(dirty.astype(np.float32)).all()
        assert dirty.tobytes() == clean.tobytes()


@each_half
@pytest.mark.parametrize("name", [name for name in CALLS if "conv" in name or "_pool" in name])
def test_an_empty_batch_keeps_its_type(half, name):
    f, (x, *rest), options, _ = cast(CALLS[name], float64=half)
    out = f(x[:0], *rest, **options)
    assert out.dtype == half
    assert all(grad.dtype == half for grad in flat(backward(f)(out, x[:0], *rest, **options)) if grad is not None)


@each_half
def test_no_keys_in_a_half_type(half):
    query, key, sink = np.ones((2, 3, 4), dtype=half), np.ones((2, 0, 4), dtype=half), np.array([0.5, -2.0], dtype=half)
    out, logsumexp = attention(query, key, key, sink=sink, return_logsumexp=True)
    assert out.dtype == half
    assert logsumexp.dtype == np.float32
    np.testing.assert_array_equal(logsumexp, [[0.5] * 3, [-2.0] * 3])


@each_half
def test_half_types_do_not_mix(half):
    """With each other, or with float32, but for logsumexps, which are float32 and nothing else."""
    x, dout = np.ones((2, 3, 4), dtype=half), np.ones((2, 3, 4), dtype=half)
    for other in (np.float32, HALVES[1 - HALVES.index(half)]):
        with pytest.raises(TypeError, match=r"^conv: weight must be of the same dtype"):
            refimpl.conv(x, np.ones((2, 3, 2), dtype=other))
        with pytest.raises(TypeError, match=r"^scaled_dot_product_attention: sink must be of the same dtype"):
            attention(x, x, x, sink=np.ones(2, dtype=other))
    with pytest.raises(TypeError, match=r"^scaled_dot_product_attention_backward: dlogsumexp must .*float32"):
        attention_backward(dout, x, x, x, dlogsumexp=np.ones((2, 3), dtype=half))
    with pytest.raises(TypeError, match=r"^merge_attention: logsumexps must .*float32"):
        refimpl.merge_attention(x, np.ones((2, 3), dtype=half))
