"""Try other libraries' kernels, kernels that add up in other orders, and other yardsticks: `python -m bench.kernels`.

Three tables: what `refimpl.testing.conformance` finds in the kernels of PyTorch, JAX and ONNX Runtime, where these are
installed; how many of a number of drawn calls of right kernels `compare` calls wrong; and how it, and other yardsticks,
judge right results and planted faults.
"""

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import refimpl
from refimpl import textbook
from refimpl.testing import ConformanceReport, compare, conformance, strategies
from refimpl.testing.kernels.cases import drawn
from refimpl.testing.trees import leaves

Array = np.ndarray[Any, Any]
ATTENTION, ATTENTION_BACKWARD = refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward


@dataclass(frozen=True)
class Tried:
    """A kernel of another library, and how it is tried."""

    name: str
    op: str
    make: Callable[[], Callable[..., Any]]
    arguments: dict[str, Any]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")


def torch_attention(which: str) -> Callable[..., Any]:
    """Return PyTorch's attention by one of its kernels."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(*arrays: Any, **options: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, which)):
            return torch.nn.functional.scaled_dot_product_attention(*arrays, **options)

    return attention


def torch_function(name: str) -> Callable[..., Any]:
    """Return a function of `torch.nn.functional`."""
    import torch

    return getattr(torch.nn.functional, name)  # type: ignore[no-any-return]


def refusing(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel where an error is a refusal: what a library says it cannot do is no wrong result."""

    @functools.wraps(kernel)
    def call(*arrays: Any, **options: Any) -> Any:
        try:
            return kernel(*arrays, **options)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise NotImplementedError(str(error)) from error

    return call


def jax_attention() -> Callable[..., Any]:
    """Return JAX's attention."""
    import jax

    return jax.nn.dot_product_attention


def onnxruntime_model(operator: str) -> Callable[..., Any]:
    """Return an operator of ONNX Runtime, run as a model of one node, called as PyTorch's function is."""
    import onnx
    import onnxruntime

    def run(x: Array, *more: Any, **options: Any) -> Array:
        weights = [a for a in more if isinstance(a, np.ndarray)]
        kernel = next((k for k in more if isinstance(k, int | tuple)), None)
        rank = x.ndim - 2
        attributes = {"kernel_shape": _each(kernel, rank)} if kernel is not None else {}
        for ours, theirs in (("stride", "strides"), ("dilation", "dilations")):
            if options.get(ours) is not None:
                attributes[theirs] = _each(options[ours], rank)
        attributes.setdefault("strides", attributes.get("kernel_shape", [1] * rank))
        padding = options.get("padding", 0)
        if options.get("divisor_override") is not None:
            raise NotImplementedError("ONNX has no divisor_override")
        if isinstance(padding, str):
            raise NotImplementedError("same: ONNX Runtime counts it in its own way, see DIALECTS.md")
        attributes["pads"] = _each(padding, rank) * 2
        if "groups" in options:
            attributes["group"] = options["groups"]
        if options.get("ceil_mode"):
            attributes["ceil_mode"] = 1
        if operator == "AveragePool":
            attributes["count_include_pad"] = int(options.get("count_include_pad", True))
        names = [f"x{i}" for i in range(1 + len(weights))]
        node = onnx.helper.make_node(operator, names, ["y"], **attributes)
        values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in (*names, "y")]
        graph = onnx.helper.make_graph([node], operator, values[:-1], values[-1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, dict(zip(names, (x, *weights), strict=True)))[0]  # type: ignore[no-any-return]

    run.__name__ = operator
    return run


def _each(value: Any, rank: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)] * rank


def tried() -> Iterator[Tried]:
    """Yield the kernels of the libraries that are installed."""
    torch: dict[str, Any] = {"arrays": "torch", "like": "torch", "backward": "autograd"}
    batch = {"batches": ((1,), (2,)), "broadcast": False}
    if importlib.util.find_spec("torch"):
        for which in ("MATH", "FLASH_ATTENTION"):
            name = f"PyTorch attention, {which.lower().removesuffix('_attention')}"
            yield Tried(name, ATTENTION.__name__, lambda w=which: torch_attention(w), torch | batch)
        for rank in (1, 2, 3):
            for op, function in (("conv", "conv"), ("max_pool", "max_pool"), ("avg_pool", "avg_pool")):
                name = f"{function}{rank}d"
                yield Tried(f"PyTorch {name}", op, lambda n=name: torch_function(n), torch | {"ranks": (rank,)})
    if importlib.util.find_spec("jax"):
        yield Tried("JAX attention", ATTENTION.__name__, jax_attention, {"arrays": "jax", "like": "jax"} | batch)
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        for operator, op in (("Conv", "conv"), ("MaxPool", "max_pool"), ("AveragePool", "avg_pool")):
            given = {"like": "torch", "ranks": (1, 2), "batches": ((1,), (2,)) if op == "conv" else ((1, 2),)}
            yield Tried(f"ONNX Runtime {operator}", op, lambda o=operator: onnxruntime_model(o), given, ("float32",))


def conform(examples: int) -> dict[str, ConformanceReport]:
    """Return the report of each kernel and dtype."""
    found = {}
    for kernel in track([*tried()], "Kernels of other libraries", transient=True):
        for dtype in kernel.dtypes:
            report = conformance(
                refusing(kernel.make()), kernel.op, dtypes=(dtype,), examples=examples, **kernel.arguments
            )
            found[f"{kernel.name}, {dtype}"] = report
    return found


# Right kernels that add up in other orders, in the dtype of their arguments


def in_turn(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
    """Return a convolution that adds up one product after the other."""
    return _convolution(x, weight, bias, options, lambda p: np.cumsum(p, axis=-1, dtype=p.dtype)[..., -1])


def shuffled(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
    """Return a convolution that adds up in an order that is drawn."""
    order = np.random.default_rng(weight.size)

    def total(p: Array) -> Array:
        return np.cumsum(p[..., order.permutation(p.shape[-1])], axis=-1, dtype=p.dtype)[..., -1]

    return _convolution(x, weight, bias, options, total)


def in_pairs(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
    """Return a convolution that adds up pairs, pairs of pairs, and so on."""

    def total(p: Array) -> Array:
        while p.shape[-1] > 1:
            odd = p[..., -1:] if p.shape[-1] % 2 else p[..., :0]
            p = np.concatenate([p[..., 0 : p.shape[-1] - 1 : 2] + p[..., 1::2], odd], axis=-1)
        return p[..., 0]

    return _convolution(x, weight, bias, options, total)


def _convolution(
    x: Array, weight: Array, bias: Array | None, options: dict[str, Any], total: Callable[[Array], Array]
) -> Array:
    """Return a convolution from the products of each output, which `total` adds up."""
    groups, taps = options.get("groups", 1), int(np.prod(weight.shape[1:]))
    eye = np.eye(taps, dtype=x.dtype).reshape(taps, *weight.shape[1:])
    columns = textbook.conv(x, np.tile(eye, (groups, *(1,) * (weight.ndim - 1))), **options)  # (..., G * taps, *O)
    axis = columns.ndim - weight.ndim + 1
    columns = np.moveaxis(columns, axis, -1)
    columns = columns.reshape(*columns.shape[:-1], groups, 1, taps)
    flat = weight.reshape(groups, weight.shape[0] // groups, taps)
    out = total(columns * flat) if taps else np.zeros((*columns.shape[:-3], *flat.shape[:-1]), x.dtype)
    out = np.moveaxis(out.reshape(*out.shape[:-2], -1), -1, axis)
    return out if bias is None else out + bias.reshape(-1, *(1,) * (weight.ndim - 2))


def online(block: int) -> Callable[..., Array]:
    """Return attention over blocks of keys, one after the other."""

    def kernel(query: Array, key: Array, value: Array, **options: Any) -> Array:
        parts = [
            ATTENTION(query, key[..., i : i + block, :], value[..., i : i + block, :], return_logsumexp=True, **options)
            for i in range(0, key.shape[-2], block)
        ]
        return refimpl.merge_attention(*(np.stack(both) for both in zip(*parts, strict=True)))[0]

    return kernel


def alarms(examples: int) -> dict[str, tuple[int, int, float]]:
    """Return for each right kernel: results, how many `compare` calls wrong, the largest error over its bound."""
    conv = strategies.conv(dtypes=("float32",), batches=((1,), (2,)))
    attention = strategies.scaled_dot_product_attention(
        dtypes=("float32",), lengths=(1, 2, 5, 17, 40), features=(1, 8, 32), options=("scale",), batches=((), (2,))
    )
    kernels: dict[str, tuple[Callable[..., Any], Any]] = {
        "convolution, one after the other": (in_turn, conv),
        "convolution, shuffled": (shuffled, conv),
        "convolution, in pairs": (in_pairs, conv),
        "attention, online": (online(1), attention),
        "attention, split": (online(7), attention),
    }
    backwards = {name: (op, draw(dtypes=("float32",))) for name, (op, draw) in _pairs().items()}
    found = {}
    share = max(1, examples // (len(kernels) + len(backwards)))
    for name, (kernel, strategy) in track({**kernels, **backwards}.items(), "Right kernels", transient=True):
        wrong, largest, calls = 0, 0.0, 0
        for case in drawn(strategy, share, 0):
            for got, f, arrays in _results(kernel, case):
                report = compare(got, f, *arrays, **case.options)
                calls, wrong = calls + 1, wrong + (not report.ok)
                largest = max([largest, *(r.error for r in report.results)])
        found[name] = (calls, wrong, largest)
    return found


def _pairs() -> dict[str, tuple[Callable[..., Any], Any]]:
    """Return refimpl's own ops in float32, forward and backward: blocked, threaded, by BLAS."""
    return {f"refimpl {name}": (getattr(refimpl, name), draw) for name, draw in strategies.EVERY_OP.items()}


def _results(kernel: Callable[..., Any], case: Any) -> Iterator[tuple[Any, Callable[..., Any], tuple[Any, ...]]]:
    """Yield what a kernel returns, and what its backward does if it is an op."""
    out = kernel(*case.arrays, **case.options)
    yield out, case.f, case.arrays
    if kernel is case.f:
        dout = case.dout()
        yield case.f_backward(dout, *case.arrays, **case.options), case.f_backward, (dout, *case.arrays)


# Yardsticks


def yardsticks() -> dict[str, Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], bool]]:
    """Return what judges a result: whether it takes it for right."""

    def within(rtol: float, atol: float) -> Callable[..., bool]:
        def judge(got: Any, f: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> bool:
            due = f(*(a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in arrays), **options)
            pairs = zip(leaves(got), leaves(due), strict=True)
            return all(np.allclose(g, d, rtol=rtol, atol=atol) for (_, g), (_, d) in pairs)

        return judge

    return {
        "refimpl compare": lambda got, f, arrays, options: compare(got, f, *arrays, **options).ok,
        "torch.testing.assert_close (1.3e-6, 1e-5)": within(1.3e-6, 1e-5),
        "KernelBench (1e-2, 1e-2)": within(1e-2, 1e-2),
        "numpy.allclose (1e-5, 1e-8)": within(1e-5, 1e-8),
    }


def judged() -> dict[str, tuple[int, int]]:
    """Return for each yardstick: right results that it rejects, and faults that it takes."""
    found = {}
    right, wrong = [*_right_results()], [*_faults()]
    for name, judge in yardsticks().items():
        rejected = sum(not judge(*result) for result in right)
        taken = sum(judge(*result) for result in wrong)
        found[f"{name}"] = (rejected, taken)
    found["of"] = (len(right), len(wrong))
    return found


def _calls() -> Iterator[tuple[tuple[Array, ...], dict[str, Any]]]:
    """Yield calls of attention: query, key, value."""
    rng = np.random.default_rng(0)
    for queries, keys, factor in ((64, 64, 1.0), (16, 1, 1.0), (64, 512, 1.0), (64, 64, 8.0), (8, 4096, 1.0)):
        for is_causal in (False, True):
            sizes = ((4, queries, 64), (4, keys, 64), (4, keys, 64))
            query, key, value = (rng.normal(size=size).astype(np.float32) for size in sizes)
            yield (query * np.float32(factor), key, value), {"is_causal": is_causal}


def _right_results() -> Iterator[tuple[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Yield right results of float32 kernels: attention both ways, convolutions, long means."""
    rng = np.random.default_rng(1)
    for arrays, options in _calls():
        yield ATTENTION(*arrays, **options), ATTENTION, arrays, options
        dout = rng.normal(size=arrays[0].shape).astype(np.float32)
        yield ATTENTION_BACKWARD(dout, *arrays, **options), ATTENTION_BACKWARD, (dout, *arrays), options
    for channels in (3, 64, 512):
        x, weight = (rng.normal(size=(2, channels, 12, 12)), rng.normal(size=(8, channels, 3, 3)))
        arrays = (x.astype(np.float32), weight.astype(np.float32))
        for kernel in (in_turn, shuffled, in_pairs, refimpl.conv):
            yield kernel(*arrays), refimpl.conv, arrays, {}
    for terms in (100, 10_000):
        x = rng.uniform(size=(1, 50, terms)).astype(np.float32)
        mean = np.cumsum(x, axis=-1, dtype=np.float32)[..., -1:] / np.float32(terms)
        yield mean, refimpl.adaptive_avg_pool, (x, 1), {}


def _faults() -> Iterator[tuple[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Yield results that are wrong."""
    for arrays, options in _calls():
        out = ATTENTION(*arrays, **options)
        middle = np.unravel_index(np.argsort(np.abs(out), axis=None)[out.size // 2], out.shape)
        for factor in (1 + 1e-4, 1 + 1e-3, 0.0):
            wrong = out.copy()
            wrong[middle] *= np.float32(factor)
            yield wrong, ATTENTION, arrays, options
        low = [a.astype(np.float16).astype(np.float32) for a in arrays]
        yield ATTENTION(*low, **options), ATTENTION, arrays, options
        if out.shape[-2] <= arrays[1].shape[-2]:
            other = options | ({"query_offset": 1} if options["is_causal"] else {"scale": 0.126})
            yield ATTENTION(*arrays, **other), ATTENTION, arrays, options
    x, weight = np.random.default_rng(2).normal(size=(2, 1, 64, 20, 20)).astype(np.float32) * np.float32(1e-3)
    weight = weight[:, :, :3, :3].reshape(-1, 1, 3, 3)[:4]
    small = refimpl.conv(x, weight.repeat(64, axis=1))
    yield np.zeros_like(small), refimpl.conv, (x, weight.repeat(64, axis=1)), {}


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """Yield what was found as tables."""
    table = Table(title="Kernels of other libraries: drawn calls", show_edge=False)
    for head in ("kernel", "passed", "failed", "refused", "what fails"):
        table.add_column(head, justify="left" if head in ("kernel", "what fails") else "right")
    for name, row in found["kernels"].items():
        table.add_row(name, *(str(row[key]) for key in ("passed", "failed", "refused")), "; ".join(row["kinds"]))
    yield table
    table = Table(title="Right kernels in float32", show_edge=False)
    for head in ("kernel", "results", "called wrong", "largest error / bound"):
        table.add_column(head, justify="left" if head == "kernel" else "right")
    for name, (calls, wrong, largest) in found["right"].items():
        table.add_row(name, str(calls), str(wrong), f"{largest:.2f}")
    yield table
    rows = dict(found["yardsticks"])
    right, faults = rows.pop("of")
    table = Table(title=f"Yardsticks, on {right} right results and {faults} faults", show_edge=False)
    for head in ("yardstick (rtol, atol)", "right, rejected", "faults, taken"):
        table.add_column(head, justify="left" if head.startswith("yard") else "right")
    for name, (rejected, taken) in rows.items():
        table.add_row(name, str(rejected), str(taken))
    yield table


def main() -> None:
    """Try, judge, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=200, help="calls of each kernel and dtype (default: 200)")
    parser.add_argument("--right", type=int, default=2000, help="calls of right kernels in all (default: 2000)")
    parser.add_argument("--json", type=Path, help="write what was found there, with a case to paste for each failure")
    args = parser.parse_args()
    reports = conform(args.examples) if args.examples > 0 else {}
    found = {
        "kernels": {
            name: {"passed": r.passed, "failed": r.failed, "refused": r.refused}
            | {"kinds": [f"{f.kind} ({f.count})" for f in r.failures], "failures": json.loads(r.to_json())["failures"]}
            for name, r in reports.items()
        },
        "right": alarms(args.right),
        "yardsticks": judged(),
    }
    console = Console(width=160)
    for table in tables(found):
        console.print(table)
        console.print()
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
