"""Convolution and its transpose against loops, as adjoints of each other, and in the corners."""

import itertools

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from samples import normal, ramp
from sizes import by_any_way

import refimpl
from refimpl import conv, conv_backward, conv_transpose, conv_transpose_backward
from refimpl.testing import strategies

NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
each_mode = pytest.mark.parametrize("mode", NUMPY_MODES)


@by_any_way
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
@given(data=st.data())
def test_agrees_with_loops(way, op, data):
    with way():
        case = data.draw(strategies.EVERY_OP[op](values="integers"))
        out = case.f(*case.arrays, **case.options)
        dout = ramp(*out.shape)
        expected = getattr(oracles, op)(dout, *case.arrays, **case.options)
        for actual, reference in zip(
            (out, *case.f_backward(dout, *case.arrays, **case.options)), expected, strict=True
        ):
            np.testing.assert_array_equal(actual, reference)


@by_any_way
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
@given(data=st.data())
def test_what_is_not_finite_agrees_with_loops(way, op, data):
    with way():
        case = data.draw(strategies.EVERY_OP[op](values="nonfinite"))
        out = case.f(*case.arrays, **case.options)
        dout = normal(*out.shape)
        expected = getattr(oracles, op)(dout, *case.arrays, **case.options)
        for actual, reference in zip(
            (out, *case.f_backward(dout, *case.arrays, **case.options)), expected, strict=True
        ):
            if reference is not None:
                np.testing.assert_allclose(actual, reference, rtol=1e-11, atol=1e-12)


@by_any_way
@pytest.mark.parametrize("op", ["conv", "conv_transpose"])
@given(data=st.data())
def test_gradients_are_adjoints(way, op, data):
    with way():
        case = data.draw(strategies.EVERY_OP[op](values="integers"))
        x, weight, _ = case.arrays
        out = case.f(x, weight, **case.options)
        dout = ramp(*out.shape)
        grads = case.f_backward(dout, x, weight, **case.options)
        assert np.sum(out * dout) == np.sum(x * grads.dx) == np.sum(weight * grads.dweight)


@pytest.mark.parametrize("padding", [0, 1, ((2, 0),), "valid", "same", "same_lower"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transpose_is_the_adjoint_of_conv(stride, padding):
    weight, dout_size = ramp(4, 3, 4), 3
    options = {"stride": stride, "padding": padding, "groups": 2}
    y = ramp(2, 4, dout_size)
    x = conv_transpose(y, weight, **options)
    other = ramp(*x.shape)
    assert conv(other, weight, **options).shape == y.shape
    assert np.sum(x * other) == np.sum(y * conv(other, weight, **options))


@pytest.mark.parametrize(("size", "stride", "kernel"), list(itertools.product([1, 4, 7], [1, 2, 3], [1, 2, 5])))
def test_same_keeps_the_size_divided_by_the_stride(size, stride, kernel):
    x, weight = ramp(1, 1, size), ramp(1, 1, kernel)
    out = conv(x, weight, stride=stride, padding="same")
    assert out.shape[-1] == -(-size // stride)
    total = max(0, (out.shape[-1] - 1) * stride + kernel - size)
    np.testing.assert_array_equal(out, conv(x, weight, stride=stride, padding=[(total // 2, total - total // 2)]))
    lower = conv(x, weight, stride=stride, padding="same_lower")
    np.testing.assert_array_equal(lower, conv(x, weight, stride=stride, padding=[(total - total // 2, total // 2)]))


@pytest.mark.parametrize(("size", "stride", "kernel"), list(itertools.product([1, 4], [1, 2, 3], [1, 2, 5])))
def test_transposed_same_multiplies_the_size_by_the_stride(size, stride, kernel):
    x, weight = ramp(1, 1, size), ramp(1, 1, kernel)
    whole = conv_transpose(x, weight, stride=stride)
    whole = np.pad(whole, ((0, 0), (0, 0), (0, max(0, stride - kernel))))
    crop = whole.shape[-1] - size * stride
    same = conv_transpose(x, weight, stride=stride, padding="same")
    np.testing.assert_array_equal(same, whole[..., crop // 2 : whole.shape[-1] - (crop - crop // 2)])
    lower = conv_transpose(x, weight, stride=stride, padding="same_lower")
    np.testing.assert_array_equal(lower, whole[..., crop - crop // 2 : whole.shape[-1] - crop // 2])


def test_output_padding_exposes_what_padding_had_cropped():
    x, weight, bias = ramp(1, 1, 3), ramp(1, 1, 3), np.array([10.0])
    whole = conv_transpose(x, weight, bias, stride=2)
    np.testing.assert_array_equal(
        conv_transpose(x, weight, bias, stride=2, padding=1, output_padding=1), whole[..., 1:]
    )
    beyond = conv_transpose(x, weight, bias, stride=2, output_padding=1)
    np.testing.assert_array_equal(beyond, np.concatenate([whole, [[[10.0]]]], axis=-1))


def test_output_size_is_output_padding_under_another_name():
    x, weight = ramp(2, 3, 4, 4), ramp(3, 2, 3, 3)
    for size in (9, 10):
        sized = conv_transpose(x, weight, stride=2, output_size=(size, 9))
        padded = conv_transpose(x, weight, stride=2, output_padding=(size - 9, 0))
        np.testing.assert_array_equal(sized, padded)


def test_a_batch_of_one_may_be_left_out():
    x, weight, bias = ramp(2, 5, 6), ramp(3, 2, 2, 3), ramp(3)
    out = conv(x, weight, bias)
    np.testing.assert_array_equal(out, conv(x[None], weight, bias)[0])
    assert conv_backward(ramp(*out.shape), x, weight, bias).dx.shape == x.shape


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_never_meets_what_is_not_finite(backend, value):
    """Only outputs whose window holds an element under the bad tap see it; the same for the taps in dweight."""
    x, weight = ramp(1, 2, 5, 4), ramp(3, 2, 3, 3)
    x = np.where(x == 0, 1.0, x)
    weight[1, 0, 0, 2] = value  # reads one row above, one column to the right
    out = refimpl.backend.to_numpy(conv(*backend.arrays((x, weight)), padding=1))
    bad = np.zeros(out.shape, dtype=bool)
    bad[0, 1, 1:, :-1] = True
    assert (np.isfinite(out) == ~bad).all()
    clean = np.where(np.isfinite(weight), weight, 0.0)
    np.testing.assert_allclose(out[~bad], conv(x, clean, padding=1)[~bad], rtol=1e-13)
    dout = ramp(1, 3, 5, 4)
    dout[0, 2, 0, 3] = value  # the corner: taps above it and to its right lie in padding
    dweight = conv_backward(*backend.arrays((dout, x, clean)), padding=1).dweight
    met = np.zeros(weight.shape, dtype=bool)
    met[2, :, 1:, :2] = True
    assert (np.isfinite(refimpl.backend.to_numpy(dweight)) == ~met).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cropping_never_meets_what_is_not_finite(value):
    x, weight = np.ones((1, 1, 3)), np.ones((1, 1, 3))
    weight[0, 0, 0] = value
    out = conv_transpose(x, weight, padding=1)  # tap 0 of element 0 is cropped
    assert np.isfinite(out).tolist() == [[[False, False, True]]]
    grads = conv_transpose_backward(np.ones((1, 1, 3)), x, weight, padding=1)
    assert np.isfinite(grads.dx).tolist() == [[[True, False, False]]]
    x[0, 0, 0] = value
    grads = conv_transpose_backward(np.ones((1, 1, 3)), x, np.ones((1, 1, 3)), padding=1)
    assert np.isfinite(grads.dweight).tolist() == [[[True, False, False]]]


@by_any_way
@given(case=st.one_of(strategies.conv(), strategies.conv_transpose()), seed=st.integers(0, 1000))
def test_what_is_not_finite_changes_no_bit_elsewhere(way, case, seed):
    """Poison one weight: outputs, gradients of x and taps that do not depend on it keep their bits."""
    with way():
        x, weight, bias = case.arrays
        rng = np.random.default_rng(seed)
        at = tuple(rng.integers(n) for n in weight.shape)
        clean = case.f(x, weight, bias, **case.options)
        unit = np.zeros(weight.shape)
        unit[at] = 1.0
        depends = case.f(np.ones(x.shape), unit, None, **case.options) > 0
        poisoned = weight.copy()
        poisoned[at] = rng.choice([np.nan, np.inf])
        out = case.f(x, poisoned, bias, **case.options)
        assert not np.isfinite(out[depends]).any()
        assert out[~depends].tobytes() == clean[~depends].tobytes()
        dout = rng.normal(size=out.shape)
        clean_dx = case.f_backward(dout, x, weight, bias, **case.options)[0]
        dx = case.f_backward(dout, x, poisoned, bias, **case.options)[0]
        depends = case.f_backward(np.ones(out.shape), x, unit, None, **case.options)[0] > 0
        assert not np.isfinite(dx[depends]).any()
        assert dx[~depends].tobytes() == clean_dx[~depends].tobytes()


@pytest.mark.parametrize("sizes", [(4, 3), (7, 9), (30,)])
def test_a_nan_in_one_plane_of_weights_changes_no_bit_beside_it(sizes):
    """Each channel by itself: NumPy's einsum rounds otherwise than a loop over the taps."""
    x, weight = normal(1, 2, *sizes), normal(2, 1, *(3 for _ in sizes))
    options = {"padding": 2, "groups": 2}
    clean = conv(x, weight, **options)
    for at in np.ndindex(weight.shape):
        unit, poisoned = np.zeros(weight.shape), weight.copy()
        unit[at], poisoned[at] = 1.0, np.nan
        depends = conv(np.ones(x.shape), unit, **options) > 0
        out = conv(x, poisoned, **options)
        assert np.isnan(out[depends]).all()
        assert out[~depends].tobytes() == clean[~depends].tobytes()


def test_tiles_that_read_nothing_but_padding(backend):
    x, weight = backend.arrays((np.full((1, 1, 2), 3.0), np.full((1, 1, 1), 4.0)))
    with refimpl.backend.limits(tile_bytes=1):  # a window each
        out = conv(x, weight, stride=2, padding=5)
        dx = conv_backward(out, x, weight, stride=2, padding=5).dx
    assert refimpl.backend.to_numpy(out).tolist() == [[[0, 0, 0, 12, 0, 0]]]
    assert refimpl.backend.to_numpy(dx).tolist() == [[[0, 48]]]


@pytest.mark.parametrize("kernel", [(5, 5), (3, 4), (1, 1)])
def test_bits_do_not_depend_on_threads_where_a_stride_has_phases(kernel):
    x, weight = normal(2, 16, 12, 13).astype(np.float32), normal(16, 8, *kernel, seed=1).astype(np.float32)
    out = conv_transpose(x, weight, stride=2)
    results = []
    for threads in (1, 2, 8, 8, 8):
        with refimpl.backend.limits(threads=threads, tile_bytes=3000):
            grads = conv_transpose_backward(out, x, weight, stride=2)
            results.append(
                (conv_transpose(x, weight, stride=2), *grads[:2], conv_backward(x, out, weight, stride=2).dx)
            )
    for result in results[1:]:
        assert [a.tobytes() for a in result] == [a.tobytes() for a in results[0]]


def test_one_output_of_one_channel_keeps_its_bits_beside_a_nan():
    x, weight = normal(1, 37, 1026).astype(np.float32), normal(1, 37, 3, seed=1).astype(np.float32)
    with refimpl.backend.limits(tile_bytes=100):
        clean = conv(x, weight, padding=1)
        weight[0, 0, 0] = np.nan
        dirty = conv(x, weight, padding=1)
    assert np.isfinite(dirty).sum() == 1
    assert dirty[0, 0, 0] == clean[0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_what_a_single_tap_reads_is_multiplied_alike(seed):
    """Each phase of the stride has one tap, which reads `x` as it lies in memory; beside a NaN, it reads a copy."""
    x, weight = normal(1, 2, 4, 2, 1, seed=seed), normal(2, 1, 1, 1, 3, seed=seed)
    options = {"stride": 4, "output_padding": 2, "padding": (3, (3, 2), (0, 0))}
    clean = conv_transpose(x, weight, **options)
    weight[0, 0, 0, 0, 1] = np.nan
    dirty = conv_transpose(x, weight, **options)
    others = np.isfinite(dirty)
    assert 0 < others.sum() < others.size
    assert dirty[others].tobytes() == clean[others].tobytes()


def test_what_is_not_finite_in_x_reaches_the_windows_that_hold_it():
    x, weight = np.ones((1, 1, 8)), np.ones((1, 1, 3))
    x[0, 0, 3] = np.nan
    assert np.isnan(conv(x, weight, padding=1)).tolist() == [[[False, False, True, True, True, False, False, False]]]


def test_many_dimensions():
    x, weight = ramp(1, 2, 2, 3, 2, 3), ramp(2, 1, 2, 1, 2, 2)
    out = conv(x, weight, padding=1, groups=2)
    dout = ramp(*out.shape)
    expected = oracles.conv(dout, x, weight, padding=1, groups=2)
    for actual, reference in zip((out, *conv_backward(dout, x, weight, padding=1, groups=2)), expected, strict=True):
        np.testing.assert_array_equal(actual, reference)


@given(case=strategies.conv(), seed=st.integers(0, 1000))
def test_nan_reaches_what_reads_its_copies_and_changes_no_bit_elsewhere(case, seed):
    """Poison one element of x, then one of dout; the oracle says which results depend on it, and on which copies."""
    x, weight, bias = case.arrays
    out = conv(*case.arrays, **case.options)
    assume(out.size)
    rng = np.random.default_rng(seed)
    dout = rng.normal(size=out.shape)
    grads = conv_backward(dout, *case.arrays, **case.options)
    ones = [np.ones(array.shape) for array in (dout, x, weight)]

    def check(clean, dirty, depends):
        np.testing.assert_array_equal(np.isnan(dirty), depends)
        assert dirty[~depends].tobytes() == clean[~depends].tobytes()

    for place, array in enumerate((dout, x)):
        poisoned, unit = array.copy(), np.zeros(array.shape)
        at = tuple(rng.integers(n) for n in array.shape)
        poisoned[at], unit[at] = np.nan, 1.0
        marked, arrays = list(ones), [dout, x]
        marked[place], arrays[place] = unit, poisoned
        of_out, of_dx, of_dweight, _ = (
            part > 0 if part is not None else None for part in oracles.conv(*marked, **case.options)
        )
        if array is x:
            check(out, conv(poisoned, weight, bias, **case.options), of_out)
        dirty = conv_backward(*arrays, weight, bias, **case.options)
        check(grads.dx, dirty.dx, of_dx if array is dout else np.zeros(x.shape, dtype=bool))
        check(grads.dweight, dirty.dweight, of_dweight)


@each_mode
@pytest.mark.parametrize("padding", [1, (0, 2), [(2, 0), (1, 2)], "valid", "same", "same_lower"])
@pytest.mark.parametrize("stride", [1, (3, 2)])
def test_padding_modes_are_those_of_numpy(backend, mode, padding, stride):
    """Padded by NumPy first, then convolved without padding."""
    x, weight = ramp(2, 4, 5, 4), ramp(6, 2, 3, 4)
    pads = oracles.window_elements((5, 4), (3, 4), stride, padding, 1)[1]
    padded = np.pad(x, [(0, 0), (0, 0), *pads], mode=NUMPY_MODES[mode])
    expected = conv(padded, weight, stride=stride, groups=2)
    out = conv(*backend.arrays((x, weight)), stride=stride, padding=padding, groups=2, padding_mode=mode)
    assert backend.owns(out)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(out), expected)


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        ("reflect", [2, 1, 0, 1, 2, 1]),
        ("replicate", [0, 0, 0, 1, 2, 2]),
        ("circular", [1, 2, 0, 1, 2, 0]),
    ],
)
def test_gradients_accumulate_onto_the_pixels_that_padding_shows(backend, mode, shown):
    """A kernel of a single 1 shows the padded x; `shown` says which pixel stands where."""
    x, weight, dout = np.array([[[3.0, 5.0, 7.0]]]), np.ones((1, 1, 1)), 10.0 ** np.arange(6)[None, None]
    options = {"padding": [(2, 1)], "padding_mode": mode}
    arrays = backend.arrays((x, weight))
    np.testing.assert_array_equal(refimpl.backend.to_numpy(conv(*arrays, **options)), x[..., shown])
    grads = conv_backward(backend.array(dout), *arrays, **options)
    dx = [[[sum(dout[0, 0, np.equal(shown, i)]) for i in range(3)]]]
    np.testing.assert_array_equal(refimpl.backend.to_numpy(grads.dx), dx)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(grads.dweight), [[[np.sum(dout * x[..., shown])]]])


@pytest.mark.parametrize(("mode", "most"), [("reflect", 3), ("circular", 4)])
@pytest.mark.parametrize("side", [0, 1])
def test_padding_reads_each_pixel_at_most_once_a_side(mode, most, side):
    x, weight = ramp(1, 2, 4, 9), ramp(1, 2, 1, 1)
    pad = [0, 0]
    pad[side] = most
    expected = conv(np.pad(x, ((0, 0), (0, 0), pad, (0, 0)), mode=NUMPY_MODES[mode]), weight)
    np.testing.assert_array_equal(conv(x, weight, padding=[pad, 0], padding_mode=mode), expected)
    pad[side] = most + 1
    for function, arrays in ((conv, (x, weight)), (conv_backward, (ramp(1, 1, 4 + most + 1, 9), x, weight))):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: .+ must .*{most}.*; got "):
            function(*arrays, padding=[pad, 0], padding_mode=mode)


def test_replicated_padding_has_no_limit_and_reflection_needs_a_second_pixel():
    x, weight = np.array([[[7.0]]]), np.ones((1, 1, 1))
    assert conv(x, weight, padding=3, padding_mode="replicate").tolist() == [[[7.0] * 7]]
    assert conv(x, weight, padding=1, padding_mode="circular").tolist() == [[[7.0] * 3]]
    assert conv(x, weight, padding_mode="reflect").tolist() == [[[7.0]]]
    for padding, kernel in ((1, 1), ("same", 3)):
        with pytest.raises(ValueError, match=r"^conv: .+ must .*; got "):
            conv(x, np.ones((1, 1, kernel)), padding=padding, padding_mode="reflect")


@each_mode
@pytest.mark.parametrize(("inner", "outer"), [(np.inf, -np.inf), (1.7e308, 1.7e308), (np.nan, np.inf)])
def test_folding_padding_back_makes_no_warning(mode, inner, outer):
    """Where inf meets -inf, or a sum exceeds the largest number."""
    x, weight, dout = (
        np.ones((1, 1, 3)),
        np.ones((1, 1, 1)),
        np.array([[[outer, outer, inner, inner, inner, outer, outer]]]),
    )
    padding = 1 if mode == "reflect" else 2
    dout = dout[..., 2 - padding : 5 + padding]
    expected = oracles.conv(dout, x, weight, padding=padding, padding_mode=mode)[1]
    assert not np.isfinite(expected).all()
    dx = conv_backward(dout, x, weight, padding=padding, padding_mode=mode).dx
    np.testing.assert_array_equal(dx, expected)


@each_mode
def test_padding_modes_of_an_empty_batch(mode):
    x, weight = np.ones((0, 2, 4)), ramp(3, 2, 3)
    out = conv(x, weight, padding=1, padding_mode=mode)
    assert out.shape == (0, 3, 4)
    grads = conv_backward(out, x, weight, padding=1, padding_mode=mode)
    assert grads.dx.shape == x.shape
    np.testing.assert_array_equal(grads.dweight, np.zeros(weight.shape))
