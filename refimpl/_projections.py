"""The projections around the heads of multi-head attention, and which tokens are hidden from them.

H heads; L length; E features that come in, D those that a projection puts out, for all heads together.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from . import _masked, backend
from ._pairs import Call, reached
from .backend import Array, Tile


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
    params: Mapping[str, Array], into: list[Linear], out: Linear, appended: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the gradients of the parameters under the keys of `params`: the inverse of `in_proj`."""
    xp = backend.namespace(out.weight)
    found = {"out_proj.weight": out.weight, "out_proj.bias": out.bias, **appended}
    if "in_proj_weight" in params:
        found["in_proj_weight"] = xp.concat([linear.weight for linear in into])
    else:
        for name, linear in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), into, strict=True):
            found[name] = linear.weight
    if "in_proj_bias" in params:
        found["in_proj_bias"] = xp.concat([linear.bias for linear in into])
    return {name: found[name] for name in params}


def append(heads: Array, token: Array | None, zero: bool) -> Array:
    """Append a token (1, 1, D) of all heads, then one of zeros: (..., H, L, D / H) -> (..., H, L + 0 to 2, D / H)."""
    xp = backend.namespace(heads)
    shape = (*heads.shape[:-2], 1, heads.shape[-1])
    more = [] if token is None else [xp.broadcast_to(split(token, heads.shape[-3])[0, ...], shape)]
    if zero:
        more.append(backend.full(shape, 0, heads))
    return xp.concat([heads, *more], axis=-2) if more else heads


def append_backward(dheads: Array, length: int, token: Array) -> Array:
    """Return the gradient of a token that came after the first `length` of every batch entry."""
    xp = backend.namespace(dheads)
    return xp.reshape(xp.sum(dheads[..., length, :], axis=tuple(range(dheads.ndim - 3))), token.shape)


def split(x: Array, num_heads: int) -> Array:
    """Split features into heads: (..., L, D) -> (..., H, L, D / H)."""
    xp = backend.namespace(x)
    return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], num_heads, x.shape[-1] // num_heads)), -2, -3)


def join(heads: Array) -> Array:
    """Concatenate the heads: (..., H, L, D / H) -> (..., L, D)."""
    xp = backend.namespace(heads)
    moved = xp.moveaxis(heads, -3, -2)
    joined = backend.full(tuple(moved.shape), 0, heads)  # a copy in any case: a reshape may be a view
    joined[...] = moved
    return xp.reshape(joined, (*joined.shape[:-2], joined.shape[-2] * joined.shape[-1]))


class Hidden(NamedTuple):
    """Where the joined heads, and the projected query, key and value, are more than a structural 0 (None: unknown)."""

    joined: Array | None = None
    query: Array | None = None
    key: Array | None = None
    value: Array | None = None


def find_hidden(call: Call, heads: list[Array], operands: Iterable[Array]) -> Hidden | None:
    """Return which tokens are hidden, if that may matter to a projection: it does where 0 would meet NaN or inf.

    None if no option hides any; nothing known if all operands are finite, so that 0 may be multiplied.
    """
    nobody = any(0 in head.shape[:-1] for head in heads)  # no query, no key, or no batch entry to meet
    if not nobody and not call.hides:
        return None
    if all(backend.all_finite(array) for array in operands):
        return Hidden()
    xp = backend.namespace(heads[0])
    joined, query, *others = reached(call, *heads)
    own = [real[..., : heads[1].shape[-2] - call.appended, :] for real in others]
    features = [heads[2].shape[-1], *(head.shape[-1] for head in heads)]
    seen = zip((joined, query, *own), features, strict=True)
    return Hidden(*(join(xp.broadcast_to(real, (*real.shape[:-1], size))) for real, size in seen))


def apply(x: Array, linear: Linear, hidden: Hidden | None = None) -> Array:
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


def apply_backward(
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
    return dx, Linear(dweight, dbias)


def _product(
    hidden: Hidden | None, a: Array, b: Array, a_real: Array | None = None, b_real: Array | None = None
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


def _tiles(x: Array, linear: Linear) -> Iterator[Tile]:
    """Cut the rows of `x` into tiles; one costs the features that go in, and those that come out."""
    return backend.tiles(tuple(x.shape[:-1]), sum(linear.weight.shape) * backend.itemsize(x), x)
