"""What a job asks of the service, step by step: token sequences as Datums, a forward_backward and an optim_step for each
mini-batch, and what comes back as metrics. Jobs, retries and policy versions are the adapter's.

A Datum predicts `target_tokens = ids[1:]` from `ids[:-1]`; positions that the policy did not sample have advantage 0, which
takes them out of the loss. Losses are defined at https://tinker-docs.thinkingmachines.ai/losses: sums over all positions. SkyRL's
jax backend takes each sequence's mean over the positions that have a weight, and the mean of those. Advantages are scaled so
that both give the mean over the batch's sampled tokens, as `local_grpo` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import BackendError
from ...redaction import redacting_logger
from ...rewards.numbers import mean
from ...training.batch import TokenSequence, TrainingBatch
from .config import TinkerConfig
from .errors import Refused, WeightsRefused, sdk, sorted_error
from .service import TinkerService

__all__ = [
    "TinkerReport",
    "advantage_scales",
    "check",
    "loss_inputs",
    "train",
]

logger = redacting_logger(__name__)


@dataclass
class TinkerReport:
    """What a job has done so far. Numbers that nothing was measured for are NaN."""

    steps_planned: int = 0
    learning_rate: float = math.nan
    losses: list[float] = field(default_factory=list)
    """One an optimizer step, as the service tells it."""
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping, one an optimizer step; NaN where the service does not tell."""
    tokens: int = 0
    kl: float = 0.0
    """Sum over the trained tokens of ratio - 1 - log ratio."""
    clipped: int = 0
    gap: float = 0.0
    """Sum over the tokens of the first step of |log probability in training - when sampled|."""
    ratios: float = 0.0
    """Sum over the same tokens of the probability in training over that when sampled."""
    largest_ratio: float = math.nan
    surprise: float = 0.0
    """Sum over the same tokens of -log probability in training."""
    gap_tokens: int = 0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def metrics(self) -> dict[str, float]:
        """The names and meanings of `local_grpo`'s. reference_kl is NaN: services give no logprobs of other weights. entropy, in
        nats, is estimated: the mean of -log probability of what was sampled, before the first step."""
        first = self.gap_tokens
        return {
            "loss": mean(self.losses),
            "kl": self.kl / self.tokens if self.tokens else math.nan,
            "reference_kl": math.nan,
            "clip_fraction": self.clipped / self.tokens if self.tokens else math.nan,
            "grad_norm": mean(self.grad_norms),
            "entropy": self.surprise / first if first else math.nan,
            "logprob_gap": self.gap / first if first else math.nan,
            "importance_ratio": self.ratios / first if first else math.nan,
            "importance_ratio_max": self.largest_ratio,
            "learning_rate": self.learning_rate,
            "trained_tokens": self.tokens,
            "optimizer_steps": self.steps,
        }

    def add(
        self, config: TinkerConfig, sequences: Sequence[TokenSequence], output: Any, update: Any, version_lag: int = 0
    ) -> None:
        """A step that was made, on trajectories of weights that are so many versions older. Raises BackendError where what came
        back is not finite, and where it shows that something else was sampled than is trained."""
        norms = [v for k, v in (update.metrics or {}).items() if "grad_norm" in k]
        first = not self.losses
        for sequence, outputs in zip(sequences, output.loss_fn_outputs, strict=True):
            if "logprobs" not in outputs:
                continue
            sampled = np.array(sequence.sampled[1:])
            logprobs = outputs["logprobs"].to_numpy().reshape(-1)[sampled]
            log_ratio = logprobs - np.array(sequence.logprobs[1:])[sampled]
            if not np.isfinite(log_ratio).all():
                raise BackendError(
                    f"optimizer step {self.steps + 1}: the service computes log probabilities that are not finite. A "
                    f"smaller learning_rate than {config.learning_rate:g} keeps the policy closer to what was sampled."
                )
            advantages = _advantages(sequence)[sampled]
            ratio = np.exp(log_ratio)
            self.kl += float((ratio - 1 - log_ratio).sum())
            if config.clips:
                self.clipped += int(((ratio < 1 - config.clip_low) & (advantages < 0)).sum())
                self.clipped += int(((ratio > 1 + config.clip_high) & (advantages > 0)).sum())
            self.tokens += len(log_ratio)
            if first:
                self.gap, self.gap_tokens = self.gap + float(np.abs(log_ratio).sum()), self.gap_tokens + len(log_ratio)
                self.ratios, self.surprise = self.ratios + float(ratio.sum()), self.surprise - float(logprobs.sum())
                self.largest_ratio = float(np.fmax(self.largest_ratio, ratio.max()))
        longest, gap = config.max_logprob_gap, self.gap / max(self.gap_tokens, 1)
        if first and longest is not None and not version_lag and gap > longest:
            raise BackendError(
                f"before the first step, the service's log probabilities in training differ from those in sampling by "
                f"{gap:.3g} nats a token in the mean; expected at most {longest:g} (max_logprob_gap). The tokens were not "
                "sampled as they are recorded, or other weights sampled them. Sample with this adapter's policy."
            )
        self.losses.append(_loss(config, sequences, output))
        self.grad_norms.append(float(norms[0]) if norms else math.nan)


def check(experience: TrainingBatch, longest: int | None) -> None:
    """Raises BackendError for sequences that the service cannot train on."""
    for sequence in experience.sequences():
        if longest is not None and len(sequence) > longest:
            raise BackendError(
                f"a trajectory has {len(sequence)} tokens, but the model holds {longest}. End the episode before it grows so "
                "long, or leave the trajectory out."
            )
        if sequence.temperature != 1.0:
            raise BackendError(
                f"a trajectory was sampled at temperature {sequence.temperature:g}, but a Tinker service computes log "
                "probabilities at temperature 1 only: it would train another policy than was sampled. Sample at 1."
            )


def loss_inputs(sequence: TokenSequence, scale: float, weights: bool) -> dict[str, np.ndarray]:
    """What a Datum holds beside the input `ids[:-1]`, (T - 1,) each. scale: of the advantages. weights: whether it says which
    positions were sampled."""
    sampled = np.array(sequence.sampled[1:])
    inputs = {
        "target_tokens": np.array(sequence.ids[1:], np.int64),
        "logprobs": np.where(sampled, np.array(sequence.logprobs[1:]), 0.0).astype(np.float32),
        "advantages": (np.where(sampled, _advantages(sequence), 0.0) * scale).astype(np.float32),
    }
    if weights:
        inputs["weights"] = sampled.astype(np.float32)
    return inputs


def advantage_scales(config: TinkerConfig, sequences: Sequence[TokenSequence]) -> list[float]:
    """What each sequence's advantages are multiplied by, so that the service's reduction gives the mean over all sampled tokens
    of the mini-batch."""
    counts = [sum(sequence.sampled) for sequence in sequences]
    if config.loss_reduction == "sequence_mean":
        return [count * len(counts) / sum(counts) for count in counts]
    return [1 / sum(counts)] * len(counts)


def _loss(config: TinkerConfig, sequences: Sequence[TokenSequence], output: Any) -> float:
    """The mini-batch's mean over its sampled tokens, as the service tells it; NaN where it does not."""
    if config.loss_reduction == "sum":
        for name in ("loss:sum", "total_loss:sum"):
            if name in output.metrics:
                return float(output.metrics[name])
    total = 0.0
    for sequence, scale, outputs in zip(
        sequences, advantage_scales(config, sequences), output.loss_fn_outputs, strict=True
    ):
        if "elementwise_loss" not in outputs:
            return math.nan
        # The service computed it with scaled advantages.
        of_tokens = outputs["elementwise_loss"].to_numpy().reshape(-1)[np.array(sequence.sampled[1:])]
        total += float(of_tokens.sum()) / (scale * sum(map(sum, (each.sampled for each in sequences))))
    return total


def _hint(service: TinkerService, config: TinkerConfig, output: Any) -> None:
    """Says once how a service seems to reduce losses, where nobody has said it."""
    tells_each = all("elementwise_loss" in outputs for outputs in output.loss_fn_outputs)
    if tells_each and not output.metrics and not service.hinted and "loss_reduction" not in config.model_fields_set:
        service.hinted = True
        logger.warning(
            "the service reports the loss of each token and no sum, as SkyRL's jax backend does. If it is one, set "
            "loss_reduction of the trainer adapter to 'sequence_mean': with 'sum', short replies count more than long ones."
        )


def _advantages(sequence: TokenSequence) -> np.ndarray:
    """(T - 1,) of each target."""
    return np.array(sequence.advantages[1:])


def train(
    service: TinkerService,
    version: int,
    experience: TrainingBatch,
    config: TinkerConfig,
    rng: np.random.Generator,
    report: TinkerReport,
    stepped: Callable[[], None],
    stopped: Callable[[], bool],
) -> None:
    """Every trajectory once in each of `inner_epochs` passes, in `optimizer_steps` steps a pass, drawn by `rng`, on the
    weights of policy version `version`.

    report: filled in as it goes. stepped: called after each step. stopped: asked before each; True ends the training with
    the steps made so far. Raises what `TinkerService.result` raises; nobody knows then what is in the weights.
    """
    tinker, model = sdk(), service.model(version)
    trajectories = experience.trajectories
    parts = min(config.optimizer_steps, len(trajectories))
    report.steps_planned, report.learning_rate = parts * config.inner_epochs, config.learning_rate
    adam = tinker.AdamParams(
        learning_rate=config.learning_rate,
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=config.weight_decay,
        grad_clip_norm=config.max_grad_norm,
    )
    for _ in range(config.inner_epochs):
        for part in experience.parts(parts, rng):
            if stopped():
                return
            sequences = [sequence for i in part for sequence in trajectories[i]]
            scales = advantage_scales(config, sequences)
            data = [
                tinker.Datum(
                    model_input=tinker.ModelInput.from_ints(sequence.ids[:-1]),
                    loss_fn_inputs=loss_inputs(sequence, scale, service.takes_weights),
                )
                for sequence, scale in zip(sequences, scales, strict=True)
            ]
            # Both are handed over before either is waited for: a service that works in rounds does them in one.
            name = f"optimizer step {report.steps + 1} of {report.steps_planned}"
            try:
                gradient = model.forward_backward(data, config.loss, config.loss_settings())
                update = model.optim_step(adam)
            except Exception as error:
                raise sorted_error(error, name) from error
            try:
                output = service.result(gradient, f"the gradient of {name}")
            except Refused as error:
                raise (WeightsRefused(str(error)) if "weights" in str(error) else error) from error
            _hint(service, config, output)
            report.add(config, sequences, output, service.result(update, name), experience.version_lag)
            stepped()
