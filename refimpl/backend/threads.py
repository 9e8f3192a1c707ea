"""Threads that take turns at the tiles of a call, and BLAS held to one thread meanwhile. Knows nothing of arrays."""

import contextlib
import functools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
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
            if due is None:
                self._do(*item)  # type: ignore[misc]  # where nothing is due, there is an item
                continue
            if due[2] is not None:
                raise due[2]
            yield due[:2]
            del due  # what is large must not wait here for the next
            with self._changed:
                self._given += 1
                self._changed.notify_all()

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
        except BaseException as raised:
            self._over = True
            if not isinstance(raised, StopIteration):
                self._arrived[self._taken] = (), None, raised
                self._taken += 1
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
        self._lock = threading.RLock()  # a signal handler may call an op, too
        self._size = self._idle = 0

    def help_with(self, job: _Job, helpers: int) -> None:
        """Send helpers to a job: those that are idle, and more if there are fewer threads than that."""
        with self._lock:
            try:
                while self._idle < helpers and self._size < helpers:
                    threading.Thread(target=self._serve, args=(self._jobs,), name="refimpl", daemon=True).start()
                    self._size += 1
                    self._idle += 1
            except RuntimeError:  # the system has no more threads, or the interpreter is shutting down
                pass
            sent = min(helpers, self._idle)
            self._idle -= sent
        for _ in range(sent):
            self._jobs.put(job)

    def _serve(self, jobs: "SimpleQueue[_Job]") -> None:
        while True:
            jobs.get().help()
            with self._lock:
                self._idle += 1


class _Call:
    """Somebody who wants BLAS on one thread."""


class _OneBlasThread:
    """Holds BLAS to one thread while any call is inside: the limit is the process's, so calls are told apart.

    Ctrl-C may interrupt any line, in here too: a call that is gone counts no more, as it is only known by a weak
    reference, and whoever leaves last restores what was before the first.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may call an op, too
        self._inside = weakref.WeakSet[_Call]()
        self._before: list[int] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        call = _Call()
        try:
            with self._lock:
                self._inside.add(call)
                if self._before is None:
                    # Not a comprehension: Python 3.12 and newer make it part of this function (PEP 709), and where
                    # an exception comes up in between, may leave without releasing the lock.
                    self._before = list(map(operator.attrgetter("num_threads"), _blas_libraries()))
                    self._set([1] * len(self._before))
            yield
        finally:
            try:
                self._leave(call)
            except KeyboardInterrupt:
                self._leave(call)
                raise

    def _leave(self, call: _Call) -> None:
        with self._lock:
            self._inside.discard(call)
            if not self._inside and self._before is not None:
                self._set(self._before)
                self._before = None

    def forked(self) -> None:
        """Start anew in a child process, where the calls that were inside have no thread to leave in."""
        if self._before is not None:
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
    _CREW.__init__()  # type: ignore[misc]  # there is nobody else yet
    one_blas_thread.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
