"""What `Run.rescore` does: finds the reward and the dataset's rows, and scores recorded rollouts with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..analysis.agreement import Agreement, agreement
from ..analysis.rescoring import (
    RescoredEpoch,
    Rescoring,
    recorded_outputs,
    recorded_scores,
    rescore_epochs,
    reweighted_epochs,
    reweighted_statistics,
)
from ..components.builder import Builder
from ..config.sections import Config
from ..errors import ConfigError, DatasetError, RunError, did_you_mean
from ..rewards.evaluators import WeightedConfig, reward_name_of, reward_parts, weighted_reward
from ..rewards.functions import Rewards, evaluators_from
from ..rewards.scoring import WeightedSum, check_evaluator
from ..rollouts.datasets import load_dataset
from ..rollouts.evaluation import dataset_of
from ..store.labels import Label, scores_by_tag
from ..text import text_of
from ..training.preview import PreviewInput, preview_input, remembered
from ..types import CurriculumState, Epoch, EvalInputItem

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "NewestEpoch",
    "all_weights",
    "agreement_with",
    "labelled_epochs",
    "reweight",
    "rescore",
    "rescoring",
    "score_by",
]


def reweight(config: Config, records: Sequence[Epoch], weights: Mapping[str, float]) -> list[RescoredEpoch]:
    """Add up recorded scores with other weights.

    Args:
        config: The run's, which says what the other weights are.
        records: The epochs.
        weights: The weights that change.

    Returns:
        The epochs with their new rewards.

    Raises:
        ConfigError: The run's reward is no weighted sum, or has no such part.
    """
    return reweighted_epochs(records, all_weights(config, weights))


def all_weights(config: Config, changes: Mapping[str, float]) -> dict[str, float]:
    """The weights of a run's reward, some of them changed.

    Args:
        config: The run's, which says what the other weights are.
        changes: The weights that change.

    Returns:
        Part of the reward -> weight.

    Raises:
        ConfigError: The run's reward is no weighted sum, or has no such part, or a weight is no finite number.
    """
    section = weighted_reward(config)
    if section is None:
        raise ConfigError(
            "this run's reward is not a weighted sum, so there are no weights to change. Give Run several rewards: "
            'reward={"format": (tags, 0.2), "correct": right}.'
        )
    if unknown := [name for name in changes if name not in section.weights]:
        raise ConfigError(f"the reward has no part {unknown[0]!r}. {did_you_mean(unknown[0], section.weights)}")
    return WeightedConfig(weights={**section.weights, **changes}).weights


class NewestEpoch:
    """What previews of the newest epoch are made on, put together once an epoch."""

    def __init__(self, record: Epoch) -> None:
        self.record = record
        self.basis = preview_input(record)
        self._reweighted: dict[tuple[tuple[str, float], ...], PreviewInput] = {}

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        return recorded_scores(self.record)

    def with_weights(self, weights: Mapping[str, float]) -> PreviewInput:
        """The same epoch with rewards that are other sums of its scores.

        Args:
            weights: Score -> weight.

        Returns:
            The epoch as previews need it.

        Raises:
            ConfigError: It has no such score.
        """

        def make() -> PreviewInput:
            return replace(self.basis, statistics=reweighted_statistics(self.record, self._scores, weights), _made={})

        return remembered(self._reweighted, tuple(weights.items()), make)


async def rescore(
    config: Config,
    components: Builder | None,
    records: Sequence[Epoch],
    reward: Rewards | None,
    only: str | Collection[str] | None,
    dataset: Any,
    max_concurrency: int,
    labels: Sequence[Label] = (),
) -> list[RescoredEpoch]:
    """Score recorded rollouts.

    Args:
        config: The run's.
        components: What makes the run's evaluators. None: the run is closed.
        records: The epochs.
        reward: As in Run. None: the run's own.
        only: As in `rescore_epochs`.
        dataset: The rows. None: the run's own, if they are known.
        max_concurrency: How many calls of an async function run at once.
        labels: Those of the run.

    Returns:
        The epochs with their new rewards.

    Raises:
        ConfigError: The reward cannot be called with the rows, or is not known.
    """
    if reward is None:
        name = reward_name_of(config)
        evaluators = await _evaluators(components, config.eval.evaluators)
    else:
        name = "reward"
        evaluators, sections = evaluators_from(reward, None)
        if name not in evaluators:
            evaluators[name] = WeightedSum(WeightedConfig(weights=sections[name]["weights"]))
    rows = _rows(config, components, dataset)
    return await _score(records, evaluators, name, rows, labels, only, max_concurrency)


async def score_by(
    judge: Config,
    of_judge: Builder | None,
    config: Config,
    components: Builder | None,
    records: Sequence[Epoch],
    labels: Sequence[Label] = (),
) -> list[RescoredEpoch]:
    """Score recorded rollouts of one run with the reward of another one.

    Args:
        judge: The config of the run whose reward it is.
        of_judge: What makes its evaluators. None: it is closed.
        config: The config of the run whose rollouts these are.
        components: Its components, which know its rows.
        records: Its epochs.
        labels: Its labels.

    Returns:
        The epochs with their new rewards.

    Raises:
        ConfigError: The reward cannot be called with the rows, or is not known.
    """
    evaluators = await _evaluators(of_judge, reward_parts(judge))
    return await _score(records, evaluators, reward_name_of(judge), _rows(config, components, None), labels)


async def _evaluators(components: Builder | None, names: Iterable[str]) -> dict[str, Any]:
    """A run's own evaluators. Raises RunError if it is closed."""
    if components is None:
        raise RunError("this run is closed, and its own reward with it: pass reward=, or open the run again.")
    return {name: await components.get_evaluator(name) for name in names}


async def _score(
    records: Sequence[Epoch],
    evaluators: Mapping[str, Any],
    reward_name: str,
    rows: Sequence[EvalInputItem],
    labels: Sequence[Label],
    only: str | Collection[str] | None = None,
    max_concurrency: int = 64,
) -> list[RescoredEpoch]:
    for evaluator in evaluators.values():
        try:
            check_evaluator(evaluator, rows)
        except ConfigError as error:
            if rows:
                raise
            raise ConfigError(f"{error} The run's dataset is not known here: pass dataset=.") from error
    by_id = {text_of(row.id): row for row in rows}
    return await rescore_epochs(records, evaluators, reward_name, by_id, only, max_concurrency, scores_by_tag(labels))


def _rows(config: Config, components: Builder | None, dataset: Any) -> Sequence[EvalInputItem]:
    """The dataset's rows; none if they are not known here."""
    if dataset is not None:
        return load_dataset(dataset, config.eval.general.dataset)
    if components is None:
        return ()
    run = config.finetuning.run_configuration
    try:
        return dataset_of(config, components, str(run.dataset) if run and run.dataset else None)
    except (ConfigError, DatasetError):
        return ()


def rescoring(
    config: Config,
    run_id: str,
    epochs: Sequence[RescoredEpoch],
    records: Sequence[Epoch],
    put_in_place: Callable[[RescoredEpoch], None],
) -> Rescoring:
    """Put the epochs together with what a selection needs."""
    percentile = config.finetuning.curriculum_learning.initial_percentile
    if records and records[0].selection.state.last_expansion_epoch < 0:
        percentile = records[0].selection.state.percentile  # also where the config cannot be read here
    started_at = CurriculumState(percentile=percentile)
    return Rescoring(run_id, tuple(epochs), config.run.seed, started_at, records, put_in_place)


def labelled_epochs(labels: Mapping[str, float], records: Sequence[Epoch]) -> list[int]:
    """The recorded epochs that labels belong to, by the names of the trajectories."""
    found = {int(match[1]) for match in (re.match(r"e(\d+)/", name) for name in labels) if match}
    return [record.index for record in records if record.index in found]


def agreement_with(labels: Mapping[str, float], rescored: Rescoring, scale: tuple[float, float]) -> Agreement:
    """Compare new rewards with labels.

    Args:
        labels: By the names of the trajectories.
        rescored: Has the rewards.
        scale: Lowest and highest value of both.

    Returns:
        The agreement.

    Raises:
        ConfigError: A label is of a rollout that is not recorded.
    """
    names: list[str] = []
    scores: list[float] = []
    lengths: list[int] = []
    for epoch in rescored.epochs:
        outputs = recorded_outputs(epoch.record)
        for place, name in enumerate(epoch.names):
            if name in labels:
                names.append(name)
                scores.append(float(epoch.after.rewards[place]))
                lengths.append(len(text_of(outputs[place])))
    if unknown := labels.keys() - set(names):
        raise ConfigError(
            f"{len(unknown)} of {len(labels)} labels are of no recorded rollout, such as {sorted(unknown)[0]!r}. Expected names "
            "as in the column `trajectory` of run.trajectories()."
        )
    return agreement(names, [labels[name] for name in names], scores, lengths, scale)
