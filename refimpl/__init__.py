"""The reference for attention, convolution and pooling, forward and backward: one source on NumPy and CuPy."""

from . import backend
from .attention import AttentionGrads, scaled_dot_product_attention, scaled_dot_product_attention_backward
from .conv import ConvGrads, conv, conv_backward, conv_transpose, conv_transpose_backward
from .multihead import MultiHeadGrads, multi_head_attention, multi_head_attention_backward
from .pool import avg_pool, avg_pool_backward, max_pool, max_pool_backward

__version__ = "0.1.0"

__all__ = [
    "AttentionGrads",
    "ConvGrads",
    "MultiHeadGrads",
    "avg_pool",
    "avg_pool_backward",
    "backend",
    "conv",
    "conv_backward",
    "conv_transpose",
    "conv_transpose_backward",
    "max_pool",
    "max_pool_backward",
    "multi_head_attention",
    "multi_head_attention_backward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
]
