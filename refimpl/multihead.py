"""Multi-head attention: projections and heads around scaled dot-product attention.

H heads; L length (Lq, Lk); E features that come in, D those that a projection puts out, for all heads together.
"""

from collections.abc import Mapping
from typing import Any

from . import _checks, backend
from ._engine.arguments import prepare
from ._engine.projections import (
    Hidden,
    append,
    append_backward,
    apply,
    apply_backward,
    as_params,
    find_hidden,
    in_proj,
    join,
    out_proj,
    split,
)
from ._engine.softmax import attend, attend_backward, attention_probabilities
from ._engine.visibility import AttentionCall, as_given
from ._grads import MultiHeadGrads
from ._options import AttentionOptions, takes_attention_options
from .backend import Array, Backend

__all__ = ["MultiHeadGrads", "multi_head_attention", "multi_head_attention_backward"]


@backend.op
@takes_attention_options()
def multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array] | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    need_weights: bool = False,
    average_weights: bool = True,
    add_zero_attn: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Project query, key and value, split them into heads, let every head attend, concatenate, and project again.

    Parameters
    ----------
    query : (..., Lq, Eq)
        float64, float32, float16 or bfloat16. Leading dimensions broadcast.
    key : (..., Lk, Ek)
    value : (..., Lk, Ev)
    params : mapping of names to arrays, optional
        The projections, with the names and shapes of a `torch.nn.MultiheadAttention` state dict; None is no projection.

        - `in_proj_weight` (3 E, E), where query, key and value have E features each; or
          `q_proj_weight` (D, Eq), `k_proj_weight` (Dk, Ek) and `v_proj_weight` (Dv, Ev)
        - `in_proj_bias` (D + Dk + Dv,), optional
        - `bias_k` (1, 1, Dk) and `bias_v` (1, 1, Dv), optional: one more projected key and its value
        - `out_proj.weight` (E_out, Dv * num_heads / num_kv_heads), and `out_proj.bias` (E_out,), optional
    num_heads : int
        Into how many equal parts the projected features are split: head h takes the h-th run of `D / num_heads`.
    num_kv_heads : int, optional
        Into how many those of key and value are split, a divisor of `num_heads`, and as many unless given. Query head h
        uses key head `h // (num_heads / num_kv_heads)`, so Dk is `D * num_kv_heads / num_heads`.
    need_weights : bool
        Return the weights, too.
    average_weights : bool
        Return the mean of the weights over the heads, not those of each.
    add_zero_attn : bool
        Append a key and a value of zeros, after `bias_k` and `bias_v`.
    bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, sink, scale, softcap
        As for `scaled_dot_product_attention`, where the scores are (..., num_heads, Lq, Lk) and E is the features of
        one head. Keys that are appended are no part of these scores: they have no bias, and every query sees them that
        is no padding.
    dropout_mask, dropout_p
        As for `scaled_dot_product_attention`, over all weights, appended keys included.

    Returns
    -------
    out : (..., Lq, E_out)
        A new array of the dtype, backend and device of `query`; without `params`, E_out is the features of value times
        `num_heads / num_kv_heads`.
    weights : (..., Lq, Lk) or (..., num_heads, Lq, Lk)
        With `need_weights`: the softmax of the scores, before dropout, and one or two keys longer if any are appended.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit; for keys of `params` that are missing, unknown, or of both kinds.

    Notes
    -----
    With `W` the projections and `b` their biases,

        q, k, v = query @ Wq^T + bq,  key @ Wk^T + bk,  value @ Wv^T + bv
        heads   = scaled_dot_product_attention(split(q), split(k), split(v), ...)
        out     = concatenate(heads) @ Wo^T + bo

    How it is computed: `refimpl.textbook.multi_head_attention`.

    References
    ----------
    Vaswani et al., Attention is all you need, arXiv:1706.03762, section 3.2.2. `torch.nn.MultiheadAttention` of
    PyTorch 2, with `batch_first=True`, agrees on the output. Its masks are True where a pair is hidden, its weights are
    those after dropout, and where it returns them, a query that sees no key makes NaN.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0, 1.0, 3.0], [0.0, 1.0, 5.0, 3.0]])
    >>> multi_head_attention(x, x, x, num_heads=2, is_causal=True)[0]
    array([1., 0., 1., 3.])
    """
    given = AttentionOptions(**options)
    arrays = {"query": query, "key": key, "value": value}
    found = _checks.multi_head(
        "multi_head_attention", arrays, params, given, num_heads=num_heads, num_kv_heads=num_kv_heads,
        need_weights=need_weights, average_weights=average_weights, add_zero_attn=add_zero_attn,
    )  # fmt: skip
    be = backend.of(query)
    arrays, params = be.widened(arrays, params)
    heads, call = _into_heads(be, found, arrays, params, given, add_zero_attn)
    out = join(be, attend(call)[0])
    if params is not None:
        hidden = find_hidden(call, heads, (*arrays.values(), *params.values()))
        out = apply(be, out, out_proj(params), hidden)
    out = be.rounded(out, like=query)
    if not need_weights:
        return out
    weights, _ = attention_probabilities(call)
    if average_weights:
        weights = be.xp.mean(weights, axis=-3)
    return out, be.rounded(weights, like=query)


@backend.op
@takes_attention_options()
def multi_head_attention_backward(
    dout: Array,
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array] | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    need_weights: bool = False,
    average_weights: bool = True,
    add_zero_attn: bool = False,
    **options: Any,
) -> MultiHeadGrads:
    """Return the gradients of `sum(dout * multi_head_attention(query, key, value, params, ...))`.

    Parameters
    ----------
    dout : (..., Lq, E_out)
        Of the shape, dtype and backend of the output.
    query, key, value, params, num_heads, num_kv_heads, add_zero_attn
        As for `multi_head_attention`.
    bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, sink, scale, softcap
        As for `multi_head_attention`.
    dropout_mask, dropout_p, need_weights, average_weights
        As for `multi_head_attention`; the last two change nothing.

    Returns
    -------
    MultiHeadGrads
        The gradient of each argument, in new arrays of the shapes and the dtype of the arguments.
        Where one array is query, key and value at once (self-attention), its gradient is the sum of the three.

    Raises
    ------
    TypeError, ValueError
        As `multi_head_attention`, and if `dout` does not have the shape or dtype of the output.

    Notes
    -----
    The chain rule through the three steps, backwards; for a projection `y = x @ W^T + b` of rows x,

        dx = dy @ W,   dW = dy^T @ x (summed over all rows),   db = dy summed over all rows

    and splitting into heads is undone by concatenating them. `bias_k` and `bias_v` take the gradients of the keys and
    values appended to every batch entry. The output of the heads is computed again.

    How it is computed: `refimpl.textbook.multi_head_attention_backward`.

    References
    ----------
    Those of `multi_head_attention` and of `scaled_dot_product_attention_backward`. Autograd of PyTorch 2 agrees
    wherever the forwards do.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0, 1.0, 3.0], [0.0, 1.0, 5.0, 3.0]])
    >>> multi_head_attention_backward(np.ones((2, 4)), x, x, x, num_heads=2, mask=np.eye(2, dtype=bool)).dvalue
    array([[1., 1., 1., 1.],
           [1., 1., 1., 1.]])
    """
    given = AttentionOptions(**options)
    arrays = {"query": query, "key": key, "value": value, "dout": dout}
    found = _checks.multi_head(
        "multi_head_attention_backward", arrays, params, given, num_heads=num_heads, num_kv_heads=num_kv_heads,
        need_weights=need_weights, average_weights=average_weights, add_zero_attn=add_zero_attn,
    )  # fmt: skip
    be = backend.of(query)
    arrays, params = be.widened(arrays, params)
    heads, call = _into_heads(be, found, arrays, params, given, add_zero_attn)
    dout, tokens = arrays["dout"], [arrays[name] for name in ("query", "key", "value")]
    if params is None:
        dheads, dbias, dsink = _heads_backward(call, dout, heads, given)
        dquery, dkey, dvalue = (join(be, d[..., : x.shape[-2], :]) for d, x in zip(dheads, tokens, strict=True))
        return be.rounded(MultiHeadGrads(dquery, dkey, dvalue, None, dbias, dsink), like=query)
    hidden = find_hidden(call, heads, (*arrays.values(), *params.values()))
    real = hidden or Hidden()
    djoined, dout_proj = apply_backward(
        be, dout, join(be, attend(call)[0]), out_proj(params), hidden, x_real=real.joined
    )
    dheads, dbias, dsink = _heads_backward(call, djoined, heads, given)
    dappended = {
        name: append_backward(be, dhead, x.shape[-2], params[name])
        for name, dhead, x in zip(("bias_k", "bias_v"), dheads[1:], tokens[1:], strict=True)
        if name in params
    }
    dprojected = (join(be, dhead[..., : x.shape[-2], :]) for dhead, x in zip(dheads, tokens, strict=True))
    into = [
        apply_backward(be, dy, x, projection, hidden, dy_real=dy_real)
        for dy, x, projection, dy_real in zip(
            dprojected, tokens, in_proj(params), (real.query, real.key, real.value), strict=True
        )
    ]
    dparams = as_params(be, params, [dprojection for _, dprojection in into], dout_proj, dappended)
    dquery, dkey, dvalue = (dx for dx, _ in into)
    return be.rounded(MultiHeadGrads(dquery, dkey, dvalue, dparams, dbias, dsink), like=query)


def _into_heads(
    be: Backend,
    found: _checks.Heads,
    arrays: Mapping[str, Array],
    params: Mapping[str, Array] | None,
    options: AttentionOptions,
    add_zero_attn: bool,
) -> tuple[list[Array], AttentionCall]:
    """Return query, key and value as they enter the heads, (..., H, L, D / H), and the call of attention with them."""
    tokens = [arrays[name] for name in ("query", "key", "value")]
    bias_k, bias_v = None, None
    if params is not None:
        tokens = [apply(be, x, projection) for x, projection in zip(tokens, in_proj(params), strict=True)]
        bias_k, bias_v = params.get("bias_k"), params.get("bias_v")
    query, key, value = (split(be, x, n) for x, n in zip(tokens, (found.query, found.key, found.key), strict=True))
    heads = {
        "query": query,
        "key": append(be, key, bias_k, add_zero_attn),
        "value": append(be, value, bias_v, add_zero_attn),
    }
    scores = (*found.scores[:-1], found.scores[-1] + found.num_appended_keys)
    return list(heads.values()), prepare(be, heads, scores, options, found.num_appended_keys)


def _heads_backward(
    call: AttentionCall, djoined: Array, heads: list[Array], options: AttentionOptions
) -> tuple[list[Array], Array | None, Array | None]:
    """Return the gradients of query, key and value as they entered the heads, of the bias and of the sink."""
    grads = attend_backward(call, split(call.be, djoined, call.scores[-3]), None)
    *dheads, dbias, dsink = (
        as_given(call.be, g, a) for g, a in zip(grads, (*heads, options.bias, options.sink), strict=True)
    )
    return dheads, dbias, dsink
