"""Ways of holding arrays: each makes an array of a NumPy one, and the ops must give the same results on all of them."""

import contextlib
import functools
import types
from unittest import mock

import array_api_strict
import numpy as np

import refimpl


class Backend:
    """Plain NumPy."""

    name = "numpy"

    def array(self, array):
        return np.array(array)

    def arrays(self, tree):
        """Turn every array in (nested) tuples, lists and dicts into one of this backend; leave all else alone."""
        if isinstance(tree, np.ndarray):
            return self.array(tree)
        if isinstance(tree, dict):
            return {key: self.arrays(value) for key, value in tree.items()}
        if isinstance(tree, tuple):
            return tuple(self.arrays(value) for value in tree)
        return tree

    def owns(self, array):
        return type(array) is np.ndarray


class ReadOnlyBackend(Backend):
    """NumPy arrays that cannot be written."""

    name = "numpy-readonly"

    def array(self, array):
        array = np.array(array)
        array.flags.writeable = False
        return array


class StridedBackend(Backend):
    """NumPy arrays whose every dimension runs backwards, with gaps."""

    name = "numpy-strided"

    def array(self, array):
        wide = np.full([2 * n for n in array.shape], 99, dtype=array.dtype)
        view = wide[(..., *(slice(None, None, -2),) * array.ndim)]
        view[...] = array
        return view


class StrictBackend(Backend):
    """array-api-strict on its second device, which refuses every silent conversion to NumPy."""

    name = "array-api-strict"
    device = array_api_strict.Device("device1")

    def array(self, array):
        return array_api_strict.asarray(np.array(array), device=self.device)

    def owns(self, array):
        return isinstance(array, type(self.array(np.zeros(1)))) and array.device == self.device


class CupyBackend(Backend):
    """CuPy, where a device answers."""

    name = "cupy"

    def array(self, array):
        import cupy

        return cupy.asarray(np.array(array))

    def owns(self, array):
        import cupy

        return type(array) is cupy.ndarray


def _waits(name):
    def method(self, *args, **kwargs):
        if not Guarded.may_wait:
            raise AssertionError(f"{name} of an array: on a GPU this would wait for the device or copy from it")
        return getattr(np.ndarray, name)(self, *args, **kwargs)

    return method


class Guarded(np.ndarray):
    """A NumPy array that behaves as one on a device would: its values cannot be looked at in passing."""

    may_wait = False

    def __array_namespace__(self, *, api_version=None):
        del api_version
        return GUARDED_NAMESPACE

    def __iter__(self):
        raise AssertionError("iteration over an array: on a GPU this would wait for the device")

    for _name in ("__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__", "item", "tolist"):
        locals()[_name] = _waits(_name)


class _GuardedNamespace(types.ModuleType):
    """NumPy, with results that are guarded, and a record of every call: `(function, arguments, keywords)`."""

    def __init__(self):
        super().__init__("guarded_numpy")
        self.calls = {}

    def __getattr__(self, name):
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            self.calls.setdefault((name, None, ()), None)
            return found

        @functools.wraps(found)
        def call(*args, **kwargs):
            self.calls.setdefault((name, len(args), tuple(sorted(kwargs))), None)
            return _guard(found(*args, **kwargs))

        return call


def _guard(result):
    if isinstance(result, tuple | list):
        return tuple(_guard(item) for item in result)
    if isinstance(result, np.ndarray | np.generic):
        return np.asarray(result).view(Guarded)
    return result


GUARDED_NAMESPACE = _GuardedNamespace()


class GuardedBackend(Backend):
    """The guarded NumPy subclass."""

    name = "guarded"

    def array(self, array):
        return np.array(array).view(Guarded)

    def owns(self, array):
        return type(array) is Guarded


@contextlib.contextmanager
def patched_waits():
    """Let guarded arrays be read by the functions of `refimpl.backend` that say that they wait, and by no other."""

    def waiting(function):
        @functools.wraps(function)
        def call(*args):
            before, Guarded.may_wait = Guarded.may_wait, True
            try:
                return function(*args)
            finally:
                Guarded.may_wait = before

        return call

    names = ("all_finite", "bounds", "largest", "sum_of_squares", "to_numpy")
    with mock.patch.multiple(refimpl.backend, **{name: waiting(getattr(refimpl.backend, name)) for name in names}):
        yield


BACKENDS = [Backend(), ReadOnlyBackend(), StridedBackend(), StrictBackend(), GuardedBackend(), CupyBackend()]
