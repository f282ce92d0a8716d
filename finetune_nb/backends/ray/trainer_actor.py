"""The trainer's actor: a process of the cluster that holds the weights, and a trainer adapter that trains them.

It survives the kernel that made it, and so does the job that it is working on.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...components.builder import Builder
from ...config.base import TrainerAdapterConfig
from ...config.sections import Config, RunSettings
from ...redaction import redacting_logger, remember_secret
from ...threads import in_daemon_thread
from ...types import Sample, SamplingParams, TrainingJobRef, TrainingStatusEnum, TrajectoryCollection
from .cluster import ray_package
from .nodes import look

__all__ = [
    "Face",
    "RunState",
    "TrainerActor",
]

logger = redacting_logger(__name__)

LOOK_SECONDS = 15.0
"""Between two looks whether this actor is an orphan, at most."""
UNENDED = (TrainingStatusEnum.PENDING, TrainingStatusEnum.RUNNING)


class RunState(NamedTuple):
    """Which weights the actor has now; goes back with every answer."""

    weights_id: int
    """Grows whenever the weights may be others."""
    version: int


@dataclass(frozen=True)
class Face:
    """What the kernel must know of the policy, to render and to parse without asking."""

    tokenizer: Any = field(repr=False)
    end_ids: frozenset[int]
    name: str
    description: str
    made_of: Any
    """The settings that it was made with."""


class TrainerActor:
    """An async actor. section: the config of the adapter that it holds. run: what that adapter reads of a run. made_of:
    given back in its Face. secrets: what it hides in its logs. folders: as a worker's."""

    def __init__(
        self,
        section: TrainerAdapterConfig,
        run: RunSettings,
        made_of: Any,
        secrets: Sequence[str],
        folders: Sequence[str],
    ) -> None:
        for secret in secrets:
            remember_secret(secret)
        sys.path += [folder for folder in folders if folder not in sys.path and os.path.isdir(folder)]
        config = Config()
        config.trainer_adapters["trainer"], config.run = section, run
        self._builder = Builder(config)
        self._made_of = made_of
        self._adapter: Any = None
        self._opening = asyncio.Lock()
        self._jobs: list[TrainingJobRef] = []
        self._timeout = run.ray.orphan_timeout
        self._alone = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def hello(self) -> dict[str, Any]:
        """That it is there, and on which node."""
        await self.heard(self._timeout)
        return look(ray_package())

    async def clock(self) -> float:
        """What time it is there."""
        return time.time()

    async def heard(self, timeout: float | None) -> None:
        """A kernel is there. timeout: `run.ray.orphan_timeout`, as that kernel has it."""
        self._timeout, self._alone = timeout, 0.0
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_as_orphan())

    async def _end_as_orphan(self) -> None:
        """Ends this actor when no kernel has been heard of for that long, and no job has run."""
        while self._timeout is None or self._alone < self._timeout:
            pause = LOOK_SECONDS if self._timeout is None else min(LOOK_SECONDS, self._timeout / 4)
            await asyncio.sleep(pause)
            # No clock is read: time in which this process itself was held up says nothing of the kernel.
            self._alone = 0.0 if await self._works() else self._alone + pause
        logger.warning("no kernel was heard of for %g s (run.ray.orphan_timeout): this trainer ends", self._timeout)
        if self._adapter is not None:
            with suppress(Exception):  # it ends, whatever is the matter with it
                await asyncio.wait_for(self._adapter.aclose(), LOOK_SECONDS)
        ray = ray_package()
        ray.kill(ray.get_runtime_context().current_actor)

    async def pid(self) -> int:
        return os.getpid()

    async def open(self) -> tuple[Face, RunState]:
        """Makes the adapter and loads its model, once. Raises what they raise."""
        async with self._opening:
            if self._adapter is None:
                adapter: Any = await self._builder.get_trainer_adapter("trainer")
                await in_daemon_thread(lambda: adapter.policy)
                self._adapter = adapter
        policy = self._adapter.policy
        face = Face(policy.tokenizer, policy._end_ids, policy._name, policy.description, self._made_of)
        return face, self._standing()

    async def sees(self, path: str) -> bool:
        """Whether a file is here, too."""
        return await in_daemon_thread(Path(path).is_file)

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ask(self, method: str, *args: Any) -> tuple[Any, RunState]:
        """The answer of an adapter's method, and which weights are there after it."""
        answer = await getattr(self._adapter, method)(*args)
        return answer, self._standing()

    async def submit(
        self, trajectories: TrajectoryCollection, settings: Mapping[str, Any]
    ) -> tuple[TrainingJobRef, RunState]:
        """Starts a job, with the settings that may have been changed since the last one."""
        for name, value in settings.items():
            setattr(self._adapter.adapter_config, name, value)
        ref = await self._adapter.submit(trajectories)
        self._jobs.append(ref)
        return ref, self._standing()

    async def at_work(self) -> tuple[bool, RunState]:
        """Whether a job has not ended."""
        return await self._works(), self._standing()

    async def _works(self) -> bool:
        stand = [await self._adapter.status(ref) for ref in self._jobs]
        return any(status.status in UNENDED for status in stand)

    def _standing(self) -> RunState:
        policy = self._adapter.policy
        return RunState(policy.weights_id, policy.version)

    # ── the policy ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int) -> tuple[Sample, RunState]:
        return await self._adapter.policy.sample(ids, params, seed), self._standing()

    async def replica(self) -> tuple[list[Any], RunState]:
        """Object ref of a function that makes a replica, in a list: Ray would fetch the value of a bare one."""
        return [await self._put(self._adapter.policy.replica)], self._standing()

    async def weights(self) -> tuple[list[Any], RunState]:
        """Object ref of what training changes, in a list, and which weights these are."""
        policy, found = self._adapter.policy, []

        def take() -> Any:
            weights_id, version, weights = policy.weights()
            found.append(RunState(weights_id, version))
            return weights

        ref = await self._put(take)
        return [ref], found[0]

    async def _put(self, make: Callable[[], Any]) -> Any:
        """Into the object store, from where workers take it without passing the kernel."""
        ray = ray_package()
        return await in_daemon_thread(lambda: ray.put(make()))
