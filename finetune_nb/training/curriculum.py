"""Which groups of an epoch are kept to be trained on: (group statistics, settings, state) -> Selection.

Easy groups first (highest mean reward), a growing share of them, and none whose rewards hardly differ: an advantage is
measured against the group's own mean. The rules are those of the NVIDIA NeMo Agent Toolkit's ART trainer, but NaN is
missing, a single group is no exception, rounding is forgiven and the subsample has a seed. Pure functions over numpy
columns, so that one call serves the trainer, a preview and a test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import ConfigError
from ..rewards.numbers import group_scales
from ..types import GROUP_REASONS, CurriculumState, GroupReason, GroupStatistics, Selection

if TYPE_CHECKING:
    from ..types import CurriculumSettings, Trajectory

__all__ = [
    "group_statistics",
    "infer_selection",
    "keep",
    "select",
    "state_from_dict",
    "state_to_dict",
    "statistics_of",
    "steer",
]

G = TypeVar("G")

ROUNDING = 1e-9
"""What thresholds forgive: 0.3 - 0.2 is 0.09999999999999998 in floats, and 10 * (0.1 + 0.2) is 3.0000000000000004."""

_CODE = {reason: code for code, reason in enumerate(GROUP_REASONS)}


def group_statistics(groups: Sequence[Sequence[Trajectory]]) -> GroupStatistics:
    """The rewards of G groups as columns, in the groups' order.

    A group's example id is its first trajectory's `metadata["id"]`, None where there is none. A NaN reward is missing: it
    does not count towards means and spreads. Groups may be empty.
    """
    example_ids: list[Any] = []

    def noted() -> Iterator[Sequence[Trajectory]]:
        # In the same pass as the rewards: a second one would find the trajectories gone from the processor's cache.
        for group in groups:
            metadata = group[0].metadata if group else None
            example_ids.append(metadata.get("id") if metadata else None)
            yield group

    sizes = np.fromiter(map(len, groups), np.int64, len(groups))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    rewards = np.fromiter(map(attrgetter("reward"), chain.from_iterable(noted())), np.float64)
    return statistics_of(example_ids, rewards, offsets)


def statistics_of(example_ids: Sequence[Any], rewards: np.ndarray, offsets: np.ndarray) -> GroupStatistics:
    """The statistics of G groups whose N rewards are known.

    Args:
        example_ids: (G,) the example of each group.
        rewards: (N,) float64, NaN where there is none.
        offsets: (G+1,) group g is `rewards[offsets[g]:offsets[g + 1]]`.
    """
    sizes = np.diff(offsets)
    filled = sizes > 0

    def by_group(operation: np.ufunc, values: np.ndarray, of_nothing: float) -> np.ndarray:
        out = np.full(len(sizes), of_nothing, dtype=values.dtype)
        if filled.any():  # reduceat has no notion of an empty slice
            out[filled] = operation.reduceat(values, offsets[:-1][filled])
        return out

    missing = np.isnan(rewards)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        counts = by_group(np.add, (~missing).astype(np.int64), 0)
        scales = group_scales(rewards, offsets)
        scaled = np.where(missing, 0.0, rewards) / np.repeat(scales, sizes)
        means = by_group(np.add, scaled, 0.0) / counts * scales
        highest, lowest = by_group(np.fmax, rewards, np.nan), by_group(np.fmin, rewards, np.nan)
        spreads = highest - lowest  # inf where the difference is beyond floats
    infinite = np.isinf(highest) | np.isinf(lowest)
    means[infinite & np.isnan(means)] = np.inf  # inf and -inf in one group
    spreads[infinite] = np.nan
    return GroupStatistics(tuple(example_ids), rewards, offsets, counts, means, spreads)


def select(
    statistics: GroupStatistics, settings: CurriculumSettings, state: CurriculumState, epoch: int, seed: int
) -> Selection:
    """Chooses the groups to train on, best mean reward first (worst first with `sort_ascending`), ties in input order.

    The share in force is `state.percentile`, which grows here once `expansion_interval` epochs have passed since the
    last growth; `settings.percentile` and `settings.schedule` act through `steer`. The returned settings carry the
    percentile that was used. `epoch` counts from 0; `seed` is the run's, at least 0, and decides only the subsample.

    Disabled: all groups in their order, state untouched. Nothing to keep: an empty choice, state untouched.
    """
    if not settings.enabled:
        everything = np.arange(len(statistics))
        return _selection(statistics, settings, state, everything, np.zeros(len(statistics), dtype=np.int8))

    reasons = _unfit(statistics, settings.min_reward_diff)
    candidates = np.flatnonzero(reasons == _CODE[GroupReason.KEPT])
    if not len(candidates):
        return _selection(statistics, settings, state, candidates, reasons)

    percentile, last_expansion_epoch = state.percentile, state.last_expansion_epoch
    if epoch - last_expansion_epoch >= settings.expansion_interval and percentile < 1:
        percentile = percentile + settings.increment_percentile
        percentile = 1.0 if percentile > 1 - ROUNDING else percentile
        last_expansion_epoch = epoch

    keys = _rounded(statistics.means[candidates])
    order = candidates[np.argsort(keys if settings.sort_ascending else -keys, kind="stable")]
    chosen = order[: _share(percentile, len(order))]
    reasons[order[len(chosen) :]] = _CODE[GroupReason.BEYOND_PERCENTILE]
    if settings.random_subsample is not None:
        # of the chosen groups, whole, with a generator of its own: NAT draws from the process-wide one
        drawn = _share(settings.random_subsample, len(chosen))
        lots = np.random.default_rng([seed, epoch]).choice(len(chosen), size=drawn, replace=False)
        reasons[chosen] = _CODE[GroupReason.SUBSAMPLED]
        chosen = chosen[np.sort(lots)]
        reasons[chosen] = _CODE[GroupReason.KEPT]

    state = CurriculumState(
        percentile=percentile,
        last_expansion_epoch=last_expansion_epoch,
        total_groups=state.total_groups or len(candidates),
        included_groups=frozenset(chosen.tolist()),  # after the subsample
    )
    return _selection(statistics, settings, state, chosen, reasons)


def steer(state: CurriculumState, settings: CurriculumSettings, epoch: int, resumed: bool = False) -> CurriculumState:
    """The state to select with at `epoch`, once what a person has set is put into it.

    Schedule "manual": the settings' percentile, and no growth in this epoch; call it before every selection. `resumed`
    (the schedule became "automatic" since the last selection): continues from the settings' percentile, the next growth
    one interval later. The same where an automatic schedule's percentile differs from the state's, which means that
    someone changed it: so hand in settings that follow the state, as `Selection.settings` does. Else unchanged.
    """
    if settings.schedule == "manual" or resumed or settings.percentile != state.percentile:
        return replace(state, percentile=settings.percentile, last_expansion_epoch=epoch)
    return state


def keep(groups: Sequence[G], selection: Selection) -> list[G]:
    """The kept ones of the `groups` that were selected from, in the order in which they are submitted."""
    return [groups[position] for position in selection.kept.tolist()]


def infer_selection(
    statistics: GroupStatistics,
    kept_positions: Sequence[int],
    settings: CurriculumSettings,
    state: CurriculumState | None,
) -> Selection:
    """The Selection that someone else's Trainer seems to have made: what it kept is given, the reasons are concluded.

    A group left out without reward or with an infinite one says so; where the curriculum is on, one without spread too, and
    every other counts as beyond the percentile; where it is off, as not submitted. `state` is the Trainer's after its
    choice; where it has none, None means the settings' percentile. Raises ValueError for a position that is not one
    of the groups'.
    """
    kept = np.array(kept_positions, dtype=np.int64)
    if outside := [int(position) for position in kept if not 0 <= position < len(statistics)]:
        raise ValueError(
            f"kept positions {outside} are not among the {len(statistics)} groups (positions from 0); match the "
            'submitted groups to the collected ones by metadata["id"] first'
        )
    reasons = _unfit(statistics, settings.min_reward_diff if settings.enabled else -math.inf)
    concluded = GroupReason.BEYOND_PERCENTILE if settings.enabled else GroupReason.NOT_SUBMITTED
    reasons[reasons == _CODE[GroupReason.KEPT]] = _CODE[concluded]
    reasons[kept] = _CODE[GroupReason.KEPT]
    state = state or CurriculumState(percentile=settings.percentile)
    return replace(_selection(statistics, settings, state, kept, reasons), inferred=True)


def state_from_dict(record: Mapping[str, Any]) -> CurriculumState:
    """A Trainer's `_curriculum_state` (or its JSON form) as a value; keys other than the four are passed over.

    Raises ConfigError where the percentile is missing, or a value is not of its kind.
    """
    try:
        state = CurriculumState(
            percentile=float(record["current_percentile"]),
            last_expansion_epoch=int(record.get("last_expansion_epoch", -1)),
            total_groups=int(record.get("total_groups", 0)),
            included_groups=frozenset(int(position) for position in record.get("included_groups", ())),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(
            f"found a curriculum state that cannot be read ({type(error).__name__}: {error}); expected a mapping with "
            "current_percentile, last_expansion_epoch, total_groups and included_groups; Trainer.initialize makes one"
        ) from error
    if not 0 < state.percentile <= 1:
        raise ConfigError(
            f"found current_percentile {state.percentile} in the curriculum state; expected a share in (0, 1]; "
            "set it to the share of groups to train on"
        )
    return state


def state_to_dict(state: CurriculumState) -> dict[str, Any]:
    """The four keys of a Trainer's `_curriculum_state`; update the Trainer's dict with them, so that keys of its own
    stay."""
    return {
        "current_percentile": state.percentile,
        "last_expansion_epoch": state.last_expansion_epoch,
        "total_groups": state.total_groups,
        "included_groups": set(state.included_groups),
    }


def _unfit(statistics: GroupStatistics, min_reward_diff: float) -> np.ndarray:
    """(G,) int8 reason codes: why a group cannot be chosen whatever the percentile; KEPT where it can."""
    reasons = np.full(len(statistics), _CODE[GroupReason.KEPT], dtype=np.int8)
    reasons[statistics.spreads < min_reward_diff - ROUNDING] = _CODE[GroupReason.NO_REWARD_SPREAD]
    reasons[~np.isfinite(statistics.spreads)] = _CODE[GroupReason.INFINITE_REWARD]
    reasons[statistics.counts == 0] = _CODE[GroupReason.NO_REWARD]
    return reasons


def _share(fraction: float, count: int) -> int:
    """`fraction` of `count` groups, rounded up: at least one, at most all."""
    return min(count, max(1, math.ceil(count * fraction - ROUNDING)))


def _rounded(means: np.ndarray) -> np.ndarray:
    """Means to 9 decimals, so that the order of the rewards within a group cannot decide between equal groups."""
    with np.errstate(over="ignore"):
        rounded = np.rint(means * 1e9) / 1e9
    return np.where(np.abs(means) < 2**52 / 1e9, rounded, means)  # beyond, floats are coarser than 9 decimals


def _selection(
    statistics: GroupStatistics,
    settings: CurriculumSettings,
    state: CurriculumState,
    kept: np.ndarray,
    reasons: np.ndarray,
) -> Selection:
    settings = replace(settings, percentile=state.percentile)
    return Selection(statistics.example_ids, reasons, kept, state, settings)
