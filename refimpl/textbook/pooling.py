"""Poolings: a reduction over the taps of each window, and where its gradient goes.

`...` leading dimensions; `*S` spatial sizes; `*O` windows along each; T taps; L the elements of one dimension.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from .. import backend
from ..backend import Array, Backend
from .windows import Window, along, col2im, each, im2col, op, pad, unpad, windows_of


def _windows(x: Array, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> list[Window]:
    rank = len(kernel_size) if isinstance(kernel_size, tuple | list) else x.ndim - 2
    kernel = each(kernel_size, rank)
    return windows_of(
        x.shape[x.ndim - rank :], kernel, kernel if stride is None else stride, padding, dilation, ceil_mode
    )


@op
def max_pool(
    x: Array, kernel_size: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """Return the largest element of each window, and perhaps its flat index within the plane."""
    be = backend.of(x)
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    columns, real = im2col(be, pad(be, x, windows), windows), _real(be, windows)  # (..., T, *O), (T, *O)
    least = -math.inf if be.is_floating(x) else be.xp.iinfo(x.dtype).min
    out = be.xp.max(be.xp.where(real, columns, least), axis=_tap_axis(windows))
    if not return_indices:
        return out
    wins = _first(be, real & (columns == be.xp.expand_dims(out, axis=_tap_axis(windows))), windows)
    flat = be.xp.reshape(be.arange(0, math.prod(w.size for w in windows)), tuple(w.size for w in windows))
    index = im2col(be, pad(be, flat, windows), windows)  # (T, *O)
    return out, be.xp.sum(be.xp.where(wins, index, 0), axis=_tap_axis(windows))


@op
def max_pool_backward(
    dout: Array, x: Array, kernel_size: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False, indices: Array | None = None,
) -> Array:  # fmt: skip
    """Give each window's gradient to its first maximum: `dx[indices] += dout`."""
    be = backend.of(x)
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    columns, real = im2col(be, pad(be, x, windows), windows), _real(be, windows)
    best = be.xp.max(be.xp.where(real, columns, -math.inf), axis=_tap_axis(windows), keepdims=True)
    wins = _first(be, real & (columns == best), windows)  # (..., T, *O)
    dcolumns = be.xp.where(wins, be.xp.expand_dims(dout, axis=_tap_axis(windows)), 0.0)
    return unpad(be, col2im(be, dcolumns, windows), windows)


@op
def avg_pool(
    x: Array, kernel_size: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Array:  # fmt: skip
    """Return the sum of each window, divided by how many elements count."""
    be = backend.of(x)
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    total = be.xp.sum(im2col(be, pad(be, x, windows), windows), axis=_tap_axis(windows))
    return total / _divisor(be, x, windows, count_include_pad, divisor_override)


@op
def avg_pool_backward(
    dout: Array, x: Array, kernel_size: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Array:  # fmt: skip
    """Share each window's gradient out among its elements: `dx += dout / divisor`."""
    be = backend.of(x)
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    share = be.xp.expand_dims(
        dout / _divisor(be, x, windows, count_include_pad, divisor_override), axis=_tap_axis(windows)
    )
    taps = math.prod(w.kernel for w in windows)
    dcolumns = be.xp.broadcast_to(share, (*x.shape[: x.ndim - len(windows)], taps, *(w.out for w in windows)))
    return unpad(be, col2im(be, dcolumns, windows), windows)


@op
def lp_pool(
    x: Array, norm_type: float, kernel_size: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Array:  # fmt: skip
    """Return the p-norm of each window, `out = (sum |x|**p) ** (1 / p)`, in units of its largest element."""
    be = backend.of(x)
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    columns = abs(im2col(be, pad(be, x, windows), windows))
    unit = be.xp.max(columns, axis=_tap_axis(windows), keepdims=True)
    scaled = columns / be.xp.where(unit == 0, 1.0, unit)
    out = unit * be.xp.sum(scaled**norm_type, axis=_tap_axis(windows), keepdims=True) ** (1 / norm_type)
    return be.xp.squeeze(out, axis=_tap_axis(windows))


@op
def lp_pool_backward(
    dout: Array, x: Array, norm_type: float, kernel_size: Any, *, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Array:  # fmt: skip
    """Return `dx += sign(x) * (|x| / out) ** (p - 1) * dout`, 0 where x is 0."""
    be, xp = backend.of(x), backend.of(x).xp
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    columns, axis = im2col(be, pad(be, x, windows), windows), _tap_axis(windows)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    out = xp.expand_dims(lp_pool(x, norm_type, kernel_size, **options), axis=axis)
    ratio = xp.where(columns == 0, 1.0, abs(columns) / xp.where(out == 0, 1.0, out))
    slope = xp.where(columns == 0, 0.0, xp.sign(columns) * ratio ** (norm_type - 1))
    return unpad(be, col2im(be, slope * xp.expand_dims(dout, axis=axis), windows), windows)


@op
def adaptive_avg_pool(x: Array, output_size: Any) -> Array:
    """Return the mean of each window `[floor(i L / out), ceil((i + 1) L / out))`, one dimension after the other."""
    be, sizes = backend.of(x), _adaptive_sizes(x, output_size)
    for axis, out in enumerate(sizes, start=-len(sizes)):
        x = along(be, x, _shares(be, x, int(x.shape[axis]), out), axis)
    return x


@op
def adaptive_avg_pool_backward(dout: Array, x: Array, output_size: Any) -> Array:
    """Apply the transposed matrix of each dimension."""
    be, sizes = backend.of(x), _adaptive_sizes(x, output_size)
    for axis, out in enumerate(sizes, start=-len(sizes)):
        dout = along(be, dout, be.xp.matrix_transpose(_shares(be, x, int(x.shape[axis]), out)), axis)
    return dout


@op
def adaptive_max_pool(x: Array, output_size: Any, *, return_indices: bool = False) -> Any:
    """Return the largest element of each of these windows, and perhaps its flat index within the plane."""
    be, sizes = backend.of(x), _adaptive_sizes(x, output_size)
    lead = x.shape[: x.ndim - len(sizes)]
    out, indices = be.empty((*lead, *sizes), x.dtype), be.empty((*lead, *sizes), be.xp.int64)
    for o, region in _adaptive_windows(x, sizes):
        part, best = x[(..., *region)], be.xp.max(x[(..., *region)], axis=tuple(range(-len(sizes), 0)))
        out[(..., *o)] = best
        wins = part == best[(..., *(None for _ in sizes))]
        indices[(..., *o)] = be.xp.min(
            be.xp.where(wins, _flat_index(be, x, region), 1 << 62), axis=tuple(range(-len(sizes), 0))
        )
    return (out, indices) if return_indices else out


@op
def adaptive_max_pool_backward(
    dout: Array, x: Array, output_size: Any, *, return_indices: bool = False, indices: Array | None = None
) -> Array:
    """Give each window's gradient to its first maximum."""
    be, sizes = backend.of(x), _adaptive_sizes(x, output_size)
    dx, (_, at) = be.full(tuple(x.shape), 0, x.dtype), adaptive_max_pool(x, sizes, return_indices=True)
    for o, region in _adaptive_windows(x, sizes):
        some = (..., *(None for _ in sizes))
        dx[(..., *region)] += be.xp.where(_flat_index(be, x, region) == at[(..., *o)][some], dout[(..., *o)][some], 0.0)
    return dx


@op
def max_unpool(
    x: Array, indices: Array, kernel_size: Any, *, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Array:
    """Return `out[indices] = x`, and 0 elsewhere; of equal indices the last wins."""
    be, sizes = backend.of(x), _unpooled_sizes(x, kernel_size, stride, padding, output_size)
    last = _last(be, indices, sizes)  # (..., I, P)
    flat = be.xp.reshape(x, (*last.shape[:-1], 1))
    out = be.xp.sum(be.xp.where(last, flat, be.xp.zeros_like(flat)), axis=-2, dtype=x.dtype)
    return be.xp.reshape(out, (*last.shape[:-2], *sizes))


@op
def max_unpool_backward(
    dout: Array, x: Array, indices: Array, kernel_size: Any, *, stride: Any = None, padding: Any = 0,
    output_size: Any = None,
) -> Array:  # fmt: skip
    """Return `dx = dout[indices]`, and 0 for what another overwrote."""
    be, sizes = backend.of(x), _unpooled_sizes(x, kernel_size, stride, padding, output_size)
    flat = be.xp.reshape(dout, (*dout.shape[: x.ndim - len(sizes)], 1, math.prod(sizes)))
    return be.xp.reshape(be.xp.sum(be.xp.where(_last(be, indices, sizes), flat, 0.0), axis=-1), x.shape)


def _tap_axis(windows: Sequence[Window]) -> int:
    """Return where the taps are in columns (..., T, *O)."""
    return -len(windows) - 1


def _real(be: Backend, windows: Sequence[Window]) -> Array:
    """Return which taps read an element, not padding: (T, *O)."""
    return im2col(be, pad(be, be.full(tuple(w.size for w in windows), 1, be.xp.bool), windows), windows)


def _first(be: Backend, wins: Array, windows: Sequence[Window]) -> Array:
    """Return the first True of each window alone: (..., T, *O)."""
    axis, taps = _tap_axis(windows), be.arange(0, math.prod(w.kernel for w in windows))
    first = be.xp.argmax(be.xp.astype(wins, be.xp.int64), axis=axis, keepdims=True)
    return be.xp.reshape(taps, (-1, *(1 for _ in windows))) == first


def _divisor(be: Backend, x: Array, windows: Sequence[Window], with_padding: bool, given: int | None) -> Array | float:
    """Return how many elements of each window count: those of x, or those of x and of its explicit padding."""
    if given is not None:
        return float(given)
    counted = [w._replace(size=w.low + w.size + w.high, low=0) if with_padding else w for w in windows]
    return be.xp.astype(be.xp.sum(be.xp.astype(_real(be, counted), be.xp.int64), axis=_tap_axis(windows)), x.dtype)


def _adaptive_sizes(x: Array, output_size: Any) -> tuple[int, ...]:
    rank = len(output_size) if isinstance(output_size, tuple | list) else x.ndim - 2
    given = each(output_size, rank)
    return tuple(int(n) if o is None else o for o, n in zip(given, x.shape[x.ndim - rank :], strict=True))


def _shares(be: Backend, x: Array, size: int, out: int) -> Array:
    """Return how much each element counts in each mean: (O, L)."""
    i, j = be.arange(0, out)[:, None], be.arange(0, size)[None, :]
    start, stop = i * size // out, -(-(i + 1) * size // out)
    return be.xp.astype((start <= j) & (j < stop), x.dtype) / be.xp.astype(stop - start, x.dtype)


def _adaptive_windows(x: Array, sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    for o in itertools.product(*map(range, sizes)):
        spatial = zip(o, sizes, x.shape[x.ndim - len(sizes) :], strict=True)
        yield o, tuple(slice(i * n // out, -(-(i + 1) * n // out)) for i, out, n in spatial)


def _flat_index(be: Backend, x: Array, region: Sequence[slice]) -> Array:
    """Return the flat index within the plane of every element of a region."""
    sizes = x.shape[x.ndim - len(region) :]
    along_each = (be.arange(r.start, r.stop) for r in region)
    return functools.reduce(lambda flat, axis: flat[..., None] * axis[0] + axis[1], zip(sizes, along_each, strict=True),
                            be.full((), 0, be.xp.int64))  # fmt: skip


def _unpooled_sizes(x: Array, kernel_size: Any, stride: Any, padding: Any, output_size: Any) -> tuple[int, ...]:
    rank = len(kernel_size) if isinstance(kernel_size, tuple | list) else x.ndim - 2
    if output_size is not None:
        return each(output_size, rank)
    kernel = each(kernel_size, rank)
    strides, sizes = each(kernel if stride is None else stride, rank), x.shape[x.ndim - rank :]
    if padding in ("same", "same_lower"):
        return tuple(n * s for n, s in zip(sizes, strides, strict=True))
    pads = [(0, 0) if p == "valid" else each(p, 2) for p in each(padding, rank)]
    return tuple((n - 1) * s + k - sum(p) for n, s, k, p in zip(sizes, strides, kernel, pads, strict=True))


def _last(be: Backend, indices: Array, sizes: Sequence[int]) -> Array:
    """Return which element is the last to go to each place: (..., *S) -> bool (..., I, P)."""
    lead, count = indices.shape[: indices.ndim - len(sizes)], math.prod(indices.shape[indices.ndim - len(sizes) :])
    goes = be.xp.reshape(indices, (*lead, count, 1)) == be.arange(0, math.prod(sizes))
    order = be.arange(0, count)[:, None]
    return goes & (order == be.xp.max(be.xp.where(goes, order, -1), axis=-2, keepdims=True))
