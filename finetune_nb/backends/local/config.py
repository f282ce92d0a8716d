"""The settings of `local_grpo`. Without torch this module can be imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...config.base import AT_TRAINING, TrainerAdapterConfig
from .vllm.config import VLLMConfig

__all__ = [
    "ImportanceBounds",
    "LoRAConfig",
    "LOSSES",
    "LocalGRPOConfig",
    "LossForm",
]


@dataclass(frozen=True)
class LossForm:
    """What a loss by name is made of."""

    surrogate: Literal["clipped", "truncated", "soft"]
    """How a ratio far from 1 is held back: PPO's minimum, a bounded weight without a gradient, or a sigmoid."""
    ratio: Literal["token", "sequence mean", "sequence sum"]
    """The probability now over that when sampled: of a token; of a sequence, to the power of 1 / its tokens; of a sequence."""
    mean: Literal["tokens", "sequences", "length"]
    """Over all tokens of an optimizer batch; over each sequence, then over sequences; over sequences, divided by one length."""
    scale_rewards: bool | Literal["batch"] = True
    baseline: Literal["mean", "leave one out"] = "mean"
    clip: tuple[float, float] = (0.2, 0.2)
    """Defaults of clip_low and clip_high."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of `local_grpo` that have another default with each loss."""
        return {"clip_low": self.clip[0], "clip_high": self.clip[1], "scale_rewards": self.scale_rewards}


LOSSES: Mapping[str, LossForm] = {
    "grpo": LossForm("clipped", "token", "sequences"),
    "dapo": LossForm("clipped", "token", "tokens"),
    "bnpo": LossForm("clipped", "token", "tokens"),
    "dr_grpo": LossForm("clipped", "token", "length", scale_rewards=False),
    "gspo": LossForm("clipped", "sequence mean", "sequences", clip=(3e-4, 4e-4)),
    "cispo": LossForm("truncated", "token", "tokens", clip=(0.2, 4.0)),
    "sapo": LossForm("soft", "token", "sequences"),
    "rloo": LossForm("clipped", "sequence sum", "sequences", scale_rewards=False, baseline="leave one out"),
    "reinforce++": LossForm("clipped", "token", "tokens", scale_rewards="batch"),
}
"""By name. Papers: grpo arXiv 2402.03300; dapo 2503.14476; bnpo 2506.02864 as TRL normalises it; dr_grpo 2503.20783; gspo
2507.18071; cispo 2506.13585; sapo 2511.20347; rloo 2402.14740; reinforce++ 2501.03262, with the group's mean as its baseline."""


@dataclass(frozen=True)
class ImportanceBounds:
    """Between which ratios the weights of importance sampling may be, and what becomes of those beyond."""

    cap: float | None = None
    """Largest weight. None: any."""
    floor: float | None = None
    """Smallest weight. None: any."""
    level: Literal["token", "sequence"] = "token"
    """Whether the ratio is a token's, or the product over a sequence, which all of its tokens then have."""
    beyond: Literal["truncate", "mask"] = "truncate"
    """A ratio beyond a bound becomes the bound, or 0."""

    @property
    def on(self) -> bool:
        """Whether anything is corrected."""
        return self.cap is not None or self.floor is not None


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
    sampler: VLLMConfig | None = None
    """Have a vLLM server sample: "vllm" for one of our own, the address of one that runs, or a mapping of settings. With
    lora it gets new weights in a moment. None: this process samples by itself."""
    learning_rate: float = Field(default=5e-4, gt=0, json_schema_extra=AT_TRAINING)
    """Of AdamW, at its highest. The default suits the embedded model; a real one wants 1e-6 to 1e-5, with LoRA 1e-5 to
    3e-4."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes over `finetuning.num_epochs` training jobs, one an epoch; it falls to a tenth."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Part of the planned epochs in which the learning rate climbs to its highest."""
    optimizer_steps: int = Field(default=8, ge=1, json_schema_extra=AT_TRAINING)
    """Steps in one pass over all trajectories of an epoch; fewer where there are fewer trajectories."""
    whole_groups: bool = Field(default=False, json_schema_extra=AT_TRAINING)
    """Whether the trajectories of a group come in the same step, where their prompt is computed once. That is much faster with
    long prompts and short replies, but each step then learns from fewer examples. False: each step draws from all of them."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over the trajectories of an epoch."""
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo", "rloo", "reinforce++"] = "dapo"
    """Which loss, by the name of its paper: what it averages over, and how it holds back a policy that has moved. See the
    table in the reference."""
    clip_low: float = Field(default=0.2, ge=0, lt=1, json_schema_extra=AT_TRAINING)
    """A token whose probability fell below 1 - clip_low of what it was gives no further push down. With gspo a sequence,
    and 3e-4 unless given."""
    clip_high: float = Field(default=0.2, ge=0, json_schema_extra=AT_TRAINING)
    """A token whose probability rose above 1 + clip_high of what it was gives no further push up. With gspo 4e-4 unless given;
    with cispo it bounds the token's weight, and is 4."""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """How fast "sapo" lets go of tokens that have moved: of those that did well, and of those that did badly."""
    kl_coef: float = Field(default=0.0, ge=0, json_schema_extra=AT_TRAINING)
    """Weight of the KL divergence from the initial weights. Above 0 a frozen copy of them is kept in memory; with LoRA
    they are there already. If it was 0 at first, they are loaded again from where `model` says."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated at a token, with d = log probability - the initial weights': "k1", d, taken from the advantage; "k2",
    d^2 / 2, and "k3", exp(-d) - 1 + d, added to the loss."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Largest absolute value of the estimate at a token; beyond it, it gives no gradient. None: any."""
    entropy_coef: float = Field(default=0.0, ge=0, json_schema_extra=AT_TRAINING)
    """Weight of the policy's mean entropy a token (nats), which the loss then makes larger. With entropy_target, the weight that
    it begins with."""
    entropy_target: float | None = Field(default=None, gt=0, json_schema_extra=AT_TRAINING)
    """Entropy (nats a token) to keep the policy at, as Skywork-OR1 does (arXiv 2505.22312): the bonus counts only while the
    entropy is not above this, and its weight grows by a step meanwhile, and falls by one otherwise. None: a fixed weight."""
    entropy_coef_step: float = Field(default=0.005, gt=0, json_schema_extra=AT_TRAINING)
    """By how much that weight changes with each optimizer step."""
    entropy_coef_max: float = Field(default=1.0, gt=0)
    """Its largest value."""
    scale_rewards: bool | Literal["batch"] = True
    """Advantages are divided by the standard deviation of their group's rewards; "batch": by that of all trained rewards, around
    their groups' means. False with dr_grpo and rloo, and "batch" with reinforce++, unless given."""
    dilute: bool = False
    """Whether groups whose rewards do not differ count in the mean over tokens or sequences, as in TRL. They teach nothing either
    way; counted, they make the steps of an epoch with many of them smaller."""
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
    """Policy versions by which a trajectory may be older than the weights that it trains. In a run, 1 samples each epoch while
    the epoch before it trains; that needs a vLLM server as `sampler`, with lora."""
    allow_inexact: bool = False
    """Trains also on turns whose token ids are not known to be those that were sampled."""
    importance_cap: float | None = Field(default=None, gt=0, json_schema_extra=AT_TRAINING)
    """Corrects for a sampler that differs from the trainer: the loss of each token is multiplied with the trainer's probability
    of it, before the first step, over the sampler's, at most this (truncated importance sampling; 2 is usual). One more forward
    pass a job. None: no upper bound, and without importance_floor no correction."""
    importance_floor: float | None = Field(default=None, gt=0, json_schema_extra=AT_TRAINING)
    """The same at least. None: no lower bound."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether that ratio is a token's, or the product over all sampled tokens of a sequence, whose variance grows with its
    length."""
    importance_beyond: Literal["truncate", "mask"] = "truncate"
    """A ratio beyond a bound becomes the bound; "mask": such tokens, or sequences, are not trained on."""
    max_logprob_gap: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Mean |log probability in training - when sampled| (nats), before the first step of a job, beyond which the job
    fails: something else was sampled than is trained. "auto": 0.01 in float32, 0.1 where what trains or samples is in half
    precision, 1 with a correction. None: never; so for trajectories that older weights sampled, which makes a gap."""
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

    def overlap_problem(self) -> str | None:
        found = "found max_staleness above 0, which samples an epoch while the epoch before it trains,"
        if self.sampler is None:
            return (
                f"{found} without a sampler: this process samples from the very weights that it trains, on one device, so that "
                'neither could begin before the other has ended. Take sampler "vllm" with lora, or set it to 0'
            )
        if self.lora is None:
            return f"{found} without lora: a vLLM server holds one set of full weights. Give lora, or set it to 0"
        if self.sampler.sleep:
            return f"{found} with sampler.sleep, for which the server stops while a job trains. Set one of the two to 0 or False"
        return None

    def to_score(self) -> Self:
        return self.model_copy(
            update={"sampler": None, "max_staleness": 0}
        )  # no server is needed, nor what it is installed with

    @property
    def baseline(self) -> Literal["mean", "leave one out"]:
        """What is taken from a reward to make an advantage."""
        return LOSSES[self.loss].baseline

    @property
    def importance(self) -> ImportanceBounds:
        """The correction for a sampler that differs."""
        return ImportanceBounds(
            self.importance_cap, self.importance_floor, self.importance_level, self.importance_beyond
        )

    @property
    def own_defaults(self) -> dict[str, Any]:
        """The defaults that follow from the loss."""
        return LOSSES[self.loss].defaults

    @model_validator(mode="before")
    @classmethod
    def take_defaults_of_loss(cls, given: Any) -> Any:
        form = LOSSES.get(given.get("loss", "dapo")) if isinstance(given, dict) else None
        return given if form is None else form.defaults | given

    @model_validator(mode="after")
    def check_entropy(self) -> Self:
        if self.entropy_target is not None and self.entropy_coef > self.entropy_coef_max:
            raise ValueError(
                f"entropy_coef begins at {self.entropy_coef:g}, above entropy_coef_max, {self.entropy_coef_max:g}; expected at "
                "most that"
            )
        return self

    @model_validator(mode="after")
    def check_importance(self) -> Self:
        bounds = self.importance
        if bounds.cap is not None and bounds.floor is not None and bounds.floor >= bounds.cap:
            raise ValueError(
                f"importance_floor is {bounds.floor:g} and importance_cap {bounds.cap:g}; expected a floor below the cap"
            )
        if not bounds.on and (bounds.level, bounds.beyond) != ("token", "truncate"):
            raise ValueError(
                f"importance_level is {bounds.level!r} and importance_beyond {bounds.beyond!r}, but nothing is corrected: give "
                "importance_cap (2.0, say) or importance_floor too"
            )
        return self
