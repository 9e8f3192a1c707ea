"""Convolution and pooling."""

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
    per_dimension,
    planes,
    slide,
    space_of,
    written,
)
from .values import Case, Limits, Source, ints, limits_of, some

Strategy = st.SearchStrategy[Case]

_BATCHES = ((1,), (2,), (), (0,))
_PLANES = ((1, 1), (1, 2), (2, 1), (2, 3), (), (2,), (0, 1), (2, 0), (1, 2, 1))
_SLIDE = ("stride", "padding", "dilation", "ceil_mode")


def conv(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    kernels: Ints = (1, 2, 3),
    strides: Ints = STRIDES,
    dilations: Ints = DILATIONS,
    channels: Ints = (1, 2),
    batches: Shapes = _BATCHES,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `conv`; the arrays are `(x, weight, bias)`.

    Parameters
    ----------
    ranks : ints
        Numbers of spatial dimensions.
    sizes : ints, optional
        Spatial sizes; None is 1 to 7, with more than two spatial dimensions 1 to 4.
    kernels : ints
        Sizes of the kernel along a dimension.
    strides, dilations : ints
        Along a dimension, where these options are given; a kernel that does not fit with any dilation has 1.
    channels : ints
        Numbers of channels that go in, and that come out, in each group.
    batches : tuples of ints
        Shapes of what comes before the channels of `x`: `()` leaves the batch out, `(0,)` is an empty one.
    dtypes : names of dtypes
        All floating arrays of a case have one of them: float64, float32, float16, or bfloat16 (which needs ml_dtypes).
    options : names, optional
        The options that may be given, of `stride`, `padding`, `dilation`, `groups`, `padding_mode` and `bias`; all
        others keep their defaults. None allows all.
    values : str
        What the arrays hold.

        - `"normal"`: normal random numbers
        - `"integers"`: whole numbers from -4 to 4, so that sums and products are exact, and maxima full of ties
        - `"distinct"`: multiples of 1/8, no two of an array equal (in pooling: of a plane)
        - `"nonzero"`: of magnitudes from 0.5 to 2
        - `"extreme"`: zeros of both signs, subnormal, tiny and huge numbers, whose products do not overflow
        - `"nonfinite"`: normal, and some NaN, inf and -inf
        - `"positive"`: of one sign, up to 1, so that sums grow
        - `"large"`: normal times 8, so that attention's logits reach 64
        - `"cancelling"`: nearly 1 and -1 in turn, so that sums cancel
        - `"equal"`: one number in a whole array, so that rounding errors of sums have one direction
        - `"outlier"`: normal, one of 16 times 256
    layouts : names of layouts
        How each array lies in memory: `"contiguous"`, `"transposed"` (in Fortran's order), `"strided"` (with gaps),
        `"reversed"` (negative strides), `"broadcast"` (a stride of 0 along the first dimension, unless values must be
        distinct there; cannot be written) or `"readonly"`.

    Returns
    -------
    SearchStrategy of Case
        Groups go up to 3, paddings up to 3 (or the kernel less one), in all their forms.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not, or if no kernel fits into a size.
    """
    known = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
    return _conv(
        limits_of("conv", known, dtypes, options, values, layouts),
        space_of("conv", ranks, sizes, kernels, batches, strides=strides, dilations=dilations, inside=True),
        ints("conv", "channels", channels),
    )


@st.composite
def _conv(draw: st.DrawFn, limits: Limits, space: Space, channels: tuple[int, ...]) -> Case:
    source = Source(draw, limits)
    sizes, kernel, options = slide(source, space, pooling=False)
    groups, into, out = _channels(source, channels, options)
    x = source.array(*source.size(space.batches), groups * into, *sizes)
    weight = source.array(groups * out, into, *kernel)
    bias = source.array(groups * out) if source.has("bias") else None
    return source.case((x, weight, bias), options)


def conv_transpose(
    *,
    ranks: Ints = (1, 2, 3),
    sizes: Ints | None = None,
    kernels: Ints = (1, 2, 3),
    strides: Ints = STRIDES,
    dilations: Ints = DILATIONS,
    channels: Ints = (1, 2),
    batches: Shapes = _BATCHES,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `conv_transpose`; the arrays are `(x, weight, bias)`.

    Parameters
    ----------
    ranks, sizes, kernels, strides, dilations, channels, batches, dtypes, values, layouts
        As for `conv`.
    options : names, optional
        Of `stride`, `padding`, `output_padding`, `output_size`, `dilation`, `groups` and `bias`.

    Returns
    -------
    SearchStrategy of Case
        Padding may crop whole contributions away, and `output_padding` extend the output beyond all of them.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    known = ("stride", "padding", "output_padding", "output_size", "dilation", "groups", "bias")
    return _conv_transpose(
        limits_of("conv_transpose", known, dtypes, options, values, layouts),
        space_of("conv_transpose", ranks, sizes, kernels, batches, strides=strides, dilations=dilations),
        ints("conv_transpose", "channels", channels),
    )


@st.composite
def _conv_transpose(draw: st.DrawFn, limits: Limits, space: Space, channels: tuple[int, ...]) -> Case:
    source = Source(draw, limits)
    sizes, kernel = blocks(source, space)
    once = (1,) * len(sizes)
    options: dict[str, Any] = {}
    strides = option(source, options, "stride", [space.strides] * len(sizes), once)
    dilations = option(source, options, "dilation", [space.dilations] * len(sizes), once)
    rooms = [range(max(s, d)) for s, d in zip(strides, dilations, strict=True)]
    extra = (0,) * len(sizes)
    further = source.pick(["", "", *sorted(limits.options & {"output_padding", "output_size"})])
    if further == "output_padding":
        extra = per_dimension(source, options, "output_padding", rooms)
    if further == "output_size":
        extra = tuple(source.pick(range(s)) for s in strides)
    full = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(sizes, strides, dilations, kernel, extra, strict=True)
    ]
    pads: Pads = [(0, 0)] * len(sizes)
    if source.has("padding"):
        options["padding"], pads = crop(source, full, () if further else WORDS)
    if further == "output_size":
        options["output_size"] = source.sequence([n - sum(pair) for n, pair in zip(full, pads, strict=True)])
    groups, into, out = _channels(source, channels, options)
    x = source.array(*source.size(space.batches), groups * into, *sizes)
    weight = source.array(groups * into, out, *kernel)
    bias = source.array(groups * out) if source.has("bias") else None
    return source.case((x, weight, bias), options)


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


def _channels(source: Source, channels: tuple[int, ...], options: dict[str, Any]) -> tuple[int, int, int]:
    """Draw the groups, and how many channels go into each and come out."""
    if source.has("groups"):
        options["groups"] = source.pick([1, 2, 3])
    return options.get("groups", 1), source.pick(channels), source.pick(channels)


def _outputs(limits: Limits, outputs: Ints | None) -> tuple[int, ...] | None:
    return None if outputs is None else ints(limits.op, "outputs", outputs)
