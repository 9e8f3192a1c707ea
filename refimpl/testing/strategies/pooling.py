"""Pooling and unpooling."""

import math
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from .geometry import (
    DILATIONS,
    STRIDES,
    WORDS,
    Ints,
    Pads,
    Shapes,
    Space,
    blocks,
    crop,
    option,
    planes,
    slide,
    space_of,
    written,
)
from .values import Case, Limits, Source, ints, limits_of, some

Strategy = st.SearchStrategy[Case]

_PLANES = ((1, 1), (1, 2), (2, 1), (2, 3), (), (2,), (0, 1), (2, 0), (1, 2, 1))
_SLIDE = ("stride", "padding", "dilation", "ceil_mode")


def max_pool(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    kernels: Ints = (1, 2, 3),
    strides: Ints = STRIDES,
    dilations: Ints = DILATIONS,
    batches: Shapes = _PLANES,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    values: str = "distinct",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `max_pool`; the arrays are `(x, kernel_size)`.

    Parameters
    ----------
    ranks, sizes, kernels, strides, dilations, layouts
        As for `conv`.
    batches : tuples of ints
        Shapes of what comes before the spatial dimensions; where it has two entries, `kernel_size` may be an int.
    dtypes : names of dtypes
        As for `conv`, and of integers: these have no gradient.
    options : names, optional
        Of `stride`, `padding`, `dilation` and `ceil_mode`.
    values : str
        As for `conv`. A maximum has a derivative where there are no ties, so these are `"distinct"` unless asked for.

    Returns
    -------
    SearchStrategy of Case
        Every window holds an element, but may hold one alone.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not, or if no kernel fits into a size.
    """
    checked = limits_of("max_pool", _SLIDE, dtypes, options, values, layouts, integers=True)
    space = space_of("max_pool", ranks, sizes, kernels, batches, strides=strides, dilations=dilations, inside=True)
    return _pool(checked, space)


def avg_pool(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    kernels: Ints = (1, 2, 3),
    strides: Ints = STRIDES,
    dilations: Ints = DILATIONS,
    batches: Shapes = _PLANES,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `avg_pool`; the arrays are `(x, kernel_size)`.

    Parameters
    ----------
    ranks, sizes, kernels, strides, dilations, dtypes, layouts
        As for `conv`.
    batches
        As for `max_pool`.
    options : names, optional
        Of `stride`, `padding`, `dilation`, `ceil_mode`, `count_include_pad` and `divisor_override`.
    values : str
        As for `conv`; with `"integers"` there is always a `divisor_override`, if allowed, that divides exactly.

    Returns
    -------
    SearchStrategy of Case
        Every window holds an element, but may hold one alone.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not, or if no kernel fits into a size.
    """
    known = (*_SLIDE, "count_include_pad", "divisor_override")
    checked = limits_of("avg_pool", known, dtypes, options, values, layouts)
    space = space_of("avg_pool", ranks, sizes, kernels, batches, strides=strides, dilations=dilations, inside=True)
    return _pool(checked, space)


def lp_pool(
    *,
    norm_types: Iterable[float] = (2, 1, 3, 0.5, 2.5),
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    kernels: Ints = (1, 2, 3),
    strides: Ints = STRIDES,
    dilations: Ints = DILATIONS,
    batches: Shapes = _PLANES,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    values: str = "nonzero",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `lp_pool`; the arrays are `(x, norm_type, kernel_size)`.

    Parameters
    ----------
    norm_types : numbers
        The powers: finite and above 0.
    ranks, sizes, kernels, strides, dilations, dtypes, layouts
        As for `conv`.
    batches
        As for `max_pool`.
    options : names, optional
        Of `stride`, `padding`, `dilation` and `ceil_mode`.
    values : str
        As for `conv`. A norm of one element, or of a power of 1 and less, has no derivative at 0, so these are
        `"nonzero"` unless asked for.

    Returns
    -------
    SearchStrategy of Case
        Every window holds an element, but may hold one alone.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not, or if no kernel fits into a size.
    """
    checked = limits_of("lp_pool", _SLIDE, dtypes, options, values, layouts)
    return _pool(
        checked,
        space_of("lp_pool", ranks, sizes, kernels, batches, strides=strides, dilations=dilations, inside=True),
        some("lp_pool", "norm_types", norm_types),
    )


@st.composite
def _pool(draw: st.DrawFn, limits: Limits, space: Space, norm_types: tuple[float, ...] = ()) -> Case:
    source = Source(draw, limits)
    sizes, kernel, options = slide(source, space, pooling=True)
    if source.has("count_include_pad"):
        options["count_include_pad"] = source.flag()
    exact = limits.values == "integers" and "divisor_override" in limits.options
    if exact or source.has("divisor_override"):
        options["divisor_override"] = source.pick([1, 2, -4] if exact else [1, 3, -2])
    x, short = planes(source, space, sizes)
    norm = [source.pick(norm_types)] if norm_types else []
    return source.case((x, *norm, written(source, kernel, short)), options)


def adaptive_avg_pool(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    outputs: Ints | None = None,
    batches: Shapes = _PLANES,
    dtypes: Iterable[str] = ("float64",),
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `adaptive_avg_pool`; the arrays are `(x, output_size)`.

    Parameters
    ----------
    ranks, sizes, dtypes, values, layouts
        As for `conv`.
    outputs : ints, optional
        Sizes of the output; None is 1 to 9, with more than two spatial dimensions 1 to 5.
    batches : tuples of ints
        Shapes of what comes before the spatial dimensions; where it has two entries, `output_size` may be an int.

    Returns
    -------
    SearchStrategy of Case
        `output_size` also holds None, and sizes above those of `x`.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    checked = limits_of("adaptive_avg_pool", (), dtypes, None, values, layouts)
    return _adaptive(checked, space_of("adaptive_avg_pool", ranks, sizes, (1,), batches), _outputs(checked, outputs))


def adaptive_max_pool(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    outputs: Ints | None = None,
    batches: Shapes = _PLANES,
    dtypes: Iterable[str] = ("float64",),
    values: str = "distinct",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `adaptive_max_pool`; the arrays are `(x, output_size)`.

    Parameters
    ----------
    ranks, sizes, outputs, batches, layouts
        As for `adaptive_avg_pool`.
    dtypes, values
        As for `max_pool`.

    Returns
    -------
    SearchStrategy of Case
        `output_size` also holds None, and sizes above those of `x`.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    checked = limits_of("adaptive_max_pool", (), dtypes, None, values, layouts, integers=True)
    return _adaptive(checked, space_of("adaptive_max_pool", ranks, sizes, (1,), batches), _outputs(checked, outputs))


@st.composite
def _adaptive(draw: st.DrawFn, limits: Limits, space: Space, outputs: tuple[int, ...] | None) -> Case:
    source = Source(draw, limits)
    sizes, _ = blocks(source, space)
    choices = range(1, 10 if len(sizes) < 3 else 6) if outputs is None else outputs
    x, short = planes(source, space, sizes)
    if short and source.flag():
        return source.case((x, source.pick(choices)), {})
    entries = [None if source.rarely() else source.pick(choices) for _ in sizes]
    return source.case((x, source.sequence(entries)), {})


def max_unpool(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    kernels: Ints = (1, 2, 3),
    batches: Shapes = _PLANES,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `max_unpool`; the arrays are `(x, indices, kernel_size)`.

    Parameters
    ----------
    ranks, sizes, kernels, values, layouts
        As for `conv`.
    batches, dtypes
        As for `max_pool`.
    options : names, optional
        Of `stride`, `padding` and `output_size`.

    Returns
    -------
    SearchStrategy of Case
        `indices` are int64 or int32, in any order, and in half of the cases may repeat themselves.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    known = ("stride", "padding", "output_size")
    checked = limits_of("max_unpool", known, dtypes, options, values, layouts, integers=True)
    return _max_unpool(checked, space_of("max_unpool", ranks, sizes, kernels, batches))


@st.composite
def _max_unpool(draw: st.DrawFn, limits: Limits, space: Space) -> Case:
    source = Source(draw, limits)
    sizes, kernel = blocks(source, space)
    options: dict[str, Any] = {}
    strides = option(source, options, "stride", [space.strides] * len(sizes), kernel, none=True)
    full = [(n - 1) * s + k for n, s, k in zip(sizes, strides, kernel, strict=True)]
    pads: Pads = [(0, 0)] * len(sizes)
    if source.has("padding"):
        options["padding"], pads = crop(source, full, WORDS)
    out = [n - sum(pair) for n, pair in zip(full, pads, strict=True)]
    if options.get("padding") in ("same", "same_lower"):
        out = [n * s for n, s in zip(sizes, strides, strict=True)]
    elif source.has("output_size"):
        out = [source.pick([m for m in range(n - s + 1, n + s) if m > 0]) for n, s in zip(out, strides, strict=True)]
        options["output_size"] = source.sequence(out)
    x, short = planes(source, space, sizes)
    indices = source.indices(x.shape, len(sizes), math.prod(out))
    return source.case((x, indices, written(source, kernel, short)), options)


def _outputs(limits: Limits, outputs: Ints | None) -> tuple[int, ...] | None:
    return None if outputs is None else ints(limits.op, "outputs", outputs)
