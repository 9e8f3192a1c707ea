"""Multi-head attention against loops, and against its own parts."""

import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import normal

import refimpl
from refimpl import multi_head_attention, multi_head_attention_backward, scaled_dot_product_attention
from refimpl.testing import check_gradients, strategies

SEPARATE = {
    "q_proj_weight": normal(8, 5),
    "k_proj_weight": normal(4, 6),
    "v_proj_weight": normal(6, 7),
    "in_proj_bias": normal(18),
    "bias_k": normal(1, 1, 4),
    "bias_v": normal(1, 1, 6),
    "out_proj.weight": normal(3, 12),
    "out_proj.bias": normal(3),
}
TOKENS = (normal(2, 3, 5), normal(2, 4, 6), normal(1, 4, 7))
OPTIONS = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "add_zero_attn": True,
    "bias": normal(4, 1, 4),
    "mask": np.array([[True, False, True, True], [False] * 4, [True] * 4]),
    "key_lengths": np.array([4, 3]),
    "query_lengths": np.array([3, 2]),
    "sink": normal(4),
    "softcap": 1.5,
    "dropout_mask": np.random.default_rng(0).random((4, 3, 6)) < 0.7,
    "dropout_p": 0.3,
}


def without(options, *names):
    return {name: option for name, option in options.items() if name not in names}


@given(case=strategies.multi_head_attention())
def test_agrees_with_loops(case):
    out = multi_head_attention(*case.arrays, **case.options)
    np.testing.assert_allclose(out, oracles.multi_head_attention(*case.arrays, **case.options), rtol=1e-11, atol=1e-12)


@given(case=strategies.multi_head_attention(), average_weights=st.booleans())
def test_weights_agree_with_loops(backend, case, average_weights):
    """They change nothing of the output, nor of the backward; dropout changes nothing of them."""
    options = case.options | {"need_weights": True, "average_weights": average_weights}
    arrays, given_options = backend.arrays((case.arrays, options))
    out, weights = multi_head_attention(*arrays, **given_options)
    assert backend.owns(weights)
    plain = multi_head_attention(*arrays, **without(given_options, "need_weights"))
    assert refimpl.backend.to_numpy(plain).tobytes() == refimpl.backend.to_numpy(out).tobytes()
    expected = oracles.multi_head_attention(*case.arrays, **options)[1]
    np.testing.assert_allclose(refimpl.backend.to_numpy(weights), expected, rtol=1e-11, atol=1e-13)
    dout = backend.array(normal(*out.shape))
    grads, same = (
        multi_head_attention_backward(dout, *arrays, **opts)
        for opts in (given_options, without(given_options, "need_weights"))
    )
    assert refimpl.backend.to_numpy(grads.dquery).tobytes() == refimpl.backend.to_numpy(same.dquery).tobytes()


def test_the_gradient_of_everything_together():
    """Shared heads, appended keys, a query that sees these alone, one that is padding, dropout."""
    check_gradients(multi_head_attention, multi_head_attention_backward, *TOKENS, SEPARATE, **OPTIONS)


def test_the_gradient_with_packed_weights_and_appended_keys():
    params = {
        "in_proj_weight": normal(12, 4), "in_proj_bias": normal(12), "bias_k": normal(1, 1, 4),
        "bias_v": normal(1, 1, 4), "out_proj.weight": normal(4, 4), "out_proj.bias": normal(4),
    }  # fmt: skip
    arrays = (normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 4), params)
    options = {"num_heads": 2, "add_zero_attn": True, "is_causal": True, "sink": normal(2)}
    check_gradients(multi_head_attention, multi_head_attention_backward, *arrays, **options)


def test_appended_keys_come_after_all_others_the_learned_one_first():
    """With queries and keys of 1 in one head: scores are 1, then that of `bias_k`, then 0."""
    one = np.ones((1, 1))
    params = {
        "q_proj_weight": one, "k_proj_weight": one, "v_proj_weight": one, "out_proj.weight": one,
        "bias_k": np.full((1, 1, 1), math.log(6)), "bias_v": np.full((1, 1, 1), 100.0),
    }  # fmt: skip
    tokens, bias = np.ones((2, 1)), np.full((1, 2), math.log(2) - 1)
    out, weights = multi_head_attention(
        np.ones((1, 1)), tokens, tokens, params, num_heads=1, add_zero_attn=True, bias=bias, need_weights=True
    )
    np.testing.assert_allclose(weights, np.array([[2, 2, 6, 1]]) / 11, rtol=1e-14)
    np.testing.assert_allclose(out, [[(2 + 2 + 600) / 11]], rtol=1e-14)


def test_appended_keys_are_hidden_from_padding_alone():
    """Not by a mask, causality, a window or the length of the keys; a query beyond `query_lengths` sees none."""
    params = without(SEPARATE, "out_proj.bias")
    options = {"num_heads": 4, "num_kv_heads": 2, "add_zero_attn": True, "need_weights": True}
    hiding = [
        {"mask": np.zeros((3, 4), dtype=bool)},
        {"key_lengths": np.zeros(2, dtype=int)},
        {"is_causal": True, "query_offset": -3},
        {"window": (0, 0), "query_offset": np.array([20, -20])},
        {"bias": np.full((3, 4), -np.inf)},
    ]
    for hides in hiding:
        lengths = {"query_lengths": np.array([3, 1])}
        out, weights = multi_head_attention(*TOKENS, params, **options, **hides, **lengths)
        assert (weights[..., :4] == 0).all()
        np.testing.assert_allclose(weights[0].sum(axis=-1), np.ones(3), rtol=1e-14)
        np.testing.assert_allclose(weights[1].sum(axis=-1), [1.0, 0.0, 0.0], rtol=1e-14)
        assert (out[1, 1:] == 0).all()
        assert (out[1, 0] != 0).all()


def test_a_zero_key_alone_makes_a_softmax_with_one_more():
    """Also known as softmax1: without projections it equals a sink of 0."""
    query, key, value = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 6)
    out = multi_head_attention(query, key, value, num_heads=2, add_zero_attn=True)
    np.testing.assert_allclose(out, multi_head_attention(query, key, value, num_heads=2, sink=np.zeros(2)), rtol=1e-12)


def test_shared_heads_are_repeated_heads():
    """Without projections, and with separate ones."""
    query, key, value = normal(2, 3, 8), normal(2, 5, 4), normal(2, 5, 6)
    out = multi_head_attention(query, key, value, num_heads=4, num_kv_heads=2)

    def repeat(x, axis=-1):
        return np.concatenate([part for part in np.split(x, 2, axis=axis) for _ in range(2)], axis=axis)

    whole = multi_head_attention(query, repeat(key), repeat(value), num_heads=4)
    np.testing.assert_allclose(out, whole, rtol=1e-13)
    params = without(SEPARATE, "in_proj_bias", "bias_k", "bias_v")
    repeated = params | {name: repeat(params[name], axis=0) for name in ("k_proj_weight", "v_proj_weight")}
    np.testing.assert_allclose(
        multi_head_attention(*TOKENS, params, num_heads=4, num_kv_heads=2),
        multi_head_attention(*TOKENS, repeated, num_heads=4),
        rtol=1e-12,
    )


def test_one_head_without_projections_is_attention():
    query, key, value = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 6)
    out = multi_head_attention(query, key, value, num_heads=1, is_causal=True)
    np.testing.assert_array_equal(out, scaled_dot_product_attention(query, key, value, is_causal=True))


def test_heads_are_consecutive_runs_of_features():
    """Splitting is *into* `num_heads` parts: 12 features and 3 heads make 3 parts of 4."""
    query, key, value = normal(3, 12), normal(5, 12), normal(5, 6)
    out = multi_head_attention(query, key, value, num_heads=3)
    for h in range(3):
        q, k, v = query[:, 4 * h : 4 * h + 4], key[:, 4 * h : 4 * h + 4], value[:, 2 * h : 2 * h + 2]
        np.testing.assert_allclose(out[:, 2 * h : 2 * h + 2], scaled_dot_product_attention(q, k, v), rtol=1e-13)


def test_packed_and_separate_weights_are_the_same():
    x, weight, bias, out = normal(2, 3, 4), normal(12, 4), normal(12), normal(4, 4)
    packed = {"in_proj_weight": weight, "in_proj_bias": bias, "out_proj.weight": out}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    separate = {**dict(zip(names, np.split(weight, 3), strict=True)), "in_proj_bias": bias, "out_proj.weight": out}
    dout = normal(2, 3, 4, seed=1)
    np.testing.assert_array_equal(
        multi_head_attention(x, x, x, packed, num_heads=2), multi_head_attention(x, x, x, separate, num_heads=2)
    )
    of_packed = multi_head_attention_backward(dout, x, x, x, packed, num_heads=2)
    of_separate = multi_head_attention_backward(dout, x, x, x, separate, num_heads=2)
    assert list(of_packed.dparams) == list(packed)
    assert list(of_separate.dparams) == list(separate)
    np.testing.assert_array_equal(
        of_packed.dparams["in_proj_weight"], np.concatenate([of_separate.dparams[name] for name in names])
    )


def test_self_attention_with_one_array_sums_its_gradients():
    x, params = normal(3, 4), {"in_proj_weight": normal(12, 4), "out_proj.weight": normal(4, 4)}
    dout = normal(3, 4, seed=1)
    grads = multi_head_attention_backward(dout, x, x, x, params, num_heads=2)
    step = 1e-5 * normal(3, 4, seed=2)
    above, below = (multi_head_attention(y, y, y, params, num_heads=2) for y in (x + step, x - step))
    dx = grads.dquery + grads.dkey + grads.dvalue
    np.testing.assert_allclose(np.sum(dx * step), np.sum(dout * (above - below)) / 2, rtol=1e-7)


@given(case=strategies.multi_head_attention(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_hidden_tokens_never_matter(backend, case, value):
    """Poison in queries that see no key and in keys and values that no query sees, whatever the projections.

    Keys that are appended are seen by every query that is one, even where all others are poisoned.
    """
    *tokens, params = case.arrays
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in tokens))
    scores = (*batch, case.options["num_heads"], tokens[0].shape[-2], tokens[1].shape[-2])
    visible = oracles.visible_pairs(scores, case.options)
    sees = visible.any(axis=(-3, -1))
    if case.options.get("add_zero_attn") or "bias_k" in (params or {}):
        lengths = {"query_lengths": case.options.get("query_lengths")}
        sees |= oracles.visible_pairs((*batch, 1, tokens[0].shape[-2], 1), lengths)[..., 0, :, 0]
    seen = visible.any(axis=(-3, -2))
    poisoned = [
        np.where(oracles.any_to(part, x.shape[:-1])[..., None], x, value)
        for x, part in zip(tokens, (sees, seen, seen), strict=True)
    ]
    results = []
    for arrays in (tokens, poisoned):
        given_arrays, given_options = backend.arrays(((*arrays, params), case.options))
        out, weights = multi_head_attention(*given_arrays, **given_options, need_weights=True)
        dout = np.random.default_rng(0).normal(size=out.shape)
        grads = multi_head_attention_backward(backend.array(dout), *given_arrays, **given_options)
        results.append([out, weights, *grads[:3], *(grads.dparams or {}).values(), grads.dbias, grads.dsink])
    for clean, dirty in zip(*results, strict=True):
        if clean is not None:
            clean, dirty = refimpl.backend.to_numpy(clean), refimpl.backend.to_numpy(dirty)
            assert dirty.tobytes() == clean.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_gradients_of_appended_keys_meet_no_poison(value):
    """Bit for bit, where tokens are hidden or padding."""
    results = []
    for hidden in (0.0, value):
        query, key, values = (np.broadcast_to(x, (2, *x.shape[1:])).copy() for x in TOKENS)
        query[1, 2], key[1, 3], values[1, 3] = (hidden,) * 3
        grads = multi_head_attention_backward(normal(2, 3, 3), query, key, values, SEPARATE, **OPTIONS)
        results.append({name: array.tobytes() for name, array in grads.dparams.items()})
    assert results[0] == results[1]


def test_poison_in_an_appended_key_reaches_all_but_padding():
    dout, clean = normal(2, 3, 3), multi_head_attention(*TOKENS, SEPARATE, **OPTIONS)
    for name in ("bias_k", "bias_v"):
        params = SEPARATE | {name: np.full(SEPARATE[name].shape, np.nan)}
        out = multi_head_attention(*TOKENS, params, **OPTIONS)
        np.testing.assert_array_equal(out[1, 2], clean[1, 2])
        assert np.isnan(out[0]).all()
        assert np.isnan(out[1, :2]).all()
        grads = multi_head_attention_backward(dout, *TOKENS, params, **OPTIONS)
        np.testing.assert_array_equal(grads.dquery[1, 2], np.zeros(5))
        assert np.isnan(grads.dquery[0]).all()


def test_poison_in_a_token_that_others_see_leaves_the_rest_alone():
    """A query that sees appended keys alone stays clean, and so does the gradient of `bias_v` by it."""
    query, key, values = normal(1, 2, 5), normal(1, 4, 6), normal(1, 4, 7)
    key[0, 1] = np.nan
    mask = np.array([[True] * 4, [False] * 4])
    options = {"num_heads": 4, "num_kv_heads": 2, "add_zero_attn": True, "mask": mask}
    out = multi_head_attention(query, key, values, SEPARATE, **options)
    assert np.isnan(out[0, 0]).all()
    clean = multi_head_attention(query[:, 1:], key[:, :0], values[:, :0], SEPARATE, **without(options, "mask"))
    np.testing.assert_allclose(out[0, 1], clean[0, 0], rtol=1e-12)
    grads = multi_head_attention_backward(normal(1, 2, 3), query, key, values, SEPARATE, **options)
    assert np.isnan(grads.dquery[0, 0]).all()
    assert np.isfinite(grads.dquery[0, 1]).all()


@pytest.mark.parametrize(("rows", "keys", "batch"), [(3, 0, 2), (0, 4, 2), (3, 4, 0)])
def test_no_tokens_with_every_option(rows, keys, batch):
    query, key, values = normal(batch, rows, 5), normal(batch, keys, 6), normal(batch, keys, 7)
    options = without(OPTIONS, "mask", "bias", "key_lengths", "query_lengths", "dropout_mask", "dropout_p")
    out, weights = multi_head_attention(query, key, values, SEPARATE, **options, need_weights=True)
    assert out.shape == (batch, rows, 3)
    assert weights.shape == (batch, rows, keys + 2)
    if out.size:  # of no keys, those that are appended remain
        assert (weights > 0).all()
        assert (out != SEPARATE["out_proj.bias"]).all()
    grads = multi_head_attention_backward(out, query, key, values, SEPARATE, **options)
    assert {name: array.shape for name, array in grads.dparams.items()} == {n: a.shape for n, a in SEPARATE.items()}
    assert [grad.shape for grad in grads[:3]] == [query.shape, key.shape, values.shape]


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_a_hidden_token_meets_no_poison_in_a_projection(name):
    """A query that sees no key gives the bias alone and takes no gradient, though 0 * inf would be NaN."""
    params = {"in_proj_weight": normal(12, 4), "out_proj.weight": normal(4, 4), "out_proj.bias": normal(4)}
    x, mask = normal(3, 4), np.ones((3, 3), dtype=bool)
    mask[1] = False
    params[name][0] = np.inf
    out = multi_head_attention(x, x, x, params, num_heads=2, mask=mask)
    np.testing.assert_array_equal(out[1], params["out_proj.bias"])
    assert not np.isfinite(out[[0, 2]]).all()
    grads = multi_head_attention_backward(normal(3, 4, seed=1), x, x, x, params, num_heads=2, mask=mask)
    np.testing.assert_array_equal(grads.dquery[1], np.zeros(4))


@pytest.mark.parametrize(("rows", "keys"), [(0, 2), (2, 0)])
def test_poison_in_tokens_that_have_nobody_to_meet(rows, keys):
    params = {"in_proj_weight": normal(12, 4), "in_proj_bias": normal(12), "out_proj.weight": normal(4, 4)}
    query, key = np.full((rows, 4), np.nan), np.full((keys, 4), np.nan)
    grads = multi_head_attention_backward(np.ones((rows, 4)), query, key, key, params, num_heads=2)
    for array in (grads.dquery, grads.dkey, grads.dvalue, *grads.dparams.values()):
        np.testing.assert_array_equal(array, np.zeros(array.shape))


def test_a_poisoned_gradient_of_a_hidden_token_reaches_the_bias_alone():
    params = {"in_proj_weight": normal(12, 4), "out_proj.weight": normal(4, 4), "out_proj.bias": normal(4)}
    x, dout = normal(3, 4), normal(3, 4, seed=1)
    dout[2] = np.nan
    grads = multi_head_attention_backward(dout, x, x, x, params, num_heads=2, query_lengths=np.asarray(2))
    assert np.isnan(grads.dparams["out_proj.bias"]).all()
    assert np.isfinite(grads.dparams["out_proj.weight"]).all()
    assert np.isfinite(grads.dparams["in_proj_weight"]).all()


def test_a_visible_nan_in_the_bias_reaches_the_result_and_the_parameters():
    params = {"in_proj_weight": normal(12, 4), "out_proj.weight": normal(4, 4)}
    x, bias = normal(3, 4), np.zeros((2, 3, 3))
    bias[:, 1, 0] = np.nan
    out = multi_head_attention(x, x, x, params, num_heads=2, is_causal=True, bias=bias)
    assert np.isnan(out).tolist() == [[False] * 4, [True] * 4, [False] * 4]
    grads = multi_head_attention_backward(normal(3, 4, seed=1), x, x, x, params, num_heads=2, is_causal=True, bias=bias)
    assert all(np.isnan(array).all() for array in grads.dparams.values())
    assert np.isnan(grads.dquery).tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert np.isnan(grads.dkey).tolist() == [[True] * 4, [True] * 4, [False] * 4]


def test_poison_where_values_have_no_features():
    params = {
        "q_proj_weight": normal(4, 4), "k_proj_weight": normal(4, 4), "v_proj_weight": np.ones((0, 4)),
        "out_proj.weight": np.ones((3, 0)), "out_proj.bias": normal(3),
    }  # fmt: skip
    x = np.full((2, 4), np.nan)
    np.testing.assert_array_equal(
        multi_head_attention(x, x, x, params, num_heads=2), np.broadcast_to(params["out_proj.bias"], (2, 3))
    )
