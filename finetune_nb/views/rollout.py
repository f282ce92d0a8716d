"""Shows rollouts as HTML and text: a single trajectory, a failed rollout, and a rollout with the rest of its group.

Each view is self-contained HTML of at most 200 kB: long texts are cut, and omissions are stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ..analysis.reasons import REASONS
from ..analysis.rollout_group import RolloutGroup
from ..errors import RunError
from ..text import SHORT, as_json, beginning, count, cut, duration, number, one_line, plain, short, signed
from ..types import LLMCall, MessageKey, RolloutFailure, Trajectory, finish_reason, sampled_tokens
from .conversation import SIZE_LIMIT, Setting, Turn, conversation, missing_entropy, turn_of
from .html import ERROR_LIMIT, Html, bar, details, element, error_block, facts_table, row, scores, table, title, view
from .tokens import Heat, check_heat

__all__ = [
    "RolloutView",
    "failure_html",
    "trajectory_html",
]


VIEW_LIMIT = 194_000
"""Bytes for a whole view; the rest of the 200 kB is for the style sheet."""
OTHERS_LIMIT = 50_000
"""Most bytes for the rest of the group."""
SIBLING_LIMIT, SIBLING_LEAST = 4_000, 1_500
"""Most and fewest bytes for another rollout of the group; with less room it is only counted."""
ROWS = 32
"""Most rollouts in the table."""


# ── one rollout ──────────────────────────────────────────────────────────────────────────────────────────────────────


def trajectory_html(trajectory: Trajectory) -> str:
    """A trajectory as a conversation: role, text, tokens, tool calls and finish reason of every turn, below a head with
    reward, scores, generation and policy version. At most 200 kB, regardless of its length."""
    metadata = trajectory.metadata or {}
    name = title(f"example {short(metadata.get('id'))}", _generation(metadata.get("generation")))
    setting = Setting(more="`.episode[N].content` is turn N at full length.")
    return view(name, *_head(trajectory), *conversation(_turns(trajectory), SIZE_LIMIT, setting))


def failure_html(failure: RolloutFailure) -> str:
    """A failed rollout: its error, and the conversation so far, if model calls were recorded."""
    name = title(f"example {short(failure.example_id)}", _generation(failure.generation), "failed")
    return view(name, *_failed(failure, SIZE_LIMIT, Setting()))


def _failed(failure: RolloutFailure, room: int, setting: Setting) -> list[Html]:
    calls = [step.data.payload for step in failure.steps if step.data and isinstance(step.data.payload, LLMCall)]
    messages: list[dict[str, Any]] = []
    if calls:
        messages = [*calls[-1].messages, {**calls[-1].reply, MessageKey.FINISH_REASON: calls[-1].finish_reason}]
    so_far = f"{count(len(calls), 'model call')} until then" if calls else "no model call was recorded"
    return [
        error_block("error: ", cut(failure.error, ERROR_LIMIT)),
        element("div", so_far, class_="ft-dim"),
        *conversation([Turn(str(m.get("role")), m.get("content"), m) for m in messages], room, setting),
    ]


def _head(trajectory: Trajectory, more: Sequence[tuple[str, Any]] = ()) -> list[Html]:
    """The reward, its scores, and other facts about the trajectory."""
    metadata = trajectory.metadata or {}
    if math.isnan(trajectory.reward):
        why = metadata.get("reward_error") or "no reason was recorded"
        reward = error_block("no reward: ", cut(why, ERROR_LIMIT))
    else:
        reward = element("div", "reward ", element("strong", number(trajectory.reward)))
    shaped = trajectory.shaped_rewards or []
    shown = " · ".join(map(number, shaped[:40]))
    if len(shaped) > 40:
        shown += f" · and {len(shaped) - 40:,} more"
    return [
        reward,
        facts_table(
            [
                ("scores", scores(metadata.get("scores"))),
                ("shaped rewards", shown),
                ("scored as", _group_size(metadata)),
                ("reasoning", metadata.get("reasoning") and cut(metadata["reasoning"], SHORT)),
                *_reasonings(metadata),
                *more,
                ("model time", _model_time(trajectory)),
                ("policy version", _plain_version(metadata.get("policy_version"))),
            ]
        ),
    ]


def _reasonings(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the other evaluators said besides their scores."""
    found = metadata.get("reasonings")
    if not isinstance(found, Mapping):
        return []
    return [(f"reasoning of {short(name, 40)}", cut(said, SHORT)) for name, said in list(found.items())[:8] if said]


def _group_size(metadata: Mapping[str, Any]) -> str | None:
    """Of a rollout that was tried by itself although a reward compares those of a group."""
    size = metadata.get("group_size")
    return f"a group of {count(size, 'rollout')}: a reward compares all rollouts of an example" if size == 1 else None


def _turns(trajectory: Trajectory) -> list[Turn]:
    return [turn_of(item) for item in trajectory.episode]


def _model_time(trajectory: Trajectory) -> str:
    """Total duration of the model calls. Calls in one batch wait for each other."""
    known = [(getattr(item, "metadata", None) or {}).get(MessageKey.SECONDS) for item in trajectory.episode]
    seconds = [float(value) for value in known if isinstance(value, Real) and math.isfinite(value)]
    return f"{duration(sum(seconds))} in {count(len(seconds), 'turn')}" if seconds else ""


def _plain_version(version: Any) -> Any:
    return version if isinstance(version, int) else version and short(version, 40)


def _generation(generation: Any) -> str:
    return "" if generation is None else f"generation {short(generation, 40)}"


# ── a rollout in its group ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class RolloutView:
    """One rollout with the rest of its group; displays itself in a cell. `trajectory` is the record."""

    group: RolloutGroup
    chosen: int | RolloutFailure
    """The trajectory's position in the group, or the failure."""
    heat: Heat = "probability"
    turn: int | None = None
    """The first turn to show, from 0, at full length. None: all of them, long ones cut, and the rest of the group."""
    changes: tuple[tuple[float, ...], ...] = ()
    """For the heat "change": for each sampled turn one number a token."""
    weights: int | None = None
    """The epoch after which the weights were that the changes are of."""

    def __post_init__(self) -> None:
        check_heat(self.heat)
        turns = 0 if self.trajectory is None else len(self.trajectory.episode)
        if self.turn is not None and not 0 <= self.turn < turns:
            raise RunError(
                f"{self._name()} has {count(turns, 'turn')}; found turn={self.turn}, expected 0 to {turns - 1}."
            )

    @property
    def trajectory(self) -> Trajectory | None:
        """None for a rollout that failed."""
        return self.group.trajectories[self.chosen] if isinstance(self.chosen, int) else None

    @property
    def failure(self) -> RolloutFailure | None:
        """None for a rollout that finished."""
        return None if isinstance(self.chosen, int) else self.chosen

    def _chosen_turns(self) -> list[Turn]:
        """Those of the trajectory, which has not failed; their tokens with their changes, if there are any."""
        assert self.trajectory is not None
        turns, changes = _turns(self.trajectory), iter(self.changes)
        if not self.changes:
            return turns
        return [turn.with_changes(next(changes, ())) if turn.tokens else turn for turn in turns]

    def _name(self) -> str:
        generation = self.chosen.generation if isinstance(self.chosen, RolloutFailure) else self._label(self.chosen)
        return f"example {short(self.group.example)} · {_generation(generation)}"

    def _label(self, place: int) -> Any:
        return self.group.generation(place)

    def __repr__(self) -> str:
        """Plain text: one line about the group, and the beginning of every turn."""
        group, trajectory = self.group, self.trajectory
        lines = [f"epoch {group.epoch} · {one_line(self._name())} · {_standing(group)}"]
        if trajectory is None:
            return "\n  ".join([*lines, f"failed: {one_line(self.failure and self.failure.error)}"])
        assert isinstance(self.chosen, int)
        lines.append(f"reward {number(trajectory.reward)}, advantage {signed(group.advantages[self.chosen])}")
        turns = self._chosen_turns()
        missing = missing_entropy(turns) if self.heat == "entropy" else ""
        if missing:
            lines.append(missing)
        said = [f"{place} {turn.role}: {_gist(turn)}" for place, turn in enumerate(turns)]
        if len(turns) > 20:
            said[16:-4] = [f"… {len(turns) - 20:,} of {len(turns):,} turns are left out …"]
        lines += said
        return plain("\n  ".join(lines))

    def _repr_html_(self) -> str:
        group = self.group
        setting = Setting(self.heat)
        head: list[Any] = [title(f"epoch {group.epoch}", self._name())]
        if isinstance(self.chosen, int):
            advantage = group.advantages[self.chosen]
            changes = [("change", f"under the weights after epoch {self.weights}")] if self.changes else []
            more = [
                *changes,
                ("advantage", "" if math.isnan(advantage) else signed(advantage)),
                ("group", _standing(group)),
            ]
            head += _head(group.trajectories[self.chosen], more)
        if self.turn is not None:
            return view(*head, *self._from_turn(self.turn, VIEW_LIMIT - _bytes(*head)))
        head.append(_table(group, self.chosen))
        room = VIEW_LIMIT - _bytes(*head)
        setting = replace(setting, more=f"{self._call('turn=N')} shows turn N and those after it at full length.")

        # The rest of the group gets the room that the chosen rollout leaves.
        others = [place for place in group.best_first() if place != self.chosen]
        failures = [failure for failure in group.failures if failure is not self.chosen]
        for_others = min(OTHERS_LIMIT, (SIBLING_LIMIT + 1_200) * (len(others) + len(failures)))
        most = min(SIZE_LIMIT, room - for_others)
        if isinstance(self.chosen, int):
            body = conversation(self._chosen_turns(), most, setting)
        else:
            body = _failed(self.chosen, most - 20_000, setting)
        return view(*head, *body, *_others(group, others, failures, room - _bytes(*body), setting))

    def _from_turn(self, first: int, room: int) -> list[Html]:
        """The turns from `first` on, at full length as far as there is room."""
        assert self.trajectory is not None
        more = f"{self._call('turn=N')} begins at turn N; .trajectory.episode[{first}].content is turn {first}."
        setting = Setting(self.heat, more=more, first=first)
        turns = self._chosen_turns()[first:]
        before = f"from turn {first} of {len(self.trajectory.episode):,}" if first else ""
        shown = [row(element("span", before, class_="ft-dim")), *conversation(turns[:1], room, setting)]
        if room - _bytes(*shown) > SIBLING_LEAST:
            setting = replace(setting, first=first + 1, legend=False)
            shown += conversation(turns[1:], room - _bytes(*shown), setting)
        return shown

    def _call(self, more: str) -> str:
        """The call of `run.show` that shows this rollout."""
        place = [f"epoch={self.group.epoch}", f"example={one_line(repr(self.group.example), 80)}"]
        if isinstance(self.chosen, int) and (generation := self._label(self.chosen)) is not None:
            place.append(f"generation={generation}")
        return f"run.show({', '.join([*place, more])})"


def _others(
    group: RolloutGroup,
    places: Sequence[int],
    failures: Sequence[RolloutFailure],
    room: int,
    setting: Setting,
) -> list[Html]:
    """The rest of the group, folded, as far as there is room; then how many are left out."""
    setting = replace(setting, tables=False, legend=False, detail="colours", more="")
    total = len(places) + len(failures)
    shown: list[Html] = []
    for rollout in [*places, *failures]:
        # Divide the remaining room equally among the remaining rollouts.
        share = min(SIBLING_LIMIT, (room - 200) // (total - len(shown)) - 1_200)
        if share < SIBLING_LEAST:
            break
        if isinstance(rollout, int):
            turns = _turns(group.trajectories[rollout])
            fold = details(_sibling_name(group, rollout, turns), *conversation(turns, share, setting))
        else:
            name = f"generation {short(rollout.generation, 40)} · failed"
            fold = details(name, *_failed(rollout, share - ERROR_LIMIT, setting))
        if _bytes(fold) > room - 200:
            break
        shown.append(fold)
        room -= _bytes(fold)
    if total > len(shown):
        left_out = (
            f"… {total - len(shown):,} of {total:,} others are left out here; run.show(generation=…) shows them …"
        )
        shown.append(element("p", left_out, class_="ft-dim"))
    return [element("div", element("strong", "others in the group, best first")), *shown] if shown else []


def _sibling_name(group: RolloutGroup, place: int, turns: Sequence[Turn]) -> str:
    """The summary of a rollout's fold."""
    parts = [f"generation {short(group.generation(place), 40)}", f"reward {number(group.trajectories[place].reward)}"]
    if not math.isnan(group.advantages[place]):
        parts.append(f"advantage {signed(group.advantages[place])}")
    length = count(len(turns), "turn")
    if turns:
        length += f", the last: {_gist(turns[-1], 60)}"
    return " · ".join([*parts, length])


def _table(group: RolloutGroup, chosen: int | RolloutFailure) -> Html:
    """A table with one row per rollout of the group, best first."""
    total = len(group.trajectories) + len(group.failures)
    if total < 2:
        return Html()
    rewards = [t.reward for t in group.trajectories if math.isfinite(t.reward)]
    bars = bool(rewards) and min(rewards) >= 0 and max(rewards) <= 1
    rows: list[list[Any]] = []
    for place in group.best_first()[:ROWS]:
        trajectory = group.trajectories[place]
        rows.append(
            [
                element("strong" if place == chosen else "span", short(group.generation(place), 20)),
                bar(trajectory.reward) if bars else number(trajectory.reward),
                signed(group.advantages[place]),
                f"{len(trajectory.episode):,}",
                f"{sampled_tokens(trajectory):,}",
                short(finish_reason(trajectory) or "", 20),
            ]
        )
    for failure in group.failures[: ROWS - len(rows)]:
        rows.append([short(failure.generation, 20), "failed", "–", "", "", one_line(failure.error, 60)])
    caption = f"the first {ROWS} of {total:,} rollouts" if total > ROWS else None
    headers = ["generation", "reward", "advantage", "turns", "tokens", "ended with"]
    return table(rows, headers, caption)


def _standing(group: RolloutGroup) -> str:
    """The group in one line: its rewards, and whether it was kept."""
    rewards = [t.reward for t in group.trajectories if not math.isnan(t.reward)]
    parts = [count(len(group.trajectories), "rollout")]
    if rewards:
        low, high = min(rewards), max(rewards)
        parts.append(f"rewards {number(low)} to {number(high)}" if low != high else f"all rewards {number(low)}")
    if group.failures:
        parts.append(f"{len(group.failures):,} failed")
    if group.reason is not None:
        parts.append(REASONS[group.reason].sentence + (" (concluded)" if group.inferred else ""))
    return ", ".join(parts)


def _gist(turn: Turn, limit: int = 160) -> str:
    calls = turn.metadata.get(MessageKey.TOOL_CALLS)
    text = beginning(turn.content if isinstance(turn.content, str) else "", limit)
    return f"{text} → {beginning(as_json(calls), limit)}".strip() if calls else text


def _bytes(*pieces: Html) -> int:
    return sum(len(piece.encode()) for piece in pieces)
