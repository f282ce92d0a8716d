"""The engine thread: a daemon thread with an event loop of its own, on which a run lives whether or not a cell waits.

`run_sync` runs somebody's coroutine to its end from a cell or a script; `enable_nested_asyncio` is the opt-in for people
whose own cells call asyncio.run. Nothing of ours needs it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["EngineThread", "enable_nested_asyncio", "run_sync"]

T = TypeVar("T")


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

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits a coroutine of the thread from any other loop. Cancelling cancels it there, and waits until it is."""
        future = self.submit(coroutine)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.cancel()
            raise

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
            loop.run_forever()
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
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


_shared = EngineThread("ft-run-sync")


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, from code that cannot await: `run_sync(run.next_epoch())`.

    It runs on a loop thread of ours, so it works inside a notebook cell too. Interrupting cancels it.
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
