"""Hypothesis strategies for valid calls of every op: NumPy arrays and options, edge geometry included."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from oracles import window_elements

import refimpl


class Case(NamedTuple):
    """A call of an op, all its arrays of NumPy."""

    f: Callable[..., Any]
    f_backward: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: dict[str, Any]

    def cast(self, dtype):
        """Return the case with all floating arrays of this dtype."""
        return self._replace(arrays=_cast(self.arrays, dtype), options=_cast(self.options, dtype))


def _cast(tree, dtype):
    if isinstance(tree, dict):
        return {key: _cast(value, dtype) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_cast(value, dtype) for value in tree)
    return tree.astype(dtype) if isinstance(tree, np.ndarray) and tree.dtype.kind == "f" else tree


def ramp(*shape):
    """Return whole numbers without a pattern that a mistake could hide in."""
    return ((np.arange(int(np.prod(shape))) * 7 + 3) % 11 - 5).reshape(shape).astype(float)


def normal(*shape, seed=0):
    """Return normal numbers, others for each shape and seed."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)


@st.composite
def values(draw, shape, kind):
    """Draw an array: `integers` (sums are exact), `normal`, or `distinct` (no two closer than 0.1)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if kind == "integers":
        return rng.integers(-4, 5, size=shape).astype(np.float64)
    if kind == "distinct":
        size = int(np.prod(shape))
        return 0.1 * (rng.permutation(size) - size // 2).reshape(shape).astype(np.float64)
    return rng.normal(size=shape)


def _per_dimension(draw, count, low, high):
    """Draw an int, or a tuple or list of them."""
    if draw(st.booleans()):
        return draw(st.integers(low, high))
    entries = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    return tuple(entries) if draw(st.booleans()) else entries


def _padding(draw, count, high):
    if draw(st.booleans()):
        return draw(st.sampled_from(["valid", "same", "same_lower"]))
    pairs = st.tuples(st.integers(0, high), st.integers(0, high))
    entry = st.one_of(st.integers(0, high), pairs)
    return draw(st.one_of(st.integers(0, high), st.lists(entry, min_size=count, max_size=count)))


def _sizes(draw, count):
    return tuple(draw(st.lists(st.integers(1, 7 if count < 3 else 4), min_size=count, max_size=count)))


def _batch(draw):
    return draw(st.sampled_from([(), (1,), (2,), (0,)]))


@st.composite
def conv(draw, kind="normal"):
    """Draw a convolution."""
    count = draw(st.integers(1, 3))
    groups, into, out = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    options = {
        "stride": _per_dimension(draw, count, 1, 4),
        "padding": _padding(draw, count, 3),
        "dilation": _per_dimension(draw, count, 1, 3),
        "groups": groups,
    }
    sizes = _sizes(draw, count)
    geometry = (options["stride"], options["padding"], options["dilation"])
    assume(all(n > 0 for n in window_elements(sizes, kernel, *geometry)[0]))
    x = draw(values((*_batch(draw), groups * into, *sizes), kind))
    weight = draw(values((groups * out, into, *kernel), kind))
    bias = draw(st.one_of(st.none(), values((groups * out,), kind)))
    return Case(refimpl.conv, refimpl.conv_backward, (x, weight, bias), options)


@st.composite
def conv_transpose(draw, kind="normal"):
    """Draw a transposed convolution."""
    count = draw(st.integers(1, 3))
    groups, into, out = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    stride, dilation = (tuple(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))) for _ in range(2))
    padding = _padding(draw, count, 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sizes = _sizes(draw, count)
    fulls = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(sizes, stride, dilation, kernel, strict=True)]
    if padding not in ("same", "same_lower"):
        pads = [0] * count if padding == "valid" else [padding] * count if isinstance(padding, int) else padding
        base = [full - (2 * p if isinstance(p, int) else sum(p)) for full, p in zip(fulls, pads, strict=True)]
        assume(min(base) >= 1)
        extra = draw(st.sampled_from(["none", "output_padding", "output_size"]))
        if extra == "output_padding":
            limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
            options[extra] = tuple(draw(st.integers(0, limit)) for limit in limits)
        if extra == "output_size":
            options[extra] = tuple(b + draw(st.integers(0, s - 1)) for b, s in zip(base, stride, strict=True))
    x = draw(values((*_batch(draw), groups * into, *sizes), kind))
    weight = draw(values((groups * into, out, *kernel), kind))
    bias = draw(st.one_of(st.none(), values((groups * out,), kind)))
    return Case(refimpl.conv_transpose, refimpl.conv_transpose_backward, (x, weight, bias), options)


def _pool(draw, kind):
    count = draw(st.integers(1, 3))
    lead = tuple(draw(st.lists(st.integers(0, 2), max_size=2)))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    options = {
        "stride": draw(st.none()) if draw(st.booleans()) else _per_dimension(draw, count, 1, 4),
        "padding": _padding(draw, count, 2),
        "dilation": _per_dimension(draw, count, 1, 3),
        "ceil_mode": draw(st.booleans()),
    }
    sizes = _sizes(draw, count)
    stride = kernel if options["stride"] is None else options["stride"]
    geometry = (stride, options["padding"], options["dilation"], options["ceil_mode"])
    outs, _, elements = window_elements(sizes, kernel, *geometry)
    assume(all(n > 0 for n in outs))
    inside = [
        any(all(0 <= i < n for i, n in zip(s, sizes, strict=True)) for _, s in taps) for taps in elements.values()
    ]
    assume(all(inside))
    x = draw(values((*lead, *sizes), kind))
    if len(lead) == 2 and len(set(kernel)) == 1 and draw(st.booleans()):
        kernel = kernel[0]
    return x, kernel, options


@st.composite
def max_pool(draw, kind="distinct"):
    """Draw a max pooling: with `distinct` values, so that the gradient exists; with `integers`, full of ties."""
    x, kernel, options = _pool(draw, "distinct" if kind == "normal" else kind)
    return Case(refimpl.max_pool, refimpl.max_pool_backward, (x, kernel), options)


@st.composite
def avg_pool(draw, kind="normal"):
    """Draw an average pooling; with `integers`, one that only sums, so that it is exact."""
    x, kernel, options = _pool(draw, kind)
    options["count_include_pad"] = draw(st.booleans())
    if kind == "integers" or draw(st.booleans()):
        options["divisor_override"] = 1 if kind == "integers" else draw(st.sampled_from([-2, 1, 3]))
    return Case(refimpl.avg_pool, refimpl.avg_pool_backward, (x, kernel), options)


def _attention_options(draw, batch, scores):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    reach = st.one_of(st.none(), st.integers(0, 4))
    options: dict[str, Any] = {}

    def shape():
        """A shape that broadcasts to the scores."""
        ones = [n if draw(st.booleans()) else 1 for n in scores]
        return tuple(ones[draw(st.integers(0, len(scores) - 2)) :])

    if draw(st.booleans()):
        options["bias"] = rng.normal(size=shape())
        if draw(st.booleans()):
            options["bias"][rng.random(options["bias"].shape) < 0.2] = -np.inf
    if draw(st.booleans()):
        options["mask"] = rng.random(shape()) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    if draw(st.booleans()):
        options["is_causal"] = draw(st.booleans())
    if draw(st.booleans()):
        options["window"] = (draw(reach), draw(reach))
    if draw(st.booleans()):
        whole = draw(st.booleans())
        options["query_offset"] = draw(st.integers(-4, 4)) if whole else np.asarray(rng.integers(-4, 5, size=batch))
    for name, size in (("query_lengths", scores[-2]), ("key_lengths", scores[-1])):
        if draw(st.booleans()):
            dtype = draw(st.sampled_from([np.int32, np.int64]))
            options[name] = np.asarray(rng.integers(0, size + 1, size=batch), dtype=dtype)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.25, 1, -0.5]))
    return options


def _batches(draw):
    """Draw batch dimensions, and three shapes that broadcast to them."""
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    shapes = [
        tuple(n if draw(st.booleans()) else 1 for n in batch)[draw(st.integers(0, len(batch))) :] for _ in range(2)
    ]
    return batch, [batch, *shapes]


@st.composite
def attention(draw, kind="normal"):
    """Draw a scaled dot-product attention, with or without heads."""
    rows, keys = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    features, out_features = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if draw(st.integers(0, 4)) == 0:
        shapes, batch, scores = [(rows,), (keys,), (keys,)], (), (rows, keys)
    else:
        kv_heads = draw(st.integers(1, 2))
        heads = kv_heads * draw(st.integers(1, 3))
        batch, (of_query, of_key, of_value) = _batches(draw)
        shapes = [(*of_query, heads, rows), (*of_key, kv_heads, keys), (*of_value, kv_heads, keys)]
        scores = (*batch, heads, rows, keys)
    arrays = tuple(
        draw(values((*shape, n), kind)) for shape, n in zip(shapes, (features, features, out_features), strict=True)
    )
    options = _attention_options(draw, batch, scores)
    return Case(refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward, arrays, options)


@st.composite
def multi_head(draw, kind="normal"):
    """Draw a multi-head attention: without projections, with packed, or with separate ones."""
    heads = draw(st.integers(1, 3))
    rows, keys = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    batch, (of_query, of_key, of_value) = _batches(draw)
    projections = draw(st.sampled_from(["none", "packed", "separate"]))
    size, value_size = (heads * draw(st.integers(1, 2)) for _ in range(2))
    if projections == "none":
        features, params = (size, size, value_size), None
    elif projections == "packed":
        features, params = (size,) * 3, {"in_proj_weight": (3 * size, size), "out_proj.weight": (size, size)}
        value_size = size
    else:
        features = tuple(draw(st.integers(1, 3)) for _ in range(3))
        params = {
            "q_proj_weight": (size, features[0]),
            "k_proj_weight": (size, features[1]),
            "v_proj_weight": (value_size, features[2]),
            "out_proj.weight": (draw(st.integers(1, 3)), value_size),
        }
    if params is not None and draw(st.booleans()):
        params["in_proj_bias"] = (2 * size + value_size,)
    if params is not None and draw(st.booleans()):
        params["out_proj.bias"] = params["out_proj.weight"][:1]
    if params is not None:
        params = {name: draw(values(shape, kind)) for name, shape in params.items()}
    shapes = ((*of_query, rows), (*of_key, keys), (*of_value, keys))
    arrays = tuple(draw(values((*shape, n), kind)) for shape, n in zip(shapes, features, strict=True))
    options = _attention_options(draw, batch, (*batch, heads, rows, keys))
    return Case(
        refimpl.multi_head_attention,
        refimpl.multi_head_attention_backward,
        (*arrays, params),
        {"num_heads": heads, **options},
    )


EVERY_OP = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "scaled_dot_product_attention": attention,
    "multi_head_attention": multi_head,
}
