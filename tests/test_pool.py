"""Pooling against loops, and in the corners: ties, NaN, padding, overhanging windows, numbers of any size."""

import math

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from samples import normal, ramp

import refimpl
from refimpl import avg_pool, avg_pool_backward, lp_pool, lp_pool_backward, max_pool, max_pool_backward
from refimpl.testing import check_gradients, strategies


@given(case=strategies.max_pool(values="integers"))
def test_max_pool_agrees_with_loops(case):
    out, indices = max_pool(*case.arrays, **case.options, return_indices=True)
    dout = ramp(*out.shape)
    expected_out, expected_indices, expected_dx = oracles.max_pool(dout, *case.arrays, **case.options)
    np.testing.assert_array_equal(out, expected_out)
    np.testing.assert_array_equal(indices, expected_indices)
    assert indices.dtype == np.int64
    for given_indices in (None, indices):
        dx = max_pool_backward(dout, *case.arrays, **case.options, indices=given_indices)
        np.testing.assert_array_equal(dx, expected_dx)


@given(case=strategies.max_pool(values="integers"), seed=st.integers(0, 1000))
def test_max_pool_takes_the_first_nan(backend, case, seed):
    x, *rest = case.arrays
    rng = np.random.default_rng(seed)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[rng.random(x.shape) < 0.2] = -np.inf
    out, indices = max_pool(backend.array(x), *rest, **case.options, return_indices=True)
    expected_out, expected_indices, _ = oracles.max_pool(None, x, *rest, **case.options)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(out), expected_out)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(indices), expected_indices)


@given(case=strategies.avg_pool())
def test_avg_pool_agrees_with_loops(case):
    out = avg_pool(*case.arrays, **case.options)
    dout = ramp(*out.shape)
    expected_out, expected_dx = oracles.avg_pool(dout, *case.arrays, **case.options)
    np.testing.assert_allclose(out, expected_out, rtol=1e-13, atol=1e-13)
    dx = avg_pool_backward(dout, *case.arrays, **case.options)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("op", ["max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "max_unpool"])
@given(data=st.data())
def test_what_is_not_finite_agrees_with_loops(op, data):
    case = data.draw(strategies.EVERY_OP[op](values="nonfinite"))
    out = case.f(*case.arrays, **case.options)
    dout = normal(*out.shape)
    expected = getattr(oracles, op)(dout, *case.arrays, **case.options)
    np.testing.assert_allclose(out, expected[0], rtol=1e-12, atol=1e-13)
    dx = case.f_backward(dout, *case.arrays, **case.options)
    np.testing.assert_allclose(dx, expected[-1], rtol=1e-12, atol=1e-13)


@given(case=strategies.avg_pool(values="integers"))
def test_avg_pool_backward_is_its_adjoint(case):
    x = case.arrays[0]
    out = avg_pool(*case.arrays, **case.options)
    dout = ramp(*out.shape)
    assert np.sum(out * dout) == np.sum(x * avg_pool_backward(dout, *case.arrays, **case.options))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_max_pool_takes_integers(backend, dtype):
    if dtype in backend.lacks:
        pytest.skip(f"{backend.name} does not compute with {dtype}")
    lowest = np.iinfo(dtype).min
    x = np.full((1, 1, 3), lowest, dtype=dtype)
    out, indices = max_pool(backend.array(x), 3, padding=1, stride=2, return_indices=True)
    assert refimpl.backend.to_numpy(out).tolist() == [[[lowest, lowest]]]
    assert refimpl.backend.to_numpy(out).dtype == dtype
    assert refimpl.backend.to_numpy(indices).tolist() == [[[0, 1]]]


def test_padding_never_wins():
    x = np.full((1, 1, 3), -np.inf)
    out, indices = max_pool(x, 3, padding=1, return_indices=True)
    assert out.tolist() == [[[-np.inf]]]
    assert indices.tolist() == [[[0]]]
    np.testing.assert_array_equal(max_pool_backward(np.ones((1, 1, 1)), x, 3, padding=1), [[[1.0, 0.0, 0.0]]])


def test_nothing_but_the_kernel_says_how_many_dimensions_there_are():
    x = ramp(6, 8)
    np.testing.assert_array_equal(max_pool(x, (2, 2)), x.reshape(3, 2, 4, 2).max(axis=(1, 3)))
    np.testing.assert_array_equal(avg_pool(x, (2,)), x.reshape(6, 4, 2).mean(axis=2))
    np.testing.assert_array_equal(max_pool(x[0], [4]), x[0].reshape(2, 4).max(axis=1))


@pytest.mark.parametrize(
    ("options", "divisors"),
    [
        ({}, [3, 3, 2]),  # the last window hangs over by one, which is not counted
        ({"count_include_pad": False}, [2, 3, 2]),
        ({"divisor_override": 7}, [7, 7, 7]),
    ],
)
def test_what_the_divisor_counts(options, divisors):
    """Windows of 3 over one element of padding and 6 of x, from -1, 1, 3 (and 5 with the second case's overhang)."""
    x = np.ones((1, 1, 5))
    out = avg_pool(x, 3, stride=2, padding=[(1, 0)], ceil_mode=True, **options)
    np.testing.assert_allclose(out[0, 0], np.array([2, 3, 2]) / divisors, rtol=1e-15)


def test_same_counts_as_padding():
    x = np.ones((1, 1, 5))
    np.testing.assert_allclose(avg_pool(x, 2, stride=1, padding="same")[0, 0], [1, 1, 1, 1, 0.5])
    np.testing.assert_array_equal(avg_pool(x, 2, stride=1, padding="same", count_include_pad=False)[0, 0], np.ones(5))
    assert max_pool(ramp(1, 1, 5), 3, stride=2, padding="same").shape == (1, 1, 3)


def test_ceil_mode_drops_a_window_that_begins_beyond_the_end():
    x = ramp(1, 1, 5)
    assert max_pool(x, 2, stride=3, ceil_mode=True).shape == (1, 1, 2)
    assert max_pool(x, 1, stride=3, padding=0, ceil_mode=True).shape == (1, 1, 2)
    assert max_pool(ramp(1, 1, 4), 2, stride=3, padding=[(0, 1)], ceil_mode=True).shape == (1, 1, 2)
    assert max_pool(ramp(1, 1, 3), 2, stride=3, padding=[(0, 1)], ceil_mode=True).shape == (1, 1, 1)


@given(case=st.one_of(strategies.lp_pool(), strategies.lp_pool(values="integers")))
def test_lp_pool_agrees_with_loops(backend, case):
    """With `integers` there are zeros, and whole windows of them, whose gradient is 0."""
    (x, *rest), options, *_ = case
    out = lp_pool(backend.array(x), *rest, **options)
    dout = ramp(*out.shape)
    dx = lp_pool_backward(backend.array(dout), backend.array(x), *rest, **options)
    assert backend.owns(out)
    assert backend.owns(dx)
    expected_out, expected_dx = oracles.lp_pool(dout, x, *rest, **options)
    np.testing.assert_allclose(refimpl.backend.to_numpy(out), expected_out, rtol=1e-12)
    np.testing.assert_allclose(refimpl.backend.to_numpy(dx), expected_dx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 2.5, 3])
def test_the_gradient_of_lp_pool(norm_type):
    """Away from 0, where a norm below 2 has a kink."""
    x = normal(2, 5, 6)
    check_gradients(
        lp_pool, lp_pool_backward, x + np.sign(x), norm_type, (3, 2), stride=2, padding="same", dilation=(1, 2)
    )


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3])
def test_lp_pool_has_no_gradient_at_zero(norm_type):
    x, dout = np.array([0.0, 0.0, 0.0, -4.0]), np.array([5.0, 7.0])
    assert lp_pool(x, norm_type, (2,)).tolist() == [0.0, 4.0]
    assert lp_pool_backward(dout, x, norm_type, (2,)).tolist() == [0.0, 0.0, 0.0, -7.0]
    assert lp_pool_backward(dout, -x, norm_type, (2,)).tolist() == [0.0, 0.0, 0.0, 7.0]


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3, 100])
@pytest.mark.parametrize("scale", [2.0**1000, 2.0**-1000])
def test_lp_pool_of_numbers_whose_powers_overflow(norm_type, scale):
    """A norm grows with x, and its gradient does not."""
    x, dout = normal(2, 3, 8), normal(2, 3, 3, seed=1)
    options = {"stride": 2, "padding": 0}
    np.testing.assert_allclose(
        lp_pool(x * scale, norm_type, 3, **options) / scale, lp_pool(x, norm_type, 3, **options), rtol=1e-12
    )
    np.testing.assert_allclose(
        lp_pool_backward(dout, x * scale, norm_type, 3, **options),
        lp_pool_backward(dout, x, norm_type, 3, **options),
        rtol=1e-11,
    )


def test_huge_and_tiny_numbers_in_one_window_of_lp_pool():
    x, dout = np.array([1e300, -1e-300, 1e-300, -1e-300]), np.array([3.0, 5.0])
    np.testing.assert_allclose(lp_pool(x, 2, (2,)), [1e300, math.sqrt(2) * 1e-300], rtol=1e-15)
    slopes = [1.0, 0.0, math.sqrt(0.5), -math.sqrt(0.5)]
    np.testing.assert_allclose(lp_pool_backward(dout, x, 2, (2,)), np.repeat(dout, 2) * slopes, rtol=1e-15)


def test_a_high_norm_is_the_maximum_and_a_first_norm_the_sum():
    x = normal(2, 2, 9)
    np.testing.assert_allclose(lp_pool(x, 1e6, 3), max_pool(np.abs(x), 3), rtol=1e-5)
    np.testing.assert_allclose(lp_pool(x, 1, 3), avg_pool(np.abs(x), 3, divisor_override=1), rtol=1e-14)


@given(case=strategies.lp_pool(), seed=st.integers(0, 1000))
def test_nan_reaches_the_windows_of_lp_pool_that_hold_it(case, seed):
    """Poison one element of x, and then one of dout: nothing else changes a bit."""
    (x, norm_type, kernel), options, *_ = case
    out = lp_pool(x, norm_type, kernel, **options)
    assume(out.size)
    rng = np.random.default_rng(seed)
    dout = rng.normal(size=out.shape)
    dx = lp_pool_backward(dout, x, norm_type, kernel, **options)
    unit_x, unit_dout = np.zeros(x.shape), np.zeros(out.shape)
    unit_x[tuple(rng.integers(n) for n in x.shape)] = 1.0
    unit_dout[tuple(rng.integers(n) for n in out.shape)] = 1.0
    holds = oracles.lp_pool(None, unit_x, 1, kernel, **options)[0] > 0
    read = oracles.lp_pool(unit_dout, np.ones(x.shape), 1, kernel, **options)[1] > 0

    poisoned = np.where(unit_x > 0, np.nan, x)
    dirty = lp_pool(poisoned, norm_type, kernel, **options)
    np.testing.assert_array_equal(np.isnan(dirty), holds)
    assert dirty[~holds].tobytes() == out[~holds].tobytes()
    meets = oracles.lp_pool(holds.astype(float), np.ones(x.shape), 1, kernel, **options)[1] > 0
    dirty = lp_pool_backward(dout, poisoned, norm_type, kernel, **options)
    if norm_type != 1:  # whose gradient is a sign, whatever the norm
        np.testing.assert_array_equal(np.isnan(dirty), meets)
    assert dirty[~meets].tobytes() == dx[~meets].tobytes()
    dirty = lp_pool_backward(np.where(unit_dout > 0, np.nan, dout), x, norm_type, kernel, **options)
    np.testing.assert_array_equal(np.isnan(dirty), read)
    assert dirty[~read].tobytes() == dx[~read].tobytes()


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3])
def test_lp_pool_of_infinities(norm_type):
    x = np.array([1.0, np.inf, -np.inf, np.inf, np.nan, np.inf, 3.0, 0.0])
    np.testing.assert_array_equal(lp_pool(x, norm_type, (2,)), [np.inf, np.inf, np.nan, 3.0])
    dx = lp_pool_backward(np.array([2.0, 3.0, 4.0, 5.0]), x, norm_type, (2,))
    np.testing.assert_allclose(dx[6:], [5.0, 0.0], rtol=1e-15)


@pytest.mark.parametrize("function", [lp_pool, avg_pool, max_pool])
def test_pooling_an_empty_batch(function):
    arguments = (2,) if function is lp_pool else ()
    out = function(np.ones((0, 3, 5)), *arguments, 2, padding=1)
    assert out.shape == (0, 3, 3)
    backward = getattr(refimpl, f"{function.__name__}_backward")
    assert backward(out, np.ones((0, 3, 5)), *arguments, 2, padding=1).shape == (0, 3, 5)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("p", [1e-50, 1e50])
def test_exponents_beyond_the_dtype(dtype, p):
    """Of a single element other than 0 the norm is its size, whatever the exponent."""
    x = np.array([[0.0, 0.0, -3.0, 0.0]], dtype=dtype)
    np.testing.assert_array_equal(refimpl.lp_pool(x, p, (2,)), [[0.0, 3.0]])
    np.testing.assert_array_equal(
        refimpl.lp_pool_backward(np.ones((1, 2), dtype=dtype), x, p, (2,)), [[0.0, 0.0, -1.0, 0.0]]
    )


def test_a_tiny_element_beside_a_huge_one():
    """For p below 1 the gradient of the tiny one is huge, but no inf: (1e152 / 5e-324) ** 0.5."""
    x = np.array([[5e-324, 1e152]])
    dx = refimpl.lp_pool_backward(np.array([[1.0]]), x, 0.5, (2,))
    np.testing.assert_allclose(dx, [[(1e152**0.5) / (5e-324**0.5), 1.0]], rtol=1e-12)
    np.testing.assert_array_equal(refimpl.lp_pool_backward(np.array([[0.0]]), x, 0.5, (2,)), [[0.0, 0.0]])


@pytest.mark.parametrize(
    ("dtype", "x", "p", "expected"),
    [
        ("float64", [1e305] * 4, 0.1, [4.0**9] * 4),
        ("float32", [1e35] * 4, 0.1, [4.0**9] * 4),
        ("float64", [5e-324, 1e-323, 5e-324], 0.5, [2 + 2**0.5, 1 + 2**0.5, 2 + 2**0.5]),
        ("float64", [3e300, 4e300], 2, [0.6, 0.8]),
        ("float64", [3e-300, 4e-300], 3, [9 / 91 ** (2 / 3), 16 / 91 ** (2 / 3)]),
    ],
)
def test_the_gradient_of_huge_and_tiny_elements_is_that_of_plain_ones(dtype, x, p, expected):
    """By definition (|x| / norm) ** (p - 1), which does not depend on the unit of x."""
    dx = lp_pool_backward(np.ones(1, dtype), np.array(x, dtype), p, (len(x),))
    np.testing.assert_allclose(dx, expected, rtol=1e-5 if dtype == "float32" else 1e-12)
