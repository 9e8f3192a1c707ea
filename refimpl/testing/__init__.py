"""What the author of a kernel needs to check it: numeric gradients, error bounds, and strategies for Hypothesis.

`refimpl.testing.strategies` is imported by itself, as it needs Hypothesis.
"""

from .bounds import error_bound
from .comparison import assert_matches, compare
from .gradients import check_gradients
from .report import Report, ResultReport

__all__ = ["Report", "ResultReport", "assert_matches", "check_gradients", "compare", "error_bound"]
