"""The gradient checker accepts what is right and rejects what is wrong."""

import re

import numpy as np
import pytest
from samples import normal

import refimpl
from refimpl import conv, conv_backward
from refimpl.testing import check_gradients

SMALL = (normal(1, 2, 4, 3), normal(2, 2, 3, 2), normal(2))
LARGE = (normal(2, 3, 12, 12), normal(3, 3, 5, 5), normal(3))
both_sizes = pytest.mark.parametrize("arrays", [SMALL, LARGE], ids=["small", "large"])


def spoiled(spoil):
    """Return conv_backward with its gradients spoiled."""

    def backward(dout, x, weight, bias):
        return spoil(conv_backward(dout, x, weight, bias))

    return backward


@both_sizes
def test_accepts_the_gradient(backend, arrays):
    check_gradients(conv, conv_backward, *backend.arrays(arrays))


def one_tap_missing(grads):
    grads.dweight[..., 0, 0] = 0
    return grads


WRONG = {
    "wrong by 0.1%": ("dx", lambda g: g._replace(dx=1.001 * g.dx)),
    "dweight wrong by 0.1%": ("dweight", lambda g: g._replace(dweight=1.001 * g.dweight)),
    "dbias wrong by 0.1%": ("dbias", lambda g: g._replace(dbias=0.999 * g.dbias)),
    "missing a factor": ("dweight", lambda g: g._replace(dweight=g.dweight / 2)),
    "missing a tap": ("dweight", one_tap_missing),
    "the wrong sign": ("dx", lambda g: g._replace(dx=-g.dx)),
    "all zero": ("dx", lambda g: g._replace(dx=0 * g.dx)),
    "NaN": ("dx", lambda g: g._replace(dx=np.nan * g.dx)),
}


@both_sizes
@pytest.mark.parametrize("kind", WRONG)
def test_rejects_a_gradient_that_is(kind, arrays):
    name, spoil = WRONG[kind]
    where = "elements|random direction"
    pattern = (
        rf"^check_gradients: {name} is wrong (in|along) .*({where}).*; worst at \[[\d, ]+\]: "
        r"analytic \S+, numeric \S+ \(step \S+, tolerance \S+\)$"
    )
    with pytest.raises(AssertionError, match=pattern):
        check_gradients(conv, spoiled(spoil), *arrays)


@pytest.mark.parametrize("size", [3, 20])
def test_rejects_a_transposed_gradient(size):
    a, b = normal(size, size), normal(size, size, seed=1)

    def matmul(a, b):
        return a @ b

    check_gradients(matmul, lambda dout, a, b: (dout @ b.T, a.T @ dout), a, b)
    with pytest.raises(AssertionError, match="check_gradients: db is wrong"):
        check_gradients(matmul, lambda dout, a, b: (dout @ b.T, (a.T @ dout).T), a, b)


@pytest.mark.parametrize("size", [4, 300])
def test_rejects_gradients_in_each_others_place(size):
    a, b = normal(size), normal(size, seed=1)
    check_gradients(lambda a, b: a * b**2, lambda dout, a, b: (dout * b**2, 2 * dout * a * b), a, b)
    with pytest.raises(AssertionError, match="check_gradients: da is wrong"):
        check_gradients(lambda a, b: a * b**2, lambda dout, a, b: (2 * dout * a * b, dout * b**2), a, b)


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (1, 2, 11, 11), (1, 0, 3, 7)])
def test_finds_the_one_wrong_element_of_a_large_gradient(index):
    def spoil(grads):
        grads.dx[index] += 0.1
        return grads

    with pytest.raises(AssertionError, match=re.escape(f"worst at {list(index)}: ")):
        check_gradients(conv, spoiled(spoil), *LARGE)


def test_reports_the_worst_element_with_both_values():
    def backward(dout, x):
        dx = 2 * x * dout
        dx[1] += 1e-3
        dx[2] += 5.0
        return dx

    with pytest.raises(AssertionError) as raised:
        check_gradients(lambda x: x**2, backward, np.array([1.0, 2.0, 3.0]))
    found = re.search(
        r"dx is wrong in 2 of 3 elements; worst at \[2\]: analytic (\S+), numeric (\S+) ", str(raised.value)
    )
    assert float(found[1]) - float(found[2]) == pytest.approx(5.0, rel=1e-9)


def test_options_and_mappings_are_checked():
    query = normal(3, 4)
    bias = normal(3, 3)

    def wrong(*args, **kwargs):
        grads = refimpl.scaled_dot_product_attention_backward(*args, **kwargs)
        return grads._replace(dbias=1.001 * grads.dbias)

    with pytest.raises(AssertionError, match="dbias is wrong"):
        check_gradients(refimpl.scaled_dot_product_attention, wrong, query, query, query, bias=bias)

    def wrong_params(*args, **kwargs):
        grads = refimpl.multi_head_attention_backward(*args, **kwargs)
        grads.dparams["in_proj_bias"][0] += 1e-3
        return grads

    params = {"in_proj_weight": normal(12, 4), "in_proj_bias": normal(12), "out_proj.weight": normal(4, 4)}
    with pytest.raises(AssertionError, match=re.escape("dparams['in_proj_bias'] is wrong in 1 of 12 elements")):
        check_gradients(refimpl.multi_head_attention, wrong_params, query, query, query, params, num_heads=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: g._replace(dbias=None), "must return gradients for bias, weight, x; got them for weight, x"),
        (lambda g: g._replace(dx=g.dx[0]), "dx must have shape"),
        (lambda g: g._replace(dx=g.dx.astype(np.float32)), "dx must have dtype float64; got float32"),
        (lambda g: g._replace(dx=g.dx.tolist()), "dx must be an ndarray, .*; got list"),
        (lambda g: (g.dx, g.dweight), "got them for weight, x"),
        (lambda g: g.dx, "got them for x"),
        (lambda g: (*g, g.dx), "got them for .*arrays"),
    ],
)
def test_rejects_gradients_that_are_missing_or_of_the_wrong_form(spoil, message):
    with pytest.raises(AssertionError, match=message):
        check_gradients(conv, spoiled(spoil), *SMALL)


def test_no_bias_has_no_gradient():
    check_gradients(conv, conv_backward, *SMALL[:2])
    check_gradients(conv, conv_backward, *SMALL[:2], None)


def test_rejects_a_function_that_writes_its_arguments():
    def f(x):
        return x * 1.0

    def backward(dout, x):
        x += 1.0
        return dout * 1.0

    with pytest.raises(AssertionError, match="x was modified by f or f_backward"):
        check_gradients(f, backward, np.ones(2))


def test_refuses_float32():
    arrays = [array.astype(np.float32) for array in SMALL]
    with pytest.raises(TypeError, match=r"check_gradients: x must be float64, .*; got float32"):
        check_gradients(conv, conv_backward, *arrays)
    with pytest.raises(TypeError, match="must hold a float64 array; got none"):
        check_gradients(conv, conv_backward, 1)


def test_refuses_values_that_are_not_finite():
    with pytest.raises(ValueError, match="must return finite numbers; got NaN or inf"):
        check_gradients(lambda x: x * np.inf, lambda dout, _: dout, np.ones(2))


@pytest.mark.parametrize("size", [5, 500])
def test_smooth_functions_hold_to_1e_7(size):
    """A relative error of 3e-7 is seen, one of 3e-8 is not."""
    x = normal(size)
    check_gradients(np.tanh, lambda dout, x: (1 + 3e-8) * dout / np.cosh(x) ** 2, x)
    with pytest.raises(AssertionError, match="is wrong"):
        check_gradients(np.tanh, lambda dout, x: (1 + 3e-7) * dout / np.cosh(x) ** 2, x, seed=1)


def test_the_first_of_several_results_counts():
    check_gradients(lambda x: (x**2, x), lambda dout, x: 2 * x * dout, normal(3))


@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, -1, slice(None)])
def test_rejects_gradients_that_are_not_finite(size, value, place):
    def backward(dout, x):
        dx = 2 * x * dout
        dx[place] = value
        return dx

    with pytest.raises(AssertionError, match=rf"dx is wrong in .*; worst at \[\d+\]: analytic {value}, numeric"):
        check_gradients(lambda x: x**2, backward, normal(size))


@pytest.mark.parametrize("size", [9, 1000])
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e12])
def test_rejects_wrong_gradients_at_values_of_any_size(size, scale):
    x = scale * normal(size)
    check_gradients(lambda x: 3 * x, lambda dout, _: 3 * dout, x)
    for factor in (-3, 4, 3.003):
        with pytest.raises(AssertionError, match="dx is wrong"):
            check_gradients(lambda x: 3 * x, lambda dout, _, factor=factor: factor * dout, x)


def test_rejects_two_elements_in_each_others_place_in_a_large_gradient():
    x = normal(1000)

    def backward(dout, x, j):
        dx = 2 * x * dout
        dx[[0, j]] = dx[[j, 0]]
        return dx

    for j in range(1, 1000, 37):
        with pytest.raises(AssertionError, match="dx is wrong along random direction"):
            check_gradients(lambda x: x**2, lambda dout, x, j=j: backward(dout, x, j), x)


def test_rejects_a_backward_that_writes_dout():
    with pytest.raises(AssertionError, match="dout was modified by f_backward"):
        check_gradients(lambda x: x**2, lambda dout, x: np.multiply(dout, 2 * x, out=dout), normal(3))


def test_takes_scalars_as_numpy_makes_them():
    check_gradients(lambda x: (x**2).sum(), lambda dout, x: 2 * x * dout, normal(3))
    check_gradients(lambda x: x**2, lambda dout, x: 2 * x * dout, np.asarray(3.0))
    with pytest.raises(AssertionError, match=r"dx is wrong in 1 of 1 elements; worst at \[\]"):
        check_gradients(lambda x: x**2, lambda dout, x: x * dout, np.asarray(3.0))


@pytest.mark.parametrize("rtol", [-1, 1, np.nan, "a", True, None])
def test_wrong_rtol(rtol):
    with pytest.raises(ValueError, match=r"check_gradients: rtol must be a number in \[0, 1\); got "):
        check_gradients(np.positive, lambda dout, _: dout, normal(2), rtol=rtol)


def test_options_may_have_any_name():
    def power(x, f):
        return x**f

    check_gradients(power, lambda dout, x, f: f * x ** (f - 1) * dout, normal(3), f=2)


def test_refuses_a_function_that_computes_in_less_than_float64():
    with pytest.raises(TypeError, match="f must return float64; got float32"):
        check_gradients(lambda x: x.astype(np.float32), lambda dout, _: dout, normal(3))
