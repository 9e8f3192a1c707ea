"""The matrix product over real pairs, against a loop over single products."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl._engine import nan_safe

VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.0, 3.0, np.inf, -np.inf, np.nan])


@given(data=st.data(), sizes=st.tuples(*[st.integers(1, 3)] * 3))
def test_matmul_is_the_sum_of_real_products(backend, data, sizes):
    rows, inner, columns = sizes

    def draw(elements, *shape):
        count = int(np.prod(shape))
        return np.array(data.draw(st.lists(elements, min_size=count, max_size=count))).reshape(shape)

    a, b = draw(VALUES, rows, inner), draw(VALUES, inner, columns)
    a_real, b_real = draw(st.booleans(), rows, inner), draw(st.booleans(), inner, columns)
    a, b = np.where(a_real, a, 0.0), np.where(b_real, b, 0.0)
    expected = np.zeros((rows, columns))
    with np.errstate(invalid="ignore"):
        for i, k, j in np.ndindex(rows, inner, columns):
            if a_real[i, k] and b_real[k, j]:
                expected[i, j] += a[i, k] * b[k, j]
        arrays = backend.arrays((a, b, a_real, b_real))
        product = nan_safe.matmul(refimpl.backend.of(arrays[0]), *arrays)
    np.testing.assert_array_equal(refimpl.backend.to_numpy(product), expected)
