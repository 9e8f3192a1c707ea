"""How far rounding may move the results of each op, by analysis: one function an op, beside each other.

`models` says how errors add up; `windows` has the convolutions and poolings. All is computed in float64, by the ops
themselves, where the arrays lie.
"""

from .models import MODELS, Arithmetic, Model, can_be_squared
from .windows import ANALYSES

__all__ = ["ANALYSES", "MODELS", "Arithmetic", "Model", "can_be_squared"]
