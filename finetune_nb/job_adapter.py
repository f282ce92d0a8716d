"""JobAdapter: what adapters share whose training jobs end by themselves, be they threads, tasks or processes: how jobs are asked
about, canceled, waited for and written down. What a job does, and on which weights, is its subclass's business.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from .config import FinetuneConfig, TrainerAdapterConfig
from .errors import BackendError, StalePolicy, UnknownJob, did_you_mean
from .interfaces import TrainerAdapter
from .jsonl import append_jsonl
from .types import TrainingJobRef, TrainingJobStatus, TrajectoryCollection

__all__ = ["Job", "JobAdapter", "check_versions", "plain_name", "write_progress"]


class Job(Protocol):
    """A training job that has been started."""

    id: str
    ended: Future[None]
    """Done once the job has ended, well or badly."""

    def status(self) -> TrainingJobStatus:
        """How it stands; reading changes nothing."""
        ...

    def cancel(self) -> None:
        """Asks it to end; returns at once, and may be called again."""
        ...


JobT = TypeVar("JobT", bound=Job)


class JobAdapter(TrainerAdapter, Generic[JobT]):
    """A subclass's `submit` makes a job, puts it into `_jobs` and starts it."""

    status_is_cheap = True

    def __init__(self, adapter_config: TrainerAdapterConfig) -> None:
        super().__init__(adapter_config)
        self._jobs: dict[str, JobT] = {}
        self._submitted = 0  # over the run's life, also before a checkpoint: each job's order is drawn by its number
        self._trained = 0  # those whose steps are in the weights, and all before them

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """How the job stands. `metadata`: job_id, policy_version, and metrics, as the job measures them."""
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


def check_versions(trajectories: TrajectoryCollection, current: int, max_staleness: int) -> None:
    """Raises StalePolicy for a trajectory that other weights sampled than those of version `current`, more than
    `max_staleness` versions before it."""
    for trajectory in (t for group in trajectories.trajectories for t in group):
        version = (trajectory.metadata or {}).get("policy_version")
        if version is None or 0 <= current - version <= max_staleness:
            continue
        age = "older" if version < current else "newer"
        raise StalePolicy(
            f"a trajectory of example {(trajectory.metadata or {}).get('id')!r} was sampled by policy version "
            f"{version}, {age} than version {current}, which would be trained; expected at most "
            f"{max_staleness} older. Collect it anew, or raise max_staleness."
        )
