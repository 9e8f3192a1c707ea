"""What the backwards return: a field `d<argument>` for each differentiable argument, None where that was None."""

from typing import NamedTuple

from .backend import Array


class ConvGrads(NamedTuple):
    """The gradients of a convolution: each has the shape of its argument; `dbias` is None if `bias` was."""

    dx: Array
    dweight: Array
    dbias: Array | None


class AttentionGrads(NamedTuple):
    """The gradients of attention: each has the shape of its argument, and is None if the argument was."""

    dquery: Array
    dkey: Array
    dvalue: Array
    dbias: Array | None
    dsink: Array | None


class AttentionWeightsGrads(NamedTuple):
    """The gradients of the weights of attention: as in `AttentionGrads`."""

    dquery: Array
    dkey: Array
    dbias: Array | None
    dsink: Array | None


class MultiHeadGrads(NamedTuple):
    """The gradients of multi-head attention; `dparams` has the keys of `params`. None where the argument was."""

    dquery: Array
    dkey: Array
    dvalue: Array
    dparams: dict[str, Array] | None
    dbias: Array | None
    dsink: Array | None


class MergeGrads(NamedTuple):
    """The gradients of a merge, of the shapes and dtypes of its arguments."""

    douts: Array
    dlogsumexps: Array
