"""Meet refimpl: every op and its gradient, both backends, the weights of PyTorch, and checks of your own code.

Read it from top to bottom: each section is a function that prints what it found. Everything is computed as it runs.

    pip install ".[examples]"
    python examples/quickstart.py        # --help: all options; with PyTorch or CuPy installed it does more

N images or sequences; C channels; H heads; L tokens, E features of each.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from digits import parsed
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from sklearn.datasets import load_sample_image

import refimpl
from refimpl.backend import available, namespace, to_numpy
from refimpl.testing import assert_matches, check_gradients

Array = Any  # of NumPy or CuPy

CONSOLE = Console(highlight=False)
PATCH, QUERY = 4, (10, 12)  # in the picture: pixels of a patch's side; row and column of the patch that attends


def ops_and_gradients(xp: ModuleType, rng: np.random.Generator) -> None:
    """Call each op and its backward, which takes `dout` before what the forward takes.

    It returns the gradient of `sum(dout * result)`; here `dout` is all ones, so of the sum of the result.
    """
    CONSOLE.rule("Every op is a pair")
    x, weight, bias = draw(xp, rng, (2, 4, 9, 9)), draw(xp, rng, (6, 2, 3, 3)), draw(xp, rng, (6,))
    options = {"stride": 2, "padding": "same", "groups": 2}
    out = refimpl.conv(x, weight, bias, **options)
    grads = refimpl.conv_backward(xp.ones_like(out), x, weight, bias, **options)
    say("conv", out, **grads._asdict())

    y = refimpl.conv_transpose(out, weight, stride=2, padding=1, groups=2)  # back to the size of x
    grads = refimpl.conv_transpose_backward(xp.ones_like(y), out, weight, stride=2, padding=1, groups=2)
    say("conv_transpose", y, dx=grads.dx, dweight=grads.dweight)

    out, indices = refimpl.max_pool(x, 3, stride=2, return_indices=True)
    say("max_pool", out, dx=refimpl.max_pool_backward(xp.ones_like(out), x, 3, stride=2, indices=indices))
    restored = refimpl.max_unpool(out, indices, 3, stride=2)
    dout = xp.ones_like(restored)
    say("max_unpool", restored, dx=refimpl.max_unpool_backward(dout, out, indices, 3, stride=2))

    out = refimpl.avg_pool(x, 3, padding=1, count_include_pad=False)
    say("avg_pool", out, dx=refimpl.avg_pool_backward(xp.ones_like(out), x, 3, padding=1, count_include_pad=False))
    out = refimpl.lp_pool(x, 2, 3)  # the root of the sum of squares in 3x3
    say("lp_pool", out, dx=refimpl.lp_pool_backward(xp.ones_like(out), x, 2, 3))
    out = refimpl.adaptive_avg_pool(x, 2)
    say("adaptive_avg_pool", out, dx=refimpl.adaptive_avg_pool_backward(xp.ones_like(out), x, 2))
    out = refimpl.adaptive_max_pool(x, 2)
    say("adaptive_max_pool", out, dx=refimpl.adaptive_max_pool_backward(xp.ones_like(out), x, 2))

    query, key, value = draw(xp, rng, (2, 4, 5, 8)), draw(xp, rng, (2, 2, 7, 8)), draw(xp, rng, (2, 2, 7, 8))
    options = {"is_causal": True, "query_offset": 2}  # 4 heads of queries share 2 of keys; the last ones line up
    out = refimpl.scaled_dot_product_attention(query, key, value, **options)
    grads = refimpl.scaled_dot_product_attention_backward(xp.ones_like(out), query, key, value, **options)
    say("scaled_dot_product_attention", out, dquery=grads.dquery, dkey=grads.dkey, dvalue=grads.dvalue)
    weights = refimpl.attention_weights(query, key, **options)
    grads = refimpl.attention_weights_backward(xp.ones_like(weights), query, key, **options)
    say("attention_weights", weights, dquery=grads.dquery, dkey=grads.dkey)
    CONSOLE.print(f"    every query's weights sum to 1: {bool(abs(weights.sum(axis=-1) - 1).max() < 1e-12)}")

    halves = [
        refimpl.scaled_dot_product_attention(query, key[:, :, part], value[:, :, part], return_logsumexp=True)
        for part in (slice(0, 3), slice(3, 7))
    ]
    outs, logsumexps = (xp.stack(both) for both in zip(*halves, strict=True))
    merged, _ = refimpl.merge_attention(outs, logsumexps)
    grads = refimpl.merge_attention_backward(xp.ones_like(merged), outs, logsumexps)
    say("merge_attention", merged, douts=grads.douts, dlogsumexps=grads.dlogsumexps)
    whole = refimpl.scaled_dot_product_attention(query, key, value)
    CONSOLE.print(f"    two parts of the keys, merged, against all at once: off by {distance(merged, whole):.0e}")

    options = {"num_heads": 2, "key_lengths": xp.asarray([6, 3])}  # the second sequence ends after 3 tokens
    tokens = draw(xp, rng, (2, 6, 8))  # without params there is no projection: heads are parts of the features
    out = refimpl.multi_head_attention(tokens, tokens, tokens, **options)
    grads = refimpl.multi_head_attention_backward(xp.ones_like(out), tokens, tokens, tokens, **options)
    say("multi_head_attention", out, dquery=grads.dquery, dkey=grads.dkey, dvalue=grads.dvalue)
    CONSOLE.print(f"    padding gets no gradient: {not grads.dkey[1, 3:].any()}")


def both_backends(rng: np.random.Generator) -> None:
    """Run one function on each backend that is here. It names none: the arrays say where it runs."""
    CONSOLE.rule("One source, both backends")

    def block(x: Array, weight: Array) -> Array:
        xp = namespace(x)
        return refimpl.max_pool(xp.tanh(refimpl.conv(x, weight, padding="same")), 2)

    x, weight = rng.standard_normal((2, 3, 8, 8)), rng.standard_normal((4, 3, 3, 3))
    results = {}
    for name in available():
        xp = importlib.import_module(name)
        results[name] = to_numpy(block(xp.asarray(x), xp.asarray(weight)))
        CONSOLE.print(f"{name}: off the result of NumPy by {distance(results[name], results['numpy']):.0e}")
    if "cupy" not in results:
        CONSOLE.print("cupy: not here; it needs an NVIDIA GPU, and pip install '.\\[cuda12]' or '.\\[cuda13]'")


def weights_of_torch() -> None:
    """Use the state dict of a PyTorch layer as it is, and compare the output and all gradients."""
    CONSOLE.rule("A torch.nn.MultiheadAttention state dict")
    if importlib.util.find_spec("torch") is None:
        CONSOLE.print("PyTorch is not here (pip install torch), so there is nothing to compare with.")
        return
    import torch

    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    tokens = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    out, _ = layer(tokens, tokens, tokens)
    dout = torch.randn_like(out)
    out.backward(dout)

    params = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    x = tokens.detach().numpy()
    ours = refimpl.multi_head_attention(x, x, x, params, num_heads=4)
    grads = refimpl.multi_head_attention_backward(dout.numpy(), x, x, x, params, num_heads=4)
    CONSOLE.print(f"output: off by {distance(ours, out.detach().numpy()):.0e}")
    dx = grads.dquery + grads.dkey + grads.dvalue  # x goes three ways
    CONSOLE.print(f"gradient of the tokens: off by {distance(dx, tokens.grad.numpy()):.0e}")
    for name, tensor in layer.named_parameters():
        CONSOLE.print(f"gradient of {name}: off by {distance(grads.dparams[name], tensor.grad.numpy()):.0e}")


def own_code(xp: ModuleType, rng: np.random.Generator) -> None:
    """Check a gradient, and a kernel, of one's own: right ones pass, and wrong ones are told where they are wrong."""
    CONSOLE.rule("Checks of your own code")

    def softplus(x: Array) -> Array:
        return namespace(x).log1p(namespace(x).exp(x))

    def right(dout: Array, x: Array) -> Array:
        return dout / (1 + namespace(x).exp(-x))

    def wrong(dout: Array, x: Array) -> Array:
        return dout / (1 + namespace(x).exp(x))  # a sign is missing

    x = draw(xp, rng, (5,))
    verdict("check_gradients, the right gradient", check_gradients, softplus, right, x)
    verdict("check_gradients, a wrong one", check_gradients, softplus, wrong, x)

    # A kernel in float32 is held to what rounding explains: there is no tolerance to choose.
    image, weight = (draw(xp, rng, shape).astype(np.float32) for shape in ((1, 3, 6, 6), (2, 3, 3, 3)))
    kernel = sum(
        xp.einsum("ncij,oc->noij", image[:, :, i : i + 4, j : j + 4], weight[:, :, i, j])
        for i in range(3) for j in range(3)
    )  # fmt: skip
    verdict("assert_matches, a kernel that adds up nine taps", assert_matches, kernel, refimpl.conv, image, weight)
    kernel[0, 1, 2, 3] += 1e-4
    verdict("assert_matches, one element off by 0.0001", assert_matches, kernel, refimpl.conv, image, weight)


def picture(path: Path, xp: ModuleType) -> None:
    """Save what convolution, pooling and attention make of a photograph."""
    image = load_sample_image("china.jpg")[:416].transpose(2, 0, 1)[None]  # (1, 3, 416, 640)
    x = refimpl.avg_pool(xp.asarray(image / 255), 4)  # (1, 3, 104, 160)
    grey = x.mean(axis=1, keepdims=True)
    sobel = xp.asarray([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    edges = refimpl.conv(grey, xp.stack([sobel, sobel.T])[:, None], padding=1, padding_mode="replicate")

    top = refimpl.max_pool(grey, 4)
    taken = refimpl.max_pool_backward(top, grey, 4)  # each maximum, where it was found
    h, w = grey.shape[2:]
    t = refimpl.avg_pool(x - x.mean(axis=(2, 3), keepdims=True), PATCH).reshape(3, -1).T  # (L, 3): a token is a colour
    t = t / xp.sqrt((t**2).sum(axis=1, keepdims=True))
    weights = refimpl.attention_weights(t, t, scale=50.0)  # (L, L): each attends to colours like its own
    seen = weights[QUERY[0] * (w // PATCH) + QUERY[1]].reshape(h // PATCH, w // PATCH)

    panels = {
        f"a photograph, {w}x{h} pixels": x[0].transpose(1, 2, 0),
        "conv: strength of edges": xp.sqrt((edges**2).sum(axis=1))[0],
        "attention_weights of the framed patch": seen,
        "avg_pool of 4x4": refimpl.avg_pool(grey, 4)[0, 0],
        "max_pool of 4x4": top[0, 0],
        "max_pool_backward: where maxima were": taken[0, 0],
    }
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        for axes, (title, shown) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
            axes.imshow(to_numpy(shown), cmap="Oranges" if shown is seen else "gray", extent=(0, w, h, 0))
            axes.set(title=title, xticks=[], yticks=[])
        for axes in figure.axes[0], figure.axes[2]:
            corner = QUERY[1] * PATCH, QUERY[0] * PATCH
            axes.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="#0072B2", linewidth=1.5))
        figure.savefig(path, dpi=200)
    CONSOLE.print(f"Saved {path}: what the ops make of a photograph.", markup=False)


def draw(xp: ModuleType, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw normal numbers, in float64."""
    return xp.asarray(rng.standard_normal(shape))


def distance(a: Array, b: Array) -> float:
    """Return the largest difference between two arrays."""
    return float(abs(a - b).max())


def say(name: str, out: Array, **grads: Array) -> None:
    """Print the shape of a result, and those of gradients."""
    shapes = ", ".join(f"{key} {tuple(grad.shape)}" for key, grad in grads.items())
    CONSOLE.print(f"[bold]{name}[/] {tuple(out.shape)}; gradients: {shapes}", soft_wrap=True)


def verdict(title: str, check: Callable[..., None], *arguments: Any) -> None:
    """Print whether a check passes, or what it says."""
    try:
        check(*arguments)
        CONSOLE.print(f"{title}: passes")
    except AssertionError as error:
        CONSOLE.print(f"{title}: fails\n    {error}", markup=False, soft_wrap=True)


def numeric(xp: ModuleType, rng: np.random.Generator) -> None:
    """Compare the gradients of all ops with numeric ones, as the tests of refimpl do with many more options."""
    CONSOLE.rule("Every gradient against a numeric one")
    x, weight, tokens = draw(xp, rng, (2, 2, 6, 6)), draw(xp, rng, (2, 2, 3, 3)), draw(xp, rng, (2, 3, 6))
    pooled, indices = refimpl.max_pool(x, 2, return_indices=True)
    calls: dict[str, tuple[Any, ...]] = {
        "conv": (x, weight), "conv_transpose": (x, weight), "max_pool": (x, 2), "max_unpool": (pooled, indices, 2),
        "avg_pool": (x, 2), "lp_pool": (x, 3, 2), "adaptive_avg_pool": (x, 2), "adaptive_max_pool": (x, 2),
        "scaled_dot_product_attention": (tokens, tokens, tokens), "attention_weights": (tokens, tokens),
        "merge_attention": (x, x[..., 0]),
    }  # fmt: skip
    for name, arguments in calls.items():
        check_gradients(getattr(refimpl, name), getattr(refimpl, f"{name}_backward"), *arguments)
    multi_head = refimpl.multi_head_attention, refimpl.multi_head_attention_backward
    check_gradients(*multi_head, tokens, tokens, tokens, num_heads=2)
    CONSOLE.print(f"{len(calls) + 1} ops agree: {', '.join(calls)}, multi_head_attention.")


def main() -> None:
    """Go through all sections, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="also compare the gradients of all ops with numeric ones")
    parser.add_argument("--quick", action="store_true", help="changes nothing: this takes seconds")
    args, rng = parsed(parser, "quickstart.png"), np.random.default_rng(0)
    xp = importlib.import_module(args.backend)
    ops_and_gradients(xp, rng)
    both_backends(rng)
    weights_of_torch()
    own_code(xp, rng)
    if args.check:
        numeric(xp, rng)
    CONSOLE.rule("A picture")
    picture(args.out, xp)


if __name__ == "__main__":
    main()
