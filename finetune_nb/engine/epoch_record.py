"""What is observed of one epoch while it runs, and the record that is made of it.

A Trainer that reports its Selection is taken at its word. For any other, the selection is inferred from what it submitted,
and marked as inferred.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RunError
from ..interfaces import Trainer
from ..redaction import error_text, redacting_logger
from ..rollouts.evaluation import Progress
from ..store.reader import PartialEpoch
from ..text import told_once
from ..training.curriculum import group_statistics, infer_selection
from ..training.metrics import epoch_metrics
from ..training.trainer import NAT_NAMES
from ..types import (
    GROUP_REASONS,
    CurriculumSettings,
    CurriculumState,
    Epoch,
    EpochMetrics,
    GroupReason,
    GroupStatistics,
    RolloutResult,
    Selection,
    TrainingJobRef,
    TrainingJobStatus,
    Trajectory,
    TrajectoryCollection,
    Validation,
)
from ..user_code import contained_call

__all__ = [
    "EpochInProgress",
    "log_what_was_left",
    "partial_record",
    "record",
    "recounted",
    "require_rewards",
    "settled_late",
    "report_of",
    "report_of_all",
    "validation_of",
]

logger = redacting_logger(__name__)


class TrainerReport(NamedTuple):
    """What a Trainer of ours says of its choice."""

    selection: Selection
    statistics: GroupStatistics
    metrics: EpochMetrics


@dataclass
class EpochInProgress:
    """What was seen of the epoch that is running."""

    epoch: int
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    collection: TrajectoryCollection | None = None
    collected: float | None = None
    settings: CurriculumSettings | None = None
    version: int | None = None
    submitted: list[TrajectoryCollection] = field(default_factory=list)
    refs: list[TrainingJobRef] = field(default_factory=list)
    waited: list[TrainingJobRef] = field(default_factory=list)
    statuses: list[TrainingJobStatus] = field(default_factory=list)
    last_status: TrainingJobStatus | None = None
    """The last status that a job reported."""
    validations: list[Validation] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)
    progress: Progress = field(default_factory=Progress)
    begun: bool = False
    """Whether the folder knows of it."""
    report: TrainerReport | None = None
    """What was chosen, where that is known from an earlier process."""
    came_in: list[RolloutResult] = field(default_factory=list)
    """Rollouts that are done and not yet in the folder."""
    kept: bool = False
    """Whether the folder has the whole collection."""
    all_in: asyncio.Event = field(default_factory=asyncio.Event)
    keeping: asyncio.Task[None] | None = None
    """Puts rollouts into the folder until all are in."""
    given: TrajectoryCollection | None = None
    """What is trained on in place of new rollouts."""
    ahead: bool = False
    """Whether its rollouts began while the epoch before was training."""
    newest_result: float | None = None
    """When the newest of its rollouts ended (time.perf_counter)."""
    lag: int | None = None
    """Policy versions between the weights that sampled and those that are trained."""

    @classmethod
    def again(cls, left: PartialEpoch) -> EpochInProgress:
        """An epoch that is known from the folder as far as its training."""
        assert left.selection is not None
        statistics = group_statistics(left.collection.trajectories)
        return cls(
            left.index,
            started_at=left.started_at,
            seconds=dict(left.seconds),
            collection=left.collection,
            settings=left.selection.settings,
            version=left.policy_version,
            validations=list(left.validations),
            progress=Progress("training"),
            begun=True,
            report=TrainerReport(
                left.selection, statistics, epoch_metrics(left.collection, statistics, left.selection)
            ),
        )

    @classmethod
    def rescored(cls, left: PartialEpoch) -> EpochInProgress:
        """An epoch whose rollouts are in the folder, with the rewards that `Rescoring.apply` gave them."""
        return cls(
            left.index,
            progress=Progress("training"),
            begun=True,
            kept=True,
            given=left.collection,
            version=left.policy_version,
        )

    def collect(self, collection: TrajectoryCollection, joined: bool) -> TrajectoryCollection:
        """What was collected, all of it. joined: after what was collected in this epoch before."""
        if joined and self.collection is not None:
            update: dict[str, Any] = {
                "trajectories": self.collection.trajectories + collection.trajectories,
                "failures": self.collection.failures + collection.failures,
            }
            collection = self.collection.model_copy(update=update)
        self.collection = collection
        return collection

    def on_result(self, result: RolloutResult) -> None:
        """A rollout has ended."""
        self.came_in.append(result)
        self.newest_result = time.perf_counter()

    def all_in_before(self) -> float | None:
        """When the last rollout ended, if it was before now: time.perf_counter. None: some are running, or nobody counts them."""
        meter = self.progress
        return self.newest_result if self.ahead and meter.total and meter.done >= meter.total else None

    def find_lag(self, version: int | None) -> None:
        """Notes how much older the weights are that sampled, than the given version, which is trained next."""
        groups = [] if self.collection is None else self.collection.trajectories
        known = [(each.metadata or {}).get("policy_version") for group in groups for each in group]
        sampled_by = [each for each in known if isinstance(each, int)]
        if version is not None and sampled_by:
            self.lag = version - min(sampled_by)

    async def end_keeping(self) -> None:
        """All rollouts are in: none is put into the folder any more by itself."""
        self.all_in.set()
        if self.keeping is not None:
            await self.keeping

    def unwaited(self) -> list[TrainingJobRef]:
        """Jobs that nobody has waited for."""
        return [ref for ref in self.refs if not any(ref is seen or ref == seen for seen in self.waited)]

    def add_seconds(self, part: str, since: float) -> None:
        """Adds the time since `since` (time.perf_counter) to what a part of the epoch took."""
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - since


def report_of(trainer: Trainer) -> TrainerReport | None:
    """None for a Trainer that says nothing, or nothing of the running epoch."""
    found = tuple(getattr(trainer, name, None) for name in ("selection", "statistics", "metrics"))
    kinds = (Selection, GroupStatistics, EpochMetrics)
    return TrainerReport(*found) if all(map(isinstance, found, kinds)) else None  # type: ignore[arg-type]


def report_of_all(
    collection: TrajectoryCollection, settings: CurriculumSettings, state: CurriculumState | None
) -> TrainerReport:
    """What a Trainer would say that chose every group."""
    statistics = group_statistics(collection.trajectories)
    selection = infer_selection(statistics, range(len(statistics)), settings, state)
    selection = replace(selection, inferred=False)
    return TrainerReport(selection, statistics, epoch_metrics(collection, statistics, selection))


def record(
    in_progress: EpochInProgress,
    run_id: str,
    report: TrainerReport | None,
    settings: CurriculumSettings,
    state: CurriculumState | None,
    version: int | None,
    error: Exception | None = None,
) -> Epoch:
    """The Epoch.

    report: what the Trainer itself says of its choice, if it does. settings, state: the curriculum in force. version: the
    policy's, now. error: what ended the epoch before its time.
    """
    collection = in_progress.collection or TrajectoryCollection(trajectories=[], run_id=run_id)
    kept = _kept(in_progress.submitted, collection)
    if report is not None and len(report.statistics) == len(collection.trajectories) and _agrees(report, kept):
        statistics, metrics, selection = report.statistics, report.metrics, report.selection
    else:
        statistics = group_statistics(collection.trajectories)
        selection = infer_selection(statistics, kept, settings, state)
        metrics = epoch_metrics(collection, statistics, selection)
    job = in_progress.statuses[-1] if in_progress.statuses else None
    metrics = replace(metrics, version_lag=in_progress.lag)
    return Epoch(
        index=in_progress.epoch,
        run_id=run_id,
        collection=collection,
        statistics=statistics,
        selection=selection,
        job=job,
        reason=None if job is not None else _why_no_job(collection, selection, metrics, error),
        metrics=metrics,
        validations=tuple(in_progress.validations),
        policy_versions=(in_progress.version, version),
        started_at=in_progress.started_at,
        seconds={**in_progress.seconds, "total": time.perf_counter() - in_progress.started},
    )


def partial_record(left: PartialEpoch, run_id: str, settings: CurriculumSettings) -> Epoch:
    """The record of an epoch that did not finish: like that of a complete one, with what there is."""
    statistics = group_statistics(left.collection.trajectories)
    selection = left.selection or Selection(
        statistics.example_ids,
        np.full(len(statistics), GROUP_REASONS.index(GroupReason.UNDECIDED), np.int8),
        np.empty(0, np.int64),
        CurriculumState(settings.percentile),
        settings,
    )
    return Epoch(
        index=left.index,
        run_id=run_id,
        collection=left.collection,
        statistics=statistics,
        selection=selection,
        job=left.status,
        reason=None if left.status else "the epoch did not finish" + (", its job is out" if left.job else ""),
        metrics=epoch_metrics(left.collection, statistics, selection),
        validations=left.validations,
        policy_versions=(left.policy_version, None),
        started_at=left.started_at,
        seconds=left.seconds,
    )


def recounted(epoch: Epoch) -> Epoch:
    """The record, with statistics, selection and metrics worked out from its trajectories alone."""
    statistics = group_statistics(epoch.collection.trajectories)
    chosen = epoch.selection
    kept = [int(place) for place in np.atleast_1d(chosen.kept) if 0 <= place < len(statistics)]
    selection = infer_selection(statistics, kept, chosen.settings, None)
    metrics = epoch_metrics(epoch.collection, statistics, selection)
    return replace(
        epoch,
        statistics=statistics,
        selection=selection,
        metrics=replace(metrics, version_lag=epoch.metrics.version_lag),
    )


def settled_late(epoch: Epoch, submitted: TrajectoryCollection, status: TrainingJobStatus) -> Epoch:
    """The record, once a job has ended that was submitted after it had been made."""
    selection = epoch.selection
    if selection.inferred:
        kept = _kept([submitted], epoch.collection)
        selection = infer_selection(epoch.statistics, kept, selection.settings, selection.state)
    metrics = epoch_metrics(epoch.collection, epoch.statistics, selection)
    metrics = replace(metrics, version_lag=epoch.metrics.version_lag)
    return replace(epoch, job=status, reason=None, selection=selection, metrics=metrics)


def _agrees(report: TrainerReport, kept: Sequence[int]) -> bool:
    """Whether a Trainer submitted what it says that it chose; a subclass may choose once more. Groups without a finite
    reward are chosen where there is no curriculum, and never submitted."""
    chosen = report.selection.kept
    return not kept or chosen[np.isfinite(report.statistics.means[chosen])].tolist() == list(kept)


def _kept(submitted: Sequence[TrajectoryCollection], collection: TrajectoryCollection) -> list[int]:
    """Positions of the groups that were submitted, in that order: found by identity, then by (id, generation)."""
    place = {id(t): g for g, group in enumerate(collection.trajectories) for t in group}
    names: dict[tuple[str, Any], int] = {}
    kept: dict[int, None] = {}
    for trajectory in (t for handed in submitted for group in handed.trajectories for t in group):
        position = place.get(id(trajectory))
        if position is None:
            names = names or {_name(t): g for g, group in enumerate(collection.trajectories) for t in group}
            position = names.get(_name(trajectory))
        if position is not None:
            kept[position] = None
    return list(kept)


def _name(trajectory: Trajectory) -> tuple[str, Any]:
    metadata = trajectory.metadata or {}
    return str(metadata.get("id")), metadata.get("generation")


def _why_no_job(
    collection: TrajectoryCollection, selection: Selection, metrics: EpochMetrics, error: Exception | None
) -> str:
    """Why nothing was trained, and how many rewards were missing."""
    if error is not None:
        return error_text(error)
    if not collection.trajectories:
        if collection.failures:
            errors = [failure.error for failure in collection.failures]
            return f"all {len(errors)} rollouts failed; {told_once(errors)}"
        return "no trajectories were collected"
    missing = metrics.rewards_missing_text
    if metrics.rewards_missing == metrics.trajectories:
        return missing
    why = _why_nothing_was_submitted(selection)
    return f"{why}; {missing}" if missing else why


def _why_nothing_was_submitted(selection: Selection) -> str:
    left_out = selection.left_out()
    if left_out and not len(selection.kept):
        parts = (f"{len(examples)} with {reason.replace('_', ' ')}" for reason, examples in left_out.items())
        return f"no group is left to train on: {', '.join(parts)}"
    return "the trainer submitted nothing"


def require_rewards(epoch: Epoch) -> None:
    """Raises RunError for an epoch without a single reward, which trained nothing: the next ones would do the same."""
    metrics = epoch.metrics
    if metrics.trajectories and metrics.rewards_missing == metrics.trajectories and not epoch.trained:
        raise RunError(
            f"epoch {epoch.index}: {metrics.rewards_missing_text}. Nothing was trained, and the run was stopped. "
            "run.trajectories() has the error of each rollout. Fix the reward, then continue with run.start()."
        )


def validation_of(epoch: int, version: int | None, metrics: Mapping[str, Any], seconds: float) -> Validation:
    """What `run_validation_evaluation` returned, as a record."""
    return Validation(
        epoch=epoch,
        policy_version=version,
        mean_reward=float(metrics.get("avg_reward", float("nan"))),
        examples=int(metrics.get("num_examples", 0)),
        scores=dict(metrics.get("scores") or {}),
        seconds=seconds,
        error=metrics.get("error"),
        rewards_missing=metrics.get("rewards_missing"),
        reward_error=metrics.get("reward_error"),
    )


def log_what_was_left(in_progress: EpochInProgress, epoch: Epoch, trainer: Trainer, folder: Path) -> None:
    """The three log_progress are called once an epoch: those that someone else's Trainer left out are called here."""
    metrics: dict[str, Any] = {"epoch": epoch.index}
    for name in ("avg_reward", "num_trajectories", "num_groups"):
        metrics[name] = getattr(epoch.metrics, NAT_NAMES[name])
    calls: dict[str, Callable[[], None]] = {
        "trainer": lambda: trainer.log_progress(epoch.index, metrics, str(folder)),
        "builder": lambda: trainer.trajectory_builder.log_progress(epoch.run_id, metrics, str(folder)),
    }
    if in_progress.refs:
        measured = dict(epoch.train_metrics)
        if epoch.job is not None:
            measured |= {"status": epoch.job.status.value, "message": epoch.job.message}
        calls["adapter"] = lambda: trainer.trainer_adapter.log_progress(in_progress.refs[-1], measured, str(folder))
    for part, call in calls.items():
        if part not in in_progress.logged:
            try:
                contained_call(f"log_progress of the {part}", call)
            except Exception:
                logger.warning("log_progress of the %s failed", part, exc_info=True)
