"""Experiment 2: what one output sees, which is its exact gradient by all of the input.

C channels; S size of an image; L tokens, E features of each; n layers.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from digits import CENTRED, NO_TICKS, Array, patches, silu, silu_backward
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Circle, Rectangle

import refimpl
from refimpl.backend import namespace, to_numpy

from .common import BLUE, RED, Effort, Finding, Track, photograph, power, random_weight

DEPTHS, CHANNELS, KERNEL = (2, 4, 8, 16, 32), 8, 3
PATCH, SHARPNESS, QUERIES = 4, 12.0, ((3, 8), (10, 12))  # two patches of the photograph: row, column


class Sight(NamedTuple):
    """What one output sees: of stacks, by depth; and of attention, from each of the two patches."""

    stacks: dict[int, np.ndarray]
    photo: np.ndarray  # (H, W, 3)
    attention: list[np.ndarray]  # (H / PATCH, W / PATCH) each
    alike: list[np.ndarray]  # how much each patch looks like the one that attends

    def widths(self) -> np.ndarray:
        """Return the standard deviation of the gradient of each stack along an axis, in pixels."""
        return np.array([math.sqrt(m.sum(axis=0) @ np.arange(-n, n + 1) ** 2) for n, m in self.stacks.items()])


def stack(x: Array, *weights: Array) -> Array:
    """Convolve and activate, once for each weight, without padding: (1, C, S, S) -> (1, C, S - 2 n, S - 2 n)."""
    for weight in weights:
        x = silu(refimpl.conv(x, weight))
    return x


def stack_backward(dout: Array, x: Array, *weights: Array) -> tuple[Array, ...]:
    """Return dx, and the gradient of every weight."""
    layers, dweights = [], []
    for weight in weights:
        a = refimpl.conv(x, weight)
        layers.append((x, a, weight))
        x = silu(a)
    dx = dout
    for x, a, weight in reversed(layers):
        dx, dweight, _ = refimpl.conv_backward(silu_backward(dx, a), x, weight)
        dweights.append(dweight)
    return dx, *reversed(dweights)


def seen_by_stack(depth: int, draws: int, rng: np.random.Generator, xp: ModuleType) -> np.ndarray:
    """Return the mean square of the gradient by each pixel of the receptive field, in shares, over random weights."""
    size, total = 1 + depth * (KERNEL - 1), 0.0  # of this, one output is left
    for _ in range(draws):
        weights = [random_weight(rng, xp, CHANNELS, CHANNELS, KERNEL, KERNEL) for _ in range(depth)]
        x = xp.asarray(rng.standard_normal((1, CHANNELS, size, size)), dtype=np.float32)
        dout = xp.asarray(rng.standard_normal((1, CHANNELS, 1, 1)), dtype=np.float32)
        square = (stack_backward(dout, x, *weights)[0].astype(np.float64) ** 2).sum(axis=(0, 1))
        total = total + square / square.sum()
    return to_numpy(total) / draws


def seen_by_attention(t: Array, query: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return the mean square of the gradient by each token, in shares: (L, E) -> (L,).

    Tokens of length 1 are their own queries, keys and values, so that each attends to what looks like it: a non-local
    mean (arXiv:1711.07971, section 3.2).
    """
    xp, total = namespace(t), 0.0
    for _ in range(draws):
        dout = xp.asarray(rng.standard_normal((1, t.shape[1])), dtype=t.dtype)
        grads = refimpl.scaled_dot_product_attention_backward(dout, t[query : query + 1], t, t, scale=SHARPNESS)
        dt = grads.dkey + grads.dvalue
        dt[query] += grads.dquery[0]
        square = (dt.astype(np.float64) ** 2).sum(axis=1)
        total = total + square / square.sum()
    return to_numpy(total) / draws


def run(effort: Effort, seed: int, xp: ModuleType, track: Track) -> Sight:
    """Take the gradient of one output of stacks of several depths, and of attention at two patches of a photograph."""
    rng, photo = np.random.default_rng([seed, 2]), photograph(xp)
    stacks = {n: seen_by_stack(n, effort.draws, rng, xp) for n in track(DEPTHS)}
    t, grid = patches(photo, PATCH)[0], (photo.shape[2] // PATCH, photo.shape[3] // PATCH)
    t = t / xp.sqrt((t**2).sum(axis=1, keepdims=True))
    queries = [row * grid[1] + column for row, column in QUERIES]
    maps = [seen_by_attention(t, query, effort.draws, rng).reshape(grid) for query in queries]
    alike = [to_numpy(t @ t[query]).reshape(grid) for query in queries]
    shown = to_numpy(photo)[0].transpose(1, 2, 0)
    return Sight(stacks, (shown - shown.min()) / np.ptp(shown), maps, alike)


def sigma(depth: Any) -> Any:
    """Return the width that theory gives a stack, in pixels: arXiv:1701.04128, section 2.

    A path from output to input is a walk of n steps, each of any tap with equal chance; the variance of a step is that
    of KERNEL equally likely places, (k^2 - 1) / 12, and variances add up.
    """
    return (depth * (KERNEL**2 - 1) / 12) ** 0.5


def findings(sight: Sight) -> list[Finding]:
    """Compare what stacks see with a Gaussian that widens with the root of depth, and attention with the photograph."""
    depths, widths, deepest = np.array(DEPTHS), sight.widths(), DEPTHS[-1]
    exponent, error = power(depths, widths), abs(widths / sigma(depths) - 1).max()
    i = np.arange(-deepest, deepest + 1)
    disc = np.hypot(i[:, None], i) <= 2 * sigma(deepest)
    within, due = sight.stacks[deepest][disc].sum(), 1 - math.exp(-2)
    rows, columns = np.indices(sight.alike[0].shape)
    tops = []
    for (row, column), seen, alike in zip(QUERIES, sight.attention, sight.alike, strict=True):
        away = np.hypot(rows - row, columns - column)
        others = away > 0
        share = seen[others] / seen[others].sum()
        ranks = -alike[others], away[others]
        tops.append([share[rank <= np.quantile(rank, 0.1)].sum() for rank in ranks])
    reached = min((seen > 0).mean() for seen in sight.attention)
    return [
        Finding(
            "The view of a stack of convolutions widens with the root of its depth: exponent 0.50 (within 0.05).",
            f"Exponent {exponent:.2f}; widths at most {error:.0%} off sqrt(n (k² - 1) / 12).",
            abs(exponent - 0.5) < 0.05,
        ),
        Finding(
            f"It is Gaussian: {due:.0%} of the squared gradient lie within two standard deviations (within 5 points).",
            f"{within:.0%}, on {disc.mean():.0%} of the receptive field of {deepest} layers.",
            abs(within - due) < 0.05,
        ),
        Finding(
            "Attention sees every place.",
            f"The gradient reaches {reached:.1%} of the photograph's patches.",
            bool(reached == 1),
        ),
        Finding(
            "What it sees is decided by content more than by distance.",
            "Squared gradient on the most alike tenth of all other patches, against the nearest tenth: "
            + " and ".join(f"{a:.0%} against {b:.0%}" for a, b in tops)
            + ".",
            all(a > b for a, b in tops),
        ),
    ]


def draw_stack(axes: Axes, depth: int, seen: np.ndarray) -> None:
    """Draw the root mean square of a stack's gradient, its receptive field, and two standard deviations in theory."""
    most = DEPTHS[-1] + 2
    axes.imshow(np.sqrt(seen), cmap="Blues", vmin=0, extent=(-depth - 0.5, depth + 0.5) * 2)
    axes.add_patch(Rectangle((-depth - 0.5,) * 2, 2 * depth + 1, 2 * depth + 1, fill=False, linestyle="--"))
    axes.add_patch(Circle((0, 0), 2 * sigma(depth), fill=False, edgecolor=RED, linewidth=1))
    axes.set(xlim=(-most, most), ylim=(-most, most))
    axes.set_title(f"{depth} convolutions")


def draw_attention(axes: Axes, query: tuple[int, int], seen: np.ndarray, photo: np.ndarray) -> None:
    """Draw the root mean square of attention's gradient, and its query."""
    axes.imshow(np.sqrt(seen), cmap="Oranges", vmin=0, vmax=np.quantile(np.sqrt(seen), 0.995), extent=extent(photo))
    frame(axes, query)


def extent(photo: np.ndarray) -> tuple[float, float, float, float]:
    """Return the edges of the photograph, in pixels."""
    return -0.5, photo.shape[1] - 0.5, photo.shape[0] - 0.5, -0.5


def frame(axes: Axes, query: tuple[int, int]) -> None:
    """Frame the patch that attends."""
    corner = query[1] * PATCH - 0.5, query[0] * PATCH - 0.5
    axes.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor=BLUE, linewidth=1.5))


def draw(figure: SubFigure, sight: Sight) -> None:
    """Draw what three stacks see, and what attention sees from two patches of a photograph."""
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.4, 1])
    for axes, depth in zip(top.subplots(1, 3, subplot_kw=NO_TICKS), DEPTHS[1:4:2] + DEPTHS[-1:], strict=True):
        draw_stack(axes, depth, sight.stacks[depth])
    photo, *maps = bottom.subplots(1, 3, subplot_kw=NO_TICKS)
    photo.imshow(sight.photo, extent=extent(sight.photo))
    photo.set_title("a photograph")
    for axes, query, seen, name in zip(maps, QUERIES, sight.attention, "AB", strict=True):
        frame(photo, query)
        at = (query[1] + 0.5) * PATCH, (query[0] + 3) * PATCH
        photo.text(*at, name, bbox={"boxstyle": "round,pad=0.15", "color": "white"}, fontsize=7, **CENTRED)
        draw_attention(axes, query, seen, sight.photo)
        axes.set_title(f"attention from {name}")
    figure.suptitle("2  What one output sees (circle: theory, dashed: field)")


def draw_growth(figure: SubFigure, sight: Sight) -> None:
    """Draw the width of a stack's view against its depth."""
    axes, depths = figure.subplots(), np.array(DEPTHS)
    axes.plot(depths, depths, "--", color="black", label="receptive field, n pixels to each side")
    axes.plot(depths, sigma(depths), "-", color=RED, label="theory: sqrt(2 n / 3)")
    axes.plot(depths, sight.widths(), "o", color=BLUE, label=f"measured: $n^{{{power(depths, sight.widths()):.2f}}}$")
    axes.set(xscale="log", yscale="log", xlabel="depth n (layers of 3x3)", ylabel="standard deviation (pixels)")
    axes.set(xticks=DEPTHS, yticks=(1, *DEPTHS), ylim=(1, 100))
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend()
    figure.suptitle("Width of a stack's view")


def draw_stacks(figure: SubFigure, sight: Sight) -> None:
    """Draw what stacks of all depths see."""
    for axes, depth in zip(figure.subplots(1, len(DEPTHS), subplot_kw=NO_TICKS), DEPTHS, strict=True):
        draw_stack(axes, depth, sight.stacks[depth])
    figure.suptitle(
        "Root mean square gradient of one output (dashed: receptive field; circle: two standard deviations, in theory)"
    )
