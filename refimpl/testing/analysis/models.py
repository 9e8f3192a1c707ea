"""How rounding errors add up: as independent errors (`Expected`), or all against us (`Worst`)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from ...backend import Array, Backend

_UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# What may be lost below: GPUs flush numbers below the smallest normal one to 0, but not in float16.
_SMALLEST = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}

_TINY = 2.0**-1022  # beside a denominator that may be 0, where the numerator is


@dataclass(frozen=True)
class Arithmetic:
    """In which precision a kernel computes."""

    dtype: str
    """Of the result."""
    exp_ulps: float = 4.0
    """The error of `exp`, `log`, `tanh` and `pow`, in units of the roundoff."""
    sums: str = "float32"
    """Where a half type's sums are accumulated: in "float32", or in the type of the "result"."""

    @property
    def u_out(self) -> float:
        """The unit roundoff of the result."""
        return _UNITS[self.dtype]

    @property
    def u(self) -> float:
        """The unit roundoff in which sums are accumulated."""
        return self.u_out if self.sums == "result" else min(self.u_out, _UNITS["float32"])

    @property
    def is_half(self) -> bool:
        """Whether factors of products are rounded to a half type on their way."""
        return self.u_out > _UNITS["float32"]

    @property
    def smallest(self) -> float:
        """What may be lost below the smallest numbers of the dtype."""
        return _SMALLEST[self.dtype]


@dataclass(frozen=True)
class Model:
    """How errors add up. What it adds is a measure of error: a variance (`Expected`) or a size (`Worst`)."""

    arithmetic: Arithmetic
    be: Backend

    name: ClassVar[str]

    def size(self, array: Array) -> Array:
        """Return what a factor of an error contributes to its measure; measures of products are products of these."""
        raise NotImplementedError

    def of_sum(self, total: Array, sizes: Array, count: Array | float) -> Array:
        """Return the measure of the error of a sum: its value, the sum of the sizes of its terms, their number."""
        raise NotImplementedError

    def roundings(self, ulps: float) -> float:
        """Return the measure of a relative error of so many units of the roundoff."""
        return self.size_of(ulps * self.arithmetic.u)

    def relative(self, ulps: float, array: Array) -> Array:
        """Return the measure of an error of so many units of the roundoff, relative to the array."""
        return self.roundings(ulps) * self.size(array)

    def of_exponent(self, error: Array) -> Array:
        """Return the measure of the relative error of `exp(x)` from that of the error of x."""
        raise NotImplementedError

    def of_quotient(self, mean: Array) -> Array:
        """Return by what the relative errors of weights grow where their sum, off by the mean of them, divides them."""
        raise NotImplementedError

    def grown(self, size: Array, measure: Array) -> Array:
        """Return the size of a factor that is itself off: what errors of second order add, where they count."""
        raise NotImplementedError

    def deviation(self, weights: Array, values: Array, mean: Array) -> Array:
        """Return the sum over the last dimension of weights of `weights * size(values - mean)`, or a bound of it."""
        raise NotImplementedError

    def of_equal_rows(self, *arrays: Array) -> Array | float:
        """Return by what errors of sums over rows grow where all rows (..., rows, features) of each array are equal."""
        raise NotImplementedError

    def either(self, a: Array, b: Array) -> Array:
        """Return the measure of a number that is computed in one of two ways."""
        return self.be.xp.maximum(a, b)

    @property
    def half(self) -> float:
        """The measure of the relative error of rounding a factor to a half type, if there is one."""
        raise NotImplementedError

    @property
    def half_floor(self) -> float:
        """The measure of its absolute error below float16's normal numbers."""
        return 0.0 if self.arithmetic.dtype != "float16" else self.size_of(2.0**-25)

    def size_of(self, number: float) -> float:
        """Return the size of a Python number."""
        raise NotImplementedError

    def bound(self, measure: Array, result: Array) -> Array:
        """Return how far a result may be from the exact one; 0 where that is not finite, inf where nothing is known."""
        raise NotImplementedError

    def clean(self, array: Array) -> Array:
        """Return the array with 0 in place of NaN and inf: what is not finite has no rounding error."""
        return self.be.xp.where(self.be.xp.isfinite(array), array, 0.0)


class Expected(Model):
    """Rounding errors are independent; a correct kernel exceeds the bound in fewer than one of 10^9 elements.

    A sum of n terms t, added one after the other in an order that does not depend on them, has partial sums that grow
    like k S / n and fluctuate by sqrt(Q k (n - k)) / n, with S the sum of t and Q that of t**2. Each addition and each
    term is rounded by at most u, uniformly, so the variance of the error is at most

        u**2 (n (S**2 / 3 + Q / 6) + Q)

    Sums in blocks or pairs have less. Equal terms drift in one direction, by up to n u |S| / 2: an eighth of this
    enters as a standard deviation, times the 8th power of S**2 / (n Q), which is 1 for equal terms and small for
    others. The bound is 8 standard deviations, two roundings of the result, and the smallest number of the dtype.
    Higham, Accuracy and stability of numerical algorithms, 2nd edition, sections 2.8 and 4.2.
    """

    name = "expected"

    def size(self, array: Array) -> Array:
        """Return the square."""
        return array * array

    def of_sum(self, total: Array, sizes: Array, count: Array | float) -> Array:
        """Return the variance."""
        square = total * total
        share = square / (count * sizes + _TINY)
        for _ in range(4):
            share = share * share
        drift = share * (square * (count * count / 256))
        u2 = self.arithmetic.u**2
        return square * (count * (u2 / 3)) + sizes * (count * (u2 / 6) + u2) + u2 * drift

    def of_exponent(self, error: Array) -> Array:
        """Return it as it is: to first order."""
        return error

    def of_quotient(self, mean: Array) -> Array:
        """Return 1: to first order."""
        return 1.0 + 0.0 * mean

    def grown(self, size: Array, measure: Array) -> Array:
        """Return the size alone."""
        del measure
        return size

    def deviation(self, weights: Array, values: Array, mean: Array) -> Array:
        """Return it from three products, as (v - m)**2 = v**2 - 2 v m + m**2."""
        xp = self.be.xp
        total = xp.sum(weights, axis=-1, keepdims=True)
        found = weights @ (values * values) - 2.0 * mean * (weights @ values) + mean * mean * total
        return xp.maximum(found, 0.0 * found)

    def of_equal_rows(self, *arrays: Array) -> Array | float:
        """Return up to 1 + n / 8: n equal errors add up to n times one, where independent ones grow with sqrt(n)."""
        xp, growth = self.be.xp, 1.0 + 0.0 * arrays[0][..., :1, :1]
        for rows in arrays:
            square, squares = xp.sum(rows, axis=-2, keepdims=True) ** 2, xp.sum(rows * rows, axis=-2, keepdims=True)
            square, squares = (xp.sum(a, axis=-1, keepdims=True) for a in (square, squares * rows.shape[-2]))
            growth = growth * xp.where(squares > 0, square / xp.where(squares > 0, squares, 1.0), 1.0) ** 8
        return 1.0 + arrays[0].shape[-2] / 8 * growth

    @property
    def half(self) -> float:
        """The variance of a uniform error of up to the roundoff."""
        return self.arithmetic.u_out**2 / 3 if self.arithmetic.is_half else 0.0

    def size_of(self, number: float) -> float:
        """Return the square."""
        return number * number

    def bound(self, measure: Array, result: Array) -> Array:
        """Return 8 standard deviations, two roundings of the result, and what may be lost to 0."""
        xp, at = self.be.xp, self.arithmetic
        return _where_finite(xp, result, 8.0 * xp.sqrt(measure) + 2.0 * at.u_out * xp.abs(result) + at.smallest)


class Worst(Model):
    """No correct kernel exceeds the bound, in whatever order it adds.

    A sum of n products is off by at most `gamma(n + 1)` times the sum of their sizes, with
    `gamma(n) = n u / (1 - n u)`: Higham, section 3.1. Where `n u` is no longer small, the bound is infinite.
    """

    name = "worst"

    def size(self, array: Array) -> Array:
        """Return the absolute value."""
        return self.be.xp.abs(array)

    def of_sum(self, total: Array, sizes: Array, count: Array | float) -> Array:
        """Return the largest error."""
        del total
        steps = (count + 1.0) * self.arithmetic.u
        if isinstance(steps, float):
            return sizes * (steps / (1.0 - steps) if steps < 1.0 else math.inf)
        return sizes * self.be.xp.where(steps < 1.0, steps / (1.0 - steps), math.inf)

    def of_exponent(self, error: Array) -> Array:
        """Return exp(error) - 1."""
        return self.be.xp.expm1(error)

    def of_quotient(self, mean: Array) -> Array:
        """Return 1 / (1 - mean), for which nothing is known from 1 on."""
        return self.be.xp.where(mean < 1.0, 1.0 / (1.0 - mean), math.inf)

    def grown(self, size: Array, measure: Array) -> Array:
        """Return the sum of both."""
        return size + measure

    def deviation(self, weights: Array, values: Array, mean: Array) -> Array:
        """Return it with |v| + |m| in place of |v - m|."""
        xp = self.be.xp
        return weights @ xp.abs(values) + xp.abs(mean) * xp.sum(weights, axis=-1, keepdims=True)

    def of_equal_rows(self, *arrays: Array) -> Array | float:
        """Return 1."""
        del arrays
        return 1.0

    @property
    def half(self) -> float:
        """The roundoff."""
        return self.arithmetic.u_out if self.arithmetic.is_half else 0.0

    def size_of(self, number: float) -> float:
        """Return the absolute value."""
        return abs(number)

    def bound(self, measure: Array, result: Array) -> Array:
        """Return the error, one rounding of what it leads to, and what may be lost to 0."""
        xp, at = self.be.xp, self.arithmetic
        rounding = at.u_out * (xp.abs(result) + measure)
        return _where_finite(xp, result, measure + rounding + at.smallest)


MODELS: dict[str, type[Model]] = {model.name: model for model in (Expected, Worst)}


def can_be_squared(be: Backend, arrays: Iterable[Array]) -> bool:
    """Return whether squares and their products neither overflow nor vanish in float64."""
    xp = be.xp
    for array in arrays:
        sizes = xp.abs(array)
        odd = (sizes > 0) & ((sizes > 2.0**200) | (sizes < 2.0**-200)) & xp.isfinite(array)
        if be.to_numpy(xp.any(odd)).item():
            return False
    return True


def _where_finite(xp: Any, result: Array, bound: Array) -> Array:
    return xp.where(xp.isfinite(result), xp.where(xp.isnan(bound), math.inf, bound), 0.0)
