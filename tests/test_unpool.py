"""Unpooling against loops, as the inverse of pooling, and in the corners: duplicates, NaN, indices out of range."""

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import normal, ramp

import refimpl
from refimpl import max_pool, max_pool_backward, max_unpool, max_unpool_backward
from refimpl.testing import check_gradients, strategies


@given(case=strategies.max_unpool(values="integers"), holes=st.sampled_from([0.0, 0.3]))
def test_agrees_with_loops(backend, case, holes):
    """Duplicates included: the last in row-major order wins, and takes the gradient. NaN is a value like any other."""
    (x, indices, kernel), options, *_ = case
    x[np.random.default_rng(0).random(x.shape) < holes] = np.nan
    arrays = backend.arrays((x, indices))
    out = max_unpool(*arrays, kernel, **options)
    dout = ramp(*out.shape)
    dx = max_unpool_backward(backend.array(dout), *arrays, kernel, **options)
    assert backend.owns(out)
    assert backend.owns(dx)
    expected_out, expected_dx = oracles.max_unpool(dout, x, indices, kernel, **options)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(out), expected_out)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(dx), expected_dx)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (2, 3), ((1, 3), (2, 3))])
def test_is_the_inverse_of_max_pool(backend, kernel, stride):
    """Where windows do not overlap, it undoes `max_pool`, and does what its backward does."""
    x = np.abs(normal(2, 3, 7, 9)) + 1.0
    options = {"stride": stride, "output_size": (7, 9)}
    out, indices = max_pool(backend.array(x), kernel, stride=stride, return_indices=True)
    dout = backend.array(normal(*out.shape, seed=1))
    np.testing.assert_array_equal(
        refimpl.backend.to_numpy(max_unpool(dout, indices, kernel, **options)),
        refimpl.backend.to_numpy(max_pool_backward(dout, backend.array(x), kernel, stride=stride)),
    )
    unpooled = max_unpool(out, indices, kernel, **options)
    kept = refimpl.backend.to_numpy(unpooled)
    assert np.count_nonzero(kept) == np.prod(out.shape)
    np.testing.assert_array_equal(kept[kept > 0], x[kept > 0])
    again = max_pool(unpooled, kernel, stride=stride)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(again), refimpl.backend.to_numpy(out))


def test_the_last_of_duplicates_wins_and_takes_the_gradient(backend):
    """A NaN that is overwritten is gone, and so is that of a dout where nothing was written."""
    x = np.array([[[np.nan, 2.0, 3.0, 4.0]]])
    indices = np.array([[[5, 1, 5, 1]]])
    out = max_unpool(*backend.arrays((x, indices)), 2)
    assert refimpl.backend.to_numpy(out).tolist() == [[[0, 4, 0, 0, 0, 3, 0, 0]]]
    dout = np.array([[[np.nan, 10.0, np.inf, 30.0, 40.0, 50.0, 60.0, 70.0]]])
    dx = max_unpool_backward(*backend.arrays((dout, x, indices)), 2)
    assert refimpl.backend.to_numpy(dx).tolist() == [[[0, 0, 50, 10]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_belongs(value):
    x, indices = np.array([[[1.0, value, 3.0]]]), np.array([[[0, 3, 4]]])
    np.testing.assert_array_equal(max_unpool(x, indices, 2), [[[1, 0, 0, value, 3, 0]]])
    dout = np.array([[[1.0, value, value, 4.0, value, value]]])
    np.testing.assert_array_equal(max_unpool_backward(dout, x, indices, 2), [[[1.0, 4.0, value]]])


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint64"])
def test_integers(backend, dtype):
    if dtype in backend.lacks:
        pytest.skip(f"{backend.name} does not compute with {dtype}")
    info = np.iinfo(dtype)
    x, indices = np.array([[[info.min, info.max, 3]]], dtype=dtype), np.array([[[5, 0, 2]]], dtype=np.int32)
    out = refimpl.backend.to_numpy(max_unpool(*backend.arrays((x, indices)), 2))
    assert out.dtype == dtype
    assert out.tolist() == [[[info.max, 0, 3, 0, 0, info.min]]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1, -(2**31)])
def test_indices_out_of_range(backend, dtype, bad):
    """The plane has 2 * 2 = 4 by 3 * 1 = 3 elements."""
    x, indices = normal(2, 1, 2, 3), np.zeros((2, 1, 2, 3), dtype=dtype)
    indices[1, 0, 1, 2] = 11
    options = {"kernel_size": (2, 1)}
    assert max_unpool(*backend.arrays((x, indices)), **options).shape == (2, 1, 4, 3)
    indices[1, 0, 1, 2] = bad
    dout = normal(2, 1, 4, 3)
    with pytest.raises(ValueError, match=r"^max_unpool: indices must .*12.*; got "):
        max_unpool(*backend.arrays((x, indices)), **options)
    with pytest.raises(ValueError, match=r"^max_unpool_backward: indices must .*12.*; got "):
        max_unpool_backward(*backend.arrays((dout, x, indices)), **options)


def test_the_output_size_is_less_than_a_stride_away():
    x, indices = ramp(1, 1, 3), np.array([[[2, 0, 1]]])
    assert max_unpool(x, indices, 3, stride=2).shape == (1, 1, 7)
    for size in (6, 7, 8):
        out = max_unpool(x, indices, 3, stride=2, output_size=(size,))
        np.testing.assert_array_equal(out[0, 0], [*x[0, 0, [1, 2, 0]], *[0.0] * (size - 3)])
    for size in (5, 9):
        with pytest.raises(ValueError, match=r"^max_unpool: output_size must .*; got "):
            max_unpool(x, indices, 3, stride=2, output_size=(size,))
    x, indices = np.ones((1, 1, 1)), np.zeros((1, 1, 1), dtype=np.int64)
    with pytest.raises(ValueError, match=r"^max_unpool: output_size.* must .*at least 1.*; got "):
        max_unpool(x, indices, 1, stride=3, output_size=(0,))
    with pytest.raises(ValueError, match=r"^max_unpool: .+ must .*; got "):
        max_unpool(x, indices, 1, padding=1)


def test_nothing_but_the_kernel_says_how_many_dimensions_there_are():
    x, indices = ramp(2, 3), np.array([[4, 0, 2], [5, 1, 3]])
    np.testing.assert_array_equal(
        max_unpool(x, indices, (2,)), np.stack([max_unpool(row, at, (2,)) for row, at in zip(x, indices, strict=True)])
    )
    assert max_unpool(x, indices, (2, 2)).shape == (4, 6)
    assert max_unpool(x[None, None], indices[None, None], 2, padding=[(1, 0), 0]).shape == (1, 1, 3, 6)


@given(case=strategies.max_unpool())
def test_the_gradient(case):
    arrays, options, *_ = case
    check_gradients(max_unpool, max_unpool_backward, *arrays, **options)


def test_an_empty_batch():
    x, indices = np.ones((0, 3, 5)), np.ones((0, 3, 5), dtype=np.int64)
    out = max_unpool(x, indices, 2)
    assert out.shape == (0, 3, 10)
    assert max_unpool_backward(out, x, indices, 2).shape == x.shape
