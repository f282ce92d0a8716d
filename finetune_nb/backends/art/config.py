"""The settings of `openpipe_art`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...config import TrainerAdapterConfig
from ...live_fields import AT_TRAINING

__all__ = ["OpenPipeArtConfig"]


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
    """The model's name in ART; a run that uses it again goes on from its last step."""
    project: str = "finetune-nb"
    """What ART files the model under."""
    learning_rate: float = Field(default=5e-6, gt=0, json_schema_extra=AT_TRAINING)
    allow_inexact: bool = False
    """Also trains on token ids that are not known to be those that were sampled."""
    train_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the backend's `train`: epsilon, kl_penalty_coef, loss_fn, ..."""
