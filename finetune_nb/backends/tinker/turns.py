"""Sampling and training take turns, for a service whose sampler and trainer share their weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager

__all__ = ["Turns"]


class Turns:
    """Replies wait while a job trains, and a job waits for the replies that are under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sampling = 0
        self._trained: Future[None] | None = None  # done when the job that trains has ended

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Around one reply."""
        while True:
            with self._changed:
                trained = self._trained
                if trained is None:
                    self._sampling += 1
                    break
            await asyncio.wrap_future(trained)
        try:
            yield
        finally:
            with self._changed:
                self._sampling -= 1
                self._changed.notify_all()

    @contextmanager
    def training(self, given_up: Callable[[], bool]) -> Iterator[bool]:
        """Around one job, which runs in a thread. Gives False where it was given up while it waited."""
        trained: Future[None] = Future()
        trained.set_running_or_notify_cancel()  # a reply that is canceled does not cancel the end of the job
        with self._changed:
            self._trained = trained
        try:
            with self._changed:
                while self._sampling and not given_up():
                    self._changed.wait(0.2)
                alone = not self._sampling
            yield alone
        finally:
            with self._changed:
                self._trained = None
            trained.set_result(None)
