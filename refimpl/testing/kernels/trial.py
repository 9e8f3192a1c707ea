"""One case, tried in several ways: once, again, with other values in the same memory, and with poison around."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import backend
from ..comparison import compare
from ..report import Report
from ..strategies import Case
from ..trees import leaves, together
from .libraries import Library, same, unchanged

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """How one case went."""

    kind: str
    """"passed", "refused", or what failed, alike for cases that fail alike."""
    text: str = ""
    """What failed in this case."""
    report: Report | None = None
    spread: float = 0.0
    """By how much two equal calls differed, relative to the largest element."""

    @property
    def failed(self) -> bool:
        """Whether the kernel did anything but pass or refuse."""
        return self.kind not in ("passed", "refused")


class Trial:
    """A kernel and perhaps its backward, and the op that they should compute.

    Parameters
    ----------
    kernel, backward
        Called as the op and its `_backward` are.
    library
        Whose arrays they take.
    model, allowances
        As `compare` takes them.
    """

    def __init__(self, kernel: Kernel, backward: Kernel | None, library: Library, allowances: dict[str, Any]) -> None:
        self.kernel, self.backward, self.library, self.allowances = kernel, backward, library, allowances

    def __call__(self, case: Case, seed: int = 0) -> Outcome:
        """Return how the kernel, and then its backward, does in a case."""
        outcome = self._ways("forward", self.kernel, case.f, case.arrays, case.options, seed)
        if outcome.failed or outcome.kind == "refused" or self.backward is None:
            return outcome
        arrays = (case.dout(seed), *case.arrays)
        back = self._ways("backward", self.backward, case.f_backward, arrays, case.options, seed)
        return back if back.failed else Outcome(outcome.kind, spread=max(outcome.spread, back.spread))

    def _ways(
        self, way: str, kernel: Kernel, f: Kernel, arrays: tuple[Any, ...], options: dict[str, Any], seed: int
    ) -> Outcome:
        """Return how a kernel does in one direction."""
        given = {"arrays": arrays, "options": options}
        mine = backend.mapped(self._handed, given)
        before = backend.mapped(lambda a: self.library.numpy(a) if self._is_array(a) else a, mine)
        try:
            first = self._called(kernel, mine, f, given)
            kept = _copied(self.library, first)
            if flaw := self._flaw(first, mine, before):
                return Outcome(f"{way}: {flaw[0]}", flaw[1])
            report = self._compared(first, f, given)
            if not report.ok:
                wrong = ", ".join(result.name for result in report.results if not result.ok)
                return Outcome(f"{way}: {wrong} wrong", "its result is wrong", report)
            again = self._called(kernel, mine, f, given)
            spread = _spread(kept, _copied(self.library, again))
            for fresh in (False, True):
                if outcome := self._with_other_values(way, kernel, mine, f, given, seed, fresh):
                    return outcome
            if not _all_same(_copied(self.library, first), kept):
                return Outcome(f"{way}: a later call changed an earlier result", "results lie in memory that is reused")
            if outcome := self._beyond_lengths(way, kernel, f, given):
                return outcome
        except NotImplementedError as error:
            return Outcome("refused", str(error))
        except AssertionError as error:
            return Outcome(f"{way}: not the results of the op", str(error))
        except Exception as error:  # whatever a kernel raises, it is counted, and the others go on
            return Outcome(f"{way}: raised {type(error).__name__}", f"{type(error).__name__}: {error}")
        return Outcome("passed", spread=spread)

    def _with_other_values(
        self, way: str, kernel: Kernel, mine: Any, f: Kernel, given: dict[str, Any], seed: int, fresh: bool
    ) -> Outcome | None:
        """Return what fails with other values: in the same memory, where a cache would look for the old ones."""
        if not (fresh or self.library.writeable):
            return None
        rng = np.random.default_rng([seed, 2 + fresh])
        other = backend.mapped(lambda a: _permuted(a, rng) if _is_values(a) else a, given)
        if fresh:
            mine = backend.mapped(self._handed, other)
        else:
            together(lambda a, values: self.library.fill(a, values) if _is_values(values) else None, mine, other)
        report = self._compared(self._called(kernel, mine, f, other), f, other)
        if report.ok:
            return None
        where = "fresh memory" if fresh else "the same memory"
        return Outcome(f"{way}: wrong with other values in {where}", "is a result, or a pointer, kept?", report)

    def _beyond_lengths(self, way: str, kernel: Kernel, f: Kernel, given: dict[str, Any]) -> Outcome | None:
        """Return what fails when all that lies beyond the lengths is NaN."""
        poisoned = _poisoned_beyond_lengths(f.__name__, given)
        if poisoned is None:
            return None
        mine = backend.mapped(self._handed, poisoned)
        report = self._compared(self._called(kernel, mine, f, poisoned), f, poisoned)
        return None if report.ok else Outcome(f"{way}: reads beyond the lengths", "NaN there reaches a result", report)

    def _called(self, kernel: Kernel, mine: dict[str, Any], f: Kernel, given: dict[str, Any]) -> Any:
        shape, dtype = _first(f(*given["arrays"], **given["options"]))
        self.library.poison(shape, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel warns is no failure
            result = kernel(*mine["arrays"], **mine["options"])
            self.library.synchronize()
        return tuple(result) if isinstance(result, list) else result

    def _compared(self, result: Any, f: Kernel, given: dict[str, Any]) -> Report:
        return compare(result, f, *given["arrays"], **self.allowances, **given["options"])

    def _flaw(self, result: Any, mine: Any, before: Any) -> tuple[str, str] | None:
        """Return what is wrong with a result but its numbers."""
        for name, array in leaves(result):
            if not self.library.is_plain(array):
                text = f"{name or 'the result'} is a {type(array).__module__}.{type(array).__qualname__}"
                return "not a plain array", text
        if (modified := unchanged(self.library, mine, before)) is not None:
            return "an argument was modified", f"{modified} was"
        for name, array in leaves(result):
            for other, argument in leaves(mine):
                if self._is_array(argument) and self.library.share_memory(array, argument):
                    return "a result shares memory with an argument", f"{name or 'the result'} with {other}"
        return None

    def _handed(self, value: Any) -> Any:
        return self.library.array(value) if isinstance(value, np.ndarray) else value

    @staticmethod
    def _is_array(value: Any) -> bool:
        return hasattr(value, "dtype") and hasattr(value, "shape")


def _first(result: Any) -> tuple[tuple[int, ...], Any]:
    """Return the shape and dtype of the first result, which itself is freed."""
    first = next((a for _, a in leaves(result)), np.zeros(0))
    return first.shape, first.dtype


def _copied(library: Library, result: Any) -> list[np.ndarray[Any, Any]]:
    return [library.numpy(array) for _, array in leaves(result)]


def _all_same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))


def _spread(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> float:
    """Return by how much results differ, relative to the largest element of each."""
    spread = 0.0
    for one, two in zip(a, b, strict=True):
        if one.shape == two.shape and one.size and not same(one, two):
            with np.errstate(all="ignore"):
                apart, largest = np.nanmax(np.abs(one.astype(float) - two.astype(float))), np.nanmax(np.abs(one))
            spread = max(spread, float(apart) / max(float(largest), 1e-30))
    return spread


def _is_values(value: Any) -> bool:
    """Return whether a value is a floating array, whose numbers may be others."""
    be = backend.find(value)
    return be is not None and be.is_floating(value)


def _permuted(array: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return other values of the same kind: those of the array in another order, with other signs where it has both."""
    values = rng.permutation(array.reshape(-1)).reshape(array.shape)
    numbers = values.astype(np.float64)
    if (numbers < 0).any() and not np.isinf(numbers).any():
        values = values * np.asarray(rng.choice([-1, 1], array.shape)).astype(values.dtype)
    return np.asarray(values)


def _poisoned_beyond_lengths(op: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments with NaN in the keys and values beyond `key_lengths`, None if there are none."""
    lengths = given["options"].get("key_lengths")
    if lengths is None or not op.startswith("scaled_dot_product_attention"):
        return None
    arrays = list(given["arrays"])
    for place in (-2, -1):
        array = arrays[place]
        counts = np.asarray(lengths)[(..., None, None, None)] if array.ndim > 2 else np.asarray(lengths)
        beyond = np.arange(array.shape[-2])[:, None] >= counts
        try:
            shape = np.broadcast_shapes(beyond.shape, array.shape)
        except ValueError:
            return None
        if shape != array.shape:  # keys that several sequences share have no end
            return None
        arrays[place] = np.where(np.broadcast_to(beyond, shape), np.array(np.nan, array.dtype), array)
    return {"arrays": tuple(arrays), "options": given["options"]}
