"""Max and average pooling, over any number of trailing dimensions.

Every pooling is a running reduction over the taps of the window: for each tap one strided slice of `x`, combined with
what the other taps left. Taps in padding have no slice, so padding never takes part.

`...` any leading dimensions; `*S` the spatial sizes; `*O` how many windows there are along each.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from . import _checks, _windows, backend
from ._geometry import Windows, taps
from .backend import Array, Tile

__all__ = ["avg_pool", "avg_pool_backward", "max_pool", "max_pool_backward"]

Ints = int | Sequence[int]
Pads = int | str | Sequence[int | Sequence[int]]


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
        float32, float64, or any integer dtype.
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
    windows = _checks.pool(
        "max_pool", {"x": x}, kernel_size, stride, padding, dilation, ceil_mode, integers=True
    )  # fmt: skip
    _checks.flag("max_pool", "return_indices", return_indices)
    xp = backend.namespace(x)
    shape = _pooled_shape(x, windows)
    out = backend.full(shape, 0, x)
    indices = backend.full(shape if return_indices else (0,), 0, x, xp.int64)

    def work(*tile: slice) -> None:
        out[tile] = best = _maximum(x, windows, tile)
        if return_indices:
            indices[tile] = _first(x, best, windows, tile)

    backend.run(work, _tiles(x, windows), x)
    return (out, indices) if return_indices else out


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
        the device: one that names no element of its window drops the gradient of that window.

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
    xp = backend.namespace(x)
    dx = backend.full(tuple(x.shape), 0, x)

    def work(*tile: slice) -> Array:
        return indices[tile] if indices is not None else _first(x, _maximum(x, windows, tile), windows, tile)

    def collect(tile: Tile, found: Array) -> None:
        lead, outputs = _split(tile, windows)
        for element, reads, writes in _elements(x, windows, outputs):
            place = (..., *writes)
            dx[(*lead, *reads)] += xp.where(found[place] == element, dout[tile][place], 0.0)

    backend.run(work, _tiles(x, windows), x, collect)
    return dx


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
        float32 or float64.
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
    out = backend.full(_pooled_shape(x, windows), 0, x)
    divide = _divider(x, windows, count_include_pad, divisor_override)

    def work(*tile: slice) -> None:
        lead, outputs = _split(tile, windows)
        total = backend.full(_sizes(tile), 0, x)
        for _, reads, writes in taps(windows, outputs):
            total[(..., *writes)] += x[(*lead, *reads)]
        out[tile] = divide(total, outputs)

    backend.run(work, _tiles(x, windows), x)
    return out


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
    dx = backend.full(tuple(x.shape), 0, x)
    divide = _divider(x, windows, count_include_pad, divisor_override)

    def work(*tile: slice) -> Array:
        return divide(dout[tile], _split(tile, windows)[1])

    def collect(tile: Tile, share: Array) -> None:
        lead, outputs = _split(tile, windows)
        for _, reads, writes in taps(windows, outputs):
            dx[(*lead, *reads)] += share[(..., *writes)]

    backend.run(work, _tiles(x, windows), x, collect)
    return dx


def _maximum(x: Array, windows: Windows, tile: Tile) -> Array:
    """Return the maximum of each window of the tile, NaN if there is one in it."""
    xp = backend.namespace(x)
    lead, outputs = _split(tile, windows)
    floating = xp.isdtype(x.dtype, "real floating")
    # A value that every element is at least as large as; every window holds an element, so it never shows.
    best = backend.full(_sizes(tile), -math.inf if floating else xp.iinfo(x.dtype).min, x)
    for _, reads, writes in taps(windows, outputs):
        place = (..., *writes)
        best[place] = xp.maximum(best[place], x[(*lead, *reads)])
    return best


def _first(x: Array, best: Array, windows: Windows, tile: Tile) -> Array:
    """Return where the first element of each window lies that is its maximum, or NaN."""
    xp = backend.namespace(x)
    lead, outputs = _split(tile, windows)
    indices = backend.full(_sizes(tile), 0, x, xp.int64)
    for element, reads, writes in reversed(list(_elements(x, windows, outputs))):  # the first tap has the last word
        place = (..., *writes)
        value = x[(*lead, *reads)]
        wins = (value == best[place]) | (value != value)
        indices[place] = xp.where(wins, element, indices[place])
    return indices


def _elements(x: Array, windows: Windows, outputs: Tile) -> Iterator[tuple[Array, Tile, Tile]]:
    """Yield `(element, reads, writes)` for each tap: `element` holds the flat index of what it reads in the plane."""
    for _, reads, writes in taps(windows, outputs):
        element = backend.full((), 0, x, backend.namespace(x).int64)
        for window, read in zip(windows, reads, strict=True):
            along = backend.arange(0, len(range(read.start, read.stop, read.step)), x) * read.step + read.start
            element = element[..., None] * window.size + along
        yield element, reads, writes


def _divider(
    x: Array, windows: Windows, count_include_pad: bool, divisor_override: int | None
) -> Callable[[Array, Tile], Array]:
    """Return the function that divides sums over the windows of a tile by their divisors."""
    if divisor_override is not None:
        return lambda total, _: total / float(divisor_override)
    counted = tuple(window.padded for window in windows) if count_include_pad else windows
    counts = _windows.counts(counted, x)

    def divide(total: Array, outputs: Tile) -> Array:
        for d, (count, o) in enumerate(zip(counts, outputs, strict=True)):
            total = total / backend.namespace(x).reshape(count[o], (-1, *(1 for _ in windows[d + 1 :])))
        return total

    return divide


def _split(tile: Tile, windows: Windows) -> tuple[Tile, Tile]:
    """Split a tile into the slices of the leading dimensions, and those of the windows."""
    return tile[: len(tile) - len(windows)], tile[len(tile) - len(windows) :]


def _sizes(tile: Tile) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in tile)


def _pooled_shape(x: Array, windows: Windows) -> tuple[int, ...]:
    return (*x.shape[: x.ndim - len(windows)], *(window.out for window in windows))


def _tiles(x: Array, windows: Windows) -> Iterator[Tile]:
    """Cut the result into tiles; an element of it costs itself, what it is compared with, and an index."""
    return backend.tiles(_pooled_shape(x, windows), 3 * backend.itemsize(x) + 16)
