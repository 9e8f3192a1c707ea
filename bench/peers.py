"""The frameworks, and what is timed of them.

- PyTorch: the forward runs without a graph. The backward is `torch.autograd.grad` on a retained graph: the forward is
  not in its time, nor what the forward saved in its extra memory.
- JAX: both jitted, compilation not counted. The backward is the vjp, with as much of the forward as XLA finds it needs.
- ONNX Runtime: forward only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import measure
from bench.contestant import Calls, Contestant, nbytes
from bench.workloads import ATTENTION, Workload


class Torch(Contestant):
    """PyTorch on the CPU."""

    packages = ("torch",)
    torch_device = "cpu"
    tf32 = False

    def calls(self, workload: Workload) -> Calls:
        """Return what to time."""
        import torch

        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        f, leaves = self._function(workload)
        with torch.enable_grad():
            out = f(*leaves)
        dout = torch.tensor(workload.dout(), device=self.torch_device)

        def forward() -> Any:
            with torch.no_grad():
                return f(*leaves)

        return {"forward": forward, "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)}

    def _function(self, workload: Workload) -> tuple[Callable[..., Any], list[Any]]:
        import torch
        from torch.nn import functional

        leaves = [torch.tensor(array, device=self.torch_device, requires_grad=True) for array in workload.arrays()]
        options, rank = dict(workload.options), len(workload.shapes[0]) - 2
        if workload.op == "multi_head_attention":
            heads, e = options["num_heads"], workload.shapes[0][-1]
            module = torch.nn.MultiheadAttention(
                e, heads, bias=False, batch_first=True, device=self.torch_device
            ).eval()
            module.in_proj_weight, module.out_proj.weight = map(torch.nn.Parameter, leaves[1:])
            leaves[1:] = module.in_proj_weight, module.out_proj.weight
            return lambda x, *_: module(x, x, x, need_weights=False)[0], leaves
        if workload.op == ATTENTION:
            if lengths := options.pop("key_lengths", None):
                keys = torch.arange(workload.shapes[1][2], device=self.torch_device)
                lengths = torch.tensor(lengths, device=self.torch_device)
                options["attn_mask"] = (keys < lengths[:, None])[:, None, None, :]
            options["enable_gqa"] = workload.shapes[0][1] != workload.shapes[1][1]
        f = getattr(functional, workload.op if workload.op == ATTENTION else f"{workload.op}{rank}d")
        return lambda *arrays: f(*arrays, **options), leaves

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the array on the host."""
        return array.detach().cpu().numpy()


class TorchCuda(Torch):
    """PyTorch on a GPU, TF32 off."""

    device = torch_device = "cuda"

    def available(self) -> bool:
        """Tell whether PyTorch is here with a GPU."""
        if not super().available():
            return False
        import torch

        return torch.cuda.is_available()

    def describe(self) -> dict[str, str]:
        """Return the versions, and the device."""
        import torch

        return super().describe() | {"device": torch.cuda.get_device_name()}

    def seconds(self, call: Callable[[], Any], budget: float) -> float:
        """Return the median time of a call."""
        return measure.torch_cuda_seconds(call, budget)

    def extra_memory(self, call: Callable[[], Any]) -> int:
        """Return the bytes a call needs beyond its inputs and outputs."""
        return measure.torch_cuda_extra_memory(call, nbytes)


class TorchCudaTF32(TorchCuda):
    """PyTorch on a GPU with TF32: float32 operands of products are rounded to 11 bits."""

    tf32 = True


class Jax(Contestant):
    """JAX on the CPU, jitted."""

    packages = ("jax", "jaxlib")

    def calls(self, workload: Workload) -> Calls:
        """Return what to time."""
        import jax

        f = self._function(workload)
        arrays = [jax.device_put(array) for array in workload.arrays()]
        dout = jax.device_put(workload.dout())
        forward = jax.jit(f)
        backward = jax.jit(lambda dout, *arrays: jax.vjp(f, *arrays)[1](dout))
        return {
            "forward": lambda: forward(*arrays).block_until_ready(),
            "backward": lambda: jax.block_until_ready(backward(dout, *arrays)),
        }

    def _function(self, workload: Workload) -> Callable[..., Any]:
        from jax import lax
        from jax import numpy as jnp

        op, options, rank = workload.op, workload.options, len(workload.shapes[0]) - 2
        stride, padding = options.get("stride", 1), options.get("padding", 0)
        if op == "conv":
            dilation, groups = (options.get("dilation", 1),) * rank, options.get("groups", 1)
            return lambda x, w: lax.conv_general_dilated(
                x, w, (stride,) * rank, [(padding, padding)] * rank, None, dilation, feature_group_count=groups
            )
        if op == "conv_transpose":
            pads = [(k - 1 - padding,) * 2 for k in workload.shapes[1][2:]]
            axes = tuple(range(2, 2 + rank))
            return lambda x, w: lax.conv_general_dilated(
                x, jnp.flip(w, axes).swapaxes(0, 1), (1,) * rank, pads, (stride,) * rank
            )
        if op == "adaptive_avg_pool":
            return lambda x: x.mean(tuple(range(2, 2 + rank)), keepdims=True)
        if op in ("max_pool", "avg_pool"):
            kernel = options["kernel_size"]
            init, reduce = (-np.inf, lax.max) if op == "max_pool" else (0.0, lax.add)
            window, strides = ((1, 1, *(n,) * rank) for n in (kernel, options.get("stride", kernel)))
            pads = [(0, 0), (0, 0), *[(padding, padding)] * rank]
            share = 1 if op == "max_pool" else kernel**rank
            return lambda x: lax.reduce_window(x, init, reduce, window, strides, pads) / share
        if op == ATTENTION:
            return lambda q, k, v: _jax_attention(q, k, v, **options)

        def multi_head(x: Any, in_proj: Any, out_proj: Any) -> Any:
            n, length, _ = x.shape
            heads = (part.reshape(n, length, options["num_heads"], -1) for part in jnp.split(x @ in_proj.T, 3, -1))
            attended = _jax_attention(*(part.swapaxes(1, 2) for part in heads))
            return attended.swapaxes(1, 2).reshape(n, length, -1) @ out_proj.T

        return multi_head


def _jax_attention(query: Any, key: Any, value: Any, is_causal: bool = False, key_lengths: Any = None) -> Any:
    import jax

    lengths = None if key_lengths is None else np.array(key_lengths)
    swapped = (array.swapaxes(1, 2) for array in (query, key, value))  # to (N, L, H, E), and back, within the jit
    out = jax.nn.dot_product_attention(*swapped, is_causal=is_causal, key_value_seq_lengths=lengths)
    return out.swapaxes(1, 2)


class OnnxRuntime(Contestant):
    """ONNX Runtime on the CPU: one node, or the few of multi-head attention."""

    packages = ("onnxruntime", "onnx")

    def calls(self, workload: Workload) -> Calls:
        """Return what to time."""
        self.model = _onnx_model(workload).SerializeToString()
        self.feed = {f"x{i}": array for i, array in enumerate(workload.arrays())}
        if "key_lengths" in workload.options:
            keys, lengths = np.arange(workload.shapes[1][2]), np.array(workload.options["key_lengths"])
            visible = (keys < lengths[:, None])[:, None, None, :]
            shape = (*visible.shape[:2], workload.shapes[0][2], visible.shape[3])
            self.feed["mask"] = np.broadcast_to(visible, shape).copy()
        return {"forward": self._call(arena=True)}

    def _call(self, *, arena: bool) -> Callable[[], Any]:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = self.threads, 1
        settings.enable_cpu_mem_arena = arena
        session = onnxruntime.InferenceSession(self.model, settings, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, self.feed)[0]

    def extra_memory(self, call: Callable[[], Any]) -> int | None:
        """Return the bytes a call needs beyond its inputs and outputs, without the arena, which gives nothing back."""
        del call  # the same without an arena
        return super().extra_memory(self._call(arena=False))


def _onnx_model(workload: Workload) -> Any:
    from onnx import TensorProto, helper

    options, rank = dict(workload.options), len(workload.shapes[0]) - 2
    names = [f"x{i}" for i in range(len(workload.shapes))]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(names, workload.shapes, strict=True)
    ]
    attributes: dict[str, Any] = {}
    if workload.op == "multi_head_attention":
        heads = options["num_heads"]
        nodes = [
            helper.make_node("Transpose", ["x1"], ["w"]),
            helper.make_node("MatMul", ["x0", "w"], ["projected"]),
            helper.make_node("Split", ["projected"], ["q", "k", "v"], axis=-1, num_outputs=3),
            helper.make_node("Attention", ["q", "k", "v"], ["joined"], q_num_heads=heads, kv_num_heads=heads),
            helper.make_node("Transpose", ["x2"], ["w2"]),
            helper.make_node("MatMul", ["joined", "w2"], ["out"]),
        ]
    else:
        if workload.op == ATTENTION:
            attributes["is_causal"] = int(options.get("is_causal", False))
            if "key_lengths" in options:
                names.append("mask")
                shape = (workload.shapes[0][0], 1, workload.shapes[0][2], workload.shapes[1][2])
                inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, shape))
        elif workload.op != "adaptive_avg_pool":
            default = options.get("kernel_size", 1)
            attributes["strides"] = [options.get("stride", default)] * rank
            attributes["pads"] = [options.get("padding", 0)] * 2 * rank
            if "kernel_size" in options:
                attributes["kernel_shape"] = [default] * rank
            else:
                attributes["group"] = options.get("groups", 1)
                attributes["dilations"] = [options.get("dilation", 1)] * rank
        node = {
            "conv": "Conv",
            "conv_transpose": "ConvTranspose",
            "max_pool": "MaxPool",
            "avg_pool": "AveragePool",
            "adaptive_avg_pool": "GlobalAveragePool",
            ATTENTION: "Attention",
        }[workload.op]
        nodes = [helper.make_node(node, names, ["out"], **attributes)]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, workload.out_shape())
    graph = helper.make_graph(nodes, "workload", inputs, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
