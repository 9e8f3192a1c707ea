"""Visibility: which keys each query may attend to; untiled in `_visible` in `textbook/attention.py`.

H heads (Hq of the queries, Hkv of keys and values, R = Hq / Hkv queries that share a key head); L length; E features.
Inside, a query is (..., Hkv, R, Lq, E) and a key (..., Hkv, 1, Lk, E): sharing heads is broadcasting, like any other.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .. import backend
from ..backend import Array, Backend, Tile
from . import nan_safe

MANY_SCORES = 1 << 16  # of a batch entry, from which on it is worth tiles of its own
LEAST_ROWS = 64  # of a tile: products of fewer rows take longer for each
MANY_PAIRS = 1 << 12  # from so many pairs on, a view of one line of distances is faster than comparing each pair


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of a call in the form that tiles use: arrays (..., Hkv, R, ., .) with all batch dimensions."""

    be: Backend
    query: Array
    key: Array
    value: Array | None
    bias: Array | None
    mask: Array | None
    first: int | Array | None
    """Query i sees no key before `i + first`."""
    last: int | Array | None
    """Query i sees no key after `i + last`."""
    query_lengths: Array | None
    key_lengths: Array | None
    sink: Array | None
    """(Hkv, R, 1, 1), with all batch dimensions."""
    scale: float
    softcap: float | None
    dropout_mask: Array | None
    keep_prob: float
    """The share of the weights that dropout keeps on average."""
    num_appended_keys: int
    """The last so many keys are visible to every query and have no bias."""
    has_hidden_pairs: bool
    """Whether any option may hide a pair."""
    finite: bool
    """Whether no score and no factor of a weight is NaN or inf. Then a hidden pair can be hidden by adding -inf and
    multiplying by 0, many times faster than by selection. True also if nothing is hidden."""
    scores: tuple[int, ...]
    """The shape of the scores, `(..., Hq, Lq, Lk)` or `(Lq, Lk)`, appended keys included."""
    space: tuple[int, ...]
    """The index space that is cut into tiles: (..., Hkv, R, Lq)."""
    lines: dict[tuple[int, int, int], tuple[Array, ...]] = field(default_factory=dict, compare=False, repr=False)
    """What `additive_mask` found for tiles in which the same distances hide the same pairs."""

    def tiles(self, arrays: int, gradients: int = 0) -> Iterator[Tile]:
        """Cut the queries into tiles that hold so many arrays (..., rows, keys), and so many gradients of all keys."""
        arrays += (
            sum(option is not None for option in (self.bias, self.softcap, self.dropout_mask))
            + 2 * self.has_hidden_pairs
        )
        features = sum(int(array.shape[-1]) for array in (self.key, self.value) if array is not None)
        for part in self._parts():
            keys, rows = self.visible_keys(part) or slice(0, 1), backend.sizes_of(part)[-1]
            held = features * (1 + gradients * (keys.stop - keys.start) // max(1, rows))
            row_bytes = (arrays * (keys.stop - keys.start) + held) * self.be.itemsize(self.query)
            for tile in self.be.tiles(backend.sizes_of(part), row_bytes):
                yield tuple(slice(p.start + t.start, p.start + t.stop) for p, t in zip(part, tile, strict=True))

    def _parts(self) -> Iterator[Tile]:
        """Yield the parts of the index space whose queries see about the same keys, so that few are computed in vain.

        Ranges of queries where distance hides, batch entries where the lengths of the keys differ.
        """
        batch, size, step = self.space[:-3], self.space[-1], max(1, self.space[-1])
        placed = [side for side in (self.first, self.last) if isinstance(side, int)]
        if placed and not self.num_appended_keys:
            width = self.scores[-1] // 4 if len(placed) == 1 else max(placed) - min(placed)
            step = max(LEAST_ROWS, width // 2)
        rows = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        lengths = self._known(self.key_lengths)
        if lengths is None or math.prod(lengths.shape) < 2 or math.prod(self.scores[-3:]) < MANY_SCORES:
            entries: Iterable[Tile] = [tuple(slice(0, n) for n in batch)]
        else:
            entries = (tuple(slice(i, i + 1) for i in at) for at in itertools.product(*map(range, batch)))
        heads = tuple(slice(0, n) for n in self.space[-3:-1])
        return ((*entry, *heads, part) for entry, part in itertools.product(entries, rows))

    def _known(self, lengths: Array | None) -> Array | None:
        """Return lengths if reading them waits for nothing."""
        some = self.be.reads_free and not self.num_appended_keys and 0 not in self.space
        return lengths if some else None

    def visible_keys(self, tile: Tile) -> slice | None:
        """Return the range of keys that holds all visible ones of the rows of the tile, None if it is empty."""
        rows, start, stop = tile[-1], 0, self.scores[-1]
        if not self.num_appended_keys:
            if isinstance(self.first, int):
                start = max(start, rows.start + self.first)
            if isinstance(self.last, int):
                stop = min(stop, rows.stop + self.last)
        if (lengths := self._known(self.key_lengths)) is not None:
            stop = min(stop, int(slice_of(lengths, tile).max()))
        return slice(start, stop) if start < stop else None

    @property
    def hidden_by_distance_only(self) -> bool:
        """Whether a pair's visibility depends only on the distance of key and query, alike in every head."""
        others = (self.bias, self.mask, self.query_lengths, self.key_lengths)
        placed = all(side is None or isinstance(side, int) for side in (self.first, self.last))
        return placed and not self.num_appended_keys and all(option is None for option in others)

    def all_visible(self, tile: Tile, keys: slice) -> bool:
        """Return whether it is clear, without reading from a device, that every row of the tile sees all these keys."""
        if self.num_appended_keys or any(o is not None for o in (self.bias, self.mask, self.query_lengths)):
            return False
        lengths = self._known(self.key_lengths)
        if self.key_lengths is not None and (lengths is None or slice_of(lengths, tile).min() < keys.stop):
            return False
        after, before = (0 if side is None else side for side in (self.first, self.last))
        if not isinstance(after, int) or not isinstance(before, int):
            return False
        reaches_first = self.first is None or tile[-1].stop - 1 + after <= keys.start
        return reaches_first and (self.last is None or tile[-1].start + before >= keys.stop - 1)

    def partially_visible_keys(self, tile: Tile, keys: slice) -> slice:
        """Return the range of keys that not every row of the tile sees; all keys before it are visible to all rows."""
        if self.first is not None or not isinstance(self.last, int) or not self.hidden_by_distance_only:
            return keys
        return slice(max(keys.start, min(tile[-1].start + self.last + 1, keys.stop)), keys.stop)

    def own_keys(self, keys: slice) -> slice:
        """Return the keys without the appended ones: those that bias, mask and positions refer to."""
        return slice(keys.start, min(keys.stop, self.scores[-1] - self.num_appended_keys))

    def with_appended_keys(self, part: Array, keys: slice, value: float) -> Array:
        """Return an array (..., own keys or 1) extended by a value for each appended key."""
        if not self.num_appended_keys:
            return part
        xp = self.be.xp
        own = self.own_keys(keys)
        part = xp.broadcast_to(part, (*part.shape[:-1], own.stop - own.start))
        more = self.be.full((*part.shape[:-1], self.num_appended_keys), value, part.dtype)
        return xp.concat([part, more], axis=-1)


def visible(call: AttentionCall, tile: Tile, keys: slice) -> Array:
    """Return which pairs of the tile are visible, in a shape that broadcasts to that of the scores."""
    own = call.own_keys(keys)
    pairs = (*tile, own)
    i = call.be.arange(tile[-1].start, tile[-1].stop)[:, None]
    j = call.be.arange(own.start, own.stop)[None, :]
    allowed = []
    if call.first is not None:
        allowed.append(j >= i + slice_of(call.first, pairs))
    if call.last is not None:
        allowed.append(j <= i + slice_of(call.last, pairs))
    if call.key_lengths is not None:
        allowed.append(j < slice_of(call.key_lengths, pairs))
    if call.mask is not None:
        allowed.append(slice_of(call.mask, pairs))
    if call.bias is not None:
        allowed.append(slice_of(call.bias, pairs) != -math.inf)
    if allowed:
        allowed = [call.with_appended_keys(functools.reduce(operator.and_, allowed), keys, True)]
    if call.query_lengths is not None:
        allowed.append(i < slice_of(call.query_lengths, pairs))
    return functools.reduce(operator.and_, allowed)


def additive_mask(call: AttentionCall, tile: Tile, keys: slice) -> tuple[Array, Array]:
    """Return 0 at visible pairs and -inf at hidden ones, and `visible` itself.

    Where only distance hides pairs, both are views of a line that holds each distance once. (256x256 pairs, Zen 4, 1
    thread: 54 us -> 19 us.)
    """
    rows, columns = backend.sizes_of((tile[-1], keys))
    if not (call.hidden_by_distance_only and call.be.has_strides and rows * columns >= MANY_PAIRS):
        return _additive(call, tile, keys)
    place = (rows, columns, keys.start - tile[-1].start)
    found = call.lines.get(place)
    if found is None:  # the first row, extended to the left by the distances of the last row
        first = (*tile[:-1], slice(tile[-1].start, tile[-1].start + 1))
        line = _additive(call, first, slice(keys.start - rows + 1, keys.stop))
        found = call.lines[place] = tuple(
            call.be.unfolded(array, [(1, rows, 1), (1, columns, 1)])[::-1, :] for array in line
        )
    return found


def _additive(call: AttentionCall, tile: Tile, keys: slice) -> tuple[Array, Array]:
    """Return 0 or -inf for each pair, in a shape that broadcasts to that of the scores, and `visible`."""
    seen = visible(call, tile, keys)
    return 1.0 - 1.0 / call.be.xp.astype(seen, call.query.dtype), seen


def visibility_of_tokens(call: AttentionCall, *arrays: Array) -> list[Array]:
    """Return which rows of the result, and of query, key and value as given, take part in any visible pair.

    Rows of the result and of query that see a key; rows of key and value that a query sees. Each is a bool array of the
    leading dimensions and the length of its array, (..., H, L, 1).
    """
    xp = call.be.xp
    inside = [array for array in (call.query, call.key, call.value) if array is not None]
    counts = [call.be.full((*shape, 1), 0, xp.int64) for shape in (call.space, *(a.shape[:-1] for a in inside))]

    def work(*tile: slice) -> tuple[slice, Array] | None:
        keys = call.visible_keys(tile)
        if keys is None:
            return None
        seen = xp.broadcast_to(visible(call, tile, keys), backend.sizes_of((*tile, keys)))
        return keys, xp.astype(seen, xp.int64)

    def collect(tile: Tile, found: tuple[slice, Array] | None) -> None:
        if found is not None:
            keys, seen = found
            for count in counts[:2]:
                accumulate(call.be, count, tile, xp.sum(seen, axis=-1, keepdims=True))
            for count in counts[2:]:
                accumulate(
                    call.be, count, (*tile[:-1], keys), xp.matrix_transpose(xp.sum(seen, axis=-2, keepdims=True))
                )

    call.be.run(work, call.tiles(2), collect)
    shapes = [call.scores[:-1], *(tuple(array.shape[:-1]) for array in arrays)]
    return [xp.reshape(count > 0, (*shape, 1)) for count, shape in zip(counts, shapes, strict=True)]


def slice_of(array: Array, at: Tile) -> Array:
    """Return the part of an array at a tile; dimensions of size 1 broadcast, and stay whole."""
    if isinstance(array, int):
        return array
    return array[(*(slice(None) if n == 1 else s for n, s in zip(array.shape, at, strict=False)), ...)]


def tiles_are_disjoint(shape: tuple[int, ...], tile: Tile, space: tuple[int, ...]) -> bool:
    """Return whether no other tile adds to the same part of an array that has this shape over the space."""
    return all(m == n > 1 or s.stop - s.start == n for m, s, n in zip(shape, tile, space, strict=True))


def add_broadcast(array: Array, more: Array) -> Array:
    """Return the sum, in the memory of the first where the second broadcasts to it."""
    more = more[(None,) * (array.ndim - more.ndim) + (...,)]
    if any(m not in (1, n) for m, n in zip(more.shape, array.shape, strict=True)):
        return array + more
    array += more
    return array


def accumulate(be: Backend, target: Array, at: Tile, part: Array) -> None:
    """Add to `target` at a tile: the adjoint of `slice_of`, which sums over dimensions that broadcast."""
    axes = tuple(d for d in range(part.ndim) if target.shape[d] == 1 != part.shape[d])
    if axes:
        part = be.sums(part, axes, True)
    target[(*(slice(None) if n == 1 else s for n, s in zip(target.shape, at, strict=False)), ...)] += part


def by_heads(be: Backend, array: Array, space: tuple[int, ...]) -> Array:
    """Return an array (..., Hq or Hkv or 1, ., .) as (..., Hkv or 1, R or 1, ., .) with all batch dimensions."""
    shape = (*(1,) * (2 - array.ndim), *array.shape)
    heads = shape[-3] if len(shape) > 2 else 1
    split = (1, 1) if heads == 1 else (space[-3], heads // space[-3])
    missing = (1,) * (len(space) - len(shape[:-3]) - 3)
    return be.xp.reshape(array, (*missing, *shape[:-3], *split, *shape[-2:]))


def as_given(be: Backend, gradient: Array | None, argument: Array | None) -> Array | None:
    """Return a gradient in the shape that its argument was given in."""
    if gradient is None or argument is None:
        return None
    return be.xp.reshape(gradient, argument.shape)


def transposed_sum(call: AttentionCall, weights: Array, seen: Array | None, x: Array) -> Array:
    """Return `weights^T @ x` over visible pairs."""
    transpose = call.be.xp.matrix_transpose
    return weighted_sum(call, transpose(weights), None if seen is None else transpose(seen), x)


def weighted_sum(call: AttentionCall, weights: Array, seen: Array | None, x: Array) -> Array:
    """Return `weights @ x` over visible pairs; the weights are 0 at hidden ones.

    Adding 0 makes a sum of zeros +0, whatever signs hidden entries would have given it.
    """
    if not call.finite:
        product = nan_safe.matmul(call.be, weights, x, a_real=seen, multiply=call.be.matmul_in_parts)
    elif weights.shape[-1] == 1:  # nothing to sum (a third of the time of a product)
        product = weights * x
    else:
        product = call.be.matmul_in_parts(weights, x)
    if call.has_hidden_pairs:
        product += 0.0
    return product
