"""How far rounding may move the gradients of attention, tile by tile: see `attention`."""

from typing import Any, NamedTuple

from ..._engine.softmax import dropped
from ..._engine.visibility import AttentionCall, accumulate, as_given, by_heads, slice_of
from ..._grads import AttentionGrads
from ...backend import Array, Tile
from .models import Model
from .softmax import EXACT, InputErrors, Rows, call_of, output_of, rows_of


def errors_of_gradients(
    model: Model,
    function: str,
    result: AttentionGrads,
    arrays: dict[str, Array],
    options: dict[str, Any],
    inputs: InputErrors = EXACT,
) -> list[Array | None]:
    """Return the errors of the gradients of query, key, value, bias and sink, None for those that are not there."""
    be, xp = model.be, model.be.xp
    options = {name: option for name, option in options.items() if name != "return_logsumexp"}
    dlse = options.pop("dlogsumexp", None)
    call = call_of(model, function, arrays, options)
    dout = by_heads(be, model.clean(arrays["dout"]), call.space)
    dlse = None if dlse is None else xp.reshape(model.clean(dlse), (*call.space, 1))
    arguments = (call.query, call.key, call.value, call.bias, call.sink)
    # Per gradient: errors of its terms, sizes of its terms, and their number.
    sums = [None if a is None else [be.full(tuple(a.shape), 0, xp.float64) for _ in range(3)] for a in arguments]

    def work(*tile: slice) -> list[tuple[Tile, tuple[Array, ...]] | None]:
        keys = call.visible_keys(tile)
        if keys is None:
            return []
        columns, own = (*tile[:-1], keys), (*tile, call.own_keys(keys))
        found = _gradients_of_tile(model, call, dout, dlse, tile, keys, inputs)
        places = (tile, columns, columns, own, tile)
        return [None if part is None else (at, part) for at, part in zip(places, found, strict=True)]

    def collect(_: Tile, found: list[tuple[Tile, tuple[Array, ...]] | None]) -> None:
        for totals, part in zip(sums, found, strict=False):
            if totals is not None and part is not None:
                for total, array in zip(totals, part[1], strict=True):
                    accumulate(be, total, part[0], array)

    be.run(work, call.tiles(20, gradients=6), collect)
    errors: list[Array | None] = []
    given = (arrays["query"], arrays["key"], arrays.get("value"), options.get("bias"), options.get("sink"))
    for gradient, totals, argument in zip(result, sums, given, strict=True):
        if gradient is None or totals is None:
            errors.append(None)
            continue
        terms, sizes, count = (as_given(be, total, argument) for total in totals)
        errors.append(terms + model.of_sum(gradient, model.grown(sizes, terms), count))
    return errors


class _OfScores(NamedTuple):
    """The gradient ds of the scores of a tile, (..., rows, keys), and its errors."""

    ds: Array
    pulled: Array
    """What an error of D does to ds: the weights times the slope of the softcap."""
    own: Array
    """Each pair's own error."""
    mean: Array
    """(..., rows, 1): D, the mean of dp."""
    of_mean: Array
    """(..., rows, 1): its error, which all pairs of a row share."""
    common: Array
    """(..., rows, 1): the relative error that all pairs of a row share."""
    each: Array
    """The error of each element, all three together."""
    bias: tuple[Array, Array]
    """The error of the gradient of the bias, and its size."""


def _gradients_of_tile(
    model: Model,
    call: AttentionCall,
    dout: Array,
    dlse: Array | None,
    tile: Tile,
    keys: slice,
    inputs: InputErrors,
) -> list[tuple[Array, ...] | None]:
    """Return for each gradient: the errors of the terms that the rows add, their sizes, and their number."""
    xp, size = call.be.xp, model.size
    rows = rows_of(model, call, tile, keys, inputs)
    of = _of_scores(model, call, dout, dlse, tile, keys, rows, inputs)
    seen = xp.astype(xp.broadcast_to(rows.p > 0, of.ds.shape), rows.p.dtype)
    terms = (xp.sum(seen, axis=-1, keepdims=True), xp.matrix_transpose(xp.sum(seen, axis=-2, keepdims=True)))
    dbias = (
        None if call.bias is None else tuple(a[..., : call.own_keys(keys).stop - keys.start] for a in (*of.bias, seen))
    )
    dsink = None
    if rows.sink is not None:
        p_sink, of_sink = rows.sink
        product, of_mean = p_sink * of.mean, size(p_sink) * of.of_mean
        dsink = (
            of_mean + (of_sink + of.common) * model.grown(size(product), of_mean),
            size(product),
            1.0 + 0.0 * product,
        )
    summed = [slice_of(array, tile) for array in ((call.query,) if call.value is None else (call.query, dout))]
    growth = model.of_equal_rows(*summed)  # of the errors of sums over the rows of the tile
    dquery, (of_dk, dk) = _of_query_and_key(model, call, tile, keys, of, seen, inputs)
    dvalue = None
    if call.value is not None:
        of_dv, dv = _of_value(model, call, dout, tile, rows, of.common, inputs)
        dvalue = (growth * of_dv, dv, terms[1])
    return [(*dquery, terms[0]), (growth * of_dk, dk, terms[1]), dvalue, dbias, dsink]


def _of_scores(
    model: Model,
    call: AttentionCall,
    dout: Array,
    dlse: Array | None,
    tile: Tile,
    keys: slice,
    rows: Rows,
    inputs: InputErrors,
) -> _OfScores:
    """Return `ds = p (dp - D)` and its errors, from those of p, of dp and of D."""
    xp, size = call.be.xp, model.size
    p, sp, common = rows.p, size(rows.p), rows.common + rows.stored
    if call.value is None:
        dp, of_dp, of_mean = slice_of(dout, (*tile, keys)), 0.0 * p, 0.0 * common
    else:
        dp, of_dp, of_mean = _of_weights(model, call, slice_of(dout, tile), tile, keys, rows, inputs)
    dp, of_dp = xp.where(p > 0, dp, 0.0), xp.where(p > 0, of_dp, 0.0)
    products = p * dp
    mean, sizes = xp.sum(products, axis=-1, keepdims=True), xp.sum(size(products), axis=-1, keepdims=True)
    # The mean of dp, weighted: shifting all dp by their mean changes none of the errors but those of its sum.
    in_turn = xp.sum(sp * (rows.own * model.grown(size(dp), of_dp) + of_dp), axis=-1, keepdims=True)
    in_turn = in_turn + common * model.grown(size(mean), in_turn)
    one_sign = xp.sum(xp.abs(products), axis=-1, keepdims=True)
    of_mean = model.either(of_mean, in_turn + model.of_sum(one_sign, model.grown(sizes, in_turn), rows.count))
    if dlse is not None:
        less = dlse[(*tile, ...)]
        mean = mean - less
        of_mean = of_mean + model.relative(1.0, xp.abs(mean) + xp.abs(less))
    centred = dp - mean
    apart = of_dp + model.relative(1.0, xp.abs(dp) + xp.abs(mean))
    ds = p * centred
    own = sp * (rows.own * model.grown(size(centred), apart + of_mean) + apart)
    if model.name == "worst":
        own = own * (1.0 + rows.own + common) + sp * (rows.own + common) * of_mean
    of_bias = size(ds)
    each = own + sp * of_mean + common * of_bias
    bias, pulled = (each, of_bias), p
    if rows.slope is not None and rows.of_slope is not None:
        of_slope = rows.of_slope * model.grown(of_bias, each)
        own, each = size(rows.slope) * own + of_slope, size(rows.slope) * each + of_slope
        ds, pulled = ds * rows.slope, p * rows.slope
    return _OfScores(ds, pulled, own, mean, of_mean, common, each, bias)


def _of_weights(
    model: Model, call: AttentionCall, do: Array, tile: Tile, keys: slice, rows: Rows, inputs: InputErrors
) -> tuple[Array, Array, Array]:
    """Return dp, the gradient of the weights, its error, and that of its mean taken as `sum dout out`."""
    xp, transpose, size = call.be.xp, call.be.xp.matrix_transpose, model.size
    columns = (*tile[:-1], keys)
    v = slice_of(call.value, columns)
    out, of_out = output_of(model, call, rows, columns, inputs)
    of_out = of_out + size(model.arithmetic.u_out * out)
    features = float(v.shape[-1])
    plain = do @ transpose(v)
    of_plain = model.of_sum(plain, size(do) @ transpose(size(v)), features)
    of_mean = size(do) * of_out
    if inputs.dout is not None and inputs.value is not None:
        of_do, of_v = slice_of(inputs.dout, tile), slice_of(inputs.value, columns)
        of_plain = of_plain + of_do @ transpose(model.grown(size(v), of_v)) + size(do) @ transpose(of_v)
        of_mean = of_mean + of_do * model.grown(size(out), of_out)
    dp = dropped(call, tile, keys, plain)
    of_dp = dropped(call, tile, keys, of_plain)
    if model.name == "expected":
        of_dp = dropped(call, tile, keys, of_dp)
    products = xp.sum(size(do) * model.grown(size(out), of_out), axis=-1, keepdims=True)
    of_mean = xp.sum(of_mean, axis=-1, keepdims=True)
    of_mean = of_mean + model.of_sum(xp.sum(do * out, axis=-1, keepdims=True), products, features)
    return dp, of_dp + model.relative(1.0, dp), of_mean


def _of_query_and_key(
    model: Model,
    call: AttentionCall,
    tile: Tile,
    keys: slice,
    of: _OfScores,
    seen: Array,
    inputs: InputErrors,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return the errors of the terms of `scale ds k` and `scale ds^T q`, and their sizes."""
    transpose, size = call.be.xp.matrix_transpose, model.size
    q, k, factor = slice_of(call.query, tile), slice_of(call.key, (*tile[:-1], keys)), model.size_of(call.scale)
    sizes, off = size(of.ds), model.grown(size(of.ds), of.each)
    of_q, of_k = factor * (sizes @ size(k)), factor * (transpose(sizes) @ size(q))
    rounded = model.half * off + model.half_floor * seen if model.half else 0.0
    if model.name == "expected":
        dquery = factor * ((of.own + rounded) @ size(k) + of.of_mean * size(of.pulled @ k))
    else:
        dquery = factor * ((of.each + rounded) @ size(k))
    dquery = dquery + of.common * size(call.scale * (of.ds @ k)) + model.roundings(2.0) * of_q
    dkey = factor * (transpose(of.each + rounded) @ size(q)) + model.roundings(2.0) * of_k
    if inputs.key is not None and inputs.query is not None:
        dquery = dquery + factor * (off @ slice_of(inputs.key, (*tile[:-1], keys)))
        dkey = dkey + factor * (transpose(off) @ slice_of(inputs.query, tile))
    return (dquery, of_q), (dkey, of_k)


def _of_value(
    model: Model, call: AttentionCall, dout: Array, tile: Tile, rows: Rows, common: Array, inputs: InputErrors
) -> tuple[Array, Array]:
    """Return the errors of the terms of `p^T dout`, and their sizes."""
    transpose, size = call.be.xp.matrix_transpose, model.size
    do, kept = slice_of(dout, tile), size(rows.kept)
    relative = rows.own + common
    terms = kept * (relative + model.half * (1.0 + relative) if model.half else relative)
    if model.half_floor:
        terms = terms + model.half_floor * call.be.xp.astype(rows.p > 0, terms.dtype)
    error = transpose(terms) @ size(do)
    if inputs.dout is not None:
        error = error + transpose(model.grown(kept, terms)) @ slice_of(inputs.dout, tile)
    return error, transpose(kept) @ size(do)
