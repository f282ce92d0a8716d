"""RayTrainerAdapter: `local_grpo` in an actor of the Ray cluster, on a GPU there, say; asked for by `run.ray.trainer`.

The actor is named by the run's folder and lives on when this process is killed: opened again, the run finds it and the job that
it is at. What the actor does stands in trainer_actor.py, how its policy is sampled in remote_policy.py.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import hashlib
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...config import FinetuneConfig, RunSettings, TrainerAdapterConfig
from ...errors import BackendError, ConfigError, FinetuneError, UnknownJob
from ...evaluation.executor import in_daemon_thread
from ...interfaces import TrainerAdapter
from ...job_adapter import write_progress
from ...live_fields import live_names
from ...observe import resolve
from ...redaction import known_secrets, redact_text, redacting_logger
from ...registry import Builder
from ...types import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum, TrajectoryCollection
from .cluster import NAMESPACE, connect, greet, require, trainer_resources, workers_at_least
from .remote_policy import RemotePolicy
from .trainer_actor import Standing, TrainerActor
from .worker import versions

__all__ = ["RayTrainerAdapter"]

logger = redacting_logger(__name__)

PARTING_SECONDS = 4.0
"""What a step that is under way may still take when the adapter is closed."""
ENDING_SECONDS = 30.0
"""Until the name of an actor that was ended is free again."""


class TrainerLost(BackendError):
    """The actor is gone, and what was not saved with it."""


class RayTrainerAdapter(TrainerAdapter):
    """section: the config of the adapter in the actor. folder: of the run that it trains; None: of none."""

    finds_jobs_again = True
    status_is_cheap = True

    def __init__(self, section: TrainerAdapterConfig, run: RunSettings, folder: Path | None) -> None:
        super().__init__(section)
        self.run, self.folder = run, folder
        self.name = _name_of(folder)
        self._live = live_names(section)
        self._made_of = {"seed": run.seed, **section.model_dump(mode="json", exclude={"reward", *self._live})}
        self._ray: Any = None
        self._actor: Any = None
        self._policy: RemotePolicy | None = None
        self._found = False
        """The actor was there, and it is not known yet whether its weights are those that this run goes on from."""
        self._as_asked = True
        """It was made with the settings that are asked for now."""
        self._following: dict[str, asyncio.Task[TrainingJobStatus]] = {}

    @property
    def policy(self) -> RemotePolicy:  # type: ignore[override]  # never None, and nobody else sets it
        if self._policy is None:
            raise BackendError("the trainer's actor is not there yet. Await open() first; a Run does it for you.")
        return self._policy

    # ── the actor ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Finds the run's actor, or starts one and loads the model there. Raises BackendError where the cluster cannot
        give it, and what loading raises."""
        self._ray = await in_daemon_thread(connect, self.run.engine)
        settings = self.run.ray
        wanted = [("the trainer", 1, trainer_resources(self._ray, settings)), workers_at_least(settings)]
        require(self._ray, wanted)
        with suppress(ValueError):  # there is none
            self._actor = await in_daemon_thread(self._ray.get_actor, self.name, NAMESPACE)
            self._found = True
        if not self._found:
            await self._start()
        else:
            await self._meet()

    async def _start(self) -> None:
        settings = self.run.ray
        resources = trainer_resources(self._ray, settings)
        options: dict[str, Any] = {"runtime_env": settings.runtime_env} if settings.runtime_env else {}
        make = self._ray.remote(TrainerActor).options(
            name=self.name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_concurrency=1000,
            num_cpus=resources["CPU"],
            num_gpus=resources["GPU"],
            **options,
        )
        there = self.run.model_copy(update={"engine": "local"})
        parts = self.adapter_config, there, self._made_of, known_secrets(), list(map(os.path.abspath, sys.path))
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            try:
                self._actor = make.remote(*parts)  # in no thread: whoever is canceled must know of it
                break
            except ValueError:  # one of that name is still ending
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
        await self._meet()

    async def _meet(self) -> None:
        asked = "what run.ray asks for"
        told = await greet(self._ray, self._actor, "the trainer's actor", self.run.ray, asked, "finetune_nb[local]")
        if told != versions():
            raise BackendError(
                f"the trainer's actor {self.name!r} has {told}; expected {versions()}, as here. Install the same versions on "
                f"every node; one that an older process left ends by ray.kill(ray.get_actor({self.name!r}, {NAMESPACE!r}))."
            )
        face, standing = await self._answer(self._actor.open.remote())
        self._as_asked = face.made_of == self._made_of
        if self._policy is None:
            self._policy = RemotePolicy(face, self._ask, self._get, self._in_doubt)
        else:
            self._policy.moved(face)
        self._policy.heard(standing)

    def end(self) -> None:
        """Ends the actor, unless it is one that another process may be using. The cluster goes on."""
        if self._actor is not None and not self._found and self._ray.is_initialized():
            self._ray.kill(self._actor)
        self._actor = None

    # ── asking it ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, method: str, *args: Any) -> Any:
        """A method of the actor, or of the adapter in it. Raises what that raises; TrainerLost where the actor is gone."""
        remote = getattr(self._actor, method, None)
        call = remote.remote(*args) if remote is not None else self._actor.ask.remote(method, *args)
        answer, standing = await self._answer(call)
        self.policy.heard(standing)
        return answer

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except Exception as error:
            raise self._meant(error) from None

    def _get(self, method: str) -> tuple[Any, Standing]:
        """For threads that may wait."""
        try:
            answer, standing = self._ray.get(getattr(self._actor, method).remote())
        except Exception as error:
            raise self._meant(error) from None
        self.policy.heard(standing)
        return answer, standing

    def _meant(self, error: Exception) -> Exception:
        """What an error of Ray stands for."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, FinetuneError):
            return cause
        if isinstance(error, self._ray.exceptions.RayActorError):
            return TrainerLost(
                f"the trainer's actor was lost: {redact_text(str(error)).splitlines()[0][:300]} Does it need more memory? Close "
                "the run and open its folder again: a new actor goes on from the newest checkpoint."
            )
        if isinstance(error, self._ray.exceptions.RayError):
            told = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
            return BackendError(f"the trainer's actor failed: {redact_text(told)[:600]}")
        return error

    # ── an adapter's methods ─────────────────────────────────────────────────────────────────────────────────────────

    async def initialize(self, run_config: FinetuneConfig) -> None:
        await super().initialize(run_config)
        if not self._found:
            await self._prepare()

    async def _prepare(self) -> None:
        """Tells the actor of the run. Raises BackendError where checkpoints would be written to a disk that is not here."""
        folder = _absolute(self.run_config.output_dir)
        if self.run.checkpoint_every:
            await in_daemon_thread(functools.partial(folder.mkdir, parents=True, exist_ok=True))
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".finetune_nb-") as file:
                if not await self._answer(self._actor.sees.remote(file.name)):
                    raise BackendError(
                        f"the trainer's actor does not see {folder}, where checkpoints are kept; expected a disk that all "
                        "nodes share. Choose such an output_dir, or set run.checkpoint_every to 0."
                    )
        told = {"run_configuration": None, "output_dir": folder}
        await self._ask("initialize", self.run_config.model_copy(update=told))

    async def holds_weights(self, version: int | None, job: TrainingJobRef | None) -> bool:
        """Whether the actor has the weights that the record ends with, or is at the job that it ends with: then nothing is
        loaded. Otherwise a new actor takes the place of one that was found, and the newest checkpoint is loaded. Asked once
        the run's folder is locked: before that, another process may be using the actor."""
        if not self._found:
            if job is not None:
                logger.warning(
                    "the trainer's actor of %s is gone, and its training job with it: a new one goes on from the newest "
                    "checkpoint",
                    self.name,
                )
            return False
        self._found = False
        job_there = job is not None and await self._knows(job)
        unchanged = version is not None and not await self._ask("at_work") and version == self.policy.version
        holds = self._as_asked and (job_there or unchanged)
        if not holds:
            logger.warning(
                "the trainer's actor of %s was found, but %s: a new one goes on from the newest checkpoint",
                self.name,
                "its weights are not those that the record ends with" if self._as_asked else "with other settings",
            )
            self._ray.kill(self._actor)
            await self._start()
        else:
            logger.info("the trainer's actor of %s was found again", self.name)
        await self._prepare()
        if holds and job is not None and job_there:
            self._follow(job)
        return holds

    async def _knows(self, ref: TrainingJobRef) -> bool:
        try:
            await self._ask("status", ref)
        except UnknownJob:
            return False
        return True

    async def is_healthy(self) -> bool:
        """As the adapter in the actor. Raises BackendError, which says what to do, where the actor is gone."""
        return await self._ask("is_healthy")

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """As the adapter in the actor does it, with the settings as they are now."""
        settings = {name: getattr(self.adapter_config, name) for name in self._live}
        parcel = await in_daemon_thread(self._ray.put, trajectories)
        ref = await self._ask("submit", parcel, settings)
        self._follow(ref)
        return ref

    def _follow(self, ref: TrainingJobRef) -> asyncio.Task[TrainingJobStatus]:
        """Waits for a job, whether or not somebody else does: behind it the weights are others."""
        job_id = str((ref.metadata or {}).get("job_id"))
        if job_id not in self._following:
            self._following[job_id] = task = asyncio.create_task(self._last_status(ref))
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen
        return self._following[job_id]

    async def _last_status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        try:
            return await self._ask("wait_until_complete", ref)
        except TrainerLost as error:
            return _lost(ref, error)

    def _in_doubt(self) -> bool:
        return any(not task.done() for task in list(self._following.values()))

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """How the job stands; answered while it trains. FAILED where the actor was lost."""
        try:
            return await self._ask("status", ref)
        except TrainerLost as error:
            return _lost(ref, error)

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """The last status, as soon as there is one; nothing is polled."""
        return await asyncio.shield(self._follow(ref))

    async def cancel(self, ref: TrainingJobRef) -> None:
        """As the adapter in the actor does it."""
        with suppress(TrainerLost):
            await self._ask("cancel", ref)

    async def save(self, directory: str | Path, merge: bool = False) -> Path:
        """As the adapter in the actor does it. Raises BackendError where that was on a disk that is not here."""
        place = _absolute(directory)
        await self._ask("save", place, merge)
        if not await in_daemon_thread(place.is_dir):
            raise BackendError(
                f"the model was saved to {place} on the trainer's node, which is not here; expected a directory on a disk that "
                "all nodes share."
            )
        return place

    async def save_checkpoint(self, directory: str | Path) -> int:
        return await self._ask("save_checkpoint", _absolute(directory))

    async def load_checkpoint(self, directory: str | Path) -> None:
        await self._ask("load_checkpoint", _absolute(directory))

    def log_progress(self, ref: TrainingJobRef, metrics: Mapping[str, Any], output_dir: str | None = None) -> None:
        """As JobAdapter does it, in this process."""
        write_progress(self.run_config, ref, metrics, output_dir)

    async def aclose(self) -> None:
        """Cancels what still runs, and waits for it a moment. The actor stays until `end`."""
        if self._actor is not None and not self._found:
            with suppress(TimeoutError, BackendError):
                await asyncio.wait_for(self._ask("aclose"), PARTING_SECONDS)


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


def _name_of(folder: Path | None) -> str:
    """The name of a run's actor: the run's, and whose folder it is."""
    if folder is None:
        return f"trainer-{uuid.uuid4().hex}"
    return f"trainer-{folder.name}-{hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=6).hexdigest()}"


@functools.cache
def _close_before_ray_does() -> None:
    """At exit Ray lets go of its cluster before the runs are closed, which it was loaded after: so they are closed once more,
    and first."""
    atexit.register(resolve("finetune_nb.run:close_all"))


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
