"""Scores, softmax, weighted sum, and the way back, tile by tile; untiled in `textbook/attention.py`.

A tile is some heads x some query rows x all the keys that these rows may see, so each softmax is computed from whole
rows. The backward computes `_softmax` again for each tile, rather than keep an array of the size of the scores.

H heads (Hq of the queries, Hkv of keys and values); L length; E features. Inside, arrays are as in `_pairs`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ..backend import Array, Backend, Tile
from . import nan_safe
from .visibility import (
    AttentionCall,
    accumulate,
    add_broadcast,
    additive_mask,
    by_heads,
    slice_of,
    tiles_are_disjoint,
    transposed_sum,
    visible,
    weighted_sum,
)

LONG_ROWS = 128  # with at least so many rows and keys in a tile, testing for safe logits takes less time than it saves
SAFE_LOGIT = 24.0  # exp of logits up to this size, and sums of them, neither overflow nor vanish in any dtype


def attend(call: AttentionCall) -> tuple[Array, Array]:
    """Return the output and the logsumexp: (..., Hq, Lq, Ev), (..., Hq, Lq)."""
    return _by_rows(call, _features(call.value), _attend)


def attention_probabilities(call: AttentionCall) -> tuple[Array, Array]:
    """Return the weights and the logsumexp: (..., Hq, Lq, Lk), (..., Hq, Lq)."""
    return _by_rows(call, call.scores[-1], _weigh)


def _features(array: Array | None) -> int:
    return 0 if array is None else int(array.shape[-1])


def _by_rows(call: AttentionCall, columns: int, of_tile: Callable[..., None]) -> tuple[Array, Array]:
    """Return what `of_tile` writes for every row, of so many columns, and its logsumexp."""
    xp = call.be.xp
    out = call.be.full((*call.space, columns), 0, call.query.dtype)
    logsumexp = call.be.full(call.space, -math.inf, call.query.dtype)
    if call.sink is not None:  # a query that sees no key meets only the sink
        logsumexp[...] = call.sink[..., 0]

    def work(*tile: slice) -> None:
        keys = call.visible_keys(tile)
        if keys is not None:
            of_tile(call, tile, keys, out[(*tile, ...)], logsumexp[tile])

    call.be.run(work, call.tiles(1))
    return xp.reshape(out, (*call.scores[:-1], columns)), xp.reshape(logsumexp, call.scores[:-1])


def attend_backward(call: AttentionCall, dout: Array, dlogsumexp: Array | None) -> tuple[Array | None, ...]:
    """Return the gradients of query, key, value, bias and sink, with the dimensions that these have in the call.

    `dout` is the gradient of the output, or of the weights if the call has no value.
    """
    (dout,) = call.be.widened(dout)
    if call.has_hidden_pairs:
        dout = call.be.contiguous(dout)
        # Dropout scales what it keeps up; the products with the values must stay finite then, too.
        most = call.be.float_range(dout)[1] * call.keep_prob**2
        bounded = all(call.be.sum_of_squares(a) < most for a in (dout, dlogsumexp) if a is not None)
        call = replace(call, finite=call.finite and bounded)
    dout = by_heads(call.be, dout, call.space)
    dlse = None if dlogsumexp is None else call.be.xp.reshape(dlogsumexp, (*call.space, 1))
    arguments = (call.query, call.key, call.value, call.bias, call.sink)
    totals = [None if array is None else call.be.full(tuple(array.shape), 0, array.dtype) for array in arguments]

    def work(*tile: slice) -> list[tuple[Tile, Array] | None]:
        """Add up the gradients that no other tile adds to; return the others."""
        keys = call.visible_keys(tile)
        if keys is None:  # no visible key: only the sink
            keys, parts = slice(0, 0), (None, None, None, None, _sink_alone(call, dlse, tile))
        else:
            parts = _attend_backward(call, dout, dlse, tile, keys)
        columns, own = (*tile[:-1], keys), (*tile, call.own_keys(keys))
        left: list[tuple[Tile, Array] | None] = [None] * len(totals)
        for i, (total, at) in enumerate(zip(totals, (tile, columns, columns, own, tile), strict=True)):
            if total is not None and parts[i] is not None:
                if tiles_are_disjoint((*total.shape[:-2], 1 if at is columns else total.shape[-2]), tile, call.space):
                    accumulate(call.be, total, at, parts[i])
                else:
                    left[i] = at, parts[i]
        return left

    def collect(_: Tile, left: list[tuple[Tile, Array] | None]) -> None:
        for total, found in zip(totals, left, strict=True):
            if total is not None and found is not None:
                accumulate(call.be, total, *found)

    held = call.scores[-1] * (_features(call.key) + _features(call.value)) * call.be.itemsize(call.query)
    call.be.run(work, call.tiles(2, gradients=2), collect, result_bytes=held)
    return tuple(totals)


def _sink_alone(call: AttentionCall, dlogsumexp: Array | None, tile: Tile) -> Array | None:
    """Return the gradient of the sink for rows that see no key: their logsumexp is the sink."""
    if call.sink is None or dlogsumexp is None:
        return None
    return nan_safe.select(call.be, slice_of(call.sink, tile) != -math.inf, dlogsumexp[(*tile, ...)])


class _Softmax(NamedTuple):
    """The softmax of the rows of a tile: `p = e / total`."""

    e: Array
    """(..., rows, keys): exp(score - row maximum), 0 at hidden pairs."""
    total: Array
    """(..., rows, 1): the sum of e and of the sink's exp; 1 where that is 0."""
    p_sink: Array | None
    """(..., rows, 1)"""
    logsumexp: Array
    """(..., rows, 1)"""
    slope: Array | None
    """The derivative of the softcap at each pair."""
    seen: Array | None
    """Which pairs are visible; None where hidden pairs are 0 already."""


def _softmax(call: AttentionCall, tile: Tile, keys: slice) -> _Softmax:
    """Return softmax(s) for the rows of the tile."""
    xp = call.be.xp
    s, slope, seen, sees = scores_of(call, tile, keys)
    sink = None if call.sink is None else slice_of(call.sink, tile)
    shift = _subtract_row_max(call, tile, keys, s, sink, sees)
    e = nan_safe.select(call.be, seen, call.be.exp(s))
    total, p_sink = call.be.row_sums(e), None
    if sink is not None:
        p_sink = xp.exp(sink - shift)
        total = total + p_sink
        p_sink = p_sink / total
    logsumexp = shift + xp.log(total)
    if sees is not None:
        total = xp.where(sees, total, 1.0)
        if sink is not None:  # a query that sees no key meets only the sink
            logsumexp, p_sink = xp.where(sees, logsumexp, sink), xp.where(sees, p_sink, 1.0)
    return _Softmax(e, total, p_sink, logsumexp, slope, seen)


def scores_of(call: AttentionCall, tile: Tile, keys: slice) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Return the scores of the tile, -inf at hidden pairs, and `slope` and `seen` of `_Softmax`.

    Last, which rows see any key, (..., rows, 1); None where each does.
    """
    xp = call.be.xp
    slope, seen, sees = None, None, None
    s = call.be.matmul(
        call.scale * slice_of(call.query, tile), xp.matrix_transpose(slice_of(call.key, (*tile[:-1], keys)))
    )
    if call.softcap is not None:
        capped = xp.tanh(s / call.softcap)
        s, slope = call.softcap * capped, (1.0 - capped) * (1.0 + capped)
    if call.bias is not None:
        s = add_broadcast(s, call.with_appended_keys(slice_of(call.bias, (*tile, call.own_keys(keys))), keys, 0.0))
    if call.has_hidden_pairs and call.finite and not call.all_visible(tile, keys):
        doubtful = call.partially_visible_keys(tile, keys)
        minus_inf, allowed = additive_mask(call, tile, doubtful)
        if doubtful == keys:
            sees, s = xp.any(allowed, axis=-1, keepdims=True), add_broadcast(s, minus_inf)
        else:  # all rows see the other keys
            s[..., doubtful.start - keys.start :] += minus_inf
    elif call.has_hidden_pairs and not call.finite:
        seen = visible(call, tile, keys)
        sees = xp.any(seen, axis=-1, keepdims=True)
        seen, s = xp.broadcast_arrays(seen, s)
        s = xp.where(seen, s, -math.inf)
    return s, slope, seen, sees


def _subtract_row_max(
    call: AttentionCall, tile: Tile, keys: slice, s: Array, sink: Array | None, sees: Array | None
) -> Array | float:
    """Subtract each row's maximum in place, so that exp cannot overflow, and return it: (..., rows, 1), or 0.

    Any shift gives the same softmax, as long as nothing overflows or vanishes. So rows whose maximum is a safe logit
    are not shifted, which on a CPU saves a pass over the scores, or two where the norms of queries and keys bound all
    scores (Cauchy-Schwarz). The shift of a row depends on visible scores only.
    """
    xp = call.be.xp
    saves = call.be.reads_free and min(s.shape[-2:]) >= LONG_ROWS
    safe: Array | bool = False
    if saves and not call.has_hidden_pairs and sink is None:
        largest_norm = xp.max(_norms(call.be, slice_of(call.key, (*tile[:-1], keys))), axis=-2, keepdims=True)
        safe = abs(call.scale) * _norms(call.be, slice_of(call.query, tile)) * largest_norm <= SAFE_LOGIT
        if xp.all(safe):
            return 0.0
    largest = call.be.row_largest(s)
    if sink is not None:
        largest = xp.maximum(largest, sink)
    if sees is not None:
        largest = xp.where(sees, largest, 0.0)
    if saves:
        largest = xp.where(safe | (largest >= 0.0) & (largest <= SAFE_LOGIT), 0.0, largest)
        if not xp.any(largest):
            return 0.0
    s -= largest
    return largest


def _norms(be: Backend, rows: Array) -> Array:
    """Return the Euclidean norm of each row, (..., rows, 1)."""
    return be.xp.sqrt(be.row_sums(rows, rows))


def _normalised(be: Backend, found: _Softmax) -> Array:
    """Return the weights `p = e / total`, in the memory of `e`."""
    p = found.e
    p /= found.total
    return nan_safe.select(be, found.seen, p)


def dropped(call: AttentionCall, tile: Tile, keys: slice, weights: Array) -> Array:
    """Return the weights after dropout: kept ones divided by `keep_prob`, the others times 0."""
    if call.dropout_mask is None:
        return weights
    keep = slice_of(call.dropout_mask, (*tile, keys))
    return weights * (call.be.xp.astype(keep, weights.dtype) / call.keep_prob)


def _weigh(call: AttentionCall, tile: Tile, keys: slice, weights: Array, logsumexp: Array) -> None:
    """Write the weights and the logsumexp of the rows of the tile."""
    found = _softmax(call, tile, keys)
    weights[..., keys] = _normalised(call.be, found)
    logsumexp[...] = found.logsumexp[..., 0]


def _attend(call: AttentionCall, tile: Tile, keys: slice, out: Array, logsumexp: Array) -> None:
    """Write `o = dropout(p) @ v` and the logsumexp of the rows of the tile."""
    found = _softmax(call, tile, keys)
    v = slice_of(call.value, (*tile[:-1], keys))
    p = _normalised(call.be, found)  # divided first, because undivided sums may overflow
    out[...] = weighted_sum(call, dropped(call, tile, keys, p), found.seen, v)
    logsumexp[...] = found.logsumexp[..., 0]


def _attend_backward(
    call: AttentionCall, dout: Array, dlogsumexp: Array | None, tile: Tile, keys: slice
) -> tuple[Array, Array, Array | None, Array, Array | None]:
    """Return what the rows of the tile add to the gradients of query, key, value, bias and sink.

    `scaled_dot_product_attention_backward` and `_softmax_backward` of the textbook, line by line.
    """
    xp = call.be.xp
    columns = (*tile[:-1], keys)
    q, k = slice_of(call.query, tile), slice_of(call.key, columns)
    found = _softmax(call, tile, keys)
    _, _, p_sink, _, slope, seen = found
    p = _normalised(call.be, found)
    if call.value is None:  # the weights are the output
        dv, dp = None, call.be.copy(slice_of(dout, (*tile, keys)))
    else:
        v, do = slice_of(call.value, columns), slice_of(dout, tile)
        dv = transposed_sum(call, dropped(call, tile, keys, p), seen, do)
        dp = dropped(call, tile, keys, call.be.matmul(do, xp.matrix_transpose(v)))
    dp = nan_safe.select(call.be, seen, dp)
    mean = call.be.row_sums(p, dp)
    if dlogsumexp is not None:
        mean = mean - dlogsumexp[(*tile, ...)]
    dp -= mean
    dp *= p
    dbias = nan_safe.select(call.be, seen, dp)
    dsink = None if p_sink is None else nan_safe.select(call.be, slice_of(call.sink, tile) != -math.inf, -p_sink * mean)
    ds = dbias if slope is None else nan_safe.select(call.be, seen, dbias * slope)
    dq = call.scale * weighted_sum(call, ds, seen, k)
    dk = transposed_sum(call, ds, seen, q)
    dk *= call.scale
    return dq, dk, dv, dbias[..., : call.own_keys(keys).stop - keys.start], dsink
