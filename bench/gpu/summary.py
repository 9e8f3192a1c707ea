"""What a GPU run found, on one page: `python -m bench.gpu.summary FACTS.json SUITE.xml RUN.json PARTS.tsv`.

Exits with 0 only if every part of the run did, and the suite ran at least one test.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import report
from bench.gpu import facts

MOST_LINES = 60


def smoke(found: dict[str, Any]) -> Iterator[str]:
    """Yield how many calls were compared, and what was wrong."""
    known = found.get("smoke", {})
    yield f"smoke: {len(known.get('distances', {}))} calls, {len(known.get('errors', {}))} raise"
    yield from (f"further than the bound: {name}" for name in known.get("too far", []))
    for name, error in [*known.get("errors", {}).items(), *found.get("semantics", {}).items()]:
        if error:
            yield f"failed: {name}: {error.strip().splitlines()[-1][:160]}"


def graphs(found: dict[str, Any]) -> Iterator[str]:
    """Yield what was not as README says of waiting and of graphs."""
    for name, seen in found.get("graphs", {}).items():
        if not seen["as README says"]:
            yield f"not as README says: {name}: {seen}"[:200]


def suite(path: Path) -> tuple[str, list[str]]:
    """Return the counts of a junit file, and a line for each test that failed."""
    if not path.exists():
        return "the suite left no report", []
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad, skipped = [], 0
    for case in cases:
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                first = (found.get("message") or "").partition("\n")[0][:160]
                bad.append(f"{kind}: {case.get('classname')}::{case.get('name')}: {first}")
    passed = len(cases) - skipped - len(bad)
    return f"{passed} passed, {len(bad)} failed, {skipped} skipped", bad


def speed(path: Path) -> Iterator[str]:
    """Yield the geometric means of a run of the speed comparison, and who could not do what."""
    if not path.exists():
        yield "no speed was measured"
        return
    run = json.loads(path.read_text())
    for name, means in report.summary(run).items():
        yield f"{name}: " + ", ".join(f"{direction} {value:.2f}" for direction, value in means.items())
    for ladder, by_direction in report.crossings(run).items():
        for direction, size in by_direction.items():
            yield (
                f"the GPU wins from {ladder} = {size:.0f} on, {direction}"
                if size
                else f"no crossing: {ladder}, {direction}"
            )
    yield from report.errors(run)


def main(known: Path, junit: Path, run: Path, parts: Path) -> int:
    """Print the summary."""
    found = facts.read(known)
    rows = [line.split("\t") for line in parts.read_text().splitlines()] if parts.exists() else []
    for key, value in found.get("environment", {}).items():
        print(f"{key}: {value}")
    for part, status, seconds in rows:
        told = {"0": "passed", "124": "OUT OF TIME", "130": "OUT OF TIME", "137": "OUT OF TIME"}.get(status, "FAILED")
        print(f"{part}: {told} (status {status}) in {seconds} s")
    ran = {part for part, _, _ in rows}
    lines = []
    if "smoke" in ran:
        lines += smoke(found)
    if "graphs" in ran:
        lines += graphs(found)
    if "suite" in ran:
        counts, bad = suite(junit)
        lines += [f"suite: {counts}", *bad[:MOST_LINES]]
    if "speed" in ran:
        lines += speed(run)
    print(*lines, sep="\n")
    whole = rows and all(status == "0" for _, status, _ in rows)
    print("All parts passed." if whole else "NOT all parts passed.")
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
