"""Every override of a backend computes what the portable definition says; and a backend from outside is taken."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as drawn

import refimpl
from refimpl import backend as backends
from refimpl.backend import Backend

PORTABLE = Backend(np.zeros(1))
NOT_PRIMITIVES = {  # what a backend is, where its arrays lie, and in what pieces it works: tested elsewhere
    "name", "threads", "tile_bytes", "has_strides", "reads_free", "owns", "available", "refuse", "context", "goes_with",
    "synchronize", "tiles", "run", "tile_room", "to_numpy", "from_numpy", "copy", "unfolded", "contiguous", "in_rows",
}  # fmt: skip
NUMBERS = st.floats(-4, 4, width=32)
SMALL = st.integers(1, 5)


def matrix(draw, *shape, dtype=np.float64, elements=NUMBERS):
    return draw(drawn(dtype, shape, elements=elements))


def one_array(draw):
    return (matrix(draw, draw(SMALL), draw(SMALL), dtype=draw(st.sampled_from([np.float64, np.float32]))),)


def any_dtype(draw):
    names = ["float64", "float32", "float16", "int8", "int64", "uint8"]
    return (np.ones(draw(SMALL), dtype=draw(st.sampled_from(names))),)


def integers(draw):
    return (matrix(draw, draw(SMALL), dtype=np.int64, elements=st.integers(-9, 9)),)


def perhaps_not_finite(draw):
    return (matrix(draw, draw(SMALL), 3, elements=st.one_of(NUMBERS, st.sampled_from([math.inf, math.nan]))),)


def condition_and_array(draw):
    (array,) = one_array(draw)
    return draw(drawn(bool, array.shape)), array


def product(draw):
    n, m, k = draw(SMALL), draw(st.sampled_from([1, 2, 70])), draw(SMALL)
    return matrix(draw, n, m, k), matrix(draw, 1, k, draw(st.sampled_from([1, 3, 512])), elements=st.just(0.5))


def rows(draw):
    (a,) = one_array(draw)
    return draw(st.sampled_from([(a,), (a, a[:1])]))


def sums(draw):
    array = matrix(draw, draw(SMALL), draw(SMALL), draw(SMALL))
    return array, draw(st.sampled_from([0, -1, (-2, -1), (0, 2)])), draw(st.booleans())


def runs(draw):
    kernel, steps = (draw(SMALL), draw(SMALL)), (draw(SMALL), draw(SMALL))
    length = draw(SMALL)
    size = sum((k - 1) * step for k, step in zip(kernel, steps, strict=True)) + length
    return matrix(draw, 2, 3, size), kernel, steps, length


def weighted_runs(draw):
    lines, kernel, steps, length = runs(draw)
    real = draw(st.sampled_from([None, lines > 0]))
    return lines, matrix(draw, 3, *kernel), steps, length, real


def run_products(draw):
    lines, kernel, steps, length = runs(draw)
    return lines, matrix(draw, 2, 3, length), kernel, steps


ARGUMENTS = {
    "dtype_name": any_dtype, "itemsize": any_dtype, "is_half": any_dtype, "is_integer": any_dtype, "bounds": integers,
    "all_finite": perhaps_not_finite, "sum_of_squares": one_array, "largest": one_array, "select": condition_and_array,
    "exp": one_array, "matmul": product, "matmul_in_parts": product, "row_sums": rows, "row_largest": one_array,
    "sums": sums, "weighted_runs": weighted_runs, "run_products": run_products,
}  # fmt: skip


def overrides(kind):
    """Return the public names that a backend defines anew."""
    found = {name for base in kind.__mro__ if issubclass(base, Backend) and base is not Backend for name in vars(base)}
    return {name for name in found if hasattr(Backend, name) and not name.startswith("_")} - NOT_PRIMITIVES


def same(actual, due):
    if isinstance(due, np.ndarray):
        assert actual.shape == due.shape
        assert actual.dtype == due.dtype
    np.testing.assert_allclose(np.asarray(actual), np.asarray(due), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
@given(data=st.data())
def test_an_override_is_the_portable_definition(backend, name, data):
    arguments = ARGUMENTS[name](data.draw)
    if arguments[0].dtype.name == "float16" and backend.name == "array-api-strict":
        return
    due = getattr(PORTABLE, name)(*(np.array(a) if isinstance(a, np.ndarray) else a for a in arguments))
    there = backend.arrays(arguments)
    be = backends.of(there[1] if name == "select" else there[0])
    with be.context():
        if name == "exp":  # which may take the place of its argument
            there = (be.copy(there[0]),)
        actual = getattr(be, name)(*there)
    if isinstance(due, str | bool):
        assert actual == due
    else:
        same(refimpl.backend.to_numpy(actual) if backends.is_array(actual) else actual, due)


@given(data=st.data())
def test_places_are_added_up_as_a_loop_does(data):
    places = data.draw(drawn(np.int64, (2, 3, 2), elements=st.integers(-1, 6)))
    values = data.draw(drawn(np.float64, (2, 3, 2), elements=NUMBERS))
    target, due = np.zeros((2, 2, 3)), np.zeros((2, 6))
    done = backends.NUMPY.add_at(target, places, values, 2)
    assert done == bool(((places >= 0) & (places < 6)).all())
    if done:
        for i, at in np.ndenumerate(places):
            due[i[0], at] += values[i]
        np.testing.assert_allclose(target.reshape(2, 6), due, atol=1e-12)


@pytest.mark.parametrize(
    "kind", [backends.numpy.NumpyBackend, backends.cupy.CupyBackend, backends.torch.TorchBackend], ids=lambda k: k.name
)
def test_no_override_is_left_out(kind):
    left = overrides(kind) - set(ARGUMENTS) - {"add_at"}
    assert not left, f"ARGUMENTS has no arguments for {left}"


class Mine(np.ndarray):
    """Stands for the array of a library that refimpl has never heard of."""

    __array_namespace__ = None


class MyBackend(backends.strided.StridedBackend):
    """A backend from outside: it wraps NumPy."""

    name = "mine"

    def __init__(self, like):
        del like
        self.xp, self.device, self._beside = np, "mine", {}

    @classmethod
    def owns(cls, array):
        return type(array) is Mine

    def to_numpy(self, array):
        return np.array(array)


def test_a_backend_from_outside_is_taken(monkeypatch):
    monkeypatch.setattr(backends, "_REGISTERED", dict(backends._REGISTERED))
    x, weight = np.random.default_rng(0).normal(size=(1, 2, 5)), np.ones((3, 2, 3))
    mine = [array.view(Mine) for array in (x, weight)]
    with pytest.raises(TypeError, match=r"conv: x must be a NumPy array.*got .*Mine"):
        refimpl.conv(*mine)
    backends.register("mine", MyBackend)
    np.testing.assert_allclose(refimpl.conv(*mine), refimpl.conv(x, weight))
    with pytest.raises(TypeError, match=r"^conv: weight must be on the same device as x"):
        refimpl.conv(mine[0], weight)


@pytest.mark.parametrize("wrong", [Backend(np.zeros(1)), int, None])
def test_only_a_backend_can_be_registered(wrong):
    with pytest.raises(TypeError, match=r"^register: backend must be a subclass of refimpl\.backend\.Backend; got "):
        backends.register("wrong", wrong)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_tensors_that_cannot_be_computed_with():
    torch = pytest.importorskip("torch")
    pytest.importorskip("array_api_compat")
    x = torch.ones(1, 1, 4)
    for wrong, rule in (
        (torch.ones(1, 1, 4, device="meta"), r"be on a CPU or a CUDA device; got a tensor on meta"),
        (x.to_sparse(), r"be dense; got layout torch\.sparse_coo"),
        (torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "be dense; got layout torch.strided, quantised"),
    ):
        with pytest.raises(TypeError, match=rf"^max_pool: x must {rule}"):
            refimpl.max_pool(wrong, 2)


def test_tensors_without_array_api_compat(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(backends.torch, "_namespace", lambda: None)
    with pytest.raises(TypeError, match=r"^max_pool: x must come with array-api-compat \(pip install"):
        refimpl.max_pool(torch.ones(1, 1, 4), 2)
