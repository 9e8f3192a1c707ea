"""How time and memory are measured, on the CPU and on a GPU.

Time: the median of several samples after a warm-up call. On the CPU a sample is the mean of as many calls as take half
a millisecond (`timeit`); on a GPU it is the time between two events on the stream (`cupyx.profiler.benchmark`, or
PyTorch's events).

Extra memory: what a call needs beyond its inputs and outputs. On the CPU the high-water mark of the process's resident
memory (Linux: `VmHWM`, reset before the call) less what was resident before and less the results: it sees every library
alike, whatever allocates, to about 0.1 MB. The process must give back at once what it frees, or the next call takes it
again unseen: `MEMORY_ENVIRONMENT` makes glibc do so, which costs time, so no times are taken there. On a GPU: what the
library's own pool grew by.
"""

import gc
import math
import statistics
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 5e-4
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
Call = Callable[[], Any]


def cpu_seconds(call: Call, budget: float) -> float:
    """Return the median seconds of a call that waits for its result, from samples that take about `budget` seconds."""
    call()  # to warm up: caches, lazy imports, pools of threads
    number = max(1, math.ceil(SAMPLE_SECONDS / timeit.timeit(call, number=1)))
    first = timeit.timeit(call, number=number)
    others = timeit.repeat(call, number=number, repeat=min(50, max(1, int(budget / first))))
    return statistics.median([first, *others]) / number


def cupy_seconds(call: Call, budget: float) -> float:
    """Return the median seconds of a call between CuPy's events."""
    from cupyx.profiler import benchmark

    times = benchmark(call, n_repeat=50, n_warmup=3, max_duration=max(budget, 0.1)).gpu_times
    return statistics.median(times.ravel().tolist())


def torch_cuda_seconds(call: Call, budget: float) -> float:
    """Return the median seconds of a call between PyTorch's events."""
    import torch

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    call()
    once = sample()
    return statistics.median(sample() for _ in range(min(50, max(3, int(budget / once)))))


def cpu_extra_memory(call: Call, nbytes: Callable[[Any], int]) -> int | None:
    """Return the bytes at the peak of a call beyond what was resident before and its results; None where not Linux."""
    if sys.platform != "linux":
        return None
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    return max(0, peak - before - nbytes(result))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def cupy_extra_memory(call: Call, nbytes: Callable[[Any], int]) -> int:
    """Return the bytes that CuPy's pool grew by, beyond the results."""
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    result = call()
    return max(0, pool.total_bytes() - before - nbytes(result))


def torch_cuda_extra_memory(call: Call, nbytes: Callable[[Any], int]) -> int:
    """Return the most that PyTorch had allocated beyond what it held before and the results."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return max(0, torch.cuda.max_memory_allocated() - before - nbytes(result))
