"""Running reductions over the taps of every window, and their adjoints; untiled in `textbook/pooling.py`.

For each tap there is one strided slice of `x`, combined with what the other taps left. Taps in padding have no slice,
so padding never takes part.

`...` any leading dimensions; `*S` the spatial sizes; `*O` how many windows there are along each.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .. import backend
from ..backend import Array, Backend, Tile
from . import im2col
from .geometry import AdaptiveWindow, AnyWindows, Window, reach, taps, whole, within

BLOCK = 64  # numbers that are added one after the other
Divide = Callable[[Array, Tile], Array]


def largest(be: Backend, x: Array, windows: AnyWindows, with_indices: bool) -> tuple[Array, Array | None]:
    """Return the maximum of each window and perhaps where it lies: (..., *S) -> (..., *O), int64 (..., *O)."""
    xp = be.xp
    shape = pooled_shape(x, windows)
    out = be.empty(shape, x.dtype)
    indices = be.empty(shape, xp.int64) if with_indices else None

    def work(*tile: slice) -> None:
        out[tile] = best = _maximum(be, x, windows, tile)
        if indices is not None:
            indices[tile] = _first(be, x, best, windows, tile)

    be.run(work, tiles_of(be, x, windows))
    return out, indices


def largest_backward(be: Backend, dout: Array, x: Array, windows: AnyWindows, indices: Array | None) -> Array:
    """Return the gradient of `sum(dout * largest(x))`: each window's goes to its first maximum."""

    def places(tile: Tile) -> Array:
        return _first(be, x, _maximum(be, x, windows, tile), windows, tile) if indices is None else indices[tile]

    def at_once(dx: Array, tile: Tile) -> bool:
        return be.add_at(dx, places(tile), dout[tile], len(windows))

    def work(*tile: slice) -> Iterator[tuple[Tile, Array]]:
        lead, outputs = split(tile, windows)
        won = places(tile)
        for reads, writes in taps_or_windows(windows, outputs):
            at = (..., *writes)
            yield (*lead, *reads), be.select(won[at] == _flat_indices(be, windows, reads), dout[tile][at])

    held = 0 if indices is not None else 2 * be.itemsize(x) + 16
    # `numpy.add.at` holds the interpreter's lock, so a second thread only waits. (8x64x112x112, Zen 4: 4.7 ms, 5.7 with
    # two threads.)
    with backend.limits(threads=None if indices is None else 1):
        return add_windows(be, work, x, windows, at_once, held)


def mean(be: Backend, x: Array, windows: AnyWindows, divide: Divide) -> Array:
    """Return the sum over each window, divided: (..., *S) -> (..., *O)."""
    out = be.empty(pooled_shape(x, windows), x.dtype)

    def work(*tile: slice) -> None:
        outputs = split(tile, windows)[1]
        out[tile] = divide(_reduced(be, x, windows, tile, _Reduction(0, operator.add, be.sums)), outputs)

    be.run(work, tiles_of(be, x, windows))
    return out


def mean_backward(be: Backend, dout: Array, x: Array, windows: AnyWindows, divide: Divide) -> Array:
    """Return the gradient of `sum(dout * mean(x))`: each window's is shared out among its elements."""

    def work(*tile: slice) -> Iterator[tuple[Tile, Array]]:
        lead, outputs = split(tile, windows)
        share = divide(dout[tile], outputs)
        if _single(outputs):
            yield (*lead, *_elements_of(windows, outputs)), share
            return
        region = reach(windows, outputs)
        for d in reversed(range(len(windows))):  # one dimension after the other: the adjoint of `_reduced`
            shape = list(share.shape)
            shape[len(lead) + d] = region[d].stop - region[d].start
            spread_out = be.full(tuple(shape), 0, x.dtype)
            after = (slice(None),) * (len(windows) - d - 1)
            for reads, writes in _along(windows[d], outputs[d], region[d]):
                spread_out[(..., reads, *after)] += share[(..., writes, *after)]
            share = spread_out
        yield (*lead, *region), share

    return add_windows(be, work, x, windows)


def add_windows(
    be: Backend,
    work: Callable[..., Iterator[tuple[Tile, Array]]],
    x: Array,
    windows: AnyWindows,
    at_once: Callable[[Array, Tile], bool] | None = None,
    held: int = 0,
) -> Array:
    """Return the sum of all `(where, what)` that `work` yields for each tile, as an array of the shape of `x`.

    Where no two tiles reach the same element, tiles write into the result; `at_once(part of dx, tile)` may do all of a
    tile, and returns whether it did. Otherwise each tile is added up by itself, and then to the result in order. `held`
    as in `tiles_of`.
    """
    tiles = list(tiles_of(be, x, windows, held))
    tiles_are_disjoint = all(whole(windows, split(tile, windows)[1]) for tile in tiles)
    dx = be.empty(tuple(x.shape), x.dtype) if tiles_are_disjoint else be.full(tuple(x.shape), 0, x.dtype)

    def add_within(*tile: slice) -> None:
        part = dx[(*split(tile, windows)[0], ...)]
        part[...] = 0.0
        if at_once is None or not at_once(part, tile):
            for at, what in work(*tile):
                dx[at] += what

    def add_beside(*tile: slice) -> tuple[Tile, Array]:
        lead, outputs = split(tile, windows)
        region = reach(windows, outputs)
        total = be.full(backend.sizes_of((*lead, *region)), 0, dx.dtype)
        for at, what in work(*tile):
            total[(..., *map(within, at[len(lead) :], region))] += what
        return (*lead, *region), total

    def collect(_: Tile, found: tuple[Tile, Array]) -> None:
        dx[found[0]] += found[1]

    if tiles_are_disjoint:
        be.run(add_within, tiles)
    else:
        be.run(add_beside, tiles, collect)
    return dx


def _single(outputs: Tile) -> bool:
    """Return whether there is one output per plane."""
    return all(o.stop - o.start == 1 for o in outputs)


def _elements_of(windows: AnyWindows, outputs: Tile) -> Tile:
    """Return the elements of the window of a single output."""
    return tuple(window.elements(o.start) for window, o in zip(windows, outputs, strict=True))


def _along(window: Window | AdaptiveWindow, o: slice, region: slice) -> Iterator[tuple[slice, slice]]:
    """Yield `(reads, writes)`, relative to their ranges, that pair each window with each of its elements once.

    One pair per tap, or one per window where windows are long and few.
    """
    first = window.elements(o.start)
    if len(range(first.start, first.stop, first.step or 1)) > 4 * (o.stop - o.start):
        pairs = ((window.elements(i), slice(i - o.start, i - o.start + 1)) for i in range(o.start, o.stop))
    else:
        pairs = ((reads, writes) for _, reads, writes in window.taps(o.start, o.stop))
    for reads, writes in pairs:
        yield within(reads, region), writes


class _Reduction(NamedTuple):
    """A reduction of the elements of a window: sum or maximum."""

    start: float
    """The result of no elements."""
    combine: Callable[[Array, Array], Array]
    """Combines two arrays, element by element."""
    reduce: Callable[..., Array]
    """Reduces one array along dimensions."""


def _reduced(be: Backend, x: Array, windows: AnyWindows, tile: Tile, to: _Reduction) -> Array:
    """Reduce each window of the tile, one dimension after the other; in one call where there is one window.

    A 3x3 window takes 3 + 3 passes over memory that way instead of 9.
    """
    lead, outputs = split(tile, windows)
    if _single(outputs):
        elements = x[(*lead, *_elements_of(windows, outputs))]
        return to.reduce(elements, axis=tuple(range(-len(windows), 0)), keepdims=True)
    region = reach(windows, outputs)
    part = x[(*lead, *region)]
    for d in range(len(windows)):
        part = _reduced_along(be, part, len(lead) + d, windows[d], outputs[d], region[d], to)
    return part


def _reduced_along(
    be: Backend, x: Array, axis: int, window: Window | AdaptiveWindow, o: slice, region: slice, to: _Reduction
) -> Array:
    """Reduce along one dimension, of which `x` holds the region: one element for each of the windows `o`."""
    before, after, count = (slice(None),) * axis, (slice(None),) * (x.ndim - axis - 1), o.stop - o.start
    result, some = None, []
    block, held = None, 0  # what was combined since the last block: sums of many numbers are off by less in blocks
    for reads, writes in _along(window, o, region):
        taken = x[(*before, reads, *after)]
        if taken.shape[axis] != count or writes.step not in (None, 1):
            some.append((writes, taken))
            continue
        block, held = taken if block is None else to.combine(block, taken), held + 1  # one element of every window
        if held == BLOCK:
            result, block, held = block if result is None else to.combine(result, block), None, 0
    if block is not None:
        result = block if result is None else to.combine(result, block)
    if not some and result is not None:
        return result
    total = be.full((*x.shape[:axis], count, *x.shape[axis + 1 :]), to.start, x.dtype)
    if result is not None:
        total[...] = result
    for writes, taken in some:
        at = (*before, writes, *after)
        if taken.shape != total[at].shape:  # all elements of one window
            taken = to.reduce(taken, axis=axis, keepdims=True)
        total[at] = to.combine(total[at], taken)
    return total


def _maximum(be: Backend, x: Array, windows: AnyWindows, tile: Tile) -> Array:
    """Return the maximum of each window of the tile, NaN if there is one in it."""
    xp = be.xp
    # The smallest value of the dtype; every window holds an element, so it never shows.
    least = -math.inf if xp.isdtype(x.dtype, "real floating") else xp.iinfo(x.dtype).min
    return _reduced(be, x, windows, tile, _Reduction(least, xp.maximum, xp.max))


def _first(be: Backend, x: Array, best: Array, windows: AnyWindows, tile: Tile) -> Array:
    """Return the flat index of the first element of each window that equals its maximum, or is NaN."""
    xp = be.xp
    lead, outputs = split(tile, windows)
    indices = be.full(backend.sizes_of(tile), 0, xp.int64)
    for reads, writes in reversed(list(taps_or_windows(windows, outputs))):  # backwards, so that the first wins
        place, elements = (..., *writes), _flat_indices(be, windows, reads)
        value = x[(*lead, *reads)]
        wins = (value == best[place]) | (value != value)
        if value.shape != best[place].shape:  # all elements of one window
            flat = xp.reshape(wins, (*wins.shape[: len(lead)], math.prod(elements.shape)))
            first = xp.argmax(xp.astype(flat, xp.int8), axis=-1)
            indices[place] = xp.reshape(
                xp.take(xp.reshape(elements, (-1,)), xp.reshape(first, (-1,))), best[place].shape
            )
        else:
            indices[place] = xp.where(wins, elements, indices[place])
    return indices


def taps_or_windows(windows: AnyWindows, outputs: Tile) -> Iterator[tuple[Tile, Tile]]:
    """Yield `(reads, writes)` that pair each window with each of its elements once.

    One pair per tap, with one element of many windows; or one per window, with all of its elements, where these are
    fewer.
    """
    elements = (w.elements(o.start) for w, o in zip(windows, outputs, strict=True))
    if math.prod(len(range(e.start, e.stop, e.step or 1)) for e in elements) <= math.prod(backend.sizes_of(outputs)):
        yield from ((reads, writes) for _, reads, writes in taps(windows, outputs))
        return
    for at in itertools.product(*(range(o.start, o.stop) for o in outputs)):
        one = tuple(slice(i, i + 1) for i in at)
        yield _elements_of(windows, one), tuple(map(within, one, outputs))


def _flat_indices(be: Backend, windows: AnyWindows, reads: Tile) -> Array:
    """Return the index in the flat plane of every element that is read."""
    element = be.full((), 0, be.xp.int64)
    for window, read in zip(windows, reads, strict=True):
        step = read.step or 1
        along = be.arange(0, len(range(read.start, read.stop, step))) * step + read.start
        element = element[..., None] * window.size + along
    return element


def divider(
    be: Backend, x: Array, windows: AnyWindows, count_include_pad: bool = False, divisor_override: int | None = None
) -> Divide:
    """Return the function that divides sums over the windows of a tile by the number of elements that count."""
    counted = [window.padded for window in windows] if count_include_pad else windows
    shared = [window.shared_count for window in counted]
    if divisor_override is None and all(shared):
        divisor_override = math.prod(shared)
    if divisor_override is not None:
        return lambda total, _: total / float(divisor_override)
    counts = im2col.counts(be, counted, x)

    def divide(total: Array, outputs: Tile) -> Array:
        divisor = 1.0
        for d, (count, o) in enumerate(zip(counts, outputs, strict=True)):
            divisor = divisor * be.xp.reshape(count[o], (-1, *(1 for _ in windows[d + 1 :])))
        return total / divisor

    return divide


def split(tile: Tile, windows: AnyWindows) -> tuple[Tile, Tile]:
    """Split a tile into the slices of the leading dimensions, and those of the windows."""
    return tile[: len(tile) - len(windows)], tile[len(tile) - len(windows) :]


def pooled_shape(x: Array, windows: AnyWindows) -> tuple[int, ...]:
    """Return the shape of the result: one element for each window."""
    return (*x.shape[: x.ndim - len(windows)], *(window.out for window in windows))


def tiles_of(be: Backend, x: Array, windows: AnyWindows, held: int = 0) -> Iterator[Tile]:
    """Cut the result into tiles; each element needs memory for itself, a comparison and an index.

    `held` more bytes of it are needed meanwhile.
    """
    return be.tiles(pooled_shape(x, windows), 3 * be.itemsize(x) + 16 + held, backend.LEAST_LIGHT)
