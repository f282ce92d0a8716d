"""Where rollouts run. `RolloutExecutor` is the seam: here on this process's event loop, elsewhere on a cluster.

A rollout is a function from RolloutRequest to RolloutResult and never raises. The executor bounds how many run at once,
over everything that is given to it. `in_daemon_thread` runs blocking code without the event loop waiting for it, and
without the interpreter waiting for it at exit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..interfaces import RolloutFunction
from ..types import RolloutRequest, RolloutResult

__all__ = [
    "LocalExecutor",
]

T = TypeVar("T")


@dataclass(eq=False)
class _Batch:
    """The requests of one call of `map`."""

    rollout: RolloutFunction
    results: list[RolloutResult | None]
    on_result: Callable[[RolloutResult], None] | None
    left: int
    done: asyncio.Future[None]
    workers: set[asyncio.Task[None]] = field(default_factory=set)
    """Workers that are on one of its requests at the moment."""
    canceled: bool = False


class LocalExecutor:
    """Rollouts as coroutines on the current event loop, `max_concurrency` at once over all calls of `map`.

    A worker goes from one rollout to the next without giving way in between: whoever counts the live episodes never sees
    a gap.
    """

    def __init__(self, max_concurrency: int = 8) -> None:
        self.max_concurrency = max_concurrency
        self._queue: deque[tuple[_Batch, int, RolloutRequest]] = deque()
        self._workers: set[asyncio.Task[None]] = set()

    async def map(
        self,
        rollout: RolloutFunction,
        requests: Sequence[RolloutRequest],
        on_result: Callable[[RolloutResult], None] | None = None,
    ) -> list[RolloutResult]:
        if not requests:
            return []
        done = asyncio.get_running_loop().create_future()
        batch = _Batch(rollout, [None] * len(requests), on_result, len(requests), done)
        self._queue.extend((batch, i, request) for i, request in enumerate(requests))
        for _ in range(min(len(requests), self.max_concurrency - len(self._workers))):
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        try:
            await done
        except asyncio.CancelledError:
            batch.canceled = True
            self._queue = deque(job for job in self._queue if job[0] is not batch)
            for worker in batch.workers:
                worker.cancel()
            raise
        return batch.results  # type: ignore[return-value]  # none is left

    @staticmethod
    def _end(batch: _Batch, i: int, result: RolloutResult) -> None:
        batch.results[i] = result
        if batch.on_result:
            batch.on_result(result)

    async def _work(self) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        while self._queue:
            batch, i, request = self._queue.popleft()
            batch.workers.add(worker)
            try:
                self._end(batch, i, await batch.rollout(request))
            except asyncio.CancelledError:
                worker.uncancel()
                if batch.canceled:
                    continue
                # Somebody else cancelled this worker: that rollout has failed, and the others still run.
                self._end(
                    batch, i, RolloutResult(request, None, [], 0.0, "CancelledError: it was cancelled from outside")
                )
            except Exception as error:
                if not batch.done.done():
                    batch.done.set_exception(error)
            finally:
                batch.workers.discard(worker)
            batch.left -= 1
            if not batch.left and not batch.done.done():
                batch.done.set_result(None)
