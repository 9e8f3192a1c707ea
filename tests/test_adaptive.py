"""Adaptive pooling against loops, and in the corners: windows that overlap, ties, NaN, sizes that are kept."""

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from samples import normal, ramp

import refimpl
from refimpl import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    adaptive_max_pool,
    adaptive_max_pool_backward,
    avg_pool,
    max_pool,
)
from refimpl.testing import check_gradients, strategies

PAIRS = [(adaptive_avg_pool, adaptive_avg_pool_backward), (adaptive_max_pool, adaptive_max_pool_backward)]
each_pair = pytest.mark.parametrize(("f", "f_backward"), PAIRS, ids=["avg", "max"])


@given(case=strategies.adaptive_avg_pool())
def test_averages_agree_with_loops(backend, case):
    x, output_size = case.arrays
    out = adaptive_avg_pool(backend.array(x), output_size)
    dout = ramp(*out.shape)
    dx = adaptive_avg_pool_backward(backend.array(dout), backend.array(x), output_size)
    assert backend.owns(out)
    assert backend.owns(dx)
    expected_out, expected_dx = oracles.adaptive_avg_pool(dout, x, output_size)
    np.testing.assert_allclose(refimpl.backend.to_numpy(out), expected_out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(refimpl.backend.to_numpy(dx), expected_dx, rtol=1e-13, atol=1e-13)


@pytest.mark.slow_on_standins
@pytest.mark.parametrize("holes", [0.0, 0.3], ids=["ties", "nan"])
@given(case=strategies.adaptive_max_pool(values="integers"), seed=st.integers(0, 1000))
def test_maxima_agree_with_loops(backend, holes, case, seed):
    """Few different numbers make ties, of which the first wins; the first NaN wins over everything."""
    x, output_size = case.arrays
    rng = np.random.default_rng(seed)
    x[rng.random(x.shape) < holes] = np.nan
    x[rng.random(x.shape) < holes] = -np.inf
    out, indices = adaptive_max_pool(backend.array(x), output_size, return_indices=True)
    dout = ramp(*out.shape)
    expected_out, expected_indices, expected_dx = oracles.adaptive_max_pool(dout, x, output_size)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(out), expected_out)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(indices), expected_indices)
    assert refimpl.backend.to_numpy(indices).dtype == np.int64
    for given_indices in (None, indices):
        arrays = backend.arrays((dout, x))
        dx = adaptive_max_pool_backward(*arrays, output_size, return_indices=True, indices=given_indices)
        np.testing.assert_array_equal(refimpl.backend.to_numpy(dx), expected_dx)


def test_what_the_windows_are():
    """Windows of 5 into 3 are [0, 2), [1, 4), [3, 5): they overlap; of 2 into 3, [0, 1), [0, 2), [1, 2)."""
    x, dout = np.array([1.0, 10.0, 4.0, 6.0, 0.0]), np.array([6.0, 60.0, 600.0])
    assert adaptive_avg_pool(x, (3,)).tolist() == [5.5, 20 / 3, 3.0]
    assert adaptive_avg_pool_backward(dout, x, (3,)).tolist() == [3.0, 23.0, 20.0, 320.0, 300.0]
    assert adaptive_max_pool(x, (3,)).tolist() == [10.0, 10.0, 6.0]
    assert adaptive_max_pool_backward(dout, x, (3,)).tolist() == [0.0, 66.0, 0.0, 600.0, 0.0]
    assert adaptive_avg_pool(x[:2], (3,)).tolist() == [1.0, 5.5, 10.0]
    assert adaptive_avg_pool_backward(dout, x[:2], (3,)).tolist() == [36.0, 630.0]


def test_sizes_that_divide_make_ordinary_pooling():
    x = normal(2, 3, 6, 8)
    np.testing.assert_allclose(adaptive_avg_pool(x, (3, 2)), avg_pool(x, (2, 4)), rtol=1e-13, atol=1e-15)
    expected = max_pool(x, (2, 4), return_indices=True)
    for actual, reference in zip(adaptive_max_pool(x, (3, 2), return_indices=True), expected, strict=True):
        np.testing.assert_array_equal(actual, reference)


@each_pair
def test_none_keeps_a_size_and_an_int_means_every_spatial_dimension(f, f_backward):
    x, dout = normal(2, 3, 5, 6), normal(2, 3, 5, 4, seed=1)
    np.testing.assert_array_equal(f(x, (None, 4)), f(x, (5, 4)))
    np.testing.assert_array_equal(f_backward(dout, x, [None, 4]), f_backward(dout, x, (5, 4)))
    np.testing.assert_array_equal(f(x, (None, None)), x)
    np.testing.assert_array_equal(f(x, 4), f(x, (4, 4)))
    np.testing.assert_array_equal(f(x, (4,)), f(x.reshape(30, 6), (4,)).reshape(2, 3, 5, 4))


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint64"])
def test_maxima_of_integers(backend, dtype):
    if dtype in backend.lacks:
        pytest.skip(f"{backend.name} does not compute with {dtype}")
    info = np.iinfo(dtype)
    x = np.array([[[info.min, info.min, info.max, info.max - 1, info.min]]], dtype=dtype)
    out, indices = adaptive_max_pool(backend.array(x), 3, return_indices=True)
    assert refimpl.backend.to_numpy(out).tolist() == [[[info.min, info.max, info.max - 1]]]
    assert refimpl.backend.to_numpy(out).dtype == dtype
    assert refimpl.backend.to_numpy(indices).tolist() == [[[0, 2, 3]]]


@each_pair
@pytest.mark.parametrize("output_size", [2, (3, 1), (7, 9), (None, 4)])
def test_the_gradient(f, f_backward, output_size):
    """Distinct numbers, so that the maximum has a gradient."""
    x = 0.1 * np.random.default_rng(0).permutation(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    check_gradients(f, f_backward, x, output_size)


@each_pair
@given(case=strategies.adaptive_max_pool(values="distinct"), seed=st.integers(0, 1000))
def test_nan_reaches_what_reads_it_and_changes_no_bit_elsewhere(f, f_backward, case, seed):
    x, output_size = case.arrays
    out = f(x, output_size)
    assume(out.size)
    rng = np.random.default_rng(seed)
    dout = rng.normal(size=out.shape)
    dx = f_backward(dout, x, output_size)
    unit_x, unit_dout = np.zeros(x.shape), np.zeros(out.shape)
    unit_x[tuple(rng.integers(n) for n in x.shape)] = 1.0
    unit_dout[tuple(rng.integers(n) for n in out.shape)] = 1.0

    holds = oracles.adaptive_avg_pool(None, unit_x, output_size)[0] > 0
    dirty = f(np.where(unit_x > 0, np.nan, x), output_size)
    np.testing.assert_array_equal(np.isnan(dirty), holds)
    assert dirty[~holds].tobytes() == out[~holds].tobytes()

    of = oracles.adaptive_avg_pool if f is adaptive_avg_pool else oracles.adaptive_max_pool
    read = of(unit_dout, x, output_size)[-1] > 0
    dirty = f_backward(np.where(unit_dout > 0, np.nan, dout), x, output_size)
    np.testing.assert_array_equal(np.isnan(dirty), read)
    assert dirty[~read].tobytes() == dx[~read].tobytes()


def test_infinities_of_averages():
    x = np.array([np.inf, 1.0, -np.inf, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(adaptive_avg_pool(x, (3,)), [np.inf, -np.inf, 3.5])
    np.testing.assert_array_equal(adaptive_avg_pool(x, (1,)), [np.nan])


@each_pair
def test_an_empty_batch(f, f_backward):
    x = np.ones((0, 3, 5))
    out = f(x, 4)
    assert out.shape == (0, 3, 4)
    assert f_backward(out, x, 4).shape == x.shape


@each_pair
@pytest.mark.parametrize("output_size", [0, -1, (3, 0), (None, -2)])
def test_an_output_has_at_least_one_element(f, f_backward, output_size):
    x = np.ones((1, 1, 4, 4))
    with pytest.raises(ValueError, match=rf"^{f.__name__}: output_size.* must .*at least 1.*; got "):
        f(x, output_size)
    with pytest.raises(ValueError, match=rf"^{f_backward.__name__}: output_size.* must .*at least 1.*; got "):
        f_backward(x, x, output_size)
