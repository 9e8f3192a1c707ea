"""Experiment 4: networks that learned centred digits read shifted ones; and which ops move with their input.

N images; C channels; S size of an image; L tokens, E features of each.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
from digits import (
    CLASSES,
    FEATURES,
    HEADS,
    Array,
    Network,
    Params,
    Saved,
    attend,
    attend_backward,
    attention_shapes,
    dense,
    dense_backward,
    head,
    head_backward,
    head_shapes,
    patches,
    silu,
    silu_backward,
)
from matplotlib.figure import SubFigure
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import refimpl
from refimpl.backend import namespace

from .common import (
    BLUE,
    GREEN,
    MARKERS,
    ORANGE,
    RED,
    SKY,
    Effort,
    Finding,
    Track,
    Trained,
    accuracy,
    fit,
    parameters,
    photograph,
    random_weight,
)

CANVAS, SHIFTS, BATCH, CHANNELS, PATCH = 20, 5, 32, (16, 32), 4
PAPER = {"padding": 1, "padding_mode": "replicate"}  # as if the blank paper went on


class Moving(NamedTuple):
    """An op with random weights: its name and colour, the step between its outputs in pixels, how to draw one."""

    name: str
    colour: str
    step: int
    draw: Callable[[np.random.Generator, ModuleType], Callable[[Array], Array]]


class Shifts(NamedTuple):
    """Accuracies of networks by shift, and errors of equivariance of ops by shift, in pixels."""

    trained: list[Trained]
    errors: dict[str, np.ndarray]


def conv_classifier(x: Array, p: Params, stride: int) -> tuple[Array, Saved]:
    """Convolve, take maxima, convolve; every place votes, and votes are averaged: (N, 1, S, S) -> (N, 10)."""
    a = refimpl.conv(x, p["conv.weight"], p["conv.bias"], **PAPER) + p.get("position", 0)
    b = silu(a)
    m, indices = refimpl.max_pool(b, 2, stride=stride, return_indices=True)
    c = refimpl.conv(m, p["conv2.weight"], p["conv2.bias"], **PAPER)
    f = silu(c).reshape(*c.shape[:2], -1).transpose(0, 2, 1)  # (N, L, C)
    votes, in_head = head(f, p)
    return votes.mean(axis=1), (a, b, indices, m, c, f, in_head, stride)


def conv_classifier_backward(dlogits: Array, x: Array, p: Params, saved: Saved) -> Params:
    """Return the gradient of every parameter."""
    a, b, indices, m, c, f, in_head, stride = saved
    df, d = head_backward(shared(dlogits, f), f, p, in_head)
    dc = silu_backward(df.transpose(0, 2, 1).reshape(c.shape), c)
    dm, d["conv2.weight"], d["conv2.bias"] = refimpl.conv_backward(dc, m, p["conv2.weight"], p["conv2.bias"], **PAPER)
    da = silu_backward(refimpl.max_pool_backward(dm, b, 2, stride=stride, indices=indices), a)
    _, d["conv.weight"], d["conv.bias"] = refimpl.conv_backward(da, x, p["conv.weight"], p["conv.bias"], **PAPER)
    return d | ({"position": da.sum(axis=0)} if "position" in p else {})


def attention_classifier(x: Array, p: Params) -> tuple[Array, Saved]:
    """Let patches of 2x2 pixels attend to each other; every one votes, and votes are averaged: -> (N, 10)."""
    t = patches(x)
    e = dense(t, p["embed.weight"], p["embed.bias"]) + p.get("position", 0)
    s = attend(e, p)
    votes, in_head = head(s, p)
    return votes.mean(axis=1), (t, e, s, in_head)


def attention_classifier_backward(dlogits: Array, x: Array, p: Params, saved: Saved) -> Params:
    """Return the gradient of every parameter."""
    del x  # its patches are saved
    t, e, s, in_head = saved
    ds, d = head_backward(shared(dlogits, s), s, p, in_head)
    de, dattention = attend_backward(ds, e, p)
    _, d["embed.weight"], d["embed.bias"] = dense_backward(de, t, p["embed.weight"])
    return d | dattention | ({"position": de.sum(axis=0)} if "position" in p else {})


def shared(dmean: Array, x: Array) -> Array:
    """Return the gradient of each of the L that are averaged: (N, J), (N, L, I) -> (N, L, J)."""
    return namespace(x).repeat(dmean[:, None] / x.shape[1], x.shape[1], axis=1)


def classifiers() -> tuple[Network, ...]:
    """Return the five networks; a position is a learned bias at each place."""
    first, second = CHANNELS
    conv = {
        "conv.weight": (first, 1, 3, 3), "conv.bias": (first,),
        "conv2.weight": (second, first, 3, 3), "conv2.bias": (second,), **head_shapes(second),
    }  # fmt: skip
    embed = {"embed.weight": (FEATURES, 4), "embed.bias": (FEATURES,)}
    attention = embed | attention_shapes() | head_shapes(FEATURES)
    in_steps = [(functools.partial(conv_classifier, stride=stride), conv_classifier_backward) for stride in (1, 2)]
    attending = attention_classifier, attention_classifier_backward
    return (
        Network("convolution, stride 1", SKY, *in_steps[0], conv),
        Network("convolution, stride 2", BLUE, *in_steps[1], conv),
        Network("stride 2, positions", GREEN, *in_steps[1], conv | {"position": (first, CANVAS, CANVAS)}),
        Network("attention", ORANGE, *attending, attention),
        Network("attention, positions", RED, *attending, attention | {"position": (CANVAS**2 // 4, FEATURES)}),
    )


NETWORKS = classifiers()


def sheets(xp: ModuleType) -> list[Array]:
    """Return digits in the middle of larger sheets, for training and test, (N, 1, S, S), and targets, (N, 10)."""
    digits, margin = load_digits(), (CANVAS - 8) // 2
    images = np.pad(digits.images[:, None] / 16, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    targets = np.eye(CLASSES)[digits.target]
    split = train_test_split(images, targets, test_size=0.25, random_state=0, stratify=digits.target)
    return [xp.asarray(array, dtype=np.float32) for array in split]


def run(effort: Effort, seed: int, xp: ModuleType, track: Track) -> Shifts:
    """Train each network on centred digits, and test it on digits shifted to all four sides; then move a photograph."""
    train, test, train_target, test_target = sheets(xp)
    test, test_target = test[: effort.tests], test_target[: effort.tests]

    def batches(rng: np.random.Generator) -> tuple[Array, Array]:
        batch = xp.asarray(rng.integers(train.shape[0], size=BATCH))
        return train[batch], train_target[batch]

    result = np.zeros((len(NETWORKS), effort.seeds, SHIFTS))
    for i, (n, network) in track([*itertools.product(range(effort.seeds), enumerate(NETWORKS))]):
        p = fit(network, batches, effort.digit_steps, np.random.default_rng([seed, 4, i]), xp)
        for shift, axis, sign in itertools.product(range(SHIFTS), (2, 3), (1, -1)):
            result[n, i, shift] += accuracy(network, p, xp.roll(test, sign * shift, axis=axis), test_target) / 4
    trained = [Trained(network, rows, test.shape[0]) for network, rows in zip(NETWORKS, result, strict=True)]
    return Shifts(trained, equivariance(effort.draws // 4, np.random.default_rng([seed, 5]), photograph(xp)))


def random_conv(rng: np.random.Generator, xp: ModuleType, stride: int) -> Callable[[Array], Array]:
    """Draw two layers of 3x3 convolution on a ring."""
    weights = random_weight(rng, xp, FEATURES, 3, 3, 3), random_weight(rng, xp, FEATURES, FEATURES, 3, 3)

    def f(x: Array) -> Array:
        for weight in weights:
            x = silu(refimpl.conv(x, weight, padding=1, stride=stride, padding_mode="circular"))
        return x

    return f


def random_attention(rng: np.random.Generator, xp: ModuleType, positions: bool) -> Callable[[Array], Array]:
    """Draw a layer of attention to patches, and a position for each patch of an image that it is given."""
    embed = random_weight(rng, xp, FEATURES, 3 * PATCH**2)
    params = {
        "in_proj_weight": random_weight(rng, xp, 3 * FEATURES, FEATURES),
        "out_proj.weight": random_weight(rng, xp, FEATURES, FEATURES),
    }
    place = positions * xp.asarray(rng.standard_normal((10_000, FEATURES)), dtype=np.float32)  # more than patches

    def f(x: Array) -> Array:
        t = patches(x, PATCH) @ embed.T
        e = t + place[: t.shape[1]]
        s = e + refimpl.multi_head_attention(e, e, e, params, num_heads=HEADS)
        return s.transpose(0, 2, 1).reshape(1, FEATURES, x.shape[2] // PATCH, x.shape[3] // PATCH)

    return f


OPS = (
    Moving("convolution, stride 1", SKY, 1, functools.partial(random_conv, stride=1)),
    Moving("convolution, stride 2 twice", BLUE, 4, functools.partial(random_conv, stride=2)),
    Moving("attention to 4x4 patches", ORANGE, PATCH, functools.partial(random_attention, positions=False)),
    Moving("attention, positions", RED, PATCH, functools.partial(random_attention, positions=True)),
)


def equivariance(draws: int, rng: np.random.Generator, x: Array) -> dict[str, np.ndarray]:
    """Return the mean of `|f(moved x) - moved f(x)| / |f(x)|` at shifts of 0 to 8 pixels, of each op."""
    xp, errors = namespace(x), {op.name: np.zeros((draws, 2 * PATCH + 1)) for op in OPS}
    for op, i in itertools.product(OPS, range(draws)):
        f = op.draw(rng, xp)
        y = f(x)
        for shift in range(2 * PATCH + 1):
            error = f(xp.roll(x, shift, axis=3)) - moved(y, shift / op.step)
            errors[op.name][i, shift] = float(xp.sqrt((error**2).sum() / (y**2).sum()))
    return {name: rows.mean(axis=0) for name, rows in errors.items()}


def moved(y: Array, steps: float) -> Array:
    """Move along the last axis, around the ring; by part of a step, as linear interpolation has it."""
    whole, roll = math.floor(steps), namespace(y).roll
    part = steps - whole
    return (1 - part) * roll(y, whole, axis=-1) + part * roll(y, whole + 1, axis=-1)


def findings(shifts: Shifts) -> list[Finding]:
    """Compare accuracies by shift, and errors of equivariance, with what strides and positions should do to them."""
    conv, strided, placed, attention, placed_attention = (t.mean for t in shifts.trained)
    best_conv, best_attention = (max(ts, key=lambda t: t.mean[0]) for ts in (shifts.trained[:3], shifts.trained[3:]))
    one, four, patched, positioned = shifts.errors.values()
    return [
        Finding(
            "A convolution of stride 1 reads a digit wherever it stands (within 2 points).",
            f"Centred {conv[0]:.1%}, at worst {conv.min():.1%}.",
            conv[0] - conv.min() < 0.02,
        ),
        Finding(
            "Steps of two pixels, in stride or patches, cost accuracy at odd shifts alone.",
            f"Even and odd shifts, at worst: stride 2 {strided[::2].min():.1%} and {strided[1::2].min():.1%}, "
            f"patches {attention[::2].min():.1%} and {attention[1::2].min():.1%}.",
            all(m[::2].min() > m[1::2].max() for m in (strided, attention)),
        ),
        Finding(
            "Positions learned on centred digits do harm off the centre (at shift 4).",
            f"Without and with: convolution {strided[-1]:.1%} and {placed[-1]:.1%}, "
            f"attention {attention[-1]:.1%} and {placed_attention[-1]:.1%}.",
            placed[-1] < strided[-1] and placed_attention[-1] < attention[-1],
        ),
        Finding(
            "Attention needs them to know what is next to what; convolution does not (centred digits).",
            f"Positions add {100 * (placed_attention[0] - attention[0]):+.1f} points to attention, "
            f"{100 * (placed[0] - strided[0]):+.1f} to convolution.",
            placed_attention[0] - attention[0] > 0.05 > placed[0] - strided[0],
        ),
        Finding(
            "From as few images and steps, convolution learns centred digits better than attention.",
            f"The best of each: {best_conv.at(0)} against {best_attention.at(0)}.",
            best_conv.mean[0] > best_attention.mean[0],
        ),
        Finding(
            "Ops without positions move with a photograph that moves by whole steps (error below 1e-5).",
            f"At most {max(one.max(), four[::PATCH].max(), patched[::PATCH].max()):.0e}; by parts of a step "
            f"{max(four.max(), patched.max()):.0%}; with positions up to {positioned.max():.0%}.",
            max(one.max(), four[::PATCH].max(), patched[::PATCH].max()) < 1e-5,
        ),
    ]


def table(shifts: Shifts) -> Table:
    """Return the accuracies at each shift."""
    columns = "size", *(f"{shift} px" for shift in range(SHIFTS)), "±"
    title = "Parameters, accuracies by shift in %, and their largest standard deviation"
    result = Table(Column("network", no_wrap=True), *columns, title=title)
    for t in shifts.trained:
        shown = (f"{100 * share:.1f}" for share in (*t.mean, t.accuracy.std(axis=0, ddof=1).max()))
        result.add_row(t.network.name, f"{parameters(t.network.shapes):,}", *shown)
    return result


def draw(figure: SubFigure, shifts: Shifts) -> None:
    """Draw accuracy against shift."""
    axes = figure.subplots()
    for t, marker in zip(shifts.trained, MARKERS, strict=True):
        t.draw(axes, np.arange(SHIFTS), marker)
    axes.set(xlabel="shift of the test digits (pixels)", ylabel="test accuracy", ylim=(0, 1.03), xticks=range(SHIFTS))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.suptitle("4  Trained on centred digits, tested on shifted ones")


def draw_equivariance(figure: SubFigure, shifts: Shifts) -> None:
    """Draw the errors of equivariance against shift."""
    axes = figure.subplots()
    for op, marker in zip(OPS, MARKERS, strict=False):
        axes.plot(shifts.errors[op.name], marker=marker, color=op.colour, label=op.name)
    axes.set(xlabel="shift of the photograph (pixels)", ylabel="|f(moved x) - moved f(x)| / |f(x)|")
    axes.set_ylim(top=1.5 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend()
    figure.suptitle("Error of equivariance, random weights")
