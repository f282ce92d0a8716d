"""When requests are sampled together. Batch size is what a small machine's speed depends on, and where results must
repeat to the last digit, it is what the last digit depends on.

A batch forms as soon as every live episode waits for a reply. Requests of nobody's episode wait a few milliseconds for
company, and so does everything else unless `deterministic`. Requests may come from any event loop; batches run one
after the other in one daemon thread, which ends when nothing has come for a while. What sampling is, is left to `run`.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field

from ...errors import BackendError, FinetuneError
from ...redaction import redacting_logger
from ...threads import interpreter_exiting, start_daemon
from ...types import EpisodeKey, Sample, SamplingParams

__all__ = [
    "Batcher",
    "Request",
]

logger = redacting_logger(__name__)

QUIET_SECONDS = 0.005
"""A batch forms when no request has come for this long and no event loop is at it ..."""
LONGEST_SECONDS = 0.050
"""... or when its first request has waited this long."""
UNSETTLED_SECONDS = 0.25
"""... which is longer while an event loop is at it: what it set off will have come by then, and on a busy machine the loop
may just not have had its turn."""
QUIET_SHARE, LONGEST_SHARE = 0.05, 0.25
"""Both are longer where the last batch took long: of its seconds this part. Waiting for company costs less than a batch
of its own for those who come late."""
PATIENCE_SECONDS = 30.0
"""With `deterministic`: a live episode that neither asks nor ends for so long is not waited for any more. It may itself
wait for one that does ask (a lock in the workflow, say), which would otherwise never end."""
QUIET_TURNS = 8
"""Turns of an event loop without news after which it has settled: whatever an arrival, an end or a released semaphore
set off in the same loop (a further request, the next episode's start) has happened by then."""
IDLE_SECONDS = 10.0

_entered: ContextVar[EpisodeKey | None] = ContextVar("finetune_nb_local_episode", default=None)


@dataclass(eq=False, slots=True)
class Request:
    """One reply to sample. `future` gets the Sample or the error; a cancelled one is not sampled any further."""

    ids: Sequence[int]
    params: SamplingParams
    seed: int
    key: EpisodeKey | None
    order: int
    arrived: float
    future: Future[Sample] = field(default_factory=Future)

    def settle(self, result: Sample | BaseException) -> None:
        """Hands the result over, unless the caller has gone."""
        if self.future.set_running_or_notify_cancel():
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class Batcher:
    """`run` samples a batch in the worker thread and settles its requests; what it raises reaches those that it left
    unsettled."""

    def __init__(self, run: Callable[[list[Request]], None], deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self._run = run
        self._changed = threading.Condition()
        self._pending: list[Request] = []
        self._live: Counter[EpisodeKey] = Counter()
        self._order = itertools.count()
        self._unsettled: dict[asyncio.AbstractEventLoop, int] = {}
        self._worker: threading.Thread | None = None
        self._last_seconds = 0.0

    @contextmanager
    def episode(self, key: EpisodeKey) -> Iterator[None]:
        """While entered, batches wait for a request of this episode."""
        with self._changed:
            self._live[key] += 1
            self._stir()
        token = _entered.set(key)
        try:
            yield
        finally:
            with suppress(ValueError):  # left in another context than entered: that one never saw the value
                _entered.reset(token)
            with self._changed:
                self._live[key] -= 1
                if not self._live[key]:
                    del self._live[key]
                self._stir()

    async def submit(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        """Waits for the reply. Cancelling it takes the request out of its batch. Raises BackendError where a version is asked
        for: the weights of this process are those that are trained."""
        if version is not None:
            raise BackendError(
                f"replies of policy version {version} are asked for, and this process samples the newest weights alone. Use a "
                "vLLM server as the sampler, or leave max_staleness at 0."
            )
        request = Request(ids, params, seed, _current_key(), next(self._order), time.monotonic())
        with self._changed:
            self._pending.append(request)
            if self._worker is None:
                self._worker = start_daemon(self._work, "finetune_nb sampling", self._wake)
            if len(self._pending) == 1:  # from here on the worker minds the clock
                self._changed.notify()
            self._stir()
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            request.future.cancel()
            self._wake()
            raise

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _stir(self) -> None:
        """Something changed: wakes the worker when the running loop has settled. Called under the lock."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # none runs in this thread
            self._changed.notify()
            return
        if loop not in self._unsettled:
            loop.call_soon(self._turn, loop)
        self._unsettled[loop] = QUIET_TURNS

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._changed:
            self._unsettled[loop] -= 1
            if self._unsettled[loop]:
                loop.call_soon(self._turn, loop)
            else:
                del self._unsettled[loop]
                self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                deadline = time.monotonic() + IDLE_SECONDS
                while not (batch := self._take(time.monotonic())):
                    if interpreter_exiting.is_set() or (not self._pending and time.monotonic() >= deadline):
                        self._worker = None
                        return
                    self._changed.wait(self._seconds_until_due(time.monotonic()) if self._pending else IDLE_SECONDS)
            started = time.monotonic()
            self._answer(batch)
            self._last_seconds = time.monotonic() - started
            del batch  # an idle worker holds on to no reply

    def _answer(self, batch: list[Request]) -> None:
        error = None
        try:
            self._run(batch)
        except BaseException as raised:  # whatever it is, callers must not wait for ever
            traceback.clear_frames(raised.__traceback__)  # they hold the cache, and errors are kept for long
            error = raised
        for request in batch:
            if not request.future.done():
                request.settle(_refusal(error))

    def _take(self, now: float) -> list[Request]:
        """The batch to sample now, in its order; empty if it is not time yet. Called under the lock."""
        self._pending = [r for r in self._pending if not r.future.cancelled()]
        if not self._pending:
            return []
        of_live = [r for r in self._pending if r.key in self._live]
        everyone_waits = len({r.key for r in of_live}) == len(self._live) > 0 and not self._stirring()
        if everyone_waits:
            batch = of_live if self.deterministic else self._pending
        elif self._seconds_until_due(now) <= 0:
            batch = self._pending
            if self.deterministic:
                batch = [r for r in self._pending if r.key not in self._live]
                if not batch:
                    batch = of_live
                    logger.warning(
                        "%d of %d live episodes have neither asked nor ended for %g s; going on without them, so this "
                        "run will not repeat to the last digit",
                        len(self._live) - len({r.key for r in of_live}), len(self._live), PATIENCE_SECONDS,
                    )  # fmt: skip
        else:
            return []
        taken = set(map(id, batch))
        self._pending = [r for r in self._pending if id(r) not in taken]
        # By key first: the order of arrival is the scheduler's, and the last digit depends on the order of rows.
        return sorted(batch, key=lambda r: (r.key is not None, r.key or (), r.order))

    def _stirring(self) -> bool:
        return any(not loop.is_closed() for loop in self._unsettled)

    def _seconds_until_due(self, now: float) -> float:
        """Seconds after which the pending requests are sampled even though an episode still runs."""
        loose = [r for r in self._pending if not (self.deterministic and r.key in self._live)]
        if not loose:
            return max(r.arrived for r in self._pending) + PATIENCE_SECONDS - now
        arrived = [r.arrived for r in loose]
        longest = min(arrived) + max(LONGEST_SECONDS, LONGEST_SHARE * self._last_seconds)
        if self._stirring():
            return max(longest, min(arrived) + UNSETTLED_SECONDS) - now
        return min(max(arrived) + max(QUIET_SECONDS, QUIET_SHARE * self._last_seconds), longest) - now


def _current_key() -> EpisodeKey | None:
    """The episode that the running code belongs to: the recorder's, else the one entered here."""
    from ...llms.call_recorder import current_episode

    episode = current_episode()
    return episode.key if episode is not None else _entered.get()


def _refusal(error: BaseException | None) -> FinetuneError:
    """An exception of its own for each caller: one that is raised in many tasks would gather all their tracebacks."""
    if error is None:
        return BackendError("the batch ended without a reply to this request")
    refusal = BackendError(f"sampling failed: {type(error).__name__}: {error}")
    refusal.__cause__ = error
    return refusal
