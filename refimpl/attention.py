"""Scaled dot-product attention: its output, its weights, and the gradients of both.

H heads (Hq of the queries, Hkv of keys and values); L length; E features.
"""

from typing import Any

from . import _checks, backend
from ._engine.arguments import prepare
from ._engine.softmax import attend, attend_backward, attention_probabilities
from ._engine.visibility import AttentionCall, as_given
from ._grads import AttentionGrads, AttentionWeightsGrads
from ._options import AttentionOptions, Window, takes_attention_options
from .backend import Array, Backend

__all__ = [
    "AttentionGrads",
    "AttentionWeightsGrads",
    "attention_weights",
    "attention_weights_backward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
]


@backend.op
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    query_offset: int | Array | str = 0,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    sink: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_mask: Array | None = None,
    dropout_p: float = 0.0,
    return_logsumexp: bool = False,
) -> Array | tuple[Array, Array]:
    """Let every query take the mean of the values, weighted by the softmax of its scores with the keys.

    Parameters
    ----------
    query : (..., Hq, Lq, E) or (Lq, E)
        float64, float32, float16 or bfloat16.
    key : (..., Hkv, Lk, E) or (Lk, E)
        Query head h uses key head `h // (Hq / Hkv)`. The leading dimensions of query, key and value broadcast.
    value : (..., Hkv, Lk, Ev) or (Lk, Ev)
        With the heads of key; arrays of two dimensions have one head.
    bias : floating, broadcasts to (..., Hq, Lq, Lk), optional
        Added to the scores. A bias of -inf hides the pair, exactly as `mask=False` does.
    mask : bool, broadcasts to (..., Hq, Lq, Lk), optional
        True where the query may attend to the key.
    is_causal : bool
        Key j is visible to query i if `j <= i + query_offset`.
    window : (left, right), each an int or None, optional
        Key j is visible to query i if `i + query_offset - left <= j <= i + query_offset + right`; None is unbounded. A
        negative side leaves the query's own token out; `left + right` is at least 0.
    query_offset : int, integer array that broadcasts to the batch dimensions, or "end"
        The position of query 0 among the keys: 0 aligns both at their beginnings, "end" at their ends. That is
        `Lk - Lq`, with the lengths of each batch entry where these are given.
    query_lengths, key_lengths : integer array that broadcasts to the batch dimensions, optional
        How many queries and keys there are; what lies beyond is padding, and hidden.
    sink : floating, (Hq,), or (1,) for arrays without heads, optional
        One more logit for each head in the denominator of the softmax, for which there is no value.
    scale : float, optional
        `1 / sqrt(E)` unless given. Without features, E = 0, all scores are 0.
    softcap : float, above 0, optional
        Bounds the scores: `softcap * tanh(score / softcap)`, before the bias.
    dropout_mask : bool, broadcasts to (..., Hq, Lq, Lk), optional
        True where a weight is kept, and divided by `1 - dropout_p`. A dropped pair is no hidden one: a NaN in its value
        stays visible.
    dropout_p : float, in [0, 1)
        The share that `dropout_mask` was drawn to drop.
    return_logsumexp : bool
        Return the logsumexp of the scores, too.

    Returns
    -------
    out : (..., Hq, Lq, Ev) or (Lq, Ev)
        A new array of the dtype, backend and device of `query`. A query that sees no key gets 0.
    logsumexp : (..., Hq, Lq) or (Lq,)
        With `return_logsumexp`: `log(sum over visible keys of exp(score))`, with the sink if there is one; -inf for a
        query that sees nothing. float32 for float16 and bfloat16.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit.

    Notes
    -----
    For every head, over the pairs (i, j) that every one of the options allows,

        s = softcap * tanh(scale * query @ key^T / softcap) + bias
        p = exp(s) / (exp(sink) + sum over keys of exp(s))
        out = dropout(p) @ value

    without the tanh where there is no softcap, and without the sink where there is none.

    What a hidden pair holds never matters: a NaN or inf there reaches neither the output nor a gradient. To see whether
    there can be any, a few numbers are read when an option hides pairs, which on a GPU waits for the device. float16
    and bfloat16 are computed in float32, from a copy, and rounded once.

    A tile holds all keys of its query rows, so with very many keys only a few rows. Where there is memory to spare,
    `limits(tile_bytes=16 << 20)` is faster then (by a quarter, and 40% in the backward, with 32,768 keys).

    How it is computed: `refimpl.textbook.scaled_dot_product_attention`.

    References
    ----------
    Vaswani et al., Attention is all you need, arXiv:1706.03762, equation 1. Shazeer, arXiv:1911.02150 and Ainslie et
    al., arXiv:2305.13245 for shared key heads; Gemma 2, arXiv:2408.00118, section 2 for the softcap; gpt-oss,
    arXiv:2508.10925, for a learned sink. `torch.nn.functional.scaled_dot_product_attention` (PyTorch 2.13) agrees.
    DIALECTS.md in the repository says which options give the answers of other libraries.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> scaled_dot_product_attention(query, key, np.array([[1.0], [3.0], [8.0]]), is_causal=True, query_offset=1)
    array([[2.]])
    """
    name = "scaled_dot_product_attention"
    options = AttentionOptions(
        bias=bias, mask=mask, is_causal=is_causal, window=window, query_offset=query_offset,
        query_lengths=query_lengths, key_lengths=key_lengths, sink=sink, scale=scale, softcap=softcap,
        dropout_mask=dropout_mask, dropout_p=dropout_p,
    )  # fmt: skip
    _checks.flag(name, "return_logsumexp", return_logsumexp)
    be = backend.of(query)
    call = _checked(be, name, {"query": query, "key": key, "value": value}, options)
    out, logsumexp = attend(call)
    out = be.rounded(out, like=query)
    return (out, logsumexp) if return_logsumexp else out


@backend.op
@takes_attention_options()
def scaled_dot_product_attention_backward(
    dout: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    return_logsumexp: bool = False,
    dlogsumexp: Array | None = None,
    **options: Any,
) -> AttentionGrads:
    """Return the gradients of `sum(dout * scaled_dot_product_attention(query, key, value, ...))`.

    Parameters
    ----------
    dout : (..., Hq, Lq, Ev) or (Lq, Ev)
        Of the shape, dtype and backend of the output.
    query, key, value, bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, sink, scale, softcap
        As for `scaled_dot_product_attention`.
    dropout_mask, dropout_p, return_logsumexp
        As for `scaled_dot_product_attention`; `return_logsumexp` changes nothing.
    dlogsumexp : (..., Hq, Lq) or (Lq,), optional
        Of the shape and dtype of the logsumexp: adds the gradients of `sum(dlogsumexp * logsumexp)`.

    Returns
    -------
    AttentionGrads
        `dquery`, `dkey`, `dvalue`, `dbias` and `dsink`, new arrays of the shapes and the dtype of the arguments, summed
        over the dimensions along which these were broadcast; 0 for hidden pairs.

    Raises
    ------
    TypeError, ValueError
        As `scaled_dot_product_attention`, and if `dout` or `dlogsumexp` does not have the shape or dtype of its result.

    Notes
    -----
    From `out = p @ value`, the softmax `p_j = exp(s_j) / sum_k exp(s_k)`, whose derivative is
    `dp_j / ds_k = p_j (1[j = k] - p_k)`, the logsumexp, whose derivative by `s_j` is `p_j`, and
    `s = softcap * tanh(t) + bias` with `t = scale * query @ key^T / softcap`, whose derivative is `1 - tanh(t)**2`:

        dvalue = dropout(p)^T @ dout,       dp = dropout(dout @ value^T)
        dbias  = p * (dp - sum over keys of p * dp + dlogsumexp)
        ds     = dbias * (1 - tanh(t)**2)
        dquery = scale * ds @ key,          dkey = scale * ds^T @ query

    The sink is one more score whose dp is 0.

    How it is computed: `refimpl.textbook.scaled_dot_product_attention_backward`.

    References
    ----------
    Dao et al., FlashAttention, arXiv:2205.14135, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [0.0]])
    >>> grads = scaled_dot_product_attention_backward(np.array([[1.0]]), np.array([[0.0]]), x, x)
    >>> grads.dquery, grads.dvalue
    (array([[0.25]]), array([[0.5],
           [0.5]]))
    """
    name = "scaled_dot_product_attention_backward"
    given = AttentionOptions(**options)
    _checks.flag(name, "return_logsumexp", return_logsumexp)
    arrays = {"query": query, "key": key, "value": value, "dout": dout}
    be = backend.of(query)
    call = _checked(be, name, arrays, given, dlogsumexp)
    grads = attend_backward(call, dout, dlogsumexp)
    shaped = (
        as_given(be, grad, array)
        for grad, array in zip(grads, (query, key, value, given.bias, given.sink), strict=True)
    )
    return be.rounded(AttentionGrads(*shaped), like=query)


@backend.op
@takes_attention_options("dropout_mask", "dropout_p")
def attention_weights(
    query: Array,
    key: Array,
    *,
    return_logsumexp: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Return how much weight every query gives to every key: the softmax of its scores.

    Parameters
    ----------
    query : (..., Hq, Lq, E) or (Lq, E)
    key : (..., Hkv, Lk, E) or (Lk, E)
    bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, sink, scale, softcap, return_logsumexp
        As for `scaled_dot_product_attention`.

    Returns
    -------
    weights : (..., Hq, Lq, Lk) or (Lq, Lk)
        A new array of the dtype, backend and device of `query`; 0 for hidden pairs. A row sums to 1, with a sink to
        less, and to 0 for a query that sees no key.
    logsumexp : (..., Hq, Lq) or (Lq,)
        With `return_logsumexp`, as for `scaled_dot_product_attention`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, dtype or backend.
    ValueError
        If a size or value does not fit.

    Notes
    -----
    The p of `scaled_dot_product_attention`, whose output is `p @ value`. All of it is held at once, as the result.

    How it is computed: `refimpl.textbook.attention_weights`.

    References
    ----------
    Those of `scaled_dot_product_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> attention_weights(np.zeros((2, 1)), np.zeros((2, 1)), is_causal=True)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    given = AttentionOptions(**options)
    _checks.flag("attention_weights", "return_logsumexp", return_logsumexp)
    be = backend.of(query)
    call = _checked(be, "attention_weights", {"query": query, "key": key}, given)
    weights, logsumexp = attention_probabilities(call)
    weights = be.rounded(weights, like=query)
    return (weights, logsumexp) if return_logsumexp else weights


@backend.op
@takes_attention_options("dropout_mask", "dropout_p")
def attention_weights_backward(
    dout: Array,
    query: Array,
    key: Array,
    *,
    return_logsumexp: bool = False,
    dlogsumexp: Array | None = None,
    **options: Any,
) -> AttentionWeightsGrads:
    """Return the gradients of `sum(dout * attention_weights(query, key, ...))`.

    Parameters
    ----------
    dout : (..., Hq, Lq, Lk) or (Lq, Lk)
        Of the shape, dtype and backend of the weights.
    query, key, bias, mask, is_causal, window, query_offset, query_lengths, key_lengths, sink, scale, softcap
        As for `attention_weights`.
    return_logsumexp, dlogsumexp
        As for `scaled_dot_product_attention_backward`.

    Returns
    -------
    AttentionWeightsGrads
        `dquery`, `dkey`, `dbias` and `dsink`, new arrays of the shapes and the dtype of the arguments, summed over the
        dimensions along which these were broadcast; 0 for hidden pairs.

    Raises
    ------
    TypeError, ValueError
        As `attention_weights`, and if `dout` or `dlogsumexp` does not have the shape or dtype of its result.

    Notes
    -----
    Those of `scaled_dot_product_attention_backward`, from `dp = dout` on.

    How it is computed: `refimpl.textbook.attention_weights_backward`.

    References
    ----------
    Those of `scaled_dot_product_attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> dout, x = np.array([[1.0, 0.0]]), np.array([[1.0], [0.0]])
    >>> attention_weights_backward(dout, np.array([[0.0]]), x).dquery
    array([[0.25]])
    """
    name = "attention_weights_backward"
    given = AttentionOptions(**options)
    _checks.flag(name, "return_logsumexp", return_logsumexp)
    be = backend.of(query)
    call = _checked(be, name, {"query": query, "key": key, "dout": dout}, given, dlogsumexp)
    dquery, dkey, _, dbias, dsink = attend_backward(call, dout, dlogsumexp)
    shaped = (
        as_given(be, g, a)
        for g, a in zip((dquery, dkey, dbias, dsink), (query, key, given.bias, given.sink), strict=True)
    )
    return be.rounded(AttentionWeightsGrads(*shaped), like=query)


def _checked(
    be: Backend, function: str, arrays: dict[str, Array], options: AttentionOptions, dlogsumexp: Array | None = None
) -> AttentionCall:
    """Check the arguments and bring them into the form that the tiles use."""
    scores = _checks.attention(function, arrays, options, dlogsumexp)
    return prepare(be, arrays, scores, options)
