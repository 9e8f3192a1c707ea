"""The speed comparison compares the same thing, and says what it measured; how fast anything is matters to no test."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import refimpl
from bench import measure, own, report
from bench.__main__ import arguments
from bench.contestant import arrays_of, nbytes
from bench.runner import CONTESTANTS, Worker, compare, processes, run
from bench.workloads import ATTENTION, DIRECTIONS, LADDERS, QUICK, WORKLOADS, Workload

TINY = (
    Workload("conv 1x2x5x5 -> 4", "conv", ((1, 2, 5, 5), (4, 2, 3, 3)), {"padding": 1}),
    Workload("conv depthwise", "conv", ((2, 3, 5, 5), (3, 1, 3, 3)), {"groups": 3, "dilation": 2, "padding": 2}),
    Workload("conv1d", "conv", ((2, 3, 9), (4, 3, 3)), {"stride": 2}),
    Workload("conv3d", "conv", ((1, 2, 4, 5, 6), (3, 2, 2, 3, 2)), {"padding": 1}),
    Workload("conv_transpose", "conv_transpose", ((2, 3, 4, 4), (3, 2, 4, 4)), {"stride": 2, "padding": 1}),
    Workload("max_pool", "max_pool", ((2, 3, 8, 8),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Workload("avg_pool", "avg_pool", ((2, 3, 8, 8),), {"kernel_size": 2}),
    Workload("adaptive", "adaptive_avg_pool", ((2, 3, 8, 8),), {"output_size": 1}),
    Workload("attention", ATTENTION, ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {}),
    Workload("grouped causal", ATTENTION, ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {"is_causal": True}),
    Workload("padded", ATTENTION, ((2, 3, 4, 8),) * 3, {"key_lengths": (4, 2)}),
    Workload("multi_head", "multi_head_attention", ((2, 5, 8), (24, 8), (8, 8)), {"num_heads": 2}),
)


def named(workload):
    return workload.name


@pytest.fixture
def made_up():
    """Return a run in which refimpl takes 2, 8 times as long as a peer, and textbook only knows one direction."""

    def record(workload, direction, contestant, seconds, **more):
        ladder, size = more.get("ladder"), more.get("size", 0)
        work = {"workload": workload, "direction": direction, "op": "conv", "ladder": ladder, "size": size}
        figures = {"flops": 10**9, "bytes": 8, "seconds": seconds, "extra_bytes": 3 * 10**6, "error": None}
        return work | figures | {"contestant": contestant}

    results = [
        record("a", "forward", "refimpl", [0.2, 0.1, 0.4]),
        record("a", "forward", "torch", [0.1, 0.1, 0.1]),
        record("b", "forward", "refimpl", [0.8]),
        record("b", "forward", "torch", [0.1]),
        record("a", "backward", "refimpl", [0.3]),
        record("a", "backward", "torch", [0.6]),
        record("a", "forward", "textbook", [0.4]),
        record("a", "forward", "ceiling", [0.05]),
        record("a", "forward", "jax", []) | {"error": "ValueError: no"},
    ]
    for work in LADDERS:
        step = {"ladder": work.ladder, "size": work.size}
        results += [record(work.name, direction, "refimpl", [work.size**2], **step) for direction in DIRECTIONS]
    contestants = {name: {"device": "cpu"} for name in ("refimpl", "torch", "jax", "textbook", "ceiling")}
    machine = {"cpu": "made up", "cores": 2}
    settings = {"threads": 2}
    return {
        "date": "2026-01-01T00:00:00",
        "machine": machine,
        "settings": settings,
        "contestants": contestants,
        "results": results,
    }


@pytest.mark.parametrize("workload", TINY, ids=named)
def test_textbook_computes_the_same(workload):
    expected, actual = own.Refimpl(1).calls(workload), own.Textbook(1).calls(workload)
    for direction in DIRECTIONS:
        ours, theirs = arrays_of(expected[direction]()), arrays_of(actual[direction]())
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workload", TINY, ids=named)
def test_the_shape_of_the_output_is_the_real_one(workload):
    assert own.Refimpl(1).calls(workload)["forward"]().shape == workload.out_shape()


def test_flops_and_bytes():
    by_name = {workload.name: workload for workload in TINY}
    assert by_name["conv 1x2x5x5 -> 4"].flops("forward") == 2 * 25 * 4 * 2 * 9
    assert by_name["conv 1x2x5x5 -> 4"].flops("backward") == 2 * 2 * 25 * 4 * 2 * 9
    assert by_name["conv depthwise"].flops("forward") == 2 * 2 * 25 * 3 * 9
    assert by_name["conv_transpose"].flops("forward") == 2 * 2 * 16 * 3 * 2 * 16
    assert by_name["attention"].flops("forward") == 2 * 2 * 3 * 5 * 7 * (8 + 8)
    assert by_name["attention"].flops("backward") == 2 * 2 * 3 * 5 * 7 * 5 * 8
    assert by_name["grouped causal"].flops("forward") == 2 * 2 * 4 * 15 * (8 + 8)
    assert by_name["padded"].flops("forward") == 2 * 3 * 4 * (4 + 2) * (8 + 8)
    assert by_name["multi_head"].flops("forward") == 2 * 10 * 8 * 32 + 2 * 2 * 2 * 25 * (4 + 4)
    assert by_name["max_pool"].flops("forward") == 0
    assert by_name["max_pool"].bytes("forward") == 4 * 6 * (64 + 16)
    assert by_name["max_pool"].bytes("backward") == 4 * 6 * (64 + 16) + 8 * 6 * 16


def test_the_workloads_are_those_of_the_targets():
    assert len(WORKLOADS) == 22
    assert len({workload.name for workload in WORKLOADS + LADDERS}) == len(WORKLOADS + LADDERS)
    assert set(QUICK) <= {workload.name for workload in WORKLOADS}


@pytest.mark.slow
def test_a_run_of_everyone_who_is_here():
    workloads = [TINY[0], TINY[6], TINY[8]]
    result = json.loads(json.dumps(run(workloads, list(CONTESTANTS), threads=1, rounds=2, budget=1e-4)))
    assert {"refimpl", "textbook", "ceiling"} <= set(result["contestants"])
    assert {"cpu", "cores", "load before", "system", "python", "blas"} == set(result["machine"])
    assert result["settings"]["threads"] == 1
    assert "kernel" in result["machine"]["blas"][0]
    assert result["contestants"]["refimpl"]["numpy"] == np.__version__
    assert report.errors(result) == []
    timed = {(record["workload"], record["direction"], record["contestant"]) for record in result["results"]}
    assert len(timed) == len(result["results"])
    for name in ("refimpl", "textbook", "ceiling"):
        assert {(work.name, direction, name) for work in workloads for direction in DIRECTIONS} <= timed
    for record in result["results"]:
        assert len(record["seconds"]) == 2
        assert all(0 < seconds < 60 for seconds in record["seconds"])
    assert len({tuple(record["seconds"]) for record in result["results"]}) == len(result["results"])


def test_a_wrong_result_is_not_timed(tmp_path):
    file = str(tmp_path / "expected.npz")
    Worker.start("textbook", 1)
    Worker.prepare(TINY[0])
    Worker.save("backward", file)
    Worker.check("backward", file)
    right = Worker.calls["backward"]()
    Worker.calls["backward"] = lambda: (right[0], right[1] * np.float32(1.01))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        Worker.check("backward", file)
    Worker.calls["backward"] = lambda: right[:1]
    with pytest.raises(ValueError, match="zip"):
        Worker.check("backward", file)


def test_who_cannot_do_a_workload_is_named_and_the_others_are_compared(tmp_path):
    def refuses(method, *_):
        raise NotImplementedError(f"not {method.__name__}")

    Worker.start("refimpl", 1)
    asks = {"refimpl": lambda method, *args: method(*args), "other": refuses}
    result = {"results": compare(TINY[7], asks, tmp_path / "expected.npz")}
    assert report.errors(result) == ["other: adaptive, both: NotImplementedError: not prepare"]
    fine = [(r["contestant"], r["direction"]) for r in result["results"] if not r["error"]]
    assert fine == [("refimpl", "forward"), ("refimpl", "backward")]


def test_the_processes_have_one_number_of_threads_and_the_best_kernels(monkeypatch):
    unset = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "REFIMPL_NUM_THREADS", "EXTRA", *unset)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1024")
    with processes(["refimpl"], 1, EXTRA="yes") as asks:
        assert asks["refimpl"](os.getpid) != os.getpid()
        there = {name: asks["refimpl"](os.getenv, name) for name in names}
    assert there == dict.fromkeys(names, "1") | {"EXTRA": "yes"} | dict.fromkeys(unset)
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"
    assert "EXTRA" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_what_lies_between():
    x = np.ones(1 << 22)

    def call():
        return ((x + 1) * (x + 2)).sum(keepdims=True)  # a sum in place of one factor: two temporaries

    assert measure.cpu_extra_memory(call, nbytes) == pytest.approx(2 * x.nbytes, rel=0.1)
    assert measure.cpu_extra_memory(lambda: x + 1, nbytes) < 0.1 * x.nbytes


def test_ratios_and_means(made_up):
    base, peer = report.records(made_up, "refimpl"), report.records(made_up, "torch")
    assert report.ratios(base, peer) == pytest.approx(
        {("a", "forward"): 2, ("b", "forward"): 8, ("a", "backward"): 0.5}
    )
    assert report.spread(base["a", "forward"]) == pytest.approx(1.5)
    assert report.rate(base["a", "forward"]) == "5.0 GFLOP/s"
    assert report.summary(made_up) == {
        "refimpl / torch": pytest.approx({"forward": 4, "backward": 0.5}),
        "refimpl / textbook": pytest.approx({"forward": 0.5}),
        "refimpl / ceiling": pytest.approx({"forward": 4}),
    }
    assert report.errors(made_up) == ["jax: a, forward: ValueError: no"]


def test_tables(made_up):
    console = Console(width=200, file=io.StringIO())
    for table in report.tables(made_up):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    brief, speed, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| a"))
    assert brief == ["a", "200.00 / 300.00", "25% / -", "2.00 / 0.50", "0.50 / -"]
    assert speed == ["a", "forward", "200.000", "150%", "5.0 GFLOP/s", "25%", "3.0", "2.00", "0.50"]
    means = next(line for line in lines if line.startswith("| geometric mean "))
    assert [cell.strip() for cell in means.split("|")[1:-1]] == ["geometric mean", "", "", "4.00 / 0.50", "0.50 / -"]


def test_comparison_with_an_older_run(made_up):
    new = json.loads(json.dumps(made_up))
    for record in new["results"]:
        if record["contestant"] == "refimpl":
            record["seconds"] = [seconds / 4 for seconds in record["seconds"]]
    table, means = report.comparison(new, made_up)
    assert list(table.columns[2].cells) == ["0.25"] * 3
    assert list(table.columns[3].cells) == ["1.00"] * 3
    assert list(means.columns[0].cells)[:2] == ["refimpl, new / old", "torch, new / old"]
    assert list(means.columns[1].cells)[:2] == ["0.25", "1.00"]


def test_pictures(made_up, tmp_path):
    plots = pytest.importorskip("bench.plots", reason="matplotlib is not installed", exc_type=ImportError)
    paths = list(plots.draw(made_up, tmp_path / "pictures"))
    assert [path.name for path in paths] == ["ratios-cpu.png", "growth.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert plots.slope([1, 2, 4, 8, 16], [100, 4, 16, 64, 256]) == pytest.approx(2)


@pytest.mark.slow
def test_a_quick_run_from_the_command_line_and_again_from_what_it_saved(tmp_path):
    saved = tmp_path / "results" / "run.json"
    command = [sys.executable, "-m", "bench"]
    quick = [*command, "--quick", "--ops", "LeNet", "--peers", "textbook", "--threads", "1", "--json", str(saved)]
    printed = subprocess.run(quick, capture_output=True, check=True, text=True).stdout
    assert "over textbook" in printed
    assert set(json.loads(saved.read_text())["summary"]) == {"refimpl / textbook", "refimpl / ceiling"}
    again = [*command, "--show", str(saved), "--compare", str(saved)]
    assert "refimpl, new / old" in subprocess.run(again, capture_output=True, check=True, text=True).stdout


def test_no_workload_of_that_name():
    command = [sys.executable, "-m", "bench", "--ops", "nothing"]
    assert "no workload has any of" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_command_line_compares_with_everyone_by_default():
    assert set(arguments([]).peers) == set(CONTESTANTS) - {"refimpl", "ceiling", "ceiling-cupy"}


def test_refimpl_is_what_is_installed_here():
    assert own.Refimpl(1).describe()["refimpl"] == refimpl.__version__


@pytest.mark.slow
def test_kernels_tell_right_results_from_faults(tmp_path, capsys):
    pytest.importorskip("rich")
    from bench import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["bench.kernels", "--examples", "0", "--right", "60", "--json", str(tmp_path / "k.json")]
        )
        kernels.main()
    found = json.loads((tmp_path / "k.json").read_text())
    assert len(found["right"]) == 5 + 12
    assert all(calls and not wrong and largest <= 1 for calls, wrong, largest in found["right"].values())
    assert found["yardsticks"]["refimpl compare"] == [0, 0]
    assert found["yardsticks"]["KernelBench (1e-2, 1e-2)"][1] > 10
    assert "faults, taken" in capsys.readouterr().out
