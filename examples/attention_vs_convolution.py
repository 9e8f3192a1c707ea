"""Compare attention with convolution in four experiments, with nothing but refimpl's ops and gradients.

1. Long range: networks of one size read two bits that stand d places apart in a sequence. How far does each see?
2. What one output sees: its exact gradient by all of the input.
3. Cost: time and memory, forward and backward, against the length of a sequence or the size of an image.
4. Shifts: networks learn centred digits and read shifted ones; and which ops move with a photograph that moves?

Each is a module in `comparison/`. The program prints what theory says beside what came out, and whether they agree; it
saves two pictures, the second (`-details`) with what the first has no room for. Dense layers, activation, loss and
optimiser are those of `digits.py`, which also explains how networks are written here.

    pip install ".[examples]"
    python examples/attention_vs_convolution.py    # minutes on two cores; --quick: half of one; --help: all options
"""

import argparse
import functools
import importlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from comparison import cost, long_range, shifts, sight
from comparison.common import Effort, Finding
from digits import TOLERANCE, parsed, worst_gradient_error
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

from refimpl.testing import check_gradients

EXPERIMENTS = {"Long range": long_range, "What one output sees": sight, "Cost": cost, "Shifts": shifts}
FULL = Effort(
    seeds=3, sequence_steps=1200, digit_steps=500, tests=500, draws=32, repeats=7, sizes=(8, 12, 16, 24, 32, 48, 64)
)
QUICK = Effort(seeds=2, sequence_steps=50, digit_steps=30, tests=100, draws=4, repeats=2, sizes=(8, 12, 16, 24, 32, 48))
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "lines.markersize": 4.5,
    "legend.fontsize": 8, "legend.framealpha": 0.85, "legend.edgecolor": "none",
}  # fmt: skip


def check(console: Console, seed: int, xp: ModuleType) -> None:
    """Compare the gradients of all networks with numeric ones."""
    rng = np.random.default_rng(seed)
    bits = long_range.marked_bits(rng.integers(1, long_range.FARTHEST, 8), rng, xp)
    _, test, _, test_target = shifts.sheets(xp)
    for networks, x, target in ((long_range.NETWORKS, *bits), (shifts.NETWORKS, test[:4], test_target[:4])):
        error = max(worst_gradient_error(network, x, target, seed) for network in networks)
        console.print(f"{len(networks)} networks: worst relative error of a gradient {error:.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"a gradient is wrong: its relative error is above {TOLERANCE:.0e}")
    x, *weights = (xp.asarray(rng.standard_normal(shape)) for shape in ((1, 2, 7, 7), (2, 2, 3, 3), (2, 2, 3, 3)))
    check_gradients(sight.stack, sight.stack_backward, x, *weights)
    console.print("a stack of convolutions: its gradients agree with numeric ones")


def verdicts(findings: list[Finding]) -> Table:
    """Return what theory says, what came out, and whether they agree."""
    result = Table("theory", "measured", "agree?", show_lines=True)
    for finding in findings:
        result.add_row(finding.theory, finding.measured, "[green]yes[/]" if finding.holds else "[bold red]no[/]")
    return result


def draw(path: Path, results: dict[str, Any]) -> None:
    """Save the picture with a panel for each experiment."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 7.4), layout="constrained")
        panels = figure.subfigures(2, 2, hspace=0.05, wspace=0.04).flat
        for panel, (name, module) in zip(panels, EXPERIMENTS.items(), strict=True):
            module.draw(panel, results[name])
        figure.savefig(path, dpi=200)


def draw_details(path: Path, results: dict[str, Any]) -> None:
    """Save the picture with what the first has no room for."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.35], hspace=0.05)
        sight.draw_stacks(top, results["What one output sees"])
        growth, memory, moving = bottom.subfigures(1, 3, wspace=0.04)
        sight.draw_growth(growth, results["What one output sees"])
        cost.draw_memory(memory, results["Cost"])
        shifts.draw_equivariance(moving, results["Shifts"])
        figure.savefig(path, dpi=200)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="first compare gradients with numeric ones")
    parser.add_argument("--quick", action="store_true", help="a short run that shows that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (0)")
    return parsed(parser, "attention_vs_convolution.png")


def main() -> None:
    """Check, run all experiments, and report, as the command line says."""
    args, console, start = arguments(), Console(), time.perf_counter()
    xp = importlib.import_module(args.backend)
    if args.check:
        check(console, args.seed, xp)
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        results = {}
        for number, (name, module) in enumerate(EXPERIMENTS.items(), 1):
            track = functools.partial(progress.track, description=f"{number} {name}")
            results[name] = module.run(QUICK if args.quick else FULL, args.seed, xp, track)
    findings = []
    for name, module in EXPERIMENTS.items():
        console.rule(name)
        if hasattr(module, "table"):
            console.print(module.table(results[name]))
        findings += module.findings(results[name])
        console.print(verdicts(module.findings(results[name])))
    details = args.out.with_name(f"{args.out.stem}-details{args.out.suffix}")
    draw(args.out, results)
    draw_details(details, results)
    console.print(f"Saved {args.out} and {details}, after {time.perf_counter() - start:.0f} s.", markup=False)
    if args.quick:
        console.print("With --quick the networks hardly learn: what became of them says nothing.")
    missed = [finding.theory for finding in findings if not finding.holds]
    console.print(f"In {len(findings) - len(missed)} of {len(findings)} points, theory agrees with what was measured.")
    for theory in missed:
        console.print(f"Not in this: {theory}", markup=False)


if __name__ == "__main__":
    with threadpool_limits(1):  # matrices this small take longer on several threads of BLAS
        main()
