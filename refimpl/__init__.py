"""The reference for attention, convolution and pooling, forward and backward: one source on NumPy and CuPy."""

from . import backend
from .adaptive import adaptive_avg_pool, adaptive_avg_pool_backward, adaptive_max_pool, adaptive_max_pool_backward
from .attention import (
    AttentionGrads,
    AttentionWeightsGrads,
    attention_weights,
    attention_weights_backward,
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
)
from .conv import ConvGrads, conv, conv_backward, conv_transpose, conv_transpose_backward
from .lp import lp_pool, lp_pool_backward
from .merging import MergeGrads, merge_attention, merge_attention_backward
from .multihead import MultiHeadGrads, multi_head_attention, multi_head_attention_backward
from .pool import avg_pool, avg_pool_backward, max_pool, max_pool_backward
from .unpool import max_unpool, max_unpool_backward

__version__ = "0.1.0"

__all__ = [
    "AttentionGrads",
    "AttentionWeightsGrads",
    "ConvGrads",
    "MergeGrads",
    "MultiHeadGrads",
    "adaptive_avg_pool",
    "adaptive_avg_pool_backward",
    "adaptive_max_pool",
    "adaptive_max_pool_backward",
    "attention_weights",
    "attention_weights_backward",
    "avg_pool",
    "avg_pool_backward",
    "backend",
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
