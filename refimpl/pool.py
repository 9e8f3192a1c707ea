"""Max and average pooling, over any number of trailing dimensions.

`...` any leading dimensions; `*S` the spatial sizes; `*O` how many windows there are along each.
"""

from collections.abc import Sequence

from . import _checks, backend
from ._engine import pooling
from .backend import Array

__all__ = ["avg_pool", "avg_pool_backward", "max_pool", "max_pool_backward"]

Ints = int | Sequence[int]
Pads = int | str | Sequence[int | Sequence[int]]


@backend.op
def max_pool(
    x: Array,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Array | tuple[Array, Array]:
    """Take the maximum over each window.

    Parameters
    ----------
    x : (..., *S)
        float64, float32, float16, bfloat16, or any integer dtype.
    kernel_size : int or tuple of ints, at least 1
        Elements of a window along each dimension. A tuple says how many of the last dimensions are spatial; an int
        means all but the first two.
    stride : int or one per spatial dimension, at least 1
        From one window to the next, in elements; `None` is `kernel_size`.
    padding
        As for `conv`; every window must still hold an element of `x`. Padding never wins, not even over -inf.
    dilation : int or one per spatial dimension, at least 1
        From one element of a window to the next.
    ceil_mode : bool
        Let the last window hang over the end, but not begin beyond `size + low` (in padded elements).
    return_indices : bool
        Return the places of the maxima, too.

    Returns
    -------
    out : (..., *O)
        A new array of the dtype, backend and device of `x`.
    indices : (..., *O), int64
        With `return_indices`: where each maximum lies, as a flat index into the spatial plane of `x`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit, and if a window would hold no element.

    Notes
    -----
    In one dimension, `out[..., o] = max over k of x[..., o * stride + k * dilation - low]`. Of equal maxima the
    first in row-major order wins; the first NaN wins over everything. Zeros of both signs are equal: which sign comes
    out is open.

    How it is computed: `refimpl.textbook.max_pool`.

    References
    ----------
    `torch.nn.functional.max_pool2d` (PyTorch 2) agrees wherever it accepts the options, indices included, but for
    windows with several NaN, where it returns the last.

    Examples
    --------
    >>> import numpy as np
    >>> max_pool(np.array([[[1.0, 3.0, 2.0, 5.0]]]), 2, return_indices=True)
    (array([[[3., 5.]]]), array([[[1, 3]]]))
    """
    windows = _checks.pool("max_pool", {"x": x}, kernel_size, stride, padding, dilation, ceil_mode, integers=True)
    _checks.flag("max_pool", "return_indices", return_indices)
    be = backend.of(x)
    (wide,) = be.widened(x)
    out, indices = pooling.largest(be, wide, windows, return_indices)
    out = be.rounded(out, like=x)
    return (out, indices) if return_indices else out


@backend.op
def max_pool_backward(
    dout: Array,
    x: Array,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    indices: Array | None = None,
) -> Array:
    """Return the gradient of `sum(dout * max_pool(x, ...))`.

    Parameters
    ----------
    dout : (..., *O)
        Of the shape, dtype and backend of what `max_pool` returns.
    x, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        As for `max_pool`, but floating; `return_indices` changes nothing.
    indices : (..., *O), int64, optional
        Those that `max_pool` returned, which saves finding them again. They are not verified, as that would wait for
        the device: one that names no element of its window drops or misplaces the gradient of that window.

    Returns
    -------
    dx : (..., *S)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `max_pool`, and if `dout` or `indices` does not have the shape or dtype of the result.

    Notes
    -----
    The maximum is one element of the window, so the whole gradient of a window goes to that element:
    `dx[..., i] = sum of dout[..., o] over the windows o whose first maximum lies at i`.

    How it is computed: `refimpl.textbook.max_pool_backward`.

    References
    ----------
    Autograd of `torch.nn.functional.max_pool2d` (PyTorch 2) agrees wherever the forwards do, ties included.

    Examples
    --------
    >>> import numpy as np
    >>> max_pool_backward(np.array([[[10.0, 20.0]]]), np.array([[[1.0, 3.0, 2.0, 5.0]]]), 2)
    array([[[ 0., 10.,  0., 20.]]])
    """
    name = "max_pool_backward"
    windows = _checks.pool(name, {"x": x, "dout": dout}, kernel_size, stride, padding, dilation, ceil_mode)
    _checks.flag(name, "return_indices", return_indices)
    _checks.pool_indices(name, indices, dout)
    be = backend.of(x)
    dout, wide = be.widened(dout, x)
    return be.rounded(pooling.largest_backward(be, dout, wide, windows, indices), like=x)


@backend.op
def avg_pool(
    x: Array,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Take the mean over each window.

    Parameters
    ----------
    x : (..., *S)
        float64, float32, float16 or bfloat16; the last two are summed in float32 and rounded once.
    kernel_size, stride, padding, dilation, ceil_mode
        As for `max_pool`.
    count_include_pad : bool
        Whether the divisor counts the padding in the window, `"same"` included. What hangs over the end with
        `ceil_mode` is never counted.
    divisor_override : int other than 0, optional
        Divide by this instead.

    Returns
    -------
    (..., *O)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit, and if a window would hold no element.

    Notes
    -----
    In one dimension, `out[..., o] = (sum over k of x[..., o * stride + k * dilation - low]) / divisor[o]`, where `x`
    is 0 outside its range. The divisor is the number of k whose element lies in `x`, or in its padding if that counts.

    How it is computed: `refimpl.textbook.avg_pool`.

    References
    ----------
    `torch.nn.functional.avg_pool2d` (PyTorch 2) agrees wherever it accepts the options; dilation is that of ONNX's
    `AveragePool`.

    Examples
    --------
    >>> import numpy as np
    >>> avg_pool(np.array([[[1.0, 3.0, 2.0, 5.0]]]), 3, stride=2, padding=1, count_include_pad=False)
    array([[[2.        , 3.33333333]]])
    """
    name = "avg_pool"
    windows = _checks.pool(name, {"x": x}, kernel_size, stride, padding, dilation, ceil_mode)
    _checks.flag(name, "count_include_pad", count_include_pad)
    _checks.divisor(name, divisor_override)
    be = backend.of(x)
    (wide,) = be.widened(x)
    divide = pooling.divider(be, wide, windows, count_include_pad, divisor_override)
    return be.rounded(pooling.mean(be, wide, windows, divide), like=x)


@backend.op
def avg_pool_backward(
    dout: Array,
    x: Array,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Return the gradient of `sum(dout * avg_pool(x, ...))`.

    Parameters
    ----------
    dout : (..., *O)
        Of the shape, dtype and backend of what `avg_pool` returns.
    x, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override
        As for `avg_pool`.

    Returns
    -------
    dx : (..., *S)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `avg_pool`, and if `dout` does not have the shape or dtype of the result.

    Notes
    -----
    Every element of a window has the weight `1 / divisor` in it, so it takes that share of the window's gradient:
    `dx[..., o * stride + k * dilation - low] += dout[..., o] / divisor[o]` for every o and k.

    How it is computed: `refimpl.textbook.avg_pool_backward`.

    References
    ----------
    Autograd of `torch.nn.functional.avg_pool2d` (PyTorch 2) agrees wherever the forwards do.

    Examples
    --------
    >>> import numpy as np
    >>> avg_pool_backward(np.array([[[2.0, 6.0]]]), np.array([[[1.0, 3.0, 2.0, 5.0]]]), 2)
    array([[[1., 1., 3., 3.]]])
    """
    name = "avg_pool_backward"
    windows = _checks.pool(name, {"x": x, "dout": dout}, kernel_size, stride, padding, dilation, ceil_mode)
    _checks.flag(name, "count_include_pad", count_include_pad)
    _checks.divisor(name, divisor_override)
    be = backend.of(x)
    dout, wide = be.widened(dout, x)
    divide = pooling.divider(be, wide, windows, count_include_pad, divisor_override)
    return be.rounded(pooling.mean_backward(be, dout, wide, windows, divide), like=x)
