"""RayTrainerAdapter: `local_grpo` in an actor of the Ray cluster, on a GPU there, for example. Set `run.ray.trainer` to use it.

The actor is named after the run's folder and survives this process: when the run is opened again, it finds the actor and the
job that it is working on.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...components.builder import Builder
from ...config.base import TrainerAdapterConfig
from ...config.sections import FinetuneConfig, RunSettings
from ...engine.live_settings import live_names
from ...errors import BackendError, ConfigError, UnknownJob
from ...interfaces import TrainerAdapter
from ...redaction import redacting_logger
from ...threads import in_daemon_thread, renew_exit_order
from ...training.jobs import write_progress
from ...types import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum, TrajectoryCollection
from .remote_policy import RemotePolicy
from .trainer_link import TrainerLink, TrainerLost

__all__ = [
    "RayTrainerAdapter",
]

logger = redacting_logger(__name__)

PARTING_SECONDS = 4.0
"""What a step that is under way may still take when the adapter is closed."""


class RayTrainerAdapter(TrainerAdapter):
    """section: the config of the adapter in the actor. folder: of the run that it trains; None: of none."""

    finds_jobs_again = True
    status_is_cheap = True

    def __init__(self, section: TrainerAdapterConfig, run: RunSettings, folder: Path | None) -> None:
        super().__init__(section)
        self.run = run
        self._live = live_names(section)
        self._following: dict[str, asyncio.Task[TrainingJobStatus]] = {}
        self._link = TrainerLink(section, run, folder, self._in_doubt)

    @property
    def policy(self) -> RemotePolicy:  # type: ignore[override]  # never None, and nobody else sets it
        """What is sampled and trained, in the actor. Raises BackendError before `open`."""
        return self._link.policy

    async def open(self) -> None:
        """Finds the run's actor, or starts one and loads the model there. Raises BackendError where the cluster cannot
        give it, and what loading raises."""
        await self._link.open()

    def end(self) -> None:
        """Ends the actor, unless it is one that another process may be using. The cluster keeps running."""
        self._link.end()

    async def initialize(self, run_config: FinetuneConfig) -> None:
        await super().initialize(run_config)
        if not self._link.found:
            await self._prepare()

    async def _prepare(self) -> None:
        """Tells the actor of the run. Raises BackendError where checkpoints would be written to a disk that is not here."""
        folder = _absolute(self.run_config.output_dir)
        if self.run.checkpoint_every:
            await in_daemon_thread(functools.partial(folder.mkdir, parents=True, exist_ok=True))
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".finetune_nb-") as file:
                if not await self._link.sees(file.name):
                    raise BackendError(
                        f"the trainer's actor does not see {folder}, where checkpoints are kept; expected a disk that all "
                        "nodes share. Choose such an output_dir, or set run.checkpoint_every to 0."
                    )
        told = {"run_configuration": None, "output_dir": folder}
        await self._link.ask("initialize", self.run_config.model_copy(update=told))

    async def holds_weights(self, version: int | None, job: TrainingJobRef | None) -> bool:
        """Whether the actor has the weights that the record ends with, or is at the job that it ends with: then nothing is
        loaded. Otherwise a new actor takes the place of one that was found, and the newest checkpoint is loaded. Asked once
        the run's folder is locked: before that, another process may be using the actor."""
        if not self._link.found:
            if job is not None:
                logger.warning(
                    "the trainer's actor of %s is gone, and its training job with it: a new one continues from the newest "
                    "checkpoint",
                    self._link.name,
                )
            return False
        self._link.found = False
        self._link.keep()
        job_there = job is not None and await self._knows(job)
        unchanged = version is not None and not await self._link.ask("at_work") and version == self.policy.version
        holds = self._link.as_asked and (job_there or unchanged)
        if not holds:
            logger.warning(
                "the trainer's actor of %s was found, but %s: a new one continues from the newest checkpoint",
                self._link.name,
                "its weights are not those that the record ends with" if self._link.as_asked else "with other settings",
            )
            await self._link.replace()
        else:
            logger.info("the trainer's actor of %s was found again", self._link.name)
        await self._prepare()
        if holds and job is not None and job_there:
            self._follow(job)
        return holds

    async def _knows(self, ref: TrainingJobRef) -> bool:
        try:
            await self._link.ask("status", ref)
        except UnknownJob:
            return False
        return True

    async def is_healthy(self) -> bool:
        """As the adapter in the actor. Raises BackendError, which says what to do, where the actor is gone."""
        return await self._link.ask("is_healthy")

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """As the adapter in the actor does it, with the settings as they are now."""
        settings = {name: getattr(self.adapter_config, name) for name in self._live}
        parcel = await in_daemon_thread(self._link.ray.put, trajectories)
        ref = await self._link.ask("submit", parcel, settings)
        self._follow(ref)
        return ref

    def _follow(self, ref: TrainingJobRef) -> asyncio.Task[TrainingJobStatus]:
        """Waits for a job, whether or not somebody else does: after it the weights are others."""
        job_id = str((ref.metadata or {}).get("job_id"))
        if job_id not in self._following:
            self._following[job_id] = task = asyncio.create_task(self._last_status(ref))
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen
        return self._following[job_id]

    async def _last_status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        try:
            return await self._link.ask("wait_until_complete", ref)
        except TrainerLost as error:
            return _lost(ref, error)

    def _in_doubt(self) -> bool:
        return any(not task.done() for task in list(self._following.values()))

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """The job's current status, also while it trains. FAILED where the actor was lost."""
        try:
            return await self._link.ask("status", ref)
        except TrainerLost as error:
            return _lost(ref, error)

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """The last status, as soon as there is one; nothing is polled."""
        return await asyncio.shield(self._follow(ref))

    async def cancel(self, ref: TrainingJobRef) -> None:
        """As the adapter in the actor does it."""
        with suppress(TrainerLost):
            await self._link.ask("cancel", ref)

    async def save(self, directory: str | Path, merge: bool = False, dtype: str | None = None) -> Path:
        """As the adapter in the actor does it. Raises BackendError where that was on a disk that is not here."""
        place = _absolute(directory)
        options = (merge,) if dtype is None else (merge, dtype)  # an adapter of somebody else may know no dtype
        await self._link.ask("save", place, *options)
        if not await in_daemon_thread(place.is_dir):
            raise BackendError(
                f"the model was saved to {place} on the trainer's node, which is not here; expected a directory on a disk that "
                "all nodes share."
            )
        return place

    async def save_checkpoint(self, directory: str | Path) -> int:
        return await self._link.ask("save_checkpoint", _absolute(directory))

    async def load_checkpoint(self, directory: str | Path) -> None:
        await self._link.ask("load_checkpoint", _absolute(directory))

    def log_progress(self, ref: TrainingJobRef, metrics: Mapping[str, Any], output_dir: str | None = None) -> None:
        """As JobAdapter does it, in this process."""
        write_progress(self.run_config, ref, metrics, output_dir)

    async def aclose(self) -> None:
        """Cancels what still runs, and waits for it a moment. The actor stays until `end`."""
        if self._link.is_ours:
            with suppress(TimeoutError, BackendError):
                await asyncio.wait_for(self._link.ask("aclose"), PARTING_SECONDS)


def _absolute(directory: str | Path) -> Path:
    """The same place for a process with another working directory."""
    return Path(directory).absolute()


def _lost(ref: TrainingJobRef, error: TrainerLost) -> TrainingJobStatus:
    return TrainingJobStatus(
        run_id=ref.run_id,
        backend=ref.backend,
        status=TrainingStatusEnum.FAILED,
        message=str(error),
        metadata=ref.metadata,
    )


@functools.cache
def _close_before_ray_does() -> None:
    """At exit Ray would shut down before the runs are closed, because it was loaded after them."""
    renew_exit_order()


async def ray_trainer(config: TrainerAdapterConfig, builder: Builder):
    if config.static_type() != "local_grpo":
        raise ConfigError(
            f"found run.ray.trainer with a trainer adapter of _type {config.static_type()!r}; expected 'local_grpo', the one "
            "that trains in this process otherwise. Leave run.ray.trainer out."
        )
    adapter = RayTrainerAdapter(config, builder.config.run, builder.run_folder)
    try:
        await adapter.open()
        _close_before_ray_does()
        yield adapter
    finally:
        adapter.end()
