"""Conformance passes what is right, and catches what is not, cheats included."""

import json
import subprocess
import sys

import numpy as np
import pytest

import refimpl
from refimpl.testing import conformance

CONV = {"options": ("stride", "bias"), "ranks": (1,), "sizes": (3, 6), "examples": 20}


def conv(x, weight, bias=None, **options):
    return refimpl.conv(x, weight, bias, **options)


def test_a_right_kernel_passes():
    report = conformance(conv, "conv", backward=refimpl.conv_backward, dtypes=("float32", "float16"), **CONV)
    assert report.ok
    assert bool(report)
    assert (report.passed, report.failed, report.refused) == (40, 0, 0)
    assert report.table["float32"] == [20, 0, 0]
    assert "option stride" in report.table
    assert str(report).startswith("conv: 40 passed, 0 failed, 0 refused (seed 0)")
    report.check()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["scaled_dot_product_attention", "max_pool", "adaptive_avg_pool", "merge_attention"])
def test_the_ops_themselves_pass(op):
    report = conformance(getattr(refimpl, op), op, backward=getattr(refimpl, f"{op}_backward"), examples=40)
    assert report.failed == 0
    assert report.passed == 40


class Cached:
    """It computes once for each shape."""

    def __init__(self, key):
        self.key, self.results = key, {}

    def __call__(self, x, weight, bias=None, **options):
        key = (x.shape, weight.shape, str(options), self.key(x))
        if key not in self.results:
            self.results[key] = conv(x, weight, bias, **options)
        return self.results[key].copy()


class Reusing:
    """It returns the same memory for each result of a shape."""

    def __init__(self):
        self.memory = {}

    def __call__(self, *arrays, **options):
        out = conv(*arrays, **options)
        kept = self.memory.setdefault(out.shape, np.empty_like(out))
        kept[...] = out
        return kept


class Lazy(np.ndarray):
    """An array that may compute later."""


class Once:
    """Right for its first calls only."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *arrays, **options):
        self.calls += 1
        out = conv(*arrays, **options)
        return out if self.calls <= 2 else out * 0


def modifying(x, weight, bias=None, **options):
    out = conv(x, weight, bias, **options)
    x *= 2
    return out


def only_small(x, weight, bias=None, **options):
    out = conv(x, weight, bias, **options)
    return out if x.shape[-1] <= 3 else out * np.float32(1.001)


def unfinished(x, weight, bias=None, stride=1):
    """It leaves the last column of its result as it found it."""
    step = stride if isinstance(stride, int) else stride[0]
    columns = (x.shape[-1] - weight.shape[-1]) // step + 1
    out = np.empty((*x.shape[:-2], weight.shape[0], columns), dtype=x.dtype)
    out[..., :-1] = conv(x, weight, bias, stride=stride)[..., :-1]
    return out


def refusing(*arrays, **options):
    raise NotImplementedError


CHEATS = {
    "zeros": (lambda: lambda *a, **o: np.zeros_like(conv(*a, **o)), "forward: the result wrong"),
    "a constant": (lambda: lambda *a, **o: np.full_like(conv(*a, **o), 0.5), "forward: the result wrong"),
    "an input": (lambda: lambda *a, **_: a[0][...], "forward: "),
    "a result by shape": (lambda: Cached(type), "wrong with other values in the same memory"),
    "a result by address": (lambda: Cached(lambda x: x.__array_interface__["data"]), "wrong"),
    "right at first": (Once, "wrong with other values"),
    "one memory for all results": (Reusing, "a later call changed an earlier result"),
    "an argument modified": (lambda: modifying, "an argument was modified"),
    "a lazy subclass": (lambda: lambda *a, **o: conv(*a, **o).view(Lazy), "not a plain array"),
    "small sizes only": (lambda: only_small, "forward: the result wrong"),
    "memory not written": (lambda: unfinished, "forward: the result wrong"),
    "exceptions": (lambda: lambda *_, **__: 1 / 0, "raised ZeroDivisionError"),
    "the wrong shape": (lambda: lambda *a, **o: conv(*a, **o)[..., None], "forward: the result wrong"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_are_caught(cheat):
    make, kind = CHEATS[cheat]
    report = conformance(make(), "conv", **CONV)
    assert report.failed > 0
    assert kind in " ".join(failure.kind for failure in report.failures)
    with pytest.raises(AssertionError, match=r"conv: \d+ passed, \d+ failed, 0 refused"):
        report.check()


def test_small_outputs_are_no_excuse_for_zeros():
    """An absolute tolerance would take zeros for means of many tiny numbers."""
    report = conformance(
        lambda x, size: 0 * refimpl.adaptive_avg_pool(x, size), "adaptive_avg_pool", values="normal", examples=10
    )
    assert report.passed < 2


def test_a_wrong_backward():
    def backward(dout, x, weight, bias=None, **options):
        grads = refimpl.conv_backward(dout, x, weight, bias, **options)
        return grads._replace(dweight=grads.dweight * np.float32(1.01))

    report = conformance(conv, "conv", backward=backward, **CONV)
    assert [failure.kind for failure in report.failures] == ["backward: dweight wrong"]
    assert "1.01 times the reference" in str(report.failures[0])


def test_a_share_of_the_arguments():
    report = conformance(lambda *arrays: arrays[0][...], "adaptive_avg_pool", examples=30, sizes=(3,), outputs=(3,))
    assert {failure.kind for failure in report.failures} <= {
        "forward: a result shares memory with an argument", "forward: the result wrong",
    }  # fmt: skip
    assert report.failed


def test_reading_beyond_lengths():
    def kernel(query, key, value, *, key_lengths=None):
        out = refimpl.scaled_dot_product_attention(query, key, value, key_lengths=key_lengths)
        if key_lengths is None:
            return out
        return out + 0 * np.sum(value, axis=(-1, -2), keepdims=True)

    aims = {"heads": ((1, 1),), "batches": ((2,),), "broadcast": False, "lengths": (4,), "examples": 40}
    report = conformance(kernel, "scaled_dot_product_attention", options=("key_lengths",), **aims)
    assert "forward: reads beyond the lengths" in [failure.kind for failure in report.failures]


def test_what_differs_from_call_to_call():
    rng = np.random.default_rng(0)

    def kernel(*arrays, **options):
        out = conv(*arrays, **options)
        return out * (1 + 1e-7 * rng.normal(size=out.shape)).astype(out.dtype)

    report = conformance(kernel, "conv", **CONV)
    assert 0 < report.spread < 1e-6
    assert "not deterministic: two equal calls differ by up to" in str(report)


def test_refusals():
    def kernel(x, weight, bias=None, *, stride=1):
        if stride != 1:
            raise NotImplementedError("stride")
        return conv(x, weight, bias)

    report = conformance(kernel, "conv", **CONV)
    assert report.ok
    assert report.refused > 0
    assert report.passed > 0
    assert not conformance(refusing, "conv", **CONV).ok
    assert "nothing is known about this kernel" in str(conformance(refusing, "conv", **CONV))


def test_the_smallest_case_is_code_to_paste():
    def kernel(x, weight, bias=None, *, stride=1):
        return conv(x, weight, bias, stride=stride) * np.float32(1 if stride == 1 else 3)

    report = conformance(kernel, "conv", **CONV | {"examples": 60})
    (failure,) = [f for f in report.failures if f.kind == "forward: the result wrong"][:1]
    printed = []
    exec(failure.code, {"kernel": kernel, "print": printed.append})  # the code is what is tested
    assert not printed[0].ok
    assert "stride" in failure.case.options
    kept = json.loads(report.to_json())
    assert kept["failed"] == report.failed
    assert kept["failures"][0]["code"] == report.failures[0].code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "convolution"}, "op must be one of conv, "),
        ({"arrays": "tensorflow"}, "arrays must be 'numpy', 'torch', 'cupy' or 'jax'; got 'tensorflow'"),
        ({"examples": 0}, "examples must be an int of at least 1; got 0"),
        ({"like": "mxnet"}, "like must be one of torch, flash-attn, jax, onnx, cudnn; got 'mxnet'"),
        ({"options": ("strides",)}, "strategies.conv: options must be among stride, "),
        ({"backward": "numeric"}, "backward must be a function or 'autograd'; got 'numeric'"),
        ({"like": "jax"}, "like='jax' has scaled_dot_product_attention; got op='conv'"),
    ],
)
def test_wrong_arguments(arguments, message):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        conformance(conv, arguments.pop("op", "conv"), **arguments)


def test_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import refimpl\nright = refimpl.conv\ndef wrong(*a, **o):\n    return 2 * refimpl.conv(*a, **o)\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "refimpl.testing", *arguments, "--examples", "10"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    passed = run("mine:right", "--op", "conv", "--options", "stride,bias", "--json", "report.json")
    assert passed.returncode == 0, passed.stderr
    assert passed.stdout.startswith("conv: 10 passed, 0 failed, 0 refused (seed 0)")
    assert json.loads((tmp_path / "report.json").read_text())["passed"] == 10
    failed = run("mine:wrong", "--op", "conv", "--options", "", "--seed", "3", "--aim", "ranks=(1,)")
    assert failed.returncode == 1
    assert "every element is 2 times the reference" in failed.stdout
    for arguments, message in (
        (("mine:wrong", "--op", "convolution"), "op must be one of"),
        (("mine:nothing", "--op", "conv"), "no attribute 'nothing'"),
        (("mine:right", "--op", "conv", "--aim", "ranks"), "an aim is NAME=VALUE"),
        (("mine:right", "--op", "conv", "--aim", "rank=1"), "unexpected keyword argument 'rank'"),
        (("mine", "--op", "conv"), "a kernel is named MODULE:KERNEL; got 'mine'"),
        (("elsewhere:f", "--op", "conv"), "No module named 'elsewhere'"),
    ):
        wrong = run(*arguments)
        assert wrong.returncode == 2
        assert message in wrong.stderr


class TestTorch:
    """PyTorch's own kernels, called as they are."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")
        self.functional = self.torch.nn.functional

    @pytest.mark.slow
    def test_attention(self):
        report = conformance(
            self.functional.scaled_dot_product_attention, "scaled_dot_product_attention", backward="autograd",
            arrays="torch", like="torch", dtypes=("float32", "bfloat16"), options=("is_causal", "mask"), examples=40,
            lengths=(1, 3, 20), features=(8, 64), value_features=(8,), heads=((2, 2), (4, 2)), batches=((1,), (2,)),
            broadcast=False, values="normal",
        )  # fmt: skip
        assert report.passed > 20, str(report)
        kinds = {failure.kind for failure in report.failures}
        assert kinds <= {"forward: the result wrong"}, str(report)  # NaN for queries that see no key, in some kernels

    def test_convolution(self):
        report = conformance(
            self.functional.conv2d, "conv", backward="autograd", arrays="torch", like="torch", ranks=(2,), examples=30,
            batches=((1,), (2,)),
        )  # fmt: skip
        assert report.failed == 0, str(report)
        assert report.passed > 5
