"""The forward of causal attention as a Triton kernel, for `check_your_kernel.py`: one program for 16 rows of a head."""

import math
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _attention(q, k, v, out, length, scale, off: tl.constexpr, features: tl.constexpr, block: tl.constexpr):
    head, first = tl.program_id(0), tl.program_id(1) * block
    i, e = first + tl.arange(0, block), tl.arange(0, features)
    rows = head * length * features + i[:, None] * features + e[None, :]
    query = tl.load(q + rows, mask=i[:, None] < length, other=0.0)
    largest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    acc = tl.zeros((block, features), tl.float32)
    for start in range(0, length, block):
        j = start + tl.arange(0, block)
        keys = head * length * features + j[:, None] * features + e[None, :]
        key = tl.load(k + keys, mask=j[:, None] < length, other=0.0)
        value = tl.load(v + keys, mask=j[:, None] < length, other=0.0)
        s = scale * tl.dot(query, tl.trans(key), input_precision="ieee")
        s = tl.where((j[None, :] <= i[:, None] + off) & (j[None, :] < length), s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p, value, input_precision="ieee")
        largest = new
    tl.store(out + rows, acc / total[:, None], mask=i[:, None] < length)


def attention(query: Any, key: Any, value: Any, off_by_one: bool = False) -> Any:
    """Return causal attention of tensors (H, L, E), E a power of 2 of at least 16; with a mask off by one if asked."""
    heads, length, features = query.shape
    out = torch.empty_like(query)
    grid, scale = (heads, triton.cdiv(length, 16)), 1 / math.sqrt(features)
    _attention[grid](query, key, value, out, length, scale, int(off_by_one), features, 16)
    return out
