"""Merging partial attention: against loops, and against attention over all keys at once."""

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import normal

import refimpl
from refimpl import merge_attention, merge_attention_backward
from refimpl import scaled_dot_product_attention as attention
from refimpl import scaled_dot_product_attention_backward as attention_backward
from refimpl.testing import check_gradients, strategies

SPLITS = [
    [(0, 7)],
    [(0, 2), (2, 7)],
    [(0, 1), (1, 1), (1, 4), (4, 7)],  # one without keys
    [(3, 7), (0, 3)],  # in any order
]
QUERY, KEY, VALUE = normal(2, 4, 5, 3), normal(2, 2, 7, 3), normal(2, 2, 7, 2)
BIAS, SINK = normal(4, 5, 7), normal(4)
MASK = np.random.default_rng(0).random((2, 4, 5, 7)) < 0.6
MASK[0, 0, 0] = False  # a query that sees no key at all
MASK[..., :2] = False  # a part that nobody sees


def parts_of(split, sink):
    """Return the arguments of attention over each part of the keys; the sink is in the first part alone."""
    for number, (start, stop) in enumerate(split):
        keys = slice(start, stop)
        options = {"bias": BIAS[..., keys], "mask": MASK[..., keys], "softcap": 2.0}
        if sink and number == 0:
            options["sink"] = SINK
        yield keys, (QUERY, KEY[..., keys, :], VALUE[..., keys, :]), options


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("sink", [False, True])
def test_merged_parts_are_the_whole(split, sink):
    """Forward and backward: the gradients of the parts, through both of their results, add up to those of the whole."""
    options = {"bias": BIAS, "mask": MASK, "softcap": 2.0} | ({"sink": SINK} if sink else {})
    whole = attention(QUERY, KEY, VALUE, **options, return_logsumexp=True)
    parts = list(parts_of(split, sink))
    results = [attention(*arrays, **opts, return_logsumexp=True) for _, arrays, opts in parts]
    outs, logsumexps = (np.stack(arrays) for arrays in zip(*results, strict=True))
    for actual, expected in zip(merge_attention(outs, logsumexps), whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)

    dout, dlogsumexp = normal(*whole[0].shape, seed=1), normal(*whole[1].shape, seed=2)
    expected = attention_backward(dout, QUERY, KEY, VALUE, **options, dlogsumexp=dlogsumexp)
    douts, dlogsumexps = merge_attention_backward(dout, outs, logsumexps, dlogsumexp=dlogsumexp)
    grads = [
        attention_backward(douts[s], *arrays, **opts, dlogsumexp=dlogsumexps[s])
        for s, (_, arrays, opts) in enumerate(parts)
    ]
    np.testing.assert_allclose(sum(g.dquery for g in grads), expected.dquery, rtol=1e-10, atol=1e-13)
    for (keys, *_), g in zip(parts, grads, strict=True):
        np.testing.assert_allclose(g.dkey, expected.dkey[..., keys, :], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(g.dvalue, expected.dvalue[..., keys, :], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(g.dbias, expected.dbias[..., keys], rtol=1e-10, atol=1e-13)
    if sink:
        np.testing.assert_allclose(grads[0].dsink, expected.dsink, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("values", ["normal", "nonfinite"])
@given(data=st.data())
def test_agrees_with_loops(backend, values, data):
    case = data.draw(strategies.merge_attention(values=values))
    results = merge_attention(*backend.arrays(case.arrays))
    for actual, expected in zip(results, oracles.merge_attention(*case.arrays), strict=True):
        assert backend.owns(actual)
        np.testing.assert_allclose(refimpl.backend.to_numpy(actual), expected, rtol=1e-13, atol=1e-14)


def out_and_logsumexp(outs, logsumexps):
    """Both results as one, to differentiate them together; the logsumexp of no part as 0."""
    out, logsumexp = merge_attention(outs, logsumexps)
    return np.concatenate([out, np.where(np.isinf(logsumexp), 0.0, logsumexp)[..., None]], axis=-1)


def out_and_logsumexp_backward(dout, outs, logsumexps):
    return merge_attention_backward(dout[..., :-1], outs, logsumexps, dlogsumexp=dout[..., -1])


@given(case=strategies.merge_attention())
def test_the_gradient_of_both_results(case):
    check_gradients(out_and_logsumexp, out_and_logsumexp_backward, *case.arrays)


@pytest.mark.slow_but_on_numpy
@given(case=strategies.merge_attention())
def test_the_gradient_of_the_output_alone(backend, case):
    check_gradients(merge_attention, merge_attention_backward, *backend.arrays(case.arrays))


def test_a_part_is_itself():
    out, logsumexp = normal(1, 2, 3, 4), normal(1, 2, 3)
    for actual, expected in zip(merge_attention(out, logsumexp), (out[0], logsumexp[0]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-15)


def test_of_no_parts_and_of_empty_parts_nothing_is_left():
    for parts in (0, 3):
        out, logsumexp = merge_attention(np.full((parts, 2, 3, 4), np.nan), np.full((parts, 2, 3), -np.inf))
        np.testing.assert_array_equal(out, np.zeros((2, 3, 4)))
        np.testing.assert_array_equal(logsumexp, np.full((2, 3), -np.inf))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_an_empty_part_holds_never_matters(backend, value):
    """Nor does the gradient of a query that sees no key in any part."""
    logsumexps = normal(3, 4, 5)
    logsumexps[np.random.default_rng(0).random(logsumexps.shape) < 0.4] = -np.inf
    logsumexps[:, 1, 2] = -np.inf
    blind = np.isinf(logsumexps).all(axis=0)
    results = []
    for hidden in (0.0, value):
        outs = np.where(np.isinf(logsumexps)[..., None], hidden, normal(3, 4, 5, 2))
        dout, dlogsumexp = np.where(blind[..., None], hidden, normal(4, 5, 2)), np.where(blind, hidden, normal(4, 5))
        dout, outs, ls, dl = backend.arrays((dout, outs, logsumexps, dlogsumexp))
        arrays = (*merge_attention(outs, ls), *merge_attention_backward(dout, outs, ls, dlogsumexp=dl))
        results.append([refimpl.backend.to_numpy(array) for array in arrays])
    for clean, dirty in zip(*results, strict=True):
        assert dirty.tobytes() == clean.tobytes()
    *_, douts, dlogsumexps = results[1]
    assert (douts[np.isinf(logsumexps)] == 0).all()
    assert (dlogsumexps[np.isinf(logsumexps)] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_element(value):
    """Even in a part whose weight underflows to 0; a NaN in a logsumexp reaches its row."""
    outs, logsumexps = normal(2, 3, 4), normal(2, 3)
    clean, _ = merge_attention(outs, logsumexps)
    poisoned = outs.copy()
    poisoned[1, 2, 3] = value
    out, logsumexp = merge_attention(poisoned, logsumexps)
    flawed = np.zeros((3, 4), dtype=bool)
    flawed[2, 3] = True
    np.testing.assert_array_equal(~np.isfinite(out), flawed)
    assert out[~flawed].tobytes() == clean[~flawed].tobytes()
    assert np.isfinite(logsumexp).all()
    far = logsumexps - np.array([[0.0], [1e4]])
    np.testing.assert_array_equal(np.isnan(merge_attention(poisoned, far)[0]), flawed)

    row = np.arange(3) == 1
    out, logsumexp = merge_attention(outs, np.where(row & [[True], [False]], np.nan, logsumexps))
    np.testing.assert_array_equal(np.isnan(logsumexp), row)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(row[:, None], out.shape))


def test_logsumexps_of_any_size_do_not_overflow():
    outs, dout = normal(3, 2, 4), normal(2, 4, seed=1)
    for shift in (1e4, -1e4):
        logsumexps = np.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]]) + shift
        expected = merge_attention(outs, logsumexps - shift)
        out, logsumexp = merge_attention(outs, logsumexps)
        np.testing.assert_allclose(out, expected[0], rtol=1e-11)
        np.testing.assert_allclose(logsumexp, expected[1] + shift, rtol=1e-14)
        grads = merge_attention_backward(dout, outs, logsumexps)
        for actual, reference in zip(grads, merge_attention_backward(dout, outs, logsumexps - shift), strict=True):
            np.testing.assert_allclose(actual, reference, rtol=1e-10, atol=1e-12)
    out, logsumexp = merge_attention(outs, np.array([[1e4], [-1e4], [0.0]]) * np.ones((3, 2)))
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(logsumexp, [1e4, 1e4])
    out, logsumexp = merge_attention(outs, np.full((3, 2), 1e300))
    np.testing.assert_allclose(out, outs.mean(axis=0), rtol=1e-14)
    np.testing.assert_array_equal(logsumexp, [1e300, 1e300])


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_to_merge(shape):
    outs, logsumexps = normal(*shape), normal(*shape[:-1])
    out, logsumexp = merge_attention(outs, logsumexps)
    assert out.shape == shape[1:]
    assert logsumexp.shape == shape[1:-1]
    grads = merge_attention_backward(out, outs, logsumexps, dlogsumexp=logsumexp)
    assert [grad.shape for grad in grads] == [outs.shape, logsumexps.shape]
