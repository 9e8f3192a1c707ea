"""PyTorch tensors on a CPU or a CUDA device, through array-api-compat. Imports nothing of PyTorch by itself.

A tensor says what it is only to those who know PyTorch: `array_api_compat.torch` gives its functions the names and
meanings of the array API standard. No graph is recorded: what comes in with `requires_grad` is read as it is.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from .portable import Backend
from .values import Array


class TorchBackend(Backend):
    """PyTorch tensors, dense ("strided"), on a CPU or a CUDA device."""

    name = "torch"

    def __init__(self, like: Array) -> None:
        self.xp, self.device, self._beside = _namespace(), like.device, {"device": like.device}
        self.reads_free = like.device.type == "cpu"
        if not self.reads_free:
            self.tile_bytes = 256 << 20

    @classmethod
    def owns(cls, array: Any) -> bool:
        """Return whether an object is a tensor; if it is, PyTorch has been imported."""
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(array, torch.Tensor)

    @classmethod
    def available(cls) -> bool:
        """Return whether PyTorch and array-api-compat are installed, without importing them."""
        return all(importlib.util.find_spec(name) is not None for name in ("torch", "array_api_compat"))

    def refuse(self, array: Array) -> str | None:
        """Return what tensor is needed if this one lies elsewhere, or is no dense one."""
        if self.xp is None:
            return "come with array-api-compat (pip install array-api-compat); got a PyTorch tensor without it"
        if type(array) not in (sys.modules["torch"].Tensor, sys.modules["torch"].nn.Parameter):
            return f"be a plain tensor; got {type(array).__module__}.{type(array).__qualname__}"
        if array.device.type not in ("cpu", "cuda"):
            return f"be on a CPU or a CUDA device; got a tensor on {array.device}"
        if str(array.layout) != "torch.strided" or array.is_quantized:
            return f"be dense; got layout {array.layout}{', quantised' if array.is_quantized else ''}"
        return None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which no graph is recorded."""
        return _without_graph(self.device)

    def copy(self, array: Array) -> Array:
        """Return a copy (`asarray` warns of tensors that require a gradient)."""
        return array.detach().clone()

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy on the host; bfloat16 is that of ml_dtypes."""
        array = array.detach().cpu()
        if self.dtype_name(array) != "bfloat16":
            return np.array(array.numpy())
        bfloat16 = importlib.import_module("ml_dtypes").bfloat16
        return np.array(array.view(self.xp.int16).numpy()).view(bfloat16)

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Array:
        """Return a copy on the device."""
        if array.dtype.name != "bfloat16":
            return self.xp.asarray(np.array(array), **self._beside)
        return self.xp.asarray(np.array(array).view(np.int16), **self._beside).view(self.xp.bfloat16)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            sys.modules["torch"].cuda.synchronize(self.device)

    def itemsize(self, array: Array) -> int:
        """Return the bytes of one element."""
        return int(array.element_size())

    def is_integer(self, array: Array) -> bool:
        """Return whether the tensor is of an integer dtype that PyTorch computes with: signed, or 8 bits."""
        return super().is_integer(array) and self.dtype_name(array) not in ("uint16", "uint32", "uint64")

    def contiguous(self, array: Array) -> Array:
        """Return the tensor in row-major order."""
        return array.contiguous()


@functools.cache
def _namespace() -> Any:
    """Return PyTorch's functions under their names in the standard, None if array-api-compat is not installed."""
    try:
        return importlib.import_module("array_api_compat.torch")
    except ImportError:
        return None


@contextlib.contextmanager
def _without_graph(device: Any) -> Iterator[None]:
    torch = sys.modules["torch"]
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield
