"""CuPy on a GPU: where it differs from the array API standard, and what is faster there (CuPy 14.2)."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from . import tiling
from .strided import StridedBackend
from .values import Array, Tile

PIECE = 1 << 24  # elements of a sum of squares at once: CuPy makes a copy of what it multiplies with itself


class CupyBackend(StridedBackend):
    """CuPy arrays on one device. New arrays lie on the current device, which `context` sets."""

    name = "cupy"
    tile_bytes = 256 << 20  # long beside the start of a kernel

    def __init__(self, like: Array) -> None:
        self.xp, self.device, self._beside = sys.modules["cupy"], like.device, {}

    @classmethod
    def owns(cls, array: Any) -> bool:
        """Return whether an object is a CuPy array; if it is, CuPy has been imported."""
        cupy = sys.modules.get("cupy")
        return cupy is not None and type(array) is cupy.ndarray

    @classmethod
    def available(cls) -> bool:
        """Return whether CuPy can be imported, and a GPU answers."""
        try:
            import cupy
        except ImportError:
            return False
        return bool(cupy.is_available())

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Make the device of the arrays the current one."""
        with np.errstate(all="ignore"), self.device:
            yield

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Array:
        """Return a copy on the device."""
        with self.device:
            return self.xp.asarray(np.array(array))

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy on the host."""
        return np.asarray(self.xp.asnumpy(array))

    def synchronize(self) -> None:
        """Wait for the device."""
        with self.device:
            self.device.synchronize()

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of squares in pieces, of which each product takes memory for itself."""
        row = self.xp.reshape(array, (-1,))
        pieces = (row[i : i + PIECE] for i in range(0, row.shape[0], PIECE))
        return sum((float(piece @ piece) for piece in pieces), 0.0)

    def tiles(self, shape: tuple[int, ...], item_bytes: int, least: int = 0) -> Iterator[Tile]:
        """Cut into tiles as large as may be: one runs after the other, each on the whole GPU."""
        del least
        return tiling.cut(shape, item_bytes, self.tile_room())

    def run(
        self,
        work: Callable[..., Any],
        tiles: Iterable[Tile],
        collect: Callable[[Tile, Any], None] | None = None,
        result_bytes: int = 0,
    ) -> None:
        """Run one tile after the other on the current stream."""
        tiling.run(work, tiles, collect, result_bytes or self.tile_room(), threads=False)
