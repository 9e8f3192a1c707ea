"""What the figures say: medians, ratios, geometric means; as tables."""

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rich.box import MARKDOWN
from rich.table import Table

from bench.workloads import DIRECTIONS

Run = dict[str, Any]
Key = tuple[str, str]  # workload, direction


class Side(NamedTuple):
    """Who is compared on a device: refimpl's backend, the ceiling there, and the others."""

    device: str
    base: str
    ceiling: str
    peers: tuple[str, ...]


SIDES = (
    Side("CPU", "refimpl", "ceiling", ("torch", "jax", "onnxruntime", "textbook")),
    Side("GPU", "refimpl-cupy", "ceiling-cupy", ("torch-cuda", "torch-cuda-tf32", "refimpl")),
)


def records(run: Run, contestant: str, *, ladders: bool = False) -> dict[Key, dict[str, Any]]:
    """Return what was timed of a contestant: the workloads, or the ladders."""
    return {
        (record["workload"], record["direction"]): record
        for record in run["results"]
        if record["contestant"] == contestant and record["seconds"] and bool(record["ladder"]) == ladders
    }


def median(record: dict[str, Any]) -> float:
    """Return the median seconds over the rounds."""
    return statistics.median(record["seconds"])


def spread(record: dict[str, Any]) -> float:
    """Return the range over the rounds, relative to the median."""
    return (max(record["seconds"]) - min(record["seconds"])) / median(record)


def ratios(base: dict[Key, dict[str, Any]], other: dict[Key, dict[str, Any]]) -> dict[Key, float]:
    """Return how many times as long base takes as the other, where both were timed."""
    return {key: median(base[key]) / median(other[key]) for key in base if key in other}


def geometric_means(values: dict[Key, float]) -> dict[str, float]:
    """Return the geometric mean of each direction that has any."""
    parts = {direction: [value for key, value in values.items() if key[1] == direction] for direction in DIRECTIONS}
    return {direction: statistics.geometric_mean(part) for direction, part in parts.items() if part}


def present(run: Run) -> Iterator[Side]:
    """Yield the sides that a run has, with the peers that it has."""
    for side in SIDES:
        if records(run, side.base):
            yield side._replace(peers=tuple(peer for peer in side.peers if records(run, peer)))


def summary(run: Run) -> dict[str, dict[str, float]]:
    """Return the geometric means of the ratios, and of the share of the ceiling."""
    found = {}
    for side in present(run):
        base = records(run, side.base)
        for other in (*side.peers, side.ceiling):
            found[f"{side.base} / {other}"] = geometric_means(ratios(base, records(run, other)))
    return found


def crossings(run: Run) -> dict[str, dict[str, float | None]]:
    """Return, for each ladder and direction, the size from which on CuPy is faster than NumPy; None if at no size.

    Between two sizes the times are taken to follow powers of the size, as lines on log axes do.
    """
    numpy, cupy = records(run, "refimpl", ladders=True), records(run, "refimpl-cupy", ladders=True)
    found: dict[str, dict[str, float | None]] = {}
    for ladder in dict.fromkeys(record["ladder"] for record in cupy.values()):
        for direction in DIRECTIONS:
            steps = sorted(
                (math.log(record["size"]), math.log(median(cupy[key]) / median(numpy[key])))
                for key, record in numpy.items()
                if key in cupy and (record["ladder"], key[1]) == (ladder, direction)
            )
            if steps:
                found.setdefault(ladder, {})[direction] = _crossing(steps)
    return found


def _crossing(steps: list[tuple[float, float]]) -> float | None:
    """Return where the log of a ratio falls below 0 for good: `(log of the size, log of the ratio)`, by size."""
    behind = [i for i, (_, ratio) in enumerate(steps) if ratio >= 0]
    if not behind:
        return math.exp(steps[0][0])
    if behind[-1] == len(steps) - 1:
        return None
    (x, high), (x_next, low) = steps[behind[-1] : behind[-1] + 2]
    return math.exp(x + (x_next - x) * high / (high - low))


def tables(run: Run) -> Iterator[Table]:
    """Yield all tables of a run."""
    for side in present(run):
        yield brief(run, side)
        yield speed(run, side)
    yield everyone(run)
    yield means(summary(run))


def brief(run: Run, side: Side) -> Table:
    """Return refimpl's time and that over each peer's, forward and backward in one row; the README shows this."""
    table = Table("forward / backward", box=MARKDOWN)
    for column in ("ms", "of ceiling", *(f"time / {peer}" for peer in side.peers)):
        table.add_column(column, justify="right", no_wrap=True)
    base, ceiling = records(run, side.base), records(run, side.ceiling)
    columns = [ratios(ceiling, base), *(ratios(base, records(run, peer)) for peer in side.peers)]
    for name in dict.fromkeys(name for name, _ in base):
        keys = [(name, direction) for direction in DIRECTIONS]
        times = [f"{1e3 * median(base[key]):.2f}" if key in base else "-" for key in keys]
        shares = [f"{columns[0][key]:.0%}" if key in columns[0] else "-" for key in keys]
        over = [[f"{found[key]:.2f}" if key in found else "-" for key in keys] for found in columns[1:]]
        table.add_row(name, *(" / ".join(cells) for cells in (times, shares, *over)))
    means = [geometric_means(found) for found in columns[1:]]
    cells = (" / ".join(f"{mean[d]:.2f}" if d in mean else "-" for d in DIRECTIONS) for mean in means)
    table.add_row("geometric mean", "", "", *cells)
    return table


def speed(run: Run, side: Side) -> Table:
    """Return refimpl's speed, its share of the ceiling, its extra memory, and its time over each peer's."""
    peers = [f"over {peer}" for peer in side.peers]
    table = _table(f"{side.base} on the {side.device}", "ms", "spread", "rate", "of ceiling", "extra MB", *peers)
    base, ceiling = records(run, side.base), records(run, side.ceiling)
    by_peer = [ratios(base, records(run, peer)) for peer in side.peers]
    for key, record in base.items():
        share = f"{median(ceiling[key]) / median(record):.0%}" if key in ceiling else "-"
        cells = [f"{1e3 * median(record):.3f}", f"{spread(record):.0%}", rate(record), share, _megabytes(record)]
        table.add_row(*key, *cells, *(f"{ratio[key]:.2f}" if key in ratio else "-" for ratio in by_peer))
    return table


def rate(record: dict[str, Any]) -> str:
    """Return GFLOP/s, or for pooling GB/s."""
    per_second = (record["flops"] or record["bytes"]) / median(record) / 1e9
    return f"{per_second:.1f} {'GFLOP/s' if record['flops'] else 'GB/s'}"


def everyone(run: Run) -> Table:
    """Return the time, spread and extra memory of every contestant."""
    names = [name for name in run["contestants"] if records(run, name)]
    table = _table("ms, spread, extra MB", *names)
    by_name = [records(run, name) for name in names]
    for key in by_name[0]:
        table.add_row(*key, *(_cell(found[key]) if key in found else "-" for found in by_name))
    return table


def _cell(record: dict[str, Any]) -> str:
    return f"{1e3 * median(record):.3f} ±{spread(record) / 2:.0%} {_megabytes(record)}"


def _megabytes(record: dict[str, Any]) -> str:
    return "-" if record["extra_bytes"] is None else f"{record['extra_bytes'] / 1e6:.1f}"


def means(found: dict[str, dict[str, float]]) -> Table:
    """Return the geometric means."""
    table = Table("geometric mean of times", *DIRECTIONS, box=MARKDOWN)
    for name, values in found.items():
        table.add_row(name, *(f"{values[direction]:.2f}" if direction in values else "-" for direction in DIRECTIONS))
    return table


def comparison(new: Run, old: Run) -> Iterator[Table]:
    """Yield how many times as long everything takes as in an older run, and the geometric means of that."""
    names = [name for name in new["contestants"] if records(new, name) and records(old, name)]
    by_name = {name: ratios(records(new, name), records(old, name)) for name in names}
    table = _table(f"time over that of {old['date']}", *names)
    for key in dict.fromkeys(key for found in by_name.values() for key in found):
        table.add_row(*key, *(f"{found[key]:.2f}" if key in found else "-" for found in by_name.values()))
    yield table
    yield means({f"{name}, new / old": geometric_means(found) for name, found in by_name.items()})


def errors(run: Run) -> Iterable[str]:
    """Return who could not do what, or did it wrongly."""
    failed = (record for record in run["results"] if record.get("error"))
    return [f"{r['contestant']}: {r['workload']}, {r['direction']}: {r['error']}" for r in failed]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=MARKDOWN, title_justify="left")
    table.add_column("workload", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
