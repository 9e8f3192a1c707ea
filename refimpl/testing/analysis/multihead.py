"""How far rounding may move multi-head attention: projections, attention of what they give, and a projection.

Each step hands its error on: a sum of products is off by its own rounding, and by the errors of its factors. In half
types, what goes from one step to the next is rounded to the half type. The steps, and the letters, are those of
`textbook.multi_head_attention`, which gives the projected arrays whole.
"""

from collections.abc import Callable, Mapping
from typing import Any

import refimpl

from ... import textbook
from ..._engine.visibility import by_heads
from ..._grads import AttentionGrads, MultiHeadGrads
from ...backend import Array, mapped
from ...textbook import attention as steps
from .attention_gradients import errors_of_gradients
from .models import Model
from .softmax import InputErrors, call_of, errors_by_row

Params = Mapping[str, Array] | None
_ATTENTION = "scaled_dot_product_attention"


def _multi_head(
    model: Model, result: Any, query: Array, key: Array, value: Array, params: Params = None, *, num_heads: int,
    num_kv_heads: int | None = None, need_weights: bool = False, average_weights: bool = True,
    add_zero_attn: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Return the error of the output, and that of the weights."""
    be, xp = model.be, model.be.xp
    query, key, value, params = _clean(model, (query, key, value, params))
    heads, errors, inner = _projected(
        model, (query, key, value), params, num_heads, num_kv_heads, add_zero_attn, options
    )
    call = call_of(model, _ATTENTION, dict(zip(("query", "key", "value"), heads, strict=True)), inner)
    inputs = _in_tiles(model, call, errors)
    of_joined = _joined(model, errors_by_row(model, call, int(heads[2].shape[-1]), inputs)[0], heads[0])
    joined = steps._joined(be, textbook.scaled_dot_product_attention(*heads, **inner))
    out = result[0] if need_weights else result
    if params is None:
        error = of_joined
    else:
        of_joined = of_joined + model.half * model.size(joined)
        error = _linear(model, out, joined, of_joined, params["out_proj.weight"], params.get("out_proj.bias"))
    if not need_weights:
        return error
    plain = {name: option for name, option in inner.items() if not name.startswith("dropout")}
    call = call_of(model, "attention_weights", {"query": heads[0], "key": heads[1]}, plain)
    weights = errors_by_row(model, call, int(heads[1].shape[-2]), _in_tiles(model, call, errors[:2]))[0]
    weights = xp.reshape(weights, (*heads[0].shape[:-1], heads[1].shape[-2]))
    if average_weights:
        count = float(num_heads)
        sizes = xp.sum(weights, axis=-3) + model.size(result[1]) * model.size_of(count)
        own = model.of_sum(count * result[1], sizes, count + 0.0 * result[1])
        weights = model.size_of(1 / count) * (xp.sum(weights, axis=-3) + own)
    return error, xp.reshape(weights, result[1].shape)


def _multi_head_backward(
    model: Model, result: MultiHeadGrads, dout: Array, query: Array, key: Array, value: Array, params: Params = None, *,
    num_heads: int, num_kv_heads: int | None = None, need_weights: bool = False, average_weights: bool = True,
    add_zero_attn: bool = False, **options: Any,
) -> MultiHeadGrads:  # fmt: skip
    """Return the error of each gradient: back through the steps."""
    del need_weights, average_weights
    be, size = model.be, model.size
    dout, query, key, value, params = _clean(model, (dout, query, key, value, params))
    tokens = (query, key, value)
    heads, errors, inner = _projected(
        model, (query, key, value), params, num_heads, num_kv_heads, add_zero_attn, options
    )
    named = dict(zip(("query", "key", "value"), heads, strict=True))
    djoined, of_djoined = dout, 0.0 * dout
    if params is not None:
        weight = params["out_proj.weight"]
        djoined = dout @ weight
        of_djoined = model.of_sum(djoined, size(dout) @ size(weight), float(weight.shape[0]) + 0.0 * djoined)
        of_djoined = of_djoined + model.half * size(djoined)
    named["dout"] = steps._split(be, djoined, num_heads)
    forward = call_of(model, _ATTENTION, {name: named[name] for name in ("query", "key", "value")}, inner)
    inputs = _in_tiles(model, forward, (*errors, steps._split(be, of_djoined, num_heads)))
    grads = textbook.scaled_dot_product_attention_backward(named["dout"], *heads, **inner)
    whole = AttentionGrads(*errors_of_gradients(model, f"{_ATTENTION}_backward", grads, named, inner, inputs))
    rows = (query.shape[-2], key.shape[-2], key.shape[-2])
    dx = [steps._joined(be, d[..., :n, :]) for d, n in zip(grads[:3], rows, strict=True)]
    of_dx = [steps._joined(be, e[..., :n, :]) for e, n in zip(whole[:3], rows, strict=True)]
    dbias = None
    if result.dbias is not None and whole.dbias is not None:
        of_bias = whole.dbias
        if of_bias.shape != result.dbias.shape:
            of_bias = steps._unbroadcast(be, of_bias[..., : key.shape[-2]], tuple(result.dbias.shape))
        dbias = of_bias
    if params is None:
        dq, dk, dv = (_summed(model, total, e, size(d)) for total, e, d in zip(result[:3], of_dx, dx, strict=True))
        return MultiHeadGrads(dq, dk, dv, None, dbias, whole.dsink)
    of_dx = [e + model.half * size(d) for e, d in zip(of_dx, dx, strict=True)]
    joined = steps._joined(be, textbook.scaled_dot_product_attention(*heads, **inner))
    of_joined = _joined(model, errors_by_row(model, forward, int(heads[2].shape[-1]), inputs)[0], heads[0])
    of_joined = of_joined + model.half * size(joined)
    place = (..., slice(key.shape[-2], key.shape[-2] + 1), slice(None))
    pairs = (("bias_k", grads.dkey, whole.dkey), ("bias_v", grads.dvalue, whole.dvalue))
    appended = {name: tuple(steps._joined(be, a[place]) for a in (d, e)) for name, d, e in pairs if name in params}
    found = _of_params(model, params, result.dparams or {}, dout, tokens, (joined, of_joined), dx, of_dx, appended)
    weights, _ = steps._projections(params)
    dq, dk, dv = (
        _dtokens(model, total, d, e, w, tuple(x.shape))
        for total, d, e, w, x in zip(result[:3], dx, of_dx, weights, tokens, strict=True)
    )
    return MultiHeadGrads(dq, dk, dv, {name: found[name] for name in params}, dbias, whole.dsink)


def _of_params(
    model: Model, params: Mapping[str, Array], dparams: Mapping[str, Array], dout: Array, tokens: tuple[Array, ...],
    joined: tuple[Array, Array], dx: list[Array], of_dx: list[Array], appended: dict[str, tuple[Array, ...]],
) -> dict[str, Any]:  # fmt: skip
    """Return the error of the gradient of each parameter; `appended` are gradients of the tokens, and their errors."""
    xp, zero = model.be.xp, 0.0 * dout
    weights, _ = steps._projections(params)
    found: dict[str, Any] = {
        "out_proj.weight": _dweight(model, dparams["out_proj.weight"], (dout, zero), joined),
        "out_proj.bias": _over_rows(model, dparams.get("out_proj.bias"), dout, zero),
    }
    parts = [
        _dweight(model, total, (d, e), (x, 0.0 * x))
        for total, d, e, x in zip(_parts(dparams, weights), dx, of_dx, tokens, strict=True)
    ]
    found |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True))
    if "in_proj_weight" in params:
        found["in_proj_weight"] = xp.concat(parts)
    if "in_proj_bias" in params:
        totals = _split_rows(dparams["in_proj_bias"], [d.shape[-1] for d in dx])
        biases = [_over_rows(model, t, d, e) for t, d, e in zip(totals, dx, of_dx, strict=True)]
        found["in_proj_bias"] = xp.concat(biases)
    for name, (token, of_token) in appended.items():
        total = xp.reshape(dparams[name], (dparams[name].shape[-1],))
        found[name] = xp.reshape(_over_rows(model, total, token, of_token), params[name].shape)
    return found


ANALYSES: dict[Callable[..., Any], Callable[..., Any]] = {
    refimpl.multi_head_attention: _multi_head,
    refimpl.multi_head_attention_backward: _multi_head_backward,
}
"""The analysis of each op."""


def _clean(model: Model, tree: Any) -> Any:
    return mapped(model.clean, tree)


def _projected(
    model: Model, tokens: tuple[Array, Array, Array], params: Params, num_heads: int, num_kv_heads: int | None,
    add_zero_attn: bool, options: dict[str, Any],
) -> tuple[tuple[Array, ...], tuple[Array, ...], dict[str, Any]]:  # fmt: skip
    """Return query, key and value by head, their errors, and the options for as many keys."""
    options = {name: option for name, option in options.items() if option is not None}
    q, k, v, inner = steps._heads(model.be, *tokens, params, num_heads, num_kv_heads, add_zero_attn, options)
    if params is None:
        return (q, k, v), tuple(0.0 * a for a in (q, k, v)), inner
    query, key, value = (model.size(x) for x in tokens)
    sized = {name: model.size(param) for name, param in params.items()}
    sizes = steps._heads(model.be, query, key, value, sized, num_heads, num_kv_heads, add_zero_attn, {})[:3]
    features = [float(x.shape[-1]) + 1.0 for x in tokens]
    errors = tuple(
        model.of_sum(a, s, n + 0.0 * a) + model.half * model.size(a)
        for a, s, n in zip((q, k, v), sizes, features, strict=True)
    )
    return (q, k, v), errors, inner


def _in_tiles(model: Model, call: Any, errors: tuple[Array, ...]) -> InputErrors:
    """Return errors of arrays by head in the form of tiles."""
    shaped = [by_heads(model.be, error, call.space) for error in errors]
    names = ("query", "key", "value", "dout")[: len(shaped)]
    return InputErrors(**dict(zip(names, shaped, strict=True)))


def _joined(model: Model, error: Array, query: Array) -> Array:
    """Return the error of the joined heads from that of the output in the form of tiles."""
    shaped = model.be.xp.reshape(error, (*query.shape[:-1], error.shape[-1]))
    return steps._joined(model.be, shaped)


def _linear(model: Model, result: Array, x: Array, of_x: Array, weight: Array, bias: Array | None) -> Array:
    """Return the error of `x @ weight^T + bias`."""
    transposed = model.be.xp.matrix_transpose(model.size(weight))
    sizes = model.grown(model.size(x), of_x) @ transposed
    sizes = sizes if bias is None else sizes + model.size(bias)
    return of_x @ transposed + model.of_sum(result, sizes, float(weight.shape[1]) + 1.0 + 0.0 * result)


def _dweight(model: Model, total: Array, dy: tuple[Array, Array], x: tuple[Array, Array]) -> Array:
    """Return the error of `dy^T @ x` summed over all rows, from arrays and their errors."""
    (d, of_d), (a, of_a) = dy, x
    size, be = model.size, model.be
    of_d = model.of_equal_rows(a) * of_d  # the errors of the rows of a softmax's gradient are not independent
    terms = steps._dweight(be, of_d, model.grown(size(a), of_a)) + steps._dweight(be, size(d), of_a)
    sizes = steps._dweight(be, model.grown(size(d), of_d), model.grown(size(a), of_a))
    count = steps._dweight(be, 1.0 + 0.0 * d, 1.0 + 0.0 * a)
    return terms + model.of_sum(total, sizes, count)


def _dtokens(model: Model, total: Array, d: Array, of_d: Array, weight: Array, shape: tuple[int, ...]) -> Array:
    """Return the error of `d @ weight`, summed over what was broadcast."""
    w = model.size(weight)
    parts = (of_d @ w, model.grown(model.size(d), of_d) @ w, (1.0 + 0.0 * d) @ (1.0 + 0.0 * w))
    terms, sizes, count = (steps._unbroadcast(model.be, part, shape) for part in parts)
    return terms + model.of_sum(total, sizes, count)


def _over_rows(model: Model, total: Array | None, d: Array, of_d: Array) -> Array | None:
    """Return the error of the sum over all rows."""
    if total is None:
        return None
    be = model.be
    sizes, count = steps._over_rows(be, model.grown(model.size(d), of_d)), steps._over_rows(be, 1.0 + 0.0 * d)
    of_d = model.of_equal_rows(1.0 + 0.0 * d) * of_d  # as in `_dweight`, with ones for x
    return steps._over_rows(be, of_d) + model.of_sum(total, sizes, count)


def _summed(model: Model, total: Array, of_terms: Array, sizes: Array) -> Array:
    """Return the error of sums over dimensions along which an argument was broadcast."""
    shape = tuple(total.shape)
    parts = [steps._unbroadcast(model.be, part, shape) for part in (of_terms, sizes, 1.0 + 0.0 * sizes)]
    return parts[0] + model.of_sum(total, model.grown(parts[1], parts[0]), parts[2])


def _parts(dparams: Mapping[str, Array], weights: list[Array]) -> list[Array]:
    """Return the gradients of the three projections, in whichever way they are stored."""
    if "in_proj_weight" in dparams:
        return _split_rows(dparams["in_proj_weight"], [w.shape[0] for w in weights])
    return [dparams[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]


def _split_rows(array: Array, sizes: list[int]) -> list[Array]:
    parts, end = [], 0
    for size in sizes:
        start, end = end, end + size
        parts.append(array[start:end, ...])
    return parts
