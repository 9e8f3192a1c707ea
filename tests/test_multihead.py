"""Multi-head attention against loops, and against its own parts."""

import cases
import numpy as np
import oracles
import pytest
from cases import normal
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import multi_head_attention, multi_head_attention_backward, scaled_dot_product_attention


@given(case=cases.multi_head())
def test_agrees_with_loops(case):
    out = multi_head_attention(*case.arrays, **case.options)
    np.testing.assert_allclose(out, oracles.multi_head_attention(*case.arrays, **case.options), rtol=1e-11, atol=1e-12)


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


@given(case=cases.multi_head(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_hidden_tokens_never_matter(backend, case, value):
    """Poison in queries that see no key and in keys and values that no query sees, whatever the projections."""
    query, key, value_array, params = case.arrays
    heads = case.options["num_heads"]
    options = {name: option for name, option in case.options.items() if name != "num_heads"}
    visible = oracles.visible_pairs((*query.shape[:-2], heads, query.shape[-2], key.shape[-2]), options)
    poisoned = [query.copy(), key.copy(), value_array.copy()]
    blind, unseen = ~visible.any(axis=(-3, -1)), ~visible.any(axis=(-3, -2))
    for array, hidden in zip(poisoned, (blind, unseen, unseen), strict=True):
        if array.shape[:-1] == hidden.shape:
            array[hidden] = value
    results = []
    for arrays in ((query, key, value_array), poisoned):
        given_arrays, given_options = backend.arrays(((*arrays, params), case.options))
        out = multi_head_attention(*given_arrays, **given_options)
        dout = np.random.default_rng(0).normal(size=out.shape)
        grads = multi_head_attention_backward(backend.array(dout), *given_arrays, **given_options)
        results.append([out, *grads[:3], *(grads.dparams or {}).values(), grads.dbias])
    for clean, dirty in zip(*results, strict=True):
        if clean is not None:
            clean, dirty = refimpl.backend.to_numpy(clean), refimpl.backend.to_numpy(dirty)
            assert dirty.tobytes() == clean.tobytes()


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
