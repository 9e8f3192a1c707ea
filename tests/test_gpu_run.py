"""`.ci/gpu` on arrays in the guise of CuPy: its parts, its time limits, and what it says of what goes wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backends import GuisedBackend, patched_waits

import refimpl
from bench import report
from bench.gpu import facts, smoke, summary
from bench.gpu.calls import flat, smoke_calls

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash")


def dry_run(out, *parts, **environment):
    environment = os.environ | {"REFIMPL_GPU_DRY_RUN": "1", "PYTHON": sys.executable, "OUT": str(out)} | environment
    command = ["bash", str(ROOT / ".ci/gpu"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_leaves_facts_and_a_summary(tmp_path):
    done = dry_run(tmp_path, "smoke", "suite", "graphs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All parts passed." in done.stdout
    known = facts.read(tmp_path / "dry-run-facts.json")
    assert known["environment"]["device"] == "NumPy in the guise of CuPy"
    ops = {name.partition(": ")[2] for name in known["smoke"]["distances"]}
    assert ops == {name.removesuffix("_backward") for name in dir(refimpl) if name.endswith("_backward")}
    assert all(set(row) == set(smoke.DTYPES) for row in known["smoke"]["distances"].values())
    assert {seen["captured"] for seen in known["graphs"].values()} == {True, False}
    assert int(re.search(r"suite: (\d+) passed", (tmp_path / "dry-run-summary.txt").read_text())[1]) > 40


@pytest.mark.slow
def test_a_part_that_is_out_of_time_stops_no_other(tmp_path):
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/bash\n[[ $* == *bench.gpu.smoke* ]] && exec sleep 60\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    done = dry_run(tmp_path, "smoke", "graphs", LIMIT_SMOKE="1", PYTHON=str(slow))
    assert done.returncode == 1
    assert "smoke: OUT OF TIME" in done.stdout
    assert "graphs: passed" in done.stdout
    assert "NOT all parts passed." in done.stdout


def test_distance_is_in_units_of_the_bound():
    due, bound = np.array([1.0, np.nan, 2.0]), np.array([0.5, 0.0, 0.0])
    assert smoke.worst([due], [due], [bound]) == 0
    assert smoke.worst([np.array([1.25, np.nan, 2.0])], [due], [bound]) == 0.5
    assert smoke.worst([np.array([1.0, np.nan, 2.5])], [due], [bound]) == np.inf
    assert smoke.worst([np.array([1.0, 3.0, 2.0])], [due], [bound]) == np.inf
    assert smoke.worst([due[:2]], [due], [bound]) == np.inf


def test_smoke_finds_a_wrong_result(monkeypatch):
    call = next(call for call in smoke_calls() if call.op == "avg_pool")
    guise = GuisedBackend()
    with patched_waits(), guise.installed():
        sys.modules["cupy"].only_device.__enter__()
        try:
            assert max(smoke.distances(call, "float32").values()) <= 1
            right = refimpl.avg_pool
            monkeypatch.setattr(refimpl, "avg_pool", lambda x, *args, **options: right(x, *args, **options) * (
                1 if type(x) is np.ndarray else 1.001))  # fmt: skip
            found = smoke.distances(call, "float32")
        finally:
            sys.modules["cupy"].only_device.__exit__()
    assert found["forward"] > 1 >= found["backward"]


def test_the_smoke_calls_are_valid_and_finite():
    for call in smoke_calls():
        out = call.forward()
        assert all(np.isfinite(array).all() for array in flat(out)), call.op
        assert flat(call.backward(np.ones_like(flat(out)[0])))


def test_the_summary_names_what_failed(tmp_path, capsys):
    known, junit, parts = tmp_path / "facts.json", tmp_path / "suite.xml", tmp_path / "parts.tsv"
    facts.tell(known, "environment", {"device": "one that is made up"})
    facts.tell(known, "smoke", {"distances": {"0: conv": {}}, "errors": {"0: conv": "Traceback\nValueError: no"}})
    facts.tell(known, "semantics", {"clip": None, "max": "Traceback\nAssertionError: 3"})
    facts.tell(known, "graphs", {"max_pool": {"waits": True, "as README says": False}})
    junit.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"><failure message="E1&#10;more"/></testcase>'
        '<testcase classname="a" name="c"/><testcase classname="a" name="d"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    parts.write_text("smoke\t1\t3\nsuite\t1\t4\ngraphs\t1\t1\n")
    assert summary.main(known, junit, tmp_path / "none.json", parts) == 1
    said = capsys.readouterr().out
    for line in (
        "device: one that is made up",
        "smoke: FAILED (status 1) in 3 s",
        "failed: 0: conv: ValueError: no",
        "failed: max: AssertionError: 3",
        "not as README says: max_pool",
        "suite: 1 passed, 1 failed, 1 skipped",
        "failure: a::b: E1",
    ):
        assert line in said
    parts.write_text("graphs\t0\t1\n")
    assert summary.main(known, junit, tmp_path / "none.json", parts) == 0


def test_facts_add_up(tmp_path):
    path = tmp_path / "facts.json"
    facts.tell(path, "a", 1)
    facts.tell(path, "b", 2)
    facts.tell(path, "a", 3)
    assert json.loads(path.read_text()) == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("ratios", "size"),
    [((4, 2, 0.5), 32**0.5), ((0.5, 0.5, 0.5), 2), ((2, 0.5, 2), None), ((3, 3, 3), None)],
)
def test_crossings(ratios, size):
    results = [
        {"workload": f"w{i}", "ladder": "size S", "size": 2 ** (i + 1), "direction": "forward", "contestant": name,
         "seconds": [seconds]}
        for i, ratio in enumerate(ratios) for name, seconds in (("refimpl", 1.0), ("refimpl-cupy", ratio))
    ]  # fmt: skip
    found = report.crossings({"results": results})["size S"]["forward"]
    assert found == (None if size is None else pytest.approx(size))
