"""One call of every op that uses most of its options, on small arrays; and calls that say whether they wait."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import refimpl

Tree = Any  # arrays in tuples and dicts
FLOATING = ("float64", "float32", "float16", "bfloat16")


class Call(NamedTuple):
    """`getattr(refimpl, op)(*arrays, **options)`, the arrays in float64 on NumPy."""

    op: str
    arrays: tuple[Any, ...]
    options: dict[str, Any]

    def on(self, place: Callable[[np.ndarray], Any]) -> "Call":
        """Return the call with each of its arrays placed elsewhere."""
        return Call(self.op, changed(place, self.arrays), changed(place, self.options))

    def cast(self, dtype: Any) -> "Call":
        """Return the call with its floating arrays in this dtype."""
        call = self.on(lambda a: a.astype(dtype) if a.dtype.name in FLOATING else a)
        if self.op == "merge_attention" and np.dtype(dtype).itemsize == 2:  # logsumexps of half types are float32
            call = call._replace(arrays=(call.arrays[0], self.arrays[1].astype(np.float32)))
        return call

    def forward(self) -> Any:
        """Return the result."""
        return getattr(refimpl, self.op)(*self.arrays, **self.options)

    def backward(self, dout: Any) -> Any:
        """Return the gradients."""
        return getattr(refimpl, f"{self.op}_backward")(dout, *self.arrays, **self.options)


def changed(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply a function to every array in (named) tuples and mappings."""
    if isinstance(tree, dict):
        return {key: changed(change, part) for key, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [changed(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return change(tree) if hasattr(tree, "dtype") and hasattr(tree, "shape") else tree


def flat(tree: Tree) -> list[Any]:
    """Return every array of a result in order, without what is None."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple):
        return [array for part in tree for array in flat(part)]
    return [] if tree is None else [tree]


def normal(*shape: int) -> np.ndarray:
    """Return normal numbers, others for every shape."""
    return np.random.default_rng(shape).standard_normal(shape)


def smoke_calls() -> list[Call]:
    """Return a call of every op."""
    x, volume, tokens = normal(2, 4, 9, 8), normal(1, 2, 5, 6, 4), normal(2, 5, 12)
    query, key, value = normal(2, 4, 6, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 4)
    mask, keep = (np.random.default_rng(seed).random((2, 4, 6, 7)) < 0.8 for seed in (0, 1))
    shared = {
        "bias": normal(4, 6, 7), "mask": mask, "is_causal": True, "window": (3, None), "query_offset": 1,
        "query_lengths": np.array([6, 4]), "key_lengths": np.array([7, 5]), "sink": normal(4), "softcap": 5.0,
    }  # fmt: skip
    params = {
        "in_proj_weight": normal(36, 12) / 4, "in_proj_bias": normal(36),
        "out_proj.weight": normal(12, 12) / 4, "out_proj.bias": normal(12),
    }  # fmt: skip
    indices = refimpl.max_pool(x, 2, return_indices=True)[1]
    same = {"stride": 2, "padding": "same", "groups": 2}
    return [
        Call("conv", (x, normal(6, 2, 3, 3), normal(6)), same),
        Call("conv", (x, normal(6, 4, 3, 3), normal(6)), {"padding": ((1, 2), (2, 1)), "padding_mode": "reflect"}),
        Call("conv", (x, normal(4, 1, 3, 3)), {"padding": 2, "dilation": 2, "groups": 4}),
        Call("conv", (volume, normal(3, 2, 2, 3, 2)), {"padding": 1}),
        Call("conv_transpose", (x, normal(4, 3, 3, 3), normal(6)), {"stride": 2, "output_padding": 1, "groups": 2}),
        Call("max_pool", (x, 3), {"stride": 2, "padding": 1, "ceil_mode": True}),
        Call("avg_pool", (x, 3), {"stride": 2, "padding": 1, "count_include_pad": False}),
        Call("lp_pool", (x, 3.0, 3), {"stride": 2}),
        Call("adaptive_avg_pool", (x, (4, 3)), {}),
        Call("adaptive_max_pool", (x, (4, 3)), {}),
        Call("max_unpool", (normal(2, 4, 4, 4), indices, 2), {"output_size": (9, 8)}),
        Call("scaled_dot_product_attention", (query, key, value), {}),
        Call("scaled_dot_product_attention", (query, key, value), {**shared, "dropout_mask": keep, "dropout_p": 0.2}),
        Call("attention_weights", (query, key), shared),
        Call("multi_head_attention", (tokens, tokens, tokens, params), {"num_heads": 3, "is_causal": True}),
        Call("merge_attention", (normal(3, 2, 4, 6, 4), normal(3, 2, 4, 6)), {}),
    ]


class Probe(NamedTuple):
    """What a README claim is tested on: a function without arguments, and whether it waits or may be captured."""

    call: Callable[[], Any]
    waits: bool
    captured: bool


def probes(asarray: Callable[[np.ndarray], Any]) -> dict[str, Probe]:
    """Return calls of which README says whether they wait for the device, and whether a CUDA graph may hold them."""

    def array(*shape: int) -> Any:
        return asarray(normal(*shape).astype(np.float32))

    r, x, depthwise, weight = refimpl, array(2, 4, 32, 32), array(4, 1, 3, 3), array(8, 4, 3, 3)
    query, key, value, dout = array(2, 4, 64, 32), array(2, 2, 80, 32), array(2, 2, 80, 16), array(2, 4, 64, 16)
    parts = array(3, 2, 4, 64, 16), array(3, 2, 4, 64)
    pooled, indices = r.max_pool(x, 3, stride=2, return_indices=True)
    grid, best = array(2, 4, 5, 5), r.adaptive_max_pool(x, 5, return_indices=True)[1]
    attention, attention_backward = r.scaled_dot_product_attention, r.scaled_dot_product_attention_backward
    lengths, of_lp, wide = asarray(np.array([80, 40])), array(2, 4, 16, 16), array(2, 8, 32, 32)
    in_graph = {
        "max_pool": lambda: r.max_pool(x, 3, stride=2, return_indices=True),
        "max_pool_backward": lambda: r.max_pool_backward(pooled, x, 3, stride=2),
        "max_pool_backward with indices": lambda: r.max_pool_backward(pooled, x, 3, stride=2, indices=indices),
        "avg_pool": lambda: r.avg_pool(x, 3, padding=1, count_include_pad=False),
        "avg_pool_backward": lambda: r.avg_pool_backward(x, x, 3, stride=1, padding=1, count_include_pad=False),
        "lp_pool": lambda: r.lp_pool(x, 3, 2),
        "lp_pool_backward": lambda: r.lp_pool_backward(of_lp, x, 3, 2),
        "adaptive_avg_pool": lambda: r.adaptive_avg_pool(x, 5),
        "adaptive_avg_pool_backward": lambda: r.adaptive_avg_pool_backward(grid, x, 5),
        "adaptive_max_pool": lambda: r.adaptive_max_pool(x, 5),
        "adaptive_max_pool_backward": lambda: r.adaptive_max_pool_backward(grid, x, 5, indices=best),
        "merge_attention": lambda: r.merge_attention(*parts),
        "merge_attention_backward": lambda: r.merge_attention_backward(parts[0][0], *parts),
        "conv depthwise, no padding": lambda: r.conv(x, depthwise, groups=4),
    }
    by_products = {
        "conv, no padding": lambda: r.conv(x, weight, stride=2),
        "attention": lambda: attention(query, key, value),
        "attention_backward": lambda: attention_backward(dout, query, key, value),
    }
    waiting = {
        "conv with padding": lambda: r.conv(x, weight, padding=1),
        "conv_backward with padding": lambda: r.conv_backward(wide, x, weight, padding=1),
        "attention, causal": lambda: attention(query, key, value, is_causal=True),
        "attention with lengths": lambda: attention(query, key, value, key_lengths=lengths),
        "max_unpool": lambda: r.max_unpool(pooled, indices, 3, stride=2, output_size=(32, 32)),
    }
    return (
        {name: Probe(call, waits=False, captured=True) for name, call in in_graph.items()}
        | {name: Probe(call, waits=False, captured=False) for name, call in by_products.items()}
        | {name: Probe(call, waits=True, captured=False) for name, call in waiting.items()}
    )
