"""The learner: takes optimizer steps on a policy's weights from given experience. It knows tensors and the optimizer;
jobs, threads and status are the adapter's. AdamW's state lives as long as the learner, that is over epochs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError
from .grpo import LossStatistics, policy_loss, token_logprobs
from .policy import LocalPolicy
from .sequences import Experience, TokenSequence, micro_batches

if TYPE_CHECKING:
    from .adapter import LocalGRPOConfig

__all__ = ["Learner", "TrainingReport", "collate"]


@dataclass
class TrainingReport:
    """What a job has done so far. Numbers that nothing was measured for are NaN."""

    steps_planned: int = 0
    learning_rate: float = math.nan
    has_reference: bool = False
    losses: list[float] = field(default_factory=list)
    """One an optimizer step."""
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping, one an optimizer step."""
    statistics: LossStatistics = field(default_factory=LossStatistics)
    logprob_gap: float = math.nan

    @property
    def steps(self) -> int:
        return len(self.losses)

    def metrics(self) -> dict[str, float]:
        """Means over the optimizer steps (loss, grad_norm) or over the trained tokens (the others).

        kl: nats from the policy that sampled. reference_kl: nats from the initial weights; NaN without kl_coef.
        trained_tokens: counted once in every pass.
        logprob_gap: mean difference of training's and the sampler's log probabilities in the first optimizer batch,
        whose weights are those that sampled: a large one means that other weights or another temperature did.
        """
        statistics = self.statistics
        return {
            "loss": _mean(self.losses),
            "kl": statistics.mean("kl_old"),
            "reference_kl": statistics.mean("kl_reference") if self.has_reference else math.nan,
            "clip_fraction": statistics.mean("clipped_low") + statistics.mean("clipped_high"),
            "grad_norm": _mean(self.grad_norms),
            "logprob_gap": self.logprob_gap,
            "learning_rate": self.learning_rate,
            "trained_tokens": int(statistics.tokens),
            "optimizer_steps": self.steps,
        }


class Learner:
    """Takes GRPO steps on `policy.model`. Whoever calls `train` holds `policy.exclusive`."""

    def __init__(self, policy: LocalPolicy, config: LocalGRPOConfig) -> None:
        self.policy, self.config = policy, config
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.reference = copy.deepcopy(policy.model).requires_grad_(False) if config.kl_coef else None

    def check(self, experience: Experience) -> None:
        """Raises BackendError for sequences that this model cannot hold."""
        vocabulary, longest = self.policy.vocabulary, self.policy.longest
        for sequence in experience.sequences():
            if max(sequence.ids) >= vocabulary:
                raise BackendError(
                    f"a trajectory has token id {max(sequence.ids)}, but the model knows {vocabulary} tokens. "
                    "Was it sampled by another model?"
                )
            if longest is not None and len(sequence) > longest:
                raise BackendError(f"a trajectory has {len(sequence)} tokens, but the model holds {longest}.")

    def train(
        self,
        experience: Experience,
        rng: np.random.Generator,
        report: TrainingReport,
        stepped: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Every trajectory once in each of `inner_epochs` passes, in `optimizer_steps` steps a pass, drawn by `rng`.

        report: filled in as it goes. stepped: called after each step. stopped: asked before each piece of work; True
        ends the training with the steps made so far. Raises BackendError where loss or gradient is not finite; the
        weights are then those before that step.
        """
        trajectories = experience.trajectories
        parts = min(self.config.optimizer_steps, len(trajectories))
        report.steps_planned = parts * self.config.inner_epochs
        report.learning_rate = self.config.learning_rate
        for group in self.optimizer.param_groups:  # it may have been changed since the last job
            group["lr"] = self.config.learning_rate
        report.has_reference = self.reference is not None
        for _ in range(self.config.inner_epochs):
            for part in np.array_split(rng.permutation(len(trajectories)), parts):
                sequences = [sequence for i in part for sequence in trajectories[i]]
                if not self._step(sequences, report, stopped):
                    return
                stepped()

    def _step(self, sequences: Sequence[TokenSequence], report: TrainingReport, stopped: Callable[[], bool]) -> bool:
        """One optimizer step; False if it was stopped before it changed anything."""
        config = self.config
        batch_tokens = sum(sum(sequence.sampled) for sequence in sequences)
        loss, statistics = 0.0, LossStatistics()
        self.optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches(sequences, config.micro_batch_tokens):
            if stopped():
                self.optimizer.zero_grad(set_to_none=True)
                return False
            value, of_batch = self._loss(batch, batch_tokens, len(sequences))
            value.backward()
            loss, statistics = loss + value.item(), statistics + of_batch
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise BackendError(
                f"loss is {loss} and its gradient's norm {grad_norm} at optimizer step {report.steps + 1} of "
                f"{report.steps_planned}; this step was not taken. Mean ratio to the sampling policy: "
                f"{statistics.mean('ratio'):.3g}. A smaller learning_rate than {config.learning_rate:g}, or fewer "
                "optimizer_steps, keep the policy closer to what was sampled."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # sampling needs the memory more
        if not report.steps:
            report.logprob_gap = statistics.mean("gap")
        report.losses.append(loss)
        report.grad_norms.append(grad_norm)
        report.statistics += statistics
        return True

    def _loss(self, batch: list[TokenSequence], tokens: int, sequences: int) -> tuple[Tensor, LossStatistics]:
        config, model = self.config, self.policy.model
        ids_BT, attention_BT, mask_BT, old_BT, advantages_B, temperature_B = collate(batch, model.device)
        reference_BT = None
        if self.reference is not None:
            with torch.no_grad():
                reference_BT = token_logprobs(self.reference, ids_BT, attention_BT, mask_BT, temperature_B)
        return policy_loss(
            token_logprobs(model, ids_BT, attention_BT, mask_BT, temperature_B),
            old_BT,
            advantages_B,
            mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            loss=config.loss,
            kl_coef=config.kl_coef,
            reference_logprobs_BT=reference_BT,
            batch_tokens=tokens,
            batch_sequences=sequences,
        )


def collate(batch: Sequence[TokenSequence], device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """ids_BT, attention_BT, mask_BT, old_logprobs_BT, advantages_B, temperature_B, padded on the right.

    Id 0 stands at padded positions: the attention mask hides it, so that it needs no token of its own.
    """
    width = max(map(len, batch))
    ids_BT, old_BT = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), np.float32)
    attention_BT, mask_BT = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), np.bool_)
    for row, sequence in enumerate(batch):
        ids_BT[row, : len(sequence)] = sequence.ids
        attention_BT[row, : len(sequence)] = 1
        mask_BT[row, : len(sequence)] = sequence.sampled
        old_BT[row, : len(sequence)] = sequence.logprobs
    advantages_B = np.array([sequence.advantage for sequence in batch], np.float32)
    temperature_B = np.array([sequence.temperature for sequence in batch], np.float32)
    arrays = (ids_BT, attention_BT, mask_BT, old_BT, advantages_B, temperature_B)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
