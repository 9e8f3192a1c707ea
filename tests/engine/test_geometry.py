"""Window arithmetic against walking along the elements, and the two moves as adjoints."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import window_elements

from refimpl import backend
from refimpl._engine import geometry, im2col


@st.composite
def windows(draw):
    size, kernel, stride, dilation = (draw(st.integers(1, n)) for n in (9, 4, 4, 3))
    low, high = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return geometry.pool_window(size, kernel, stride, dilation, (low, high), draw(st.booleans()))


@given(window=windows(), data=st.data())
def test_a_tap_reads_the_elements_that_the_formula_says(window, data):
    if window.out < 1:
        return
    start = data.draw(st.integers(0, window.out - 1))
    stop = data.draw(st.integers(start + 1, window.out))
    for k in range(window.kernel):
        elements = {o: o * window.stride + k * window.dilation - window.low for o in range(start, stop)}
        expected = {o - start: i for o, i in elements.items() if 0 <= i < window.size}
        found = window.tap(k, start, stop)
        reads, writes = found or (slice(0, 0), slice(0, 0))
        pairs = zip(range(window.out)[writes], range(window.size)[reads], strict=True)
        assert dict(pairs) == expected


@given(window=windows(), data=st.data())
def test_the_reach_of_windows_holds_all_that_their_taps_read(window, data):
    if window.out < 1 or window.first_empty() is not None:
        return
    start = data.draw(st.integers(0, window.out - 1))
    stop = data.draw(st.integers(start + 1, window.out))
    read = {i for _, reads, _ in window.taps(start, stop) for i in range(window.size)[reads]}
    reach = window.reach(start, stop)
    assert 0 <= reach.start <= min(read) <= max(read) < reach.stop <= window.size
    assert {i for _, reads, _ in window.taps(start, start + 1) for i in range(window.size)[reads]} == set(
        range(window.size)[window.elements(start)]
    )


@given(window=windows())
def test_the_first_empty_window(window):
    if window.out < 1:
        return
    empty = [
        o
        for o in range(window.out)
        if not any(
            0 <= o * window.stride + k * window.dilation - window.low < window.size for k in range(window.kernel)
        )
    ]
    assert window.first_empty() == (empty[0] if empty else None)


@given(window=windows())
def test_whether_a_window_overreaches(window):
    if window.out < 1:
        return
    elements = [
        o * window.stride + k * window.dilation - window.low for o in range(window.out) for k in range(window.kernel)
    ]
    assert window.overreaches == any(not 0 <= i < window.size for i in elements)


@pytest.mark.parametrize("ceil_mode", [False, True])
@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    padding=st.one_of(
        st.sampled_from(["valid", "same", "same_lower"]), st.tuples(st.integers(0, 4), st.integers(0, 4))
    ),
)
def test_output_sizes(size, kernel, stride, dilation, padding, ceil_mode):
    window = geometry.pool_window(size, kernel, stride, dilation, padding, ceil_mode)
    spelled = padding if isinstance(padding, str) else [padding]
    outs, pads, _ = window_elements((size,), (kernel,), (stride,), spelled, (dilation,), ceil_mode)
    assert max(window.out, 0) == max(outs[0], 0)
    assert (window.low, window.high) == pads[0]


@given(first=windows(), second=windows(), data=st.data())
def test_gather_and_add_back_are_adjoint(first, second, data):
    both = (first, second)
    if min(w.out for w in both) < 1:
        return
    rng = np.random.default_rng(0)
    x = rng.integers(-5, 6, size=(3, 2, first.size, second.size)).astype(float)
    lead = (slice(1, 3),)
    outputs = tuple(slice(data.draw(st.integers(0, w.out - 1)), w.out) for w in both)
    columns = im2col.im2col(backend.NUMPY, x, lead, both, outputs)
    assert columns.shape == (2, 2, first.kernel * second.kernel, *(o.stop - o.start for o in outputs))
    with patch.object(backend.NUMPY, "has_strides", False):  # as it is done without views
        np.testing.assert_array_equal(columns, im2col.im2col(backend.NUMPY, x, lead, both, outputs))
    other = rng.integers(-5, 6, size=columns.shape).astype(float)
    dx = np.zeros(x.shape)
    im2col.col2im(backend.NUMPY, other, dx, lead, both, outputs)
    assert np.sum(columns * other) == np.sum(x * dx)
    assert (dx[0] == 0).all()


@given(window=windows())
def test_phases_undo_what_taps_do(window):
    """Every pair of an element and the output and tap that read it is found once from the side of the element."""
    if window.out < 1:
        return
    forth = {
        (i, k, o)
        for k in range(window.kernel)
        for o in range(window.out)
        if 0 <= (i := o * window.stride + k * window.dilation - window.low) < window.size
    }
    back = []
    for places, taps, over in window.phases():
        elements, kernel = range(window.size)[places], range(window.kernel)[taps][::-1]
        assert (len(elements), len(kernel), window.out, 1) == (over.out, over.kernel, over.size, over.stride)
        for t, reads, writes in over.taps(0, over.out):
            pairs = zip(range(over.size)[reads], range(over.out)[writes], strict=True)
            back += [(elements[m], kernel[t], o) for o, m in pairs]
    assert len(back) == len(set(back))
    assert set(back) == forth


@given(first=windows(), second=windows(), data=st.data())
def test_runs_laid_end_to_end_hold_what_gather_finds(first, second, data):
    both = tuple(window._replace(stride=1, out=max(1, window.out)) for window in (first, second))
    outputs = []
    for window in both:
        start = data.draw(st.integers(0, window.out - 1))
        outputs.append(slice(start, data.draw(st.integers(start + 1, window.out))))
    x = np.random.default_rng(0).normal(size=(2, *(window.size for window in both)))
    lead = (slice(0, 2),)
    rows, steps, shape = im2col.end_to_end(backend.NUMPY, x, lead, both, tuple(outputs))
    gathered = im2col.im2col(backend.NUMPY, x, lead, both, tuple(outputs))
    runs = backend.runs([window.kernel for window in both], steps, np.prod(shape))
    for t, (_, where) in enumerate(runs):
        run = rows[:, where].reshape(2, *shape)
        np.testing.assert_array_equal(run[:, :, : gathered.shape[-1]], gathered[:, t])
    whole = im2col.in_runs(backend.NUMPY, gathered[:, 0], shape).reshape(2, *shape)
    np.testing.assert_array_equal(whole[:, :, : gathered.shape[-1]], gathered[:, 0])
    assert not whole[:, :, gathered.shape[-1] :].any()
