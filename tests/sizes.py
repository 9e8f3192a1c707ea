"""Small arrays the way of large ones: what is chosen by size, chosen as for large ones."""

import contextlib
import sys
from unittest import mock

import pytest

import refimpl

THRESHOLDS = {
    "_engine.correlate": {"FEW_COLUMNS": 0, "FEWER_CHANNELS": 1 << 30, "MANY_WINDOWS": 1},
    "_engine.im2col": {"FEW_ELEMENTS": 0, "MANY_TAPS": 2},
    "_engine.visibility": {"MANY_PAIRS": 0, "MANY_SCORES": 0, "LEAST_ROWS": 1},
    "_engine.softmax": {"LONG_ROWS": 1},
    "backend.numpy": {"LONG_RUN": 1},
}


@contextlib.contextmanager
def as_if_large():
    """Let small arrays take the ways of large ones."""
    with contextlib.ExitStack() as stack:
        for module, values in THRESHOLDS.items():
            stack.enter_context(mock.patch.multiple(sys.modules[f"{refimpl.__name__}.{module}"], **values))
        yield


by_any_way = pytest.mark.parametrize("way", [contextlib.nullcontext, as_if_large], ids=["as-it-is", "as-if-large"])
