"""Multi-head attention: projections and heads around scaled dot-product attention.

H heads; L length (Lq, Lk); E features that come in, D those that a projection puts out, for all heads together.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import _checks, _masked, backend
from .attention import (
    Window,
    may_hide,
    reached,
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
)
from .backend import Array, Tile

__all__ = ["MultiHeadGrads", "multi_head_attention", "multi_head_attention_backward"]


class MultiHeadGrads(NamedTuple):
    """The gradients of multi-head attention; `dparams` has the keys of `params`. None where the argument was."""

    dquery: Array
    dkey: Array
    dvalue: Array
    dparams: dict[str, Array] | None
    dbias: Array | None
    dsink: Array | None


def multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array] | None = None,
    *,
    num_heads: int,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    query_offset: int | Array = 0,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Project query, key and value, split them into heads, let every head attend, concatenate, and project again.

    Parameters
    ----------
    query : (..., Lq, Eq)
        float32 or float64. Leading dimensions broadcast.
    key : (..., Lk, Ek)
    value : (..., Lk, Ev)
    params : mapping of names to arrays, optional
        The projections, with the names and shapes of a `torch.nn.MultiheadAttention` state dict; None is no projection.

        - `in_proj_weight` (3 E, E), where query, key and value have E features each; or
          `q_proj_weight` (D, Eq), `k_proj_weight` (D, Ek) and `v_proj_weight` (Dv, Ev)
        - `in_proj_bias` (D + D + Dv,), optional
        - `out_proj.weight` (E_out, Dv), and `out_proj.bias` (E_out,), optional
    num_heads : int
        Into how many equal parts the projected features are split: head h takes the h-th run of `D / num_heads`.
    bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, scale
        As for `scaled_dot_product_attention`, where the scores are (..., num_heads, Lq, Lk) and E is the features of
        one head.

    Returns
    -------
    (..., Lq, E_out)
        A new array of the dtype, backend and device of `query`; without `params`, E_out is the features of value.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit; for keys of `params` that are missing, unknown, or of both kinds.

    Notes
    -----
    With `W` the projections and `b` their biases,

        q, k, v = query @ Wq^T + bq,  key @ Wk^T + bk,  value @ Wv^T + bv
        heads   = scaled_dot_product_attention(split(q), split(k), split(v), ...)
        out     = concatenate(heads) @ Wo^T + bo

    References
    ----------
    Vaswani et al., Attention is all you need, arXiv:1706.03762, section 3.2.2. `torch.nn.MultiheadAttention` of
    PyTorch 2, with `batch_first=True`, agrees.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0, 1.0, 3.0], [0.0, 1.0, 5.0, 3.0]])
    >>> multi_head_attention(x, x, x, num_heads=2, is_causal=True)[0]
    array([1., 0., 1., 3.])
    """
    options: dict[str, Any] = {
        "bias": bias, "mask": mask, "is_causal": is_causal, "window": window, "query_offset": query_offset,
        "query_lengths": query_lengths, "key_lengths": key_lengths, "scale": scale,
    }  # fmt: skip
    arrays = {"query": query, "key": key, "value": value}
    num_heads = _checks.multi_head("multi_head_attention", arrays, params, num_heads, options)
    heads = _project_in(query, key, value, params, num_heads)
    joined = _join(scaled_dot_product_attention(*heads, **options))
    if params is None:
        return joined
    return _apply(joined, _out_proj(params), _hidden(arrays, params, heads, options))


def multi_head_attention_backward(
    dout: Array,
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array] | None = None,
    *,
    num_heads: int,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    query_offset: int | Array = 0,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
) -> MultiHeadGrads:
    """Return the gradients of `sum(dout * multi_head_attention(query, key, value, params, ...))`.

    Parameters
    ----------
    dout : (..., Lq, E_out)
        Of the shape, dtype and backend of the output.
    query, key, value, params, num_heads
        As for `multi_head_attention`.
    bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, scale
        As for `multi_head_attention`.

    Returns
    -------
    MultiHeadGrads
        `dquery`, `dkey`, `dvalue`, `dparams` and `dbias`, new arrays of the shapes and the dtype of the arguments.
        Where one array is query, key and value at once (self-attention), its gradient is the sum of the three.

    Raises
    ------
    TypeError, ValueError
        As `multi_head_attention`, and if `dout` does not have the shape or dtype of the output.

    Notes
    -----
    The chain rule through the three steps, backwards; for a projection `y = x @ W^T + b` of rows x,

        dx = dy @ W,   dW = dy^T @ x (summed over all rows),   db = dy summed over all rows

    and splitting into heads is undone by concatenating them. The output of the heads is computed again.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0, 1.0, 3.0], [0.0, 1.0, 5.0, 3.0]])
    >>> multi_head_attention_backward(np.ones((2, 4)), x, x, x, num_heads=2, mask=np.eye(2, dtype=bool)).dvalue
    array([[1., 1., 1., 1.],
           [1., 1., 1., 1.]])
    """
    options: dict[str, Any] = {
        "bias": bias, "mask": mask, "is_causal": is_causal, "window": window, "query_offset": query_offset,
        "query_lengths": query_lengths, "key_lengths": key_lengths, "scale": scale,
    }  # fmt: skip
    arrays = {"query": query, "key": key, "value": value, "dout": dout}
    num_heads = _checks.multi_head("multi_head_attention_backward", arrays, params, num_heads, options)
    heads = _project_in(query, key, value, params, num_heads)
    if params is None:
        grads = scaled_dot_product_attention_backward(_split(dout, num_heads), *heads, **options)
        dquery, dkey, dvalue = (_join(grad) for grad in grads[:3])
        return MultiHeadGrads(dquery, dkey, dvalue, None, grads.dbias, None)
    joined = _join(scaled_dot_product_attention(*heads, **options))
    hidden = _hidden(arrays, params, heads, options)
    real = hidden or _Hidden()
    djoined, dout_proj = _apply_backward(dout, joined, _out_proj(params), hidden, x_real=real.joined)
    grads = scaled_dot_product_attention_backward(_split(djoined, num_heads), *heads, **options)
    into = [
        _apply_backward(_join(grad), x, projection, hidden, dy_real=dy_real)
        for grad, x, projection, dy_real in zip(
            grads[:3], (query, key, value), _in_proj(params), (real.query, real.key, real.value), strict=True
        )
    ]
    dparams = _as_params(params, [dprojection for _, dprojection in into], dout_proj)
    dquery, dkey, dvalue = (dx for dx, _ in into)
    return MultiHeadGrads(dquery, dkey, dvalue, dparams, grads.dbias, None)


class _Linear(NamedTuple):
    """A projection `y = x @ weight^T + bias`, or the gradients of one."""

    weight: Array
    bias: Array | None


def _in_proj(params: Mapping[str, Array]) -> list[_Linear]:
    """Return the projections of query, key and value, in whichever way they are stored."""
    if "in_proj_weight" in params:
        packed = params["in_proj_weight"]
        weights = [packed[i : i + packed.shape[1], :] for i in range(0, packed.shape[0], packed.shape[1])]
    else:
        weights = [params[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    bias = params.get("in_proj_bias")
    if bias is None:
        return [_Linear(weight, None) for weight in weights]
    ends = itertools.accumulate(weight.shape[0] for weight in weights)
    return [_Linear(weight, bias[end - weight.shape[0] : end]) for weight, end in zip(weights, ends, strict=True)]


def _out_proj(params: Mapping[str, Array]) -> _Linear:
    return _Linear(params["out_proj.weight"], params.get("out_proj.bias"))


def _as_params(params: Mapping[str, Array], into: list[_Linear], out: _Linear) -> dict[str, Array]:
    """Return the gradients of the projections under the keys of `params`: the inverse of `_in_proj`."""
    xp = backend.namespace(out.weight)
    found = {"out_proj.weight": out.weight, "out_proj.bias": out.bias}
    if "in_proj_weight" in params:
        found["in_proj_weight"] = xp.concat([linear.weight for linear in into])
    else:
        for name, linear in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), into, strict=True):
            found[name] = linear.weight
    if "in_proj_bias" in params:
        found["in_proj_bias"] = xp.concat([linear.bias for linear in into])
    return {name: found[name] for name in params}


def _project_in(
    query: Array, key: Array, value: Array, params: Mapping[str, Array] | None, num_heads: int
) -> list[Array]:
    """Return query, key and value as they enter the heads: (..., H, L, D / H)."""
    if params is None:
        return [_split(x, num_heads) for x in (query, key, value)]
    return [_split(_apply(x, p), num_heads) for x, p in zip((query, key, value), _in_proj(params), strict=True)]


def _split(x: Array, num_heads: int) -> Array:
    """Split features into heads: (..., L, D) -> (..., H, L, D / H)."""
    xp = backend.namespace(x)
    return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], num_heads, x.shape[-1] // num_heads)), -2, -3)


def _join(heads: Array) -> Array:
    """Concatenate the heads: (..., H, L, D / H) -> (..., L, D)."""
    xp = backend.namespace(heads)
    moved = xp.moveaxis(heads, -3, -2)
    joined = backend.full(tuple(moved.shape), 0, heads)  # a copy in any case: a reshape may be a view
    joined[...] = moved
    return xp.reshape(joined, (*joined.shape[:-2], joined.shape[-2] * joined.shape[-1]))


class _Hidden(NamedTuple):
    """Where the joined heads, and the projected query, key and value, are more than a structural 0 (None: unknown)."""

    joined: Array | None = None
    query: Array | None = None
    key: Array | None = None
    value: Array | None = None


def _hidden(
    arrays: Mapping[str, Array], params: Mapping[str, Array], heads: list[Array], options: Mapping[str, Any]
) -> _Hidden | None:
    """Return which tokens are hidden, if that may matter to a projection: it does where 0 would meet NaN or inf.

    None if no option hides any; nothing known if all is finite, so that 0 may be multiplied.
    """
    nobody = any(0 in head.shape[:-1] for head in heads)  # no query, no key, or no batch entry to meet
    if not nobody and not may_hide(**options):
        return None
    if all(backend.all_finite(array) for array in (*arrays.values(), *params.values())):
        return _Hidden()
    xp = backend.namespace(heads[0])
    features = [heads[2].shape[-1], *(head.shape[-1] for head in heads)]
    seen = zip(reached(*heads, **options), features, strict=True)
    return _Hidden(*(_join(xp.broadcast_to(real, (*real.shape[:-1], size))) for real, size in seen))


def _apply(x: Array, linear: _Linear, hidden: _Hidden | None = None) -> Array:
    """Return `x @ weight^T + bias`: (..., L, E) -> (..., L, D); `hidden` is given if `x` is the joined heads."""
    xp = backend.namespace(x)
    y = backend.full((*x.shape[:-1], linear.weight.shape[0]), 0, x)
    shift = 0.0 if linear.bias is None else linear.bias
    x_real = None if hidden is None else hidden.joined

    def work(*rows: slice) -> None:
        at = (*rows, ...)
        product = _product(hidden, _rows(x, at), xp.matrix_transpose(linear.weight), a_real=_rows(x_real, at))
        y[at] = xp.reshape(product + shift, y[at].shape)

    backend.run(work, _tiles(x, linear), x)
    return y


def _apply_backward(
    dy: Array,
    x: Array,
    linear: _Linear,
    hidden: _Hidden | None,
    x_real: Array | None = None,
    dy_real: Array | None = None,
) -> tuple[Array, _Linear]:
    """Return the gradients of `sum(dy * _apply(x, linear))`: that of x, and those of the projection.

    With `y = x @ weight^T + bias` of rows x: dx = dy @ weight, dweight = dy^T @ x, dbias = dy summed over rows.
    """
    xp = backend.namespace(x)
    dx = backend.full(tuple(x.shape), 0, x)
    dweight = backend.full(tuple(linear.weight.shape), 0, x)
    dbias = None if linear.bias is None else backend.full(tuple(linear.bias.shape), 0, x)

    def work(*rows: slice) -> tuple[Array, Array]:
        at = (*rows, ...)
        part, real = _rows(dy, at), _rows(dy_real, at)  # (rows, D)
        real_t = None if real is None else xp.matrix_transpose(real)
        dx[at] = xp.reshape(_product(hidden, part, linear.weight, real), dx[at].shape)
        dw = _product(hidden, xp.matrix_transpose(part), _rows(x, at), real_t, _rows(x_real, at))
        return dw, xp.sum(part, axis=0)

    def collect(_: Tile, parts: tuple[Array, Array]) -> None:
        dweight[...] += parts[0]
        if dbias is not None:
            dbias[...] += parts[1]

    backend.run(work, _tiles(x, linear), x, collect)
    return dx, _Linear(dweight, dbias)


def _product(
    hidden: _Hidden | None, a: Array, b: Array, a_real: Array | None = None, b_real: Array | None = None
) -> Array:
    """Return `a @ b`, where something is hidden over real pairs and with the same bits whatever hidden entries hold."""
    if hidden is None:
        return a @ b
    if a_real is None and b_real is None and hidden.joined is None:
        return _masked.laid_out(a) @ _masked.laid_out(b)
    return _masked.matmul(a, b, a_real, b_real)


def _rows(x: Array | None, at: tuple[Any, ...]) -> Array | None:
    """Return a part of (..., L, E) as one matrix of rows."""
    if x is None:
        return None
    return backend.namespace(x).reshape(x[at], (math.prod(x[at].shape[:-1]), x.shape[-1]))


def _tiles(x: Array, linear: _Linear) -> Iterator[Tile]:
    """Cut the rows of `x` into tiles; one costs the features that go in, and those that come out."""
    return backend.tiles(tuple(x.shape[:-1]), sum(linear.weight.shape) * backend.itemsize(x))
