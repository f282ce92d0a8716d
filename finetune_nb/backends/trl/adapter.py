"""`trl_dpo` and `trl_sft`: training jobs that TRL does in a process of its own, started by `accelerate launch`.

So the same code trains on one GPU, on many or on none, the kernel stays free, and a job is canceled by ending its process.
The policy is sampled here; a job gets its weights as files and gives new ones back, which are sampled from then on. What a
job trains on stands in rows.py, what its process does in worker.py. Without torch this module can be imported, not used.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ...config import FinetuneConfig, TrainerAdapterConfig
from ...errors import BackendError, FinetuneError, MissingExtra, UnknownJob, did_you_mean
from ...interfaces import TrainerAdapter
from ...jsonl import append_jsonl
from ...observe import resolve
from ...redaction import redacting_logger
from ...registry import Builder, register_trainer_adapter
from ...types import TrainingJobRef, TrainingJobStatus, TrajectoryCollection
from .job import TRLJob
from .rows import best_of_groups, preference_rows, supervised_rows

__all__ = ["TRLAdapter", "TRLConfig", "TRLDPOConfig", "TRLSFTConfig"]

logger = redacting_logger(__name__)

AT_TRAINING: dict[str, Any] = {"live": "training"}


class TRLConfig(TrainerAdapterConfig):
    """What both have in common. Each job begins with a fresh optimizer."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = "embedded"
    """"embedded", a Hugging Face model directory, or a name on the hub."""
    learning_rate: float = Field(default=1e-5, gt=0, json_schema_extra=AT_TRAINING)
    """Of AdamW, falling to 0 over a job."""
    epochs: float = Field(default=1.0, gt=0, json_schema_extra=AT_TRAINING)
    """Passes over the data of a job."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward and backward pass, on each device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Passes that make one optimizer step."""
    max_length: int | None = Field(default=1024, ge=1)
    """Tokens of a row; a longer one is cut. None = never."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Trains a low-rank adapter, which is added to the weights behind every job; None = all weights."""
    processes: int = Field(default=1, ge=1)
    """Processes that accelerate starts: one a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """"cpu": no GPU is used, for sampling and training alike."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads of the training process; None = torch's own setting."""
    options: dict[str, Any] = {}
    """Further settings by TRL's own names: fields of trl.DPOConfig or trl.SFTConfig."""

    def settings(self, seed: int) -> dict[str, Any]:
        """By TRL's names."""
        return {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_length": self.max_length,
            "use_cpu": self.device == "cpu",
            "seed": seed % 2**31,
        }


class TRLDPOConfig(TRLConfig, name="trl_dpo"):
    """Direct preference optimisation (Rafailov et al. 2023), on the preferences of the builder `preference_builder`. The
    reference is the policy as it was when the job began."""

    beta: float = Field(default=0.1, gt=0, json_schema_extra=AT_TRAINING)
    """How much it costs to leave the reference."""

    def settings(self, seed: int) -> dict[str, Any]:
        return {**super().settings(seed), "beta": self.beta, **self.options}


class TRLSFTConfig(TRLConfig, name="trl_sft"):
    """Supervised training on chosen trajectories: the tokens that the policy sampled in them (rejection sampling)."""

    chosen: Literal["best", "all"] = "best"
    """"best": of each group the trajectory with the highest reward; "all": every one."""
    min_reward: float | None = Field(default=None, json_schema_extra=AT_TRAINING)
    """Trajectories with a lower reward are not learned from; None = no bound."""

    def settings(self, seed: int) -> dict[str, Any]:
        return {**super().settings(seed), **self.options}


class TRLAdapter(TrainerAdapter):
    """Trains `policy` by TRL. seed: of the order of rows. policy: one that is loaded already."""

    adapter_config: TRLDPOConfig | TRLSFTConfig

    def __init__(self, adapter_config: TRLDPOConfig | TRLSFTConfig, seed: int = 0, *, policy: Any = None) -> None:
        super().__init__(adapter_config)
        self.seed = seed
        self._policy = policy
        self._loading = threading.Lock()
        self._jobs: dict[str, TRLJob] = {}

    @property
    def name(self) -> str:
        return self.adapter_config.static_type() or "trl"

    @property
    def policy(self) -> Any:  # type: ignore[override]  # never None, and nobody else sets it
        """A local policy. Loads the model if need be; MissingExtra without TRL."""
        with self._loading:
            if self._policy is None:
                if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "trl")):
                    raise MissingExtra(f"the training backend {self.name}", "trl")
                config = self.adapter_config
                load = resolve("finetune_nb.backends.local.policy:LocalPolicy").load
                self._policy = load(config.model, config.device)
            return self._policy

    async def initialize(self, run_config: FinetuneConfig) -> None:
        await super().initialize(run_config)
        await asyncio.to_thread(lambda: self.policy)

    async def is_healthy(self) -> bool:
        """Whether TRL is there and the model can be loaded; the log says why not."""
        try:
            await asyncio.to_thread(lambda: self.policy)
        except FinetuneError as error:
            logger.error("%s is not healthy: %s", self.name, error)
            return False
        return True

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a process. Raises BackendError for what it cannot learn from; nothing is then started."""
        rows = self._rows(trajectories)
        working = [job.id for job in self._jobs.values() if not job.ended.done()]
        if working:
            raise BackendError(f"training job {working[0]!r} is at work; one at a time. Wait for it, or cancel it.")
        policy, config = await asyncio.to_thread(lambda: self.policy), self.adapter_config
        job = TRLJob(trajectories.run_id, self.name, self._folder(trajectories.run_id), policy, len(rows))
        settings = {
            "method": "dpo" if isinstance(config, TRLDPOConfig) else "sft",
            "settings": config.settings(self.seed + len(self._jobs)),
            "lora_rank": config.lora_rank,
            "threads": config.threads,
        }
        await asyncio.to_thread(job.write, settings, rows)
        self._jobs[job.id] = job
        job.start(config.processes, cpu=config.device == "cpu")
        return job.ref

    def _rows(self, collection: TrajectoryCollection) -> list[dict[str, Any]]:
        config = self.adapter_config
        if isinstance(config, TRLDPOConfig):
            rows = preference_rows(collection)
            missing = "preferences"
        else:
            rows = supervised_rows(best_of_groups(collection, config.min_reward, config.chosen == "best"))
            missing = "trajectories with a sampled turn" + (
                "" if config.min_reward is None else f" and a reward of at least {config.min_reward:g}"
            )
        if not rows:
            raise BackendError(f"{self.name} got no {missing} in {len(collection.trajectories)} groups.")
        return rows

    def _folder(self, run_id: str) -> Path:
        if self.run_config is None:
            raise BackendError("the adapter has no config, so no place for its jobs. Call initialize first.")
        return Path(self.run_config.output_dir).absolute() / _plain(run_id) / "trl"

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """How the job stands. `metadata`: job_id, policy_version, and metrics as TRL logs them."""
        return self._job(ref).status()

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """The last status, as soon as there is one. A job that failed is returned, not raised."""
        job = self._job(ref)
        await asyncio.wrap_future(job.ended)
        return job.status()

    async def cancel(self, ref: TrainingJobRef) -> None:
        """Ends the job's processes; returns at once. The policy stays as it was before the job."""
        self._job(ref).cancel()

    def _job(self, ref: TrainingJobRef) -> TRLJob:
        job_id = str((ref.metadata or {}).get("job_id"))
        if job_id not in self._jobs:
            raise UnknownJob(f"this adapter has no training job {job_id!r}. {did_you_mean(job_id, self._jobs)}")
        return self._jobs[job_id]

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Appends a line to trainer_adapter_<run id>.jsonl in `output_dir` (default: the config's)."""
        folder = Path(output_dir) if output_dir else self._folder(ref.run_id).parent
        line = {"run_id": ref.run_id, "backend": ref.backend, **metrics}
        append_jsonl(folder / f"trainer_adapter_{_plain(ref.run_id)}.jsonl", line)

    async def save(self, directory: str | Path) -> Path:
        """Writes model and tokenizer to `directory`; from_pretrained, and `model` in the config, read them."""
        return await asyncio.to_thread(self.policy.save, directory)

    async def save_checkpoint(self, directory: str | Path) -> int:
        """Writes the weights to `directory`, at once or not at all; returns the bytes written. A job's optimizer begins
        anew with every job, so there is nothing else to keep."""
        for job in list(self._jobs.values()):
            await asyncio.wrap_future(job.ended)

        def save() -> int:
            place = Path(directory).absolute()
            draft = place.with_name(f".{place.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            self.policy.save(draft)
            (draft / "job.json").write_text(json.dumps({"version": self.policy.version, "jobs": len(self._jobs)}))
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
            return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())

        return await asyncio.to_thread(save)

    async def load_checkpoint(self, directory: str | Path) -> None:
        """Puts the policy where it was when `save_checkpoint` wrote `directory`. Raises BackendError, and changes nothing,
        for one that is missing, damaged or of another model."""

        def load() -> None:
            from .weights import load_weights

            place = Path(directory).absolute()
            try:
                version = int(json.loads((place / "job.json").read_text(encoding="utf-8"))["version"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BackendError(f"{place.name} is no checkpoint of {self.name}: {error}") from error
            load_weights(self.policy, place, version)

        await asyncio.to_thread(load)

    async def aclose(self) -> None:
        """Cancels what still runs, and waits for it."""
        for job in self._jobs.values():
            job.cancel()
        for job in list(self._jobs.values()):
            await asyncio.wrap_future(job.ended)


def _plain(run_id: str) -> str:
    return re.sub(r"[^\w.-]", "_", run_id)  # it names a file, and must not lead out of the folder


@register_trainer_adapter(config_type=TRLDPOConfig)
async def trl_dpo(config: TRLDPOConfig, builder: Builder):
    adapter = TRLAdapter(config, seed=builder.config.run.seed)
    yield adapter
    await adapter.aclose()


@register_trainer_adapter(config_type=TRLSFTConfig)
async def trl_sft(config: TRLSFTConfig, builder: Builder):
    adapter = TRLAdapter(config, seed=builder.config.run.seed)
    yield adapter
    await adapter.aclose()
