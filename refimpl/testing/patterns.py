"""What wrong elements have in common: where they are, and what would explain them. All is found by looking."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

import refimpl

from .. import backend
from .arrays import viewed
from .trees import leaves

Numpy = np.ndarray[Any, Any]
Others = Callable[[], list[tuple[str, dict[str, Numpy]]]]

_ATTENTION = {
    "dkey": ("head", "key", "feature"),
    "dvalue": ("head", "key", "feature"),
    "dbias": ("head", "query", "key"),
    "weights": ("head", "query", "key"),
    "logsumexp": ("head", "query"),
    "": ("head", "query", "feature"),
}
_SPATIAL = {1: ("column",), 2: ("row", "column"), 3: ("plane", "row", "column")}


def patterns_of(
    name: str, got: Numpy, due: Numpy, errors: Numpy, bound: Numpy, f: Any, others: Others
) -> tuple[str, ...]:
    """Return a line for everything that the wrong elements of a result have in common.

    `errors` are in units of the bound; `others` are references of other calls, which might have been meant.
    """
    got, due = got.astype(np.float64), due.astype(np.float64)
    wrong, axes = ~(errors <= 1), axes_of(f, name, due.ndim)
    lines = [*_not_finite(got, due)]
    if not lines:
        lines += [*_explained(got, due, bound, wrong, axes), *_by_another_call(name, got, due, bound, others)]
    return (*lines, *_places(wrong, axes))


def axes_of(f: Any, name: str, rank: int) -> tuple[str, ...]:
    """Return what the dimensions of a result are called."""
    op = getattr(f, "__name__", "")
    if "attention" in op and "multi_head" not in op and "merge" not in op:
        kind = "weights" if op == "attention_weights" and name in ("", "result 0") else name
        last = _ATTENTION.get("logsumexp" if name == "result 1" else kind, _ATTENTION[""])[-rank:]
    elif op == "multi_head_attention" or name in ("dquery", "dkey", "dvalue"):
        last = ("token", "feature")[-rank:]
    elif name == "dweight":
        last = ("output channel", "input channel", *(f"tap {s}" for s in _SPATIAL.get(rank - 2, ())))[-rank:]
    elif ("conv" in op or "pool" in op) and name in ("", "dx", "result 0", "result 1"):
        last = ("channel", *_SPATIAL.get(rank - 2, ()))[-rank:]
    else:
        last = ()
    return (*(f"dimension {i}" if rank - len(last) > 1 else "batch entry" for i in range(rank - len(last))), *last)


def references(
    f: Callable[..., Any], arrays: tuple[Any, ...], options: Mapping[str, Any]
) -> list[tuple[str, dict[str, Numpy]]]:
    """Return the results of other calls in float64, by name, each with what it would mean; without failing ones."""

    def wide(array: Any) -> Any:
        be = backend.find(array)
        if be is None:
            return array
        copy = be.to_numpy(array)
        return copy.astype(np.float64) if be.is_floating(array) else copy

    given = backend.mapped(wide, viewed("compare", {"arrays": arrays, "options": dict(options)}))
    found = []
    for text, other_arrays, other_options in _other_calls(f, given["arrays"], given["options"]):
        try:
            results = f(*other_arrays, **other_options)
            found.append((text, {n: _folded(n, r, arrays) for n, r in leaves(results)}))
        except (TypeError, ValueError):
            continue
    return found


def _folded(name: str, result: Any, arrays: tuple[Any, ...]) -> Numpy:
    """Return a result as the call itself has it: gradients of keys that were repeated for each query head add up."""
    found = backend.to_numpy(result)
    place = {"dkey": 2, "dvalue": 3}.get(name)
    due = tuple(arrays[place].shape) if place is not None and len(arrays) == 4 else found.shape
    if due == found.shape or found.ndim < 3:
        return found
    heads = due[-3]
    folded: Numpy = found.reshape(*found.shape[:-3], found.shape[-3] // heads, heads, *found.shape[-2:]).sum(-4)
    return folded


def _other_calls(
    f: Any, arrays: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Yield calls that may have been computed instead: what they mean, their arrays and options."""
    op = getattr(f, "__name__", "")
    for name, value in options.items():
        if value is not None and value is not False:
            yield f"without {name}", arrays, {n: v for n, v in options.items() if n != name}
    if "attention" in op and "merge" not in op:
        yield from _other_attention(op, arrays, options)
    if "conv" in op:
        place = 2 if op.endswith("_backward") else 1
        weight = arrays[place]
        flipped = weight[(..., *(slice(None, None, -1),) * (weight.ndim - 2))]
        yield "with the kernel flipped", (*arrays[:place], flipped, *arrays[place + 1 :]), options
    if op.startswith("avg_pool"):
        other = not options.get("count_include_pad", True)
        yield f"with count_include_pad={other}", arrays, options | {"count_include_pad": other}
    for kind, bits in (("TF32", 13), ("bfloat16", 16)):
        rounded = tuple(_rounded(a, bits) if backend.is_array(a) and a.dtype.kind == "f" else a for a in arrays)
        yield f"on arguments rounded to {kind}", rounded, options


def _other_attention(
    op: str, arrays: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Yield other calls of attention: other alignments and masks."""
    first = 1 if op.endswith("_backward") else 0
    query, key, *values = arrays[first:]
    queries, keys = int(query.shape[-2]), int(key.shape[-2])
    offset = options.get("query_offset", 0)
    hidden = any(options.get(name) is not None for name in ("is_causal", "window"))
    if isinstance(offset, str) and not any(options.get(name) is not None for name in ("query_lengths", "key_lengths")):
        offset = keys - queries
    if hidden and isinstance(offset, int):
        for text, other in (("their ends", keys - queries), ("their beginnings", 0)):
            if other != offset:
                yield f"with queries and keys aligned at {text}", arrays, options | {"query_offset": other}
        for by in (-1, 1):
            yield (
                f"with query_offset={offset + by}: a mask off by one?",
                arrays,
                options | {"query_offset": offset + by},
            )
    if not options.get("is_causal"):
        yield "with is_causal=True", arrays, options | {"is_causal": True}
    if options.get("mask") is not None:
        yield "with the mask inverted", arrays, options | {"mask": ~options["mask"]}
    if options.get("scale") is None:
        yield "with scale=1", arrays, options | {"scale": 1.0}
    if op == "scaled_dot_product_attention_backward" and options.get("dlogsumexp") is None:
        dout, inner = arrays[0], {n: v for n, v in options.items() if n not in ("dlogsumexp", "return_logsumexp")}
        out = refimpl.scaled_dot_product_attention(query, key, *values, **inner)
        mean = (dout * out).sum(-1)
        yield "without the row mean in ds = p (dp - mean)", arrays, options | {"dlogsumexp": mean}
    if query.ndim > 2 and key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        tiled = (np.concatenate([a] * times, axis=-3) for a in (key, *values))
        yield (
            "with key head `h % Hkv` for query head h, in place of `h // (Hq / Hkv)`",
            (*arrays[:first], query, *tiled),
            options,
        )


def _rounded(array: Numpy, bits: int) -> Numpy:
    """Return the numbers of a float64 array rounded to float32 without its last bits, ties to even."""
    whole = array.astype(np.float32).view(np.uint32)
    whole = (whole + np.uint32((1 << (bits - 1)) - 1) + ((whole >> np.uint32(bits)) & np.uint32(1))) >> np.uint32(bits)
    return (whole << np.uint32(bits)).view(np.float32).astype(np.float64)


def _close(got: Numpy, other: Numpy, bound: Numpy) -> bool:
    """Return whether another reference explains what came, as the bound explains rounding (with room)."""
    if got.shape != other.shape:
        return False
    with np.errstate(all="ignore"):
        near = np.abs(got - other) <= 4 * bound + 1e-6 * np.abs(other)
    return bool((near | (got == other) | (np.isnan(got) & np.isnan(other))).all())


def _not_finite(got: Numpy, due: Numpy) -> Iterator[str]:
    for text, test in (("NaN", np.isnan), ("inf", np.isinf)):
        extra, lacking = int((test(got) & ~test(due)).sum()), int((test(due) & ~test(got)).sum())
        if extra:
            yield f"{extra} elements are {text} that should not be"
        if lacking:
            yield f"{lacking} elements should be {text}"


def _explained(got: Numpy, due: Numpy, bound: Numpy, wrong: Numpy, axes: tuple[str, ...]) -> Iterator[str]:
    """Yield what transformation of the reference equals what came."""
    if not np.any(got):
        yield "every element is 0"
        return
    for which, subset in (("every element is", np.ones_like(wrong)), ("the wrong elements are", wrong)):
        squares = float(np.sum(due[subset] ** 2))
        factor = float(np.sum(got[subset] * due[subset])) / squares if squares else 1.0
        if int(subset.sum()) > 1 and _close(got[subset], factor * due[subset], max(1, abs(factor)) * bound[subset]):
            yield f"{which} {_times(factor)}"
            return
    if due.ndim > 1 and due.shape[-1] == due.shape[-2] > 1 and _close(got, np.swapaxes(due, -1, -2), bound):
        yield f"equal to the reference with {axes[-2]} and {axes[-1]} transposed"
    for axis, name in enumerate(axes):
        size = due.shape[axis]
        if size > 2:
            ahead, behind = [np.moveaxis(a, axis, 0)[s] for a, s in ((due, slice(1, None)), (due, slice(None, -1)))]
            room = np.moveaxis(bound, axis, 0)[1:]
            if _close(np.moveaxis(got, axis, 0)[:-1], ahead, room) or _close(
                np.moveaxis(got, axis, 0)[1:], behind, room
            ):
                yield f"equal to the reference shifted by one {name}"
        if 1 < size <= 64 and (order := _permutation(got, due, bound, axis)) is not None:
            yield f"equal to the reference with each {name} in another place: that of {order}"


def _times(factor: float) -> str:
    if abs(factor + 1) < 1e-3:
        return "the negative of the reference"
    inverse = 1 / factor if factor else math.inf
    if abs(inverse) > 1.5 and abs(inverse - round(inverse)) < 1e-3 * abs(inverse):
        return f"1/{round(inverse)} of the reference: a missing scale, or one too many?"
    return f"{factor:.6g} times the reference"


def _permutation(got: Numpy, due: Numpy, bound: Numpy, axis: int) -> list[int] | None:
    """Return which slice of the reference each slice equals, if all are found, each once, and in another order."""
    came, were, room = (np.moveaxis(a, axis, 0) for a in (got, due, bound))
    order = []
    for part, own in zip(came, room, strict=True):
        at = next((i for i, other in enumerate(were) if i not in order and _close(part, other, own)), None)
        if at is None:
            return None
        order.append(at)
    return None if order == sorted(order) else order


def _by_another_call(name: str, got: Numpy, due: Numpy, bound: Numpy, others: Others) -> Iterator[str]:
    for text, results in others():
        other = results.get(name)
        if (
            other is not None
            and other.shape == due.shape
            and not _close(due, other, bound)
            and _close(got, other, bound)
        ):
            yield f"equal to the reference {text}"


def _places(wrong: Numpy, axes: tuple[str, ...]) -> Iterator[str]:
    """Yield where wrong elements are, if that is not everywhere."""
    if wrong.ndim == 0 or wrong.all() or int(wrong.sum()) == 1:
        return
    parts, held = [], 1
    for axis, name in enumerate(axes):
        hit = np.flatnonzero(wrong.any(axis=tuple(a for a in range(wrong.ndim) if a != axis)))
        held *= len(hit)
        if len(hit) < wrong.shape[axis]:
            parts.append(_ranges(hit, wrong.shape[axis], name))
    if parts:
        share = int(wrong.sum()) / held
        yield f"wrong in {', '.join(parts)}" + ("" if share > 0.9 else f" ({share:.0%} of the elements there)")
    if wrong.ndim > 1 and axes[-2:] == ("query", "key"):
        at = np.argwhere(wrong)
        steps = np.unique(at[:, -1] - at[:, -2])
        if len(steps) == 1 < len(at):
            yield f"all on the diagonal key = query + {int(steps[0])}: where a causal mask's edge lies?"


def _ranges(hit: Numpy, size: int, name: str) -> str:
    """Return indices as a text: "rows 128 to 191", "the last column", "rows 3, 7 and 9"."""
    if len(hit) == 1:
        return f"the last {name}" if hit[0] == size - 1 > 0 else f"{name} {int(hit[0])}"
    breaks = np.flatnonzero(np.diff(hit) > 1)
    starts, ends = hit[np.r_[0, breaks + 1]], hit[np.r_[breaks, len(hit) - 1]]
    steps = np.unique(np.diff(hit))
    plural = f"{name.removesuffix('y')}ies" if name.endswith(("query", "entry")) else f"{name}s"
    if len(steps) == 1 and steps[0] > 1 and len(hit) > 2:
        return f"every {int(steps[0])}th {name} from {int(hit[0])} on"
    if len(starts) > 4:
        return f"{len(hit)} of {size} {plural}"
    spans = [f"{int(a)} to {int(b)}" if a != b else f"{int(a)}" for a, b in zip(starts, ends, strict=True)]
    return f"{plural} {', '.join(spans[:-1])} and {spans[-1]}" if len(spans) > 1 else f"{plural} {spans[0]}"
