"""Textbook NumPy: sliding windows and one tensordot, attention with all scores at once; arguments as refimpl takes.

N batch, C channels, S image, K kernel, T output positions; H heads, L length, E features.
"""

from typing import Any

import numpy as np

Array = np.ndarray


def _all(value: int | None, rank: int, default: int = 1) -> tuple[int, ...]:
    return (default if value is None else value,) * rank


def _pad(x: Array, padding: int, value: float = 0.0) -> Array:
    return np.pad(x, ((0, 0), (0, 0), *((padding, padding),) * (x.ndim - 2)), constant_values=value)


def _windows(x: Array, kernel: tuple[int, ...], stride: int, dilation: int = 1) -> Array:
    """Return the view (N, C, *T, *K)."""
    rank = len(kernel)
    spread = tuple(dilation * (k - 1) + 1 for k in kernel)
    view = np.lib.stride_tricks.sliding_window_view(x, spread, axis=tuple(range(2, 2 + rank)))
    return view[(..., *(slice(None, None, stride),) * rank, *(slice(None, None, dilation),) * rank)]


def _add_back(columns: Array, sizes: tuple[int, ...], stride: int, dilation: int, padding: int) -> Array:
    """Add columns (N, C, *T, *K) onto the pixels that they came from, (N, C, *S): the adjoint of windows."""
    rank = len(sizes)
    kernel, out = columns.shape[2 + rank :], columns.shape[2 : 2 + rank]
    x = np.zeros(columns.shape[:2] + tuple(size + 2 * padding for size in sizes), columns.dtype)
    for tap in np.ndindex(*kernel):
        here = (slice(k * dilation, k * dilation + (t - 1) * stride + 1, stride) for k, t in zip(tap, out, strict=True))
        x[(..., *here)] += columns[(..., *tap)]
    return np.ascontiguousarray(x[(..., *(slice(padding, padding + size) for size in sizes))])


def conv(x: Array, weight: Array, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Array:
    """Convolve."""
    rank = x.ndim - 2
    columns = _windows(_pad(x, padding), weight.shape[2:], stride, dilation)
    taps = range(2 + rank, 2 + 2 * rank)
    out = [
        np.moveaxis(np.tensordot(c, w, ((1, *taps), range(1, 2 + rank))), -1, 1)
        for c, w in zip(np.split(columns, groups, 1), np.split(weight, groups, 0), strict=True)
    ]
    return np.concatenate(out, 1)


def conv_backward(
    dout: Array, x: Array, weight: Array, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> tuple[Array, Array]:
    """Return dx and dweight."""
    rank = x.ndim - 2
    columns = _windows(_pad(x, padding), weight.shape[2:], stride, dilation)
    douts, batch = np.split(dout, groups, 1), (0, *range(2, 2 + rank))
    dweight = [np.tensordot(d, c, (batch, batch)) for d, c in zip(douts, np.split(columns, groups, 1), strict=True)]
    dcolumns = [  # (N, *T, C, *K) -> (N, C, *T, *K)
        np.moveaxis(np.tensordot(d, w, (1, 0)), 1 + rank, 1)
        for d, w in zip(douts, np.split(weight, groups, 0), strict=True)
    ]
    dx = _add_back(np.concatenate(dcolumns, 1), x.shape[2:], stride, dilation, padding)
    return dx, np.concatenate(dweight, 0)


def conv_transpose(x: Array, weight: Array, *, stride: int = 1, padding: int = 0) -> Array:
    """Convolve transposed."""
    sizes = tuple((s - 1) * stride - 2 * padding + k for s, k in zip(x.shape[2:], weight.shape[2:], strict=True))
    columns = np.moveaxis(np.tensordot(x, weight, (1, 0)), x.ndim - 1, 1)
    return _add_back(columns, sizes, stride, 1, padding)


def conv_transpose_backward(
    dout: Array, x: Array, weight: Array, *, stride: int = 1, padding: int = 0
) -> tuple[Array, Array]:
    """Return dx and dweight."""
    batch = (0, *range(2, x.ndim))
    columns = _windows(_pad(dout, padding), weight.shape[2:], stride)
    return conv(dout, weight, stride=stride, padding=padding), np.tensordot(x, columns, (batch, batch))


def max_pool(x: Array, kernel_size: int, *, stride: int | None = None, padding: int = 0) -> Array:
    """Take the maximum of every window."""
    rank = x.ndim - 2
    windows = _windows(_pad(x, padding, -np.inf), _all(kernel_size, rank), stride or kernel_size)
    return windows.max(axis=tuple(range(-rank, 0)))


def max_pool_backward(dout: Array, x: Array, kernel_size: int, *, stride: int | None = None, padding: int = 0) -> Array:
    """Return dx: the first maximum of a window takes its whole gradient."""
    kernel = _all(kernel_size, x.ndim - 2)
    windows = _windows(_pad(x, padding, -np.inf), kernel, stride or kernel_size)
    first = windows.reshape(*dout.shape, -1).argmax(-1)
    columns = (first[..., None] == np.arange(kernel_size ** len(kernel))) * dout[..., None]
    return _add_back(columns.reshape(*dout.shape, *kernel), x.shape[2:], stride or kernel_size, 1, padding)


def avg_pool(x: Array, kernel_size: int) -> Array:
    """Take the mean of every window."""
    rank = x.ndim - 2
    return _windows(x, _all(kernel_size, rank), kernel_size).mean(axis=tuple(range(-rank, 0)))


def avg_pool_backward(dout: Array, x: Array, kernel_size: int) -> Array:
    """Return dx."""
    rank = x.ndim - 2
    share = (dout / np.float32(kernel_size**rank))[(..., *(None,) * rank)]
    columns = np.broadcast_to(share, dout.shape + _all(kernel_size, rank))
    return _add_back(columns, x.shape[2:], kernel_size, 1, 0)


def adaptive_avg_pool(x: Array, output_size: int) -> Array:
    """Take the mean of a whole image: `output_size` 1 only."""
    if output_size != 1:
        raise NotImplementedError
    return x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)


def adaptive_avg_pool_backward(dout: Array, x: Array, output_size: int) -> Array:
    """Return dx."""
    if output_size != 1:
        raise NotImplementedError
    return np.broadcast_to(dout / np.float32(np.prod(x.shape[2:])), x.shape).copy()


def _weights(query: Array, key: Array, is_causal: bool, key_lengths: Any) -> Array:
    """Return the softmax of all scores, (N, H, L, L)."""
    s = query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(query.shape[-1]))
    if is_causal:
        s[..., ~np.tri(*s.shape[-2:], dtype=bool)] = -np.inf
    if key_lengths is not None:
        s = np.where(np.arange(s.shape[-1]) < np.reshape(key_lengths, (-1, 1, 1, 1)), s, np.float32(-np.inf))
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, *, is_causal: bool = False, key_lengths: Any = None
) -> Array:
    """Attend with all scores at once; grouped heads are repeated."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat(shared, 1), value.repeat(shared, 1)
    return _weights(query, key, is_causal, key_lengths) @ value


def scaled_dot_product_attention_backward(
    dout: Array, query: Array, key: Array, value: Array, *, is_causal: bool = False, key_lengths: Any = None
) -> tuple[Array, Array, Array]:
    """Return dquery, dkey and dvalue."""
    grouped = (key.shape[0], key.shape[1], -1, *key.shape[2:])
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat(shared, 1), value.repeat(shared, 1)
    p = _weights(query, key, is_causal, key_lengths)
    dp = dout @ value.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / np.float32(np.sqrt(query.shape[-1]))
    dkey, dvalue = ds.swapaxes(-1, -2) @ query, p.swapaxes(-1, -2) @ dout
    return ds @ key, dkey.reshape(grouped).sum(2), dvalue.reshape(grouped).sum(2)


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _join(x: Array) -> Array:
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def multi_head_attention(x: Array, in_proj: Array, out_proj: Array, *, num_heads: int) -> Array:
    """Attend to oneself: all three projections in one product."""
    heads = (_split(part, num_heads) for part in np.split(x @ in_proj.T, 3, -1))
    return _join(scaled_dot_product_attention(*heads)) @ out_proj.T


def multi_head_attention_backward(
    dout: Array, x: Array, in_proj: Array, out_proj: Array, *, num_heads: int
) -> tuple[Array, Array, Array]:
    """Return the gradients of x and of both weights."""
    heads = [_split(part, num_heads) for part in np.split(x @ in_proj.T, 3, -1)]
    joined, batch = _join(scaled_dot_product_attention(*heads)), (0, 1)
    dheads = scaled_dot_product_attention_backward(_split(dout @ out_proj, num_heads), *heads)
    dprojected = np.concatenate([_join(part) for part in dheads], -1)
    return dprojected @ in_proj, np.tensordot(dprojected, x, (batch, batch)), np.tensordot(dout, joined, (batch, batch))
