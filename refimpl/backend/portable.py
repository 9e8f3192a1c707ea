"""The portable definition of every primitive that ops use, in the words of the array API standard."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np

from . import tiling
from .threads import one_blas_thread
from .values import Array, Tile, mapped

T = TypeVar("T")


class Backend:
    """Arrays of one library on one device: how to make them, and the primitives that ops are made of.

    This class needs nothing but the array API standard, so it serves any array that offers `__array_namespace__`. A
    library that strays from the standard, or has a faster way, gets a subclass, each of whose methods computes what the
    method of this class says. See `register`.

    Parameters
    ----------
    like
        An array beside which new arrays are made: of its library, on its device.
    """

    name = "array API"
    """What messages and `available` call the backend."""
    threads = False
    """Whether tiles run on several threads at once."""
    tile_bytes = 4 << 20
    """The working set of a tile unless `limits` says otherwise: what a core's cache holds."""
    has_strides = False
    """Whether `unfolded` can make overlapping views."""
    reads_free = False
    """Whether a number of an array can be read without waiting for a device."""

    def __init__(self, like: Array) -> None:
        self.xp: ModuleType = like.__array_namespace__()
        self.device: Any = like.device
        self._beside: dict[str, Any] = {"device": self.device}  # what a creation function of the standard is given

    @classmethod
    def owns(cls, array: Any) -> bool:
        """Return whether an object is an array of this backend. It must not import the library."""
        # A subclass of ndarray inherits the method, and with it the claim to mean what NumPy's functions mean: a masked
        # array or a matrix does not. One that brings a namespace of its own is taken at its word.
        method = getattr(type(array), "__array_namespace__", None)
        return not (method is None or isinstance(array, np.generic) or method is np.ndarray.__array_namespace__)

    @classmethod
    def available(cls) -> bool:
        """Return whether arrays of this backend can be made here. It may import the library."""
        return False

    def refuse(self, array: Array) -> str | None:
        """Return which rule an array of this backend breaks that ops cannot compute with, None if it is fine."""
        if hasattr(type(array), "at"):  # as JAX's arrays have, in place of assignments
            rule = f"be writeable in place; got an array of {self.xp.__name__}"
            return f"{rule}, which numpy.from_dlpack (bfloat16: numpy.asarray) views"
        return None

    def goes_with(self, other: "Backend") -> bool:
        """Return whether arrays of both are of the same library."""
        return self.xp is other.xp

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which all is computed: no floating-point warning leaves it."""
        return np.errstate(all="ignore")

    # New arrays

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Array:
        """Return a new array of the value."""
        if value == 0:  # memory that is zero already: pages that are never written never count
            return self.xp.zeros(shape, dtype=dtype, **self._beside)
        return self.xp.full(shape, value, dtype=dtype, **self._beside)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array that holds anything, for tiles that write all of it: no pass over memory to fill it."""
        return self.xp.empty(shape, dtype=dtype, **self._beside)

    def arange(self, start: int, stop: int) -> Array:
        """Return the integers from `start` up to `stop`, int64."""
        return self.xp.arange(start, stop, dtype=self.xp.int64, **self._beside)

    def copy(self, array: Array) -> Array:
        """Return a copy."""
        return self.xp.asarray(array, copy=True)

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Array:
        """Return a copy of a NumPy array."""
        return self.xp.asarray(np.array(array), **self._beside)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy of the array in NumPy. Waits for the device."""
        if np.lib.NumpyVersion(np.__version__) < "2.1.0":  # knows no device=
            return np.array(np.from_dlpack(array))
        return np.array(np.from_dlpack(array, device="cpu"))

    def synchronize(self) -> None:
        """Wait until the device has done all the work given to it."""

    # Dtypes

    def dtype_name(self, array: Array) -> str:
        """Return the name of a dtype as NumPy and ml_dtypes have it, such as "float32"."""
        return str(array.dtype).rpartition(".")[2]

    def itemsize(self, array: Array) -> int:
        """Return the bytes of one element."""
        info = self.xp.finfo if self.xp.isdtype(array.dtype, "real floating") else self.xp.iinfo
        return int(info(array.dtype).bits) // 8

    def float_range(self, array: Array) -> tuple[float, float]:
        """Return the smallest normal and the largest number of the dtype of a floating array that is no half type.

        A Python float beyond them becomes 0 or inf where it meets the array.
        """
        info = self.xp.finfo(array.dtype)
        return float(info.smallest_normal), float(info.max)

    def is_half(self, array: Array) -> bool:
        """Return whether the array is float16 or bfloat16 (which has no name in the standard)."""
        return self.dtype_name(array) in ("float16", "bfloat16")

    def is_floating(self, array: Array) -> bool:
        """Return whether the array is of a dtype that ops compute with or round to."""
        return array.dtype in (self.xp.float32, self.xp.float64) or self.is_half(array)

    def is_integer(self, array: Array) -> bool:
        """Return whether the array is of an integer dtype."""
        try:
            return bool(self.xp.isdtype(array.dtype, ("signed integer", "unsigned integer")))
        except TypeError:  # a dtype that is not the namespace's own, as bfloat16
            return False

    def widened(self, *trees: Any) -> tuple[Any, ...]:
        """Return arrays (mappings of them, None) with those of a half type as float32, in which an op computes."""

        def widen(array: Array) -> Array:
            return self.xp.astype(array, self.xp.float32) if self.is_half(array) else array

        return tuple(mapped(widen, tree) for tree in trees)

    def rounded(self, tree: T, like: Array) -> T:
        """Return results of `widened` arguments in the dtype of `like`: the one rounding of a half type."""
        if not self.is_half(like):
            return tree
        return cast(T, mapped(lambda array: self.xp.astype(array, like.dtype), tree))

    # Numbers that are read, and waited for

    def bounds(self, array: Array) -> tuple[int, int]:
        """Return the smallest and the largest value of an integer array that is not empty. Waits for the device."""
        return int(self.xp.min(array)), int(self.xp.max(array))

    def largest(self, array: Array) -> float:
        """Return the largest element of an array that is not empty, NaN if there is one. Waits for the device."""
        return float(self.xp.max(array))

    def all_finite(self, array: Array) -> bool:
        """Return whether the array holds neither NaN nor inf. Waits for the device.

        NaN and inf survive every sum. A sum that overflows is taken for an inf: callers lose time, not accuracy.
        """
        return math.isfinite(float(self.xp.sum(array)))

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of squares, NaN or inf if an element is or if it overflows. Waits for the device."""
        return float(self.xp.sum(array * array))

    # Element by element

    def select(self, condition: Array, array: Array) -> Array:
        """Return the floating array where the condition holds, and 0 elsewhere."""
        return self.xp.where(condition, array, 0.0)

    def exp(self, array: Array) -> Array:
        """Return the exponential, which may take the place of its argument."""
        return self.xp.exp(array)

    # Sums and products

    def matmul(self, a: Array, b: Array) -> Array:
        """Return `a @ b`."""
        return a @ b

    def matmul_in_parts(self, a: Array, b: Array) -> Array:
        """Return `a @ b`, in parts of the rows of `a` where that is faster."""
        return a @ b

    def row_sums(self, a: Array, b: Array | None = None) -> Array:
        """Return the sums over the last dimension of `a`, or of `a * b`, which keeps size 1."""
        return self.xp.sum(a if b is None else a * b, axis=-1, keepdims=True)

    def row_largest(self, array: Array) -> Array:
        """Return the largest of the last dimension, which keeps size 1; NaN if there is one."""
        return self.xp.max(array, axis=-1, keepdims=True)

    def sums(self, array: Array, axis: int | tuple[int, ...], keepdims: bool) -> Array:
        """Return the sums along dimensions."""
        return self.xp.sum(array, axis=axis, keepdims=keepdims)

    def weighted_runs(
        self, rows: Array, weights: Array, steps: Sequence[int], length: int, real: Array | None = None
    ) -> Array:
        """Return the sum of runs of the last dimension of `rows`, one for each weight, each times that weight.

        Parameters
        ----------
        rows : (..., C, R)
        weights : (C, *K)
        steps
            From the run of one weight to that of the next, along each dimension of the kernel, in elements.
        length
            Of a run.
        real : bool, of the shape of rows, optional
            Which elements count, whatever they are multiplied by.

        Returns
        -------
        (..., C, length)
            A sum of nothing but zeros is +0.
        """
        total = self.full((*rows.shape[:-1], length), 0, rows.dtype)
        for k, run in runs(weights.shape[1:], steps, length):
            product = rows[..., run] * weights[(slice(None), *k, None)]
            total += product if real is None else self.select(real[..., run], product)
        return total

    def run_products(self, rows: Array, factor: Array, kernel: Sequence[int], steps: Sequence[int]) -> Array:
        """Return the product of `factor` with each run of `weighted_runs`: (..., R), (..., L) -> (..., *K)."""
        length = factor.shape[-1]
        products = [factor[..., None, :] @ rows[..., run, None] for _, run in runs(kernel, steps, length)]
        return self.xp.reshape(self.xp.concat(products, axis=-1), (*factor.shape[:-1], *kernel))  # of (..., 1, 1)

    def add_at(self, target: Array, places: Array, values: Array, spatial: int) -> bool:
        """Add each value at its place, a flat index into the last `spatial` dimensions of `target`, if that is fast.

        Return whether it was done. The sums must be the same each time, so no backend may add in any order.
        """
        del target, places, values, spatial
        return False

    # How arrays lie in memory

    def unfolded(self, array: Array, axes: Sequence[tuple[int, int, int]]) -> Array:
        """Return a view along other axes, each `(axis of array, size, step)`; where axes share one, elements reappear.

        Without a check that they stay within the array. Not to be written to. Only where `has_strides`.
        """
        raise NotImplementedError

    def contiguous(self, array: Array) -> Array:
        """Return the array in row-major order, as a copy if it lies in another, where a backend knows of such order."""
        return array

    def in_rows(self, array: Array) -> Array:
        """Return matrices as the library multiplies them fastest, and always in the same way: as a copy if need be."""
        return array

    # Tiles

    def tile_room(self) -> int:
        """Return how many bytes the working set of a tile may have."""
        return tiling.limit_of_tile_bytes() or self.tile_bytes

    def tiles(self, shape: tuple[int, ...], item_bytes: int, least: int = tiling.LEAST_TILE) -> Iterator[Tile]:
        """Cut an index space into tiles, so that the items of one need about `tile_room` bytes.

        Fewer if there are few items, so that there are tiles for many threads, but not below `least`. See `tiling.cut`.
        """
        needed = math.prod(shape) * item_bytes
        return tiling.cut(shape, item_bytes, min(self.tile_room(), max(least, needed // tiling.LEAST_TILES)))

    def run(
        self,
        work: Callable[..., Any],
        tiles: Iterable[Tile],
        collect: Callable[[Tile, Any], None] | None = None,
        result_bytes: int = 0,
    ) -> None:
        """Call `work(*tile)` for every tile.

        Where `threads`, several at a time, so `work` may write only what belongs to its tile alone. What several tiles
        add to is returned instead, and handed to `collect(tile, result)` in the order of the tiles: no sum depends on
        timing, or on how many threads there are. Results, of `result_bytes` if they are larger than a tile, wait for
        their turn in a bounded amount of memory.
        """
        with one_blas_thread():  # for the same bits, and because BLAS's threads and ours would wait for each other
            tiling.run(work, tiles, collect, result_bytes or self.tile_room(), threads=self.threads)


def runs(kernel: Sequence[int], steps: Sequence[int], length: int) -> Iterator[tuple[tuple[int, ...], slice]]:
    """Yield each place in the kernel, and the run that begins as many steps further on."""
    for k in itertools.product(*map(range, kernel)):
        first = sum(i * step for i, step in zip(k, steps, strict=True))
        yield k, slice(first, first + length)
