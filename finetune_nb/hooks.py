"""Wraps methods of single instances, and finds objects of higher layers by their names.

With wrapped methods a Run can follow a Trainer, a builder and an adapter that know nothing of it. `resolve` turns
"module:object" into the object, and `shown_by` is how a noun shows itself with it.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from .text import plain

__all__ = [
    "wrap_method",
    "resolve",
    "shown_by",
    "unwrap_methods",
    "without_wrappers",
]

T = TypeVar("T")
_MARK = "__finetune_nb_observes__"


def wrap_method(instance: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces `instance.name` by `wrapper(original, *args, **kwargs)`, for this instance only."""
    original = getattr(instance, name)

    @functools.wraps(original)
    def observed(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(observed, _MARK, vars(instance).get(name, _MARK))
    setattr(instance, name, observed)


def unwrap_methods(instance: Any) -> None:
    """Takes off every wrapper; what the instance held of its own (a test's replacement, say) comes back."""
    for name, value in list(vars(instance).items()):
        while hasattr(value, _MARK):
            value = getattr(value, _MARK)
            if value is _MARK:
                delattr(instance, name)
            else:
                setattr(instance, name, value)


def without_wrappers(instance: T) -> T:
    """A shallow copy without wrappers, whose methods are bound to the copy."""
    twin = copy.copy(instance)
    unwrap_methods(twin)
    return twin


def resolve(path: str) -> Any:
    """The object that "package.module:name" refers to."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def shown_by(view: str, noun: Any, /, **options: Any) -> Any:
    """Shows a noun with a function that lies above it; its module is imported when the noun is first shown.

    Args:
        view: The function, as "package.module:name".
        noun: What is shown: the function's first argument.
        options: The function's other arguments.

    Returns:
        What the function returns: HTML, text or a figure.
    """
    shown = resolve(view)(noun, **options)
    return plain(shown) if view.endswith("_text") else shown  # a text may go to a terminal
