"""Epochs for tests, made from plain reward lists by the real curriculum and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_nb.config import CurriculumSettings
from finetune_nb.training.curriculum import group_statistics, select
from finetune_nb.training.metrics import epoch_metrics
from finetune_nb.types import (
    CurriculumState,
    EpisodeItem,
    Epoch,
    RolloutFailure,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
    Validation,
)


def item(role: str, content: str, logprobs: Any = None, **metadata: Any) -> EpisodeItem:
    """A turn; an assistant's has one logprob a character unless they are given."""
    if role == "assistant" and logprobs is None:
        logprobs = [-0.5] * len(content)
    return EpisodeItem(role=role, content=content, logprobs=logprobs, metadata=metadata or None)  # type: ignore[arg-type]


def sampled(*tokens: tuple[str, float], **metadata: Any) -> EpisodeItem:
    """An assistant's turn of these tokens, each with its logprob."""
    texts = [text for text, _ in tokens]
    metadata.setdefault("tokens", texts)
    return item("assistant", "".join(texts), logprobs=[logprob for _, logprob in tokens], **metadata)


def make_trajectory(
    reward: float | None = 1.0, example: Any = "q0", generation: int | None = 0, reply: str = "4", **metadata: Any
) -> Trajectory:
    """A question and a reply. Reward None is a missing one."""
    found = {
        "id": example,
        "policy_version": 0,
        **({} if generation is None else {"generation": generation}),
        **metadata,
    }
    if reward is None:
        found.setdefault("reward_error", "ValueError: no number in the reply")
    episode = [item("user", "2+2"), item("assistant", reply, finish_reason="stop")]
    return Trajectory(episode=episode, reward=math.nan if reward is None else reward, metadata=found)


def collected(trajectories: Sequence[Trajectory], failures: Sequence[RolloutFailure] = ()) -> TrajectoryCollection:
    """Rollouts as a collection, grouped by example."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(repr((trajectory.metadata or {}).get("id")), []).append(trajectory)
    return TrajectoryCollection(trajectories=list(groups.values()), run_id="run", failures=list(failures))


def make_epoch(
    rewards: Mapping[Any, Sequence[float | None]] | Sequence[Sequence[float | None]],
    index: int = 0,
    *,
    failures: Sequence[RolloutFailure] = (),
    settings: CurriculumSettings | None = None,
    scores: Mapping[str, Any] | None = None,
    job: str | None = "completed",
    message: str | None = None,
    train: Mapping[str, float] | None = None,
    validation: float | None = None,
    validation_error: str | None = None,
    reason: str | None = None,
) -> Epoch:
    """An Epoch with these rewards by example; in a list the examples are q0, q1, ..."""
    if not isinstance(rewards, Mapping):
        rewards = {f"q{place}": group for place, group in enumerate(rewards)}
    extra = {} if scores is None else {"scores": scores}
    trajectories = [
        [make_trajectory(reward, example, generation, **extra) for generation, reward in enumerate(group)]
        for example, group in rewards.items()
    ]
    collection = TrajectoryCollection(trajectories=trajectories, run_id="run", failures=list(failures))
    statistics = group_statistics(trajectories)
    settings = settings or CurriculumSettings()
    selection = select(statistics, settings, CurriculumState(settings.percentile), index, seed=0)
    status = job and TrainingJobStatus(
        run_id="run",
        backend="fake",
        status=TrainingStatusEnum(job),
        message=message,
        metadata={"metrics": dict({"loss": 0.25} if train is None else train)},
    )
    validations = ()
    if validation is not None or validation_error is not None:
        mean = math.nan if validation is None else validation
        validations = (Validation(index, 0, mean, 0 if validation is None else 8, {}, 0.3, validation_error),)
    return Epoch(
        index=index,
        run_id="run",
        collection=collection,
        statistics=statistics,
        selection=selection,
        job=status or None,
        reason=reason,
        metrics=epoch_metrics(collection, statistics, selection),
        validations=validations,
        policy_versions=(index, index + 1 if job == "completed" else index),
        started_at=1_800_000_000.0 + 60 * index,
        seconds={"rollouts": 0.7, "training": 0.5, "total": 1.2},
    )
