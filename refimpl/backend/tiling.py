"""Tiles: how an index space is cut, what bounds them, and the loop that runs them, perhaps on several threads."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from . import threads as _threads
from .values import Tile, is_number, shown


class _Limits(NamedTuple):
    threads: int | None
    tile_bytes: int | None


LEAST_TILE, LEAST_TILES = 2 << 20, 8  # bytes below which, and number from which on, smaller tiles gain nothing
LEAST_LIGHT = 4 << 20
"""The bytes of a tile that does little with each of them: a smaller one is done before another thread wakes up."""
_AHEAD_BYTES = 64 << 20  # of results that wait for their turn
_UNLIMITED = _Limits(threads=None, tile_bytes=None)
_LIMITS = ContextVar("refimpl.limits", default=_UNLIMITED)


@contextlib.contextmanager
def limits(*, threads: int | None = None, tile_bytes: int | None = None) -> Iterator[None]:
    """Bound what ops use inside a `with` block, in this thread or task: the limits are context variables.

    Parameters
    ----------
    threads
        How many CPU threads tiles run on, at least 1. Unless set, as many as the environment variable
        `REFIMPL_NUM_THREADS` says when it is first needed, or as the process may use cores. Results never depend on it.
    tile_bytes
        The working set of one tile in bytes, at least 1: what one thread allocates beyond the results. A tile holds at
        least one output position or query row, so a small value is met as nearly as that allows. May change rounding.
        Unless set, 4 MiB on a CPU and 256 MiB on a GPU, however much is free there: the same call gives the same bits.
    """
    for name, value in (("threads", threads), ("tile_bytes", tile_bytes)):
        if value is not None and not is_number(value):
            raise TypeError(f"limits: {name} must be an int; got {shown(value)}")
        if value is not None and not 1 <= int(value) <= 1 << 40:
            raise ValueError(f"limits: {name} must be from 1 to {1 << 40}; got {shown(value)}")
    now = _LIMITS.get()
    token = _LIMITS.set(_Limits(int(threads or 0) or now.threads, int(tile_bytes or 0) or now.tile_bytes))
    try:
        yield
    finally:
        _LIMITS.reset(token)


def limit_of_tile_bytes() -> int | None:
    """Return what `limits` says of the working set of a tile, None if nothing."""
    return _LIMITS.get().tile_bytes


def cut(shape: tuple[int, ...], item_bytes: int, room: int) -> Iterator[Tile]:
    """Cut an index space into tiles whose items need at most `room` bytes, but for tiles of one item.

    Trailing dimensions stay whole while they fit, one dimension is cut into ranges, and those before it are walked one
    index at a time; ranges are of nearly one size. A tile is a slice per dimension, in row-major order; an empty space
    has none. The limits are those of the caller, whoever takes the tiles.
    """
    if 0 in shape:
        return iter(())
    if math.prod(shape) * item_bytes <= room:
        return iter([tuple(slice(0, size) for size in shape)])
    room = max(1, room // max(1, item_bytes))
    steps = []
    for size in reversed(shape):
        steps.append(-(-size // -(-size // min(size, room))))
        room = max(1, room // size)
    ranges = [range(0, size, step) for size, step in zip(shape, reversed(steps), strict=True)]
    return (
        tuple(slice(i, min(i + r.step, r.stop)) for i, r in zip(starts, ranges, strict=True))
        for starts in itertools.product(*ranges)
    )


def run(
    work: Callable[..., Any],
    tiles: Iterable[Tile],
    collect: Callable[[Tile, Any], None] | None,
    result_bytes: int,
    *,
    threads: bool,
    prepare: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> None:
    """Run the tiles: see `Backend.run`. `prepare` changes `work` where there is more than one tile."""
    tiles = iter(tiles)
    first = list(itertools.islice(tiles, 2))
    count = (_LIMITS.get().threads or _threads.usable_cores()) if threads and len(first) > 1 else 1
    if prepare is not None and len(first) > 1:
        work = prepare(work)
    tiles = itertools.chain(first, tiles)
    if count == 1:
        results: Any = ((tile, work(*tile)) for tile in tiles)
    else:
        few = max(1, min(2 * count, _AHEAD_BYTES // result_bytes))
        results = _threads.in_order(work, tiles, count, ahead=math.inf if collect is None else few)
    with contextlib.closing(results):
        for tile, result in results:
            if collect is not None:
                collect(tile, result)
            del result  # before the next one is computed
