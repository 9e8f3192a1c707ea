"""The edges of each op, as rules of a case: `EDGES[op][name](case)` says whether the case lies there."""

import functools
from typing import Any, NamedTuple

import numpy as np
import oracles

import refimpl


class Identity(NamedTuple):
    """A case that is equal to itself alone, to be remembered."""

    case: Any

    def __hash__(self):
        return id(self.case)

    def __eq__(self, other):
        return self.case is other.case


def remembered(function):
    """Remember what a function says of a case while its rules are asked one after the other."""
    remember = functools.lru_cache(maxsize=2)(lambda key: function(key.case))
    return functools.wraps(function)(lambda case: remember(Identity(case)))


def has(name, rule=lambda _: True):
    """Whether an option is given, and keeps to a rule."""
    return lambda case: case.options.get(name) is not None and bool(rule(case.options[name]))


def is_a(name, kind):
    return has(name, lambda value: isinstance(value, kind))


def every(*rules):
    return lambda case: all(rule(case) for rule in rules)


def each(value, count):
    return (value,) * count if value is None or isinstance(value, int) else tuple(value)


class Axis(NamedTuple):
    """What happens along one spatial dimension."""

    n: int
    k: int = 1
    s: int = 1
    d: int = 1
    low: int = 0
    high: int = 0
    out: int = 0
    places: tuple = ()
    """Of each window, what it reads; with transposed convolution, of each element, where it lands."""
    default: int = 0
    """What `out` is without any option that sets it."""

    @property
    def read(self):
        """How many elements each window holds."""
        return [sum(0 <= i < self.n for i in window) for window in self.places]

    @property
    def reached(self):
        """Which places of the result of a transposed convolution an element lands on."""
        return {i for window in self.places for i in window if 0 <= i < self.out}

    @property
    def overhangs(self):
        return any(max(window) >= self.n + self.high for window in self.places)


def kernel_of(case):
    if case.f in (refimpl.conv, refimpl.conv_transpose):
        return case.arrays[1].shape[2:]
    return each(case.arrays[-1], case.arrays[0].ndim - 2)


def sizes_of(case):
    return case.arrays[0].shape[case.arrays[0].ndim - len(kernel_of(case)) :]


@remembered
def axes(case):
    """Return the `Axis` of each spatial dimension."""
    kernel, sizes = kernel_of(case), sizes_of(case)
    if case.f in (refimpl.adaptive_avg_pool, refimpl.adaptive_max_pool):
        return [Axis(n, out=out) for n, out in zip(sizes, kernel, strict=True)]
    o, count = case.options, len(kernel)
    convolves = case.f in (refimpl.conv, refimpl.conv_transpose)
    stride = each((1 if convolves else kernel) if o.get("stride") is None else o["stride"], count)
    dilation, padding = each(o.get("dilation", 1), count), o.get("padding", 0)
    paddings = each(padding, count) if not isinstance(padding, str) else [padding] * count
    results = case.f(*case.arrays, **o).shape[-count:]
    describe = {refimpl.conv_transpose: transposed, refimpl.max_unpool: unpooled}.get(case.f, sliding)
    return [describe(o, *along) for along in zip(sizes, kernel, stride, dilation, paddings, results, strict=True)]


def sliding(options, n, k, s, d, padding, out):
    entry = padding if isinstance(padding, str | int) else [padding]
    _, [(low, high)], elements = oracles.window_elements([n], [k], [s], entry, [d], options.get("ceil_mode", False))
    places = tuple({i for _, (i,) in window} for window in elements.values())
    return Axis(n, k, s, d, low, high, out, places)


def transposed(_, n, k, s, d, padding, out):
    full = (n - 1) * s + d * (k - 1) + 1
    low, high = crop(padding, full - n * s)
    places = tuple({i * s + tap * d - low for tap in range(k)} for i in range(n))
    return Axis(n, k, s, d, low, high, out, places, default=full - low - high)


def unpooled(_, n, k, s, d, padding, out):
    low, high = crop(padding, (n - 1) * s + k - n * s)
    return Axis(n, k, s, d, low, high, out, default=(n - 1) * s + k - low - high)


def crop(padding, excess):
    if isinstance(padding, int):
        return padding, padding
    few, many = max(0, excess) // 2, max(0, excess + 1) // 2
    return {"valid": (0, 0), "same": (few, many), "same_lower": (many, few)}.get(padding, padding)


def some(rule):
    """Turn a rule of an axis into one of a case: whether it holds along any."""
    return lambda case: any(map(rule, axes(case)))


def unequal(field):
    return lambda case: len({getattr(w, field) for w in axes(case)}) > 1


padded = some(lambda w: w.low or w.high)


def odd_excess(word):
    return every(has("padding", lambda p: p == word), some(lambda w: w.low != w.high))


def mode(name, rule=lambda w: w.low or w.high):
    return every(lambda case: case.options.get("padding_mode", "zeros") == name, some(rule))


def given_as(name, value):
    return has(name, lambda given: type(given) is type(value) and given == value)


FORMS = {
    "padding as an int": is_a("padding", int),
    "padding as a tuple": is_a("padding", tuple),
    "padding as a list": is_a("padding", list),
    "padding as ints": has("padding", lambda p: isinstance(p, tuple | list) and any(isinstance(e, int) for e in p)),
    "valid": given_as("padding", "valid"),
    "same with an odd excess": odd_excess("same"),
    "same_lower with an odd excess": odd_excess("same_lower"),
    "stride as an int": is_a("stride", int),
    "stride as a tuple": is_a("stride", tuple),
    "stride as a list": is_a("stride", list),
}

GEOMETRY = {
    "size 1": some(lambda w: w.n == 1),
    "nothing but size 1": lambda case: {w.n for w in axes(case)} == {1},
    "unequal sizes": unequal("n"),
    "unequal kernel": unequal("k"),
    "unequal strides": unequal("s"),
    "stride > kernel": some(lambda w: w.s > w.k),
    "stride > size": some(lambda w: w.s > w.n),
    "stride < kernel": some(lambda w: w.s < w.k),
    "asymmetric pads": some(lambda w: w.low != w.high),
    **{f"{rank} dimensions": lambda case, rank=rank: len(kernel_of(case)) == rank for rank in (1, 2, 3)},
}

WINDOWS = {
    **FORMS,
    **GEOMETRY,
    "kernel of the size of x": some(lambda w: w.k == w.n > 1),
    "kernel > size": some(lambda w: w.k > w.n),
    "elements that nothing reads": some(lambda w: not set(range(w.n)) <= set().union(*w.places)),
    "dilation > 1": some(lambda w: w.d > 1 and w.k > 1),
    "dilation > size": some(lambda w: w.d > w.n and w.k > 1),
    "dilation as an int": is_a("dilation", int),
    "dilation as a tuple": is_a("dilation", tuple),
    "low pad alone": some(lambda w: w.low > w.high == 0),
    "high pad alone": some(lambda w: w.high > w.low == 0),
    "same with a stride": every(given_as("padding", "same"), some(lambda w: w.s > 1)),
}

CONVOLUTIONS = {
    "several channels in each of several groups": every(
        has("groups", lambda n: n > 1), lambda case: case.arrays[1].shape[1] > 1
    ),
    "no batch": lambda case: case.arrays[0].ndim < case.arrays[1].ndim,
    "empty batch": lambda case: 0 in case.arrays[0].shape,
    "several in a batch": lambda case: case.arrays[0].ndim == case.arrays[1].ndim and len(case.arrays[0]) > 1,
    "bias": lambda case: case.arrays[2] is not None,
    "no bias": lambda case: case.arrays[2] is None,
}

CONV = {
    **WINDOWS,
    **CONVOLUTIONS,
    "one channel in each of several groups": every(
        has("groups", lambda n: n > 1), lambda case: case.arrays[1].shape[1] == 1
    ),
    "windows in padding alone": some(lambda w: 0 in w.read),
    "padding > size": some(lambda w: max(w.low, w.high) > w.n),
    **{f"{name} padding": mode(name) for name in ("zeros", "reflect", "replicate", "circular")},
    "reflect, as far as it goes": mode("reflect", lambda w: max(w.low, w.high) == w.n - 1 > 0),
    "circular, as far as it goes": mode("circular", lambda w: max(w.low, w.high) == w.n),
    "replicate beyond the size": mode("replicate", lambda w: max(w.low, w.high) > w.n),
    "same with other values than zeros": every(
        given_as("padding", "same"), padded, has("padding_mode", lambda name: name != "zeros")
    ),
}

CONV_TRANSPOSE = {
    **FORMS,
    **GEOMETRY,
    **CONVOLUTIONS,
    "dilation > 1": some(lambda w: w.d > 1 and w.k > 1),
    "output padding": every(has("output_padding"), some(lambda w: w.out > w.default)),
    "output padding >= stride": every(has("output_padding"), some(lambda w: w.out - w.default >= w.s)),
    "output padding without which nothing is left": every(has("output_padding"), some(lambda w: w.default < 1)),
    "output size": has("output_size"),
    "output size as a list": is_a("output_size", list),
    "results that nothing reaches, between others": some(lambda w: len(w.reached) < max(w.reached, default=-1) + 1),
    "results that nothing reaches, at the end": some(lambda w: w.out - 1 > max(w.reached, default=-1)),
    "same that extends": every(given_as("padding", "same"), some(lambda w: w.out - 1 > max(w.reached, default=-1))),
    "elements that are cropped away": some(lambda w: any(not window & set(range(w.out)) for window in w.places)),
}

PLANES = {
    "a tuple says how many dimensions are spatial": lambda case: isinstance(case.arrays[-1], tuple),
    "a list says how many dimensions are spatial": lambda case: isinstance(case.arrays[-1], list),
    "an int says that all but two are": lambda case: isinstance(case.arrays[-1], int),
    "empty": lambda case: 0 in case.arrays[0].shape,
    **{
        f"{n} leading dimensions": lambda case, n=n: case.arrays[0].ndim - len(kernel_of(case)) == n
        for n in (0, 1, 2, 3)
    },
}

POOL = {
    **WINDOWS,
    **PLANES,
    "stride None": lambda case: "stride" in case.options and case.options["stride"] is None,
    "ceil_mode": has("ceil_mode", bool),
    "overhanging windows": some(lambda w: w.overhangs),
    "overhanging windows, and padding": every(some(lambda w: w.overhangs), padded),
    "ceil_mode that drops a window": every(
        has("ceil_mode", bool),
        lambda case: case.options.get("padding") not in ("same", "same_lower"),
        some(lambda w: w.out < -(-(w.n + w.low + w.high - w.d * (w.k - 1) - 1) // w.s) + 1),
    ),
    "windows with one element of many": some(lambda w: w.k > 1 and 1 in w.read),
    "dilation beside padding": some(lambda w: w.d > 1 and w.k > 1 and w.low + w.high > 0),
}

AVG_POOL = {
    **POOL,
    "count_include_pad": every(given_as("count_include_pad", True), padded),
    "count_include_pad=False": every(given_as("count_include_pad", False), padded),
    "overhang, of which padding counts": every(
        POOL["overhanging windows, and padding"], lambda case: case.options.get("count_include_pad", True)
    ),
    "divisor_override > 0": has("divisor_override", lambda n: n > 0),
    "divisor_override < 0": has("divisor_override", lambda n: n < 0),
}

LP_POOL = {
    **POOL,
    "p < 1": lambda case: case.arrays[1] < 1,
    "p = 1": lambda case: case.arrays[1] == 1,
    "p = 2": lambda case: case.arrays[1] == 2,
    "p > 2": lambda case: case.arrays[1] > 2,
    "p not whole": lambda case: case.arrays[1] % 1 > 0,
}

ADAPTIVE = {
    **PLANES,
    "size 1": some(lambda w: w.n == 1),
    "one window": some(lambda w: w.out == 1 < w.n),
    "as many windows as elements": some(lambda w: w.out == w.n > 1),
    "more windows than elements": some(lambda w: w.out is not None and w.out > w.n),
    "twice as many windows as elements": some(lambda w: w.out is not None and w.out >= 2 * w.n),
    "windows of unequal sizes": some(lambda w: w.out is not None and w.out < w.n and w.n % w.out),
    "None": some(lambda w: w.out is None),
    **{f"{rank} dimensions": lambda case, rank=rank: len(kernel_of(case)) == rank for rank in (1, 2, 3)},
}


def repeats(case):
    """Return how often the indices of a plane repeat themselves, at most."""
    rows = case.arrays[1].reshape(-1, int(np.prod(sizes_of(case))))
    return max((int(np.unique(row, return_counts=True)[1].max()) for row in rows), default=0)


MAX_UNPOOL = {
    **FORMS,
    **GEOMETRY,
    **PLANES,
    "stride None": POOL["stride None"],
    "output below the default": every(has("output_size"), some(lambda w: w.out < w.default)),
    "output above the default": every(has("output_size"), some(lambda w: w.out > w.default)),
    "output of 1": some(lambda w: w.out == 1),
    "repeated indices": lambda case: repeats(case) > 1,
    "indices without repetition": lambda case: case.arrays[0].size > 1 and repeats(case) == 1,
    "int32 indices": lambda case: case.arrays[1].dtype == np.int32,
    "int64 indices": lambda case: case.arrays[1].dtype == np.int64,
}


class Scores(NamedTuple):
    """What an attention case scores."""

    rows: int
    keys: int
    batch: tuple
    visible: np.ndarray

    @property
    def seen(self):
        """How many keys each query sees."""
        return self.visible.sum(axis=-1)


@remembered
def scores(case):
    query, key = case.arrays[:2]
    if case.f is refimpl.multi_head_attention:
        batch = np.broadcast_shapes(*(array.shape[:-2] for array in case.arrays[:3]))
        shape = (*batch, case.options["num_heads"], query.shape[-2], key.shape[-2])
    else:
        shape = oracles.scores_of(*case.arrays)
        shape = shape if query.ndim > 2 else (1, *shape)
    return Scores(shape[-2], shape[-1], shape[:-3], oracles.visible_pairs(shape, case.options))


def scoring(rule):
    """Turn a rule of scores into one of a case."""
    return lambda case: bool(rule(scores(case)))


def beside(name, field, rule):
    """Whether an option keeps to a rule beside the number of rows or keys."""
    return lambda case: name in case.options and bool(np.any(rule(case.options[name], getattr(scores(case), field))))


def smaller(name):
    """Whether an option leaves something to broadcasting."""
    return has(name, lambda array: array.ndim < 3 or 1 in array.shape)


def broadcasts(number):
    """Whether an array leaves batch dimensions to broadcasting."""
    return lambda case: case.arrays[number].shape[: len(scores(case).batch)] != scores(case).batch


causal = has("is_causal", bool)
minus_inf = has("bias", lambda array: np.isneginf(array).any())
hidden = scoring(lambda s: s.keys > 0 and 0 in s.seen)
moved = has("query_offset", lambda o: isinstance(o, str) or np.any(o))

VISIBILITY = {
    "one query": scoring(lambda s: s.rows == 1),
    "one key": scoring(lambda s: s.keys == 1),
    "no queries": scoring(lambda s: s.rows == 0),
    "no keys": scoring(lambda s: s.keys == 0),
    "no queries, no keys": scoring(lambda s: s.rows == s.keys == 0),
    "more queries than keys": scoring(lambda s: s.rows > s.keys > 0),
    "more keys than queries": scoring(lambda s: s.keys > s.rows > 0),
    "no batch dimensions": scoring(lambda s: s.batch == ()),
    "two batch dimensions": scoring(lambda s: len(s.batch) == 2),
    "empty batch": scoring(lambda s: 0 in s.batch),
    "query that broadcasts": broadcasts(0),
    "key that broadcasts": broadcasts(1),
    "everything visible": scoring(lambda s: s.visible.size and s.visible.all()),
    "nothing visible": scoring(lambda s: s.visible.size and not s.visible.any()),
    "queries that see nothing": hidden,
    "queries that see nothing beside some that see": every(hidden, scoring(lambda s: s.visible.any())),
    "queries that see one key of many": scoring(lambda s: s.keys > 1 and 1 in s.seen),
    "bias": has("bias", lambda array: np.isfinite(array).all()),
    "bias with -inf": minus_inf,
    "bias that broadcasts": smaller("bias"),
    "bias of no dimensions": has("bias", lambda array: array.ndim == 0),
    "mask": has("mask", lambda array: array.any() and not array.all()),
    "mask that hides all": has("mask", lambda array: array.size and not array.any()),
    "mask that broadcasts": smaller("mask"),
    "causal": causal,
    "causal, more queries than keys": every(causal, scoring(lambda s: s.rows > s.keys > 0)),
    "causal, more keys than queries": every(causal, scoring(lambda s: s.keys > s.rows > 0)),
    "causal and a window": every(causal, has("window")),
    "causal and a bias with -inf": every(causal, minus_inf),
    "causal with an offset": every(causal, moved),
    "window": has("window", lambda w: None not in w),
    "window, left alone": has("window", lambda w: w[0] is not None and w[1] is None),
    "window, right alone": has("window", lambda w: w[0] is None and w[1] is not None),
    "window without bounds": has("window", lambda w: tuple(w) == (None, None)),
    "window of one key": has("window", lambda w: tuple(w) == (0, 0)),
    "window with an offset": every(has("window"), moved),
    "offset < 0": has("query_offset", lambda o: isinstance(o, int) and o < 0),
    "offset > 0": has("query_offset", lambda o: isinstance(o, int) and o > 0),
    "aligned at the ends": has("query_offset", lambda o: isinstance(o, str)),
    "window without the own token": has("window", lambda w: any(side is not None and side < 0 for side in w)),
    "offset for each batch entry": has("query_offset", lambda o: np.unique(o).size > 1),
    "some queries are padding": beside("query_lengths", "rows", lambda n, size: (n > 0) & (n < size)),
    "all queries are padding": beside("query_lengths", "rows", lambda n, size: (n == 0) & (size > 0)),
    "no query is padding": beside("query_lengths", "rows", lambda n, size: (n == size) & (size > 0)),
    "some keys are padding": beside("key_lengths", "keys", lambda n, size: (n > 0) & (n < size)),
    "all keys are padding": beside("key_lengths", "keys", lambda n, size: (n == 0) & (size > 0)),
    "no key is padding": beside("key_lengths", "keys", lambda n, size: (n == size) & (size > 0)),
    "both lengths": every(has("query_lengths"), has("key_lengths")),
    "int32 lengths": has("key_lengths", lambda array: array.dtype == np.int32),
    "scale > 0": has("scale", lambda s: s > 0),
    "scale < 0": has("scale", lambda s: s < 0),
    "scale 0": has("scale", lambda s: s == 0),
    "softcap": has("softcap"),
    "softcap and a bias": every(has("softcap"), has("bias")),
    "sink": has("sink"),
    "sink, and queries that see nothing": every(has("sink"), hidden),
    "sink without keys": every(has("sink"), scoring(lambda s: s.keys == 0)),
    "no options": lambda case: not case.options.keys() - {"num_heads"},
    "four options and more": lambda case: len(case.options.keys() - {"num_heads", "num_kv_heads"}) >= 4,
}

DROPOUT = {
    "dropout": every(
        has("dropout_p", lambda p: p > 0), has("dropout_mask", lambda array: array.any() and not array.all())
    ),
    "dropout_mask alone": lambda case: "dropout_mask" in case.options and "dropout_p" not in case.options,
    "all dropped": has("dropout_mask", lambda array: array.size and not array.any()),
    "all kept, and enlarged": every(has("dropout_mask", np.all), has("dropout_p", lambda p: p > 0)),
    "dropout_mask that broadcasts": smaller("dropout_mask"),
    "dropout, and queries that see nothing": every(has("dropout_mask"), hidden),
}


def heads(rule):
    """Turn a rule of the heads of query and key into one of a case."""
    return lambda case: case.arrays[0].ndim > 2 and rule(case.arrays[0].shape[-3], case.arrays[1].shape[-3])


ATTENTION_WEIGHTS = {
    **VISIBILITY,
    "one head": heads(lambda q, k: q == k == 1),
    "several heads": heads(lambda q, k: q == k > 1),
    "grouped heads": heads(lambda q, k: q > k > 1),
    "many heads on one": heads(lambda q, k: q > k == 1),
    "no heads": lambda case: case.arrays[0].ndim == case.arrays[1].ndim == 2,
}

ATTENTION = {
    **ATTENTION_WEIGHTS,
    **DROPOUT,
    "value that broadcasts": broadcasts(2),
    "value of another width": lambda case: case.arrays[2].shape[-1] != case.arrays[0].shape[-1],
    "value of no width": lambda case: case.arrays[2].shape[-1] == 0,
}

PARTS = {"in_proj_bias", "bias_k", "out_proj.bias"}


def params(case):
    return case.arrays[3] or {}


def added(case):
    """Return how many keys are added."""
    return ("bias_k" in params(case)) + bool(case.options.get("add_zero_attn"))


def projections(*names):
    return lambda case: params(case).keys() >= set(names)


def grouped(case):
    return case.options.get("num_kv_heads", case.options["num_heads"]) < case.options["num_heads"]


def unprojected(case):
    return case.arrays[3] is None


MULTI_HEAD = {
    **VISIBILITY,
    **DROPOUT,
    "no projections": unprojected,
    "packed projections": projections("in_proj_weight"),
    "packed projections with every bias": projections("in_proj_weight", *PARTS, "bias_v"),
    "separate projections": projections("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    "separate projections with every bias": projections("q_proj_weight", *PARTS, "bias_v"),
    "separate projections without bias": every(projections("q_proj_weight"), lambda case: len(params(case)) == 4),
    **{f"{part} alone": lambda case, part=part: params(case).keys() & PARTS == {part} for part in sorted(PARTS)},
    "widths that all differ": lambda case: len({array.shape[-1] for array in case.arrays[:3]}) == 3,
    "a result of another width": every(
        projections("out_proj.weight"), lambda case: len(params(case)["out_proj.weight"]) != case.arrays[0].shape[-1]
    ),
    "one head": has("num_heads", lambda n: n == 1),
    "several heads": has("num_heads", lambda n: n > 1),
    "num_kv_heads that change nothing": every(has("num_kv_heads"), lambda case: not grouped(case)),
    "grouped heads without projections": every(unprojected, grouped),
    "grouped heads with projections": every(projections("q_proj_weight"), grouped),
    "grouped heads and bias_k": every(projections("bias_k"), grouped),
    "zeros added": lambda case: bool(case.options.get("add_zero_attn")),
    "zeros added without projections": every(unprojected, added),
    "bias_k and zeros added": lambda case: added(case) == 2,
    "keys added to none": every(added, scoring(lambda s: s.keys == 0)),
    "keys added for queries that see nothing else": every(added, hidden),
    "keys added beside a bias": every(added, has("bias")),
    "keys added beside a mask": every(added, has("mask")),
    "keys added, and queries that are padding": every(added, VISIBILITY["some queries are padding"]),
    "dropout of added keys": every(added, has("dropout_mask")),
}


def empty_parts(case):
    return np.isneginf(case.arrays[1])


MERGE = {
    "no parts": lambda case: len(case.arrays[0]) == 0,
    "one part": lambda case: len(case.arrays[0]) == 1,
    "several parts": lambda case: len(case.arrays[0]) > 2,
    "an empty part beside a full one": lambda case: (
        empty_parts(case).any(axis=0) & ~empty_parts(case).all(axis=0)
    ).any(),
    "nothing but empty parts": lambda case: len(case.arrays[0]) > 0 and empty_parts(case).all(axis=0).any(),
    "no empty part": lambda case: case.arrays[1].size > 0 and not empty_parts(case).any(),
    "no queries": lambda case: case.arrays[1].shape[-1] == 0,
    "no width": lambda case: case.arrays[0].shape[-1] == 0,
    "empty batch": lambda case: 0 in case.arrays[1].shape[1:-1],
    "no batch dimensions": lambda case: case.arrays[1].ndim == 2,
    "two batch dimensions": lambda case: case.arrays[1].ndim == 4,
}

EDGES = {
    "conv": CONV,
    "conv_transpose": CONV_TRANSPOSE,
    "max_pool": POOL,
    "avg_pool": AVG_POOL,
    "lp_pool": LP_POOL,
    "adaptive_avg_pool": ADAPTIVE,
    "adaptive_max_pool": ADAPTIVE,
    "max_unpool": MAX_UNPOOL,
    "scaled_dot_product_attention": ATTENTION,
    "attention_weights": ATTENTION_WEIGHTS,
    "multi_head_attention": MULTI_HEAD,
    "merge_attention": MERGE,
}
