"""The three moves on windows that convolution is made of, each one a loop over tiles.

    correlate           out = weight @ gather(x)              conv, and the dx of conv_transpose
    correlate_dx        dx  = add_back(weight^T @ dout)       the dx of conv, and conv_transpose: a correlation, too
    correlate_dweight   dweight = dout @ gather(x)^T          the dweight of both

N batch; C channels; G groups; I, J channels of one group that go in, and come out; T taps of the kernel; P positions
that a tile puts out; `*S` the spatial sizes that windows slide over; `*O` how many windows there are along each.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import _masked, _windows, backend
from ._geometry import Window, Windows
from .backend import Array, Tile

_MANY_WINDOWS = 512  # from which on it pays to multiply each line of taps by itself
_FEWER_CHANNELS = 4  # times fewer that come out of a gradient than go in make it pay to multiply before adding back
_FEW_COLUMNS = 1 << 17  # up to which that also takes less time than to see to every phase
_NEAR_TAPS = 32  # elements, within which the taps of windows lie that share what a tile reads
_ENOUGH_ROWS = 32  # of a matrix, from which on a product is as fast as any

Work = Callable[..., None]


class _Step(NamedTuple):
    """Taps that are multiplied at once."""

    weight: Array
    """(G, J, I*T)"""
    taps: slice
    """Which ones, along the first spatial dimension."""
    shift: int
    """How far along that dimension they read beyond the first step."""


def _steps(weight: Array, windows: Windows, groups: int) -> tuple[Windows, list[_Step]]:
    """Return the windows to gather, and the products that make a convolution of what they gather.

    With a stride of 1, what a tap along the first dimension reads is what the first reads, some elements further on. So
    that dimension is not gathered: one product for each of its taps takes a shifted view. That saves most of the
    passes over memory (of a 3x3 kernel, two of three), which cost as much as the products.
    """
    xp = backend.namespace(weight)
    first = windows[0]
    rows = math.prod(weight.shape[1:]) // first.kernel  # not copied for each further tap; there, results are added
    shared = first.stride == 1 and 1 < first.extent <= first.out and rows >= 2 * weight.shape[0] // groups
    shared = shared and math.prod(w.out for w in windows) >= _MANY_WINDOWS
    if shared:
        line = first._replace(kernel=1, dilation=1, out=first.out + first.extent - 1)
        windows = (line, *windows[1:])
    steps = []
    for k in range(first.kernel if shared else 1):
        which = slice(k, k + 1) if shared else slice(0, first.kernel)
        part = weight[:, :, which, ...]
        # Always in one layout: BLAS rounds by layout.
        part = backend.contiguous(xp.reshape(part, (groups, -1, math.prod(part.shape[1:]))))
        steps.append(_Step(part, which, k * first.dilation if shared else 0))
    return windows, steps


def _reach(o: Tile, steps: list[_Step]) -> Tile:
    """Return what all steps read of what is gathered, for the windows `o`."""
    return (slice(o[0].start, o[0].stop + steps[-1].shift), *o[1:])


def _part(columns: Array, step: _Step, o: Tile, groups: int) -> Array:
    """Return what one step reads of gathered columns (N, G*I, T, *O): (N, G, I*T, P)."""
    lines = slice(step.shift, step.shift + o[0].stop - o[0].start)
    taken = columns[(slice(None), slice(None), slice(None), lines, ...)]
    return _grouped(taken, groups, step.weight.shape[2])


def correlate(x: Array, weight: Array, windows: Windows, groups: int, bias: Array | None = None) -> Array:
    """Return `weight @ gather(x) + bias`: `x` (N, G*I, *S), `weight` (G*J, I, *K), result (N, G*J, *O)."""
    out = backend.empty((x.shape[0], weight.shape[0], *(w.out for w in windows)), x)
    work, tiles = _correlation(out, x, weight, windows, groups, bias, _meets_padding(weight, windows))
    backend.run(work, tiles, x)
    return out


def _correlation(
    out: Array, x: Array, weight: Array, windows: Windows, groups: int, bias: Array | None, meets_padding: bool
) -> tuple[Work, Iterator[Tile]]:
    """Return what writes to `out` what `correlate` returns, tile by tile."""
    xp = backend.namespace(x)
    if _by_planes(weight, windows, groups):
        return _correlation_of_planes(out, x, weight, windows, bias, meets_padding)
    gathered, steps = _steps(weight, windows, groups)
    addend = None if bias is None else xp.reshape(bias, (groups, -1, 1))

    def work(n: slice, *o: slice) -> None:
        columns = _windows.gather(x, (n,), gathered, _reach(o, steps))
        real = _windows.gather(_everywhere(x), (n,), gathered, _reach(o, steps)) if meets_padding else None

        def multiplied(step: _Step) -> Array:  # (G, J, I*T) @ (N, G, I*T, P)
            part = _part(columns, step, o, groups)
            if real is None:
                return step.weight @ part
            return _masked.matmul(step.weight, part, b_real=_part(real, step, o, groups))

        product = multiplied(steps[0])
        for step in steps[1:]:
            product += multiplied(step)
        if addend is not None:
            product += addend
        at = (n, ..., *o)
        out[at] = xp.reshape(product, out[at].shape)

    return work, _tiles(x, weight, windows, gathered)


def correlate_dx(dout: Array, weight: Array, windows: Windows, groups: int, bias: Array | None = None) -> Array:
    """Return `add_back(weight^T @ dout) + bias`: `dout` (N, G*J, *O), `weight` (G*J, I, *K), result (N, G*I, *S).

    Element `stride * m + phase` is reached by every `stride`-th tap at most, the later the earlier the window: each
    phase is a convolution of `dout` with its taps in reverse order. That gathers J channels for I that come out, at
    every element; where these are few, or windows fewer than elements, and where there is little to do, to multiply
    first and add back what comes out is less work.
    """
    xp = backend.namespace(dout)
    rows, planes = weight.shape[0] // groups, weight.shape[1]
    columns = dout.shape[0] * groups * math.prod(weight.shape[1:]) * math.prod(w.out for w in windows)
    wide = 2 * math.prod(w.out for w in windows) < math.prod(-(-w.size // w.stride) for w in windows)
    if wide or planes * _FEWER_CHANNELS < rows or columns <= _FEW_COLUMNS:
        return _add_back_dx(dout, weight, windows, groups, bias)
    phases = [list(window.phases()) for window in windows]
    reached = all(len(along) == min(w.stride, w.size) for along, w in zip(phases, windows, strict=True))
    shape = (dout.shape[0], planes * groups, *(w.size for w in windows))
    dx = backend.empty(shape, dout) if reached else _biased(shape, bias, like=dout)
    weight_g = xp.reshape(weight, (groups, rows, planes, *weight.shape[2:]))
    weight_t = xp.reshape(xp.moveaxis(weight_g, 1, 2), (groups * planes, rows, *weight.shape[2:]))  # (G*I, J, *K)
    meets_padding = _meets_padding(weight, [over for along in phases for _, _, over in along])
    jobs: list[tuple[Any, ...]] = []  # of all phases: what to do with a tile, and the tile
    for phase in itertools.product(*phases):
        places, taps, over = zip(*phase, strict=True)
        part, part_weight = dx[(..., *places)], weight_t[(..., *taps)]
        work, tiles = _correlation(part, dout, part_weight, over, groups, bias, meets_padding)
        jobs += ((work, *tile) for tile in tiles)
    backend.run(lambda work, *tile: work(*tile), jobs, dout)
    return dx


def _add_back_dx(dout: Array, weight: Array, windows: Windows, groups: int, bias: Array | None) -> Array:
    """Return what `correlate_dx` does.

    Cut into channels, tiles share no element of the result, so that the threads can add to it; into windows if a plane
    of columns is too large for that, and then the tiles take turns.
    """
    xp = backend.namespace(dout)
    batch, planes = dout.shape[0], weight.shape[1]
    dx = _biased((batch, planes * groups, *(w.size for w in windows)), bias, like=dout)
    dx_g = xp.reshape(dx, (batch, groups, planes, *dx.shape[2:]))
    outs = tuple(w.out for w in windows)
    weight_g = xp.reshape(weight, (groups, -1, planes, math.prod(weight.shape[2:])))  # (G, J, I, T)

    def columns(n: slice, g: slice, i: slice, o: Tile) -> Array:
        """Return the columns of the tile: (N, G, I, T, *O)."""
        part = weight_g[g, :, i, :]
        douts = _grouped(dout[(n, ..., *o)], groups, part.shape[1])[:, g, ...]  # (N, G, J, P)
        part_t = xp.matrix_transpose(xp.reshape(part, (*part.shape[:2], -1)))  # (G, I*T, J)
        product = part_t @ douts if part.shape[1] > 1 else part_t * douts
        return xp.reshape(product, (*product.shape[:2], *part.shape[2:], *backend.sizes_of(o)))

    def of_channels(n: slice, g: slice, i: slice) -> None:
        everything = tuple(slice(0, out) for out in outs)
        _windows.add_back(columns(n, g, i, everything), dx_g, (n, g, i), windows, everything)

    def of_windows(n: slice, *o: slice) -> Array:
        return columns(n, slice(0, groups), slice(0, planes), o)

    def collect(tile: Tile, dcolumns: Array) -> None:
        lead = (tile[0], slice(0, groups), slice(0, planes))
        _windows.add_back(dcolumns, dx_g, lead, windows, tile[1:])

    taps = weight_g.shape[3]
    plane_bytes = taps * math.prod(outs) * backend.itemsize(dout)
    channels = backend.tile_bytes(dout) // max(1, plane_bytes)
    if channels >= planes or channels * taps >= _ENOUGH_ROWS:
        backend.run(of_channels, backend.tiles((batch, groups, planes), plane_bytes, dout), dout)
    else:
        backend.run(of_windows, _tiles(dx, weight, windows, windows), dout, collect)
    return dx


def correlate_dweight(dout: Array, x: Array, weight: Array, windows: Windows, groups: int) -> Array:
    """Return `dout @ gather(x)^T` summed over the batch: `dout` (N, G*J, *O), `x` (N, G*I, *S), result as `weight`.

    Computed as its transpose, `gather(x) @ dout^T`: BLAS is faster where the first of two factors has the more rows
    (192x3136 @ 3136x64: 84 GFLOP/s on a thread, the other way 70).
    """
    xp = backend.namespace(x)
    if _by_planes(weight, windows, groups):
        return _correlate_dweight_planes(dout, x, weight, windows)
    meets_padding = _meets_padding(dout, windows)
    gathered, steps = _steps(weight, windows, groups)
    totals = [backend.full((groups, step.weight.shape[2], step.weight.shape[1]), 0, x) for step in steps]

    def work(n: slice, *o: slice) -> list[Array]:
        columns = _windows.gather(x, (n,), gathered, _reach(o, steps))
        if meets_padding:
            real = _windows.gather(_everywhere(x), (n,), gathered, _reach(o, steps))
        douts_t = xp.matrix_transpose(_grouped(dout[(n, ..., *o)], groups, weight.shape[0] // groups))
        products = []
        for step in steps:  # (N, G, I*T, P) @ (N, G, P, J)
            part = _part(columns, step, o, groups)
            if meets_padding:
                product = _masked.matmul(part, douts_t, a_real=_part(real, step, o, groups))
            else:
                product = part @ douts_t
            products.append(xp.sum(product, axis=0))
        return products

    def collect(_: Tile, products: list[Array]) -> None:
        for total, product in zip(totals, products, strict=True):
            total[...] += product

    backend.run(work, _tiles(x, weight, windows, gathered), x, collect)
    dweight = backend.empty(tuple(weight.shape), x)
    for total, step in zip(totals, steps, strict=True):
        at = (slice(None), slice(None), step.taps, ...)
        dweight[at] = xp.reshape(xp.matrix_transpose(total), dweight[at].shape)
    return dweight


def _by_planes(weight: Array, windows: Windows, groups: int) -> bool:
    """Return whether each channel is convolved by itself, with many windows that lie next to each other.

    Then there is nothing for a product of matrices to do, and less to gather: see `_windows.end_to_end`.
    """
    alone = weight.shape[0] == groups and weight.shape[1] == 1
    return alone and all(w.stride == 1 and w.extent <= min(w.out, _NEAR_TAPS) for w in windows)


def _correlation_of_planes(
    out: Array, x: Array, weight: Array, windows: Windows, bias: Array | None, meets_padding: bool
) -> tuple[Work, Iterator[Tile]]:
    """Return what `_correlation` does, for `_by_planes`: (N, C, *S), (C, 1, *K) -> (N, C, *O)."""
    xp = backend.namespace(x)
    weights = backend.contiguous(weight[:, 0, ...])  # (C, *K)
    plain = backend.contiguous(_masked.finite(weights)) if meets_padding else weights
    addend = None if bias is None else xp.reshape(bias, (-1, 1))

    def work(n: slice, c: slice, *o: slice) -> None:
        rows, steps, shape = _windows.end_to_end(x, (n, c), windows, o)
        length = math.prod(shape)
        total = backend.weighted_runs(rows, plain[c, ...], steps, length)
        if meets_padding:  # what no NaN or inf reaches keeps its bits
            real = _windows.end_to_end(_everywhere(x), (n, c), windows, o)[0]
            special = xp.astype(~xp.isfinite(weights[c, ...]), x.dtype)
            reached = backend.weighted_runs(xp.astype(real, x.dtype), special, steps, length) > 0
            of_real = backend.weighted_runs(rows, weights[c, ...], steps, length, real)
            total = xp.where(reached, of_real, total)
        if addend is not None:
            total += addend[c, :]
        own = (slice(0, size) for size in backend.sizes_of(o))
        out[(n, c, *o)] = xp.reshape(total, (*total.shape[:2], *shape))[(..., *own)]

    return work, backend.tiles(tuple(out.shape), 3 * backend.itemsize(x), x, backend.LEAST_LIGHT)


def _correlate_dweight_planes(dout: Array, x: Array, weight: Array, windows: Windows) -> Array:
    """Return what `correlate_dweight` does, for `_by_planes`."""
    xp = backend.namespace(x)
    kernel = tuple(weight.shape[2:])
    dweight = backend.full((weight.shape[0], *kernel), 0, x)
    finite = backend.all_finite(x) and backend.all_finite(dout)  # what lies between the rows of a run meets a 0

    def work(n: slice, c: slice, *o: slice) -> Array:
        rows, steps, shape = _windows.end_to_end(x, (n, c), windows, o)
        douts = _windows.in_runs(dout[(n, c, *o)], shape)
        if finite:
            products = backend.run_products(rows, douts, kernel, steps)
        else:
            real = _windows.end_to_end(_everywhere(x), (n, c), windows, o)[0]
            own = _windows.in_runs(_everywhere(dout)[(n, c, *o)], shape)
            each = (
                _masked.matmul(douts[..., None, :], rows[..., run, None], own[..., None, :], real[..., run, None])
                for _, run in backend.runs(kernel, steps, math.prod(shape))
            )
            products = xp.reshape(xp.concat(list(each), axis=-1), (*douts.shape[:2], *kernel))
        return xp.sum(products, axis=0)

    def collect(tile: Tile, part: Array) -> None:
        dweight[tile[1], ...] += part

    backend.run(work, backend.tiles(tuple(dout.shape), 3 * backend.itemsize(x), x, backend.LEAST_LIGHT), x, collect)
    return xp.reshape(dweight, weight.shape)


def _meets_padding(factor: Array, windows: Sequence[Window]) -> bool:
    """Return whether a NaN or inf of `factor`, which gathered taps are multiplied by, may meet the 0 of padding."""
    return any(window.overreaches for window in windows) and not backend.all_finite(factor)


def _everywhere(x: Array) -> Array:
    """Return True for every element of `x`, in no memory; gathered, it tells elements from padding."""
    xp = backend.namespace(x)
    return xp.broadcast_to(backend.full((1,), 1, x, xp.bool), x.shape)


def _grouped(array: Array, groups: int, rows: int) -> Array:
    """Return an array (N, G*rows or G*I, T, ..., *O) as (N, G, rows, P)."""
    positions = math.prod(array.shape[1:]) // (groups * rows)
    return backend.in_rows(backend.namespace(array).reshape(array, (array.shape[0], groups, rows, positions)))


def _biased(shape: tuple[int, ...], bias: Array | None, like: Array) -> Array:
    """Return a new array that holds the bias of each channel, or 0."""
    out = backend.full(shape, 0, like)
    if bias is not None:
        out[...] = backend.namespace(bias).reshape(bias, (-1, *(1 for _ in shape[2:])))
    return out


def _tiles(x: Array, weight: Array, windows: Windows, gathered: Windows) -> Iterator[Tile]:
    """Cut batch and windows into tiles; a window costs its columns and what comes out of them.

    Where the first dimension is not gathered, tiles are as long along it as can be: each reads some lines beyond.
    """
    per_window = x.shape[1] * math.prod(w.kernel for w in gathered) + weight.shape[0]
    first, *others = (w.out for w in windows)
    outer = max(0, len(others) - 1) if gathered != windows else 0  # dimensions that are cut before the first one is
    shape = (x.shape[0], *others[:outer], first, *others[outer:])
    tiles = backend.tiles(shape, per_window * backend.itemsize(x), x)
    return ((n, o[outer], *o[:outer], *o[outer + 1 :]) for n, *o in tiles)
