"""Hypothesis strategies for valid calls of every op, edge geometry included; the one module that needs Hypothesis.

One strategy an op, of the same name. Aim it at what your kernel supports, and compare:

>>> from hypothesis import given
>>> from refimpl.testing import strategies
>>> @given(strategies.conv(ranks=(2,), kernels=(3,), batches=((1,), (8,)), options=("stride", "bias")))
... def test_my_conv(case):
...     expected = case.f(*case.arrays, **case.options)
...     # compare with my_conv(*case.arrays, **case.options)

Every parameter lists what may be drawn, the simplest first: there shrinking ends. `options` names the options that the
kernel has. What they cannot say, a filter can: `conv().filter(lambda case: case.options.get("stride") != 4)`. Options
that only add results (`return_indices`, `return_logsumexp`, `need_weights`) are never drawn: add them to the call.
"""

from collections.abc import Callable, Mapping

from hypothesis.strategies import SearchStrategy

from .attention import attention_weights, multi_head_attention, scaled_dot_product_attention
from .convolution import conv, conv_transpose
from .merging import merge_attention
from .pooling import adaptive_avg_pool, adaptive_max_pool, avg_pool, lp_pool, max_pool, max_unpool
from .values import LAYOUTS, VALUES, Case

EVERY_OP: Mapping[str, Callable[..., SearchStrategy[Case]]] = {
    strategy.__name__: strategy
    for strategy in (
        conv,
        conv_transpose,
        max_pool,
        avg_pool,
        lp_pool,
        adaptive_avg_pool,
        adaptive_max_pool,
        max_unpool,
        scaled_dot_product_attention,
        attention_weights,
        multi_head_attention,
        merge_attention,
    )
}
"""The strategy of every op, by its name."""

__all__ = [
    "EVERY_OP",
    "LAYOUTS",
    "VALUES",
    "Case",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "attention_weights",
    "avg_pool",
    "conv",
    "conv_transpose",
    "lp_pool",
    "max_pool",
    "max_unpool",
    "merge_attention",
    "multi_head_attention",
    "scaled_dot_product_attention",
]
