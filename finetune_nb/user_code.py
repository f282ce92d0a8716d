"""Calls code that users wrote, and lets nothing out of it but an ordinary exception.

SystemExit, KeyboardInterrupt, GeneratorExit, a cancellation that nobody asked for and any other BaseException become a
UserCodeError: on an event loop they would end the loop, or pass for an abort.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from .errors import UserCodeError
from .redaction import error_text, redacting_logger

__all__ = [
    "LEFT_OUT",
    "Parameters",
    "as_exception",
    "contained",
    "contained_call",
    "raised_text",
]

T = TypeVar("T")
LEFT_OUT: Any = object()
"""In place of an argument: the parameter keeps its default."""
logger = redacting_logger(__name__)


def as_exception(error: BaseException, what: str) -> Exception:
    """Turn whatever user code raised into an exception that only ends what raised it.

    Args:
        error: What was raised.
        what: The code that raised it, for the message: "workflow 'solve'".

    Returns:
        The error itself if it is an Exception, else a UserCodeError that is caused by it.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, asyncio.CancelledError):
        said = message = f"CancelledError: {what} was cancelled from inside"
    else:
        said = error_text(error)
        message = f"{what} raised {said}"
    replaced = UserCodeError(message)
    replaced.said = said
    replaced.__cause__ = error
    return replaced


def raised_text(error: Exception) -> str:
    """What user code raised, as `error_text` has it: that of the cause, if `as_exception` replaced it.

    Args:
        error: What `contained` or `contained_call` raised.

    Returns:
        Its type and message, without secrets: "SystemExit: 2".
    """
    return error.said if isinstance(error, UserCodeError) else error_text(error)


def contained_call(what: str, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call a function of the user's.

    Args:
        what: The code that is called, for messages.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        What it returns.

    Raises:
        Exception: Whatever it raised, as `as_exception` turns it.
    """
    try:
        return function(*args, **kwargs)
    except Exception:
        raise
    except BaseException as error:
        raise as_exception(error, what) from error


class Parameters:
    """The parameters of a function of the user's, which are filled by name.

    Args:
        function: Any callable. One whose signature cannot be read, as of some built-in ones, has a single parameter.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        kinds = inspect.Parameter
        try:
            found = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            found = [kinds("value", kinds.POSITIONAL_ONLY)]
        self.takes_all = any(parameter.kind == kinds.VAR_KEYWORD for parameter in found)
        """Whether it takes keywords that it does not name."""
        variadic = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        self.each = [parameter for parameter in found if parameter.kind not in variadic]

    @property
    def names(self) -> list[str]:
        """The names of all parameters, in order."""
        return [parameter.name for parameter in self.each]

    @property
    def single(self) -> str | None:
        """The name of the only parameter; None if there are more, or none."""
        return self.each[0].name if len(self.each) == 1 else None

    def arguments(
        self, find: Callable[[inspect.Parameter], Any], others: Mapping[Any, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Fill the parameters.

        Args:
            find: Returns the argument of a parameter, or LEFT_OUT.
            others: What a function that takes all keywords gets besides.

        Returns:
            Positional and keyword arguments.
        """
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in self.each:
            value = find(parameter)
            if value is LEFT_OUT:
                continue
            if parameter.kind == inspect.Parameter.POSITIONAL_ONLY:
                args.append(value)
            else:
                kwargs[parameter.name] = value
        if self.takes_all:
            kwargs = {**{str(name): value for name, value in others.items()}, **kwargs}
        return args, kwargs


async def contained(what: str, work: Awaitable[T], patience: float | None = None) -> T:
    """Await user code in a task of its own, so that code which cancels its own task ends nothing else.

    Args:
        what: The code that is awaited, for messages.
        work: What to await.
        patience: Seconds that the code gets to clean up after the caller was cancelled. Then it is abandoned: a task that
            ignores its cancellation holds nobody. None: as long as it takes.

    Returns:
        What it returns.

    Raises:
        Exception: Whatever it raised, as `as_exception` turns it.
        CancelledError: The caller was cancelled.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    async def run() -> None:
        try:
            returned.append(await work)
        except BaseException as error:  # what it is, is decided outside of the task
            raised.append(error)

    task = asyncio.ensure_future(run())
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await _wait_out(task, what, patience)
        if not returned and not raised and inspect.iscoroutine(work):
            work.close()  # cancelled before it began
        raise
    if returned:
        return returned[0]
    if raised:
        raise as_exception(raised[0], what)
    raise as_exception(asyncio.CancelledError(), what)


async def _wait_out(task: asyncio.Task[None], what: str, patience: float | None) -> None:
    """Waits until a cancelled task has ended, `patience` seconds at most, however often the waiter is cancelled."""
    loop = asyncio.get_running_loop()
    deadline = None if patience is None else loop.time() + patience
    while not task.done():
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            logger.warning("%s does not end although it was cancelled: it is abandoned", what)
            return
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError:
            continue  # cancelled once more
