"""PreferenceBuilder: of the rollouts of one example, pairs of a better and a worse one, for backends that learn from
preferences (DPO).

Two rollouts are compared where they part: what both have in common is the prompt, the next turn of each is the response.
A pair is one trajectory, whose reward is the difference of the two rewards; `chosen_reward` and `rejected_reward` are in
its metadata, and a validation shows the rewards themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from ..components.builder import Builder
from ..components.registry import register_trajectory_builder
from ..redaction import redacting_logger
from ..types import (
    DPOItem,
    EpisodeItem,
    EvaluationRunOutput,
    OpenAIMessage,
    RolloutFailure,
    Trajectory,
    TrajectoryCollection,
    is_sampled,
)
from .episodes import SampledTurn
from .trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig

__all__ = [
    "PreferenceBuilder",
    "PreferenceBuilderConfig",
    "preference_pairs",
]

logger = redacting_logger(__name__)

Pairing = Literal["best_worst", "all_pairs"]


class PreferenceBuilderConfig(EvalTrajectoryBuilderConfig, name="preference_builder"):
    """Preferences from evaluation runs. With curriculum learning, set its min_reward_diff to 0: a group of one pair has no
    spread of its own."""

    pairs: Pairing = "best_worst"
    """"best_worst": the best rollout of an example against its worst. "all_pairs": each against each."""
    min_reward_difference: float = Field(default=1e-9, gt=0, allow_inf_nan=False)
    """Rewards that differ by less make no pair."""
    max_pairs_per_example: int = Field(default=8, ge=1)
    """Of more pairs, those with the largest difference are taken."""


def preference_pairs(
    group: Sequence[Trajectory],
    pairs: Pairing = "best_worst",
    min_reward_difference: float = 1e-9,
    max_pairs: int = 8,
) -> list[Trajectory]:
    """The preferences within the rollouts of one example, the largest difference first.

    Rollouts without a finite reward, or that do not part at a turn that the policy sampled, make none. The same two
    responses to the same prompt make one pair only, also where they were once judged the other way round.
    """
    rated = [t for t in group if math.isfinite(t.reward)]
    ranked = sorted(rated, key=lambda t: -t.reward)  # ties stay in their order
    candidates = itertools.combinations(ranked, 2)
    if pairs == "best_worst":
        candidates = iter([(ranked[0], ranked[-1])] if len(ranked) > 1 else [])
    found: list[Trajectory] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    for better, worse in sorted(candidates, key=lambda pair: pair[1].reward - pair[0].reward):
        difference = better.reward - worse.reward
        if difference < min_reward_difference or len(found) == max_pairs:
            break
        item = _preference(better, worse)
        if item is None:
            continue
        same = repr(item.prompt), frozenset((item.chosen_response, item.rejected_response))
        if same not in seen:
            seen.add(same)
            found.append(_pair(item, better, worse, difference))
    return found


def _pair(item: DPOItem, better: Trajectory, worse: Trajectory, difference: float) -> Trajectory:
    chosen, rejected = better.metadata or {}, worse.metadata or {}
    versions = [v for v in (chosen.get("policy_version"), rejected.get("policy_version")) if v is not None]
    metadata = {
        "id": chosen.get("id"),
        "generation": chosen.get("generation"),
        "run_id": chosen.get("run_id"),
        "policy_version": min(versions, default=None),
        "rejected_generation": rejected.get("generation"),
        "chosen_reward": better.reward,
        "rejected_reward": worse.reward,
        "scores": chosen.get("scores"),
    }
    return Trajectory(episode=[item], reward=difference, metadata=metadata)


def _preference(better: Trajectory, worse: Trajectory) -> DPOItem | None:
    """Prompt and responses at the turn where two rollouts part; None where that is not a turn of the policy's in both."""
    prompt: list[OpenAIMessage] = []
    for mine, other in zip(better.episode, worse.episode, strict=False):
        if not isinstance(mine, EpisodeItem) or not isinstance(other, EpisodeItem):
            return None
        text, other_text = _text(mine), _text(other)
        if mine.role == other.role and text == other_text:
            prompt.append(OpenAIMessage(role=mine.role.value, content=text))
            continue
        if not (is_sampled(mine) and is_sampled(other)) or not prompt:
            return None
        return DPOItem(prompt=prompt, chosen_response=text, rejected_response=other_text)
    return None


def _text(item: EpisodeItem) -> str:
    """What a turn says. A tool call has no content: its text is what the policy wrote, without the token that ended it."""
    turn = SampledTurn.of(item)
    if turn is None or not turn.tool_calls or not turn.tokens:
        return item.content
    return "".join(turn.tokens[:-1] if turn.finish_reason == "stop" else turn.tokens)


def _unrated(trajectory: Trajectory) -> RolloutFailure:
    """A rollout without a reward. It can make no preference, and its trajectory ends here."""
    metadata = trajectory.metadata or {}
    why = metadata.get("reward_error") or "no reason was recorded"
    return RolloutFailure(metadata.get("id"), metadata.get("generation") or 0, f"no reward: {why}")


class PreferenceBuilder(EvalTrajectoryBuilder):
    """Collects as EvalTrajectoryBuilder does, and hands over pairs. Rollouts without a reward are failures."""

    async def collect(
        self, outputs: Sequence[EvaluationRunOutput | BaseException], run_id: str, meta: dict | None = None
    ) -> TrajectoryCollection:
        collection = await super().collect(outputs, run_id, meta)
        unrated = [_unrated(t) for group in collection.trajectories for t in group if math.isnan(t.reward)]
        groups = list(self._pairs(collection.trajectories))
        without = len(collection.trajectories) - len(groups)
        if without:
            logger.warning(
                "%d of %d examples make no preference: their rollouts have equal rewards or none, or say the same.",
                without, len(collection.trajectories),
            )  # fmt: skip
        return TrajectoryCollection(trajectories=groups, run_id=run_id, failures=collection.failures + unrated)

    def _pairs(self, groups: Sequence[list[Trajectory]]) -> Iterator[list[Trajectory]]:
        config = self.trajectory_builder_config
        assert isinstance(config, PreferenceBuilderConfig)
        for group in groups:
            pairs = preference_pairs(group, config.pairs, config.min_reward_difference, config.max_pairs_per_example)
            if pairs:
                yield pairs


@register_trajectory_builder(config_type=PreferenceBuilderConfig)
async def preference_builder(config: PreferenceBuilderConfig, builder: Builder):
    general = builder.config.eval.general
    preferences = PreferenceBuilder(
        config, builder.config.run.seed, lambda: general.max_concurrency, await builder.get_executor()
    )
    yield preferences
    await preferences.aclose()
