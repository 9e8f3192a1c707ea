"""Convolution and transposed convolution, of any number of spatial dimensions.

Both ops and both of their gradients are three moves on windows, each one a loop over tiles:

    correlate           out = weight @ gather(x)              conv, and the dx of conv_transpose
    correlate_dx        dx  = add_back(weight^T @ dout)       the dx of conv, and conv_transpose: a correlation, too
    correlate_dweight   dweight = dout @ gather(x)^T          the dweight of both

N batch; C channels; G groups; I, J channels of one group that go in, and come out; T taps of the kernel; P positions
that a tile puts out; `*S` the spatial sizes that windows slide over; `*O` how many windows there are along each.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import _checks, _masked, _windows, backend
from ._geometry import Window, Windows
from .backend import Array, Tile

__all__ = ["ConvGrads", "conv", "conv_backward", "conv_transpose", "conv_transpose_backward"]

_MANY = 1024  # windows, from which on it pays to multiply each line of taps by itself
_FEW = 4  # times fewer channels that come out of a gradient than go in make it pay to multiply before adding back
_NEAR = 32  # elements, within which the taps of windows lie that share what a tile reads
_ROWS = 32  # of a matrix, from which on a product is as fast as any

Ints = int | Sequence[int]
Pads = int | str | Sequence[int | Sequence[int]]


class ConvGrads(NamedTuple):
    """The gradients of a convolution: each has the shape of its argument; `dbias` is None if `bias` was."""

    dx: Array
    dweight: Array
    dbias: Array | None


@backend.op
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Pads = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Convolve, as neural networks use the word: cross-correlate `x` with `weight`, and add `bias`.

    Parameters
    ----------
    x : (N, C_in, *S) or (C_in, *S)
        float64, float32, float16 or bfloat16, with at least one spatial dimension.
    weight : (C_out, C_in / groups, *K)
        Its dtype and backend, like those of every array of the call, are those of `x`.
    bias : (C_out,), optional
    stride, dilation : int or one per spatial dimension, at least 1
        From one window to the next, and from one tap of the kernel to the next, in elements of `x`.
    padding : int, or an int or a (low, high) pair per spatial dimension, or a string
        Zeros around `x`, in elements. `"valid"` is none; `"same"` pads to an output of `ceil(size / stride)`, an odd
        one more after than before, `"same_lower"` one more before.
    groups : int
        Channels are cut into as many groups; those that come out see only those of their group.
    padding_mode : str
        What padding holds. `"zeros"`; `"reflect"`: the elements mirrored at the border one, so at most `size - 1` of
        them; `"replicate"`: the border element; `"circular"`: what lies at the other end, at most `size` elements.

    Returns
    -------
    (N, C_out, *O) or (C_out, *O)
        A new array of the dtype, backend and device of `x`, with
        `O = floor((S + low + high - dilation * (K - 1) - 1) / stride) + 1`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit, and if the output would be empty.

    Notes
    -----
    In one dimension and without groups, for every n, output channel j and window o,

        out[n, j, o] = bias[j] + sum over i, k of weight[j, i, k] * x[n, i, o * stride + k * dilation - low]

    where `x` is 0 outside its range. A NaN or inf in `weight` does not meet that 0: padding contributes nothing. In the
    other padding modes what lies outside is a copy of an element, as real as the element.

    To see whether there is one, a number is read where windows reach into padding, which on a GPU waits for the device.

    float16 and bfloat16 are computed in float32, from a copy, and rounded once.

    References
    ----------
    Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv:1603.07285, section 2 and 5.1.
    `torch.nn.functional.conv2d` and the padding modes of `torch.nn.Conv2d` (PyTorch 2) agree wherever they accept the
    options; `"same"` with a stride is that of ONNX's `SAME_UPPER` and of TensorFlow.

    Examples
    --------
    >>> import numpy as np
    >>> conv(np.array([[[1.0, 2.0, 3.0, 4.0]]]), np.array([[[1.0, -1.0]]]))
    array([[[-1., -1., -1.]]])
    """
    arrays = {"x": x, "weight": weight}
    windows, groups = _checks.conv("conv", arrays, bias, stride, padding, dilation, groups, padding_mode)
    wide, weight, bias = backend.widened(_batched(x, weight), weight, bias)
    wide, windows = _windows.fill_padding(wide, windows, padding_mode)
    out = _correlate(wide, weight, windows, groups, bias)
    return backend.rounded(_unbatched(out, like=x), like=x)


@backend.op
def conv_backward(
    dout: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Pads = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> ConvGrads:
    """Return the gradients of `sum(dout * conv(x, weight, bias, ...))`.

    Parameters
    ----------
    dout
        Of the shape, dtype and backend of what `conv` returns.
    x, weight, bias, stride, padding, dilation, groups, padding_mode
        As for `conv`.

    Returns
    -------
    ConvGrads
        `dx`, `dweight` and `dbias`, new arrays of the shapes and the dtype of `x`, `weight` and `bias`.

    Raises
    ------
    TypeError, ValueError
        As `conv`, and if `dout` does not have the shape or dtype of the result.

    Notes
    -----
    `out` is linear in each argument, so each gradient is the adjoint of that linear map. Per group, with
    `columns = gather(x)` of shape (I*T, P) and `out = weight @ columns + bias`:

        dcolumns = weight^T @ dout,   dx = add_back(dcolumns)
        dweight  = dout @ columns^T   (summed over the batch)
        dbias    = dout summed over everything but the channel

    Where padding holds copies, they add their gradients to the elements that they are copies of. As for `conv`, numbers
    are read where windows reach beyond what they slide over, which for `dx` are the windows of the adjoint.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[[1.0, 2.0, 3.0, 4.0]]]), np.array([[[1.0, -1.0]]])
    >>> conv_backward(np.array([[[1.0, 0.0, 2.0]]]), x, weight)
    ConvGrads(dx=array([[[ 1., -1.,  2., -2.]]]), dweight=array([[[ 7., 10.]]]), dbias=None)
    """
    arrays = {"x": x, "weight": weight, "dout": dout}
    windows, groups = _checks.conv("conv_backward", arrays, bias, stride, padding, dilation, groups, padding_mode)
    dout, wide, weight = backend.widened(_batched(dout, weight), _batched(x, weight), weight)
    wide, over = _windows.fill_padding(wide, windows, padding_mode)
    dx = _windows.fold_padding(_correlate_dx(dout, weight, over, groups), windows, padding_mode)
    grads = ConvGrads(
        dx=_unbatched(dx, like=x),
        dweight=_correlate_dweight(dout, wide, weight, over, groups),
        dbias=None if bias is None else _sum_of_channels(dout),
    )
    return backend.rounded(grads, like=x)


@backend.op
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Pads = 0,
    output_padding: Ints = 0,
    output_size: Ints | None = None,
    dilation: Ints = 1,
    groups: int = 1,
) -> Array:
    """Apply the adjoint of `conv` in its `x` ("transposed convolution", "deconvolution"), and add `bias`.

    Parameters
    ----------
    x : (N, C_in, *S) or (C_in, *S)
        float64, float32, float16 or bfloat16, with at least one spatial dimension.
    weight : (C_in, C_out / groups, *K)
        The weight of the convolution whose adjoint this is.
    bias : (C_out,), optional
    stride, dilation, groups
        Those of the convolution.
    padding
        That of the convolution, in all its forms: here it crops the output. `"same"` crops it to `size * stride`, an
        odd one more from the end, `"same_lower"` one more from the beginning; where there is nothing to crop
        (a kernel shorter than the stride), the end is extended instead.
    output_padding : int or one per spatial dimension, at least 0 and below `max(stride, dilation)`
        Extends the output at the end: with values that `padding` would have cropped, then with the bias alone.
    output_size : int or one per spatial dimension, optional
        The spatial size of the output; sets `output_padding`, which must come out in `[0, stride)`.

    Returns
    -------
    (N, C_out, *L) or (C_out, *L)
        A new array of the dtype, backend and device of `x`, with
        `L = (S - 1) * stride - low - high + dilation * (K - 1) + 1 + output_padding`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit, and if the output would be empty.

    Notes
    -----
    In one dimension and without groups, every element of `x` stamps the kernel, scaled, onto the output:

        out[n, j, s * stride + k * dilation - low] += weight[i, j, k] * x[n, i, s]     for every n, i, j, s, k

    As for `conv`, a number is read to see whether a NaN or inf of `weight` might meet the 0 beyond the border of `x`.

    References
    ----------
    Dumoulin and Visin, arXiv:1603.07285, section 4. `torch.nn.functional.conv_transpose2d` (PyTorch 2) agrees wherever
    it accepts the options.

    Examples
    --------
    >>> import numpy as np
    >>> conv_transpose(np.array([[[1.0, 2.0]]]), np.array([[[1.0, 10.0, 100.0]]]), stride=2)
    array([[[  1.,  10., 102.,  20., 200.]]])
    """
    windows, groups = _checks.conv_transpose(
        "conv_transpose", {"x": x, "weight": weight}, bias,
        stride, padding, output_padding, output_size, dilation, groups,
    )  # fmt: skip
    wide, weight, bias = backend.widened(_batched(x, weight), weight, bias)
    out = _correlate_dx(wide, weight, windows, groups, bias)
    return backend.rounded(_unbatched(out, like=x), like=x)


@backend.op
def conv_transpose_backward(
    dout: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Pads = 0,
    output_padding: Ints = 0,
    output_size: Ints | None = None,
    dilation: Ints = 1,
    groups: int = 1,
) -> ConvGrads:
    """Return the gradients of `sum(dout * conv_transpose(x, weight, bias, ...))`.

    Parameters
    ----------
    dout
        Of the shape, dtype and backend of what `conv_transpose` returns.
    x, weight, bias, stride, padding, output_padding, output_size, dilation, groups
        As for `conv_transpose`.

    Returns
    -------
    ConvGrads
        `dx`, `dweight` and `dbias`, new arrays of the shapes and the dtype of `x`, `weight` and `bias`.

    Raises
    ------
    TypeError, ValueError
        As `conv_transpose`, and if `dout` does not have the shape or dtype of the result.

    Notes
    -----
    `<conv_transpose(x), dout> = <x, conv(dout)>` by definition, which is symmetric in what is given and what is sought:
    `dx` is `conv(dout)` with the same weight, and `dweight` is that of a convolution with the roles of its input and of
    its gradient exchanged:

        dx = weight @ gather(dout),   dweight = x @ gather(dout)^T,   dbias = dout summed

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[[1.0, 2.0]]]), np.array([[[1.0, 10.0, 100.0]]])
    >>> conv_transpose_backward(np.array([[[0.0, 1.0, 0.0, 0.0, 3.0]]]), x, weight, stride=2)
    ConvGrads(dx=array([[[ 10., 300.]]]), dweight=array([[[0., 1., 6.]]]), dbias=None)
    """
    windows, groups = _checks.conv_transpose(
        "conv_transpose_backward", {"x": x, "weight": weight, "dout": dout}, bias,
        stride, padding, output_padding, output_size, dilation, groups,
    )  # fmt: skip
    dout, wide, weight = backend.widened(_batched(dout, weight), _batched(x, weight), weight)
    grads = ConvGrads(
        dx=_unbatched(_correlate(dout, weight, windows, groups), like=x),
        dweight=_correlate_dweight(wide, dout, weight, windows, groups),
        dbias=None if bias is None else _sum_of_channels(dout),
    )
    return backend.rounded(grads, like=x)


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
    shared = shared and math.prod(w.out for w in windows) >= _MANY
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


def _correlate(x: Array, weight: Array, windows: Windows, groups: int, bias: Array | None = None) -> Array:
    """Return `weight @ gather(x) + bias`: `x` (N, G*I, *S), `weight` (G*J, I, *K), result (N, G*J, *O)."""
    out = backend.empty((x.shape[0], weight.shape[0], *(w.out for w in windows)), x)
    _correlate_into(out, x, weight, windows, groups, bias, _meets_padding(weight, windows))
    return out


def _correlate_into(
    out: Array, x: Array, weight: Array, windows: Windows, groups: int, bias: Array | None, meets_padding: bool
) -> None:
    """Write to `out` what `_correlate` returns."""
    xp = backend.namespace(x)
    if _by_planes(weight, windows, groups):
        _correlate_planes(out, x, weight, windows, bias, meets_padding)
        return
    gathered, steps = _steps(weight, windows, groups)
    shift = 0.0 if bias is None else xp.reshape(bias, (groups, -1, 1))  # sums of zeros come out as +0 either way

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
        product += shift
        at = (n, ..., *o)
        out[at] = xp.reshape(product, out[at].shape)

    backend.run(work, _tiles(x, weight, windows, gathered), x)


def _correlate_dx(dout: Array, weight: Array, windows: Windows, groups: int, bias: Array | None = None) -> Array:
    """Return `add_back(weight^T @ dout) + bias`: `dout` (N, G*J, *O), `weight` (G*J, I, *K), result (N, G*I, *S).

    Element `stride * m + phase` is reached by every `stride`-th tap at most, the later the earlier the window: each
    phase is a convolution of `dout` with its taps in reverse order. That gathers J channels for I that come out; where
    these are few, to multiply first and add back what comes out is less work.
    """
    xp = backend.namespace(dout)
    rows, planes = weight.shape[0] // groups, weight.shape[1]
    if planes * _FEW < rows:
        return _add_back_dx(dout, weight, windows, groups, bias)
    phases = [list(window.phases()) for window in windows]
    reached = all(len(along) == min(w.stride, w.size) for along, w in zip(phases, windows, strict=True))
    shape = (dout.shape[0], planes * groups, *(w.size for w in windows))
    dx = backend.empty(shape, dout) if reached else _biased(shape, bias, like=dout)
    weight_g = xp.reshape(weight, (groups, rows, planes, *weight.shape[2:]))
    weight_t = xp.reshape(xp.moveaxis(weight_g, 1, 2), (groups * planes, rows, *weight.shape[2:]))  # (G*I, J, *K)
    meets_padding = _meets_padding(weight, [over for along in phases for _, _, over in along])
    for phase in itertools.product(*phases):
        places, taps, over = zip(*phase, strict=True)
        _correlate_into(dx[(..., *places)], dout, weight_t[(..., *taps)], over, groups, bias, meets_padding)
    return dx


def _add_back_dx(dout: Array, weight: Array, windows: Windows, groups: int, bias: Array | None) -> Array:
    """Return what `_correlate_dx` does.

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
        return xp.reshape(product, (*product.shape[:2], *part.shape[2:], *(s.stop - s.start for s in o)))

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
    channels = backend.tile_bytes() // max(1, plane_bytes)
    if channels >= planes or channels * taps >= _ROWS:
        backend.run(of_channels, backend.tiles((batch, groups, planes), plane_bytes), dout)
    else:
        backend.run(of_windows, _tiles(dx, weight, windows, windows), dout, collect)
    return dx


def _correlate_dweight(dout: Array, x: Array, weight: Array, windows: Windows, groups: int) -> Array:
    """Return `dout @ gather(x)^T` summed over the batch: `dout` (N, G*J, *O), `x` (N, G*I, *S), result as `weight`."""
    xp = backend.namespace(x)
    if _by_planes(weight, windows, groups):
        return _correlate_dweight_planes(dout, x, weight, windows)
    dweight = backend.full(tuple(weight.shape), 0, x)
    meets_padding = _meets_padding(dout, windows)
    gathered, steps = _steps(weight, windows, groups)

    def work(n: slice, *o: slice) -> list[Array]:
        columns = _windows.gather(x, (n,), gathered, _reach(o, steps))
        if meets_padding:
            real = _windows.gather(_everywhere(x), (n,), gathered, _reach(o, steps))
        douts = _grouped(dout[(n, ..., *o)], groups, weight.shape[0] // groups)
        products = []
        for step in steps:  # (N, G, J, P) @ (N, G, P, I*T)
            columns_t = xp.matrix_transpose(_part(columns, step, o, groups))
            if meets_padding:
                real_t = xp.matrix_transpose(_part(real, step, o, groups))
                product = _masked.matmul(douts, columns_t, b_real=real_t)
            else:
                product = douts @ columns_t
            products.append(xp.sum(product, axis=0))
        return products

    def collect(_: Tile, products: list[Array]) -> None:
        for step, product in zip(steps, products, strict=True):
            at = (slice(None), slice(None), step.taps, ...)
            dweight[at] += xp.reshape(product, dweight[at].shape)

    backend.run(work, _tiles(x, weight, windows, gathered), x, collect)
    return dweight


def _by_planes(weight: Array, windows: Windows, groups: int) -> bool:
    """Return whether each channel is convolved by itself, with many windows that lie next to each other.

    Then there is nothing for a product of matrices to do, and less to gather: see `_windows.end_to_end`.
    """
    alone = weight.shape[0] == groups and weight.shape[1] == 1
    return alone and all(w.stride == 1 and w.extent <= min(w.out, _NEAR) for w in windows)


def _correlate_planes(
    out: Array, x: Array, weight: Array, windows: Windows, bias: Array | None, meets_padding: bool
) -> None:
    """Write to `out` what `_correlate` returns, for `_by_planes`: (N, C, *S), (C, 1, *K) -> (N, C, *O)."""
    xp = backend.namespace(x)
    scales = xp.reshape(weight, (weight.shape[0], -1, 1))  # (C, T, 1)
    shift = xp.reshape(_biased((out.shape[1],), bias, x), (-1, 1))

    def work(n: slice, c: slice, *o: slice) -> None:
        rows, offsets, shape = _windows.end_to_end(x, (n, c), windows, o)
        real = _windows.end_to_end(_everywhere(x), (n, c), windows, o)[0] if meets_padding else None

        def scaled(t: int) -> Array:
            run = (..., slice(offsets[t], offsets[t] + math.prod(shape)))
            return _masked.select(None if real is None else real[run], rows[run] * scales[c, t, :])

        total = scaled(0)
        for t in range(1, len(offsets)):
            total += scaled(t)
        total += shift[c, :]
        own = (slice(0, s.stop - s.start) for s in o)
        out[(n, c, *o)] = xp.reshape(total, (*total.shape[:2], *shape))[(..., *own)]

    backend.run(work, backend.tiles(tuple(out.shape), 3 * backend.itemsize(x), backend.LEAST_LIGHT), x)


def _correlate_dweight_planes(dout: Array, x: Array, weight: Array, windows: Windows) -> Array:
    """Return what `_correlate_dweight` does, for `_by_planes`."""
    xp = backend.namespace(x)
    dweight = backend.full((weight.shape[0], math.prod(weight.shape[2:])), 0, x)
    finite = backend.all_finite(x) and backend.all_finite(dout)  # what lies between the rows of a run meets a 0

    def work(n: slice, c: slice, *o: slice) -> Array:
        rows, offsets, shape = _windows.end_to_end(x, (n, c), windows, o)
        douts = _windows.in_runs(dout[(n, c, *o)], shape)[..., None, :]  # (N, C, 1, run)
        if not finite:
            real = _windows.end_to_end(_everywhere(x), (n, c), windows, o)[0]
            own = _windows.in_runs(_everywhere(dout)[(n, c, *o)], shape)[..., None, :]
        products = []  # (N, C, 1, 1)
        for offset in offsets:
            run = (..., slice(offset, offset + douts.shape[-1]), None)
            product = douts @ rows[run] if finite else _masked.matmul(douts, rows[run], own, real[run])
            products.append(product[..., 0])
        return xp.sum(xp.concat(products, axis=-1), axis=0)

    def collect(tile: Tile, part: Array) -> None:
        dweight[tile[1], :] += part

    backend.run(work, backend.tiles(tuple(dout.shape), 3 * backend.itemsize(x), backend.LEAST_LIGHT), x, collect)
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
    return backend.namespace(array).reshape(array, (array.shape[0], groups, rows, positions))


def _biased(shape: tuple[int, ...], bias: Array | None, like: Array) -> Array:
    """Return a new array that holds the bias of each channel, or 0."""
    out = backend.full(shape, 0, like)
    if bias is not None:
        out[...] = backend.namespace(bias).reshape(bias, (-1, *(1 for _ in shape[2:])))
    return out


def _sum_of_channels(dout: Array) -> Array:
    """Return the sum over everything but the channel: (N, C, *O) -> (C,)."""
    xp = backend.namespace(dout)
    dbias = backend.full((dout.shape[1],), 0, dout)

    def work(n: slice) -> Array:
        return xp.sum(dout[n, ...], axis=(0, *range(2, dout.ndim)))

    def collect(_: Tile, part: Array) -> None:
        dbias[...] += part

    backend.run(work, backend.tiles(dout.shape[:1], math.prod(dout.shape[1:]) * backend.itemsize(dout)), dout, collect)
    return dbias


def _tiles(x: Array, weight: Array, windows: Windows, gathered: Windows) -> Iterator[Tile]:
    """Cut batch and windows into tiles; a window costs its columns and what comes out of them."""
    per_window = x.shape[1] * math.prod(w.kernel for w in gathered) + weight.shape[0]
    return backend.tiles((x.shape[0], *(w.out for w in windows)), per_window * backend.itemsize(x))


def _batched(array: Array, weight: Array) -> Array:
    """Give an array that came without a batch dimension one of size 1."""
    return array if array.ndim == weight.ndim else array[None, ...]


def _unbatched(array: Array, like: Array) -> Array:
    """Take away the batch dimension again if `like` has none."""
    return array if array.ndim == like.ndim else backend.namespace(array).reshape(array, array.shape[1:])
