"""What the ops use of their namespace is there in CuPy, with those arguments; the wheel imports without a GPU."""

import inspect
import operator
import os

import pytest
from backends import GUARDED_NAMESPACE, GUISE, GuardedBackend, GuisedBackend, patched_waits
from hypothesis import given, settings

from refimpl.testing.strategies import EVERY_OP

try:
    import cupy
except ImportError:  # a skip, unless a GPU is required
    cupy = None
if cupy is GUISE:  # of which nothing can be learnt about CuPy
    pytest.skip("CuPy's stand-in is installed", allow_module_level=True)

pytestmark = pytest.mark.skipif(
    cupy is None and os.environ.get("REFIMPL_REQUIRE_GPU") != "1", reason="no CuPy is installed"
)


def recorded_calls(backend, namespace):
    """Run every op over many cases on a recording namespace; returns `{(function, arguments, keywords)}`."""
    namespace.calls.clear()

    for strategy in EVERY_OP.values():

        @settings(max_examples=100, database=None, deadline=None)
        @given(case=strategy())
        def run(case):
            arrays, options = backend.arrays((case.arrays, case.options))
            out = case.f(*arrays, **options)
            case.f_backward(out[0] if isinstance(out, tuple) else out, *arrays, **options)

        with patched_waits(), backend.installed():
            run()
    return set(namespace.calls)


@pytest.fixture(scope="module")
def calls():
    return recorded_calls(GuisedBackend(), GUISE)


def test_the_record_is_one(calls):
    """If nothing is recorded, nothing is checked."""
    names = {name for name, _, _ in calls}
    assert {"matrix_transpose", "where", "zeros", "reshape", "exp", "maximum", "float64"} <= names
    assert "lib.stride_tricks.as_strided" in names
    assert len(names) > 15


def test_cupy_has_what_is_used(calls):
    for name, _, _ in calls:
        assert operator.attrgetter(name)(cupy) is not None


def test_cupy_takes_the_arguments(calls):
    for name, count, keywords in calls:
        function = operator.attrgetter(name)(cupy)
        if count is None:  # a dtype or a constant
            continue
        if isinstance(function, cupy.ufunc):
            assert count == function.nin, name
            assert set(keywords) <= {"out", "dtype", "casting"}, name
        else:
            inspect.signature(function).bind(*[None] * count, **dict.fromkeys(keywords))


@pytest.mark.slow
def test_device_is_only_given_where_arrays_are_made():
    calls = recorded_calls(GuardedBackend(), GUARDED_NAMESPACE)
    makers = {name for name, _, keywords in calls if "device" in keywords}
    assert "zeros" in makers
    assert makers <= {"zeros", "full", "empty", "arange", "asarray"}


@pytest.mark.parametrize("wrong", [("unstack", 1, ()), ("sum", 1, ("where",)), ("where", 5, ())])
def test_the_check_can_fail(wrong):
    name, count, keywords = wrong
    if not hasattr(cupy, name):
        return
    with pytest.raises(TypeError):
        inspect.signature(getattr(cupy, name)).bind(*[None] * count, **dict.fromkeys(keywords))
