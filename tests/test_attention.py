"""Attention against loops, and in the corners: hidden pairs, empty rows, poison, long sequences."""

import itertools

import cases
import numpy as np
import oracles
import pytest
from cases import normal
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import scaled_dot_product_attention as attention
from refimpl import scaled_dot_product_attention_backward as attention_backward
from refimpl.testing import check_gradients


@given(case=cases.attention())
def test_agrees_with_loops(case):
    out, logsumexp = attention(*case.arrays, **case.options, return_logsumexp=True)
    expected_out, expected_logsumexp = oracles.attention(*case.arrays, **case.options)
    np.testing.assert_allclose(out, expected_out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, rtol=1e-12, atol=1e-13)


@given(case=cases.attention(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_hidden_pairs_never_matter(backend, case, value):
    """Poison in keys and values that no query sees, in queries that see nothing, and in biases that are hidden."""
    query, key, value_array = (array.copy() for array in case.arrays)
    batch = query.shape[:-3]
    scores = (*query.shape[:-1], key.shape[-2])
    visible = oracles.visible_pairs(scores, case.options)
    options = dict(case.options)
    poisoned = [query.copy(), key.copy(), value_array.copy()]
    poisoned[0][~visible.any(axis=-1)] = value
    kv_heads = key.shape[-3] if key.ndim > 2 else 1
    shared = visible.reshape(*batch, kv_heads, scores[-3] // kv_heads, *scores[-2:]) if query.ndim > 2 else visible
    unseen = ~shared.any(axis=(-3, -2) if query.ndim > 2 else -2)
    for array in poisoned[1:]:
        if array.shape[:-1] == unseen.shape:
            array[unseen] = value
    bias = options.get("bias")
    if bias is not None and bias.shape == scores:
        options["bias"] = np.where(visible, bias, np.where(np.isinf(bias), bias, value))
    dout = normal(*query.shape[:-1], value_array.shape[-1])
    dout_poisoned = np.where(visible.any(axis=-1)[..., None], dout, value)
    clean = attention_backward(*backend.arrays((dout, query, key, value_array)), **backend.arrays(case.options))
    dirty = attention_backward(*backend.arrays((dout_poisoned, *poisoned)), **backend.arrays(options))
    clean = [attention(*backend.arrays((query, key, value_array)), **backend.arrays(case.options)), *clean]
    dirty = [attention(*backend.arrays(tuple(poisoned)), **backend.arrays(options)), *dirty]
    for a, b in zip(clean, dirty, strict=True):
        if a is not None:
            assert refimpl.backend.to_numpy(a).tobytes() == refimpl.backend.to_numpy(b).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_visible_poison_reaches_exactly_what_depends_on_it(value):
    query, key, values, dout = normal(4, 3), normal(5, 3), normal(5, 2), normal(4, 2)
    values[2, 1] = value  # causal with offset 1: rows 1, 2 and 3 see key 2
    out = attention(query, key, values, is_causal=True, query_offset=1)
    expected = np.zeros((4, 2), dtype=bool)
    expected[1:, 1] = True
    np.testing.assert_array_equal(~np.isfinite(out), expected)
    np.testing.assert_array_equal(out[expected], np.full(3, value))
    grads = attention_backward(dout, query, key, values, is_causal=True, query_offset=1)
    assert np.isfinite(grads.dquery[0]).all()
    assert not np.isfinite(grads.dquery[1:]).any()
    assert not np.isfinite(grads.dkey).any()  # every key up to 4 is seen by row 3, whose scores all depend on it
    assert np.isfinite(grads.dvalue).all()


@pytest.mark.parametrize("tile_bytes", [1, 1 << 24])
def test_a_visible_nan_in_the_bias_reaches_its_row(backend, tile_bytes):
    """Also where query, key and value are finite, and another option hides other pairs."""
    query, key, values, dout = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(2, 3, 2)
    bias, mask = normal(2, 3, 5), np.ones((3, 5), dtype=bool)
    bias[1, 2, 0] = np.nan
    mask[:, 4] = False
    options = backend.arrays({"bias": bias, "mask": mask})
    with refimpl.backend.limits(tile_bytes=tile_bytes):
        out = refimpl.backend.to_numpy(attention(*backend.arrays((query, key, values)), **options))
        grads = attention_backward(*backend.arrays((dout, query, key, values)), **options)
    dquery, dkey, dvalue, dbias = (refimpl.backend.to_numpy(grad) for grad in grads[:4])
    row = np.zeros((2, 3), dtype=bool)
    row[1, 2] = True
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(row[..., None], out.shape))
    np.testing.assert_array_equal(np.isnan(dquery), np.broadcast_to(row[..., None], dquery.shape))
    np.testing.assert_array_equal(np.isnan(dbias), row[..., None] & mask)
    seen = row.any(axis=1)[:, None] & mask[2]
    np.testing.assert_array_equal(np.isnan(dkey), np.broadcast_to(seen[..., None], dkey.shape))
    np.testing.assert_array_equal(np.isnan(dvalue), np.broadcast_to(seen[..., None], dvalue.shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_query_reaches_only_the_keys_that_it_sees(value):
    query, x = np.array([[value], [1.0]]), np.array([[1.0], [2.0]])
    grads = attention_backward(np.ones((2, 1)), query, x, x, mask=np.eye(2, dtype=bool))
    clean = attention_backward(np.ones((2, 1)), np.ones((2, 1)), x, x, mask=np.eye(2, dtype=bool))
    for poisoned, expected in ((grads.dkey, clean.dkey), (grads.dvalue, clean.dvalue), (grads.dquery, clean.dquery)):
        assert not np.isfinite(poisoned[0]).any()
        np.testing.assert_array_equal(poisoned[1], expected[1])


def test_a_visible_zero_weight_meets_inf():
    """A weight that underflows to 0 is no hidden pair: 0 * inf is NaN."""
    query, key = np.array([[1000.0]]), np.array([[1000.0], [-1000.0], [0.0]])
    values = np.array([[1.0], [np.inf], [1.0]])
    assert np.isnan(attention(query, key, values, scale=1.0)).all()
    assert np.isnan(attention(query, key, values, scale=1.0, mask=np.array([True, True, False]))).all()
    assert attention(query, key, values, scale=1.0, mask=np.array([True, False, True])).tolist() == [[1.0]]


def test_scores_that_are_all_minus_infinity_by_themselves_are_not_hidden():
    query, key, values = np.array([[np.inf]]), np.array([[-1.0], [-2.0]]), np.ones((2, 1))
    assert np.isnan(attention(query, key, values)).all()
    assert np.isnan(attention(query, key, values, mask=np.ones((1, 2), dtype=bool))).all()


def test_a_query_that_sees_no_key_gives_nothing(backend):
    query, key, values, dout = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(2, 3, 2)
    mask = np.ones((3, 5), dtype=bool)
    mask[1] = False
    out, logsumexp = attention(*backend.arrays((query, key, values)), mask=backend.array(mask), return_logsumexp=True)
    assert (refimpl.backend.to_numpy(out)[:, 1] == 0).all()
    assert (refimpl.backend.to_numpy(logsumexp)[:, 1] == -np.inf).all()
    grads = attention_backward(*backend.arrays((dout, query, key, values)), mask=backend.array(mask))
    assert (refimpl.backend.to_numpy(grads.dquery)[:, 1] == 0).all()
    assert np.isfinite(refimpl.backend.to_numpy(grads.dkey)).all()


def test_no_keys_and_no_queries():
    out, logsumexp = attention(normal(2, 3, 4), normal(2, 0, 4), normal(2, 0, 5), return_logsumexp=True)
    assert out.tolist() == np.zeros((2, 3, 5)).tolist()
    assert (logsumexp == -np.inf).all()
    grads = attention_backward(np.ones((2, 0, 5)), normal(2, 0, 4), normal(2, 3, 4), normal(2, 3, 5))
    assert grads.dkey.tolist() == np.zeros((2, 3, 4)).tolist()
    assert grads.dquery.shape == (2, 0, 4)


@pytest.mark.parametrize(("rows", "keys"), list(itertools.product([1, 3, 5], repeat=2)))
@pytest.mark.parametrize("offset", [0, -2, 2, "bottom-right"])
@pytest.mark.parametrize("window", [None, (0, 0), (1, None), (None, 1), (2, 1), (None, None)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bands_are_masks(rows, keys, offset, window, is_causal):
    offset = keys - rows if offset == "bottom-right" else offset
    query, key, values = normal(rows, 2), normal(keys, 2), normal(keys, 3)
    position, j = np.arange(rows)[:, None] + offset, np.arange(keys)
    left, right = window or (None, None)
    mask = np.ones((rows, keys), dtype=bool)
    mask &= (j <= position) | (not is_causal)
    mask &= (left is None) | (j >= position - (left or 0))
    mask &= (right is None) | (j <= position + (right or 0))
    expected = attention(query, key, values, mask=mask)
    np.testing.assert_allclose(
        attention(query, key, values, is_causal=is_causal, window=window, query_offset=offset), expected, rtol=1e-13
    )
    as_array = attention(query, key, values, is_causal=is_causal, window=window, query_offset=np.asarray(offset))
    np.testing.assert_allclose(as_array, expected, rtol=1e-13)


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63 - 1, 2**64 - 1, 10**30])
def test_numbers_beyond_every_integer_type_mean_what_they_say(huge):
    query, key, values = normal(3, 2), normal(4, 2), normal(4, 2)
    everything = attention(query, key, values)
    np.testing.assert_array_equal(attention(query, key, values, window=(huge, huge)), everything)
    np.testing.assert_array_equal(attention(query, key, values, is_causal=True, query_offset=huge), everything)
    assert (attention(query, key, values, is_causal=True, query_offset=-huge) == 0).all()
    if huge < 2**64:
        offset = np.asarray(huge, dtype=np.uint64 if huge >= 2**63 else None)
        np.testing.assert_array_equal(attention(query, key, values, is_causal=True, query_offset=offset), everything)
        assert (attention(query, key, values, window=(1, 1), query_offset=offset) == 0).all()


def test_small_integer_types_do_not_overflow():
    query, key, values = normal(3, 2), normal(300, 2), normal(300, 2)
    small = attention(query, key, values, window=(np.int8(100), np.int8(100)), query_offset=np.int8(100))
    np.testing.assert_array_equal(small, attention(query, key, values, window=(100, 100), query_offset=100))
    offset = np.asarray(100, dtype=np.int8)
    np.testing.assert_allclose(attention(query, key, values, window=(100, 100), query_offset=offset), small, rtol=1e-13)


def test_a_bias_of_minus_infinity_is_a_mask(backend):
    query, key, values, dout = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(2, 3, 2)
    mask = np.random.default_rng(0).random((2, 3, 5)) < 0.5
    mask[0, 1] = False
    arrays = backend.arrays((dout, query, key, values))
    by_mask = attention_backward(*arrays, mask=backend.array(mask))
    by_bias = attention_backward(*arrays, bias=backend.array(np.where(mask, 0.0, -np.inf)))
    for a, b in zip(by_mask[:3], by_bias[:3], strict=True):
        np.testing.assert_array_equal(refimpl.backend.to_numpy(a), refimpl.backend.to_numpy(b))
    assert (refimpl.backend.to_numpy(by_bias.dbias)[~mask] == 0).all()


def test_padding_of_keys_is_as_if_they_were_not_there():
    query, key, values = normal(2, 2, 3, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 4)
    out = attention(query, key, values, key_lengths=np.array([4, 6]), query_lengths=np.array([3, 1]))
    np.testing.assert_allclose(out[0], attention(query[0], key[0, :, :4], values[0, :, :4]), rtol=1e-13)
    np.testing.assert_allclose(out[1, :, :1], attention(query[1, :, :1], key[1], values[1]), rtol=1e-13)
    assert (out[1, :, 1:] == 0).all()


def test_shared_heads_are_repeated_heads():
    query, key, values = normal(6, 3, 4), normal(2, 5, 4), normal(2, 5, 4)
    shared = attention(query, key, values)
    np.testing.assert_allclose(shared, attention(query, key.repeat(3, axis=0), values.repeat(3, axis=0)), rtol=1e-13)
    np.testing.assert_allclose(attention(query, key[0], values[0]), attention(query, key[:1], values[:1]), rtol=1e-13)


def test_scores_of_any_size_do_not_overflow():
    query, key, values = 1e3 * normal(3, 4), 1e3 * normal(5, 4), normal(5, 2)
    out, logsumexp = attention(query, key, values, return_logsumexp=True)
    assert np.isfinite(out).all()
    assert np.isfinite(logsumexp).all()
    np.testing.assert_allclose(out, values[np.argmax(query @ key.T, axis=1)])


def test_the_gradient_where_tiles_cut_rows_and_heads():
    arrays = (normal(2, 4, 6, 3), normal(1, 2, 7, 3, seed=1), normal(2, 2, 7, 2, seed=2))
    for tile_bytes in (1, 400, 2000):
        with refimpl.backend.limits(tile_bytes=tile_bytes):
            check_gradients(attention, attention_backward, *arrays, bias=normal(4, 1, 7), is_causal=True)
