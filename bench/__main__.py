"""Time every backend that is present, and textbook NumPy, on the same work: `python -m bench`.

Each contestant runs in a process of its own, in alternating rounds; what counts is the median over the rounds of the
median within one, and the spread (the range over the rounds, relative to the median).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import timeit
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_info

from bench.workloads import QUICK, WORKLOADS, calls, contestants


def time_one(contestant: str, names: list[str], repeat: int) -> dict[str, float]:
    """Return the median seconds of each call, after one to warm up."""
    seconds = {}
    for workload in WORKLOADS:
        if workload.name in names:
            for direction, call in calls(contestant, workload).items():
                call()
                times = timeit.repeat(call, number=1, repeat=repeat)
                seconds[f"{workload.name}, {direction}"] = statistics.median(times)
    return seconds


def time_in_a_process(contestant: str, names: list[str], repeat: int) -> dict[str, float]:
    """Run `time_one` in a new process, where OpenBLAS chooses its kernels itself."""
    command = [sys.executable, "-m", "bench", "--only", contestant, "--repeat", str(repeat), "--ops", *names]
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(printed)


def table(rounds: dict[str, dict[str, list[float]]], who: list[str]) -> Table:
    """Return the medians side by side; the ratio is to refimpl on numpy."""
    result = Table("milliseconds (spread)", *who, *(f"{name} / {who[0]}" for name in who[1:]))
    for work, by_contestant in rounds.items():
        medians = {name: statistics.median(seconds) for name, seconds in by_contestant.items()}
        cells = []
        for name in who:
            if name in medians:
                spread = (max(by_contestant[name]) - min(by_contestant[name])) / medians[name]
                cells.append(f"{1e3 * medians[name]:.2f} ({spread:.0%})")
            else:
                cells.append("-")
        ratios = [f"{medians[name] / medians[who[0]]:.2f}" if name in medians else "-" for name in who[1:]]
        result.add_row(work, *cells, *ratios)
    return result


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    libraries = [info for info in threadpool_info() if info["user_api"] == "blas"]
    blas = [f"{info['internal_api']} {info['version']} {info.get('architecture')}" for info in libraries]
    return {"python": platform.python_version(), "numpy": np.__version__, "blas": blas, "cores": os.cpu_count()}


def main() -> None:
    """Time all contestants in turns, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--ops", nargs="+", choices=names, metavar="WORKLOAD", default=names, help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="two small workloads, one round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant gets its turn (3)")
    parser.add_argument("--repeat", type=int, default=7, help="how often each call is timed in a turn (7)")
    parser.add_argument("--json", type=Path, help="where to save all figures")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # in a process of its own: print its times as JSON
    args = parser.parse_args()
    if args.only:
        print(json.dumps(time_one(args.only, args.ops, args.repeat)))
        return
    if args.quick:
        args.ops, args.rounds = list(QUICK), 1
    who = contestants()
    rounds: dict[str, dict[str, list[float]]] = {}
    turns = [name for _ in range(args.rounds) for name in who]
    for name in track(turns, description="rounds", console=Console(stderr=True)):
        for work, seconds in time_in_a_process(name, args.ops, args.repeat).items():
            rounds.setdefault(work, {}).setdefault(name, []).append(seconds)
    console = Console()
    console.print(table(rounds, who))
    console.print(machine())
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "seconds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
