"""The arguments of attention, checked, in the form that tiles use: see `AttentionCall`."""

import math
from collections.abc import Mapping

from .. import backend
from .._options import AttentionOptions
from ..backend import Array, Backend
from .visibility import AttentionCall, by_heads


def prepare(
    be: Backend,
    arrays: Mapping[str, Array],
    scores: tuple[int, ...],
    options: AttentionOptions,
    num_appended_keys: int = 0,
) -> AttentionCall:
    """Return checked arguments in the form that tiles use, half types as float32.

    `scores` is the shape of the scores, appended keys included.
    """
    query, key, value, bias, sink = be.widened(
        arrays["query"], arrays["key"], arrays.get("value"), options.bias, options.sink
    )
    kv_heads = int(key.shape[-3]) if key.ndim > 2 else 1
    heads = scores[-3] if len(scores) > 2 else 1
    space = (*scores[:-3], kv_heads, heads // kv_heads, scores[-2])
    first, last = _band(be, options, space, scores[-1] - num_appended_keys)
    query_lengths, key_lengths = (
        None if lengths is None else _per_batch(be, lengths, space)
        for lengths in (options.query_lengths, options.key_lengths)
    )
    hiding = (bias, options.mask, first, last, query_lengths, key_lengths)
    has_hidden_pairs = any(option is not None for option in hiding)

    smallest, largest = be.float_range(query)
    factor = 1.0 / math.sqrt(max(1, query.shape[-1])) if options.scale is None else float(options.scale)
    cap = None if options.softcap is None else float(options.softcap)
    if cap is not None:
        cap = None if cap > largest else max(cap, smallest)  # no score comes near a cap beyond the largest number

    def split(array: Array | None) -> Array | None:
        return None if array is None else by_heads(be, array, space)

    finite = True
    if has_hidden_pairs:  # in one layout, finite or not, because BLAS rounds by layout
        query, key, value = (None if array is None else be.contiguous(array) for array in (query, key, value))
        finite = _bounded(be, query, key, value, (bias, sink), factor, largest)
    return AttentionCall(
        be=be,
        query=split(query),
        key=split(key),
        value=split(value),
        bias=split(bias),
        mask=split(options.mask),
        first=first,
        last=last,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        sink=None if sink is None else split(be.xp.reshape(sink, (-1, 1, 1))),
        scale=max(-largest, min(factor, largest)),
        softcap=cap,
        dropout_mask=split(options.dropout_mask),
        keep_prob=1.0 - float(options.dropout_p),
        num_appended_keys=num_appended_keys,
        has_hidden_pairs=has_hidden_pairs,
        finite=finite,
        scores=scores,
        space=space,
    )


def _bounded(
    be: Backend,
    query: Array,
    key: Array,
    value: Array | None,
    logits: tuple[Array | None, ...],
    scale: float,
    largest: float,
) -> bool:
    """Return whether nothing is NaN or inf, and no score can be: sums of squares bound them (Cauchy-Schwarz)."""
    q, k, *v = (be.sum_of_squares(array) for array in (query, key, value) if array is not None)
    scaled = abs(scale) * math.sqrt(q)
    bounded = all(map(math.isfinite, v)) and scaled < largest / 2 and scaled * math.sqrt(k) < largest / 2
    # A bias or sink of -inf does no harm: it hides.
    return bounded and all(a is None or 0 in a.shape or be.largest(a) < largest / 2 for a in logits)


def _band(
    be: Backend, options: AttentionOptions, space: tuple[int, ...], num_keys: int
) -> tuple[int | Array | None, int | Array | None]:
    """Return the first and last visible key relative to a query's number, None where there is no bound."""
    left, right = (None if side is None else int(side) for side in options.window or (None, None))
    if options.is_causal:
        right = 0 if right is None else min(right, 0)
    offset = _offset(be, options, space[-1], num_keys)
    first = None if left is None else _shifted(be, offset, -left, space, num_keys)
    last = None if right is None else _shifted(be, offset, right, space, num_keys)
    return first, last


def _offset(be: Backend, options: AttentionOptions, num_queries: int, num_keys: int) -> int | Array:
    """Return the position of query 0 among the keys."""
    if not isinstance(options.query_offset, str):
        return options.query_offset if backend.is_array(options.query_offset) else int(options.query_offset)
    ends = zip((options.key_lengths, options.query_lengths), (num_keys, num_queries), strict=True)
    keys, queries = (size if lengths is None else be.xp.astype(lengths, be.xp.int64) for lengths, size in ends)
    return keys - queries


def _shifted(be: Backend, offset: int | Array, by: int, space: tuple[int, ...], num_keys: int) -> int | Array:
    """Return `offset + by`, bounded so that nothing overflows and no comparison with a key changes."""
    if isinstance(offset, int):
        return max(-space[-1], min(offset + by, num_keys))
    far = 1 << 61
    bounded = be.xp.clip(_per_batch(be, offset, space), -far, far)
    return bounded + max(-far, min(by, far))


def _per_batch(be: Backend, array: Array, space: tuple[int, ...]) -> Array:
    """Return integers for each batch entry as int64 (..., 1, 1, 1, 1)."""
    xp = be.xp
    missing = (1,) * (len(space) - 3 - array.ndim)
    if array.dtype == xp.uint64:
        array = xp.clip(array, 0, 1 << 62)
    return xp.astype(xp.reshape(array, (*missing, *array.shape, 1, 1, 1, 1)), xp.int64)
