"""Compare the speed of refimpl on its backends, its textbook and the frameworks that are present: `python -m bench`.

Each contestant runs in a process of its own, all with the same number of threads, in alternating rounds. What counts is
the median over the rounds of the median within one; the spread is the range over the rounds, relative to that median.
Before it is timed, every result is compared with refimpl's. `measure.py` says how time and memory are measured,
`own.py` and `peers.py` what exactly is timed of each, `workloads.py` how FLOPs and bytes are counted. The ceiling is
one square `np.matmul` of the same FLOPs, or for pooling one `np.copyto` of the same bytes, with the same number of
threads (`copyto` uses one).
"""

import argparse
import functools
import json
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import report
from bench.runner import ALWAYS, CEILINGS, CONTESTANTS, PAUSE_SECONDS, run
from bench.workloads import LADDERS, QUICK, WORKLOADS


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    peers = [name for name in CONTESTANTS if name not in ALWAYS + CEILINGS]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "--ops", nargs="+", metavar="WORD", help="only workloads whose name or op contains one of these"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=peers, default=peers, help="who is compared with refimpl on NumPy"
    )
    parser.add_argument("--quick", action="store_true", help="three small workloads, one short round")
    parser.add_argument("--threads", type=int, default=cores, help=f"for every contestant ({cores})")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant gets its turn (5)")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds a turn should take (0.2)")
    parser.add_argument("--pause", type=float, default=PAUSE_SECONDS, help=f"seconds before a turn ({PAUSE_SECONDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures, after each workload those so far")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="time growing sizes, too, and save pictures")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show the ratios to an older run")
    parser.add_argument("--show", type=Path, metavar="RUN.json", help="time nothing: show this run")
    return parser.parse_args(args)


def measured(args: argparse.Namespace) -> report.Run:
    """Run what the arguments ask for, and show the progress."""
    workloads = [work for work in WORKLOADS if not args.quick or args.ops or work.name in QUICK]
    if args.plot:
        workloads += [work for work in LADDERS if not args.quick or work.flops("forward") < 4e8]
    if args.ops:
        workloads = [work for work in workloads if any(word in f"{work.name} {work.op}" for word in args.ops)]
    if not workloads:
        raise SystemExit(f"no workload has any of {args.ops} in its name: {[work.name for work in WORKLOADS]}")
    ceilings = [name for name in CEILINGS if name in ALWAYS or "refimpl-cupy" in args.peers]
    names = [name for name in CONTESTANTS if name in ("refimpl", *args.peers, *ceilings)]
    rounds, budget = (1, 0.02) if args.quick else (args.rounds, args.budget)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("start")

        def tell(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        settings = {"threads": args.threads, "rounds": rounds, "budget": budget, "pause": args.pause}
        return run(workloads, names, **settings, tell=tell, keep=functools.partial(save, args.json))


def save(path: Path | None, result: report.Run) -> None:
    """Save a run, or what is known of it so far, if a file is asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, or read a saved run; then print, save and draw it."""
    args = arguments()
    old = json.loads(args.compare.read_text()) if args.compare else None
    result = json.loads(args.show.read_text()) if args.show else measured(args)
    result["summary"] = report.summary(result)
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    for table in report.tables(result):
        console.print(table)
    if old:
        for table in report.comparison(result, old):
            console.print(table)
    console.print({key: result[key] for key in ("date", "machine", "settings", "contestants")})
    for error in report.errors(result):
        console.print(error, style="red", markup=False)
    save(args.json, result)
    if args.plot:
        from bench import plots

        for path in plots.draw(result, args.plot):
            console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
