"""How far a result may be from the exact one."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from .analysis import ANALYSES, MODELS, Arithmetic, can_be_squared
from .arrays import returned, viewed
from .trees import leaves, together

__all__ = ["error_bound"]

_DRAWS, _HEAVY_DRAWS = 16, 32
_STEP = 2.0**-30  # of relative changes; the error of float64 is far below their effect, their square far below them
_NEAR = 2.0**-18  # of relative changes that float32 rounds in another way
_SAFETY = 4.0
_TILE_BYTES = 16 << 20  # of an analysis, which holds many arrays that are short-lived


def error_bound(
    f: Callable[..., Any],
    /,
    *arrays: Array,
    dtype: Any = None,
    model: str = "expected",
    exp_ulps: float = 4.0,
    sums: str = "float32",
    seed: int = 0,
    **options: Any,
) -> Any:
    """Return how far rounding explains that a kernel's result is from `f(*arrays, **options)` in float64.

    Parameters
    ----------
    f
        An op or its backward, or any function of arrays of one backend.
    *arrays, **options
        Its arguments, of any floating dtype: the numbers that the kernel is given. Arrays of NumPy, CuPy, PyTorch or
        JAX, mixed if `f` is an op of refimpl: what lies on a CPU is viewed as NumPy arrays, the rest stays on its GPU.
    dtype : dtype or its name, optional
        That of the kernel's result: "float64", "float32", "float16" or "bfloat16"; that of the first floating argument
        unless given.
    model : "expected" or "worst"
        "expected" takes rounding errors as independent: a correct kernel exceeds the bound in fewer than one of 10^9
        elements. "worst": no correct kernel exceeds it, in whatever order it adds.
    exp_ulps : float, at least 0
        The error of the kernel's exp, log, tanh and pow, in units of the roundoff.
    sums : "float32" or "result"
        Where a kernel of a half type accumulates sums: in float32, or in the type of its result.
    seed : int
        Of the changes that are tried where the bound is an estimate.

    Returns
    -------
    NumPy array of float64, or a tuple or mapping of them
        One bound for each element, as `f` returns results; 0 for results that are not floating.

    Raises
    ------
    TypeError
        If there is no floating array among the arguments, or for a dtype that is none of those.
    ValueError
        For a model, `exp_ulps` or `sums` that is none of those.

    Notes
    -----
    The bounds of refimpl's ops are derived, op by op, in `refimpl.testing.analysis`, and cost a few evaluations of the
    op. (Where numbers are too large or too small to be squared in float64, "expected" is "worst".) For any other
    function the bound is an estimate from samples, for both models.

    In the estimate, what rounding does to a result is, up to a factor, what small relative changes of the arguments do
    to it. With `a_i` the change of an element of the result by each of them, u the unit roundoff of the dtype, U that
    in which sums are accumulated (float32 for half types, else the dtype's), and e the error of `f` itself in float32,
    the bound is

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
    arithmetic = allowances("error_bound", model, exp_ulps, sums)
    return reference("error_bound", f, arrays, options, lambda _: dtype, arithmetic, model, seed)[1]


def allowances(function: str, model: str, exp_ulps: float, sums: str) -> Callable[[str], Arithmetic]:
    """Check what is allowed for, and return the arithmetic of a dtype."""
    if model not in MODELS:
        raise ValueError(f"{function}: model must be 'expected' or 'worst'; got {backend.shown(model)}")
    if not backend.is_number(exp_ulps, numbers.Real) or not 0 <= exp_ulps < math.inf:
        raise ValueError(f"{function}: exp_ulps must be a number of at least 0; got {backend.shown(exp_ulps)}")
    if sums not in ("float32", "result"):
        raise ValueError(f"{function}: sums must be 'float32' or 'result'; got {backend.shown(sums)}")
    return lambda dtype: Arithmetic(dtype, float(exp_ulps), sums)


def reference(
    function: str,
    f: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: dict[str, Any],
    dtype_of: Callable[[str], Any],
    arithmetic: Callable[[str], Arithmetic],
    model: str,
    seed: int,
) -> tuple[Any, Any]:
    """Return the results of `f` in float64, and their bounds, as NumPy arrays.

    `dtype_of` gives the dtype of the result of each name; None stands for that of the first floating argument.
    """
    given = {"arrays": arrays, "options": options}
    views = viewed(function, given)
    floating = [array for _, array in leaves(views) if _is_floating(array)]
    if not floating:
        raise TypeError(f"{function}: arrays must hold a floating array, as integers are exact; got none")
    default = backend.of(floating[0]).dtype_name(floating[0])

    def of_result(name: str) -> Arithmetic:
        dtype = dtype_of(name)
        return arithmetic(default if dtype is None else dtype_name(dtype))

    of_result("")  # a wrong dtype is found before anything is computed
    if f in ANALYSES:
        return _analysed(f, views, of_result, model)
    return _sampled(f, given, views, of_result, seed)


def _analysed(
    f: Callable[..., Any], given: dict[str, Any], of_result: Callable[[str], Arithmetic], model: str
) -> tuple[Any, Any]:
    """Return results and bounds by analysis."""

    def wide(array: Any) -> Any:
        return backend.of(array).xp.astype(array, backend.of(array).xp.float64) if _is_floating(array) else array

    given = backend.mapped(wide, given)
    floating = [array for _, array in leaves(given) if _is_floating(array)]
    be = backend.of(floating[0])
    with be.context():
        expected = f(*given["arrays"], **given["options"])
        kind = MODELS[model if can_be_squared(be, floating) else "worst"]
        found: dict[Arithmetic, dict[str, Any]] = {}
        bounds = []
        for name, result in leaves(expected):
            if not _is_floating(result):
                bounds.append(0.0 * backend.to_numpy(result))
                continue
            of = kind(of_result(name), be)
            if of.arithmetic not in found:
                with backend.limits(tile_bytes=max(be.tile_room(), _TILE_BYTES)):
                    errors = ANALYSES[f](of, expected, *given["arrays"], **given["options"])
                found[of.arithmetic] = dict(leaves(errors))
            bounds.append(backend.to_numpy(of.bound(found[of.arithmetic][name], result)))
    remaining = iter(bounds)
    return backend.mapped(backend.to_numpy, expected), backend.mapped(lambda _: next(remaining), expected)


def _sampled(
    f: Callable[..., Any],
    given: dict[str, Any],
    views: dict[str, Any],
    of_result: Callable[[str], Arithmetic],
    seed: int,
) -> tuple[Any, Any]:
    """Return results and bounds by sampling."""
    rng = np.random.default_rng(seed)

    def at(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], dtype: type = np.float64) -> Any:
        """Return the results in a dtype where every floating argument is changed."""

        def put(array: Any, view: Any) -> Any:
            if not _is_floating(view):
                return array
            return returned(change(backend.to_numpy(view).astype(np.float64)).astype(dtype), array)

        changed = together(put, given, views)
        results = viewed("error_bound", f(*changed["arrays"], **changed["options"]))
        return backend.mapped(backend.to_numpy, results)

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
        for (name, result), by_error, by_normal, by_heavy in zip(leaves(expected), errors, normal, heavy, strict=True):
            of = of_result(name)
            e, squares = (_known(np.sqrt(np.mean(np.square(drawn), axis=0))) for drawn in (by_error, by_normal))
            sizes = np.maximum(_known(np.median(by_heavy, axis=0)), squares)
            in_turn = _known(sizes**2 / squares) + 2 * e / 2.0**-24
            bound = 2 * of.u_out * np.abs(result) + _SAFETY * (of.u_out * squares + of.u * in_turn) + of.smallest
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
    return [np.abs(a - b) / step for (_, a), (_, b) in zip(leaves(after), leaves(before), strict=True)]


def _by_result(draws: Iterable[list[np.ndarray[Any, Any]]]) -> list[np.ndarray[Any, Any]]:
    """Return what was found for each draw and result as one array a result, with the draws first."""
    return [np.stack(found) for found in zip(*draws, strict=True)]


def _known(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array with 0 where an overflow left nothing to go by."""
    return np.where(np.isfinite(values), values, 0.0)


def dtype_name(dtype: Any) -> str:
    """Return the name of a floating dtype that results may have."""
    name = dtype if isinstance(dtype, str) else str(getattr(dtype, "__name__", dtype))
    name = name.rpartition(".")[2]
    if name not in ("float64", "float32", "float16", "bfloat16"):
        raise TypeError(
            f"error_bound: dtype must be 'float64', 'float32', 'float16' or 'bfloat16'; got {backend.shown(dtype)}"
        )
    return name


def largest(dtype: Any) -> float:
    """Return the largest number of a floating dtype; bfloat16 ends shortly before float32."""
    name = dtype_name(str(dtype))
    return float(np.finfo("float32" if name == "bfloat16" else name).max)
