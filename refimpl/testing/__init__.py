"""What the author of a kernel needs to check it: numeric gradients, error bounds, and strategies for Hypothesis.

`refimpl.testing.strategies` is imported by itself, as it needs Hypothesis.
"""

from .bounds import assert_matches, error_bound
from .gradients import check_gradients

__all__ = ["assert_matches", "check_gradients", "error_bound"]
