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
    "backend.values", "backend.threads", "backend.tiling", "backend.portable", "backend.strided", "backend.numpy",
    "backend.cupy", "backend.torch", "backend", "_grads", "_options", "textbook",
    "_engine.geometry", "_engine.nan_safe", "_engine.im2col", "_engine.correlate", "_engine.pooling",
    "_engine.visibility", "_engine.arguments", "_engine.softmax", "_engine.projections", "_engine", "_checks",
    "conv", "pool", "lp", "adaptive", "unpool", "attention", "multihead", "merging", "testing",
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
        documentation = inspect.getdoc(thing)  # Python 3.13 takes the indentation from `__doc__`, the others do not.
        for section in ("Parameters", "Returns", "Raises", "Notes", "Examples"):
            assert f"\n{section}\n{'-' * len(section)}\n" in documentation
        for parameter in inspect.signature(thing).parameters:
            assert parameter in documentation


def layer_of(parts):
    """Return the layer of a module, by the parts of its path or name: the longest name that is one."""
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(LAYERS.index(name) for name in names if name in LAYERS)


def imported_by(path):
    """Yield what a module of the package imports from it, as the parts of names."""
    package = [*path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield from ([*filter(None, origin), alias.name] for alias in node.names)


def test_imports_run_downwards():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        parts = [*path.relative_to(PACKAGE).with_suffix("").parts]
        if parts == ["__init__"]:
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        for imported in imported_by(path):
            seen += 1
            inside = parts[0] == imported[0] and parts[0] in ("testing", "_checks", "textbook")
            assert inside or layer_of(imported) < layer_of(parts), f"{parts} imports {imported}"
    assert seen > 50


def test_nothing_but_the_backend_and_testing_imports_numpy():
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "import numpy" in path.read_text().replace(">>> import", "")
    }
    assert importers == {"backend", "testing"}


def test_importing_refimpl_imports_no_other_array_library():
    code = "import sys, refimpl; print({'cupy', 'torch', 'jax', 'hypothesis'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert printed == "set()\n"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
