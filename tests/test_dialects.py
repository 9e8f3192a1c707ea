"""DIALECTS.md is true: its cells with a check mark are run, the library against refimpl with the options they name."""

import ast
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import refimpl

PAGE = (Path(__file__).parent.parent / "DIALECTS.md").read_text(encoding="utf-8")
LEAST = {  # the versions that the page was checked with
    "torch": re.search(r"PyTorch ([\d.]+\d)", PAGE)[1],
    "onnx": re.search(r"ONNX ([\d.]+\d)", PAGE)[1],
    "onnxruntime": re.search(r"onnxruntime ([\d.]+\d)", PAGE)[1],
    "jax": re.search(r"JAX ([\d.]+\d)", PAGE)[1],
}


def read_cells(page):
    """Return the cells of all tables of the page, by question and library."""
    cells, header = {}, None
    for line in page.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        question, *row = (cell.strip() for cell in line.strip("|").split("|"))
        if header is None:
            header = row
        elif not set(line) <= set("|-"):
            assert len(row) == len(header), question
            assert (question, header[0]) not in cells, question
            cells |= {(question, library): cell for library, cell in zip(header, row, strict=True)}
    return cells


def options_of(cell):
    """Return what follows the arrows of a cell, or an empty string for "no option"."""
    return re.findall("→ `([^`]*)`", cell) or [""] * ("no option" in cell)


CELLS = read_cells(PAGE)
RUN = {}


def runs(question, *libraries):
    """Register what runs the cells of a row.

    The function takes a library, and returns a `Case` for each answer of refimpl that its cell names, in their order.
    Behaviour that refimpl has no option for, it asserts by itself.
    """

    def register(function):
        for library in libraries:
            assert (question, library) not in RUN
            RUN[question, library] = function
        return function

    return register


@dataclass
class Case:
    """What a library put out, and the call of refimpl that puts out the same once it has the options of the cell."""

    expected: list  # of arrays: one, or for ONNX one for each evaluator
    function: Callable
    arguments: dict
    names: dict = field(default_factory=dict)  # what the letters in the options stand for, beside the arguments
    otherwise: dict | None = None  # another dialect, where the other cells of the row name none

    def result(self, options):
        return self.function(**{**self.arguments, **options})

    def options(self, code):
        """Return the options that the page writes as `code`: floating arrays get the dtype of the arguments."""
        names = {"np": np, "max": max, **self.arguments, **self.names}
        options = eval(f"dict({code})", {"__builtins__": {}, "dict": dict}, names)
        dtype = next(array.dtype for array in self.arguments.values() if isinstance(array, np.ndarray))
        floats = {name for name, value in options.items() if isinstance(value, np.ndarray) and value.dtype.kind == "f"}
        return {name: value.astype(dtype) if name in floats else value for name, value in options.items()}


def close(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def check(case, code, others):
    """Fail unless the options give what the library put out, and some other options give something else."""
    actual = case.result(case.options(code))
    for expected in case.expected:
        assert close(actual, expected), f"{code!r} gives {actual}, the library {expected}"

    def differs(options):
        try:
            return not close(case.result(options), actual)
        except ValueError:  # refused by refimpl
            return True

    choices = [case.options(other) for other in others] if case.otherwise is None else [case.otherwise]
    assert any(differs(options) for options in choices), f"{code!r} gives the same as {others or case.otherwise}"


# The libraries: NumPy arrays in, a list of NumPy arrays out.


def torch():
    module = pytest.importorskip("torch", minversion=LEAST["torch"])
    module.set_num_threads(1)  # idle threads would spin beside the other tests
    return module


def in_torch(function, *arguments, **options):
    def tensor(value):
        return torch().from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    function = getattr(torch().nn.functional, function) if isinstance(function, str) else function
    with warnings.catch_warnings(), torch().no_grad():
        warnings.simplefilter("ignore")  # that "same" may copy where the kernel is even, that flex isn't compiled
        out = function(*map(tensor, arguments), **{name: tensor(value) for name, value in options.items()})
    return [part.numpy() for part in out] if isinstance(out, tuple) else [out.numpy()]


def torch_module(name, weights, *sizes, **options):
    """Return a module without biases that has these weights."""
    module = getattr(torch().nn, name)(*sizes, **options, bias=False)
    module.load_state_dict({key: torch().from_numpy(array) for key, array in weights.items()})
    return module


def jax():
    module = pytest.importorskip("jax", minversion=LEAST["jax"])
    module.config.update("jax_platforms", "cpu")  # a GPU rounds differently, and its memory is for CuPy
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "register_at_fork", raising=False)  # or it would warn when another test forks: an error
        module.devices()
    return module


def in_jax(function, *arguments, **options):
    out = function(*arguments, **options)
    return [np.asarray(part) for part in out] if isinstance(out, tuple) else [np.asarray(out)]


def in_onnx(op, *inputs, evaluators=("onnx", "onnxruntime"), opset=22, outputs=("float32",), **attributes):
    """Return the last output of one node as each evaluator that is installed computes it."""
    onnx = pytest.importorskip("onnx", minversion=LEAST["onnx"])
    names = ["" if array is None else f"input{i}" for i, array in enumerate(inputs)]
    feed = {name: array for name, array in zip(names, inputs, strict=True) if name}
    results = {f"output{i}": dtype for i, dtype in enumerate(outputs)}

    def value(name, dtype, shape):
        return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, names, list(results), **attributes)],
        "node",
        [value(name, array.dtype, array.shape) for name, array in feed.items()],
        [value(name, dtype, None) for name, dtype in results.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    found = [_evaluated(evaluator, model, feed) for evaluator in evaluators]
    if all(out is None for out in found):
        pytest.skip(f"none of {evaluators} is installed")
    return [out[-1] for out in found if out is not None]


def _evaluated(evaluator, model, feed):
    try:
        module = pytest.importorskip(evaluator, minversion=LEAST[evaluator])
    except pytest.skip.Exception:
        return None
    if evaluator == "onnx":
        with np.errstate(all="ignore"):  # NaN and inf are what some of the cases are about
            return pytest.importorskip("onnx.reference").ReferenceEvaluator(model).run(None, feed)
    options = module.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what it refuses comes as an exception, too
    return module.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feed)


REFERENCE, RUNTIME = {"evaluators": ("onnx",)}, {"evaluators": ("onnxruntime",)}


def line(*values):
    """Return one line of one channel: (1, 1, L), float32."""
    return np.array([[values]], np.float32)


# Attention.

_rng = np.random.default_rng(0)
ARRAYS = {
    name: _rng.normal(size=(2, 2, length, 4)).astype(np.float32)
    for name, length in (("query", 3), ("key", 5), ("value", 5))
}
MASK = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]], bool)
EMPTY = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]], bool)
BIAS = 2 * _rng.normal(size=(3, 5)).astype(np.float32)
LENGTHS, QUERY_LENGTHS = np.array([4, 2], np.int32), np.array([3, 2], np.int32)
LETTERS = {
    "Lq": 3, "Lk": 5, "Hq": 2, "E": 4, "i": np.arange(3)[:, None], "j": np.arange(5), "mask": MASK, "bias": BIAS,
    "sink": np.array([1.0, -1.0]), "left": 1, "right": 1, "past": 1, "lengths": LENGTHS, "cap": 1.0,
    "query_lengths": QUERY_LENGTHS, "slopes": np.array([[[0.5]], [[0.25]]]),
}  # fmt: skip


def ours(**changes):
    return refimpl.scaled_dot_product_attention(**{**ARRAYS, **changes})


def our_logsumexp(**arguments):
    return refimpl.scaled_dot_product_attention(**arguments, return_logsumexp=True)[1]


def attention(expected, function=refimpl.scaled_dot_product_attention, otherwise=None, **letters):
    """Return the case of attention on the arrays above."""
    return Case(expected, function, ARRAYS, {**LETTERS, **letters}, otherwise)


def torch_attention(arrays=ARRAYS, **options):
    return in_torch("scaled_dot_product_attention", *arrays.values(), **options)


def torch_flex(score_mod):
    """Return output and logsumexp of PyTorch's attention with scores of one's own."""
    torch()
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def attend(*arrays):
        out, more = flex.flex_attention(*arrays, score_mod=score_mod, return_aux=flex.AuxRequest(lse=True))
        return out, more.lse

    return in_torch(attend, *ARRAYS.values())


def torch_multi_head(mask=None, padding=None, **options):
    """Return the case of PyTorch's multi-head module on some tokens."""
    rng, shapes = np.random.default_rng(1), {"in_proj_weight": (12, 4), "out_proj.weight": (4, 4)}
    tokens = rng.normal(size=(2, 3, 4)).astype(np.float32)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    module = torch_module("MultiheadAttention", weights, 4, 2, batch_first=True, **options)
    out = in_torch(module, tokens, tokens, tokens, attn_mask=mask, key_padding_mask=padding)[:1]
    arguments = {"query": tokens, "key": tokens, "value": tokens, "params": weights, "num_heads": 2}
    return Case(out, refimpl.multi_head_attention, arguments, {**LETTERS, "mask": mask})


def onnx_attention(*more, arrays=ARRAYS, **options):
    return in_onnx("Attention", *arrays.values(), *more, opset=25, **options)


def jax_attention(arrays=ARRAYS, **options):
    """Return output and logsumexp of JAX's attention, heads first."""
    swapped = (array.swapaxes(1, 2) for array in arrays.values())
    outs = in_jax(jax().nn.dot_product_attention, *swapped, **options, return_residual=True)
    return [out.swapaxes(1, 2) for out in outs]


@runs("Causal alignment", "PyTorch", "ONNX", "JAX")
def _(library):
    if library == "PyTorch":
        torch()
        ends = pytest.importorskip("torch.nn.attention.bias").causal_lower_right(3, 5)
        return [attention(torch_attention(is_causal=True)), attention(torch_attention(attn_mask=ends))]
    if library == "JAX":
        return [attention(jax_attention(is_causal=True)[:1])]
    assert all(close(out, ours(is_causal=True)) for out in onnx_attention(is_causal=1))
    past = [ARRAYS[name][:, :, :1] for name in ("key", "value")]
    new = {name: array[:, :, 1:] if name != "query" else array for name, array in ARRAYS.items()}
    return [attention(onnx_attention(None, *past, arrays=new, is_causal=1))]


@runs("Causal with lengths", "ONNX", "JAX")
def _(library):
    if library == "ONNX":
        return [attention(onnx_attention(None, None, None, LENGTHS.astype(np.int64), is_causal=1))]
    return [attention(jax_attention(is_causal=True, key_value_seq_lengths=LENGTHS)[:1])]


@runs("Window bounds", "ONNX", "JAX")
def _(library):
    if library == "ONNX":
        return [attention(onnx_attention(left_window_size=1, right_window_size=1))]
    return [attention(jax_attention(local_window_size=(1, 1))[:1])]


@runs("Boolean mask", "PyTorch", "ONNX", "JAX")
def _(library):
    if library == "PyTorch":
        padding = np.arange(3) >= QUERY_LENGTHS[:, None]
        case = torch_multi_head(padding=padding)
        assert close(case.result({"mask": ~padding[:, None, None, :]}), case.expected[0])
        return [attention(torch_attention(attn_mask=MASK)), torch_multi_head(MASK[:, :3])]
    if library == "JAX":
        return [attention(jax_attention(mask=MASK[None, None])[:1])]
    short = MASK & (np.arange(5) < 4)
    assert all(close(out, ours(mask=short)) for out in onnx_attention(MASK[:, :4]))
    return [attention(onnx_attention(MASK))]


@runs("No visible key: output", "PyTorch", "ONNX", "JAX")
def _(library):
    if library == "PyTorch":
        case = torch_multi_head(~EMPTY[:, :3])
        assert np.isnan(case.expected[0][:, 1]).all()
        assert (case.result({"mask": EMPTY[:, :3]})[:, 1] == 0).all()
        return [attention(torch_attention(attn_mask=EMPTY), mask=EMPTY)]
    if library == "ONNX":
        return [attention(onnx_attention(EMPTY), mask=EMPTY)]
    hidden = jax_attention(mask=EMPTY[None, None])[:1]
    assert close(hidden[0][:, :, 1], ARRAYS["value"].mean(axis=2))
    padded = jax_attention(query_seq_lengths=QUERY_LENGTHS)[:1]
    return [attention(hidden, mask=EMPTY), attention(padded, otherwise={})]


@runs("No visible key: logsumexp", "PyTorch", "JAX")
def _(library):
    if library == "JAX":
        return [attention(jax_attention(mask=EMPTY[None, None])[1:], our_logsumexp, mask=EMPTY)]
    where, visible = torch().where, torch().from_numpy(EMPTY)
    flex = torch_flex(lambda score, _n, _h, i, j: where(visible[i, j], score, -math.inf))
    return [attention(flex[1:], our_logsumexp, mask=EMPTY)]


@runs("Softcap and bias", "PyTorch", "ONNX")
def _(library):
    query, key = ARRAYS["query"], ARRAYS["key"]  # the bias as features, so that the cap comes after it
    query = np.concatenate((query, np.broadcast_to(2 * BIAS, (2, 2, 3, 5))), axis=-1)
    key = np.concatenate((key, np.broadcast_to(np.eye(5, dtype=np.float32), (2, 2, 5, 5))), axis=-1)
    bias_first = {"query": query, "key": key, "scale": 0.5, "softcap": 1.0}
    if library == "ONNX":
        return [attention(onnx_attention(BIAS, softcap=1.0), otherwise=bias_first)]
    tanh, bias = torch().tanh, torch().from_numpy(BIAS)
    assert close(ours(**bias_first), torch_flex(lambda score, _n, _h, i, j: tanh(score + bias[i, j]))[0])
    cap_first = torch_flex(lambda score, _n, _h, i, j: tanh(score) + bias[i, j])[:1]
    return [attention(cap_first, otherwise=bias_first)]


@runs("Sinks", "PyTorch")
def _(_):
    return [torch_multi_head(add_zero_attn=True) for _ in range(2)]


@runs("Scale unless given", "PyTorch", "ONNX", "JAX")
def _(library):
    call = {"PyTorch": torch_attention, "ONNX": onnx_attention, "JAX": lambda: jax_attention()[:1]}[library]
    return [attention(call())]


@runs("NaN in a hidden value", "PyTorch", "ONNX", "JAX")
def _(library):
    hides_last = np.broadcast_to(np.arange(5) < 4, (3, 5))
    spoilt = {**ARRAYS, "value": np.where(np.arange(5)[:, None] == 4, np.float32(np.nan), ARRAYS["value"])}
    if library == "PyTorch":
        outs = torch_attention(spoilt, attn_mask=hides_last)
    elif library == "ONNX":
        outs = onnx_attention(hides_last, arrays=spoilt)
    else:
        outs = jax_attention(spoilt, mask=hides_last[None, None])[:1]
    assert all(np.isnan(out).all() for out in outs)
    assert np.array_equal(ours(**spoilt, mask=hides_last), ours(mask=hides_last))
    return []


@runs("Softmax of float64", "PyTorch", "ONNX", "JAX")
def _(library):
    rng = np.random.default_rng(1)
    wide = {name: rng.normal(size=array.shape) for name, array in ARRAYS.items()}
    weights = np.exp(wide["query"] @ wide["key"].swapaxes(-1, -2) / 2)
    exact = weights / weights.sum(axis=-1, keepdims=True) @ wide["value"]

    def error(out):
        assert out.dtype == np.float64
        return np.abs(out - exact).max()

    assert error(ours(**wide)) < 1e-14
    if library == "PyTorch":
        assert error(torch_attention(wide)[0]) < 1e-14
    elif library == "ONNX":
        double = {"arrays": wide, "outputs": ("float64",), **REFERENCE}
        assert error(onnx_attention(**double)[0]) < 1e-14
        assert 1e-9 < error(onnx_attention(**double, softmax_precision=1)[0]) < 1e-6
    else:
        with jax().enable_x64(True):
            out = jax_attention(wide)[0]
        assert 1e-9 < error(out) < 1e-6
        assert close(ours(**{name: array.astype(np.float32) for name, array in wide.items()}), out)
    return []


# Pooling.

TWO = ("float32", "int64")  # MaxPool with its indices; for a stride of 1 the reference evaluator has wrong ones


def our_indices(**arguments):
    return refimpl.max_pool(**arguments, return_indices=True)[1]


def our_gradient(**arguments):
    """Return the gradient of the sum of the maxima, without that of what was put around `x` by hand."""
    dx = refimpl.max_pool_backward(np.ones_like(refimpl.max_pool(**arguments)), **arguments)
    return dx[..., 1:-1] if arguments["x"].shape[-1] == 6 else dx


def jax_windows(x, window, stride, *padding, initial=-np.inf, reduce="max"):
    lax = jax().lax
    padding = ((0, 0), (0, 0), *padding) if padding else "VALID"
    return lax.reduce_window(x, np.float32(initial), getattr(lax, reduce), (1, 1, *window), (1, 1, *stride), padding)


def jax_gradient(x, *windows):
    return in_jax(jax().grad(lambda x: jax_windows(x, *windows).sum()), x)


@runs("Last window of `ceil_mode`", "PyTorch", "ONNX", "JAX")
def _(library):
    x = np.random.default_rng(1).permutation(30).astype(np.float32).reshape(1, 1, 6, 5)
    # Along the first dimension the last window hangs over the end, along the second it would begin beyond it.
    kernel, stride = (3, 2), (2, 3)
    if library == "PyTorch":
        out = in_torch("max_pool2d", x, kernel, stride, padding=1, ceil_mode=True)
    elif library == "ONNX":
        out = in_onnx("MaxPool", x, kernel_shape=kernel, strides=stride, pads=(1, 1, 1, 1), ceil_mode=1)
    else:
        out = in_jax(jax_windows, x, kernel, stride, (1, 1), (1, 1))
    return [Case(out, refimpl.max_pool, {"x": x, "kernel_size": kernel, "stride": stride, "padding": 1})]


@runs("Divisor of the mean", "PyTorch", "ONNX", "JAX")
def _(library):
    x = line(1, 2, 3, 4, 5, 6)  # the first window has padding in it, the last hangs over the padding after the end
    if library == "PyTorch":
        outs = [in_torch("avg_pool1d", x, 3, 2, 1, ceil_mode=True)]
    elif library == "ONNX":
        options = {"kernel_shape": (3,), "strides": (2,), "pads": (1, 1), "ceil_mode": 1}
        outs = [in_onnx("AveragePool", x, **options, **more) for more in ({}, {"count_include_pad": 1})]
    else:
        outs = [[total / 3 for total in in_jax(jax_windows, x, (3,), (2,), (1, 2), initial=0, reduce="add")]]
    arguments = {"x": x, "kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    return [Case(out, refimpl.avg_pool, arguments, {"K": 3}) for out in outs]


@runs("Equal maxima", "PyTorch", "ONNX", "JAX")
def _(library):
    # Row by row the first maximum comes at 1, column by column at 2: where `nearly` has it by a hair.
    x, nearly = np.array([[[[1, 3], [3, 0]]], [[[1, 3], [3.001, 0]]]], np.float32).reshape(2, 1, 1, 2, 2)
    arguments = {"x": x, "kernel_size": (2, 2)}
    if library == "JAX":
        return [Case(jax_gradient(x, (2, 2), (1, 1)), our_gradient, arguments, otherwise={"x": nearly})]
    if library == "PyTorch":
        found = in_torch("max_pool2d", x, (2, 2), return_indices=True)[1:]
    else:
        found = in_onnx("MaxPool", x, kernel_shape=(2, 2), strides=(2, 2), outputs=TWO)
    return [Case(found, our_indices, arguments, otherwise={"x": nearly})]


@runs("NaN", "PyTorch", "ONNX", "JAX")
def _(library):
    x = line(1, np.nan, 2, np.nan, 0)
    arguments = {"x": x, "kernel_size": 5}
    assert our_indices(**arguments).item() == 1
    if library == "PyTorch":
        out, found = in_torch("max_pool1d", x, 5, return_indices=True)
        assert found.item() == 3
        return [Case([out], refimpl.max_pool, arguments)]
    if library == "JAX":
        assert jax_gradient(x, (5,), (1,))[0].tolist() == line(0, 0, 0, 0, 1).tolist()
        assert our_gradient(**arguments).tolist() == line(0, 1, 0, 0, 0).tolist()
        return [Case(in_jax(jax_windows, x, (5,), (1,)), refimpl.max_pool, arguments)]
    options = {"kernel_shape": (5,), "strides": (5,), "outputs": TWO}
    assert all(found.item() == 0 for found in in_onnx("MaxPool", line(np.nan, 1, 2, 3, 4), **options))
    return [Case(in_onnx("MaxPool", x, **options), our_indices, arguments)]


@runs("Padding against -inf", "PyTorch", "ONNX", "JAX")
def _(library):
    x = line(-np.inf, 1, 2, -np.inf)
    arguments = {"x": x, "kernel_size": 2, "stride": 2}
    if library == "JAX":
        return [Case(jax_gradient(x, (2,), (2,), (1, 1)), our_gradient, arguments)]
    if library == "PyTorch":
        found = in_torch("max_pool1d", x, 2, 2, 1, return_indices=True)[1:]
    else:
        found = in_onnx("MaxPool", x, kernel_shape=(2,), strides=(2,), pads=(1, 1), outputs=TWO)
    return [Case(found, our_indices, arguments)]


@runs("Indices", "PyTorch", "ONNX")
def _(library):
    x = np.random.default_rng(1).permutation(32).astype(np.float32).reshape(1, 2, 4, 4)
    arguments = {"x": x, "kernel_size": (2, 2)}
    if library == "PyTorch":
        found = in_torch("max_pool2d", x, (2, 2), return_indices=True)[1:]
        return [Case(found, our_indices, arguments, otherwise={"x": x.swapaxes(2, 3)})]
    options = {"kernel_shape": (2, 2), "strides": (2, 2)}
    found, by_columns = (in_onnx("MaxPool", x, **options, outputs=TWO, storage_order=order) for order in (0, 1))
    own, first = our_indices(**arguments), np.array([0, 16]).reshape(1, 2, 1, 1)
    assert all(np.array_equal(each, own + first) for each in found)
    assert all(np.array_equal(each, own % 4 * 4 + own // 4 + first) for each in by_columns)
    found, values = own + first, refimpl.max_pool(**arguments)
    arguments = {"x": values, "indices": found, "kernel_size": (2, 2)}
    out = in_onnx("MaxUnpool", values, found, **options)
    return [Case(out, refimpl.max_unpool, arguments, {"P": 16}, otherwise={"indices": found})]


@runs("How much padding", "PyTorch", "ONNX", "JAX")
def _(library):
    x = line(1, 2, 3, 4)
    arguments = {"x": x, "kernel_size": 3, "stride": 1}
    if library == "PyTorch":
        with pytest.raises(RuntimeError, match="at most half"):
            in_torch("max_pool1d", x, 3, 1, padding=2)
        return []
    if library == "ONNX":
        with pytest.raises(Exception, match="kernel"):
            in_onnx("MaxPool", x, kernel_shape=(3,), pads=(3, 3), **RUNTIME)
        out = in_onnx("MaxPool", x, kernel_shape=(3,), pads=(2, 2), **RUNTIME)
    else:
        assert in_jax(jax_windows, x, (3,), (1,), (3, 3))[0][0, 0, 0] == -np.inf
        with pytest.raises(ValueError, match="padding"):
            refimpl.max_pool(**arguments, padding=3)
        out = in_jax(jax_windows, x, (3,), (1,), (2, 2))
    return [Case(out, refimpl.max_pool, arguments, otherwise={"padding": 1})]


@runs("Adaptive windows", "PyTorch", "ONNX")
def _(library):
    x = line(1, 2, 3, 4, 5)
    out = in_torch("adaptive_avg_pool1d", x, 3) if library == "PyTorch" else in_onnx("GlobalAveragePool", x)
    return [Case(out, refimpl.adaptive_avg_pool, {"x": x})]


@runs("Lp of negative elements", "PyTorch", "ONNX")
def _(library):
    x = line(3, -4, 1, 5, -2, 2)
    if library == "PyTorch":
        cubes = in_torch("lp_pool1d", x, 3, 2)[0]
        assert np.array_equal(cubes, line(np.nan, np.cbrt(np.float32(126)), 0), equal_nan=True)
        out = in_torch("lp_pool1d", x, 2, 2)
    else:
        out = in_onnx("LpPool", x, kernel_shape=(2,), strides=(2,), p=3)
    return [Case(out, refimpl.lp_pool, {"x": x, "kernel_size": 2}, {"p": 3})]


@runs("Lp over the end", "PyTorch", "ONNX")
def _(library):
    x = line(1, 2, 3, 4, 5)
    arguments = {"x": x, "norm_type": 2, "kernel_size": 2}
    options = {"kernel_shape": (2,), "strides": (2,), "p": 2, "ceil_mode": 1}
    scaled = refimpl.lp_pool(**arguments, ceil_mode=True) * line(1, 1, math.sqrt(2))
    if library == "PyTorch":
        assert close(in_torch("lp_pool1d", x, 2, 2, ceil_mode=True)[0], scaled)
        return []
    assert close(in_onnx("LpPool", x, **options, **REFERENCE)[0], scaled)
    return [Case(in_onnx("LpPool", x, **options, **RUNTIME), refimpl.lp_pool, arguments, otherwise={})]


@runs("Stride unless given", "PyTorch", "ONNX", "JAX")
def _(library):
    x = line(1, 2, 3, 4, 5)
    if library == "PyTorch":
        out = in_torch("max_pool1d", x, 2)
    elif library == "ONNX":
        out = in_onnx("MaxPool", x, kernel_shape=(2,))
    else:
        out = in_jax(jax().lax.reduce_window, x, -np.inf, jax().lax.max, (1, 1, 2))
    return [Case(out, refimpl.max_pool, {"x": x, "kernel_size": 2})]


# Convolution.


def jax_conv(x, weight, stride=1, padding="VALID"):
    return in_jax(jax().lax.conv_general_dilated, x, weight, (stride,), padding)


def jax_transpose(x, weight, stride, padding="VALID", *, adjoint=True, **options):
    """Transpose as JAX does, `adjoint` with the kernel turned into that of the others."""
    layout = {"dimension_numbers": ("NCH", "OIH" if adjoint else "IOH", "NCH"), "transpose_kernel": adjoint}
    return in_jax(jax().lax.conv_transpose, x, weight, (stride,), padding, **layout, **options)


@runs('"same": the odd element', "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight, modes = line(1, 2, 3, 4), line(1, 10), ("SAME_UPPER", "SAME_LOWER")
    arguments, letters = {"x": x, "weight": weight}, {"a": 0, "b": 1}
    if library == "PyTorch":
        out = in_torch("conv1d", x, weight, padding="same")
        return [Case(out, refimpl.conv, arguments, letters, otherwise={"padding": "same_lower"})]
    if library == "ONNX":
        outs = [in_onnx("Conv", x, weight, auto_pad=mode) for mode in modes]
    else:
        outs = [jax_conv(x, weight, padding=mode.removesuffix("_UPPER")) for mode in modes]
    return [Case(out, refimpl.conv, arguments, letters) for out in outs]


@runs('"same" with a stride', "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight = line(1, 2, 3, 4), line(1, 10, 100)
    if library == "PyTorch":
        with pytest.raises(RuntimeError, match="strided"):
            in_torch("conv1d", x, weight, stride=2, padding="same")
        out = in_torch("conv1d", x, weight, stride=2, padding=1)
    elif library == "ONNX":
        out = in_onnx("Conv", x, weight, strides=(2,), auto_pad="SAME_UPPER")
    else:
        out = jax_conv(x, weight, 2, "SAME")
    return [Case(out, refimpl.conv, {"x": x, "weight": weight, "stride": 2}, {"K": 3})]


@runs("Padding with values", "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight, modes = line(1, 2, 3, 4), line(1, 10, 100), ("reflect", "edge", "wrap")
    if library == "PyTorch":
        weights, modes = {"weight": weight}, ("reflect", "replicate", "circular")
        modules = [torch_module("Conv1d", weights, 1, 1, 3, padding=2, padding_mode=mode) for mode in modes]
        outs = [in_torch(module, x) for module in modules]
    elif library == "ONNX":
        padded = [in_onnx("Pad", x, np.array([0, 0, 2, 0, 0, 2]), mode=mode) for mode in modes]
        outs = [[out for around in each for out in in_onnx("Conv", around, weight)] for each in padded]
    else:
        padded = [jax().numpy.pad(x, ((0, 0), (0, 0), (2, 2)), mode=mode) for mode in modes]
        outs = [jax_conv(around, weight) for around in padded]
    return [Case(out, refimpl.conv, {"x": x, "weight": weight, "padding": 2}) for out in outs]


@runs("Kernel flipped", "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight = line(1, 2, 3, 4), line(1, 10)
    if library == "PyTorch":
        outs = [in_torch("conv1d", x, weight)]
    elif library == "ONNX":
        outs = [in_onnx("Conv", x, weight)]
    else:
        outs = [jax_conv(x, weight), in_jax(jax().scipy.signal.convolve, x, weight, mode="valid")]
    return [Case(out, refimpl.conv, {"x": x, "weight": weight}) for out in outs]


@runs("Transposed: kernel", "PyTorch", "ONNX", "JAX")
def _(library):
    rng = np.random.default_rng(1)
    x, weight = (rng.integers(9, size=size).astype(np.float32) for size in ((1, 2, 3), (2, 3, 3)))
    if library == "PyTorch":
        outs = [in_torch("conv_transpose1d", x, weight, stride=2)]
    elif library == "ONNX":
        outs = [in_onnx("ConvTranspose", x, weight, strides=(2,))]
    else:
        outs = [jax_transpose(x, weight, 2, adjoint=adjoint) for adjoint in (False, True)]
    return [Case(out, refimpl.conv_transpose, {"x": x, "weight": weight, "stride": 2}) for out in outs]


@runs("Transposed: padding", "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight, letters = line(1, 2, 3), line(1, 10, 100, 1000), {"K": 4, "a": 0, "b": 1}
    if library == "PyTorch":
        outs, letters["a"] = [in_torch("conv_transpose1d", x, weight, stride=2, padding=1)], 1
    elif library == "ONNX":
        outs = [in_onnx("ConvTranspose", x, weight, strides=(2,), pads=(0, 1))]
    else:
        outs = [jax_transpose(x, weight, 2, ((0, 1),), use_consistent_padding=crops) for crops in (False, True)]
    return [Case(out, refimpl.conv_transpose, {"x": x, "weight": weight, "stride": 2}, letters) for out in outs]


@runs("Transposed: output padding", "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight = line(1, 2, 3), line(1, 10, 100)
    arguments, extra = {"x": x, "weight": weight, "stride": 2, "padding": 1}, 1
    if library == "PyTorch":
        options, extra = {"stride": 2, "padding": 1, "output_padding": 2}, 2
        with pytest.raises(RuntimeError, match="smaller than either stride or dilation"):
            in_torch("conv_transpose1d", x, weight, **options)
        out = in_torch("conv_transpose1d", x, weight, **options, dilation=3)
        arguments["dilation"] = 3
    elif library == "ONNX":
        options = {"strides": (2,), "pads": (1, 1)}
        for evaluator in (REFERENCE, RUNTIME):
            with pytest.raises(Exception, match=r"output.shape"):
                in_onnx("ConvTranspose", x, weight, **options, dilations=(3,), output_padding=(2,), **evaluator)
        out = in_onnx("ConvTranspose", x, weight, **options, output_padding=(1,))
    else:
        out = jax_transpose(x, weight, 2, ((1, 1 + extra),))
        assert close(jax_transpose(x, weight, 2, ((1, 1),))[0], refimpl.conv_transpose(**arguments))
    letters = {"extra": extra, "size": out[0].shape[-1]}
    return [Case(out, refimpl.conv_transpose, arguments, letters, otherwise={})]


@runs('Transposed "same"', "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight = line(1, 2, 3), line(1, 10, 100)
    if library == "PyTorch":
        with pytest.raises(TypeError, match="padding"):
            in_torch("conv_transpose1d", x, weight, stride=2, padding="same")
        return []
    if library == "ONNX":
        modes = ("SAME_UPPER", "SAME_LOWER")
        outs = [in_onnx("ConvTranspose", x, weight, strides=(2,), auto_pad=mode) for mode in modes]
    else:
        outs = [jax_transpose(x, weight, 2, "SAME")]
    return [Case(out, refimpl.conv_transpose, {"x": x, "weight": weight, "stride": 2}) for out in outs]


@runs("Transposed, kernel shorter than stride", "PyTorch", "ONNX", "JAX")
def _(library):
    x, weight = line(1, 2, 3), line(1, 10)
    if library == "PyTorch":
        out = in_torch("conv_transpose1d", x, weight, stride=3)
    elif library == "ONNX":
        out = in_onnx("ConvTranspose", x, weight, strides=(3,))
    else:
        out = jax_transpose(x, weight, 3, "VALID")
    arguments, letters = {"x": x, "weight": weight, "stride": 3}, {"K": 2, "size": 9}
    return [Case(out, refimpl.conv_transpose, arguments, letters)]


@runs("Transposed: size asked for", "PyTorch", "ONNX")
def _(library):
    x, weight = line(1, 2, 3), line(1, 10, 100)
    if library == "PyTorch":
        module, letters = (
            torch_module("ConvTranspose1d", {"weight": weight}, 1, 1, 3, stride=2),
            {"size": 8, "total": 0},
        )
        for size in (6, 9):
            with pytest.raises(ValueError, match="output size"):
                in_torch(module, x, output_size=[size])
        outs = [in_torch(module, x, output_size=[8])]
    else:
        options = {"strides": (2,), "output_shape": (4,), **RUNTIME}  # the other evaluator refuses to crop
        modes, letters = ({}, {"auto_pad": "SAME_UPPER"}), {"size": 4, "total": 3}
        outs = [in_onnx("ConvTranspose", x, weight, **options, **mode) for mode in modes]
    return [Case(out, refimpl.conv_transpose, {"x": x, "weight": weight, "stride": 2}, letters) for out in outs]


@pytest.mark.parametrize(("question", "library"), RUN, ids=map(" ".join, RUN))
def test_the_cell_is_true(question, library):
    own = options_of(CELLS[question, library])
    row = {code for (other, _), cell in CELLS.items() if other == question for code in options_of(cell)}
    for case, code in zip(RUN[question, library](library), own, strict=True):
        check(case, code, sorted(row - {code}))


def test_what_has_a_check_mark_is_run_and_nothing_else():
    marked = {key for key, cell in CELLS.items() if cell.endswith("✓")}
    assert marked == set(RUN)
    assert not any("✓" in cell for key, cell in CELLS.items() if key not in marked)
    assert {library for _, library in marked} == {"PyTorch", "ONNX", "JAX"}


def test_every_option_of_the_page_is_one_of_ours():
    ops = [function for function in vars(refimpl).values() if inspect.isfunction(function)]
    known = {name for op in ops for name in inspect.signature(op).parameters}
    calls = [ast.parse(f"dict({code})", mode="eval").body for cell in CELLS.values() for code in options_of(cell)]
    named = {keyword.arg for call in calls for keyword in call.keywords}
    assert len(named) > 15
    assert named <= known


def test_a_false_cell_fails():
    case = Case([line(1, 2)], lambda x, factor: x * factor, {"x": line(1, 2)})
    check(case, "factor=1", ["factor=2"])
    with pytest.raises(AssertionError, match=r"'factor=2' gives .* the library"):
        check(case, "factor=2", ["factor=1"])
    with pytest.raises(AssertionError, match="gives the same as"):
        check(case, "factor=1", ["factor=1.0"])
