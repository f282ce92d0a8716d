"""The engine thread: a daemon thread with an event loop of its own, on which a run lives whether or not a cell waits.

`run_sync` runs somebody's coroutine to its end from a cell or a script; `enable_nested_asyncio` is the opt-in for people
whose own cells call asyncio.run. Nothing of ours needs it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from .errors import RunError
from .redaction import redacting_logger

__all__ = [
    "EngineThread",
    "before_exit",
    "enable_nested_asyncio",
    "in_daemon_thread",
    "interpreter_exiting",
    "renew_exit_order",
    "run_sync",
    "start_daemon",
]

interpreter_exiting = threading.Event()
"""Set when the interpreter begins to end: stop after the step at hand."""
PARTING_SECONDS = 3.0
_wakes: dict[threading.Thread, Callable[[], None]] = {}


def start_daemon(work: Callable[[], None], name: str, wake: Callable[[], None] = lambda: None) -> threading.Thread:
    """Runs `work` in a daemon thread of its own, with the caller's context variables.

    Args:
        work: What to run. It should look at `interpreter_exiting` between its steps.
        name: The thread's name.
        wake: Called at exit, so that work that sleeps looks at `interpreter_exiting`.
    """
    context = contextvars.copy_context()

    def run() -> None:
        try:
            context.run(work)
        finally:
            _wakes.pop(threading.current_thread(), None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _wakes[thread] = wake
    thread.start()
    return thread


@atexit.register
def _join_daemons() -> None:
    interpreter_exiting.set()
    deadline = time.monotonic() + PARTING_SECONDS
    threads = dict(_wakes)
    for wake in threads.values():
        wake()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


_exit_work: list[Callable[[], None]] = []


def before_exit(work: Callable[[], None]) -> Callable[[], None]:
    """Calls `work` when the interpreter exits. It must bear to be called twice: see `renew_exit_order`.

    Args:
        work: A function without arguments.

    Returns:
        `work` itself, so that this can be used as a decorator.
    """
    _exit_work.append(work)
    return atexit.register(work)


def renew_exit_order() -> None:
    """Moves what `before_exit` was given to the front of what happens at exit.

    Exit functions run last in, first out. A library that is imported later, such as Ray, would shut down before the runs
    that use it are closed: whoever loads it calls this once.
    """
    for work in _exit_work:
        atexit.register(work)


T = TypeVar("T")
ANSWER_SECONDS = 2.0
"""A loop that has not answered by then is blocked."""
logger = redacting_logger(__name__)


class LoopTask(Generic[T]):
    """A coroutine that is running on an engine thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T],
        ended: Callable[[], Any] = lambda: None,
    ) -> None:
        self._loop, self._tell = loop, ended
        self._task: asyncio.Task[T] | None = None
        self._canceled = False
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended.set_running_or_notify_cancel()  # so that a waiter who is canceled does not cancel the end
        loop.call_soon_threadsafe(self._start, coroutine)

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(coroutine)
        self._task.add_done_callback(self._end)
        if self._canceled:
            self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more
        self._tell()
        self._ended.set_result(None)

    def cancel(self) -> None:
        """Cancels it; returns at once. May be called from any thread, and from a signal handler."""
        self._canceled = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    async def join(self) -> T:
        """Its result. Cancelling the join cancels it too, and waits until it has ended (a second at most: something that
        will not end must not hold the caller)."""
        waiting = asyncio.wrap_future(self._ended)
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([waiting], timeout=1.0)
            raise
        assert self._task is not None
        return self._task.result()

    async def wait_ended(self, timeout: float) -> None:
        """Waits until it has ended, in whatever way, or for `timeout` seconds."""
        await asyncio.wait([asyncio.shield(asyncio.wrap_future(self._ended))], timeout=timeout)


class EngineThread:
    """A daemon thread that runs coroutines. Started by the first one, ended by `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine on the thread's loop. May be called from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())

    def launch(self, coroutine: Coroutine[Any, Any, T], ended: Callable[[], Any] = lambda: None) -> LoopTask[T]:
        """Starts a coroutine that can be canceled and joined. May be called from any thread. ended: called on the thread
        when it has ended, also where it was canceled before it began."""
        return LoopTask(self._running_loop(), coroutine, ended)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits a coroutine of the thread from any other loop; see LoopTask.join."""
        return await self.launch(coroutine).join()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=(loop,), name=self.name, daemon=True)
                self._thread.start()
                self._loop = loop
            return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while True:
                try:
                    loop.run_forever()
                    break
                except (SystemExit, KeyboardInterrupt):
                    # A task of somebody's has raised it, and asyncio lets it through. Its waiter hears of it; the loop
                    # belongs to everybody else, too. A person's interrupt never arrives in this thread.
                    logger.warning("%s: a task ended by SystemExit or KeyboardInterrupt", self.name, exc_info=True)
        finally:
            loop.run_until_complete(_cancel_the_rest())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def close(self) -> None:
        """Ends the loop; what still runs on it is cancelled."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)

    def close_after(self, last: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Runs a last coroutine, ten seconds at most, and closes. Raises what that raised, or RunError where something
        blocks the loop: it is abandoned in its thread, which ends with the interpreter."""
        try:
            try:
                self.submit(asyncio.sleep(0)).result(timeout=ANSWER_SECONDS)
            except concurrent.futures.TimeoutError:
                raise RunError(
                    f"{self.name}: something blocks the run's event loop and cannot be ended, such as an async workflow that "
                    "never awaits. It was abandoned; what was recorded is in the run's folder. Restart the kernel to be "
                    "rid of it."
                ) from None
            self.submit(last()).result(timeout=10.0)
        finally:
            self.close()

    def close_in_background(self, last: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """The same for the garbage collector, which may call from any thread, this one included: nobody waits."""

        def end() -> None:
            try:
                self.close_after(last)
            except Exception:
                logger.warning("%s could not be closed well", self.name, exc_info=True)

        if self._loop is not None:  # else nothing ever ran on it
            threading.Thread(target=end, name=f"{self.name}-close", daemon=True).start()


async def _cancel_the_rest() -> None:
    """Cancels every other task of the loop, and leaves each half a second to end."""
    await asyncio.sleep(0)  # what was submitted at the last moment becomes a task first
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=0.5)


_shared = EngineThread("ft-run-sync")


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine from code that cannot await: `run_sync(run.next_epoch())`.

    It runs on a loop thread of ours, so it works inside a notebook cell too. Interrupting cancels it.

    Args:
        coroutine: The coroutine to run.

    Returns:
        Its result.

    Raises:
        RuntimeError: It was called from a coroutine that run_sync itself runs.
    """
    if _shared.is_current:
        coroutine.close()
        raise RuntimeError("run_sync was called from a coroutine that run_sync runs: use await there.")
    future = _shared.submit(coroutine)
    try:
        while True:
            try:
                return future.result(timeout=0.1)  # in slices, so that an interrupt arrives
            except concurrent.futures.TimeoutError:
                if future.done():
                    return future.result()
    except BaseException:
        future.cancel()
        raise


def enable_nested_asyncio() -> None:
    """Lets your own cells call `asyncio.run` inside a running loop, by nest-asyncio2 where it is installed, else by
    nest-asyncio. Process-wide and irrevocable; finetune_nb never needs it."""
    try:
        import nest_asyncio2 as nest
    except ImportError:
        import nest_asyncio as nest
    nest.apply()


async def in_daemon_thread(function: Callable[..., T], *args: Any) -> T:
    """Runs blocking code in a thread of its own, with the caller's context variables.

    When the caller is cancelled or times out, the thread is left to itself: Python cannot stop it. It ends with the
    interpreter at the latest.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def run() -> None:
        result, caught = None, None
        try:
            result = context.run(function, *args)
        except BaseException as error:
            caught = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
        try:
            loop.call_soon_threadsafe(settle, result, caught)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    threading.Thread(target=run, name=f"ft-{getattr(function, '__name__', 'call')}", daemon=True).start()
    return await future
