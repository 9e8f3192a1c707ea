"""What poolings share: running reductions over the taps of every window, and the way back of their gradients.

For each tap there is one strided slice of `x`, combined with what the other taps left. Taps in padding have no slice,
so padding never takes part.

`...` any leading dimensions; `*S` the spatial sizes; `*O` how many windows there are along each.
"""

import math
from collections.abc import Callable, Iterator

from . import _windows, backend
from ._geometry import AnyWindows, taps
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
    xp = backend.namespace(x)
    dx = backend.full(tuple(x.shape), 0, x)

    def work(*tile: slice) -> Array:
        return indices[tile] if indices is not None else _first(x, _maximum(x, windows, tile), windows, tile)

    def collect(tile: Tile, found: Array) -> None:
        lead, outputs = split(tile, windows)
        for element, reads, writes in _elements(x, windows, outputs):
            place = (..., *writes)
            dx[(*lead, *reads)] += xp.where(found[place] == element, dout[tile][place], 0.0)

    backend.run(work, tiles_of(x, windows), x, collect)
    return dx


def mean(x: Array, windows: AnyWindows, divide: Divide) -> Array:
    """Return the sum over each window, divided: (..., *S) -> (..., *O)."""
    out = backend.full(pooled_shape(x, windows), 0, x)

    def work(*tile: slice) -> None:
        lead, outputs = split(tile, windows)
        total = backend.full(sizes_of(tile), 0, x)
        for _, reads, writes in taps(windows, outputs):
            total[(..., *writes)] += x[(*lead, *reads)]
        out[tile] = divide(total, outputs)

    backend.run(work, tiles_of(x, windows), x)
    return out


def mean_backward(dout: Array, x: Array, windows: AnyWindows, divide: Divide) -> Array:
    """Return the gradient of `sum(dout * mean(x))`: each window's is shared out among its elements."""
    dx = backend.full(tuple(x.shape), 0, x)

    def work(*tile: slice) -> Array:
        return divide(dout[tile], split(tile, windows)[1])

    def collect(tile: Tile, share: Array) -> None:
        lead, outputs = split(tile, windows)
        for _, reads, writes in taps(windows, outputs):
            dx[(*lead, *reads)] += share[(..., *writes)]

    backend.run(work, tiles_of(x, windows), x, collect)
    return dx


def _maximum(x: Array, windows: AnyWindows, tile: Tile) -> Array:
    """Return the maximum of each window of the tile, NaN if there is one in it."""
    xp = backend.namespace(x)
    lead, outputs = split(tile, windows)
    floating = xp.isdtype(x.dtype, "real floating")
    # A value that every element is at least as large as; every window holds an element, so it never shows.
    best = backend.full(sizes_of(tile), -math.inf if floating else xp.iinfo(x.dtype).min, x)
    for _, reads, writes in taps(windows, outputs):
        place = (..., *writes)
        best[place] = xp.maximum(best[place], x[(*lead, *reads)])
    return best


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
        for d, (count, o) in enumerate(zip(counts, outputs, strict=True)):
            total = total / backend.namespace(x).reshape(count[o], (-1, *(1 for _ in windows[d + 1 :])))
        return total

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
