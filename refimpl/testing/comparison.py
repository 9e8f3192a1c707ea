"""Comparison of what a kernel returned with the float64 reference."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from .analysis import ANALYSES
from .arrays import is_array, viewed
from .bounds import allowances, dtype_name, largest, reference
from .patterns import patterns_of, references
from .report import Report, ResultReport
from .trees import leaves

__all__ = ["assert_matches", "compare"]


def compare(
    actual: Any,
    f: Callable[..., Any],
    /,
    *arrays: Array,
    model: str = "expected",
    exp_ulps: float = 4.0,
    sums: str = "float32",
    seed: int = 0,
    **options: Any,
) -> Report:
    """Compare what a kernel returned with `f(*arrays, **options)` in float64.

    Parameters
    ----------
    actual
        What the kernel returned for the same arguments: an array, or several in the form that `f` returns, as a plain
        tuple or list (as autograd returns gradients), or as a mapping by name, which may hold some of them only
        (`{"dweight": dweight}`). One array is compared with the first result of `f`. Each result's dtype is the one
        whose rounding is allowed for.
    f, *arrays, **options, model, exp_ulps, sums, seed
        As for `error_bound`. These arrays, and those of `actual`, may be of NumPy, CuPy, PyTorch or JAX, mixed.

    Returns
    -------
    Report
        Its `ok` says whether rounding explains every element. A NaN or inf must be one in the reference, too; beyond
        the largest number of the dtype, inf is right.

    Raises
    ------
    TypeError, ValueError
        As `error_bound`, and if `actual` holds anything but floating arrays or integers.
    AssertionError
        If results are missing or have other names.

    Examples
    --------
    >>> import numpy as np, refimpl
    >>> x = np.array([[[1.0, 2.0, 4.0, 8.0]]], dtype=np.float32)
    >>> report = compare(np.array([[[3.0, 12.0]]], dtype=np.float32), refimpl.avg_pool, x, 2)
    >>> report.ok, report.results[0].wrong, report.results[0].patterns[0]
    (False, 2, 'every element is 2 times the reference')
    """
    return _compared("compare", actual, f, arrays, options, model, exp_ulps, sums, seed)


def assert_matches(
    actual: Any,
    f: Callable[..., Any],
    /,
    *arrays: Array,
    model: str = "expected",
    exp_ulps: float = 4.0,
    sums: str = "float32",
    seed: int = 0,
    **options: Any,
) -> None:
    """Raise an AssertionError with the report of `compare` unless rounding explains every element.

    Parameters
    ----------
    actual, f, *arrays, **options, model, exp_ulps, sums, seed
        As for `compare`.

    Raises
    ------
    AssertionError
        If a result has the wrong shape, or an element is further from the reference than `error_bound` says: with the
        worst index, both values, their difference and the bound, and what the wrong elements have in common.
    TypeError, ValueError
        As `compare`.

    Examples
    --------
    >>> import numpy as np, refimpl
    >>> x = np.array([[[1.0, 2.0, 4.0, 8.0]]], dtype=np.float32)
    >>> assert_matches(np.array([[[1.5, 6.0]]], dtype=np.float32), refimpl.avg_pool, x, 2)
    >>> assert_matches(np.array([[[1.5, 6.1]]], dtype=np.float32), refimpl.avg_pool, x, 2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: assert_matches: the result is wrong in 1 of 2 elements; worst at [0, 0, 1]: 6.099..., ...
    """
    report = _compared("assert_matches", actual, f, arrays, options, model, exp_ulps, sums, seed)
    if not report.ok:
        raise AssertionError(f"assert_matches: {report}")


def _compared(
    function: str,
    actual: Any,
    f: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: dict[str, Any],
    model: str,
    exp_ulps: float,
    sums: str,
    seed: int,
) -> Report:
    """Return the report of a comparison."""
    came = _of_kernel(function, actual)
    dtypes = {name: dtype_name(str(a.dtype)) for name, a in came.items() if a.dtype.kind not in "iu"}
    first = next(iter(dtypes.values()), None)

    def dtype_of(name: str) -> str | None:
        return dtypes.get(name) or first

    arithmetic = allowances(function, model, exp_ulps, sums)
    expected, bounds = reference(function, f, arrays, options, dtype_of, arithmetic, model, seed)
    due, explained = dict(leaves(expected)), dict(leaves(bounds))
    came = _named(came, actual, expected)
    some = is_array(actual) or (isinstance(actual, Mapping) and not isinstance(expected, Mapping))
    missing = set() if some else due.keys() - came.keys()
    if missing or came.keys() - due.keys() or not came:
        raise AssertionError(f"{function}: actual must hold {', '.join(due)}; got {', '.join(came) or 'nothing'}")

    @functools.cache
    def in_half() -> dict[str, Any]:
        """Return the bounds of a kernel that adds up in float16."""
        low = allowances(function, model, exp_ulps, "result")
        return dict(leaves(reference(function, f, arrays, options, lambda _: "float16", low, model, seed)[1]))

    others = functools.cache(lambda: references(f, arrays, options) if f in ANALYSES else [])
    results = []
    for name, result in due.items():
        if name in came:
            compared = _compare(name or "the result", came[name], result, explained[name])
            if compared.wrong and compared.errors is not None:
                bound = np.broadcast_to(explained[name], result.shape)
                found = patterns_of(name, came[name], result, compared.errors, bound, f, others)
                if f in ANALYSES and not any("reference" in pattern for pattern in found):
                    found = (*_precision(came[name], result, in_half()[name]), *found)
                compared = replace(compared, patterns=found)
            results.append(compared)
    return Report(_shown_call(f, arrays, options, seed), tuple(results))


def _of_kernel(function: str, actual: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return what a kernel returned as NumPy arrays by name, or by number."""
    actual = tuple(actual) if isinstance(actual, list) else actual
    found = {}
    for name, array in leaves(actual):
        if not is_array(array):
            raise TypeError(f"{function}: {name or 'actual'} must be an array; got {type(array).__name__}")
        view = viewed(function, array, name or "actual")
        be = backend.of(view)
        if not (be.is_floating(view) or be.is_integer(view)):
            raise TypeError(f"{function}: {name or 'actual'} must be floating or integers; got {array.dtype}")
        found[name] = be.to_numpy(view)
    return found


def _named(came: dict[str, Any], actual: Any, expected: Any) -> dict[str, Any]:
    """Return results under the names that the reference gives them."""
    names = [name for name, _ in leaves(expected)]
    if is_array(actual):
        return {names[0]: came[""]}
    if isinstance(actual, list) or type(actual) is tuple:
        fields = getattr(expected, "_fields", None)
        if fields is not None and len(actual) == len(fields):
            return {fields[int(name.removeprefix("result "))]: array for name, array in came.items()}
        return dict(zip(names, came.values(), strict=True)) if len(came) == len(names) else came
    if isinstance(actual, Mapping) and not isinstance(expected, Mapping):
        plain = {name.removeprefix("['").replace("']", "", 1): array for name, array in came.items()}
        return {name if name in names else f"d{name}": array for name, array in plain.items()}
    return came


def _compare(name: str, actual: np.ndarray[Any, Any], expected: Any, bound: Any) -> ResultReport:
    """Compare one array."""
    about: dict[str, Any] = {"name": name, "shape": tuple(expected.shape), "dtype": actual.dtype.name}
    if actual.shape != expected.shape:
        problem = f"must have shape {expected.shape}; got {actual.shape}"
        return ResultReport(**about, wrong=expected.size, problem=problem)
    values = actual.astype(np.float64) if expected.dtype.kind == "f" else actual
    bound = np.broadcast_to(np.asarray(bound, dtype=np.float64), expected.shape)
    with np.errstate(all="ignore"):
        difference = np.abs(values - expected)
        right = (difference <= bound) | (values == expected) | (np.isnan(values) & np.isnan(expected))
        if expected.dtype.kind == "f" and actual.dtype.kind not in "iu":
            beyond = np.abs(expected) + bound > largest(actual.dtype)
            right |= np.isinf(values) & (np.sign(values) == np.sign(expected)) & beyond
        errors = np.where(right & ~(difference > 0), 0.0, difference / bound)
        errors = np.where(right, np.minimum(np.nan_to_num(errors, nan=0.0), 1.0), np.nan_to_num(errors, nan=math.inf))
    if not expected.size:
        return ResultReport(**about, wrong=0)
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape))
    return ResultReport(
        **about,
        wrong=int((~right).sum()),
        worst=at,
        got=values[at].item(),
        due=expected[at].item(),
        difference=float(difference[at]),
        bound=float(bound[at]),
        error=float(errors[at]),
        errors=errors,
    )


def _precision(actual: np.ndarray[Any, Any], expected: Any, bound: Any) -> tuple[str, ...]:
    """Return whether sums in float16 explain what came."""
    if not (_compare("", actual, expected, bound).wrong == 0 and np.any(actual)):
        return ()
    return ("what sums in float16 explain: is something added up, or rounded, in lower precision?",)


def _shown_call(f: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any], seed: int) -> str:
    """Return a call as a report names it: shapes and dtypes of arrays, other arguments as they are."""

    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key!r}: {shown(part)}" for key, part in value.items()) + "}"
        if is_array(value):
            return f"<{str(value.dtype).rpartition('.')[2]} {tuple(value.shape)}>"
        return backend.shown(value)

    given = [*map(shown, arrays), *(f"{name}={shown(value)}" for name, value in options.items())]
    given += [f"seed={seed}"] if seed else []
    return f"{getattr(f, '__name__', repr(f))}({', '.join(given)})"
