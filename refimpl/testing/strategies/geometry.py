"""The geometry of windows, drawn dimension by dimension so that it is valid by construction.

n size, k kernel, s stride, d dilation. Window o begins at element `o * s - low`, its taps lie d apart; elements are
0 to n - 1. Written as loops over windows and taps: slow, and independent of how the ops compute the same.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .values import Array, Source, fail, ints, shapes

Ints = Iterable[int]
Shapes = Iterable[tuple[int, ...]]
Pads = Sequence[tuple[int, int]]

STRIDES, DILATIONS = (1, 2, 3, 4), (1, 2, 3)
WORDS = ("valid", "same", "same_lower")
_MODES: dict[str, Callable[[int], float]] = {  # the largest pad beside n elements, for other than zeros
    "replicate": lambda _: math.inf,
    "reflect": lambda n: n - 1,
    "circular": lambda n: n,
}


class Window(NamedTuple):
    """How windows slide along one dimension, before there is padding."""

    n: int
    k: int
    s: int
    d: int


@dataclass(frozen=True)
class Space:
    """The shapes that may be drawn."""

    ranks: tuple[int, ...]
    sizes: tuple[int, ...] | None
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]

    def along(self, rank: int) -> Sequence[int]:
        """Return the sizes along each of so many dimensions."""
        return range(1, 8 if rank < 3 else 5) if self.sizes is None else self.sizes


def space_of(
    op: str,
    ranks: Ints,
    sizes: Ints | None,
    kernels: Ints,
    batches: Shapes,
    *,
    strides: Ints = STRIDES,
    dilations: Ints = DILATIONS,
    inside: bool = False,
) -> Space:
    """Check the parameters; `inside` says that a kernel must fit into the size, unless there is padding."""
    result = Space(
        ints(op, "ranks", ranks),
        None if sizes is None else ints(op, "sizes", sizes),
        ints(op, "kernels", kernels),
        ints(op, "strides", strides),
        ints(op, "dilations", dilations),
        shapes(op, "batches", batches, 1 if op.startswith("conv") else None),
    )
    largest = min(max(result.along(rank)) for rank in result.ranks)
    if inside and min(result.kernels) > largest:
        fail(op, "kernels", f"hold one that fits into the largest size, {largest}", str(result.kernels))
    return result


def blocks(source: Source, space: Space) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw sizes and kernel, any of which go together."""
    rank = source.pick(space.ranks)
    sizes = tuple(source.pick(space.along(rank)) for _ in range(rank))
    return sizes, tuple(source.pick(space.kernels) for _ in range(rank))


def slide(source: Source, space: Space, pooling: bool) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Draw windows that slide over elements, `(sizes, kernel, options)`; in pooling each must hold an element.

    What a stride and dilation of 1 allow decides about size and kernel, so that there is always a way on.
    """
    options: dict[str, Any] = {}
    rank = source.pick(space.ranks)
    if pooling and source.has("ceil_mode"):
        options["ceil_mode"] = not source.rarely()
    ceil = options.get("ceil_mode", False)
    padded = source.has("padding")
    limit = max(4, *space.kernels) if padded else 1

    def fitting(n: int, k: int, s: int = 1, d: int = 1) -> Pads:
        return _fitting(n, k, s, d, limit, ceil, pooling)

    pairs = [(n, k) for n in space.along(rank) for k in space.kernels if fitting(n, k)]
    sizes = tuple(source.pick(list(dict.fromkeys(n for n, _ in pairs))) for _ in range(rank))
    kernel = tuple(source.pick([k for m, k in pairs if m == n]) for n in sizes)
    if pooling:
        strides = option(source, options, "stride", [space.strides] * rank, kernel, none=True)
    else:
        strides = option(source, options, "stride", [space.strides] * rank, (1,) * rank)
    steps = list(zip(sizes, kernel, strides, strict=True))
    apart = [[d for d in space.dilations if fitting(*step, d)] or [1] for step in steps]
    dilations = option(source, options, "dilation", apart, (1,) * rank)
    windows = [Window(*step, d) for step, d in zip(steps, dilations, strict=True)]
    choices = [fitting(*window) for window in windows]
    if not pooling and source.has("padding_mode"):
        modes = [mode for mode in _MODES if all(_within(mode, n, c) for n, c in zip(sizes, choices, strict=True))]
        options["padding_mode"] = source.pick([*modes, *modes[1:]] if padded else ["zeros", *modes])
    if padded:
        options["padding"] = _cover(source, windows, choices, options, pooling)
    return sizes, kernel, options


def _cover(
    source: Source, windows: Sequence[Window], choices: Sequence[Pads], options: dict[str, Any], pooling: bool
) -> Any:
    """Draw a padding that windows can have, from the choices of pads, and what the words mean where that fits."""
    mode, ceil = options.get("padding_mode", "zeros"), options.get("ceil_mode", False)
    same = [_same(*window) for window in windows]
    words: dict[str, Pads] = {
        "valid": [(0, 0)] * len(windows),
        "same": same,
        "same_lower": [(low, high) for high, low in same],
    }
    possible = [
        word
        for word, pads in words.items()
        if all(
            _within(mode, window.n, [pair]) and _fits(*window, *pair, ceil and word == "valid", pooling)
            for window, pair in zip(windows, pads, strict=True)
        )
    ]
    allowed = [_within(mode, window.n, pads) for window, pads in zip(windows, choices, strict=True)]
    return padding(source, allowed, possible)[0]


def _within(mode: str, n: int, pads: Pads) -> Pads:
    """Return those of the pads that a padding mode allows."""
    return [pair for pair in pads if mode == "zeros" or max(pair) <= _MODES[mode](n)]


def _fits(n: int, k: int, s: int, d: int, low: int, high: int, ceil: bool, pooling: bool) -> bool:
    """Return whether there is a window, and in pooling whether each holds an element."""
    last = n + high - (d * (k - 1) + 1) + (s - 1 if ceil else 0)
    starts = list(range(-low, last + 1, s))
    if ceil and starts and starts[-1] >= n:
        starts.pop()
    held = all(any(0 <= start + tap * d < n for tap in range(k)) for start in starts)
    return bool(starts) and (held or not pooling)


@functools.lru_cache(maxsize=1 << 12)
def _fitting(n: int, k: int, s: int, d: int, limit: int, ceil: bool, pooling: bool) -> Pads:
    """Return the pads below a limit that fit, the least first."""
    return [pair for pair in _pairs(limit) if _fits(n, k, s, d, *pair, ceil, pooling)]


def _same(n: int, k: int, s: int, d: int) -> tuple[int, int]:
    total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
    return total // 2, total - total // 2


def padding(source: Source, choices: Sequence[Pads], words: Sequence[str]) -> tuple[Any, Pads]:
    """Draw a padding in one of its forms, and return it beside the pairs that it means; a word means what it does."""
    common = [low for low, high in choices[0] if low == high and all((low, high) in other for other in choices)]
    form = source.pick([*(["one"] if common else []), "each", *words])
    if form in words:
        return form, [(0, 0)] * len(choices)
    if form == "one":
        pad = source.pick(common[-1:] if source.rarely(3) else common)
        return pad, [(pad, pad)] * len(choices)
    entries = [_entry(source, c) for c in choices]
    return source.sequence(entries), [(e, e) if isinstance(e, int) else e for e in entries]


def _entry(source: Source, pads: Pads) -> int | tuple[int, int]:
    """Draw a padding of one dimension: an int, or a pair; often one of the widest, which come last."""
    alike = [low for low, high in pads if low == high]
    if alike and source.flag():
        return source.pick(alike[-1:] if source.rarely(3) else alike)
    return source.pick(pads[-2:] if source.rarely(3) else pads)


def crop(source: Source, full: Sequence[int], words: Sequence[str]) -> tuple[Any, Pads]:
    """Draw a padding that crops an output of these sizes, and leaves some of it."""
    choices = [[pair for pair in _pairs(4) if n > sum(pair)] for n in full]
    return padding(source, choices, [*words, *words[1:]])


def _pairs(limit: int) -> Pads:
    """Return all pads below a limit, the least first."""
    return sorted(itertools.product(range(limit), range(limit)), key=sum)


def option(
    source: Source,
    options: dict[str, Any],
    name: str,
    choices: Sequence[Sequence[int]],
    default: tuple[int, ...],
    none: bool = False,
) -> tuple[int, ...]:
    """Draw an option of ints, if it is given; `none` says that None stands for its default."""
    if not source.has(name):
        return default
    if none and source.rarely():
        options[name] = None
        return default
    return per_dimension(source, options, name, choices)


def per_dimension(
    source: Source, options: dict[str, Any], name: str, choices: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Draw an int for each dimension, in one of its forms."""
    common = [c for c in choices[0] if all(c in other for other in choices)]
    if common and not source.flag():
        options[name] = source.pick(common)
        return (options[name],) * len(choices)
    entries = [source.pick(c) for c in choices]
    options[name] = source.sequence(entries)
    return tuple(entries)


def planes(source: Source, space: Space, sizes: tuple[int, ...]) -> tuple[Array, bool]:
    """Draw an array of planes, and say whether an int may stand for an entry for each dimension."""
    leading = source.size(space.batches)
    return source.array(*leading, *sizes, plane=len(sizes)), len(leading) == 2


def written(source: Source, kernel: tuple[int, ...], short: bool) -> Any:
    """Return the kernel as a tuple or list, or as an int where it may be one."""
    return kernel[0] if short and len(set(kernel)) == 1 and source.flag() else source.sequence(list(kernel))
