"""Ways of holding arrays: each makes an array of a NumPy one, and the ops must give the same results on all of them."""

import contextlib
import functools
import sys
import types
from unittest import mock

import array_api_strict
import numpy as np

import refimpl


class Backend:
    """Plain NumPy."""

    name = "numpy"
    lacks = ()
    """Dtypes that it does not compute with."""
    flushes_subnormals = False
    """Whether numbers of float32 and bfloat16 below the smallest normal one count as 0."""

    def missing(self):
        """Return why no array of this backend can be had here, None if one can."""
        return

    def installed(self):
        """Return a context in which refimpl knows this backend."""
        return contextlib.nullcontext()

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

    def missing(self):
        return None if "cupy" in refimpl.backend.available() else "no device answers to CuPy"

    flushes_subnormals = True  # CuPy compiles its kernels with -ftz=true

    def array(self, array):
        import cupy

        return cupy.asarray(np.array(array))

    def owns(self, array):
        import cupy

        return type(array) is cupy.ndarray


class CupyViewsBackend(CupyBackend):
    """CuPy arrays that are views: reversed with gaps, transposed, or beginning beside an aligned address."""

    name = "cupy-views"

    def array(self, array):
        import cupy

        array = np.array(array)
        shape, kind = array.shape, array.size % 3
        if kind == 0:
            view = cupy.asarray(np.full([2 * n for n in shape], 99, dtype=array.dtype))[
                (..., *(slice(None, None, -2),) * array.ndim)
            ]
        elif kind == 1:
            view = cupy.asarray(np.zeros(shape[::-1], dtype=array.dtype)).T
        else:
            view = cupy.asarray(np.zeros(array.size + 1, dtype=array.dtype))[1:].reshape(shape)
        view[...] = cupy.asarray(array)
        return view


class TorchBackend(Backend):
    """PyTorch tensors on the CPU that record a graph, where it is not forbidden."""

    name = "torch"
    device = "cpu"
    lacks = ("uint16", "uint32", "uint64")

    def missing(self):
        if "torch" not in refimpl.backend.available():
            return "PyTorch or array-api-compat is not installed"
        return None

    def array(self, array):
        import torch

        torch.set_num_threads(1)  # idle threads would spin beside the other tests
        array = np.array(array)
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        tensor = tensor.to(self.device)
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    def owns(self, array):
        import torch

        return type(array) is torch.Tensor and array.device.type == self.device and not array.requires_grad


class TorchViewsBackend(TorchBackend):
    """Tensors whose every dimension has gaps, or is expanded where all along it is equal."""

    name = "torch-views"

    def array(self, array):
        tensor = super().array(array).detach()
        for d, size in enumerate(tensor.shape):
            first = tensor.narrow(d, 0, min(1, size))
            if size > 1 and bool((tensor == first).all()):
                tensor = first.expand(tensor.shape)
        if tensor.is_contiguous():
            wide = tensor.new_zeros([2 * n for n in tensor.shape])
            view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
            view[...] = tensor
            tensor = view
        return tensor


class TorchCudaBackend(TorchBackend):
    """PyTorch tensors on a GPU."""

    name = "torch-cuda"
    device = "cuda"

    def missing(self):
        if reason := super().missing():
            return reason
        import torch

        return None if torch.cuda.is_available() else "no GPU answers to PyTorch"


def _waits(name):
    def method(self, *args, **kwargs):
        if Guarded.never_waits or not Guarded.may_wait:
            raise AssertionError(f"{name} of an array: on a GPU this would wait for the device or copy from it")
        return getattr(np.ndarray, name)(self, *args, **kwargs)

    return method


class Guarded(np.ndarray):
    """A NumPy array that behaves as one on a device would: its values cannot be looked at in passing."""

    may_wait = never_waits = False

    def __array_namespace__(self, *, api_version=None):
        del api_version
        return GUARDED_NAMESPACE

    def __iter__(self):
        raise AssertionError("iteration over an array: on a GPU this would wait for the device")

    for _name in ("__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__", "item", "tolist"):
        locals()[_name] = _waits(_name)


class GuardedInGuise(Guarded):
    """A guarded array that passes for one of CuPy's, which has no `__array_namespace__` and lies on a device."""

    __array_namespace__ = None

    @property
    def device(self):
        return GUISE.only_device


class _GuardedNamespace(types.ModuleType):
    """NumPy, with results that are guarded, and a record of every call: `(function, arguments, keywords)`."""

    def __init__(self, name, kind):
        super().__init__(name)
        self.kind = kind
        self.calls = {}

    def __getattr__(self, name):
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            self.calls.setdefault((name, None, ()), None)
            return found

        @functools.wraps(found)
        def call(*args, **kwargs):
            self.calls.setdefault((name, len(args), tuple(sorted(kwargs))), None)
            return self.guard(found(*args, **kwargs))

        return call

    def guard(self, result):
        if isinstance(result, tuple | list):
            return tuple(self.guard(item) for item in result)
        if isinstance(result, np.ndarray | np.generic):
            return np.asarray(result).view(self.kind)
        return result


class _Device:
    """Stands for a device of CuPy, which is current inside of a `with` block."""

    def __init__(self):
        self.entered = 0

    def __enter__(self):
        self.entered += 1
        return self

    def __exit__(self, *error):
        self.entered -= 1

    def synchronize(self):
        pass


class _Guise(_GuardedNamespace):
    """What the guarded NumPy needs to pass for CuPy, where that differs."""

    ndarray = GuardedInGuise
    asnumpy = staticmethod(np.array)

    def __init__(self):
        super().__init__("cupy", GuardedInGuise)
        self.only_device = _Device()
        self.lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=self._as_strided))

    def _as_strided(self, *args):
        self.calls.setdefault(("lib.stride_tricks.as_strided", len(args), ()), None)
        return self.guard(np.lib.stride_tricks.as_strided(*args))

    def __getattr__(self, name):
        if name in ("arange", "asarray", "empty", "full", "ones", "zeros"):
            assert self.only_device.entered, f"{name} would put its array on whatever device is current"
        return super().__getattr__(name)


GUARDED_NAMESPACE = _GuardedNamespace("guarded_numpy", Guarded)
GUISE = _Guise()


class GuardedBackend(Backend):
    """The guarded NumPy subclass."""

    name = "guarded"

    def array(self, array):
        return np.array(array).view(Guarded)

    def owns(self, array):
        return type(array) is Guarded


class GuisedBackend(Backend):
    """The guarded NumPy subclass in the guise of CuPy: the ops go the ways that they go on a GPU."""

    name = "guarded-as-cupy"

    def installed(self):
        return mock.patch.dict(sys.modules, {"cupy": GUISE})

    def array(self, array):
        return np.array(array).view(GuardedInGuise)

    def owns(self, array):
        return type(array) is GuardedInGuise


def _subclasses(kind):
    return {kind for child in kind.__subclasses__() for kind in (child, *_subclasses(child))}


@contextlib.contextmanager
def patched_waits():
    """Let guarded arrays be read by the methods of a `Backend` that say that they wait, and by no other."""

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
    with contextlib.ExitStack() as stack:
        for kind in (refimpl.backend.Backend, *_subclasses(refimpl.backend.Backend)):
            own = {name: waiting(vars(kind)[name]) for name in names if name in vars(kind)}
            if own:
                stack.enter_context(mock.patch.multiple(kind, **own))
        yield


@contextlib.contextmanager
def a_gpu_that_nobody_waits_for():
    """Give a backend that passes for CuPy, of whose arrays no function at all may read a value."""
    guised = GuisedBackend()
    with guised.installed(), mock.patch.object(Guarded, "never_waits", True):
        yield guised


BACKENDS = [
    Backend(),
    ReadOnlyBackend(),
    StridedBackend(),
    StrictBackend(),
    GuardedBackend(),
    GuisedBackend(),
    CupyBackend(),
    CupyViewsBackend(),
    TorchBackend(),
    TorchViewsBackend(),
    TorchCudaBackend(),
]
