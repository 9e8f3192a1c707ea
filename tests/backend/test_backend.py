"""Whose arrays these are, tiles, and the loop over them: order, threads, limits, errors."""

import contextvars
import itertools
import linecache
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import array_api_strict
import numpy as np
import pytest
from backends import Guarded, GuisedBackend
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

import refimpl
from refimpl import backend as be

ONE = np.ones(1)
NUMPY = be.NUMPY


def test_namespace_of_each_backend(backend):
    array = backend.array(np.ones(3))
    xp = be.namespace(array, None, array)
    assert backend.owns(xp.zeros_like(array))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((), "namespace: arrays must hold an array; got none"),
        ((None,), r"namespace: arrays\[0\] must hold an array; got none"),
        (([1.0],), r"namespace: arrays\[0\] must be a NumPy array.*; got builtins.list"),
        ((np.ones(1), 1.0), r"namespace: arrays\[1\] must be a NumPy array.*; got builtins.float"),
        ((np.float64(1),), "got numpy.float64"),
        ((np.ma.ones(1),), "got numpy.ma.*MaskedArray"),
        ((np.ones((1, 1)).view(np.matrix),), "got numpy.*matrix"),
        ((np.ones(1, dtype=">f4"),), "native byte order; got dtype >f4"),
        ((np.ones(1), array_api_strict.ones(1)), r"same backend as arrays\[0\] \(numpy\); got array_api_strict"),
        (
            (array_api_strict.ones(1), array_api_strict.ones(1, device=array_api_strict.Device("device1"))),
            r"arrays\[1\] must be on the same device as arrays\[0\]",
        ),
    ],
)
def test_namespace_refuses_a_mixture(arrays, message):
    with pytest.raises(TypeError, match=message):
        be.namespace(*arrays)


def test_to_numpy_gives_a_new_array_of_the_same_values(backend):
    for dtype in (np.float64, np.float32, np.int64, np.bool_):
        values = np.arange(6).reshape(2, 3).astype(dtype)
        array = backend.array(values)
        copy = be.to_numpy(array)
        assert type(copy) is np.ndarray
        np.testing.assert_array_equal(copy, values)
        copy[...] = 0
        np.testing.assert_array_equal(be.to_numpy(array), values)


def test_synchronize_takes_arrays_of_any_backend(backend):
    assert be.synchronize(backend.array(np.ones(1)), None) is None
    with pytest.raises(TypeError, match=r"^synchronize: "):
        be.synchronize([1])


def test_numpy_is_always_available():
    assert be.available()[0] == "numpy"
    assert set(be.available()) <= {"numpy", "cupy", "torch"}


class Immutable:
    """An array as JAX has them: with `at`, in place of assignments."""

    device, dtype, shape, ndim, at = "cpu", np.float64, (1, 1, 4), 3, None

    def __array_namespace__(self):
        return np


def test_arrays_that_cannot_be_written_are_refused():
    message = "avg_pool: x must be writeable in place; got an array of numpy, which numpy.from_dlpack"
    with pytest.raises(TypeError, match=message):
        refimpl.avg_pool(Immutable(), 2)


def test_arrays_of_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((1, 1, 4))
    with pytest.raises(TypeError, match=r"conv: x must be writeable in place; got an array of jax\.numpy, which"):
        refimpl.conv(x, x)
    assert refimpl.avg_pool(np.from_dlpack(x), 2).shape == (1, 1, 2)


def test_guarded_arrays_refuse_to_be_looked_at():
    """The guard must guard, or the tests that run on it show nothing."""
    array = np.ones(1).view(Guarded)
    for look in (bool, float, int, list, lambda a: a.item(), lambda a: a.tolist(), lambda a: range(a)):
        with pytest.raises(AssertionError, match="on a GPU"):
            look(array)
    total = be.namespace(array).sum(array)
    with pytest.raises(AssertionError, match="on a GPU"):
        float(total)


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), room=st.integers(1, 200))
def test_tiles_cover_every_item_once_in_order_within_the_limit(shape, room):
    seen = np.zeros(shape, dtype=int)
    starts = []
    with be.limits(tile_bytes=8 * room):
        for tile in NUMPY.tiles(tuple(shape), 8):
            assert seen[tile].size <= max(room, 1)
            seen[tile] += 1
            starts.append(tuple(s.start for s in tile))
    assert (seen == 1).all()
    assert starts == sorted(starts)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_are_collected_in_order(threads):
    order = []

    def work(part):
        time.sleep(0.002 * (part.start % 3))
        return part.start

    with be.limits(threads=threads, tile_bytes=8):
        NUMPY.run(work, NUMPY.tiles((20,), 8), collect=lambda tile, result: order.append((tile[0].start, result)))
    assert order == [(i, i) for i in range(20)]


def test_no_more_tiles_run_at_once_than_there_are_threads():
    running, most, lock = set(), [0], threading.Lock()

    def work(part):
        with lock:
            running.add(part.start)
            most[0] = max(most[0], len(running))
        time.sleep(0.005)
        with lock:
            running.discard(part.start)

    with be.limits(threads=3, tile_bytes=8):
        NUMPY.run(work, NUMPY.tiles((30,), 8))
    assert 1 <= most[0] <= 3


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_tile_arrives_and_leaves_nothing_running(threads):
    before = blas_threads()
    started = []

    def work(part):
        started.append(part.start)
        if part.start == 2:
            raise MemoryError("no room")
        time.sleep(0.01)

    with be.limits(threads=threads, tile_bytes=8), pytest.raises(MemoryError, match="no room"):
        NUMPY.run(work, NUMPY.tiles((1000,), 8))
    count = len(started)
    time.sleep(0.05)
    assert len(started) == count < 100
    assert blas_threads() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_tiles_themselves_arrives(threads):
    def tiles():
        yield from NUMPY.tiles((10,), 8)
        raise MemoryError("no more tiles")

    for _ in range(20):
        with be.limits(threads=threads, tile_bytes=8), pytest.raises(MemoryError, match="no more tiles"):
            NUMPY.run(lambda _: time.sleep(0.0005), tiles())


def test_no_job_waits_for_helpers_that_are_busy():
    release, started = threading.Event(), threading.Event()

    def hold(_):
        started.set()
        release.wait(timeout=30)

    def busy():
        with be.limits(threads=3, tile_bytes=8):
            NUMPY.run(hold, NUMPY.tiles((3,), 8))

    holder = threading.Thread(target=busy)
    holder.start()
    started.wait(timeout=30)
    with be.limits(threads=3, tile_bytes=8):
        for _ in range(50):
            NUMPY.run(lambda _: None, NUMPY.tiles((4,), 8))
    assert be.threads._CREW._jobs.qsize() <= be.threads._CREW._size
    release.set()
    holder.join()


def interrupted_at(number, call):
    """Run a call, and interrupt it at a line of `backend/threads.py`; returns whether it got there.

    Not at a `with`, where Python lets no signal in between a lock and its release.
    """
    lines = itertools.count(1)

    def trace(frame, event, _):
        file, line = frame.f_code.co_filename, frame.f_lineno
        here = file == be.threads.__file__ and event == "line" and "with " not in linecache.getline(file, line)
        if here and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_on_any_line_is_healed_by_the_next_call():
    def call():
        NUMPY.run(lambda _: None, [(slice(0, 1),)])

    before, number = blas_threads(), 1
    while interrupted_at(number, call):
        call()
        assert blas_threads() == before
        number += 1
    assert number > 10


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_blas_has_one_thread_inside_and_as_many_as_before_outside():
    before = blas_threads()
    inside = []

    def work(part):
        inside.append(blas_threads())
        if part.start == 0:  # a nested call
            NUMPY.run(lambda _: inside.append(blas_threads()), [(slice(0, 1),)])
            inside.append(blas_threads())

    NUMPY.run(work, [(slice(0, 1),)])
    assert inside == [[1] * len(before)] * 3
    assert blas_threads() == before


def test_eight_callers_at_once_share_one_limit():
    before, outcomes = blas_threads(), []
    x, weight = np.random.default_rng(0).normal(size=(2, 4, 20, 20)), np.random.default_rng(1).normal(size=(4, 4, 3, 3))
    expected = refimpl.conv(x, weight)
    barrier = threading.Barrier(8)

    def call():
        barrier.wait()
        with be.limits(tile_bytes=50_000):
            for _ in range(10):
                outcomes.append(np.allclose(refimpl.conv(x, weight), expected, rtol=1e-13))

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert outcomes == [True] * 80
    assert blas_threads() == before


@pytest.mark.parametrize("name", ["threads", "tile_bytes"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**41, ValueError),
        pytest.param(-(10**5000), ValueError, id="too long to print"),
        (1.5, TypeError),
        (True, TypeError),
        ("2", TypeError),
        (np.array([1, 2]), TypeError),
        (np.array(1), TypeError),
    ],
)
def test_wrong_limits(name, value, error):
    with pytest.raises(error, match=f"^limits: {name} must .*; got "), be.limits(**{name: value}):
        pass


def test_limits_nest_and_belong_to_their_context():
    def pieces():
        return len(list(NUMPY.tiles((64,), 1)))

    with be.limits(tile_bytes=32):
        assert pieces() == 2
        with be.limits(tile_bytes=16):
            assert pieces() == 4
            with be.limits(threads=1):
                assert pieces() == 4
        assert pieces() == 2
        assert contextvars.Context().run(pieces) == 1
    assert pieces() == 1


@pytest.mark.parametrize("rows", [64, 100, 129])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_a_product_in_parts_is_the_product(rows, parts):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (2, rows, 7)).astype(float), rng.integers(-9, 9, (3, 1, 7, 5)).astype(float)
    with mock.patch.object(be.numpy, "SMALL_PRODUCT", rows * 35 // parts):
        np.testing.assert_array_equal(NUMPY.matmul_in_parts(a, b), a @ b)


def test_a_gpu_takes_few_tiles():
    guised = GuisedBackend()

    def pieces(mebibytes, like):
        return len(list(be.of(like).tiles((mebibytes,), 1 << 20)))

    with guised.installed():
        like = guised.array(ONE)
        assert (pieces(16, ONE), pieces(16, like)) == (8, 1)
        assert (pieces(1024, ONE), pieces(1024, like)) == (256, 4)
        with be.limits(tile_bytes=2 << 20):
            assert pieces(16, ONE) == pieces(16, like) == 8


def test_limits_take_numpy_integers():
    x = np.ones((1, 30, 9))
    with be.limits(tile_bytes=np.uint8(1), threads=np.int8(2)):
        np.testing.assert_array_equal(refimpl.conv(x, np.ones((2, 30, 3))), np.full((1, 2, 7), 90.0))


def test_ops_work_while_the_interpreter_shuts_down():
    code = """
import atexit, numpy as np, refimpl
def last():
    with refimpl.backend.limits(threads=2, tile_bytes=100):
        print(refimpl.conv(np.ones((1, 1, 50)), np.ones((1, 1, 3))).sum())
atexit.register(last)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert (done.stdout, done.stderr) == ("144.0\n", "")


def test_without_threads_to_be_had_the_caller_does_the_work(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    order = []
    with be.limits(threads=2, tile_bytes=8):
        NUMPY.run(lambda part: part.start, NUMPY.tiles((9,), 8), collect=lambda _, result: order.append(result))
    assert order == list(range(9))


def test_threads_are_a_number_of_the_environment():
    code = "import refimpl.backend.threads as t; print(t.usable_cores())"
    for value, cores in (("3", 3), ("", None), ("many", None)):
        environment = os.environ | {"REFIMPL_NUM_THREADS": value}
        printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        assert int(printed) == (cores or len(os.sched_getaffinity(0)))


def _child(queue):
    x = np.ones((4, 2, 30, 30))
    with be.limits(threads=2, tile_bytes=20_000):
        queue.put((refimpl.conv(x, np.ones((2, 2, 3, 3))).sum(), blas_threads()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")  # of JAX, where another test has imported it
def test_a_forked_process_computes_with_threads_of_its_own():
    fork = multiprocessing.get_context("fork")
    here, there = fork.Queue(), fork.Queue()
    _child(here)  # the pool of this process has threads now, which a fork does not inherit
    before = blas_threads()
    ready, release = threading.Event(), threading.Event()

    def hold(_):
        ready.set()
        release.wait(timeout=30)

    holder = threading.Thread(target=NUMPY.run, args=(hold, [(slice(0, 1),)]))
    holder.start()  # BLAS is held to one thread at the moment of the fork
    ready.wait(timeout=30)
    child = fork.Process(target=_child, args=(there,))
    child.start()
    result = there.get(timeout=60)
    child.join(timeout=60)
    release.set()
    holder.join()
    assert child.exitcode == 0
    assert result == (here.get(timeout=10)[0], before)


def test_ctrl_c_stops_between_tiles():
    code = """
import numpy as np, signal, threading, refimpl.backend as b
from threadpoolctl import threadpool_info
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
def blas(): return [i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"]
before, done = blas(), []
def work(part):
    if part.start == 0: print("started", flush=True)
    done.append(threading.Event().wait(0.02))
try:
    with b.limits(threads=2, tile_bytes=8): b.NUMPY.run(work, b.NUMPY.tiles((100000,), 8))
except KeyboardInterrupt:
    count = len(done); threading.Event().wait(0.2)
    print("stopped", count == len(done) < 5000, blas() == before)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "stopped True True"


def test_an_op_leaves_numpy_as_it_was():
    x, weight = np.ones((4, 3, 40, 40)), np.ones((2, 3, 3, 3))
    before = np.geterr(), np.getbufsize()
    with be.limits(threads=2, tile_bytes=10000):
        refimpl.conv(x, weight)
        assert (np.geterr(), np.getbufsize()) == before
    with be.limits(threads=1, tile_bytes=10000):
        refimpl.conv(x, weight)
    assert (np.geterr(), np.getbufsize()) == before
