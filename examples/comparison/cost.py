"""Experiment 3: time and memory, forward and backward, against the length of a sequence or the size of an image.

E features (channels); S size of an image; L places, which are S^2 for an image; k taps.
"""

import functools
import itertools
import math
import time
import tracemalloc
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

import refimpl
from refimpl.backend import limits, synchronize

from .common import BLUE, MARKERS, RED, SKY, Effort, Finding, Track, power, random_weight

FEATURES, TAPS, ASYMPTOTE = 128, 9, 1024


def attention_work(s: int, rng: np.random.Generator, xp: ModuleType) -> Callable[[], None]:
    """Return a function that attends among S^2 places, forward and backward."""
    q, k, v, dout = xp.asarray(rng.standard_normal((4, s * s, FEATURES)), dtype=np.float32)

    def work() -> None:
        refimpl.scaled_dot_product_attention(q, k, v)
        refimpl.scaled_dot_product_attention_backward(dout, q, k, v)

    return work


def conv_work(s: int, rng: np.random.Generator, xp: ModuleType, dims: int) -> Callable[[], None]:
    """Return a function that convolves S^2 places, in a row or in a square, forward and backward."""
    spatial, kernel = ((s * s,), (TAPS,)) if dims == 1 else ((s, s), (math.isqrt(TAPS),) * 2)
    x, dout = xp.asarray(rng.standard_normal((2, 1, FEATURES, *spatial)), dtype=np.float32)
    weight = random_weight(rng, xp, FEATURES, FEATURES, *kernel)

    def work() -> None:
        refimpl.conv(x, weight, padding="same")
        refimpl.conv_backward(dout, x, weight, padding="same")

    return work


WORKS = {  # name: colour, exponent of time in theory, and what to measure
    "attention": (RED, 2, attention_work),
    "convolution, 1-D": (BLUE, 1, functools.partial(conv_work, dims=1)),
    "convolution, 2-D": (SKY, 1, functools.partial(conv_work, dims=2)),
}


class Cost(NamedTuple):
    """What an op costs at several numbers of places."""

    name: str
    places: np.ndarray
    seconds: np.ndarray
    peak: np.ndarray  # bytes

    def exponents(self) -> tuple[float, float]:
        """Return the exponents of time and of memory where places are many."""
        far = self.places >= ASYMPTOTE
        return power(self.places[far], self.seconds[far]), power(self.places[far], self.peak[far])


def run(effort: Effort, seed: int, xp: ModuleType, track: Track) -> list[Cost]:
    """Measure each op: the best time of several, and the most memory that it took beyond its arguments.

    On one thread of the CPU: how work grows, not how well it is shared out.
    """
    rng, result = np.random.default_rng([seed, 3]), {name: ([], []) for name in WORKS}
    for s, (name, (_, _, make)) in track([*itertools.product(effort.sizes, WORKS.items())]):
        work = make(s, rng, xp)
        with limits(threads=1):
            result[name][1].append(peak(work, xp))
            result[name][0].append(min(seconds(work, xp) for _ in range(effort.repeats)))
    places = np.array(effort.sizes) ** 2
    return [Cost(name, places, *map(np.array, measured)) for name, measured in result.items()]


def seconds(work: Callable[[], None], xp: ModuleType) -> float:
    """Return how long some work takes, the device's part included."""
    synchronize(xp.zeros(1))
    start = time.perf_counter()
    work()
    synchronize(xp.zeros(1))
    return time.perf_counter() - start


def peak(work: Callable[[], None], xp: ModuleType) -> int:
    """Return how many bytes some work held at once, results included."""
    if xp.__name__ == "cupy":
        pool = xp.cuda.MemoryPool()
        with xp.cuda.using_allocator(pool.malloc):
            work()
        return pool.total_bytes()
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def crossing(a: Cost, b: Cost) -> float:
    """Return at how many places a begins to take longer than b for good, between sizes by a power law; else NaN."""
    ahead = np.log(a.seconds / b.seconds)
    for i in range(len(ahead) - 1):
        if ahead[i] <= 0 and (ahead[i + 1 :] > 0).all():
            share = -ahead[i] / (ahead[i + 1] - ahead[i])
            return float(a.places[i] ** (1 - share) * a.places[i + 1] ** share)
    return math.nan


# Attention multiplies 2 L^2 E times forward and 5 L^2 E times backward (the scores anew, and the gradients of weights,
# query, key and value); convolution L k E^2 times forward and twice that backward.
CROSSING = 3 * TAPS * FEATURES / 7


def all_scores(places: np.ndarray) -> np.ndarray:
    """Return how many bytes the scores take when all are held at once."""
    return 4 * places**2


def findings(measured: list[Cost]) -> list[Finding]:
    """Compare exponents, and where attention begins to cost more, with counts of multiplications."""
    result = []
    for cost in measured:
        in_time, _ = cost.exponents()
        theory = WORKS[cost.name][1]
        result.append(Finding(
            f"The time of {cost.name} grows as L^{theory} (within 0.2).",
            f"L^{in_time:.2f} from L = {ASYMPTOTE} on; {cost.seconds[-1]:.2f} s at L = {cost.places[-1]}.",
            abs(in_time - theory) < 0.2,
        ))  # fmt: skip
    for cost in measured:
        _, in_memory = cost.exponents()
        at_once = f" (all scores at once: {all_scores(cost.places)[-1] / 2**20:.0f} MiB)" if cost is measured[0] else ""
        result.append(Finding(
            f"The memory of {cost.name} grows no faster than L, as it works in tiles (within 0.2).",
            f"L^{in_memory:.2f}; {cost.peak[-1] / 2**20:.0f} MiB at L = {cost.places[-1]}{at_once}.",
            in_memory < 1.2,
        ))  # fmt: skip
    found = crossing(*measured[:2])
    where = "They cross nowhere." if math.isnan(found) else f"The lines cross at L = {found:.0f}."
    return [*result, Finding(
        f"Attention costs more than convolution from L = 3 k E / 7 = {CROSSING:.0f} on (within a factor of 2).",
        where, CROSSING / 2 < found < CROSSING * 2,
    )]  # fmt: skip


def draw(figure: SubFigure, measured: list[Cost]) -> None:
    """Draw time against places."""
    axes = figure.subplots()
    for cost, marker in zip(measured, MARKERS, strict=False):
        far, label = cost.places[cost.places >= ASYMPTOTE], f"{cost.name}: $L^{{{cost.exponents()[0]:.2f}}}$"
        axes.plot(cost.places, cost.seconds, marker=marker, color=WORKS[cost.name][0], label=label)
        theory = cost.seconds[-1] * (far / far[-1]) ** WORKS[cost.name][1]
        axes.plot(far, theory * 1.5, ":", color=WORKS[cost.name][0])
    axes.axvline(CROSSING, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", ylabel="time (s)")
    label_places(axes, measured[0].places)
    axes.legend(loc="lower right")
    figure.suptitle(f"3  Cost (dotted: L² and L; dashed: equal counts, L = {CROSSING:.0f})")


def draw_memory(figure: SubFigure, measured: list[Cost]) -> None:
    """Draw memory against places, beside what all scores at once would take."""
    axes = figure.subplots()
    for cost, marker in zip(measured, MARKERS, strict=False):
        label = f"{cost.name}: $L^{{{cost.exponents()[1]:.2f}}}$"
        axes.plot(cost.places, cost.peak / 2**20, marker=marker, color=WORKS[cost.name][0], label=label)
    places = measured[0].places
    axes.plot(places, all_scores(places) / 2**20, "k--", label="all scores at once: $L^2$")
    axes.set(xscale="log", yscale="log", ylabel="memory beyond the arguments (MiB)")
    axes.yaxis.set_major_formatter("{x:g}")
    label_places(axes, places)
    axes.legend()
    figure.suptitle("Memory, forward and backward")


def label_places(axes: Axes, places: np.ndarray) -> None:
    """Label lengths as numbers, and as the sizes of the images that have as many pixels."""
    axes.set_xticks(places, [f"{n}\n{math.isqrt(n)}²" for n in places])
    axes.minorticks_off()
    axes.set_xlabel("places L (sequence), S² (image)")
