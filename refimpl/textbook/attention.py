"""Attention: scores, softmax, weighted sum, and the way back.

q query, k key, v value, s scores, p probabilities, o output. H heads (Hq of the queries, Hkv of keys and values);
L length; E features; D features of a projection; S parts of split keys.
"""

import math
from collections.abc import Mapping
from typing import Any

from .. import backend
from .._grads import AttentionGrads, AttentionWeightsGrads, MergeGrads, MultiHeadGrads
from ..backend import Array, Backend
from .windows import op

Softmax = tuple[Array, Array, Array | None, Array | None]


@op
def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, *, dropout_mask: Array | None = None, dropout_p: float = 0.0,
    return_logsumexp: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Return `o = dropout(softmax(s)) @ v`, and perhaps the logsumexp of s."""
    be = backend.of(query)
    p, logsumexp, *_ = _softmax(be, query, key, **options)
    o = _dropped(be, p, dropout_mask, dropout_p) @ _for_each_query_head(be, value, query)
    return (o, be.copy(be.xp.broadcast_to(logsumexp, o.shape[:-1]))) if return_logsumexp else o


@op
def scaled_dot_product_attention_backward(
    dout: Array, query: Array, key: Array, value: Array, *, dropout_mask: Array | None = None, dropout_p: float = 0.0,
    return_logsumexp: bool = False, dlogsumexp: Array | None = None, **options: Any,
) -> AttentionGrads:  # fmt: skip
    """Return `dv = p^T @ do`, `dp = do @ v^T`, and what `_softmax_backward` makes of dp."""
    be = backend.of(query)
    p, *_ = found = _softmax(be, query, key, **options)
    v = _for_each_query_head(be, value, query)
    dv = be.xp.matrix_transpose(_dropped(be, p, dropout_mask, dropout_p)) @ dout
    dp = _dropped(be, dout @ be.xp.matrix_transpose(v), dropout_mask, dropout_p)
    dquery, dkey, dbias, dsink = _softmax_backward(be, found, dp, dlogsumexp, query, key, **options)
    return AttentionGrads(dquery, dkey, _summed_to(be, dv, value, query), dbias, dsink)


@op
def attention_weights(query: Array, key: Array, *, return_logsumexp: bool = False, **options: Any) -> Any:
    """Return `p = softmax(s)`, and perhaps the logsumexp of s."""
    p, logsumexp, *_ = _softmax(backend.of(query), query, key, **options)
    return (p, logsumexp) if return_logsumexp else p


@op
def attention_weights_backward(
    dout: Array, query: Array, key: Array, *, return_logsumexp: bool = False, dlogsumexp: Array | None = None,
    **options: Any,
) -> AttentionWeightsGrads:  # fmt: skip
    """Return what `_softmax_backward` makes of `dp = dout`."""
    be = backend.of(query)
    found = _softmax(be, query, key, **options)
    return AttentionWeightsGrads(*_softmax_backward(be, found, dout, dlogsumexp, query, key, **options))


def _softmax(
    be: Backend, query: Array, key: Array, *, bias: Array | None = None, sink: Array | None = None,
    scale: float | None = None, softcap: float | None = None, **visibility: Any,
) -> Softmax:  # fmt: skip
    """Return p, the logsumexp, the sink's probability, and the slope of the softcap.

    s = softcap * tanh(scale * q @ k^T / softcap) + bias, -inf where a pair is hidden; p = exp(s) / (exp(sink) + sum of
    exp(s)). The largest score of a row is subtracted before exp, which changes nothing but that it cannot overflow.
    """
    xp, slope, p_sink = be.xp, None, None
    k = _for_each_query_head(be, key, query)
    s = _scale(query, scale) * (query @ xp.matrix_transpose(k))  # (..., Hq, Lq, Lk)
    if softcap is not None:
        s, slope = softcap * xp.tanh(s / softcap), 1 - xp.tanh(s / softcap) ** 2
    if bias is not None:
        s = s + bias
    if visibility:
        s = xp.where(_visible(be, s, **visibility), s, -math.inf)
    m = xp.max(s, axis=-1, keepdims=True) if s.shape[-1] else be.full((*s.shape[:-1], 1), -math.inf, s.dtype)
    if sink is not None:
        sink = xp.reshape(sink, (-1, 1, 1)) if s.ndim > 2 else xp.reshape(sink, (1, 1))
        m = xp.maximum(m, sink)
    m = xp.where(xp.isfinite(m), m, 0.0)
    e = xp.exp(s - m)
    total = xp.sum(e, axis=-1, keepdims=True)
    if sink is not None:
        total = total + xp.exp(sink - m)
        p_sink = xp.exp(sink - m) / xp.where(total == 0, 1.0, total)
    p = e / xp.where(total == 0, 1.0, total)  # a query that sees no key has p = 0
    return p, (m + xp.log(total))[..., 0], p_sink, slope


def _softmax_backward(
    be: Backend, found: Softmax, dp: Array, dlogsumexp: Array | None, query: Array, key: Array, *,
    bias: Array | None = None, sink: Array | None = None, scale: float | None = None, **others: Any,
) -> tuple[Array, Array, Array | None, Array | None]:  # fmt: skip
    """Return dq, dk, dbias and dsink.

    From `dp_j / ds_k = p_j (1[j = k] - p_k)` and `dlogsumexp / ds_j = p_j`: `ds = p * (dp - sum(p * dp) + dlogsumexp)`,
    then through the softcap, and `dq = scale * ds @ k`, `dk = scale * ds^T @ q`. The sink is a score whose dp is 0.
    """
    xp, (p, _, p_sink, slope) = be.xp, found
    mean = xp.sum(p * dp, axis=-1, keepdims=True)
    if dlogsumexp is not None:
        mean = mean - dlogsumexp[..., None]
    ds = p * (dp - mean)
    dbias = None if bias is None else _unbroadcast(be, ds, tuple(bias.shape))
    dsink = None
    if p_sink is not None and sink is not None:
        dsink = _unbroadcast(be, -p_sink * mean, (*sink.shape, 1, 1) if p.ndim > 2 else (1, 1))
    if slope is not None:
        ds = ds * slope
    factor, k = _scale(query, scale), _for_each_query_head(be, key, query)
    dq = _unbroadcast(be, factor * (ds @ k), tuple(query.shape))
    dk = _summed_to(be, factor * (xp.matrix_transpose(ds) @ query), key, query)
    return dq, dk, dbias, None if dsink is None or sink is None else xp.reshape(dsink, sink.shape)


def _visible(
    be: Backend, s: Array, *, mask: Array | None = None, is_causal: bool = False, window: Any = None,
    query_offset: Any = 0, query_lengths: Array | None = None, key_lengths: Array | None = None,
) -> Array:  # fmt: skip
    """Return which queries see which keys: every option must allow the pair."""
    i, j = be.arange(0, s.shape[-2])[:, None], be.arange(0, s.shape[-1])[None, :]

    def per_batch(value: Any) -> Any:  # (...) -> (..., 1, 1, 1), beside heads, queries and keys
        if not backend.is_array(value):
            return value
        return be.xp.astype(value, be.xp.int64)[(..., *(None,) * min(3, s.ndim))]

    if isinstance(query_offset, str):  # "end": the last query stands at the last key
        lengths = zip((key_lengths, query_lengths), s.shape[:-3:-1], strict=True)
        keys, queries = (n if a is None else be.xp.astype(a, be.xp.int64) for a, n in lengths)
        query_offset = keys - queries
    position = i + per_batch(query_offset)
    left, right = (None, None) if window is None else window
    visible = (i >= 0) & (j >= 0)
    if mask is not None:
        visible = visible & mask
    if is_causal:
        visible = visible & (j <= position)
    if left is not None:
        visible = visible & (j >= position - left)
    if right is not None:
        visible = visible & (j <= position + right)
    if query_lengths is not None:
        visible = visible & (i < per_batch(query_lengths))
    if key_lengths is not None:
        visible = visible & (j < per_batch(key_lengths))
    return visible


@op
def multi_head_attention(
    query: Array, key: Array, value: Array, params: Mapping[str, Array] | None = None, *, num_heads: int,
    num_kv_heads: int | None = None, need_weights: bool = False, average_weights: bool = True,
    add_zero_attn: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Project, split into heads, attend, concatenate the heads, project."""
    be = backend.of(query)
    q, k, v, options = _heads(be, query, key, value, params, num_heads, num_kv_heads, add_zero_attn, options)
    joined = _joined(be, scaled_dot_product_attention(q, k, v, **options))
    out = joined if params is None else _linear(be, joined, params["out_proj.weight"], params.get("out_proj.bias"))
    if not need_weights:
        return out
    weights = attention_weights(q, k, **{n: a for n, a in options.items() if not n.startswith("dropout")})
    return out, be.xp.mean(weights, axis=-3) if average_weights else weights


@op
def multi_head_attention_backward(
    dout: Array, query: Array, key: Array, value: Array, params: Mapping[str, Array] | None = None, *, num_heads: int,
    num_kv_heads: int | None = None, need_weights: bool = False, average_weights: bool = True,
    add_zero_attn: bool = False, **options: Any,
) -> MultiHeadGrads:  # fmt: skip
    """Go back through the steps; for a projection `y = x @ W^T + b`: dx = dy @ W, dW = dy^T @ x, db = sum of dy."""
    be, xp, named = backend.of(query), backend.of(query).xp, {}
    q, k, v, inner = _heads(be, query, key, value, params, num_heads, num_kv_heads, add_zero_attn, options)
    djoined = dout
    if params is not None:
        djoined = dout @ params["out_proj.weight"]
        joined = _joined(be, scaled_dot_product_attention(q, k, v, **inner))
        named = {"out_proj.weight": _dweight(be, dout, joined), "out_proj.bias": _over_rows(be, dout)}
    grads = scaled_dot_product_attention_backward(_split(be, djoined, num_heads), q, k, v, **inner)
    dbias = grads.dbias
    if dbias is not None and dbias.shape != options["bias"].shape:  # without the appended keys
        dbias = _unbroadcast(be, dbias[..., : key.shape[-2]], tuple(options["bias"].shape))
    rows = (query.shape[-2], key.shape[-2], key.shape[-2])
    dx = [_joined(be, d[..., :n, :]) for d, n in zip(grads[:3], rows, strict=True)]  # d of what was projected
    if params is None:
        dq, dk, dv = (_unbroadcast(be, d, tuple(x.shape)) for d, x in zip(dx, (query, key, value), strict=True))
        return MultiHeadGrads(dq, dk, dv, None, dbias, grads.dsink)
    tokens, (weights, _) = (query, key, value), _projections(params)
    dweights = [_dweight(be, dy, x) for dy, x in zip(dx, tokens, strict=True)]
    named |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), dweights, strict=True))
    if "in_proj_weight" in params:
        named["in_proj_weight"] = xp.concat(dweights)
    named["in_proj_bias"] = xp.concat([_over_rows(be, dy) for dy in dx])
    for name, dhead in (("bias_k", grads.dkey), ("bias_v", grads.dvalue)):
        if name in params:
            token = _joined(be, dhead[..., key.shape[-2] : key.shape[-2] + 1, :])  # (..., 1, D)
            named[name] = xp.reshape(_over_rows(be, token), params[name].shape)
    dq, dk, dv = (_unbroadcast(be, dy @ w, tuple(x.shape)) for dy, w, x in zip(dx, weights, tokens, strict=True))
    return MultiHeadGrads(dq, dk, dv, {name: named[name] for name in params}, dbias, grads.dsink)


def _heads(
    be: Backend, query: Array, key: Array, value: Array, params: Mapping[str, Array] | None, num_heads: int,
    num_kv_heads: int | None, add_zero_attn: bool, options: dict[str, Any],
) -> tuple[Array, Array, Array, dict[str, Any]]:  # fmt: skip
    """Return query, key and value by head, with the appended keys, and the options for as many keys."""
    xp, extra = be.xp, 0
    batch = _batch(query, key, value)
    tokens = [xp.broadcast_to(query, (*batch, *query.shape[-2:])), key, value]
    if params is not None:
        tokens = [_linear(be, x, w, b) for x, w, b in zip(tokens, *_projections(params), strict=True)]
    counts = (num_heads, num_kv_heads or num_heads, num_kv_heads or num_heads)
    q, *kv = (_split(be, x, n) for x, n in zip(tokens, counts, strict=True))
    for name in ("bias_k", "bias_v") if params is not None and "bias_k" in params else ():
        i = 0 if name == "bias_k" else 1
        token = _split(be, params[name][0, ...], counts[1])  # type: ignore[index]  # (Hkv, 1, E)
        kv[i] = xp.concat([kv[i], xp.broadcast_to(token, (*kv[i].shape[:-2], 1, kv[i].shape[-1]))], axis=-2)
        extra = 1
    if add_zero_attn:
        kv = [xp.concat([a, be.full((*a.shape[:-2], 1, a.shape[-1]), 0, a.dtype)], axis=-2) for a in kv]
        extra += 1
    return q, *kv, _with_appended_keys(be, options, q, kv[0], extra) if extra else options


def _with_appended_keys(be: Backend, options: dict[str, Any], q: Array, k: Array, extra: int) -> dict[str, Any]:
    """Return the options with a mask and bias that let every query see the appended keys, without a bias."""
    xp, dropout = be.xp, {n: a for n, a in options.items() if n in ("scale", "softcap", "sink") or "dropout" in n}
    names = ("mask", "is_causal", "window", "query_offset", "key_lengths")
    length = k.shape[-2] - extra
    s = q @ be.xp.matrix_transpose(_for_each_query_head(be, k[..., :length, :], q))
    own = _visible(be, s, **{n: a for n, a in options.items() if n in names})
    mask = xp.concat([xp.broadcast_to(own, s.shape), be.full((*s.shape[:-1], extra), 1, xp.bool)], axis=-1)
    bias = options.get("bias")
    if bias is not None:
        bias = xp.concat([xp.broadcast_to(bias, s.shape), be.full((*s.shape[:-1], extra), 0, bias.dtype)], axis=-1)
    return dropout | {"mask": mask, "bias": bias, "query_lengths": options.get("query_lengths")}


def _projections(params: Mapping[str, Array]) -> tuple[list[Array], list[Array | None]]:
    """Return the weights and biases of query, key and value, in whichever way they are stored."""
    if "in_proj_weight" in params:
        packed = params["in_proj_weight"]
        weights = [packed[i : i + packed.shape[1], :] for i in range(0, packed.shape[0], packed.shape[1])]
    else:
        weights = [params[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    bias, biases, end = params.get("in_proj_bias"), [], 0
    for weight in weights:
        start, end = end, end + weight.shape[0]
        biases.append(None if bias is None else bias[start:end])
    return weights, biases


@op
def merge_attention(outs: Array, logsumexps: Array) -> tuple[Array, Array]:
    """Return the sum over parts (S, ..., L, Ev) of `w * outs` with `w = exp(logsumexps - logsumexp)`."""
    be = backend.of(outs)
    w, logsumexp = _parts(be, logsumexps)
    return be.xp.sum(w[..., None] * outs, axis=0), logsumexp


@op
def merge_attention_backward(
    dout: Array, outs: Array, logsumexps: Array, *, dlogsumexp: Array | None = None
) -> MergeGrads:
    """Return `douts = w * dout`, `dl = w * (sum over features of dout * (outs - out) + dlogsumexp)`."""
    be = backend.of(outs)
    w, _ = _parts(be, logsumexps)
    out = be.xp.sum(w[..., None] * outs, axis=0)
    slope = be.xp.sum(dout * (outs - out), axis=-1)
    if dlogsumexp is not None:
        slope = slope + dlogsumexp
    return MergeGrads(w[..., None] * dout, w * slope)


def _parts(be: Backend, logsumexps: Array) -> tuple[Array, Array]:
    """Return the share of each part, a softmax over the parts, and the logsumexp of all."""
    xp = be.xp
    if not logsumexps.shape[0]:
        return logsumexps, be.full(tuple(logsumexps.shape[1:]), -math.inf, logsumexps.dtype)
    m = xp.max(logsumexps, axis=0)
    m = xp.where(xp.isfinite(m), m, 0.0)
    e = xp.exp(logsumexps - m)
    total = xp.sum(e, axis=0)
    return e / xp.where(total == 0, 1.0, total), m + xp.log(total)


def _scale(query: Array, scale: float | None) -> float:
    return 1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale)


def _dropped(be: Backend, p: Array, keep: Array | None, dropout_p: float) -> Array:
    """Return p where it is kept, divided by the share that is kept, and 0 elsewhere."""
    return p if keep is None else be.xp.where(keep, p, 0.0) / (1 - dropout_p)


def _for_each_query_head(be: Backend, array: Array, query: Array) -> Array:
    """Repeat heads of key or value, so that query head h meets head `h // (Hq / Hkv)`."""
    if array.ndim < 3 or query.ndim < 3 or query.shape[-3] == array.shape[-3]:
        return array
    return be.xp.repeat(array, query.shape[-3] // array.shape[-3], axis=-3)


def _summed_to(be: Backend, gradient: Array, array: Array, query: Array) -> Array:
    """Return the gradient of key or value: heads that share one add up, and so does what was broadcast."""
    if array.ndim > 2 and query.ndim > 2 and gradient.shape[-3] != array.shape[-3]:
        lead, heads, rest = gradient.shape[:-3], array.shape[-3], gradient.shape[-2:]
        gradient = be.xp.sum(be.xp.reshape(gradient, (*lead, heads, gradient.shape[-3] // heads, *rest)), axis=-3)
    return _unbroadcast(be, gradient, tuple(array.shape))


def _unbroadcast(be: Backend, gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the dimensions along which an array of this shape was broadcast."""
    padded = (*(1,) * (gradient.ndim - len(shape)), *shape)
    axes = tuple(d for d, size in enumerate(padded) if size == 1)
    return be.xp.reshape(be.xp.sum(gradient, axis=axes, keepdims=True), shape) if axes else gradient


def _batch(*arrays: Array) -> tuple[int, ...]:
    """Return what the leading dimensions of arrays (..., L, E) broadcast to."""
    rank = max(array.ndim for array in arrays)
    shapes = [(*(1,) * (rank - array.ndim), *array.shape[:-2]) for array in arrays]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True))


def _linear(be: Backend, x: Array, weight: Array, bias: Array | None) -> Array:
    y = x @ be.xp.matrix_transpose(weight)
    return y if bias is None else y + bias


def _dweight(be: Backend, dy: Array, x: Array) -> Array:
    """Return `dy^T @ x` summed over all rows: (..., L, D), (..., L, E) -> (D, E)."""
    return _unbroadcast(be, be.xp.matrix_transpose(dy) @ x, (dy.shape[-1], x.shape[-1]))


def _over_rows(be: Backend, dy: Array) -> Array:
    """Return the sum over all rows: (..., L, D) -> (D,)."""
    return be.xp.sum(dy, axis=tuple(range(dy.ndim - 1)))


def _split(be: Backend, x: Array, heads: int) -> Array:
    """Split features into heads: (..., L, D) -> (..., H, L, D / H)."""
    return be.xp.moveaxis(be.xp.reshape(x, (*x.shape[:-1], heads, x.shape[-1] // heads)), -2, -3)


def _joined(be: Backend, heads: Array) -> Array:
    """Concatenate the heads: (..., H, L, D / H) -> (..., L, D)."""
    moved = be.xp.moveaxis(heads, -3, -2)
    return be.xp.reshape(moved, (*moved.shape[:-2], moved.shape[-2] * moved.shape[-1]))
