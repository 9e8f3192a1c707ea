"""How far rounding may move the results of attention, tile by tile.

Each score s is off by rounding in its sum of products, in scale, softcap and bias; subtracting the row's maximum m and
taking exp add to that, so each weight has a relative error of its own, and all weights of a row have one in common, of
the sum that divides them. From there errors go through the same products as the results. What is called "error" here
is a measure as in `models`; letters are those of `textbook/attention.py`.

The backward may take its mean D of dp as `sum p dp` or, as FlashAttention 2 does (arXiv:2307.08691, section 3.1), as
`sum dout out` from a stored output, and p from the stored logsumexp: the larger error is allowed for.
"""

from collections.abc import Callable
from typing import Any

import refimpl

from ..._grads import AttentionGrads, AttentionWeightsGrads
from ...backend import Array
from .attention_gradients import errors_of_gradients
from .models import Model
from .softmax import call_of, errors_by_row


def _attention(
    model: Model, result: Any, query: Array, key: Array, value: Array, *, return_logsumexp: bool = False, **options: Any
) -> Any:
    """Return the error of the output, and that of the logsumexp."""
    call = call_of(model, "scaled_dot_product_attention", {"query": query, "key": key, "value": value}, options)
    out, logsumexp = errors_by_row(model, call, int(value.shape[-1]))
    shape = (result[0] if return_logsumexp else result).shape
    out = model.be.xp.reshape(out, shape)
    return (out, model.be.xp.reshape(logsumexp, shape[:-1])) if return_logsumexp else out


def _weights(
    model: Model, result: Any, query: Array, key: Array, *, return_logsumexp: bool = False, **options: Any
) -> Any:
    """Return the error of the weights, and that of the logsumexp."""
    call = call_of(model, "attention_weights", {"query": query, "key": key}, options)
    weights, logsumexp = errors_by_row(model, call, int(key.shape[-2]))
    shape = (result[0] if return_logsumexp else result).shape
    weights = model.be.xp.reshape(weights, shape)
    return (weights, model.be.xp.reshape(logsumexp, shape[:-1])) if return_logsumexp else weights


def _attention_backward(
    model: Model, result: AttentionGrads, dout: Array, query: Array, key: Array, value: Array, **options: Any
) -> AttentionGrads:
    """Return the error of each gradient."""
    arrays = {"query": query, "key": key, "value": value, "dout": dout}
    return AttentionGrads(*errors_of_gradients(model, "scaled_dot_product_attention_backward", result, arrays, options))


def _weights_backward(
    model: Model, result: AttentionWeightsGrads, dout: Array, query: Array, key: Array, **options: Any
) -> AttentionWeightsGrads:
    """Return the error of each gradient."""
    arrays = {"query": query, "key": key, "dout": dout}
    padded = AttentionGrads(result.dquery, result.dkey, None, result.dbias, result.dsink)
    dquery, dkey, _, dbias, dsink = errors_of_gradients(model, "attention_weights_backward", padded, arrays, options)
    return AttentionWeightsGrads(dquery, dkey, dbias, dsink)


ANALYSES: dict[Callable[..., Any], Callable[..., Any]] = {
    refimpl.scaled_dot_product_attention: _attention,
    refimpl.scaled_dot_product_attention_backward: _attention_backward,
    refimpl.attention_weights: _weights,
    refimpl.attention_weights_backward: _weights_backward,
}
"""The analysis of each op."""
