"""Training jobs: their id, their daemon thread, their status, and the base of adapters whose jobs are such threads.

A status is made anew whenever something changes and is never altered: reading one needs no lock and changes nothing.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..config.base import TrainerAdapterConfig
from ..config.sections import FinetuneConfig
from ..errors import BackendError, FinetuneError, StalePolicy, UnknownJob, did_you_mean
from ..interfaces import TrainerAdapter
from ..redaction import error_text, redacting_logger
from ..rollouts.episodes import SampledTurn
from ..store.json import append_jsonl
from ..threads import in_daemon_thread, interpreter_exiting, start_daemon
from ..types import (
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from .batch import TrainingBatch, training_batch

__all__ = [
    "Job",
    "JobAdapter",
    "PolicyAdapter",
    "Report",
    "TrainingJob",
    "check_exact",
    "check_versions",
    "plain_name",
    "write_progress",
]

logger = redacting_logger(__name__)


class Report(Protocol):
    """What a job has done so far, filled in by whoever trains."""

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        ...

    @property
    def steps_planned(self) -> int:
        """0 as long as nobody knows."""
        ...

    def metrics(self) -> dict[str, float]:
        """What was measured, NaN where nothing was."""
        ...


class TrainingJob:
    """Starts after the job `before` has ended. Of `learned` only numbers are kept once it has ended itself."""

    def __init__(
        self,
        run_id: str,
        backend: str,
        policy_version: int,
        learned: TrainingBatch,
        report: Report,
        before: TrainingJob | None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.ref = TrainingJobRef(run_id=run_id, backend=backend, metadata={"job_id": self.id})
        self.report = report
        self.policy_version = policy_version
        self.canceled = threading.Event()
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # so that a waiter who is canceled does not cancel the job's end
        self._before = before
        self._trajectories, self._groups = len(learned.trajectories), learned.groups
        self._without_signal, self._truncated = learned.groups_without_signal, learned.truncated
        self._started = time.perf_counter()
        self._status = self._make(TrainingStatusEnum.PENDING, "waiting for the weights")

    def start(self, train: Callable[[], None]) -> None:
        """`train` fills in `report`, calls `stepped` after each step and returns early once `stopped()`."""
        start_daemon(lambda: self._work(train), "finetune_nb training")

    def cancel(self) -> None:
        """It stops before its next optimizer step; those that it has made stay."""
        self.canceled.set()

    def stopped(self) -> bool:
        """Whether it is to end before its next step."""
        return self.canceled.is_set() or interpreter_exiting.is_set()

    def stepped(self) -> None:
        """Says which step has been made."""
        self.say(f"step {self.report.steps} of {self.report.steps_planned}")

    def say(self, message: str) -> None:
        """What the running job is at, or waits for."""
        self._status = self._make(TrainingStatusEnum.RUNNING, message)

    def status(self) -> TrainingJobStatus:
        """A copy of its current status."""
        return self._status.model_copy(deep=True)

    def _work(self, train: Callable[[], None]) -> None:
        try:
            while self._before is not None and not self.stopped():
                if wait([self._before.ended], timeout=0.05).done:
                    self._before = None
            self._started = time.perf_counter()
            train()
            self._status = self._last()
        except BaseException as error:  # the thread's last word: whoever waits must hear of it
            logger.exception("training job %s failed", self.id)
            self._status = self._make(TrainingStatusEnum.FAILED, error_text(error))
        finally:
            self._before = None
            self.ended.set_result(None)

    def _last(self) -> TrainingJobStatus:
        report = self.report
        if not self._trajectories:
            message = f"nothing to train on: none of {self._without_signal} groups has rewards that differ"
            return self._make(TrainingStatusEnum.COMPLETED, message)
        if report.steps == report.steps_planned > 0:
            return self._make(TrainingStatusEnum.COMPLETED, f"{report.steps} optimizer steps")
        message = f"canceled after {report.steps} of {report.steps_planned or 'the'} optimizer steps"
        return self._make(TrainingStatusEnum.CANCELED, message)

    def _make(self, status: TrainingStatusEnum, message: str) -> TrainingJobStatus:
        report = self.report
        progress = 100.0 * report.steps / report.steps_planned if report.steps_planned else 0.0
        metrics = {
            **report.metrics(),
            "trained_trajectories": self._trajectories if report.steps else 0,
            "trained_groups": self._groups if report.steps else 0,
            "groups_without_signal": self._without_signal,
            "truncated_trajectories": self._truncated,
            "seconds": time.perf_counter() - self._started,
        }
        return TrainingJobStatus(
            run_id=self.ref.run_id,
            backend=self.ref.backend,
            status=status,
            progress=100.0 if status == TrainingStatusEnum.COMPLETED else progress,
            message=message,
            metadata={"job_id": self.id, "policy_version": self.policy_version, "metrics": metrics},
        )


class Job(Protocol):
    """A training job that has been started."""

    id: str
    ended: Future[None]
    """Done once the job has ended, well or badly."""

    def status(self) -> TrainingJobStatus:
        """Its current status; reading changes nothing."""
        ...

    def cancel(self) -> None:
        """Asks it to end; returns at once, and may be called again."""
        ...


JobT = TypeVar("JobT", bound=Job)


class JobAdapter(TrainerAdapter, Generic[JobT]):
    """Base of adapters with jobs in this process: a subclass's `submit` puts a job into `_jobs` and starts it."""

    status_is_cheap = True

    def __init__(self, adapter_config: TrainerAdapterConfig) -> None:
        super().__init__(adapter_config)
        self._jobs: dict[str, JobT] = {}
        self._submitted = 0  # over the run's life, also before a checkpoint: each job's order is drawn by its number
        self._trained = 0  # those whose steps are in the weights, and all before them

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """The job's current status. `metadata`: job_id, policy_version, and metrics, as the job measures them."""
        return self._job(ref).status()

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """The last status, as soon as there is one; nothing is polled. A job that failed is returned, not raised."""
        job = self._job(ref)
        await asyncio.wrap_future(job.ended)
        return job.status()

    async def cancel(self, ref: TrainingJobRef) -> None:
        """Asks the job to stop; returns at once. Whether steps that it has made stay is the job's to say."""
        self._job(ref).cancel()

    def _job(self, ref: TrainingJobRef) -> JobT:
        job_id = str((ref.metadata or {}).get("job_id"))
        if job_id not in self._jobs:
            raise UnknownJob(f"this adapter has no training job {job_id!r}. {did_you_mean(job_id, self._jobs)}")
        return self._jobs[job_id]

    def _newest_job(self) -> JobT | None:
        return next(reversed(self._jobs.values()), None)

    async def _all_ended(self) -> None:
        for job in list(self._jobs.values()):
            await asyncio.wrap_future(job.ended)

    def _require_no_job_at_work(self, when: str = "while a checkpoint is loaded") -> None:
        working = [job.id for job in self._jobs.values() if not job.ended.done()]
        if working:
            raise BackendError(
                f"training job {working[0]!r} is at work; expected none {when}. Wait for it, or cancel it."
            )

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Appends a line to trainer_adapter_<run id>.jsonl in `output_dir` (default: the config's), NaN as null."""
        write_progress(self.run_config, ref, metrics, output_dir)

    async def aclose(self) -> None:
        """Cancels what still runs, and waits for it."""
        for job in self._jobs.values():
            job.cancel()
        await self._all_ended()


class PolicyAdapter(JobAdapter[JobT]):
    """Base of adapters that train the policy they sample from, and load it at first use.

    A subclass makes the policy in `_make_policy`, and trains it in `_train`, which runs on the job's own thread.
    """

    backend: str
    """Name of the backend, for the references of its jobs and for messages."""

    def __init__(self, adapter_config: TrainerAdapterConfig, policy: Any = None) -> None:
        super().__init__(adapter_config)
        self._policy = policy
        self._loaded = False
        self._loading = threading.Lock()

    @property
    def policy(self) -> Any:  # type: ignore[override]  # never None, and nobody else sets it
        """What is sampled and trained; loaded if need be. Raises MissingExtra without the packages that this takes."""
        return self._load()

    def _load(self) -> Any:
        with self._loading:
            if not self._loaded:
                self._policy = self._make_policy()
                self._loaded = True
            return self._policy

    def _make_policy(self) -> Any:
        """The policy, which is `self._policy` if the adapter was made with one. Called once, under a lock."""
        raise NotImplementedError

    async def initialize(self, run_config: FinetuneConfig) -> None:
        await super().initialize(run_config)
        await in_daemon_thread(self._load)

    async def is_healthy(self) -> bool:
        """Whether the policy can be loaded and its service answers; the log says why not."""
        try:
            await in_daemon_thread(self._load)
            await in_daemon_thread(self._probe)
        except FinetuneError as error:
            logger.error("%s is not healthy: %s", self.backend, error)
            return False
        return True

    def _probe(self) -> None:
        """Raises BackendError if what trains the policy cannot be reached. Nothing to reach: nothing to do."""

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Start a job that trains after those before it.

        Args:
            trajectories: Groups of trajectories, as `Trainer` selected them.

        Returns:
            A reference to the job.

        Raises:
            StalePolicy: A trajectory was sampled by older weights than the config allows.
            MissingLogprobs: A sampled turn has none.
            BackendError: The trajectories cannot be trained on. Nothing is started in any of these cases.
        """
        policy = await in_daemon_thread(self._load)
        config: Any = self.adapter_config
        check_versions(trajectories, policy.version, config.max_staleness)
        check_exact((t for group in trajectories.trajectories for t in group), config.allow_inexact)
        batch = training_batch(
            trajectories, config.scale_rewards, config.truncated, getattr(config, "baseline", "mean")
        )

        def check_again() -> int:  # a job before this one may have trained since
            return check_versions(trajectories, policy.version, config.max_staleness)

        return self._start(trajectories.run_id, policy, batch, check_again)

    def _start(
        self, run_id: str, policy: Any, batch: TrainingBatch, check_again: Callable[[], int] = lambda: 0
    ) -> TrainingJobRef:
        """Starts a job on that batch. check_again: called right before it trains, gives the batch's `version_lag`."""
        report = self._check(batch)
        before: Any = self._newest_job()
        job = TrainingJob(run_id, self.backend, policy.version, batch, report, before)

        def train(number: int) -> None:
            self._train(job, replace(batch, version_lag=check_again()), number)

        return self._begin(job, policy, train if batch.trajectories else None)

    def _begin(self, job: TrainingJob, policy: Any, train: Callable[[int], None] | None) -> TrainingJobRef:
        """Has a job trained alone with the weights, after those before it. train: is given the job's number; None: there is
        nothing to train on."""
        self._jobs[job.id] = job  # type: ignore[assignment]  # such adapters have such jobs
        self._submitted = number = self._submitted + 1

        def work() -> None:
            with self._exclusive(job) as alone:
                if not alone or job.stopped() or train is None:
                    return
                try:
                    train(number)
                finally:
                    self._trained = number
                    policy.version += bool(job.report.steps)
                    job.policy_version = policy.version
            if job.report.steps:
                self._on_trained()

        job.start(work)
        return job.ref

    def _check(self, batch: TrainingBatch) -> Report:
        """An empty report for a job on `batch`. Raises BackendError for what cannot be trained on."""
        raise NotImplementedError

    def _exclusive(self, job: TrainingJob) -> AbstractContextManager[bool]:
        """Keeps everybody else from the weights while a job trains; gives False if the job was canceled before."""
        return nullcontext(True)

    def _train(self, job: TrainingJob, batch: TrainingBatch, number: int) -> None:
        """Make the steps of a job: fill in `job.report`, call `job.stepped` after each step, and return early once
        `job.stopped()`. number: of the job over the run's life, from 1."""
        raise NotImplementedError

    def _on_trained(self) -> None:
        """The weights have changed, and may be sampled again."""


def write_progress(
    run_config: FinetuneConfig | None, ref: TrainingJobRef, metrics: Mapping[str, Any], output_dir: str | None
) -> None:
    """JobAdapter's `log_progress`, for adapters that are none."""
    folder = output_dir or (run_config.output_dir if run_config else None)
    if folder is None:
        raise BackendError("log_progress got no output_dir, and the adapter has no config. Call initialize first.")
    line = {"run_id": ref.run_id, "backend": ref.backend, **metrics}
    append_jsonl(Path(folder) / f"trainer_adapter_{plain_name(ref.run_id)}.jsonl", line)


def plain_name(run_id: str) -> str:
    """A run's id as the name of a file or folder, which leads nowhere else."""
    return re.sub(r"[^\w.-]", "_", run_id)


def check_versions(trajectories: TrajectoryCollection, current: int, max_staleness: int) -> int:
    """How many versions before `current` the oldest weights are that sampled a trajectory; 0 where no version is known.

    Raises:
        StalePolicy: A trajectory was sampled by newer weights, or by some more than `max_staleness` versions older.
    """
    oldest = current
    for trajectory in (t for group in trajectories.trajectories for t in group):
        version = (trajectory.metadata or {}).get("policy_version")
        if version is None:
            continue
        if 0 <= current - version <= max_staleness:
            oldest = min(oldest, version)
            continue
        age = "older" if version < current else "newer"
        raise StalePolicy(
            f"a trajectory of example {(trajectory.metadata or {}).get('id')!r} was sampled by policy version "
            f"{version}, {age} than version {current}, which would be trained; expected at most "
            f"{max_staleness} older. Collect it anew, or raise max_staleness."
        )
    return current - oldest


def check_exact(trajectories: Iterable[Trajectory], allow_inexact: bool) -> None:
    """Raises BackendError for a sampled turn whose ids are not those that the model saw and sampled, unless allowed."""
    if allow_inexact:
        return
    for trajectory in trajectories:
        for place, item in enumerate(trajectory.episode):
            turn = SampledTurn.of(item)
            if turn is not None and turn.exact is False:
                known = trajectory.metadata or {}
                raise BackendError(
                    f"turn {place} of example {known.get('id')!r}, generation {known.get('generation')}, has token ids that "
                    "are not exact: nothing says that they are those that the model saw and sampled, and training on "
                    "others teaches something else. Sample with the adapter's policy or from a server that returns token "
                    "ids, or set allow_inexact of the trainer adapter."
                )
