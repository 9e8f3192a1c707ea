"""How far rounding may move the results of convolutions and poolings.

Each function takes a model, the reference result and the arguments of its op, in float64, and returns the measure of
the error of each element (see `Model`). Sums of products are all alike: the op itself, on the sizes of its arguments,
adds up the sizes of its terms, and on ones it counts them.
"""

from collections.abc import Callable
from typing import Any

import refimpl

from ... import backend
from ...backend import Array
from ..trees import together
from .models import Model


def _products(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return the analysis of an op whose results are sums of products of its arguments."""

    def analysis(model: Model, result: Any, *arrays: Any, **options: Any) -> Any:
        given = {"arrays": arrays, "options": options}
        sizes = _floating(lambda a: model.size(model.clean(a)), given)
        ones = _floating(lambda a: model.be.full(tuple(a.shape), 1, a.dtype), given)
        totals, counts = (f(*each["arrays"], **each["options"]) for each in (sizes, ones))
        return together(model.of_sum, result, totals, counts)

    return analysis


def _sums_of_dout(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return the analysis of an op that adds up elements of its first argument, at places that the others name."""

    def analysis(model: Model, result: Array, dout: Array, *arrays: Any, **options: Any) -> Array:
        sizes = f(model.size(model.clean(dout)), *arrays, **options)
        counts = f(model.be.full(tuple(dout.shape), 1, dout.dtype), *arrays, **options)
        return model.of_sum(result, sizes, counts)

    return analysis


def _chosen(model: Model, result: Any, *arrays: Any, **options: Any) -> Any:
    """Return 0: an op that only chooses elements makes no error."""
    del arrays, options
    return backend.mapped(lambda r: model.be.full(tuple(r.shape), 0, model.be.xp.float64), result)


def _avg_pool(model: Model, result: Array, x: Array, *arrays: Any, **options: Any) -> Array:
    """Count the terms of each mean, a sum that is divided, by the same pooling of ones."""
    share, count = _shares(model, x, *arrays, **options)
    sizes = refimpl.avg_pool(model.size(model.clean(x)), *arrays, **options | {"divisor_override": 1})
    return _of_mean(model, result, sizes, count, share)


def _avg_pool_backward(model: Model, result: Array, dout: Array, x: Array, *arrays: Any, **options: Any) -> Array:
    """Each window hands on its share of dout."""
    share, _ = _shares(model, x, *arrays, **options)
    summed = options | {"divisor_override": 1}
    sizes = refimpl.avg_pool_backward(model.size(model.clean(dout) * share), x, *arrays, **summed)
    counts = refimpl.avg_pool_backward(model.be.full(tuple(dout.shape), 1, dout.dtype), x, *arrays, **summed)
    return model.of_sum(result, 4 * sizes, counts)  # a term is divided by a number that is itself rounded


def _shares(model: Model, x: Array, *arrays: Any, **options: Any) -> tuple[Array, Array]:
    """Return what the sum of each window is multiplied by, and of how many elements it is."""
    ones = model.be.full(tuple(x.shape), 1, x.dtype)
    count = refimpl.avg_pool(ones, *arrays, **options | {"divisor_override": 1})
    return refimpl.avg_pool(ones, *arrays, **options) / model.be.xp.where(count == 0, 1.0, count), count


def _adaptive_avg_pool(model: Model, result: Array, x: Array, output_size: Any) -> Array:
    """As for `avg_pool`; windows differ in size."""
    count = _adaptive_counts(model, x, result)
    sizes = count * refimpl.adaptive_avg_pool(model.size(model.clean(x)), output_size)
    return _of_mean(model, result, sizes, count, 1.0 / count)


def _adaptive_avg_pool_backward(model: Model, result: Array, dout: Array, x: Array, output_size: Any) -> Array:
    """As for `avg_pool_backward`; the op divides by the counts once itself."""
    count = _adaptive_counts(model, x, dout)
    f = refimpl.adaptive_avg_pool_backward
    sizes = f(count * model.size(model.clean(dout) / count), x, output_size)
    counts = f(model.be.xp.broadcast_to(count, dout.shape), x, output_size)
    return model.of_sum(result, 4 * sizes, counts)


def _adaptive_counts(model: Model, x: Array, out: Array) -> Array:
    """Return how many elements each window holds, of shape (*O)."""
    be, xp = model.be, model.be.xp
    rank = len(out.shape)
    count = be.full((1,), 1, xp.float64)
    for axis in range(rank):
        size, windows = int(x.shape[axis]), int(out.shape[axis])
        if size == windows:  # of batch and channels, and of windows of one element: no sum along it
            continue
        o = be.arange(0, windows)
        held = -((-(o + 1) * size) // windows) - (o * size) // windows
        count = count * xp.reshape(xp.astype(held, xp.float64), (windows, *(1,) * (rank - axis - 1)))
    return count


def _of_mean(model: Model, mean: Array, sizes: Array, count: Array, share: Array) -> Array:
    total = mean / model.be.xp.where(share == 0, 1.0, share)
    return model.size(share) * model.of_sum(total, sizes, count) + model.relative(2.0, mean)


def _lp_pool(model: Model, result: Array, x: Array, norm_type: float, *arrays: Any, **options: Any) -> Array:
    """With S the sum of |x|**p, `y = S**(1/p)`: the relative error of S shrinks p times; each power adds its own."""
    return model.size(result) * _lp_relative(model, x, norm_type, arrays, options)


def _lp_relative(model: Model, x: Array, norm_type: float, arrays: Any, options: dict[str, Any]) -> Array:
    """Return the measure of the relative error of each norm."""
    xp, p, exp_ulps = model.be.xp, float(norm_type), model.arithmetic.exp_ulps
    sizes = xp.abs(model.clean(x))
    count = refimpl.lp_pool(model.be.full(tuple(x.shape), 1, x.dtype), 1, *arrays, **options)
    power = 2 * p if model.name == "expected" else p  # the sum of squares of terms, or of terms, relative to S
    norm, larger = (refimpl.lp_pool(sizes, q, *arrays, **options) for q in (p, power))
    parts = (larger / xp.where(norm == 0, 1.0, norm)) ** power
    one = model.be.full(tuple(count.shape), 1, x.dtype)
    of_terms = model.relative(exp_ulps, one)
    return model.size(one / p) * (model.of_sum(one, parts, count) + of_terms) + of_terms


def _lp_pool_backward(
    model: Model, result: Array, dout: Array, x: Array, norm_type: float, *arrays: Any, **options: Any
) -> Array:
    """Terms are `dout sign(x) |x|**(p-1) y**(1-p)`: the error of y enters p - 1 times, and that of two powers."""
    xp, p = model.be.xp, float(norm_type)
    dout, x, squared = model.clean(dout), model.clean(x), model.name == "expected"
    of_term = model.size(p - 1 + 0 * dout) * _lp_relative(model, x, norm_type, arrays, options)
    of_term = of_term + model.relative(2 * model.arithmetic.exp_ulps + 3, model.be.full(tuple(dout.shape), 1, x.dtype))
    y = refimpl.lp_pool(x, norm_type, *arrays, **options)
    sized = model.size(x)  # |x|, or x**2 whose norm is another: so the terms are squared, too
    other = refimpl.lp_pool(sized, norm_type, *arrays, **options)
    weight = (other / xp.where(y == 0, 1.0, y * y)) ** (p - 1) if squared else 1.0

    def added(weights: Array) -> Array:
        """Return the sizes of the terms of each element, added up with a weight for each window."""
        return refimpl.lp_pool_backward(model.size(dout) * weight * weights, sized, norm_type, *arrays, **options)

    count = refimpl.lp_pool_backward(0 * dout + 1, 0 * x + 1, 1, *arrays, **options)
    return model.of_sum(result, added(0 * dout + 1), count) + added(of_term)


def _floating(change: Callable[[Array], Array], tree: Any) -> Any:
    def apply(value: Any) -> Any:
        be = backend.find(value)
        return change(value) if be is not None and be.is_floating(value) else value

    return backend.mapped(apply, tree)


ANALYSES: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        f: _products(f)
        for f in (refimpl.conv, refimpl.conv_backward, refimpl.conv_transpose, refimpl.conv_transpose_backward)
    },
    **dict.fromkeys(
        (refimpl.max_pool, refimpl.adaptive_max_pool, refimpl.max_unpool, refimpl.max_unpool_backward), _chosen
    ),
    refimpl.max_pool_backward: _sums_of_dout(refimpl.max_pool_backward),
    refimpl.adaptive_max_pool_backward: _sums_of_dout(refimpl.adaptive_max_pool_backward),
    refimpl.avg_pool: _avg_pool,
    refimpl.avg_pool_backward: _avg_pool_backward,
    refimpl.adaptive_avg_pool: _adaptive_avg_pool,
    refimpl.adaptive_avg_pool_backward: _adaptive_avg_pool_backward,
    refimpl.lp_pool: _lp_pool,
    refimpl.lp_pool_backward: _lp_pool_backward,
}
"""The analysis of each op."""
