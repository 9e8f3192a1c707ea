"""Memory beyond arguments and results stays proportional to a tile, as tracemalloc sees it (NumPy reports to it)."""

import tracemalloc

import numpy as np
import pytest

import refimpl

TILE = 1 << 20
THREADS = 2


def extra(function, *arrays, **options):
    """Return the bytes at the peak of a call, beyond its arguments and results."""
    with refimpl.backend.limits(threads=THREADS, tile_bytes=TILE):
        tracemalloc.start()
        result = function(*arrays, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    results = result if isinstance(result, tuple) else (result,)
    return peak - sum(array.nbytes for array in results if array is not None)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_the_measure_sees_what_numpy_allocates():
    assert extra(lambda x: (x + 1).sum(keepdims=True), np.ones(1 << 20)) >= 8 << 20


def test_attention_never_holds_all_scores():
    length = 4096
    query = normal(1, length, 16)
    limit = 12 * TILE
    assert length * length * 8 > 10 * limit
    assert extra(refimpl.scaled_dot_product_attention, query, query, query) < limit
    assert extra(refimpl.scaled_dot_product_attention_backward, query, query, query, query) < limit
    assert extra(refimpl.scaled_dot_product_attention, query, query, query, is_causal=True) < limit
    assert extra(refimpl.scaled_dot_product_attention_backward, query, query, query, query, is_causal=True) < limit


@pytest.mark.parametrize("shape", [(128, 8, 32, 32), (1, 8, 512, 256)], ids=["many images", "one large image"])
def test_convolution_never_holds_all_columns(shape):
    x, weight = normal(*shape), normal(8, 8, 3, 3)
    columns = 9 * x.nbytes
    limit = 12 * TILE
    assert columns > 3 * limit
    assert extra(refimpl.conv, x, weight, padding=1) < limit
    assert extra(refimpl.conv_backward, x, x, weight, padding=1) < limit
    assert extra(refimpl.conv_transpose, x, weight, padding=1) < limit
    assert extra(refimpl.conv_transpose_backward, x, x, weight, padding=1) < limit


def test_what_lies_between_taps_far_apart_is_never_held():
    apart = 1 << 28
    options = {"stride": apart, "padding": apart, "dilation": apart}
    x, weight = np.arange(1.0, 5.0).reshape(1, 1, 4), np.array([[[2.0, 3.0]]])
    np.testing.assert_array_equal(refimpl.conv(x, weight, **options), [[[3.0, 2.0]]])
    assert extra(refimpl.conv, x, weight, **options) < TILE
    assert extra(refimpl.conv_backward, np.ones((1, 1, 2)), x, weight, **options) < TILE


def test_pooling_never_holds_a_copy():
    x = normal(16, 16, 64, 256)
    limit = 12 * TILE
    assert x.nbytes > 2 * limit
    for options in ({}, {"ceil_mode": True, "padding": 1, "stride": 2}):
        pooled = refimpl.max_pool(x, 2, **options).shape
        dout = normal(*pooled)
        assert extra(refimpl.max_pool, x, 2, return_indices=True, **options) < limit
        assert extra(refimpl.max_pool_backward, dout, x, 2, **options) < limit
        assert extra(refimpl.avg_pool, x, 2, **options) < limit
        assert extra(refimpl.avg_pool_backward, dout, x, 2, **options) < limit
