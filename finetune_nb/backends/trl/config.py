"""The settings of `trl_dpo` and `trl_sft`, and what TRL calls them. Without torch this module can be imported."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ...config.base import AT_TRAINING, TrainerAdapterConfig

__all__ = [
    "TRLConfig",
    "TRLDPOConfig",
    "TRLSFTConfig",
]


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
    """Trains a low-rank adapter, which is added to the weights after every job; None = all weights."""
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
    """How much it costs to leave the reference. (`ref_policy_kl_penalty` of the NeMo Agent Toolkit's config.)"""
    preference_loss_weight: float = Field(default=1.0, ge=0, json_schema_extra=AT_TRAINING)
    """Weight of the preferences in the loss."""
    preference_average_log_probs: bool = False
    """A response's log probability is its tokens' mean. False: their sum, as in the paper."""
    sft_loss_weight: float = Field(default=0.0, ge=0, json_schema_extra=AT_TRAINING)
    """Weight of supervised learning of the chosen responses, in the same loss."""

    @model_validator(mode="after")
    def check_weights(self) -> Self:
        if not self.preference_loss_weight and not self.sft_loss_weight:
            raise ValueError(
                "preference_loss_weight and sft_loss_weight are both 0, so nothing would be learned; raise one"
            )
        return self

    def settings(self, seed: int) -> dict[str, Any]:
        loss = {"sigmoid_norm" if self.preference_average_log_probs else "sigmoid": self.preference_loss_weight}
        if self.sft_loss_weight:
            loss["sft"] = self.sft_loss_weight
        loss = {name: weight for name, weight in loss.items() if weight}
        own = {"beta": self.beta, "loss_type": list(loss), "loss_weights": list(loss.values())}
        return {**super().settings(seed), **own, **self.options}


class TRLSFTConfig(TRLConfig, name="trl_sft"):
    """Supervised training on chosen trajectories: the tokens that the policy sampled in them (rejection sampling)."""

    chosen: Literal["best", "all"] = "best"
    """"best": of each group the trajectory with the highest reward; "all": every one."""
    min_reward: float | None = Field(default=None, json_schema_extra=AT_TRAINING)
    """Trajectories with a lower reward are not learned from; None = no bound."""

    def settings(self, seed: int) -> dict[str, Any]:
        return {**super().settings(seed), **self.options}
