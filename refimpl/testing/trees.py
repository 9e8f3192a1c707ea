"""Results and gradients: arrays, or (named) tuples and mappings of them, with None for what is not there."""

from collections.abc import Callable, Mapping
from typing import Any


def leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return `(name, leaf)` for everything in (named) tuples and mappings that is not None."""
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return [leaf for key, part in tree.items() for leaf in leaves(part, f"{name}[{key!r}]")]
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", [f"result {i}" for i in range(len(tree))])
        return [leaf for key, part in zip(names, tree, strict=True) for leaf in leaves(part, f"{name}{key}")]
    return [(name, tree)]


def together(f: Callable[..., Any], tree: Any, *more: Any) -> Any:
    """Return the tree of `f(leaf, ...)` over the leaves of trees of the same form."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: together(f, part, *(other[key] for other in more)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [together(f, *each) for each in zip(tree, *more, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return f(tree, *more)
