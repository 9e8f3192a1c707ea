"""Check a kernel of your own: a small flash attention, right, and five copies with classic faults, each found by name.

    pip install ".[examples]"
    python examples/check_your_kernel.py        # --help: all options; with Triton and PyTorch it does more

The kernel is compiled by Numba. It goes over the keys in blocks and never holds a row of scores (arXiv:2205.14135); its
backward takes the weights from the logsumexp, as FlashAttention 2 does (arXiv:2307.08691). H heads (Hq of the queries,
Hkv of keys and values); L length; E features.
"""

import argparse
import importlib.util
import math
import os
from typing import Any

import numpy as np
from digits import parsed
from matplotlib import colors
from matplotlib.figure import Figure
from numba import njit
from rich.console import Console

import refimpl
from refimpl.testing import Report, compare, conformance

CONSOLE = Console(highlight=False)
BLOCK = 16  # keys
NONE, MASK, HEADS, STALE, HALF, MEAN = range(6)
FAULTS = {
    MASK: "the mask is off by one",
    HEADS: "query head h takes key head h % Hkv",
    STALE: "the last block of keys meets the values of the block before",
    HALF: "sums are accumulated in half precision",
    MEAN: "ds lacks the mean of its row",
}
OPTIONS = {"lengths": (1, 5, 16, 33, 70), "features": (8, 16), "batches": ((),), "broadcast": False}


@njit
def rounded(x: float, fault: int) -> float:
    """Return a sum as its accumulator holds it: float32, or with the 11 bits of float16."""
    if fault != HALF:
        return x
    split = np.float32(8193.0) * np.float32(x)  # Dekker's way to keep the leading bits
    return np.float32(split - np.float32(split - np.float32(x)))


@njit
def forward(q: Any, k: Any, v: Any, scale: float, causal: bool, fault: int) -> tuple[Any, Any]:
    """Return the output (Hq, Lq, E) and the logsumexp (Hq, Lq)."""
    heads, rows, features = q.shape
    keys, group = k.shape[1], heads // k.shape[0]
    out, logsumexp = np.zeros((heads, rows, v.shape[2]), np.float32), np.full((heads, rows), -np.inf, np.float32)
    scores = np.empty(BLOCK, np.float32)
    for h in range(heads):
        kh = h % k.shape[0] if fault == HEADS else h // group
        for i in range(rows):
            largest, total = np.float32(-np.inf), np.float32(0.0)
            acc = np.zeros(v.shape[2], np.float32)
            last = min(keys, i + (2 if fault == MASK else 1)) if causal else keys  # of the visible keys, exclusive
            for start in range(0, last, BLOCK):
                stop = min(start + BLOCK, last)
                new = largest
                for j in range(start, stop):
                    s = np.float32(0.0)
                    for e in range(features):
                        s += q[h, i, e] * k[kh, j, e]
                    scores[j - start] = np.float32(scale) * s
                    new = max(new, scores[j - start])
                shrink = np.exp(largest - new)
                total *= shrink
                acc *= shrink
                back = BLOCK if fault == STALE and stop == keys and start > 0 else 0
                for j in range(start, stop):
                    p = np.exp(scores[j - start] - new)
                    total = rounded(total + p, fault)
                    for e in range(v.shape[2]):
                        acc[e] = rounded(acc[e] + p * v[kh, j - back, e], fault)
                largest = new
            if last > 0:
                out[h, i] = acc / total
                logsumexp[h, i] = largest + np.log(total)
    return out, logsumexp


@njit
def gradients(
    do: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, scale: float, causal: bool, fault: int
) -> tuple[Any, Any, Any]:
    """Return dq, dk and dv."""
    heads, rows, features = q.shape
    keys, group = k.shape[1], heads // k.shape[0]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(heads):
        kh = h % k.shape[0] if fault == HEADS else h // group
        for i in range(rows):
            mean = np.float32(0.0)
            for e in range(v.shape[2]):
                mean += do[h, i, e] * out[h, i, e]
            if fault == MEAN:
                mean = np.float32(0.0)
            last = min(keys, i + (2 if fault == MASK else 1)) if causal else keys
            for j in range(last):
                s, dp = np.float32(0.0), np.float32(0.0)
                for e in range(features):
                    s += q[h, i, e] * k[kh, j, e]
                for e in range(v.shape[2]):
                    dp += do[h, i, e] * v[kh, j, e]
                p = np.exp(np.float32(scale) * s - logsumexp[h, i])
                ds = np.float32(scale) * p * (dp - mean)
                for e in range(v.shape[2]):
                    dv[kh, j, e] = rounded(dv[kh, j, e] + p * do[h, i, e], fault)
                for e in range(features):
                    dq[h, i, e] = rounded(dq[h, i, e] + ds * k[kh, j, e], fault)
                    dk[kh, j, e] = rounded(dk[kh, j, e] + ds * q[h, i, e], fault)
    return dq, dk, dv


class Kernel:
    """The kernel as refimpl's op is called: `(query, key, value, *, is_causal, scale)`, arrays (H, L, E)."""

    def __init__(self, fault: int) -> None:
        self.fault = fault

    def __call__(self, query: Any, key: Any, value: Any, *, is_causal: bool = False, scale: float | None = None) -> Any:
        """Return the output."""
        return self._forward(query, key, value, is_causal, scale)[0]

    def backward(
        self, dout: Any, query: Any, key: Any, value: Any, *, is_causal: bool = False, scale: Any = None
    ) -> Any:
        """Return the gradients of query, key and value."""
        out, logsumexp = self._forward(query, key, value, is_causal, scale)
        given = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return gradients(dout, query, key, value, out, logsumexp, given, is_causal, self.fault)

    def _forward(self, query: Any, key: Any, value: Any, is_causal: bool, scale: float | None) -> tuple[Any, Any]:
        if not query.ndim == key.ndim == value.ndim == 3 or key.shape[-1] == 0:
            raise NotImplementedError("arrays (H, L, E)")
        given = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return forward(query, key, value, given, is_causal, self.fault)


def one_call(kernel: Kernel, rng: np.random.Generator) -> tuple[Report, Report]:
    """Compare the forward and the backward of a kernel in one call: causal, 4 heads of queries that share 2 of keys."""
    query, dout = (rng.normal(size=(4, 70, 16)).astype(np.float32) for _ in range(2))
    key, value = (rng.normal(size=(2, 70, 16)).astype(np.float32) for _ in range(2))
    arrays, options = (query, key, value), {"is_causal": True}
    back = refimpl.scaled_dot_product_attention_backward
    return (
        compare(kernel(*arrays, **options), refimpl.scaled_dot_product_attention, *arrays, **options),
        compare(kernel.backward(dout, *arrays, **options), back, dout, *arrays, **options),
    )


def many_calls(kernel: Kernel, examples: int) -> None:
    """Let conformance draw calls for the right kernel."""
    report = conformance(
        kernel, "scaled_dot_product_attention", backward=kernel.backward, options=("is_causal", "scale"),
        examples=examples, heads=((4, 2), (2, 2), (3, 1)), value_features=(8,), **OPTIONS,
    )  # fmt: skip
    CONSOLE.print(str(report), markup=False)
    report.check()


def picture(reports: dict[int, Report], path: Any) -> None:
    """Draw where each fault's first wrong gradient, or output, is wrong."""
    figure = Figure(figsize=(3 * len(reports), 4), layout="constrained")
    norm = colors.LogNorm(vmin=1e-4, vmax=1e4, clip=True)
    for axes, (fault, report) in zip(figure.subplots(1, len(reports)), reports.items(), strict=True):
        result = max((r for r in report.results if r.errors is not None), key=lambda r: r.error)
        image = axes.imshow(np.maximum(result.errors[1], 1e-4), norm=norm, cmap="RdBu_r", aspect="auto")
        axes.set(title=f"{FAULTS[fault]}\n({result.name}, head 1)", xlabel="feature", ylabel="token")
        axes.title.set_fontsize(7)
    figure.colorbar(image, label="error in units of its bound (above 1: wrong)")
    figure.savefig(path, dpi=120)


def in_triton(rng: np.random.Generator) -> None:
    """Check the forward as a Triton kernel: compiled where PyTorch has a GPU, interpreted on a CPU elsewhere."""
    if any(importlib.util.find_spec(name) is None for name in ("triton", "torch")):
        CONSOLE.print("Triton and PyTorch are not both installed: left out.")
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from kernels.triton_attention import attention

    arrays = [torch.from_numpy(rng.normal(size=(3, 40, 16)).astype(np.float32)).to(device) for _ in range(3)]
    for fault in (False, True):
        report = compare(
            attention(*arrays, off_by_one=fault), refimpl.scaled_dot_product_attention, *arrays, is_causal=True
        )
        CONSOLE.print(f"{'off by one' if fault else 'right'}, on {device}: {report}", markup=False)
        if report.ok == fault:
            raise SystemExit("the Triton kernel was judged wrongly")


def main() -> None:
    """Check the right kernel, then each fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="changes nothing: all of this is a check")
    parser.add_argument("--quick", action="store_true", help="draw 30 calls for the right kernel, not 200")
    args = parsed(parser, "check_your_kernel.png")
    CONSOLE.rule("The right kernel, in calls that are drawn")
    many_calls(Kernel(NONE), 30 if args.quick else 200)
    reports = {}
    for fault, name in FAULTS.items():
        CONSOLE.rule(f"A fault: {name}")
        output, grads = one_call(Kernel(fault), np.random.default_rng(0))
        for report in (output, grads):
            CONSOLE.print(str(report), markup=False)
        if output.ok and grads.ok:
            raise SystemExit(f"not found: {name}")
        reports[fault] = grads
    CONSOLE.rule("As a Triton kernel")
    in_triton(np.random.default_rng(0))
    picture(reports, args.out)
    CONSOLE.print(f"Saved {args.out}")


if __name__ == "__main__":
    main()
