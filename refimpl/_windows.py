"""The two adjoint moves that convolution and pooling are made of: gather the taps of every window, add them back.

T taps of the kernel; `(*S)` the elements that windows slide over; `(*O)` the windows of a tile.
"""

from . import backend
from ._geometry import Windows, taps
from .backend import Array, Tile


def gather(x: Array, lead: Tile, windows: Windows, outputs: Tile) -> Array:
    """Return what every tap of every window in the tile reads: `columns[..., t, o] = x[..., element of t at o]`.

    Taps in padding hold 0.

    Parameters
    ----------
    x : (..., *S)
    lead
        The part of the first dimensions of `x` that the tile takes.
    windows, outputs
        The windows, and the range of them along each dimension that the tile takes.

    Returns
    -------
    (..., T, *O)
    """
    kept = (*(s.stop - s.start for s in lead), *x.shape[len(lead) : x.ndim - len(windows)])
    count = 1
    for window in windows:
        count *= window.kernel
    columns = backend.full((*kept, count, *(o.stop - o.start for o in outputs)), 0, x)
    for t, reads, writes in taps(windows, outputs):
        columns[(..., t, *writes)] = x[(*lead, ..., *reads)]
    return columns


def add_back(columns: Array, x: Array, lead: Tile, windows: Windows, outputs: Tile) -> None:
    """Add every tap to the element that it was gathered from: `x[..., element of t at o] += columns[..., t, o]`.

    The adjoint of `gather`: `<gather(x), columns> = <x, add_back(columns)>`. Taps in padding are dropped.
    """
    for t, reads, writes in taps(windows, outputs):
        x[(*lead, ..., *reads)] += columns[(..., t, *writes)]


def counts(windows: Windows, like: Array) -> list[Array]:
    """Return, along each dimension, how many taps of each window meet an element; one array `(O,)` a dimension."""
    xp = backend.namespace(like)
    result = []
    for window in windows:
        begin = backend.arange(0, window.out, like) * window.stride - window.low
        first = xp.clip(-(begin // window.dilation), 0, window.kernel)
        after = xp.clip((window.size - 1 - begin) // window.dilation + 1, 0, window.kernel)
        result.append(xp.astype(after - first, like.dtype))
    return result
