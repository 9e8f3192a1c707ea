"""What is timed: shapes, options, and how many operations and bytes each call takes.

N batch, C channels, H heads, L length, E features, K kernel.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

ATTENTION = "scaled_dot_product_attention"
DIRECTIONS = ("forward", "backward")


class Workload(NamedTuple):
    """A call of an op on random float32 arrays of these shapes; `ladder` and `size` if it is a step of growing work."""

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]
    ladder: str | None = None
    size: int = 0

    def arrays(self) -> list[np.ndarray]:
        """Draw the arguments; weights keep the variance of what they meet."""
        rng = np.random.default_rng(0)
        drawn = [rng.standard_normal(shape, dtype=np.float32) for shape in self.shapes]
        if self.op != ATTENTION:
            drawn[1:] = [array / np.float32(np.sqrt(prod(array.shape[1:]))) for array in drawn[1:]]
        return drawn

    def dout(self) -> np.ndarray:
        """Draw the gradient of the output."""
        return np.random.default_rng(1).standard_normal(self.out_shape(), dtype=np.float32)

    def out_shape(self) -> tuple[int, ...]:
        """Return the shape of the output."""
        first, *others = self.shapes
        if self.op == ATTENTION:
            return *first[:-1], others[1][-1]
        if self.op == "multi_head_attention":
            return first
        if self.op == "adaptive_avg_pool":
            return *first[:2], *(self.options["output_size"] for _ in first[2:])
        channels = {"conv": lambda w: w[0], "conv_transpose": lambda w: w[1]}
        kernel = others[0][2:] if others else (self.options["kernel_size"],) * len(first[2:])
        stride = self.options.get("stride", 1 if others else self.options.get("kernel_size"))
        padding, dilation = self.options.get("padding", 0), self.options.get("dilation", 1)
        spread = [dilation * (k - 1) + 1 for k in kernel]
        if self.op == "conv_transpose":
            sizes = [(size - 1) * stride - 2 * padding + k for size, k in zip(first[2:], spread, strict=True)]
        else:
            sizes = [(size + 2 * padding - k) // stride + 1 for size, k in zip(first[2:], spread, strict=True)]
        return first[0], channels[self.op](others[0]) if others else first[1], *sizes

    def flops(self, direction: str) -> int:
        """Return the multiplications and additions of its matrix products; 0 for pooling.

        A convolution's backward is two products of the forward's size; an attention's is five to the forward's two, one
        of them the scores again. Of attention only visible pairs count.
        """
        first, *others = self.shapes
        if self.op in ("conv", "conv_transpose"):
            points = first if self.op == "conv_transpose" else self.out_shape()
            # Every point of (N, C, *S) meets all of its channel's weights.
            forward = 2 * points[0] * prod(points[2:]) * prod(others[0])
            return forward * (1 if direction == "forward" else 2)
        if self.op == ATTENTION:
            return _attention_flops(first, others[0], self.options, direction)
        if self.op == "multi_head_attention":
            n, length, e = first
            heads = self.options["num_heads"]
            split = (n, heads, length, e // heads)
            projections = 2 * n * length * e * 4 * e * (1 if direction == "forward" else 2)
            return projections + _attention_flops(split, split, {}, direction)
        return 0

    def bytes(self, direction: str) -> int:
        """Return what pooling must read and write: x and out, or dout and dx, and the int64 indices of a maximum."""
        indices = 8 * prod(self.out_shape()) if self.op == "max_pool" and direction == "backward" else 0
        return 4 * (prod(self.shapes[0]) + prod(self.out_shape())) + indices


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], options: dict[str, Any], direction: str) -> int:
    n, heads, length, e = query
    pairs = n * length * key[2]
    if options.get("is_causal"):
        pairs = n * length * (length + 1) // 2
    if "key_lengths" in options:
        pairs = length * sum(options["key_lengths"])
    return 2 * heads * pairs * e * (2 if direction == "forward" else 5)


def _attention(name: str, query: tuple[int, ...], key: tuple[int, ...], **options: Any) -> Workload:
    return Workload(name, ATTENTION, (query, key, key), options)


def _conv(name: str, x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Workload:
    return Workload(name, "conv", (x, weight), options)


WORKLOADS = (
    _conv("conv 7x7/2, 8x3x224x224 -> 64", (8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    _conv("conv 3x3, 8x64x56x56 -> 64", (8, 64, 56, 56), (64, 64, 3, 3), padding=1),
    _conv("conv 3x3, 8x256x14x14 -> 256", (8, 256, 14, 14), (256, 256, 3, 3), padding=1),
    _conv("conv 1x1, 8x256x56x56 -> 64", (8, 256, 56, 56), (64, 256, 1, 1)),
    _conv("conv depthwise 3x3, 8x96x56x56", (8, 96, 56, 56), (96, 1, 3, 3), padding=1, groups=96),
    _conv("conv dilated 3x3, 4x64x56x56", (4, 64, 56, 56), (64, 64, 3, 3), padding=2, dilation=2),
    _conv("conv1d k3, 8x80x1500 -> 384", (8, 80, 1500), (384, 80, 3), padding=1),
    _conv("conv3d k3, 2x16x16x56x56 -> 32", (2, 16, 16, 56, 56), (32, 16, 3, 3, 3), padding=1),
    Workload(
        "conv_transpose k4/2, 8x64x28x28 -> 32",
        "conv_transpose",
        ((8, 64, 28, 28), (64, 32, 4, 4)),
        {"stride": 2, "padding": 1},
    ),
    _conv("conv LeNet k5, 1x1x28x28 -> 16", (1, 1, 28, 28), (16, 1, 5, 5)),
    Workload(
        "max_pool 3/2, 8x64x112x112", "max_pool", ((8, 64, 112, 112),), {"kernel_size": 3, "stride": 2, "padding": 1}
    ),
    Workload("avg_pool 2/2, 8x64x56x56", "avg_pool", ((8, 64, 56, 56),), {"kernel_size": 2}),
    Workload("adaptive_avg_pool to 1, 8x64x56x56", "adaptive_avg_pool", ((8, 64, 56, 56),), {"output_size": 1}),
    _attention("attention 8x8x128x64", (8, 8, 128, 64), (8, 8, 128, 64)),
    _attention("attention 2x8x1024x64", (2, 8, 1024, 64), (2, 8, 1024, 64)),
    _attention("attention 1x8x4096x64", (1, 8, 4096, 64), (1, 8, 4096, 64)),
    _attention("attention causal 1x12x1024x64", (1, 12, 1024, 64), (1, 12, 1024, 64), is_causal=True),
    _attention("attention ViT-B 8x12x197x64", (8, 12, 197, 64), (8, 12, 197, 64)),
    _attention("attention grouped causal 1x32/8x1024x128", (1, 32, 1024, 128), (1, 8, 1024, 128), is_causal=True),
    _attention(
        "attention padded BERT 8x12x128x64",
        (8, 12, 128, 64),
        (8, 12, 128, 64),
        key_lengths=(128, 112, 96, 80, 64, 48, 32, 16),
    ),
    _attention("attention decode 8x8x1x64, 4096 keys", (8, 8, 1, 64), (8, 8, 4096, 64)),
    Workload(
        "multi_head 8x128x512, 8 heads",
        "multi_head_attention",
        ((8, 128, 512), (1536, 512), (512, 512)),  # x as query, key and value; in_proj_weight; out_proj.weight
        {"num_heads": 8},
    ),
)
QUICK = ("conv LeNet k5, 1x1x28x28 -> 16", "avg_pool 2/2, 8x64x56x56", "attention 8x8x128x64")
LADDERS = (
    tuple(
        _attention(f"attention 1x8xLx64, L = {length}", (1, 8, length, 64), (1, 8, length, 64))._replace(
            ladder="attention 1x8xLx64: length L", size=length
        )
        for length in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    )
    + tuple(
        _conv(f"conv 3x3, 1x64xSxS -> 64, S = {size}", (1, 64, size, size), (64, 64, 3, 3), padding=1)._replace(
            ladder="conv 3x3, 1x64xSxS -> 64: image size S", size=size
        )
        for size in (4, 8, 16, 32, 64, 128, 256)
    )
    + tuple(
        Workload(
            f"avg_pool 2/2, 1x64xSxS, S = {size}", "avg_pool", ((1, 64, size, size),), {"kernel_size": 2}
        )._replace(ladder="avg_pool 2/2, 1x64xSxS: image size S", size=size)
        for size in (16, 32, 64, 128, 256)
    )
)
