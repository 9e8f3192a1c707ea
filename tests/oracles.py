"""The ops written as loops over single elements, sharing nothing with refimpl: slow, and plain enough to believe."""

import itertools
import math
from typing import Any, NamedTuple

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


def source(index, sizes, padding_mode):
    """Return which element of a plane the padded plane shows at an index; None is a zero."""
    if padding_mode == "zeros":
        return index if inside(index, sizes) else None
    if padding_mode == "replicate":
        return tuple(min(max(i, 0), n - 1) for i, n in zip(index, sizes, strict=True))
    if padding_mode == "circular":
        return tuple(i % n for i, n in zip(index, sizes, strict=True))
    return tuple(-i if i < 0 else 2 * (n - 1) - i if i >= n else i for i, n in zip(index, sizes, strict=True))


def _terms(sizes, weight_shape, groups, stride, padding, dilation, padding_mode):
    """Yield `((c_out, *o), (c_in, *s), w)` for every product that a convolution over `sizes` sums up."""
    c_out, in_group = weight_shape[:2]
    _, _, elements = window_elements(sizes, weight_shape[2:], stride, padding, dilation)
    for j in range(c_out):
        group = j // (c_out // groups)
        for i in range(in_group):
            for o, taps in elements.items():
                for k, place in taps:
                    s = source(place, sizes, padding_mode)
                    if s is not None:
                        yield (j, *o), (group * in_group + i, *s), (j, i, *k)


@np.errstate(all="ignore")
def conv(dout, x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
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
    for o, s, w in _terms(sizes, weight.shape, groups, stride, padding, dilation, padding_mode):
        for n in range(xs.shape[0]):
            out[(n, *o)] += weight[w] * xs[(n, *s)]
            if dout is not None:
                dx[(n, *s)] += weight[w] * douts[(n, *o)]
                dweight[w] += xs[(n, *s)] * douts[(n, *o)]
    if not batched:
        out, dx = out[0], dx[0]
    dbias = None if bias is None or dout is None else np.array([douts[:, c].sum() for c in range(weight.shape[0])])
    return out, dx, dweight, dbias


@np.errstate(all="ignore")
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


def _first_maximum(x, plane, window):
    """Return the element of a window that wins: the first NaN, or else the first maximum."""
    best = window[0]
    for s in window:
        value, so_far = x[(*plane, *s)], x[(*plane, *best)]
        if value > so_far or (value != value and so_far == so_far):
            best = s
    return best


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
            best = _first_maximum(x, plane, [s for _, s in taps if inside(s, sizes)])
            out[(*plane, *o)] = x[(*plane, *best)]
            indices[(*plane, *o)] = np.ravel_multi_index(best, sizes)
            if dout is not None:
                dx[(*plane, *best)] += dout[(*plane, *o)]
    return out, indices, dx


@np.errstate(all="ignore")
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


def lp_pool(dout, x, norm_type, kernel_size, *, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Return `(out, dx)`; numbers that overflow in a power do so here, too."""
    lead, sizes = _planes(x, kernel_size)
    stride = kernel_size if stride is None else stride
    outs, _, elements = window_elements(sizes, kernel_size, stride, padding, dilation, ceil_mode)
    out, dx = np.zeros((*lead, *outs)), np.zeros(x.shape)
    for plane in np.ndindex(*lead):
        for o, taps in elements.items():
            read = [(*plane, *s) for _, s in taps if inside(s, sizes)]
            norm = sum(abs(float(x[s])) ** norm_type for s in read) ** (1 / norm_type)
            out[(*plane, *o)] = norm
            for s in read if dout is not None else []:
                if norm != 0 and x[s] != 0:
                    slope = math.copysign((abs(float(x[s])) / norm) ** (norm_type - 1), x[s])
                    dx[s] += dout[(*plane, *o)] * slope
    return out, dx


def _adaptive_windows(x, output_size):
    """Return the leading and the result's sizes, and for each output index the elements of its window."""
    lead, sizes = _planes(x, output_size)
    outs = [n if m is None else m for m, n in zip(_per_dimension(output_size, len(sizes)), sizes, strict=True)]
    windows = {
        o: list(
            itertools.product(
                *(
                    range(math.floor(i * n / m), math.ceil((i + 1) * n / m))
                    for i, n, m in zip(o, sizes, outs, strict=True)
                )
            )
        )
        for o in itertools.product(*(range(m) for m in outs))
    }
    return lead, outs, windows


@np.errstate(all="ignore")
def adaptive_avg_pool(dout, x, output_size):
    """Return `(out, dx)`."""
    lead, outs, windows = _adaptive_windows(x, output_size)
    out, dx = np.zeros((*lead, *outs)), np.zeros(x.shape)
    for plane in np.ndindex(*lead):
        for o, window in windows.items():
            out[(*plane, *o)] = sum(x[(*plane, *s)] for s in window) / len(window)
            for s in window if dout is not None else []:
                dx[(*plane, *s)] += dout[(*plane, *o)] / len(window)
    return out, dx


def adaptive_max_pool(dout, x, output_size):
    """Return `(out, indices, dx)`."""
    lead, outs, windows = _adaptive_windows(x, output_size)
    out = np.zeros((*lead, *outs), dtype=x.dtype)
    indices = np.zeros((*lead, *outs), dtype=np.int64)
    dx = np.zeros(x.shape)
    for plane in np.ndindex(*lead):
        for o, window in windows.items():
            best = _first_maximum(x, plane, window)
            out[(*plane, *o)] = x[(*plane, *best)]
            indices[(*plane, *o)] = np.ravel_multi_index(best, x.shape[len(lead) :])
            if dout is not None:
                dx[(*plane, *best)] += dout[(*plane, *o)]
    return out, indices, dx


def unpooled_sizes(sizes, kernel_size, stride, padding):
    """Return the spatial sizes of the result of `max_unpool` without `output_size`."""
    kernel, stride = (_per_dimension(v, len(sizes)) for v in (kernel_size, stride))
    if padding in ("same", "same_lower"):
        return [n * step for n, step in zip(sizes, stride, strict=True)]
    pads = _pads(padding, sizes, kernel, stride)
    return [(n - 1) * step + k - sum(p) for n, step, k, p in zip(sizes, stride, kernel, pads, strict=True)]


def max_unpool(dout, x, indices, kernel_size, *, stride=None, padding=0, output_size=None):
    """Return `(out, dx)`."""
    lead, sizes = _planes(x, kernel_size)
    stride = kernel_size if stride is None else stride
    outs = unpooled_sizes(sizes, kernel_size, stride, padding) if output_size is None else output_size
    outs = _per_dimension(outs, len(sizes))
    out, dx = np.zeros((*lead, *outs), dtype=x.dtype), np.zeros(x.shape)
    for plane in np.ndindex(*lead):
        winner = {}
        for s in itertools.product(*(range(n) for n in sizes)):
            place = np.unravel_index(indices[(*plane, *s)], outs)
            out[(*plane, *place)] = x[(*plane, *s)]
            winner[place] = s
        for place, s in winner.items() if dout is not None else []:
            dx[(*plane, *s)] = dout[(*plane, *place)]
    return out, dx


def visible_pairs(shape, options):
    """Return which pairs the options of attention allow, as a bool array of the shape of the scores."""
    batch = shape[:-3]
    visible = np.zeros(shape, dtype=bool)
    mask = np.broadcast_to(options["mask"], shape) if options.get("mask") is not None else None
    bias = np.broadcast_to(options["bias"], shape) if options.get("bias") is not None else None
    left, right = options.get("window") or (None, None)
    offsets = options.get("query_offset", 0)
    if isinstance(offsets, str):  # "end"
        ends = (("key_lengths", shape[-1]), ("query_lengths", shape[-2]))
        keys, queries = (np.asarray(options.get(name, size), dtype=int) for name, size in ends)
        offsets = keys - queries
    offsets = np.broadcast_to(offsets, batch)
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


def touched(visible, query, *keys_and_values):
    """Return for query, keys and values which of their rows are part of a visible pair, in their shapes (..., H, L)."""
    rows = [any_to(visible.any(axis=-1), query.shape[:-1])]
    for array in keys_and_values:
        seen = visible.any(axis=-2)
        if seen.ndim > 1:
            heads = array.shape[-3] if array.ndim > 2 else 1
            seen = seen.reshape(*seen.shape[:-2], heads, seen.shape[-2] // heads, seen.shape[-1]).any(axis=-2)
        rows.append(any_to(seen, array.shape[:-1]))
    return rows


def scores_of(query, key, value=None):
    """Return the shape of the scores."""
    leads = (array.shape[:-3] for array in (query, key, value) if array is not None)
    batch = np.broadcast_shapes(*leads)
    heads = [a.shape[-3] for a in (query, key, value) if a is not None and a.ndim > 2]
    return (*batch, *heads[:1], query.shape[-2], key.shape[-2])


class Attention(NamedTuple):
    """Everything that attention gives; the gradients are those of whatever `dout`, `dlogsumexp`, `dweights` came in."""

    out: Any
    logsumexp: Any
    weights: Any
    dquery: Any
    dkey: Any
    dvalue: Any
    dbias: Any
    dsink: Any


@np.errstate(all="ignore")
def attention(query, key, value=None, *, dout=None, dlogsumexp=None, dweights=None, **options):
    """Return an `Attention`, computed one row at a time, over the keys that the row sees and no others."""
    if value is None:  # attention_weights
        value = np.zeros((*key.shape[:-1], 0))
    q, k, v = (array if array.ndim > 2 else array[None] for array in (query, key, value))
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    heads, rows, keys = q.shape[-3], q.shape[-2], k.shape[-2]
    shared = heads // k.shape[-3]
    q, k, v = (np.broadcast_to(a, (*batch, *a.shape[-3:])) for a in (q, k, v))
    scores = (*batch, heads, rows, keys)
    visible = visible_pairs(scores, options)
    bias, sink, cap = options.get("bias"), options.get("sink"), options.get("softcap")
    keep, drop = options.get("dropout_mask"), options.get("dropout_p", 0.0)
    biases = np.broadcast_to(0.0 if bias is None else bias, scores)
    kept = np.broadcast_to(True if keep is None else keep, scores) / (1 - drop)
    scale = options.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = np.zeros((*batch, heads, rows, v.shape[-1]))
    logsumexp, weights = np.full((*batch, heads, rows), -math.inf), np.zeros(scores)
    douts = np.zeros(out.shape) if dout is None else dout.reshape(out.shape)
    dlogs = np.zeros(logsumexp.shape) if dlogsumexp is None else dlogsumexp.reshape(logsumexp.shape)
    dps = np.zeros(scores) if dweights is None else dweights.reshape(scores)
    dq, dk, dv, ds, dsink = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros(scores), np.zeros(heads)
    for row in np.ndindex(*batch, heads, rows):
        *entry, head, _ = row
        seen = [(*row, j) for j in range(keys) if visible[(*row, j)]]
        place = [(*entry, head // shared, pair[-1]) for pair in seen]
        raw = [scale * float(np.sum(q[row] * k[at])) for at in place]
        bent = [r if cap is None else cap * math.tanh(r / cap) for r in raw]
        logits = [s + float(biases[pair]) for s, pair in zip(bent, seen, strict=True)]
        sinks = sink is not None and sink[head] != -math.inf
        if sinks:
            logits.append(float(sink[head]))
        if not seen:
            logsumexp[row] = sink[head] if sinks else -math.inf
            dsink[head] += dlogs[row] if sinks else 0.0
            continue
        top = float(np.max(logits))
        total = sum(math.exp(logit - top) for logit in logits)
        p = [math.exp(logit - top) / total for logit in logits]
        logsumexp[row] = top + math.log(total)
        dp = [dps[pair] + kept[pair] * float(np.sum(douts[row] * v[at])) for pair, at in zip(seen, place, strict=True)]
        mean = sum(p_j * dp_j for p_j, dp_j in zip(p, dp, strict=False))  # the sink has a weight and no value
        for j, (pair, at) in enumerate(zip(seen, place, strict=True)):
            weights[pair] = p[j]
            out[row] += p[j] * kept[pair] * v[at]
            dv[at] += p[j] * kept[pair] * douts[row]
            ds[pair] = p[j] * (dp[j] - mean + dlogs[row])
            draw = ds[pair] * (1.0 if cap is None else 1 - math.tanh(raw[j] / cap) ** 2)
            dq[row] += scale * draw * k[at]
            dk[at] += scale * draw * q[row]
        if len(p) > len(seen):
            dsink[head] += p[-1] * (dlogs[row] - mean)
    flat = query.ndim == key.ndim == value.ndim == 2
    return Attention(
        *(array[0] if flat else array for array in (out, logsumexp, weights)),
        *(_sum_to(d, array.shape) for d, array in ((dq, query), (dk, key), (dv, value))),
        dbias=None if bias is None else _sum_to(ds, bias.shape),
        dsink=None if sink is None else dsink,
    )


def _broadcast_axes(array, shape):
    full = (1,) * (array.ndim - len(shape)) + tuple(shape)
    return tuple(d for d, n in enumerate(full) if n == 1)


def _sum_to(array, shape):
    """Return the sum over what was broadcast from a shape."""
    return np.sum(array, axis=_broadcast_axes(array, shape)).reshape(shape)


def any_to(array, shape):
    """Return whether any is true of what was broadcast from a shape."""
    return np.any(array, axis=_broadcast_axes(array, shape)).reshape(shape)


@np.errstate(all="ignore")
def multi_head_attention(
    query, key, value, params=None, *, num_heads, num_kv_heads=None, need_weights=False, average_weights=True,
    add_zero_attn=False, **options,
):  # fmt: skip
    """Return the output, or with `need_weights` `(output, weights)`: projections, more keys, heads."""
    params = params or {}
    if "in_proj_weight" in params:
        weights = np.split(params["in_proj_weight"], 3)
    else:
        weights = [params.get(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    if params:
        ends = np.cumsum([len(w) for w in weights])[:-1]
        biases = np.split(params["in_proj_bias"], ends) if "in_proj_bias" in params else [0.0] * 3
        query, key, value = (
            np.einsum("...e,de->...d", x, w) + b for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    scores = (*batch, num_heads, query.shape[-2], key.shape[-2])
    visible, bias = visible_pairs(scores, options), np.broadcast_to(0.0, scores)
    if options.get("bias") is not None:
        bias = np.broadcast_to(options["bias"], scores)
    key, value = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (key, value))
    there = visible_pairs((*scores[:-1], 1), {"query_lengths": options.get("query_lengths")})
    more = [(params["bias_k"][0, 0], params["bias_v"][0, 0])] if "bias_k" in params else []
    more += [(0.0, 0.0)] if add_zero_attn else []
    for k, v in more:
        key, value = (
            np.concatenate([x, np.broadcast_to(token, (*batch, 1, x.shape[-1]))], axis=-2)
            for x, token in ((key, k), (value, v))
        )
        visible = np.concatenate([visible, there], axis=-1)
        bias = np.concatenate([bias, np.zeros(there.shape)], axis=-1)
    parts = (num_heads, num_kv_heads or num_heads, num_kv_heads or num_heads)
    split = [np.stack(np.split(x, n, axis=-1), axis=-3) for x, n in zip((query, key, value), parts, strict=True)]
    names = ("scale", "softcap", "sink", "dropout_mask", "dropout_p")
    result = attention(*split, mask=visible, bias=bias, **{name: options[name] for name in names if name in options})
    out = np.concatenate([result.out[..., h, :, :] for h in range(num_heads)], axis=-1)
    if params:
        out = np.einsum("...e,de->...d", out, params["out_proj.weight"]) + params.get("out_proj.bias", 0.0)
    if need_weights:
        return out, sum(
            result.weights[..., h, :, :] for h in range(num_heads)
        ) / num_heads if average_weights else result.weights
    return out


@np.errstate(all="ignore")
def merge_attention(outs, logsumexps):
    """Return `(out, logsumexp)`, one row at a time, over the parts that saw a key."""
    out, logsumexp = np.zeros(outs.shape[1:]), np.full(logsumexps.shape[1:], -math.inf)
    for row in np.ndindex(*logsumexp.shape):
        parts = [s for s in range(len(outs)) if logsumexps[(s, *row)] != -math.inf]
        if parts:
            top = float(np.max([logsumexps[(s, *row)] for s in parts]))
            total = sum(math.exp(logsumexps[(s, *row)] - top) for s in parts)
            logsumexp[row] = top + math.log(total)
            out[row] = sum(math.exp(logsumexps[(s, *row)] - top) / total * outs[(s, *row)] for s in parts)
    return out, logsumexp
