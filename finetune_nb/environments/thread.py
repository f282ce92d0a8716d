"""Calls of somebody else's sync environment, made in a thread of its own, and the random generators that they draw from."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import inspect
import os
import queue
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

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
IDLE_SECONDS = 10.0
"""After which a thread that no environment has ends."""


class CallThread:
    """One environment of a rollout, and the thread in which all calls of it are made, so that none of them blocks the event
    loop. Enter it with `async with`; leaving it closes the environment: at once, or when a call that hangs returns.

    Args:
        name: What messages call the environment.
        make: Makes it, in the thread, before the first call.
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
        self._context = contextvars.copy_context()

    async def __aenter__(self) -> Self:
        self._mail = _Mail.of(asyncio.get_running_loop())
        self._thread = _Thread.take(f"ft-{self._name}")
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, asyncio.CancelledError | TimeoutError):
            self._finish(None)  # nobody waits for what may hang
            return
        closed = asyncio.get_running_loop().create_future()
        self._finish(closed)
        await asyncio.wait([closed], timeout=CLOSING_SECONDS)

    async def call(self, what: str, work: Callable[[], Any]) -> Any:
        """Make a call in the thread, after those that were asked for before. The first one makes the environment, too.

        Args:
            what: What it is, for messages: "step()".
            work: The call. It may return something to await, which is awaited here.

        Returns:
            What it returns.

        Raises:
            WorkflowError: It raised something.
            Exception: It raised this, after which trying again may help.
        """
        future = asyncio.get_running_loop().create_future()

        def made() -> Any:
            if not self._is_made:
                self.held = self._make()
                self._is_made = True
            return work()

        self._put(lambda: self._mail.send(_settle, future, *self._result_of(made)))
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
            where = what if self._is_made else "making it"
            raise WorkflowError(f"{self._name} raised in {where}: {error_text(error)}") from error

    def _finish(self, closed: asyncio.Future[None] | None) -> None:
        """Has it closed after the call that is running, and gives the thread back."""

        def close() -> None:
            # Whether something is made when the rollout is cancelled is known only in the thread.
            result, error = self._result_of(lambda: self._close(self.held) if self._is_made else None)
            if error is not None:
                logger.warning("%s raised when it was closed: %s", self._name, error_text(error))
            if self._random is not None:
                self._random.release()
            if inspect.isawaitable(result):
                self._mail.send(_await_quietly, result, closed, self._name)
            elif closed is not None:
                self._mail.send(_settle, closed, None, None)

        if closed is None:
            self._thread.work.put(close)  # after the call that may hang, and it takes no turn before
            self._thread.work.put(None)
        else:
            self._put(close, None)

    def _put(self, *work: Callable[[], None] | None) -> None:
        """Has the thread do it; if it draws from the random generators, when it is its turn."""

        def begin() -> None:
            for each in work:
                self._thread.work.put(each)

        if self._random is None:
            begin()
        else:
            self._random.ask(begin)
            OwnRandom.watch(asyncio.get_running_loop())

    def _result_of(self, work: Callable[[], Any]) -> tuple[Any, Exception | None]:
        """What work returned, and what it raised. Called in the thread."""
        own = contextlib.nullcontext() if self._random is None else self._random.in_force()
        try:
            with own:
                return self._context.run(work), None
        except BaseException as error:
            return None, error if isinstance(error, Exception) else RuntimeError(error_text(error))


class _Thread:
    """A thread that one environment has for as long as it lives, and then the next one: starting a thread costs as much as
    some calls."""

    _idle: ClassVar[list[_Thread]] = []

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """None: the environment is closed, and needs it no longer."""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, name: str) -> _Thread:
        try:
            found = cls._idle.pop()
        except IndexError:
            found = cls()
        found._thread.name = name
        return found

    def _serve(self) -> None:
        while True:
            try:
                work = self.work.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                try:
                    self._idle.remove(self)
                except ValueError:
                    continue  # an environment has it
                return
            if work is None:
                self._idle.append(self)
            else:
                work()
            del work  # it holds the environment


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Thread._idle.clear)  # a child has none of these threads


class _Mail:
    """What threads tell an event loop: it is woken once for all that has come, since each time costs as much as a call."""

    _known: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._sent: collections.deque[tuple[Callable[..., None], tuple[Any, ...]]] = collections.deque()
        self._is_woken = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Mail:
        """The one of the loop that runs here."""
        found = cls._known.get(loop)
        if found is None:
            found = cls._known[loop] = cls(loop)
        return found

    def send(self, function: Callable[..., None], *arguments: Any) -> None:
        """Has the loop call it."""
        self._sent.append((function, arguments))
        loop = self._loop()
        if self._is_woken or loop is None:
            return
        self._is_woken = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False  # first: what comes from here on wakes the loop again
        while self._sent:
            function, arguments = self._sent.popleft()
            function(*arguments)


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

    _lock = threading.Lock()
    _holder: ClassVar[OwnRandom | None] = None
    _since: ClassVar[float] = 0.0
    _waiting: ClassVar[collections.deque[tuple[OwnRandom, Callable[[], None]]]] = collections.deque()
    _outside: ClassVar[Any] = None
    """The state outside of all environments. It is in force again when nobody waits for a turn."""
    _watching: ClassVar[weakref.WeakSet[asyncio.AbstractEventLoop]] = weakref.WeakSet()

    def __init__(self, seed: int) -> None:
        self._state: Any = None
        self._seed = seed

    def ask(self, begin: Callable[[], None]) -> None:
        """Call `begin`, which must be short, once it is this environment's turn: now, or in the thread that had the last one.

        Args:
            begin: Has some thread enter `in_force`.
        """
        with OwnRandom._lock:
            if OwnRandom._holder is None:
                OwnRandom._outside = _random_state()
                self._take(begin)
            else:
                OwnRandom._waiting.append((self, begin))

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the global generators are this environment's own. Waits for its turn if it has none."""
        while not self._begins():
            turn = threading.Event()
            self.ask(turn.set)
            while not turn.wait(TURN_SECONDS):
                OwnRandom.pass_on()
        try:
            yield
        finally:
            with OwnRandom._lock:
                if OwnRandom._holder is self:
                    self._state = _random_state()
                    OwnRandom._next()  # else another one has taken its turn

    def abandon(self) -> None:
        """The call that is running may hang: the others do not wait for it."""
        with OwnRandom._lock:
            kept = [each for each in OwnRandom._waiting if each[0] is not self]
            OwnRandom._waiting = collections.deque(kept)
            if OwnRandom._holder is self:
                OwnRandom._next()

    @staticmethod
    def pass_on() -> None:
        """Gives the turn to the next one, if the call that has it takes long: it waits for something, or hangs."""
        with OwnRandom._lock:
            if OwnRandom._holder is not None and time.monotonic() - OwnRandom._since >= TURN_SECONDS:
                OwnRandom._next()

    @classmethod
    def watch(cls, loop: asyncio.AbstractEventLoop) -> None:
        """Has the loop look after the turns for as long as somebody waits for one."""
        if cls._waiting and loop not in cls._watching:
            cls._watching.add(loop)
            loop.call_later(TURN_SECONDS, cls._look, loop)

    @classmethod
    def _look(cls, loop: asyncio.AbstractEventLoop) -> None:
        cls._watching.discard(loop)
        cls.pass_on()
        cls.watch(loop)

    def release(self) -> None:
        """Nothing draws from it any more."""
        if self._state is not None and self._state[1] is not None:
            _spare.append(self._state[1])
        self._state = None

    def _begins(self) -> bool:
        """Whether it is its turn; then its state is in force."""
        with OwnRandom._lock:
            if OwnRandom._holder is not self:
                return False
            OwnRandom._since = time.monotonic()
            if self._state is None:
                _seed_random(self._seed)
            else:
                _set_random_state(self._state)
            return True

    def _take(self, begin: Callable[[], None]) -> None:
        OwnRandom._holder, OwnRandom._since = self, time.monotonic()
        begin()

    @staticmethod
    def _next() -> None:
        if OwnRandom._waiting:
            following, begin = OwnRandom._waiting.popleft()
            following._take(begin)
        else:
            OwnRandom._holder = None
            _set_random_state(OwnRandom._outside)


def _random_state() -> Any:
    """The state of Python's generator, and NumPy's generator itself: a copy of its state takes ten times as long."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_bit_generator()


def _set_random_state(state: Any) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_bit_generator(state[1])


_spare: list[Any] = []
"""NumPy's generators of environments that are closed: making one takes as long as some calls."""


def _seed_random(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.set_bit_generator(_spare.pop() if _spare else numpy.random.MT19937(0))
        numpy.random.seed(seed % 2**32)
