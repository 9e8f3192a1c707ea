"""The ops written as loops over single elements, sharing nothing with refimpl: slow, and plain enough to believe."""

import itertools
import math

import numpy as np


def _per_dimension(value, count):
    return [value] * count if isinstance(value, int | np.integer) else list(value)


def _pads(padding, sizes, extents, strides):
    """Return `(low, high)` for each dimension."""
    pads = []
    for d, (size, extent, stride) in enumerate(zip(sizes, extents, strides, strict=True)):
        if padding == "valid":
            pads.append((0, 0))
        elif padding in ("same", "same_lower"):
            total = max(0, (math.ceil(size / stride) - 1) * stride + extent - size)
            few, many = total // 2, total - total // 2
            pads.append((few, many) if padding == "same" else (many, few))
        else:
            pad = _per_dimension(padding, len(sizes))[d]
            pads.append((pad, pad) if isinstance(pad, int) else tuple(pad))
    return pads


def window_elements(sizes, kernel, stride, padding, dilation, ceil_mode=False):
    """Return `(out_sizes, pads, elements)`: for each output index, a list of `(kernel index, element index)`.

    The element index may lie in padding, or beyond it.
    """
    count = len(sizes)
    kernel, stride, dilation = (_per_dimension(v, count) for v in (kernel, stride, dilation))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = _pads(padding, sizes, extents, stride)
    outs = []
    for size, extent, step, (low, high) in zip(sizes, extents, stride, pads, strict=True):
        out = 0
        while out * step + extent <= low + size + high:
            out += 1
        if ceil_mode and padding not in ("same", "same_lower"):
            out = math.ceil((low + size + high - extent) / step) + 1
            out -= (out - 1) * step >= low + size
        outs.append(out)
    elements = {}
    for o in itertools.product(*(range(n) for n in outs)):
        elements[o] = [
            (k, tuple(o[i] * stride[i] + k[i] * dilation[i] - pads[i][0] for i in range(count)))
            for k in itertools.product(*(range(n) for n in kernel))
        ]
    return outs, pads, elements


def inside(index, sizes):
    """Return whether an index lies in a plane of these sizes."""
    return all(0 <= i < n for i, n in zip(index, sizes, strict=True))


def _terms(sizes, weight_shape, groups, stride, padding, dilation):
    """Yield `(c_out, o, c_in, s, w)` for every product that a convolution over `sizes` sums up."""
    c_out, in_group = weight_shape[:2]
    _, _, elements = window_elements(sizes, weight_shape[2:], stride, padding, dilation)
    for j in range(c_out):
        group = j // (c_out // groups)
        for i in range(in_group):
            for o, taps in elements.items():
                for k, s in taps:
                    if inside(s, sizes):
                        yield (j, *o), (group * in_group + i, *s), (j, i, *k)


def conv(dout, x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    """Return `(out, dx, dweight, dbias)`; `dout=None` gives the first alone."""
    batched = x.ndim == weight.ndim
    xs = x if batched else x[None]
    sizes = xs.shape[2:]
    outs, _, _ = window_elements(sizes, weight.shape[2:], stride, padding, dilation)
    out = np.zeros((xs.shape[0], weight.shape[0], *outs))
    if bias is not None:
        out += bias.reshape(-1, *[1] * len(sizes))
    douts = None if dout is None else dout.reshape(out.shape)
    dx, dweight = np.zeros(xs.shape), np.zeros(weight.shape)
    for o, s, w in _terms(sizes, weight.shape, groups, stride, padding, dilation):
        for n in range(xs.shape[0]):
            out[(n, *o)] += weight[w] * xs[(n, *s)]
            if dout is not None:
                dx[(n, *s)] += weight[w] * douts[(n, *o)]
                dweight[w] += xs[(n, *s)] * douts[(n, *o)]
    if not batched:
        out, dx = out[0], dx[0]
    dbias = None if bias is None or dout is None else np.array([douts[:, c].sum() for c in range(weight.shape[0])])
    return out, dx, dweight, dbias


def conv_transpose(
    dout, x, weight, bias=None, *, stride=1, padding=0, output_padding=0, output_size=None, dilation=1, groups=1
):
    """Return `(out, dx, dweight, dbias)`: every element of x stamps the kernel onto the output."""
    batched = x.ndim == weight.ndim
    xs = x if batched else x[None]
    sizes, count = xs.shape[2:], weight.ndim - 2
    kernel = weight.shape[2:]
    stride, dilation = _per_dimension(stride, count), _per_dimension(dilation, count)
    fulls = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(sizes, stride, dilation, kernel, strict=True)]
    lows, results = [], []
    for d in range(count):
        if padding in ("same", "same_lower"):
            total = max(0, fulls[d] - sizes[d] * stride[d])
            lows.append(total // 2 if padding == "same" else total - total // 2)
            results.append(sizes[d] * stride[d])
        else:
            pad = 0 if padding == "valid" else _per_dimension(padding, count)[d]
            low, high = (pad, pad) if isinstance(pad, int) else pad
            lows.append(low)
            results.append(fulls[d] - low - high + _per_dimension(output_padding, count)[d])
    if output_size is not None:
        results = _per_dimension(output_size, count)
    c_in, out_group = weight.shape[:2]
    out = np.zeros((xs.shape[0], out_group * groups, *results))
    if bias is not None:
        out += bias.reshape(-1, *[1] * count)
    douts = None if dout is None else dout.reshape(out.shape)
    dx, dweight = np.zeros(xs.shape), np.zeros(weight.shape)
    for n, i, j in itertools.product(range(xs.shape[0]), range(c_in), range(out_group)):
        channel = i // (c_in // groups) * out_group + j
        for s in itertools.product(*(range(m) for m in sizes)):
            for k in itertools.product(*(range(m) for m in kernel)):
                place = tuple(s[d] * stride[d] + k[d] * dilation[d] - lows[d] for d in range(count))
                if inside(place, results):
                    out[(n, channel, *place)] += weight[(i, j, *k)] * xs[(n, i, *s)]
                    if dout is not None:
                        dx[(n, i, *s)] += weight[(i, j, *k)] * douts[(n, channel, *place)]
                        dweight[(i, j, *k)] += xs[(n, i, *s)] * douts[(n, channel, *place)]
    if not batched:
        out, dx = out[0], dx[0]
    dbias = (
        None if bias is None or dout is None else np.array([douts[:, c].sum() for c in range(out.shape[-count - 1])])
    )
    return out, dx, dweight, dbias


def _planes(x, kernel_size):
    count = x.ndim - 2 if isinstance(kernel_size, int | np.integer) else len(kernel_size)
    return x.shape[: x.ndim - count], x.shape[x.ndim - count :]


def max_pool(dout, x, kernel_size, *, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Return `(out, indices, dx)`."""
    lead, sizes = _planes(x, kernel_size)
    stride = kernel_size if stride is None else stride
    outs, _, elements = window_elements(sizes, kernel_size, stride, padding, dilation, ceil_mode)
    out = np.zeros((*lead, *outs), dtype=x.dtype)
    indices = np.zeros((*lead, *outs), dtype=np.int64)
    dx = np.zeros(x.shape)
    for plane in np.ndindex(*lead):
        for o, taps in elements.items():
            best = None
            for _, s in taps:
                if not inside(s, sizes):
                    continue
                value = x[(*plane, *s)]
                if best is None or value > x[(*plane, *best)] or (value != value and not np.isnan(x[(*plane, *best)])):
                    best = s
            out[(*plane, *o)] = x[(*plane, *best)]
            indices[(*plane, *o)] = np.ravel_multi_index(best, sizes)
            if dout is not None:
                dx[(*plane, *best)] += dout[(*plane, *o)]
    return out, indices, dx


def avg_pool(
    dout, x, kernel_size, *, stride=None, padding=0, dilation=1, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
):  # fmt: skip
    """Return `(out, dx)`."""
    lead, sizes = _planes(x, kernel_size)
    stride = kernel_size if stride is None else stride
    outs, pads, elements = window_elements(sizes, kernel_size, stride, padding, dilation, ceil_mode)
    out, dx = np.zeros((*lead, *outs)), np.zeros(x.shape)
    for o, taps in elements.items():
        read = [s for _, s in taps if inside(s, sizes)]
        in_padding = [s for _, s in taps if all(-p[0] <= i < n + p[1] for i, n, p in zip(s, sizes, pads, strict=True))]
        divisor = divisor_override or len(in_padding if count_include_pad else read)
        for plane in np.ndindex(*lead):
            out[(*plane, *o)] = sum(x[(*plane, *s)] for s in read) / divisor
            for s in read if dout is not None else []:
                dx[(*plane, *s)] += dout[(*plane, *o)] / divisor
    return out, dx


def visible_pairs(shape, options):
    """Return which pairs the options of attention allow, as a bool array of the shape of the scores."""
    batch = shape[:-3]
    visible = np.zeros(shape, dtype=bool)
    mask = np.broadcast_to(options["mask"], shape) if options.get("mask") is not None else None
    bias = np.broadcast_to(options["bias"], shape) if options.get("bias") is not None else None
    left, right = options.get("window") or (None, None)
    offsets = np.broadcast_to(options.get("query_offset", 0), batch)
    for index in np.ndindex(*shape):
        i, j = index[-2:]
        entry = index[: len(batch)]
        position = i + int(offsets[entry])
        allowed = not options.get("is_causal") or j <= position
        allowed = allowed and (left is None or position - left <= j)
        allowed = allowed and (right is None or j <= position + right)
        for name, here in (("query_lengths", i), ("key_lengths", j)):
            if options.get(name) is not None:
                allowed = allowed and here < np.broadcast_to(options[name], batch)[entry]
        allowed = allowed and (mask is None or mask[index])
        allowed = allowed and (bias is None or bias[index] != -math.inf)
        visible[index] = allowed
    return visible


def attention(query, key, value, **options):
    """Return `(out, logsumexp)`, one row at a time."""
    if query.ndim == key.ndim == value.ndim == 2:
        out, logsumexp = attention(query[None], key[None], value[None], **options)
        return out[0], logsumexp[0]
    query, key, value = (array if array.ndim > 2 else array[None] for array in (query, key, value))
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    heads, rows, keys = query.shape[-3], query.shape[-2], key.shape[-2]
    shared = heads // key.shape[-3]
    query, key, value = (np.broadcast_to(a, (*batch, *a.shape[-3:])) for a in (query, key, value))
    scores = (*batch, heads, rows, keys)
    visible = visible_pairs(scores, options)
    bias = np.broadcast_to(options.get("bias") if options.get("bias") is not None else 0.0, scores)
    scale = options.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out = np.zeros((*batch, heads, rows, value.shape[-1]))
    logsumexp = np.full((*batch, heads, rows), -math.inf)
    for index in np.ndindex(*batch, heads, rows):
        *entry, head, _ = index
        kv = (*entry, head // shared)
        seen = [j for j in range(keys) if visible[(*index, j)]]
        if seen:
            s = [scale * float(np.sum(query[index] * key[(*kv, j)])) + float(bias[(*index, j)]) for j in seen]
            top = max(s)
            total = sum(math.exp(v - top) for v in s)
            logsumexp[index] = top + math.log(total)
            out[index] = sum(math.exp(v - top) / total * value[(*kv, j)] for v, j in zip(s, seen, strict=True))
    return out, logsumexp


def multi_head_attention(query, key, value, params=None, *, num_heads, **options):
    """Return the output, head by head."""
    if params is not None:
        if "in_proj_weight" in params:
            weights = np.split(params["in_proj_weight"], 3)
        else:
            weights = [params[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        ends = np.cumsum([len(w) for w in weights])[:-1]
        biases = np.split(params["in_proj_bias"], ends) if "in_proj_bias" in params else [0.0] * 3
        query, key, value = (
            np.einsum("...e,de->...d", x, w) + b for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    split = [np.stack(np.split(x, num_heads, axis=-1), axis=-3) for x in (query, key, value)]
    out = attention(*split, **options)[0]
    out = np.concatenate([out[..., h, :, :] for h in range(num_heads)], axis=-1)
    if params is not None:
        out = np.einsum("...e,de->...d", out, params["out_proj.weight"]) + params.get("out_proj.bias", 0.0)
    return out
