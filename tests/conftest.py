"""The backends that every test of an op runs over, and the Hypothesis profiles."""

import contextlib
import os

import hypothesis
import pytest
from backends import BACKENDS, CupyBackend, patched_waits

hypothesis.settings.register_profile("default", max_examples=30, deadline=None, print_blob=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("REFIMPL_PROFILE", "default"))


collect_ignore = ["standins"]  # to import CuPy's stand-in is to put it in CuPy's place


def pytest_collection_modifyitems(items):
    """Count as slow what is fast on plain NumPy, or there and on a GPU, alone."""
    fast = {"slow_but_on_numpy": {"numpy"}, "slow_on_standins": {"numpy", "cupy", "cupy-views", "torch-cuda"}}
    for item in items:
        chosen = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        for marker, names in fast.items():
            if chosen is not None and chosen.name not in names and item.get_closest_marker(marker):
                item.add_marker("slow")


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    """One way after the other of holding arrays; see `backends.py`."""
    chosen = request.param
    if reason := chosen.missing():
        if os.environ.get("REFIMPL_REQUIRE_GPU") == "1" and isinstance(chosen, CupyBackend):
            pytest.fail(f"REFIMPL_REQUIRE_GPU=1, but {reason}")
        pytest.skip(reason)
    return chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Let refimpl know the backend while the test runs, and no longer: other tests may share the process."""
    chosen = getattr(item, "funcargs", {}).get("backend")
    with contextlib.ExitStack() as stack:
        if chosen is not None:
            stack.enter_context(patched_waits())
            stack.enter_context(chosen.installed())
        return (yield)
