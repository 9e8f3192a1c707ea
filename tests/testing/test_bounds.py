"""The error bound explains rounding, of every op and of a plain loop, and nothing larger."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import normal

import refimpl
from refimpl.testing import assert_matches, error_bound, strategies
from refimpl.testing.analysis import ANALYSES

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", strategies.EVERY_OP)
@settings(max_examples=5)
@given(data=st.data())
def test_every_op_is_within_its_bound(op, dtype, data):
    case = data.draw(strategies.EVERY_OP[op](dtypes=(dtype,)))
    model = data.draw(st.sampled_from(["expected", "worst"]))
    out = case.f(*case.arrays, **case.options)
    assert_matches(out, case.f, *case.arrays, model=model, **case.options)
    out = out[0] if isinstance(out, tuple) else out
    dout = np.random.default_rng(0).normal(size=out.shape).astype(out.dtype)
    grads = case.f_backward(dout, *case.arrays, **case.options)
    assert_matches(grads, case.f_backward, dout, *case.arrays, model=model, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [-0.02, 0.02])
def test_an_error_of_two_percent_is_none_of_rounding(dtype, error):
    x, weight = normal(1, 8, 6, 6).astype(DTYPES[dtype]), normal(4, 8, 3, 3).astype(DTYPES[dtype])
    out = refimpl.conv(x, weight)
    at = np.unravel_index(np.argmax(np.abs(out.astype(float))), out.shape)
    out[at] *= 1 + error
    place = ", ".join(str(int(i)) for i in at)
    with pytest.raises(AssertionError, match=rf"the result is wrong in 1 of 64 elements; worst at \[{place}\]: "):
        assert_matches(out, refimpl.conv, x, weight)


def test_a_plain_loop_in_float32_is_within_the_bound():
    """Terms of one sign added up one after the other: the error grows with their number."""
    x, weight = np.abs(normal(1, 64, 9)).astype(np.float32), np.abs(normal(2, 64, 9)).astype(np.float32)
    out = np.zeros((1, 2, 1), dtype=np.float32)
    for channel in range(2):
        for i, k in np.ndindex(64, 9):
            out[0, channel, 0] += np.float32(x[0, i, k] * weight[channel, i, k])
    assert_matches(out, refimpl.conv, x, weight)


TERMS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "of one sign": lambda rng, shape: rng.uniform(size=shape),
    "cancelling": lambda rng, shape: np.where(np.arange(shape[-1]) % 2, 1.0, -1.0) + 1e-3 * rng.normal(size=shape),
    "a large one first": lambda rng, shape: np.where(np.arange(shape[-1]) == 0, 1e4, rng.normal(size=shape)),
    "equal": lambda rng, shape: np.broadcast_to(rng.uniform(size=(*shape[:-1], 1)), shape),
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("count", [1, 10, 1_000, 4_000])
def test_sums_one_after_the_other(terms, count):
    """They are within the bound, and, where partial sums are no smaller than random, it is at most 100 times larger."""
    x = TERMS[terms](np.random.default_rng(count), (1, 200, count)).astype(np.float32)
    mean = np.cumsum(x, axis=-1, dtype=np.float32)[..., -1:] / np.float32(count)
    assert_matches(mean, refimpl.adaptive_avg_pool, x, 1)
    error = np.abs(mean - x.astype(np.float64).mean(axis=-1, keepdims=True))
    bound = error_bound(refimpl.adaptive_avg_pool, x, 1)
    if count > 1 and terms in ("normal", "of one sign"):
        assert np.median(bound) <= 100 * np.sqrt(np.mean(error**2))


@pytest.mark.parametrize("order", [np.sort, lambda x: -np.sort(-x), lambda x: x])
@pytest.mark.parametrize("terms", TERMS)
def test_no_order_of_a_sum_exceeds_the_worst_bound(terms, order):
    x = order(TERMS[terms](np.random.default_rng(1), (1, 50, 2_000)).astype(np.float32))
    mean = np.cumsum(x, axis=-1, dtype=np.float32)[..., -1:] / np.float32(2_000)
    assert_matches(mean, refimpl.adaptive_avg_pool, x, 1, model="worst")
    worst, expected = (error_bound(refimpl.adaptive_avg_pool, x, 1, model=model) for model in ("worst", "expected"))
    assert (worst > np.abs(x).mean(axis=-1, keepdims=True) * 2_000 * 2.0**-24).all()
    assert np.median(worst) > np.median(expected)


def test_every_op_has_an_analysis():
    ops = {getattr(refimpl, name) for name in strategies.EVERY_OP}
    backwards = {getattr(refimpl, f"{name}_backward") for name in strategies.EVERY_OP}
    assert ANALYSES.keys() == ops | backwards


def test_half_sums_are_an_allowance():
    x = np.ones((1, 1, 3_000), dtype=np.float16)
    stuck = np.full((1, 1, 1), 2_048 / 3_000, dtype=np.float16)  # 2048 + 1 is 2048 in float16
    with pytest.raises(AssertionError, match="wrong in 1 of 1"):
        assert_matches(stuck, refimpl.adaptive_avg_pool, x, 1)
    assert_matches(stuck, refimpl.adaptive_avg_pool, x, 1, sums="result")


def test_each_result_has_its_own_dtype():
    x, weight, dout = normal(1, 8, 6), normal(4, 8, 3), normal(1, 4, 4)
    grads = refimpl.conv_backward(dout, x, weight, padding=0)
    mixed = grads._replace(dx=grads.dx.astype(np.float32), dweight=grads.dweight.astype(ml_dtypes.bfloat16))
    assert_matches(mixed, refimpl.conv_backward, dout, x, weight)
    blunt = mixed.dx + np.float32(1e-3)  # which rounding in bfloat16 would explain, and in float32 does not
    with pytest.raises(AssertionError, match="dx is wrong"):
        assert_matches(mixed._replace(dx=blunt), refimpl.conv_backward, dout, x, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "best"}, "model must be 'expected' or 'worst'; got 'best'"),
        ({"exp_ulps": -1}, "exp_ulps must be a number of at least 0; got -1"),
        ({"sums": "float16"}, "sums must be 'float32' or 'result'; got 'float16'"),
    ],
)
def test_allowances_are_checked(options, message):
    x = normal(1, 1, 4)
    with pytest.raises(ValueError, match=f"error_bound: {message}"):
        error_bound(refimpl.avg_pool, x, 2, **options)
    with pytest.raises(ValueError, match=f"assert_matches: {message}"):
        assert_matches(x, refimpl.avg_pool, x, 1, **options)


def test_a_wrong_tie_is_none_of_rounding():
    x, dout = np.ones((1, 1, 4), dtype=np.float32), np.array([[[2.0, 3.0]]], dtype=np.float32)
    dx = refimpl.max_pool_backward(dout, x, 2)
    assert_matches(dx, refimpl.max_pool_backward, dout, x, 2)
    with pytest.raises(AssertionError, match="wrong in 4 of 4 elements"):
        assert_matches(dx[..., ::-1], refimpl.max_pool_backward, dout[..., ::-1], x, 2)
    _, indices = refimpl.max_pool(x, 2, return_indices=True)
    with pytest.raises(AssertionError, match="result 1 is wrong in 2 of 2 elements"):
        assert_matches((x[..., ::2], indices + 1), refimpl.max_pool, x, 2, return_indices=True)


def test_what_is_not_finite_must_be_so_in_the_reference():
    x = np.array([[[1.0, np.nan, np.inf, 2.0]]], dtype=np.float32)
    assert_matches(refimpl.avg_pool(x, 1), refimpl.avg_pool, x, 1)
    for place, value in ((0, np.nan), (1, 1.0), (2, np.nan), (2, -np.inf), (3, np.inf)):
        wrong = x.copy()
        wrong[..., place] = value
        with pytest.raises(AssertionError, match=rf"worst at \[0, 0, {place}\]"):
            assert_matches(wrong, refimpl.avg_pool, x, 1)


def test_beyond_the_largest_number_lies_inf():
    x, weight = np.full((1, 1, 2), 300, dtype=np.float16), np.full((1, 1, 2), 300, dtype=np.float16)
    out = refimpl.conv(x, weight)
    assert np.isinf(out).all()
    assert_matches(out, refimpl.conv, x, weight)
    with pytest.raises(AssertionError, match="wrong in 1 of 1"):
        assert_matches(-out, refimpl.conv, x, weight)


def test_every_result_is_compared(backend):
    query, dout = normal(2, 3, 4).astype(np.float32), normal(2, 3, 4, seed=1).astype(np.float32)
    f, f_backward = refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward
    arrays = backend.arrays((dout, query, query, query))
    grads = f_backward(*arrays, is_causal=True)
    assert_matches(grads, f_backward, *arrays, is_causal=True)
    with pytest.raises(AssertionError, match="dkey is wrong"):
        assert_matches(grads._replace(dkey=grads.dquery), f_backward, *arrays, is_causal=True)
    with pytest.raises(AssertionError, match="must hold dquery, dkey, dvalue; got dquery, dvalue"):
        assert_matches(grads._replace(dkey=None), f_backward, *arrays, is_causal=True)
    out, logsumexp = f(*arrays[1:], return_logsumexp=True)
    assert_matches((out, logsumexp), f, *arrays[1:], return_logsumexp=True)
    assert_matches(out, f, *arrays[1:], return_logsumexp=True)
    with pytest.raises(AssertionError, match="result 1 is wrong"):
        assert_matches((out, logsumexp + 1e-3), f, *arrays[1:], return_logsumexp=True)
    with pytest.raises(AssertionError, match=r"must have shape \(2, 3, 4\); got \(2, 3\)"):
        assert_matches(logsumexp, f, *arrays[1:])


@pytest.mark.parametrize("wrong", ["float8", np.int32, "complex128"])
def test_dtypes_that_are_none_of_ours(wrong):
    with pytest.raises(TypeError, match="error_bound: dtype must be 'float64'"):
        error_bound(refimpl.avg_pool, normal(1, 1, 2), 2, dtype=wrong)


def test_nothing_to_bound():
    with pytest.raises(
        TypeError, match="error_bound: arrays must hold a floating array, as integers are exact; got none"
    ):
        error_bound(refimpl.max_pool, np.ones((1, 1, 2), dtype=int), 2)


def test_the_dtype_may_be_named_in_any_way():
    x = normal(1, 1, 4)
    named = [error_bound(refimpl.avg_pool, x, 2, dtype=d) for d in ("float16", np.float16, np.dtype("float16"))]
    for bound in named:
        np.testing.assert_array_equal(bound, named[0])
    assert (error_bound(refimpl.avg_pool, x, 2, dtype=ml_dtypes.bfloat16) > named[0]).all()


def online(query, key, value, block=7):
    """Attention over blocks of keys, one after the other, in the dtype of the arguments: FlashAttention's way."""
    q, k, v = query / np.sqrt(query.dtype.type(query.shape[-1])), key, value
    m = np.full((*q.shape[:-1], 1), -np.inf, dtype=q.dtype)
    total, out = np.zeros_like(m), np.zeros((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    for first in range(0, k.shape[-2], block):
        s = q @ np.swapaxes(k[..., first : first + block, :], -1, -2)
        new = np.maximum(m, s.max(axis=-1, keepdims=True))
        e, shrink = np.exp(s - new), np.exp(m - new)
        total, out, m = (
            total * shrink + e.sum(axis=-1, keepdims=True),
            out * shrink + e @ v[..., first : first + block, :],
            new,
        )
    return out / total, (m + np.log(total))[..., 0]


def from_stored(dout, query, key, value, is_causal=False):
    """The backward that takes weights from the logsumexp and the mean of dp from the output, as FlashAttention 2."""
    out, logsumexp = refimpl.scaled_dot_product_attention(query, key, value, is_causal=is_causal, return_logsumexp=True)
    scale = 1 / np.sqrt(query.dtype.type(query.shape[-1]))
    p = np.exp(scale * (query @ np.swapaxes(key, -1, -2)) - logsumexp[..., None])
    p = np.tril(p) if is_causal else p
    ds = p * (dout @ np.swapaxes(value, -1, -2) - (dout * out).sum(axis=-1, keepdims=True))
    t = np.swapaxes(ds, -1, -2) @ query
    return scale * (ds @ key), scale * t, np.swapaxes(p, -1, -2) @ dout


HARD = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "large logits": lambda rng, shape: 2.8 * rng.normal(size=shape),
    "equal": lambda _, shape: np.full(shape, 0.3),
    "of one sign": lambda rng, shape: rng.uniform(size=shape),
    "a large key first": lambda rng, shape: np.where(
        np.arange(shape[-2])[:, None] == 0, 2.0, np.abs(rng.normal(size=shape))
    ),
}


@pytest.mark.parametrize("values", HARD)
@pytest.mark.parametrize("keys", [1, 2, 100, 400])
@pytest.mark.parametrize("model", ["expected", "worst"])
def test_attention_in_other_orders(values, keys, model):
    rng = np.random.default_rng(keys)
    query, key, value, dout = (HARD[values](rng, (2, n, 64)).astype(np.float32) for n in (40, keys, keys, 40))
    f, f_backward = refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward
    assert_matches(online(query, key, value), f, query, key, value, return_logsumexp=True, model=model)
    for is_causal in (False, True):
        arrays = (dout[:, :keys], query[:, :keys], key, value)
        grads = refimpl.AttentionGrads(*from_stored(*arrays, is_causal=is_causal), None, None)
        if arrays[1].shape[1] == keys or not is_causal:
            assert_matches(grads, f_backward, *arrays, is_causal=is_causal, model=model)


@pytest.mark.parametrize("error", [1e-4, -1e-4])
def test_one_element_wrong_by_one_in_ten_thousand(error):
    query, key, value, dout = (normal(2, 60, 32, seed=i).astype(np.float32) for i in range(4))
    f, f_backward = refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward
    out, grads = f(query, key, value), f_backward(dout, query, key, value)
    for name, due in (("out", out), ("dquery", grads.dquery), ("dkey", grads.dkey), ("dvalue", grads.dvalue)):
        wrong = due.copy()
        at = np.unravel_index(np.argsort(np.abs(due), axis=None)[due.size // 2], due.shape)
        wrong[at] *= 1 + error
        found = wrong if name == "out" else grads._replace(**{name: wrong})
        op, arrays = (f, (query, key, value)) if name == "out" else (f_backward, (dout, query, key, value))
        with pytest.raises(AssertionError, match="is wrong in 1 of"):
            assert_matches(found, op, *arrays)


def test_dout_of_ones_for_the_weights():
    """All gradients are 0, by sums that cancel."""
    query, key = normal(2, 30, 16).astype(np.float32), normal(2, 40, 16, seed=1).astype(np.float32)
    grads = refimpl.attention_weights_backward(np.ones((2, 30, 40), dtype=np.float32), query, key)
    assert_matches(grads, refimpl.attention_weights_backward, np.ones((2, 30, 40), dtype=np.float32), query, key)
