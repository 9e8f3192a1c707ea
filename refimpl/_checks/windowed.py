"""Checks of convolution and pooling."""

import math
from collections.abc import Mapping

from .. import backend
from .._engine.geometry import (
    PADDING_MODES,
    AdaptiveWindow,
    AnyWindows,
    Padding,
    Window,
    Windows,
    conv_window,
    pool_window,
    transposed_window,
)
from ..backend import Array, shown
from .common import (
    LARGEST,
    MOST,
    fail,
    flag,
    floating,
    gradient,
    integer,
    not_empty,
    number,
    required,
    result,
    shapes_of,
    sizes,
)


def padding_of(function: str, value: object, count: int) -> Padding:
    """Check padding in any of its forms; returns a string, or a `(low, high)` pair for each dimension."""
    if isinstance(value, str):
        if value not in ("valid", "same", "same_lower"):
            fail(ValueError, function, "padding", "be 'valid', 'same' or 'same_lower' if a string", shown(value))
        return value
    if not isinstance(value, tuple | list) and not backend.is_number(value):
        rule = "be an int, a tuple of ints or of (low, high) pairs, or a string"
        fail(TypeError, function, "padding", rule, shown(value))
    if not isinstance(value, tuple | list):
        return ((integer(function, "padding", value, 0, LARGEST),) * 2,) * count
    if len(value) != count:
        rule = f"be an int, or have one entry, an int or a (low, high) pair, for each of the {count} spatial dimensions"
        fail(ValueError, function, "padding", rule, shown(value))
    pairs = []
    for i, entry in enumerate(value):
        pair = entry if isinstance(entry, tuple | list) else (entry, entry)
        if len(pair) != 2:
            fail(ValueError, function, f"padding[{i}]", "be an int or a (low, high) pair", shown(entry))
        low, high = (integer(function, f"padding[{i}]", side, 0, LARGEST) for side in pair)
        pairs.append((low, high))
    return tuple(pairs)


def _pad(pads: Padding, d: int) -> tuple[int, int] | str:
    return pads if isinstance(pads, str) else pads[d]


def _fits(function: str, x: Array, kernel: str, windows: Windows) -> None:
    """Check that a window fits into `x` and its padding, along each dimension."""
    for axis, window in enumerate(windows, start=x.ndim - len(windows)):
        if window.out < 1:
            rule = (
                f"be at least {window.extent} with its padding, the extent of {kernel} with dilation {window.dilation}"
            )
            got = f"{window.size}, padding {window.low} and {window.high}"
            fail(ValueError, function, f"x.shape[{axis}]", rule, got)


def conv(
    function: str,
    arrays: Mapping[str, Array],
    bias: Array | None,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
    padding_mode: object,
) -> tuple[Windows, int]:
    """Check `x`, `weight`, perhaps `dout`, and the options of `conv`; returns the windows over `x`, and `groups`."""
    x, weight, groups = _conv_arrays(function, arrays, bias, groups, spatial_may_be_empty=True)
    spatial = weight.ndim - 2
    axis = x.ndim - spatial - 1
    if x.shape[axis] != weight.shape[1] * groups:
        rule = f"equal weight.shape[1] * groups ({weight.shape[1]} * {groups} = {weight.shape[1] * groups})"
        got = f"{shapes_of(x=x, weight=weight)}, groups={groups}"
        fail(ValueError, function, f"x.shape[{axis}]", rule, got)
    if weight.shape[0] % groups:
        rule = f"be a multiple of groups ({groups})"
        fail(ValueError, function, "weight.shape[0]", rule, shapes_of(weight=weight))
    _bias(function, bias, weight.shape[0])
    strides = sizes(function, "stride", stride, spatial, 1)
    dilations = sizes(function, "dilation", dilation, spatial, 1)
    pads = padding_of(function, padding, spatial)
    windows = tuple(
        conv_window(x.shape[d - spatial], weight.shape[2 + d], strides[d], dilations[d], _pad(pads, d))
        for d in range(spatial)
    )
    _fits(function, x, "weight", windows)
    _padding_mode(function, padding_mode, x, windows)
    result(function, arrays, (*x.shape[:axis], weight.shape[0], *(w.out for w in windows)))
    return windows, groups


def _padding_mode(function: str, mode: object, x: Array, windows: tuple[Window, ...]) -> None:
    """Check the name of the mode, that `x` is large enough to fill the padding, and that indices fit int64."""
    if not isinstance(mode, str):
        fail(TypeError, function, "padding_mode", "be a string", shown(mode))
    if mode not in PADDING_MODES:
        fail(ValueError, function, "padding_mode", f"be one of {', '.join(map(repr, PADDING_MODES))}", shown(mode))
    for d, window in enumerate(windows):
        limit = {"reflect": window.size - 1, "circular": window.size}.get(mode, LARGEST)
        if max(window.low, window.high) > limit:
            rule = f"be at most {limit} in spatial dimension {d} of size {window.size} with padding_mode={mode!r}"
            fail(ValueError, function, "padding", rule, f"{window.low} and {window.high}")
    filled = (*x.shape[: x.ndim - len(windows)], *(w.low + w.size + w.high for w in windows))
    if mode != "zeros" and math.prod(filled) > MOST:
        rule = f"fill x up to at most {MOST} elements with padding_mode={mode!r}"
        fail(ValueError, function, "padding", rule, f"shape {filled}")


def conv_transpose(
    function: str,
    arrays: Mapping[str, Array],
    bias: Array | None,
    stride: object,
    padding: object,
    output_padding: object,
    output_size: object,
    dilation: object,
    groups: object,
) -> tuple[Windows, int]:
    """Check `x`, `weight`, perhaps `dout`, and the options of `conv_transpose`; returns windows and `groups`."""
    x, weight, groups = _conv_arrays(function, arrays, bias, groups)
    spatial = weight.ndim - 2
    axis = x.ndim - spatial - 1
    if x.shape[axis] != weight.shape[0]:
        rule = f"equal weight.shape[0] ({weight.shape[0]})"
        fail(ValueError, function, f"x.shape[{axis}]", rule, shapes_of(x=x, weight=weight))
    if weight.shape[0] % groups:
        rule = f"be a multiple of groups ({groups})"
        fail(ValueError, function, "weight.shape[0]", rule, shapes_of(weight=weight))
    _bias(function, bias, weight.shape[1] * groups)
    strides = sizes(function, "stride", stride, spatial, 1)
    dilations = sizes(function, "dilation", dilation, spatial, 1)
    pads = padding_of(function, padding, spatial)
    extras = _output_padding(function, output_padding, output_size, pads, strides, dilations)
    windows = tuple(
        transposed_window(x.shape[d - spatial], weight.shape[2 + d], strides[d], dilations[d], _pad(pads, d), extras[d])
        for d in range(spatial)
    )
    if output_size is not None:
        windows = _sized(function, windows, output_size)
    for d, window in enumerate(windows):
        if window.size < 1:
            rule = f"leave an output size of at least 1 in spatial dimension {d}"
            fail(ValueError, function, "padding", rule, f"{window.size} (padding={shown(padding)}, {shapes_of(x=x)})")
    result(function, arrays, (*x.shape[:axis], weight.shape[1] * groups, *(w.size for w in windows)))
    return windows, groups


def _conv_arrays(
    function: str, arrays: Mapping[str, Array], bias: Array | None, groups: object, spatial_may_be_empty: bool = False
) -> tuple[Array, Array, int]:
    """Check the arrays and `groups` of `conv` or `conv_transpose`; returns `x`, `weight` and `groups`."""
    required(function, arrays)
    floating(function, **arrays, bias=bias)
    x, weight = arrays["x"], arrays["weight"]
    if weight.ndim < 3:
        fail(ValueError, function, "weight", "have at least 3 dimensions", shapes_of(weight=weight))
    if x.ndim not in (weight.ndim, weight.ndim - 1):
        rule = f"have {weight.ndim} dimensions, or {weight.ndim - 1} without the batch, as weight has {weight.ndim}"
        fail(ValueError, function, "x", rule, shapes_of(x=x, weight=weight))
    not_empty(function, "weight", weight, 0)
    first = x.ndim - weight.ndim + 1
    not_empty(function, "x", x, first, first + 1 if spatial_may_be_empty else None)
    return x, weight, integer(function, "groups", groups, 1, LARGEST)


def _bias(function: str, bias: Array | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        fail(ValueError, function, "bias", f"have shape ({channels},), one for each channel", shapes_of(bias=bias))


def _output_padding(
    function: str,
    output_padding: object,
    output_size: object,
    pads: Padding,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    extras = sizes(function, "output_padding", output_padding, len(strides), 0)
    if any(extras) and output_size is not None:
        fail(ValueError, function, "output_padding", "be 0 when output_size is given", shown(output_padding))
    if isinstance(pads, str) and pads != "valid" and output_size is not None:
        rule = f"be left out with padding={pads!r}, which sets the size"
        fail(ValueError, function, "output_size", rule, shown(output_size))
    for d, extra in enumerate(extras):
        limit = max(strides[d], dilations[d])
        if extra >= limit:
            rule = f"be below max(stride, dilation) ({limit}) in spatial dimension {d}"
            fail(ValueError, function, "output_padding", rule, shown(output_padding))
    return extras


def _sized(function: str, windows: Windows, output_size: object) -> Windows:
    """Let `output_size` set the size of the output."""
    wanted = sizes(function, "output_size", output_size, len(windows), 1)
    for d, (window, size) in enumerate(zip(windows, wanted, strict=True)):
        if not window.size <= size < window.size + window.stride:
            rule = f"be in [{window.size}, {window.size + window.stride}) in spatial dimension {d}"
            fail(ValueError, function, "output_size", rule, shown(output_size))
    return tuple(window._replace(size=size) for window, size in zip(windows, wanted, strict=True))


def pool(
    function: str,
    arrays: Mapping[str, Array],
    kernel_size: object,
    stride: object,
    padding: object,
    dilation: object,
    ceil_mode: object,
    integers: bool = False,
) -> Windows:
    """Check `x`, perhaps `dout`, and the options of pooling; returns the windows over the last dimensions of `x`."""
    x = _pooled_array(function, arrays, integers)
    spatial = _spatial(function, x, "kernel_size", kernel_size)
    kernels = sizes(function, "kernel_size", kernel_size, spatial, 1)
    strides = kernels if stride is None else sizes(function, "stride", stride, spatial, 1)
    dilations = sizes(function, "dilation", dilation, spatial, 1)
    pads = padding_of(function, padding, spatial)
    ceil = flag(function, "ceil_mode", ceil_mode)
    windows = tuple(
        pool_window(x.shape[d - spatial], kernels[d], strides[d], dilations[d], _pad(pads, d), ceil)
        for d in range(spatial)
    )
    _fits(function, x, "kernel_size", windows)
    for d, window in enumerate(windows):
        empty = window.first_empty()
        if empty is not None:
            rule = f"leave an element of x in every window; window {empty} of spatial dimension {d} has none"
            got = f"padding={shown(padding)}, kernel_size={kernels}, {shapes_of(x=x)}"
            fail(ValueError, function, "padding", rule, got)
    result(function, arrays, (*x.shape[: x.ndim - spatial], *(w.out for w in windows)))
    return windows


def adaptive(function: str, arrays: Mapping[str, Array], output_size: object, integers: bool = False) -> AnyWindows:
    """Check `x`, perhaps `dout`, and the output size of adaptive pooling; returns the windows over `x`."""
    x = _pooled_array(function, arrays, integers)
    spatial = _spatial(function, x, "output_size", output_size)
    kept = x.shape[x.ndim - spatial :]
    if isinstance(output_size, tuple | list):
        output_size = [size if out is None else out for out, size in zip(output_size, kept, strict=True)]
    outs = sizes(function, "output_size", output_size, spatial, 1)
    result(function, arrays, (*x.shape[: x.ndim - spatial], *outs))
    return tuple(AdaptiveWindow(int(size), out) for size, out in zip(kept, outs, strict=True))


def max_unpool(
    function: str,
    arrays: Mapping[str, Array],
    indices: Array | None,
    kernel_size: object,
    stride: object,
    padding: object,
    output_size: object,
    integers: bool = False,
) -> tuple[int, ...]:
    """Check `x`, `indices`, perhaps `dout`, and the options of unpooling; returns the spatial sizes of the output."""
    required(function, {"indices": indices})
    x = _pooled_array(function, arrays, integers)
    spatial = _spatial(function, x, "kernel_size", kernel_size)
    kernels = sizes(function, "kernel_size", kernel_size, spatial, 1)
    strides = kernels if stride is None else sizes(function, "stride", stride, spatial, 1)
    pads = padding_of(function, padding, spatial)
    defaults = [
        transposed_window(x.shape[d - spatial], kernels[d], strides[d], 1, _pad(pads, d), 0).size
        for d in range(spatial)
    ]
    if isinstance(pads, str) and pads != "valid" and output_size is not None:
        rule = f"be left out with padding={pads!r}, which sets the size"
        fail(ValueError, function, "output_size", rule, shown(output_size))
    outs = defaults if output_size is None else sizes(function, "output_size", output_size, spatial, 1)
    for d, (out, default) in enumerate(zip(outs, defaults, strict=True)):
        if out < 1:
            rule = f"leave an output size of at least 1 in spatial dimension {d}"
            fail(ValueError, function, "padding", rule, f"{out} (padding={shown(padding)}, {shapes_of(x=x)})")
        if abs(out - default) >= strides[d]:
            rule = f"be less than one stride ({strides[d]}) away from {default} in spatial dimension {d}"
            fail(ValueError, function, "output_size", rule, shown(output_size))
    result(function, arrays, (*x.shape[: x.ndim - spatial], *outs))
    _unpool_indices(function, x, indices, math.prod(outs))
    return tuple(outs)


def _unpool_indices(function: str, x: Array, indices: Array, plane: int) -> None:
    """Check where `max_unpool` is to put each element of `x`: in a plane of so many. Waits for the device."""
    be = backend.common(function, {"x": x, "indices": indices})
    if indices.dtype not in (be.xp.int32, be.xp.int64):
        fail(TypeError, function, "indices", "be of dtype int32 or int64", indices.dtype)
    if tuple(indices.shape) != tuple(x.shape):
        fail(ValueError, function, "indices", "have the shape of x", shapes_of(x=x, indices=indices))
    if math.prod(indices.shape):
        low, high = be.bounds(indices)
        if low < 0 or high >= plane:
            fail(ValueError, function, "indices", f"be in [0, {plane})", f"values from {low} to {high}")


def _pooled_array(function: str, arrays: Mapping[str, Array], integers: bool) -> Array:
    """Check `x`, floating or perhaps of an integer dtype, and perhaps `dout`; returns `x`."""
    required(function, arrays)
    be = backend.common(function, arrays)
    x = arrays["x"]
    if integers and not (be.is_integer(x) or be.is_floating(x)):
        fail(TypeError, function, "x", "be of a floating dtype or of an integer dtype", x.dtype)
    if not be.is_integer(x) or not integers:
        floating(function, **arrays)
    if x.ndim == 0:
        fail(ValueError, function, "x", "have at least 1 dimension", shapes_of(x=x))
    return x


def _spatial(function: str, x: Array, argument: str, value: object) -> int:
    """Return the number of spatial dimensions of `x`: the length of an option that has an entry for each."""
    if isinstance(value, tuple | list):
        if not 1 <= len(value) <= x.ndim:
            rule = f"have 1 to {x.ndim} entries, no more than x has dimensions"
            fail(ValueError, function, argument, rule, f"{shown(value)}, {shapes_of(x=x)}")
        spatial = len(value)
    else:
        integer(function, argument, value, 1)
        if x.ndim < 3:
            fail(ValueError, function, "x", f"have at least 3 dimensions when {argument} is an int", shapes_of(x=x))
        spatial = x.ndim - 2
    not_empty(function, "x", x, x.ndim - spatial)
    return spatial


def pool_indices(function: str, indices: Array | None, dout: Array) -> None:
    """Check the indices that a backward is given: those of the forward, so int64 and of the shape of the result."""
    if indices is None:
        return
    be = backend.common(function, {"dout": dout, "indices": indices})
    if indices.dtype != be.xp.int64:
        fail(TypeError, function, "indices", "be of dtype int64, as the forward returns them", indices.dtype)
    gradient(function, indices, dout.shape, "indices")


def norm_type(function: str, value: object) -> float:
    """Check the exponent of a norm: a finite number above 0."""
    p = number(function, "norm_type", value)
    if p <= 0:
        fail(ValueError, function, "norm_type", "be above 0", shown(value))
    return p


def divisor(function: str, divisor_override: object) -> None:
    """Check an int other than 0, or None."""
    if divisor_override is None:
        return
    if integer(function, "divisor_override", divisor_override, -LARGEST, LARGEST) == 0:
        fail(ValueError, function, "divisor_override", "be an int other than 0", "0")
