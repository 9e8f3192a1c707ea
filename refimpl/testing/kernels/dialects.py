"""Kernels that are called as another library's functions are: its names, layouts and meanings, as DIALECTS.md has them.

What a library cannot say is refused by NotImplementedError, so it counts as refused.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

Kernel = Callable[..., Any]


def autograd(kernel: Kernel) -> Kernel:
    """Return the backward that PyTorch's autograd has for a kernel: gradients by the name of their argument."""

    def backward(dout: Any, *arrays: Any, **options: Any) -> Any:
        torch = sys.modules["torch"]
        watched = [a.detach().requires_grad_() if _floating(torch, a) else a for a in arrays]
        named = {n: o.detach().requires_grad_() if _floating(torch, o) else o for n, o in options.items()}
        out = kernel(*watched, **named)
        out = out[0] if isinstance(out, tuple) else out
        inputs = [a for a in (*watched, *named.values()) if _floating(torch, a)]
        if not out.requires_grad:
            raise NotImplementedError("the result has no graph")
        grads = iter(torch.autograd.grad(out, inputs, dout, allow_unused=True))
        found = [next(grads) for _ in inputs]
        full = [torch.zeros_like(a) if g is None else g for g, a in zip(found, inputs, strict=True)]
        return full[0] if len(full) == 1 else tuple(full)

    return backward


def _floating(torch: Any, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def adapted(kernel: Kernel, op: str, like: str, options: Iterable[str] | None) -> tuple[Kernel, Iterable[str] | None]:
    """Return a kernel that is called as the op is, and the options that may be drawn for it."""
    makers = DIALECTS[like]
    if op not in makers:
        raise ValueError(f"conformance: like={like!r} has {', '.join(makers)}; got op={op!r}")
    make, known = makers[op]
    return make(kernel), known if options is None else options


def _refuse(options: dict[str, Any]) -> None:
    """Refuse options that are left over and say anything."""
    left = [name for name, value in options.items() if value is not None and value is not False]
    if left:
        raise NotImplementedError(f"no {', '.join(left)}")


def _offset(query: Any, key: Any, options: dict[str, Any]) -> Any:
    """Take the offset of the queries out of the options."""
    offset = options.pop("query_offset", 0)
    if not isinstance(offset, str):
        return offset
    if options.get("query_lengths") is not None or options.get("key_lengths") is not None:
        raise NotImplementedError("lengths")
    return key.shape[-2] - query.shape[-2]


def _own_token_inside(window: Any) -> None:
    """Refuse a window that leaves the query's own token out: there a negative side means none."""
    if any(side is not None and side < 0 for side in window or ()):
        raise NotImplementedError("a window holds the query's own token")


def _aligned_at_the_end(query: Any, key: Any, options: dict[str, Any]) -> None:
    """Refuse a causal mask or window, unless the last query stands at the last key."""
    offset = _offset(query, key, options)
    hidden = options.get("is_causal") or options.get("window") is not None
    if hidden and offset != key.shape[-2] - query.shape[-2]:
        raise NotImplementedError("masks are aligned at the ends of queries and keys")


def _with_heads(call: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse arrays without a batch and heads, which the library does not take, or whose batches broadcast."""

    def checked(query: Any, key: Any, value: Any, **options: Any) -> Any:
        if not query.ndim == key.ndim == value.ndim == 4:
            raise NotImplementedError("arrays have 4 dimensions")
        if not query.shape[0] == key.shape[0] == value.shape[0]:
            raise NotImplementedError("batches do not broadcast")
        return call(query, key, value, **options)

    return checked


def _torch_attention(kernel: Kernel) -> Kernel:
    """`torch.nn.functional.scaled_dot_product_attention`: (B, H, L, E); one `attn_mask`, added or bool."""

    @_with_heads
    def call(query: Any, key: Any, value: Any, *, is_causal: bool = False, scale: Any = None, **options: Any) -> Any:
        bias, mask = options.pop("bias", None), options.pop("mask", None)
        if _offset(query, key, options) != 0 and is_causal:
            raise NotImplementedError("a causal mask is aligned at the beginnings")
        if sum((bias is not None, mask is not None, bool(is_causal))) > 1:
            raise NotImplementedError("one of bias, mask and is_causal")
        _refuse(options)
        attn_mask = mask if bias is None else bias
        gqa = query.shape[1] != key.shape[1]
        return kernel(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)

    return call


def _flash_attention(kernel: Kernel) -> Kernel:
    """`flash_attn_func`: (B, L, H, E); causal masks and windows are aligned at the ends."""

    @_with_heads
    def call(query: Any, key: Any, value: Any, **options: Any) -> Any:
        _aligned_at_the_end(query, key, options)
        causal, window = bool(options.pop("is_causal", False)), options.pop("window", None) or (None, None)
        _own_token_inside(window)
        sides = tuple(-1 if side is None else int(side) for side in window)
        scale, softcap = options.pop("scale", None), options.pop("softcap", None)
        _refuse(options)
        out = kernel(
            *(array.swapaxes(1, 2) for array in (query, key, value)),
            softmax_scale=scale, causal=causal, window_size=sides, softcap=0.0 if softcap is None else softcap,
        )  # fmt: skip
        return out.swapaxes(1, 2)

    return call


def _jax_attention(kernel: Kernel) -> Kernel:
    """`jax.nn.dot_product_attention`: (B, L, H, E); masks are aligned at the beginnings."""

    @_with_heads
    def call(query: Any, key: Any, value: Any, **options: Any) -> Any:
        if _offset(query, key, options) != 0:
            raise NotImplementedError("masks are aligned at the beginnings")
        window = options.pop("window", None)
        if window is not None and None in window:
            raise NotImplementedError("a window has both sides")
        _own_token_inside(window)
        named = {
            "bias": options.pop("bias", None), "mask": options.pop("mask", None), "scale": options.pop("scale", None),
            "is_causal": bool(options.pop("is_causal", False)), "local_window_size": window,
        }  # fmt: skip
        _refuse(options)
        return kernel(*(array.swapaxes(1, 2) for array in (query, key, value)), **named).swapaxes(1, 2)

    return call


def _onnx_attention(kernel: Kernel) -> Kernel:
    """ONNX's `Attention`: (Q, K, V, attn_mask), (B, H, L, E); a causal mask is aligned at the beginnings."""

    @_with_heads
    def call(query: Any, key: Any, value: Any, **options: Any) -> Any:
        bias, mask = options.pop("bias", None), options.pop("mask", None)
        if _offset(query, key, options) != 0 or (bias is not None and mask is not None):
            raise NotImplementedError("one attn_mask, and no offset")
        causal, scale = int(options.pop("is_causal", False)), options.pop("scale", None)
        softcap = options.pop("softcap", None) or 0.0
        _refuse(options)
        return kernel(query, key, value, mask if bias is None else bias, is_causal=causal, scale=scale, softcap=softcap)

    return call


def _cudnn_attention(kernel: Kernel) -> Kernel:
    """CuDNN's `sdpa`: (B, H, L, E), `attn_scale`, `use_causal_mask` or `use_causal_mask_bottom_right`."""

    @_with_heads
    def call(query: Any, key: Any, value: Any, **options: Any) -> Any:
        causal, offset = bool(options.pop("is_causal", False)), _offset(query, key, options)
        ends = offset == key.shape[-2] - query.shape[-2]
        if causal and offset != 0 and not ends:
            raise NotImplementedError("a causal mask is aligned at the beginnings or at the ends")
        bias, scale = options.pop("bias", None), options.pop("scale", None)
        _refuse(options)
        named = {"use_causal_mask": causal and offset == 0, "use_causal_mask_bottom_right": causal and offset != 0}
        return kernel(query, key, value, attn_scale=scale, bias=bias, **named)

    return call


def _torch_conv(kernel: Kernel) -> Kernel:
    """`torch.nn.functional.conv{1,2,3}d`: one padding for both ends of a dimension."""

    def call(x: Any, weight: Any, bias: Any = None, **options: Any) -> Any:
        _refuse_rank(kernel, weight.ndim - 2)
        if options.pop("padding_mode", "zeros") != "zeros":
            raise NotImplementedError("padding of zeros only")
        padding = _symmetric(options.get("padding", 0))
        strided = any(s != 1 for s in _each(options.get("stride", 1)))
        if isinstance(padding, str) and (padding != "valid" and (strided or padding != "same")):
            raise NotImplementedError("padding 'same' has no stride")
        named = {name: _sequence(options[name]) for name in ("stride", "dilation", "groups") if name in options}
        return kernel(x, weight, bias, padding=padding, **named)

    return call


def _torch_pool(kernel: Kernel) -> Kernel:
    """`torch.nn.functional.{max,avg}_pool{1,2,3}d`: paddings of at most half the kernel, alike at both ends."""

    def call(x: Any, kernel_size: Any, **options: Any) -> Any:
        if not isinstance(kernel_size, int):
            _refuse_rank(kernel, len(kernel_size))
        if isinstance(options.get("padding"), str):
            raise NotImplementedError("padding is numbers")
        kernel_size, padding = _sequence(kernel_size), _symmetric(options.get("padding", 0))
        if any(2 * p > k for p, k in zip(_each(padding), _each(kernel_size), strict=False)):
            raise NotImplementedError("padding is at most half the kernel")
        named = {name: _sequence(option) for name, option in options.items() if name != "padding"}
        return kernel(x, kernel_size, padding=padding, **named)

    return call


def _refuse_rank(kernel: Kernel, rank: int) -> None:
    """Refuse other numbers of spatial dimensions than the function's name says: `conv2d` has two."""
    named = [int(letter) for letter in getattr(kernel, "__name__", "") if letter.isdigit()]
    if named and named[-1] != rank:
        raise NotImplementedError(f"{named[-1]} spatial dimensions")


def _symmetric(padding: Any) -> Any:
    """Return a padding with one number a dimension, or refuse it."""
    if isinstance(padding, str | int):
        return padding
    sides = [tuple(side) if isinstance(side, list | tuple) else (side, side) for side in padding]
    if any(low != high for low, high in sides):
        raise NotImplementedError("padding is alike at both ends")
    return tuple(low for low, _ in sides)


def _each(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Makers = dict[str, tuple[Callable[[Kernel], Kernel], tuple[str, ...]]]
_ATTENTION = "scaled_dot_product_attention"
DIALECTS: dict[str, Makers] = {
    "torch": {
        _ATTENTION: (_torch_attention, ("bias", "mask", "is_causal", "scale")),
        "conv": (_torch_conv, ("stride", "padding", "dilation", "groups", "bias")),
        "max_pool": (_torch_pool, ("stride", "padding", "dilation", "ceil_mode")),
        "avg_pool": (_torch_pool, ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")),
    },
    "flash-attn": {_ATTENTION: (_flash_attention, ("is_causal", "window", "query_offset", "scale", "softcap"))},
    "jax": {_ATTENTION: (_jax_attention, ("bias", "mask", "is_causal", "window", "scale"))},
    "onnx": {_ATTENTION: (_onnx_attention, ("bias", "mask", "is_causal", "scale", "softcap"))},
    "cudnn": {_ATTENTION: (_cudnn_attention, ("bias", "is_causal", "query_offset", "scale"))},
}
"""For each library, the ops, how they are called, and the options that can be said."""
