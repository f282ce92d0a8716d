"""What other curriculum settings would do, before they do it: the next selection, made on the newest epoch's rewards.

The same pure functions as the trainer's, so what is shown is what would happen if the next epoch brought the same
rewards; it draws other examples, so it is a forecast of shares and counts. What is needed of an epoch is put together
once, in a PreviewInput; a preview on it then costs two selections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ..hooks import shown_by
from ..types import (
    GROUP_REASONS,
    CurriculumSettings,
    CurriculumState,
    DPOItem,
    Epoch,
    GroupReason,
    GroupStatistics,
    Selection,
    sampled_tokens,
)
from .curriculum import select, steer
from .metrics import has_signal

__all__ = [
    "PreviewInput",
    "Preview",
    "preview_input",
    "preview",
    "remembered",
]


T = TypeVar("T")


def remembered(made: dict[Any, T], key: Any, make: Callable[[], T]) -> T:
    """The value of that key, made where it is not there. The last four stay: what a slider was moved over need not."""
    value = made.pop(key) if key in made else make()
    made[key] = value
    for old in list(made)[:-4]:
        made.pop(old, None)
    return value


@dataclass(frozen=True, eq=False)
class PreviewInput:
    """One epoch as previews need it."""

    epoch: int
    """Whose rewards these are; the selection that is previewed is that of the next one."""
    statistics: GroupStatistics
    state: CurriculumState
    """The curriculum's state after that epoch."""
    tokens: np.ndarray
    """(G,) int64, sampled tokens of each group."""
    seconds_per_token: float
    """What training took for each token of the groups that were trained on; NaN where nothing was trained."""
    preferences: bool = False
    """Whether the groups hold preferences. These teach by themselves, episodes only if the rewards of a group differ."""

    _made: dict[Any, Selection] = field(default_factory=dict, repr=False)

    @cached_property
    def teaches(self) -> np.ndarray:
        """(G,) bool, whether a group is trained on if it is kept."""
        return has_signal(self.statistics) | self.preferences

    @cached_property
    def sizes(self) -> np.ndarray:
        """(G,) trajectories of each group."""
        return np.diff(self.statistics.offsets)

    def next_selection(self, applied: CurriculumSettings, settings: CurriculumSettings, seed: int) -> Selection:
        """The selection of the next epoch, if it brings these rewards. applied: the settings of the last one."""
        resumed, epoch = settings.resumes_after(applied), self.epoch + 1

        def make() -> Selection:
            return select(self.statistics, settings, steer(self.state, settings, epoch, resumed), epoch, seed)

        return remembered(self._made, (settings, resumed, seed), make)


@dataclass(frozen=True, eq=False)
class Preview:
    """What a selection would be, beside what it will be if nothing is changed. Shows itself as a card."""

    basis: PreviewInput
    selection: Selection
    """With the settings in question."""
    unchanged: Selection
    """With those that are in force, or asked for already."""
    unchanged_basis: PreviewInput | None = None
    """Where the rewards in question are others too: those that `unchanged` was selected by. None: `basis`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """The weights in question of the reward's parts, if they are others than those in force."""

    @property
    def settings(self) -> CurriculumSettings:
        """The settings in question; their percentile is the share that would be used."""
        return self.selection.settings

    @property
    def enters(self) -> list[Any]:
        """Example ids of groups that would be trained on, and will not be if nothing is changed."""
        return self._examples(self.trained & ~self.trained_unchanged)

    @property
    def leaves(self) -> list[Any]:
        """Example ids of groups that would not be trained on any more."""
        return self._examples(self.trained_unchanged & ~self.trained)

    @property
    def moves(self) -> tuple[int, int]:
        """How many groups enter and leave."""
        then, before = self.trained, self.trained_unchanged
        return int(np.count_nonzero(then & ~before)), int(np.count_nonzero(before & ~then))

    @cached_property
    def counts(self) -> dict[GroupReason, int]:
        """Groups by what would become of them; reasons without a group are left out."""
        return _counts(self.selection)

    @property
    def kept_groups(self) -> tuple[int, int]:
        """Groups that are kept: with the settings in question, and if nothing is changed."""
        return len(self.selection.kept), len(self.unchanged.kept)

    @property
    def groups(self) -> tuple[int, int]:
        """Groups trained on, in the same order: those that are kept and can teach."""
        return int(np.count_nonzero(self.trained)), int(np.count_nonzero(self.trained_unchanged))

    @cached_property
    def trajectories(self) -> tuple[int, int]:
        """Trajectories in the groups trained on."""
        return self._sums(self.basis.sizes)

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Sampled tokens in them."""
        return self._sums(self.basis.tokens)

    @property
    def training_seconds(self) -> tuple[float, float]:
        """What training on them would take, at the newest epoch's pace; NaN where nothing was trained in it."""
        then, now = self.tokens
        return then * self.basis.seconds_per_token, now * self.basis.seconds_per_token

    @cached_property
    def trained(self) -> np.ndarray:
        """(G,) bool, whether a group would be trained on."""
        return (self.selection.reasons == 0) & self.basis.teaches

    @cached_property
    def trained_unchanged(self) -> np.ndarray:
        """(G,) bool, whether it will be if nothing is changed."""
        return (self.unchanged.reasons == 0) & (self.unchanged_basis or self.basis).teaches

    def _examples(self, which: np.ndarray) -> list[Any]:
        return [self.selection.example_ids[place] for place in np.flatnonzero(which).tolist()]

    def _sums(self, values: np.ndarray) -> tuple[int, int]:
        """Sums of a value of each group, over the groups trained on."""
        return int(values[self.trained].sum()), int(values[self.trained_unchanged].sum())

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.preview_card:preview_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.preview_card:preview_html", self)


def preview_input(epoch: Epoch) -> PreviewInput:
    """What previews need of an epoch."""
    tokens = _tokens_by_group(epoch)
    preferences = _holds_preferences(epoch)
    trained = (epoch.selection.reasons == 0) & (has_signal(epoch.statistics) | preferences)
    trained_tokens = int(tokens[trained].sum())
    seconds_per_token = math.nan
    if epoch.trained and trained_tokens:
        seconds_per_token = epoch.seconds.get("training", math.nan) / trained_tokens
    state = epoch.selection.state
    return PreviewInput(epoch.index, epoch.statistics, state, tokens, seconds_per_token, preferences)


def preview(
    basis: PreviewInput,
    applied: CurriculumSettings,
    asked: CurriculumSettings,
    settings: CurriculumSettings,
    seed: int,
    unchanged_basis: PreviewInput | None = None,
    weights: Mapping[str, float] | None = None,
) -> Preview:
    """Preview the next epoch's selection with other settings, beside those that are asked for already.

    Args:
        basis: The epoch whose rewards count.
        applied: The settings of the last selection.
        asked: Those that are asked for already.
        settings: Those in question.
        seed: The run's, which decides a random subsample.
        unchanged_basis: The same epoch with the rewards that count if nothing is changed. Default: `basis`.
        weights: The weights that made the rewards of `basis`, if they are in question too.

    Returns:
        Both selections.
    """
    unchanged = (unchanged_basis or basis).next_selection(applied, asked, seed)
    selection = basis.next_selection(applied, settings, seed)
    return Preview(basis, selection, unchanged, unchanged_basis, weights or {})


def _counts(selection: Selection) -> dict[GroupReason, int]:
    found = np.bincount(selection.reasons, minlength=len(GROUP_REASONS)).tolist()
    return {reason: count for reason, count in zip(GROUP_REASONS, found, strict=True) if count}


def _holds_preferences(epoch: Epoch) -> bool:
    """Whether its trajectories are preferences. Read only where no rewards differ, as it may need the file."""
    if has_signal(epoch.statistics).any():
        return False
    for group in epoch.collection.trajectories:
        if group:
            return any(isinstance(item, DPOItem) for item in group[0].episode)
    return False


def _tokens_by_group(epoch: Epoch) -> np.ndarray:
    groups = len(epoch.statistics)
    columns = getattr(epoch, "columns", None)  # a stored epoch: without its trajectories being read
    if columns is None:
        counts = (sum(map(sampled_tokens, group)) for group in epoch.collection.trajectories)
        return np.fromiter(counts, np.int64, groups)
    table = columns(("group", "tokens"))
    rows = len(epoch.statistics.rewards)  # failures come after them, and belong to no group
    group, tokens = (table.column(name).slice(0, rows).to_numpy() for name in ("group", "tokens"))
    return np.bincount(group, weights=tokens, minlength=groups).astype(np.int64)
