"""The three products of convolution, each a loop over tiles; untiled in `textbook/convolution.py`.

    correlate           out = weight @ im2col(x)              conv, and the dx of conv_transpose
    correlate_dx        dx  = col2im(weight^T @ dout)         the dx of conv, and conv_transpose
    correlate_dweight   dweight = dout @ im2col(x)^T          the dweight of both

N batch; C channels; G groups; I, J input and output channels of one group; T taps of the kernel; P output positions
of a tile; `*S` the spatial sizes; `*O` the number of windows along each dimension.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .. import backend
from ..backend import Array, Backend, Tile
from . import nan_safe
from .geometry import Window, Windows
from .im2col import col2im, end_to_end, im2col, in_runs

MANY_WINDOWS = 512  # with at least so many windows, a product per line of taps is faster than one product of all taps
FEWER_CHANNELS = 4  # with so many times fewer input than output channels, col2im is faster than a correlation
FEW_COLUMNS = 1 << 17  # up to so many elements of columns, col2im is faster than one correlation per phase
NEAR_TAPS = 32  # depthwise: the largest extent of a kernel, in elements, for which windows share what a tile reads
ENOUGH_ROWS = 32  # a matrix of at least so many rows is multiplied at full speed

Work = Callable[..., None]


class _Step(NamedTuple):
    """One product: some of the taps along the first spatial dimension, all of the others."""

    weight: Array
    """(G, J, I*T)"""
    taps: slice
    """The taps, along the first spatial dimension."""
    shift: int
    """Offset along that dimension of what they read, relative to the first step."""


def _steps(be: Backend, weight: Array, windows: Windows, groups: int) -> tuple[Windows, list[_Step]]:
    """Return the windows that im2col takes, and the products that make a convolution of its columns.

    With a stride of 1, each tap along the first dimension reads what the first tap reads, shifted. So im2col leaves
    that dimension out, and there is one product per tap of it, on a shifted view of the columns. That saves most passes
    over memory (two of three for a 3x3 kernel), which take as long as the products.
    """
    xp = be.xp
    first = windows[0]
    rows = (
        math.prod(weight.shape[1:]) // first.kernel
    )  # rows that are not copied per further tap; in exchange, results are added
    shared = first.stride == 1 and 1 < first.extent <= first.out and rows >= 2 * weight.shape[0] // groups
    shared = shared and math.prod(w.out for w in windows) >= MANY_WINDOWS
    if shared:
        line = first._replace(kernel=1, dilation=1, out=first.out + first.extent - 1)
        windows = (line, *windows[1:])
    steps = []
    for k in range(first.kernel if shared else 1):
        which = slice(k, k + 1) if shared else slice(0, first.kernel)
        part = weight[:, :, which, ...]
        # Always in the same layout, because BLAS rounds differently in another.
        part = be.contiguous(xp.reshape(part, (groups, -1, math.prod(part.shape[1:]))))
        steps.append(_Step(part, which, k * first.dilation if shared else 0))
    return windows, steps


def _read_by_steps(o: Tile, steps: list[_Step]) -> Tile:
    """Return the range of the columns that all steps read for the windows `o`."""
    return (slice(o[0].start, o[0].stop + steps[-1].shift), *o[1:])


def _part(be: Backend, columns: Array, step: _Step, o: Tile, groups: int) -> Array:
    """Return the part of the columns (N, G*I, T, *O) that one step reads: (N, G, I*T, P)."""
    lines = slice(step.shift, step.shift + o[0].stop - o[0].start)
    taken = columns[(slice(None), slice(None), slice(None), lines, ...)]
    return _grouped(be, taken, groups, step.weight.shape[2])


def correlate(be: Backend, x: Array, weight: Array, windows: Windows, groups: int, bias: Array | None = None) -> Array:
    """Return `weight @ im2col(x) + bias`: `x` (N, G*I, *S), `weight` (G*J, I, *K), result (N, G*J, *O)."""
    out = be.empty((x.shape[0], weight.shape[0], *(w.out for w in windows)), x.dtype)
    work, tiles = _correlation(be, out, x, weight, windows, groups, bias, _nonfinite_meets_padding(be, weight, windows))
    be.run(work, tiles)
    return out


def _correlation(
    be: Backend,
    out: Array,
    x: Array,
    weight: Array,
    windows: Windows,
    groups: int,
    bias: Array | None,
    nonfinite_meets_padding: bool,
) -> tuple[Work, Iterator[Tile]]:
    """Return the tile function that writes `weight @ im2col(x) + bias` to `out`, and the tiles."""
    xp = be.xp
    if _by_planes(weight, windows, groups):
        return _correlation_of_planes(be, out, x, weight, windows, bias, nonfinite_meets_padding)
    gathered, steps = _steps(be, weight, windows, groups)
    addend = None if bias is None else xp.reshape(bias, (groups, -1, 1))

    def work(n: slice, *o: slice) -> None:
        columns = im2col(be, x, (n,), gathered, _read_by_steps(o, steps))
        real = (
            im2col(be, _all_true_like(be, x), (n,), gathered, _read_by_steps(o, steps))
            if nonfinite_meets_padding
            else None
        )

        def multiplied(step: _Step) -> Array:  # (G, J, I*T) @ (N, G, I*T, P)
            part = _part(be, columns, step, o, groups)
            if real is None:
                return step.weight @ part
            return nan_safe.matmul(be, step.weight, part, b_real=_part(be, real, step, o, groups))

        product = multiplied(steps[0])
        for step in steps[1:]:
            product += multiplied(step)
        if addend is not None:
            product += addend
        at = (n, ..., *o)
        out[at] = xp.reshape(product, out[at].shape)

    return work, _tiles(be, x, weight, windows, gathered)


def correlate_dx(
    be: Backend, dout: Array, weight: Array, windows: Windows, groups: int, bias: Array | None = None
) -> Array:
    """Return `col2im(weight^T @ dout) + bias`: `dout` (N, G*J, *O), `weight` (G*J, I, *K), result (N, G*I, *S).

    The elements `stride * m + phase` of one phase are read by every `stride`-th tap only, and a later tap reads them
    from an earlier window. So each phase is a correlation of `dout` with these taps in reverse order. Its im2col holds
    J channels per element. Where J is much larger than I, where there are fewer windows than elements, or where the
    whole problem is small, col2im is less work.
    """
    xp = be.xp
    rows, planes = weight.shape[0] // groups, weight.shape[1]
    columns = dout.shape[0] * groups * math.prod(weight.shape[1:]) * math.prod(w.out for w in windows)
    wide = 2 * math.prod(w.out for w in windows) < math.prod(-(-w.size // w.stride) for w in windows)
    if wide or planes * FEWER_CHANNELS < rows or columns <= FEW_COLUMNS:
        return _col2im_dx(be, dout, weight, windows, groups, bias)
    phases = [list(window.phases()) for window in windows]
    all_reached = all(len(along) == min(w.stride, w.size) for along, w in zip(phases, windows, strict=True))
    shape = (dout.shape[0], planes * groups, *(w.size for w in windows))
    dx = be.empty(shape, dout.dtype) if all_reached else _biased(be, shape, bias, like=dout)
    weight_g = xp.reshape(weight, (groups, rows, planes, *weight.shape[2:]))
    weight_t = xp.reshape(xp.moveaxis(weight_g, 1, 2), (groups * planes, rows, *weight.shape[2:]))  # (G*I, J, *K)
    nonfinite_meets_padding = _nonfinite_meets_padding(be, weight, [over for along in phases for _, _, over in along])
    jobs: list[tuple[Any, ...]] = []  # of all phases: the tile function and the tile
    for phase in itertools.product(*phases):
        places, taps, over = zip(*phase, strict=True)
        part = dx[(..., *places)]
        part_weight = xp.flip(weight_t[(..., *taps)], axis=tuple(range(2, weight_t.ndim)))
        work, tiles = _correlation(be, part, dout, part_weight, over, groups, bias, nonfinite_meets_padding)
        jobs += ((work, *tile) for tile in tiles)
    be.run(lambda work, *tile: work(*tile), jobs)
    return dx


def _col2im_dx(be: Backend, dout: Array, weight: Array, windows: Windows, groups: int, bias: Array | None) -> Array:
    """Compute `correlate_dx` by col2im.

    Tiles are cut along channels where the columns of a plane fit: then no two tiles add to the same element, and
    threads write to the result directly. Otherwise they are cut along windows, and added up one after the other.
    """
    xp = be.xp
    batch, planes = dout.shape[0], weight.shape[1]
    dx = _biased(be, (batch, planes * groups, *(w.size for w in windows)), bias, like=dout)
    dx_g = xp.reshape(dx, (batch, groups, planes, *dx.shape[2:]))
    outs = tuple(w.out for w in windows)
    weight_g = xp.reshape(weight, (groups, -1, planes, math.prod(weight.shape[2:])))  # (G, J, I, T)

    def columns(n: slice, g: slice, i: slice, o: Tile) -> Array:
        """Return the columns of the tile: (N, G, I, T, *O)."""
        part = weight_g[g, :, i, :]
        douts = _grouped(be, dout[(n, ..., *o)], groups, part.shape[1])[:, g, ...]  # (N, G, J, P)
        part_t = xp.matrix_transpose(xp.reshape(part, (*part.shape[:2], -1)))  # (G, I*T, J)
        product = part_t @ douts if part.shape[1] > 1 else part_t * douts
        return xp.reshape(product, (*product.shape[:2], *part.shape[2:], *backend.sizes_of(o)))

    def of_channels(n: slice, g: slice, i: slice) -> None:
        everything = tuple(slice(0, out) for out in outs)
        col2im(be, columns(n, g, i, everything), dx_g, (n, g, i), windows, everything)

    def of_windows(n: slice, *o: slice) -> Array:
        return columns(n, slice(0, groups), slice(0, planes), o)

    def collect(tile: Tile, dcolumns: Array) -> None:
        lead = (tile[0], slice(0, groups), slice(0, planes))
        col2im(be, dcolumns, dx_g, lead, windows, tile[1:])

    taps = weight_g.shape[3]
    plane_bytes = taps * math.prod(outs) * be.itemsize(dout)
    channels = be.tile_room() // max(1, plane_bytes)
    if channels >= planes or channels * taps >= ENOUGH_ROWS:
        be.run(of_channels, be.tiles((batch, groups, planes), plane_bytes))
    else:
        be.run(of_windows, _tiles(be, dx, weight, windows, windows), collect)
    return dx


def correlate_dweight(be: Backend, dout: Array, x: Array, weight: Array, windows: Windows, groups: int) -> Array:
    """Return `dout @ im2col(x)^T` summed over the batch: `dout` (N, G*J, *O), `x` (N, G*I, *S), result as `weight`.

    Computed as its transpose, `im2col(x) @ dout^T`: BLAS is faster where the first factor has more rows than the second
    (192x3136 @ 3136x64: 84 GFLOP/s on a thread, the other way 70).
    """
    xp = be.xp
    if _by_planes(weight, windows, groups):
        return _correlate_dweight_planes(be, dout, x, weight, windows)
    nonfinite_meets_padding = _nonfinite_meets_padding(be, dout, windows)
    gathered, steps = _steps(be, weight, windows, groups)
    totals = [be.full((groups, step.weight.shape[2], step.weight.shape[1]), 0, x.dtype) for step in steps]

    def work(n: slice, *o: slice) -> list[Array]:
        columns = im2col(be, x, (n,), gathered, _read_by_steps(o, steps))
        if nonfinite_meets_padding:
            real = im2col(be, _all_true_like(be, x), (n,), gathered, _read_by_steps(o, steps))
        douts_t = xp.matrix_transpose(_grouped(be, dout[(n, ..., *o)], groups, weight.shape[0] // groups))
        products = []
        for step in steps:  # (N, G, I*T, P) @ (N, G, P, J)
            part = _part(be, columns, step, o, groups)
            if nonfinite_meets_padding:
                product = nan_safe.matmul(be, part, douts_t, a_real=_part(be, real, step, o, groups))
            else:
                product = part @ douts_t
            products.append(be.sums(product, 0, False))
        return products

    def collect(_: Tile, products: list[Array]) -> None:
        for total, product in zip(totals, products, strict=True):
            total[...] += product

    be.run(work, _tiles(be, x, weight, windows, gathered), collect)
    dweight = be.empty(tuple(weight.shape), x.dtype)
    for total, step in zip(totals, steps, strict=True):
        at = (slice(None), slice(None), step.taps, ...)
        dweight[at] = xp.reshape(xp.matrix_transpose(total), dweight[at].shape)
    return dweight


def _by_planes(weight: Array, windows: Windows, groups: int) -> bool:
    """Return whether the convolution is depthwise with a stride of 1 and near taps: then no matrices are multiplied.

    See `end_to_end`.
    """
    alone = weight.shape[0] == groups and weight.shape[1] == 1
    return alone and all(w.stride == 1 and w.extent <= min(w.out, NEAR_TAPS) for w in windows)


def _correlation_of_planes(
    be: Backend,
    out: Array,
    x: Array,
    weight: Array,
    windows: Windows,
    bias: Array | None,
    nonfinite_meets_padding: bool,
) -> tuple[Work, Iterator[Tile]]:
    """Return what `_correlation` returns, for a depthwise convolution: (N, C, *S), (C, 1, *K) -> (N, C, *O)."""
    xp = be.xp
    weights = be.contiguous(weight[:, 0, ...])  # (C, *K)
    plain = be.contiguous(nan_safe.finite(be, weights)) if nonfinite_meets_padding else weights
    addend = None if bias is None else xp.reshape(bias, (-1, 1))

    def work(n: slice, c: slice, *o: slice) -> None:
        rows, steps, shape = end_to_end(be, x, (n, c), windows, o)
        length = math.prod(shape)
        total = be.weighted_runs(rows, plain[c, ...], steps, length)
        if nonfinite_meets_padding:  # outputs that no NaN or inf reaches keep their bits
            real = end_to_end(be, _all_true_like(be, x), (n, c), windows, o)[0]
            special = xp.astype(~xp.isfinite(weights[c, ...]), x.dtype)
            nonfinite_reaches = be.weighted_runs(xp.astype(real, x.dtype), special, steps, length) > 0
            of_real = be.weighted_runs(rows, weights[c, ...], steps, length, real)
            total = xp.where(nonfinite_reaches, of_real, total)
        if addend is not None:
            total += addend[c, :]
        own = (slice(0, size) for size in backend.sizes_of(o))
        out[(n, c, *o)] = xp.reshape(total, (*total.shape[:2], *shape))[(..., *own)]

    return work, be.tiles(tuple(out.shape), 3 * be.itemsize(x), backend.LEAST_LIGHT)


def _correlate_dweight_planes(be: Backend, dout: Array, x: Array, weight: Array, windows: Windows) -> Array:
    """Compute `correlate_dweight` for a depthwise convolution."""
    xp = be.xp
    kernel = tuple(weight.shape[2:])
    dweight = be.full((weight.shape[0], *kernel), 0, x.dtype)
    finite = be.all_finite(x) and be.all_finite(dout)  # the gap between two rows of a run is multiplied by 0

    def work(n: slice, c: slice, *o: slice) -> Array:
        rows, steps, shape = end_to_end(be, x, (n, c), windows, o)
        douts = in_runs(be, dout[(n, c, *o)], shape)
        if finite:
            products = be.run_products(rows, douts, kernel, steps)
        else:
            real = end_to_end(be, _all_true_like(be, x), (n, c), windows, o)[0]
            own = in_runs(be, _all_true_like(be, dout)[(n, c, *o)], shape)
            each = (
                nan_safe.matmul(be, douts[..., None, :], rows[..., run, None], own[..., None, :], real[..., run, None])
                for _, run in backend.runs(kernel, steps, math.prod(shape))
            )
            products = xp.reshape(xp.concat(list(each), axis=-1), (*douts.shape[:2], *kernel))
        return be.sums(products, 0, False)

    def collect(tile: Tile, part: Array) -> None:
        dweight[tile[1], ...] += part

    be.run(work, be.tiles(tuple(dout.shape), 3 * be.itemsize(x), backend.LEAST_LIGHT), collect)
    return xp.reshape(dweight, weight.shape)


def _nonfinite_meets_padding(be: Backend, factor: Array, windows: Sequence[Window]) -> bool:
    """Return whether windows reach into padding, whose zeros a NaN or inf in `factor` would be multiplied with."""
    return any(window.overreaches for window in windows) and not be.all_finite(factor)


def _all_true_like(be: Backend, x: Array) -> Array:
    """Return True of the shape of `x`, in the memory of one element; its im2col is False in padding."""
    xp = be.xp
    return xp.broadcast_to(be.full((1,), 1, xp.bool), x.shape)


def _grouped(be: Backend, array: Array, groups: int, rows: int) -> Array:
    """Return an array (N, G*rows or G*I, T, ..., *O) as (N, G, rows, P)."""
    positions = math.prod(array.shape[1:]) // (groups * rows)
    return be.in_rows(be.xp.reshape(array, (array.shape[0], groups, rows, positions)))


def _biased(be: Backend, shape: tuple[int, ...], bias: Array | None, like: Array) -> Array:
    """Return a new array that holds the bias of each channel, or 0."""
    out = be.full(shape, 0, like.dtype)
    if bias is not None:
        out[...] = be.xp.reshape(bias, (-1, *(1 for _ in shape[2:])))
    return out


def _tiles(be: Backend, x: Array, weight: Array, windows: Windows, gathered: Windows) -> Iterator[Tile]:
    """Cut batch and windows into tiles; a window needs memory for its columns and its outputs.

    Where im2col leaves the first dimension out, tiles are as long along it as possible, as each reads some lines more.
    """
    per_window = x.shape[1] * math.prod(w.kernel for w in gathered) + weight.shape[0]
    first, *others = (w.out for w in windows)
    outer = max(0, len(others) - 1) if gathered != windows else 0  # so many dimensions are cut before the first one
    shape = (x.shape[0], *others[:outer], first, *others[outer:])
    tiles = be.tiles(shape, per_window * be.itemsize(x))
    return ((n, o[outer], *o[:outer], *o[outer + 1 :]) for n, *o in tiles)
