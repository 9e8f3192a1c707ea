"""Every op and backward once on CuPy arrays, against NumPy in float64: `python -m bench.gpu.smoke FACTS.json`.

The distance is given in units of `refimpl.testing.error_bound`, so up to 1 is right.
"""

import importlib
import importlib.metadata
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import refimpl
from bench.gpu import facts
from bench.gpu.calls import FLOATING, Call, flat, smoke_calls
from bench.gpu.semantics import CHECKS
from refimpl.backend import to_numpy
from refimpl.testing import error_bound

DTYPES = FLOATING


def environment() -> dict[str, Any]:
    """Return the device and the versions of what computes on it."""
    import cupy

    found = {"python": platform.python_version(), "system": platform.platform(), "refimpl": refimpl.__version__}
    for package in ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "jax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    runtime = cupy.cuda.runtime
    return found | {
        "device": runtime.getDeviceProperties(0)["name"].decode(),
        "CUDA runtime": runtime.runtimeGetVersion(),
        "driver": runtime.driverGetVersion(),
        "backends": refimpl.backend.available(),
    }


def dtype_of(name: str) -> Any:
    """Return the dtype of a name; bfloat16 is of ml_dtypes."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16) if name == "bfloat16" else np.dtype(name)


def distances(call: Call, dtype: str) -> dict[str, float]:
    """Return how far results and gradients on CuPy are from NumPy's in float64, in units of the bound."""
    import cupy

    given = call.cast(dtype_of(dtype))
    exact = given.cast(np.float64)
    there = given.on(cupy.asarray)
    dout = np.random.default_rng(0).standard_normal(flat(exact.forward())[0].shape).astype(dtype_of(dtype))
    f, f_backward = (getattr(refimpl, name) for name in (call.op, f"{call.op}_backward"))
    found = {}
    for direction, actual, due, bound in (
        (
            "forward",
            there.forward(),
            exact.forward(),
            lambda: error_bound(f, *exact.arrays, dtype=dtype, **exact.options),
        ),
        (
            "backward",
            there.backward(cupy.asarray(dout)),
            exact.backward(dout.astype(np.float64)),
            lambda: error_bound(f_backward, dout.astype(np.float64), *exact.arrays, dtype=dtype, **exact.options),
        ),
    ):
        if strays := [type(array) for array in flat(actual) if type(array) is not cupy.ndarray]:
            raise TypeError(f"results must be CuPy arrays; got {strays}")
        found[direction] = worst(*(list(map(to_numpy, flat(t))) for t in (actual, due, bound())))
    return found


def worst(actual: list[np.ndarray], due: list[np.ndarray], bounds: list[np.ndarray]) -> float:
    """Return the largest distance in units of the bound; inf where shapes differ, or where NaN meets a number."""
    found = 0.0
    for a, d, b in zip(actual, due, bounds, strict=True):
        if a.shape != d.shape:
            return np.inf
        with np.errstate(all="ignore"):
            apart = np.abs(a.astype(np.float64) - d)
            units = np.where((apart == 0) | (np.isnan(a.astype(np.float64)) & np.isnan(d)), 0.0, apart / b)
        found = max(found, float(np.nan_to_num(units, nan=np.inf, posinf=np.inf).max(initial=0)))
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Show the distances."""
    result = Table(title="CuPy against NumPy in float64, in units of the bound (forward / backward)")
    result.add_column("op")
    for dtype in DTYPES:
        result.add_column(dtype, justify="right")
    for name, by_dtype in found.items():
        cells = (" / ".join(f"{value:.2f}" for value in by_dtype[dtype].values()) or "raises" for dtype in DTYPES)
        result.add_row(name, *cells)
    return result


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what a call returns, or its whole traceback."""
    try:
        return call(), None
    except Exception:
        return None, traceback.format_exc()


def main(path: Path) -> int:
    """Check all ops, and what they rely on CuPy for; return 1 if anything is wrong."""
    console = Console(width=120)
    facts.tell(path, "environment", environment())
    found: dict[str, dict[str, dict[str, float]]] = {}
    errors: dict[str, str] = {}
    for number, call in enumerate(smoke_calls()):
        name = f"{number}: {call.op}"
        found[name] = {}
        for dtype in DTYPES:
            distance, error = attempt(lambda call=call, dtype=dtype: distances(call, dtype))
            found[name][dtype] = distance or {}
            if error is not None:
                errors.setdefault(name, f"{dtype}: {error}")
        facts.tell(path, "smoke", {"distances": found, "errors": errors})
    semantics = {check.__name__: attempt(check)[1] for check in CHECKS}
    facts.tell(path, "semantics", semantics)
    console.print(table(found))
    for name, error in (errors | {f"semantics: {k}": e for k, e in semantics.items() if e}).items():
        console.rule(name)
        console.print(error, markup=False)
    far = [f"{n}, {d}" for n, row in found.items() for d, pair in row.items() if max(pair.values(), default=0) > 1]
    console.print(
        f"{len(found)} calls in {len(DTYPES)} dtypes: {len(errors)} raise, {len(far)} are further than the bound."
    )
    console.print(f"{sum(e is None for e in semantics.values())} of {len(semantics)} checks of CuPy's semantics hold.")
    facts.tell(path, "smoke", {"distances": found, "errors": errors, "too far": far})
    return int(bool(errors or far or any(semantics.values())))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
