"""Arrays of the library that a kernel is written for: made, filled, compared, and watched."""

import importlib
from typing import Any

import numpy as np

from ..arrays import viewed
from ..trees import leaves

_POISON = {"f": np.nan, "i": -77, "u": 77, "b": True}


class Library:
    """NumPy, PyTorch, CuPy or JAX, on a device.

    Parameters
    ----------
    name : "numpy", "torch", "cupy" or "jax"
    device : str, optional
        As the library names it, such as "cuda".
    """

    def __init__(self, name: str, device: str | None) -> None:
        self.name, self.device = name, device
        self.module: Any = importlib.import_module(name)
        self.writeable = name != "jax"

    def array(self, array: np.ndarray[Any, Any]) -> Any:
        """Return a copy of a NumPy array, in fresh memory, which keeps gaps and other strides where the library can."""
        if self.name == "numpy":
            return self._laid_out(array)
        if self.name == "torch":
            return self._tensor(array)
        if self.name == "cupy":
            return self.module.asarray(np.array(array))
        return self.module.numpy.asarray(array)

    def fill(self, target: Any, values: np.ndarray[Any, Any]) -> None:
        """Write other values into the memory of an array."""
        if self.name == "torch":
            target.detach().copy_(self._tensor(values))
        else:
            target[...] = self.array(values)

    def poison(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Leave NaN in freed memory of the size of a result, where the next allocation may find it."""
        if self.name in ("numpy", "torch"):
            filled = self.array(np.full(shape, _POISON.get(dtype.kind, np.nan)).astype(dtype))
            del filled

    def numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """Return a copy in NumPy."""
        from ... import backend

        return backend.to_numpy(viewed("conformance", array))

    def is_plain(self, array: Any) -> bool:
        """Return whether an array is one of the library, and of no subclass that may compute later."""
        if self.name == "jax":
            return isinstance(array, self.module.Array)
        kinds = {"numpy": ("ndarray",), "torch": ("Tensor",), "cupy": ("ndarray",)}[self.name]
        return type(array) in tuple(getattr(self.module, kind) for kind in kinds) or isinstance(array, np.generic)

    def share_memory(self, a: Any, b: Any) -> bool:
        """Return whether two arrays lie in the same memory."""
        if self.name == "torch":
            starts = [array.untyped_storage().data_ptr() for array in (a, b)]
            return bool(starts[0] == starts[1] != 0)
        if self.name == "jax" or not all(isinstance(array, self.module.ndarray) for array in (a, b)):
            return False
        return bool(self.module.shares_memory(a, b)) if a.size and b.size else False

    def synchronize(self) -> None:
        """Wait until what was handed to a GPU is done: errors come out here."""
        if self.name == "torch" and self.device not in (None, "cpu"):
            self.module.cuda.synchronize()
        elif self.name == "cupy":
            self.module.cuda.Device().synchronize()

    def _tensor(self, array: np.ndarray[Any, Any]) -> Any:
        torch = self.module
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).to(self.device or "cpu")
        return torch.from_numpy(np.array(array, order="K")).to(self.device or "cpu")

    @staticmethod
    def _laid_out(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        copy = np.array(array, order="K")
        copy.flags.writeable = True
        return copy


def unchanged(library: Library, arrays: Any, before: Any) -> str | None:
    """Return the name of the first array that no longer holds what it held, None if all do."""
    for (name, array), (_, values) in zip(leaves(arrays), leaves(before), strict=True):
        if isinstance(values, np.ndarray) and not same(library.numpy(array), values):
            return name
    return None


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Return whether two arrays hold the same numbers, NaN included."""
    if a.dtype.kind not in "fV" and b.dtype.kind not in "fV":
        return np.array_equal(a, b)
    return np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)
