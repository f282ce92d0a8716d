"""Shows an epoch or a run, as HTML and as plain text.

Each view is self-contained HTML of at most 200 kB: long texts are cut, and omissions are stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..analysis.diagnosis import epoch_warnings
from ..analysis.reasons import REASONS
from ..text import SHORT, count, cut, duration, kinds_of_errors, number, one_line, plain, short, trend
from ..types import (
    WARM_UP,
    Epoch,
    EpochMetrics,
    GroupReason,
    RolloutFailure,
    TrainingStatusEnum,
    Validation,
    as_float,
)
from .html import (
    ERROR_LIMIT,
    bar,
    drifted,
    element,
    error_block,
    facts_table,
    row,
    scores,
    some_examples,
    sparkline,
    table,
    title,
    view,
)

__all__ = [
    "epoch_html",
    "epoch_text",
    "run_html",
    "run_text",
]

LINE_LIMIT = 160
"""Most characters of the missing rewards in a line about an epoch."""
CELL_LIMIT = 60
"""Most characters of them in a table."""


# ── an epoch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def epoch_html(epoch: Epoch) -> str:
    """An epoch as HTML: its rewards, which groups were kept and trained on, why the others were not, failures, missing
    rewards, the training job, validation, policy versions and times."""
    metrics, curriculum = epoch.metrics, epoch.curriculum
    times = [f"{short(part, 40)} {duration(took)}" for part, took in epoch.seconds.items()]
    if epoch.kind == WARM_UP:
        rows = [
            ("warm-up", _warm_up(epoch)),
            ("training", _training(epoch)),
            ("policy version", _versions(*epoch.policy_versions, 0)),
            ("time", ", ".join(times)),
        ]
        return view(title(f"epoch {epoch.index}", short(epoch.run_id, 80), "warm-up"), facts_table(rows))
    rows = [
        ("mean reward", _reward(metrics)),
        ("trajectories", [number(metrics.trajectories), f", {metrics.sampled_tokens:,} sampled tokens"]),
        ("groups that teach", f"{metrics.groups_with_spread:,} of {metrics.groups:,} (their rewards differ)"),
        ("groups", _groups(epoch)),
        ("curriculum", curriculum.enabled and f"percentile {curriculum.percentile:.3g}, {curriculum.schedule}"),
        ("drift", drifted(metrics)),
        ("failures", _failures(epoch.collection.failures if metrics.failures else ())),
        ("rewards missing", _missing(metrics)),
        ("warnings", [row(element("strong", warning, class_="ft-bad")) for warning in epoch_warnings(metrics)]),
        ("scores (mean)", scores(metrics.scores)),
        ("training", _training(epoch)),
        ("validation", [row(_validation(each)) for each in epoch.validations]),
        ("policy version", _versions(*epoch.policy_versions, metrics.version_lag or 0)),
        ("time", ", ".join(times)),
    ]
    return view(title(f"epoch {epoch.index}", short(epoch.run_id, 80)), facts_table(rows))


def _reward(metrics: EpochMetrics) -> list[Any]:
    """The mean reward, as a bar if it is between 0 and 1, and the range of most groups."""
    mean = metrics.mean_reward
    shown = element("span", bar(mean) if 0 <= mean <= 1 else number(mean))
    low, _, high = metrics.group_quantiles
    return [shown, f" (most groups {number(low)} to {number(high)})" if math.isfinite(low) else ""]


def _groups(epoch: Epoch) -> list[Any]:
    """How many groups were kept, how many of them were trained on, and how many were left out, by reason."""
    metrics = epoch.metrics
    lines = [row(f"{metrics.kept_groups:,} of {metrics.groups:,} {REASONS[GroupReason.KEPT].sentence}")]
    if epoch.trained_groups is not None:
        lines.append(row(f"{epoch.trained_groups:,} trained on"))
    for reason, examples in epoch.selection.left_out().items():
        lines.append(row(f"{len(examples):,} {REASONS[reason].sentence}", some_examples(examples)))
    if epoch.selection.inferred:
        lines.append(row("the Trainer made its own choice; the reasons are concluded from it"))
    return lines


def _warm_up(epoch: Epoch) -> list[Any]:
    """How many demonstrations were learned, the loss of each step as a line, and the rows that were left out."""
    found, metrics = epoch.warm_up, epoch.train_metrics
    assert found is not None  # asked for such an epoch alone
    lines: list[Any] = [row(f"{_demonstrations(epoch)}, passes: {number(as_float(metrics.get('passes')))}")]
    for what, losses in (("loss", found.losses), ("held-out loss", found.held_out_losses)):
        if losses:
            said = f"{what} {number(losses[0])} → {number(losses[-1])}"
            lines.append(row(element("span", said), " ", sparkline(losses, said)))
    for error in found.errors[:5]:
        what = "held-out row" if error.held_out else "row"
        lines.append(row(element("strong", f"{what} {error.row}: ", cut(error.error, SHORT), class_="ft-bad")))
    if len(found.errors) > 5:
        lines.append(row(f"and {count(len(found.errors) - 5, 'other error')}"))
    return lines


def _demonstrations(epoch: Epoch) -> str:
    metrics = epoch.train_metrics
    rows, left_out = (as_float(metrics.get(name)) for name in ("rows", "rows_left_out"))
    text = f"{number(rows)} demonstrations" if rows != 1 else "1 demonstration"
    return f"{text}, {number(left_out)} left out" if left_out > 0 else text


def _warm_up_text(epoch: Epoch) -> str:
    """A warm-up as one line: `epoch 0  warm-up on 40 demonstrations  loss 4.1 → 0.6  trained in 0.5 s  0.6 s`."""
    metrics = epoch.train_metrics
    parts = [f"epoch {epoch.index}", f"warm-up on {_demonstrations(epoch)}"]
    for what, before, after in _LOSSES:
        if math.isfinite(as_float(metrics.get(after))):
            parts.append(f"{what} {number(as_float(metrics.get(before)))} → {number(as_float(metrics.get(after)))}")
    parts.append(_job(epoch))
    if "total" in epoch.seconds:
        parts.append(duration(epoch.seconds["total"]))
    return "  ".join(parts)


_LOSSES = (("loss", "first_loss", "last_loss"), ("held-out", "held_out_loss_before", "held_out_loss"))
"""What a warm-up's line says, and the metrics in which it is found."""


def epoch_text(epoch: Epoch) -> str:
    """An epoch as one line: `epoch 3  reward 0.61  31/40 groups teach  0 failures  trained in 0.5 s  1.2 s`."""
    if epoch.kind == WARM_UP:
        return _warm_up_text(epoch)
    metrics = epoch.metrics
    parts = [
        f"epoch {epoch.index}",
        f"reward {number(metrics.mean_reward)}",
        f"{metrics.groups_with_spread}/{metrics.groups} groups teach",
        count(metrics.failures, "failure"),
    ]
    if metrics.drifted_turns:
        parts.append(f"{count(metrics.drifted_turns, 'turn')} drifted")
    missing = metrics.rewards_missing_text
    if missing and missing not in (epoch.reason or ""):
        parts.append(one_line(missing, LINE_LIMIT))
    parts += epoch_warnings(metrics)
    parts.append(_job(epoch))
    if epoch.validations:
        newest = epoch.validations[-1]
        missing = f" ({count(newest.rewards_missing, 'reward')} missing)" if newest.rewards_missing else ""
        parts.append(f"validation {number(newest.mean_reward)}{missing}")
    if "total" in epoch.seconds:
        parts.append(duration(epoch.seconds["total"]))
    return "  ".join(parts)


def _job(epoch: Epoch) -> str:
    """The outcome of training in one short line."""
    if epoch.job is None:
        return f"not trained: {one_line(epoch.reason or 'no reason was recorded')}"
    if epoch.job.status != TrainingStatusEnum.COMPLETED:
        return f"training {epoch.job.status}" + (f": {one_line(epoch.job.message)}" if epoch.job.message else "")
    if not epoch.trained:
        return f"not trained: {one_line(epoch.job.message or 'no optimizer step was made')}"
    took = epoch.seconds.get("training")
    trained = "trained"
    if epoch.trained_groups is not None and epoch.trained_groups < epoch.metrics.kept_groups:
        trained += f" on {epoch.trained_groups} of {count(epoch.metrics.kept_groups, 'kept group')}"
    return trained if took is None else f"{trained} in {duration(took)}"


def _training(epoch: Epoch) -> Any:
    """The training job: status, message and metrics."""
    job = epoch.job
    if job is None:
        return element("strong", "nothing was trained: ", cut(epoch.reason or "no reason was recorded", SHORT))
    status: Any = f"{job.status} ({short(job.backend, 80)})"
    trouble = None if job.status == TrainingStatusEnum.COMPLETED else "ft-bad"
    if trouble:
        status = element("strong", status, class_=trouble)
    message = job.message and element("div", cut(job.message, 4 * SHORT), class_=trouble)
    return [status, message, row(scores(epoch.train_metrics))]


def _missing(metrics: EpochMetrics) -> Any:
    """How many rewards are missing, and the most frequent reason."""
    if not metrics.rewards_missing:
        return ""
    return element("strong", cut(metrics.rewards_missing_text.removeprefix("rewards missing "), SHORT), class_="ft-bad")


def _failures(failures: Sequence[RolloutFailure]) -> Any:
    """The number of failed rollouts, and the five most frequent errors with their examples."""
    if not failures:
        return "none"
    kinds = kinds_of_errors(failure.error for failure in failures)
    shown = [row(element("strong", f"{len(failures):,} failed", class_="ft-bad"))]
    for error, places in kinds[:5]:
        examples = [failures[place].example_id for place in places]
        shown.append(row(f"{len(places):,} × {cut(error, SHORT)}", some_examples(examples)))
    if len(kinds) > 5:
        shown.append(row(f"and {count(len(kinds) - 5, 'other error')}"))
    return shown


def _validation(validation: Validation) -> str:
    if validation.error:
        return f"failed: {cut(validation.error, SHORT)}"
    found = f"{number(validation.mean_reward)} on {count(validation.examples, 'example')}"
    if validation.rewards_missing:
        why = f": {cut(validation.reward_error, SHORT)}" if validation.reward_error else ""
        found += f", rewards missing {validation.rewards_missing:,}{why}"
    return f"{found} in {duration(validation.seconds)}" if math.isfinite(validation.seconds) else found


def _versions(sampled: int | None, trained: int | None, lag: int) -> str:
    if sampled is None and trained is None:
        return ""
    before, after = ("unknown" if version is None else str(version) for version in (sampled, trained))
    if sampled is not None and lag:
        return f"{before} sampled, {sampled + lag} before training, {after} after it"
    return f"{before}, unchanged" if before == after else f"{before} sampled, {after} after training"


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_html(
    *,
    name: str,
    state: str,
    epochs: Sequence[Epoch],
    error: str | None = None,
    folder: str | None = None,
    model: str | None = None,
) -> str:
    """A run as HTML: its state, the mean reward of all epochs as a line, and the last ten epochs as a table."""
    rewards = [epoch.metrics.mean_reward for epoch in epochs]
    where = [("model", model and short(model)), ("folder", folder and short(folder))]
    body = [title(f"run {short(name, 120)}", state, count(len(epochs), "epoch")), facts_table(where)]
    if error:
        body.append(error_block("error: ", cut(error, ERROR_LIMIT)))
    if not epochs:
        return view(*body, element("div", "no epoch yet", class_="ft-dim"))
    went = trend(rewards, none="", highest="at best")
    said = f"mean reward {went}" if went else "no epoch has a reward"
    body.append(element("div", said, " ", sparkline(rewards, said)))
    headers = ["epoch", "reward", "groups that teach", "kept", "failures", "validation", "time", "training"]
    shown = epochs[-10:]
    if any(epoch.metrics.rewards_missing for epoch in shown):
        headers.insert(5, "rewards missing")
    caption = f"the last {len(shown)} of {len(epochs):,} epochs" if len(shown) < len(epochs) else None
    rows = [_row(epoch, "rewards missing" in headers) for epoch in shown]
    return view(*body, table(rows, headers, caption))


def run_text(
    *,
    name: str,
    state: str,
    epochs: Sequence[Epoch],
    error: str | None = None,
    folder: str | None = None,
    model: str | None = None,
) -> str:
    """A run as a few lines of text: its state, and the last three epochs."""
    lines = [f"run {one_line(name)}  {one_line(state)}  {count(len(epochs), 'epoch')}"]
    if folder:
        lines[0] += f"  {one_line(folder)}"
    if model:
        lines.append(f"model: {one_line(model)}")
    if error:
        lines.append(f"error: {one_line(error)}")
    return plain("\n  ".join([*lines, *map(epoch_text, epochs[-3:])]))


def _row(epoch: Epoch, with_missing: bool) -> list[Any]:
    """The row of an epoch in the table of a run. with_missing: whether it has a column for missing rewards."""
    metrics = epoch.metrics
    checked = ""
    if epoch.validations:
        newest = epoch.validations[-1]
        checked = "failed" if newest.error else number(newest.mean_reward)
    teach = f"{metrics.groups_with_spread:,} of {metrics.groups:,}"
    if epoch.kind == WARM_UP:
        teach = f"warm-up on {_demonstrations(epoch)}"
    return [
        epoch.index,
        metrics.mean_reward,
        _on_one_line(teach),
        metrics.kept_groups,
        metrics.failures,
        *([_missing_cell(metrics)] if with_missing else []),
        checked,
        _on_one_line(duration(epoch.seconds.get("total"))),
        _job(epoch),
    ]


def _missing_cell(metrics: EpochMetrics) -> str:
    """The missing rewards of an epoch in the table of a run: "44 of 48: RateLimitError: ..."."""
    if not metrics.rewards_missing:
        return ""
    return one_line(metrics.rewards_missing_text.removeprefix("rewards missing "), CELL_LIMIT)


def _on_one_line(text: str) -> str:
    """Replace spaces by non-breaking ones."""
    return text.replace(" ", "\u00a0")
