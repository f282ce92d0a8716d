"""The `run` section of a config, which is ours alone: where a run is driven, its seed, its checkpoints, and what it takes of
a Ray cluster.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .errors import did_you_mean

__all__ = ["RaySettings", "RunSettings"]

ENGINES = ("local", "ray")


class RaySettings(BaseModel):
    """The `run.ray` section: what a run takes of a Ray cluster. It counts with `engine: ray` alone."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    workers: int | None = Field(default=None, ge=1)
    """Processes that roll out. None: one for each CPU of the cluster, or for what `worker_gpus` leaves room for, and no more
    than rollouts at once."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """CPUs that the cluster sets aside for one worker: little, where agents mostly wait for a model elsewhere."""
    worker_gpus: float = Field(default=0, ge=0)
    """GPUs for one worker, where it samples from a replica of the policy."""
    trainer: bool = False
    """Whether `local_grpo` trains in a process of the cluster, which lives on when the kernel is killed. Otherwise training
    stays in the kernel."""
    trainer_cpus: float = Field(default=1, gt=0)
    """CPUs that the cluster sets aside for the trainer."""
    trainer_gpus: float | None = Field(default=None, ge=0)
    """GPUs for the trainer. None: one where the cluster has any."""
    tries: int = Field(default=3, ge=1)
    """How often a rollout is begun where its worker is lost each time, before it counts as failed."""
    start_timeout: float = Field(default=300.0, gt=0)
    """Seconds that workers and trainer may take to start, waiting for what others have of the cluster included."""
    runtime_env: dict[str, Any] = {}
    """Ray's own: `working_dir`, `py_modules`, `pip`, `env_vars` of workers and trainer, for modules that the cluster does not
    have."""


class RunSettings(BaseModel):
    """The `run` section. Ours alone."""

    model_config = ConfigDict(extra="forbid")

    engine: str = "local"
    """Where the work is done. "local": in this process. "ray": on a Ray cluster of this machine, which is started where
    none runs in this process yet; "ray:auto": on the cluster that this machine belongs to; "ray:HOST:PORT": on that one."""
    ray: RaySettings = RaySettings()
    """What it takes of a Ray cluster."""
    seed: int = Field(default=0, ge=0)
    """Of every draw and every sampled token."""
    deterministic: bool = False
    """True: a repeat is equal to the last digit, at the price of waiting for the slowest rollout of a batch."""
    checkpoint_every: int = Field(default=1, ge=0)
    """Epochs between checkpoints of the weights; a run that is killed goes on behind the newest one, and cannot with 0 = none."""
    keep_checkpoints: int | None = Field(default=None, ge=1)
    """The newest ones that are kept, beside the one that validated best and those that runs were forked from. None: as
    many as take 500 MB together, at least 2."""

    @field_validator("engine")
    @classmethod
    def check_engine(cls, engine: str) -> str:
        kind, _, address = engine.partition(":")
        if kind not in ENGINES or (kind == "local" and engine != kind):
            raise ValueError(f"there is no engine {engine!r}. {did_you_mean(engine, ENGINES)}")
        if "://" in address:
            raise ValueError(
                f"found engine {engine!r}; expected 'ray', 'ray:auto' or 'ray:HOST:PORT'. Ray Client (ray://) is too slow for "
                "rollouts: start the kernel on a machine of the cluster, and take 'ray:auto'"
            )
        return engine

    @property
    def engine_kind(self) -> str:
        """The engine without its address."""
        return self.engine.partition(":")[0]

    @property
    def trains_elsewhere(self) -> bool:
        """Whether the engine trains, too."""
        return self.engine_kind == "ray" and self.ray.trainer
