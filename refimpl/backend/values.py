"""Values that are no arrays: numbers, trees of arrays, slices, and how an error shows them."""

import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""An array of any backend: `numpy.ndarray`, `cupy.ndarray`, or one that offers `__array_namespace__`."""

Tile: TypeAlias = tuple[slice, ...]
"""A part of an index space: a slice per dimension."""


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


def sizes_of(tile: Sequence[slice]) -> tuple[int, ...]:
    """Return the shape of what a tile holds."""
    return tuple(s.stop - s.start for s in tile)
