"""PreferenceBuilder: pairs of a better and a worse response, for backends that learn from preferences (DPO).

They come from the rollouts of one example, or from the candidates of one turn. Two rollouts are compared where they part: what
both have in common is the prompt, the next turn of each is the response. Candidates are what a workflow pushes as TTC_END steps
with TTCEventData: several responses to one prompt, each with a score. A pair is one trajectory, whose reward is the difference of
the two rewards or scores. Both are in its metadata.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from ..components.builder import Builder
from ..components.registry import register_trajectory_builder
from ..llms.chat_messages import field_of
from ..redaction import redacting_logger
from ..text import text_of
from ..types import (
    DPOItem,
    EpisodeItem,
    EvaluationRunOutput,
    IntermediateStep,
    IntermediateStepType,
    OpenAIMessage,
    RolloutFailure,
    Trajectory,
    TrajectoryCollection,
    TTCEventData,
    is_sampled,
)
from .episodes import SampledTurn
from .trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig

__all__ = [
    "Candidate",
    "PreferenceBuilder",
    "PreferenceBuilderConfig",
    "candidate_pairs",
    "candidates_of",
    "preference_pairs",
]

logger = redacting_logger(__name__)

Pairing = Literal["best_worst", "all_pairs"]
SMALLEST = 1e-9
"""Rewards that differ by less are equal."""


class PreferenceBuilderConfig(EvalTrajectoryBuilderConfig, name="preference_builder"):
    """Preferences from evaluation runs, with the settings that the NeMo Agent Toolkit's builder and trainer for DPO have. With
    curriculum learning, set its min_reward_diff to 0: a group of one pair has no spread of its own."""

    ttc_step_name: str | None = None
    """Name of the TTC_END steps whose candidates are compared, turn by turn. None: whole rollouts of an example are compared, by
    their rewards."""
    exhaustive_pairs: bool = True
    """Each response against each that is worse. False: the best against the worst alone."""
    min_score_diff: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Scores, or rewards, that differ by less make no pair. Equal ones never do."""
    max_pairs_per_turn: int | None = Field(default=None, ge=1)
    """Most pairs of one turn; where whole rollouts are compared, of one example. Those with the largest difference are taken.
    None: all."""
    reward_from_score_diff: bool = True
    """The reward of a pair is the difference of the two scores. False: the score of the better one."""
    require_multiple_candidates: Literal[True] = True
    """A turn with one candidate makes no pair: it says nothing of what is better."""
    deduplicate_pairs: bool = True
    """Of pairs with the same prompt and the same two responses, one an epoch is kept."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Most pairs of an epoch; of more, so many are drawn by the run's seed. None: all."""


def preference_pairs(
    group: Sequence[Trajectory],
    pairs: Pairing = "best_worst",
    min_reward_difference: float = SMALLEST,
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several responses to a prompt."""

    prompt: str | list[OpenAIMessage]
    response: str
    score: float
    index: int
    """Which candidate of its turn it is, from 0."""


def candidates_of(steps: Iterable[IntermediateStep], name: str) -> tuple[dict[str, list[Candidate]], int]:
    """The candidates that a rollout pushed, by turn, and how many such steps have no turn or no finite score.

    Args:
        steps: The rollout's.
        name: Of the TTC_END steps that count.

    Returns:
        By `turn_id` its candidates in the order in which they came, and the number of steps left out.
    """
    turns: dict[str, list[Candidate]] = {}
    left_out = 0
    for step in steps:
        if step.event_type != IntermediateStepType.TTC_END or step.name != name:
            continue
        data = step.data
        if not isinstance(data, TTCEventData) or data.turn_id is None or not _is_finite(data.score):
            left_out += 1
            continue
        response = "" if data.output is None else str(data.output)
        turn = turns.setdefault(data.turn_id, [])
        index = len(turn) if data.candidate_index is None else data.candidate_index
        turn.append(Candidate(_prompt_of(data.input, response), response, float(data.score or 0.0), index))
    return turns, left_out


def _is_finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _prompt_of(given: Any, response: str) -> str | list[OpenAIMessage]:
    """A prompt as messages, or as text. Some workflows give the whole conversation: the response at its end is no prompt."""
    if not isinstance(given, list):
        return "" if given is None else str(given)
    messages = [OpenAIMessage(role=str(field_of(m, "role")), content=text_of(field_of(m, "content"))) for m in given]
    if len(messages) > 1 and messages[-1].role == "assistant" and messages[-1].content == response:
        messages.pop()
    return messages


def candidate_pairs(
    candidates: Sequence[Candidate],
    exhaustive_pairs: bool = True,
    min_score_diff: float = 0.0,
    max_pairs: int | None = None,
) -> list[tuple[Candidate, Candidate]]:
    """The preferences among the candidates of one turn, each the better and the worse, the largest difference first.

    Args:
        candidates: Of one turn.
        exhaustive_pairs: Each against each that is worse, or only the best against the worst.
        min_score_diff: Scores that differ by less make no pair, and equal ones never do.
        max_pairs: Most pairs. Default: all.

    Returns:
        The pairs. Of two candidates with the same response there is none.
    """
    ranked = sorted(candidates, key=lambda candidate: -candidate.score)  # ties stay in their order
    pairs = list(itertools.combinations(ranked, 2))
    if not exhaustive_pairs:
        pairs = [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
    kept = [(better, worse) for better, worse in pairs if better.response != worse.response]
    kept = [pair for pair in kept if 0 < pair[0].score - pair[1].score >= min_score_diff]
    return sorted(kept, key=lambda pair: pair[1].score - pair[0].score)[:max_pairs]


class PreferenceBuilder(EvalTrajectoryBuilder):
    """Collects as EvalTrajectoryBuilder does, and hands over pairs. Rollouts without a reward are failures where whole rollouts
    are compared."""

    async def collect(
        self, outputs: Sequence[EvaluationRunOutput | BaseException], run_id: str, meta: dict | None = None
    ) -> TrajectoryCollection:
        config = self.trajectory_builder_config
        assert isinstance(config, PreferenceBuilderConfig)
        collection = await super().collect(outputs, run_id, meta)
        failures = list(collection.failures)
        if config.ttc_step_name is None:
            failures += [_unrated(t) for group in collection.trajectories for t in group if math.isnan(t.reward)]
            examples = len(collection.trajectories)
            groups = [self._of_rollouts(group) for group in collection.trajectories]
            why = "their rollouts have equal rewards or none, or say the same"
        else:
            by_example = self._of_turns(outputs, collection, run_id)
            examples, groups = len(by_example), list(by_example.values())
            made = {(text_of(_about(t)["id"]), _about(t)["generation"]) for group in groups for t in group}
            # A rollout of which there are candidates is none that failed, if no model call of it was recorded.
            failures = [each for each in failures if (text_of(each.example_id), each.generation) not in made]
            why = (
                f"no turn of theirs has two different responses with different scores in steps {config.ttc_step_name!r}"
            )
        groups = self._selected([group for group in groups if group], (meta or {}).get("epoch", 0))
        if len(groups) < examples:
            logger.warning("%d of %d examples make no preference: %s.", examples - len(groups), examples, why)
        return TrajectoryCollection(trajectories=groups, run_id=run_id, failures=failures)

    def _of_rollouts(self, group: Sequence[Trajectory]) -> list[Trajectory]:
        config = self.trajectory_builder_config
        assert isinstance(config, PreferenceBuilderConfig)
        most = len(group) ** 2 if config.max_pairs_per_turn is None else config.max_pairs_per_turn
        found = preference_pairs(
            group, "all_pairs" if config.exhaustive_pairs else "best_worst", config.min_score_diff or SMALLEST, most
        )
        if config.reward_from_score_diff:
            return found
        return [pair.model_copy(update={"reward": _about(pair)["chosen_reward"]}) for pair in found]

    def _of_turns(
        self, outputs: Sequence[EvaluationRunOutput | BaseException], collection: TrajectoryCollection, run_id: str
    ) -> dict[str, list[Trajectory]]:
        """By example its pairs, turn by turn."""
        config = self.trajectory_builder_config
        assert isinstance(config, PreferenceBuilderConfig) and config.ttc_step_name is not None
        recorded = {
            (text_of(_about(t)["id"]), _about(t)["generation"]): _about(t)
            for group in collection.trajectories
            for t in group
        }
        groups: dict[str, list[Trajectory]] = {}
        left_out = 0
        for generation, output in enumerate(outputs):
            if isinstance(output, BaseException):
                continue
            failed = {text_of(failure.example_id) for failure in output.failures}
            for item in output.eval_input.eval_input_items:
                if text_of(item.id) in failed:
                    continue
                group = groups.setdefault(text_of(item.id), [])
                known = recorded.get((text_of(item.id), generation), {})
                about = {"id": item.id, "generation": generation, "run_id": run_id}
                about |= {"policy_version": known.get("policy_version"), "scores": known.get("scores")}
                turns, unusable = candidates_of(item.trajectory, config.ttc_step_name)
                left_out += unusable
                for turn_id, candidates in turns.items():
                    for better, worse in candidate_pairs(
                        candidates, config.exhaustive_pairs, config.min_score_diff, config.max_pairs_per_turn
                    ):
                        group.append(
                            _turn_pair(better, worse, about | {"turn_id": turn_id}, config.reward_from_score_diff)
                        )
        if left_out:
            logger.warning(
                "%d steps %r have no turn_id or no finite score, and are left out.", left_out, config.ttc_step_name
            )
        return groups

    def _selected(self, groups: list[list[Trajectory]], epoch: int) -> list[list[Trajectory]]:
        """Without what is there twice, and at most `max_pairs` of them."""
        config = self.trajectory_builder_config
        assert isinstance(config, PreferenceBuilderConfig)
        if config.deduplicate_pairs:
            seen: set[tuple[str, str, str]] = set()
            groups = [[pair for pair in group if _is_new(pair, seen)] for group in groups]
        pairs = [pair for group in groups for pair in group]
        if config.max_pairs is not None and len(pairs) > config.max_pairs:
            drawn = random.Random(f"{self.seed}/{epoch}").sample(range(len(pairs)), config.max_pairs)
            kept = {id(pairs[place]) for place in drawn}
            logger.info("%d of %d pairs are drawn: max_pairs.", config.max_pairs, len(pairs))
            groups = [[pair for pair in group if id(pair) in kept] for group in groups]
        return [group for group in groups if group]


def _about(trajectory: Trajectory) -> dict[str, Any]:
    return trajectory.metadata or {}


def _is_new(pair: Trajectory, seen: set[tuple[str, str, str]]) -> bool:
    """Whether no pair before had the same prompt and responses."""
    item = pair.episode[0]
    assert isinstance(item, DPOItem)
    same = repr(item.prompt), item.chosen_response, item.rejected_response
    if same in seen:
        return False
    seen.add(same)
    return True


def _turn_pair(better: Candidate, worse: Candidate, about: dict[str, Any], from_difference: bool) -> Trajectory:
    difference = better.score - worse.score
    item = DPOItem(prompt=better.prompt, chosen_response=better.response, rejected_response=worse.response)
    metadata = about | {
        "chosen_score": better.score,
        "rejected_score": worse.score,
        "score_diff": difference,
        "chosen_index": better.index,
        "rejected_index": worse.index,
    }
    return Trajectory(episode=[item], reward=difference if from_difference else better.score, metadata=metadata)


@register_trajectory_builder(config_type=PreferenceBuilderConfig)
async def preference_builder(config: PreferenceBuilderConfig, builder: Builder):
    general = builder.config.eval.general
    preferences = PreferenceBuilder(
        config, builder.config.run.seed, lambda: general.max_concurrency, await builder.get_executor()
    )
    yield preferences
    await preferences.aclose()
