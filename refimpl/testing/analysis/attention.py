"""How far rounding may move the results of attention, tile by tile.

Each score s is off by rounding in its sum of products, in scale, softcap and bias; subtracting the row's maximum m and
taking exp add to that, so each weight has a relative error of its own, and all weights of a row have one in common, of
the sum that divides them. From there errors go through the same products as the results. What is called "error" here
is a measure as in `models`; letters are those of `textbook/attention.py`.

The backward may take its mean D of dp as `sum p dp` or, as FlashAttention 2 does (arXiv:2307.08691, section 3.1), as
`sum dout out` from a stored output, and p from the stored logsumexp: the larger error is allowed for.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import refimpl

from ... import _checks
from ..._engine.softmax import dropped, scores_of
from ..._engine.visibility import AttentionCall, accumulate, as_given, by_heads, prepare, slice_of
from ..._grads import AttentionGrads, AttentionWeightsGrads
from ..._options import AttentionOptions
from ...backend import Array, Tile
from .models import Model


def _attention(
    model: Model, result: Any, query: Array, key: Array, value: Array, *, return_logsumexp: bool = False, **options: Any
) -> Any:
    """Return the error of the output, and that of the logsumexp."""
    call = call_of(model, "scaled_dot_product_attention", {"query": query, "key": key, "value": value}, options)
    out, logsumexp = errors_by_row(model, call, int(value.shape[-1]))
    shape = (result[0] if return_logsumexp else result).shape
    out = model.be.xp.reshape(out, shape)
    return (out, model.be.xp.reshape(logsumexp, shape[:-1])) if return_logsumexp else out


def _weights(
    model: Model, result: Any, query: Array, key: Array, *, return_logsumexp: bool = False, **options: Any
) -> Any:
    """Return the error of the weights, and that of the logsumexp."""
    call = call_of(model, "attention_weights", {"query": query, "key": key}, options)
    weights, logsumexp = errors_by_row(model, call, int(key.shape[-2]))
    shape = (result[0] if return_logsumexp else result).shape
    weights = model.be.xp.reshape(weights, shape)
    return (weights, model.be.xp.reshape(logsumexp, shape[:-1])) if return_logsumexp else weights


def _attention_backward(
    model: Model, result: AttentionGrads, dout: Array, query: Array, key: Array, value: Array, **options: Any
) -> AttentionGrads:
    """Return the error of each gradient."""
    arrays = {"query": query, "key": key, "value": value, "dout": dout}
    return AttentionGrads(*errors_of_gradients(model, "scaled_dot_product_attention_backward", result, arrays, options))


def _weights_backward(
    model: Model, result: AttentionWeightsGrads, dout: Array, query: Array, key: Array, **options: Any
) -> AttentionWeightsGrads:
    """Return the error of each gradient."""
    arrays = {"query": query, "key": key, "dout": dout}
    padded = AttentionGrads(result.dquery, result.dkey, None, result.dbias, result.dsink)
    dquery, dkey, _, dbias, dsink = errors_of_gradients(model, "attention_weights_backward", padded, arrays, options)
    return AttentionWeightsGrads(dquery, dkey, dbias, dsink)


ANALYSES: dict[Callable[..., Any], Callable[..., Any]] = {
    refimpl.scaled_dot_product_attention: _attention,
    refimpl.scaled_dot_product_attention_backward: _attention_backward,
    refimpl.attention_weights: _weights,
    refimpl.attention_weights_backward: _weights_backward,
}
"""The analysis of each op."""


def call_of(model: Model, function: str, arrays: dict[str, Array], options: dict[str, Any]) -> AttentionCall:
    """Return the arguments in the form of tiles, with 0 for what is not finite; a bias or sink of -inf hides."""
    clean = {name: model.clean(array) for name, array in arrays.items()}
    given = AttentionOptions(**options)
    given = replace(given, bias=_finite_or_hiding(model, given.bias), sink=_finite_or_hiding(model, given.sink))
    return prepare(model.be, clean, _checks.attention(function, clean, given, None), given)


def _finite_or_hiding(model: Model, array: Array | None) -> Array | None:
    return None if array is None else model.be.xp.where(array == -math.inf, array, model.clean(array))


class InputErrors(NamedTuple):
    """How far the arguments of the softmax and its products are off themselves, in the form of tiles; None: exact."""

    query: Array | None = None
    key: Array | None = None
    value: Array | None = None
    dout: Array | None = None


EXACT = InputErrors()


class _Rows(NamedTuple):
    """The weights of the rows of a tile, and their errors."""

    p: Array
    """(..., rows, keys)"""
    kept: Array
    """The weights after dropout."""
    own: Array
    """(..., rows, keys): the relative error of each weight by itself."""
    common: Array
    """(..., rows, 1): the relative error that the weights of a row have in common."""
    stored: Array
    """(..., rows, 1): what is added to it where the weights come from a stored logsumexp."""
    count: Array
    """(..., rows, 1): how many keys are visible."""
    logsumexp: Array
    """(..., rows, 1)"""
    of_logsumexp: Array
    """(..., rows, 1): its error."""
    slope: Array | None
    """The derivative of the softcap, and its error."""
    of_slope: Array | None
    sink: tuple[Array, Array] | None
    """The weight of the sink, (..., rows, 1), and its own relative error."""


def _rows(model: Model, call: AttentionCall, tile: Tile, keys: slice, inputs: InputErrors) -> _Rows:
    xp, at = call.be.xp, model.arithmetic
    q, k = slice_of(call.query, tile), slice_of(call.key, (*tile[:-1], keys))
    s, slope, *_ = scores_of(call, tile, keys)
    seen = s != -math.inf
    plain = call.softcap is None and call.bias is None  # then the products are the scores
    t = xp.where(seen, s, 0.0) if plain else call.scale * (q @ xp.matrix_transpose(k))
    sizes = model.size_of(call.scale) * (model.size(q) @ xp.matrix_transpose(model.size(k)))
    error = model.of_sum(t, sizes, float(q.shape[-1])) + model.roundings(1.0) * sizes + model.relative(1.0, t)
    columns, factor = (*tile[:-1], keys), model.size_of(call.scale)
    if inputs.query is not None and inputs.key is not None:
        of_query, of_key = slice_of(inputs.query, tile), slice_of(inputs.key, columns)
        error = error + factor * (of_query @ xp.matrix_transpose(model.grown(model.size(k), of_key)))
        error = error + factor * (model.size(q) @ xp.matrix_transpose(of_key))
    of_slope = None
    if call.softcap is not None and slope is not None:
        tanh = xp.tanh(t / call.softcap)
        of_slope = model.size(2.0 * tanh) * (
            model.size(slope / call.softcap) * error + model.relative(at.exp_ulps, tanh)
        ) + model.roundings(2.0)
        error = model.size(slope) * (error + model.relative(2.0, t)) + model.relative(
            at.exp_ulps + 1.0, call.softcap * tanh
        )
    s = t if plain else xp.where(seen, s, 0.0)
    if call.bias is not None:
        error = error + model.relative(1.0, s)
    sink = None if call.sink is None else slice_of(call.sink, tile)
    some = xp.any(seen, axis=-1, keepdims=True)
    m = xp.max(xp.where(seen, s, -math.inf), axis=-1, keepdims=True)
    m = m if sink is None else xp.maximum(m, sink)
    m = xp.where(xp.isfinite(m), m, 0.0)
    e = xp.where(seen, xp.exp(s - m), 0.0)
    total = xp.sum(e, axis=-1, keepdims=True)
    e_sink = None if sink is None else xp.exp(sink - m)
    total = total if e_sink is None else total + e_sink
    total = xp.where(total > 0, total, 1.0)
    p = e / total
    own = model.of_exponent(error + model.relative(1.0, xp.abs(s) + xp.abs(m)) + model.roundings(at.exp_ulps))
    one = 1.0 + 0.0 * m
    count = xp.sum(xp.astype(seen, p.dtype), axis=-1, keepdims=True)
    mean = xp.sum(model.size(p) * own, axis=-1, keepdims=True)
    sizes = xp.sum(model.size(p), axis=-1, keepdims=True)
    of_sink = None
    if e_sink is not None:
        p_sink = e_sink / total
        known = xp.where(sink == -math.inf, 0.0, sink)
        of_sink = model.of_exponent(model.relative(1.0, xp.abs(known) + xp.abs(m)) + model.roundings(at.exp_ulps))
        mean, sizes = mean + model.size(p_sink) * of_sink, sizes + model.size(p_sink)
    growth = model.of_quotient(mean)
    common = model.of_sum(one, sizes, count + 1.0) + model.roundings(2.0)
    logsumexp = m + xp.log(total)
    of_logsumexp = (
        mean * growth + common + model.relative(1.0, xp.abs(m) + xp.abs(logsumexp))
        + model.roundings(at.exp_ulps) + model.relative(at.exp_ulps, logsumexp)
    )  # fmt: skip
    return _Rows(
        p=p,
        kept=dropped(call, tile, keys, p),
        own=own * growth,
        common=xp.where(some, common, 0.0),
        stored=model.of_exponent(mean * growth + model.relative(1.0, xp.abs(logsumexp) + xp.abs(m))),
        count=count,
        logsumexp=logsumexp,
        of_logsumexp=xp.where(some, of_logsumexp, 0.0),
        slope=slope,
        of_slope=of_slope,
        sink=None if of_sink is None else (p_sink, of_sink * growth),
    )


def _output(model: Model, call: AttentionCall, rows: _Rows, columns: Tile, inputs: InputErrors) -> tuple[Array, Array]:
    """Return the output and its error: (..., rows, Ev)."""
    xp, v = call.be.xp, slice_of(call.value, columns)
    out = rows.kept @ v
    # With weights w = p own: w (kept v / p - out) is what an error of each weight does to the output, which it divides.
    if call.dropout_mask is None:
        error = model.deviation(model.size(rows.p) * rows.own, v, out)
    else:
        error = (model.size(rows.kept) * rows.own) @ model.size(v) * 2.0 + 2.0 * model.size(out) * xp.sum(
            model.size(rows.p) * rows.own, axis=-1, keepdims=True
        )
    if rows.sink is not None:
        p_sink, of_sink = rows.sink
        error = error + model.size(p_sink) * of_sink * model.size(out)
    if inputs.value is not None:
        error = error + model.size(rows.kept) @ slice_of(inputs.value, columns)
    sizes = model.size(rows.kept) @ model.size(v)
    error = error + rows.common * model.grown(model.size(out), error)
    error = error + model.half * model.grown(sizes, error)
    if model.half_floor:
        error = error + model.half_floor * (xp.astype(rows.p > 0, v.dtype) @ model.size(v))
    return out, error + model.of_sum(out, model.grown(sizes, error), rows.count + 1.0)


def errors_by_row(model: Model, call: AttentionCall, columns: int, inputs: InputErrors = EXACT) -> tuple[Array, Array]:
    """Return the errors of the output, or of the weights of a call without value, and of the logsumexp."""
    be = call.be
    result = be.full((*call.space, columns), 0, be.xp.float64)
    logsumexp = be.full(call.space, 0, be.xp.float64)

    def work(*tile: slice) -> None:
        keys = call.visible_keys(tile)
        if keys is None:
            return
        rows = _rows(model, call, tile, keys, inputs)
        if call.value is None:
            size = model.size(rows.p)
            own = rows.own * model.size(1.0 - rows.p)  # a weight is in the sum that divides it
            others = _mean_of_others(model, rows)
            result[(*tile, keys)] = size * (own + others + rows.common)
        else:
            result[(*tile, ...)] = _output(model, call, rows, (*tile[:-1], keys), inputs)[1]
        logsumexp[tile] = rows.of_logsumexp[..., 0]

    be.run(work, call.tiles(12))
    return result, logsumexp


def _mean_of_others(model: Model, rows: _Rows) -> Array:
    """Return what the errors of all weights of a row do to the sum that divides each."""
    xp = model.be.xp
    mean = xp.sum(model.size(rows.p) * rows.own, axis=-1, keepdims=True)
    return mean if rows.sink is None else mean + model.size(rows.sink[0]) * rows.sink[1]


def errors_of_gradients(
    model: Model,
    function: str,
    result: AttentionGrads,
    arrays: dict[str, Array],
    options: dict[str, Any],
    inputs: InputErrors = EXACT,
) -> list[Array | None]:
    """Return the errors of the gradients of query, key, value, bias and sink, None for those that are not there."""
    be, xp = model.be, model.be.xp
    options = {name: option for name, option in options.items() if name != "return_logsumexp"}
    dlse = options.pop("dlogsumexp", None)
    call = call_of(model, function, arrays, options)
    dout = by_heads(be, model.clean(arrays["dout"]), call.space)
    dlse = None if dlse is None else xp.reshape(model.clean(dlse), (*call.space, 1))
    arguments = (call.query, call.key, call.value, call.bias, call.sink)
    # Per gradient: errors of its terms, sizes of its terms, and their number.
    sums = [None if a is None else [be.full(tuple(a.shape), 0, xp.float64) for _ in range(3)] for a in arguments]

    def work(*tile: slice) -> list[tuple[Tile, tuple[Array, ...]] | None]:
        keys = call.visible_keys(tile)
        if keys is None:
            return []
        columns, own = (*tile[:-1], keys), (*tile, call.own_keys(keys))
        found = _gradients_of_tile(model, call, dout, dlse, tile, keys, inputs)
        places = (tile, columns, columns, own, tile)
        return [None if part is None else (at, part) for at, part in zip(places, found, strict=True)]

    def collect(_: Tile, found: list[tuple[Tile, tuple[Array, ...]] | None]) -> None:
        for totals, part in zip(sums, found, strict=False):
            if totals is not None and part is not None:
                for total, array in zip(totals, part[1], strict=True):
                    accumulate(be, total, part[0], array)

    be.run(work, call.tiles(20, gradients=6), collect)
    errors: list[Array | None] = []
    given = (arrays["query"], arrays["key"], arrays.get("value"), options.get("bias"), options.get("sink"))
    for gradient, totals, argument in zip(result, sums, given, strict=True):
        if gradient is None or totals is None:
            errors.append(None)
            continue
        terms, sizes, count = (as_given(be, total, argument) for total in totals)
        errors.append(terms + model.of_sum(gradient, model.grown(sizes, terms), count))
    return errors


class _OfScores(NamedTuple):
    """The gradient ds of the scores of a tile, (..., rows, keys), and its errors."""

    ds: Array
    pulled: Array
    """What an error of D does to ds: the weights times the slope of the softcap."""
    own: Array
    """Each pair's own error."""
    mean: Array
    """(..., rows, 1): D, the mean of dp."""
    of_mean: Array
    """(..., rows, 1): its error, which all pairs of a row share."""
    common: Array
    """(..., rows, 1): the relative error that all pairs of a row share."""
    each: Array
    """The error of each element, all three together."""
    bias: tuple[Array, Array]
    """The error of the gradient of the bias, and its size."""


def _gradients_of_tile(
    model: Model,
    call: AttentionCall,
    dout: Array,
    dlse: Array | None,
    tile: Tile,
    keys: slice,
    inputs: InputErrors,
) -> list[tuple[Array, ...] | None]:
    """Return for each gradient: the errors of the terms that the rows add, their sizes, and their number."""
    xp, size = call.be.xp, model.size
    rows = _rows(model, call, tile, keys, inputs)
    of = _of_scores(model, call, dout, dlse, tile, keys, rows, inputs)
    seen = xp.astype(xp.broadcast_to(rows.p > 0, of.ds.shape), rows.p.dtype)
    terms = (xp.sum(seen, axis=-1, keepdims=True), xp.matrix_transpose(xp.sum(seen, axis=-2, keepdims=True)))
    dbias = (
        None if call.bias is None else tuple(a[..., : call.own_keys(keys).stop - keys.start] for a in (*of.bias, seen))
    )
    dsink = None
    if rows.sink is not None:
        p_sink, of_sink = rows.sink
        product, of_mean = p_sink * of.mean, size(p_sink) * of.of_mean
        dsink = (
            of_mean + (of_sink + of.common) * model.grown(size(product), of_mean),
            size(product),
            1.0 + 0.0 * product,
        )
    dquery, dkey = _of_query_and_key(model, call, dout, tile, keys, of, seen, inputs)
    dvalue = None if call.value is None else (*_of_value(model, call, dout, tile, rows, of.common, inputs), terms[1])
    return [(*dquery, terms[0]), (*dkey, terms[1]), dvalue, dbias, dsink]


def _of_scores(
    model: Model,
    call: AttentionCall,
    dout: Array,
    dlse: Array | None,
    tile: Tile,
    keys: slice,
    rows: _Rows,
    inputs: InputErrors,
) -> _OfScores:
    """Return `ds = p (dp - D)` and its errors, from those of p, of dp and of D."""
    xp, size = call.be.xp, model.size
    p, sp, common = rows.p, size(rows.p), rows.common + rows.stored
    if call.value is None:
        dp, of_dp, of_mean = slice_of(dout, (*tile, keys)), 0.0 * p, 0.0 * common
    else:
        dp, of_dp, of_mean = _of_weights(model, call, slice_of(dout, tile), tile, keys, rows, inputs)
    dp, of_dp = xp.where(p > 0, dp, 0.0), xp.where(p > 0, of_dp, 0.0)
    products = p * dp
    mean, sizes = xp.sum(products, axis=-1, keepdims=True), xp.sum(size(products), axis=-1, keepdims=True)
    # The mean of dp, weighted: shifting all dp by their mean changes none of the errors but those of its sum.
    in_turn = xp.sum(sp * (rows.own * model.grown(size(dp), of_dp) + of_dp), axis=-1, keepdims=True)
    in_turn = in_turn + common * model.grown(size(mean), in_turn)
    one_sign = xp.sum(xp.abs(products), axis=-1, keepdims=True)
    of_mean = model.either(of_mean, in_turn + model.of_sum(one_sign, model.grown(sizes, in_turn), rows.count))
    if dlse is not None:
        less = dlse[(*tile, ...)]
        mean = mean - less
        of_mean = of_mean + model.relative(1.0, xp.abs(mean) + xp.abs(less))
    centred = dp - mean
    apart = of_dp + model.relative(1.0, xp.abs(dp) + xp.abs(mean))
    ds = p * centred
    own = sp * (rows.own * model.grown(size(centred), apart + of_mean) + apart)
    if model.name == "worst":
        own = own * (1.0 + rows.own + common) + sp * (rows.own + common) * of_mean
    of_bias = size(ds)
    each = own + sp * of_mean + common * of_bias
    bias, pulled = (each, of_bias), p
    if rows.slope is not None and rows.of_slope is not None:
        of_slope = rows.of_slope * model.grown(of_bias, each)
        own, each = size(rows.slope) * own + of_slope, size(rows.slope) * each + of_slope
        ds, pulled = ds * rows.slope, p * rows.slope
    return _OfScores(ds, pulled, own, mean, of_mean, common, each, bias)


def _of_weights(
    model: Model, call: AttentionCall, do: Array, tile: Tile, keys: slice, rows: _Rows, inputs: InputErrors
) -> tuple[Array, Array, Array]:
    """Return dp, the gradient of the weights, its error, and that of its mean taken as `sum dout out`."""
    xp, transpose, size = call.be.xp, call.be.xp.matrix_transpose, model.size
    columns = (*tile[:-1], keys)
    v = slice_of(call.value, columns)
    out, of_out = _output(model, call, rows, columns, inputs)
    of_out = of_out + size(model.arithmetic.u_out * out)
    features = float(v.shape[-1])
    plain = do @ transpose(v)
    of_plain = model.of_sum(plain, size(do) @ transpose(size(v)), features)
    of_mean = size(do) * of_out
    if inputs.dout is not None and inputs.value is not None:
        of_do, of_v = slice_of(inputs.dout, tile), slice_of(inputs.value, columns)
        of_plain = of_plain + of_do @ transpose(model.grown(size(v), of_v)) + size(do) @ transpose(of_v)
        of_mean = of_mean + of_do * model.grown(size(out), of_out)
    dp = dropped(call, tile, keys, plain)
    of_dp = dropped(call, tile, keys, of_plain)
    if model.name == "expected":
        of_dp = dropped(call, tile, keys, of_dp)
    products = xp.sum(size(do) * model.grown(size(out), of_out), axis=-1, keepdims=True)
    of_mean = xp.sum(of_mean, axis=-1, keepdims=True)
    of_mean = of_mean + model.of_sum(xp.sum(do * out, axis=-1, keepdims=True), products, features)
    return dp, of_dp + model.relative(1.0, dp), of_mean


def _of_query_and_key(
    model: Model,
    call: AttentionCall,
    dout: Array,
    tile: Tile,
    keys: slice,
    of: _OfScores,
    seen: Array,
    inputs: InputErrors,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return the errors of the terms of `scale ds k` and `scale ds^T q`, and their sizes."""
    transpose, size = call.be.xp.matrix_transpose, model.size
    q, k, factor = slice_of(call.query, tile), slice_of(call.key, (*tile[:-1], keys)), model.size_of(call.scale)
    sizes, off = size(of.ds), model.grown(size(of.ds), of.each)
    of_q, of_k = factor * (sizes @ size(k)), factor * (transpose(sizes) @ size(q))
    rounded = model.half * off + model.half_floor * seen if model.half else 0.0
    if model.name == "expected":
        dquery = factor * ((of.own + rounded) @ size(k) + of.of_mean * size(of.pulled @ k))
    else:
        dquery = factor * ((of.each + rounded) @ size(k))
    dquery = dquery + of.common * size(call.scale * (of.ds @ k)) + model.roundings(2.0) * of_q
    dkey = factor * (transpose(of.each + rounded) @ size(q)) + model.roundings(2.0) * of_k
    if inputs.key is not None and inputs.query is not None:
        dquery = dquery + factor * (off @ slice_of(inputs.key, (*tile[:-1], keys)))
        dkey = dkey + factor * (transpose(off) @ slice_of(inputs.query, tile))
    return (dquery, of_q), (_growth(model, call, q, dout, tile) * dkey, of_k)


def _of_value(
    model: Model, call: AttentionCall, dout: Array, tile: Tile, rows: _Rows, common: Array, inputs: InputErrors
) -> tuple[Array, Array]:
    """Return the errors of the terms of `p^T dout`, and their sizes."""
    transpose, size = call.be.xp.matrix_transpose, model.size
    do, kept = slice_of(dout, tile), size(rows.kept)
    relative = rows.own + common
    terms = kept * (relative + model.half * (1.0 + relative) if model.half else relative)
    if model.half_floor:
        terms = terms + model.half_floor * call.be.xp.astype(rows.p > 0, terms.dtype)
    error = transpose(terms) @ size(do)
    if inputs.dout is not None:
        error = error + transpose(model.grown(kept, terms)) @ slice_of(inputs.dout, tile)
    growth = _growth(model, call, slice_of(call.query, tile), dout, tile)
    return growth * error, transpose(kept) @ size(do)


def _growth(model: Model, call: AttentionCall, q: Array, dout: Array, tile: Tile) -> Array | float:
    """Return by what the errors of sums over the rows of the tile grow where its rows are equal."""
    return model.of_equal_rows(*([q] if call.value is None else [q, slice_of(dout, tile)]))
