"""What README says of waiting and of CUDA graphs, tried: `python -m bench.gpu.graphs FACTS.json`.

A call that waits is found by forbidding it (`cupyx.allow_synchronize`). A graph is captured after a call on the same
stream, which compiles kernels and fills a memory pool of its own; the pool stays alive as long as the graph, whose
replays write into it.
"""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.gpu import facts
from bench.gpu.calls import Probe, flat, probes
from refimpl.backend import to_numpy

REPLAYS = 20


def waits(probe: Probe) -> bool:
    """Return whether a call that runs the second time waits for the device."""
    import cupyx

    probe.call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        try:
            with cupyx.allow_synchronize(False):
                probe.call()
        except Exception as error:
            if "synchron" in f"{type(error).__name__} {error}".lower() or isinstance(error, AssertionError):
                return True
            raise
    return False


def captured(probe: Probe) -> dict[str, Any]:
    """Capture a call, replay it, and compare: `{"captured": bool, "same": bool, "ms": of a replay}`, or why not."""
    import cupy

    cupy.cuda.Device().synchronize()
    expected = [to_numpy(array) for array in flat(probe.call())]
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        warm = probe.call()
        stream.synchronize()
        del warm
        stream.begin_capture()
        try:
            result = probe.call()
        except Exception as error:
            with contextlib.suppress(Exception):
                stream.end_capture()
            return {"captured": False, "error": f"{type(error).__name__}: {error}"[:300]}
        graph = stream.end_capture()
        arrays = flat(result)
        for array in arrays:
            array.fill(0)
        graph.launch(stream)
        stream.synchronize()
        same = all(to_numpy(a).tobytes() == e.tobytes() for a, e in zip(arrays, expected, strict=True))
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for _ in range(REPLAYS):
            graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        return {"captured": True, "same": same, "ms": cupy.cuda.get_elapsed_time(start, stop) / REPLAYS}


def main(path: Path) -> int:
    """Try every probe; return 1 if anything is not as README says.

    Captures that should fail come last, as they may leave their stream unusable.
    """
    import cupy

    found: dict[str, dict[str, Any]] = {}
    for name, probe in sorted(probes(cupy.asarray).items(), key=lambda item: not item[1].captured):
        seen: dict[str, Any] = {"waits": None, "captured": None}
        try:
            seen["waits"] = waits(probe)
            seen |= captured(probe)
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"[:300]
        as_told = seen["waits"] == probe.waits and seen["captured"] == probe.captured and seen.get("same") is not False
        found[name] = seen | {"as README says": as_told}
        facts.tell(path, "graphs", found)
    table = Table("call", "waits", "captured", "same bits", "ms a replay", "as README says", "error")
    for name, seen in found.items():
        cells = (seen.get(key, "") for key in ("waits", "captured", "same", "ms", "as README says", "error"))
        table.add_row(name, *(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=160).print(table)
    return int(not all(seen["as README says"] for seen in found.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
