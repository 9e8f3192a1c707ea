"""Every argument check, and the wording of every message: `{function}: {argument} must {rule}; got {what came}`.

A check either raises or returns the argument in the one form that the ops compute with: tuples of ints, windows.
TypeError is for the kind, dtype or backend of an argument, ValueError for its size or value.
"""

from .attending import Heads, attention, merge, multi_head
from .common import flag
from .windowed import adaptive, conv, conv_transpose, divisor, max_unpool, norm_type, pool, pool_indices

__all__ = [
    "Heads",
    "adaptive",
    "attention",
    "conv",
    "conv_transpose",
    "divisor",
    "flag",
    "max_unpool",
    "merge",
    "multi_head",
    "norm_type",
    "pool",
    "pool_indices",
]
