"""How far rounding may move the weights and the output of the rows of a tile: see `attention`."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from ... import _checks
from ..._engine.arguments import prepare
from ..._engine.softmax import dropped, scores_of
from ..._engine.visibility import AttentionCall, slice_of
from ..._options import AttentionOptions
from ...backend import Array, Tile
from .models import Model


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


class Rows(NamedTuple):
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


def _scores(
    model: Model, call: AttentionCall, tile: Tile, keys: slice, inputs: InputErrors
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Return the scores, 0 at hidden pairs; which are visible; their errors; the softcap's slope, and its error."""
    xp, transpose, at = call.be.xp, call.be.xp.matrix_transpose, model.arithmetic
    q, k = slice_of(call.query, tile), slice_of(call.key, (*tile[:-1], keys))
    s, slope, *_ = scores_of(call, tile, keys)
    seen = s != -math.inf
    plain = call.softcap is None and call.bias is None  # then the products are the scores
    t = xp.where(seen, s, 0.0) if plain else call.scale * (q @ transpose(k))
    factor = model.size_of(call.scale)
    sizes = factor * (model.size(q) @ transpose(model.size(k)))
    error = model.of_sum(t, sizes, float(q.shape[-1])) + model.roundings(1.0) * sizes + model.relative(1.0, t)
    if inputs.query is not None and inputs.key is not None:
        of_query, of_key = slice_of(inputs.query, tile), slice_of(inputs.key, (*tile[:-1], keys))
        error = error + factor * (of_query @ transpose(model.grown(model.size(k), of_key)))
        error = error + factor * (model.size(q) @ transpose(of_key))
    of_slope = None
    if call.softcap is not None and slope is not None:
        tanh = xp.tanh(t / call.softcap)
        of_tanh = model.size(slope / call.softcap) * error + model.relative(at.exp_ulps, tanh)
        of_slope = model.size(2.0 * tanh) * of_tanh + model.roundings(2.0)
        error = model.size(slope) * (error + model.relative(2.0, t))
        error = error + model.relative(at.exp_ulps + 1.0, call.softcap * tanh)
    s = t if plain else xp.where(seen, s, 0.0)
    if call.bias is not None:
        error = error + model.relative(1.0, s)
    return s, seen, error, slope, of_slope


def rows_of(model: Model, call: AttentionCall, tile: Tile, keys: slice, inputs: InputErrors) -> Rows:
    """Return the weights of the rows of a tile, and their errors."""
    xp, at = call.be.xp, model.arithmetic
    s, seen, error, slope, of_slope = _scores(model, call, tile, keys, inputs)
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
    return Rows(
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


def output_of(model: Model, call: AttentionCall, rows: Rows, columns: Tile, inputs: InputErrors) -> tuple[Array, Array]:
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
        rows = rows_of(model, call, tile, keys, inputs)
        if call.value is None:
            size = model.size(rows.p)
            own = rows.own * model.size(1.0 - rows.p)  # a weight is in the sum that divides it
            others = _mean_of_others(model, rows)
            result[(*tile, keys)] = size * (own + others + rows.common)
        else:
            result[(*tile, ...)] = output_of(model, call, rows, (*tile[:-1], keys), inputs)[1]
        logsumexp[tile] = rows.of_logsumexp[..., 0]

    be.run(work, call.tiles(12))
    return result, logsumexp


def _mean_of_others(model: Model, rows: Rows) -> Array:
    """Return what the errors of all weights of a row do to the sum that divides each."""
    xp = model.be.xp
    mean = xp.sum(model.size(rows.p) * rows.own, axis=-1, keepdims=True)
    return mean if rows.sink is None else mean + model.size(rows.sink[0]) * rows.sink[1]
