"""Adaptive pooling: the output size sets the windows.

`...` any leading dimensions; `*S` the spatial sizes; `*O` the output sizes.
"""

from collections.abc import Sequence

from . import _checks, backend
from ._engine import pooling
from .backend import Array

__all__ = ["adaptive_avg_pool", "adaptive_avg_pool_backward", "adaptive_max_pool", "adaptive_max_pool_backward"]

Outputs = int | Sequence[int | None]


@backend.op
def adaptive_avg_pool(x: Array, output_size: Outputs) -> Array:
    """Average over `output_size` windows of nearly equal size, which cover the input (adaptive average pooling).

    Parameters
    ----------
    x : (..., *S)
        float64, float32, float16 or bfloat16; the last two are summed in float32 and rounded once.
    output_size : int, or tuple of ints or None, at least 1
        Windows along each dimension; None keeps the size. A tuple says how many of the last dimensions are spatial; an
        int means all but the first two. It may exceed the size.

    Returns
    -------
    (..., *O)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit.

    Notes
    -----
    Along each dimension, window i holds the elements from `floor(i * S / O)` up to but not including
    `ceil((i + 1) * S / O)`; neighbours overlap where O does not divide S. `output_size=1` is global pooling.

    How it is computed: `refimpl.textbook.adaptive_avg_pool`.

    References
    ----------
    `torch.nn.functional.adaptive_avg_pool2d` (PyTorch 2) agrees.

    Examples
    --------
    >>> import numpy as np
    >>> adaptive_avg_pool(np.array([[[1.0, 3.0, 2.0, 5.0, 9.0]]]), 2)
    array([[[2.        , 5.33333333]]])
    """
    windows = _checks.adaptive("adaptive_avg_pool", {"x": x}, output_size)
    be = backend.of(x)
    (wide,) = be.widened(x)
    return be.rounded(pooling.mean(be, wide, windows, pooling.divider(be, wide, windows)), like=x)


@backend.op
def adaptive_avg_pool_backward(dout: Array, x: Array, output_size: Outputs) -> Array:
    """Return the gradient of `sum(dout * adaptive_avg_pool(x, output_size))`.

    Parameters
    ----------
    dout : (..., *O)
        Of the shape, dtype and backend of what `adaptive_avg_pool` returns.
    x, output_size
        As for `adaptive_avg_pool`.

    Returns
    -------
    dx : (..., *S)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `adaptive_avg_pool`, and if `dout` does not have the shape or dtype of the result.

    Notes
    -----
    Every element takes its share of the gradient of each window that it lies in: `dout / elements of the window`.

    How it is computed: `refimpl.textbook.adaptive_avg_pool_backward`.

    References
    ----------
    Autograd of `torch.nn.functional.adaptive_avg_pool2d` (PyTorch 2) agrees.

    Examples
    --------
    >>> import numpy as np
    >>> adaptive_avg_pool_backward(np.array([[[4.0, 6.0]]]), np.zeros((1, 1, 3)), 2)
    array([[[2., 5., 3.]]])
    """
    windows = _checks.adaptive("adaptive_avg_pool_backward", {"x": x, "dout": dout}, output_size)
    be = backend.of(x)
    dout, wide = be.widened(dout, x)
    return be.rounded(pooling.mean_backward(be, dout, wide, windows, pooling.divider(be, wide, windows)), like=x)


@backend.op
def adaptive_max_pool(x: Array, output_size: Outputs, *, return_indices: bool = False) -> Array | tuple[Array, Array]:
    """Take the maximum over `output_size` windows of nearly equal size, which cover the input (adaptive max pooling).

    Parameters
    ----------
    x : (..., *S)
        float64, float32, float16, bfloat16, or any integer dtype.
    output_size
        As for `adaptive_avg_pool`.
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
        If a size or value does not fit.

    Notes
    -----
    The windows are those of `adaptive_avg_pool`; ties and NaN are decided as in `max_pool`: the first in row-major
    order wins, and the first NaN wins over everything.

    How it is computed: `refimpl.textbook.adaptive_max_pool`.

    References
    ----------
    `torch.nn.functional.adaptive_max_pool2d` (PyTorch 2) agrees, but for windows with several NaN, where it returns the
    last.

    Examples
    --------
    >>> import numpy as np
    >>> adaptive_max_pool(np.array([[[1.0, 3.0, 2.0, 5.0, 9.0]]]), 2, return_indices=True)
    (array([[[3., 9.]]]), array([[[1, 4]]]))
    """
    windows = _checks.adaptive("adaptive_max_pool", {"x": x}, output_size, integers=True)
    _checks.flag("adaptive_max_pool", "return_indices", return_indices)
    be = backend.of(x)
    (wide,) = be.widened(x)
    out, indices = pooling.largest(be, wide, windows, return_indices)
    out = be.rounded(out, like=x)
    return (out, indices) if return_indices else out


@backend.op
def adaptive_max_pool_backward(
    dout: Array, x: Array, output_size: Outputs, *, return_indices: bool = False, indices: Array | None = None
) -> Array:
    """Return the gradient of `sum(dout * adaptive_max_pool(x, output_size))`.

    Parameters
    ----------
    dout : (..., *O)
        Of the shape, dtype and backend of what `adaptive_max_pool` returns.
    x, output_size, return_indices
        As for `adaptive_max_pool`, but floating; `return_indices` changes nothing.
    indices : (..., *O), int64, optional
        Those that `adaptive_max_pool` returned, as for `max_pool_backward`.

    Returns
    -------
    dx : (..., *S)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `adaptive_max_pool`, and if `dout` or `indices` does not have the shape or dtype of the result.

    Notes
    -----
    The whole gradient of a window goes to its first maximum.

    How it is computed: `refimpl.textbook.adaptive_max_pool_backward`.

    References
    ----------
    Autograd of `torch.nn.functional.adaptive_max_pool2d` (PyTorch 2) agrees wherever the forwards do, ties included.

    Examples
    --------
    >>> import numpy as np
    >>> adaptive_max_pool_backward(np.array([[[10.0, 20.0]]]), np.array([[[1.0, 3.0, 2.0]]]), 2)
    array([[[ 0., 30.,  0.]]])
    """
    name = "adaptive_max_pool_backward"
    windows = _checks.adaptive(name, {"x": x, "dout": dout}, output_size)
    _checks.flag(name, "return_indices", return_indices)
    _checks.pool_indices(name, indices, dout)
    be = backend.of(x)
    dout, wide = be.widened(dout, x)
    return be.rounded(pooling.largest_backward(be, dout, wide, windows, indices), like=x)
