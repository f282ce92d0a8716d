"""The reasons why a group is kept or left out: each one's wording, and how plots draw it."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import GroupReason

__all__ = [
    "REASONS",
    "Reason",
]


@dataclass(frozen=True)
class Reason:
    """How one GroupReason is named, explained and drawn."""

    label: str
    """A few words for a legend: "not drawn in the subsample"."""
    sentence: str
    """What happened to such groups, to follow their number: "3 left out: a reward is infinite"."""
    meaning: str
    """Why they teach or do not, for an example whose rewards are known."""
    advice: str
    """What can be done about it; empty if nothing needs to be done."""
    marker: str
    """Marker in scatter plots, as matplotlib names it."""
    fill: str
    """SVG style of a bar."""


_GREY = "rgba(128,128,128,"

REASONS = {
    GroupReason.KEPT: Reason(
        label="kept",
        sentence="kept",
        meaning="their rewards differ, and they are trained on",
        advice="",
        marker="o",
        fill="fill:var(--on);stroke:none",
    ),
    GroupReason.NO_REWARD_SPREAD: Reason(
        label="rewards hardly differ",
        sentence="left out: their rewards hardly differ",
        meaning="their rewards differ by less than the curriculum's min_reward_diff",
        advice="lower min_reward_diff if such differences mean something",
        marker="_",
        fill=f"fill:none;stroke:{_GREY}.9);stroke-dasharray:2 2",
    ),
    GroupReason.BEYOND_PERCENTILE: Reason(
        label="beyond the percentile",
        sentence="left out: beyond the curriculum's percentile",
        meaning="their rewards differ, but they are beyond the curriculum's percentile",
        advice="run.preview(percentile=...) shows what a larger share would let in",
        marker="^",
        fill=f"fill:{_GREY}.45);stroke:none",
    ),
    GroupReason.SUBSAMPLED: Reason(
        label="not drawn in the subsample",
        sentence="left out: not drawn in the random subsample",
        meaning="their rewards differ, but they were not drawn in the random subsample",
        advice="raise random_subsample",
        marker="s",
        fill=f"fill:{_GREY}.2);stroke:{_GREY}.9)",
    ),
    GroupReason.NO_REWARD: Reason(
        label="no reward",
        sentence="left out: no trajectory has a reward",
        meaning="no rollout has a reward",
        advice="see reward_error, the column `error` of run.trajectories()",
        marker="x",
        fill=f"fill:none;stroke:{_GREY}.9)",
    ),
    GroupReason.INFINITE_REWARD: Reason(
        label="infinite reward",
        sentence="left out: a reward is infinite",
        meaning="a reward, or the difference of two, is infinite",
        advice="fix the reward function",
        marker="P",
        fill=f"fill:none;stroke:{_GREY}.9)",
    ),
    GroupReason.UNDECIDED: Reason(
        label="undecided",
        sentence="undecided: the epoch ended before groups were chosen",
        meaning="their rewards differ, and the epoch ended before groups were chosen",
        advice="run the epoch again",
        marker="D",
        fill=f"fill:none;stroke:{_GREY}.9)",
    ),
    GroupReason.NOT_SUBMITTED: Reason(
        label="left out by the trainer",
        sentence="left out by the trainer",
        meaning="their rewards differ, but the trainer did not submit them",
        advice="check how the trainer chooses",
        marker="v",
        fill=f"fill:none;stroke:{_GREY}.9)",
    ),
}
"""One entry for every GroupReason."""
