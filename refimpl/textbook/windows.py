"""Windows over padded arrays: sizes, padding and its adjoint, im2col and its adjoint col2im.

N batch; C channels; `*S` the spatial sizes; `*K` the kernel; `*O` how many windows there are along each dimension.
Along one dimension, window o at tap k reads element `o * stride + k * dilation - low`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from .. import backend
from ..backend import Array, Backend, mapped

F = TypeVar("F", bound=Callable[..., Any])


def op(function: F) -> F:
    """Compute in the arrays' own precision, half types in float32, and round a half type's results once.

    What comes second in a plain tuple keeps its dtype: an index, or a logsumexp, which is float32 beside half types.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        be = next(be for be in map(backend.find, args) if be is not None)
        like = next(array for array in args if backend.is_array(array))

        def widen(value: Any) -> Any:
            return be.widened(value)[0] if backend.is_array(value) else value

        with be.context():
            result = function(*mapped(widen, args), **mapped(widen, options))
        if type(result) is tuple and not options.get("need_weights"):
            return be.rounded(result[0], like), result[1]
        if hasattr(result, "dlogsumexps"):
            return result._replace(douts=be.rounded(result.douts, like))
        return be.rounded(result, like)

    return call  # type: ignore[return-value]  # of the same signature


class Window(NamedTuple):
    """How windows slide along one dimension: padding, and how many there are."""

    size: int
    kernel: int
    stride: int
    dilation: int
    low: int
    high: int
    out: int

    @property
    def span(self) -> int:
        """Elements from the first tap of the first window to the last tap of the last."""
        return (self.out - 1) * self.stride + self.dilation * (self.kernel - 1) + 1


def each(value: Any, count: int) -> tuple[Any, ...]:
    """Return an option as one value for each dimension."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * count


def windows_of(
    sizes: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> list[Window]:
    """Return the windows along each dimension: `out = floor((size + low + high - extent) / stride) + 1`."""
    rank, found = len(sizes), []
    for size, k, s, d, pads in zip(sizes, kernel, *(each(v, rank) for v in (stride, dilation, padding)), strict=True):
        extent = d * (k - 1) + 1
        if pads in ("same", "same_lower"):
            out = -(-size // s)
            total = max(0, (out - 1) * s + extent - size)
            low, high = (total - total // 2, total // 2) if pads == "same_lower" else (total // 2, total - total // 2)
        else:
            low, high = (0, 0) if pads == "valid" else each(pads, 2)
            out = (size + low + high - extent) // s + 1
            if ceil_mode:  # a last window may hang over the end, but not begin beyond it
                out = -(-(size + low + high - extent) // s) + 1
                out -= (out - 1) * s >= size + low
        found.append(Window(size, k, s, d, low, high, out))
    return found


def pad(be: Backend, x: Array, windows: Sequence[Window], value: float = 0) -> Array:
    """Return what the windows slide over: x, with a value around it, or without what no window reaches."""
    first = x.ndim - len(windows)
    padded = be.full((*x.shape[:first], *(w.span for w in windows)), value, x.dtype)
    ends = [min(w.size, w.span - w.low) for w in windows]
    inside = tuple(slice(w.low, w.low + end) for w, end in zip(windows, ends, strict=True))
    padded[(..., *inside)] = x[(..., *(slice(0, end) for end in ends))]
    return padded


def unpad(be: Backend, dpadded: Array, windows: Sequence[Window]) -> Array:
    """Return the gradient of x from that of `pad(x)`."""
    first = dpadded.ndim - len(windows)
    dx = be.full((*dpadded.shape[:first], *(w.size for w in windows)), 0, dpadded.dtype)
    ends = [min(w.size, w.span - w.low) for w in windows]
    inside = tuple(slice(w.low, w.low + end) for w, end in zip(windows, ends, strict=True))
    dx[(..., *(slice(0, end) for end in ends))] = dpadded[(..., *inside)]
    return dx


def source(be: Backend, window: Window, mode: str) -> Array:
    """Return which element each place of a dimension shows, padding included: int64 (low + size + high,)."""
    i, last = be.arange(-window.low, window.size + window.high), window.size - 1
    if mode == "reflect":
        return last - abs(last - abs(i))
    return be.xp.clip(i, 0, last) if mode == "replicate" else i % window.size


def taps(windows: Sequence[Window]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield each place in the kernel, and which elements of the padded array it reads, one for each window."""
    for k in itertools.product(*(range(w.kernel) for w in windows)):
        starts = [i * w.dilation for i, w in zip(k, windows, strict=True)]
        ends = [start + (w.out - 1) * w.stride + 1 for start, w in zip(starts, windows, strict=True)]
        yield k, tuple(slice(a, b, w.stride) for a, b, w in zip(starts, ends, windows, strict=True))


def im2col(be: Backend, padded: Array, windows: Sequence[Window]) -> Array:
    """Return what every tap of every window reads: (..., *padded) -> (..., T, *O) with T = prod(K)."""
    lead = padded.shape[: padded.ndim - len(windows)]
    outs = tuple(w.out for w in windows)
    columns = be.empty((*lead, *(w.kernel for w in windows), *outs), padded.dtype)
    for k, reads in taps(windows):
        columns[(..., *k, *(slice(None) for _ in outs))] = padded[(..., *reads)]
    return be.xp.reshape(columns, (*lead, math.prod(w.kernel for w in windows), *outs))


def col2im(be: Backend, columns: Array, windows: Sequence[Window]) -> Array:
    """Add every tap to the element that it was read from, the adjoint of `im2col`: (..., T, *O) -> (..., *padded)."""
    lead = columns.shape[: columns.ndim - len(windows) - 1]
    kernel, outs = (w.kernel for w in windows), tuple(w.out for w in windows)
    columns = be.xp.reshape(columns, (*lead, *kernel, *outs))
    padded = be.full((*lead, *(w.span for w in windows)), 0, columns.dtype)
    for k, reads in taps(windows):
        padded[(..., *reads)] += columns[(..., *k, *(slice(None) for _ in outs))]
    return padded


def along(be: Backend, x: Array, matrix: Array, axis: int) -> Array:
    """Return `matrix @ x` along one dimension of x: (O, S), (..., S, ...) -> (..., O, ...)."""
    moved = be.xp.moveaxis(x, axis, -1)
    return be.xp.moveaxis(moved @ be.xp.matrix_transpose(be.xp.astype(matrix, x.dtype)), -1, axis)
