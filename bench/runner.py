"""Run the contestants in turns, each in a process of its own, and gather what they say."""

import contextlib
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from bench import own, peers
from bench.contestant import Contestant, arrays_of
from bench.measure import MEMORY_ENVIRONMENT
from bench.workloads import DIRECTIONS, Workload

Asks = dict[str, Callable[..., Any]]
CONTESTANTS: dict[str, type[Contestant]] = {
    "refimpl": own.Refimpl,
    "refimpl-cupy": own.RefimplCupy,
    "textbook": own.Textbook,
    "torch": peers.Torch,
    "torch-cuda": peers.TorchCuda,
    "torch-cuda-tf32": peers.TorchCudaTF32,
    "jax": peers.Jax,
    "onnxruntime": peers.OnnxRuntime,
    "ceiling": own.Ceiling,
    "ceiling-cupy": own.CeilingCupy,
}
ALWAYS = ("refimpl", "ceiling")
CEILINGS = ("ceiling", "ceiling-cupy")
PAUSE_SECONDS = 0.2  # before a turn: threads of the one before spin on, those of OpenBLAS for a tenth of a second
TOLERANCES = {"torch-cuda-tf32": 1e-2}
"""How far a result may be from refimpl's, relative to the largest; 1e-3 unless named."""


class Worker:
    """What a contestant's process holds; its class attributes are that process's state between two requests."""

    contestant: Contestant
    calls: dict[str, Callable[[], Any]]

    tolerance: float

    @classmethod
    def start(cls, name: str, threads: int) -> None:
        """Set up the process.

        glibc maps every block anew, page by page, that is larger than the largest freed so far. Without a large one to
        begin with, that is in the time of what comes first (PyTorch's depthwise convolution: 12 ms, 2 after others).
        """
        np.empty(31 << 20, dtype=np.uint8)
        cls.contestant, cls.calls, cls.tolerance = CONTESTANTS[name](threads), {}, TOLERANCES.get(name, 1e-3)

    @classmethod
    def describe(cls) -> dict[str, Any] | None:
        """Return versions, device and BLAS, or None if the library is not here."""
        if not cls.contestant.available():
            return None
        blas = [f"{i['internal_api']} {i['version']}, kernel {i.get('architecture')}" for i in threadpool_info()]
        return cls.contestant.describe() | {"blas": blas}

    @classmethod
    def prepare(cls, workload: Workload) -> list[str]:
        """Get ready for a workload, and return the directions that can be timed."""
        cls.calls = {}  # the last one's arrays go first
        cls.calls = cls.contestant.calls(workload)
        return list(cls.calls)

    @classmethod
    def save(cls, direction: str, file: str) -> None:
        """Save what a call returns."""
        np.savez(file, *map(cls.contestant.to_numpy, arrays_of(cls.calls[direction]())))

    @classmethod
    def check(cls, direction: str, file: str) -> None:
        """Compare what a call returns with what another process saved."""
        arrays = [cls.contestant.to_numpy(array) for array in arrays_of(cls.calls[direction]())]
        with np.load(file) as saved:
            for array, expected in zip(arrays, saved.values(), strict=True):
                largest = float(np.abs(expected).max(initial=0))
                np.testing.assert_allclose(array, expected, rtol=cls.tolerance, atol=cls.tolerance * largest)

    @classmethod
    def extra_memory(cls, direction: str) -> int | None:
        """Measure the extra memory of a call."""
        return cls.contestant.extra_memory(cls.calls[direction])

    @classmethod
    def seconds(cls, direction: str, budget: float) -> float:
        """Measure the time of a call."""
        return cls.contestant.seconds(cls.calls[direction], budget)


@contextlib.contextmanager
def processes(names: Iterable[str], threads: int, **environment: str) -> Iterator[Asks]:
    """Give, for each contestant, a function that lets its process do `Worker`'s methods.

    All get the same number of threads, and OpenBLAS chooses its kernel itself. JAX has no setting for threads, so all
    processes are confined to as many cores, where the system can.
    """
    before, cores = dict(os.environ), getattr(os, "sched_getaffinity", lambda _: None)(0)
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "REFIMPL"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    os.environ |= {"VECLIB_MAXIMUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"} | environment
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    if cores:
        os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        with contextlib.ExitStack() as stack:
            asks = {}
            for name in names:
                pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), Worker.start, (name, threads)))
                asks[name] = lambda method, *args, pool=pool: pool.submit(method, *args).result()
            yield asks
    finally:
        os.environ.clear()
        os.environ.update(before)
        if cores:
            os.sched_setaffinity(0, cores)


def run(
    workloads: Sequence[Workload],
    names: Sequence[str],
    *,
    threads: int,
    rounds: int,
    budget: float,
    pause: float = PAUSE_SECONDS,
    tell: Callable[[str, int, int], None] = lambda *_: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the workloads, and return all that is known: the machine, the settings, a record for every call.

    Parameters
    ----------
    workloads : sequence of Workload
    names : sequence of str
        Keys of `CONTESTANTS`, "refimpl" among them. Those that are not installed, or have no device here, are left out.
    threads : int
        For every contestant.
    rounds : int
        How often each contestant has its turn at each call.
    budget : float
        Seconds that a turn should take, beyond warming up.
    pause : float
        Seconds of rest before a turn.
    tell : function
        Called with what happens next, how many steps are done, and how many there are.
    keep : function
        Called after each workload with what is known so far, so that a run that is cut off loses only the rest.
    """
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    steps, records = 2 * len(workloads), []
    with (
        processes(names, threads, **MEMORY_ENVIRONMENT) as asks,
        tempfile.TemporaryDirectory() as folder,
    ):
        tell("start", 0, steps)
        contestants = {name: known for name in names if (known := asks[name](Worker.describe)) is not None}
        for done, workload in enumerate(workloads):
            tell(f"compare results and memory: {workload.name}", done, steps)
            present = {name: asks[name] for name in contestants}
            records += compare(workload, present, Path(folder, "expected.npz"))
    known = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine | {"blas": contestants["refimpl"]["blas"]},
        "settings": {"threads": threads, "rounds": rounds, "budget": budget, "pause": pause, "dtype": "float32"},
        "contestants": contestants,
        "results": records,
    }
    with processes(contestants, threads) as asks:
        for done, workload in enumerate(workloads, len(workloads)):
            tell(f"time: {workload.name}", done, steps)
            mine = [record for record in records if record["workload"] == workload.name and not record["error"]]
            take_turns(workload, mine, asks, rounds, budget, pause)
            keep(known)
    tell("done", steps, steps)
    return known


def compare(workload: Workload, asks: Asks, expected: Path) -> list[dict[str, Any]]:
    """Return a record for every call, without times: its extra memory, or why it fails or differs from refimpl."""
    records = []
    for name, ask in asks.items():
        about = {"workload": workload.name, "op": workload.op, "ladder": workload.ladder, "size": workload.size}
        about |= {"contestant": name, "extra_bytes": None, "error": None}
        try:
            for direction in ask(Worker.prepare, workload):
                work = {"direction": direction, "flops": workload.flops(direction), "bytes": workload.bytes(direction)}
                records.append(about | work | {"seconds": []})
        except Exception as error:
            records.append(about | {"direction": "both", "seconds": [], "error": f"{type(error).__name__}: {error}"})
    for direction in DIRECTIONS:
        asks["refimpl"](Worker.save, direction, str(expected))
        for record in (record for record in records if record["direction"] == direction):
            ask = asks[record["contestant"]]
            try:
                if record["contestant"] not in CEILINGS:
                    ask(Worker.check, direction, str(expected))
                    record["extra_bytes"] = ask(Worker.extra_memory, direction)
            except Exception as error:
                record["error"] = f"{type(error).__name__}: {error}"
    return records


def take_turns(
    workload: Workload, records: list[dict[str, Any]], asks: Asks, rounds: int, budget: float, pause: float
) -> None:
    """Add to each record the seconds that its contestant takes, a number for every round; between turns, all rest."""
    for name in {record["contestant"] for record in records}:
        asks[name](Worker.prepare, workload)
    for direction in DIRECTIONS:
        for _ in range(rounds):
            for record in records:
                if record["direction"] == direction:
                    time.sleep(pause)
                    record["seconds"].append(asks[record["contestant"]](Worker.seconds, direction, budget))


def cpu_name() -> str:
    """Return the processor's name, as the system has it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
