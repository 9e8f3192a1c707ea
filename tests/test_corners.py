"""Corners that are legal: windows without the query's own token, alignment at the ends, no features, no pixels."""

import numpy as np
import pytest

import refimpl
from refimpl import textbook
from refimpl.backend import to_numpy
from refimpl.testing import check_gradients

ATTENTION, ATTENTION_BACKWARD = refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("window", [(3, -1), (-2, 4), (None, -3), (-1, None), (-2, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_without_the_own_token(backend, window, is_causal):
    query, key, value = drawn(2, 3, 40, 4), drawn(2, 3, 50, 4, seed=1), drawn(2, 3, 50, 4, seed=2)
    i, j = np.arange(40)[:, None], np.arange(50)[None, :]
    left, right = (np.inf if side is None else side for side in window)
    mask = (j >= i + 2 - left) & (j <= i + 2 + right)
    if is_causal:
        mask &= j <= i + 2
    given = [backend.array(a) for a in (query, key, value)]
    got = ATTENTION(*given, window=window, is_causal=is_causal, query_offset=2)
    np.testing.assert_allclose(to_numpy(got), ATTENTION(query, key, value, mask=mask), rtol=1e-12, atol=1e-14)
    due = textbook.scaled_dot_product_attention(query, key, value, window=window, is_causal=is_causal, query_offset=2)
    np.testing.assert_allclose(to_numpy(got), due, rtol=1e-12, atol=1e-14)
    if backend.name == "numpy":
        check_gradients(ATTENTION, ATTENTION_BACKWARD, query, key, value, window=window, is_causal=is_causal)


@pytest.mark.parametrize("lengths", [{}, {"key_lengths": np.array([7, 3])}, {"query_lengths": np.array([4, 0])}])
def test_aligned_at_the_ends(backend, lengths):
    query, key, value = drawn(2, 3, 5, 4), drawn(2, 3, 9, 4, seed=1), drawn(2, 3, 9, 4, seed=2)
    both = {"key_lengths": np.array([9, 9]), "query_lengths": np.array([5, 5])} | lengths
    offset = both["key_lengths"] - both["query_lengths"]
    given = [backend.array(a) for a in (query, key, value)]
    moved = {name: backend.array(a) for name, a in lengths.items()}
    due = ATTENTION(query, key, value, is_causal=True, query_offset=offset, **lengths)
    got = ATTENTION(*given, is_causal=True, query_offset="end", **moved)
    np.testing.assert_allclose(to_numpy(got), due, rtol=1e-12, atol=1e-14)
    by_textbook = textbook.scaled_dot_product_attention(
        query, key, value, is_causal=True, query_offset="end", **lengths
    )
    np.testing.assert_allclose(by_textbook, due, rtol=1e-12, atol=1e-14)
    dout = drawn(2, 3, 5, 4, seed=3)
    found = ATTENTION_BACKWARD(backend.array(dout), *given, is_causal=True, query_offset="end", **moved)
    expected = ATTENTION_BACKWARD(dout, query, key, value, is_causal=True, query_offset=offset, **lengths)
    for got, due in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(to_numpy(got), due, rtol=1e-12, atol=1e-14)


def test_multi_head_attention_aligned_at_the_ends():
    query, key = drawn(2, 3, 4), drawn(2, 7, 4, seed=1)
    got = refimpl.multi_head_attention(query, key, key, num_heads=2, is_causal=True, query_offset="end")
    due = refimpl.multi_head_attention(query, key, key, num_heads=2, is_causal=True, query_offset=4)
    np.testing.assert_array_equal(got, due)
    got = refimpl.multi_head_attention(
        query, key, key, num_heads=2, is_causal=True, query_offset="end", add_zero_attn=True
    )
    due = refimpl.multi_head_attention(query, key, key, num_heads=2, is_causal=True, query_offset=4, add_zero_attn=True)
    np.testing.assert_array_equal(got, due)


def test_no_features(backend):
    """All scores are 0: each query takes the mean of the values that it sees."""
    query, key, value, dout = drawn(2, 3, 0), drawn(2, 3, 0), drawn(2, 3, 2), drawn(2, 3, 2, seed=1)
    given = [backend.array(a) for a in (query, key, value)]
    due = np.cumsum(value, axis=-2) / np.arange(1, 4)[:, None]
    np.testing.assert_allclose(to_numpy(ATTENTION(*given, is_causal=True)), due, rtol=1e-13)
    grads = ATTENTION_BACKWARD(backend.array(dout), *given, is_causal=True)
    assert tuple(grads.dquery.shape) == tuple(grads.dkey.shape) == (2, 3, 0)
    shares = np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None]
    np.testing.assert_allclose(to_numpy(grads.dvalue), shares.T @ dout, rtol=1e-13)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spatial", [(0,), (0, 4), (4, 0), (0, 0, 2)])
def test_a_convolution_of_padding_alone(backend, spatial, groups):
    x, weight, bias = np.zeros((2, 3, *spatial)), drawn(6, 3 // groups, *(2 for _ in spatial)), drawn(6, seed=1)
    given = [backend.array(a) for a in (x, weight, bias)]
    out = to_numpy(refimpl.conv(*given, padding=1, groups=groups))
    assert out.shape == (2, 6, *(n + 1 for n in spatial))
    np.testing.assert_array_equal(out, np.broadcast_to(bias.reshape(6, *(1 for _ in spatial)), out.shape))
    dout = drawn(*out.shape, seed=2)
    grads = refimpl.conv_backward(backend.array(dout), *given, padding=1, groups=groups)
    assert tuple(grads.dx.shape) == x.shape
    np.testing.assert_array_equal(to_numpy(grads.dweight), np.zeros_like(weight))
    axes = (0, *range(2, dout.ndim))
    np.testing.assert_allclose(to_numpy(grads.dbias), dout.sum(axis=axes), rtol=1e-12)
    np.testing.assert_array_equal(textbook.conv(x, weight, bias, padding=1, groups=groups), out)


@pytest.mark.parametrize("padding", ["same", "same_lower"])
@pytest.mark.parametrize(("kernel", "stride", "extra"), [(3, 2, 1), (4, 3, 2), (2, 3, 2), (5, 2, 1)])
def test_transposed_same_with_output_padding(padding, kernel, stride, extra):
    """ONNX: total padding = stride * (size - 1) + output_padding + extent - size * stride."""
    x, weight = drawn(1, 2, 5), drawn(2, 3, kernel, seed=1)
    total = max(0, stride * 4 + extra + kernel - 5 * stride)
    low = total // 2 if padding == "same" else total - total // 2
    full = refimpl.conv_transpose(x, weight, stride=stride)
    full = np.pad(full, ((0, 0), (0, 0), (0, stride)))
    got = refimpl.conv_transpose(x, weight, stride=stride, padding=padding, output_padding=extra)
    np.testing.assert_allclose(got, full[..., low : low + 5 * stride], rtol=1e-12, atol=1e-14)
    check_gradients(
        refimpl.conv_transpose, refimpl.conv_transpose_backward, x, weight, stride=stride, padding=padding,
        output_padding=extra,
    )  # fmt: skip
