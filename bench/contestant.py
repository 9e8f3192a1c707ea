"""What a contestant is: a library on a device, that knows how to do every workload."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import measure
from bench.workloads import Workload

Calls = dict[str, Callable[[], Any]]


class Contestant:
    """A library on a device. `calls` gives, by direction, functions that return the result or a tuple of gradients."""

    device = "cpu"
    packages: tuple[str, ...] = ("numpy",)

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def calls(self, workload: Workload) -> Calls:
        """Return what to time."""
        raise NotImplementedError

    def available(self) -> bool:
        """Tell whether the library and its device are here."""
        try:
            return all(importlib.metadata.version(package) for package in self.packages)
        except importlib.metadata.PackageNotFoundError:
            return False

    def describe(self) -> dict[str, str]:
        """Return the versions, and the device."""
        return {package: importlib.metadata.version(package) for package in self.packages} | {"device": self.device}

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the array on the host."""
        return np.asarray(array)

    def seconds(self, call: Callable[[], Any], budget: float) -> float:
        """Return the median time of a call."""
        return measure.cpu_seconds(call, budget)

    def extra_memory(self, call: Callable[[], Any]) -> int | None:
        """Return the bytes a call needs beyond its inputs and outputs."""
        return measure.cpu_extra_memory(call, nbytes)


def arrays_of(result: Any) -> tuple[Any, ...]:
    """Return the arrays of a result."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def nbytes(result: Any) -> int:
    """Return the size of a result."""
    return sum(array.nbytes for array in arrays_of(result))
