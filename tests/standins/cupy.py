"""CuPy's stand-in for dry runs of what needs a GPU: NumPy arrays in its guise, of which `backends.py` has the class.

With this folder first on `PYTHONPATH`, `import cupy` gives it. Reading a value is allowed, unless a stream captures or
waiting is forbidden; products cannot be captured, as CuPy 14 refuses to call cuBLAS then.
"""

import contextlib
import sys
import time
import types

import numpy as np
from backends import GUISE, Guarded, GuardedInGuise

Guarded.may_wait = True


class Capturing:
    """Whether some stream captures, and what was overwritten since."""

    now = False
    overwritten = ()


class Stream:
    """A stream that does everything at once."""

    def __init__(self, non_blocking=False):
        del non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def synchronize(self):
        pass

    def begin_capture(self):
        Capturing.now, Capturing.overwritten, Guarded.never_waits = True, [], True

    def end_capture(self):
        Capturing.now = Guarded.never_waits = False
        return Graph()


class Graph:
    """A graph whose replay writes what the captured call had written, where it was overwritten since."""

    def launch(self, stream):
        del stream
        for array, written in Capturing.overwritten:
            array.view(np.ndarray)[...] = written


class Event:
    """A moment on the host."""

    def record(self, stream=None):
        del stream
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass


class Pool:
    """A memory pool that does not count."""

    malloc = None

    def free_all_blocks(self):
        pass

    def total_bytes(self):
        return 0


def _product(a, b):
    if Capturing.now:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED: products cannot be captured")
    return np.ndarray.__matmul__(a, b)


def _fill(self, value):
    Capturing.overwritten.append((self, np.array(self.view(np.ndarray))))
    np.ndarray.fill(self.view(np.ndarray), value)


GuardedInGuise.__matmul__ = _product
GuardedInGuise.__iter__ = lambda self: (self[i] for i in range(len(self)))
GuardedInGuise.get = lambda self: np.array(self.view(np.ndarray))
GuardedInGuise.fill = _fill
GUISE.__version__ = "0 (a stand-in)"
GUISE.is_available = lambda: True
GUISE.asarray = lambda array, *args, **keywords: GUISE.guard(np.asarray(array, *args, **keywords))
GUISE.get_default_memory_pool = Pool
GUISE.cuda = types.SimpleNamespace(
    Stream=Stream,
    Event=Event,
    MemoryPool=Pool,
    Device=lambda: GUISE.only_device,
    get_elapsed_time=lambda start, stop: 1e3 * (stop.seconds - start.seconds),
    using_allocator=lambda _: contextlib.nullcontext(),
    runtime=types.SimpleNamespace(
        getDeviceProperties=lambda _: {"name": b"NumPy in the guise of CuPy"},
        runtimeGetVersion=lambda: 0,
        driverGetVersion=lambda: 0,
    ),
)
GUISE.only_device.__enter__()  # it is current, as the first device is
sys.modules["cupy"] = GUISE
