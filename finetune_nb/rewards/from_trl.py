"""Takes reward functions that were written for TRL's GRPOTrainer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from ..text import text_of
from ..types import EpisodeItem, EpisodeItemRole, EvalInputItem, MessageKey, Trajectory, chat_fields, is_sampled
from ..user_code import Parameters
from .functions import GroupReward, row_of

__all__ = [
    "from_trl",
]


def from_trl(function: Callable[..., Any], conversational: bool | None = None) -> GroupReward:
    """Take a reward function of TRL's GRPOTrainer.

    It gets `prompts`, `completions`, `completion_ids` and each column of the dataset as lists with one entry a rollout, those
    of one example at a time, and returns a list of numbers, None where there is no reward.

    Args:
        function: The function, sync or async.
        conversational: Whether prompts and completions are lists of messages, as TRL gives them for a dataset of
            conversations, or plain texts. Default: as the dataset's column `prompt` is.

    Returns:
        What `Run` takes as a reward or an evaluator, with the function's name.

    Raises:
        ConfigError: It is no function.
    """
    if not callable(function):
        raise ConfigError(f"from_trl takes a reward function of TRL; got {type(function).__name__}.")
    taken = Parameters(function)

    def adapted(items: list[EvalInputItem], trajectories: list[Trajectory]) -> Any:
        row = row_of(items[0])
        messages = _is_conversation(row, conversational)
        columns: dict[str, Any] = {}
        for name, value in row.items():
            if name != "prompt":
                columns[str(name)] = [value] * len(items)
        columns["prompts"] = [_prompt(item, row, messages) for item in items]
        columns["completions"] = [
            _completion(item, each, messages) for item, each in zip(items, trajectories, strict=True)
        ]
        columns["completion_ids"] = [_completion_ids(trajectory) for trajectory in trajectories]
        columns |= {"trainer_state": None, "log_extra": _unlogged, "log_metric": _unlogged}
        if not taken.takes_all:
            columns = {name: values for name, values in columns.items() if name in taken.names}
        return function(**columns)

    functools.update_wrapper(adapted, function)
    adapted.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("items", "trajectories")]
    )
    return GroupReward(adapted)


def _unlogged(*args: Any, **kwargs: Any) -> None:
    """In place of TRL's own logging: return scores by name to have them recorded."""


def _is_conversation(row: Mapping[str, Any], conversational: bool | None) -> bool:
    if conversational is not None:
        return conversational
    return isinstance(row.get("prompt"), list)


def _prompt(item: EvalInputItem, row: Mapping[str, Any], messages: bool) -> Any:
    prompt = row.get("prompt", item.input_obj)
    if messages and not isinstance(prompt, list):
        return [{"role": "user", "content": prompt}]
    return prompt


def _completion(item: EvalInputItem, trajectory: Trajectory, messages: bool) -> Any:
    """What the policy replied: messages, or the text of the last one."""
    episode = [each for each in trajectory.episode if isinstance(each, EpisodeItem)]
    first = next((place for place, each in enumerate(episode) if is_sampled(each)), len(episode))
    replies = [each for each in episode[first:] if each.role == EpisodeItemRole.ASSISTANT]
    if not messages:
        return replies[-1].content if replies else text_of(item.output_obj)
    return [{"role": str(each.role), "content": each.content, **chat_fields(each.metadata)} for each in episode[first:]]


def _completion_ids(trajectory: Trajectory) -> list[int]:
    ids: list[int] = []
    for item in trajectory.episode:
        if is_sampled(item):
            ids += (getattr(item, "metadata", None) or {}).get(MessageKey.TOKEN_IDS) or []
    return ids
