"""Pooling by p-norms, over any number of trailing dimensions.

`...` any leading dimensions; `*S` the spatial sizes; `*O` how many windows there are along each.
"""

from collections.abc import Iterator, Sequence

from . import _checks, backend
from ._engine import pooling
from ._engine.geometry import Windows
from ._engine.pooling import taps_or_windows
from .backend import Array, Backend, Tile

__all__ = ["lp_pool", "lp_pool_backward"]

Ints = int | Sequence[int]
Pads = int | str | Sequence[int | Sequence[int]]


@backend.op
def lp_pool(
    x: Array,
    norm_type: float,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Array:
    """Take the p-norm over each window.

    Parameters
    ----------
    x : (..., *S)
        float64, float32, float16 or bfloat16; the last two are computed in float32 and rounded once.
    norm_type : float, above 0
        The exponent p.
    kernel_size, stride, padding, dilation, ceil_mode
        As for `max_pool`. Padding takes no part.

    Returns
    -------
    (..., *O)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit, and if a window would hold no element.

    Notes
    -----
    In one dimension, `out[..., o] = (sum over k of |x[..., o * stride + k * dilation - low]|**p) ** (1 / p)`, computed
    in units of the window's largest element, so that no power overflows or vanishes where the norm does not.

    How it is computed: `refimpl.textbook.lp_pool`.

    References
    ----------
    Gulcehre et al., Learned-norm pooling for deep feedforward and recurrent neural networks, arXiv:1311.1780. ONNX's
    `LpPool` agrees. `torch.nn.functional.lp_pool2d` (PyTorch 2) raises `x`, not `|x|`, to the power, which differs for
    exponents that are not even, and takes the mean times the size of the kernel in windows that hang over the end.

    Examples
    --------
    >>> import numpy as np
    >>> lp_pool(np.array([[[3.0, -4.0, 0.0, 2.0]]]), 2, 2)
    array([[[5., 2.]]])
    """
    p = _checks.norm_type("lp_pool", norm_type)
    windows = _checks.pool("lp_pool", {"x": x}, kernel_size, stride, padding, dilation, ceil_mode)
    be = backend.of(x)
    (wide,) = be.widened(x)
    p = _exponent(be, p, wide)
    out = be.empty(pooling.pooled_shape(wide, windows), wide.dtype)

    def work(*tile: slice) -> None:
        unit, total = _powers(be, wide, p, windows, tile)
        out[tile] = unit * total ** (1 / p)

    be.run(work, pooling.tiles_of(be, wide, windows))
    return be.rounded(out, like=x)


@backend.op
def lp_pool_backward(
    dout: Array,
    x: Array,
    norm_type: float,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Array:
    """Return the gradient of `sum(dout * lp_pool(x, ...))`.

    Parameters
    ----------
    dout : (..., *O)
        Of the shape, dtype and backend of what `lp_pool` returns.
    x, norm_type, kernel_size, stride, padding, dilation, ceil_mode
        As for `lp_pool`.

    Returns
    -------
    dx : (..., *S)
        A new array of the dtype, backend and device of `x`; 0 where `x` is 0, whatever p, and so in windows of norm 0.

    Raises
    ------
    TypeError, ValueError
        As `lp_pool`, and if `dout` does not have the shape or dtype of the result.

    Notes
    -----
    The derivative of `out**p = sum of |x|**p` by an element says `p out**(p-1) dout/dx = p |x|**(p-1) sign(x)`, so for
    every window that it lies in

        dx += sign(x) * (|x| / out) ** (p - 1) * dout

    How it is computed: `refimpl.textbook.lp_pool_backward`.

    References
    ----------
    Gulcehre et al., arXiv:1311.1780. Autograd of `torch.nn.functional.lp_pool2d` (PyTorch 2) agrees wherever the
    forwards do and no norm is 0.

    Examples
    --------
    >>> import numpy as np
    >>> lp_pool_backward(np.array([[[10.0]]]), np.array([[[3.0, -4.0]]]), 2, 2)
    array([[[ 6., -8.]]])
    """
    name = "lp_pool_backward"
    p = _checks.norm_type(name, norm_type)
    windows = _checks.pool(name, {"x": x, "dout": dout}, kernel_size, stride, padding, dilation, ceil_mode)
    be = backend.of(x)
    xp = be.xp
    dout, wide = be.widened(dout, x)
    p = _exponent(be, p, wide)

    def work(*tile: slice) -> Iterator[tuple[Tile, Array]]:
        lead, outputs = pooling.split(tile, windows)
        units, total = _powers(be, wide, p, windows, tile)
        norms = total ** (1 / p)  # in the units
        for reads, writes in taps_or_windows(windows, outputs):
            part, place = wide[(*lead, *reads)], (..., *writes)
            unit, norm = units[place], norms[place]
            if p < 1:  # a quotient that vanishes would be an inf here; that of the fourth roots does not
                slope = (unit**0.25 / xp.abs(part) ** 0.25) ** (4 * (1 - p)) * norm ** (1 - p)
            else:
                slope = (xp.abs(part) / unit / norm) ** (p - 1)
            yield (*lead, *reads), be.select(part != 0, xp.sign(part) * slope * dout[tile][place])

    return be.rounded(pooling.add_windows(be, work, wide, windows), like=x)


def _exponent(be: Backend, p: float, x: Array) -> float:
    """Return an exponent that is a number of the dtype of `x`, as its inverse is: beyond these it changes no norm."""
    smallest, _ = be.float_range(x)
    return max(smallest, min(p, 1 / smallest))


def _powers(be: Backend, x: Array, p: float, windows: Windows, tile: Tile) -> tuple[Array, Array]:
    """Return the largest |x| of each window of the tile, and the sum of `(|x| / largest) ** p`.

    In place of a largest of 0, inf or NaN stands 1, which changes no norm.
    """
    xp = be.xp
    lead, outputs = pooling.split(tile, windows)
    unit, total = (be.full(backend.sizes_of(tile), 0, x.dtype) for _ in range(2))
    spatial = tuple(range(-len(windows), 0))
    for reads, writes in taps_or_windows(windows, outputs):
        place, part = (..., *writes), xp.abs(x[(*lead, *reads)])
        if part.shape != unit[place].shape:  # all elements of one window
            part = xp.max(part, axis=spatial, keepdims=True)
        unit[place] = xp.maximum(unit[place], part)
    unit = xp.where((unit > 0) & xp.isfinite(unit), unit, 1.0)
    block, held = be.full(backend.sizes_of(tile), 0, x.dtype), 0
    for reads, writes in taps_or_windows(windows, outputs):
        place = (..., *writes)
        part = (xp.abs(x[(*lead, *reads)]) / unit[place]) ** p
        if part.shape != total[place].shape:
            total[place] = be.sums(part, spatial, True)
            continue
        block[place] += part
        held += 1
        if held == pooling.BLOCK:
            total, block, held = total + block, 0.0 * unit, 0
    return unit, total + block
