"""How an ONNX node is written in refimpl: one function an operator.

Its positional arguments are the node's inputs, its keyword arguments the attributes, both with ONNX's defaults; it
returns all the outputs that the operator has. NumPy does the layout here, refimpl's public calls the mathematics.
"""

import math

import numpy as np
import onnx

import refimpl


def run(node, inputs):
    """Return the outputs that `node` names, given the arrays of the inputs that it names."""
    arrays = iter(inputs)
    arguments = [next(arrays) if name else None for name in node.input]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    outputs = OPERATORS[node.op_type](*arguments, **attributes)
    return [output for output, name in zip(outputs, node.output, strict=False) if name]


def padding(pads, auto_pad):
    """Return the `padding` that stands for `pads`, which lists all low sides and then all high sides, or `auto_pad`."""
    if auto_pad != "NOTSET":
        return {"VALID": "valid", "SAME_UPPER": "same", "SAME_LOWER": "same_lower"}[auto_pad]
    return 0 if pads is None else tuple(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True))


def conv(x, w, b=None, *, auto_pad="NOTSET", dilations=1, group=1, kernel_shape=None, pads=None, strides=1):
    """Conv: the arrays as they are; `kernel_shape` only repeats what the shape of `w` says."""
    assert kernel_shape is None or tuple(kernel_shape) == w.shape[2:]
    return (refimpl.conv(x, w, b, stride=strides, padding=padding(pads, auto_pad), dilation=dilations, groups=group),)


def conv_transpose(
    x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None,
    output_padding=None, output_shape=None, pads=None, strides=None,
):  # fmt: skip
    """ConvTranspose: the arrays as they are, and `padding` crops, unless `output_shape` (spatial) says what to keep.

    Then the rest is cropped in halves, the odd element at the end for SAME_UPPER and at the beginning otherwise;
    what is missing instead is output padding. SAME_* with an `output_padding` means the output shape `size * stride`.
    """
    assert kernel_shape is None or tuple(kernel_shape) == w.shape[2:]
    ones = (1,) * (x.ndim - 2)
    strides, dilations, output_padding = strides or ones, dilations or ones, list(output_padding or (0 for _ in ones))
    if output_shape is None and auto_pad.startswith("SAME") and any(output_padding):
        output_shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    crop = padding(pads, auto_pad) if output_shape is None else []
    sizes = zip(x.shape[2:], w.shape[2:], strides, dilations, output_padding, output_shape or (), strict=False)
    for i, (size, kernel, stride, dilation, extra, out) in enumerate(sizes):
        full = (size - 1) * stride + dilation * (kernel - 1) + 1
        total = max(full + extra - out, 0)
        crop.append((total // 2, total - total // 2) if auto_pad == "SAME_UPPER" else (total - total // 2, total // 2))
        output_padding[i] = out - full + total
    options = {"stride": strides, "padding": crop, "output_padding": output_padding, "dilation": dilations}
    return (refimpl.conv_transpose(x, w, b, **options, groups=group),)


def pool_options(auto_pad, ceil_mode, dilations, pads, strides):
    """Return the options that the pooling operators share.

    ONNX's stride is 1 unless given, refimpl's the kernel. With `auto_pad`, ONNX's `ceil_mode` changes no size.
    """
    ceil_mode = bool(ceil_mode) and auto_pad == "NOTSET"
    return {"stride": strides, "padding": padding(pads, auto_pad), "dilation": dilations, "ceil_mode": ceil_mode}


def max_pool(x, *, kernel_shape, auto_pad="NOTSET", ceil_mode=0, dilations=1, pads=None, storage_order=0, strides=1):
    """MaxPool: refimpl's indices count within a plane, row by row; ONNX's in all of `x`.

    Within a plane ONNX's go column by column if `storage_order` is 1; the planes come one after the other all the same.
    """
    options = pool_options(auto_pad, ceil_mode, dilations, pads, strides)
    y, indices = refimpl.max_pool(x, kernel_shape, **options, return_indices=True)
    plane = x.shape[2:]
    if storage_order:
        indices = np.ravel_multi_index(np.unravel_index(indices, plane), plane, order="F")
    first = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *(1 for _ in plane)) * math.prod(plane)
    return y, indices + first


def average_pool(
    x, *, kernel_shape, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0, dilations=1, pads=None, strides=1
):
    """AveragePool: padding doesn't count unless the node says so, in refimpl it does."""
    options = pool_options(auto_pad, ceil_mode, dilations, pads, strides)
    return (refimpl.avg_pool(x, kernel_shape, **options, count_include_pad=bool(count_include_pad)),)


def lp_pool(x, *, kernel_shape, auto_pad="NOTSET", ceil_mode=0, dilations=1, p=2, pads=None, strides=1):
    """LpPool: `p` is the norm's type."""
    return (refimpl.lp_pool(x, p, kernel_shape, **pool_options(auto_pad, ceil_mode, dilations, pads, strides)),)


def global_average_pool(x):
    """GlobalAveragePool: adaptive pooling to one element, whatever the size."""
    return (refimpl.adaptive_avg_pool(x, 1),)


def global_max_pool(x):
    """GlobalMaxPool: adaptive pooling to one element, whatever the size."""
    return (refimpl.adaptive_max_pool(x, 1),)


def max_unpool(x, indices, output_shape=None, *, kernel_shape, pads=None, strides=None):
    """MaxUnpool: the indices count in all of the output, those of refimpl within a plane of it.

    `output_shape` has the batch and the channels, too; refimpl's `output_size` is only what is spatial.
    """
    strides, pads = strides or (1,) * len(kernel_shape), pads or (0,) * 2 * len(kernel_shape)
    crop = padding(pads, "NOTSET")
    if output_shape is None:
        sizes = zip(x.shape[2:], strides, kernel_shape, crop, strict=True)
        output_size = [(size - 1) * stride + kernel - sum(pair) for size, stride, kernel, pair in sizes]
    else:
        output_size = [int(size) for size in output_shape[2:]]
    indices = indices % math.prod(output_size)
    return (refimpl.max_unpool(x, indices, kernel_shape, stride=strides, padding=crop, output_size=tuple(output_size)),)


def attention(
    q, k, v, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *, is_causal=0, kv_num_heads=None,
    left_window_size=-1, q_num_heads=None, qk_matmul_output_mode=0, right_window_size=-1, scale=None, softcap=0.0,
    softmax_precision=None,
):  # fmt: skip
    """Attention: heads come second, keys of the past first, and everything that hides a pair has an option of its own.

    - Three dimensions (batch, length, heads * features), with head counts: reshaped to four, and back.
    - `past_key`, `past_value`: concatenated before the new ones; the queries stand behind them (`query_offset`).
    - `nonpad_kv_seqlen`: the `key_lengths`; the last query stands at the last key of each batch entry (`query_offset`).
    - `attn_mask`: a `mask` if it is boolean, else a `bias`; the keys that a short one leaves out are hidden.
    - `left_window_size`, `right_window_size`: the `window`, where -1 is None. A `softcap` of 0 is None.
    - `softmax_precision`: refimpl computes float16 and bfloat16 in float32. For DOUBLE, the arrays are widened.
    """
    dtype, rank = q.dtype, q.ndim
    if rank == 3:
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    query_offset = 0
    if past_key is not None:
        query_offset = past_key.shape[2]
        k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
    elif nonpad_kv_seqlen is not None:
        query_offset = nonpad_kv_seqlen - q.shape[2]
    present_key, present_value = k, v
    if attn_mask is not None:
        left_out = (*attn_mask.shape[:-1], k.shape[2] - attn_mask.shape[-1])
        hide = False if attn_mask.dtype == bool else -np.inf
        attn_mask = np.concatenate((attn_mask, np.full(left_out, hide, attn_mask.dtype)), axis=-1)
    mask, bias = (attn_mask, None) if attn_mask is not None and attn_mask.dtype == bool else (None, attn_mask)
    if softmax_precision == onnx.TensorProto.DOUBLE:
        q, k, v, bias = (None if a is None else a.astype(np.float64) for a in (q, k, v, bias))
    visible = {
        "mask": mask,
        "is_causal": bool(is_causal),
        "window": tuple(None if size < 0 else size for size in (left_window_size, right_window_size)),
        "query_offset": query_offset,
        "key_lengths": nonpad_kv_seqlen,
    }
    score = {"bias": bias, "scale": scale, "softcap": softcap or None}
    y = refimpl.scaled_dot_product_attention(q, k, v, **score, **visible)
    if rank == 3:
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
    qk_matmul_output = attention_scores(qk_matmul_output_mode, q, k, score, visible)
    return y.astype(dtype), present_key, present_value, qk_matmul_output.astype(dtype)


def split_heads(x, heads):
    """Return (N, L, H * E) as (N, H, L, E)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def attention_scores(mode, q, k, score, visible):
    """Return `qk_matmul_output`: the scaled scores (0), then capped (1), then biased and masked (2), or weights (3).

    refimpl shows what comes out of the softmax, not what goes in: the scores are NumPy's. Which pairs are visible is
    what the weights of equal scores tell: 0 for a hidden pair and for no other.
    """
    if mode == 3:
        return refimpl.attention_weights(q, k, **score, **visible)
    bias, scale, softcap = score["bias"], score["scale"], score["softcap"]
    wide = np.promote_types(q.dtype, np.float32)
    keys = np.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2)
    scores = q.astype(wide) @ keys.astype(wide) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mode >= 1 and softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if mode == 2:
        equal = refimpl.attention_weights(np.zeros_like(q), np.zeros_like(k), **visible)
        scores = np.where(equal > 0, scores if bias is None else scores + bias, -np.inf)
    return scores


OPERATORS = {
    "Attention": attention,
    "AveragePool": average_pool,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}
