"""The options that all kinds of attention share."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from ... import backend
from .values import Array, Source, among, fail, some

Shape = tuple[int, ...]

HIDING = ("bias", "mask", "is_causal", "window", "query_offset", "query_lengths", "key_lengths")
SCORES = ("sink", "scale", "softcap")
DROPOUT = ("dropout_mask", "dropout_p")


class Chosen(NamedTuple):
    """Which options exclude each other, and what may be drawn for some; None: what is small and hurts."""

    exclusive: tuple[tuple[str, ...], ...]
    windows: tuple[tuple[int | None, ...], ...] | None
    scales: tuple[float, ...] | None


def chosen_of(
    op: str,
    exclusive: Iterable[Iterable[str]],
    windows: Iterable[Sequence[int | None]] | None,
    scales: Iterable[float] | None,
) -> Chosen:
    """Check what is to be drawn for the options."""
    known = (*HIDING, *SCORES, *DROPOUT)
    groups = tuple(among(op, "exclusive", group, known) for group in exclusive)
    pairs = None if windows is None else some(op, "windows", (tuple(window) for window in windows))
    for window in pairs or ():
        valid = len(window) == 2 and all(side is None or type(side) is int for side in window)
        if not valid or (None not in window and sum(side or 0 for side in window) < 0):
            rule = "be pairs (left, right) of ints or None, with left + right of at least 0"
            fail(op, "windows", rule, repr(window))
    numbers = None if scales is None else some(op, "scales", scales)
    for scale in numbers or ():
        if not backend.is_number(scale, Real) or not math.isfinite(scale):
            fail(op, "scales", "be finite numbers", repr(scale))
    return Chosen(groups, pairs, numbers)


def _window(source: Source, windows: Sequence[Sequence[int | None]] | None) -> Any:
    """Draw a window, mostly one that holds the query's own token."""
    sides = (0, None, 2)
    if windows is not None:
        return source.sequence(list(source.pick(windows)))
    if source.rarely():
        return source.sequence(source.pick([[2, -1], [-1, None]]))
    return source.sequence([source.pick(sides), source.pick(sides)])


def _offset(source: Source, shape: Shape) -> Any:
    """Draw the position of query 0: one for all, one for each batch entry, or aligned at the ends."""
    kind = source.pick(["one", "each", "end"])
    if kind == "each":
        return _integers(source, shape, -4, 4)
    return kind if kind == "end" else source.pick([0, 1, -1, 2, -2, 4, -4])


def options_of(
    source: Source, scores: Shape, batch: Shape, heads: int, broadcast: bool, chosen: Chosen, appended: int = 0
) -> dict[str, Any]:
    """Draw the options that all kinds of attention share; `appended` keys lie beyond those of the scores."""
    weights = (*scores[:-1], scores[-1] + appended)
    draws: dict[str, Callable[[], Any]] = {
        "bias": lambda: _bias(source, reduced(source, scores, broadcast)),
        "mask": lambda: _mask(source, reduced(source, scores, broadcast), [0.9, 0.5, 0.0]),
        "is_causal": lambda: not source.rarely(),
        "window": lambda: _window(source, chosen.windows),
        "query_offset": lambda: _offset(source, reduced(source, batch, broadcast)),
        "query_lengths": lambda: _integers(source, reduced(source, batch, broadcast), 0, scores[-2]),
        "key_lengths": lambda: _integers(source, reduced(source, batch, broadcast), 0, scores[-1]),
        "sink": lambda: source.array(heads),
        "scale": lambda: source.pick([1, 0.25, -0.5, 0.0] if chosen.scales is None else chosen.scales),
        "softcap": lambda: source.pick([1, 0.5, 30.0]),
        "dropout_mask": lambda: _mask(source, reduced(source, weights, broadcast), [0.7, 1.0, 0.0]),
        "dropout_p": lambda: source.pick([0.25, 0.5, 0.0]),
    }
    masked = "dropout_mask" in source.limits.options
    known = [name for name in draws if name in source.limits.options and (masked or name != "dropout_p")]
    count = source.draw(st.integers(0, min(len(known), 6)))
    names = source.draw(st.lists(st.sampled_from(known), unique=True, min_size=count, max_size=count)) if count else []
    if "dropout_p" in names and "dropout_mask" not in names:
        names.append("dropout_mask")
    for group in chosen.exclusive:
        rivals = [name for name in names if name in group]
        if len(rivals) > 1:
            kept = source.pick(rivals)
            names = [name for name in names if name == kept or name not in group]
    return {name: draws[name]() for name in draws if name in names}


def _bias(source: Source, shape: Shape) -> Array:
    """Draw a bias that may hide pairs."""
    bias = source.contents(shape)
    if not source.rarely(3):
        bias[source.rng().random(shape) < 0.3] = -math.inf
    return source.lay_out(bias)


def _mask(source: Source, shape: Shape, densities: Sequence[float]) -> Array:
    return source.lay_out(np.asarray(source.rng().random(shape) < source.pick(densities)))


def _integers(source: Source, shape: Shape, low: int, high: int) -> Array:
    """Draw an integer array, its bounds included."""
    numbers = np.asarray(source.rng().integers(low, high + 1, size=shape))
    return source.lay_out(numbers.astype(source.pick([np.int64, np.int32])))


def reduced(source: Source, shape: Shape, broadcast: bool) -> Shape:
    """Draw a shape that broadcasts to another."""
    if not broadcast or not source.flag():
        return shape
    start = source.draw(st.integers(0, len(shape)))
    return tuple(1 if source.flag() else n for n in shape[start:])
