"""Small true adapters for runs that are killed: weights in a file, and a backend whose jobs live in a directory and go on
when the process that submitted them has ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from small_agents import coin

from finetune_nb.errors import BackendError, UnknownJob
from finetune_nb.testing import FakeAdapter, FakeAdapterConfig, ScriptedPolicy
from finetune_nb.types import TrainingJobRef, TrainingJobStatus


class Weights(FakeAdapter):
    """An adapter whose weights are a number in a file."""

    def __init__(self, delay=0.0, staleness=0):
        super().__init__(FakeAdapterConfig(max_staleness=staleness), policy=ScriptedPolicy(coin), delay=delay)

    async def save_checkpoint(self, directory):
        fresh = directory.with_name(f".{directory.name}")
        fresh.mkdir(parents=True, exist_ok=True)
        (fresh / "version").write_text(str(self.policy.version))
        if directory.exists():
            (directory / "version").unlink()
            directory.rmdir()
        fresh.rename(directory)
        return 1

    async def load_checkpoint(self, directory):
        self.policy.version = int((directory / "version").read_text())


class Detached(FakeAdapter):
    """Its jobs are files: each is done some time after it was submitted, whoever still lives then."""

    finds_jobs_again = True

    def __init__(self, backend: Path, seconds=0.05, staleness=0):
        super().__init__(FakeAdapterConfig(max_staleness=staleness), policy=ScriptedPolicy(coin))
        self.backend, self.seconds, self.reachable = Path(backend), seconds, True
        self.backend.mkdir(exist_ok=True)
        self._see_version()

    def jobs(self):
        return [json.loads(path.read_text()) for path in sorted(self.backend.glob("*.json"))]

    def _see_version(self):
        self.policy.version = sum(job["done_at"] <= time.time() and not job.get("failed") for job in self.jobs())

    async def submit(self, trajectories):
        number = len(self.jobs())
        sampled = sorted(f"{t.metadata['id']}/{t.metadata['generation']}" for g in trajectories.trajectories for t in g)
        job = {"done_at": time.time() + self.seconds, "trajectories": sampled}
        (self.backend / f"{number:03d}.json").write_text(json.dumps(job))
        return TrainingJobRef(run_id=trajectories.run_id, backend="files", metadata={"job_id": f"{number:03d}"})

    async def status(self, ref):
        if not self.reachable:
            raise BackendError("the backend does not answer. Try again later.")
        path = self.backend / f"{ref.metadata['job_id']}.json"
        if not path.exists():
            raise UnknownJob(f"there is no job {ref.metadata['job_id']!r}")
        job = json.loads(path.read_text())
        done = "failed" if job.get("failed") else "completed"
        state = done if job["done_at"] <= time.time() else "running"
        metadata = {"metrics": {"loss": 0.5}} if state == "completed" else None
        return TrainingJobStatus(run_id=ref.run_id, backend="files", status=state, metadata=metadata)

    async def wait_until_complete(self, ref, poll_interval=0.01):
        while (status := await self.status(ref)).status == "running":
            await asyncio.sleep(0.01)
        self._see_version()
        return status

    async def cancel(self, ref):
        pass

    async def aclose(self):
        pass
