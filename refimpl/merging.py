"""Merging partial attention: results over disjoint sets of keys, and the gradients of what comes out.

S parts; L length; E features.
"""

import math
from collections.abc import Callable

from . import _checks, backend
from ._engine import nan_safe
from ._grads import MergeGrads
from .backend import Array, Backend

__all__ = ["MergeGrads", "merge_attention", "merge_attention_backward"]


@backend.op
def merge_attention(outs: Array, logsumexps: Array) -> tuple[Array, Array]:
    """Merge attention over parts of the keys into attention over all of them.

    Parameters
    ----------
    outs : (S, ..., L, Ev)
        What `scaled_dot_product_attention` put out for each part: float64, float32, float16 or bfloat16.
    logsumexps : (S, ..., L)
        What it returned as logsumexp for each part: float32 for half types, and else of the dtype of `outs`. A part
        whose logsumexp is -inf is empty, and takes no part whatever its `outs` holds.

    Returns
    -------
    out : (..., L, Ev)
        A new array of the dtype, backend and device of `outs`; 0 where all parts are empty.
    logsumexp : (..., L)
        A new array of the dtype of `logsumexps`; -inf where all parts are empty.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size does not fit.

    Notes
    -----
    With `l` the logsumexps, a sink counting in one part alone,

        logsumexp = log(sum over parts of exp(l)),    out = sum over parts of exp(l - logsumexp) * outs

    How it is computed: `refimpl.textbook.merge_attention`.

    References
    ----------
    Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867; Liu et al., Ring attention,
    arXiv:2310.01889.

    Examples
    --------
    >>> import numpy as np
    >>> out, logsumexp = merge_attention(np.array([[[1.0]], [[4.0]]]), np.log([[2.0], [1.0]]))
    >>> out, np.exp(logsumexp).round(12)
    (array([[2.]]), array([3.]))
    """
    _checks.merge("merge_attention", {"outs": outs}, logsumexps, None)
    be = backend.of(outs)
    wide, lses = be.widened(outs, logsumexps)
    out = be.full(tuple(outs.shape[1:]), 0, wide.dtype)
    logsumexp = be.full(tuple(outs.shape[1:-1]), -math.inf, wide.dtype)

    def work(*tile: slice) -> None:
        each = (slice(None), *tile)
        weights, present, logsumexp[tile] = _shares(be, lses[each])
        out[(*tile, ...)] = be.sums(weights * nan_safe.select(be, present, wide[(*each, ...)]), 0, False)

    _run(be, work, wide)
    return be.rounded(out, like=outs), logsumexp


@backend.op
def merge_attention_backward(
    dout: Array, outs: Array, logsumexps: Array, *, dlogsumexp: Array | None = None
) -> MergeGrads:
    """Return the gradients of `sum(dout * out)` for `out, logsumexp = merge_attention(outs, logsumexps)`.

    Parameters
    ----------
    dout : (..., L, Ev)
        Of the shape, dtype and backend of `out`.
    outs, logsumexps
        As for `merge_attention`.
    dlogsumexp : (..., L), optional
        Of the shape and dtype of the logsumexp: adds the gradients of `sum(dlogsumexp * logsumexp)`.

    Returns
    -------
    MergeGrads
        `douts` and `dlogsumexps`, new arrays of the shapes and dtypes of the arguments; 0 for empty parts.

    Raises
    ------
    TypeError, ValueError
        As `merge_attention`, and if `dout` or `dlogsumexp` does not have the shape or dtype of its result.

    Notes
    -----
    With `w = exp(l - logsumexp)`, a softmax over the parts,

        douts = w * dout,    dl = w * (sum over features of dout * (outs - out) + dlogsumexp)

    How it is computed: `refimpl.textbook.merge_attention_backward`.

    References
    ----------
    Those of `merge_attention`; the derivative of a softmax and of its logarithm.

    Examples
    --------
    >>> import numpy as np
    >>> merge_attention_backward(np.array([[1.0]]), np.array([[[1.0]], [[3.0]]]), np.zeros((2, 1))).dlogsumexps
    array([[-0.5],
           [ 0.5]])
    """
    _checks.merge("merge_attention_backward", {"outs": outs, "dout": dout}, logsumexps, dlogsumexp)
    be = backend.of(outs)
    dout, wide, lses = be.widened(dout, outs, logsumexps)
    douts, dlses = be.full(tuple(outs.shape), 0, wide.dtype), be.full(tuple(lses.shape), 0, wide.dtype)

    def work(*tile: slice) -> None:
        each = (slice(None), *tile)
        weights, present, _ = _shares(be, lses[each])
        parts, do = nan_safe.select(be, present, wide[(*each, ...)]), dout[(*tile, ...)]
        slope = be.sums(do * (parts - be.sums(weights * parts, 0, False)), -1, True)
        if dlogsumexp is not None:
            slope = slope + dlogsumexp[tile][..., None]
        douts[(*each, ...)] = nan_safe.select(be, present, weights * do)
        dlses[each] = nan_safe.select(be, present, weights * slope)[..., 0]

    _run(be, work, wide)
    return MergeGrads(be.rounded(douts, like=outs), dlses)


def _shares(be: Backend, logsumexps: Array) -> tuple[Array, Array, Array]:
    """Return the share of each part, whether it is there at all, both (S, ..., L, 1), and the logsumexp (..., L)."""
    xp = be.xp
    present = logsumexps != -math.inf
    largest = xp.where(xp.any(present, axis=0), xp.max(logsumexps, axis=0), 0.0)
    shares = xp.exp(logsumexps - largest)
    total = be.sums(shares, 0, False)
    shares = nan_safe.select(be, present, shares / total)
    return shares[..., None], present[..., None], largest + xp.log(total)


def _run(be: Backend, work: Callable[..., None], outs: Array) -> None:
    """Do the work on tiles of rows; without parts there is none."""
    parts, *rows, features = outs.shape
    if parts:
        be.run(work, be.tiles(tuple(rows), 4 * parts * (features + 2) * be.itemsize(outs)))
