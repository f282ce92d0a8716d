"""The settings of `local_grpo`. Without torch this module can be imported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...config.base import AT_TRAINING, TrainerAdapterConfig

__all__ = [
    "LoRAConfig",
    "LocalGRPOConfig",
]


class LoRAConfig(BaseModel):
    """Train an adapter of low rank in place of all weights."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    rank: int = Field(default=16, ge=1)
    """Of the two matrices beside each layer: more can learn more, and needs more memory."""
    alpha: int | None = Field(default=None, ge=1)
    """The adapter's output is scaled by alpha / rank. None: 2 * rank."""
    target: str | list[str] = "all-linear"
    """Layers that get an adapter: "all-linear" (all but the output layer), a regular expression, or ends of names. The
    experts of a mixture are among them, also where they are one parameter; routers only where they are linear layers. Such
    experts are added up with their adapter in every pass, and training holds the sums of all layers at once, unless
    gradient_checkpointing is on."""


class LocalGRPOConfig(TrainerAdapterConfig, name="local_grpo"):
    """GRPO in this process, with torch and transformers."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = "embedded"
    """"embedded" (ships with finetune_nb), a Hugging Face model directory, or a name on the hub."""
    lora: LoRAConfig | None = None
    """Train a LoRA adapter: {} for its defaults. None: all weights are trained."""
    learning_rate: float = Field(default=5e-4, gt=0, json_schema_extra=AT_TRAINING)
    """Of AdamW, at its highest. The default suits the embedded model; a real one wants 1e-6 to 1e-5, with LoRA 1e-5 to
    3e-4."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes over `finetuning.num_epochs` training jobs, one an epoch; it falls to a tenth."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Part of the planned epochs in which the learning rate climbs to its highest."""
    optimizer_steps: int = Field(default=8, ge=1, json_schema_extra=AT_TRAINING)
    """Steps in one pass over all trajectories of an epoch; fewer where there are fewer trajectories."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over the trajectories of an epoch."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """A token whose probability fell below 1 - clip_low of what it was gives no further push down."""
    clip_high: float = Field(default=0.2, ge=0)
    """A token whose probability rose above 1 + clip_high of what it was gives no further push up."""
    loss: Literal["dapo", "grpo"] = "dapo"
    """"dapo": mean over all tokens of an optimizer batch; "grpo": mean over each sequence, then over sequences."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the initial weights. Above 0 a frozen copy of them is kept in memory; with LoRA
    they are there already."""
    scale_rewards: bool = True
    """Advantages are divided by the standard deviation of their group's rewards."""
    truncated: Literal["train", "mask"] = "train"
    """Trajectories whose last reply was cut at max_tokens: "mask" does not train on them (DAPO's overlong filtering).
    Their rewards count in their group either way."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A longer gradient is shortened to this."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the gradient's mean and of its square's."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW: the share of a weight that a step takes away, times the learning rate."""
    micro_batch_tokens: int = Field(default=4096, ge=1, json_schema_extra=AT_TRAINING)
    """Tokens, padding included, in one forward and backward pass, whose gradients add up to an optimizer step's: less
    needs less memory and changes no result. A prompt that a group shares counts once."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, much less memory. Prompts are not shared
    then."""
    max_staleness: int = Field(default=0, ge=0)
    """Policy versions by which a trajectory may be older than the weights that it trains."""
    allow_inexact: bool = False
    """Trains also on turns whose token ids are not known to be those that were sampled."""
    max_logprob_gap: float | None = Field(default=0.1, gt=0)
    """Mean |log probability in training - when sampled| (nats), before the first step of a job, beyond which the job
    fails: something else was sampled than is trained. None: never; so with max_staleness above 0, which makes a gap."""
    record_entropy: bool = True
    """Record the policy's entropy (nats) in the place of each sampled token, as float16: of the model's own distribution
    over its whole vocabulary, at temperature 1 whatever is sampled at. Costs about 2 % of the sampling."""
    device: str = "auto"
    """A torch device; "auto": cuda, else mps, else cpu."""
    dtype: str = "auto"
    """A torch dtype; "auto": float32, and with LoRA on a GPU that has it bfloat16 for what is not trained. Weights in
    bfloat16 or float16 are trained by float32 masters, so that no step is lost: 18 bytes a weight, where float32 takes 16.
    Models are saved in the dtype that they were stored in."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads; None: 1 for a small model, else torch's own setting (2 in a deterministic run)."""
