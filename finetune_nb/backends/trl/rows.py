"""Trajectories as rows of a TRL dataset. Pure functions: no TRL, no torch.

A sampled turn is trained on as the ids that were sampled, wherever they are known; text is what preferences and
trajectories of other recorders have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...errors import BackendError
from ...rollouts.episodes import SampledTurn, sampled_turns
from ...types import DPOItem, EpisodeItem, Trajectory, TrajectoryCollection

__all__ = [
    "best_of_groups",
    "preference_rows",
    "supervised_rows",
]


def preference_rows(collection: TrajectoryCollection) -> list[dict[str, Any]]:
    """One row a preference: prompt, chosen, rejected, as messages where the prompt is. Raises BackendError for anything
    but preferences."""
    rows = []
    for trajectory in _all(collection):
        for item in trajectory.episode:
            if not isinstance(item, DPOItem):
                raise BackendError(
                    "trl_dpo got an episode; expected preferences (DPOItem). Use the trajectory builder "
                    "preference_builder, or the adapter trl_sft, which learns from episodes."
                )
            rows.append(
                {
                    "prompt": _prompt(item),
                    "chosen": _response(item, item.chosen_response),
                    "rejected": _response(item, item.rejected_response),
                }
            )
    return rows


def supervised_rows(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Rows for supervised training: `input_ids` and `completion_mask` (1 = sampled by the policy) where all ids are known,
    else prompt and completion as messages. A preference gives its chosen response."""
    by_ids = [row for trajectory in trajectories for row in _id_rows(trajectory)]
    turns = sum(len(sampled_turns(trajectory)) for trajectory in trajectories)
    if by_ids and turns == sum(row.pop("turns") for row in by_ids) and not _preferences(trajectories):
        return by_ids
    return [row for trajectory in trajectories for row in _text_rows(trajectory)]


def best_of_groups(collection: TrajectoryCollection, min_reward: float | None, best_only: bool) -> list[Trajectory]:
    """What supervised training learns from: of each group the best trajectory (of equal ones the first), or all, with a
    reward of at least `min_reward`."""
    chosen = []
    for group in collection.trajectories:
        good = [t for t in group if t.reward == t.reward and (min_reward is None or t.reward >= min_reward)]
        chosen += [max(good, key=lambda t: t.reward)] if good and best_only else good
    return chosen


def _id_rows(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
    """The turns, as few rows as possible: one whose prompt begins with all of the row before carries that one on."""
    row: dict[str, Any] | None = None
    for item in trajectory.episode:
        turn = SampledTurn.of(item)
        if turn is None or not turn.prompt_ids or not turn.ids:
            continue
        prompt, reply = turn.prompt_ids, turn.ids
        if row is None or prompt[: len(row["input_ids"])] != row["input_ids"]:
            if row is not None:
                yield row
            row = {"input_ids": [], "completion_mask": [], "turns": 0}
        context = prompt[len(row["input_ids"]) :]
        row["input_ids"] = [*row["input_ids"], *context, *reply]
        row["completion_mask"] = [*row["completion_mask"], *([0] * len(context)), *([1] * len(reply))]
        row["turns"] += 1
    if row is not None:
        yield row


def _text_rows(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
    for item in trajectory.episode:
        if isinstance(item, DPOItem):
            yield {"prompt": _prompt(item), "completion": _response(item, item.chosen_response)}
    for place in sampled_turns(trajectory):
        *before, turn = (_message(item) for item in trajectory.episode[: place + 1] if isinstance(item, EpisodeItem))
        yield {"prompt": before, "completion": [turn]}


def _message(item: EpisodeItem) -> dict[str, Any]:
    return {"role": item.role.value, "content": item.content}


def _prompt(item: DPOItem) -> str | list[dict[str, Any]]:
    """Without the chosen response, which some workflows of the NeMo Agent Toolkit have at the end of the prompt."""
    if isinstance(item.prompt, str):
        return item.prompt
    messages = [message.model_dump() for message in item.prompt]
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": item.chosen_response}:
        messages.pop()
    return messages


def _response(item: DPOItem, text: str) -> str | list[dict[str, Any]]:
    return text if isinstance(item.prompt, str) else [{"role": "assistant", "content": text}]


def _preferences(trajectories: Iterable[Trajectory]) -> bool:
    return any(isinstance(item, DPOItem) for trajectory in trajectories for item in trajectory.episode)


def _all(collection: TrajectoryCollection) -> Iterator[Trajectory]:
    return (trajectory for group in collection.trajectories for trajectory in group)
