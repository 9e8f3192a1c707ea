"""Every op and its backward as the formula reads: the first thing to read, and an oracle for everything else.

Whole im2col matrices, whole score matrices: no tiles, no checks of arguments, no promise about NaN. Names, arguments
and results are those of `refimpl`. Each forward stands above its backward, with the same letters; a gradient is d + its
argument. Half types are computed in float32 and rounded once, by the decorator `op`.

    convolution   conv, conv_transpose
    pooling       max_pool, avg_pool, lp_pool, adaptive_avg_pool, adaptive_max_pool, max_unpool
    attention     scaled_dot_product_attention, attention_weights, multi_head_attention, merge_attention
    windows       what the first two share: padding, im2col, col2im

Only the array API standard is used, so it runs on every backend.
"""

from .attention import (
    attention_weights,
    attention_weights_backward,
    merge_attention,
    merge_attention_backward,
    multi_head_attention,
    multi_head_attention_backward,
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
)
from .convolution import conv, conv_backward, conv_transpose, conv_transpose_backward
from .pooling import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    adaptive_max_pool,
    adaptive_max_pool_backward,
    avg_pool,
    avg_pool_backward,
    lp_pool,
    lp_pool_backward,
    max_pool,
    max_pool_backward,
    max_unpool,
    max_unpool_backward,
)

__all__ = [
    "adaptive_avg_pool",
    "adaptive_avg_pool_backward",
    "adaptive_max_pool",
    "adaptive_max_pool_backward",
    "attention_weights",
    "attention_weights_backward",
    "avg_pool",
    "avg_pool_backward",
    "conv",
    "conv_backward",
    "conv_transpose",
    "conv_transpose_backward",
    "lp_pool",
    "lp_pool_backward",
    "max_pool",
    "max_pool_backward",
    "max_unpool",
    "max_unpool_backward",
    "merge_attention",
    "merge_attention_backward",
    "multi_head_attention",
    "multi_head_attention_backward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
]
