"""Anyone's arrays as arrays that ops take: viewed, not copied, and without importing their libraries.

NumPy arrays, and what lies on a CPU, are viewed as NumPy arrays (which the ops compute with fastest); what lies on a
GPU stays there, as CuPy arrays, or as PyTorch tensors.
"""

import sys
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from .trees import leaves

_ON_CPU = 1  # DLPack's number of the device type


def viewed(function: str, tree: Any, name: str = "") -> Any:
    """Return the tree with each array as one that ops take, all of one backend.

    Raises
    ------
    TypeError
        For a tensor that cannot be viewed: sparse, quantised, or without memory ("meta").
    """
    found = _mapped_by_name(function, tree, name)
    elsewhere = [array for _, array in leaves(found) if backend.is_array(array) and type(array) is not np.ndarray]
    if not elsewhere:
        return found
    be = backend.of(elsewhere[0])

    def moved(array: Any) -> Any:
        if not backend.is_array(array):
            return array
        other = backend.of(array)
        return array if other.goes_with(be) and other.device == be.device else be.from_numpy(other.to_numpy(array))

    return backend.mapped(moved, found)


def returned(array: np.ndarray[Any, Any], like: Any) -> Any:
    """Return a copy of a NumPy array as an array of the library, and on the device, of another."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(like, torch.Tensor):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(like.device)
        return torch.from_numpy(np.array(array)).to(like.device)
    if jax is not None and isinstance(like, jax.Array):
        return jax.numpy.asarray(array)
    return backend.of(like).from_numpy(array)


def is_array(value: Any) -> bool:
    """Return whether the value is an array of any library that can be viewed."""
    return backend.is_array(value) or hasattr(value, "__dlpack__") or isinstance(value, np.ndarray | np.generic)


def _mapped_by_name(function: str, tree: Any, name: str) -> Any:
    """Return the tree with its arrays viewed; errors name the leaf."""
    if isinstance(tree, dict):
        return {key: _mapped_by_name(function, part, f"{name}[{key!r}]") for key, part in tree.items()}
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", [f"{name}[{i}]" for i in range(len(tree))])
        parts = [_mapped_by_name(function, part, each) for each, part in zip(names, tree, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return _viewed(function, tree, name) if is_array(tree) else tree


def _viewed(function: str, array: Any, name: str) -> Array:
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if type(array) is np.ndarray:
        return array
    if isinstance(array, np.generic | np.memmap):
        return np.asarray(array)
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_torch(function, torch, array, name)
    if jax is not None and isinstance(array, jax.Array) and all(d.platform == "cpu" for d in array.devices()):
        return np.asarray(array)  # knows bfloat16, which DLPack does not bring to NumPy
    be = backend.find(array)
    if be is not None and be.refuse(array) is None:
        return array
    if hasattr(array, "__dlpack_device__"):
        if array.__dlpack_device__()[0] == _ON_CPU:
            return np.from_dlpack(array)
        if (cupy := sys.modules.get("cupy")) is not None:
            return cupy.from_dlpack(array)
    raise TypeError(f"{function}: {name or 'the array'} cannot be viewed as a NumPy or CuPy array; got {type(array)}")


def _of_torch(function: str, torch: Any, tensor: Any, name: str) -> Array:
    kind = (
        f"layout {tensor.layout}" if tensor.layout != torch.strided
        else "a quantised tensor" if tensor.is_quantized
        else f"a tensor on {tensor.device}" if tensor.device.type not in ("cpu", "cuda")
        else None
    )  # fmt: skip
    if kind is not None:
        raise TypeError(f"{function}: {name or 'the tensor'} must be dense, on a CPU or a CUDA device; got {kind}")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.device.type == "cpu":
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy()
        ml_dtypes = sys.modules.get("ml_dtypes") or __import__("ml_dtypes")
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    be = backend.find(tensor)
    if be is not None and be.refuse(tensor) is None:
        return tensor
    if (cupy := sys.modules.get("cupy")) is not None:
        return cupy.from_dlpack(tensor)
    raise TypeError(
        f"{function}: {name or 'the tensor'} lies on {tensor.device}: install array-api-compat, or import cupy"
    )
