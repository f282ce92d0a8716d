"""Scores recorded rollouts with another reward, and says what it changes: rewards, ranks, groups that teach, the selection.

Nothing is run but the reward. Epochs are read one after the other, so memory does not grow with the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RunError, did_you_mean
from ..hooks import shown_by
from ..store.arrays import to_python
from ..store.json import decode
from ..store.reader import trajectory_columns
from ..text import plain, text_of
from ..types import (
    RESCORED,
    CurriculumSettings,
    CurriculumState,
    Epoch,
    EvalInputItem,
    GroupStatistics,
    Selection,
    Trajectory,
    TrajectoryCollection,
)
from .trajectory_names import generations_of, trajectory_names

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..rewards.recorded import RecordedScores
    from ..training.preview import Preview

__all__ = [
    "RescoredEpoch",
    "Rescoring",
    "recorded_outputs",
    "recorded_scores",
    "rescore_epochs",
    "reweighted_epochs",
    "reweighted_statistics",
]

MOVED = 10
"""Rollouts that are shown because their rewards moved most."""


@dataclass(frozen=True, eq=False)
class RescoredEpoch:
    """One epoch under another reward: G groups, N trajectories."""

    record: Epoch
    generations: list[Any]
    """(N,) which rollout of its group each is; None if that is not known."""
    after: GroupStatistics
    """The groups with the new rewards."""
    scores: dict[str, np.ndarray]
    """Evaluator -> (N,) float64."""
    errors: list[str | None]
    """(N,) why a new reward is missing."""
    turns: list[list[float] | None]
    """(N,) a new reward for each sampled turn, where the function gave some."""
    changed: np.ndarray
    """(N,) bool: whether the rollout was scored anew."""
    words: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Place of a rollout that was scored anew -> its `reasoning` and `reasonings`, as in the metadata of a trajectory."""

    @property
    def index(self) -> int:
        """The epoch's number."""
        return self.record.index

    @property
    def before(self) -> GroupStatistics:
        """The groups with the recorded rewards."""
        return self.record.statistics

    @cached_property
    def names(self) -> list[str]:
        """(N,) the names of the trajectories, such as "e3/q17/2"."""
        return _names(self.record, self.generations)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(G,) trajectories of each group."""
        import numpy as np

        return np.diff(self.before.offsets)

    @cached_property
    def teaches(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,) bool each: whether a group's rewards differ, before and after."""
        from ..training.metrics import has_signal

        return has_signal(self.before), has_signal(self.after)

    @cached_property
    def flips(self) -> np.ndarray:
        """(G,) pairs of rollouts of a group whose order the new reward turns around."""
        import numpy as np

        flips = np.zeros(len(self.before), dtype=np.int64)
        for size in np.unique(self.sizes):
            places = np.flatnonzero(self.sizes == size)
            if size < 2:
                continue
            rows = self.before.offsets[:-1][places][:, None] + np.arange(size)
            old, new = self.before.rewards[rows], self.after.rewards[rows]
            with np.errstate(invalid="ignore"):
                old_order = np.sign(old[:, :, None] - old[:, None, :])
                new_order = np.sign(new[:, :, None] - new[:, None, :])
            flips[places] = (old_order * new_order == -1).sum((1, 2)) // 2
        return flips

    def trajectory(self, recorded: Trajectory, place: int) -> Trajectory:
        """A recorded trajectory with its new reward.

        Args:
            recorded: The trajectory.
            place: Which of the N trajectories it is.

        Returns:
            A copy with the new reward, rewards of turns, scores, and words of judges.
        """
        scores = {name: _number_or_none(values[place]) for name, values in self.scores.items()}
        metadata = {**(recorded.metadata or {}), "scores": scores}
        if self.changed[place]:
            metadata |= self.words.get(place, {})
            if not metadata.get("reasonings", True):
                del metadata["reasonings"]
        metadata.pop("reward_error", None)
        if self.errors[place] is not None:
            metadata["reward_error"] = self.errors[place]
        update = {
            "reward": float(self.after.rewards[place]),
            "shaped_rewards": self.turns[place],
            "metadata": metadata,
        }
        return recorded.model_copy(update=update)

    def collection(self) -> TrajectoryCollection:
        """The recorded trajectories with their new rewards.

        Returns:
            Copies in the recorded groups, marked by `rescored` in their metadata; failed rollouts stay as they are.
        """
        recorded, groups, place = self.record.collection, [], 0
        for group in recorded.trajectories:
            groups.append([])
            for trajectory in group:
                made = self.trajectory(trajectory, place)
                groups[-1].append(made.model_copy(update={"metadata": {**(made.metadata or {}), RESCORED: True}}))
                place += 1
        return recorded.model_copy(update={"trajectories": groups})


@dataclass(frozen=True, eq=False)
class Rescoring:
    """Recorded rollouts under another reward; displays itself in a cell.

    `rollouts()` and `groups()` are frames, `preview()` says what the curriculum would choose.
    """

    run: str
    epochs: tuple[RescoredEpoch, ...]
    seed: int
    """The run's, which decides a random subsample."""
    started_at: CurriculumState
    """The state of the curriculum before the run's first epoch."""
    records: Sequence[Epoch]
    """All of the run's epochs."""
    put_in_place: Callable[[RescoredEpoch], None] | None = field(default=None, repr=False)
    """Puts the new rewards of an epoch into the run that it is of."""

    def __getitem__(self, epoch: int) -> RescoredEpoch:
        for each in self.epochs:
            if each.index == epoch:
                return each
        known = ", ".join(str(each.index) for each in self.epochs)
        raise IndexError(f"epoch {epoch} was not scored anew. Known: {known or 'none'}.")

    @property
    def rewards_missing(self) -> tuple[int, int]:
        """Rollouts without a reward: as recorded, and now."""
        import numpy as np

        before = sum(int(np.isnan(epoch.before.rewards).sum()) for epoch in self.epochs)
        return before, sum(int(np.isnan(epoch.after.rewards).sum()) for epoch in self.epochs)

    @property
    def gained(self) -> int:
        """Groups that would teach, and did not."""
        return sum(int((after & ~before).sum()) for before, after in (epoch.teaches for epoch in self.epochs))

    @property
    def lost(self) -> int:
        """Groups that did teach, and would not."""
        return sum(int((before & ~after).sum()) for before, after in (epoch.teaches for epoch in self.epochs))

    def rollouts(self) -> pd.DataFrame:
        """Compare the rollouts.

        Returns:
            One row a trajectory: epoch, example, generation, trajectory (its name), reward, new_reward, change, advantage,
            new_advantage, error (why there is no new reward), and score_<name> for every new score.
        """
        import pandas as pd

        frames = [_rollouts(epoch) for epoch in self.epochs]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def groups(self) -> pd.DataFrame:
        """Compare the groups.

        Returns:
            One row a group: epoch, example, rollouts, mean, new_mean, spread, new_spread, teaches, new_teaches, flips (pairs of
            rollouts whose order turns around).
        """
        import pandas as pd

        frames = [_groups(epoch) for epoch in self.epochs]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def moved(self, count: int = MOVED) -> pd.DataFrame:
        """Find the rollouts whose advantage changed most.

        Args:
            count: How many.

        Returns:
            Rows of `rollouts()`, the largest change of advantage first; rollouts whose advantage stays are left out.
        """
        import pandas as pd

        frames = [_rollouts(epoch, [place]) for epoch, place in self.most_moved(count)]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def most_moved(self, count: int = MOVED) -> list[tuple[RescoredEpoch, int]]:
        """Find the places of the rollouts whose advantage changed most.

        Args:
            count: How many.

        Returns:
            Epoch and place among its N trajectories, the largest change first.
        """
        import numpy as np

        from ..training.metrics import advantages

        found: list[tuple[float, RescoredEpoch, int]] = []
        for epoch in self.epochs:
            moves = np.abs(np.nan_to_num(advantages(epoch.after)) - np.nan_to_num(advantages(epoch.before)))
            for place in np.argsort(-moves, kind="stable")[:count].tolist():
                if moves[place] > 0:
                    found.append((float(moves[place]), epoch, place))
        found.sort(key=lambda each: -each[0])
        return [(epoch, place) for _, epoch, place in found[:count]]

    def trajectory(self, epoch: int, place: int) -> Trajectory:
        """Get a recorded trajectory with its new reward.

        Args:
            epoch: Number of the epoch.
            place: Which of its N trajectories, in the order of the groups.

        Returns:
            A copy with the new reward, rewards of turns, and scores.

        Raises:
            IndexError: The epoch was not scored anew, or has no such trajectory.
        """
        rescored = self[epoch]
        found = [trajectory for group in rescored.record.collection.trajectories for trajectory in group][place]
        return rescored.trajectory(found, place)

    def selection(self, epoch: int | None = None) -> Selection:
        """The selection that the run's own curriculum would have made under the new rewards.

        Args:
            epoch: Number of the epoch. Default: the last one.

        Returns:
            Which groups would have been kept, and why the others would not.

        Raises:
            IndexError: The epoch was not scored anew.
        """
        rescored = self._rescored(epoch)
        return self._selections[rescored.index]

    def preview(self, epoch: int | None = None, **settings: Any) -> Preview:
        """What the curriculum would choose next under the new rewards, with other settings if you like.

        Args:
            epoch: Number of the epoch whose rewards count. Default: the last one.
            **settings: Fields of CurriculumSettings, such as `percentile=0.5`.

        Returns:
            Which groups would be trained on and why the others would not, beside what the recorded rewards lead to. It
            displays itself as a card.

        Raises:
            IndexError: The epoch was not scored anew.
            ConfigError: The settings do not fit.
        """
        from ..training.preview import Preview, preview_input

        rescored = self._rescored(epoch)
        record = rescored.record
        basis = preview_input(record)
        made = self._selections[rescored.index]
        applied = made.settings
        wanted = applied.steered(settings) if settings else applied
        new = replace(basis, statistics=rescored.after, state=made.state, _made={})
        unchanged = basis.next_selection(record.curriculum, record.curriculum, self.seed)
        return Preview(new, new.next_selection(applied, wanted, self.seed), unchanged, basis)

    def apply(self, epoch: int | None = None) -> None:
        """Put the new rewards of an epoch that was not trained on in place: the next epoch of the run trains on its rollouts.

        That is for an epoch whose rewards were missing, say because the judge could not be reached. The record as it was goes
        to the archive beside the run.

        Args:
            epoch: Number of the epoch, the run's newest. Default: the last one that was scored anew.

        Raises:
            IndexError: The epoch was not scored anew.
            RunError: It was trained on, or it is not the newest one, or the run is closed or at work.
        """
        rescored = self._rescored(epoch)
        if self.put_in_place is None:
            raise RunError(
                f"these rewards are of no run that is open here: ask {self.run!r} again, by run.rescore(...)."
            )
        self.put_in_place(rescored)

    def _rescored(self, epoch: int | None) -> RescoredEpoch:
        if epoch is None:
            if not self.epochs:
                raise IndexError("no epoch was scored anew.")
            return self.epochs[-1]
        return self[epoch]

    @cached_property
    def _selections(self) -> dict[int, Selection]:
        """By epoch. The state of the curriculum is carried on from epoch to epoch."""
        from ..training.curriculum import select

        recorded = {record.index: record for record in self.records}
        made: dict[int, Selection] = {}
        for epoch in self.epochs:
            index = epoch.index
            previous = recorded.get(index - 1)
            state = (
                made[index - 1].state
                if index - 1 in made
                else previous.selection.state
                if previous
                else self.started_at
            )
            settings, state = _in_force(epoch.record, previous.selection.state if previous else self.started_at, state)
            made[index] = select(epoch.after, settings, state, index, self.seed)
        return made

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.rescoring:rescoring_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.rescoring:rescoring_html", self)


def _in_force(
    record: Epoch, recorded: CurriculumState, state: CurriculumState
) -> tuple[CurriculumSettings, CurriculumState]:
    """The settings of a recorded selection, and the state to repeat it from.

    recorded: the state before it. state: the same under the new rewards. Where the percentile is not what the schedule alone
    would have made of the recorded state, a person set it, and it holds.
    """
    settings = record.curriculum
    grown = recorded.percentile
    if record.index - recorded.last_expansion_epoch >= settings.expansion_interval:
        grown = min(1.0, grown + settings.increment_percentile)
    own = math.isclose(settings.percentile, grown) or math.isclose(settings.percentile, recorded.percentile)
    if settings.schedule == "manual" or not own:
        return settings, replace(state, percentile=settings.percentile, last_expansion_epoch=record.index)
    return settings, state


# ── scoring ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def rescore_epochs(
    records: Iterable[Epoch],
    evaluators: Mapping[str, Any],
    reward_name: str,
    rows: Mapping[str, EvalInputItem],
    only: str | Collection[str] | None = None,
    max_concurrency: int = 64,
    labels: Mapping[str, Mapping[str, float | None]] | None = None,
) -> list[RescoredEpoch]:
    """Score the trajectories of recorded epochs.

    Args:
        records: The epochs.
        evaluators: Evaluators by name.
        reward_name: The one whose score is the reward.
        rows: The dataset's rows by the text of their ids.
        only: "failed": rollouts without a reward; or the names of some ("e3/q17/2"). With a reward that compares a group, whole
            groups that have one of them. The others keep what they have. None: all.
        max_concurrency: How many calls of an async function run at once.
        labels: Of labelled rollouts by their names: the score of each tag.

    Returns:
        The epochs with their new rewards.

    Raises:
        ConfigError: `only` is something else, or a reward has a parameter that nothing fills.
    """
    from ..rewards.recorded import needs_trajectories

    if isinstance(only, str) and only != "failed":
        raise ConfigError(
            f"only is {only!r}; expected 'failed', a list of names of trajectories, or None for all rollouts."
        )
    with_trajectories = needs_trajectories(evaluators)
    return [
        await _rescored(record, evaluators, reward_name, rows, only, with_trajectories, max_concurrency, labels or {})
        for record in records
    ]


async def _rescored(
    record: Epoch,
    evaluators: Mapping[str, Any],
    reward_name: str,
    rows: Mapping[str, EvalInputItem],
    only: str | Collection[str] | None,
    with_trajectories: bool,
    max_concurrency: int,
    labels: Mapping[str, Mapping[str, float | None]],
) -> RescoredEpoch:
    import numpy as np

    from ..rewards.functions import needs_group
    from ..rewards.recorded import RecordedRollout, score_recorded

    statistics = record.statistics
    columns = _columns(record, ["generation", "output", "scores", "error", "shaped_rewards"])
    if only is None:
        wanted = np.ones(len(statistics.rewards), dtype=bool)
    else:
        wanted = _those(record, columns["generation"], only)
        if any(map(needs_group, evaluators.values())):
            group_of = np.repeat(np.arange(len(statistics)), np.diff(statistics.offsets))
            wanted = np.isin(group_of, group_of[wanted])

    # The rollouts that are scored, and where they stand among all of the epoch's.
    chosen = np.flatnonzero(wanted).tolist()
    place_of = {row: place for place, row in enumerate(chosen)}
    names = _names(record, columns["generation"]) if labels else []
    items: list[EvalInputItem] = []
    groups: list[list[int]] = []
    for example, begin, end in zip(
        statistics.example_ids, statistics.offsets[:-1].tolist(), statistics.offsets[1:].tolist(), strict=True
    ):
        members = [row for row in range(begin, end) if row in place_of]
        row = rows.get(text_of(example))
        for each in members:
            output = columns["output"][each]
            known = {} if output is None else {"output_obj": decode(output)}
            scores = labels.get(plain(names[each])) if labels else None
            items.append(RecordedRollout.of(example, row, scores, **known))
        if members:
            groups.append([place_of[each] for each in members])
    trajectories = None
    if with_trajectories:
        every = [trajectory for group in record.collection.trajectories for trajectory in group]
        trajectories = [_unscored(every[row]) for row in chosen]
    scored = await score_recorded(evaluators, reward_name, items, groups, trajectories, max_concurrency)
    return _put_together(record, columns, scored, wanted)


def _those(record: Epoch, generations: Sequence[Any], only: str | Collection[str]) -> np.ndarray:
    """(N,) bool: which trajectories are to be scored."""
    import numpy as np

    statistics = record.statistics
    if only == "failed":
        return np.isnan(statistics.rewards)
    wanted = set(only)
    return np.array([name in wanted for name in _names(record, generations)], dtype=bool)


def _names(record: Epoch, generations: Sequence[Any]) -> list[str]:
    """(N,) the names of an epoch's trajectories, as the frames have them."""
    examples: list[Any] = []
    places: list[int] = []
    sizes = (record.statistics.offsets[1:] - record.statistics.offsets[:-1]).tolist()
    for example, size in zip(record.statistics.example_ids, sizes, strict=True):
        examples += [example] * size
        places += range(size)
    return trajectory_names(record.index, examples, generations, places)


def _put_together(
    record: Epoch, columns: Mapping[str, list[Any]], scored: RecordedScores, wanted: np.ndarray
) -> RescoredEpoch:
    """The new scores in the places of those that were scored anew, the recorded ones elsewhere."""
    import numpy as np

    from ..training.curriculum import statistics_of

    statistics = record.statistics
    rewards = statistics.rewards.copy()
    rewards[wanted] = scored.rewards
    errors, turns = list(columns["error"]), list(columns["shaped_rewards"])
    words: dict[int, dict[str, Any]] = {}
    for place, row in enumerate(np.flatnonzero(wanted).tolist()):
        errors[row], turns[row] = scored.errors[place], scored.turns[place]
        words[row] = {"reasoning": scored.reasoning[place], "reasonings": scored.words[place]}
    scores = {} if wanted.all() else _scores_in(columns["scores"])
    for name, values in scored.scores.items():
        if name not in scores:
            scores[name] = np.full(len(rewards), math.nan)
        scores[name][wanted] = values
    after = statistics_of(statistics.example_ids, rewards, statistics.offsets)
    return RescoredEpoch(record, columns["generation"], after, scores, errors, turns, wanted, words)


def reweighted_epochs(records: Iterable[Epoch], weights: Mapping[str, float]) -> list[RescoredEpoch]:
    """Add up the recorded scores with other weights. No function is called.

    Args:
        records: The epochs.
        weights: Score -> weight.

    Returns:
        The epochs with their new rewards.

    Raises:
        ConfigError: There is no such score.
    """
    import numpy as np

    found = []
    for record in records:
        columns = _columns(record, ["generation", "scores", "error"])
        scores = _scores_in(columns["scores"])
        after = reweighted_statistics(record, scores, weights)
        missing = np.isnan(after.rewards)
        errors = [error if gone else None for error, gone in zip(columns["error"], missing.tolist(), strict=True)]
        everything = np.ones(len(after.rewards), dtype=bool)
        turns: list[list[float] | None] = [None] * len(after.rewards)
        found.append(RescoredEpoch(record, columns["generation"], after, scores, errors, turns, everything))
    return found


def reweighted_statistics(
    record: Epoch, scores: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> GroupStatistics:
    """The groups of an epoch with rewards that are weighted sums of its recorded scores.

    Args:
        record: The epoch, of N trajectories.
        scores: Score -> (N,) float64, as `recorded_scores` has them.
        weights: Score -> weight.

    Returns:
        Its groups with the new rewards.

    Raises:
        ConfigError: There is no such score.
    """
    from ..rewards.recorded import weighted_scores
    from ..training.curriculum import statistics_of

    if unknown := [name for name in weights if name not in scores]:
        raise ConfigError(f"epoch {record.index} has no score {unknown[0]!r}. {did_you_mean(unknown[0], scores)}")
    statistics = record.statistics
    return statistics_of(statistics.example_ids, weighted_scores(weights, scores), statistics.offsets)


def recorded_scores(record: Epoch) -> dict[str, np.ndarray]:
    """Score -> (N,) float64: the scores of an epoch's trajectories, NaN where one is missing."""
    return _scores_in(_columns(record, ["scores"])["scores"])


def recorded_outputs(record: Epoch) -> list[Any]:
    """(N,) what the workflow returned in each rollout, None where that was not recorded."""
    return [None if text is None else decode(text) for text in _columns(record, ["output"])["output"]]


def _columns(record: Epoch, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of an epoch's trajectories as Python values, N each."""
    table = trajectory_columns(record, names)
    found = {name: to_python(table.column(name).combine_chunks()) for name in names}
    if "generation" in found:
        found["generation"] = generations_of(record, found["generation"])
    return found


def _scores_in(texts: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Score -> (N,) float64, of scores as JSON. The same text recurs often, so each is parsed once."""
    import numpy as np

    places: dict[str | None, int] = {}
    codes = np.fromiter((places.setdefault(text, len(places)) for text in texts), np.int64, len(texts))
    records = [{} if text is None else decode(text, dict) for text in places]
    names = list(dict.fromkeys(name for record in records for name in record))
    found = {}
    for name in names:
        values = [_number(record.get(name)) for record in records]
        found[name] = np.array(values, dtype=np.float64)[codes]
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _unscored(trajectory: Trajectory) -> Trajectory:
    """A trajectory as a reward function gets it in an epoch: before it was scored."""
    known = trajectory.metadata or {}
    metadata = {"id": known.get("id"), "policy_version": known.get("policy_version")}
    return Trajectory.model_construct(
        episode=trajectory.episode, reward=math.nan, shaped_rewards=None, metadata=metadata
    )


# ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rollouts(epoch: RescoredEpoch, places: Sequence[int] | None = None) -> pd.DataFrame:
    """The rows of one epoch. places: only those of its trajectories."""
    import numpy as np
    import pandas as pd

    from ..training.metrics import advantages

    rows = np.arange(len(epoch.after.rewards)) if places is None else np.array(places, dtype=np.int64)
    group_of = np.repeat(np.arange(len(epoch.before)), epoch.sizes)
    examples = [epoch.before.example_ids[group] for group in group_of[rows].tolist()]
    generations = [epoch.generations[row] for row in rows.tolist()]
    names = [epoch.names[row] for row in rows.tolist()]
    found: dict[str, Any] = {
        "epoch": np.full(len(rows), epoch.index),
        "example": pd.Series(examples, dtype=object),
        "generation": pd.array(generations, dtype="Int64"),
        "trajectory": names,
        "reward": epoch.before.rewards[rows],
        "new_reward": epoch.after.rewards[rows],
        "change": (epoch.after.rewards - epoch.before.rewards)[rows],
        "advantage": advantages(epoch.before)[rows],
        "new_advantage": advantages(epoch.after)[rows],
        "error": pd.Series([epoch.errors[row] for row in rows.tolist()], dtype=object),
    }
    return pd.DataFrame(found | {f"score_{name}": values[rows] for name, values in epoch.scores.items()})


def _groups(epoch: RescoredEpoch) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    before, after = epoch.teaches
    return pd.DataFrame(
        {
            "epoch": np.full(len(epoch.before), epoch.index),
            "example": pd.Series(list(epoch.before.example_ids), dtype=object),
            "rollouts": epoch.sizes,
            "mean": epoch.before.means,
            "new_mean": epoch.after.means,
            "spread": epoch.before.spreads,
            "new_spread": epoch.after.spreads,
            "teaches": before,
            "new_teaches": after,
            "flips": epoch.flips,
        }
    )
