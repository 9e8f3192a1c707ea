"""Every node case that the onnx package ships for refimpl's operators, run through the adapter."""

import warnings

import numpy as np
import onnx
import onnx.backend.test.loader
import onnx_adapter
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # from the generators of other operators' cases
    warnings.simplefilter("ignore", DeprecationWarning)  # onnx 1.23 sets shapes in place, which NumPy 2.5 deprecates
    EVERY_CASE = onnx.backend.test.loader.load_model_tests(kind="node")

# An "_expanded" case repeats another one, with the operator's definition in place of its node.
CASES = {
    case.name: case
    for case in EVERY_CASE
    if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in onnx_adapter.OPERATORS
}

# What onnx 1.23 has.
IS_1_23 = onnx.__version__.startswith("1.23.")
COUNTS = {
    "Attention": 93,
    "AveragePool": 20,
    "Conv": 6,
    "ConvTranspose": 11,
    "GlobalAveragePool": 2,
    "GlobalMaxPool": 2,
    "LpPool": 8,
    "MaxPool": 19,
    "MaxUnpool": 2,
}

# Where ONNX's own text contradicts the outputs that it ships: (those, the right ones).
WRONG = {
    # The values 5, 6, 7, 8 go to the indices 5, 7, 13, 15 of an output of shape (1, 1, 5, 5). The operator's text says
    # that "the indices are linear, i.e. computed considering the tensor as flattened 1-D tensor, assuming row-major
    # storage", ranging over all of it: row and column are divmod(index, 5), that is (1, 0), (1, 2), (2, 3) and (3, 0).
    # The stored output has divmod(index, 4): it unpools to (1, 1, 4, 4), the shape without output_shape, and appends
    # zeros. That cannot undo MaxPool, which gives 6, 8, 16, 18 for an increasing 5 x 5 plane, when 16 is beyond 4 x 4.
    # Reported in onnx/onnx#2398; onnxruntime leaves the case out and computes what stands here, as PyTorch does.
    "test_maxunpool_export_with_output_shape": (
        [[[[0, 0, 0, 0, 0], [0, 5, 0, 6, 0], [0, 0, 0, 0, 0], [0, 7, 0, 8, 0], [0, 0, 0, 0, 0]]]],
        [[[[0, 0, 0, 0, 0], [5, 0, 6, 0, 0], [0, 0, 0, 7, 0], [8, 0, 0, 0, 0], [0, 0, 0, 0, 0]]]],
    ),
}


def assert_outputs(actual, expected, rtol, atol):
    """Fail unless every output has the dtype and shape that ONNX expects, and values within its tolerances."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        if a.dtype.name == "bfloat16":  # the stored 1e-3 is less than its precision: onnx's own runner takes this, too
            np.testing.assert_allclose(a.astype(np.float32), e.astype(np.float32), rtol=max(rtol, 2**-6), atol=atol)
        else:
            np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WRONG])
def test_the_outputs_are_those_of_onnx(name):
    case = CASES[name]
    for inputs, outputs in case.data_sets:
        assert_outputs(onnx_adapter.run(case.model.graph.node[0], inputs), outputs, case.rtol, case.atol)


@pytest.mark.parametrize("name", WRONG)
def test_the_outputs_are_right_where_those_of_onnx_are_wrong(name):
    case = CASES[name]
    ((inputs, (stored,)),) = case.data_sets
    wrong, right = (np.array(output, stored.dtype) for output in WRONG[name])
    is_wrong = np.array_equal(stored, wrong)
    assert is_wrong or not IS_1_23
    expected = right if is_wrong else stored  # a later onnx may have mended it
    assert_outputs(onnx_adapter.run(case.model.graph.node[0], inputs), [expected], case.rtol, case.atol)


def test_no_case_is_left_out():
    of_the_operators = {
        case.name
        for case in EVERY_CASE
        if any(node.op_type in onnx_adapter.OPERATORS for node in case.model.graph.node)
        and "_expanded" not in case.name
    }
    assert set(CASES) == of_the_operators
    ops = [case.model.graph.node[0].op_type for case in CASES.values()]
    if IS_1_23:
        assert {op: ops.count(op) for op in onnx_adapter.OPERATORS} == COUNTS
    assert len(ops) >= 150
    assert set(WRONG) < set(CASES)


@pytest.mark.parametrize("storage_order", [0, 1])
def test_indices_count_over_all_planes(storage_order):
    """Which no case shows: all that have indices have one plane."""
    x = np.random.default_rng(0).permutation(2 * 3 * 4 * 5).astype(np.float32).reshape(2, 3, 4, 5)
    y, indices = onnx_adapter.max_pool(x, kernel_shape=[2, 2], strides=[2, 2], storage_order=storage_order)
    stored = x.swapaxes(2, 3) if storage_order else x
    np.testing.assert_array_equal(stored.reshape(-1)[indices], y)
    if storage_order == 0:
        (back,) = onnx_adapter.max_unpool(y, indices, np.array(x.shape), kernel_shape=[2, 2], strides=[2, 2])
        np.testing.assert_array_equal(back, np.where(np.isin(x, y), x, 0))


@pytest.mark.parametrize(
    "actual",
    [
        [],
        [np.ones(2, np.float64)],
        [np.ones((1, 2), np.float32)],
        [np.array([1, 1.002], np.float32)],
        [np.array([1, np.nan], np.float32)],
    ],
    ids=["count", "dtype", "shape", "value", "nan"],
)
def test_a_difference_is_found(actual):
    with pytest.raises(AssertionError):
        assert_outputs(actual, [np.ones(2, np.float32)], rtol=1e-3, atol=1e-7)
