"""What the ops rely on CuPy for, where reading its source leaves a doubt or a difference from NumPy: a check each."""

from collections.abc import Callable
from typing import Any

import numpy as np


def scalars_keep_the_dtype() -> None:
    """Check that a Python number takes the dtype of the array that it meets."""
    import cupy

    x = cupy.asarray(np.ones(3, dtype=np.float32))
    for result in (x * 2.0, 1.0 - 1.0 / x, cupy.where(x > 0, x, 0.0), cupy.where(x > 0, x, float("nan"))):
        np.testing.assert_equal(result.dtype, np.dtype(np.float32))


def products_of_views_that_overlap() -> None:
    """Check products of transposed, reversed and broadcast operands, of size 0, and with nothing to sum."""
    import cupy

    a = np.arange(24.0).reshape(2, 3, 4)
    b = cupy.asarray(a)
    for left, right in (
        (lambda m: m, lambda m: m.transpose(0, 2, 1)),
        (lambda m: m[:, ::-1, ::-1], lambda m: m.transpose(0, 2, 1)),
        (lambda m: m[:1], lambda m: m.transpose(0, 2, 1)),
        (lambda m: m[:, :0], lambda m: m.transpose(0, 2, 1)),
        (lambda m: m[..., :0], lambda m: m.transpose(0, 2, 1)[:, :0]),
    ):
        np.testing.assert_array_equal((left(b) @ right(b)).get(), left(a) @ right(a))


def the_largest_is_nan_if_there_is_one() -> None:
    """Check that `max` and `maximum` return NaN where there is one."""
    import cupy

    x = np.array([[1.0, np.nan, 3.0, np.nan], [2.0, 5.0, 5.0, -np.inf]])
    np.testing.assert_array_equal(cupy.asarray(x).max(axis=-1).get(), x.max(axis=-1))
    y = cupy.asarray(x)
    np.testing.assert_array_equal(cupy.maximum(y[0], y[1]).get(), np.maximum(x[0], x[1]))


def clip_takes_large_integers() -> None:
    """Check bounds far beyond 32 bits."""
    import cupy

    x = np.array([-(1 << 62), 0, 1 << 62])
    np.testing.assert_array_equal(
        cupy.clip(cupy.asarray(x), -(1 << 61), 1 << 61).get(), np.clip(x, -(1 << 61), 1 << 61)
    )


CHECKS: tuple[Callable[[], Any], ...] = (
    scalars_keep_the_dtype,
    products_of_views_that_overlap,
    the_largest_is_nan_if_there_is_one,
    clip_takes_large_integers,
)
