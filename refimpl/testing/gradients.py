"""Comparison of a backward with numeric derivatives of its forward."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array

__all__ = ["check_gradients"]

_SMALL = 128  # elements, up to which every one is checked by itself
_DIRECTIONS = 8  # random ones, for larger arguments
_STEP = 1e-3  # relative to elements above 1; its fourth power is the error of the method


def check_gradients(
    f: Callable[..., Any],
    f_backward: Callable[..., Any],
    /,
    *arrays: Array,
    rtol: float = 1e-7,
    seed: int = 0,
    **options: Any,
) -> None:
    """Compare `f_backward(dout, *arrays, **options)` with numeric derivatives of `sum(dout * f(*arrays, **options))`.

    Parameters
    ----------
    f
        Any function of float64 arrays of one backend; if it returns a tuple, its first result counts. It may return a
        NumPy scalar.
    f_backward
        Its gradient for a random `dout`, as every pair in refimpl has it: one array (for the first argument); a
        NamedTuple with fields named `d` and the argument; or a plain tuple, one entry for each of `arrays`. None stands
        for an argument that was None; where an argument is a mapping, so is its gradient.
    *arrays, **options
        The arguments of `f`. Every float64 array among them, options included, must be given a gradient.
    rtol : float
        The relative difference that is allowed, at least 0, on top of what rounding explains.
    seed : int
        Of `dout` and of the directions.

    Raises
    ------
    AssertionError
        If a gradient is wrong: with the argument, the worst index, the analytic and the numeric value, the step and the
        tolerance. Also if one is missing, has the wrong shape, dtype or backend, or if an argument was modified.
    TypeError
        For floating arrays that are not float64: a numeric derivative in float32 has no digits left to compare.
    ValueError
        If `f` returns NaN or inf.

    Notes
    -----
    Central differences with one step of Richardson extrapolation,

        D(h) = (L(x + h d) - L(x - h d)) / 2h,    derivative along d = (4 D(h / 2) - D(h)) / 3 + O(h^4)

    where L is the sum. For arguments of up to 128 elements d is each element in turn; for larger ones d is a random
    direction, eight times, and if one disagrees, halving its support leads to an element that does. The step is 1e-3,
    in units of the element if that is above 1. The function must be smooth within it: draw the input of a maximum
    without ties closer than that.

    Examples
    --------
    >>> import numpy as np
    >>> check_gradients(lambda x: x**2, lambda dout, x: 2 * x * dout, np.array([1.0, 3.0]))
    >>> check_gradients(lambda x: x**2, lambda dout, x: x * dout, np.array([1.0, 3.0]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: check_gradients: dx is wrong in 2 of 2 elements; worst at [1]: analytic ..., numeric ...
    """
    if not backend.is_number(rtol, numbers.Real) or not 0 <= rtol < 1:
        raise ValueError(f"check_gradients: rtol must be a number in [0, 1); got {backend.shown(rtol)}")
    rng = np.random.default_rng(seed)
    slots = _slots(f, arrays, options)
    before = {slot.name: slot.value for slot in slots}
    loss = _Loss(f, arrays, options, rng)
    gradients = _by_name(f_backward(loss.dout, *arrays, **options), slots)
    for slot in _slots(f, arrays, options):
        if not np.array_equal(slot.value, before[slot.name], equal_nan=True):
            raise AssertionError(f"check_gradients: {slot.name} was modified by f or f_backward")
    if not np.array_equal(backend.to_numpy(loss.dout), loss.weights):
        raise AssertionError("check_gradients: dout was modified by f_backward")
    for slot in slots:
        gradient = _checked(gradients[slot.name], slot)
        check = _check_elements if slot.value.size <= _SMALL else _check_directions
        check(slot, gradient, loss, rtol, rng)


@dataclass(frozen=True)
class _Slot:
    """One float64 array among the arguments, and where it stands there."""

    argument: str
    place: int | str
    """Among the arrays, or the name of an option."""
    key: str | None
    """If the argument is a mapping."""
    array: Array
    value: np.ndarray[Any, Any]

    @property
    def name(self) -> str:
        return self.argument if self.key is None else f"{self.argument}[{self.key!r}]"


def _slots(f: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> list[_Slot]:
    """Return all floating arrays among the arguments, which must be float64."""
    slots = []
    for argument, place, given in _named(f, arrays, options):
        for key, array in given.items() if isinstance(given, Mapping) else [(None, given)]:
            if not backend.is_array(array):
                continue
            slot = _Slot(argument, place, key, array, backend.to_numpy(array))
            if slot.value.dtype == np.float64:
                slots.append(slot)
            elif slot.value.dtype.kind not in "biu":
                raise TypeError(
                    f"check_gradients: {slot.name} must be float64, as numeric derivatives have too few digits in any "
                    f"other dtype; got {slot.value.dtype}"
                )
    if not slots:
        raise TypeError("check_gradients: arrays must hold a float64 array; got none")
    return slots


def _named(f: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[str, int | str, Any]]:
    """Return `(name, place, argument)` for every argument, the name from the signature of `f` where it has one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        names = [p.name for p in inspect.signature(f).parameters.values() if p.kind in kinds]
    except ValueError:  # a built-in function may have none
        names = []
    names += [f"arrays[{i}]" for i in range(len(names), len(arrays))]
    positional: list[tuple[str, int | str, Any]] = [(names[i], i, given) for i, given in enumerate(arrays)]
    return positional + [(name, name, given) for name, given in options.items()]


def _by_name(gradients: Any, slots: list[_Slot]) -> dict[str, Array]:
    """Return the gradients under the names of their slots, and check that there is just one for each."""
    if hasattr(gradients, "_fields"):
        entries = {f.removeprefix("d"): gradient for f, gradient in zip(gradients._fields, gradients, strict=True)}
    elif isinstance(gradients, tuple | list):
        arguments = {slot.place: slot.argument for slot in slots}
        entries = {arguments.get(i, f"arrays[{i}]"): gradient for i, gradient in enumerate(gradients)}
    else:
        entries = {slots[0].argument: gradients}
    found: dict[str, Array] = {}
    for argument, gradient in entries.items():
        if isinstance(gradient, Mapping):
            found |= {f"{argument}[{key!r}]": array for key, array in gradient.items()}
        elif gradient is not None:
            found[argument] = gradient
    names = {slot.name for slot in slots}
    if found.keys() != names:
        raise AssertionError(
            f"check_gradients: f_backward must return gradients for {', '.join(sorted(names))}; "
            f"got them for {', '.join(sorted(found)) or 'none'}"
        )
    return found


def _checked(gradient: Array, slot: _Slot) -> np.ndarray[Any, Any]:
    """Check that a gradient is an array like its argument; returns it as a NumPy array."""
    gradient = _as_array(gradient)
    if type(gradient) is not type(slot.array):
        due, came = type(slot.array).__name__, type(gradient).__name__
        raise AssertionError(f"check_gradients: d{slot.name} must be an {due}, as its argument is; got {came}")
    for what in ("device", "shape", "dtype"):
        came, due = getattr(gradient, what), getattr(slot.array, what)
        if came != due:
            raise AssertionError(f"check_gradients: d{slot.name} must have {what} {due}; got {came}")
    return backend.to_numpy(gradient)


def _as_array(value: Any) -> Any:
    """Return a NumPy scalar, which NumPy's functions make of an array without dimensions, as such an array."""
    return np.asarray(value) if isinstance(value, np.generic) else value


class _Loss:
    """`sum(dout * f(...))` for a random `dout`, and its derivatives."""

    def __init__(
        self, f: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any], rng: np.random.Generator
    ) -> None:
        self._f, self._arrays, self._options = f, arrays, options
        out = self._first_result(arrays, options)
        value = backend.to_numpy(out)
        if value.dtype != np.float64:
            raise TypeError(f"check_gradients: f must return float64; got {value.dtype}")
        if not np.isfinite(value).all():
            raise ValueError("check_gradients: f must return finite numbers; got NaN or inf")
        self.weights = rng.normal(size=value.shape)
        self.dout = backend.of(out).from_numpy(self.weights)

    def _first_result(self, arrays: tuple[Any, ...], options: dict[str, Any]) -> Array:
        out = self._f(*arrays, **options)
        return _as_array(out[0] if isinstance(out, tuple) else out)

    def _at(self, slot: _Slot, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the terms of the sum with another value in a slot."""
        arrays, options = list(self._arrays), dict(self._options)
        target: Any = options if isinstance(slot.place, str) else arrays
        array = backend.of(slot.array).from_numpy(value)
        target[slot.place] = array if slot.key is None else {**target[slot.place], slot.key: array}
        result: np.ndarray[Any, Any] = self.weights * backend.to_numpy(self._first_result(tuple(arrays), options))
        return result

    def derivative(self, slot: _Slot, direction: np.ndarray[Any, Any], step: float) -> tuple[float, float]:
        """Return the derivative along a direction, and how far rounding in `f` may have moved it."""
        estimates, noise = [], 0.0
        for h in (step, step / 2):
            above, below = self._at(slot, slot.value + h * direction), self._at(slot, slot.value - h * direction)
            estimates.append(math.fsum((above - below).ravel()) / (2 * h))
            noise = 64 * np.finfo(np.float64).eps * float(np.linalg.norm(np.abs(above) + np.abs(below))) / h
        return (4 * estimates[1] - estimates[0]) / 3, noise


def _check_elements(
    slot: _Slot, gradient: np.ndarray[Any, Any], loss: _Loss, rtol: float, rng: np.random.Generator
) -> None:
    """Compare every element."""
    del rng  # every element is its own direction
    wrong = []
    for index in np.ndindex(slot.value.shape):
        numeric, tolerance, step = _element(slot, loss, rtol, index)
        excess = abs(float(gradient[index]) - numeric) - tolerance
        if not excess <= 0:
            wrong.append((_nan_last(excess), index, numeric, tolerance, step))
    if wrong:
        _fail(slot, gradient, f"in {len(wrong)} of {slot.value.size} elements", *max(wrong)[1:])


def _check_directions(
    slot: _Slot, gradient: np.ndarray[Any, Any], loss: _Loss, rtol: float, rng: np.random.Generator
) -> None:
    """Compare derivatives along random directions; where one is wrong, look for an element that is."""
    flaws = np.argwhere(~np.isfinite(gradient))
    if flaws.size:
        index = tuple(int(i) for i in flaws[0])
        where = f"in {len(flaws)} of {slot.value.size} elements"
        _fail(slot, gradient, where, index, *_element(slot, loss, rtol, index))
    scale = _step_sizes(slot.value)

    def excess(direction: np.ndarray[Any, Any]) -> float:
        direction = direction * scale / np.linalg.norm(direction)
        numeric, noise = loss.derivative(slot, direction, _STEP)
        terms = gradient * direction
        return abs(math.fsum(terms.ravel()) - numeric) - rtol * float(np.linalg.norm(terms)) - noise

    for number in range(_DIRECTIONS):
        direction = rng.normal(size=slot.value.shape)
        if not excess(direction) <= 0:
            support = np.arange(direction.size)
            while support.size > 1:
                halves = np.array_split(support, 2)
                support = max(halves, key=lambda half: _nan_last(excess(_only(direction, half))))
            index = tuple(int(i) for i in np.unravel_index(support[0], slot.value.shape))
            _fail(slot, gradient, f"along random direction {number + 1}", index, *_element(slot, loss, rtol, index))


def _nan_last(excess: float) -> float:
    return math.inf if math.isnan(excess) else excess


def _only(direction: np.ndarray[Any, Any], support: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the direction on its support, and 0 elsewhere."""
    flat = np.zeros(direction.size)
    flat[support] = direction.ravel()[support]
    return flat.reshape(direction.shape)


def _step_sizes(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the unit of a step by each element: the element if that is above 1."""
    return np.where(np.isfinite(value), np.maximum(1.0, np.abs(value)), 1.0)


def _element(slot: _Slot, loss: _Loss, rtol: float, index: tuple[int, ...]) -> tuple[float, float, float]:
    """Return the numeric derivative by one element, the tolerance, and the step."""
    direction = np.zeros(slot.value.shape)
    direction[index] = 1.0
    step = _STEP * float(_step_sizes(slot.value)[index])
    numeric, noise = loss.derivative(slot, direction, step)
    return numeric, rtol * abs(numeric) + noise, step


def _fail(
    slot: _Slot,
    gradient: np.ndarray[Any, Any],
    where: str,
    index: tuple[int, ...],
    numeric: float,
    tolerance: float,
    step: float,
) -> None:
    raise AssertionError(
        f"check_gradients: d{slot.name} is wrong {where}; worst at {list(index)}: analytic {float(gradient[index])!r}, "
        f"numeric {numeric!r} (step {step:.1e}, tolerance {tolerance:.1e})"
    )
