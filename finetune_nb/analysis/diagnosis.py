"""Says why a run does not learn: each finding with its number, the rollouts that show it, and the next step.

Numbers of whole epochs come from the epochs' records. Rollouts are read for the newest epochs only, and of those no more than
a few columns. The limits are measured: no healthy run of `tests/analysis/test_diagnosis.py` reaches one, and the planted faults
do.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ..hooks import shown_by
from ..store.reader import trajectory_columns
from ..text import count, number, one_line
from ..training.metrics import NO_SPREAD, has_signal, length_correlation
from ..types import Epoch, EpochMetrics, TrainingStatusEnum, as_float
from .learning_signal import chance_of_spread, group_signals
from .rollout_columns import RolloutColumns
from .trajectory_names import trajectory_names

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "Diagnosis",
    "Finding",
    "SEVERITIES",
    "diagnosis",
    "epoch_warnings",
]

Severity = Literal["critical", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")
"""From the worst on. "critical": nothing can be learned like this. "info": worth knowing, and no fault."""

NEWEST = 3
"""Epochs, from the newest, whose rollouts are read and whose numbers count as those of now."""
EVIDENCE = 10
"""Most rollouts that a finding names."""
FEW = 16
"""Rollouts below which a share of them says nothing."""

MISSING = 0.05
"""Share of rewards missing, or of rollouts failed, from which on it is a finding ..."""
MANY_MISSING = 0.5
"""... and a critical one."""
TEACHING = 0.25
"""Share of groups whose rewards differ, below which too little is taught."""
SMALL_GROUP, MORE_WITH_SIZE = 4, 1.5
"""Generations up to which a group can be too small, and how many times as many groups would teach with FULL_GROUP of them."""
FULL_GROUP = 8
LENGTH_EXPLAINS = 0.8
"""Share of the rewards' spread inside groups that the reply's length explains."""
DOMINATES, VARIES = 20.0, 0.5
"""How many times the spread of another component a dominating one has, where the other one differs in at least this part of
the groups in which the dominating one does."""
FALLS, PAID = 0.1, 0.25
"""What a component lost in training, as a part of its range and of what the reward gained, from which on another one is bought
with it."""
CUT, MANY_CUT = 0.2, 0.5
"""Share of rollouts whose last reply was cut."""
ENTROPY_LOW, ENTROPY_FALL = 0.05, 0.25
"""Nats a token below which a policy hardly explores, and the part of its first entropy to which it has then fallen."""
ENTROPY_HIGH, ENTROPY_RISE = 1.0, 2.0
"""The same for one that grows: nats, and times the lowest of the run."""
MASTERED = 0.9
"""Mean reward, as a part of the run's range, from which on a policy may be sure of itself."""
DRIFTED = 0.1
"""Share of continued turns."""
GAP = 0.02
"""Nats a token between training's and sampling's log probabilities before the first step, where the backend does not say what
rounding makes of it."""
EFFECTIVE, EFFECTIVE_CORRECTED = 0.98, 0.5
"""Part of the samples that are worth one of the trainer's own, below which a sampler differs too much: uncorrected, and with
importance sampling."""
CLIPPED, KL_LARGE, KL_FIRST = 0.3, 0.2, 1.2
"""Share of trained tokens that were clipped, and KL from the policy that sampled, of a learning rate that is too large. The first
job of a run may move further, as AdamW's first steps are its largest."""
KL_SMALL, MOVED = 1e-6, 0.05
"""KL, and the share of weights that a job changed, of one that is too small."""
REPEATED, LOOPS = 0.8, 0.2
"""Share of rollouts with the same reply to different questions, or with a reply that repeats itself."""
LOOP_LENGTH, LOOP_RATIO = 100, 0.2
"""Characters from which on a reply can repeat itself, and the part of its length to which zlib then packs it."""
LEARNED, FOLLOWED = 0.2, 0.25
"""What the reward gained in training, as a part of its range, and the part of that which validation has to gain as well."""
UNPARSED = 0.05
"""Share of rollouts with something that looks like a tool call and was not parsed as one."""


@dataclass(frozen=True)
class Finding:
    """One reason why a run may not learn."""

    kind: str
    """A name that stays the same between releases, such as "replies_cut"."""
    severity: Severity
    sentence: str
    """What was found, with its number. It may quote errors of user code as they are."""
    number: float
    """The number of the sentence: a share, a correlation, nats, ..."""
    next_step: str
    """One line: code to run or a setting to change, where there is one."""
    evidence: tuple[str, ...] = ()
    """Names of rollouts that show it, such as "e3/q17/2", or of epochs ("e3")."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Why a run does not learn; displays itself in a cell. True where there are findings, also if they are mere information."""

    run_id: str
    epochs: tuple[int, ...]
    """Numbers of the epochs that were looked at."""
    findings: tuple[Finding, ...]
    """The worst ones first."""
    unchecked: tuple[str, ...] = ()
    """What could not be looked at, and why."""

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, kind: str) -> Finding:
        """The finding of that kind; KeyError where there is none."""
        for finding in self.findings:
            if finding.kind == kind:
                return finding
        raise KeyError(kind)

    def frame(self) -> pd.DataFrame:
        """One row = one finding, the worst ones first: kind, severity, sentence, number, next_step, evidence (names of rollouts,
        separated by spaces)."""
        import pandas as pd

        rows = [(f.kind, f.severity, f.sentence, f.number, f.next_step, " ".join(f.evidence)) for f in self.findings]
        frame = pd.DataFrame(rows, columns=["kind", "severity", "sentence", "number", "next_step", "evidence"])
        return frame.astype({"number": "float64"})

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.diagnosis:diagnosis_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.diagnosis:diagnosis_html", self)


def diagnosis(
    run_id: str,
    epochs: Sequence[Epoch],
    weights: Mapping[str, float] | None = None,
    records: Sequence[Epoch] | None = None,
) -> Diagnosis:
    """Find out why a run does not learn.

    Args:
        run_id: Of the run.
        epochs: Its records, oldest first. Those without a finished rollout say nothing of rewards.
        weights: Component of the reward -> weight, if the reward is a weighted sum.
        records: All epochs of the run, which say what rewards there are and where it began. Default: `epochs`.

    Returns:
        The findings, the worst ones first.
    """
    seen = _Seen(epochs, weights or {}, epochs if records is None else records)
    found: list[Finding] = []
    for check in CHECKS:
        found += check(seen)
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(run_id, tuple(epoch.index for epoch in epochs), tuple(found), tuple(seen.unchecked()))


def epoch_warnings(metrics: EpochMetrics) -> list[str]:
    """What of an epoch's numbers is a warning by itself, in words. Takes no rollout, so it can be asked after every epoch.

    Rewards that are missing and turns that drifted have places of their own.
    """
    warnings = []
    cut = metrics.replies_cut or 0
    if metrics.trajectories >= FEW and cut >= CUT * metrics.trajectories:
        warnings.append(f"{cut:,} of {metrics.trajectories:,} replies cut at the token limit")
    correlation = metrics.length_correlation
    if correlation is not None and correlation**2 >= LENGTH_EXPLAINS:
        warnings.append(_length_sentence(correlation))
    entropy, span = metrics.mean_entropy, metrics.max_reward - metrics.min_reward
    if entropy is not None and entropy < ENTROPY_LOW and metrics.groups_with_spread < TEACHING * metrics.groups:
        if metrics.mean_reward - metrics.min_reward < MASTERED * span:
            warnings.append(f"entropy {number(entropy)} nats a token: the policy hardly explores")
    return warnings


# ── what the checks look at ──────────────────────────────────────────────────────────────────────────────────────────


class _Seen:
    """The epochs of a run, and the rollouts of the newest ones. What takes reading is read when a check asks for it."""

    def __init__(self, epochs: Sequence[Epoch], weights: Mapping[str, float], records: Sequence[Epoch]) -> None:
        self.epochs = [epoch for epoch in epochs if len(epoch.statistics.rewards)]
        """Those with rollouts that finished."""
        self.newest = self.epochs[-NEWEST:]
        self.last = list(epochs[-NEWEST:])
        """The newest ones, also those without rollouts."""
        self.weights = weights
        self._records = [epoch for epoch in records if len(epoch.statistics.rewards)]

    def unchecked(self) -> Iterator[str]:
        if not self.epochs:
            yield "nothing: no epoch has a rollout that finished"
            return
        if all(epoch.metrics.mean_entropy is None for epoch in self.newest):
            yield "entropy: it was not recorded (local_grpo records it)"
        if not any(epoch.train_metrics.get("kl") is not None for epoch in self.newest):
            yield "learning rate, clipping and gap: the training backend measured none of them"
        if sum(len(epoch.validations) for epoch in self.epochs) < 2:
            yield "validation: fewer than two (give Run validation= and validation_interval=)"

    # ── of rewards ───────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest finite reward of the whole run; NaN without one."""
        lows = [epoch.metrics.min_reward for epoch in self._records if math.isfinite(epoch.metrics.min_reward)]
        highs = [epoch.metrics.max_reward for epoch in self._records if math.isfinite(epoch.metrics.max_reward)]
        return min(lows, default=math.nan), max(highs, default=math.nan)

    @property
    def span(self) -> float:
        """How far apart the lowest and the highest reward of all epochs are."""
        low, high = self.bounds
        return high - low

    def level(self, epochs: Sequence[Epoch]) -> float:
        """Mean reward as a part of the run's range, from 0 to 1; NaN without rewards that differ."""
        means = [epoch.metrics.mean_reward for epoch in epochs if math.isfinite(epoch.metrics.mean_reward)]
        if not means or not self.span > NO_SPREAD:
            return math.nan
        return (sum(means) / len(means) - self.bounds[0]) / self.span

    @cached_property
    def mastered(self) -> bool:
        """Whether nearly every rollout now has the best reward, and that was learned: the first epoch was below it."""
        return self.level(self.newest) >= MASTERED and self.level(self._records[:1]) < MASTERED

    @cached_property
    def group_sizes(self) -> list[int]:
        return [int(size) for epoch in self.newest for size in epoch.statistics.counts]

    @cached_property
    def teaching(self) -> float:
        """Share of the newest epochs' groups whose rewards differ."""
        import numpy as np

        return float(np.concatenate([has_signal(epoch.statistics) for epoch in self.newest]).mean())

    @cached_property
    def first_trained(self) -> int | None:
        """The first epoch of the run that trained."""
        return next((epoch.index for epoch in self._records if epoch.trained), None)

    # ── of training ──────────────────────────────────────────────────────────────────────────────────────────────────

    def trained_with(self, name: str, epochs: Sequence[Epoch] | None = None) -> list[float]:
        """A training metric of those epochs that trained; of the newest ones by default."""
        among = self.newest if epochs is None else epochs
        values = [as_float(epoch.train_metrics.get(name)) for epoch in among if epoch.trained]
        return [value for value in values if math.isfinite(value)]

    # ── of rollouts ──────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def rollouts(self) -> RolloutColumns:
        return RolloutColumns(self.newest)


def _percent(share: float) -> str:
    """ "12 %"; one digit more where that would be 0 or 100 and is not."""
    percent = 100 * share
    return f"{percent:.1f} %" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.0f} %"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rewards_missing(seen: _Seen) -> Iterator[Finding]:
    import numpy as np

    if not seen.newest:
        return
    missing = np.isnan(seen.rollouts.rewards)
    share = float(missing.mean())
    if share < MISSING:
        return
    error = next((e.metrics.reward_error for e in reversed(seen.newest) if e.metrics.reward_error), None)
    yield Finding(
        "rewards_missing",
        "critical" if share >= MANY_MISSING else "warning",
        f"{int(missing.sum()):,} of {len(missing):,} rewards are missing ({_percent(share)})"
        + (f": {one_line(error, 160)}" if error else "; such rollouts are not trained on"),
        share,
        'run.rescore(only="failed") scores them again; mend the reward if it raises: run.trajectories().error says where',
        seen.rollouts.names(missing),
    )


def _rollouts_failed(seen: _Seen) -> Iterator[Finding]:
    failed = sum(epoch.metrics.failures for epoch in seen.last)
    asked = failed + sum(epoch.metrics.trajectories for epoch in seen.last)
    if not failed or failed < MISSING * asked:
        return
    share = failed / asked
    failures = [(epoch.index, failure) for epoch in seen.last for failure in epoch.collection.failures]
    errors = Counter(one_line(failure.error, 160) for _, failure in failures)
    names = []
    for index, failure in failures[:EVIDENCE]:
        names += trajectory_names(index, [failure.example_id], [failure.generation], [0])
    yield Finding(
        "rollouts_failed",
        "critical" if share >= MANY_MISSING else "warning",
        f"{failed:,} of {asked:,} rollouts failed ({_percent(share)}), most often with {errors.most_common(1)[0][0]}",
        share,
        "await run.rollout(example=...) shows one alone; retries= and item_timeout= of Run are for what passes by itself",
        tuple(names),
    )


def _no_spread(seen: _Seen) -> Iterator[Finding]:
    """Groups whose rewards do not differ teach nothing. Which advice helps depends on why."""
    if not seen.newest or not math.isfinite(seen.span):
        return
    rollouts = seen.rollouts
    if seen.span <= NO_SPREAD:
        yield Finding(
            "reward_constant",
            "critical",
            f"every reward so far is {number(seen.bounds[0])}: nothing can be learned from that",
            seen.bounds[0],
            "run.show() shows what was scored; give partial credit, and try it: run.rescore(new_reward)",
            rollouts.names(rollouts.group_of >= 0),
        )
        return
    sizes = sorted(seen.group_sizes)
    size = sizes[len(sizes) // 2] if sizes else 0
    if size == 1:
        yield Finding(
            "too_few_generations",
            "critical",
            "a group has 1 rollout with a reward, so there is nothing to compare it with",
            1,
            f"generations={FULL_GROUP} of Run",
            rollouts.names(rollouts.group_of >= 0),
        )
        return
    if 1 < size <= SMALL_GROUP:
        share = _expected_share(seen)
        if seen.teaching < 2 * TEACHING and share >= MORE_WITH_SIZE * max(
            seen.teaching, 1 / max(len(seen.group_sizes), 1)
        ):
            yield Finding(
                "too_few_generations",
                "warning",
                f"{_percent(seen.teaching)} of the groups teach with {size} generations, and about {_percent(share)} would with "
                f"{FULL_GROUP}",
                seen.teaching,
                f"generations={FULL_GROUP} of Run; run.signal() has the forecast for other sizes",
                rollouts.names(_without_spread(seen)),
            )
            return
    if seen.teaching >= TEACHING:
        return

    signals = group_signals(seen.newest, *seen.bounds)
    most = Counter(signal for signal in signals if signal in _SPREADLESS).most_common(1)
    if not most:
        return
    signal, groups = most[0]
    kind, what, step = _SPREADLESS[signal]
    chosen = [found == signal for found in signals]
    severity: Severity = "critical" if seen.teaching < TEACHING / 10 else "warning"
    if kind == "too_easy" and seen.mastered:
        severity, step = (
            "info",
            "the run has learned what these examples teach: stop here, or continue with harder ones",
        )
    yield Finding(
        kind,
        severity,
        f"{_percent(seen.teaching)} of the groups teach: in {groups:,} of {len(signals):,} {what}",
        groups / len(signals),
        step,
        rollouts.names(_in_groups(rollouts, chosen)),
    )


_SPREADLESS = {
    "all_best": (
        "too_easy",
        "every rollout has the best reward",
        "take harder examples, or a stricter reward: run.rescore(new_reward)",
    ),
    "all_worst": (
        "too_hard",
        "every rollout has the worst reward",
        "start with easier examples (curriculum={}), give partial credit, or use more generations",
    ),
    "all_equal": (
        "too_coarse",
        "all rollouts have one and the same reward between best and worst",
        "a finer-grained reward tells them apart; try it: run.rescore(new_reward)",
    ),
}
"""Signal of a group without spread -> kind of finding, what is so, and what can be done."""


def _expected_share(seen: _Seen) -> float:
    """Share of groups that would teach with FULL_GROUP generations."""
    import numpy as np

    groups = []
    for epoch in seen.newest:
        rewards, offsets = epoch.statistics.rewards, epoch.statistics.offsets
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            finite = rewards[start:stop][np.isfinite(rewards[start:stop])]
            if len(finite):
                groups.append(finite)
    return float(chance_of_spread(groups, [FULL_GROUP]).mean()) if groups else 0.0


def _without_spread(seen: _Seen) -> np.ndarray:
    import numpy as np

    spread = np.concatenate([has_signal(epoch.statistics) for epoch in seen.newest])
    return ~spread[seen.rollouts.group_of]


def _in_groups(rollouts: RolloutColumns, groups: Sequence[bool]) -> np.ndarray:
    import numpy as np

    return np.array(groups, dtype=bool)[rollouts.group_of]


def _components(seen: _Seen) -> Iterator[Finding]:
    """Components of a weighted reward: one that outweighs another, and one that is never reached."""
    import numpy as np

    if not seen.newest or len(seen.weights) < 2:
        return
    rollouts = seen.rollouts
    spreads: dict[str, float] = {}
    differs: dict[str, int] = {}
    for name, weight in seen.weights.items():
        values = rollouts.scores.get(name)
        if values is None or np.isfinite(values).sum() < FEW:
            continue
        known = values[np.isfinite(values)]
        if np.ptp(known) <= NO_SPREAD:
            if known[0] == 0 and all(epoch.metrics.scores.get(name) == 0 for epoch in seen.epochs):
                yield Finding(
                    "score_constant",
                    "warning",
                    f"the score {one_line(name, 60)!r} is 0 for all rollouts: what it rewards was never sampled, "
                    "so it teaches nothing",
                    0.0,
                    "show the format in the prompt, give partial credit for it, or warm up on examples of it first",
                    rollouts.names(values == 0),
                )
            continue
        inside = np.nan_to_num(rollouts.inside_groups(values))
        spreads[name] = abs(weight) * float(np.sqrt((inside**2).mean()))
        differs[name] = len(np.unique(rollouts.group_of[np.abs(inside) > NO_SPREAD]))
    if len(spreads) < 2:
        return
    largest = max(spreads, key=spreads.__getitem__)
    others = [name for name in spreads if name != largest and differs[name] >= VARIES * max(differs[largest], 1)]
    small = [name for name in others if spreads[largest] >= DOMINATES * spreads[name]]
    if not small:
        return
    name = min(small, key=spreads.__getitem__)
    share = spreads[largest] ** 2 / sum(spread**2 for spread in spreads.values())
    if spreads[name] > 0:
        times = f"{number(spreads[largest] / spreads[name])} times that of"
    else:
        times = "and none is left of"
    shown = np.abs(np.nan_to_num(rollouts.inside_groups(rollouts.scores[name]))) > NO_SPREAD
    yield Finding(
        "component_dominates",
        "warning",
        f"{one_line(largest, 60)!r} decides the reward: {_percent(share)} of its spread inside groups, {times} "
        f"{one_line(name, 60)!r}",
        share,
        f"bring them to one scale, and look first: run.rescore(weights={{{largest!r}: {seen.weights[largest] / DOMINATES:g}}})",
        rollouts.names(shown),
    )


def _falling(seen: _Seen) -> Iterator[Finding]:
    """A component that falls while the reward rises: another one pays for it."""
    import numpy as np

    if len(seen.epochs) < 2 or len(seen.weights) < 2 or not seen.span > NO_SPREAD:
        return
    gained = (seen.level(seen.newest) - seen.level(seen.epochs[:1])) * seen.span
    if not gained > 0:
        return
    changes = {}
    for name, weight in seen.weights.items():
        before = as_float(seen.epochs[0].metrics.scores.get(name))
        now = _mean([as_float(epoch.metrics.scores.get(name)) for epoch in seen.newest])
        if math.isfinite(now - before):
            changes[name] = weight * (now - before)
    if len(changes) < 2:
        return
    name, payer = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
    values = seen.rollouts.scores.get(name, np.empty(0))
    span = abs(seen.weights[name]) * float(np.ptp(values[np.isfinite(values)])) if np.isfinite(values).any() else 0.0
    if not -changes[name] >= max(FALLS * span, PAID * gained, NO_SPREAD):
        return
    before = as_float(seen.epochs[0].metrics.scores[name])
    now = before + changes[name] / seen.weights[name]
    rewards = np.concatenate([epoch.statistics.rewards for epoch in seen.newest])
    low = seen.weights[name] * values <= np.nanmin(seen.weights[name] * values) + NO_SPREAD
    yield Finding(
        "component_falls",
        "warning",
        f"the reward rose by {number(gained)} while its component {one_line(name, 60)!r} went from {number(before)} to "
        f"{number(now)}: {one_line(payer, 60)!r} pays for something else",
        changes[name],
        f"look at the rollouts that are paid best, change {payer!r}, and see what that would do: run.rescore(...)",
        seen.rollouts.names(low & (rewards >= np.nanmax(rewards[low]) - NO_SPREAD)),
    )


def _length(seen: _Seen) -> Iterator[Finding]:
    import numpy as np

    found: list[float] = []
    for epoch in seen.newest:
        table = trajectory_columns(epoch, ["tokens", "turns", "finish_reason"])
        tokens, messages = (table.column(name).fill_null(0).to_numpy() for name in ("tokens", "turns"))
        cut = np.array([reason == "length" for reason in table.column("finish_reason").to_pylist()], dtype=bool)
        correlation = length_correlation(epoch.statistics, tokens, messages, cut)
        if correlation is not None:
            found.append(correlation)
    if not found:
        return
    correlation = _mean(found)
    if min(each**2 for each in found) < LENGTH_EXPLAINS or abs(correlation) ** 2 < LENGTH_EXPLAINS:
        return
    rollouts = seen.rollouts
    order = np.argsort(-np.nan_to_num(rollouts.rewards, nan=-math.inf), kind="stable")
    best = np.zeros(len(rollouts), dtype=bool)
    best[order[:EVIDENCE]] = True
    yield Finding(
        "length_explains_reward",
        "warning",
        _length_sentence(correlation),
        correlation**2,
        "read the best rollouts (run.show()), and score what they say, not how long it takes: run.rescore(new_reward)",
        rollouts.names(best),
    )


def _length_sentence(correlation: float) -> str:
    which = "longer" if correlation > 0 else "shorter"
    share = _percent(correlation**2)
    return f"the reply's length explains {share} of what the rewards differ by inside groups: {which} is better"


# ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cut(seen: _Seen) -> Iterator[Finding]:
    if not seen.newest or len(seen.rollouts) < FEW:
        return
    cut = seen.rollouts.cut
    share = float(cut.mean())
    if share < CUT:
        return
    if share == 1.0:
        yield Finding(
            "end_token_never_sampled",
            "critical",
            f"all {len(cut):,} replies were cut at the token limit: the model never ends its turn",
            share,
            "raise max_tokens (run.live); if that ends none, tokenizer and template have another end token than the model",
            seen.rollouts.names(cut),
        )
        return
    yield Finding(
        "replies_cut",
        "critical" if share >= MANY_CUT else "warning",
        f"{int(cut.sum()):,} of {len(cut):,} replies were cut at the token limit ({_percent(share)}), and scored as they are",
        share,
        'run.live["llm.max_tokens"] = ... raises the limit; training={"truncated": "mask"} of Run leaves them out of training',
        seen.rollouts.names(cut),
    )


def _tools(seen: _Seen) -> Iterator[Finding]:
    if not seen.newest:
        return
    rollouts = seen.rollouts
    offered = rollouts.offered
    if offered.sum() < FEW:
        return
    lost = offered & ~rollouts.called & rollouts.looks_like_call
    share = float(lost.sum() / offered.sum())
    if share >= UNPARSED:
        yield Finding(
            "tool_calls_not_parsed",
            "critical" if share >= MANY_MISSING else "warning",
            f"{int(lost.sum()):,} of {int(offered.sum()):,} rollouts have a text that looks like a tool call and "
            "was not parsed as one",
            share,
            'name the format in which the model calls tools: tool_parser="hermes" of Run, for example',
            rollouts.names(lost),
        )
    elif not (offered & rollouts.called).any():
        yield Finding(
            "tools_never_called",
            "warning",
            f"tools were offered in {int(offered.sum()):,} rollouts, and called in none",
            0.0,
            "show a call in the prompt, or warm up on conversations with calls: what is never sampled is never rewarded",
            rollouts.names(offered),
        )


def _repeated(seen: _Seen) -> Iterator[Finding]:
    import numpy as np

    if not seen.newest or len(seen.rollouts) < FEW:
        return
    rollouts = seen.rollouts
    replies = rollouts.replies
    reply, times = Counter(replies).most_common(1)[0]
    same = np.array([each == reply for each in replies], dtype=bool)
    questions = {example for example, is_same in zip(rollouts.examples, same.tolist(), strict=True) if is_same}
    share = times / len(replies)
    if share >= REPEATED and len(questions) > 3 and not seen.level(seen.newest) >= MASTERED:
        yield Finding(
            "replies_all_alike",
            "critical",
            f"{times:,} of {len(replies):,} replies are the same, to {len(questions):,} questions: {one_line(reply, 60)!r}",
            share,
            "go back to an epoch before that (run.fork(epoch=...)), with a smaller learning_rate or a kl_coef above 0",
            rollouts.names(same),
        )
    looping = np.array([_repeats_itself(each) for each in replies], dtype=bool)
    share = float(looping.mean())
    if share >= LOOPS:
        yield Finding(
            "replies_repeat_themselves",
            "warning",
            f"{int(looping.sum()):,} of {len(replies):,} replies say the same again and again ({_percent(share)})",
            share,
            "see what it earns them (run.show()); a smaller learning_rate or a kl_coef above 0 keeps the language of the start",
            rollouts.names(looping),
        )


def _repeats_itself(text: str) -> bool:
    raw = text.encode("utf-8", "backslashreplace")
    return len(raw) >= LOOP_LENGTH and len(zlib.compress(raw, 1)) < LOOP_RATIO * len(raw)


# ── the policy and its training ──────────────────────────────────────────────────────────────────────────────────────


def _entropy(seen: _Seen) -> Iterator[Finding]:
    known = [(epoch, epoch.metrics.mean_entropy) for epoch in seen.epochs if epoch.metrics.mean_entropy is not None]
    if not known or not seen.newest:
        return
    last, now = known[-1]
    first, lowest = known[0][1], min(entropy for _, entropy in known)
    fell = first < ENTROPY_LOW or now < ENTROPY_FALL * first
    if now < ENTROPY_LOW and fell and seen.teaching < TEACHING and not seen.level(seen.newest) >= MASTERED:
        yield Finding(
            "entropy_collapsed",
            "critical" if seen.teaching < TEACHING / 10 else "warning",
            f"the policy's entropy is {number(now)} nats a token"
            + (f", from {number(first)} in epoch {known[0][0].index}" if first > now else "")
            + ": it says the same each time, so groups do not differ",
            now,
            'raise the temperature and lower learning_rate; run.show(heat="entropy") shows where there is still a choice',
            (f"e{last.index}",),
        )
    if now > ENTROPY_HIGH and len(known) > 1 and now > ENTROPY_RISE * lowest:
        yield Finding(
            "entropy_exploded",
            "warning",
            f"the policy's entropy is {number(now)} nats a token, {number(now / max(lowest, 1e-9))} times its lowest: it "
            "unlearns its language",
            now,
            "go back to an epoch before that (run.fork(epoch=...)), with a smaller learning_rate or a kl_coef above 0",
            (f"e{last.index}",),
        )


def _training(seen: _Seen) -> Iterator[Finding]:
    failed = [epoch for epoch in seen.last if epoch.job and epoch.job.status == TrainingStatusEnum.FAILED]
    if failed:
        yield Finding(
            "training_failed",
            "critical",
            f"{count(len(failed), 'training job')} of the newest {count(len(seen.last), 'epoch')} failed: "
            + one_line(failed[-1].job.message or "no reason was given", 240),  # type: ignore[union-attr]
            len(failed),
            "run[-1].job.message is the whole error",
            tuple(f"e{epoch.index}" for epoch in failed),
        )
    where = tuple(f"e{epoch.index}" for epoch in seen.newest if epoch.trained)
    yield from _sampler(seen, where)
    kl, clipped = _mean(seen.trained_with("kl")), _mean(seen.trained_with("clip_fraction"))
    rate = _mean(seen.trained_with("learning_rate"))
    first = seen.first_trained
    later = [as_float(epoch.train_metrics.get("kl")) for epoch in seen.newest if epoch.trained and epoch.index != first]
    if clipped > CLIPPED or (_mean(later) > KL_LARGE if later else kl > KL_FIRST):
        yield Finding(
            "learning_rate_too_large",
            "warning",
            f"a training job moves the policy by {number(kl)} nats a token (KL); {_percent(clipped)} of the tokens are clipped",
            max(clipped, kl),
            f"{_rate(rate / 5)}: a fifth of what it is; or fewer optimizer_steps and inner_epochs",
            where,
        )
    moved = seen.trained_with("weights_moved")
    enough = len(seen.trained_with("kl")) > 1 or len(moved) > 1
    if enough and (kl < KL_SMALL or (moved and max(moved) < MOVED)):
        what = f"moves the policy by {number(kl)} nats a token (KL)"
        if moved:
            what += f" and changes {_percent(max(moved))} of the weights"
        yield Finding(
            "learning_rate_too_small",
            "warning",
            f"a training job {what}: it hardly changes anything",
            kl,
            f"{_rate(10 * rate)}: ten times what it is",
            where,
        )


def _sampler(seen: _Seen, where: tuple[str, ...]) -> Iterator[Finding]:
    """Whether something else sampled than is trained."""
    # Of older weights, log probabilities differ as they should.
    on_policy = [epoch for epoch in seen.newest if not epoch.metrics.version_lag]
    gap, effective = _mean(seen.trained_with("logprob_gap", on_policy)), _mean(seen.trained_with("effective_samples"))
    corrected = bool(seen.trained_with("importance_bounded"))
    if not corrected and gap > max(seen.trained_with("rounding_gap"), default=GAP):
        yield Finding(
            "logprob_gap",
            "warning",
            f"before the first step, training's log probabilities differ from the recorded ones by {number(gap)} nats a token",
            gap,
            "sample with the adapter's own policy, at the temperature that is recorded; see run.plot_training()",
            where,
        )
    if effective < (EFFECTIVE_CORRECTED if corrected else EFFECTIVE):
        largest = max(seen.trained_with("importance_ratio_max"), default=math.nan)
        yield Finding(
            "sampler_differs",
            "warning",
            f"the sampler draws from another distribution than is trained: {_percent(effective)} of its samples count "
            f"(effective sample size), and a probability is up to {number(largest)} times as large in training; "
            + ("that is much to correct" if corrected else "nothing corrects for it"),
            effective,
            "sample with the weights, the dtype and at the temperature that are trained; see run.plot_training()"
            if corrected
            else 'training={"importance_cap": 2.0} of Run corrects for it (truncated importance sampling)',
            where,
        )


def _rate(rate: float) -> str:
    return f'run.live["adapter.learning_rate"] = {rate:.1g}' if math.isfinite(rate) else "change learning_rate"


def _drift(seen: _Seen) -> Iterator[Finding]:
    continued = sum(epoch.metrics.continued_turns or 0 for epoch in seen.newest)
    drifted = sum(epoch.metrics.drifted_turns or 0 for epoch in seen.newest)
    if continued < FEW or drifted < DRIFTED * continued:
        return
    yield Finding(
        "drift",
        "warning",
        f"{drifted:,} of {continued:,} turns that continue a conversation were rendered anew ({_percent(drifted / continued)}), "
        "and each is trained on by itself",
        drifted / continued,
        "send the messages back as they came: await llm.chat([*messages, reply, ...]) with the reply itself",
        seen.rollouts.names(seen.rollouts.drifted),
    )


def _memorised(seen: _Seen) -> Iterator[Finding]:
    if len(seen.epochs) < 2 or not seen.span > NO_SPREAD:
        return
    checks = [check for epoch in seen.epochs for check in epoch.validations if math.isfinite(check.mean_reward)]
    if len(checks) < 2:
        return
    gained = (seen.level(seen.newest) - seen.level(seen.epochs[:1])) * seen.span
    followed = checks[-1].mean_reward - checks[0].mean_reward
    if not gained >= LEARNED * seen.span or followed >= FOLLOWED * gained:
        return
    yield Finding(
        "memorised",
        "warning",
        f"the reward in training rose by {number(gained)}, the one in validation by {number(followed)} "
        f"(now {number(checks[-1].mean_reward)}): it learns the examples, not the task",
        gained - followed,
        "take more or other training examples; run.fork(epoch=...) goes back to where validation was best",
        tuple(f"e{check.epoch}" for check in (checks[0], checks[-1])),
    )


CHECKS: tuple[Callable[[_Seen], Iterator[Finding]], ...] = (
    _training,
    _rollouts_failed,
    _rewards_missing,
    _no_spread,
    _cut,
    _tools,
    _components,
    _falling,
    _length,
    _repeated,
    _entropy,
    _drift,
    _memorised,
)
"""In this order findings of one severity are shown: what hinders all else comes first."""
