"""Array backends: whose arrays these are, how new ones are made, and the primitives that ops are made of.

`of` finds the backend of an op's arguments, once a call; everything below the op is handed that object.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

from .cupy import CupyBackend
from .numpy import NumpyBackend
from .portable import Backend, runs
from .tiling import LEAST_LIGHT, limits
from .torch import TorchBackend
from .values import Array, Tile, is_number, mapped, shown, sizes_of

__all__ = [
    "LEAST_LIGHT",
    "NUMPY",
    "Array",
    "Backend",
    "Tile",
    "available",
    "common",
    "find",
    "is_array",
    "is_number",
    "limits",
    "mapped",
    "namespace",
    "of",
    "op",
    "register",
    "runs",
    "shown",
    "sizes_of",
    "synchronize",
    "to_numpy",
]

P = ParamSpec("P")
T = TypeVar("T")

NUMPY = NumpyBackend()
_REGISTERED: dict[str, type[Backend]] = {"numpy": NumpyBackend, "cupy": CupyBackend, "torch": TorchBackend}


def register(name: str, backend: type[Backend]) -> None:
    """Make every op take the arrays of a further library.

    Parameters
    ----------
    name
        What `available` calls it. A name that is registered already is replaced.
    backend
        A subclass of `Backend`. Its `owns` recognises the arrays, and its constructor is given one of them.

    Raises
    ------
    TypeError
        If `backend` is no subclass of `Backend`.
    """
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise TypeError(f"register: backend must be a subclass of refimpl.backend.Backend; got {shown(backend)}")
    _REGISTERED[name] = backend


def available() -> tuple[str, ...]:
    """Return the names of the backends that work here.

    "numpy" always; "cupy" where a GPU answers to it (CuPy is imported to find out; nothing else in refimpl does);
    "torch" where PyTorch and array-api-compat are installed; and those registered.
    """
    return tuple(name for name, backend in _REGISTERED.items() if backend.available())


def namespace(*arrays: Array | None) -> ModuleType:
    """Return the module (`numpy`, `cupy`, ...) that the arrays belong to.

    Parameters
    ----------
    *arrays
        Arrays of one backend, on one device; `None` stands for an argument that was left out.

    Raises
    ------
    TypeError
        For arrays of two backends or devices, for anything that is no array (a list, a scalar, a subclass of
        `numpy.ndarray` such as a masked array), and if there is no array at all.

    Examples
    --------
    >>> import numpy
    >>> namespace(numpy.zeros(3), None) is numpy
    True
    """
    return common("namespace", {f"arrays[{i}]": array for i, array in enumerate(arrays)}).xp


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """Return the array as a new NumPy array, copied from its device where it has one (which waits for the device)."""
    return common("to_numpy", {"array": array}).to_numpy(array)


def synchronize(*arrays: Array | None) -> None:
    """Wait until the device of the arrays has done all the work given to it; on a CPU there is nothing to wait for."""
    common("synchronize", {f"arrays[{i}]": array for i, array in enumerate(arrays)}).synchronize()


def find(array: Any) -> Backend | None:
    """Return the backend of an object, None if it is no array."""
    if type(array) is np.ndarray:
        return NUMPY
    for backend in _REGISTERED.values():
        if backend.owns(array):
            return backend(array)
    return Backend(array) if Backend.owns(array) else None


def is_array(value: object) -> bool:
    """Return whether the value is an array of some backend."""
    return find(value) is not None


def of(array: Array) -> Backend:
    """Return the backend of an array that has been checked."""
    return cast(Backend, find(array))


def common(function: str, arrays: Mapping[str, Array | None]) -> Backend:
    """Return the one backend of all arrays, or raise the TypeError that names the function and the argument."""
    first: tuple[str, Backend] | None = None
    for name, array in arrays.items():
        if array is None:
            continue
        be = find(array)
        if be is None:
            raise TypeError(
                f"{function}: {name} must be a NumPy array, a CuPy array, or one that offers __array_namespace__"
                f"; got {type(array).__module__}.{type(array).__qualname__}"
            )
        if rule := be.refuse(array):
            raise TypeError(f"{function}: {name} must {rule}")
        if first is None:
            first = name, be
        elif not be.goes_with(first[1]):
            raise TypeError(
                f"{function}: {name} must be of the same backend as {first[0]} ({first[1].xp.__name__})"
                f"; got {be.xp.__name__}"
            )
        elif be.device != first[1].device:
            rule = f"be on the same device as {first[0]} ({first[1].device}); got {be.device}"
            raise TypeError(f"{function}: {name} must {rule}")
    if first is None:
        raise TypeError(f"{function}: {' or '.join(arrays) or 'arrays'} must hold an array; got none")
    return first[1]


def op(function: Callable[P, T]) -> Callable[P, T]:
    """Make a public op of a function: it computes in the context of its arrays' backend.

    A `numpy.memmap` is taken as the array that it is.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if not _PLAIN.issuperset(map(type, (*args, *options.values()))):
            args, options = mapped(_without_file, args), mapped(_without_file, options)
        first = next((be for be in map(find, (*args, *options.values())) if be is not None), NUMPY)
        with first.context():
            return function(*args, **options)

    return call


_PLAIN = frozenset((np.ndarray, bool, int, float, str, tuple, type(None)))  # types that hold no numpy.memmap


def _without_file(value: Any) -> Any:
    return value.view(np.ndarray) if type(value) is np.memmap else value
