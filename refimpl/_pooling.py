"""What poolings share: running reductions over the taps of every window, and the way back of their gradients.

For each tap there is one strided slice of `x`, combined with what the other taps left. Taps in padding have no slice,
so padding never takes part.

`...` any leading dimensions; `*S` the spatial sizes; `*O` how many windows there are along each.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from . import _windows, backend
from ._geometry import AnyWindows, taps, whole
from .backend import Array, Tile

Divide = Callable[[Array, Tile], Array]


def largest(x: Array, windows: AnyWindows, with_indices: bool) -> tuple[Array, Array | None]:
    """Return the maximum of each window and perhaps where it lies: (..., *S) -> (..., *O), int64 (..., *O)."""
    xp = backend.namespace(x)
    shape = pooled_shape(x, windows)
    out = backend.full(shape, 0, x)
    indices = backend.full(shape, 0, x, xp.int64) if with_indices else None

    def work(*tile: slice) -> None:
        out[tile] = best = _maximum(x, windows, tile)
        if indices is not None:
            indices[tile] = _first(x, best, windows, tile)

    backend.run(work, tiles_of(x, windows), x)
    return out, indices


def largest_backward(dout: Array, x: Array, windows: AnyWindows, indices: Array | None) -> Array:
    """Return the gradient of `sum(dout * largest(x))`: each window's goes to its first maximum."""
    dx = backend.full(tuple(x.shape), 0, x)

    def work(*tile: slice) -> Iterator[tuple[Tile, Array]]:
        lead, _ = split(tile, windows)
        wins = _first_wins(x, windows, tile) if indices is None else _named_wins(x, windows, tile, indices)
        for reads, place, won in wins:
            yield (*lead, *reads), backend.select(won, dout[tile][place])

    spread(work, dx, windows)
    return dx


def mean(x: Array, windows: AnyWindows, divide: Divide) -> Array:
    """Return the sum over each window, divided: (..., *S) -> (..., *O)."""
    xp = backend.namespace(x)
    out = backend.full(pooled_shape(x, windows), 0, x)

    def work(*tile: slice) -> None:
        outputs = split(tile, windows)[1]
        out[tile] = divide(_reduced(x, windows, tile, 0, operator.add, xp.sum), outputs)

    backend.run(work, tiles_of(x, windows), x)
    return out


def mean_backward(dout: Array, x: Array, windows: AnyWindows, divide: Divide) -> Array:
    """Return the gradient of `sum(dout * mean(x))`: each window's is shared out among its elements."""
    dx = backend.full(tuple(x.shape), 0, x)

    def work(*tile: slice) -> Iterator[tuple[Tile, Array]]:
        lead, outputs = split(tile, windows)
        share = divide(dout[tile], outputs)
        for reads, writes in _by_window(windows, outputs) or by_tap(windows, outputs):
            yield (*lead, *reads), share[(..., *writes)]

    spread(work, dx, windows)
    return dx


def spread(work: Callable[..., Iterator[tuple[Tile, Array]]], dx: Array, windows: AnyWindows) -> None:
    """Add up what `work` yields for each tile: `(where in dx, what)`.

    At once where no other tile reaches the same elements, and else beside dx, to be added one tile after the other.
    """

    def add(*tile: slice) -> tuple[Tile, Array] | None:
        lead, outputs = split(tile, windows)
        if whole(windows, outputs):
            for at, part in work(*tile):
                dx[at] += part
            return None
        region = tuple(w.reach(o.start, o.stop) for w, o in zip(windows, outputs, strict=True))
        total = backend.full(sizes_of((*lead, *region)), 0, dx)
        for at, part in work(*tile):
            reads = zip(at[len(lead) :], region, strict=True)
            total[(..., *(slice(s.start - r.start, s.stop - r.start, s.step) for s, r in reads))] += part
        return (*lead, *region), total

    def collect(_: Tile, found: tuple[Tile, Array] | None) -> None:
        if found is not None:
            dx[found[0]] += found[1]

    backend.run(add, tiles_of(dx, windows), dx, collect)


def by_tap(windows: AnyWindows, outputs: Tile) -> Iterator[tuple[Tile, Tile]]:
    """Yield what each tap of all windows reads, and for which outputs."""
    for _, reads, writes in taps(windows, outputs):
        yield reads, writes


def _by_window(windows: AnyWindows, outputs: Tile) -> list[tuple[Tile, Tile]] | None:
    """Return what each window reads, and its output; None unless a window holds many times more than there are windows.

    Then a reduction for each window is less work than one step for each tap, of which each touches few elements.
    """
    most = math.prod(o.stop - o.start for o in outputs)
    first = math.prod(len(range(*w.elements(o.start).indices(w.size))) for w, o in zip(windows, outputs, strict=True))
    if first <= 4 * most:
        return None
    along = [
        [(w.elements(i), slice(i - o.start, i - o.start + 1)) for i in range(o.start, o.stop)]
        for w, o in zip(windows, outputs, strict=True)
    ]
    return [tuple(zip(*found, strict=True)) for found in itertools.product(*along)]


def _reduced(
    x: Array,
    windows: AnyWindows,
    tile: Tile,
    start: float,
    combine: Callable[[Array, Array], Array],
    reduce: Callable[..., Array],
) -> Array:
    """Return a reduction of each window of the tile: over its taps, or at once where few windows hold many elements."""
    lead, outputs = split(tile, windows)
    result = backend.full(sizes_of(tile), start, x)
    large = _by_window(windows, outputs)
    for reads, writes in large or ():
        axes = tuple(range(-len(windows), 0))
        result[(..., *writes)] = reduce(x[(*lead, *reads)], axis=axes, keepdims=True)
    for reads, writes in by_tap(windows, outputs) if large is None else ():
        place = (..., *writes)
        result[place] = combine(result[place], x[(*lead, *reads)])
    return result


def _maximum(x: Array, windows: AnyWindows, tile: Tile) -> Array:
    """Return the maximum of each window of the tile, NaN if there is one in it."""
    xp = backend.namespace(x)
    # A value that every element is at least as large as; every window holds an element, so it never shows.
    least = -math.inf if xp.isdtype(x.dtype, "real floating") else xp.iinfo(x.dtype).min
    return _reduced(x, windows, tile, least, xp.maximum, xp.max)


def _first_wins(x: Array, windows: AnyWindows, tile: Tile) -> Iterator[tuple[Tile, Any, Array]]:
    """Yield, for each tap, `(reads, place, won)`: whether it is the first that is the maximum of its window, or NaN."""
    lead, outputs = split(tile, windows)
    best = _maximum(x, windows, tile)
    open_ = backend.full(sizes_of(tile), 1, x, backend.namespace(x).bool)
    for reads, writes in by_tap(windows, outputs):
        place, value = (..., *writes), x[(*lead, *reads)]
        won = ((value == best[place]) | (value != value)) & open_[place]
        open_[place] ^= won
        yield reads, place, won


def _named_wins(x: Array, windows: AnyWindows, tile: Tile, indices: Array) -> Iterator[tuple[Tile, Any, Array]]:
    """Yield, for each tap, `(reads, place, won)`: whether it is the one that the indices name."""
    for element, reads, writes in _elements(x, windows, split(tile, windows)[1]):
        yield reads, (..., *writes), indices[tile][(..., *writes)] == element


def _first(x: Array, best: Array, windows: AnyWindows, tile: Tile) -> Array:
    """Return where the first element of each window lies that is its maximum, or NaN."""
    xp = backend.namespace(x)
    lead, outputs = split(tile, windows)
    indices = backend.full(sizes_of(tile), 0, x, xp.int64)
    for element, reads, writes in reversed(list(_elements(x, windows, outputs))):  # the first tap has the last word
        place = (..., *writes)
        value = x[(*lead, *reads)]
        wins = (value == best[place]) | (value != value)
        indices[place] = xp.where(wins, element, indices[place])
    return indices


def _elements(x: Array, windows: AnyWindows, outputs: Tile) -> Iterator[tuple[Array, Tile, Tile]]:
    """Yield `(element, reads, writes)` for each tap: `element` holds the flat index of what it reads in the plane."""
    for _, reads, writes in taps(windows, outputs):
        element = backend.full((), 0, x, backend.namespace(x).int64)
        for window, read in zip(windows, reads, strict=True):
            along = backend.arange(0, len(range(read.start, read.stop, read.step)), x) * read.step + read.start
            element = element[..., None] * window.size + along
        yield element, reads, writes


def divider(
    x: Array, windows: AnyWindows, count_include_pad: bool = False, divisor_override: int | None = None
) -> Divide:
    """Return the function that divides sums over the windows of a tile by the number of elements that count."""
    if divisor_override is not None:
        return lambda total, _: total / float(divisor_override)
    counts = _windows.counts([window.padded for window in windows] if count_include_pad else windows, x)

    def divide(total: Array, outputs: Tile) -> Array:
        divisor = 1.0
        for d, (count, o) in enumerate(zip(counts, outputs, strict=True)):
            divisor = divisor * backend.namespace(x).reshape(count[o], (-1, *(1 for _ in windows[d + 1 :])))
        return total / divisor

    return divide


def split(tile: Tile, windows: AnyWindows) -> tuple[Tile, Tile]:
    """Split a tile into the slices of the leading dimensions, and those of the windows."""
    return tile[: len(tile) - len(windows)], tile[len(tile) - len(windows) :]


def sizes_of(tile: Tile) -> tuple[int, ...]:
    """Return the shape of what a tile holds."""
    return tuple(s.stop - s.start for s in tile)


def pooled_shape(x: Array, windows: AnyWindows) -> tuple[int, ...]:
    """Return the shape of the result: one element for each window."""
    return (*x.shape[: x.ndim - len(windows)], *(window.out for window in windows))


def tiles_of(x: Array, windows: AnyWindows) -> Iterator[Tile]:
    """Cut the result into tiles; an element of it costs itself, what it is compared with, and an index."""
    return backend.tiles(pooled_shape(x, windows), 3 * backend.itemsize(x) + 16)
