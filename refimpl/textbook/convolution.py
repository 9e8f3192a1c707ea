"""Convolution and transposed convolution: im2col, one product, and its two transposes.

N batch; G groups; I, J channels of one group that go in, and come out; T taps of the kernel; P positions.
"""

import math
from typing import Any

from .. import backend
from .._grads import ConvGrads
from ..backend import Array, Backend
from .windows import Window, along, col2im, each, im2col, op, pad, source, unpad, windows_of


@op
def conv(
    x: Array, weight: Array, bias: Array | None = None, *,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, padding_mode: str = "zeros",
) -> Array:  # fmt: skip
    """Return `weight @ im2col(x) + bias`."""
    be = backend.of(x)
    xb = x if x.ndim == weight.ndim else x[None, ...]
    windows = windows_of(xb.shape[2:], weight.shape[2:], stride, padding, dilation)
    padded, windows = _padded(be, xb, windows, padding_mode)
    columns = _grouped(be, im2col(be, padded, windows), groups, len(windows))  # (N, G, I*T, P)
    out = _by_group(be, weight, groups) @ columns  # (G, J, I*T) @ (N, G, I*T, P)
    out = be.xp.reshape(out, (xb.shape[0], weight.shape[0], *(w.out for w in windows)))
    if bias is not None:
        out = out + be.xp.reshape(bias, (-1, *(1 for _ in windows)))
    return out if x.ndim == weight.ndim else out[0, ...]


@op
def conv_backward(
    dout: Array, x: Array, weight: Array, bias: Array | None = None, *,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, padding_mode: str = "zeros",
) -> ConvGrads:  # fmt: skip
    """Return `dx = col2im(weight^T @ dout)`, `dweight = dout @ im2col(x)^T`, and dout summed for the bias."""
    be = backend.of(x)
    xb, dout = (a if a.ndim == weight.ndim else a[None, ...] for a in (x, dout))
    unfilled = windows_of(xb.shape[2:], weight.shape[2:], stride, padding, dilation)
    padded, windows = _padded(be, xb, unfilled, padding_mode)
    columns = im2col(be, padded, windows)  # (N, G*I, T, *O)
    douts = _grouped(be, dout, groups, len(windows))  # (N, G, J, P)
    dcolumns = be.xp.matrix_transpose(_by_group(be, weight, groups)) @ douts  # (N, G, I*T, P)
    dpadded = col2im(be, be.xp.reshape(dcolumns, columns.shape), windows)
    dx = _unpadded(be, dpadded, unfilled, windows, padding_mode)
    dweight = be.xp.sum(
        douts @ be.xp.matrix_transpose(_grouped(be, columns, groups, len(windows))), axis=0
    )  # (G, J, I*T)
    dbias = None if bias is None else be.xp.sum(dout, axis=(0, *range(2, dout.ndim)))
    return ConvGrads(be.xp.reshape(dx, x.shape), be.xp.reshape(dweight, weight.shape), dbias)


@op
def conv_transpose(
    x: Array, weight: Array, bias: Array | None = None, *,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, output_size: Any = None, dilation: Any = 1,
    groups: int = 1,
) -> Array:  # fmt: skip
    """Return `col2im(weight^T @ x) + bias`: the dx of the convolution that has this weight, with x for its dout."""
    be = backend.of(x)
    xb = x if x.ndim == weight.ndim else x[None, ...]
    windows = _transposed_windows(xb, weight, stride, padding, output_padding, output_size, dilation)
    columns = be.xp.matrix_transpose(_by_group(be, weight, groups)) @ _grouped(
        be, xb, groups, len(windows)
    )  # (N, G, I*T, P)
    channels, taps = groups * weight.shape[1], columns.shape[2] // weight.shape[1]
    columns = be.xp.reshape(columns, (xb.shape[0], channels, taps, *xb.shape[2:]))
    out = unpad(be, col2im(be, columns, windows), windows)
    if bias is not None:
        out = out + be.xp.reshape(bias, (-1, *(1 for _ in windows)))
    return out if x.ndim == weight.ndim else out[0, ...]


@op
def conv_transpose_backward(
    dout: Array, x: Array, weight: Array, bias: Array | None = None, *,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, output_size: Any = None, dilation: Any = 1,
    groups: int = 1,
) -> ConvGrads:  # fmt: skip
    """Return `dx = weight @ im2col(dout)`, `dweight = x @ im2col(dout)^T`, and dout summed for the bias."""
    be = backend.of(x)
    xb, dout = (a if a.ndim == weight.ndim else a[None, ...] for a in (x, dout))
    windows = _transposed_windows(xb, weight, stride, padding, output_padding, output_size, dilation)
    columns = _grouped(be, im2col(be, pad(be, dout, windows), windows), groups, len(windows))  # (N, G, I*T, P)
    dx = _by_group(be, weight, groups) @ columns  # (N, G, J, P)
    dweight = be.xp.sum(_grouped(be, xb, groups, len(windows)) @ be.xp.matrix_transpose(columns), axis=0)  # (G, J, I*T)
    dbias = None if bias is None else be.xp.sum(dout, axis=(0, *range(2, dout.ndim)))
    return ConvGrads(be.xp.reshape(dx, x.shape), be.xp.reshape(dweight, weight.shape), dbias)


def _by_group(be: Backend, weight: Array, groups: int) -> Array:
    """Return the weight as matrices: (G*J, I, *K) -> (G, J, I*T)."""
    return be.xp.reshape(weight, (groups, weight.shape[0] // groups, math.prod(weight.shape[1:])))


def _grouped(be: Backend, array: Array, groups: int, rank: int) -> Array:
    """Return columns or positions by group: (N, G*I, T, *O) -> (N, G, I*T, P), (N, G*J, *O) -> (N, G, J, P)."""
    rows, positions = math.prod(array.shape[1:-rank]) // groups, math.prod(array.shape[-rank:])
    return be.xp.reshape(array, (array.shape[0], groups, rows, positions))


def _padded(be: Backend, x: Array, windows: list[Window], mode: str) -> tuple[Array, list[Window]]:
    """Return x with its padding, and the windows over both: zeros, or copies of elements of x."""
    if mode == "zeros":
        return pad(be, x, windows), windows
    for axis, window in enumerate(windows, start=2):
        x = be.xp.take(x, source(be, window, mode), axis=axis)
    filled = [w._replace(size=w.low + w.size + w.high, low=0, high=0) for w in windows]
    return pad(be, x, filled), filled


def _unpadded(be: Backend, dpadded: Array, windows: list[Window], filled: list[Window], mode: str) -> Array:
    """Return the gradient of x from that of `_padded(x)`: copies add theirs to the element that they show."""
    dx = unpad(be, dpadded, filled)
    if mode != "zeros":
        for axis, window in enumerate(windows, start=2):
            shows = source(be, window, mode)[None, :] == be.arange(0, window.size)[:, None]  # (S, low + S + high)
            dx = along(be, dx, shows, axis)
    return dx


def _transposed_windows(
    x: Array, weight: Array, stride: Any, padding: Any, output_padding: Any, output_size: Any, dilation: Any
) -> list[Window]:
    """Return the windows of the convolution that puts out as many places as x has: `size` is that of the output."""
    rank, found = weight.ndim - 2, []
    options = (each(value, rank) for value in (stride, padding, output_padding, output_size, dilation))
    for out, k, s, pads, extra, size, d in zip(x.shape[2:], weight.shape[2:], *options, strict=True):
        whole = (out - 1) * s + d * (k - 1) + 1
        if pads in ("same", "same_lower"):
            total = max(0, whole - out * s)
            low, high = (total - total // 2, total // 2) if pads == "same_lower" else (total // 2, total - total // 2)
            result = out * s
        else:
            low, high = (0, 0) if pads == "valid" else each(pads, 2)
            result = whole - low - high + extra if size is None else size
        found.append(Window(result, k, s, d, low, high, out))
    return found
