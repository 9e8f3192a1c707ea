"""Sums are as accurate in every layout as in a contiguous copy: of many numbers of one sign, where errors add up."""

import numpy as np
import pytest

import refimpl
from refimpl.testing import assert_matches

MANY = 1_000_000
EPS = 2.0**-24


def error(got, due):
    """Return the largest relative error in units of the roundoff of float32."""
    return np.max(np.abs(got.astype(np.float64) - due) / np.abs(due)) / EPS


def drawn(*shape):
    return np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)


LAYOUTS = {
    "contiguous": lambda a: a,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "transposed": lambda a: np.ascontiguousarray(np.swapaxes(a, -1, -2)).swapaxes(-1, -2),
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "batch last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0),
}
SHAPES = [(1, 3, 700, 700), (20000, 2, 5, 5), (2, 2, 300_000, 2), (2, 2, 2, 300_000), (300_000, 2, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_over_all(layout, shape):
    x = LAYOUTS[layout](drawn(*shape))
    due = x.mean(axis=(-2, -1), keepdims=True, dtype=np.float64)
    assert error(refimpl.adaptive_avg_pool(x, 1), due) < 12
    assert error(refimpl.avg_pool(x, shape[-2:]), due) < 12
    norm = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=(-2, -1), keepdims=True))
    assert error(refimpl.lp_pool(x, 2, shape[-2:]), norm) < 12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_bias(layout, shape):
    dout = LAYOUTS[layout](drawn(*shape))
    x, weight = np.zeros((shape[0], 1, *shape[2:]), np.float32), np.zeros((shape[1], 1, 1, 1), np.float32)
    got = refimpl.conv_backward(dout, x, weight, np.zeros(shape[1], np.float32)).dbias
    assert error(got, dout.sum(axis=(0, 2, 3), dtype=np.float64)) < 12


def test_the_gradient_of_a_projection():
    tokens = drawn(1, MANY // 4, 2)
    params = {"in_proj_weight": np.eye(2, dtype=np.float32).repeat(3, axis=0), "in_proj_bias": np.zeros(6, np.float32)}
    params |= {"out_proj.weight": np.eye(2, dtype=np.float32), "out_proj.bias": np.zeros(2, np.float32)}
    key = drawn(1, 1, 2)
    got = refimpl.multi_head_attention_backward(tokens, tokens, key, key, params, num_heads=1).dparams
    assert error(got["out_proj.bias"], tokens.sum(axis=(0, 1), dtype=np.float64)) < 12


def test_ones_that_a_running_sum_would_lose():
    ones = np.ones((1, 20_000_000, 2), np.float32).transpose(0, 2, 1)
    mean = refimpl.adaptive_avg_pool(ones, 1)
    assert (mean == 1).all()
    assert_matches(mean, refimpl.adaptive_avg_pool, ones, 1)


@pytest.mark.parametrize("size", [1000, 4096])
def test_windows_that_overlap(size):
    x = drawn(1, 1, size + 600)
    got = refimpl.avg_pool(x, size, stride=1)
    due = np.lib.stride_tricks.sliding_window_view(x[0, 0], size).mean(axis=-1, dtype=np.float64)
    assert error(got[0, 0], due) < 12


def test_what_many_share():
    """Gradients that are summed over dimensions along which an argument was broadcast."""
    rows = 1 << 18
    query, key, value, dout = drawn(rows, 1, 2) / 255, drawn(2, 2) / 255, drawn(2, 1), drawn(rows, 1, 1)
    got = refimpl.scaled_dot_product_attention_backward(dout, query, key, value)
    wide = (a.astype(np.float64) for a in (dout, query, key, value))
    due = refimpl.scaled_dot_product_attention_backward(*wide)
    assert error(got.dvalue, due.dvalue) < 12
    assert error(got.dkey, due.dkey) < 12


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2), -1, (-2, -1), ()])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other", "backwards"])
@pytest.mark.parametrize("keepdims", [False, True])
def test_the_primitive(axis, layout, keepdims):
    array = LAYOUTS[layout](np.random.default_rng(1).integers(-9, 9, (3, 700, 5)).astype(np.float32))
    got = refimpl.backend.of(array).sums(array, axis, keepdims)
    np.testing.assert_array_equal(got, array.sum(axis=axis, keepdims=keepdims))
