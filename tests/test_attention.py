"""Attention against loops, and in the corners: hidden pairs, empty rows, poison, long sequences."""

import itertools

import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import normal

import refimpl
from refimpl import attention_weights, attention_weights_backward
from refimpl import scaled_dot_product_attention as attention
from refimpl import scaled_dot_product_attention_backward as attention_backward
from refimpl.testing import check_gradients, strategies


def numbers(*arrays):
    return [None if array is None else refimpl.backend.to_numpy(array) for array in arrays]


def assert_close(actual, expected):
    """Compare arrays one by one; None is equal to None."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.tobytes() == b.tobytes()


@pytest.mark.parametrize("values", ["normal", "nonfinite"])
@given(data=st.data(), alone=st.booleans())
def test_agrees_with_loops(values, data, alone):
    """Forward and backward; `dlogsumexp` stands on its own, too. NaN and inf reach just what depends on them."""
    case = data.draw(strategies.scaled_dot_product_attention(values=values))
    arrays, options, *_ = case
    out, logsumexp = attention(*arrays, **options, return_logsumexp=True)
    dout, dlogsumexp = np.zeros(out.shape) if alone else normal(*out.shape), normal(*logsumexp.shape, seed=1)
    grads = attention_backward(dout, *arrays, **options, dlogsumexp=dlogsumexp)
    expected = oracles.attention(*arrays, dout=dout, dlogsumexp=dlogsumexp, **options)
    assert_close((out, logsumexp, *grads), (*expected[:2], *expected[3:]))


@pytest.mark.parametrize("values", ["normal", "nonfinite"])
@given(data=st.data(), with_logsumexp=st.booleans())
def test_weights_agree_with_loops(backend, values, data, with_logsumexp):
    case = data.draw(strategies.attention_weights(values=values))
    arrays, options = backend.arrays(case[:2])
    weights, logsumexp = attention_weights(*arrays, **options, return_logsumexp=True)
    assert backend.owns(weights)
    dweights, dlogsumexp = normal(*weights.shape), normal(*logsumexp.shape, seed=1) if with_logsumexp else None
    given_d = backend.arrays((dweights, dlogsumexp))
    grads = attention_weights_backward(given_d[0], *arrays, **options, dlogsumexp=given_d[1])
    expected = oracles.attention(*case.arrays, dweights=dweights, dlogsumexp=dlogsumexp, **case.options)
    assert_close(numbers(weights, logsumexp), (expected.weights, expected.logsumexp))
    assert grads._fields == ("dquery", "dkey", "dbias", "dsink")
    assert_close(numbers(*grads), (expected.dquery, expected.dkey, expected.dbias, expected.dsink))


def poison(arrays, options, value):
    """Put a value wherever it cannot matter; returns arrays, options, and which pairs are visible.

    In keys and values that no query sees, in queries that see nothing, and in biases that are hidden.
    """
    visible = oracles.visible_pairs(oracles.scores_of(*arrays), options)
    taking_part = oracles.touched(visible, *arrays)
    poisoned = [np.where(rows[..., None], array, value) for array, rows in zip(arrays, taking_part, strict=True)]
    bias = options.get("bias")
    if bias is not None:
        hidden = ~oracles.any_to(visible, bias.shape) & (bias != -np.inf)  # -inf is what hides
        options = options | {"bias": np.where(hidden, value, bias)}
    return tuple(poisoned), options, visible


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sink": np.array([1.0])}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0], ids=["modest", "mixed", "large"])
def test_many_rows_agree_with_loops(size, options):
    """Tiles in which the softmax may do without the largest score: of all rows, of some, of none."""
    query, key, value = normal(140, 4, seed=1), normal(150, 4, seed=2), normal(150, 3, seed=3)
    query *= np.linspace(0.1, size, 140)[:, None]
    query[:2] = key[:1] * [[-8.0], [8.0]] / np.square(key[0]).sum()  # alone with this key, a row has no other score
    dout, dlogsumexp = normal(140, 3), normal(140)
    result = attention(query, key, value, **options, return_logsumexp=True)
    grads = attention_backward(dout, query, key, value, **options, dlogsumexp=dlogsumexp)
    expected = oracles.attention(query, key, value, dout=dout, dlogsumexp=dlogsumexp, **options)
    for a, b in zip((*result, *grads), (*expected[:2], *expected[3:]), strict=True):
        assert (a is None) == (b is None)
        assert a is None or np.allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": 20}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e3])
def test_a_query_among_many_is_alone(value, options):
    """Whatever it holds, no bit of another changes."""
    query, key, values = (normal(140, 4, seed=seed) for seed in range(3))
    other = query.copy()
    other[7] = value
    for clean, dirty in zip(
        attention(query, key, values, **options, return_logsumexp=True),
        attention(other, key, values, **options, return_logsumexp=True),
        strict=True,
    ):
        assert_same_bits([np.delete(clean, 7, axis=0)], [np.delete(dirty, 7, axis=0)])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e3])
@pytest.mark.parametrize("count", [150, 1024])
def test_hidden_keys_never_matter_to_many_rows(count, value):
    query, key, values = normal(140, 4), normal(count, 4, seed=1), normal(count, 3, seed=2)
    mask = np.arange(count) < np.where(np.arange(140) < 130, count - 9, count)[:, None]
    clean = attention(query, key, values, mask=mask, return_logsumexp=True)
    key[-9:], values[-9:] = value, value
    dirty = attention(query, key, values, mask=mask, return_logsumexp=True)
    assert_same_bits([a[:130] for a in clean], [a[:130] for a in dirty])


@given(case=strategies.scaled_dot_product_attention(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_hidden_pairs_never_matter(backend, case, value):
    *dirty, visible = poison(*case[:2], value)
    sees = visible.any(axis=-1)
    dout, dlogsumexp = normal(*sees.shape, case.arrays[2].shape[-1]), normal(*sees.shape, seed=1)
    results = []
    for (arrays, options), hidden in ((case[:2], 0.0), (dirty, value)):
        do = np.where(sees[..., None], dout, hidden)
        dl = dlogsumexp if "sink" in options else np.where(sees, dlogsumexp, hidden)  # every query sees the sink
        do, dl, arrays, options = backend.arrays((do, dl, arrays, options))
        grads = attention_backward(do, *arrays, **options, dlogsumexp=dl)
        results.append(numbers(*attention(*arrays, **options, return_logsumexp=True), *grads))
    assert_same_bits(*results)


@given(case=strategies.attention_weights(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_hidden_pairs_never_matter_to_weights(backend, case, value):
    *dirty, visible = poison(*case[:2], value)
    dweights = normal(*visible.shape)
    results = []
    for (arrays, options), hidden in ((case[:2], 0.0), (dirty, value)):
        dw, arrays, options = backend.arrays((np.where(visible, dweights, hidden), arrays, options))
        weights = attention_weights(*arrays, **options, return_logsumexp=True)
        results.append(numbers(*weights, *attention_weights_backward(dw, *arrays, **options)))
    assert_same_bits(*results)


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


@pytest.mark.slow
def test_the_gradient_where_tiles_cut_rows_and_heads():
    arrays = (normal(2, 4, 6, 3), normal(1, 2, 7, 3, seed=1), normal(2, 2, 7, 2, seed=2))
    for tile_bytes in (400, 2000):
        with refimpl.backend.limits(tile_bytes=tile_bytes):
            check_gradients(attention, attention_backward, *arrays, bias=normal(4, 1, 7), is_causal=True)


def out_and_logsumexp(query, key, value, **options):
    """Both results of attention as one, to differentiate them together; the logsumexp of no key as 0."""
    out, logsumexp = attention(query, key, value, **options, return_logsumexp=True)
    return np.concatenate([out, np.where(np.isinf(logsumexp), 0.0, logsumexp)[..., None]], axis=-1)


def out_and_logsumexp_backward(dout, *arrays, **options):
    return attention_backward(dout[..., :-1], *arrays, **options, dlogsumexp=dout[..., -1])


EVERYTHING = {
    "bias": normal(4, 1, 6),
    "mask": np.random.default_rng(0).random((2, 1, 5, 6)) < 0.7,
    "is_causal": True,
    "window": (4, None),
    "query_offset": np.array([[2], [0], [3]]),
    "query_lengths": np.array([5, 3]),
    "key_lengths": np.array([[6], [5], [4]]),
    "sink": normal(4),
    "scale": 0.7,
    "softcap": 1.5,
}
DROPOUT = {"dropout_mask": np.random.default_rng(1).random((4, 5, 6)) < 0.6, "dropout_p": 0.4}
# Grouped heads, and batch dimensions (3, 2) of which each array lacks one.
SHARED = (normal(3, 1, 4, 5, 3), normal(2, 2, 6, 3, seed=1), normal(1, 2, 2, 6, 2, seed=2))


@pytest.mark.parametrize(
    ("left_out", "tile_bytes"), [(None, 4000), (None, 1 << 22), ("sink", 1 << 22), ("softcap", 1 << 22)]
)
def test_the_gradient_of_everything_together(left_out, tile_bytes):
    options = {name: option for name, option in (EVERYTHING | DROPOUT).items() if name != left_out}
    with refimpl.backend.limits(tile_bytes=tile_bytes):
        check_gradients(out_and_logsumexp, out_and_logsumexp_backward, *SHARED, **options)


def test_everything_together_agrees_with_loops(backend):
    arrays, options = backend.arrays((SHARED, EVERYTHING | DROPOUT))
    out, logsumexp = attention(*arrays, **options, return_logsumexp=True)
    dout, dlogsumexp = normal(*out.shape), normal(*logsumexp.shape, seed=1)
    grads = attention_backward(backend.array(dout), *arrays, **options, dlogsumexp=backend.array(dlogsumexp))
    assert all(backend.owns(array) for array in (out, logsumexp, *grads))
    expected = oracles.attention(*SHARED, dout=dout, dlogsumexp=dlogsumexp, **EVERYTHING, **DROPOUT)
    assert_close(numbers(out, logsumexp, *grads), (*expected[:2], *expected[3:]))


def test_the_gradient_of_the_weights_with_everything_together():
    check_gradients(attention_weights, attention_weights_backward, *SHARED[:2], **EVERYTHING)


def test_the_gradient_of_the_logsumexp_by_the_bias_is_the_weights():
    query, key, values, bias = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(2, 3, 5)
    options = {"bias": bias, "is_causal": True, "query_offset": 1, "sink": normal(2)}
    weights, dlogsumexp = attention_weights(query, key, **options), normal(2, 3, seed=1)
    grads = attention_backward(np.zeros((2, 3, 2)), query, key, values, **options, dlogsumexp=dlogsumexp)
    np.testing.assert_allclose(grads.dbias, dlogsumexp[..., None] * weights, rtol=1e-13)
    np.testing.assert_allclose(grads.dsink, np.sum(dlogsumexp * (1 - weights.sum(axis=-1)), axis=-1), rtol=1e-12)
    assert (grads.dvalue == 0).all()


def test_attention_is_its_weights_times_the_values():
    query, key, values = normal(4, 3, 4), normal(2, 5, 4), normal(2, 5, 2)
    options = {"mask": np.random.default_rng(0).random((3, 5)) < 0.6, "sink": normal(4), "softcap": 0.5}
    weights, logsumexp = attention_weights(query, key, **options, return_logsumexp=True)
    out, expected = attention(query, key, values, **options, return_logsumexp=True)
    np.testing.assert_array_equal(logsumexp, expected)
    np.testing.assert_allclose(weights @ values.repeat(2, axis=0), out, rtol=1e-13, atol=1e-15)
    keep = np.random.default_rng(1).random((4, 3, 5)) < 0.6
    dropped = weights * keep / 0.75
    out, logsumexp = attention(query, key, values, **options, dropout_mask=keep, dropout_p=0.25, return_logsumexp=True)
    np.testing.assert_array_equal(logsumexp, expected)
    np.testing.assert_allclose(dropped @ values.repeat(2, axis=0), out, rtol=1e-13, atol=1e-15)


def test_a_sink_is_a_key_without_a_value():
    """A key of zeros with a value of zeros, whose bias is the sink, does the same."""
    query, key, values, sink = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(2)
    dout, dlogsumexp = normal(2, 3, 2, seed=1), normal(2, 3, seed=2)
    longer = [np.concatenate([array, np.zeros((2, 1, array.shape[-1]))], axis=1) for array in (key, values)]
    bias = np.concatenate([np.zeros((2, 3, 5)), np.broadcast_to(sink[:, None, None], (2, 3, 1))], axis=-1)
    expected = attention(query, *longer, bias=bias, return_logsumexp=True)
    assert_close(attention(query, key, values, sink=sink, return_logsumexp=True), expected)
    grads = attention_backward(dout, query, key, values, sink=sink, dlogsumexp=dlogsumexp)
    expected = attention_backward(dout, query, *longer, bias=bias, dlogsumexp=dlogsumexp)
    assert_close(grads[:3], (expected.dquery, expected.dkey[:, :5], expected.dvalue[:, :5]))
    np.testing.assert_allclose(grads.dsink, expected.dbias[..., 5].sum(axis=-1), rtol=1e-12)


@pytest.mark.parametrize("value", [0.5, np.inf, np.nan])
@pytest.mark.parametrize("hides", ["no key", "mask", "band"])
def test_a_query_that_sees_the_sink_alone(backend, hides, value):
    """Its output is 0 and its logsumexp the sink, which takes all of `dlogsumexp` and nothing of `dout`."""
    keys = 0 if hides == "no key" else 5
    query, key, values, sink = normal(2, 3, 4), normal(2, keys, 4), normal(2, keys, 2), np.array([value, 2.0])
    dout, dlogsumexp = np.full((2, 3, 2), np.nan), normal(2, 3, seed=1)
    options = {"is_causal": True, "query_offset": -3} if hides == "band" else {"mask": np.zeros((3, keys), dtype=bool)}
    arrays, options = backend.arrays(((query, key, values), options | {"sink": sink}))
    out, logsumexp = numbers(*attention(*arrays, **options, return_logsumexp=True))
    np.testing.assert_array_equal(out, np.zeros((2, 3, 2)))
    np.testing.assert_array_equal(logsumexp, np.broadcast_to(sink[:, None], (2, 3)))
    grads = attention_backward(backend.array(dout), *arrays, **options, dlogsumexp=backend.array(dlogsumexp))
    *others, dsink = numbers(*grads[:3], grads.dsink)
    for gradient, array in zip(others, (query, key, values), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(array.shape))
    np.testing.assert_allclose(dsink, dlogsumexp.sum(axis=-1), rtol=1e-13)
    alone = attention_backward(backend.array(dout), *arrays, **options)
    np.testing.assert_array_equal(numbers(alone.dsink)[0], np.zeros(2))


@pytest.mark.parametrize("band", [False, True])
def test_a_sink_of_minus_infinity_is_none(band):
    """Also for a query that sees no key, because of a mask or because of where it stands."""
    query, key, values, dout = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 2), normal(2, 3, 2, seed=1)
    mask = np.random.default_rng(0).random((2, 3, 5)) < 0.5
    mask[0, 1] = False
    options = {"is_causal": True, "query_offset": -1} if band else {"mask": mask}
    sink, dlogsumexp = np.full(2, -np.inf), normal(2, 3, seed=2)
    with refimpl.backend.limits(tile_bytes=1):
        expected = attention(query, key, values, **options, return_logsumexp=True)
        assert_close(attention(query, key, values, **options, sink=sink, return_logsumexp=True), expected)
        grads = attention_backward(dout, query, key, values, **options, sink=sink, dlogsumexp=dlogsumexp)
        expected = attention_backward(dout, query, key, values, **options, dlogsumexp=dlogsumexp)
    assert_close(grads[:3], expected[:3])
    np.testing.assert_array_equal(grads.dsink, [0.0, 0.0])


def test_a_sink_of_any_size_does_not_overflow():
    query, key, values = normal(3, 3, 4), normal(3, 5, 4), normal(3, 5, 2)
    out, logsumexp = attention(query, key, values, sink=np.array([1e4, -1e4, 0.0]), return_logsumexp=True)
    assert (out[0] == 0).all()
    np.testing.assert_array_equal(logsumexp[0], np.full(3, 1e4))
    assert_close((out[1],), (attention(query[1], key[1], values[1]),))
    dout = normal(3, 3, 2, seed=1)
    grads = attention_backward(dout, query, key, values, sink=np.array([1e4, -1e4, 0.0]))
    assert all(np.isfinite(array).all() for array in (grads.dquery, grads.dkey, grads.dvalue, grads.dsink))


def test_a_nan_in_the_sink_reaches_its_head():
    arrays, sink = (normal(3, 3, 4), normal(3, 5, 4), normal(3, 5, 2)), normal(3)
    dout = normal(3, 3, 2, seed=1)
    results = []
    for value in (sink[1], np.nan):
        options = {"sink": np.where(np.arange(3) == 1, value, sink), "is_causal": True}
        out = attention(*arrays, **options, return_logsumexp=True)
        grads = attention_backward(dout, *arrays, **options)
        results.append((*out, grads.dquery, grads.dsink))
    for clean, dirty in zip(*results, strict=True):
        assert np.isnan(dirty[1]).all()
        np.testing.assert_array_equal(dirty[[0, 2]], clean[[0, 2]])


def test_a_cap_bounds_the_scores_before_the_bias():
    """Scores of any size, even infinite ones, are at most the cap; a bias comes on top."""
    query, key, values = np.array([[1e200], [1.0]]), np.array([[1e200], [-1e200]]), np.array([[1.0], [0.0]])
    bias = np.array([[0.0, 7.0], [2.0, 0.0]])
    out, logsumexp = attention(query, key, values, softcap=2.0, bias=bias, return_logsumexp=True)
    logits = np.array([[2.0, 5.0], [4.0, -2.0]])
    np.testing.assert_allclose(logsumexp, np.log(np.exp(logits).sum(axis=1)), rtol=1e-14)
    np.testing.assert_allclose(out[:, 0], 1 / (1 + np.exp(logits[:, 1] - logits[:, 0])), rtol=1e-13)
    grads = attention_backward(np.array([[3.0], [5.0]]), query, key, values, softcap=2.0, bias=bias)
    assert (grads.dquery == 0).all()
    assert (grads.dkey == 0).all()
    assert (grads.dbias != 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_dropped_pair_is_not_a_hidden_one(value):
    """Its weight is 0, and 0 * NaN is NaN; a masked pair stays hidden, dropped or not."""
    query, key, values, dout = normal(3, 4), normal(5, 4), normal(5, 2), normal(3, 2, seed=1)
    values[2, 0] = value
    keep, mask = np.ones((3, 5), dtype=bool), np.ones((3, 5), dtype=bool)
    keep[:2, 2] = False
    mask[1, 2] = False
    options = {"mask": mask, "dropout_mask": keep, "dropout_p": 0.5}
    out, logsumexp = attention(query, key, values, **options, return_logsumexp=True)
    assert np.isfinite(logsumexp).all()
    assert np.isnan(out[0, 0])
    np.testing.assert_array_equal(np.isfinite(out), [[False, True], [True, True], [False, True]])
    grads = attention_backward(dout, query, key, values, **options)
    np.testing.assert_array_equal(np.isfinite(grads.dquery).all(axis=1), [False, True, False])
    assert np.isfinite(grads.dvalue).all()


def test_no_keys_and_no_queries_with_every_option():
    sink, dropout = normal(4), {"dropout_mask": np.ones((1, 1), dtype=bool), "dropout_p": 0.5}
    for rows, keys, batch in ((3, 0, 2), (0, 3, 2), (3, 3, 0)):
        arrays = normal(batch, 4, rows, 5), normal(batch, 2, keys, 5), normal(batch, 2, keys, 6)
        options = {"sink": sink, "softcap": 2.0, "bias": normal(1, rows, keys), "is_causal": True}
        out, logsumexp = attention(*arrays, **options, **dropout, return_logsumexp=True)
        assert out.shape == (batch, 4, rows, 6)
        dlogsumexp = normal(batch, 4, rows, seed=1)
        grads = attention_backward(out, *arrays, **options, **dropout, dlogsumexp=dlogsumexp)
        assert [grad.shape for grad in grads] == [a.shape for a in (*arrays, options["bias"], sink)]
        weights, of_weights = attention_weights(*arrays[:2], **options, return_logsumexp=True)
        assert weights.shape == (batch, 4, rows, keys)
        np.testing.assert_array_equal(of_weights, logsumexp)
        if keys == 0:
            assert (out == 0).all()
            np.testing.assert_array_equal(logsumexp, np.broadcast_to(sink[:, None], logsumexp.shape))
            np.testing.assert_allclose(grads.dsink, dlogsumexp.sum(axis=(0, 2)), rtol=1e-13)


def test_a_query_that_sees_no_key_has_no_weights():
    query, key, mask = normal(2, 3, 4), normal(2, 5, 4), np.ones((3, 5), dtype=bool)
    mask[1] = False
    weights, logsumexp = attention_weights(query, key, mask=mask, return_logsumexp=True)
    assert (weights[:, 1] == 0).all()
    assert (logsumexp[:, 1] == -np.inf).all()
    np.testing.assert_allclose(weights[:, [0, 2]].sum(axis=-1), np.ones((2, 2)), rtol=1e-14)
    grads = attention_weights_backward(normal(2, 3, 5, seed=1), query, key, mask=mask, dlogsumexp=normal(2, 3))
    assert (grads.dquery[:, 1] == 0).all()


def test_a_visible_nan_reaches_the_weights_of_its_rows():
    query, key, dweights = normal(4, 3), normal(5, 3), normal(4, 5, seed=1)
    key[2, 1] = np.nan  # causal with offset 1: rows 1, 2 and 3 see key 2
    visible = np.tri(4, 5, 1, dtype=bool)
    poisoned = visible & (np.arange(4) >= 1)[:, None]
    weights = attention_weights(query, key, is_causal=True, query_offset=1)
    np.testing.assert_array_equal(np.isnan(weights), poisoned)
    assert (weights[~visible] == 0).all()
    grads = attention_weights_backward(dweights, query, key, is_causal=True, query_offset=1)
    np.testing.assert_array_equal(np.isnan(grads.dquery).any(axis=1), [False, True, True, True])
    assert np.isnan(grads.dkey).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numbers_beyond_the_dtype_mean_what_they_say(dtype):
    """A softcap that no score comes near is none; one below all numbers, and a huge scale of 0, leave no score."""
    query, key, values = (normal(*shape).astype(dtype) for shape in ((2, 3), (4, 3), (4, 2)))
    plain, mean = attention(query, key, values), attention(0 * query, key, values)
    np.testing.assert_allclose(attention(query, key, values, softcap=1e50), plain, rtol=1e-3)
    np.testing.assert_array_equal(attention(query, key, values, softcap=1e-320), mean)
    np.testing.assert_array_equal(attention(0 * query, key, values, scale=1e50), mean)
    dout = normal(2, 2).astype(dtype)
    capped = attention_backward(dout, query, key, values, softcap=1e50)
    for actual, expected in zip(capped[:3], attention_backward(dout, query, key, values)[:3], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_mean_of_values_near_the_largest_is_one(dtype, hidden):
    """No sum of values overflows where their weighted mean does not."""
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    large = float(ml_dtypes.finfo(dtype).max) * 0.6
    values = np.full((4, 1), large).astype(dtype)
    options = {"is_causal": True, "query_offset": 2} if hidden else {}
    out = attention(np.zeros((1, 2), dtype), np.zeros((4, 2), dtype), values, **options)
    np.testing.assert_allclose(out.astype(float), float(values[0, 0]), rtol=0.01)


@pytest.mark.parametrize("low", [-np.inf, -1e30])
def test_an_additive_mask_is_hidden_by_arithmetic(low):
    """A bias of large negative numbers takes the quick path: it cannot make NaN of anything."""
    from refimpl._engine.arguments import _bounded

    query, bias = normal(3, 2).astype(np.float32), np.where(np.eye(3, dtype=bool), 0, low).astype(np.float32)
    assert _bounded(refimpl.backend.NUMPY, query, query, query, bias, 1.0, 3e38)
    assert not _bounded(refimpl.backend.NUMPY, query, query, query, bias * np.float32(np.nan), 1.0, 3e38)
    assert not _bounded(refimpl.backend.NUMPY, query, query, query, -bias, 1.0, 1e29)
    np.testing.assert_allclose(attention(query, query, query, bias=bias), query, rtol=1e-6)


@pytest.mark.parametrize("sink", [np.nan, np.inf, -np.inf])
def test_a_sink_that_is_not_finite_stays_away_from_hidden_pairs(sink):
    ones, mask = np.ones((1, 2, 1)), np.array([[True, False]] * 2)  # nobody sees key 1
    options = {"mask": mask, "sink": np.array([sink]), "bias": np.zeros((1, 2, 2))}
    grads = attention_backward(ones, ones, ones, ones, **options)
    assert grads.dkey[0, 1].tolist() == grads.dvalue[0, 1].tolist() == [0.0]
    assert grads.dbias[0, :, 1].tolist() == [0.0, 0.0]
    assert attention_weights(ones, ones, **options)[0, :, 1].tolist() == [0.0, 0.0]


def test_a_large_hidden_value_changes_no_bit_where_dropout_scales_up():
    query, key, dout = np.ones((1, 2, 2), "f4"), np.ones((1, 3, 2), "f4"), np.full((1, 2, 2), 1e18, "f4")
    options = {"mask": np.array([[True, True, False]] * 2), "dropout_mask": np.ones((2, 3), bool), "dropout_p": 0.999}
    results = []
    for hidden in (0, 1e18):
        value = np.array([[[1, 2], [3, 4], [hidden, hidden]]], np.float32)
        results.append(attention_backward(dout, query, key, value, **options).dquery)
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(*results)
