"""Unpooling: putting values back where max pooling found them.

`...` any leading dimensions; `*S` the spatial sizes of what was pooled; `*O` those of the plane it is put back into.
B planes of a tile; P elements of a plane of the result, I of a plane of `x`.
"""

import math
from collections.abc import Iterator, Sequence

from . import _checks, backend
from .backend import Array, Backend, Tile

__all__ = ["max_unpool", "max_unpool_backward"]

Ints = int | Sequence[int]
Pads = int | str | Sequence[int | Sequence[int]]


@backend.op
def max_unpool(
    x: Array,
    indices: Array,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    output_size: Ints | None = None,
) -> Array:
    """Put every element where its index says, and 0 elsewhere: a partial inverse of `max_pool`.

    Parameters
    ----------
    x : (..., *S)
        float64, float32, float16, bfloat16, or any integer dtype.
    indices : (..., *S), int32 or int64
        Those that `max_pool` returned: flat, within the spatial plane of the result.
    kernel_size, stride, padding
        Those of `max_pool`; they say how large the result is. A tuple says how many of the last dimensions are spatial;
        an int means all but the first two.
    output_size : int or one per spatial dimension, optional
        The spatial size of the result, less than one stride away from the one that follows.

    Returns
    -------
    (..., *O)
        A new array of the dtype, backend and device of `x`, with `O = (S - 1) * stride + kernel - low - high`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit; for an index outside of the plane, which is looked for and so waits for a GPU.

    Notes
    -----
    `out[..., indices[..., i]] = x[..., i]` for every i of a plane, in row-major order: of equal indices, which
    overlapping windows have, the last wins.

    How it is computed: `refimpl.textbook.max_unpool`.

    References
    ----------
    `torch.nn.functional.max_unpool2d` (PyTorch 2) agrees; of equal indices it does not say which wins. ONNX's
    `MaxUnpool` counts indices over the whole array.

    Examples
    --------
    >>> import numpy as np
    >>> max_unpool(np.array([[[3.0, 5.0]]]), np.array([[[1, 3]]]), 2)
    array([[[0., 3., 0., 5.]]])
    """
    sizes = _checks.max_unpool(
        "max_unpool", {"x": x}, indices, kernel_size, stride, padding, output_size, integers=True
    )
    be = backend.of(x)
    xp = be.xp
    (wide,) = be.widened(x)
    values, places = _planes(be, wide, len(sizes)), _planes(be, indices, len(sizes))
    out = be.full((values.shape[0], math.prod(sizes)), 0, wide.dtype)

    def work(*tile: slice) -> None:
        at = (*tile, ...)
        last = _last(be, places[at], out.shape[1])
        out[at] = xp.where(last >= 0, _at(be, values[at], last), out[at])

    be.run(work, _tiles(be, places, out))
    return be.rounded(xp.reshape(out, (*x.shape[: x.ndim - len(sizes)], *sizes)), like=x)


@backend.op
def max_unpool_backward(
    dout: Array,
    x: Array,
    indices: Array,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Pads = 0,
    output_size: Ints | None = None,
) -> Array:
    """Return the gradient of `sum(dout * max_unpool(x, indices, ...))`.

    Parameters
    ----------
    dout : (..., *O)
        Of the shape, dtype and backend of what `max_unpool` returns.
    x, indices, kernel_size, stride, padding, output_size
        As for `max_unpool`, but `x` is floating.

    Returns
    -------
    dx : (..., *S)
        A new array of the dtype, backend and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `max_unpool`, and if `dout` does not have the shape or dtype of the result.

    Notes
    -----
    `dx[..., i] = dout[..., indices[..., i]]` where i is the last with its index, and 0 where another overwrote it.

    How it is computed: `refimpl.textbook.max_unpool_backward`.

    References
    ----------
    Autograd of `torch.nn.functional.max_unpool2d` (PyTorch 2) agrees where no two indices are equal; of
    equal ones it gives the gradient to each.

    Examples
    --------
    >>> import numpy as np
    >>> max_unpool_backward(np.array([[[7.0, 8.0]]]), np.array([[[3.0, 5.0]]]), np.array([[[1, 1]]]), 1)
    array([[[0., 8.]]])
    """
    sizes = _checks.max_unpool(
        "max_unpool_backward", {"x": x, "dout": dout}, indices, kernel_size, stride, padding, output_size
    )
    be = backend.of(x)
    xp = be.xp
    (wide,) = be.widened(dout)
    douts, places = _planes(be, wide, len(sizes)), _planes(be, indices, len(sizes))
    dx = be.full(tuple(places.shape), 0, wide.dtype)

    def work(*tile: slice) -> None:
        at = (*tile, ...)
        own, here = be.arange(0, places.shape[1]), places[at]
        dx[at] = xp.where(_at(be, _last(be, here, douts.shape[1]), here) == own, _at(be, douts[at], here), dx[at])

    be.run(work, _tiles(be, places, douts))
    return be.rounded(xp.reshape(dx, x.shape), like=x)


def _last(be: Backend, places: Array, plane: int) -> Array:
    """Return which element comes last to each place of a plane, -1 where none does: (B, I) -> (B, P), int64.

    Sorted by place and then by element, the last of each place stands right before where the next place would begin.
    Sorting and looking up are exact and reproducible on every backend, which scattering is not.
    """
    xp = be.xp
    planes, count = places.shape
    own, place = be.arange(0, count), be.arange(0, planes * plane)
    first = be.arange(0, planes)[:, None] * plane
    entries = xp.sort(xp.reshape((xp.astype(places, xp.int64) + first) * count + own, (-1,)))
    before = xp.searchsorted(entries, (place + 1) * count) - 1
    found = xp.take(entries, xp.clip(before, 0, planes * count - 1))
    last = xp.where((before >= 0) & (found // count == place), found % count, -1)
    return xp.reshape(last, (planes, plane))


def _at(be: Backend, values: Array, places: Array) -> Array:
    """Return `values[b, places[b, i]]`: (B, P), (B, I) -> (B, I). A place of -1 gives anything."""
    xp = be.xp
    planes, count = values.shape
    first = be.arange(0, planes)[:, None] * count
    flat = xp.reshape(xp.clip(xp.astype(places, xp.int64), 0, count - 1) + first, (-1,))
    return xp.reshape(xp.take(xp.reshape(values, (-1,)), flat), places.shape)


def _planes(be: Backend, array: Array, spatial: int) -> Array:
    """Return the array with one row for each plane."""
    lead = array.shape[: array.ndim - spatial]
    plane = math.prod(array.shape[array.ndim - spatial :])
    return be.xp.reshape(array, (math.prod(lead), plane))


def _tiles(be: Backend, places: Array, out: Array) -> Iterator[Tile]:
    """Cut the planes into tiles; each is sorted and looked up in a handful of int64 arrays."""
    return be.tiles(tuple(places.shape[:1]), 6 * 8 * (places.shape[1] + out.shape[1]))
