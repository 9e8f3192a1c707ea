"""Experiment 1: how far networks of one size see, which read two bits that stand d places apart in a sequence.

N sequences; C channels; L places, E features of each; d a distance.
"""

import functools
import itertools
import math
from types import ModuleType

import numpy as np
from digits import (
    FEATURES,
    HEADS,
    Array,
    Network,
    Params,
    Saved,
    attention_shapes,
    dense,
    dense_backward,
    head,
    head_backward,
    head_shapes,
    projections,
    silu,
    silu_backward,
)
from matplotlib.figure import SubFigure
from rich.table import Column, Table

import refimpl

from .common import BLUE, GREEN, MARKERS, ORANGE, RED, SKY, Effort, Finding, Track, Trained, accuracy, fit, parameters

LENGTH, FARTHEST, TAPS, BATCH = 52, 36, 3, 64
READS = 0.9


def marked_bits(distances: np.ndarray, rng: np.random.Generator, xp: ModuleType) -> tuple[Array, Array]:
    """Draw sequences of random bits, two of them marked; the question is whether these two are equal.

    Channel 0 holds the bits, as -1 and 1; channel 1 marks the first of the two, channel 2 the second: (N, 3, L), and
    the answer, one-hot: (N, 2).
    """
    n = np.arange(distances.size)
    second = rng.integers(FARTHEST, LENGTH, n.size)
    first = second - distances
    x = np.zeros((n.size, 3, LENGTH), np.float32)
    x[:, 0] = rng.choice((-1, 1), (n.size, LENGTH))
    x[n, 1, first] = x[n, 2, second] = 1
    equal = x[n, 0, first] == x[n, 0, second]
    return xp.asarray(x), xp.asarray(np.eye(2, dtype=np.float32)[equal.astype(int)])


def attention_reader(x: Array, p: Params) -> tuple[Array, Saved]:
    """Let the second marked place attend to all places, and answer from what it gets: (N, 3, L) -> (N, 2)."""
    t = x.transpose(0, 2, 1)
    e = dense(t, p["embed.weight"], p["embed.bias"])  # (N, L, E), with no positions: it goes by the marks
    q = (e * t[..., 2:]).sum(axis=1, keepdims=True)  # (N, 1, E)
    f = (q + refimpl.multi_head_attention(q, e, e, projections(p), num_heads=HEADS))[:, 0]
    logits, in_head = head(f, p)
    return logits, (t, e, q, f, in_head)


def attention_reader_backward(dlogits: Array, x: Array, p: Params, saved: Saved) -> Params:
    """Return the gradient of every parameter."""
    del x  # its transpose is saved
    t, e, q, f, in_head = saved
    df, d = head_backward(dlogits, f, p, in_head)
    grads = refimpl.multi_head_attention_backward(df[:, None], q, e, e, projections(p), num_heads=HEADS)
    d |= {f"attention.{name}": grad for name, grad in grads.dparams.items()}
    dq = df[:, None] + grads.dquery
    de = dq * t[..., 2:] + grads.dkey + grads.dvalue
    _, d["embed.weight"], d["embed.bias"] = dense_backward(de, t, p["embed.weight"])
    return d


def conv_reader(x: Array, p: Params, dilations: tuple[int, ...]) -> tuple[Array, Saved]:
    """Convolve over what came before, layer upon layer, and answer from the second marked place: (N, 3, L) -> (N, 2).

    A layer adds to its input, as in arXiv:1512.03385; the factor keeps a deep sum as large as a shallow one.
    """
    h, layers = refimpl.conv(x, p["embed.weight"], p["embed.bias"]), []  # (N, C, L)
    for i, dilation in enumerate(dilations):
        options = {"dilation": dilation, "padding": [((TAPS - 1) * dilation, 0)]}
        a = refimpl.conv(h, p[f"{i}.weight"], p[f"{i}.bias"], **options)
        layers.append((h, a, options))
        h = h + silu(a) / math.sqrt(len(dilations))
    f = (h * x[:, 2:]).sum(axis=2)
    logits, in_head = head(f, p)
    return logits, (layers, f, in_head)


def conv_reader_backward(dlogits: Array, x: Array, p: Params, saved: Saved) -> Params:
    """Return the gradient of every parameter."""
    layers, f, in_head = saved
    df, d = head_backward(dlogits, f, p, in_head)
    dh = df[..., None] * x[:, 2:]
    for i, (h, a, options) in reversed(list(enumerate(layers))):
        da = silu_backward(dh / math.sqrt(len(layers)), a)
        grads = refimpl.conv_backward(da, h, p[f"{i}.weight"], p[f"{i}.bias"], **options)
        d[f"{i}.weight"], d[f"{i}.bias"] = grads.dweight, grads.dbias
        dh = dh + grads.dx
    _, d["embed.weight"], d["embed.bias"] = refimpl.conv_backward(dh, x, p["embed.weight"], p["embed.bias"])
    return d


def conv_reader_network(name: str, colour: str, dilations: tuple[int, ...]) -> Network:
    """Return a stack with as many channels as bring it closest to the size of the attention reader."""

    def shapes(channels: int) -> dict[str, tuple[int, ...]]:
        weights = {f"{i}.weight": (channels, channels, TAPS) for i in range(len(dilations))}
        biases = {f"{i}.bias": (channels,) for i in range(len(dilations))}
        embed = {"embed.weight": (channels, 3, 1), "embed.bias": (channels,)}
        return embed | weights | biases | head_shapes(channels, 2)

    channels = min(range(1, 65), key=lambda c: abs(parameters(shapes(c)) - parameters(ATTENTION.shapes)))
    forward = functools.partial(conv_reader, dilations=dilations)
    return Network(name, colour, forward, conv_reader_backward, shapes(channels))


ATTENTION = Network("attention", RED, attention_reader, attention_reader_backward, {
    "embed.weight": (FEATURES, 3), "embed.bias": (FEATURES,), **attention_shapes(), **head_shapes(FEATURES, 2),
})  # fmt: skip
STACKS = {  # name: colour and dilations
    "4 convolutions": (BLUE, (1,) * 4),
    "8 convolutions": (SKY, (1,) * 8),
    "4, dilated 1 to 8": (GREEN, (1, 2, 4, 8)),
    "5, dilated 1 to 16": (ORANGE, (1, 2, 4, 8, 16)),
}
NETWORKS = ATTENTION, *(conv_reader_network(name, *stack) for name, stack in STACKS.items())
REACHES = {name: (TAPS - 1) * sum(dilations) for name, (_, dilations) in STACKS.items()}  # receptive field, less 1


def run(effort: Effort, seed: int, xp: ModuleType, track: Track) -> list[Trained]:
    """Train each network on all distances, and test it on each."""

    def batches(rng: np.random.Generator) -> tuple[Array, Array]:
        return marked_bits(rng.integers(1, FARTHEST + 1, BATCH), rng, xp)

    result = {network.name: np.zeros((effort.seeds, FARTHEST)) for network in NETWORKS}
    for i, network in track([*itertools.product(range(effort.seeds), NETWORKS)]):
        rng = np.random.default_rng([seed, 1, i])
        p = fit(network, batches, effort.sequence_steps, rng, xp)
        for d in range(1, FARTHEST + 1):
            result[network.name][i, d - 1] = accuracy(network, p, *marked_bits(np.full(effort.tests, d), rng, xp))
    return [Trained(network, result[network.name], effort.tests) for network in NETWORKS]


def findings(trained: list[Trained]) -> list[Finding]:
    """Compare how far networks read with how far they can see."""
    attention, stacks = trained[0], trained[1:]
    worst = int(attention.mean.argmin())
    inside = {t.network.name: t.mean[: REACHES[t.network.name]].min() for t in stacks}
    weakest = min(inside, key=inside.__getitem__)
    beyond = {t.network.name: t.accuracy[:, REACHES[t.network.name] :] for t in stacks}
    # Guesses are right half of the time, up to the spread of that many tosses of a coin.
    off = {name: (a.mean() - 0.5) / (0.5 / math.sqrt(attention.tests * a.size)) for name, a in beyond.items() if a.size}
    oddest = max(off, key=lambda name: abs(off[name]))
    return [
        Finding(
            f"Attention reads at every distance (accuracy above {READS:.0%}).",
            f"At its worst distance, {worst + 1}: {attention.at(worst)}.",
            attention.mean.min() > READS,
        ),
        Finding(
            f"Convolutions can read within their receptive field (above {READS:.0%}).",
            f"The lowest accuracy there is {inside[weakest]:.1%} ({weakest}).",
            inside[weakest] > READS,
        ),
        Finding(
            "Beyond it they guess: 50% (up to four standard errors).",
            f"Farthest off: {beyond[oddest].mean():.1%}, {off[oddest]:+.1f} standard errors ({oddest}).",
            abs(off[oddest]) < 4,
        ),
    ]


def table(trained: list[Trained]) -> Table:
    """Return how far each network reads, beside how far it can see."""
    name, last = Column("network", no_wrap=True), f"accuracy at {FARTHEST}"
    result = Table(name, "parameters", "sees back", "reads back", last, title="Distances in places")
    for t in trained:
        reads = int(np.argmin(np.append(t.mean > READS, False)))  # without a gap
        sees = str(REACHES.get(t.network.name, "everything"))
        result.add_row(t.network.name, f"{parameters(t.network.shapes):,}", sees, str(reads), t.at(FARTHEST - 1))
    return result


def draw(figure: SubFigure, trained: list[Trained]) -> None:
    """Draw accuracy against distance, with the end of each receptive field."""
    axes, farthest_sighted = figure.subplots(), []
    for t, marker in zip(trained, MARKERS, strict=True):
        line = t.draw(axes, np.arange(1, FARTHEST + 1), marker)
        reach, colour = REACHES.get(t.network.name, math.inf), t.network.colour
        if reach < FARTHEST:
            axes.axvline(reach + 0.5, color=colour, linestyle="--", linewidth=1)
            axes.text(reach + 0.9, 0.76, t.network.name, color=colour, rotation="vertical", va="center")
        else:
            farthest_sighted.append(line)
    axes.set(xlabel="distance of the two bits (places)", ylabel="test accuracy", ylim=(0.4, 1.03))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(handles=farthest_sighted, loc="center", bbox_to_anchor=(0.62, 0.83), handlelength=1.2)
    figure.suptitle("1  Reading two bits (dashed: end of a receptive field)")
