"""Calls code that users wrote, and lets nothing out of it but an ordinary exception.

SystemExit, KeyboardInterrupt, GeneratorExit, a cancellation that nobody asked for and any other BaseException become a
UserCodeError: on an event loop they would end the loop, or pass for an abort.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from .errors import UserCodeError
from .redaction import error_text, redacting_logger

__all__ = [
    "as_exception",
    "contained",
    "contained_call",
    "raised_text",
]

T = TypeVar("T")
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
