"""Labels as a reward: what a person says of recorded rollouts, as a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..text import short
from ..types import EvalInputItem
from .numbers import mean
from .recorded import RecordedRollout

__all__ = [
    "LabelReward",
    "Tags",
    "checked_tags",
    "label_reward",
    "label_value",
]

Tags = str | Sequence[str] | Mapping[str, float]
"""Which labels count: a tag, several, or what each of them is worth."""


class LabelReward:
    """A reward that is read from labels. Made by `label_reward`."""

    def __init__(self, tags: Tags, otherwise: float | None) -> None:
        self.tags, self.otherwise = checked_tags(tags), otherwise
        if otherwise is not None and not _is_number(otherwise):
            raise ConfigError(f"otherwise is {short(repr(otherwise), 80)}; expected a finite number or None.")
        self.__name__ = "label_reward"

    def __call__(self, item: EvalInputItem) -> float | None:
        """The reward of a rollout. One that has just been made has no labels yet."""
        value = label_value(item.labels, self.tags) if isinstance(item, RecordedRollout) else None
        return self.otherwise if value is None else value


def label_reward(tags: Tags, *, otherwise: float | None = None) -> LabelReward:
    """Take the labels of recorded rollouts as their reward, for `run.rescore`.

        run.rescore(ft.label_reward({"good": 1, "hacked": 0}))

    Args:
        tags: What each tag is worth. Or a tag, or several, whose scores count; a label without a score counts as 1.
            Of a rollout with several such labels, the mean is the reward.
        otherwise: The reward of a rollout without such a label. Default: it has none. In an epoch that runs, no rollout has a
            label yet.

    Returns:
        What `Run.rescore` and `Run` take as a reward, also as a part of one.

    Raises:
        ConfigError: The tags are none of these.
    """
    return LabelReward(tags, otherwise)


def label_value(labels: Mapping[str, float | None], tags: Mapping[str, float] | Sequence[str]) -> float | None:
    """What the labels of one rollout amount to.

    Args:
        labels: The score of each of its tags; None for a tag without a score.
        tags: As `checked_tags` returns them.

    Returns:
        The mean over those tags that it has; None if it has none of them.
    """
    found = []
    for tag, score in labels.items():
        if tag not in tags:
            continue
        if isinstance(tags, Mapping):
            found.append(float(tags[tag]))
        else:
            found.append(1.0 if score is None else score)
    return mean(found) if found else None


def checked_tags(tags: Any) -> Mapping[str, float] | Sequence[str]:
    """A mapping from tags to numbers, or a list of tags.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(tags, Mapping):
        fits = all(isinstance(tag, str) and _is_number(value) for tag, value in tags.items())
        found: Any = dict(tags)
    else:
        found = [tags] if isinstance(tags, str) else list(tags) if isinstance(tags, Sequence) else None
        fits = found is not None and all(isinstance(tag, str) for tag in found)
    if not fits or not found:
        raise ConfigError(
            f'tags are {short(repr(tags), 80)}; expected a tag, several, or numbers by tag, such as {{"good": 1, "hacked": 0}}.'
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
