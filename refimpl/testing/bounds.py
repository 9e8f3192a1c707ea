"""How far a result may be from the exact one, and comparison of a kernel with the float64 reference."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array

__all__ = ["assert_matches", "error_bound"]

_DRAWS, _HEAVY_DRAWS = 16, 32
_STEP = 2.0**-30  # of relative changes; the error of float64 is far below their effect, their square far below them
_NEAR = 2.0**-18  # of relative changes that float32 rounds in another way
_SAFETY = 4.0


def error_bound(f: Callable[..., Any], /, *arrays: Array, dtype: Any = None, seed: int = 0, **options: Any) -> Any:
    """Return how far rounding explains that a kernel's result is from `f(*arrays, **options)` in float64.

    Parameters
    ----------
    f
        An op or its backward, or any function of arrays of one backend.
    *arrays, **options
        Its arguments, of any floating dtype: the numbers that the kernel is given.
    dtype : dtype or its name, optional
        That of the kernel's result: "float64", "float32", "float16" or "bfloat16"; that of the first floating argument
        unless given. A kernel of a half type is expected to accumulate in float32.
    seed : int
        Of the changes that are tried.

    Returns
    -------
    NumPy array of float64, or a tuple or mapping of them
        One bound for each element, as `f` returns results; 0 for results that are not floating.

    Raises
    ------
    TypeError
        If there is no floating array among the arguments, or for a dtype that is none of those.

    Notes
    -----
    What rounding does to a result is, up to a factor, what small relative changes of the arguments do to it. With `a_i`
    the change of an element of the result by each of them, u the unit roundoff of the dtype, U that in which sums are
    accumulated (float32 for half types, else the dtype's), and e the error of `f` itself in float32, the bound is

        2 u |f| + 4 u sqrt(sum of a_i**2) + 4 U (sum of |a_i|)**2 / sqrt(sum of a_i**2) + 8 e U / 2**-24

    for rounding the result; for rounding what is multiplied; for adding terms up one after the other (the quotient is
    the sum of n equal terms times sqrt(n)); and for sums that cancel whatever the arguments are, as those of the
    gradient of a softmax. All are estimated: e from 16 computations in float32 close to the arguments, the sum of
    squares from 16 normal changes, the sum of sizes from 32 Cauchy-distributed ones, as their sum is distributed as one
    of them times the sum of `|a_i|`. Equal elements of an array change together, so that ties stay ties.

    References
    ----------
    Kreinovich and Ferson, A new Cauchy-based black-box technique for uncertainty in risk analysis, Reliability
    Engineering and System Safety 85 (2004), for the estimate of the first sum; Higham, Accuracy and stability of
    numerical algorithms, 2nd edition, section 4.2, for sums.

    Examples
    --------
    >>> import numpy as np, refimpl
    >>> x = np.array([[[1.0, 2.0, 4.0, 8.0]]], dtype=np.float32)
    >>> bool((error_bound(refimpl.avg_pool, x, 2) < 1e-5).all())
    True
    """
    return _reference(f, arrays, options, dtype, seed)[1]


def assert_matches(actual: Any, f: Callable[..., Any], /, *arrays: Array, seed: int = 0, **options: Any) -> None:
    """Compare what a kernel returned with `f(*arrays, **options)` in float64.

    Parameters
    ----------
    actual
        What the kernel returned for the same arguments: an array, or a tuple or mapping of them as `f` returns it. One
        array is compared with the first result of `f`. Its dtype is the one whose rounding is allowed for.
    f, *arrays, **options, seed
        As for `error_bound`.

    Raises
    ------
    AssertionError
        If a result has the wrong shape, or an element is further from the reference than `error_bound` says: with the
        worst index, both values, their difference and the bound. A NaN or inf must be one in the reference, too; beyond
        the largest number of the dtype, inf is right.

    Examples
    --------
    >>> import numpy as np, refimpl
    >>> x = np.array([[[1.0, 2.0, 4.0, 8.0]]], dtype=np.float32)
    >>> assert_matches(np.array([[[1.5, 6.0]]], dtype=np.float32), refimpl.avg_pool, x, 2)
    >>> assert_matches(np.array([[[1.5, 6.1]]], dtype=np.float32), refimpl.avg_pool, x, 2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: assert_matches: the result is wrong in 1 of 2 elements; worst at [0, 0, 1]: 6.099..., ...
    """
    for name, array in _leaves(actual):
        if not backend.is_array(array):
            raise TypeError(f"assert_matches: {name or 'actual'} must be an array; got {type(array).__name__}")
        be = backend.of(array)
        if not (be.is_floating(array) or be.is_integer(array)):
            raise TypeError(f"assert_matches: {name or 'actual'} must be floating or integers; got {array.dtype}")
    first = next((array for _, array in _leaves(actual) if _is_floating(array)), None)
    expected, bounds = _reference(f, arrays, options, None if first is None else str(first.dtype), seed)
    if isinstance(expected, tuple) and not isinstance(actual, tuple):
        expected, bounds = expected[0], bounds[0]
    due, came = dict(_leaves(expected)), dict(_leaves(actual))
    if due.keys() != came.keys():
        raise AssertionError(f"assert_matches: actual must hold {', '.join(due)}; got {', '.join(came)}")
    for (name, result), (_, bound) in zip(due.items(), _leaves(bounds), strict=True):
        _compare(name or "the result", backend.to_numpy(came[name]), result, bound)


def _compare(name: str, actual: np.ndarray[Any, Any], expected: Any, bound: Any) -> None:
    """Compare one array."""
    if actual.shape != expected.shape:
        raise AssertionError(f"assert_matches: {name} must have shape {expected.shape}; got {actual.shape}")
    values = actual.astype(np.float64) if expected.dtype.kind == "f" else actual
    with np.errstate(all="ignore"):
        difference = np.abs(values - expected)
        right = (difference <= bound) | (values == expected) | (np.isnan(values) & np.isnan(expected))
        if expected.dtype.kind == "f" and actual.dtype.kind not in "iu":
            largest = _precision(actual.dtype)[2]
            right |= np.isinf(values) & (np.sign(values) == np.sign(expected)) & (np.abs(expected) + bound > largest)
    if not right.all():
        excess = np.where(right, -math.inf, np.nan_to_num(difference - bound, nan=math.inf))
        at = np.unravel_index(int(np.argmax(excess)), excess.shape)
        raise AssertionError(
            f"assert_matches: {name} is wrong in {int((~right).sum())} of {right.size} elements; worst at "
            f"{[int(i) for i in at]}: {values[at].item()!r}, reference {expected[at].item()!r}; they differ by "
            f"{difference[at].item():.3e}, and rounding in {actual.dtype} explains {np.asarray(bound)[at].item():.3e}"
        )


def _reference(
    f: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any], dtype: Any, seed: int
) -> tuple[Any, Any]:
    """Return the results of `f` in float64, and their bounds."""
    given = {"arrays": arrays, "options": options}
    floating = [array for _, array in _leaves(given) if _is_floating(array)]
    if not floating:
        raise TypeError("error_bound: arrays must hold a floating array, as integers are exact; got none")
    unit, unit_of_sums, _, smallest = _precision(str(floating[0].dtype) if dtype is None else dtype)
    rng = np.random.default_rng(seed)

    def at(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], dtype: type = np.float64) -> Any:
        """Return the results in a dtype where every floating argument is changed."""

        def put(array: Any) -> Any:
            if not _is_floating(array):
                return array
            return backend.of(array).from_numpy(change(backend.to_numpy(array).astype(np.float64)).astype(dtype))

        changed = backend.mapped(put, given)
        return backend.mapped(lambda r: backend.to_numpy(_as_array(r)), f(*changed["arrays"], **changed["options"]))

    expected = at(lambda values: values)

    def effect(draw: Callable[[int], np.ndarray[Any, Any]], draws: int) -> list[list[np.ndarray[Any, Any]]]:
        """Return, for each draw, by how much every result changes, in units of the step."""
        return [_apart(at(_changing(draw, _STEP)), expected, _STEP) for _ in range(draws)]

    def error() -> list[np.ndarray[Any, Any]]:
        """Return how far every result in float32 is from that in float64, somewhere near the arguments."""
        kept: list[np.ndarray[Any, Any]] = []

        def near(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            kept.append(_changing(rng.standard_normal, _NEAR)(values).astype(np.float32))
            return kept[-1]

        single = at(near, np.float32)
        again = iter(kept)
        return _apart(single, at(lambda _: next(again)), 1.0)

    with np.errstate(all="ignore"):
        errors = _by_result(error() for _ in range(_DRAWS))
        normal = _by_result(effect(rng.standard_normal, _DRAWS))
        heavy = _by_result(effect(lambda size: np.clip(rng.standard_cauchy(size), -(2.0**20), 2.0**20), _HEAVY_DRAWS))
        bounds = []
        for (_, result), by_error, by_normal, by_heavy in zip(_leaves(expected), errors, normal, heavy, strict=True):
            e, squares = (_known(np.sqrt(np.mean(np.square(drawn), axis=0))) for drawn in (by_error, by_normal))
            sizes = np.maximum(_known(np.median(by_heavy, axis=0)), squares)
            in_turn = _known(sizes**2 / squares) + 2 * e / 2.0**-24
            bound = 2 * unit * np.abs(result) + _SAFETY * (unit * squares + unit_of_sums * in_turn) + smallest
            bounds.append(np.where(np.isfinite(result), bound, 0.0) if result.dtype.kind == "f" else 0.0 * result)
    remaining = iter(bounds)
    return expected, backend.mapped(lambda _: next(remaining), expected)


def _is_floating(value: Any) -> bool:
    """Return whether the value is an array of a floating dtype."""
    be = backend.find(value)
    return be is not None and be.is_floating(value)


def _changing(
    draw: Callable[[int], np.ndarray[Any, Any]], step: float
) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Return the function that changes numbers by draws, relative to them, in units of the step; equal ones equally."""

    def change(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        distinct, inverse = np.unique(values, return_inverse=True)
        changed: np.ndarray[Any, Any] = (distinct * (1.0 + step * draw(distinct.size)))[inverse.reshape(values.shape)]
        return changed

    return change


def _apart(after: Any, before: Any, step: float) -> list[np.ndarray[Any, Any]]:
    """Return how far each result is from another, in units of the step."""
    return [np.abs(a - b) / step for (_, a), (_, b) in zip(_leaves(after), _leaves(before), strict=True)]


def _by_result(draws: Iterable[list[np.ndarray[Any, Any]]]) -> list[np.ndarray[Any, Any]]:
    """Return what was found for each draw and result as one array a result, with the draws first."""
    return [np.stack(found) for found in zip(*draws, strict=True)]


def _known(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array with 0 where an overflow left nothing to go by."""
    return np.where(np.isfinite(values), values, 0.0)


def _precision(dtype: Any) -> tuple[float, float, float, float]:
    """Return the unit roundoff of a dtype, that of its sums, its largest number, and the smallest that it can lose."""
    name = dtype if isinstance(dtype, str) else str(getattr(dtype, "__name__", dtype))
    name = name.rpartition(".")[2]
    single = np.finfo(np.float32)
    if name == "bfloat16":  # the exponents of float32 and 8 bits of precision
        return 2.0**-8, float(single.eps) / 2, float(single.max), float(single.tiny)
    if name not in ("float64", "float32", "float16"):
        raise TypeError(
            f"error_bound: dtype must be 'float64', 'float32', 'float16' or 'bfloat16'; got {backend.shown(dtype)}"
        )
    info = np.finfo(name)
    sums = max(info, single, key=lambda i: i.precision)
    # GPUs flush what is below the smallest normal number of float32 to 0, but not of float16.
    smallest = info.smallest_subnormal if name == "float16" else info.tiny
    return float(info.eps) / 2, float(sums.eps) / 2, float(info.max), float(smallest)


def _as_array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, np.generic) else value


def _leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return `(name, leaf)` for everything in (named) tuples and mappings that is not None."""
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return [leaf for key, part in tree.items() for leaf in _leaves(part, f"{name}[{key!r}]")]
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", [f"result {i}" for i in range(len(tree))])
        return [leaf for key, part in zip(names, tree, strict=True) for leaf in _leaves(part, f"{name}{key}")]
    return [(name, tree)]
