"""RayExecutor: rollouts on a Ray cluster, as many at once as locally, in workers that are replaced when they are lost.

A worker is sent as many rollouts as have become free, and gives each back when it has ended: workers that are quick get more.
Scoring stays in this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import os
import pickle
import sys
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...components.builder import Builder
from ...config.sections import RaySettings, RunSettings
from ...errors import BackendError
from ...interfaces import RolloutFunction
from ...redaction import error_text, known_secrets, redacting_logger
from ...threads import in_daemon_thread
from ...types import RolloutRequest, RolloutResult
from .cluster import actor_options, connect, greet, require, total, trainer_resources, workers_at_least
from .parcel import Parcel, PolicyParcel, packed
from .worker import RolloutWorker

__all__ = [
    "RayExecutor",
]

logger = redacting_logger(__name__)

MOST_WORKERS = 256
"""Workers that one run starts by itself: more answers than theirs, one process can hardly take in."""
ANSWER_SECONDS = 5.0
"""A worker that has not answered a cancellation by then is blocked, and is replaced."""


@dataclass(eq=False)
class _Batch:
    """The requests of one call of `map`."""

    rollout: Any
    parcel: Parcel
    requests: Sequence[RolloutRequest]
    results: list[RolloutResult | None]
    tries: list[int]
    """How often each was lost."""
    on_result: Callable[[RolloutResult], None] | None
    done: asyncio.Future[None]
    left: int
    canceled: bool = False

    def settle(self, place: int, output: Any, steps: list[Any], seconds: float, error: str | None) -> None:
        result = RolloutResult(self.requests[place], output, steps, seconds, error)
        self.results[place] = result
        self.left -= 1
        if self.on_result is not None:
            try:
                self.on_result(result)
            except Exception as raised:
                self.fail(raised)
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class _Worker:
    actor: Any
    ready: bool = False
    load: int = 0
    """Rollouts that it has not given back."""
    sent: dict[int, tuple[_Batch, asyncio.Task[None]]] = field(default_factory=dict)


class RayExecutor:
    """engine: as in `run.engine`. bound: rollouts at once, over all calls of `map`; asked anew each time. All methods run on
    one event loop."""

    def __init__(self, engine: str, settings: RaySettings, bound: Callable[[], int]) -> None:
        self.engine, self.settings, self._bound = engine, settings, bound
        self._ray: Any = None
        self._workers: list[_Worker] = []
        self._queue: deque[tuple[_Batch, int]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._numbers = itertools.count()
        self._failed_starts = 0
        self._names: dict[int, tuple[Any, str, Any]] = {}  # id of a policy -> the policy, its name, its replica
        self._weights: dict[str, tuple[Any, Any]] = {}  # name of a policy -> which weights, and where they are
        self._packing = asyncio.Lock()

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Reaches the cluster and starts the workers. Raises BackendError where it cannot give them, or they do not start."""
        self._ray = await in_daemon_thread(connect, self.engine, self.settings.runtime_env)
        count = self.workers_wanted()
        trainer = ("the trainer", 1, trainer_resources(self._ray, self.settings))
        require(self._ray, [trainer, workers_at_least(self.settings, count)])
        self._workers = [self._start() for _ in range(count)]
        try:
            await asyncio.gather(*[self._task(self._welcome(worker)) for worker in self._workers])
        except BaseException:
            await self.aclose()
            raise

    def workers_wanted(self) -> int:
        """What the settings say, or what the cluster has room for."""
        settings = self.settings
        if settings.workers is not None:
            return settings.workers
        trainer = trainer_resources(self._ray, settings)
        room = total(self._ray, "CPU") - trainer["CPU"]
        if settings.worker_gpus:
            room = min(room, (total(self._ray, "GPU") - trainer["GPU"]) / settings.worker_gpus)
        return max(1, min(int(room), self._bound(), MOST_WORKERS))

    def _start(self) -> _Worker:
        settings = self.settings
        resources = {"num_cpus": settings.worker_cpus, "num_gpus": settings.worker_gpus}
        actor = self._ray.remote(**resources, max_concurrency=1000, **actor_options(settings))(RolloutWorker)
        return _Worker(actor.remote(known_secrets(), [os.path.abspath(folder) for folder in sys.path]))

    async def _welcome(self, worker: _Worker) -> None:
        """Waits until it is there. Raises BackendError where it does not come, or is another version."""
        asked = f"{self.settings.worker_cpus:g} CPU and {self.settings.worker_gpus:g} GPU for each"
        await greet(self._ray, worker.actor, "a rollout worker", self.settings, asked, "finetune_nb")
        self._failed_starts, worker.ready = 0, True
        self._fill()

    def _lost(self, worker: _Worker, error: BaseException) -> None:
        """Puts another one in its place. What it was at comes back to the queue by itself, job for job."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        logger.warning(
            "a rollout worker was lost: %s", str(error).splitlines()[0] if str(error) else type(error).__name__
        )
        self._task(self._replace())

    async def _replace(self) -> None:
        worker = self._start()
        self._workers.append(worker)
        try:
            await self._welcome(worker)
        except BackendError as error:
            self._failed_starts += 1
            logger.warning("no rollout worker in place of one that was lost: %s", error)
            if worker in self._workers:
                self._workers.remove(worker)
            self._ray.kill(worker.actor)
            if self._failed_starts < self.settings.tries:
                await self._replace()
            elif not any(other.ready for other in self._workers):
                for batch, _ in self._queue:
                    batch.fail(error)

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def map(
        self,
        rollout: RolloutFunction,
        requests: Sequence[RolloutRequest],
        on_result: Callable[[RolloutResult], None] | None = None,
    ) -> list[RolloutResult]:
        """All results, in the order of the requests. A rollout whose worker was lost is begun anew, `tries` times at most.
        Raises ConfigError for a workflow that cannot go elsewhere, BackendError where no worker is left."""
        if not requests:
            return []
        parcel, count = await self._parcel(rollout), len(requests)
        done = asyncio.get_running_loop().create_future()
        batch = _Batch(rollout, parcel, requests, [None] * count, [0] * count, on_result, done, count)
        self._queue.extend((batch, place) for place in range(count))
        self._fill()
        try:
            await done
        finally:
            if batch.left:
                self._call_off(batch)
        return batch.results  # type: ignore[return-value]  # none is left

    def _call_off(self, batch: _Batch) -> None:
        batch.canceled = True
        self._queue = deque(job for job in self._queue if job[0] is not batch)
        for worker in list(self._workers):
            numbers = [number for number, (of_batch, _) in worker.sent.items() if of_batch is batch]
            for number in numbers:
                worker.sent[number][1].cancel()
            if numbers:
                self._task(self._cancel(worker, numbers))
        self._fill()

    async def _cancel(self, worker: _Worker, numbers: Sequence[int]) -> None:
        try:
            asked = [worker.actor.cancel.remote(number) for number in numbers]
            await asyncio.wait_for(asyncio.gather(*asked), ANSWER_SECONDS)
        except TimeoutError:
            self._lost(worker, BackendError("it did not answer: a workflow blocks it"))
        except self._ray.exceptions.RayError as error:
            self._lost(worker, error)

    def _fill(self) -> None:
        """Sends what may begin now, evenly, to the workers that have least to do."""
        while self._queue:
            ready = [worker for worker in self._workers if worker.ready]
            free = self._bound() - sum(worker.load for worker in self._workers)
            if not ready or free <= 0:
                return
            worker = min(ready, key=lambda each: each.load)
            share = math.ceil(self._bound() / len(ready)) - worker.load
            batch = self._queue[0][0]
            places: list[int] = []
            while self._queue and self._queue[0][0] is batch and len(places) < max(1, min(free, share)):
                places.append(self._queue.popleft()[1])
            number = next(self._numbers)
            worker.load += len(places)
            worker.sent[number] = batch, self._task(self._run(worker, number, batch, places))

    async def _run(self, worker: _Worker, number: int, batch: _Batch, places: list[int]) -> None:
        """Some rollouts on one worker, from the sending to the last answer."""
        outstanding = dict.fromkeys(places)
        try:
            gate = getattr(batch.rollout, "gate", None)
            if gate is not None:
                await gate()
            sent = [(place, batch.requests[place]) for place in places]
            stream = worker.actor.run.options(num_returns="streaming").remote(number, batch.parcel, sent)
            async for ref in stream:
                for place, answer in await ref:
                    del outstanding[place]
                    worker.load -= 1
                    batch.settle(place, *pickle.loads(answer))
                self._fill()
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError) as error:
            worker.ready = False
            self._lost(worker, error)
            self._again(batch, list(outstanding), error)
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            batch.fail(
                BackendError(
                    f"rollouts cannot begin on a worker: {error_text(cause)[:500]}. Expected "
                    "everything that the workflow needs on every node: define it in the notebook, install it there, or "
                    "name it in run.ray.runtime_env."
                )
            )
        finally:
            worker.load -= len(outstanding)
            worker.sent.pop(number, None)
            self._fill()

    def _again(self, batch: _Batch, places: Sequence[int], error: BaseException) -> None:
        """Rollouts whose worker is gone go first in the queue, or have failed."""
        if batch.canceled:
            return
        for place in reversed(places):
            batch.tries[place] += 1
            if batch.tries[place] < self.settings.tries:
                self._queue.appendleft((batch, place))
            else:
                reason = f"its worker was lost {batch.tries[place]} times (run.ray.tries)"
                batch.settle(place, None, [], math.nan, f"{type(error).__name__}: {reason}. Does it need more memory?")

    # ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _parcel(self, rollout: RolloutFunction) -> Parcel:
        async with self._packing:  # the generations of an epoch come at once, and share the weights
            replicated = [p for p in getattr(rollout, "policies", ()) if hasattr(p, "replica")]
            policies = tuple([await self._policy(policy) for policy in replicated])
            content = packed(rollout, {id(policy): self._names[id(policy)][1] for policy in replicated})
            key = hashlib.blake2b(content, digest_size=16).hexdigest()
            return Parcel(key, self._ray.put(content), policies)

    async def _policy(self, policy: Any) -> PolicyParcel:
        if id(policy) not in self._names:
            replica = await in_daemon_thread(policy.replica)
            self._names[id(policy)] = policy, uuid.uuid4().hex, self._put(replica)
        _, name, replica = self._names[id(policy)]
        if self._weights.get(name, (None,))[0] != policy.weights_id:
            weights_id, version, weights = await in_daemon_thread(policy.weights)
            self._weights[name] = weights_id, (version, await in_daemon_thread(self._put, weights))
        version, weights = self._weights[name][1]
        return PolicyParcel(name, version, replica, weights)

    def _put(self, value: Any) -> Any:
        return value if isinstance(value, self._ray.ObjectRef) else self._ray.put(value)

    async def aclose(self) -> None:
        """Ends the workers. The cluster keeps running."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers, self._workers = self._workers, []
        if self._ray is not None and self._ray.is_initialized():
            for worker in workers:
                self._ray.kill(worker.actor)


async def ray_executor(run: RunSettings, builder: Builder):
    general = builder.config.eval.general
    executor = RayExecutor(run.engine, run.ray, lambda: general.max_concurrency)
    await executor.open()
    yield executor
    await executor.aclose()
