"""Convolution and transposed convolution, of any number of spatial dimensions.

What they compute is in `_correlate`: three moves, of which each op takes one, and its gradient the two others.

N batch; C channels; `*K` the kernel; `*S` the sizes that windows slide over; `*O` how many there are along each.
"""

import math
from collections.abc import Sequence

from . import _checks, backend
from ._engine.correlate import correlate, correlate_dweight, correlate_dx
from ._engine.im2col import fill_padding, fold_padding
from ._grads import ConvGrads
from .backend import Array, Backend, Tile

__all__ = ["ConvGrads", "conv", "conv_backward", "conv_transpose", "conv_transpose_backward"]

Ints = int | Sequence[int]
Pads = int | str | Sequence[int | Sequence[int]]


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

    How it is computed: `refimpl.textbook.conv`.

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
    be = backend.of(x)
    wide, weight, bias = be.widened(_batched(x, weight), weight, bias)
    wide, windows = fill_padding(be, wide, windows, padding_mode)
    out = correlate(be, wide, weight, windows, groups, bias)
    return be.rounded(_unbatched(be, out, like=x), like=x)


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
    `columns = im2col(x)` of shape (I*T, P) and `out = weight @ columns + bias`:

        dcolumns = weight^T @ dout,   dx = col2im(dcolumns)
        dweight  = dout @ columns^T   (summed over the batch)
        dbias    = dout summed over everything but the channel

    Where padding holds copies, they add their gradients to the elements that they are copies of. As for `conv`, numbers
    may be read to see whether all is finite, here without padding, too.

    How it is computed: `refimpl.textbook.conv_backward`.

    References
    ----------
    Dumoulin and Visin, arXiv:1603.07285, section 4: the gradient of `x` is a transposed convolution. Autograd of
    PyTorch 2 agrees wherever the forwards do.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[[1.0, 2.0, 3.0, 4.0]]]), np.array([[[1.0, -1.0]]])
    >>> conv_backward(np.array([[[1.0, 0.0, 2.0]]]), x, weight)
    ConvGrads(dx=array([[[ 1., -1.,  2., -2.]]]), dweight=array([[[ 7., 10.]]]), dbias=None)
    """
    arrays = {"x": x, "weight": weight, "dout": dout}
    windows, groups = _checks.conv("conv_backward", arrays, bias, stride, padding, dilation, groups, padding_mode)
    be = backend.of(x)
    dout, wide, weight = be.widened(_batched(dout, weight), _batched(x, weight), weight)
    wide, over = fill_padding(be, wide, windows, padding_mode)
    dx = fold_padding(be, correlate_dx(be, dout, weight, over, groups), windows, padding_mode)
    grads = ConvGrads(
        dx=_unbatched(be, dx, like=x),
        dweight=correlate_dweight(be, dout, wide, weight, over, groups),
        dbias=None if bias is None else _sum_of_channels(be, dout),
    )
    return be.rounded(grads, like=x)


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
        Extends the output at the end: with values that `padding` would have cropped, then with the bias alone. With
        `"same"`, the size stays `size * stride`, and what is extended is part of what is cropped, as ONNX counts it:
        `(S - 1) * stride + output_padding + dilation * (K - 1) + 1 - S * stride`.
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

    As for `conv`, a number may be read to see whether a NaN or inf of `weight` meets the 0 beyond the border of `x`.

    How it is computed: `refimpl.textbook.conv_transpose`.

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
    be = backend.of(x)
    wide, weight, bias = be.widened(_batched(x, weight), weight, bias)
    out = correlate_dx(be, wide, weight, windows, groups, bias)
    return be.rounded(_unbatched(be, out, like=x), like=x)


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

        dx = weight @ im2col(dout),   dweight = x @ im2col(dout)^T,   dbias = dout summed

    How it is computed: `refimpl.textbook.conv_transpose_backward`.

    References
    ----------
    Dumoulin and Visin, arXiv:1603.07285, section 4. Autograd of PyTorch 2 agrees wherever the forwards do.

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
    be = backend.of(x)
    dout, wide, weight = be.widened(_batched(dout, weight), _batched(x, weight), weight)
    grads = ConvGrads(
        dx=_unbatched(be, correlate(be, dout, weight, windows, groups), like=x),
        dweight=correlate_dweight(be, wide, dout, weight, windows, groups),
        dbias=None if bias is None else _sum_of_channels(be, dout),
    )
    return be.rounded(grads, like=x)


def _sum_of_channels(be: Backend, dout: Array) -> Array:
    """Return the sum over everything but the channel: (N, C, *O) -> (C,)."""
    dbias = be.full((dout.shape[1],), 0, dout.dtype)

    def work(n: slice) -> Array:
        return be.sums(dout[n, ...], (0, *range(2, dout.ndim)), False)

    def collect(_: Tile, part: Array) -> None:
        dbias[...] += part

    tiles = be.tiles(dout.shape[:1], math.prod(dout.shape[1:]) * be.itemsize(dout))
    be.run(work, tiles, collect)
    return dbias


def _batched(array: Array, weight: Array) -> Array:
    """Give an array that came without a batch dimension one of size 1."""
    return array if array.ndim == weight.ndim else array[None, ...]


def _unbatched(be: Backend, array: Array, like: Array) -> Array:
    """Take away the batch dimension again if `like` has none."""
    return array if array.ndim == like.ndim else be.xp.reshape(array, array.shape[1:])
