"""What holds for every op: its gradient, and everything that the rules of the library promise."""

import inspect

import numpy as np
import pytest
from backends import a_gpu_that_nobody_waits_for
from hypothesis import given
from hypothesis import strategies as st
from sizes import as_if_large

import refimpl
from refimpl.testing import check_gradients
from refimpl.testing.strategies import EVERY_OP

SHORT = {  # as a numeric derivative is a call for each element
    "adaptive_avg_pool": {"ranks": (1, 2)},
    "adaptive_max_pool": {"ranks": (1, 2)},
    "scaled_dot_product_attention": {"lengths": (1, 2, 3, 0)},
    "attention_weights": {"lengths": (1, 2, 3, 0)},
    "multi_head_attention": {"lengths": (1, 2, 3, 0), "features": (1, 2)},
}
LAYOUTS = ("contiguous", "transposed", "strided", "reversed", "broadcast", "readonly")
each_op = pytest.mark.parametrize("op", EVERY_OP)


def flat(result):
    """Return every array in what an op or its backward returned, in order; None is kept."""
    if isinstance(result, dict):
        result = tuple(result.values())
    return [item for part in result for item in flat(part)] if isinstance(result, tuple) else [result]


def numbers(result):
    return [None if array is None else refimpl.backend.to_numpy(array) for array in flat(result)]


def gradient_of(result, dtype=np.float64):
    """Return a random `dout` of whole numbers for the first result."""
    out = result[0] if isinstance(result, tuple) else result
    return np.random.default_rng(0).integers(-3, 4, size=out.shape).astype(dtype)


def both(case, dtype=np.float64, backend=None):
    """Return the results of the op and of its backward."""
    arrays, options = (case.arrays, case.options) if backend is None else backend.arrays((case.arrays, case.options))
    out = case.f(*arrays, **options)
    dout = gradient_of(out, dtype)
    return out, case.f_backward(dout if backend is None else backend.array(dout), *arrays, **options)


def same(left, right):
    """Whether two lists of NumPy arrays are equal to the bit, 0 and -0 alike."""
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.slow_but_on_numpy
@each_op
@given(data=st.data())
def test_gradient_is_the_derivative(backend, op, data):
    case = data.draw(EVERY_OP[op](**SHORT.get(op, {})))
    arrays, options = backend.arrays((case.arrays, case.options))
    check_gradients(case.f, case.f_backward, *arrays, **options)


@each_op
@given(data=st.data())
def test_results_are_of_the_backend_and_do_not_depend_on_it(backend, op, data):
    case = data.draw(EVERY_OP[op]())
    expected = numbers(both(case))
    results = flat(both(case, backend=backend))
    assert all(backend.owns(array) for array in results if array is not None)
    for actual, reference in zip(numbers(tuple(results)), expected, strict=True):
        if reference is None:
            assert actual is None
        else:
            np.testing.assert_allclose(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.slow_on_standins
@pytest.mark.parametrize("op", ["conv", "conv_transpose", "max_pool", "avg_pool", "adaptive_max_pool", "max_unpool"])
@given(data=st.data())
def test_whole_numbers_agree_to_the_bit(backend, op, data):
    case = data.draw(EVERY_OP[op](values="integers"))
    if op == "avg_pool":  # the sum, as thirds are no whole numbers
        case.options["divisor_override"] = 1
    with refimpl.backend.limits(tile_bytes=data.draw(st.sampled_from([1, 200, 1 << 22]))):
        results = numbers(both(case, backend=backend))
    assert same(results, numbers(both(case)))


@each_op
@given(data=st.data())
def test_small_tiles_change_nothing_but_rounding(op, data):
    case = data.draw(EVERY_OP[op]())
    expected = numbers(both(case))
    with refimpl.backend.limits(tile_bytes=data.draw(st.integers(1, 2000))):
        results = numbers(both(case))
    for actual, reference in zip(results, expected, strict=True):
        if reference is not None:
            np.testing.assert_allclose(actual, reference, rtol=1e-12, atol=1e-12)


@each_op
@given(data=st.data())
def test_the_ways_of_large_arrays_change_nothing_but_rounding(op, data):
    case = data.draw(EVERY_OP[op]())
    expected = numbers(both(case))
    with as_if_large():
        results = numbers(both(case))
    for actual, reference in zip(results, expected, strict=True):
        if reference is not None:
            np.testing.assert_allclose(actual, reference, rtol=1e-12, atol=1e-12)


@each_op
@given(data=st.data())
def test_the_same_call_gives_the_same_bits(op, data):
    case = data.draw(EVERY_OP[op]())
    first = [None if a is None else a.tobytes() for a in numbers(both(case))]
    with refimpl.backend.limits(threads=data.draw(st.integers(1, 4))):
        assert [None if a is None else a.tobytes() for a in numbers(both(case))] == first


@pytest.mark.slow_on_standins
@each_op
@given(data=st.data())
def test_float32_is_computed_in_float32(backend, op, data):
    case = data.draw(EVERY_OP[op]())
    expected = numbers(both(case))
    results = numbers(both(case.cast(np.float32), dtype=np.float32, backend=backend))
    for actual, reference in zip(results, expected, strict=True):
        if reference is not None:
            assert actual.dtype == np.float32
            largest = np.abs(reference).max(initial=1, where=np.isfinite(reference))
            np.testing.assert_allclose(actual, reference, rtol=2e-4, atol=2e-4 * largest)


@each_op
@given(data=st.data())
def test_results_are_new_and_arguments_untouched(op, data):
    case = data.draw(EVERY_OP[op](dtypes=("float64", "float16", "bfloat16"), layouts=LAYOUTS))
    given_arrays = [a for a in flat((case.arrays, case.options)) if isinstance(a, np.ndarray)]
    before = [a.tobytes() for a in given_arrays]
    out = case.f(*case.arrays, **case.options)
    dout = gradient_of(out, flat(out)[0].dtype)
    kept = dout.tobytes()
    results = [*flat(out), *flat(case.f_backward(dout, *case.arrays, **case.options))]
    assert [a.tobytes() for a in given_arrays] == before
    assert dout.tobytes() == kept
    for array in results:
        if array is not None:
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert not any(np.may_share_memory(array, other) for other in [*given_arrays, dout] if array.size)


@each_op
@given(data=st.data())
def test_gradients_have_the_shapes_of_their_arguments(op, data):
    case = data.draw(EVERY_OP[op]())
    _, gradients = both(case)
    if not isinstance(gradients, tuple):
        assert gradients.shape == case.arrays[0].shape
        return
    arguments = dict(zip(inspect.signature(case.f).parameters, case.arrays, strict=False)) | case.options
    for field, gradient in zip(gradients._fields, gradients, strict=True):
        argument = arguments.get(field.removeprefix("d"))
        if argument is None:
            assert gradient is None
        elif isinstance(argument, dict):
            assert {k: a.shape for k, a in gradient.items()} == {k: a.shape for k, a in argument.items()}
        else:
            assert gradient.shape == argument.shape


@each_op
@pytest.mark.parametrize("values", ["extreme", "nonfinite"])
@given(data=st.data())
def test_no_floating_point_warning_leaves_the_library(op, values, data):
    case = data.draw(EVERY_OP[op](values=values, dtypes=("float64", "float16")))
    with np.errstate(all="raise"):
        out = case.f(*case.arrays, **case.options)
        case.f_backward(out[0] if isinstance(out, tuple) else out, *case.arrays, **case.options)


NEVER_WAIT = [op for op in EVERY_OP if "pool" in op and op != "max_unpool"] + ["merge_attention"]


@pytest.mark.parametrize("op", NEVER_WAIT)
@given(data=st.data())
def test_what_never_waits_for_a_gpu(op, data):
    case = data.draw(EVERY_OP[op]())
    dout = gradient_of(case.f(*case.arrays, **case.options))
    with a_gpu_that_nobody_waits_for() as gpu:
        arrays, options = gpu.arrays((case.arrays, case.options))
        results = case.f(*arrays, **options), case.f_backward(gpu.array(dout), *arrays, **options)
        assert all(map(gpu.owns, flat(results)))


def test_what_does_not_wait_for_a_gpu_with_these_options():
    with a_gpu_that_nobody_waits_for() as gpu:
        x, weight, rows = (gpu.array(np.ones(shape)) for shape in ((2, 3, 8, 8), (4, 3, 3, 3), (2, 3, 4)))
        keep = gpu.array(np.ones((2, 3, 3), dtype=bool))
        options = {"scale": 0.5, "softcap": 2.0, "sink": gpu.array(np.zeros(2)), "dropout_mask": keep, "dropout_p": 0.1}
        assert gpu.owns(refimpl.conv(x, weight, stride=2))
        assert gpu.owns(refimpl.scaled_dot_product_attention(rows, rows, rows, **options))
        grads = refimpl.scaled_dot_product_attention_backward(rows, rows, rows, rows, **options)
        assert [gpu.owns(grad) for grad in grads if grad is not None] == [True] * 4
        assert gpu.owns(refimpl.multi_head_attention(rows, rows, rows, num_heads=2))


def test_what_waits_for_a_gpu_is_found_out():
    with a_gpu_that_nobody_waits_for() as gpu, pytest.raises(AssertionError, match="would wait"):
        refimpl.conv(gpu.array(np.ones((1, 1, 4))), gpu.array(np.ones((1, 1, 3))), padding=1)
