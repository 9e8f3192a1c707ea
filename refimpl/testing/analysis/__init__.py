"""How far rounding may move the results of each op, by analysis: one function an op, beside each other.

`models` says how errors add up; `windows` has the convolutions and poolings, `attention`, `multihead` and `merging` the
attention ops. All is computed in float64, by the ops themselves and their engine, where the arrays lie.
"""

from collections.abc import Callable
from typing import Any

from . import attention, merging, multihead, windows
from .models import MODELS, Arithmetic, Model, can_be_squared

ANALYSES: dict[Callable[..., Any], Callable[..., Any]] = {
    **windows.ANALYSES,
    **attention.ANALYSES,
    **multihead.ANALYSES,
    **merging.ANALYSES,
}
"""The analysis of each op."""

__all__ = ["ANALYSES", "MODELS", "Arithmetic", "Model", "can_be_squared"]
