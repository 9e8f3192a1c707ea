"""Whether a kernel computes an op: many drawn calls, each made in several ways, and a report of what failed."""

import base64
import functools
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ... import backend
from ..report import Report
from ..strategies import EVERY_OP, Case
from . import dialects
from .cases import drawn, smallest, strategies_of
from .libraries import Library
from .trial import Kernel, Outcome, Trial

__all__ = ["ConformanceReport", "Failure", "conformance"]

_MOST_KINDS = 6  # of failures that are made small, which takes up to 200 calls each
_AGAIN = 10  # cases that are tried once more at the end


@dataclass(frozen=True)
class Failure:
    """A kind of failure, by its smallest case."""

    kind: str
    """What fails, such as "backward: dkey wrong"."""
    dtype: str
    count: int
    """How many of the drawn cases fail like this."""
    case: Case
    """Its arrays, options and op."""
    outcome: Outcome
    code: str
    """The case as code to paste."""
    patterns: tuple[str, ...] = ()
    """What the wrong elements of the first case had in common: a small case has little to see."""

    @property
    def report(self) -> Report | None:
        """The comparison, where numbers are wrong."""
        return self.outcome.report

    def __str__(self) -> str:
        """Return what fails, its report and its code."""
        lines = [f"{self.kind} ({self.dtype}, {self.count} cases): {self.outcome.text}"]
        lines += [f"in the first case: {pattern}" for pattern in self.patterns]
        lines += [] if self.report is None else [str(self.report)]
        return "\n".join([*lines, self.code])


@dataclass
class ConformanceReport:
    """How many cases passed, failed and were refused, and the smallest case of each kind of failure."""

    op: str
    seed: int
    passed: int = 0
    failed: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)
    table: dict[str, list[int]] = field(default_factory=dict)
    """(passed, failed, refused) of the cases with each dtype, option and edge."""
    spread: float = 0.0
    """The largest difference of two equal calls, relative to the largest element; 0 if the kernel is deterministic."""

    @property
    def ok(self) -> bool:
        """Whether no case failed, and some passed."""
        return self.failed == 0 < self.passed

    def __bool__(self) -> bool:
        """Return `ok`."""
        return self.ok

    def check(self) -> None:
        """Raise an AssertionError that says what failed, unless `ok`: for the test of a kernel."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """Return the counts, the table, and the failures."""
        width = max([len(name) for name in self.table] or [0])
        lines = [
            f"{self.op}: {self.passed} passed, {self.failed} failed, {self.refused} refused (seed {self.seed})",
            f"{'':{width}}  passed  failed refused",
            *(f"{name:{width}}{a:8}{b:8}{c:8}" for name, (a, b, c) in self.table.items()),
        ]
        if self.passed + self.failed == 0:
            lines.append("no case was computed: nothing is known about this kernel")
        if self.spread:
            lines.append(f"not deterministic: two equal calls differ by up to {self.spread:.2g} of the largest element")
        return "\n".join([*lines, *(f"\n{failure}" for failure in self.failures)])

    def to_json(self) -> str:
        """Return all but the arrays as JSON."""
        failures = [
            {"kind": f.kind, "dtype": f.dtype, "count": f.count, "text": f.outcome.text, "code": f.code}
            | {"report": None if f.report is None else str(f.report), "patterns": f.patterns}
            for f in self.failures
        ]
        counts = {"op": self.op, "seed": self.seed, "passed": self.passed, "failed": self.failed}
        more = {"refused": self.refused, "spread": self.spread, "table": self.table, "failures": failures}
        return json.dumps(counts | more, indent=1)


def conformance(
    kernel: Kernel,
    op: str | Callable[..., Any],
    /,
    *,
    backward: Kernel | str | None = None,
    arrays: str = "numpy",
    device: str | None = None,
    dtypes: Iterable[str] = ("float32",),
    options: Iterable[str] | None = None,
    examples: int = 200,
    seed: int = 0,
    like: str | None = None,
    model: str = "expected",
    exp_ulps: float = 4.0,
    sums: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    **aims: Any,
) -> ConformanceReport:
    """Try a kernel with drawn calls of an op, and say what it gets wrong.

    Parameters
    ----------
    kernel
        Called as the op is: `kernel(*arrays, **options)`. What it does not support it refuses by NotImplementedError.
    op
        The op, or its name.
    backward : optional
        Called as the op's `_backward` is: `backward(dout, *arrays, **options)`; it returns the gradients in any form
        that `compare` takes. "autograd" takes them from PyTorch's autograd of the kernel.
    arrays : "numpy", "torch", "cupy" or "jax"
        Whose arrays the kernel takes.
    device : str, optional
        Where they lie, such as "cuda".
    dtypes : names of dtypes
        "float64", "float32", "float16" or "bfloat16".
    options : names, optional
        The options of the op that the kernel has; all unless given.
    examples : int
        Cases for each dtype, at least 1.
    seed : int
        Of everything that is drawn.
    like : "torch", "jax", "flash-attn", "onnx" or "cudnn", optional
        The kernel is called as this library's function is, with its names, layout and meanings.
    model, exp_ulps, sums
        What is allowed for, as `compare` takes them.
    progress : function of (done, all), optional
        Called after each case.
    **aims
        Parameters of the op's strategy in `refimpl.testing.strategies`: sizes, heads, layouts, values. Without any,
        cases have the strategy's sizes, and those of real nets.

    Returns
    -------
    ConformanceReport
        `assert conformance(...).ok`, or `conformance(...).check()`, makes a test of it.

    Raises
    ------
    ValueError
        If an argument names what there is not.

    Notes
    -----
    Each case is computed twice, then with other values in the same memory and in fresh memory, and ten cases once more
    at the end: so a stored result, or a pointer to memory that has changed, shows. Arguments must come back unchanged,
    results must be plain arrays of the library, whole, and share no memory with arguments or with later results. Freed
    memory holds NaN before each call, and so do keys and values beyond `key_lengths`.

    Examples
    --------
    >>> import numpy as np, refimpl
    >>> def mean(x, output_size):
    ...     return refimpl.adaptive_avg_pool(x, output_size)
    >>> report = conformance(mean, "adaptive_avg_pool", examples=10)
    >>> report.ok, report.failed
    (True, 0)
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", backend.shown(op))
    _check(name, arrays, examples, like)
    library = Library(arrays, device)
    if like is not None:
        kernel, options = dialects.adapted(kernel, name, like, options)
    if backward == "autograd":
        backward = dialects.autograd(kernel)
    if isinstance(backward, str):
        raise ValueError(f"conformance: backward must be a function or 'autograd'; got {backend.shown(backward)}")
    trial = Trial(kernel, backward, library, {"model": model, "exp_ulps": exp_ulps, "sums": sums})
    chosen = None if options is None else tuple(options)
    plans = []
    for dtype in dtypes:
        sources = strategies_of(name, dtype, chosen, aims)
        shares = [examples // len(sources) + (i < examples % len(sources)) for i in range(len(sources))]
        plans += [
            (dtype, source, case)
            for i, (source, share) in enumerate(zip(sources, shares, strict=True))
            for case in drawn(source, share, seed + i)
        ]
    random.Random(seed).shuffle(plans)
    return _run(name, seed, trial, plans, progress)


def _check(name: str, arrays: str, examples: int, like: str | None) -> None:
    if name not in EVERY_OP:
        raise ValueError(f"conformance: op must be one of {', '.join(EVERY_OP)}; got {name}")
    if arrays not in ("numpy", "torch", "cupy", "jax"):
        raise ValueError(f"conformance: arrays must be 'numpy', 'torch', 'cupy' or 'jax'; got {backend.shown(arrays)}")
    if not backend.is_number(examples) or examples < 1:
        raise ValueError(f"conformance: examples must be an int of at least 1; got {backend.shown(examples)}")
    if like is not None and like not in dialects.DIALECTS:
        raise ValueError(f"conformance: like must be one of {', '.join(dialects.DIALECTS)}; got {backend.shown(like)}")


def _run(
    name: str, seed: int, trial: Trial, plans: list[tuple[str, Any, Case]], progress: Callable[[int, int], None] | None
) -> ConformanceReport:
    """Try all cases, and make the failures small."""
    report, kinds = ConformanceReport(name, seed), Counter[tuple[str, str]]()
    first: dict[tuple[str, str], tuple[Any, Case, Outcome]] = {}
    again = plans[: _AGAIN if len(plans) > _AGAIN else 0]
    for number, (dtype, source, case) in enumerate([*plans, *again]):
        repeated = number >= len(plans)
        outcome = trial(case, seed + number)
        if repeated and outcome.kind == "passed":
            continue
        if repeated and (outcome.kind == "refused" or kinds[outcome.kind, dtype]):
            continue
        _count(report, outcome, dtype, case)
        if outcome.failed:
            kinds[outcome.kind, dtype] += 1
            first.setdefault((outcome.kind, dtype), (source, case, outcome))
        if progress is not None:
            progress(number + 1, len(plans) + len(again))
    for (kind, dtype), count in kinds.most_common(_MOST_KINDS):
        source, case, outcome = first[kind, dtype]
        results = [] if outcome.report is None else outcome.report.results
        patterns = tuple(f"{result.name}: {pattern}" for result in results for pattern in result.patterns)
        simple = smallest(source, functools.partial(_fails_alike, trial, kind, seed), seed) or case
        found = trial(simple, seed)
        simple, outcome = (simple, found) if found.failed else (case, outcome)
        report.failures.append(Failure(kind, dtype, count, simple, outcome, as_code(simple), patterns))
    return report


def _fails_alike(trial: Trial, kind: str, seed: int, case: Case) -> bool:
    return trial(case, seed).kind == kind


def _count(report: ConformanceReport, outcome: Outcome, dtype: str, case: Case) -> None:
    """Count a case, also beside each of its labels."""
    column = 1 if outcome.failed else 2 if outcome.kind == "refused" else 0
    report.passed, report.failed, report.refused = (
        count + (column == i) for i, count in enumerate((report.passed, report.failed, report.refused))
    )
    report.spread = max(report.spread, outcome.spread)
    for label in (dtype, *(f"option {option}" for option in case.options), *_edges(case)):
        report.table.setdefault(label, [0, 0, 0])[column] += 1


def _edges(case: Case) -> list[str]:
    """Return which edges a case is at."""
    arrays = [array for array in case.arrays if isinstance(array, np.ndarray)]
    edges = {
        "edge: an empty array": any(array.size == 0 for array in arrays),
        "edge: one element": any(array.size == 1 for array in arrays),
        "edge: sizes of real nets": max((array.size for array in arrays), default=0) > 4096,
        "no options": not case.options,
    }
    return [edge for edge, holds in edges.items() if holds]


def as_code(case: Case) -> str:
    """Return Python code that makes the arrays of a case and calls the op; `kernel` stands for what is tried."""
    names, lines = [], ["import base64, zlib", "import numpy as np, refimpl", "from refimpl.testing import compare"]

    def named(value: Any, name: str) -> str:
        if isinstance(value, np.ndarray):
            lines.append(f"{name} = {_array_code(value)}")
            return name
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k!r}: {named(v, k.replace('.', '_'))}" for k, v in value.items()) + "}"
        return repr(value)

    for i, array in enumerate(case.arrays):
        names.append(named(array, f"array_{i}"))
    given = [*names, *(f"{name}={named(value, name)}" for name, value in case.options.items())]
    call = f"{', '.join(given)}"
    lines.append(f"print(compare(kernel({call}), refimpl.{case.f.__name__}, {call}))")
    return "\n".join(lines if any("b85" in line for line in lines) else lines[1:])


def _array_code(array: np.ndarray[Any, Any]) -> str:
    """Return an array as an expression: its numbers, or, if there are many, its bytes."""
    dtype = "ml_dtypes.bfloat16" if array.dtype.name == "bfloat16" else f"np.{array.dtype.name}"
    prefix = "__import__('ml_dtypes').bfloat16" if "ml" in dtype else dtype.replace("np.bool", "np.bool_")
    if array.size <= 64:
        numbers = repr(array.astype(np.float64).tolist() if "ml" in dtype else array.tolist())
        numbers = numbers.replace("nan", "np.nan").replace("inf", "np.inf")
        return f"np.array({numbers}, dtype={prefix}).reshape({array.shape})"
    packed = base64.b85encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()
    return f"np.frombuffer(zlib.decompress(base64.b85decode({packed!r})), {prefix}).reshape({array.shape})"
