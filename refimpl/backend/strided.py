"""What NumPy and CuPy share beyond the array API standard: strides, memory order, and results in given memory."""

from collections.abc import Sequence

from .portable import Backend
from .values import Array


class StridedBackend(Backend):
    """Arrays that say how they lie in memory."""

    has_strides = True

    def itemsize(self, array: Array) -> int:
        """Return the bytes of one element (Without looking up what the dtype is: 2.3 us -> 0.1 us)."""
        return int(array.dtype.itemsize)

    def exp(self, array: Array) -> Array:
        """Return the exponential in the place of its argument: memory that is in the cache."""
        return self.xp.exp(array, out=array)

    def unfolded(self, array: Array, axes: Sequence[tuple[int, int, int]]) -> Array:
        """Return a view by strides."""
        shape = [size for _, size, _ in axes]
        strides = [array.strides[axis] * step if size > 1 else 0 for axis, size, step in axes]
        return self.xp.lib.stride_tricks.as_strided(array, shape, strides)

    def contiguous(self, array: Array) -> Array:
        """Return the array in row-major order."""
        return self.xp.ascontiguousarray(array)

    def in_rows(self, array: Array) -> Array:
        """Return matrices as they are if BLAS takes them so, with rows that lie end to end and in order; else a copy.

        NumPy multiplies any others without BLAS, slowly and with other rounding; so it does with rows of one element
        that lie apart. CuPy copies them for each product.
        """
        *others, step = array.strides
        apart = all(s >= array.shape[-1] * step for n, s in zip(array.shape, others, strict=False) if n > 1)
        if array.shape[-1] > 1 and step == array.itemsize and apart:
            return array
        return self.contiguous(array)
