"""The textbook against loops and numeric derivatives, and the library against the textbook."""

import inspect

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import textbook
from refimpl.testing import check_gradients
from refimpl.testing.strategies import EVERY_OP

each_op = pytest.mark.parametrize("op", EVERY_OP)


def flat(tree):
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [array for part in tree for array in flat(part)] if isinstance(tree, tuple) else [tree]


def test_it_holds_every_op_with_the_same_arguments():
    ops = {name for name in refimpl.__all__ if inspect.isfunction(getattr(refimpl, name))}
    assert ops == set(textbook.__all__)
    for name in ops:
        own, other = (inspect.signature(getattr(module, name)).parameters for module in (refimpl, textbook))
        spelt = {n: p.default for n, p in other.items() if p.kind is not p.VAR_KEYWORD}
        assert spelt == {n: p.default for n, p in own.items() if n in spelt}
        assert set(own) == set(spelt) or any(p.kind is p.VAR_KEYWORD for p in other.values()), name


@pytest.mark.parametrize("op", [op for op in EVERY_OP if "attention" not in op])
@given(data=st.data())
def test_windows_agree_with_loops(op, data):
    case = data.draw(EVERY_OP[op]())
    out = getattr(textbook, op)(*case.arrays, **case.options)
    dout = np.random.default_rng(0).normal(size=out.shape)
    expected = [array for array in getattr(oracles, op)(dout, *case.arrays, **case.options) if array is not None]
    grads = [g for g in flat(getattr(textbook, f"{op}_backward")(dout, *case.arrays, **case.options)) if g is not None]
    for actual, due in zip([out, *grads], [expected[0], *expected[-len(grads) :]], strict=True):
        np.testing.assert_allclose(actual, due, rtol=1e-10, atol=1e-10)


@given(data=st.data())
def test_attention_agrees_with_loops(data):
    case = data.draw(EVERY_OP["scaled_dot_product_attention"]())
    out, logsumexp = textbook.scaled_dot_product_attention(*case.arrays, **case.options, return_logsumexp=True)
    dout, dlogsumexp = (np.random.default_rng(0).normal(size=array.shape) for array in (out, logsumexp))
    due = oracles.attention(*case.arrays, dout=dout, dlogsumexp=dlogsumexp, **case.options)
    grads = textbook.scaled_dot_product_attention_backward(dout, *case.arrays, **case.options, dlogsumexp=dlogsumexp)
    expected = (due.out, due.logsumexp, due.dquery, due.dkey, due.dvalue, due.dbias, due.dsink)
    for actual, other in zip((out, logsumexp, *grads), expected, strict=True):
        if other is not None:
            np.testing.assert_allclose(actual, other, rtol=1e-10, atol=1e-10)


@pytest.mark.slow_on_standins
@each_op
@given(data=st.data())
def test_the_library_agrees(backend, op, data):
    case = data.draw(EVERY_OP[op]())
    f, f_backward = getattr(textbook, op), getattr(textbook, f"{op}_backward")
    arrays, options = backend.arrays((case.arrays, case.options))
    expected = case.f(*case.arrays, **case.options)
    out = f(*arrays, **options)
    dout = np.random.default_rng(0).normal(size=flat(expected)[0].shape)
    grads = f_backward(backend.array(dout), *arrays, **options)
    results = zip(
        flat((out, grads)), flat((expected, case.f_backward(dout, *case.arrays, **case.options))), strict=True
    )
    for actual, due in results:
        assert (actual is None) == (due is None)
        if due is not None:
            assert backend.owns(actual)
            np.testing.assert_allclose(refimpl.backend.to_numpy(actual), due, rtol=1e-10, atol=1e-10)


@each_op
@given(data=st.data())
def test_further_results_and_half_types_agree(op, data):
    case = data.draw(EVERY_OP[op](dtypes=("float16", "float32")))
    further = {"return_indices", "return_logsumexp", "need_weights"} & set(inspect.signature(case.f).parameters)
    options = case.options | dict.fromkeys(further, True)
    actual, due = (flat(f(*case.arrays, **options)) for f in (getattr(textbook, op), case.f))
    for a, d in zip(actual, due, strict=True):
        assert (a.dtype, a.shape) == (d.dtype, d.shape)
        tolerance = 2e-3 if d.dtype == np.float16 else 2e-5
        np.testing.assert_allclose(a.astype(float), d.astype(float), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@each_op
@given(data=st.data())
def test_the_backward_is_the_derivative(op, data):
    case = data.draw(EVERY_OP[op]())
    check_gradients(getattr(textbook, op), getattr(textbook, f"{op}_backward"), *case.arrays, **case.options)
