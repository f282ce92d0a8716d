"""`trl_dpo` and `trl_sft`: training jobs that TRL does in a process of its own, started by `accelerate launch`.

The same code trains on one GPU, on many or on none, the kernel stays free, and a job is canceled by ending its process. The
policy is sampled here; a job gets its weights as files and gives new ones back, which are sampled from then on. Without torch
this module can be imported, but not used.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ...components.builder import Builder
from ...components.registry import register_trainer_adapter
from ...errors import BackendError, ConfigError, MissingExtra
from ...redaction import redacting_logger
from ...store.durable import atomic_directory, check_plain, size_of
from ...threads import in_daemon_thread
from ...training.jobs import PolicyAdapter, plain_name
from ...types import TrainingJobRef, Trajectory, TrajectoryCollection
from .config import TRLConfig, TRLDPOConfig, TRLSFTConfig
from .job import TRLJob
from .rows import best_of_groups, preference_rows, supervised_rows

__all__ = ["TRLAdapter", "TRLConfig", "TRLDPOConfig", "TRLSFTConfig"]

logger = redacting_logger(__name__)

MANIFEST = "job.json"
"""In a checkpoint: the policy's version, and how many jobs there were."""


class TRLAdapter(PolicyAdapter[TRLJob]):
    """Trains `policy` by TRL. seed: of the order of rows. policy: one that is loaded already, without a LoRA adapter;
    ConfigError for one with. A job that is canceled leaves the policy as it was before it."""

    adapter_config: TRLDPOConfig | TRLSFTConfig

    def __init__(self, adapter_config: TRLDPOConfig | TRLSFTConfig, seed: int = 0, *, policy: Any = None) -> None:
        super().__init__(adapter_config, policy)
        if policy is not None and hasattr(policy.model, "peft_config"):
            raise ConfigError(
                f"the policy given to {self.backend} carries a LoRA adapter, and TRL's process would get the adapter alone. Give "
                "one without (policy.save(directory, merge=True), then model=directory), and set lora_rank to train an adapter "
                "that is added to the weights after every job."
            )
        self.seed = seed

    @property
    def takes_preferences(self) -> bool:  # type: ignore[override]
        """Whether it learns from preferences."""
        return isinstance(self.adapter_config, TRLDPOConfig)

    @property
    def backend(self) -> str:  # type: ignore[override]  # one class, two backends
        """The `_type` of its config, for messages."""
        return self.adapter_config.static_type() or "trl"

    def _make_policy(self) -> Any:
        if self._policy is not None:
            return self._policy
        if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "trl")):
            raise MissingExtra(f"the training backend {self.backend}", "trl")
        from ..local.policy import LocalPolicy

        return LocalPolicy.load(self.adapter_config.model, self.adapter_config.device)

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a process. Raises BackendError for what it cannot learn from; nothing is then started."""
        return await self._launch(trajectories.run_id, self._rows(trajectories))

    async def submit_chosen(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a process that learns from all of these, whatever their rewards. Raises as `submit`."""
        if isinstance(self.adapter_config, TRLDPOConfig):
            return await self._launch(trajectories.run_id, self._rows(trajectories))
        rows = supervised_rows([trajectory for group in trajectories.trajectories for trajectory in group])
        if not rows:
            raise BackendError(f"{self.backend} got no trajectories with a sampled turn.")
        return await self._launch(trajectories.run_id, rows)

    async def _launch(self, run_id: str, rows: list[dict[str, Any]]) -> TrainingJobRef:
        self._require_no_job_at_work("beside another one")
        policy, config = await in_daemon_thread(self._load), self.adapter_config
        job = TRLJob(run_id, self.backend, self._folder(run_id), policy, len(rows))
        settings = {
            "method": "dpo" if isinstance(config, TRLDPOConfig) else "sft",
            "settings": config.settings(self.seed + self._submitted),
            "lora_rank": config.lora_rank,
            "threads": config.threads,
        }
        await in_daemon_thread(job.write, settings, rows)
        self._jobs[job.id] = job
        self._submitted += 1
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
            raise BackendError(f"{self.backend} got no {missing} in {len(collection.trajectories)} groups.")
        return rows

    def _folder(self, run_id: str) -> Path:
        if self.run_config is None:
            raise BackendError("the adapter has no config, so no place for its jobs. Call initialize first.")
        place = Path(self.run_config.output_dir).absolute() / plain_name(run_id) / "trl"
        check_plain(place)
        return place

    async def save(self, directory: str | Path) -> Path:
        """Writes model and tokenizer to `directory`; from_pretrained, and `model` in the config, read them."""
        return await in_daemon_thread(self.policy.save, directory)

    async def save_checkpoint(self, directory: str | Path) -> int:
        """Writes the weights to `directory`, at once or not at all; returns the bytes written. A job's optimizer begins
        anew with every job, so there is nothing else to keep. An older checkpoint of that name is replaced. Raises
        BackendError where it cannot be written, and for a directory that is no checkpoint; what is there then stays."""
        await self._all_ended()

        def save() -> int:
            place = Path(directory).absolute()
            with atomic_directory(place, MANIFEST) as unfinished:
                self.policy.save(unfinished, dtype=self.policy.dtype)
                said = {"version": self.policy.version, "jobs": self._submitted}
                (unfinished / MANIFEST).write_text(json.dumps(said), encoding="utf-8")
            return size_of(place)

        return await in_daemon_thread(save)

    async def load_checkpoint(self, directory: str | Path) -> None:
        """Puts the policy where it was when `save_checkpoint` wrote `directory`. Raises BackendError, and changes nothing,
        while a job is at work, and for one that is missing, damaged or of another model."""
        self._submitted = await self._load_from(directory)

    async def load_weights(self, directory: str | Path) -> None:
        """Puts the weights of a checkpoint into the policy. Raises as `load_checkpoint`."""
        await self._load_from(directory)

    async def token_logprobs(self, trajectory: Trajectory) -> list[list[float]]:
        """By one forward pass. Raises BackendError or MissingLogprobs where a turn lacks its ids or logprobs, and
        BackendError where memory runs out."""
        policy = await in_daemon_thread(self._load)

        def score() -> list[list[float]]:
            from ..local.trajectory_logprobs import trajectory_logprobs

            with policy.exclusive.hold():
                return trajectory_logprobs(policy, trajectory)

        return await in_daemon_thread(score)

    async def _load_from(self, directory: str | Path) -> int:
        """Puts the weights of a checkpoint into the policy; how many jobs there were until then."""
        self._require_no_job_at_work()

        def load() -> int:
            from .job import load_weights

            place = Path(directory).absolute()
            try:
                saved = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
                version, jobs = int(saved["version"]), int(saved["jobs"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BackendError(
                    f"{place.name} is no checkpoint of {self.backend}: {error}. Load another one."
                ) from error
            load_weights(self.policy, place, version)
            return jobs

        return await in_daemon_thread(load)


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
