"""Async rewards that depend on a server: tried again after a transient failure, and so many at once."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import ConfigError, is_transient

__all__ = [
    "CallLimit",
    "call_again",
    "retrying",
]

LONGEST_WAIT = 30.0
"""Seconds between two tries."""


class CallLimit:
    """How many calls run at once, in each event loop.

    Args:
        concurrency: The limit; None: no limit.
    """

    def __init__(self, concurrency: int | None) -> None:
        if concurrency is not None and concurrency < 1:
            raise ConfigError(f"concurrency is {concurrency}; expected at least 1, or None for no limit.")
        self.concurrency = concurrency
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    @asynccontextmanager
    async def slot(self):
        """Waits until a call may begin, and holds its place."""
        if self.concurrency is None:
            yield
            return
        loop = asyncio.get_running_loop()
        gate = self._gates.get(loop)
        if gate is None:
            gate = self._gates[loop] = asyncio.Semaphore(self.concurrency)
        async with gate:
            yield


async def call_again(
    call: Callable[[], Awaitable[Any]],
    retries: int,
    limit: CallLimit,
    wait: float = 0.5,
    may_help: Callable[[BaseException], bool] = is_transient,
) -> Any:
    """Await a call, and try again with growing pauses where that may help.

    Args:
        call: Makes the call; each try makes a new one.
        retries: How often it is tried again.
        limit: How many calls run at once. A pause between two tries holds no place.
        wait: Seconds before the second try, at random between 0 and that; twice as long before each next one.
        may_help: Whether trying again after that error may help.

    Returns:
        What the call returned.

    Raises:
        Exception: That of the last try.
    """
    from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    tries = AsyncRetrying(
        stop=stop_after_attempt(retries + 1),
        wait=wait_random_exponential(multiplier=wait, max=LONGEST_WAIT),
        retry=retry_if_exception(may_help),
        reraise=True,
    )
    async for attempt in tries:
        with attempt:
            async with limit.slot():
                return await call()
    raise AssertionError("tenacity makes at least one try")


def retrying(function: Callable[..., Any], retries: int = 5, concurrency: int | None = None) -> Callable[..., Any]:
    """Have an async reward tried again after a transient failure: a lost connection, a time-out, a status of 429 or 5xx.

    Args:
        function: An async reward function.
        retries: How often it is tried again, with growing pauses.
        concurrency: How many of its calls run at once. Default: no limit of its own.

    Returns:
        The function, with the same name and parameters.

    Raises:
        ConfigError: The function is not async, or a number is out of range.
    """
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"retrying takes an async function; {getattr(function, '__name__', function)!r} is none.")
    if retries < 0:
        raise ConfigError(f"retries is {retries}; expected at least 0.")
    limit = CallLimit(concurrency)

    @functools.wraps(function)
    async def retried(*args: Any, **kwargs: Any) -> Any:
        return await call_again(lambda: function(*args, **kwargs), retries, limit)

    return retried
