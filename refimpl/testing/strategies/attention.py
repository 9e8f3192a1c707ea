"""Attention, in one piece, in heads with projections, and merged from parts.

H heads (Hq of the queries, Hkv of keys and values), L length, E features of a head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from .scoring import DROPOUT, HIDING, SCORES, Chosen, chosen_of, options_of, reduced
from .values import Array, Case, Limits, Source, among, fail, ints, limits_of, shapes, some

Strategy = st.SearchStrategy[Case]
Ints = Iterable[int]
Shape = tuple[int, ...]

_LENGTHS = (1, 2, 3, 4, 5, 6, 0)
_HEADS = ((1, 1), (2, 2), (2, 1), (4, 2), (3, 3), (3, 1))
_BATCHES = ((), (1,), (2,), (3,), (2, 3), (1, 2), (0,), (2, 0))


def scaled_dot_product_attention(
    *,
    lengths: Ints = _LENGTHS,
    keys: Ints | None = None,
    features: Ints = (1, 2, 3),
    value_features: Ints = (1, 2, 3, 4, 0),
    heads: Iterable[tuple[int, int]] = _HEADS,
    batches: Iterable[Shape | None] = (*_BATCHES, None),
    broadcast: bool = True,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    exclusive: Iterable[Iterable[str]] = (),
    windows: Iterable[Sequence[int | None]] | None = None,
    scales: Iterable[float] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `scaled_dot_product_attention`; the arrays are `(query, key, value)`.

    Parameters
    ----------
    lengths : ints
        How many queries; and how many keys, unless `keys` are given.
    keys : ints, optional
        How many keys.
    features, value_features : ints
        E and Ev.
    heads : pairs of ints
        Hq and Hkv: `((1, 1), (8, 8))` is for a kernel without grouped heads.
    batches : tuples of ints, or None
        Shapes of what comes before the heads; None is arrays of two dimensions, without heads.
    broadcast : bool
        Whether an array may have 1 for a size, or leave dimensions out, and broadcast to the others.
    dtypes, layouts
        As for `conv`.
    options : names, optional
        All of the op but `return_logsumexp`: `bias`, `mask`, `is_causal`, `window`, `query_offset`, `query_lengths`,
        `key_lengths`, `sink`, `scale`, `softcap`, `dropout_mask` and `dropout_p` (which comes with a `dropout_mask`).
    exclusive : groups of names, optional
        Options of which a case has one at most: `(("bias", "mask", "is_causal"),)` is for a kernel with one mask.
    windows : pairs of an int or None, optional
        The windows that are drawn; None is small ones, with sides of up to 2.
    scales : floats, optional
        The scales that are drawn; None is 1, 0.25, -0.5 and 0.
    values : str
        As for `conv`. A bias may hold -inf with any of them.

    Returns
    -------
    SearchStrategy of Case
        Up to six options at once; queries that see no key are common.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    op = "scaled_dot_product_attention"
    checked = limits_of(op, (*HIDING, *SCORES, *DROPOUT), dtypes, options, values, layouts, factors=3)
    sizes = (*_lengths(op, lengths, keys), ints(op, "features", features))
    ev = ints(op, "value_features", value_features, 0)
    chosen = chosen_of(op, exclusive, windows, scales)
    return _attention(checked, *sizes, ev, _head_pairs(op, heads), _batch_shapes(op, batches), broadcast, chosen)


def attention_weights(
    *,
    lengths: Ints = _LENGTHS,
    keys: Ints | None = None,
    features: Ints = (1, 2, 3),
    heads: Iterable[tuple[int, int]] = _HEADS,
    batches: Iterable[Shape | None] = (*_BATCHES, None),
    broadcast: bool = True,
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    exclusive: Iterable[Iterable[str]] = (),
    windows: Iterable[Sequence[int | None]] | None = None,
    scales: Iterable[float] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `attention_weights`; the arrays are `(query, key)`.

    Parameters
    ----------
    lengths, keys, features, heads, batches, broadcast, dtypes, exclusive, windows, scales, values, layouts
        As for `scaled_dot_product_attention`.
    options : names, optional
        Those of `scaled_dot_product_attention`, without dropout.

    Returns
    -------
    SearchStrategy of Case
        As for `scaled_dot_product_attention`.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    op = "attention_weights"
    checked = limits_of(op, (*HIDING, *SCORES), dtypes, options, values, layouts, factors=3)
    sizes = (*_lengths(op, lengths, keys), ints(op, "features", features))
    chosen = chosen_of(op, exclusive, windows, scales)
    return _attention(checked, *sizes, None, _head_pairs(op, heads), _batch_shapes(op, batches), broadcast, chosen)


@st.composite
def _attention(
    draw: st.DrawFn,
    limits: Limits,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    features: tuple[int, ...],
    value_features: tuple[int, ...] | None,
    heads: tuple[tuple[int, int], ...],
    batches: tuple[Shape | None, ...],
    broadcast: bool,
    chosen: "Chosen",
) -> Case:
    """Draw attention, or without value features its weights."""
    source = Source(draw, limits)
    rows, keys, batch = source.size(lengths), source.size(key_lengths), source.size(batches)
    e = source.pick(features)
    widths = [e, e] if value_features is None else [e, e, source.size(value_features)]
    count = len(widths)
    hq, hkv = (1, 1) if batch is None else source.pick(heads)
    if batch is None:
        shapes: list[Shape] = [(rows,), *[(keys,)] * (count - 1)]
        scores: Shape = (rows, keys)
    else:
        leading = _leading(source, batch, count, broadcast)
        shapes = [(*lead, *end) for lead, end in zip(leading, [(hq, rows), *[(hkv, keys)] * (count - 1)], strict=True)]
        scores = (*batch, hq, rows, keys)
    arrays = tuple(source.array(*shape, width) for shape, width in zip(shapes, widths, strict=True))
    return source.case(arrays, options_of(source, scores, batch or (), hq, broadcast, chosen))


def multi_head_attention(
    *,
    lengths: Ints = _LENGTHS,
    keys: Ints | None = None,
    features: Ints = (1, 2, 3),
    heads: Iterable[tuple[int, int]] = _HEADS,
    batches: Iterable[Shape] = _BATCHES,
    broadcast: bool = True,
    projections: Iterable[str] = ("none", "packed", "separate"),
    dtypes: Iterable[str] = ("float64",),
    options: Iterable[str] | None = None,
    exclusive: Iterable[Iterable[str]] = (),
    windows: Iterable[Sequence[int | None]] | None = None,
    scales: Iterable[float] | None = None,
    values: str = "normal",
    layouts: Iterable[str] = ("contiguous",),
) -> Strategy:
    """Draw calls of `multi_head_attention`; the arrays are `(query, key, value, params)`.

    Parameters
    ----------
    lengths, keys, broadcast, dtypes, exclusive, windows, scales, values, layouts
        As for `scaled_dot_product_attention`.
    features : ints
        Features of a head; with separate projections, also those of query, key, value and output.
    heads : pairs of ints
        `num_heads` and `num_kv_heads`; these are equal where `num_kv_heads` is not among the options or projections
        are packed.
    batches : tuples of ints
        Shapes of what comes before the length.
    projections : names
        `"none"` (`params` is None), `"packed"` (`in_proj_weight`) and `"separate"` (`q_proj_weight` and so on).
    options : names, optional
        Those of `scaled_dot_product_attention`, `num_kv_heads` and `add_zero_attn`, and the parts of `params` that may
        be missing: `in_proj_bias`, `bias_k` (which comes with `bias_v`) and `out_proj.bias`.

    Returns
    -------
    SearchStrategy of Case
        `num_heads` is always among the options.

    Raises
    ------
    ValueError
        If a parameter is empty or names what there is not.
    """
    op = "multi_head_attention"
    parts = ("in_proj_bias", "bias_k", "out_proj.bias")
    known = (*HIDING, *SCORES, *DROPOUT, "num_kv_heads", "add_zero_attn", *parts)
    return _multi_head(
        limits_of(op, known, dtypes, options, values, layouts, factors=6),
        *_lengths(op, lengths, keys),
        ints(op, "features", features),
        _head_pairs(op, heads),
        shapes(op, "batches", batches),
        broadcast,
        among(op, "projections", some(op, "projections", projections), ("none", "packed", "separate")),
        chosen_of(op, exclusive, windows, scales),
    )


@st.composite
def _multi_head(
    draw: st.DrawFn,
    limits: Limits,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    features: tuple[int, ...],
    heads: tuple[tuple[int, int], ...],
    batches: tuple[Shape, ...],
    broadcast: bool,
    projections: tuple[str, ...],
    chosen: "Chosen",
) -> Case:
    source = Source(draw, limits)
    rows, keys, batch = source.size(lengths), source.size(key_lengths), source.size(batches)
    form = source.pick(projections)
    hq, hkv = source.pick(heads)
    if form == "packed" or "num_kv_heads" not in limits.options:
        hkv = hq
    e, ev = source.pick(features), source.pick(features)
    inner = [hq * e, hkv * e, hkv * ev]
    joined = hq * ev
    if form == "packed":
        inner, joined = [hq * e] * 3, hq * e
    widths = [source.pick(features) for _ in range(3)] if form == "separate" else inner
    params = None if form == "none" else _parameters(source, form, widths, inner, joined, features)
    options: dict[str, Any] = {"num_heads": hq}
    if hkv != hq or source.has("num_kv_heads", 2):
        options["num_kv_heads"] = hkv
    appended = int(params is not None and "bias_k" in params)
    if source.has("add_zero_attn", 2):
        options["add_zero_attn"] = not source.rarely()
        appended += options["add_zero_attn"]
    shapes = zip(_leading(source, batch, 3, broadcast), (rows, keys, keys), widths, strict=True)
    arrays = tuple(source.array(*lead, length, width) for lead, length, width in shapes)
    options |= options_of(source, (*batch, hq, rows, keys), batch, hq, broadcast, chosen, appended)
    return source.case((*arrays, params), options)


def _parameters(
    source: Source, form: str, widths: list[int], inner: list[int], joined: int, features: tuple[int, ...]
) -> dict[str, Array]:
    """Draw projections of query, key and value from `widths` to `inner` features, and of `joined` heads."""
    out = joined if form == "packed" else source.pick(features)
    shapes: dict[str, Shape] = {"in_proj_weight": (sum(inner), widths[0])}
    if form == "separate":
        shapes = {f"{n}_proj_weight": (d, e) for n, d, e in zip("qkv", inner, widths, strict=True)}
    if source.has("in_proj_bias", 2):
        shapes["in_proj_bias"] = (sum(inner),)
    if source.has("bias_k", 2):
        shapes |= {"bias_k": (1, 1, inner[1]), "bias_v": (1, 1, inner[2])}
    shapes["out_proj.weight"] = (out, joined)
    if source.has("out_proj.bias", 2):
        shapes["out_proj.bias"] = (out,)
    return {name: source.array(*shape) for name, shape in shapes.items()}


def _lengths(op: str, lengths: Ints, keys: Ints | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check how many queries and keys there may be."""
    queries = ints(op, "lengths", lengths, 0)
    return queries, queries if keys is None else ints(op, "keys", keys, 0)


def _head_pairs(op: str, heads: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    result = some(op, "heads", heads)
    for pair in result:
        if len(pair) != 2 or min(pair) < 1 or pair[0] % pair[1]:
            fail(op, "heads", "be pairs of ints, the first a multiple of the second", repr(pair))
    return result


def _batch_shapes(op: str, batches: Iterable[Shape | None]) -> tuple[Shape | None, ...]:
    """Check shapes, or None for arrays without heads."""
    result = some(op, "batches", batches)
    if any(batch is not None for batch in result):
        shapes(op, "batches", [batch for batch in result if batch is not None])
    return result


def _leading(source: Source, batch: Shape, count: int, broadcast: bool) -> list[Shape]:
    """Draw the batch dimensions of so many arrays, of which one has all."""
    full = source.pick(range(count))
    return [batch if i == full else reduced(source, batch, broadcast) for i in range(count)]
