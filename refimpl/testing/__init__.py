"""What the author of a kernel needs to check it: numeric gradients, error bounds, and strategies for Hypothesis.

`conformance` and `refimpl.testing.strategies` need Hypothesis (the extra `testing`), and are imported when asked for.
"""

from typing import Any

from .bounds import error_bound
from .comparison import assert_matches, compare
from .gradients import check_gradients
from .report import Report, ResultReport

__all__ = [
    "ConformanceReport",
    "Report",
    "ResultReport",
    "assert_matches",
    "check_gradients",
    "compare",
    "conformance",
    "error_bound",
]


def __getattr__(name: str) -> Any:
    if name in ("ConformanceReport", "conformance"):
        from . import kernels

        return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
