"""`ft.compare`: runs on the examples that they share; where their rewards differ, under each of the rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..analysis.run_comparison import Comparison, compare_runs
from ..components.registry import PythonEvaluatorConfig
from ..errors import ConfigError, FinetuneError
from ..rewards.evaluators import WeightedConfig, reward_parts
from ..rewards.functions import RewardFunction, batch_method
from ..types import GroupStatistics

if TYPE_CHECKING:
    from ..analysis.rescoring import RescoredEpoch
    from .run import Run

__all__ = [
    "compare",
]

REWARDS = ("own", "all")


def compare(runs: Sequence[Run], confidence: float = 0.95, rewards: str | None = None) -> Comparison:
    """Compare runs with the first one, on the examples that they share in the same epoch.

    Runs with different rewards cannot be compared by what they recorded alone: each looks good under its own. Their rollouts are
    then scored anew with every run's reward, and the runs are compared under each.

    Args:
        runs: At least two different runs.
        confidence: Confidence level of the intervals, between 0 and 1.
        rewards: "all": score with every run's reward, also if that asks a judge. "own": only by what was recorded. Default: all,
            if the rewards differ and none of them is async or an evaluator of other people, which may cost money.

    Returns:
        A comparison that displays itself as a table. `.frame` has the pairs, `.differences` the numbers with their
        bootstrap intervals, `.under` the same under each run's reward, and `.plot()` draws the curves.

    Raises:
        ConfigError: There are fewer than two different runs, or an argument is out of range; or `rewards` is "all", and a reward
            is not known here.
    """
    if rewards not in (None, *REWARDS):
        raise ConfigError(f"rewards is {rewards!r}; expected 'all', 'own', or None.")
    names = [run.id for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"a run is compared against others, not against itself; found {', '.join(names)}.")
    parents = {run.id: parent for run in runs if (parent := getattr(run, "parent", None))}
    recorded = replace(compare_runs({run.id: run.records for run in runs}, confidence), parents=parents)
    if rewards == "own":
        return recorded
    if rewards is None and _are_same(runs):
        return recorded
    obstacle = _obstacle(runs, rewards == "all")
    if obstacle is not None and rewards == "all":
        raise ConfigError(obstacle)
    if obstacle is not None:
        return recorded.with_rewards({}, obstacle)
    under = {judge.id: compare_runs(_scored_by(judge, runs), confidence).differences for judge in runs}
    return recorded.with_rewards(under, None)


def _are_same(runs: Sequence[Run]) -> bool:
    """Whether the rewards are the same, or nothing is known of any."""
    return len({run._reward_digest() for run in runs}) == 1


def _obstacle(runs: Sequence[Run], may_cost: bool) -> str | None:
    """Why the rollouts cannot be scored with every run's reward, or are not without being asked to; None where they are."""
    for run in runs:
        if not _is_here(run):
            return (
                f"the rewards differ, and that of {run.id} is not known here, as it was opened without it or is closed. To "
                "compare under each of them, open it with its functions: Run.open(folder, workflow, reward)"
            )
    if not may_cost and any(_may_cost(run) for run in runs):
        return (
            'the rewards differ. To compare under each of them, which may ask a model: ft.compare(..., rewards="all")'
        )
    return None


def _is_here(run: Run) -> bool:
    """Whether the run's reward can be called in this kernel."""
    if run._unable is not None or run._closed:
        return False
    sections, functions = run.config.eval.evaluators, _functions(run)
    parts = reward_parts(run.config)
    return all(name in functions or not isinstance(sections[name], PythonEvaluatorConfig) for name in parts)


def _may_cost(run: Run) -> bool:
    """Whether a part of the reward is async, or an evaluator of other people: it may ask a model that is paid for."""
    functions = _functions(run)
    for name in reward_parts(run.config):
        if isinstance(run.config.eval.evaluators[name], WeightedConfig):
            continue
        if name not in functions or batch_method(functions[name]) or RewardFunction(functions[name]).is_async:
            return True
    return False


def _functions(run: Run) -> dict[str, Any]:
    """The evaluators that the run was given as functions, by name."""
    return {name: each for kind, name, each in run._driver.components.added() if kind == "evaluator"}


@dataclass(frozen=True)
class _Scored:
    """An epoch as a comparison needs it."""

    index: int
    statistics: GroupStatistics


def _scored_by(judge: Run, runs: Sequence[Run]) -> Mapping[str, Sequence[Any]]:
    """The epochs that all runs have, with the rewards of one of them."""
    shared = set.intersection(*({epoch.index for epoch in run.records} for run in runs))
    found = {}
    for run in runs:
        try:
            rescored: Sequence[RescoredEpoch] = run._scored_by(judge, sorted(shared)) if shared else ()
        except FinetuneError as error:
            raise ConfigError(f"run {run.id} cannot be scored with the reward of {judge.id}: {error}") from error
        found[run.id] = [_Scored(epoch.index, epoch.after) for epoch in rescored]
    return found
