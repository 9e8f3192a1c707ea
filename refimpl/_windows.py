"""The two adjoint moves that convolution and pooling are made of: gather the taps of every window, add them back.

T taps of the kernel; `(*S)` the elements that windows slide over; `(*O)` the windows of a tile.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from . import backend
from ._geometry import AdaptiveWindow, AnyWindows, Windows, reach, taps, within
from .backend import Array, Tile

_MANY = 16  # taps, from which on it pays to gather them along one dimension after another


def gather(x: Array, lead: Tile, windows: Windows, outputs: Tile) -> Array:
    """Return what every tap of every window in the tile reads: `columns[..., t, o] = x[..., element of t at o]`.

    Taps in padding hold 0. Many are gathered along the last dimension first: a kernel of 7x7 takes 7 copies of short
    rows that way, and 7 of longer runs, not 49 of short rows.

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
    dims, first = len(windows), x.ndim - len(windows)
    region = reach(windows, outputs)
    columns = x[(*lead, ..., *region)][(*(slice(None),) * first, *(None,) * dims, ...)]  # (..., *K, *S), each K still 1
    kernel = [window.kernel for window in windows]
    lines = math.prod(r.stop - r.start for r in region[:-1])  # that the taps of the last dimension read
    fewer = lines <= math.prod(kernel[:-1]) * math.prod(o.stop - o.start for o in outputs[:-1])
    twice = math.prod(kernel) >= _MANY and math.prod(kernel[:-1]) > 1 and fewer
    for now in (range(dims - 1, dims), range(dims - 1)) if twice else (range(dims),):
        columns = _gathered_along(columns, now, windows, outputs, region)
    sizes = columns.shape[first + dims :]
    return backend.namespace(x).reshape(columns, (*columns.shape[:first], math.prod(kernel), *sizes))


def _gathered_along(x: Array, now: range, windows: Windows, outputs: Tile, region: Sequence[slice]) -> Array:
    """Return what the taps of the windows read along some dimensions: (..., *K, *S), of K 1 there and S the region."""
    dims, everything = len(windows), slice(None)
    along: list[list[tuple[int | slice, slice, slice]]] = [[(everything, everything, everything)]] * dims
    kernel, sizes, complete = list(x.shape[-2 * dims : -dims]), list(x.shape[-dims:]), True
    for d in now:
        window, o = windows[d], outputs[d]
        kernel[d], sizes[d] = window.kernel, o.stop - o.start
        along[d] = [(k, within(reads, region[d]), writes) for k, reads, writes in window.taps(o.start, o.stop)]
        complete &= [writes.stop - writes.start for _, _, writes in along[d]] == [sizes[d]] * window.kernel
    found = list(itertools.product(*along))
    if complete and len(found) == 1:  # a view, as nothing is moved
        return x[(..., *(reads for _, reads, _ in found[0]))]
    shape = (*x.shape[: -2 * dims], *kernel, *sizes)
    columns = backend.empty(shape, x) if complete else backend.full(shape, 0, x)
    for taps_of in found:
        k, reads, writes = zip(*taps_of, strict=True)
        columns[(..., *k, *writes)] = x[(..., *(0 if isinstance(i, int) else i for i in k), *reads)]
    return columns


def end_to_end(x: Array, lead: Tile, windows: Windows, outputs: Tile) -> tuple[Array, list[int], tuple[int, ...]]:
    """Lay what windows with a stride of 1 read end to end, padding included, so that a tap reads one long run.

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
    xp = backend.namespace(x)
    sizes = [o.stop - o.start + window.extent - 1 for window, o in zip(windows, outputs, strict=True)]
    shape = (outputs[0].stop - outputs[0].start, *sizes[1:])
    steps = [window.dilation * math.prod(sizes[d + 1 :]) for d, window in enumerate(windows)]
    region = reach(windows, outputs)
    places = [
        slice(r.start + w.low - o.start, r.stop + w.low - o.start)
        for r, w, o in zip(region, windows, outputs, strict=True)
    ]
    sizes[0] += len(sizes) > 1  # the last run goes on beyond the last row
    rows = backend.full((*(s.stop - s.start for s in lead), *sizes), 0, x)
    if all(r.start < r.stop for r in region):
        rows[(..., *places)] = x[(*lead, *region)]
    rows = xp.reshape(rows, (*rows.shape[: len(lead)], math.prod(sizes)))
    return rows, steps, shape


def in_runs(outputs: Array, shape: tuple[int, ...]) -> Array:
    """Return what belongs to windows as runs of this shape do, with 0 between the rows: (..., *O) -> (..., run)."""
    lead = outputs.shape[: outputs.ndim - len(shape)]
    runs = backend.full((*lead, *shape), 0, outputs)
    runs[(..., *(slice(0, size) for size in outputs.shape[len(lead) :]))] = outputs
    return backend.namespace(outputs).reshape(runs, (*lead, math.prod(shape)))


def add_back(columns: Array, x: Array, lead: Tile, windows: Windows, outputs: Tile) -> None:
    """Add every tap to the element that it was gathered from: `x[..., element of t at o] += columns[..., t, o]`.

    The adjoint of `gather`: `<gather(x), columns> = <x, add_back(columns)>`. Taps in padding are dropped.
    """
    xp = backend.namespace(columns)
    kernel, first = tuple(window.kernel for window in windows), columns.ndim - len(windows) - 1
    columns = xp.reshape(columns, (*columns.shape[:first], *kernel, *columns.shape[first + 1 :]))
    for k, reads, writes in taps(windows, outputs):
        x[(*lead, ..., *reads)] += columns[(..., *k, *writes)]


def counts(windows: AnyWindows, like: Array) -> list[Array]:
    """Return, along each dimension, how many taps of each window meet an element; one array `(O,)` a dimension."""
    xp = backend.namespace(like)
    result = []
    for window in windows:
        o = backend.arange(0, window.out, like)
        if isinstance(window, AdaptiveWindow):
            first, after = o * window.size // window.out, -(-(o + 1) * window.size // window.out)
        else:
            begin = o * window.stride - window.low
            first = xp.clip(-(begin // window.dilation), 0, window.kernel)
            after = xp.clip((window.size - 1 - begin) // window.dilation + 1, 0, window.kernel)
        result.append(xp.astype(after - first, like.dtype))
    return result


def fill_padding(x: Array, windows: Windows, mode: str) -> tuple[Array, Windows]:
    """Return a copy of `x` with its padding filled from its elements, and the windows that slide over both.

    `reflect` mirrors at the border element, `replicate` repeats it, `circular` goes on at the other end. One dimension
    after the other, so that corners are filled from what is filled already. With `zeros`, padding stays outside of `x`.
    """
    if mode == "zeros":
        return x, windows
    first = x.ndim - len(windows)
    filled = backend.full((*x.shape[:first], *(w.low + w.size + w.high for w in windows)), 0, x)
    filled[(..., *_inside(windows))] = x
    for to, origin in _copies(windows, mode):
        filled[to] = filled[origin]
    return filled, tuple(window.padded for window in windows)


def fold_padding(dfilled: Array, windows: Windows, mode: str) -> Array:
    """Return the gradient of `x` from that of `fill_padding(x)`, which is written to: its adjoint.

    What was copied adds its gradient to where it came from, in the reverse order.
    """
    if mode == "zeros":
        return dfilled
    xp = backend.namespace(dfilled)
    for to, origin in reversed(list(_copies(windows, mode))):
        part = dfilled[to]
        for d in range(part.ndim):
            if dfilled[origin].shape[d] < part.shape[d]:  # one element, repeated
                part = xp.sum(part, axis=d, keepdims=True)
        dfilled[origin] += part
    dx = backend.full((*dfilled.shape[: dfilled.ndim - len(windows)], *(w.size for w in windows)), 0, dfilled)
    dx[...] = dfilled[(..., *_inside(windows))]
    return dx


def _inside(windows: Windows) -> Tile:
    """Return where the elements lie among elements and padding."""
    return tuple(slice(window.low, window.low + window.size) for window in windows)


def _copies(windows: Windows, mode: str) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Yield `(to, origin)` for each side that has padding: what is filled, and from where, among both."""
    for d, window in enumerate(windows):
        begin, end = window.low, window.low + window.size
        low, high = slice(0, begin), slice(end, end + window.high)
        if mode == "reflect":
            of_low = slice(begin + window.low, begin, -1)
            after = end - 2 - window.high
            of_high = slice(end - 2, after if after >= 0 else None, -1)
        elif mode == "replicate":
            of_low, of_high = slice(begin, begin + 1), slice(end - 1, end)
        else:
            of_low, of_high = slice(end - window.low, end), slice(begin, begin + window.high)
        rest = (slice(None),) * (len(windows) - d - 1)
        if window.low:
            yield (..., low, *rest), (..., of_low, *rest)
        if window.high:
            yield (..., high, *rest), (..., of_high, *rest)
