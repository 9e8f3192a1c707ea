"""The package as a whole: its public names, who imports whom, and what it never imports."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl

PACKAGE = Path(refimpl.__file__).parent
LAYERS = [
    "_threads", "backend", "_masked",
    "_geometry", "_windows", "_correlate", "_pooling", "_pairs", "_attend", "_projections", "_checks",
    "conv", "pool", "adaptive", "unpool", "attention", "multihead", "merging", "testing",
]  # fmt: skip


def test_all_is_sorted_and_there():
    assert refimpl.__all__ == sorted(refimpl.__all__)
    assert all(hasattr(refimpl, name) for name in refimpl.__all__)


def test_every_op_has_a_backward_with_the_same_arguments():
    names = [
        name
        for name in refimpl.__all__
        if not name.endswith("_backward") and inspect.isfunction(getattr(refimpl, name))
    ]
    assert len(names) >= 12
    for name in names:
        forward = inspect.signature(getattr(refimpl, name)).parameters
        backward = inspect.signature(getattr(refimpl, f"{name}_backward")).parameters
        assert next(iter(backward)) == "dout"
        for parameter in forward.values():
            assert backward[parameter.name] == parameter
        assert set(backward) - set(forward) <= {"dout", "indices", "dlogsumexp"}


@pytest.mark.parametrize("name", refimpl.__all__)
def test_public_functions_document_themselves(name):
    thing = getattr(refimpl, name)
    if inspect.isfunction(thing):
        for section in ("Parameters", "Returns", "Raises", "Notes", "Examples"):
            assert f"{section}\n    {'-' * len(section)}\n" in thing.__doc__
        for parameter in inspect.signature(thing).parameters:
            assert parameter in thing.__doc__


def test_imports_run_downwards():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(path.relative_to(PACKAGE).parts):
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                for imported in modules:
                    assert LAYERS.index(imported) < LAYERS.index(module), f"{module} imports {imported}"


def test_nothing_but_the_backend_and_testing_imports_numpy():
    importers = {
        path.name for path in PACKAGE.glob("*.py") if "import numpy" in path.read_text().replace(">>> import", "")
    }
    assert importers == {"backend.py"}


def test_importing_refimpl_imports_no_other_array_library():
    code = "import sys, refimpl; print({'cupy', 'torch', 'jax', 'hypothesis'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert printed == "set()\n"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
