"""Calls of somebody else's sync environment, made in a thread of its own, and the random generators that they draw from."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from ..errors import WorkflowError, is_transient
from ..redaction import error_text, redacting_logger

__all__ = [
    "CallThread",
    "OwnRandom",
]

logger = redacting_logger(__name__)
TURN_SECONDS = 1.0
"""After which a call loses the state of its own, if others wait for their turn."""
CLOSING_SECONDS = 5.0
"""What a rollout waits for its environment to close. Later it closes in its thread, and nobody waits."""


class CallThread:
    """One environment of a rollout, and the thread in which all calls of it are made, so that none of them blocks the event
    loop. Enter it with `async with`; leaving it closes the environment: at once, or when a call that hangs returns.

    Args:
        name: What messages call the environment.
        make: Makes it, in the thread.
        close: Closes it, in the thread. It may return something to await.
        own: The state of the random generators that its calls see. None: the global one.
    """

    def __init__(
        self, name: str, make: Callable[[], Any], close: Callable[[Any], Any], own: OwnRandom | None = None
    ) -> None:
        self._name, self._make, self._close, self._random = name, make, close, own
        self.held: Any = None
        """The environment, once it is made."""
        self._is_made = False
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any, Any], None]] | None] = queue.SimpleQueue()
        self._context = contextvars.copy_context()

    async def __aenter__(self) -> Self:
        threading.Thread(target=self._serve, name=f"ft-{self._name}", daemon=True).start()
        try:
            await self.call("making it", self._hold)
        except BaseException:
            self._finish(None)
            raise
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, asyncio.CancelledError | TimeoutError):
            self._finish(None)  # nobody waits for what may hang
            return
        closed = asyncio.get_running_loop().create_future()
        self._finish(closed)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(closed), CLOSING_SECONDS)

    def _hold(self) -> None:
        self.held = self._make()
        self._is_made = True

    async def call(self, what: str, work: Callable[[], Any]) -> Any:
        """Make a call in the thread, after those that were asked for before.

        Args:
            what: What it is, for messages: "step()".
            work: The call. It may return something to await, which is awaited here.

        Returns:
            What it returns.

        Raises:
            WorkflowError: It raised something.
            Exception: It raised this, after which trying again may help.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._work.put((work, settle))
        try:
            found = await future
            return await found if inspect.isawaitable(found) else found
        except asyncio.CancelledError:
            if self._random is not None:
                self._random.abandon()
            raise
        except Exception as error:
            if is_transient(error):
                raise  # the rollout may be tried again
            raise WorkflowError(f"{self._name} raised in {what}: {error_text(error)}") from error

    def _finish(self, closed: asyncio.Future[None] | None) -> None:
        """Has it closed after the call that is running, and the thread ended."""
        loop = asyncio.get_running_loop()

        def settle(result: Any, error: BaseException | None) -> None:
            if error is not None:
                logger.warning("%s raised when it was closed: %s", self._name, error_text(error))
            with contextlib.suppress(RuntimeError):
                if inspect.isawaitable(result):
                    loop.call_soon_threadsafe(_await_quietly, result, closed, self._name)
                elif closed is not None:
                    loop.call_soon_threadsafe(_settle, closed, None, None)

        def close() -> Any:
            # Whether something is made when the rollout is cancelled is known only in the thread.
            return self._close(self.held) if self._is_made else None

        self._work.put((close, settle))
        self._work.put(None)

    def _serve(self) -> None:
        while (asked := self._work.get()) is not None:
            work, settle = asked
            try:
                if self._random is None:
                    result = self._context.run(work)
                else:
                    with self._random.in_force():
                        result = self._context.run(work)
            except BaseException as error:
                settle(None, error if isinstance(error, Exception) else RuntimeError(error_text(error)))
            else:
                settle(result, None)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


_closing: set[asyncio.Future[Any]] = set()


def _await_quietly(work: Any, closed: asyncio.Future[None] | None, name: str) -> None:
    """Awaits what closes an async environment."""
    task = asyncio.ensure_future(work)
    _closing.add(task)

    def end(done: asyncio.Future[Any]) -> None:
        _closing.discard(done)
        error = None if done.cancelled() else done.exception()
        if error is not None:
            logger.warning("%s raised when it was closed: %s", name, error_text(error))
        if closed is not None:
            _settle(closed, None, None)

    task.add_done_callback(end)


class OwnRandom:
    """A state of the global random generators that belongs to one environment. Environments that have one take turns."""

    _turn = threading.Condition()
    _holder: OwnRandom | None = None
    _since = 0.0

    def __init__(self, seed: int) -> None:
        self._state: Any = None
        self._seed = seed
        self._outside: Any = None

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the global generators are this environment's own."""
        kind = OwnRandom
        with kind._turn:
            while (holder := kind._holder) is not None:
                left = kind._since + TURN_SECONDS - time.monotonic()
                if left <= 0:
                    holder._give_up()  # it waits for something, or hangs
                    break
                kind._turn.wait(left)
            kind._holder, kind._since = self, time.monotonic()
            self._outside = _random_state()
            if self._state is None:
                _seed_random(self._seed)
            else:
                _set_random_state(self._state)
        try:
            yield
        finally:
            with kind._turn:
                if kind._holder is self:
                    self._state = _random_state()
                    self._give_up()  # else another one has taken its turn

    def abandon(self) -> None:
        """The call that is running may hang: the others do not wait for it."""
        with OwnRandom._turn:
            if OwnRandom._holder is self:
                self._give_up()

    def _give_up(self) -> None:
        _set_random_state(self._outside)
        OwnRandom._holder = None
        OwnRandom._turn.notify()


def _random_state() -> Any:
    """The state of Python's generator, and NumPy's generator itself: a copy of its state takes ten times as long."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_bit_generator()


def _set_random_state(state: Any) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_bit_generator(state[1])


def _seed_random(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.set_bit_generator(numpy.random.MT19937())
        numpy.random.seed(seed % 2**32)
