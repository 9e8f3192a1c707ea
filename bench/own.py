"""refimpl on its backends, its textbook on NumPy, and the ceilings: what the house brings itself.

refimpl and its textbook are stateless: a backward recomputes what it needs from the arguments. `max_pool_backward` is
given the indices of the forward, which PyTorch saves, too. Multi-head attention is self-attention, so its gradients are
those of x and of the two weights.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import measure
from bench.contestant import Calls, Contestant, arrays_of, nbytes
from bench.workloads import DIRECTIONS, Workload


class Refimpl(Contestant):
    """refimpl on NumPy."""

    library = "refimpl"

    def describe(self) -> dict[str, str]:
        """Return the versions; refimpl's own is known without its being installed."""
        import refimpl

        return {"refimpl": refimpl.__version__} | super().describe()

    def asarray(self, array: np.ndarray) -> Any:
        """Return the array on this backend."""
        return array

    def calls(self, workload: Workload) -> Calls:
        """Return what to time."""
        library = importlib.import_module(self.library)
        f, f_backward = getattr(library, workload.op), getattr(library, f"{workload.op}_backward")
        x, *others = arrays = [self.asarray(array) for array in workload.arrays()]
        dout, options = self.asarray(workload.dout()), dict(workload.options)
        if "key_lengths" in options:
            options["key_lengths"] = self.asarray(np.array(options["key_lengths"]))
        if workload.op == "multi_head_attention":
            params = dict(zip(("in_proj_weight", "out_proj.weight"), others, strict=True))

            def backward() -> tuple[Any, ...]:
                grads = f_backward(dout, x, x, x, params, **options)
                return grads.dquery + grads.dkey + grads.dvalue, *grads.dparams.values()

            return {"forward": lambda: f(x, x, x, params, **options), "backward": backward}
        saved = {"indices": f(x, **options, return_indices=True)[1]} if workload.op == "max_pool" else {}

        def present(grads: Any) -> tuple[Any, ...]:
            return tuple(grad for grad in arrays_of(grads) if grad is not None)

        return {
            "forward": lambda: f(*arrays, **options),
            "backward": lambda: present(f_backward(dout, *arrays, **options, **saved)),
        }


class RefimplCupy(Refimpl):
    """refimpl on CuPy."""

    device = "gpu"

    def available(self) -> bool:
        """Tell whether a GPU answers."""
        import refimpl

        return "cupy" in refimpl.backend.available()

    def describe(self) -> dict[str, str]:
        """Return the versions, and the device."""
        import cupy

        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return super().describe() | {"cupy": cupy.__version__, "device": name}

    def asarray(self, array: np.ndarray) -> Any:
        """Return the array on the GPU."""
        import cupy

        return cupy.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the array on the host."""
        return array.get()

    def seconds(self, call: Callable[[], Any], budget: float) -> float:
        """Return the median time of a call."""
        return measure.cupy_seconds(call, budget)

    def extra_memory(self, call: Callable[[], Any]) -> int:
        """Return the bytes a call needs beyond its inputs and outputs."""
        return measure.cupy_extra_memory(call, nbytes)


class Textbook(Refimpl):
    """`refimpl.textbook` on NumPy: the same mathematics as one would first write it."""

    library = "refimpl.textbook"


class Ceiling(Contestant):
    """One square `np.matmul` of the same FLOPs, or for pooling one `np.copyto` of the same bytes."""

    xp: Any = np

    def calls(self, workload: Workload) -> Calls:
        """Return what to time."""
        return {direction: self._call(workload, direction) for direction in DIRECTIONS}

    def _call(self, workload: Workload, direction: str) -> Callable[[], Any]:
        xp, rng = self.xp, np.random.default_rng(0)
        if flops := workload.flops(direction):
            n = max(1, round((flops / 2) ** (1 / 3)))
            a, b = (xp.asarray(rng.standard_normal((n, n), dtype=np.float32)) for _ in range(2))
            return lambda: xp.matmul(a, b)
        source = xp.ones(workload.bytes(direction) // 8, np.float32)  # half of the bytes is read, half is written
        target = xp.zeros_like(source)
        return lambda: xp.copyto(target, source)


class CeilingCupy(Ceiling, RefimplCupy):
    """One square `cupy.matmul` of the same FLOPs, or for pooling one `cupy.copyto` of the same bytes."""

    @property
    def xp(self) -> Any:
        """CuPy, imported when it is needed."""
        return importlib.import_module("cupy")
