"""What the experiments share: how much to do, findings, training, colours."""

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from digits import Adam, Array, Network, Params, cross_entropy_backward
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from sklearn.datasets import load_sample_image

import refimpl

Track = Callable[[Sequence[Any]], Iterable[Any]]  # goes through a sequence behind a progress bar
Batches = Callable[[np.random.Generator], tuple[Array, Array]]  # draws inputs and one-hot targets

RATE = 1e-2
# The palette by Okabe and Ito, which colour-blind readers can tell apart; markers tell lines apart once more.
BLUE, SKY, GREEN, ORANGE, RED = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
MARKERS = "osD^v"


class Effort(NamedTuple):
    """How much to do."""

    seeds: int
    """How often each network is trained."""
    sequence_steps: int
    digit_steps: int
    tests: int
    """Inputs that a network is tested on, at each distance or shift."""
    draws: int
    """Random weights over which gradients are averaged."""
    repeats: int
    """Timings, of which the best counts."""
    sizes: tuple[int, ...]
    """Of the images whose cost is measured."""


class Finding(NamedTuple):
    """What theory says, what came out, and whether that bears it out."""

    theory: str
    measured: str
    holds: bool


class Trained(NamedTuple):
    """A network's accuracies: one row a seed, one column a distance or shift."""

    network: Network
    accuracy: np.ndarray
    tests: int  # inputs behind each

    @property
    def mean(self) -> np.ndarray:
        """The mean over seeds."""
        return self.accuracy.mean(axis=0)

    def at(self, column: int) -> str:
        """Return the mean of a column, and its standard deviation over seeds."""
        return f"{self.mean[column]:.1%} ± {self.accuracy[:, column].std(ddof=1):.1%}"

    def draw(self, axes: Axes, x: np.ndarray, marker: str) -> Line2D:
        """Draw the mean, which is returned, and the range over seeds."""
        low, high = self.accuracy.min(axis=0), self.accuracy.max(axis=0)
        axes.fill_between(x, low, high, color=self.network.colour, alpha=0.2, linewidth=0)
        every = (MARKERS.index(marker), 6) if len(x) > 6 else 1  # where lines coincide, markers of all can be seen
        style = {"marker": marker, "markevery": every, "color": self.network.colour, "label": self.network.name}
        return axes.plot(x, self.mean, **style)[0]


def fit(network: Network, batches: Batches, steps: int, rng: np.random.Generator, xp: ModuleType) -> Params:
    """Train a new network with Adam, at a rate that rises for a twentieth of the time and then falls to 0."""
    p = network.new_params(rng, xp, np.float32)
    adam = Adam(p)
    for step in range(steps):
        x, target = batches(rng)
        logits, saved = network.forward(x, p)
        d = network.backward(cross_entropy_backward(logits, target), x, p, saved)
        adam.step(p, d, RATE * min(1, 20 * (step + 1) / steps) * (1 - step / steps))
    return p


def accuracy(network: Network, p: Params, x: Array, target: Array) -> float:
    """Return the share of inputs that the network classifies as it should."""
    logits, _ = network.forward(x, p)
    return float((logits.argmax(axis=1) == target.argmax(axis=1)).mean())


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return how many numbers there are to learn."""
    return sum(math.prod(shape) for shape in shapes.values())


def random_weight(rng: np.random.Generator, xp: ModuleType, *shape: int) -> Array:
    """Draw a weight with which signals keep their size through `silu`."""
    return xp.asarray(1.7 / math.sqrt(math.prod(shape[1:])) * rng.standard_normal(shape), dtype=np.float32)


def photograph(xp: ModuleType) -> Array:
    """Return scikit-learn's photograph of a Chinese temple, at a quarter of its size: (1, 3, 104, 160), of spread 1."""
    image = xp.asarray(load_sample_image("china.jpg").transpose(2, 0, 1)[None, :, :416], dtype=np.float32)
    x = refimpl.avg_pool(image, 4)
    return (x - x.mean()) / x.std()


def power(x: np.ndarray, y: np.ndarray) -> float:
    """Return the exponent b of the power law `y = a x^b` that fits best in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
