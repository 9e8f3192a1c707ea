"""What the checks of all ops share: kinds of options, dtypes, shapes, and how an error is worded."""

import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, cast

from .. import backend
from ..backend import Array, Backend, shown

MOST = sys.maxsize // 8  # elements of an array, whose bytes must have addresses
LARGEST = 1 << 40  # of a size, stride, dilation or padding: its products with another fit into 64 bits


def fail(kind: type[Exception], function: str, argument: str, rule: str, got: object) -> NoReturn:
    """Raise the error in the one wording that there is."""
    raise kind(f"{function}: {argument} must {rule}; got {got}")


def shapes_of(**arrays: Array | None) -> str:
    """Return the shapes of arrays as an error shows them."""
    return ", ".join(f"{name}.shape={tuple(a.shape)}" for name, a in arrays.items() if a is not None)


def required(function: str, arrays: Mapping[str, Array | None]) -> None:
    """Check that no array was left out."""
    for name, array in arrays.items():
        if array is None:
            fail(TypeError, function, name, "be an array", "None")


def integer(function: str, argument: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """Check an int (or NumPy integer), and its bounds."""
    if not backend.is_number(value):
        fail(TypeError, function, argument, "be an int", shown(value))
    result = int(cast(int, value))
    if minimum is not None and result < minimum:
        fail(ValueError, function, argument, f"be at least {minimum}", shown(value))
    if maximum is not None and result > maximum:
        fail(ValueError, function, argument, f"be at most {maximum}", shown(value))
    return result


def number(function: str, argument: str, value: object) -> float:
    """Check a finite int or float (of NumPy, too)."""
    if not backend.is_number(value, numbers.Real):
        fail(TypeError, function, argument, "be a number", shown(value))
    try:
        result = float(cast(float, value))
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        fail(ValueError, function, argument, "be finite", shown(value))
    return result


def flag(function: str, argument: str, value: object) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        fail(TypeError, function, argument, "be True or False", shown(value))
    return value


def sizes(function: str, argument: str, value: object, count: int, minimum: int) -> tuple[int, ...]:
    """Check an int, or a tuple or list of `count` of them, each at least `minimum`."""
    if not isinstance(value, tuple | list) and not backend.is_number(value):
        fail(TypeError, function, argument, "be an int or a tuple of ints", shown(value))
    if not isinstance(value, tuple | list):
        return (integer(function, argument, value, minimum, LARGEST),) * count
    if len(value) != count:
        rule = f"be an int or have one for each of the {count} spatial dimensions"
        fail(ValueError, function, argument, rule, shown(value))
    return tuple(integer(function, f"{argument}[{i}]", v, minimum, LARGEST) for i, v in enumerate(value))


def floating(function: str, **arrays: Array | None) -> Backend:
    """Check floating arrays of one backend, device and dtype; returns their backend."""
    be = backend.common(function, arrays)
    present = {name: array for name, array in arrays.items() if array is not None}
    first = next(iter(present))
    for name, array in present.items():
        if not be.is_floating(array):
            fail(TypeError, function, name, "be of dtype float64, float32, float16 or bfloat16", array.dtype)
        if array.dtype != present[first].dtype:
            rule = f"be of the same dtype as {first} ({present[first].dtype})"
            fail(TypeError, function, name, rule, array.dtype)
    return be


def logsumexp(function: str, name: str, array: Array | None, like: Array, shape: Sequence[int]) -> None:
    """Check an array of a logsumexp's kind, or None: float32 beside half types, and else of the dtype of `like`."""
    if array is None:
        return
    be = backend.common(function, {"out": like, name: array})
    due = be.xp.float32 if be.is_half(like) else like.dtype
    if array.dtype != due:
        fail(
            TypeError,
            function,
            name,
            f"be of dtype {'float32' if be.is_half(like) else due}, as a logsumexp beside {like.dtype} is",
            array.dtype,
        )
    if tuple(array.shape) != tuple(shape):
        fail(ValueError, function, name, f"have the shape of the logsumexp, {tuple(shape)}", shapes_of(**{name: array}))


def result(function: str, arrays: Mapping[str, Array], shape: tuple[int, ...]) -> None:
    """Check that a result of this shape can be addressed, and that `dout`, in a backward, has it."""
    if math.prod(max(1, size) for size in shape) > MOST:
        fail(ValueError, function, "the result", f"have at most {MOST} elements", f"shape {shape}")
    if "dout" in arrays:
        gradient(function, arrays["dout"], shape)


def gradient(function: str, dout: Array, shape: Sequence[int], name: str = "dout") -> None:
    """Check that what comes with a result has its shape."""
    if tuple(dout.shape) != tuple(shape):
        fail(ValueError, function, name, f"have the shape of the result, {tuple(shape)}", shapes_of(**{name: dout}))


def not_empty(function: str, argument: str, array: Array, first: int, stop: int | None = None) -> None:
    """Check that no dimension from `first` on, and before `stop`, has size 0."""
    if 0 in array.shape[first:stop]:
        rule = f"have sizes of at least 1 from dimension {first} on"
        if stop is not None:
            rule = f"have at least 1 channel, in dimension {first}"
        fail(ValueError, function, argument, rule, shapes_of(**{argument: array}))


def broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that the shapes broadcast to, None if they do not."""
    result = []
    for d in range(-max(map(len, shapes)), 0):
        found = {shape[d] for shape in shapes if len(shape) >= -d} - {1}
        if len(found) > 1:
            return None
        result.append(found.pop() if found else 1)
    return tuple(result)
