"""Every argument check, and the wording of every message: `{function}: {argument} must {rule}; got {what came}`.

A check either raises or returns the argument in the one form that the ops compute with: tuples of ints, windows.
TypeError is for the kind, dtype or backend of an argument, ValueError for its size or value.
"""

import math
import numbers
import reprlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from . import backend
from ._geometry import Padding, Windows, conv_window, pool_window, transposed_window
from .backend import Array

_LARGEST = 1 << 40  # of a size, stride, dilation or padding: its products with another fit into 64 bits
_INTEGER_KINDS = ("signed integer", "unsigned integer")


def _fail(kind: type[Exception], function: str, argument: str, rule: str, got: object) -> NoReturn:
    raise kind(f"{function}: {argument} must {rule}; got {got}")


def _shapes(**arrays: Array | None) -> str:
    return ", ".join(f"{name}.shape={tuple(a.shape)}" for name, a in arrays.items() if a is not None)


def integer(function: str, argument: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """Check an int (or NumPy integer), and its bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        _fail(TypeError, function, argument, "be an int", _show(value))
    result = int(value)
    if minimum is not None and result < minimum:
        _fail(ValueError, function, argument, f"be at least {minimum}", _show(value))
    if maximum is not None and result > maximum:
        _fail(ValueError, function, argument, f"be at most {maximum}", _show(value))
    return result


def number(function: str, argument: str, value: object) -> float:
    """Check a finite int or float (of NumPy, too)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        _fail(TypeError, function, argument, "be a number", _show(value))
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        _fail(ValueError, function, argument, "be finite", _show(value))
    return result


def flag(function: str, argument: str, value: object) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        _fail(TypeError, function, argument, "be True or False", _show(value))
    return value


def sizes(function: str, argument: str, value: object, count: int, minimum: int) -> tuple[int, ...]:
    """Check an int, or a tuple or list of `count` of them, each at least `minimum`."""
    if not isinstance(value, tuple | list | numbers.Integral) or isinstance(value, bool):
        _fail(TypeError, function, argument, "be an int or a tuple of ints", _show(value))
    if not isinstance(value, tuple | list):
        return (integer(function, argument, value, minimum, _LARGEST),) * count
    if len(value) != count:
        rule = f"be an int or have one for each of the {count} spatial dimensions"
        _fail(ValueError, function, argument, rule, _show(value))
    return tuple(integer(function, f"{argument}[{i}]", v, minimum, _LARGEST) for i, v in enumerate(value))


def padding_of(function: str, value: object, count: int) -> Padding:
    """Check padding in any of its forms; returns a string, or a `(low, high)` pair for each dimension."""
    if isinstance(value, str):
        if value not in ("valid", "same", "same_lower"):
            _fail(ValueError, function, "padding", "be 'valid', 'same' or 'same_lower' if a string", _show(value))
        return value
    if not isinstance(value, tuple | list | numbers.Integral) or isinstance(value, bool):
        rule = "be an int, a tuple of ints or of (low, high) pairs, or a string"
        _fail(TypeError, function, "padding", rule, _show(value))
    if not isinstance(value, tuple | list):
        return ((integer(function, "padding", value, 0, _LARGEST),) * 2,) * count
    if len(value) != count:
        rule = f"be an int, or have one entry, an int or a (low, high) pair, for each of the {count} spatial dimensions"
        _fail(ValueError, function, "padding", rule, _show(value))
    pairs = []
    for i, entry in enumerate(value):
        pair = entry if isinstance(entry, tuple | list) else (entry, entry)
        if len(pair) != 2:
            _fail(ValueError, function, f"padding[{i}]", "be an int or a (low, high) pair", _show(entry))
        low, high = (integer(function, f"padding[{i}]", side, 0, _LARGEST) for side in pair)
        pairs.append((low, high))
    return tuple(pairs)


def floating(function: str, **arrays: Array | None) -> ModuleType:
    """Check floating arrays of one backend, device and dtype; returns their namespace."""
    xp = backend.common_namespace(function, arrays)
    present = {name: array for name, array in arrays.items() if array is not None}
    first = next(iter(present))
    for name, array in present.items():
        if array.dtype not in (xp.float32, xp.float64):
            _fail(TypeError, function, name, "be of dtype float32 or float64", array.dtype)
        if array.dtype != present[first].dtype:
            rule = f"be of the same dtype as {first} ({present[first].dtype})"
            _fail(TypeError, function, name, rule, array.dtype)
    return xp


def _show(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"{type(value).__name__} beyond printing"


def _result(function: str, arrays: Mapping[str, Array], shape: tuple[int, ...]) -> None:
    """Check that a result of this shape can be addressed, and that `dout`, in a backward, has it."""
    if math.prod(max(1, size) for size in shape) > sys.maxsize // 8:
        _fail(ValueError, function, "the result", f"have at most {sys.maxsize // 8} elements", f"shape {shape}")
    if "dout" in arrays:
        _gradient(function, arrays["dout"], shape)


def _gradient(function: str, dout: Array, shape: Sequence[int], name: str = "dout") -> None:
    if tuple(dout.shape) != tuple(shape):
        _fail(ValueError, function, name, f"have the shape of the result, {tuple(shape)}", _shapes(**{name: dout}))


def _not_empty(function: str, argument: str, array: Array, first: int) -> None:
    """Check that no dimension from `first` on has size 0."""
    if 0 in array.shape[first:]:
        rule = f"have sizes of at least 1 from dimension {first} on"
        _fail(ValueError, function, argument, rule, _shapes(**{argument: array}))


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
    x, weight, groups = _conv_arrays(function, arrays, bias, groups)
    spatial = weight.ndim - 2
    axis = x.ndim - spatial - 1
    if not isinstance(padding_mode, str):
        _fail(TypeError, function, "padding_mode", "be a string", _show(padding_mode))
    if padding_mode != "zeros":
        _fail(ValueError, function, "padding_mode", "be 'zeros'", _show(padding_mode))
    if x.shape[axis] != weight.shape[1] * groups:
        rule = f"equal weight.shape[1] * groups ({weight.shape[1]} * {groups} = {weight.shape[1] * groups})"
        got = f"{_shapes(x=x, weight=weight)}, groups={groups}"
        _fail(ValueError, function, f"x.shape[{axis}]", rule, got)
    if weight.shape[0] % groups:
        rule = f"be a multiple of groups ({groups})"
        _fail(ValueError, function, "weight.shape[0]", rule, _shapes(weight=weight))
    _bias(function, bias, weight.shape[0])
    strides = sizes(function, "stride", stride, spatial, 1)
    dilations = sizes(function, "dilation", dilation, spatial, 1)
    pads = padding_of(function, padding, spatial)
    windows = tuple(
        conv_window(x.shape[d - spatial], weight.shape[2 + d], strides[d], dilations[d], _pad(pads, d))
        for d in range(spatial)
    )
    _fits(function, x, "weight", windows)
    _result(function, arrays, (*x.shape[:axis], weight.shape[0], *(w.out for w in windows)))
    return windows, groups


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
        _fail(ValueError, function, f"x.shape[{axis}]", rule, _shapes(x=x, weight=weight))
    if weight.shape[0] % groups:
        rule = f"be a multiple of groups ({groups})"
        _fail(ValueError, function, "weight.shape[0]", rule, _shapes(weight=weight))
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
            _fail(ValueError, function, "padding", rule, f"{window.size} (padding={_show(padding)}, {_shapes(x=x)})")
    _result(function, arrays, (*x.shape[:axis], weight.shape[1] * groups, *(w.size for w in windows)))
    return windows, groups


def _conv_arrays(
    function: str, arrays: Mapping[str, Array], bias: Array | None, groups: object
) -> tuple[Array, Array, int]:
    """Check what both convolutions ask of their arrays and of `groups`; returns `x`, `weight` and `groups`."""
    _required(function, arrays)
    floating(function, **arrays, bias=bias)
    x, weight = arrays["x"], arrays["weight"]
    if weight.ndim < 3:
        _fail(ValueError, function, "weight", "have at least 3 dimensions", _shapes(weight=weight))
    if x.ndim not in (weight.ndim, weight.ndim - 1):
        rule = f"have {weight.ndim} dimensions, or {weight.ndim - 1} without the batch, as weight has {weight.ndim}"
        _fail(ValueError, function, "x", rule, _shapes(x=x, weight=weight))
    _not_empty(function, "weight", weight, 0)
    _not_empty(function, "x", x, x.ndim - weight.ndim + 1)
    return x, weight, integer(function, "groups", groups, 1, _LARGEST)


def _bias(function: str, bias: Array | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        _fail(ValueError, function, "bias", f"have shape ({channels},), one for each channel", _shapes(bias=bias))


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
        _fail(ValueError, function, "output_padding", "be 0 when output_size is given", _show(output_padding))
    if isinstance(pads, str) and pads != "valid" and (any(extras) or output_size is not None):
        name, value = ("output_padding", output_padding) if any(extras) else ("output_size", output_size)
        _fail(ValueError, function, name, f"be left out with padding={pads!r}, which sets the size", _show(value))
    for d, extra in enumerate(extras):
        limit = max(strides[d], dilations[d])
        if extra >= limit:
            rule = f"be below max(stride, dilation) ({limit}) in spatial dimension {d}"
            _fail(ValueError, function, "output_padding", rule, _show(output_padding))
    return extras


def _sized(function: str, windows: Windows, output_size: object) -> Windows:
    """Let `output_size` set the size of the output."""
    wanted = sizes(function, "output_size", output_size, len(windows), 1)
    for d, (window, size) in enumerate(zip(windows, wanted, strict=True)):
        if not window.size <= size < window.size + window.stride:
            rule = f"be in [{window.size}, {window.size + window.stride}) in spatial dimension {d}"
            _fail(ValueError, function, "output_size", rule, _show(output_size))
    return tuple(window._replace(size=size) for window, size in zip(windows, wanted, strict=True))


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
            _fail(ValueError, function, f"x.shape[{axis}]", rule, got)


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
    _required(function, arrays)
    xp = backend.common_namespace(function, arrays)
    x = arrays["x"]
    if integers and not xp.isdtype(x.dtype, ("real floating", *_INTEGER_KINDS)):
        _fail(TypeError, function, "x", "be of dtype float32 or float64, or of an integer dtype", x.dtype)
    if not (integers and xp.isdtype(x.dtype, _INTEGER_KINDS)):
        floating(function, **arrays)
    spatial = _pooled(function, x, kernel_size)
    _not_empty(function, "x", x, x.ndim - spatial)
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
            _fail(
                ValueError,
                function,
                "padding",
                rule,
                f"padding={_show(padding)}, kernel_size={kernels}, {_shapes(x=x)}",
            )
    _result(function, arrays, (*x.shape[: x.ndim - spatial], *(w.out for w in windows)))
    return windows


def _pooled(function: str, x: Array, kernel_size: object) -> int:
    """Return how many of the last dimensions of `x` the kernel says are spatial."""
    if x.ndim == 0:
        _fail(ValueError, function, "x", "have at least 1 dimension", _shapes(x=x))
    if isinstance(kernel_size, tuple | list):
        if not 1 <= len(kernel_size) <= x.ndim:
            rule = f"have 1 to {x.ndim} entries, no more than x has dimensions"
            _fail(ValueError, function, "kernel_size", rule, f"{_show(kernel_size)}, {_shapes(x=x)}")
        return len(kernel_size)
    integer(function, "kernel_size", kernel_size, 1)
    if x.ndim < 3:
        _fail(ValueError, function, "x", "have at least 3 dimensions when kernel_size is an int", _shapes(x=x))
    return int(x.ndim) - 2


def pool_indices(function: str, indices: Array | None, dout: Array) -> None:
    """Check the indices that a backward is given: those of the forward, so int64 and of the shape of the result."""
    if indices is None:
        return
    xp = backend.common_namespace(function, {"dout": dout, "indices": indices})
    if indices.dtype != xp.int64:
        _fail(TypeError, function, "indices", "be of dtype int64, as the forward returns them", indices.dtype)
    _gradient(function, indices, dout.shape, "indices")


def divisor(function: str, divisor_override: object) -> None:
    """Check an int other than 0, or None."""
    if (
        divisor_override is not None
        and integer(function, "divisor_override", divisor_override, -_LARGEST, _LARGEST) == 0
    ):
        _fail(ValueError, function, "divisor_override", "be an int other than 0", "0")


def attention_arrays(function: str, arrays: Mapping[str, Array], bias: Array | None) -> tuple[int, ...]:
    """Check `query`, `key`, `value` and perhaps `dout`; returns the shape of the result, `(..., Hq, Lq, Ev)`."""
    _required(function, arrays)
    floating(function, **arrays, bias=bias)
    query, key, value = _rows_of_features(function, arrays)
    shapes = _shapes(query=query, key=key, value=value)
    if query.shape[-1] == 0:
        _fail(ValueError, function, "query", "have at least 1 feature", shapes)
    if key.shape[-1] != query.shape[-1]:
        _fail(ValueError, function, "key.shape[-1]", f"equal query.shape[-1] ({query.shape[-1]})", shapes)
    if value.shape[-2] != key.shape[-2]:
        _fail(ValueError, function, "value.shape[-2]", f"equal key.shape[-2] ({key.shape[-2]})", shapes)
    heads, kv_heads = _heads(query), _heads(key)
    if _heads(value) != kv_heads:
        _fail(ValueError, function, "value", f"have as many heads as key ({kv_heads})", shapes)
    if heads < 1 or kv_heads < 1:
        _fail(ValueError, function, "key" if kv_heads < 1 else "query", "have at least 1 head", shapes)
    if heads % kv_heads:
        _fail(ValueError, function, "the heads of query", f"be a multiple of those of key ({kv_heads})", shapes)
    batch = _broadcast([tuple(array.shape[:-3]) for array in (query, key, value)])
    if batch is None:
        _fail(ValueError, function, "query, key and value", "have leading dimensions that broadcast", shapes)
    rows = (query.shape[-2], value.shape[-1])
    shape = (*batch, heads, *rows) if max(query.ndim, key.ndim, value.ndim) > 2 else rows
    _result(function, arrays, shape)
    return shape


def _rows_of_features(function: str, arrays: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Check that query, key and value are rows of features, whatever comes before."""
    for name in ("query", "key", "value"):
        if arrays[name].ndim < 2:
            _fail(ValueError, function, name, "have at least 2 dimensions", _shapes(**{name: arrays[name]}))
    return arrays["query"], arrays["key"], arrays["value"]


def _heads(array: Array) -> int:
    return int(array.shape[-3]) if array.ndim > 2 else 1


def attention_options(
    function: str,
    like: Array,
    scores: tuple[int, ...],
    *,
    bias: Array | None,
    mask: Array | None,
    is_causal: object,
    window: object,
    query_offset: object,
    query_lengths: Array | None,
    key_lengths: Array | None,
    scale: object,
) -> None:
    """Check the options that shape the scores, `(..., Hq, Lq, Lk)`; `like` is an array of the call."""
    batch = scores[:-3]
    arrays = {"query": like, "mask": mask, "query_lengths": query_lengths, "key_lengths": key_lengths}
    xp = backend.common_namespace(function, arrays)
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and _broadcast([tuple(array.shape), scores]) != scores:
            _fail(ValueError, function, name, f"broadcast to the scores, {scores}", _shapes(**{name: array}))
    if mask is not None and mask.dtype != xp.bool:
        _fail(TypeError, function, "mask", "be of dtype bool", mask.dtype)
    flag(function, "is_causal", is_causal)
    _window(function, window)
    if scale is not None:
        number(function, "scale", scale)
    if backend.is_array(query_offset):
        _batch_integers(function, like, "query_offset", query_offset, batch)
    elif isinstance(query_offset, bool) or not isinstance(query_offset, numbers.Integral):
        _fail(TypeError, function, "query_offset", "be an int or an integer array", _show(query_offset))
    for name, lengths, size in (("query_lengths", query_lengths, scores[-2]), ("key_lengths", key_lengths, scores[-1])):
        if lengths is not None:
            _batch_integers(function, like, name, lengths, batch)
            if math.prod(lengths.shape):
                low, high = backend.bounds(lengths)
                if low < 0 or high > size:
                    _fail(ValueError, function, name, f"be in [0, {size}]", f"values from {low} to {high}")


def _batch_integers(function: str, like: Array, name: str, array: Array, batch: tuple[int, ...]) -> None:
    """Check an integer array that has an entry for each batch entry."""
    xp = backend.common_namespace(function, {"query": like, name: array})
    if not xp.isdtype(array.dtype, _INTEGER_KINDS):
        _fail(TypeError, function, name, "be of an integer dtype", array.dtype)
    if _broadcast([tuple(array.shape), batch]) != batch:
        _fail(ValueError, function, name, f"broadcast to the batch dimensions, {batch}", _shapes(**{name: array}))


def _window(function: str, window: object) -> None:
    if window is None:
        return
    if not isinstance(window, tuple | list):
        _fail(TypeError, function, "window", "be None or a pair (left, right)", _show(window))
    if len(window) != 2:
        _fail(ValueError, function, "window", "be None or a pair (left, right)", _show(window))
    for i, side in enumerate(window):
        if side is not None:
            integer(function, f"window[{i}]", side, 0)


def _broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that the shapes broadcast to, None if they do not."""
    result = []
    for d in range(-max(map(len, shapes)), 0):
        found = {shape[d] for shape in shapes if len(shape) >= -d} - {1}
        if len(found) > 1:
            return None
        result.append(found.pop() if found else 1)
    return tuple(result)


_PACKED = ("in_proj_weight",)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_REST = ("in_proj_bias", "out_proj.weight", "out_proj.bias")


def multi_head(
    function: str,
    arrays: Mapping[str, Array],
    params: Mapping[str, Array] | None,
    num_heads: object,
    options: Mapping[str, Any],
) -> int:
    """Check every argument of multi-head attention, and perhaps `dout`; returns the number of heads."""
    _required(function, arrays)
    heads = integer(function, "num_heads", num_heads, 1, _LARGEST)
    named = {} if params is None else _parameters(function, params)
    floating(function, **arrays, **named, bias=options["bias"])
    query, key, value = _rows_of_features(function, arrays)
    shapes = _shapes(query=query, key=key, value=value)
    if value.shape[-2] != key.shape[-2]:
        _fail(ValueError, function, "value.shape[-2]", f"equal key.shape[-2] ({key.shape[-2]})", shapes)
    batch = _broadcast([tuple(array.shape[:-2]) for array in (query, key, value)])
    if batch is None:
        _fail(ValueError, function, "query, key and value", "have leading dimensions that broadcast", shapes)
    out_features = _features(function, query, key, value, params, heads)
    _result(function, arrays, (*batch, query.shape[-2], out_features))
    attention_options(function, query, (*batch, heads, query.shape[-2], key.shape[-2]), **options)
    return heads


def _features(
    function: str, query: Array, key: Array, value: Array, params: Mapping[str, Array] | None, heads: int
) -> int:
    """Check the features, before and after projection; returns those of the result."""
    inner = {"query": int(query.shape[-1]), "key": int(key.shape[-1]), "value": int(value.shape[-1])}
    if params is not None:
        inner = _parameter_shapes(function, inner, params)
    elif inner["key"] != inner["query"]:
        got = _shapes(query=query, key=key, value=value)
        _fail(ValueError, function, "key.shape[-1]", f"equal query.shape[-1] ({inner['query']})", got)
    what = "features" if params is None else "projected features"
    for name, size in inner.items():
        if size % heads:
            _fail(ValueError, function, "num_heads", f"divide the {what} of {name} ({size})", heads)
    if inner["query"] == 0:
        _fail(ValueError, function, "query", f"have at least 1 of the {what} in each head", "0")
    return inner["value"] if params is None else int(params["out_proj.weight"].shape[0])


def _parameters(function: str, params: object) -> dict[str, Array]:
    """Check which keys there are; returns them as the names that messages use."""
    if not isinstance(params, Mapping):
        _fail(TypeError, function, "params", "be None or a mapping of names to arrays", _show(params))
    known = _PACKED + _SEPARATE + _REST
    for name in params:
        if name not in known:
            _fail(ValueError, function, "params", f"have keys among {', '.join(known)}", _show(name))
    weights = _PACKED if "in_proj_weight" in params else _SEPARATE
    for name in (*weights, "out_proj.weight"):
        if name not in params:
            _fail(ValueError, function, "params", f"have the key {name!r}", f"the keys {list(params)}")
    for name in _SEPARATE:
        if weights is _PACKED and name in params:
            _fail(ValueError, function, "params", "have either in_proj_weight or separate weights", f"{name!r} as well")
    for name, array in params.items():
        if array is None:
            _fail(TypeError, function, f"params[{name!r}]", "be an array", "None")
    return {f"params[{name!r}]": array for name, array in params.items()}


def _parameter_shapes(function: str, features: dict[str, int], params: Mapping[str, Array]) -> dict[str, int]:
    """Check the shapes of the projections; returns the number of projected features of query, key and value."""

    def expect(name: str, shape: tuple[int, ...]) -> None:
        array = params.get(name)
        if array is not None and tuple(array.shape) != shape:
            rule = f"have shape {shape} for the features of query, key and value, {tuple(features.values())}"
            _fail(ValueError, function, f"params[{name!r}]", rule, f"shape {tuple(array.shape)}")

    def rows(name: str) -> int:
        if params[name].ndim != 2:
            got = f"shape {tuple(params[name].shape)}"
            _fail(ValueError, function, f"params[{name!r}]", "have 2 dimensions", got)
        return int(params[name].shape[0])

    if "in_proj_weight" in params:
        size = features["query"]
        for name in ("key", "value"):
            if features[name] != size:
                rule = f"equal query.shape[-1] ({size}) when params has in_proj_weight"
                _fail(ValueError, function, f"{name}.shape[-1]", rule, features[name])
        expect("in_proj_weight", (3 * size, size))
        inner = dict.fromkeys(features, size)
    else:
        inner = {name: rows(weight) for name, weight in zip(features, _SEPARATE, strict=True)}
        for (name, size), weight in zip(features.items(), _SEPARATE, strict=True):
            expect(weight, (inner["query"] if name == "key" else inner[name], size))
    expect("in_proj_bias", (sum(inner.values()),))
    expect("out_proj.weight", (rows("out_proj.weight"), inner["value"]))
    expect("out_proj.bias", (rows("out_proj.weight"),))
    return inner


def _required(function: str, arrays: Mapping[str, Array | None]) -> None:
    for name, array in arrays.items():
        if array is None:
            _fail(TypeError, function, name, "be an array", "None")
