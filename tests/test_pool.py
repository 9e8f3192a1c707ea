"""Pooling against loops, and in the corners: ties, NaN, padding, overhanging windows."""

import cases
import numpy as np
import oracles
import pytest
from cases import ramp
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import avg_pool, avg_pool_backward, max_pool, max_pool_backward


@given(case=cases.max_pool(kind="integers"))
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


@given(case=cases.max_pool(kind="integers"), seed=st.integers(0, 1000))
def test_max_pool_takes_the_first_nan(backend, case, seed):
    x, *rest = case.arrays
    rng = np.random.default_rng(seed)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[rng.random(x.shape) < 0.2] = -np.inf
    out, indices = max_pool(backend.array(x), *rest, **case.options, return_indices=True)
    expected_out, expected_indices, _ = oracles.max_pool(None, x, *rest, **case.options)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(out), expected_out)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(indices), expected_indices)


@given(case=cases.avg_pool())
def test_avg_pool_agrees_with_loops(case):
    out = avg_pool(*case.arrays, **case.options)
    dout = ramp(*out.shape)
    expected_out, expected_dx = oracles.avg_pool(dout, *case.arrays, **case.options)
    np.testing.assert_allclose(out, expected_out, rtol=1e-13, atol=1e-13)
    dx = avg_pool_backward(dout, *case.arrays, **case.options)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-13, atol=1e-13)


@given(case=cases.avg_pool(kind="integers"))
def test_avg_pool_backward_is_its_adjoint(case):
    x = case.arrays[0]
    out = avg_pool(*case.arrays, **case.options)
    dout = ramp(*out.shape)
    assert np.sum(out * dout) == np.sum(x * avg_pool_backward(dout, *case.arrays, **case.options))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_max_pool_takes_integers(backend, dtype):
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
