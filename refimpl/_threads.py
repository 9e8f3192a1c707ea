"""Threads that take turns at the tiles of a call, and BLAS held to one thread meanwhile. Knows nothing of arrays."""

import functools
import os
import threading
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from typing import Any

from threadpoolctl import ThreadpoolController


@functools.cache
def usable_cores() -> int:
    """Return `REFIMPL_NUM_THREADS` if it is set, and else how many cores this process may use."""
    wanted = os.environ.get("REFIMPL_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[..., Any], tiles: Iterable[Any], threads: int, ahead: float
) -> Generator[tuple[Any, Any], None, None]:
    """Yield `(tile, work(*tile))` in the order of the tiles, computed by the caller and up to `threads - 1` helpers.

    At most `ahead` results wait for their turn or are computed. However this ends, no tile runs on afterwards.
    """
    job = _Job(work, tiles, ahead)
    try:
        _CREW.help_with(job, threads - 1)
        yield from job.results()
    finally:
        job.end()


class _Job:
    """The tiles of one call: whoever has time takes the next."""

    def __init__(self, work: Callable[..., Any], tiles: Iterable[Any], ahead: float) -> None:
        self._work, self._tiles, self._ahead = work, iter(tiles), ahead
        self._changed = threading.Condition()
        self._over = False  # no more tiles are taken
        self._taken = self._given = self._helping = 0
        self._arrived: dict[int, tuple[Any, Any, BaseException | None]] = {}

    def results(self) -> Generator[tuple[Any, Any], None, None]:
        """Yield what has its turn, compute what nobody else has taken, and wait if there is neither."""
        while True:
            with self._changed:
                while self._given not in self._arrived and (item := self._next()) is None:
                    if self._given == self._taken:
                        return
                    self._changed.wait()
                due = self._arrived.pop(self._given, None)
                if due is not None:
                    self._given += 1
                    self._changed.notify_all()
            if due is None:
                self._do(*item)  # type: ignore[misc]  # where nothing is due, there is an item
                continue
            if due[2] is not None:
                raise due[2]
            yield due[:2]
            del due  # what is large must not wait here for the next

    def help(self) -> None:
        """Compute tiles until there are none, in a thread of the crew."""
        while True:
            with self._changed:
                while (item := self._next()) is None and not self._over:
                    self._changed.wait()
                if item is None:
                    return
                self._helping += 1
            self._do(*item)
            with self._changed:
                self._helping -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Let nobody take another tile, wait for those in progress, and hold on to no array."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            while self._helping:
                self._changed.wait()
        del self._work, self._tiles, self._arrived

    def _next(self) -> tuple[int, tuple[Any, ...]] | None:
        """Return the next tile and its number; None if there is none, or none may be taken yet."""
        if self._over or self._taken - self._given >= self._ahead:
            return None
        try:
            tile = next(self._tiles)
        except StopIteration:
            self._over = True
            self._changed.notify_all()
            return None
        self._taken += 1
        return self._taken - 1, tile

    def _do(self, number: int, tile: tuple[Any, ...]) -> None:
        result, error = None, None
        try:
            result = self._work(*tile)
        except BaseException as raised:  # the caller's to handle, when it is its turn
            error = raised
        with self._changed:
            self._arrived[number] = tile, result, error
            self._over = self._over or error is not None
            self._changed.notify_all()


class _Crew:
    """Threads that wait for jobs, as many as were ever wanted: starting one takes longer than a small tile.

    They are shared by all callers. A caller never waits for one to be free: it does by itself what nobody helps with.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._lock = threading.Lock()
        self._size = 0

    def help_with(self, job: _Job, helpers: int) -> None:
        """Send helpers to a job, fewer if the system has no more threads or the interpreter is shutting down."""
        with self._lock:
            try:
                while self._size < helpers:
                    threading.Thread(target=_serve, args=(self._jobs,), name="refimpl", daemon=True).start()
                    self._size += 1
            except RuntimeError:
                helpers = self._size
        for _ in range(helpers):
            self._jobs.put(job)


def _serve(jobs: "SimpleQueue[_Job]") -> None:
    while True:
        jobs.get().help()


class _OneBlasThread:
    """Holds BLAS to one thread while any call is inside: the limit is the process's, so calls are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [library.num_threads for library in _blas_libraries()]
                self._set([1] * len(self._before))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._before)

    def forked(self) -> None:
        """Start anew in a child process, where the calls that were inside have no thread to leave in."""
        if self._inside:
            self._set(self._before)
        self.__init__()  # type: ignore[misc]  # there is nobody else yet

    @staticmethod
    def _set(numbers: list[int]) -> None:
        for library, number in zip(_blas_libraries(), numbers, strict=True):
            library.set_num_threads(number)


@functools.cache
def _blas_libraries() -> list[Any]:
    """Return the BLAS libraries that NumPy brought along; finding them takes milliseconds, so it is done once."""
    found: list[Any] = ThreadpoolController().select(user_api="blas").lib_controllers
    return found


_CREW = _Crew()
one_blas_thread = _OneBlasThread()


def _forked() -> None:
    """In a child process there is only the thread that forked it."""
    _CREW.__init__()  # type: ignore[misc]
    one_blas_thread.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
