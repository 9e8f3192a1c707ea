"""What is timed, and who does it."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import refimpl

Array = Any


class Workload(NamedTuple):
    """A call of an op on random float32 arrays."""

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]


WORKLOADS = (
    Workload("conv 7x7/2, 8x3x224x224 -> 64", "conv", ((8, 3, 224, 224), (64, 3, 7, 7)), {"stride": 2, "padding": 3}),
    Workload("conv 3x3, 8x64x56x56 -> 64", "conv", ((8, 64, 56, 56), (64, 64, 3, 3)), {"padding": 1}),
    Workload("conv 3x3, 8x256x14x14 -> 256", "conv", ((8, 256, 14, 14), (256, 256, 3, 3)), {"padding": 1}),
    Workload("conv 1x1, 8x256x56x56 -> 64", "conv", ((8, 256, 56, 56), (64, 256, 1, 1)), {"padding": 0}),
    Workload("max pool 2/2, 8x64x56x56", "max_pool", ((8, 64, 56, 56),), {"kernel_size": 2}),
    Workload("average pool 2/2, 8x64x56x56", "avg_pool", ((8, 64, 56, 56),), {"kernel_size": 2}),
    Workload("attention 8x8x128x64", "scaled_dot_product_attention", ((8, 8, 128, 64),) * 3, {}),
    Workload("attention 2x8x1024x64", "scaled_dot_product_attention", ((2, 8, 1024, 64),) * 3, {}),
)
QUICK = ("max pool 2/2, 8x64x56x56", "attention 8x8x128x64")


def textbook_conv(x: Array, weight: Array, *, padding: int, stride: int = 1) -> Array:
    """Convolve with a sliding view of all windows and one tensordot."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.moveaxis(np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))), -1, 1)


def textbook_max_pool(x: Array, kernel_size: int) -> Array:
    """Take the maximum over blocks."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // kernel_size, kernel_size, w // kernel_size, kernel_size).max(axis=(3, 5))


def textbook_avg_pool(x: Array, kernel_size: int) -> Array:
    """Take the mean over blocks."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // kernel_size, kernel_size, w // kernel_size, kernel_size).mean(axis=(3, 5))


def textbook_attention(query: Array, key: Array, value: Array) -> Array:
    """Attend with all scores at once."""
    s = query @ key.swapaxes(-1, -2) / float(np.sqrt(query.shape[-1]))
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ value


TEXTBOOK = {
    "conv": textbook_conv,
    "max_pool": textbook_max_pool,
    "avg_pool": textbook_avg_pool,
    "scaled_dot_product_attention": textbook_attention,
}


def contestants() -> list[str]:
    """Return who can take part here."""
    return [*(f"refimpl on {name}" for name in refimpl.backend.available()), "textbook NumPy"]


def calls(contestant: str, workload: Workload) -> dict[str, Callable[[], Any]]:
    """Return what to time, by direction: each call waits until its result is there."""
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(shape, dtype=np.float32) for shape in workload.shapes]
    if contestant == "textbook NumPy":
        return {"forward": lambda: TEXTBOOK[workload.op](*drawn, **workload.options)}
    xp = importlib.import_module(contestant.removeprefix("refimpl on "))
    arrays = [xp.asarray(array) for array in drawn]
    forward, backward = getattr(refimpl, workload.op), getattr(refimpl, f"{workload.op}_backward")
    dout = xp.ones_like(forward(*arrays, **workload.options))

    def waiting(function: Callable[..., Any], *args: Array) -> Callable[[], None]:
        def call() -> None:
            function(*args, **workload.options)
            refimpl.backend.synchronize(dout)

        return call

    return {"forward": waiting(forward, *arrays), "backward": waiting(backward, dout, *arrays)}
