"""How far rounding may move merged attention: a softmax over the parts, whose logits are given."""

import math
from collections.abc import Callable
from typing import Any

import refimpl

from ..._grads import MergeGrads
from ...backend import Array
from .models import Model


def _merge(model: Model, result: tuple[Array, Array], outs: Array, logsumexps: Array) -> tuple[Array, Array]:
    """Return the errors of the output and of the logsumexp."""
    share, own, common, of_logsumexp = _shares(model, logsumexps)
    xp, clean = model.be.xp, _where(model, share > 0, model.clean(outs))
    terms = model.size(share * clean)
    error = xp.sum(model.size(share) * own * model.size(clean - result[0]), axis=0)
    error = error + common[..., None] * model.grown(model.size(result[0]), error)
    count = float(outs.shape[0]) + 0.0 * result[0]
    sizes = model.grown(xp.sum(terms, axis=0), error)
    return error + model.of_sum(result[0], sizes, count), of_logsumexp


def _merge_backward(
    model: Model, result: MergeGrads, dout: Array, outs: Array, logsumexps: Array, *, dlogsumexp: Array | None = None
) -> MergeGrads:
    """Return the errors of the gradients; the slope may be a difference of two sums over features."""
    del result  # products of errors and arguments alone
    share, own, common, _ = _shares(model, logsumexps)
    xp = model.be.xp
    dout, clean = model.clean(dout), _where(model, share > 0, model.clean(outs))
    relative = own + common[None, ..., None] + model.relative(2.0, 1.0 + 0.0 * share)
    douts = model.size(share * dout) * relative
    out, features = xp.sum(share * clean, axis=0), float(outs.shape[-1])
    of_out = xp.sum(model.size(share) * relative * model.size(clean - out), axis=0)
    of_out = of_out + common[..., None] * model.size(out) + model.size(model.arithmetic.u_out * out)
    of_out = of_out + model.of_sum(out, xp.sum(model.size(share * clean), axis=0), float(outs.shape[0]) + 0.0 * out)
    slope = xp.sum(dout * (clean - out), axis=-1, keepdims=True)
    of_slope = xp.sum(model.size(dout) * of_out, axis=-1, keepdims=True)
    for factor in (clean, out + 0.0 * clean):
        total = xp.sum(dout * factor, axis=-1, keepdims=True)
        sizes = xp.sum(model.size(dout) * model.grown(model.size(factor), of_out), axis=-1, keepdims=True)
        of_slope = of_slope + model.of_sum(total, sizes, features + 0.0 * total) + model.relative(1.0, total)
    if dlogsumexp is not None:
        less = model.clean(dlogsumexp)[..., None]
        slope = slope + less
        of_slope = of_slope + model.relative(1.0, xp.abs(slope) + xp.abs(less))
    dl = model.size(share) * (of_slope + relative * model.grown(model.size(slope), of_slope))
    return MergeGrads(douts, dl[..., 0])


def _where(model: Model, condition: Array, array: Array) -> Array:
    """Return the array where the condition holds, 0 elsewhere."""
    return model.be.xp.where(condition, array, 0.0)


def _shares(model: Model, logsumexps: Array) -> tuple[Array, Array, Array, Array]:
    """Return the share of each part (S, ..., 1), its own relative error, that of all, and that of the logsumexp."""
    xp, at = model.be.xp, model.arithmetic
    present = logsumexps != -math.inf
    logits = xp.where(present, model.clean(logsumexps), 0.0)
    if not logsumexps.shape[0]:
        none = model.be.full(tuple(logsumexps.shape[1:]), 0, xp.float64)
        return logits[..., None], logits[..., None], none, none
    m = xp.max(xp.where(present, logits, -math.inf), axis=0)
    m = xp.where(xp.isfinite(m), m, 0.0)
    e = xp.where(present, xp.exp(logits - m), 0.0)
    total = xp.sum(e, axis=0)
    safe = xp.where(total > 0, total, 1.0)
    share, one = e / safe, 1.0 + 0.0 * e
    own = model.of_exponent(model.relative(1.0, xp.abs(logits) + xp.abs(m)) + model.relative(at.exp_ulps, one))
    mean, sizes = xp.sum(model.size(share) * own, axis=0), xp.sum(model.size(share), axis=0)
    growth, unit = model.of_quotient(mean), 1.0 + 0.0 * m
    common = model.of_sum(unit, sizes, float(logsumexps.shape[0]) + 0.0 * m) + model.relative(2.0, unit)
    logsumexp = m + xp.log(safe)
    error = mean * growth + common + model.relative(1.0, xp.abs(m) + xp.abs(logsumexp))
    error = error + model.relative(at.exp_ulps, unit) + model.relative(at.exp_ulps, logsumexp)
    # A kernel may divide by the total, or take exp(l - logsumexp), which has the error of the logsumexp.
    common = common + model.of_exponent(error)
    return share[..., None], (own * growth)[..., None], common, error


ANALYSES: dict[Callable[..., Any], Callable[..., Any]] = {
    refimpl.merge_attention: _merge,
    refimpl.merge_attention_backward: _merge_backward,
}
"""The analysis of each op."""
