"""NumPy on a CPU: tiles on several threads, and faster ways for what the array API standard says plainly.

Every override says why it is faster and by how much. The times are of float32 on one thread of an AMD EPYC (Zen 4)
with OpenBLAS, unless they say otherwise.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from . import tiling
from .strided import StridedBackend
from .threads import one_blas_thread
from .values import Array, Tile

T = TypeVar("T")

SMALL_PRODUCT = 1_000_000  # multiplications, up to which OpenBLAS uses kernels that pack nothing
SHORT_VECTOR = 4096  # elements of a product of vectors, up to 10,000 of which OpenBLAS multiplies on one thread
BLOCK, SHORT_ROW = 128, 1024  # numbers that are added one after the other, and in pairs
LONG_RUN = 512  # elements of a run, from which on a batch entry is worth a call of its own


class NumpyBackend(StridedBackend):
    """NumPy arrays."""

    name = "numpy"
    threads = True
    reads_free = True

    def __init__(self, like: Array | None = None) -> None:
        del like  # there is one device
        self.xp, self.device, self._beside = np, "cpu", {}

    @classmethod
    def owns(cls, array: Any) -> bool:
        """Return whether an object is a NumPy array, and of no subclass that means something else."""
        return type(array) is np.ndarray

    @classmethod
    def available(cls) -> bool:
        """Return True: refimpl needs NumPy."""
        return True

    def refuse(self, array: Array) -> str | None:
        """Return that bytes must be in the machine's order if they are not."""
        return None if array.dtype.isnative else f"be in native byte order; got dtype {array.dtype.str}"

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy."""
        return np.array(array)

    def dtype_name(self, array: Array) -> str:
        """Return the name of the dtype."""
        return str(array.dtype.name)

    def is_half(self, array: Array) -> bool:
        """Return whether the array is float16 or bfloat16 (The name of a dtype takes 1 us to make)."""
        return array.dtype.itemsize == 2 and array.dtype.name in ("float16", "bfloat16")

    def all_finite(self, array: Array) -> bool:
        """Return whether the array holds neither NaN nor inf (A product of vectors takes a third of a sum's time)."""
        return (array.flags.c_contiguous and math.isfinite(self.sum_of_squares(array))) or super().all_finite(array)

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of squares, as products of vectors: they need no memory, and run at the speed of reading.

        Vectors are so short that OpenBLAS keeps to one thread: those that it starts for a longer one spin on for many
        milliseconds, and take the core from the tiles that follow. (Causal attention 8x12x128x64, float64, 2 threads:
        15.5 ms -> 9.8 ms.)
        """
        row = array.reshape(-1)
        whole = row.size - row.size % SHORT_VECTOR
        rows, rest = row[:whole].reshape(-1, SHORT_VECTOR), row[whole:]
        return float(np.vecdot(rows, rows).sum() + rest @ rest)

    def select(self, condition: Array, array: Array) -> Array:
        """Return the array where the condition holds, and 0 elsewhere, by masking bits.

        `where` branches, ten times slower where the condition has no pattern. (1,024 elements: 3.8 us -> 0.3 us.)
        """
        bits = np.dtype(f"i{array.dtype.itemsize}")
        return np.bitwise_and(array.view(bits), np.negative(condition.astype(bits))).view(array.dtype)

    def matmul(self, a: Array, b: Array) -> Array:
        """Return `a @ b`, whose rows do not begin a multiple of 4 KiB apart.

        Such rows all fall into the same few lines of the cache. (256x64 @ 64x4096, with 64 bytes between the rows:
        1.9 ms -> 1.5 ms.)
        """
        width = b.shape[-1]
        if a.shape[-2] == 1 or width * a.itemsize % 4096:
            return a @ b
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        rows = np.empty((*lead, a.shape[-2], width + 64 // a.itemsize), dtype=a.dtype)
        return np.matmul(a, b, out=rows[..., :width])

    def matmul_in_parts(self, a: Array, b: Array) -> Array:
        """Return `a @ b`, a few rows of `a` at a time where that keeps each product small.

        OpenBLAS has kernels for small ones, which pack nothing. (128x128 @ 128x64: 86 -> 109 GFLOP/s, in two parts.)
        """
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        parts = -(-rows * inner * columns // SMALL_PRODUCT)
        if not 1 < parts <= 4 or rows < 64:
            return a @ b
        out = np.empty((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), rows, columns), dtype=a.dtype)
        step = -(-rows // parts)
        for first in range(0, rows, step):
            at = (..., slice(first, first + step), slice(None))
            np.matmul(a[at], b, out=out[at])
        return out

    def row_sums(self, a: Array, b: Array | None = None) -> Array:
        """Return the sums over rows as products of vectors: no product is stored, half the time of a sum."""
        return np.vecdot(a, np.ones(a.shape[-1], dtype=a.dtype) if b is None else b)[..., None]

    def row_largest(self, array: Array) -> Array:
        """Return the largest of each row as the reduction of a segment (128 elements: 70 ns -> 40 ns a row)."""
        if not array.shape[-1]:
            return super().row_largest(array)
        return np.maximum.reduceat(array, [0], axis=-1)

    def sums(self, array: Array, axis: int | tuple[int, ...], keepdims: bool) -> Array:
        """Return the sums, as accurate in every layout as `sum` is along rows that lie end to end: in blocks.

        `sum` adds one after the other along all dimensions but the one that lies end to end. Few numbers are summed as
        `row_sums` does. (512 planes of 56x56: 0.25 ms -> 0.1 ms.)
        """
        given = (axis,) if isinstance(axis, int) else axis
        axes = sorted(d % array.ndim for d in given)
        count, contiguous = math.prod(array.shape[d] for d in axes), array.flags.c_contiguous
        apart = bool(axes) and axes[-1] != array.ndim - 1
        if count <= 1 or (count == array.size <= SHORT_ROW and contiguous) or (count <= BLOCK and apart):
            return array.sum(axis=tuple(axes), keepdims=keepdims)
        shape = tuple(1 if d in axes else n for d, n in enumerate(array.shape))
        if count <= 4096 and contiguous and axes == list(range(array.ndim - len(axes), array.ndim)):
            total = self.row_sums(array.reshape(*array.shape[: axes[0]], count))
        else:
            total = _sum_in_blocks(array, axes)
        kept = tuple(n for d, n in enumerate(array.shape) if d not in axes)
        return total.reshape(shape if keepdims else kept)

    def weighted_runs(
        self, rows: Array, weights: Array, steps: Sequence[int], length: int, real: Array | None = None
    ) -> Array:
        """Return the sum of weighted runs in one call, which stores no product and lets other threads run meanwhile.

        (768 planes of 56x56, 9 weights each: 7.9 ms -> 4.6 ms.) Long runs of a line of weights one batch entry after
        the other, as `einsum` copies to a buffer what it walks in more than three dimensions. (8x8x2000, 31 weights:
        1.2 ms -> 0.5 ms.)
        """
        kernel = weights.shape[1:]
        if real is not None:
            return super().weighted_runs(rows, weights, steps, length, real)
        if rows.ndim > 2 and len(kernel) == 1 and length >= LONG_RUN:
            return np.stack([self.weighted_runs(part, weights, steps, length) for part in rows])
        lead, taps, run = range(rows.ndim - 1), range(rows.ndim, rows.ndim + len(kernel)), rows.ndim - 1
        given = (weights, [lead[-1], *taps], self._runs(rows, kernel, steps, length), [*lead, *taps, run])
        return np.einsum(*given, [run, *reversed(lead)], order="F").T  # "F": walks along runs, then from plane to plane

    def run_products(self, rows: Array, factor: Array, kernel: Sequence[int], steps: Sequence[int]) -> Array:
        """Return the products with all runs in one call (96 planes of 56x56, 9 runs each: 0.29 ms -> 0.18 ms)."""
        runs = self._runs(rows, kernel, steps, factor.shape[-1])
        return np.vecdot(factor[(..., *(None for _ in kernel), slice(None))], runs)

    def _runs(self, rows: Array, kernel: Sequence[int], steps: Sequence[int], length: int) -> Array:
        """Return a view of all runs at once, which overlap: (..., *K, length)."""
        last = rows.ndim - 1
        taps = ((last, size, step) for size, step in zip(kernel, steps, strict=True))
        axes = [*((axis, size, 1) for axis, size in enumerate(rows.shape[:-1])), *taps, (last, length, 1)]
        return self.unfolded(rows, axes)

    def add_at(self, target: Array, places: Array, values: Array, spatial: int) -> bool:
        """Add in the order of the values, so that the sums are always the same (200,000 values: 0.4 ms)."""
        plane = math.prod(target.shape[-spatial:])
        if not places.size or places.view(np.uint64).max() >= plane:
            return False  # places outside of the plane are none at all
        rows, places, values = (a.reshape(-1, math.prod(a.shape[-spatial:])) for a in (target, places, values))
        first = np.arange(0, rows.size, plane)[:, None]
        np.add.at(rows.reshape(-1), (places + first).reshape(-1), values.reshape(-1))
        return True

    def run(
        self,
        work: Callable[..., Any],
        tiles: Iterable[Tile],
        collect: Callable[[Tile, Any], None] | None = None,
        result_bytes: int = 0,
    ) -> None:
        """Run tiles on several threads."""
        with one_blas_thread():
            room = result_bytes or self.tile_room()
            tiling.run(work, tiles, collect, room, threads=True, prepare=_unbuffered)


def _sum_in_blocks(array: Array, axes: Sequence[int]) -> Array:
    """Return the sums along dimensions, one dimension after the other, the closest in memory first, each in blocks."""
    closest = sorted(axes, key=lambda d: (abs(array.strides[d]), -d))
    kept = [d for d in range(array.ndim) if d not in axes]
    total = array.transpose(*reversed(closest), *kept)
    lead = len(closest)
    while lead > 1:  # dimensions that lie end to end are one
        outer, inner = lead - 2, lead - 1
        if total.strides[outer] == total.strides[inner] * total.shape[inner] or total.shape[outer] == 1:
            merged = (*total.shape[:outer], total.shape[outer] * total.shape[inner], *total.shape[lead:])
            strides = (*total.strides[:outer], *total.strides[inner:])
            total = np.lib.stride_tricks.as_strided(total, merged, strides, writeable=False)
        else:
            total = _sum_along(total, inner)
        lead -= 1
    return _sum_along(total, 0)


def _sum_along(array: Array, axis: int) -> Array:
    """Return the sum along one dimension: in blocks, whose sums are summed in the same way."""
    # `sum` adds up in pairs along a dimension that lies end to end, but NumPy 2.0 only as far as its buffer goes.
    size, block = array.shape[axis], SHORT_ROW if abs(array.strides[axis]) <= array.itemsize else BLOCK
    if size <= block:
        return array.sum(axis=axis)
    whole = size - size % block
    before = (slice(None),) * axis
    blocks = array[(*before, slice(whole))].reshape(
        *array.shape[:axis], whole // block, block, *array.shape[axis + 1 :]
    )
    total = _sum_along(blocks.sum(axis=axis + 1), axis)
    return total + array[(*before, slice(whole, None))].sum(axis=axis) if whole < size else total


def _unbuffered(work: Callable[..., T]) -> Callable[..., T]:
    """Let NumPy compute in place what lies in rows of 1,024 elements or more, and without floating-point warnings.

    NumPy copies arrays with gaps to a buffer first, some rows at a time, which takes longer than to multiply them. Both
    settings are context variables: a thread does not see the caller's. (Attention 2x8x1024x64: 35 ms -> 32 ms.)
    """

    def call(*tile: slice) -> T:
        with np.errstate(all="ignore"):  # which restores the size of the buffer, too
            np.setbufsize(1024)
            return work(*tile)

    return call


# Let the C library keep what tiles free for the tiles that follow, as it does once a large block was freed: glibc gives
# memory above a threshold back to the system at once, which takes a fault for each page when it is needed again, and
# raises the threshold to the largest block that it saw freed, of at most 32 MiB. This one is never touched. (Attention
# backward of 8x8x128x64: 4,400 faults and 25 ms a call without this line, none and 9 ms with it.)
np.empty(31 << 20, dtype=np.uint8)
