"""Try a kernel with drawn calls of an op: python -m refimpl.testing MODULE:KERNEL --op OP."""

import argparse
import ast
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any


def main() -> int:
    """Run the command; the exit status is 0 if no case failed, 1 if one did, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.testing", description=__doc__)
    parser.add_argument("kernel", metavar="MODULE:KERNEL", help="where the kernel is; called as the op is")
    parser.add_argument("--op", required=True, help="the op, such as conv or scaled_dot_product_attention")
    parser.add_argument("--backward", metavar="MODULE:KERNEL", help="its gradient, or 'autograd' for PyTorch's")
    parser.add_argument("--arrays", default="numpy", choices=["numpy", "torch", "cupy", "jax"])
    parser.add_argument("--device", help="where the arrays lie, such as cuda")
    parser.add_argument("--dtypes", default="float32", help="separated by commas (default: float32)")
    parser.add_argument("--options", help="the options that the kernel has, separated by commas (default: all)")
    parser.add_argument(
        "--like", choices=["torch", "jax", "flash-attn", "onnx", "cudnn"], help="called as this library's"
    )
    parser.add_argument("--examples", type=int, default=200, help="for each dtype (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="expected", choices=["expected", "worst"])
    parser.add_argument(
        "--sums", default="float32", choices=["float32", "result"], help="where half types are added up"
    )
    aim = "a parameter of the op's strategy, such as ranks=(2,), lengths=(64,128) or values='large'"
    parser.add_argument("--aim", action="append", default=[], metavar="NAME=VALUE", help=aim)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the report there, too")
    given = parser.parse_args()
    try:
        from .kernels import conformance
    except ImportError as error:
        parser.error(f'{error}; what draws cases is installed by pip install "refimpl[testing]"')

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} cases", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        kernel, backward = _found(given.kernel), given.backward
        report = conformance(
            kernel,
            given.op,
            backward=_found(backward) if backward and backward != "autograd" else backward,
            arrays=given.arrays,
            device=given.device,
            dtypes=given.dtypes.split(","),
            options=None if given.options is None else [o for o in given.options.split(",") if o],
            examples=given.examples,
            seed=given.seed,
            like=given.like,
            model=given.model,
            sums=given.sums,
            progress=progress,
            **dict(_aim(text) for text in given.aim),
        )
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(report)
    if given.json is not None:
        given.json.write_text(report.to_json())
    return 0 if report.ok else 1


def _aim(text: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=VALUE."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise ValueError(f"an aim is NAME=VALUE, a value as Python writes it; got {text!r}") from None


def _found(place: str) -> Callable[..., Any]:
    """Return the function at MODULE:NAME; modules of the current directory are found."""
    module, _, name = place.partition(":")
    if not name:
        raise ValueError(f"a kernel is named MODULE:KERNEL; got {place!r}")
    sys.path.insert(0, "")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]  # whatever is there is called


if __name__ == "__main__":
    sys.exit(main())
