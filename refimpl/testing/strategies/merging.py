"""Merging the parts of attention."""

from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st

from .values import Case, Limits, Source, ints, limits_of, shapes

Strategy = st.SearchStrategy[Case]
Ints = Iterable[int]
Shape = tuple[int, ...]


def merge_attention(
    *,
    parts: Ints = (1, 2, 3, 4, 0),
    lengths: Ints = (1, 2, 3, 4, 0),
    features: Ints = (1, 2, 3, 0),
    batches: Iterable[Shape] = ((), (1,), (2,), (2, 3), (0,)),
    dtypes: Iterable[str] = ("float64",),
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `merge_attention`; the arrays are `(outs, logsumexps)`.

    Parameters
    ----------
    parts : ints
        How many parts are merged.
    lengths, features : ints
        L and Ev.
    batches : tuples of ints
        Shapes of what comes before the length, heads included.
    dtypes
        As for `conv`; with half types the logsumexps are float32.
    values, layouts
        As for `conv`. Some logsumexps are -inf with any of them: parts without keys.

    Returns
    -------
    SearchStrategy of Case

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    op = "merge_attention"
    return _merge(
        limits_of(op, (), dtypes, None, values, layouts),
        ints(op, "parts", parts, 0),
        ints(op, "lengths", lengths, 0),
        ints(op, "features", features, 0),
        shapes(op, "batches", batches),
    )


@st.composite
def _merge(
    draw: st.DrawFn,
    limits: Limits,
    parts: tuple[int, ...],
    lengths: tuple[int, ...],
    features: tuple[int, ...],
    batches: tuple[Shape, ...],
) -> Case:
    source = Source(draw, limits)
    shape = (source.size(parts), *source.size(batches), source.size(lengths))
    outs = source.array(*shape, source.size(features))
    logsumexps = source.contents(shape)
    if source.flag():
        logsumexps[source.rng().random(shape) < source.pick([0.3, 0.7])] = -np.inf
    if outs.dtype.itemsize == 2:
        logsumexps = logsumexps.astype(np.float32)
    return source.case((outs, source.lay_out(logsumexps)), {})
