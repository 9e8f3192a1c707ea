"""im2col, its adjoint col2im, and padding modes with theirs; untiled in `textbook/windows.py`.

T taps of the kernel; `*S` the spatial sizes; `*O` the windows of a tile.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .. import backend
from ..backend import Array, Backend, Tile
from .geometry import AdaptiveWindow, AnyWindows, Windows, reach, spans, taps, within

# Two-pass im2col is faster from 16 taps on or below 32 windows per row; below 4,096 elements the extra pass costs more.
MANY_TAPS, SHORT_ROW, FEW_ELEMENTS = 16, 32, 1 << 12


def im2col(be: Backend, x: Array, lead: Tile, windows: Windows, outputs: Tile) -> Array:
    """Return what every tap of every window in the tile reads: `columns[..., t, o] = x[..., element of t at o]`.

    Taps in padding hold 0.

    Parameters
    ----------
    x : (..., *S)
    lead
        The part of the first dimensions of `x` that the tile takes.
    windows, outputs
        The windows, and the range of them along each dimension that the tile takes.

    Returns
    -------
    (..., T, *O)
    """
    kernel, counts = tuple(window.kernel for window in windows), backend.sizes_of(outputs)
    region, around = reach(windows, outputs), spans(windows, outputs)
    # A padded copy pays unless taps lie so far apart that most of it would lie between them.
    worth = region == around or math.prod(backend.sizes_of(around)) <= 2 * math.prod(kernel) * math.prod(counts)
    if be.has_strides and worth:
        columns = _sliding_view(be, _padded(be, x, lead, region, around), windows, counts)
    else:  # without strides: one slice per tap
        part = x[(*lead, ...)]
        columns = be.full((*part.shape[: -len(windows)], *kernel, *counts), 0, x.dtype)
        for k, reads, writes in taps(windows, outputs):
            columns[(..., *k, *writes)] = part[(..., *reads)]
    first = columns.ndim - 2 * len(windows)
    return be.xp.reshape(columns, (*columns.shape[:first], math.prod(kernel), *counts))


def _sliding_view(be: Backend, x: Array, windows: Windows, counts: Sequence[int]) -> Array:
    """Return im2col of windows that begin at the first element: (..., *S) -> (..., *K, *O).

    One copy of an overlapping view, in which an element appears as often as it is read; the view itself if that is
    once. With many taps or short rows, the last dimension is done first, so that the second pass copies longer runs.
    """
    first = x.ndim - len(windows)
    before = [(axis, size, 1) for axis, size in enumerate(x.shape[:first])]
    along = range(first, x.ndim)
    taps = [(axis, window.kernel, window.dilation) for axis, window in zip(along, windows, strict=True)]
    outs = [(axis, count, window.stride) for axis, count, window in zip(along, counts, windows, strict=True)]
    if _pays_twice(x, windows, counts):
        others = [(axis, x.shape[axis], 1) for axis in along[:-1]]
        x = be.contiguous(be.unfolded(x, [*before, taps[-1], *others, outs[-1]]))  # (..., K, *S, O)
        taps = [(axis + 1, size, step) for axis, size, step in taps[:-1]] + [(first, taps[-1][1], 1)]
        outs = [(axis + 1, size, step) for axis, size, step in outs[:-1]] + [(x.ndim - 1, counts[-1], 1)]
    columns = be.unfolded(x, [*before, *taps, *outs])
    return columns if all(window.kernel == 1 for window in windows) else be.contiguous(columns)


def _pays_twice(x: Array, windows: Windows, counts: Sequence[int]) -> bool:
    """Return whether to do the last dimension in a pass of its own: longer runs, but one more copy."""
    if x.size < FEW_ELEMENTS:
        return False
    others = math.prod(window.kernel for window in windows[:-1])
    read, written = math.prod(x.shape[-len(windows) : -1]), others * math.prod(counts[:-1])  # lines
    many = others * windows[-1].kernel >= MANY_TAPS or counts[-1] < SHORT_ROW
    return others > 1 and many and read < written


def _padded(be: Backend, x: Array, lead: Tile, region: Tile, around: Tile, spare: int = 0) -> Array:
    """Return a region of `x` with the zeros of padding around it; a view if there is no padding and no spare line.

    `spare` more lines of zeros are added along the first spatial dimension.
    """
    part = x[(*lead, ..., *region)]
    if region == around and not spare:
        return part
    first, *others = backend.sizes_of(around)
    padded = be.full((*part.shape[: part.ndim - len(region)], first + spare, *others), 0, x.dtype)
    if all(r.start < r.stop for r in region):
        padded[(..., *map(within, region, around))] = part
    return padded


def end_to_end(
    be: Backend, x: Array, lead: Tile, windows: Windows, outputs: Tile
) -> tuple[Array, list[int], tuple[int, ...]]:
    """Lay the rows that windows with a stride of 1 read end to end, with padding, so that each tap reads one long run.

    Returns
    -------
    rows : (..., R)
        What the windows of the tile read, with 0 in padding; a row is as long as what all taps read of it.
    steps
        From the run of one tap to that of the next, along each dimension of the kernel, in elements.
    shape
        Of a run: the windows of the tile, and after each row as many again as there is padding between, which count
        for nothing.
    """
    # The last run ends beyond the last row.
    rows = _padded(be, x, lead, reach(windows, outputs), spans(windows, outputs), spare=1)
    sizes = rows.shape[len(lead) :]
    steps = [window.dilation * math.prod(sizes[d + 1 :]) for d, window in enumerate(windows)]
    rows = be.xp.reshape(rows, (*rows.shape[: len(lead)], math.prod(sizes)))
    return rows, steps, (outputs[0].stop - outputs[0].start, *sizes[1:])


def in_runs(be: Backend, outputs: Array, shape: tuple[int, ...]) -> Array:
    """Lay outputs end to end as `end_to_end` does, with 0 between the rows: (..., *O) -> (..., run)."""
    lead = outputs.shape[: outputs.ndim - len(shape)]
    runs = be.full((*lead, *shape), 0, outputs.dtype)
    runs[(..., *(slice(0, size) for size in outputs.shape[len(lead) :]))] = outputs
    return be.xp.reshape(runs, (*lead, math.prod(shape)))


def col2im(be: Backend, columns: Array, x: Array, lead: Tile, windows: Windows, outputs: Tile) -> None:
    """Add every tap to the element that it was read from: `x[..., element of t at o] += columns[..., t, o]`.

    The adjoint of `im2col`: `<im2col(x), columns> = <x, col2im(columns)>`. Taps in padding are dropped.
    """
    xp = be.xp
    kernel, first = tuple(window.kernel for window in windows), columns.ndim - len(windows) - 1
    columns = xp.reshape(columns, (*columns.shape[:first], *kernel, *columns.shape[first + 1 :]))
    for k, reads, writes in taps(windows, outputs):
        x[(*lead, ..., *reads)] += columns[(..., *k, *writes)]


def counts(be: Backend, windows: AnyWindows, like: Array) -> list[Array]:
    """Return, along each dimension, how many taps of each window meet an element; one array `(O,)` a dimension."""
    xp = be.xp
    result = []
    for window in windows:
        o = be.arange(0, window.out)
        if isinstance(window, AdaptiveWindow):
            first, after = o * window.size // window.out, -(-(o + 1) * window.size // window.out)
        else:
            begin = o * window.stride - window.low
            first = xp.clip(-(begin // window.dilation), 0, window.kernel)
            after = xp.clip((window.size - 1 - begin) // window.dilation + 1, 0, window.kernel)
        result.append(xp.astype(after - first, like.dtype))
    return result


def fill_padding(be: Backend, x: Array, windows: Windows, mode: str) -> tuple[Array, Windows]:
    """Return a copy of `x` with its padding filled from its elements, and the windows that slide over both.

    `reflect` mirrors at the border element, `replicate` repeats it, `circular` goes on at the other end. One dimension
    after the other, so that corners are filled from what is filled already. With `zeros`, padding stays outside of `x`.
    """
    if mode == "zeros":
        return x, windows
    first = x.ndim - len(windows)
    filled = be.full((*x.shape[:first], *(w.low + w.size + w.high for w in windows)), 0, x.dtype)
    filled[(..., *_inside(windows))] = x
    for to, origin, mirrored in _copies(windows, mode):
        filled[to] = _flipped(be, filled[origin], mirrored)
    return filled, tuple(window.padded for window in windows)


def fold_padding(be: Backend, dfilled: Array, windows: Windows, mode: str) -> Array:
    """Return the gradient of `x` from that of `fill_padding(x)`, which is written to: its adjoint.

    What was copied adds its gradient to where it came from, in the reverse order.
    """
    if mode == "zeros":
        return dfilled
    for to, origin, mirrored in reversed(list(_copies(windows, mode))):
        part = _flipped(be, dfilled[to], mirrored)
        for d in range(part.ndim):
            if dfilled[origin].shape[d] < part.shape[d]:  # one element, repeated
                part = be.sums(part, d, True)
        dfilled[origin] += part
    dx = be.full((*dfilled.shape[: dfilled.ndim - len(windows)], *(w.size for w in windows)), 0, dfilled.dtype)
    dx[...] = dfilled[(..., *_inside(windows))]
    return dx


def _inside(windows: Windows) -> Tile:
    """Return the part of a padded array that holds its elements."""
    return tuple(slice(window.low, window.low + window.size) for window in windows)


def _flipped(be: Backend, array: Array, axis: int | None) -> Array:
    return array if axis is None else be.xp.flip(array, axis=axis)


def _copies(windows: Windows, mode: str) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], int | None]]:
    """Yield `(to, origin, mirrored)` for each padded side: the slices of the padded array to fill, and to copy from.

    `mirrored` is the axis along which the copy is reversed, None for none.
    """
    for d, window in enumerate(windows):
        begin, end = window.low, window.low + window.size
        low, high = slice(0, begin), slice(end, end + window.high)
        if mode == "reflect":
            of_low = slice(begin + 1, begin + 1 + window.low)
            of_high = slice(end - 1 - window.high, end - 1)
        elif mode == "replicate":
            of_low, of_high = slice(begin, begin + 1), slice(end - 1, end)
        else:
            of_low, of_high = slice(end - window.low, end), slice(begin, begin + window.high)
        rest = (slice(None),) * (len(windows) - d - 1)
        mirrored = d - len(windows) if mode == "reflect" else None
        if window.low:
            yield (..., low, *rest), (..., of_low, *rest), mirrored
        if window.high:
            yield (..., high, *rest), (..., of_high, *rest), mirrored
