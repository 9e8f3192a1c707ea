"""Train two small networks on handwritten digits with nothing but refimpl: one convolves, the other attends.

A layer is a pair of functions, forward and backward; a network is a pair of chains of them. What refimpl does not have
(dense layer, activation, loss, optimiser) is written out here in a few lines each. In order: layers, networks,
training, a check of all gradients, the picture. A backward stands below its forward and uses the same letters; the
gradient of the loss by `x` is `dx`.

The images are the 1,797 real ones of 8x8 pixels that scikit-learn ships. Both networks train in half a minute on two
cores; then the program prints how they compare, and saves a picture of what they learned.

    pip install ".[examples]"
    python examples/digits.py            # --check: compare gradients with numeric ones first; --help: all options

N images; C channels; L tokens, E features of each; H heads; I, J features that enter a dense layer, and leave it.
"""

import argparse
import functools
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import refimpl
from refimpl.backend import namespace, to_numpy

Array = Any  # of NumPy or CuPy
Params = dict[str, Array]
Saved = tuple[Any, ...]  # what a backward needs of its forward

CHANNELS, TOKENS, FEATURES, HEADS, HIDDEN, CLASSES = 16, 16, 32, 4, 64, 10
EPOCHS, BATCH, RATE = 40, 32, 3e-3
GOAL, TOLERANCE = 0.97, 1e-6
NO_TICKS, CENTRED = {"xticks": [], "yticks": []}, {"ha": "center", "va": "center"}


def dense(x: Array, weight: Array, bias: Array) -> Array:
    """Return `x @ weight^T + bias`: (..., I), (J, I), (J,) -> (..., J)."""
    return x @ weight.T + bias


def dense_backward(dout: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias; every row of x meets the same weight, so dweight is a sum over rows."""
    rows = dout.reshape(-1, dout.shape[-1])
    return dout @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(axis=0)  # dweight: (J, rows) @ (rows, I)


def sigmoid(x: Array) -> Array:
    """Return `1 / (1 + exp(-x))`, in a form that cannot overflow."""
    return 0.5 + 0.5 * namespace(x).tanh(0.5 * x)


def silu(x: Array) -> Array:
    """Return `x * sigmoid(x)`: much like ReLU, but smooth, so that numeric derivatives exist everywhere."""
    return x * sigmoid(x)


def silu_backward(dout: Array, x: Array) -> Array:
    """Return dx, by the product rule and `sigmoid' = sigmoid * (1 - sigmoid)`."""
    s = sigmoid(x)
    return dout * s * (1 + x * (1 - s))


def cross_entropy(logits: Array, target: Array) -> Array:
    """Return the mean of `-log softmax(logits)` at the true class: (N, 10), one-hot (N, 10) -> ()."""
    xp = namespace(logits)
    z = logits - logits.max(axis=1, keepdims=True)
    return (xp.log(xp.exp(z).sum(axis=1)) - (target * z).sum(axis=1)).mean()


def cross_entropy_backward(logits: Array, target: Array) -> Array:
    """Return dlogits: what the network believes, less the truth."""
    p = namespace(logits).exp(logits - logits.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True) - target) / logits.shape[0]


def head(f: Array, p: Params) -> tuple[Array, Saved]:
    """Classify features with two dense layers, as both networks do at last: (N, I) -> (N, 10)."""
    u = dense(f, p["hidden.weight"], p["hidden.bias"])
    v = silu(u)
    return dense(v, p["out.weight"], p["out.bias"]), (u, v)


def head_backward(dlogits: Array, f: Array, p: Params, saved: Saved) -> tuple[Array, Params]:
    """Return df, and the gradient of every parameter."""
    u, v = saved
    d: Params = {}
    dv, d["out.weight"], d["out.bias"] = dense_backward(dlogits, v, p["out.weight"])
    du = silu_backward(dv, u)
    df, d["hidden.weight"], d["hidden.bias"] = dense_backward(du, f, p["hidden.weight"])
    return df, d


def conv_net(x: Array, p: Params) -> tuple[Array, Saved]:
    """Convolve, take the maximum of every 2x2 pixels, classify: (N, 1, 8, 8) -> (N, 10)."""
    a = refimpl.conv(x, p["conv.weight"], p["conv.bias"], padding=1)  # (N, C, 8, 8)
    b = silu(a)
    m, indices = refimpl.max_pool(b, 2, return_indices=True)  # (N, C, 4, 4)
    f = m.reshape(m.shape[0], -1)
    logits, in_head = head(f, p)
    return logits, (a, b, indices, f, in_head)


def conv_net_backward(dlogits: Array, x: Array, p: Params, saved: Saved) -> Params:
    """Return the gradient of every parameter."""
    a, b, indices, f, in_head = saved
    df, d = head_backward(dlogits, f, p, in_head)
    dm = df.reshape(indices.shape)
    db = refimpl.max_pool_backward(dm, b, 2, indices=indices)
    da = silu_backward(db, a)
    _, d["conv.weight"], d["conv.bias"] = refimpl.conv_backward(da, x, p["conv.weight"], p["conv.bias"], padding=1)
    return d


def attention_net(x: Array, p: Params) -> tuple[Array, Saved]:
    """Cut the image into patches, let them attend to each other, classify: (N, 1, 8, 8) -> (N, 10)."""
    t = patches(x)
    e = dense(t, p["embed.weight"], p["position"])  # (N, L, E): a bias of its own tells each token its place
    s = attend(e, p)
    f = s.reshape(s.shape[0], -1)
    logits, in_head = head(f, p)
    return logits, (t, e, f, in_head)


def attention_net_backward(dlogits: Array, x: Array, p: Params, saved: Saved) -> Params:
    """Return the gradient of every parameter."""
    del x  # its patches are saved
    t, e, f, in_head = saved
    df, d = head_backward(dlogits, f, p, in_head)
    ds = df.reshape(e.shape)
    de, dattention = attend_backward(ds, e, p)
    d |= dattention
    _, d["embed.weight"], _ = dense_backward(de, t, p["embed.weight"])
    d["position"] = de.sum(axis=0)
    return d


def attend(e: Array, p: Params, **options: Any) -> Array:
    """Add to each token what it attends to: (N, L, E) -> (N, L, E)."""
    return e + refimpl.multi_head_attention(e, e, e, projections(p), num_heads=HEADS, **options)


def attend_backward(dout: Array, e: Array, p: Params, **options: Any) -> tuple[Array, Params]:
    """Return de, and the gradient of every parameter of attention; e goes four ways."""
    grads = refimpl.multi_head_attention_backward(dout, e, e, e, projections(p), num_heads=HEADS, **options)
    de = dout + grads.dquery + grads.dkey + grads.dvalue
    return de, {f"attention.{name}": grad for name, grad in grads.dparams.items()}


def patches(x: Array, size: int = 2) -> Array:
    """Return the square patches of that many pixels a side, in reading order: (N, C, H, W) -> (N, L, C * size^2)."""
    n, c, h, w = x.shape
    rows = x.reshape(n, c, h // size, size, w // size, size).transpose(0, 2, 4, 1, 3, 5)
    return rows.reshape(n, -1, c * size * size)


def projections(p: Params) -> Params:
    """Return the parameters of attention under the names of a `torch.nn.MultiheadAttention` state dict."""
    return {name.removeprefix("attention."): array for name, array in p.items() if name.startswith("attention.")}


def attention_weights(x: Array, p: Params) -> Array:
    """Return how much every patch attends to every other: (N, H, L, L), where rows sum to 1."""
    xp = namespace(x)
    e = dense(patches(x), p["embed.weight"], p["position"])
    qkv = dense(e, p["attention.in_proj_weight"], p["attention.in_proj_bias"])  # (N, L, 3 E)
    q, k, _ = xp.moveaxis(qkv.reshape(-1, TOKENS, 3, HEADS, FEATURES // HEADS), (2, 3), (0, 2))  # (N, H, L, E / H)
    # Attention returns weights @ value: with the identity matrix as value, the weights themselves.
    identity = xp.eye(TOKENS, dtype=x.dtype)[None, None]
    return refimpl.scaled_dot_product_attention(q, k, xp.broadcast_to(identity, (*k.shape[:-1], TOKENS)))


class Network(NamedTuple):
    """A network: its name, its colour in the picture, its two functions, and the shapes of its parameters."""

    name: str
    colour: str
    forward: Callable[[Array, Params], tuple[Array, Saved]]
    backward: Callable[[Array, Array, Params, Saved], Params]
    shapes: dict[str, tuple[int, ...]]

    def new_params(self, rng: np.random.Generator, xp: ModuleType, dtype: type) -> Params:
        """Draw weights with which signals keep their size; biases begin at 0."""
        scales = {n: 1.4 / math.sqrt(math.prod(shape[1:])) for n, shape in self.shapes.items()}
        scales |= {n: 0.0 for n in self.shapes if n.endswith("bias")} | {"position": 0.5}
        return {n: xp.asarray(scales[n] * rng.standard_normal(s), dtype=dtype) for n, s in self.shapes.items()}


def attention_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of `attend`."""
    return {
        "attention.in_proj_weight": (3 * FEATURES, FEATURES), "attention.in_proj_bias": (3 * FEATURES,),
        "attention.out_proj.weight": (FEATURES, FEATURES), "attention.out_proj.bias": (FEATURES,),
    }  # fmt: skip


def head_shapes(features: int, classes: int = CLASSES) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of `head`."""
    return {
        "hidden.weight": (HIDDEN, features), "hidden.bias": (HIDDEN,),
        "out.weight": (classes, HIDDEN), "out.bias": (classes,),
    }  # fmt: skip


NETWORKS = (  # two colours of the palette by Okabe and Ito, which colour-blind readers can tell apart
    Network("convolution", "#0072B2", conv_net, conv_net_backward, {
        "conv.weight": (CHANNELS, 1, 3, 3), "conv.bias": (CHANNELS,), **head_shapes(CHANNELS * 4 * 4),
    }),
    Network("attention", "#D55E00", attention_net, attention_net_backward, {
        "embed.weight": (FEATURES, 4), "position": (TOKENS, FEATURES),
        **attention_shapes(), **head_shapes(TOKENS * FEATURES),
    }),
)  # fmt: skip


class Data(NamedTuple):
    """Images, pixels from 0 to 1, and one-hot targets; those for training have a border: (N, 1, 10, 10)."""

    train: Array
    train_target: Array
    test: Array
    test_target: Array


def load(xp: ModuleType) -> Data:
    """Split the digits, the same way every time, and move them to the backend."""
    digits = load_digits()
    images, labels = digits.images[:, None] / 16, digits.target
    split = train_test_split(images, np.eye(CLASSES)[labels], test_size=0.25, random_state=0, stratify=labels)
    train, test, train_target, test_target = split
    train = np.pad(train, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return Data(*(xp.asarray(array, dtype=np.float32) for array in (train, train_target, test, test_target)))


def shifted(images: Array, share: Array, top: int, left: int) -> Array:
    """Move each image by its share of a pixel, so that none is seen twice: (N, 1, 10, 10) -> (N, 1, 8, 8)."""
    middle, moved = images[:, :, 1:9, 1:9], images[:, :, top : top + 8, left : left + 8]
    return middle + share * (moved - middle)


class Adam:
    """The optimiser of Kingma and Ba, arXiv:1412.6980, algorithm 1."""

    def __init__(self, p: Params) -> None:
        self.steps = 0
        self.mean = {name: 0 * array for name, array in p.items()}
        self.square = {name: 0 * array for name, array in p.items()}

    def step(self, p: Params, d: Params, rate: float) -> None:
        """Move each parameter, in place, against the running mean of its gradient, over that gradient's usual size."""
        self.steps += 1
        unbias = math.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)  # as both means begin at 0
        for name in p:
            self.mean[name] += 0.1 * (d[name] - self.mean[name])
            self.square[name] += 0.001 * (d[name] ** 2 - self.square[name])
            p[name] -= rate * unbias * self.mean[name] / (self.square[name] ** 0.5 + 1e-8)


class Run(NamedTuple):
    """What came of training a network."""

    network: Network
    params: Params
    losses: list[tuple[float, float]]  # of each epoch: while training, and on the test images after it
    read: np.ndarray  # the digits that it takes the test images for
    accuracy: float
    seconds: float  # per epoch, without the test


def train(network: Network, data: Data, epochs: int, seed: int, tick: Callable[..., None]) -> Run:
    """Train a new network, and call `tick(state=...)` after every epoch."""
    xp, rng = namespace(data.train), np.random.default_rng(seed)
    p, count, losses, seconds = network.new_params(rng, xp, np.float32), data.train.shape[0], [], 0.0
    adam, steps = Adam(p), epochs * math.ceil(count / BATCH)
    true = to_numpy(data.test_target).argmax(axis=1)
    for _ in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = xp.asarray(rng.permutation(count))
        share = xp.asarray(rng.random((count, 1, 1, 1)), dtype=np.float32)
        for i in range(0, count, BATCH):
            batch = order[i : i + BATCH]
            corner = ((0, 1), (2, 1), (1, 0), (1, 2))[rng.integers(4)]  # down, up, to the right, to the left
            x, target = shifted(data.train[batch], share[batch], *corner), data.train_target[batch]
            logits, saved = network.forward(x, p)
            d = network.backward(cross_entropy_backward(logits, target), x, p, saved)
            adam.step(p, d, RATE * (1 - adam.steps / steps))  # ever smaller steps settle in a minimum
            total += cross_entropy(logits, target) * batch.size
        train_loss = float(total) / count  # waits for the device: the time counts the work, not the asking
        seconds += time.perf_counter() - start
        logits, _ = network.forward(data.test, p)
        losses.append((train_loss, float(cross_entropy(logits, data.test_target))))
        read = to_numpy(logits.argmax(axis=1))
        tick(state=f"loss {train_loss:.3f}, test accuracy {np.mean(read == true):.1%}")
    return Run(network, p, losses, read, float(np.mean(read == true)), seconds / epochs)


def worst_gradient_error(network: Network, x: Array, target: Array, seed: int) -> float:
    """Return the worst relative error of five random entries of every parameter's gradient, in float64.

    The numeric derivative is taken with three steps, of which the best counts. Within a large one, another pixel may
    become the maximum of its window, where there is no derivative; a small one leaves little but rounding; and a wrong
    gradient is wrong with all of them. (Windows of blank paper tie. That is harmless: the same pixels around each give
    the same derivative, whichever wins.) The error is relative to the entry, or to 1% of the parameter's largest one
    if that is more, as some entries are 0 but for rounding.
    """
    rng, x, target = np.random.default_rng(seed), x.astype(np.float64), target.astype(np.float64)
    p = network.new_params(rng, namespace(x), np.float64)
    logits, saved = network.forward(x, p)
    d = network.backward(cross_entropy_backward(logits, target), x, p, saved)
    worst = 0.0
    for name, array in p.items():
        for _ in range(5):
            at = tuple(rng.integers(array.shape).tolist())
            analytic, floor = float(d[name][at]), 0.01 * float(abs(d[name]).max())
            errors = []
            for h in (1e-3, 1e-4, 1e-5):
                numeric = derivative(lambda: float(cross_entropy(network.forward(x, p)[0], target)), array, at, h)
                errors.append(abs(analytic - numeric) / max(abs(analytic), abs(numeric), floor))
            worst = max(worst, min(errors))
    return worst


def derivative(loss: Callable[[], float], array: Array, at: tuple[int, ...], h: float) -> float:
    """Differentiate by one entry, which is put back: central differences, extrapolated (Richardson) to O(h^4)."""
    entry = float(array[at])

    def slope(h: float) -> float:
        array[at] = entry + h
        above = loss()
        array[at] = entry - h
        below = loss()
        array[at] = entry
        return (above - below) / (2 * h)

    return (4 * slope(h / 2) - slope(h)) / 3


def draw(path: Path, runs: list[Run], data: Data) -> None:
    """Save losses, test digits with both readings, attention over one of them, and the filters of the convolution."""
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10}):
        figure = Figure(figsize=(9, 7.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1], hspace=0.05)
        losses, digits = top.subfigures(1, 2, width_ratios=[1, 1.35], wspace=0.05)
        attention, filters = bottom.subfigures(1, 2, width_ratios=[1.35, 1], wspace=0.05)
        draw_losses(losses, runs)
        draw_digits(digits, runs, data)
        draw_attention(attention, runs[1], data)
        draw_filters(filters, runs[0])
        figure.savefig(path, dpi=200)


def draw_losses(figure: SubFigure, runs: list[Run]) -> None:
    """Draw the losses of both networks."""
    figure.suptitle("Losses")
    axes = figure.subplots()
    for run in runs:
        epochs, losses = range(1, len(run.losses) + 1), np.array(run.losses)
        axes.plot(epochs, losses[:, 0], ":", color=run.network.colour, label=f"{run.network.name}, training (shifted)")
        axes.plot(epochs, losses[:, 1], "-", color=run.network.colour, label=f"{run.network.name}, test")
    axes.set(xlabel="epoch", ylabel="cross-entropy (nats per image)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_digits(figure: SubFigure, runs: list[Run], data: Data) -> None:
    """Draw test digits, misread ones first, and below each what both networks read."""
    images, true = to_numpy(data.test)[:, 0], to_numpy(data.test_target).argmax(axis=1)
    wrong = np.any([run.read != true for run in runs], axis=0)
    figure.suptitle(f"Test digits as both networks read them (boxed: misread, {wrong.sum()} of {len(true)})")
    panels = figure.subplots(3, 6, subplot_kw=NO_TICKS).flat
    for axes, n in zip(panels, [*np.flatnonzero(wrong)[:12], *np.flatnonzero(~wrong)], strict=False):
        axes.imshow(images[n], cmap="gray_r")
        axes.set_title(f"true: {true[n]}", pad=2)
        axes.set_xlabel(" ")  # room for what was read
        for run, x in zip(runs, (0.25, 0.75), strict=True):
            text = axes.text(x, -0.2, run.read[n], color=run.network.colour, transform=axes.transAxes, **CENTRED)
            if run.read[n] != true[n]:
                text.set_bbox({"boxstyle": "square,pad=0.15", "fill": False, "edgecolor": run.network.colour})


def draw_attention(figure: SubFigure, run: Run, data: Data) -> None:
    """Draw how much each head attends to each patch of one digit, from the three patches with the most ink."""
    x = data.test[:1]
    image, ink = to_numpy(x)[0, 0], to_numpy(patches(x))[0].sum(axis=1)
    weights = to_numpy(attention_weights(x, run.params)).reshape(HEADS, TOKENS, 4, 4)
    figure.suptitle("Attention from the framed patch (dots: ink)")
    panels = figure.subplots(3, 1 + HEADS, subplot_kw=NO_TICKS)
    for row, query in zip(panels, sorted(ink.argsort()[-3:]), strict=True):
        corner = (query % 4 * 2 - 0.5, query // 4 * 2 - 0.5)
        row[0].imshow(image, cmap="gray_r")
        row[0].add_patch(Rectangle(corner, 2, 2, fill=False, edgecolor=run.network.colour, linewidth=2))
        for axes, weight in zip(row[1:], weights[:, query], strict=True):
            shown = axes.imshow(weight, cmap="Oranges", vmin=0, vmax=weights.max(), extent=(-0.5, 7.5, 7.5, -0.5))
            axes.scatter(*np.nonzero(image.T > 0.4), s=3, color="black", linewidths=0)
    for h, axes in enumerate(panels[0, 1:]):
        axes.set_title(f"head {h + 1}")
    figure.colorbar(shown, ax=panels, label="weight (the 16 of a panel sum to 1)")


def draw_filters(figure: SubFigure, run: Run) -> None:
    """Draw the filters of the convolution."""
    filters = to_numpy(run.params["conv.weight"])[:, 0]
    figure.suptitle("Convolution: its 16 filters of 3x3 pixels")
    panels = figure.subplots(4, 4, subplot_kw=NO_TICKS)
    for axes, weight in zip(panels.flat, filters, strict=True):
        shown = axes.imshow(weight, cmap="PuOr", vmin=-abs(filters).max(), vmax=abs(filters).max())
    figure.colorbar(shown, ax=panels, label="weight")


def table(runs: list[Run]) -> Table:
    """Return both networks side by side."""
    result = Table("", *(run.network.name for run in runs))
    result.add_row("test accuracy", *(f"{run.accuracy:.2%}" for run in runs))
    result.add_row("parameters", *(f"{sum(array.size for array in run.params.values()):,}" for run in runs))
    result.add_row("seconds per epoch", *(f"{run.seconds:.2f}" for run in runs))
    return result


def parsed(parser: argparse.ArgumentParser, picture: str) -> argparse.Namespace:
    """Read the command line, with what all examples take: where to compute, and where to save the picture."""
    parser.add_argument("--backend", choices=["numpy", "cupy"], default="numpy", help="what to compute with")
    parser.add_argument("--out", type=Path, default=Path(picture), help=f"where to save the picture ({picture})")
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists; got {args.out}")
    if args.backend not in refimpl.backend.available():
        parser.error("--backend cupy needs a GPU, and CuPy (pip install '.[cuda12]' or '.[cuda13]')")
    return args


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="first compare gradients with numeric ones")
    parser.add_argument("--epochs", type=int, help=f"how often to see all training images ({EPOCHS}; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a short run that shows that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of images (0)")
    args = parsed(parser, "digits.png")
    if args.epochs is None:
        args.epochs = 2 if args.quick else EPOCHS
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {args.epochs}")
    return args


def main() -> None:
    """Check, train, compare and draw, as the command line says."""
    args, console = arguments(), Console()
    data = load(importlib.import_module(args.backend))
    for network in NETWORKS if args.check else ():
        error = worst_gradient_error(network, data.test[:4], data.test_target[:4], args.seed)
        console.print(f"{network.name}: worst relative error of a gradient {error:.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"{network.name}: a gradient is wrong: its relative error is above {TOLERANCE:.0e}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[state]}"), console=console) as progress:
        runs = []
        for network in NETWORKS:
            task = progress.add_task(network.name, total=args.epochs, state="")
            tick = functools.partial(progress.update, task, advance=1)
            runs.append(train(network, data, args.epochs, args.seed, tick))
    console.print(table(runs))
    draw(args.out, runs, data)
    console.print(f"Saved {args.out}.", markup=False)
    if not args.quick:
        missed = " and ".join(run.network.name for run in runs if run.accuracy < GOAL)
        console.print(f"Both reached {GOAL:.0%}." if not missed else f"Did not reach {GOAL:.0%}: {missed}.")


if __name__ == "__main__":
    with threadpool_limits(1):  # matrices this small take longer on several threads of BLAS
        main()
