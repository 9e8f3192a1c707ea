"""Checks of attention: of scaled dot-product and multi-head attention, and of merging their parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import backend
from .._options import AttentionOptions
from ..backend import Array, Backend, shown
from .common import (
    LARGEST,
    broadcast,
    fail,
    flag,
    floating,
    gradient,
    integer,
    logsumexp,
    number,
    required,
    result,
    shapes_of,
)

_PACKED = ("in_proj_weight",)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_APPENDED = ("bias_k", "bias_v")
_REST = ("in_proj_bias", "out_proj.weight", "out_proj.bias")


def attention(
    function: str, arrays: Mapping[str, Array], options: AttentionOptions, dlogsumexp: Array | None = None
) -> tuple[int, ...]:
    """Check `query`, `key`, perhaps `value` and `dout`, and all options; returns the shape of the scores."""
    required(function, arrays)
    floating(function, **arrays, bias=options.bias, sink=options.sink)
    query, key, *values = attention_rows(function, {n: arrays[n] for n in arrays if n != "dout"})
    scores = _scores(function, query, key, values)
    result(function, arrays, (*scores[:-1], values[0].shape[-1]) if values else scores)
    logsumexp(function, "dlogsumexp", dlogsumexp, query, scores[:-1])
    _options(function, query, scores, scores, options)
    return scores


def attention_rows(function: str, arrays: Mapping[str, Array]) -> list[Array]:
    """Check that query, key and value are rows of features, whatever comes before, with a value for each key."""
    for name, array in arrays.items():
        if array.ndim < 2:
            fail(ValueError, function, name, "have at least 2 dimensions", shapes_of(**{name: array}))
    if "value" in arrays and arrays["value"].shape[-2] != arrays["key"].shape[-2]:
        rule = f"equal key.shape[-2] ({arrays['key'].shape[-2]})"
        fail(ValueError, function, "value.shape[-2]", rule, shapes_of(**arrays))
    return list(arrays.values())


def _scores(function: str, query: Array, key: Array, values: list[Array]) -> tuple[int, ...]:
    """Check that query, key and value fit each other; returns the shape of the scores, `(..., Hq, Lq, Lk)`."""
    named = dict(zip(("query", "key", "value"), (query, key, *values), strict=False))
    got = shapes_of(**named)
    if key.shape[-1] != query.shape[-1]:
        fail(ValueError, function, "key.shape[-1]", f"equal query.shape[-1] ({query.shape[-1]})", got)
    heads, kv_heads, *of_values = (int(array.shape[-3]) if array.ndim > 2 else 1 for array in named.values())
    if any(of_value != kv_heads for of_value in of_values):
        fail(ValueError, function, "value", f"have as many heads as key ({kv_heads})", got)
    if heads < 1 or kv_heads < 1:
        fail(ValueError, function, "key" if kv_heads < 1 else "query", "have at least 1 head", got)
    if heads % kv_heads:
        fail(ValueError, function, "the heads of query", f"be a multiple of those of key ({kv_heads})", got)
    batch = broadcast([tuple(array.shape[:-3]) for array in named.values()])
    if batch is None:
        fail(ValueError, function, " and ".join(named), "have leading dimensions that broadcast", got)
    rows = (int(query.shape[-2]), int(key.shape[-2]))
    return (*batch, heads, *rows) if max(array.ndim for array in named.values()) > 2 else rows


def _options(
    function: str, like: Array, scores: tuple[int, ...], weights: tuple[int, ...], options: AttentionOptions
) -> None:
    """Check the options that shape the scores, `(..., Hq, Lq, Lk)`, and the weights; `like` is an array of the call."""
    batch = scores[:-3]
    for name, shape in (("bias", scores), ("mask", scores), ("dropout_mask", weights)):
        array = getattr(options, name)
        if array is not None:
            be = backend.common(function, {"query": like, name: array})
            if name != "bias" and array.dtype != be.xp.bool:
                fail(TypeError, function, name, "be of dtype bool", array.dtype)
            if broadcast([tuple(array.shape), shape]) != shape:
                rule = f"broadcast to the {'weights' if name == 'dropout_mask' else 'scores'}, {shape}"
                fail(ValueError, function, name, rule, shapes_of(**{name: array}))
    flag(function, "is_causal", options.is_causal)
    _window(function, options.window)
    heads = scores[-3] if len(scores) > 2 else 1
    sink, scale, softcap = options.sink, options.scale, options.softcap
    if sink is not None and tuple(sink.shape) != (heads,):
        fail(ValueError, function, "sink", f"have shape ({heads},), one for each head", shapes_of(sink=sink))
    if scale is not None:
        number(function, "scale", scale)
    if softcap is not None and number(function, "softcap", softcap) <= 0:
        fail(ValueError, function, "softcap", "be above 0", shown(softcap))
    _dropout(function, options.dropout_mask, options.dropout_p)
    if backend.is_array(options.query_offset):
        _batch_integers(function, like, "query_offset", options.query_offset, batch)
    elif not backend.is_number(options.query_offset) and options.query_offset != "end":
        fail(TypeError, function, "query_offset", "be an int, an integer array or 'end'", shown(options.query_offset))
    _lengths(function, like, "query_lengths", options.query_lengths, batch, scores[-2])
    _lengths(function, like, "key_lengths", options.key_lengths, batch, scores[-1])


def _dropout(function: str, dropout_mask: Array | None, dropout_p: object) -> None:
    p = number(function, "dropout_p", dropout_p)
    if not 0 <= p < 1:
        fail(ValueError, function, "dropout_p", "be in [0, 1)", shown(dropout_p))
    if p > 0 and dropout_mask is None:
        fail(ValueError, function, "dropout_p", "be 0 without a dropout_mask", shown(dropout_p))


def _lengths(function: str, like: Array, name: str, lengths: Array | None, batch: tuple[int, ...], size: int) -> None:
    if lengths is None:
        return
    be = _batch_integers(function, like, name, lengths, batch)
    if 0 not in lengths.shape:
        low, high = be.bounds(lengths)
        if low < 0 or high > size:
            fail(ValueError, function, name, f"be in [0, {size}]", f"values from {low} to {high}")


def _batch_integers(function: str, like: Array, name: str, array: Any, batch: tuple[int, ...]) -> Backend:
    """Check an integer array that has an entry for each batch entry; returns its backend."""
    be = backend.common(function, {"query": like, name: array})
    if not be.is_integer(array):
        fail(TypeError, function, name, "be of an integer dtype", array.dtype)
    if broadcast([tuple(array.shape), batch]) != batch:
        fail(ValueError, function, name, f"broadcast to the batch dimensions, {batch}", shapes_of(**{name: array}))
    return be


def _window(function: str, window: object) -> None:
    if window is None:
        return
    if not isinstance(window, tuple | list):
        fail(TypeError, function, "window", "be None or a pair (left, right)", shown(window))
    if len(window) != 2:
        fail(ValueError, function, "window", "be None or a pair (left, right)", shown(window))
    left, right = (None if side is None else integer(function, f"window[{i}]", side) for i, side in enumerate(window))
    if left is not None and right is not None and left + right < 0:
        fail(ValueError, function, "window", "have left + right of at least 0", shown(window))


class Heads(NamedTuple):
    """The sizes of a call of multi-head attention."""

    query: int
    """Heads of the queries."""
    key: int
    """Heads of keys and values."""
    num_appended_keys: int
    """Number of appended keys."""
    scores: tuple[int, ...]
    """`(..., heads, Lq, Lk)`, without the appended keys."""


def multi_head(
    function: str,
    arrays: Mapping[str, Array],
    params: Mapping[str, Array] | None,
    options: AttentionOptions,
    *,
    num_heads: object,
    num_kv_heads: object,
    need_weights: object,
    average_weights: object,
    add_zero_attn: object,
) -> Heads:
    """Check every argument of multi-head attention, and perhaps `dout`; returns how the features become heads."""
    required(function, arrays)
    heads = integer(function, "num_heads", num_heads, 1, LARGEST)
    kv_heads = heads if num_kv_heads is None else integer(function, "num_kv_heads", num_kv_heads, 1, LARGEST)
    if heads % kv_heads:
        fail(ValueError, function, "num_kv_heads", f"divide num_heads ({heads})", kv_heads)
    flag(function, "need_weights", need_weights)
    flag(function, "average_weights", average_weights)
    named = {} if params is None else _parameters(function, params, packed=kv_heads == heads)
    floating(function, **arrays, **named, bias=options.bias, sink=options.sink)
    query, key, value = attention_rows(function, {n: arrays[n] for n in arrays if n != "dout"})
    batch = broadcast([tuple(array.shape[:-2]) for array in (query, key, value)])
    if batch is None:
        rule = "have leading dimensions that broadcast"
        fail(ValueError, function, "query, key and value", rule, shapes_of(query=query, key=key, value=value))
    out_features = _features(function, query, key, value, params, heads, kv_heads)
    result(function, arrays, (*batch, query.shape[-2], out_features))
    appended = int(flag(function, "add_zero_attn", add_zero_attn)) + int(params is not None and "bias_k" in params)
    scores = (*batch, heads, int(query.shape[-2]), int(key.shape[-2]))
    if need_weights:
        result(function, {}, (*scores[:-1], scores[-1] + appended))
    _options(function, query, scores, (*scores[:-1], scores[-1] + appended), options)
    return Heads(heads, kv_heads, appended, scores)


def _features(
    function: str,
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array] | None,
    heads: int,
    kv_heads: int,
) -> int:
    """Check the features, before and after projection; returns those of the result."""
    inner = {"query": int(query.shape[-1]), "key": int(key.shape[-1]), "value": int(value.shape[-1])}
    shared = heads // kv_heads
    out_features = inner["value"] * shared
    what = "features" if params is None else "projected features"
    if params is not None:
        inner = _projected(function, inner, params)
        out_features = _parameter_shapes(function, inner, params, shared)
    for name, size in inner.items():
        parts, option = (heads, "num_heads") if name == "query" or shared == 1 else (kv_heads, "num_kv_heads")
        if size % parts:
            fail(ValueError, function, option, f"divide the {what} of {name} ({size})", parts)
    if inner["key"] * shared != inner["query"]:
        rule = f"equal query.shape[-1] ({inner['query']})" + f" / {shared} as heads are shared" * (shared > 1)
        fail(ValueError, function, "key.shape[-1]", rule, shapes_of(query=query, key=key, value=value))
    return out_features


def _parameters(function: str, params: object, packed: bool) -> dict[str, Array]:
    """Check the names of the parameters; returns them as messages show them."""
    if not isinstance(params, Mapping):
        fail(TypeError, function, "params", "be None or a mapping of names to arrays", shown(params))
    known = _PACKED + _SEPARATE + _APPENDED + _REST
    for name in params:
        if name not in known:
            fail(ValueError, function, "params", f"have keys among {', '.join(known)}", shown(name))
    weights = _PACKED if "in_proj_weight" in params else _SEPARATE
    appended = _APPENDED if any(name in params for name in _APPENDED) else ()
    for name in (*weights, "out_proj.weight", *appended):
        if name not in params:
            fail(ValueError, function, "params", f"have the key {name!r}", f"the keys {list(params)}")
    for name in _SEPARATE:
        if weights is _PACKED and name in params:
            fail(ValueError, function, "params", "have either in_proj_weight or separate weights", f"{name!r} as well")
    if weights is _PACKED and not packed:
        rule = "have q_proj_weight, k_proj_weight and v_proj_weight when num_kv_heads is not num_heads"
        fail(ValueError, function, "params", rule, "'in_proj_weight'")
    for name, array in params.items():
        if array is None:
            fail(TypeError, function, f"params[{name!r}]", "be an array", "None")
    return {f"params[{name!r}]": array for name, array in params.items()}


def _shape(function: str, params: Mapping[str, Array], name: str, shape: tuple[int, ...], what: str) -> None:
    """Check the shape of a parameter, if it is there."""
    if name in params and tuple(params[name].shape) != shape:
        fail(
            ValueError,
            function,
            f"params[{name!r}]",
            f"have shape {shape} {what}",
            f"shape {tuple(params[name].shape)}",
        )


def _rows(function: str, params: Mapping[str, Array], name: str) -> int:
    """Return how many features a projection puts out."""
    if params[name].ndim != 2:
        got = f"shape {tuple(params[name].shape)}"
        fail(ValueError, function, f"params[{name!r}]", "have 2 dimensions", got)
    return int(params[name].shape[0])


def _projected(function: str, features: dict[str, int], params: Mapping[str, Array]) -> dict[str, int]:
    """Check the projections of query, key and value; returns how many features each puts out."""
    what = f"for the features of query, key and value, {tuple(features.values())}"
    if "in_proj_weight" not in params:
        inner = {name: _rows(function, params, weight) for name, weight in zip(features, _SEPARATE, strict=True)}
        for (name, size), weight in zip(features.items(), _SEPARATE, strict=True):
            _shape(function, params, weight, (inner[name], size), what)
        return inner
    size = features["query"]
    for name in ("key", "value"):
        if features[name] != size:
            rule = f"equal query.shape[-1] ({size}) when params has in_proj_weight"
            fail(ValueError, function, f"{name}.shape[-1]", rule, features[name])
    _shape(function, params, "in_proj_weight", (3 * size, size), what)
    return dict.fromkeys(features, size)


def _parameter_shapes(function: str, inner: dict[str, int], params: Mapping[str, Array], shared: int) -> int:
    """Check the shapes of the other parameters, and that keys fit queries; returns the features of the result."""
    what = f"for the projected features of query, key and value, {tuple(inner.values())}"
    if inner["key"] * shared != inner["query"]:
        size = int(params["k_proj_weight"].shape[1])
        _shape(function, params, "k_proj_weight", (inner["query"] // shared, size), what)
    _shape(function, params, "in_proj_bias", (sum(inner.values()),), what)
    _shape(function, params, "bias_k", (1, 1, inner["key"]), what)
    _shape(function, params, "bias_v", (1, 1, inner["value"]), what)
    rows = _rows(function, params, "out_proj.weight")
    _shape(function, params, "out_proj.weight", (rows, inner["value"] * shared), what)
    _shape(function, params, "out_proj.bias", (rows,), what)
    return rows


def merge(function: str, arrays: Mapping[str, Array], logsumexps: Array | None, dlogsumexp: Array | None) -> None:
    """Check `outs`, `logsumexps`, and perhaps their gradients."""
    required(function, {**arrays, "logsumexps": logsumexps})
    floating(function, **arrays)
    outs = arrays["outs"]
    if outs.ndim < 3:
        fail(ValueError, function, "outs", "have at least 3 dimensions, (S, ..., L, Ev)", shapes_of(outs=outs))
    logsumexp_shape = tuple(outs.shape[:-1])
    logsumexp(function, "logsumexps", logsumexps, outs, logsumexp_shape)
    if "dout" in arrays:
        gradient(function, arrays["dout"], outs.shape[1:])
    logsumexp(function, "dlogsumexp", dlogsumexp, outs, logsumexp_shape[1:])
