"""The linear maps around the heads of multi-head attention; untiled in `textbook/attention.py`.

H heads; L length; E features that come in, D those that a projection puts out, for all heads together.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..backend import Array, Backend, Tile
from . import nan_safe
from .visibility import AttentionCall, visibility_of_tokens


class Linear(NamedTuple):
    """A projection `y = x @ weight^T + bias`, or the gradients of one."""

    weight: Array
    bias: Array | None


def in_proj(params: Mapping[str, Array]) -> list[Linear]:
    """Return the projections of query, key and value, in whichever way they are stored."""
    if "in_proj_weight" in params:
        packed = params["in_proj_weight"]
        weights = [packed[i : i + packed.shape[1], :] for i in range(0, packed.shape[0], packed.shape[1])]
    else:
        weights = [params[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    bias = params.get("in_proj_bias")
    if bias is None:
        return [Linear(weight, None) for weight in weights]
    ends = itertools.accumulate(weight.shape[0] for weight in weights)
    return [Linear(weight, bias[end - weight.shape[0] : end]) for weight, end in zip(weights, ends, strict=True)]


def out_proj(params: Mapping[str, Array]) -> Linear:
    """Return the projection of the joined heads."""
    return Linear(params["out_proj.weight"], params.get("out_proj.bias"))


def as_params(
    be: Backend, params: Mapping[str, Array], into: list[Linear], out: Linear, appended: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the gradients of the parameters under the keys of `params`: the inverse of `in_proj`."""
    xp = be.xp
    found = {"out_proj.weight": out.weight, "out_proj.bias": out.bias, **appended}
    if "in_proj_weight" in params:
        found["in_proj_weight"] = xp.concat([linear.weight for linear in into])
    else:
        for name, linear in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), into, strict=True):
            found[name] = linear.weight
    if "in_proj_bias" in params:
        found["in_proj_bias"] = xp.concat([linear.bias for linear in into])
    return {name: found[name] for name in params}


def append(be: Backend, heads: Array, token: Array | None, zero: bool) -> Array:
    """Append a token (1, 1, D) of all heads, then one of zeros: (..., H, L, D / H) -> (..., H, L + 0 to 2, D / H)."""
    xp = be.xp
    shape = (*heads.shape[:-2], 1, heads.shape[-1])
    more = [] if token is None else [xp.broadcast_to(split(be, token, heads.shape[-3])[0, ...], shape)]
    if zero:
        more.append(be.full(shape, 0, heads.dtype))
    return xp.concat([heads, *more], axis=-2) if more else heads


def append_backward(be: Backend, dheads: Array, length: int, token: Array) -> Array:
    """Return the gradient of a token that came after the first `length` of every batch entry."""
    xp = be.xp
    return xp.reshape(be.sums(dheads[..., length, :], tuple(range(dheads.ndim - 3)), False), token.shape)


def split(be: Backend, x: Array, num_heads: int) -> Array:
    """Split features into heads: (..., L, D) -> (..., H, L, D / H)."""
    xp = be.xp
    return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], num_heads, x.shape[-1] // num_heads)), -2, -3)


def join(be: Backend, heads: Array) -> Array:
    """Concatenate the heads: (..., H, L, D / H) -> (..., L, D)."""
    xp = be.xp
    moved = xp.moveaxis(heads, -3, -2)
    joined = be.full(tuple(moved.shape), 0, heads.dtype)  # always a copy, because a reshape may be a view
    joined[...] = moved
    return xp.reshape(joined, (*joined.shape[:-2], joined.shape[-2] * joined.shape[-1]))


class Hidden(NamedTuple):
    """Which entries of the joined heads, and of query, key and value, take part in attention; None: not known."""

    joined: Array | None = None
    query: Array | None = None
    key: Array | None = None
    value: Array | None = None


def find_hidden(call: AttentionCall, heads: list[Array], operands: Iterable[Array]) -> Hidden | None:
    """Return which tokens are hidden, where a projection would multiply their 0 by a NaN or inf.

    None if no option hides any; all fields None if all operands are finite, so that a 0 stays 0.
    """
    nobody = any(0 in head.shape[:-1] for head in heads)  # no query, no key, or an empty batch
    if not nobody and not call.has_hidden_pairs:
        return None
    if all(call.be.all_finite(array) for array in operands):
        return Hidden()
    xp = call.be.xp
    joined, query, *others = visibility_of_tokens(call, *heads)
    own = [real[..., : heads[1].shape[-2] - call.num_appended_keys, :] for real in others]
    features = [heads[2].shape[-1], *(head.shape[-1] for head in heads)]
    seen = zip((joined, query, *own), features, strict=True)
    return Hidden(*(join(call.be, xp.broadcast_to(real, (*real.shape[:-1], size))) for real, size in seen))


def apply(be: Backend, x: Array, linear: Linear, hidden: Hidden | None = None) -> Array:
    """Return `x @ weight^T + bias`: (..., L, E) -> (..., L, D); `hidden` is given if `x` is the joined heads."""
    xp = be.xp
    y = be.full((*x.shape[:-1], linear.weight.shape[0]), 0, x.dtype)
    shift = 0.0 if linear.bias is None else linear.bias
    x_real = None if hidden is None else hidden.joined

    def work(*rows: slice) -> None:
        at = (*rows, ...)
        product = _product(
            be, hidden, _rows(be, x, at), xp.matrix_transpose(linear.weight), a_real=_rows(be, x_real, at)
        )
        y[at] = xp.reshape(product + shift, y[at].shape)

    be.run(work, _tiles(be, x, linear))
    return y


def apply_backward(
    be: Backend,
    dy: Array,
    x: Array,
    linear: Linear,
    hidden: Hidden | None,
    x_real: Array | None = None,
    dy_real: Array | None = None,
) -> tuple[Array, Linear]:
    """Return the gradients of `sum(dy * apply(x, linear))`: that of x, and those of the projection.

    With `y = x @ weight^T + bias` of rows x: dx = dy @ weight, dweight = dy^T @ x, dbias = dy summed over rows.
    """
    xp = be.xp
    dx = be.full(tuple(x.shape), 0, x.dtype)
    dweight = be.full(tuple(linear.weight.shape), 0, x.dtype)
    dbias = None if linear.bias is None else be.full(tuple(linear.bias.shape), 0, x.dtype)

    def work(*rows: slice) -> tuple[Array, Array]:
        at = (*rows, ...)
        part, real = _rows(be, dy, at), _rows(be, dy_real, at)  # (rows, D)
        real_t = None if real is None else xp.matrix_transpose(real)
        dx[at] = xp.reshape(_product(be, hidden, part, linear.weight, real), dx[at].shape)
        dw = _product(be, hidden, xp.matrix_transpose(part), _rows(be, x, at), real_t, _rows(be, x_real, at))
        return dw, be.sums(part, 0, False)

    def collect(_: Tile, parts: tuple[Array, Array]) -> None:
        dweight[...] += parts[0]
        if dbias is not None:
            dbias[...] += parts[1]

    be.run(work, _tiles(be, x, linear), collect)
    return dx, Linear(dweight, dbias)


def _product(
    be: Backend, hidden: Hidden | None, a: Array, b: Array, a_real: Array | None = None, b_real: Array | None = None
) -> Array:
    """Return `a @ b`, bit for bit the same whatever hidden entries hold."""
    if hidden is None:
        return a @ b
    if a_real is None and b_real is None and hidden.joined is None:
        return nan_safe.same_layout_as_finite(be, a) @ nan_safe.same_layout_as_finite(be, b)
    return nan_safe.matmul(be, a, b, a_real, b_real)


def _rows(be: Backend, x: Array | None, at: tuple[Any, ...]) -> Array | None:
    """Return a part of (..., L, E) as one matrix of rows."""
    if x is None:
        return None
    return be.xp.reshape(x[at], (math.prod(x[at].shape[:-1]), x.shape[-1]))


def _tiles(be: Backend, x: Array, linear: Linear) -> Iterator[Tile]:
    """Cut the rows of `x` into tiles; a row needs memory for its input and output features."""
    return be.tiles(tuple(x.shape[:-1]), sum(linear.weight.shape) * be.itemsize(x))
