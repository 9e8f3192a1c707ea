"""Pictures of a run: how refimpl compares with each peer, and how cost grows with size."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only
from matplotlib import pyplot, ticker

from bench import report
from bench.workloads import DIRECTIONS, LADDERS

SLOPE_OVER = 4  # the largest sizes: below them, fixed costs hide the slope


def draw(run: report.Run, folder: Path) -> Iterator[Path]:
    """Write the pictures into the folder, and yield their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.style.use("tableau-colorblind10")
    for side in report.present(run):
        if side.peers:
            yield _save(bars(run, side), folder / f"ratios-{side.device.lower()}.png")
    if any(record["ladder"] and record["seconds"] for record in run["results"]):
        yield _save(growth(run), folder / "growth.png")
    if report.crossings(run):
        yield _save(crossings(run), folder / "crossings.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def bars(run: report.Run, side: report.Side) -> Any:
    """Draw refimpl's time over that of each peer, a bar for every workload."""
    base = report.records(run, side.base)
    names = list(dict.fromkeys(name for name, _ in base))
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 1.5 + 0.4 * len(names)), sharey=True, layout="constrained")
    height = 0.8 / len(side.peers)
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        for i, peer in enumerate(side.peers):
            ratios = report.ratios(base, report.records(run, peer))
            here = {name: ratios[name, direction] for name in names if (name, direction) in ratios}
            if here:
                mean = statistics.geometric_mean(here.values())
                places = [names.index(name) + (i + 0.5) * height - 0.4 for name in here]
                lengths = [ratio - 1 for ratio in here.values()]  # bars start at 1, where both are equally fast
                label = f"{side.base} / {peer}: geometric mean {mean:.2f}"
                axis.barh(places, lengths, height, left=1, color=f"C{i}", label=label)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(xscale="log", xlabel=f"time of {side.base} / time of peer (left of 1: {side.base} faster)")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", which="both", alpha=0.3)
        axis.legend(fontsize="small", title=direction, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    machine, settings = run["machine"], run["settings"]
    figure.suptitle(f"{machine['cpu']}, {settings['threads']} threads, float32, {run['date'][:10]}", fontsize="medium")
    return figure


def growth(run: report.Run) -> Any:
    """Draw time against size on log axes, with the slope fitted to the largest sizes."""
    ladders = list(dict.fromkeys(workload.ladder for workload in LADDERS))
    shape = (len(ladders), len(DIRECTIONS))
    figure, axes = pyplot.subplots(*shape, figsize=(12, 4.5 * len(ladders)), layout="constrained", squeeze=False)
    for row, ladder in zip(axes, ladders, strict=True):
        for axis, direction in zip(row, DIRECTIONS, strict=True):
            for i, name in enumerate(run["contestants"]):
                found = report.records(run, name, ladders=True).values()
                steps = [record for record in found if (record["ladder"], record["direction"]) == (ladder, direction)]
                if len(steps) > 1:
                    sizes, times = [s["size"] for s in steps], [1e3 * report.median(s) for s in steps]
                    style = "--" if name.startswith("ceiling") else "-"
                    label = f"{name}: slope {slope(sizes, times):.2f}"
                    axis.plot(sizes, times, style, marker="o", color=f"C{i}", label=label)
            axis.set(xscale="log", yscale="log", title=direction, xlabel=ladder, ylabel="ms")
            axis.set_xticks([work.size for work in LADDERS if work.ladder == ladder])
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(which="both", alpha=0.3)
            if axis.lines:
                axis.legend(
                    fontsize="small", title=f"slope over the largest {SLOPE_OVER} sizes", title_fontsize="small"
                )
    return figure


def crossings(run: report.Run) -> Any:
    """Draw how many times as fast as NumPy everyone on the GPU is, against size, and mark where CuPy overtakes it."""
    found = report.crossings(run)
    figure, axes = pyplot.subplots(
        len(found), len(DIRECTIONS), figsize=(12, 1 + 3.6 * len(found)), layout="constrained", squeeze=False
    )
    numpy = report.records(run, "refimpl", ladders=True)
    names = [
        name for name in ("refimpl-cupy", "torch-cuda", "torch-cuda-tf32") if report.records(run, name, ladders=True)
    ]
    for row, (ladder, by_direction) in zip(axes, found.items(), strict=True):
        for axis, direction in zip(row, DIRECTIONS, strict=True):
            for i, name in enumerate(names):
                ratios = report.ratios(numpy, report.records(run, name, ladders=True))
                here = (key for key in ratios if (numpy[key]["ladder"], key[1]) == (ladder, direction))
                if steps := [(numpy[key]["size"], ratios[key]) for key in here]:
                    axis.plot(*zip(*sorted(steps), strict=True), marker="o", color=f"C{i}", label=name)
            axis.axhline(1, color="black", linewidth=1)
            if size := by_direction.get(direction):
                axis.axvline(size, color="C0", linestyle=":", label=f"the GPU wins from {size:.0f} on")
            axis.set(xscale="log", yscale="log", title=direction, xlabel=ladder, ylabel="times as fast as NumPy")
            axis.set_xticks([work.size for work in LADDERS if work.ladder == ladder])
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            for either in (axis.xaxis, axis.yaxis):
                either.set_major_formatter("{x:g}")
            axis.grid(which="both", alpha=0.3)
            axis.legend(fontsize="small")
    gpu, cpu = run["contestants"]["refimpl-cupy"]["device"], run["machine"]["cpu"]
    figure.suptitle(f"{gpu} against {cpu}, {run['settings']['threads']} threads, float32", fontsize="medium")
    return figure


def slope(sizes: list[float], times: list[float]) -> float:
    """Return the exponent of size in time, fitted to the largest sizes."""
    pairs = sorted(zip(sizes, times, strict=True))[-SLOPE_OVER:]
    return statistics.linear_regression(
        *([math.log(value) for value in part] for part in zip(*pairs, strict=True))
    ).slope
