"""Reports find the bug: where wrong elements are, and what would explain them; arrays of any library are taken."""

import importlib.util
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from samples import normal

import refimpl
from refimpl.testing import assert_matches, check_gradients, compare, error_bound

ATTENTION, BACKWARD = refimpl.scaled_dot_product_attention, refimpl.scaled_dot_product_attention_backward


def single(*shape, seed=0):
    return normal(*shape, seed=seed).astype(np.float32)


@pytest.fixture
def qkv():
    return single(2, 8, 24, 16), single(2, 4, 24, 16, seed=1), single(2, 4, 24, 16, seed=2)


def patterns(report, name="the result"):
    assert not report.ok
    return "; ".join(report[name].patterns)


def test_a_right_result_has_a_report_too(qkv):
    report = compare(ATTENTION(*qkv, is_causal=True), ATTENTION, *qkv, is_causal=True)
    assert report
    assert report.ok
    assert report.results[0].wrong == 0
    assert 0 < report.results[0].error < 1
    assert str(report).startswith("the result is right: the largest error is 0.")
    assert "scaled_dot_product_attention(<float32 (2, 8, 24, 16)>, " in str(report)
    assert "is_causal=True" in str(report)


@pytest.mark.parametrize(
    ("kernel", "options", "pattern"),
    [
        (lambda q, k, v: ATTENTION(q, k, v) / 8, {}, "every element is 1/8 of the reference: a missing scale"),
        (lambda q, k, v: -ATTENTION(q, k, v), {}, "every element is the negative of the reference"),
        (lambda q, k, v: 0 * ATTENTION(q, k, v), {}, "every element is 0"),
        (lambda q, k, v: ATTENTION(q, k, v, scale=1.0), {}, "equal to the reference with scale=1"),
        (
            lambda q, k, v: ATTENTION(q, k, v)[:, ::-1],
            {},
            "each head in another place: that of [7, 6, 5, 4, 3, 2, 1, 0]",
        ),
        (lambda q, k, v: np.roll(ATTENTION(q, k, v), 1, axis=-2), {}, "shifted by one query"),
        (lambda q, k, v: ATTENTION(q, k, v), {"is_causal": True}, "equal to the reference without is_causal"),
        (lambda q, k, v: ATTENTION(q, k, v, is_causal=True), {}, "equal to the reference with is_causal=True"),
        (
            lambda q, k, v: ATTENTION(q, k, v, is_causal=True, query_offset=-1),
            {"is_causal": True},
            "equal to the reference with query_offset=-1: a mask off by one?",
        ),
        (
            lambda q, k, v: ATTENTION(q, np.tile(k, (1, 2, 1, 1)), np.tile(v, (1, 2, 1, 1))),
            {},
            "equal to the reference with key head `h % Hkv` for query head h",
        ),
    ],
)
def test_what_would_explain_an_output(qkv, kernel, options, pattern):
    assert pattern in patterns(compare(kernel(*qkv), ATTENTION, *qkv, **options))


def test_ends_and_beginnings(qkv):
    query, key, value = qkv
    arrays = (query[..., -5:, :], key, value)
    out = ATTENTION(*arrays, is_causal=True, query_offset=19)
    found = patterns(compare(out, ATTENTION, *arrays, is_causal=True))
    assert "equal to the reference with queries and keys aligned at their ends" in found


def test_a_missing_row_mean(qkv):
    dout = single(2, 8, 24, 16, seed=3)
    mean = (dout * ATTENTION(*qkv)).sum(-1)
    grads = BACKWARD(dout, *qkv, dlogsumexp=mean)
    report = compare(grads, BACKWARD, dout, *qkv)
    assert report["dvalue"].ok
    for name in ("dquery", "dkey"):
        assert "without the row mean in ds = p (dp - mean)" in patterns(report, name)
    with pytest.raises(AssertionError, match=r"(?s)dquery is wrong .*dkey is wrong .*dvalue is right"):
        assert_matches(grads, BACKWARD, dout, *qkv)


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ((slice(None), slice(None), slice(8, 16)), "wrong in queries 8 to 15"),
        ((Ellipsis, -1), "wrong in the last feature"),
        ((slice(None), slice(4, 8)), "wrong in heads 4 to 7"),
        ((1, 3), "wrong in the last batch entry, head 3"),
        ((Ellipsis, slice(1, None, 4)), "wrong in every 4th feature from 1 on"),
        ((slice(None), slice(None), [2, 3, 9]), "wrong in queries 2 to 3 and 9"),
    ],
)
def test_where_wrong_elements_are(qkv, wrong, place):
    out = ATTENTION(*qkv)
    out[wrong] += 1
    assert place in patterns(compare(out, ATTENTION, *qkv))


def test_the_edge_of_a_mask(qkv):
    weights = refimpl.attention_weights(*qkv[:2], is_causal=True)
    i = np.arange(23)
    weights[..., i, i + 1] = 0.5
    found = patterns(compare(weights, refimpl.attention_weights, *qkv[:2], is_causal=True))
    assert "all on the diagonal key = query + 1: where a causal mask's edge lies?" in found


def test_convolutions_and_pools():
    x, weight = single(2, 4, 12, 12), single(4, 4, 3, 3, seed=1)
    out = refimpl.conv(x, weight[:, :, ::-1, ::-1], padding=1)
    assert "with the kernel flipped" in patterns(compare(out, refimpl.conv, x, weight, padding=1))
    out = refimpl.conv(x, weight, padding=1)
    assert "transposed" in patterns(compare(np.swapaxes(out, -1, -2), refimpl.conv, x, weight, padding=1))
    out[..., 0, :] += 1
    assert "wrong in row 0" in patterns(compare(out, refimpl.conv, x, weight, padding=1))
    other = refimpl.avg_pool(x, 3, padding=1, count_include_pad=False)
    assert "with count_include_pad=False" in patterns(compare(other, refimpl.avg_pool, x, 3, padding=1))
    low = refimpl.conv(*(a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x, weight)))
    assert "on arguments rounded to bfloat16" in patterns(compare(low, refimpl.conv, x, weight))


def test_sums_in_half_precision(qkv):
    out = ATTENTION(*(a.astype(np.float16) for a in qkv)).astype(np.float32)
    assert "what sums in float16 explain" in patterns(compare(out, ATTENTION, *qkv))
    out[1, 2, 3, 4] += 1
    assert "what sums in float16 explain" not in patterns(compare(out, ATTENTION, *qkv))


def test_gradients_of_other_heads(qkv):
    query, key, value = qkv
    dout = single(2, 8, 24, 16, seed=3)
    dquery, dkey, dvalue, *_ = BACKWARD(dout, query, np.tile(key, (1, 2, 1, 1)), np.tile(value, (1, 2, 1, 1)))
    folded = [d.reshape(2, 2, 4, 24, 16).sum(1) for d in (dkey, dvalue)]
    report = compare((dquery, *folded), BACKWARD, dout, *qkv)
    for name in ("dquery", "dkey", "dvalue"):
        assert "with key head `h % Hkv` for query head h" in patterns(report, name)


def test_nan_and_inf_apart(qkv):
    out = ATTENTION(*qkv)
    out[0, 0, 3] = np.nan
    found = patterns(compare(out, ATTENTION, *qkv))
    assert "16 elements are NaN that should not be" in found
    assert "wrong in batch entry 0, head 0, query 3" in found


def test_gradients_in_every_form(qkv):
    dout = single(2, 8, 24, 16, seed=3)
    grads = BACKWARD(dout, *qkv)
    for given in (grads, tuple(grads[:3]), list(grads[:3]), tuple(grads), {"dkey": grads.dkey}, {"key": grads.dkey}):
        assert_matches(given, BACKWARD, dout, *qkv)
    with pytest.raises(AssertionError, match="dkey is wrong"):
        assert_matches({"dkey": grads.dkey * 2}, BACKWARD, dout, *qkv)
    with pytest.raises(AssertionError, match="must hold dquery, dkey, dvalue; got dsomething"):
        assert_matches({"something": grads.dkey}, BACKWARD, dout, *qkv)
    with pytest.raises(AssertionError, match="must hold dquery, dkey, dvalue; got"):
        assert_matches(tuple(grads[:2]), BACKWARD, dout, *qkv)
    tokens = single(2, 5, 12)
    params = {"in_proj_weight": single(36, 12, seed=4), "out_proj.weight": single(12, 12, seed=5)}
    arrays = (tokens, tokens, tokens, params)
    grads = refimpl.multi_head_attention_backward(tokens, *arrays, num_heads=3)
    assert_matches(grads, refimpl.multi_head_attention_backward, tokens, *arrays, num_heads=3)


def test_the_picture(qkv):
    out = ATTENTION(*qkv)
    out[1, 2, 3, 4] += 1
    figure = compare(out, ATTENTION, *qkv).plot()
    assert figure.axes[0].get_title() == "the result[1, 2]"
    assert np.argmax(figure.axes[0].images[0].get_array()) == 3 * 16 + 4


def test_a_memory_map(tmp_path, qkv):
    mapped = np.memmap(tmp_path / "query", dtype=np.float32, mode="w+", shape=qkv[0].shape)
    mapped[:] = qkv[0]
    out = ATTENTION(mapped, *qkv[1:])
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, ATTENTION(*qkv))
    assert_matches(out, ATTENTION, mapped, *qkv[1:])
    params = {"in_proj_weight": mapped[0, 0, :, :8].reshape(24, 8), "out_proj.weight": np.eye(8, dtype=np.float32)}
    tokens = single(3, 8)
    assert type(refimpl.multi_head_attention(tokens, tokens, tokens, params, num_heads=2)) is np.ndarray


def test_what_cannot_be_viewed(qkv):
    with pytest.raises(TypeError, match="assert_matches: actual must be an array; got str"):
        assert_matches("no", ATTENTION, *qkv)
    with pytest.raises(TypeError, match="error_bound: arrays must hold a floating array"):
        error_bound(ATTENTION)


def test_importing_testing_imports_no_framework():
    assert "refimpl.testing" in sys.modules
    for name in ("torch", "jax"):
        if importlib.util.find_spec(name) is None:
            assert name not in sys.modules


class TestTorch:
    """PyTorch tensors, wherever arrays are taken."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")

    def tensors(self, *arrays, dtype="float32"):
        return [self.torch.tensor(a).to(getattr(self.torch, dtype)).requires_grad_() for a in arrays]

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    def test_attention_and_autograd(self, qkv, dtype):
        tensors = self.tensors(*qkv, dtype=dtype)
        out = self.torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)
        dout = self.torch.tensor(single(2, 8, 24, 16, seed=3)).to(out.dtype)
        assert_matches(out, ATTENTION, *tensors)
        grads = self.torch.autograd.grad(out, tensors, dout)
        assert_matches(grads, BACKWARD, dout, *tensors)
        with pytest.raises(AssertionError, match="dkey is wrong"):
            assert_matches((grads[0], grads[1] * 1.1, grads[2]), BACKWARD, dout, *tensors)

    def test_mixed_readonly_and_strided(self, qkv):
        query, _, value = self.tensors(*qkv)
        fixed = qkv[1].copy()
        fixed.flags.writeable = False
        strided = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert_matches(ATTENTION(*qkv), ATTENTION, query, fixed, strided)

    def test_what_cannot_be_viewed(self, qkv):
        for tensor, kind in (
            (self.torch.zeros(2, 3).to_sparse(), "layout torch.sparse_coo"),
            (self.torch.zeros(2, 3, device="meta"), "a tensor on meta"),
            (self.quantised(), "a quantised tensor"),
        ):
            with pytest.raises(TypeError, match=f"must be dense, on a CPU or a CUDA device; got {kind}"):
                assert_matches(qkv[0], ATTENTION, tensor, *qkv[1:])

    def quantised(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch will give them up
            return self.torch.quantize_per_tensor(self.torch.zeros(2, 3), 0.1, 0, self.torch.qint8)

    def test_a_bound_for_a_function_of_tensors(self):
        (x,) = self.tensors(single(50))
        assert_matches(self.torch.sin(x), self.torch.sin, x)
        with pytest.raises(AssertionError, match="every element is 2 times the reference"):
            assert_matches(2 * self.torch.sin(x), self.torch.sin, x)

    def test_check_gradients(self):
        (x,) = self.tensors(normal(3, 4), dtype="float64")

        def backward(dout, x):
            return self.torch.autograd.grad(self.torch.sin(x), x, dout)

        check_gradients(self.torch.sin, backward, x)
        with pytest.raises(AssertionError, match="is wrong in 12 of 12"):
            check_gradients(self.torch.sin, lambda dout, x: 2 * backward(dout, x)[0], x)
