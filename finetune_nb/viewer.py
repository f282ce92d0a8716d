"""Records shown: a trajectory, a failed rollout, an epoch, a run, each as HTML; epochs and runs also as plain text.

Pure functions that return one self-contained piece of HTML, at most 200 kB of it: long texts are cut, and what is left
out is said. All text is untrusted and goes through html.py, which also owns the style. Turns are set in
conversation.py, figures are made in plots.py, the control panel in panel.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .conversation import Turn, conversation, short, turn_of
from .html import Html, bar, cut, duration, element, number, plain, sparkline, table, view
from .types import (
    Epoch,
    GroupReason,
    LLMCall,
    RolloutFailure,
    TrainingStatusEnum,
    Trajectory,
    Validation,
)

__all__ = ["epoch_html", "epoch_text", "failure_html", "run_html", "run_text", "trajectory_html"]

ERROR_LIMIT = 2_000
"""Characters shown of an error."""
SHORT = 300
"""Characters shown of an id or a note."""

REASONS = {
    GroupReason.KEPT: "kept",
    GroupReason.NO_REWARD_SPREAD: "left out: their rewards hardly differ",
    GroupReason.BEYOND_PERCENTILE: "left out: beyond the curriculum's percentile",
    GroupReason.SUBSAMPLED: "left out: not drawn in the random subsample",
    GroupReason.NO_REWARD: "left out: no trajectory has a reward",
    GroupReason.INFINITE_REWARD: "left out: a reward is infinite",
    GroupReason.UNDECIDED: "undecided: the epoch ended before groups were chosen",
}
"""Every reason in words; they go on from a number of groups."""


# ── one rollout ──────────────────────────────────────────────────────────────────────────────────────────────────────


def trajectory_html(trajectory: Trajectory) -> str:
    """A trajectory as a conversation: role, text, tool calls and finish reason of every turn, under a head with reward,
    scores, generation and policy version. At most 200 kB, whatever its length."""
    metadata = trajectory.metadata or {}
    head = [_title(f"example {short(metadata.get('id'))}", _generation(metadata.get("generation")))]
    if math.isnan(trajectory.reward):
        why = metadata.get("reward_error") or "no reason was recorded"
        head.append(_bad("no reward: ", cut(why, ERROR_LIMIT)))
    else:
        head.append(element("div", "reward ", element("strong", number(trajectory.reward))))
    facts = [("scores", _scores(metadata.get("scores"))), ("policy version", metadata.get("policy_version"))]
    facts.append(("reasoning", metadata.get("reasoning") and cut(metadata["reasoning"], SHORT)))
    head.append(_facts(facts))
    return view(*head, *conversation([turn_of(item) for item in trajectory.episode]))


def failure_html(failure: RolloutFailure) -> str:
    """A rollout that failed: its error, and the conversation up to there as far as model calls were recorded."""
    calls = [step.data.payload for step in failure.steps if step.data and isinstance(step.data.payload, LLMCall)]
    messages = [*calls[-1].messages, {**calls[-1].reply, "finish_reason": calls[-1].finish_reason}] if calls else []
    so_far = f"{_count(len(calls), 'model call')} until then" if calls else "no model call was recorded"
    return view(
        _title(f"example {short(failure.example_id)}", _generation(failure.generation), "failed"),
        _bad("error: ", cut(failure.error, ERROR_LIMIT)),
        element("div", so_far, class_="ft-dim"),
        *conversation([Turn(str(m.get("role")), m.get("content"), m) for m in messages]),
    )


# ── an epoch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def epoch_html(epoch: Epoch) -> str:
    """An epoch as a card: its rewards, which groups were trained on and why the others were not, failures, the training
    job, validation, versions, times."""
    metrics = epoch.metrics
    low, _, high = metrics.group_quantiles
    spread = f" (most groups {number(low)} to {number(high)})" if math.isfinite(low) else ""
    reward = element("span", bar(metrics.mean_reward) if 0 <= metrics.mean_reward <= 1 else number(metrics.mean_reward))
    by_reason = epoch.selection.left_out()
    groups = [_line(f"{metrics.kept_groups:,} of {metrics.groups:,} {REASONS[GroupReason.KEPT]}")]
    groups += [_line(f"{len(ids):,} {REASONS[reason]}", _some(ids)) for reason, ids in by_reason.items()]
    if epoch.selection.inferred:
        groups.append(_line("the Trainer made its own choice; the reasons are concluded from it"))
    curriculum = epoch.curriculum
    return view(
        _title(f"epoch {epoch.index}", short(epoch.run_id, 80)),
        _facts(
            [
                ("mean reward", [reward, spread]),
                ("trajectories", [number(metrics.trajectories), f", {metrics.sampled_tokens:,} sampled tokens"]),
                ("groups that teach", f"{metrics.groups_with_spread:,} of {metrics.groups:,} (their rewards differ)"),
                ("groups", groups),
                ("curriculum", curriculum.enabled and f"percentile {curriculum.percentile:.3g}, {curriculum.schedule}"),
                ("failures", _failures(epoch.collection.failures if metrics.failures else ())),
                ("scores (mean)", _scores(metrics.scores)),
                ("training", _training(epoch)),
                ("validation", [_line(_validation(each)) for each in epoch.validations]),
                ("policy version", _versions(*epoch.policy_versions)),
                ("time", ", ".join(f"{short(part, 40)} {duration(took)}" for part, took in epoch.seconds.items())),
            ]
        ),
    )


def epoch_text(epoch: Epoch) -> str:
    """An epoch as one line: `epoch 3  reward 0.61  31/40 groups teach  0 failures  trained in 0.5 s  1.2 s`."""
    metrics = epoch.metrics
    parts = [f"epoch {epoch.index}", f"reward {number(metrics.mean_reward)}"]
    parts += [f"{metrics.groups_with_spread}/{metrics.groups} groups teach", _count(metrics.failures, "failure")]
    parts.append(_job(epoch))
    parts += [f"validation {number(each.mean_reward)}" for each in epoch.validations[-1:]]
    if "total" in epoch.seconds:
        parts.append(duration(epoch.seconds["total"]))
    return "  ".join(parts)


def _job(epoch: Epoch) -> str:
    """What became of the training, in one short line."""
    if epoch.job is None:
        return f"not trained: {_one_line(epoch.reason or 'no reason was recorded')}"
    if epoch.job.status != TrainingStatusEnum.COMPLETED:
        return f"training {epoch.job.status}" + (f": {_one_line(epoch.job.message)}" if epoch.job.message else "")
    took = epoch.seconds.get("training")
    return "trained" if took is None else f"trained in {duration(took)}"


def _training(epoch: Epoch) -> Any:
    job = epoch.job
    if job is None:
        return element("strong", "nothing was trained: ", cut(epoch.reason or "no reason was recorded", SHORT))
    status = f"{job.status} ({short(job.backend, 80)})"
    good = job.status == TrainingStatusEnum.COMPLETED
    message = job.message and element("div", cut(job.message, 4 * SHORT), class_=None if good else "ft-bad")
    return [
        status if good else element("strong", status, class_="ft-bad"),
        message,
        _line(_scores(epoch.train_metrics)),
    ]


def _failures(failures: Sequence[RolloutFailure]) -> Any:
    if not failures:
        return "none"
    kinds: dict[str, list[RolloutFailure]] = {}
    for failure in failures:
        kinds.setdefault(failure.error, []).append(failure)
    shown = [_line(element("strong", f"{len(failures):,} failed", class_="ft-bad"))]
    for error, those in list(kinds.items())[:5]:
        examples = [failure.example_id for failure in those]
        shown.append(_line(f"{len(those):,} × {cut(error, SHORT)}", _some(examples)))
    if len(kinds) > 5:
        shown.append(_line(f"and {len(kinds) - 5:,} other errors"))
    return shown


def _validation(validation: Validation) -> str:
    if validation.error:
        return f"failed: {cut(validation.error, SHORT)}"
    found = f"{number(validation.mean_reward)} on {_count(validation.examples, 'example')}"
    return f"{found} in {duration(validation.seconds)}" if math.isfinite(validation.seconds) else found


def _versions(sampled: int | None, trained: int | None) -> str:
    if sampled is None and trained is None:
        return ""
    before, after = ("unknown" if version is None else str(version) for version in (sampled, trained))
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
    """A run: its state, the mean reward of all epochs as a line, and the last ten epochs as a table."""
    rewards = [epoch.metrics.mean_reward for epoch in epochs]
    where = [("model", model and short(model)), ("folder", folder and short(folder))]
    body = [_title(f"run {short(name, 120)}", state, _count(len(epochs), "epoch")), _facts(where)]
    if error:
        body.append(_bad("error: ", cut(error, ERROR_LIMIT)))
    if not epochs:
        return view(*body, element("div", "no epoch yet", class_="ft-dim"))
    line = sparkline(rewards, _course(rewards))
    body.append(element("div", _course(rewards), " ", line))
    headers = ["epoch", "reward", "groups that teach", "kept", "failures", "validation", "time", "training"]
    shown = epochs[-10:]
    caption = f"the last {len(shown)} of {len(epochs):,} epochs" if len(shown) < len(epochs) else None
    return view(*body, table([_row(epoch) for epoch in shown], headers, caption))


def run_text(
    *, name: str, state: str, epochs: Sequence[Epoch], error: str | None = None, folder: str | None = None
) -> str:
    """A run in a few lines, for terminals: its state, and the last three epochs."""
    lines = [
        f"run {_one_line(name)}  {state}  {_count(len(epochs), 'epoch')}" + (f"  {_one_line(folder)}" if folder else "")
    ]
    if error:
        lines.append(f"error: {_one_line(error)}")
    return "\n  ".join([*lines, *map(epoch_text, epochs[-3:])])


def _row(epoch: Epoch) -> list[Any]:
    metrics = epoch.metrics
    validation = epoch.validations[-1] if epoch.validations else None
    checked = "" if validation is None else "failed" if validation.error else number(validation.mean_reward)
    teach, took = (
        text.replace(" ", "\u00a0")  # stays on one line
        for text in (f"{metrics.groups_with_spread:,} of {metrics.groups:,}", duration(epoch.seconds.get("total")))
    )
    return [epoch.index, metrics.mean_reward, teach, metrics.kept_groups, metrics.failures, checked, took, _job(epoch)]


def _course(rewards: Sequence[float]) -> str:
    finite = [reward for reward in rewards if math.isfinite(reward)]
    if not finite:
        return "no epoch has a reward"
    if len(finite) == 1:
        return f"mean reward {number(finite[0])}"
    return f"mean reward from {number(finite[0])} to {number(finite[-1])}, at best {number(max(finite))}"


# ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _title(*parts: str) -> Html:
    return element("div", " · ".join(part for part in parts if part), class_="ft-title")


def _facts(rows: Iterable[tuple[str, Any]]) -> Html:
    """A table of what there is: rows without a value are left out; 0 is a value."""
    given = [row for row in rows if row[1] or (row[1] == 0 and row[1] is not False)]
    return table(given) if given else Html()


def _scores(scores: Any) -> str:
    """Numbers by name: "correct 1 · length 0.4"."""
    if not isinstance(scores, Mapping):
        return ""
    shown = [f"{short(name, 80)} {number(value)}" for name, value in list(scores.items())[:24]]
    return " · ".join(shown) + (f" · and {len(scores) - 24:,} more" if len(scores) > 24 else "")


def _some(examples: Sequence[Any], most: int = 5) -> Html:
    """The first of some examples, in brackets."""
    ids = ", ".join(short(example, 40) for example in examples[:most])
    return element("span", f" ({ids}{', …' if len(examples) > most else ''})", class_="ft-dim")


def _line(*parts: Any) -> Html:
    return element("div", *parts)


def _bad(label: str, text: str) -> Html:
    return element("div", element("strong", label, class_="ft-bad"), element("pre", text, dir="auto"))


def _one_line(text: Any) -> str:
    return " ".join(plain(cut(text, SHORT)).split())


def _generation(generation: Any) -> str:
    return "" if generation is None else f"generation {short(generation, 40)}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
