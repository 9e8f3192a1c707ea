"""The calls that a kernel is tried with: drawn by the strategies, at sizes of the strategies and of real nets."""

import inspect
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, find, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from .. import strategies
from ..strategies import Case

_VALUES = ("normal", "integers", "positive", "large", "cancelling", "equal", "outlier")
_NEAR = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257)  # multiples of 16, 64 and 128, and beside
_HEAD_SIZES = (64, 80, 96, 128, 256)
_REAL: Mapping[str, dict[str, Any]] = {
    "scaled_dot_product_attention": {
        "lengths": _NEAR, "features": _HEAD_SIZES, "value_features": _HEAD_SIZES, "batches": ((1,), (2,)),
        "heads": ((2, 2), (4, 1), (6, 2)),
    },
    "attention_weights": {
        "lengths": _NEAR, "features": _HEAD_SIZES, "batches": ((1,), (2,)), "heads": ((2, 2), (4, 1), (6, 2)),
    },
    "multi_head_attention": {"lengths": _NEAR, "batches": ((1,), (2,))},
    "conv": {
        "ranks": (2,), "sizes": (7, 14, 28, 56), "kernels": (1, 3, 7), "channels": (3, 16, 64), "batches": ((1,),),
    },
    "conv_transpose": {
        "ranks": (2,), "sizes": (7, 14, 28), "kernels": (2, 4), "channels": (16, 32), "batches": ((1,),),
    },
    "max_pool": {"ranks": (2,), "sizes": (14, 56, 112), "kernels": (2, 3), "batches": ((1, 8), (2, 3))},
    "avg_pool": {"ranks": (2,), "sizes": (14, 56, 112), "kernels": (2, 3, 7), "batches": ((1, 8), (2, 3))},
    "adaptive_avg_pool": {"ranks": (2,), "sizes": (7, 14, 56), "batches": ((1, 8), (2, 3))},
}  # fmt: skip
"""Sizes of real nets: head sizes, lengths around multiples of tiles, the shapes of a ResNet."""


def strategies_of(
    op: str, dtype: str, options: Iterable[str] | None, aims: Mapping[str, Any]
) -> list[st.SearchStrategy[Case]]:
    """Return the strategies that cases are drawn from in turn: small sizes, with every kind of values, and real ones.

    Raises
    ------
    ValueError
        If an option or an aim names what there is not.
    """
    draw, common = strategies.EVERY_OP[op], dict[str, Any](dtypes=(dtype,))
    if "options" in inspect.signature(draw).parameters:
        common["options"] = options
    elif options:
        raise ValueError(f"conformance: options must be none, as {op} has none; got {', '.join(options)}")
    kinds = (aims["values"],) if "values" in aims else _VALUES
    given_aims = {name: aim for name, aim in aims.items() if name != "values"}
    small = [draw(**common, **given_aims, values=kind) for kind in kinds]
    if op not in _REAL or given_aims:
        return small
    return [*small, draw(**common, **_REAL[op], values=kinds[0]), draw(**common, **_REAL[op], values=kinds[-1])]


def drawn(strategy: st.SearchStrategy[Case], count: int, number: int) -> list[Case]:
    """Return so many cases of a strategy; the number is the seed."""
    found: list[Case] = []
    if count < 1:
        return found

    @seed(number)
    @_settings(count)
    @given(strategy)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[:count]


def smallest(strategy: st.SearchStrategy[Case], fails: Callable[[Case], bool], number: int) -> Case | None:
    """Return the simplest case that is found to fail, None if drawing anew finds none."""
    try:
        return find(strategy, fails, settings=_settings(200, shrink=True), random=random.Random(number))
    except HypothesisException:  # none is found, or the kernel does not fail the same way twice
        return None


def _settings(count: int, shrink: bool = False) -> settings:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    return settings(
        max_examples=count,
        phases=phases,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
