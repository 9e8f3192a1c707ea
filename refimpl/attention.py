"""Scaled dot-product attention.

A tile is some heads x some query rows x all the keys that these rows may see, so that the softmax of a row is computed
whole. `_probabilities` is the formula; the backward calls it again for each tile rather than keep what is quadratic.

H heads (Hq of the queries, Hkv of keys and values, R = Hq / Hkv queries that share a key head); L length; E features.
Inside, a query is (..., Hkv, R, Lq, E) and a key (..., Hkv, 1, Lk, E): sharing heads is broadcasting, like any other.
"""

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _checks, _masked, backend
from .backend import Array, Tile

__all__ = ["AttentionGrads", "scaled_dot_product_attention", "scaled_dot_product_attention_backward"]

Window = tuple[int | None, int | None]


class AttentionGrads(NamedTuple):
    """The gradients of attention: each has the shape of its argument, and is None if the argument was."""

    dquery: Array
    dkey: Array
    dvalue: Array
    dbias: Array | None
    dsink: Array | None


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    query_offset: int | Array = 0,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
    return_logsumexp: bool = False,
) -> Array | tuple[Array, Array]:
    """Let every query take the mean of the values, weighted by the softmax of its scores with the keys.

    Parameters
    ----------
    query : (..., Hq, Lq, E) or (Lq, E)
        float32 or float64.
    key : (..., Hkv, Lk, E) or (Lk, E)
        Query head h uses key head `h // (Hq / Hkv)`. The leading dimensions of query, key and value broadcast.
    value : (..., Hkv, Lk, Ev) or (Lk, Ev)
        With the heads of key; arrays of two dimensions have one head.
    bias : floating, broadcasts to (..., Hq, Lq, Lk), optional
        Added to the scores. A bias of -inf hides the pair, exactly as `mask=False` does.
    mask : bool, broadcasts to (..., Hq, Lq, Lk), optional
        True where the query may attend to the key.
    is_causal : bool
        Key j is visible to query i if `j <= i + query_offset`.
    window : (left, right), each at least 0 or None, optional
        Key j is visible to query i if `i + query_offset - left <= j <= i + query_offset + right`; None is unbounded.
    query_offset : int, or integer array that broadcasts to the batch dimensions
        The position of query 0 among the keys: 0 aligns both at their beginnings, `Lk - Lq` at their ends.
    query_lengths, key_lengths : integer array that broadcasts to the batch dimensions, optional
        How many queries and keys there are; what lies beyond is padding, and hidden.
    scale : float, optional
        `1 / sqrt(E)` unless given.
    return_logsumexp : bool
        Return the logsumexp of the scores, too.

    Returns
    -------
    out : (..., Hq, Lq, Ev) or (Lq, Ev)
        A new array of the dtype, backend and device of `query`. A query that sees no key gets 0.
    logsumexp : (..., Hq, Lq) or (Lq,)
        With `return_logsumexp`: `log(sum over visible keys of exp(score))`, -inf for a query that sees no key.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit.

    Notes
    -----
    For every head, over the pairs (i, j) that every one of the options allows,

        s = scale * query @ key^T + bias,    p = softmax(s) along the keys,    out = p @ value

    What a hidden pair holds never matters: a NaN or inf there reaches neither the output nor a gradient. To see that,
    one flag is read when an option hides pairs, which on a GPU waits for the device.

    References
    ----------
    Vaswani et al., Attention is all you need, arXiv:1706.03762, equation 1. Shazeer, arXiv:1911.02150 and Ainslie et
    al., arXiv:2305.13245 for shared key heads. `torch.nn.functional.scaled_dot_product_attention` (PyTorch 2) agrees,
    but for queries that see no key, some of whose kernels give NaN.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> scaled_dot_product_attention(query, key, np.array([[1.0], [3.0], [8.0]]), is_causal=True, query_offset=1)
    array([[2.]])
    """
    name = "scaled_dot_product_attention"
    _checks.flag(name, "return_logsumexp", return_logsumexp)
    call = _prepare(
        name, {"query": query, "key": key, "value": value}, bias, mask, is_causal, window,
        query_offset, query_lengths, key_lengths, scale,
    )  # fmt: skip
    out = backend.full((*call.space, value.shape[-1]), 0, query)
    logsumexp = backend.full(call.space, -math.inf, query)

    def work(*tile: slice) -> None:
        keys = call.visible_keys(tile)
        if keys is not None:
            out[(*tile, ...)], logsumexp[tile] = _attend(call, tile, keys)

    backend.run(work, call.tiles(4), query)
    out = backend.namespace(query).reshape(out, call.shape)
    return (out, backend.namespace(query).reshape(logsumexp, call.shape[:-1])) if return_logsumexp else out


def scaled_dot_product_attention_backward(
    dout: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    query_offset: int | Array = 0,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
    return_logsumexp: bool = False,
) -> AttentionGrads:
    """Return the gradients of `sum(dout * scaled_dot_product_attention(query, key, value, ...))`.

    Parameters
    ----------
    dout : (..., Hq, Lq, Ev) or (Lq, Ev)
        Of the shape, dtype and backend of the output.
    query, key, value, bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, scale, return_logsumexp
        As for `scaled_dot_product_attention`; `return_logsumexp` changes nothing.

    Returns
    -------
    AttentionGrads
        `dquery`, `dkey`, `dvalue` and `dbias`, new arrays of the shapes and the dtype of the arguments, summed over
        the dimensions along which these were broadcast; 0 for hidden pairs.

    Raises
    ------
    TypeError, ValueError
        As `scaled_dot_product_attention`, and if `dout` does not have the shape or dtype of the output.

    Notes
    -----
    From `out = p @ value`, the softmax `p_j = exp(s_j) / sum_k exp(s_k)`, whose derivative is
    `dp_j / ds_k = p_j (1[j = k] - p_k)`, and `s = scale * query @ key^T + bias`:

        dvalue = p^T @ dout,                              dp = dout @ value^T
        ds     = p * (dp - sum over keys of p * dp)
        dquery = scale * ds @ key,   dkey = scale * ds^T @ query,   dbias = ds

    References
    ----------
    Dao et al., FlashAttention, arXiv:2205.14135, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [0.0]])
    >>> grads = scaled_dot_product_attention_backward(np.array([[1.0]]), np.array([[0.0]]), x, x)
    >>> grads.dquery, grads.dvalue
    (array([[0.25]]), array([[0.5],
           [0.5]]))
    """
    name = "scaled_dot_product_attention_backward"
    _checks.flag(name, "return_logsumexp", return_logsumexp)
    call = _prepare(
        name, {"query": query, "key": key, "value": value, "dout": dout}, bias, mask, is_causal, window,
        query_offset, query_lengths, key_lengths, scale,
    )  # fmt: skip
    xp = backend.namespace(query)
    dout = _heads(dout, call.space)
    dquery, dkey, dvalue = (backend.full(tuple(a.shape), 0, a) for a in (call.query, call.key, call.value))
    dbias = None if call.bias is None else backend.full(tuple(call.bias.shape), 0, query)

    def work(*tile: slice) -> list[tuple[Array, Tile, Array]]:
        keys = call.visible_keys(tile)
        if keys is None:
            return []
        dq, dk, dv, ds = _attend_backward(call, dout, tile, keys)
        columns, pairs = (*tile[:-1], keys), (*tile, keys)
        parts = [(dquery, tile, dq), (dkey, columns, dk), (dvalue, columns, dv), (dbias, pairs, ds)]
        return parts if dbias is not None else parts[:3]

    def collect(_: Tile, parts: list[tuple[Array, Tile, Array]]) -> None:
        for total, at, part in parts:
            _accumulate(total, at, part)

    keys_and_values = call.key.shape[-2] * (call.key.shape[-1] + call.value.shape[-1]) * backend.itemsize(query)
    backend.run(work, call.tiles(6), query, collect, result_bytes=keys_and_values)
    return AttentionGrads(
        dquery=xp.reshape(dquery, query.shape),
        dkey=xp.reshape(dkey, key.shape),
        dvalue=xp.reshape(dvalue, value.shape),
        dbias=None if bias is None else xp.reshape(dbias, bias.shape),
        dsink=None,
    )


@dataclass(frozen=True)
class _Call:
    """The arguments of a call as the tiles use them: every array (..., Hkv, R, ., .), with all batch dimensions."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    mask: Array | None
    first: int | Array | None
    """Query i sees no key before `i + first`."""
    last: int | Array | None
    """Query i sees no key after `i + last`."""
    query_lengths: Array | None
    key_lengths: Array | None
    scale: float
    hides: bool
    """Whether any option may hide a pair."""
    finite: bool
    """Whether query, key, value and dout hold no NaN or inf, so that a hidden pair may be multiplied by 0."""
    shape: tuple[int, ...]
    """That of the output."""
    space: tuple[int, ...]
    """What there is to cut into tiles: (..., Hkv, R, Lq)."""

    def tiles(self, arrays: int) -> Iterator[Tile]:
        """Cut the queries into tiles, of which each holds so many arrays (..., rows, keys)."""
        row = arrays * self.key.shape[-2] + self.key.shape[-1] + self.value.shape[-1]
        return backend.tiles(self.space, row * backend.itemsize(self.query))

    def visible_keys(self, tile: Tile) -> slice | None:
        """Return the keys outside of which the rows of the tile see none, or None if there are none."""
        rows, start, stop = tile[-1], 0, int(self.key.shape[-2])
        if isinstance(self.first, int):
            start = max(start, rows.start + self.first)
        if isinstance(self.last, int):
            stop = min(stop, rows.stop + self.last)
        return slice(start, stop) if start < stop else None


def _probabilities(call: _Call, tile: Tile, keys: slice) -> tuple[Array, Array, Array | None]:
    """Return softmax(s), its logsumexp, and which pairs are visible (None: all), for the rows of the tile."""
    xp = backend.namespace(call.query)
    pairs = (*tile, keys)
    s = (call.scale * _take(call.query, tile)) @ xp.matrix_transpose(_take(call.key, (*tile[:-1], keys)))
    if call.bias is not None:
        s = s + _take(call.bias, pairs)
    if not call.hides:
        largest = xp.max(s, axis=-1, keepdims=True)
        p = xp.exp(s - largest)
        total = xp.sum(p, axis=-1, keepdims=True)
        return p / total, (largest + xp.log(total))[..., 0], None
    visible, s = xp.broadcast_arrays(_visible(call, pairs), s)
    s = xp.where(visible, s, -math.inf)
    sees = xp.any(visible, axis=-1, keepdims=True)
    largest = xp.where(sees, xp.max(s, axis=-1, keepdims=True), 0.0)
    p = xp.exp(s - largest)
    total = xp.sum(p, axis=-1, keepdims=True)
    p = _masked.select(visible, p / total)  # last: a total of NaN, or of 0 where nothing is seen, makes NaN of the row
    return p, (largest + xp.log(total))[..., 0], visible


def _attend(call: _Call, tile: Tile, keys: slice) -> tuple[Array, Array]:
    """Return the output and the logsumexp for the rows of the tile."""
    p, logsumexp, visible = _probabilities(call, tile, keys)
    v = _take(call.value, (*tile[:-1], keys))
    return _weighted_sum(call, p, visible, v), logsumexp


def _attend_backward(call: _Call, dout: Array, tile: Tile, keys: slice) -> tuple[Array, Array, Array, Array]:
    """Return what the rows of the tile add to the gradients of query, key, value and bias."""
    xp = backend.namespace(dout)
    columns = (*tile[:-1], keys)
    q, k, v, do = _take(call.query, tile), _take(call.key, columns), _take(call.value, columns), _take(dout, tile)
    p, _, visible = _probabilities(call, tile, keys)
    dv = _transposed_sum(call, p, visible, do)
    dp = _masked.select(visible, do @ xp.matrix_transpose(v))
    ds = _masked.select(visible, p * (dp - xp.sum(p * dp, axis=-1, keepdims=True)))
    dq = call.scale * _weighted_sum(call, ds, visible, k)
    dk = call.scale * _transposed_sum(call, ds, visible, q)
    return dq, dk, dv, ds


def _prepare(
    function: str,
    arrays: dict[str, Array],
    bias: Array | None,
    mask: Array | None,
    is_causal: bool,
    window: Window | None,
    query_offset: int | Array,
    query_lengths: Array | None,
    key_lengths: Array | None,
    scale: float | None,
) -> _Call:
    """Check the arguments and bring them into the form that the tiles use."""
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    shape = _checks.attention_arrays(function, arrays, bias)
    _checks.attention_options(
        function, query, (*shape[:-1], key.shape[-2]), bias=bias, mask=mask, is_causal=is_causal, window=window,
        query_offset=query_offset, query_lengths=query_lengths, key_lengths=key_lengths, scale=scale,
    )  # fmt: skip
    kv_heads = key.shape[-3] if key.ndim > 2 else 1
    heads = shape[-3] if len(shape) > 2 else 1
    space = (*shape[:-3], kv_heads, heads // kv_heads, shape[-2])
    left, right = (None if side is None else int(side) for side in window or (None, None))
    if is_causal:
        right = 0
    offset = query_offset if backend.is_array(query_offset) else int(query_offset)
    hides = may_hide(bias, mask, is_causal, window, query_lengths, key_lengths)
    return _Call(
        query=_heads(query, space),
        key=_heads(key, space),
        value=_heads(value, space),
        bias=None if bias is None else _heads(bias, space),
        mask=None if mask is None else _heads(mask, space),
        first=None if left is None else _shifted(offset, -left, space, key),
        last=None if right is None else _shifted(offset, right, space, key),
        query_lengths=None if query_lengths is None else _per_batch(query_lengths, space),
        key_lengths=None if key_lengths is None else _per_batch(key_lengths, space),
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        hides=hides,
        finite=not hides or all(backend.all_finite(array) for array in arrays.values()),
        shape=shape,
        space=space,
    )


def may_hide(
    bias: Array | None,
    mask: Array | None,
    is_causal: bool,
    window: Window | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    **_: Any,
) -> bool:
    """Return whether any option, of all that attention takes, may hide a pair."""
    sides = (None, None) if window is None else window
    return is_causal or any(option is not None for option in (bias, mask, *sides, query_lengths, key_lengths))


def _heads(array: Array, space: tuple[int, ...]) -> Array:
    """Return an array (..., Hq or Hkv or 1, ., .) as (..., Hkv, R, ., .), any of these 1, with all batch dimensions."""
    shape = (*(1,) * (2 - array.ndim), *array.shape)
    heads = shape[-3] if len(shape) > 2 else 1
    split = (1, 1) if heads == 1 else (space[-3], heads // space[-3])
    missing = (1,) * (len(space) - len(shape[:-3]) - 3)
    return backend.namespace(array).reshape(array, (*missing, *shape[:-3], *split, *shape[-2:]))


def _per_batch(array: Array, space: tuple[int, ...]) -> Array:
    """Return integers for each batch entry as int64 (..., 1, 1, 1, 1)."""
    xp = backend.namespace(array)
    missing = (1,) * (len(space) - 3 - array.ndim)
    if array.dtype == xp.uint64:
        array = xp.clip(array, 0, 1 << 62)
    return xp.astype(xp.reshape(array, (*missing, *array.shape, 1, 1, 1, 1)), xp.int64)


def _shifted(offset: int | Array, by: int, space: tuple[int, ...], key: Array) -> int | Array:
    """Return `offset + by`, bounded so that nothing overflows and no comparison with a key changes."""
    if isinstance(offset, int):
        return max(-space[-1], min(offset + by, int(key.shape[-2])))
    far = 1 << 61
    bounded = backend.namespace(offset).clip(_per_batch(offset, space), -far, far)
    return bounded + max(-far, min(by, far))


def _visible(call: _Call, pairs: Tile) -> Array:
    """Return which pairs of the tile every option allows, in a shape that broadcasts to that of the scores."""
    rows, keys = pairs[-2:]
    i = backend.arange(rows.start, rows.stop, call.query)[:, None]
    j = backend.arange(keys.start, keys.stop, call.query)[None, :]
    allowed = []
    if call.first is not None:
        allowed.append(j >= i + _take(call.first, pairs))
    if call.last is not None:
        allowed.append(j <= i + _take(call.last, pairs))
    if call.query_lengths is not None:
        allowed.append(i < _take(call.query_lengths, pairs))
    if call.key_lengths is not None:
        allowed.append(j < _take(call.key_lengths, pairs))
    if call.mask is not None:
        allowed.append(_take(call.mask, pairs))
    if call.bias is not None:
        allowed.append(_take(call.bias, pairs) != -math.inf)
    return functools.reduce(operator.and_, allowed)


def reached(query: Array, key: Array, value: Array, **options: Any) -> tuple[Array, Array, Array, Array]:
    """Return where attention is more than a structural 0: rows of the result, of query, of key and of value.

    Of the result and of query, those that see a key; of key and value, those that a query sees. Each is a bool array
    of the leading dimensions and the length of its array, (..., H, L, 1).
    """
    call = _prepare("reached", {"query": query, "key": key, "value": value}, **options)
    xp = backend.namespace(query)
    shapes = [call.space, *(tuple(array.shape[:-1]) for array in (call.query, call.key, call.value))]
    counts = [backend.full((*shape, 1), 0, query, xp.int64) for shape in shapes]

    def work(*tile: slice) -> tuple[slice, Array] | None:
        keys = call.visible_keys(tile)
        return None if keys is None else (keys, xp.astype(_visible(call, (*tile, keys)), xp.int64))

    def collect(tile: Tile, found: tuple[slice, Array] | None) -> None:
        if found is not None:
            keys, visible = found
            for count in counts[:2]:
                _accumulate(count, tile, xp.sum(visible, axis=-1, keepdims=True))
            for count in counts[2:]:
                seen = xp.matrix_transpose(xp.sum(visible, axis=-2, keepdims=True))
                _accumulate(count, (*tile[:-1], keys), seen)

    backend.run(work, call.tiles(2), query, collect)
    whole = [(*call.shape[:-1], 1), *((*array.shape[:-1], 1) for array in (query, key, value))]
    rows, *others = (xp.reshape(count > 0, shape) for count, shape in zip(counts, whole, strict=True))
    return rows, *others


def _take(array: Array, at: Tile) -> Array:
    """Return the part of an array at a tile; along dimensions of size 1, which broadcast, there is only one part."""
    if isinstance(array, int):
        return array
    return array[(*(slice(None) if n == 1 else s for n, s in zip(array.shape, at, strict=False)), ...)]


def _accumulate(target: Array, at: Tile, part: Array) -> None:
    """Add to `target` at a tile: the adjoint of `_take`, which sums over what broadcasts."""
    axes = tuple(d for d in range(part.ndim) if target.shape[d] == 1 < part.shape[d])
    if axes:
        part = backend.namespace(part).sum(part, axis=axes, keepdims=True)
    target[(*(slice(None) if n == 1 else s for n, s in zip(target.shape, at, strict=False)), ...)] += part


def _transposed_sum(call: _Call, weights: Array, visible: Array | None, x: Array) -> Array:
    """Return `weights^T @ x` over visible pairs."""
    transpose = backend.namespace(weights).matrix_transpose
    return _weighted_sum(call, transpose(weights), None if visible is None else transpose(visible), x)


def _weighted_sum(call: _Call, weights: Array, visible: Array | None, x: Array) -> Array:
    """Return `weights @ x` over visible pairs; the weights are 0 at hidden ones.

    Adding 0 makes a sum of zeros +0, whatever signs hidden entries would have given it.
    """
    if visible is None:
        return weights @ x
    if call.finite:
        return weights @ _masked.laid_out(x) + 0.0
    return _masked.matmul(weights, x, a_real=visible) + 0.0
