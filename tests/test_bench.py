"""The speed comparison compares the same thing, and runs."""

import json
import subprocess
import sys

import numpy as np
import pytest

import refimpl
from bench.workloads import TEXTBOOK, WORKLOADS, calls, contestants


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_textbook_and_refimpl_compute_the_same(workload):
    rng = np.random.default_rng(0)
    small = [tuple(min(n, 16) for n in shape) for shape in workload.shapes]
    arrays = [rng.normal(size=shape) for shape in small]
    expected = getattr(refimpl, workload.op)(*arrays, **workload.options)
    np.testing.assert_allclose(TEXTBOOK[workload.op](*arrays, **workload.options), expected, rtol=1e-10, atol=1e-10)


def test_every_contestant_has_something_to_time():
    for contestant in contestants():
        assert "forward" in calls(contestant, WORKLOADS[-2])


def test_a_quick_run(tmp_path):
    saved = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "--quick", "--repeat", "1", "--json", str(saved)]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "textbook NumPy" in printed
    figures = json.loads(saved.read_text())
    assert set(figures["machine"]) == {"python", "numpy", "blas", "cores"}
    for by_contestant in figures["seconds"].values():
        assert all(0 < seconds < 60 for times in by_contestant.values() for seconds in times)
    assert len(figures["seconds"]) == 4
