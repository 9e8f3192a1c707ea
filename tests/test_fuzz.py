"""Whatever a public function is called with, it returns what it should, or raises an error that says what is wrong.

2,000 calls and more; `REFIMPL_PROFILE=long pytest tests/test_fuzz.py` makes 70,000.
"""

import inspect
import math
import re
import warnings

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.testing import strategies

DTYPES = [
    "f8", "f4", "f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3, "g", "c16", "i8", "i4", "u1", "u8", "?", "O", "S3",
    "U3", "M8[s]", "m8[s]", ">f8", [("a", "f8"), ("b", "i4")],
]  # fmt: skip
INTS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([30, -(2**31), 2**41, 2**63, -(2**63), 2**64, 10**400, -(10**4000)]),
    st.sampled_from([np.int8(3), np.uint8(20), np.int64(-1), np.int32(2), np.uint64(2**64 - 1)]),
)
SCALARS = st.one_of(
    INTS,
    st.booleans(),
    st.floats(width=32),
    st.sampled_from([None, 1e308, 5e-324, 1j, np.nan, np.inf, -0.0, np.float32(0.5), np.bool_(True), ...]),
    st.sampled_from(
        ["", "same", "valid", "SAME", "reflect", "circular", b"same", object(), int, {1: 2}, {1}, slice(3)]
    ),
)


@st.composite
def arrays(draw):
    """Draw an array of any dtype and a small shape, or something like one."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    array = np.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["array"] * 6 + ["masked", "strict", "list", "matrix", "memoryview"]))
    if kind == "masked":
        return np.ma.array(array)
    if kind == "strict":
        return array_api_strict.zeros(shape)
    if kind == "list":
        return array.tolist()
    if kind == "matrix":
        return np.zeros((2, 2)).view(np.matrix)
    if kind == "memoryview":
        return memoryview(np.zeros(shape or 1))
    return array


ANYTHING = st.one_of(
    SCALARS,
    arrays(),
    st.lists(SCALARS, max_size=4),
    st.tuples(SCALARS, SCALARS),
    st.tuples(st.tuples(INTS, INTS), INTS),
)


@st.composite
def calls(draw, op, backward):
    """Draw the arguments of a call: valid ones, of which one to three are replaced by anything."""
    case = draw(strategies.EVERY_OP[op](dtypes=("float64", "float32", "float16")))
    function = case.f_backward if backward else case.f
    names = list(inspect.signature(function).parameters)
    positional = [np.zeros(draw(st.lists(st.integers(0, 3), max_size=4))) if backward else None, *case.arrays]
    arguments = dict(zip(names, positional if backward else case.arrays, strict=False)) | case.options
    if backward and draw(st.booleans()):
        out = case.f(*case.arrays, **case.options)
        arguments["dout"] = out[0] if isinstance(out, tuple) else out
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        arguments[name] = draw(ANYTHING)
        if isinstance(arguments.get("params"), dict) and name == "params":
            arguments["params"] = {draw(st.sampled_from(["in_proj_weight", "bias_k", 3])): draw(ANYTHING)}
    return function, arguments


def check_shapes(function, arguments, result):
    """Check what a call that was no error returned."""
    if not function.__name__.endswith("_backward"):
        out = result[0] if isinstance(result, tuple) else result
        assert out.dtype == next(arguments[name] for name in ("x", "query", "outs") if name in arguments).dtype
        if refimpl.backend.of(out).is_floating(out) and math.prod(out.shape) < 1 << 20:
            getattr(refimpl, f"{function.__name__}_backward")(out, **arguments)  # agrees that this is the shape
        return
    gradients = result._asdict() if hasattr(result, "_asdict") else {"dx": result}
    for field, gradient in gradients.items():
        argument = arguments.get(field.removeprefix("d"))
        if refimpl.backend.is_array(argument):
            assert gradient.shape == argument.shape
            assert gradient.dtype == argument.dtype


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("op", strategies.EVERY_OP)
@settings(max_examples=3 * settings.default.max_examples)
@given(data=st.data())
def test_a_call_is_right_or_says_what_is_wrong(op, backward, data):
    function, arguments = data.draw(calls(op, backward))
    result, error = outcome(function, **arguments)
    if error is None:
        check_shapes(function, arguments, result)
        return
    found = re.match(rf"^{function.__name__}: (?P<what>.+?) must .+; got ", str(error), flags=re.DOTALL)
    assert found, error
    assert any(name in found["what"] for name in [*arguments, "the result", "the heads of query"]), error


def outcome(function, *args, **kwargs):
    """Return the result of a call, or the error that it raised."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        try:
            return function(*args, **kwargs), None
        except (TypeError, ValueError) as error:
            return None, error


@pytest.mark.parametrize("name", ["namespace", "to_numpy", "synchronize"])
@given(value=ANYTHING)
def test_the_backend_says_what_is_no_array(name, value):
    _, error = outcome(getattr(refimpl.backend, name), value)
    assert error is None or re.match(rf"^{name}: (array|arrays\[0\]) must .+; got ", str(error)), error


@given(threads=ANYTHING, tile_bytes=ANYTHING)
def test_limits_say_what_is_wrong(threads, tile_bytes):
    _, error = outcome(lambda: refimpl.backend.limits(threads=threads, tile_bytes=tile_bytes).__enter__())
    assert error is None or re.match(r"^limits: (threads|tile_bytes) must .+; got ", str(error)), error
