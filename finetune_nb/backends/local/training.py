"""The learner: takes optimizer steps on a policy's weights from given training_batch, and refuses what would not teach this
policy. Jobs, threads and status are the adapter's. AdamW's state lives as long as the learner, that is over epochs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError, ConfigError
from ...rewards.numbers import mean
from ...training.batch import TokenSequence, TrainingBatch
from ...types import MessageKey, WarmUpSettings
from .config import LocalGRPOConfig
from .families.positions import borders_of
from .forward import TokenBatch, check_fits, collate, micro_batches
from .lora import as_trained, is_lora, switched_off
from .losses.entropy import EntropyWeight
from .losses.importance import ImportanceBounds, Mismatch, importance_weights, mismatch
from .losses.loss import LossStatistics, policy_loss, supervised_loss
from .memory import largest_that_fits, ran_out
from .policy import LocalPolicy
from .prefill import can_share
from .weights import HALF_PRECISION, TrainedWeights, known_by

__all__ = [
    "DemonstrationReport",
    "Learner",
    "Schedule",
    "TrainingReport",
    "rate",
]

Schedule = Literal["constant", "linear", "cosine"]

LARGEST_GAP, LARGEST_GAP_HALF, LARGEST_GAP_CORRECTED = 0.01, 0.1, 1.0
"""`max_logprob_gap` "auto", in nats a token: in float32, where one of the two is in half precision, and where importance
sampling corrects for the sampler. Rounding alone makes 1e-5 in float32 and 0.035 in bfloat16 (SmolLM2-135M beside vLLM)."""
ROUNDING, ROUNDING_HALF = 1e-3, 0.05
"""What rounding makes at most, with a margin."""
FLOAT16_SCALE = 2.0**16
"""The loss is multiplied with this where a model computes in float16, so that small gradients are not rounded to 0."""


def rate(
    schedule: Schedule, done: float, planned: float, step: float, warmup: float = 0.0, floor: float = 0.1
) -> float:
    """What the learning rate is multiplied with for the step that begins at `done`, in (0, 1].

    done, planned, step: epochs, fractions included: `done` of `planned` are over, the step takes `step` of one. warmup:
    the part of the planned epochs in which the rate climbs from near 0 in a straight line. floor: what "linear" and
    "cosine" (a half wave, as in SGDR, arXiv 1608.03983) have fallen to when the planned epochs are over; epochs after
    the plan keep it, so that they still learn something.
    """
    climbing = warmup * planned
    if done < climbing:
        return min((done + step) / climbing, 1.0)
    if schedule == "constant":
        return 1.0
    over = min((done - climbing) / (planned - climbing), 1.0) if planned > climbing else 1.0
    left = 1 - over if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * over))
    return floor + (1 - floor) * left


@dataclass
class TrainingReport:
    """What a job has done so far. Numbers that nothing was measured for are NaN."""

    steps_planned: int = 0
    learning_rate: float = math.nan
    """Of the newest step."""
    has_reference: bool = False
    has_entropy: bool = False
    entropy_coef: float = math.nan
    """Of the newest step."""
    losses: list[float] = field(default_factory=list)
    """One an optimizer step."""
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping, one an optimizer step."""
    statistics: LossStatistics = field(default_factory=LossStatistics)
    mismatch: Mismatch = field(default_factory=Mismatch)
    """Of training and sampling, before the first step."""
    importance_bounded: float = math.nan
    """Share of the tokens whose importance ratio was beyond the bounds."""
    rounding_gap: float = math.nan
    weights_moved: float = math.nan

    @property
    def steps(self) -> int:
        return len(self.losses)

    def metrics(self) -> dict[str, float]:
        """Means over the optimizer steps (loss, grad_norm) or over the trained tokens (the others).

        kl: nats from the policy that sampled; with a correction for the sampler, from the one before the first step.
        reference_kl: nats from the initial weights; NaN without kl_coef. entropy: nats; NaN without entropy_coef and
        entropy_target. entropy_coef: the weight of the bonus in the last step, 0 where it did not count.
        trained_tokens: counted once in every pass. learning_rate: of the last step.
        logprob_gap: mean difference of training's and the sampler's log probabilities before the first step, when the weights
        are those that sampled: a large one means that other weights or another temperature did. rounding_gap: what rounding alone
        makes of it at most. importance_ratio, importance_ratio_max: mean and largest of the trainer's probabilities over the
        sampler's, unbounded. effective_samples: as many samples of the trainer's own would teach as much, as a part of those
        there are. These are of all tokens where a correction is on, else of the first optimizer batch's. importance_bounded:
        share of the tokens whose ratio was beyond the correction's bounds; NaN without one.
        weights_moved: share of the trained weights that the job has changed; near 0, its steps are lost in rounding. Of
        weights in half precision the float32 masters count: what is sampled follows as steps add up to its spacing.
        """
        statistics = self.statistics
        return {
            "loss": mean(self.losses),
            "kl": statistics.mean("kl_old"),
            "reference_kl": statistics.mean("kl_reference") if self.has_reference else math.nan,
            "entropy": statistics.mean("entropy") if self.has_entropy else math.nan,
            "entropy_coef": self.entropy_coef,
            "clip_fraction": statistics.mean("clipped_low") + statistics.mean("clipped_high"),
            "grad_norm": mean(self.grad_norms),
            "logprob_gap": self.mismatch.gap,
            "rounding_gap": self.rounding_gap,
            "importance_ratio": self.mismatch.mean_ratio,
            "importance_ratio_max": self.mismatch.largest_ratio,
            "effective_samples": self.mismatch.effective_samples,
            "importance_bounded": self.importance_bounded,
            "learning_rate": self.learning_rate,
            "weights_moved": self.weights_moved,
            "trained_tokens": int(statistics.tokens),
            "optimizer_steps": self.steps,
        }


@dataclass
class DemonstrationReport(TrainingReport):
    """What a warm-up has done so far."""

    held_out_losses: list[float] = field(default_factory=list)
    """Cross entropy (nats a learned token) of the rows held out, before the first pass and after each."""

    def metrics(self) -> dict[str, float]:
        """As those of a job, and the first and the last of the losses."""
        held_out = self.held_out_losses
        return super().metrics() | {
            "first_loss": self.losses[0] if self.losses else math.nan,
            "last_loss": self.losses[-1] if self.losses else math.nan,
            "held_out_loss_before": held_out[0] if held_out else math.nan,
            "held_out_loss": held_out[-1] if held_out else math.nan,
        }


class Learner:
    """Takes GRPO or supervised steps on `policy.model`. Whoever calls `train` holds `policy.exclusive`."""

    def __init__(self, policy: LocalPolicy, config: LocalGRPOConfig) -> None:
        self.policy, self.config = policy, config
        self.trained = TrainedWeights(policy.model)
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._scale = 1.0
        self._idle: tuple[float, float] = (0, 0)
        self._length = 1
        self._supervised = False
        self._version_lag = 0
        self._has_entropy = False
        self._log_ratios: list[Tensor] | None = None
        """Those of each sequence, while they are asked for."""
        self.entropy_weight = EntropyWeight(config.entropy_coef)
        self.reference: Any = None
        """A copy of the initial weights, where KL is asked for and no adapter can be switched off."""
        self.moved = False
        """Whether the weights are no longer those that the learner began with."""
        self._initial = None if is_lora(policy.model) else known_by(policy.model)
        if config.kl_coef and not is_lora(policy.model):
            self.copy_reference()
        if config.gradient_checkpointing:
            _checkpoint_gradients(as_trained(policy.model))
        # Layers that compute their activations again let go of the keys and values that sharing needs.
        self._shares = can_share(policy.model) and not config.gradient_checkpointing
        self._unchanged = min(borders_of(policy.model), default=math.inf)
        """Tokens up to which a sequence's positions are those of its beginning."""

    def copy_reference(self) -> None:
        """Makes the weights as they are now the reference."""
        self.reference = copy.deepcopy(self.policy.model).requires_grad_(False)

    def _provide_reference(self) -> None:
        """The initial weights, where KL is measured from them and they are not there yet: kl_coef was 0 when the learner began.
        Raises BackendError where they cannot be had any more."""
        if not self.config.kl_coef or self.reference is not None or is_lora(self.policy.model):
            return
        if not self.moved:
            self.copy_reference()
            return
        cure = "Keep it at 0, or begin a run with kl_coef above 0 (1e-9 keeps them too), or with lora."
        where, asked = self.policy.source, f"kl_coef is {self.config.kl_coef:g} now, and was 0 when training began"
        if where is None:
            raise BackendError(
                f"{asked}: the initial weights of a model that was handed over are not kept then. Nothing was trained. {cure}"
            )
        loaded = LocalPolicy.load(where, self.policy.device, self.policy.dtype, threads=self.policy.exclusive.threads)
        if known_by(loaded.model) != self._initial:
            raise BackendError(
                f"{asked}: {where!r} has other weights than those that this run began with. Nothing was trained. {cure}"
            )
        self.reference = loaded.model.requires_grad_(False)

    def check(self, experience: TrainingBatch) -> None:
        """Raises BackendError for sequences that this model cannot hold."""
        check_fits(experience.sequences(), self.policy)

    def train(
        self,
        experience: TrainingBatch,
        rng: np.random.Generator,
        report: TrainingReport,
        stepped: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
        done: int = 0,
        planned: int = 1,
    ) -> None:
        """Every trajectory once in each of `inner_epochs` passes, in `optimizer_steps` steps a pass, drawn by `rng`.

        report: filled in as it goes. stepped: called after each step. stopped: asked before each piece of work; True
        ends the training with the steps made so far. done, planned: jobs before this one, and those that the learning
        rate's schedule is made for. Raises BackendError where loss or gradient is not finite, where something else was
        sampled than is trained, and where memory runs out; the weights are then those before that step.
        """
        trajectories, config = experience.trajectories, self.config
        parts = min(config.optimizer_steps, len(trajectories))
        report.steps_planned = steps = parts * config.inner_epochs
        report.has_reference = config.kl_coef > 0
        report.has_entropy = config.entropy_coef > 0 or config.entropy_target is not None
        # Part of the tokens and sequences that teach nothing and count all the same.
        self._idle = (experience.idle_tokens / parts, experience.idle_sequences / parts) if config.dilute else (0, 0)
        self._length = max(sum(sequence.sampled) for sequence in experience.sequences())
        self._supervised, self._version_lag = experience.supervised, experience.version_lag
        self._has_entropy = report.has_entropy and not experience.supervised
        self.entropy_weight.follow(config.entropy_coef)
        if not self._supervised:
            self._provide_reference()
        self.trained.follow()
        self._scale = FLOAT16_SCALE if self.policy.model.dtype == torch.float16 else 1.0
        report.rounding_gap = ROUNDING_HALF if self._half_precision else ROUNDING
        before = self.trained.sample()
        bounds = config.importance
        if bounds.on and not self._supervised:
            corrected = self._corrected(trajectories, bounds, report, stopped)
            if corrected is None:
                return
            trajectories = corrected
        for _ in range(config.inner_epochs):
            for part in experience.parts(parts, rng, config.whole_groups):
                factor = rate(config.lr_schedule, done + report.steps / steps, planned, 1 / steps, config.warmup)
                report.learning_rate = config.learning_rate * factor
                for group in self.optimizer.param_groups:  # it may also have been changed since the last job
                    group["lr"] = report.learning_rate
                sequences = [sequence for i in part for sequence in trajectories[i]]
                with _checkpointing(self.policy.model, config.gradient_checkpointing), self.trained.gathering():
                    if not self._step(sequences, report, stopped):
                        return
                report.weights_moved = self.trained.share_changed(before)
                stepped()

    def learn(
        self,
        rows: list[list[TokenSequence]],
        held_out: list[list[TokenSequence]],
        settings: WarmUpSettings,
        rng: np.random.Generator,
        report: DemonstrationReport,
        stepped: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Learns the tokens of demonstrations, by an AdamW of its own: that of the run's other jobs stays as it was.

        rows: each has at least one sequence. rng: draws the order of each pass. If it is stopped or raises, the weights are
        those before it, and the report has no steps. Raises as `train`.
        """
        config, size = self.config, settings.batch_size
        self._idle, self._length, self._version_lag = (0, 0), 1, 0
        self._supervised, self._has_entropy = True, False
        self.trained.follow()
        self._scale = FLOAT16_SCALE if self.policy.model.dtype == torch.float16 else 1.0
        report.steps_planned = math.ceil(len(rows) / size) * settings.epochs
        report.learning_rate = config.learning_rate if settings.learning_rate is None else settings.learning_rate
        before, ended = self.trained.sample(), False
        with self._own_optimizer(report.learning_rate) as put_back:
            try:
                self._measure(held_out, report, stopped)
                for _ in range(settings.epochs):
                    order = rng.permutation(len(rows))
                    for begin in range(0, len(rows), size):
                        sequences = [sequence for i in order[begin : begin + size] for sequence in rows[i]]
                        with _checkpointing(self.policy.model, config.gradient_checkpointing), self.trained.gathering():
                            if not self._step(sequences, report, stopped):
                                return
                        stepped()
                    self._measure(held_out, report, stopped)
                report.weights_moved = self.trained.share_changed(before)
                ended = not stopped()
            finally:
                if not ended:
                    put_back()
                    report.losses.clear()
                    report.held_out_losses.clear()

    @contextmanager
    def _own_optimizer(self, learning_rate: float) -> Iterator[Callable[[], None]]:
        """Inside, steps are those of a new optimizer. Gives what puts the weights back to what they are now."""
        config, kept, moved = self.config, self.optimizer, self.moved
        parameters = self.trained.parameters
        values = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

        @torch.no_grad()
        def put_back() -> None:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            self.trained.put()
            self.moved = moved

        self.optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        try:
            yield put_back
        finally:
            self.optimizer = kept

    @torch.no_grad()
    def _measure(
        self, rows: list[list[TokenSequence]], report: DemonstrationReport, stopped: Callable[[], bool]
    ) -> None:
        """Adds the loss of rows that are held out to the report, if there are any."""
        sequences = [sequence for row in rows for sequence in row]
        if not sequences:
            return
        loss = tokens = 0.0
        sharing = self._shares and max(map(len, sequences)) <= self._unchanged
        for batch, shared in micro_batches(sequences, self.config.micro_batch_tokens, sharing):
            if stopped():
                return
            of_batch, logprobs_BT = self._scored(batch, shared)
            loss -= torch.where(of_batch.mask_BT, logprobs_BT, 0.0).sum().item()
            tokens += int(of_batch.mask_BT.sum())
        report.held_out_losses.append(loss / tokens)

    def _step(self, sequences: Sequence[TokenSequence], report: TrainingReport, stopped: Callable[[], bool]) -> bool:
        """One optimizer step; False if it was stopped before it changed anything."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        first = not (report.steps or self._supervised or config.importance.on)
        try:
            while True:
                self._log_ratios = [] if first else None
                computed = self._gradient(sequences, stopped)
                if computed is None:
                    return False
                loss, statistics, grad_norm = computed
                if math.isfinite(grad_norm) or self._scale == 1 or not math.isfinite(loss):
                    break
                # Scaled by so much the gradient is beyond float16: once more, with less.
                self._scale = max(self._scale / 16, 1.0)
                self.optimizer.zero_grad(set_to_none=True)
            if self._log_ratios is not None:
                report.mismatch = mismatch(self._log_ratios, config.importance_level)
                self._log_ratios = None
                self._check_gap(report.mismatch.gap)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise BackendError(
                    f"loss is {loss} and its gradient's norm {grad_norm} at optimizer step {report.steps + 1} of "
                    f"{report.steps_planned}; this step was not taken. Mean ratio to the sampling policy: "
                    f"{statistics.mean('ratio'):.3g}. A smaller learning_rate than {config.learning_rate:g}, or fewer "
                    "optimizer_steps, keep the policy closer to what was sampled."
                )
            self.moved = True
            self.optimizer.step()
            self.trained.put()
        finally:
            self.optimizer.zero_grad(set_to_none=True)  # sampling needs the memory more
        if self._has_entropy:
            report.entropy_coef = self.entropy_weight.weight(config.entropy_target)
            self.entropy_weight.step(
                statistics.mean("entropy"), config.entropy_target, config.entropy_coef_step, config.entropy_coef_max
            )
        report.losses.append(loss)
        report.grad_norms.append(grad_norm)
        report.statistics += statistics
        return True

    def _gradient(
        self, sequences: Sequence[TokenSequence], stopped: Callable[[], bool]
    ) -> tuple[float, LossStatistics, float] | None:
        """The loss, its statistics, and the norm of its gradient, which is clipped; None if it was stopped before."""
        config = self.config
        tokens = sum(sum(sequence.sampled) for sequence in sequences) + self._idle[0]
        loss, statistics = 0.0, LossStatistics()
        # The positions of a prompt must not change with the reply that comes after it.
        sharing = self._shares and max(map(len, sequences)) <= self._unchanged
        for batch, shared in micro_batches(sequences, config.micro_batch_tokens, sharing):
            if stopped():
                return None
            of_batch = self._backward(batch, shared, tokens, len(sequences) + self._idle[1])
            loss, statistics = loss + of_batch[0], statistics + of_batch[1]
        parameters = self.trained.parameters
        if self._scale != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._scale
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        return loss, statistics, grad_norm

    @torch.no_grad()
    def _corrected(
        self,
        trajectories: list[list[TokenSequence]],
        bounds: ImportanceBounds,
        report: TrainingReport,
        stopped: Callable[[], bool],
    ) -> list[list[TokenSequence]] | None:
        """The trajectories as if the weights before the first step had sampled them: with their log probabilities, and each
        token's advantage times its importance weight. None if it was stopped before."""
        sequences = [sequence for trajectory in trajectories for sequence in trajectory]
        corrected: dict[int, TokenSequence] = {}
        log_ratios: list[Tensor] = []
        tokens = beyond = 0
        sharing = self._shares and max(map(len, sequences)) <= self._unchanged
        for batch, shared in micro_batches(sequences, self.config.micro_batch_tokens, sharing):
            if stopped():
                return None
            of_batch, logprobs_BT = self._scored(batch, shared)
            log_ratio_BT = torch.where(of_batch.mask_BT, logprobs_BT - of_batch.old_logprobs_BT, 0.0)
            weights_BT, beyond_BT = importance_weights(log_ratio_BT, of_batch.mask_BT, bounds)
            tokens, beyond = tokens + int(of_batch.mask_BT.sum()), beyond + int(beyond_BT.sum())
            log_ratios += [row[mask] for row, mask in zip(log_ratio_BT.cpu(), of_batch.mask_BT.cpu(), strict=True)]
            rows = zip(batch, logprobs_BT.tolist(), (of_batch.advantages_BT * weights_BT).tolist(), strict=True)
            for (sequence, logprobs, advantages), length in zip(
                rows, of_batch.attention_BT.sum(1).tolist(), strict=True
            ):
                shared_prompt = [0.0] * (len(sequence) - length)
                corrected[id(sequence)] = replace(
                    sequence, logprobs=shared_prompt + logprobs[:length], advantages=shared_prompt + advantages[:length]
                )
        report.mismatch = mismatch(log_ratios, bounds.level)
        report.importance_bounded = beyond / tokens
        self._check_gap(report.mismatch.gap)
        return [[corrected[id(sequence)] for sequence in trajectory] for trajectory in trajectories]

    def _scored(self, batch: list[TokenSequence], shared: bool) -> tuple[TokenBatch, Tensor]:
        """A micro-batch, and the log probabilities of its tokens."""
        try:
            of_batch = collate(batch, self.policy.model.device, shared)
            return of_batch, of_batch.scores(self.policy.model).logprobs_BT
        except Exception as error:
            if not ran_out(error):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        with torch.enable_grad():
            raise self._out_of_memory(batch, shared, reason)

    @property
    def _half_precision(self) -> bool:
        """Whether the weights that are trained, or those that sample, are in half precision."""
        return not {self.policy.model.dtype, self.policy.sampling_dtype}.isdisjoint(HALF_PRECISION)

    @property
    def largest_gap(self) -> float | None:
        """Mean difference (nats a token) of training's and the sampler's log probabilities that is still trained on."""
        longest = self.config.max_logprob_gap
        if longest != "auto":
            return longest
        if self.config.importance.on:
            return LARGEST_GAP_CORRECTED
        return LARGEST_GAP_HALF if self._half_precision else LARGEST_GAP

    def _check_gap(self, gap: float) -> None:
        """Before the first step the weights are those that sampled: whatever differs by more than rounding is a mistake
        that no training would get over, or what a correction has to weigh. Not so where older weights sampled."""
        longest = self.largest_gap
        if longest is None or self._version_lag or not gap > longest:
            return
        raise BackendError(
            f"before the first step, training's log probabilities differ from the sampler's by {gap:.3g} nats a token in "
            f"the mean; expected at most {longest:g} (max_logprob_gap). Nothing was trained. Likely causes: the tokens were "
            "not sampled as they are recorded (a chat template or tokenizer that differs, text that was tokenized again), "
            "other weights sampled them (stale, or of another run), an adapter that was on in one and off in the other, or "
            f"logprobs at another temperature than metadata[{MessageKey.TEMPERATURE!r}] says. Sample with this adapter's policy. "
            + (
                "That is beyond what importance sampling can correct."
                if self.config.importance.on
                else "Where the sampler differs on purpose, importance_cap=2.0 corrects for it."
            )
        )

    def _backward(
        self, batch: list[TokenSequence], shared: bool, tokens: float, sequences: float
    ) -> tuple[float, LossStatistics]:
        """Adds the gradient of a micro-batch; its part of the loss, and its statistics."""
        try:
            value, statistics = self._loss(collate(batch, self.policy.model.device, shared), tokens, sequences)
            (value * self._scale).backward()
            return value.item(), statistics
        except Exception as error:
            if not ran_out(error):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        value = None  # it would hold on to all that did not fit
        raise self._out_of_memory(batch, shared, reason)

    def _out_of_memory(self, batch: list[TokenSequence], shared: bool, reason: str) -> BackendError:
        """The error for a micro-batch that does not fit. How much would is tried out."""
        self.optimizer.zero_grad(set_to_none=True)
        model = self.policy.model

        def attempt(rows: int) -> None:  # the longest ones
            self._loss(collate(batch[-rows:], model.device, shared), 1, 1)[0].backward()
            self.optimizer.zero_grad(set_to_none=True)

        rows = largest_that_fits(len(batch), attempt)
        whole = collate(batch, shared=shared).size
        if rows:
            size = collate(batch[-rows:], shared=shared).size
            advice = f"A micro-batch of {size} tokens was tried and fits: set micro_batch_tokens={size}."
        else:
            advice = "Not even one of its sequences fits alone: gradient_checkpointing=True"
            advice += (
                ", a shorter conversation or a smaller model." if is_lora(model) else ", lora={}, or a smaller model."
            )
        return BackendError(
            f"a micro-batch of {len(batch)} sequences, {whole} tokens with padding, does not fit into the memory of "
            f"{model.device} ({reason:.200}). {advice} This step was not taken."
        )

    def _loss(self, batch: TokenBatch, tokens: float, sequences: float) -> tuple[Tensor, LossStatistics]:
        config, model = self.config, self.policy.model
        if self._supervised:
            return supervised_loss(batch.scores(model).logprobs_BT, batch.mask_BT, tokens)
        reference_BT = None
        if config.kl_coef:
            with torch.no_grad():
                if self.reference is not None:
                    reference_BT = batch.scores(self.reference).logprobs_BT
                else:
                    with switched_off(model):
                        reference_BT = batch.scores(model).logprobs_BT
        scores = batch.scores(model, entropies=self._has_entropy)
        if self._log_ratios is not None:
            log_ratio_BT, mask_BT = (scores.logprobs_BT.detach() - batch.old_logprobs_BT).cpu(), batch.mask_BT.cpu()
            self._log_ratios += [row[mask] for row, mask in zip(log_ratio_BT, mask_BT, strict=True)]
        return policy_loss(
            scores.logprobs_BT,
            batch.old_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            loss=config.loss,
            sapo_temperatures=config.sapo_temperatures,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            kl_clip=config.kl_clip,
            reference_logprobs_BT=reference_BT,
            entropy_coef=self.entropy_weight.weight(config.entropy_target),
            entropies_BT=scores.entropies_BT,
            length=self._length,
            batch_tokens=tokens,
            batch_sequences=sequences,
        )


def _checkpoint_gradients(model: Any) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing is on, but {type(model).__name__} cannot do it. Leave it out, and use a smaller "
            "micro_batch_tokens."
        )
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Layers compute their activations again in the backward pass only while they are in training mode; what is inside
    them stays in evaluation mode, without dropout."""
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)] if on else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
