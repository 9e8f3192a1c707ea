"""The backends that every test of an op runs over, and the Hypothesis profiles."""

import os

import hypothesis
import pytest
from backends import BACKENDS, CupyBackend, patched_waits

import refimpl

hypothesis.settings.register_profile("default", max_examples=30, deadline=None, print_blob=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("REFIMPL_PROFILE", "default"))


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    """One way after the other of holding arrays; see `backends.py`."""
    chosen = request.param
    if isinstance(chosen, CupyBackend) and "cupy" not in refimpl.backend.available():
        if os.environ.get("REFIMPL_REQUIRE_GPU") == "1":
            pytest.fail("REFIMPL_REQUIRE_GPU=1, but no device answers to CuPy")
        pytest.skip("no device answers to CuPy")
    with patched_waits(), chosen.installed():
        yield chosen
