"""Whose arrays these are, allocation beside them, and in what pieces the work is done.

The only module that computes with NumPy by name, and the only one that knows that CuPy differs. Everything else takes
the namespace of its arrays and keeps to the array API standard.
"""

import contextlib
import functools
import itertools
import math
import numbers
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import numpy as np

from . import _threads

__all__ = ["available", "limits", "namespace", "synchronize", "to_numpy"]

Array: TypeAlias = Any
"""An array of any backend: `numpy.ndarray`, `cupy.ndarray`, or one that offers `__array_namespace__`."""

Tile: TypeAlias = tuple[slice, ...]

P = ParamSpec("P")
T = TypeVar("T")


class _Limits(NamedTuple):
    threads: int | None
    tile_bytes: int | None


_DEFAULTS = _Limits(threads=None, tile_bytes=None)
_CPU_TILE, _GPU_TILE = 4 << 20, 256 << 20  # bytes: what a core's cache holds; what is long beside the start of a kernel
LEAST_LIGHT = 4 << 20
"""The bytes of a tile that does little with each of them: a smaller one is done before another thread wakes up."""
_LEAST_TILE, _LEAST_TILES = 2 << 20, 8  # bytes below which, and number from which on, smaller tiles gain nothing
_SMALL_PRODUCT = 1_000_000  # multiplications, for which OpenBLAS has kernels that pack nothing
_LONG_RUN = 512  # elements
_PIECE = 1 << 24  # elements of a sum of squares on a GPU
_AHEAD_BYTES = 64 << 20  # of results that wait for their turn
_NOWHERE = contextlib.nullcontext()
_LIMITS = ContextVar("refimpl.limits", default=_DEFAULTS)


def namespace(*arrays: Array | None) -> ModuleType:
    """Return the module (`numpy`, `cupy`, ...) that the arrays belong to.

    Parameters
    ----------
    *arrays
        Arrays of one backend, on one device; `None` stands for an argument that was left out.

    Raises
    ------
    TypeError
        For arrays of two backends or devices, for anything that is no array (a list, a scalar, a subclass of
        `numpy.ndarray` such as a masked array), and if there is no array at all.

    Examples
    --------
    >>> import numpy
    >>> namespace(numpy.zeros(3), None) is numpy
    True
    """
    if len(arrays) == 1 and type(arrays[0]) is np.ndarray and arrays[0].dtype.isnative:  # a hundred times in a call
        return np
    return common_namespace("namespace", {f"arrays[{i}]": array for i, array in enumerate(arrays)})


def available() -> tuple[str, ...]:
    """Return the names of the backends that work here: `("numpy",)`, or `("numpy", "cupy")` where a GPU answers.

    Looks for CuPy by importing it; nothing else in refimpl does.
    """
    try:
        import cupy
    except ImportError:
        return ("numpy",)
    return ("numpy", "cupy") if cupy.is_available() else ("numpy",)


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """Return the array as a new NumPy array, copied from its device where it has one (which waits for the device)."""
    xp = common_namespace("to_numpy", {"array": array})
    if xp is np:
        return np.array(array)
    if _is_cupy(xp):
        return np.asarray(xp.asnumpy(array))
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":  # knows no device=
        return np.array(np.from_dlpack(array))
    return np.array(np.from_dlpack(array, device="cpu"))


def synchronize(*arrays: Array | None) -> None:
    """Wait until the device of the arrays has done all the work given to it; on a CPU there is nothing to wait for."""
    xp = common_namespace("synchronize", {f"arrays[{i}]": array for i, array in enumerate(arrays)})
    if _is_cupy(xp):
        with next(array for array in arrays if array is not None).device as device:
            device.synchronize()


@contextlib.contextmanager
def limits(*, threads: int | None = None, tile_bytes: int | None = None) -> Iterator[None]:
    """Bound what ops use inside a `with` block, in this thread or task: the limits are context variables.

    Parameters
    ----------
    threads
        How many CPU threads tiles run on, at least 1. Unless set, as many as the environment variable
        `REFIMPL_NUM_THREADS` says when it is first needed, or as the process may use cores. Results never depend on it.
    tile_bytes
        The working set of one tile in bytes, at least 1: what one thread allocates beyond the results. A tile holds at
        least one output position or query row, so a small value is met as nearly as that allows. May change rounding.
        Unless set, 4 MiB on a CPU and 256 MiB on a GPU, however much is free there: the same call gives the same bits.
    """
    for name, value in (("threads", threads), ("tile_bytes", tile_bytes)):
        if value is not None and not is_number(value):
            raise TypeError(f"limits: {name} must be an int; got {shown(value)}")
        if value is not None and not 1 <= int(value) <= 1 << 40:
            raise ValueError(f"limits: {name} must be from 1 to {1 << 40}; got {shown(value)}")
    now = _LIMITS.get()
    token = _LIMITS.set(_Limits(int(threads or 0) or now.threads, int(tile_bytes or 0) or now.tile_bytes))
    try:
        yield
    finally:
        _LIMITS.reset(token)


def shown(value: object) -> str:
    """Return a value as an error shows it: shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"{type(value).__name__} beyond printing"


def is_number(value: object, kind: type = numbers.Integral) -> bool:
    """Return whether the value is an int, or a number of a kind (`numbers.Real`), of Python or NumPy, and no bool."""
    if type(value) is int:
        return True
    # NumPy registers timedelta64 as an integer, which it is not without a unit of time.
    return isinstance(value, kind) and not isinstance(value, bool | np.timedelta64)


def op(function: Callable[P, T]) -> Callable[P, T]:
    """Make a public op of a function: it computes beside its first array, and no floating-point warning leaves it."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        cupy = sys.modules.get("cupy")
        given: tuple[Any, ...] = (*args, *options.values())
        on_device = [value.device for value in given if cupy is not None and type(value) is cupy.ndarray]
        with on_device[0] if on_device else _NOWHERE, np.errstate(all="ignore"):
            return function(*args, **options)

    return call


def is_array(value: object) -> bool:
    """Return whether the value is an array of some backend."""
    return _namespace_of(value) is not None


def common_namespace(function: str, arrays: Mapping[str, Array | None]) -> ModuleType:
    """`namespace`, with the names of the function and of its arguments in the message."""
    first: tuple[str, ModuleType, Any] | None = None
    for name, array in arrays.items():
        if array is None:
            continue
        xp = _namespace_of(array)
        if xp is None:
            raise TypeError(
                f"{function}: {name} must be a NumPy array, a CuPy array, or one that offers __array_namespace__"
                f"; got {type(array).__module__}.{type(array).__qualname__}"
            )
        if xp is np and not array.dtype.isnative:
            raise TypeError(f"{function}: {name} must be in native byte order; got dtype {array.dtype.str}")
        device = array.device
        if first is None:
            first = name, xp, device
        elif xp is not first[1]:
            raise TypeError(
                f"{function}: {name} must be of the same backend as {first[0]} ({first[1].__name__}); got {xp.__name__}"
            )
        elif device != first[2]:
            raise TypeError(f"{function}: {name} must be on the same device as {first[0]} ({first[2]}); got {device}")
    if first is None:
        raise TypeError(f"{function}: {' or '.join(arrays) or 'arrays'} must hold an array; got none")
    return first[1]


def _namespace_of(array: Any) -> ModuleType | None:
    if type(array) is np.ndarray:
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and type(array) is cupy.ndarray:
        return cupy
    # A subclass of ndarray inherits the method, and with it the claim to mean what NumPy's functions mean: a masked
    # array or a matrix does not. One that brings a namespace of its own is taken at its word.
    method = getattr(type(array), "__array_namespace__", None)
    if method is None or isinstance(array, np.generic) or method is np.ndarray.__array_namespace__:
        return None
    return array.__array_namespace__()  # type: ignore[no-any-return]  # the standard says that it is a module


def _is_cupy(xp: ModuleType) -> bool:
    return xp is sys.modules.get("cupy")


def _placement(like: Array) -> tuple[ModuleType, dict[str, Any], contextlib.AbstractContextManager[Any]]:
    """Return the namespace of `like`, and what puts a new array beside it: creation keywords and a context."""
    if type(like) is np.ndarray:
        return np, {}, _NOWHERE
    xp = common_namespace("backend", {"like": like})
    if _is_cupy(xp):  # no device= on creation: the current device counts
        return xp, {}, like.device
    return xp, {"device": like.device}, _NOWHERE


def full(shape: tuple[int, ...], value: float, like: Array, dtype: Any = None) -> Array:
    """Return a new array of the value beside `like`; its dtype is that of `like` unless given."""
    xp, keywords, context = _placement(like)
    dtype = like.dtype if dtype is None else dtype
    with context:
        if value == 0:  # memory that is zero already: pages that are never written never count
            return xp.zeros(shape, dtype=dtype, **keywords)
        return xp.full(shape, value, dtype=dtype, **keywords)


def empty(shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
    """Return a new array beside `like` that holds anything, for tiles that write all of it.

    Zeros would cost one more pass over the memory, by one thread.
    """
    xp, keywords, context = _placement(like)
    with context:
        return xp.empty(shape, dtype=like.dtype if dtype is None else dtype, **keywords)


def arange(start: int, stop: int, like: Array) -> Array:
    """Return the integers from `start` up to `stop` beside `like`, int64."""
    xp, keywords, context = _placement(like)
    with context:
        return xp.arange(start, stop, dtype=xp.int64, **keywords)


def from_numpy(array: np.ndarray[Any, Any], like: Array) -> Array:
    """Return a copy of a NumPy array beside `like`."""
    xp, keywords, context = _placement(like)
    with context:
        return xp.asarray(np.array(array), **keywords)


def itemsize(array: Array) -> int:
    """Return the bytes of one element."""
    if type(array) is np.ndarray:
        return int(array.dtype.itemsize)
    xp = namespace(array)
    info = xp.finfo if xp.isdtype(array.dtype, "real floating") else xp.iinfo
    return int(info(array.dtype).bits) // 8


def float_range(array: Array) -> tuple[float, float]:
    """Return the smallest normal and the largest number of the dtype of a floating array that is no half type.

    A Python float beyond them becomes 0 or inf where it meets the array.
    """
    info = namespace(array).finfo(array.dtype)
    return float(info.smallest_normal), float(info.max)


def is_half(array: Array) -> bool:
    """Return whether the array is float16 or bfloat16 (which is ml_dtypes' and has no name in the namespaces)."""
    if type(array) is np.ndarray and array.dtype.itemsize != 2:  # to name a dtype takes microseconds
        return False
    return str(array.dtype) in ("float16", "bfloat16")


def is_floating(array: Array) -> bool:
    """Return whether the array is of a dtype that ops compute with or round to."""
    xp = namespace(array)
    return array.dtype in (xp.float32, xp.float64) or is_half(array)


def is_integer(array: Array) -> bool:
    """Return whether the array is of an integer dtype."""
    xp = _placement(array)[0]
    try:
        return bool(xp.isdtype(array.dtype, ("signed integer", "unsigned integer")))
    except TypeError:  # a dtype that is not the namespace's own, as bfloat16
        return False


def widened(*trees: Any) -> tuple[Any, ...]:
    """Return arrays (mappings of them, None) with those of a half type as float32, in which an op computes."""

    def widen(array: Array) -> Array:
        xp = _placement(array)[0]
        return xp.astype(array, xp.float32) if is_half(array) else array

    return tuple(mapped(widen, tree) for tree in trees)


def rounded(tree: T, like: Array) -> T:
    """Return results, computed from `widened` arguments, in the dtype of `like`: the one rounding of a half type."""
    if not is_half(like):
        return tree
    xp = _placement(like)[0]
    return cast(T, mapped(lambda array: xp.astype(array, like.dtype), tree))


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to everything in (named) tuples and mappings that is not None."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {name: mapped(change, part) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [mapped(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return change(tree)


def bounds(array: Array) -> tuple[int, int]:
    """Return the smallest and the largest value of an integer array that is not empty. Waits for the device."""
    xp, _, context = _placement(array)
    with context:
        return int(xp.min(array)), int(xp.max(array))


def all_finite(array: Array) -> bool:
    """Return whether the array holds neither NaN nor inf. Waits for the device.

    NaN and inf survive every sum. One that overflows is taken for an inf: callers lose time, not accuracy.
    """
    xp = namespace(array)
    if xp is np and array.flags.c_contiguous and math.isfinite(sum_of_squares(array)):  # a third of the time of a sum
        return True
    return math.isfinite(float(xp.sum(array)))


def select(condition: Array, array: Array) -> Array:
    """Return the floating array where the condition holds, and 0 elsewhere.

    On a CPU by masking bits: `numpy.where` takes ten times as long where the condition has no pattern, as it cannot
    foresee branches (3.8 and 0.3 us for 1,024 elements).
    """
    xp = _namespace_of(array)
    if xp is not np:
        return namespace(array).where(condition, array, 0.0)
    bits = np.dtype(f"i{array.dtype.itemsize}")
    return np.bitwise_and(array.view(bits), np.negative(condition.astype(bits))).view(array.dtype)


def sum_of_squares(array: Array) -> float:
    """Return the sum of squares, NaN or inf if an element is or if it overflows. Waits for the device.

    As a product of vectors, at the speed of reading; in pieces, as CuPy makes a copy of what it multiplies with itself.
    """
    row = namespace(array).reshape(array, (-1,))
    if not _is_cupy(namespace(array)):
        return float(row @ row)
    pieces = (row[i : i + _PIECE] for i in range(0, row.shape[0], _PIECE))
    return sum((float(piece @ piece) for piece in pieces), 0.0)


def exp(array: Array) -> Array:
    """Return the exponential, in the place of its argument where the backend can: memory that is in the cache."""
    xp = namespace(array)
    return xp.exp(array, out=array) if xp is np or _is_cupy(xp) else xp.exp(array)


def matmul(a: Array, b: Array) -> Array:
    """Return `a @ b`; on a CPU its rows lie so that they do not crowd each other out of the cache.

    Rows that begin a multiple of 4 KiB apart all fall into the same few lines of it (256x64 @ 64x4096, float32: 1.9 ms,
    and 1.5 ms with 64 bytes between the rows).
    """
    xp = _namespace_of(a)
    width = b.shape[-1]
    if xp is not np or a.shape[-2] == 1 or width * a.itemsize % 4096:
        return a @ b
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows = np.empty((*lead, a.shape[-2], width + 64 // a.itemsize), dtype=a.dtype)
    return np.matmul(a, b, out=rows[..., :width])


def matmul_in_parts(a: Array, b: Array) -> Array:
    """Return `a @ b`; on a CPU a few rows of `a` at a time, where that keeps each product small.

    OpenBLAS has kernels for small ones, which pack nothing (128x128 @ 128x64, float32: 86 GFLOP/s on a thread at once,
    and 109 in two parts).
    """
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    parts = -(-rows * inner * columns // _SMALL_PRODUCT)
    if _namespace_of(a) is not np or not 1 < parts <= 4 or rows < 64:
        return a @ b
    out = np.empty((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), rows, columns), dtype=a.dtype)
    step = -(-rows // parts)
    for first in range(0, rows, step):
        at = (..., slice(first, first + step), slice(None))
        np.matmul(a[at], b, out=out[at])
    return out


def row_sums(a: Array, b: Array | None = None) -> Array:
    """Return the sums over the last dimension of `a`, or of `a * b`, which keeps size 1.

    On a CPU as a product of vectors, which adds up as products of matrices do: nothing is stored, and it takes half the
    time of a sum.
    """
    xp = namespace(a)
    if xp is np:
        return np.vecdot(a, np.ones(a.shape[-1], dtype=a.dtype) if b is None else b)[..., None]
    return xp.sum(a if b is None else a * b, axis=-1, keepdims=True)


def sums(array: Array, axis: int | tuple[int, ...], keepdims: bool) -> Array:
    """Return the sums along dimensions: as `row_sums` of the last ones where these lie end to end and are not long.

    (Of 512 planes of 56x56, 0.25 and 0.1 ms.) The longer, the more accurate it is to add up pairs of pairs.
    """
    last = array.ndim - len(axis) if isinstance(axis, tuple) and axis == tuple(range(-len(axis), 0)) else array.ndim
    size = math.prod(array.shape[last:])
    if _namespace_of(array) is not np or not array.flags.c_contiguous or not 1 < size <= 4096:
        return namespace(array).sum(array, axis=axis, keepdims=keepdims)
    total = row_sums(array.reshape(*array.shape[:last], size))
    return total.reshape(*array.shape[:last], *(1,) * (array.ndim - last if keepdims else 0))


def weighted_runs(rows: Array, weights: Array, steps: Sequence[int], length: int, real: Array | None = None) -> Array:
    """Return the sum of runs of the last dimension of `rows`, one for each weight, each times that weight.

    On a CPU in one call, which stores no product and lets other threads run all the while (768 planes of 56x56, 9
    weights each, one thread: 7.9 and 4.6 ms). Long runs of a line of weights one batch entry after the other, as
    `einsum` copies to a buffer what it walks in more than three dimensions (8x8x2000, 31 weights: 1.2 and 0.5 ms).

    Parameters
    ----------
    rows : (..., C, R)
    weights : (C, *K)
    steps
        From the run of one weight to that of the next, along each dimension of the kernel, in elements.
    length
        Of a run.
    real : bool, of the shape of rows, optional
        Which elements count, whatever they are multiplied by: the slow way.

    Returns
    -------
    (..., C, length)
        A sum of nothing but zeros is +0.
    """
    kernel = weights.shape[1:]
    if _namespace_of(rows) is np and real is None:
        if rows.ndim > 2 and len(kernel) == 1 and length >= _LONG_RUN:
            return np.stack([weighted_runs(part, weights, steps, length) for part in rows])
        lead, taps, run = range(rows.ndim - 1), range(rows.ndim, rows.ndim + len(kernel)), rows.ndim - 1
        given = (weights, [lead[-1], *taps], _runs(rows, kernel, steps, length), [*lead, *taps, run])
        return np.einsum(*given, [run, *reversed(lead)], order="F").T  # "F": walks along runs, then from plane to plane
    total = full((*rows.shape[:-1], length), 0, rows)
    for k, run in runs(kernel, steps, length):
        product = rows[..., run] * weights[(slice(None), *k, None)]
        total += product if real is None else select(real[..., run], product)
    return total


def run_products(rows: Array, factor: Array, kernel: Sequence[int], steps: Sequence[int]) -> Array:
    """Return the product of `factor` with each run that `weighted_runs` adds up: (..., R), (..., L) -> (..., *K).

    On a CPU in one call, too. (96 planes of 56x56, 9 runs each: 0.29 and 0.18 ms.)
    """
    length = factor.shape[-1]
    if _namespace_of(rows) is np:
        return np.vecdot(factor[(..., *(None for _ in kernel), slice(None))], _runs(rows, kernel, steps, length))
    xp = namespace(rows)
    products = [factor[..., None, :] @ rows[..., run, None] for _, run in runs(kernel, steps, length)]  # (..., 1, 1)
    return xp.reshape(xp.concat(products, axis=-1), (*factor.shape[:-1], *kernel))


def runs(kernel: Sequence[int], steps: Sequence[int], length: int) -> Iterator[tuple[tuple[int, ...], slice]]:
    """Yield each place in the kernel, and the run that begins as many steps further on."""
    for k in itertools.product(*map(range, kernel)):
        first = sum(i * step for i, step in zip(k, steps, strict=True))
        yield k, slice(first, first + length)


def _runs(rows: Array, kernel: Sequence[int], steps: Sequence[int], length: int) -> Array:
    """Return a view of all runs at once, which overlap: (..., *K, length)."""
    last = rows.ndim - 1
    taps = ((last, size, step) for size, step in zip(kernel, steps, strict=True))
    return unfolded(rows, [*((axis, size, 1) for axis, size in enumerate(rows.shape[:-1])), *taps, (last, length, 1)])


def has_strides(array: Array) -> bool:
    """Return whether `unfolded` can be had of the array."""
    xp = _namespace_of(array)
    return xp is np or (xp is not None and _is_cupy(xp))


def unfolded(array: Array, axes: Sequence[tuple[int, int, int]]) -> Array:
    """Return a view along other axes, each `(axis of array, size, step)`; where several share one, elements reappear.

    Without a check that they stay within the array. Not to be written to.
    """
    shape = [size for _, size, _ in axes]
    strides = [array.strides[axis] * step if size > 1 else 0 for axis, size, step in axes]
    return namespace(array).lib.stride_tricks.as_strided(array, shape, strides)


def row_largest(array: Array) -> Array:
    """Return the largest of the last dimension, which keeps size 1; NaN if there is one.

    As the reduction of a segment, which NumPy begins faster than that of a dimension: 40 for 70 ns of 128 elements.
    """
    xp = namespace(array)
    if xp is np and array.shape[-1]:
        return np.maximum.reduceat(array, [0], axis=-1)
    return xp.max(array, axis=-1, keepdims=True)


def at_hand(array: Array) -> bool:
    """Return whether numbers of the array can be read without waiting for a device."""
    return _namespace_of(array) is np


def largest(array: Array) -> float:
    """Return the largest element of an array that is not empty, NaN if there is one. Waits for the device."""
    return float(namespace(array).max(array))


def contiguous(array: Array) -> Array:
    """Return the array in row-major order, as a copy if it lies in another, where a backend knows of such order."""
    xp, _, context = _placement(array)
    with context:
        return xp.ascontiguousarray(array) if xp is np or _is_cupy(xp) else array


def in_rows(array: Array) -> Array:
    """Return matrices as they are if BLAS takes them so: rows end to end, each further on than the last; else a copy.

    NumPy multiplies any others without BLAS, slowly and with other rounding; so it does with rows of one element that
    lie apart.
    """
    xp = namespace(array)
    if xp is np or _is_cupy(xp):
        *others, step = array.strides
        apart = all(s >= array.shape[-1] * step for n, s in zip(array.shape, others, strict=False) if n > 1)
        if array.shape[-1] > 1 and step == array.itemsize and apart:
            return array
    return contiguous(array)


def add_at(target: Array, places: Array, values: Array, spatial: int) -> bool:
    """Add each value at its place, a flat index into the last `spatial` dimensions of `target`, where that is fast.

    Return whether it was done. NumPy adds in the order of the values, so the sums are always the same, and faster than
    any other way (0.4 ms for 200,000 values); what CuPy adds at once, it adds in any order.
    """
    xp = _namespace_of(target)
    if xp is not np or not places.size or places.view(np.uint64).max() >= (plane := math.prod(target.shape[-spatial:])):
        return False  # places outside of the plane are none at all
    rows, places, values = (a.reshape(-1, math.prod(a.shape[-spatial:])) for a in (target, places, values))
    first = np.arange(0, rows.size, plane)[:, None]
    np.add.at(rows.reshape(-1), (places + first).reshape(-1), values.reshape(-1))
    return True


def tile_bytes(like: Array) -> int:
    """Return how large the working set of a tile of such arrays may be."""
    return _LIMITS.get().tile_bytes or (_GPU_TILE if _is_cupy(namespace(like)) else _CPU_TILE)


def tiles(shape: tuple[int, ...], item_bytes: int, like: Array, least: int = _LEAST_TILE) -> Iterator[Tile]:
    """Cut an index space into tiles, so that the items of one need about `tile_bytes`.

    On a CPU less if there are few items, so that there are tiles for many threads; on a GPU there is one after another.

    Trailing dimensions stay whole while they fit, one dimension is cut into ranges, and those before it are walked one
    index at a time; ranges are of nearly one size. A tile is a slice per dimension, in row-major order; an empty space
    has none. The limits are those of the caller, whoever takes the tiles.
    """
    if 0 in shape:
        return iter(())
    needed, room = math.prod(shape) * item_bytes, tile_bytes(like)
    if not _is_cupy(namespace(like)):
        room = min(room, max(least, needed // _LEAST_TILES))
    if needed <= room:
        return iter([tuple(slice(0, size) for size in shape)])
    room = max(1, room // max(1, item_bytes))
    steps = []
    for size in reversed(shape):
        steps.append(-(-size // -(-size // min(size, room))))
        room = max(1, room // size)
    ranges = [range(0, size, step) for size, step in zip(shape, reversed(steps), strict=True)]
    return (
        tuple(slice(i, min(i + r.step, r.stop)) for i, r in zip(starts, ranges, strict=True))
        for starts in itertools.product(*ranges)
    )


def sizes_of(tile: Sequence[slice]) -> tuple[int, ...]:
    """Return the shape of what a tile holds."""
    return tuple(s.stop - s.start for s in tile)


def run(
    work: Callable[..., Any],
    tiles: Iterable[Tile],
    like: Array,
    collect: Callable[[Tile, Any], None] | None = None,
    result_bytes: int = 0,
) -> None:
    """Call `work(*tile)` for every tile, beside `like`, without floating-point warnings.

    On NumPy, tiles run on threads, several at a time, so `work` may write only what belongs to its tile alone. What
    several tiles add to is returned instead, and handed to `collect(tile, result)` in the order of the tiles: no sum
    depends on timing, or on how many threads there are. BLAS runs on one thread meanwhile, for the same reason, and
    because its threads and ours would wait for each other. Results, of `result_bytes` if they are larger than a tile,
    wait for their turn in a bounded amount of memory.
    """
    xp, _, context = _placement(like)
    with context, np.errstate(all="ignore"), _NOWHERE if _is_cupy(xp) else _threads.one_blas_thread():
        tiles = iter(tiles)
        first = list(itertools.islice(tiles, 2))
        threads = (_LIMITS.get().threads or _threads.usable_cores()) if xp is np and len(first) > 1 else 1
        work = _unbuffered(work) if len(first) > 1 else work
        tiles = itertools.chain(first, tiles)
        if threads == 1:
            results = ((tile, work(*tile)) for tile in tiles)
        else:
            few = max(1, min(2 * threads, _AHEAD_BYTES // (result_bytes or tile_bytes(like))))
            results = _threads.in_order(work, tiles, threads, ahead=math.inf if collect is None else few)
        with contextlib.closing(results):
            for tile, result in results:
                if collect is not None:
                    collect(tile, result)
                del result  # before the next one is computed


def _unbuffered(work: Callable[..., T]) -> Callable[..., T]:
    """Let NumPy compute in place what lies in rows of 1,024 elements or more, and without floating-point warnings.

    Arrays with gaps it copies to a buffer first, some rows at a time, which takes longer than to multiply them. Both
    settings are context variables: a thread does not see the caller's. (Attention 2x8x1024x64: 35 and 32 ms.)
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
