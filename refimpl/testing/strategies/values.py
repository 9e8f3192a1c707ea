"""A case, the limits within which cases are drawn, and what their arrays hold and how they lie in memory."""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from hypothesis import strategies as st

import refimpl

Array = np.ndarray[Any, Any]
T = TypeVar("T")

VALUES = (
    "normal", "integers", "distinct", "nonzero", "extreme", "nonfinite",
    "positive", "large", "cancelling", "equal", "outlier",
)  # fmt: skip
LAYOUTS = ("contiguous", "transposed", "strided", "reversed", "broadcast", "readonly")
_EXPONENTS = {  # the largest, the smallest of a normal number, and that of the smallest number of all
    "float64": (1023, -1022, -1074),
    "float32": (127, -126, -149),
    "float16": (15, -14, -24),
    "bfloat16": (127, -126, -133),
}


class Case(NamedTuple):
    """A valid call of an op: `case.f(*case.arrays, **case.options)`; `arrays, options = case[:2]`."""

    arrays: tuple[Any, ...]
    """The positional arguments: NumPy arrays, None or a mapping for some; with pooling also `kernel_size` and such."""
    options: dict[str, Any]
    """The options that are not left at their defaults."""
    f: Callable[..., Any]
    """The op of refimpl."""
    f_backward: Callable[..., Any]
    """Its gradient, a function of `(dout, *arrays, **options)`."""

    def dout(self, seed: int = 0) -> Array:
        """Return normal random numbers of the shape and dtype of the (first) result, for `f_backward`."""
        out = self.f(*self.arrays, **self.options)
        out = out[0] if isinstance(out, tuple) else out
        return np.asarray(np.random.default_rng(seed).normal(size=out.shape)).astype(out.dtype)

    def cast(self, dtype: Any) -> "Case":
        """Return the case with all floating arrays of this dtype (logsumexps of half types are float32), as copies."""
        arrays = _cast(self.arrays, dtype)
        if self.f.__name__ == "merge_attention" and arrays[0].dtype.itemsize == 2:
            arrays = (arrays[0], self.arrays[1].astype(np.float32))
        return self._replace(arrays=arrays, options=_cast(self.options, dtype))


def _cast(tree: Any, dtype: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _cast(value, dtype) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_cast(value, dtype) for value in tree)
    return tree.astype(dtype) if isinstance(tree, np.ndarray) and tree.dtype.name in _EXPONENTS else tree


@dataclass(frozen=True)
class Limits:
    """What the cases of one strategy may be, checked."""

    op: str
    dtypes: tuple[np.dtype[Any], ...]
    options: frozenset[str]
    values: str
    layouts: tuple[str, ...]
    factors: int
    """How many elements the op multiplies with one another, which sets how large extreme ones may be."""


def limits_of(
    op: str,
    known: Sequence[str],
    dtypes: Iterable[str],
    options: Iterable[str] | None,
    values: str,
    layouts: Iterable[str],
    *,
    integers: bool = False,
    factors: int = 2,
) -> Limits:
    """Check the parameters that every strategy has; `integers` says that the op takes integer dtypes, too."""
    chosen = among(op, "options", known if options is None else options, known)
    found = tuple(_dtype(op, name, integers) for name in some(op, "dtypes", dtypes))
    (kind,) = among(op, "values", (values,), VALUES)
    return Limits(
        op, found, frozenset(chosen), kind, among(op, "layouts", some(op, "layouts", layouts), LAYOUTS), factors
    )


def some(op: str, name: str, entries: Iterable[T]) -> tuple[T, ...]:
    """Check that there is something to draw from."""
    result = tuple(entries)
    if not result:
        fail(op, name, "have at least 1 entry", "none")
    return result


def ints(op: str, name: str, entries: Iterable[int], minimum: int = 1) -> tuple[int, ...]:
    """Check ints to draw from."""
    result = some(op, name, entries)
    for entry in result:
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < minimum:
            fail(op, name, f"be ints of at least {minimum}", repr(entry))
    return result


def shapes(
    op: str, name: str, entries: Iterable[tuple[int, ...]], most: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Check shapes to draw from, and perhaps that these have at most so many dimensions."""
    result = some(op, name, entries)
    for entry in result:
        if not isinstance(entry, tuple):
            fail(op, name, "be tuples", repr(entry))
        if most is not None and len(entry) > most:
            fail(op, name, f"have at most {most} dimension", repr(entry))
    return result


def among(op: str, name: str, entries: Iterable[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Check names."""
    result = tuple(entries)
    for entry in result:
        if entry not in allowed:
            fail(op, name, f"be among {', '.join(allowed)}" if allowed else "be none", repr(entry))
    return result


def fail(op: str, name: str, rule: str, got: str) -> None:
    """Raise the ValueError for a parameter."""
    raise ValueError(f"strategies.{op}: {name} must {rule}; got {got}")


def _dtype(op: str, name: str, integers: bool) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    if dtype.name not in _EXPONENTS and not (integers and dtype.kind in "iu"):
        rule = (
            "be float64, float32, float16, bfloat16 or of integers"
            if integers
            else "be float64, float32, float16 or bfloat16"
        )
        fail(op, "dtypes", rule, repr(name))
    return dtype


class Source:
    """Where the parts of one case are drawn from."""

    def __init__(self, draw: st.DrawFn, limits: Limits) -> None:
        self.draw, self.limits = draw, limits
        self.dtype = self.pick(limits.dtypes)
        self._empty = self.rarely(4)  # whether there are sizes of 0, of which several would leave nothing of most cases
        self._seed = draw(st.integers(0, 1 << 16))
        self._arrays = 0  # each has its own random numbers, which stay as they are while another array shrinks

    def pick(self, choices: Sequence[T]) -> T:
        """Draw one of the choices; the first is the simplest."""
        return self.draw(st.sampled_from(choices))

    def size(self, choices: Sequence[T]) -> T:
        """Draw a size, or a shape."""
        empty = [c for c in choices if c == 0 or (isinstance(c, tuple) and 0 in c)]
        full = [c for c in choices if c not in empty]
        return self.pick(empty if not full or (empty and self._empty and self.flag()) else full)

    def flag(self) -> bool:
        """Draw a bool."""
        return self.draw(st.booleans())

    def rarely(self, one_in: int = 5) -> bool:
        """Draw a bool that is mostly False."""
        return self.draw(st.integers(1, one_in)) == one_in

    def has(self, option: str, one_in: int = 4) -> bool:
        """Draw whether an option is given, if it may be; one in so many cases goes without."""
        return option in self.limits.options and self.draw(st.integers(1, one_in)) > 1

    def sequence(self, entries: Sequence[Any]) -> Any:
        """Return a tuple or a list, either of which an option may be."""
        return list(entries) if self.flag() else tuple(entries)

    def rng(self) -> np.random.Generator:
        """Return the random numbers of one more array."""
        self._arrays += 1
        return np.random.default_rng([self._seed, self._arrays])

    def array(self, *shape: int, plane: int | None = None) -> Array:
        """Return one more floating array; `plane` counts the last dimensions within which values are distinct."""
        distinct = self.limits.values == "distinct"
        return self.lay_out(self.contents(shape, plane), fixed=(plane or len(shape)) if distinct else 0)

    def contents(self, shape: tuple[int, ...], plane: int | None = None) -> Array:
        """Return its values."""
        rng, kind = self.rng(), self.limits.values
        if self.dtype.kind in "iu" or kind == "distinct":
            numbers = self._whole(rng, kind, shape, plane or len(shape))
        elif kind == "integers":
            numbers = rng.integers(-4, 5, size=shape)
        elif kind == "nonzero":
            numbers = rng.uniform(0.5, 2.0, size=shape) * rng.choice([-1.0, 1.0], shape)
        elif kind == "positive":
            numbers = rng.uniform(size=shape)
        elif kind == "large":  # logits of 64 and more
            numbers = 8.0 * rng.normal(size=shape)
        elif kind == "cancelling":
            numbers = np.where(np.arange(math.prod(shape)) % 2, 1.0, -1.0).reshape(shape) + rng.normal(size=shape) / 256
        elif kind == "equal":
            numbers = np.full(shape, rng.normal())
        elif kind == "outlier":
            numbers = rng.normal(size=shape) * np.where(rng.random(shape) < 1 / 16, 256.0, 1.0)
        elif kind == "extreme":
            largest, normal, smallest = _EXPONENTS[self.dtype.name]
            large = 2.0 ** max(3, largest // self.limits.factors - 4)
            magnitudes = [0.0, 1.0, large, 1 / large, 2.0**normal, 2.0**smallest]
            numbers = rng.choice(magnitudes, shape) * rng.choice([-1.0, 1.0], shape)
        else:
            numbers = rng.normal(size=shape)
            if kind == "nonfinite":
                numbers = np.where(rng.random(shape) < 0.2, rng.choice([np.nan, np.inf, -np.inf], shape), numbers)
        return np.asarray(numbers).astype(self.dtype)

    def _whole(self, rng: np.random.Generator, kind: str, shape: tuple[int, ...], plane: int) -> Array:
        """Return integers, or distinct multiples of 1/8."""
        if kind == "distinct":
            size = math.prod(shape[len(shape) - plane :])
            ranks = np.tile(np.arange(size) - size // 2, (math.prod(shape) // max(size, 1), 1))
            whole = rng.permuted(ranks, axis=1).reshape(shape)
            return whole if self.dtype.kind in "iu" else whole / 8
        bounds = np.iinfo(self.dtype)
        if kind in ("extreme", "nonfinite"):
            return np.asarray(rng.choice(np.array([bounds.min, 0, 1, bounds.max], self.dtype), shape))
        return np.asarray(rng.integers(max(-4, int(bounds.min)), 5, size=shape))

    def indices(self, shape: tuple[int, ...], plane: int, count: int) -> Array:
        """Return one more array, of indices below `count`; `plane` as for `array`, but where all can be others."""
        rng, size = self.rng(), math.prod(shape[len(shape) - plane :])
        rows = math.prod(shape) // size
        if size <= count and self.flag():
            found = rng.permuted(np.tile(np.arange(count), (rows, 1)), axis=1)[:, :size]
        else:
            found = rng.integers(0, count, size=(rows, size))
        return self.lay_out(found.reshape(shape).astype(self.pick([np.int64, np.int32])))

    def lay_out(self, array: Array, fixed: int = 0) -> Array:
        """Return the array in one of the layouts; `fixed` counts the last dimensions that may not repeat values."""
        layout = self.pick(self.limits.layouts)
        if layout == "transposed":
            return array.T.copy().T
        if layout == "reversed" and array.ndim > 0:  # np.flip makes a scalar of an array without dimensions
            return np.flip(np.flip(array).copy())
        if layout == "strided":
            wide = np.full([2 * n for n in array.shape], 77, array.dtype)
            gaps: Any = (..., *(slice(None, None, 2),) * array.ndim)
            view: Array = wide[gaps]
            view[...] = array
            return view
        if layout == "broadcast" and array.ndim > fixed:
            return np.broadcast_to(array[:1], array.shape)
        if layout == "readonly":
            array.flags.writeable = False
        return array

    def case(self, arrays: tuple[Any, ...], options: dict[str, Any]) -> Case:
        """Return the case with the functions of its op."""
        op = self.limits.op
        return Case(arrays, options, getattr(refimpl, op), getattr(refimpl, f"{op}_backward"))
