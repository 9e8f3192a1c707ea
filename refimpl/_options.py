"""The options that every attention op takes, in one place."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .backend import Array

F = TypeVar("F", bound=Callable[..., Any])
Window = tuple[int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What `scaled_dot_product_attention` documents under these names."""

    bias: Array | None = None
    mask: Array | None = None
    is_causal: bool = False
    window: Window | None = None
    query_offset: int | Array | str = 0
    query_lengths: Array | None = None
    key_lengths: Array | None = None
    sink: Array | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_mask: Array | None = None
    dropout_p: float = 0.0


def takes_attention_options(*without: str) -> Callable[[F], F]:
    """Give a function that takes `**options` the options of attention in its signature; any other is a TypeError."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        *parameters, _ = own.parameters.values()  # the last one is **options
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(AttentionOptions)
            if f.name not in without
        ]
        known = {p.name for p in parameters}

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if unknown := options.keys() - known:
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {min(unknown)!r}")
            return function(*args, **options)

        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect looks for
        return call  # type: ignore[return-value]  # of the same type, but for the signature that is shown

    return decorate
