"""What a job asks of the service, step by step: token sequences as Datums, a forward_backward and an optim_step for each
mini-batch, and what comes back as metrics. Jobs, retries and policy versions are the adapter's.

A Datum predicts `target_tokens = ids[1:]` from `ids[:-1]`; positions that the policy did not sample have advantage 0, which
takes them out of the loss. Losses are defined at https://tinker-docs.thinkingmachines.ai/losses: sums over all positions. The
advantages are divided by the batch's sampled tokens, which makes the sum their mean, as `local_grpo` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import BackendError
from ...rewards.numbers import mean
from ...training.batch import TokenSequence, TrainingBatch
from .config import TinkerConfig
from .service import TinkerService, sdk

__all__ = [
    "TinkerReport",
    "check",
    "loss_inputs",
    "train",
]


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
    gap_tokens: int = 0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def metrics(self) -> dict[str, float]:
        """The names and meanings of `local_grpo`'s. reference_kl is NaN: services give no logprobs of other weights."""
        return {
            "loss": mean(self.losses),
            "kl": self.kl / self.tokens if self.tokens else math.nan,
            "reference_kl": math.nan,
            "clip_fraction": self.clipped / self.tokens if self.tokens else math.nan,
            "grad_norm": mean(self.grad_norms),
            "logprob_gap": self.gap / self.gap_tokens if self.gap_tokens else math.nan,
            "learning_rate": self.learning_rate,
            "trained_tokens": self.tokens,
            "optimizer_steps": self.steps,
        }

    def add(
        self, config: TinkerConfig, sequences: Sequence[TokenSequence], output: Any, update: Any, version_lag: int = 0
    ) -> None:
        """A step that was made, on trajectories of weights that are so many versions older. Raises BackendError where what came
        back is not finite, and where it shows that something else was sampled than is trained."""
        loss = float(output.metrics.get("loss:sum", math.nan))
        norms = [v for k, v in (update.metrics or {}).items() if "grad_norm" in k]
        first = not self.losses
        for sequence, outputs in zip(sequences, output.loss_fn_outputs, strict=True):
            if "logprobs" not in outputs:
                continue
            sampled = np.array(sequence.sampled[1:])
            log_ratio = outputs["logprobs"].to_numpy().reshape(-1) - np.array(sequence.logprobs[1:])
            log_ratio = log_ratio[sampled]
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
        longest, gap = config.max_logprob_gap, self.gap / max(self.gap_tokens, 1)
        if first and longest is not None and not version_lag and gap > longest:
            raise BackendError(
                f"before the first step, the service's log probabilities in training differ from those in sampling by "
                f"{gap:.3g} nats a token in the mean; expected at most {longest:g} (max_logprob_gap). The tokens were not "
                "sampled as they are recorded, or other weights sampled them. Sample with this adapter's policy."
            )
        self.losses.append(loss)
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


def loss_inputs(sequence: TokenSequence, batch_tokens: int) -> dict[str, np.ndarray]:
    """What a Datum holds beside the input `ids[:-1]`, (T - 1,) each. batch_tokens: sampled tokens of the mini-batch."""
    sampled = np.array(sequence.sampled[1:])
    return {
        "target_tokens": np.array(sequence.ids[1:], np.int64),
        "logprobs": np.where(sampled, np.array(sequence.logprobs[1:]), 0.0).astype(np.float32),
        "advantages": (np.where(sampled, _advantages(sequence), 0.0) / batch_tokens).astype(np.float32),
    }


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
        for part in np.array_split(rng.permutation(len(trajectories)), parts):
            if stopped():
                return
            sequences = [sequence for i in part for sequence in trajectories[i]]
            tokens = sum(sum(sequence.sampled) for sequence in sequences)
            data = [
                tinker.Datum(
                    model_input=tinker.ModelInput.from_ints(sequence.ids[:-1]),
                    loss_fn_inputs=loss_inputs(sequence, tokens),
                )
                for sequence in sequences
            ]
            # Both are handed over before either is waited for: a service that works in rounds does them in one.
            gradient = model.forward_backward(data, config.loss, config.loss_settings())
            update = model.optim_step(adam)
            name = f"optimizer step {report.steps + 1} of {report.steps_planned}"
            output = service.result(gradient, f"the gradient of {name}")
            report.add(config, sequences, output, service.result(update, name), experience.version_lag)
            stepped()
