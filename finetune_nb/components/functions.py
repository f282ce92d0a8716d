"""Functions of a config: what the section `functions` names, as workflows call them, and which one is running."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any

from ..types import InvocationNode

__all__ = [
    "WORKFLOW",
    "Function",
    "current_function",
    "running",
]

WORKFLOW = InvocationNode(function_id="<workflow>", function_name="<workflow>")
"""The workflow itself."""
_numbers = itertools.count(1)
_function: ContextVar[InvocationNode] = ContextVar("finetune_nb_function", default=WORKFLOW)


def current_function() -> InvocationNode:
    """The function that the running code belongs to; outside of any, the workflow."""
    return _function.get()


@contextmanager
def running(function: InvocationNode) -> Iterator[None]:
    """Code inside belongs to that function."""
    token = _function.set(function)
    try:
        yield
    finally:
        _function.reset(token)


class Function:
    """A function of the config. Call it as the function itself: what is called in it is recorded as called by it.

    Args:
        function: Any callable, sync or async.
        name: Its name in the section `functions`.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        update_wrapper(self, function, updated=())
        self.function, self.name = function, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; an awaitable, if it is async."""
        caller = current_function()
        node = InvocationNode(
            function_id=f"{self.name}-{next(_numbers)}",
            function_name=self.name,
            parent_id=caller.function_id,
            parent_name=caller.function_name,
        )
        with running(node):
            result = self.function(*args, **kwargs)
        return _awaited(result, node) if inspect.isawaitable(result) else result

    async def ainvoke(self, value: Any, **kwargs: Any) -> Any:
        """The same, awaited whether the function is async or not. The Toolkit's name for it."""
        result = self(value, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def __repr__(self) -> str:
        return f"Function({self.name!r})"


async def _awaited(result: Awaitable[Any], node: InvocationNode) -> Any:
    with running(node):
        return await result
