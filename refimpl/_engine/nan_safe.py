"""Products in which hidden entries and padding ("not real") contribute nothing, even where they would meet a NaN.

A 0 times NaN is NaN, so what is not real is selected away, never multiplied by 0.
"""

import math
import operator
from collections.abc import Callable

from ..backend import Array, Backend


def select(be: Backend, real: Array | None, array: Array) -> Array:
    """Return the array with 0 where it is not real (None: all of it is)."""
    return array if real is None else be.select(real, array)


def finite(be: Backend, x: Array) -> Array:
    """Return a copy with 0 in place of NaN and inf."""
    xp = be.xp
    return xp.where(xp.isfinite(x), x, 0.0)


def same_layout_as_finite(be: Backend, x: Array) -> Array:
    """Return a copy in the memory layout of `finite(x)`, with all its values.

    For products that must have the same bits whether or not a hidden entry makes `matmul` necessary: BLAS rounds by
    layout.
    """
    xp = be.xp
    return xp.where(xp.isfinite(x), x, x)


def matmul(
    be: Backend,
    a: Array,
    b: Array,
    a_real: Array | None = None,
    b_real: Array | None = None,
    multiply: Callable[[Array, Array], Array] = operator.matmul,
) -> Array:
    """Return `a @ b` over real entries, exact for NaN and inf.

    The finite entries are multiplied as ever. What the others add is found by multiplying indicators: whether any real
    pair of a row and a column has a product of +inf, of -inf, or of NaN. Slow, and taken only where it matters.

    Parameters
    ----------
    a : (..., M, K)
    b : (..., K, N)
    a_real, b_real : bool, of the shapes of `a` and `b`, optional
        False where an entry is a placeholder, which must be 0.
    multiply
        How to multiply the finite entries: as it would be done without others, since BLAS rounds by shape.
    """
    xp = be.xp

    def meet(left: Array, right: Array) -> Array:
        left, right = (x if real is None else x & real for x, real in ((left, a_real), (right, b_real)))
        return xp.astype(left, a.dtype) @ xp.astype(right, a.dtype) > 0

    inf, anything = math.inf, (xp.ones_like(a, dtype=xp.bool), xp.ones_like(b, dtype=xp.bool))
    up = meet(a > 0, b == inf) | meet(a < 0, b == -inf) | meet(a == inf, b > 0) | meet(a == -inf, b < 0)
    down = meet(a > 0, b == -inf) | meet(a < 0, b == inf) | meet(a == inf, b < 0) | meet(a == -inf, b > 0)
    neither = meet(xp.isnan(a), anything[1]) | meet(anything[0], xp.isnan(b))
    neither = neither | meet(a == 0, xp.isinf(b)) | meet(xp.isinf(a), b == 0)
    total = multiply(finite(be, a), finite(be, b))
    total = xp.where(up, total + inf, total)
    total = xp.where(down, total - inf, total)
    return xp.where(neither, math.nan, total)
