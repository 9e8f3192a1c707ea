"""Convolution and its adjoint."""

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
    slide,
    space_of,
)
from .values import Case, Limits, Source, ints, limits_of

Strategy = st.SearchStrategy[Case]

_BATCHES = ((1,), (2,), (), (0,))


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


def _channels(source: Source, channels: tuple[int, ...], options: dict[str, Any]) -> tuple[int, int, int]:
    """Draw the groups, and how many channels go into each and come out."""
    if source.has("groups"):
        options["groups"] = source.pick([1, 2, 3])
    return options.get("groups", 1), source.pick(channels), source.pick(channels)
