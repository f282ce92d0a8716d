"""The settings of `tinker`."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, SecretStr

from ...config.base import AT_TRAINING, TrainerAdapterConfig
from .rest import is_hosted

__all__ = [
    "TinkerConfig",
]


class TinkerConfig(TrainerAdapterConfig, name="tinker"):
    """A LoRA adapter, trained and sampled on a Tinker-compatible service."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())
    saves_elsewhere: ClassVar[bool] = True

    model: str
    """The base model, as the service calls it, such as "Qwen/Qwen3-8B"."""
    tokenizer: str | None = None
    """Hugging Face directory or hub name of the model's tokenizer; None: `model`."""
    base_url: str | None = None
    """Of a server of your own; None: $TINKER_BASE_URL, else Thinking Machines' service."""
    api_key: SecretStr | None = None
    """None: $TINKER_API_KEY. A server of your own needs none."""
    base: str | None = None
    """The base model on this machine, a Hugging Face directory or a name in its cache: for `run.save_model`, and to know how
    many tokens it holds. None: `model`, if it is here."""
    context_length: int | None = Field(default=None, ge=2)
    """Tokens that prompt and reply may have together. None: what the service says, else what the config of `base` says."""
    rank: int = Field(default=32, ge=1)
    """Of the LoRA adapter's matrices."""
    learning_rate: float = Field(default=1e-4, gt=0, json_schema_extra=AT_TRAINING)
    """Of AdamW, constant."""
    optimizer_steps: int = Field(default=1, ge=1, json_schema_extra=AT_TRAINING)
    """Steps in one pass over all trajectories of an epoch; fewer where there are fewer trajectories."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over the trajectories of an epoch."""
    loss: Literal["importance_sampling", "ppo", "cispo"] = "importance_sampling"
    """The service's loss. "importance_sampling" is not clipped and known to every service; with more than a few steps on
    the same trajectories take "ppo"."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """A token's probability ratio is clipped below 1 - clip_low; not with importance_sampling."""
    clip_high: float = Field(default=0.2, ge=0)
    """A token's probability ratio is clipped above 1 + clip_high; not with importance_sampling."""
    scale_rewards: bool = True
    """Advantages are divided by the standard deviation of their group's rewards."""
    truncated: Literal["train", "mask"] = "train"
    """Trajectories whose last reply was cut at max_tokens: "mask" does not train on them. Their rewards count in their
    group either way."""
    loss_reduction: Literal["sum", "sequence_mean"] = "sum"
    """What the service makes of the losses of a batch's tokens: their sum (Thinking Machines; SkyRL's fsdp and megatron), or
    the mean over the sequences of each one's mean (SkyRL's jax). Advantages are scaled so that the mean over all tokens comes
    out either way."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """A longer gradient is shortened to this; 0: never. SkyRL's server does not do it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the gradient's mean and of its square's."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW: the share of a weight that a step takes away, times the learning rate."""
    max_staleness: int = Field(default=0, ge=0)
    """Policy versions by which a trajectory may be older than the weights that it trains. In a run, 1 samples each epoch while
    the epoch before it trains."""
    max_logprob_gap: float | None = Field(default=0.1, gt=0)
    """Mean |log probability in training - when sampled| (nats), before the first step of a job, beyond which the job
    fails: something else was sampled than is trained. None: never; so for trajectories that older weights sampled,
    which makes a gap."""
    allow_inexact: bool = False
    """Trains also on turns whose token ids are not known to be those that were sampled."""
    retries: int = Field(default=2, ge=0)
    """How often a job is begun again, and a reply asked for again, after the service failed. What the SDK tries again by
    itself (connections, rate limits) does not count."""
    retry_delay: float = Field(default=1.0, ge=0)
    """Seconds before the first retry; each further one waits twice as long."""
    step_timeout: float = Field(default=3600.0, gt=0)
    """Seconds that one request may take, waiting in the service's queue included."""
    slot_timeout: float = Field(default=600.0, ge=0)
    """Seconds to wait for an adapter slot of the service while all are held; 0: not at all. SkyRL's server frees those of
    processes that died elsewhere after six minutes."""
    sample_while_training: bool | None = None
    """Whether replies are sampled while a job trains. None: only from Thinking Machines' service. Elsewhere sampler and trainer
    may share their weights, as on SkyRL's jax, and a reply would be of a policy between two steps."""
    state_ttl: int | None = Field(default=None, ge=1)
    """Seconds after which the service may delete a saved state; None: it is kept. Checkpoints are as old as they get."""

    def service_url(self) -> str | None:
        """The address of the service: the setting's, else that of the environment; None: neither names one."""
        return self.base_url or os.environ.get("TINKER_BASE_URL") or None

    def samples_while_training(self) -> bool:
        """Whether replies are sampled while a job trains."""
        said = self.sample_while_training
        return is_hosted(self.service_url()) if said is None else said

    def overlap_problem(self) -> str | None:
        if self.samples_while_training():
            return None
        return (
            "found max_staleness 1, and replies of this service wait while a job trains (sample_while_training). Set "
            "sample_while_training: true if its samplers keep the weights that they were made with, else max_staleness to 0"
        )

    @property
    def clips(self) -> bool:
        return self.loss != "importance_sampling"

    def loss_settings(self) -> dict[str, float] | None:
        """The service wants bounds of the ratio itself."""
        if not self.clips:
            return None
        return {"clip_low_threshold": 1 - self.clip_low, "clip_high_threshold": 1 + self.clip_high}
