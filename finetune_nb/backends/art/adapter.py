"""OpenPipe ART as a training backend, through any implementation of its public Backend protocol
(`backend.train(model, groups)`): its local, serverless and Tinker backends among them.

Trajectories become ART's own types, and ART renders their prompts again with its own tokenizer and chat template. What the
backend learns, and how, is decided by ART.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...components.builder import Builder
from ...components.registry import register_trainer_adapter
from ...config.base import AT_TRAINING, TrainerAdapterConfig
from ...config.sections import FinetuneConfig
from ...errors import BackendError, ConfigError, MissingExtra, did_you_mean
from ...hooks import resolve
from ...redaction import error_text
from ...store.durable import model_directory
from ...threads import in_daemon_thread
from ...training.jobs import JobAdapter, check_exact
from ...types import TrainingJobRef, TrajectoryCollection
from ..import_guard import undo_side_effects
from .job import ArtJob
from .trajectories import art_groups

__all__ = [
    "OpenPipeArtAdapter",
    "OpenPipeArtConfig",
]


class OpenPipeArtConfig(TrainerAdapterConfig, name="openpipe_art"):
    """Training by OpenPipe ART."""

    backend: Literal["local", "serverless", "tinker"] = "local"
    """ART's own: "local" wants a GPU, "serverless" WANDB_API_KEY, "tinker" TINKER_API_KEY. Another implementation is handed
    over in code: `OpenPipeArtAdapter(config, backend=...)`."""
    backend_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that backend's constructor."""
    base_model: str
    """The model that is trained, as the ART backend names it."""
    name: str = "finetune-nb"
    """The model's name in ART; a run that uses it again continues from its last step."""
    project: str = "finetune-nb"
    """What ART files the model under."""
    learning_rate: float = Field(default=5e-6, gt=0, json_schema_extra=AT_TRAINING)
    allow_inexact: bool = False
    """Also trains on token ids that are not known to be those that were sampled."""
    train_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the backend's `train`: epsilon, kl_penalty_coef, loss_fn, ..."""


_BACKENDS = {
    "local": "art.local:LocalBackend",
    "serverless": "art.serverless:ServerlessBackend",
    "tinker": "art.tinker:TinkerBackend",
}


class OpenPipeArtAdapter(JobAdapter[ArtJob]):
    """Trains `model`, an art.TrainableModel, by a Backend of ART's. backend: one of your own, in place of the config's; it
    is not closed here."""

    adapter_config: OpenPipeArtConfig

    def __init__(self, adapter_config: OpenPipeArtConfig, backend: Any = None) -> None:
        super().__init__(adapter_config)
        self.backend: Any = backend
        self._own = backend is None
        self.model: Any = None
        self._checkpoint: str | None = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Registers the model, which starts ART's inference server. Raises MissingExtra, ConfigError, BackendError."""
        await super().initialize(run_config)
        if self.model is not None:
            return
        try:
            with undo_side_effects():
                trainable_model = resolve("art:TrainableModel")
        except ImportError as error:
            raise MissingExtra("the training backend openpipe_art", "art") from error
        config = self.adapter_config
        backend = self.backend or self._make_backend()
        self._check_options(backend)
        model = trainable_model(name=config.name, project=config.project, base_model=config.base_model)
        try:
            await model.register(backend)
        except ImportError as error:
            raise self._lacks(error) from error
        except Exception as error:
            raise BackendError(
                f"ART's {type(backend).__name__} did not take the model {config.base_model!r}: {error_text(error)}. "
                "Start or repair it, then run the epoch again."
            ) from error
        self.backend, self.model = backend, model

    def _make_backend(self) -> Any:
        config = self.adapter_config
        try:
            kind = resolve(_BACKENDS[config.backend])
        except ImportError as error:
            raise self._lacks(error) from error
        try:
            return kind(**config.backend_options)
        except Exception as error:
            raise ConfigError(f"backend_options do not make a {kind.__name__}: {error_text(error)}.") from error

    def _lacks(self, error: ImportError) -> BackendError:
        backend = self.adapter_config.backend
        return BackendError(
            f"ART's {backend} backend needs packages of its own, and the local one a GPU ({error}): pip install "
            f'"openpipe-art[{"tinker" if backend == "tinker" else "backend"}]"'
        )

    def _check_options(self, backend: Any) -> None:
        """What the backend would drop or refuse is said before the first rollout."""
        taken = inspect.signature(backend.train).parameters
        if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
            return
        for name in ("learning_rate", *self.adapter_config.train_options):
            if name not in taken:
                known = set(taken) - {"model", "trajectory_groups"}
                raise ConfigError(f"{type(backend).__name__}.train takes no {name!r}. {did_you_mean(name, known)}")

    async def is_healthy(self) -> bool:
        """Whether the backend has the model, and answers for it."""
        if self.model is None:
            return False
        try:
            await self.backend._get_step(self.model)
        except Exception:
            return False
        return True

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a job. Raises BackendError or MissingLogprobs for trajectories that cannot be trained on exactly."""
        if self.model is None:
            raise BackendError("the ART model is not registered: call initialize first.")
        everything = [trajectory for group in trajectories.trajectories for trajectory in group]
        check_exact(everything, self.adapter_config.allow_inexact)
        groups = art_groups(trajectories)
        job = ArtJob(trajectories.run_id, self._train(groups), sum(len(group.trajectories) for group in groups))
        self._jobs[job.id] = job
        return job.ref

    async def _train(self, groups: list[Any]) -> Any:
        config = self.adapter_config
        result = await self.backend.train(
            self.model, groups, learning_rate=config.learning_rate, **config.train_options
        )
        self._checkpoint = getattr(result, "checkpoint_path", None) or self._checkpoint
        return result

    async def save(self, directory: str) -> str:
        """Copies the newest checkpoint, where the backend has written one here. Raises BackendError."""
        if self._checkpoint is None:
            raise BackendError(
                f"ART's {type(self.backend).__name__} has left no checkpoint on this machine. Take it from the service."
            )

        def copy(checkpoint: str) -> None:
            with model_directory(Path(directory)) as unfinished:
                shutil.copytree(checkpoint, unfinished, dirs_exist_ok=True)

        await in_daemon_thread(copy, self._checkpoint)
        return directory

    async def aclose(self) -> None:
        """Cancels what still runs, and closes a backend that was made here."""
        await super().aclose()
        if self._own and self.backend is not None:
            await self.backend.close()
            self.backend = self.model = None


@register_trainer_adapter(config_type=OpenPipeArtConfig)
async def openpipe_art(config: OpenPipeArtConfig, builder: Builder):
    adapter = OpenPipeArtAdapter(config)
    yield adapter
    await adapter.aclose()
