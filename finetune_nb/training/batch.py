"""What a training job learns from: token sequences made of trajectories, with the advantage of each sampled token.

Ids are taken as they were sampled; no text is ever tokenized again. Groups that cannot teach are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import BackendError, MissingLogprobs
from ..rewards.numbers import scale_of, within_floats
from ..rollouts.episodes import SampledTurn, sampled_turns
from ..types import DPOItem, MessageKey, Trajectory, TrajectoryCollection, finish_reason, sampled_tokens
from .curriculum import group_statistics
from .metrics import advantages, deviation_of_all

__all__ = [
    "LARGEST_ADVANTAGE",
    "TrainingBatch",
    "TokenSequence",
    "supervised_batch",
    "training_batch",
    "token_sequences",
    "turn_advantages",
    "where",
]


def turn_advantages(group: Sequence[Trajectory], scale_rewards: bool = True) -> list[list[float]]:
    """The advantage of each sampled turn, with credit for the part of the reward that the turn earned.

    Let rollout i of a group have the reward R_i, and let its turn k = 0, 1, ... have earned r_ik of it (its shaped rewards; 0
    if it has none). When turn k began, G_ik = R_i - (r_i0 + ... + r_i,k-1) was still to be earned: what the shaped rewards
    leave of R_i is earned at the end. All tokens of turn k have the advantage

        A_ik = (G_ik - mean over j of G_j,min(k, last turn of j)) / (std(R) + 1e-4)

    so a turn gets no credit for what was earned before it. The first turn, and every turn if nothing is shaped, has the
    advantage of plain GRPO. Rewards to go are those of DeepSeekMath's process supervision (arXiv 2402.03300, section 4.1.3),
    which normalises each step's reward instead. Which groups teach is still decided by the rewards R alone.

    Args:
        group: The trajectories of one example. Their rewards differ.
        scale_rewards: Whether to divide by the standard deviation of the rewards.

    Returns:
        For each trajectory a list with one advantage a sampled turn; NaN if it has no reward.

    Raises:
        BackendError: Shaped rewards are neither one a sampled turn nor one a message, or are not finite.
    """
    counted = [i for i, trajectory in enumerate(group) if not math.isnan(trajectory.reward)]
    turns = [len(sampled_turns(trajectory)) for trajectory in group]
    longest = max(turns, default=0)
    rewards = [group[i].reward for i in counted]
    shaped = [value for i in counted for value in group[i].shaped_rewards or ()]
    scale = scale_of([*rewards, *shaped])  # sums of huge rewards would overflow
    to_go_CK = np.empty((len(counted), longest))
    for row, i in enumerate(counted):
        left = group[i].reward / scale - np.cumsum([0.0, *_earned(group[i], scale)])[: max(turns[i], 1)]
        to_go_CK[row] = np.pad(left, (0, longest - len(left)), mode="edge") if longest else left[:0]
    advantages_CK = to_go_CK - to_go_CK.mean(0)
    if scale_rewards:
        advantages_CK /= np.std(np.array(rewards) / scale, ddof=1) + 1e-4 / scale
    else:
        with np.errstate(over="ignore"):
            advantages_CK = within_floats(advantages_CK * scale)
    found = [[math.nan] * count for count in turns]
    for row, i in enumerate(counted):
        found[i] = advantages_CK[row, : turns[i]].tolist()
    return found


def _earned(trajectory: Trajectory, scale: float) -> list[float]:
    """What each sampled turn earned, divided by `scale`. Of values that come one a message, a turn has those from it up to
    the next turn."""
    shaped, turns = trajectory.shaped_rewards, sampled_turns(trajectory)
    if not shaped:
        return [0.0] * len(turns)
    if not all(map(math.isfinite, shaped)):
        raise BackendError(f"{where(trajectory)} has shaped_rewards that are not finite: {shaped!r:.80}")
    shaped = [value / scale for value in shaped]
    if len(shaped) == len(turns):
        return shaped
    if len(shaped) != len(trajectory.episode) or not turns:
        raise BackendError(
            f"{where(trajectory)} has {len(shaped)} shaped_rewards; expected one for each of its {len(turns)} sampled "
            f"turns or one for each of its {len(trajectory.episode)} messages."
        )
    borders = [0, *turns[1:], len(shaped)]
    return [sum(shaped[begin:end]) for begin, end in itertools.pairwise(borders)]


def where(trajectory: Trajectory, turn: int | None = None) -> str:
    """The place of a trajectory, or of a turn in it, for a message."""
    metadata = trajectory.metadata or {}
    place = f"example {metadata.get('id')!r}, generation {metadata.get('generation')}"
    return f"the trajectory of {place}" if turn is None else f"turn {turn} of {place}"


@dataclass(slots=True)
class TokenSequence:
    """T tokens that the policy saw and sampled in one piece."""

    ids: list[int]
    """(T,)"""
    sampled: list[bool]
    """(T,) True for tokens that the policy sampled; the others are context: prompts, tools, the environment."""
    logprobs: list[float]
    """(T,) when sampled, at `temperature`; 0.0 for context, where it is ignored."""
    temperature: float
    """At which the logprobs hold, above 0."""
    advantages: list[float]
    """(T,) of the turn that a token belongs to; 0.0 for context."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What one training job learns from."""

    trajectories: list[list[TokenSequence]] = field(repr=False)
    """Those with a reward and a sampled token, in groups whose rewards differ, one group after the other; each has at least
    one sequence."""
    sizes: list[int]
    """Trajectories of each group."""
    groups_without_signal: int
    """Groups of which nothing is trained on: their rewards do not differ, are missing or infinite."""
    idle_tokens: int = 0
    """Sampled tokens of groups whose rewards do not differ."""
    idle_sequences: int = 0
    """Their trajectories."""
    truncated: int = 0
    """Trajectories that were submitted and whose last reply was cut at its longest length, trained on or not."""
    supervised: bool = False
    """Whether every sampled token is to become more likely, whatever the rewards were; advantages are then without meaning."""
    version_lag: int = 0
    """Policy versions by which the oldest weights that sampled are older than those that are trained."""

    @property
    def groups(self) -> int:
        """Groups that the trajectories belong to."""
        return len(self.sizes)

    def parts(self, count: int, rng: np.random.Generator, whole_groups: bool = False) -> list[np.ndarray]:
        """The places of all trajectories in random order, in `count` parts of as many: one for each optimizer step.

        whole_groups: those of a group stay together, except where a part ends within a group.
        """
        order = rng.permutation(len(self.trajectories))
        if whole_groups:
            group_of = np.repeat(rng.permutation(len(self.sizes)), self.sizes)
            order = order[np.argsort(group_of[order], kind="stable")]
        return np.array_split(order, count)

    def sequences(self) -> Iterator[TokenSequence]:
        return (sequence for trajectory in self.trajectories for sequence in trajectory)


def training_batch(
    collection: TrajectoryCollection,
    scale_rewards: bool | Literal["batch"] = True,
    truncated: Literal["train", "mask"] = "train",
    baseline: Literal["mean", "leave one out"] = "mean",
) -> TrainingBatch:
    """What `collection` can teach. Raises BackendError or MissingLogprobs where a turn lacks what training needs.

    scale_rewards: advantages are divided by the standard deviation of their group's rewards; "batch": by that of all of them.
    truncated: whether trajectories whose last reply was cut are trained on; their rewards count in their group either way.
    baseline: what is taken from a reward, the mean of its group or that of the others in it.
    """
    groups = collection.trajectories
    statistics = group_statistics(groups)
    advantage_of = iter(advantages(statistics, scale=scale_rewards is True).tolist())
    # What an advantage is multiplied with: 1 / the standard deviation of all rewards; and n / (n - 1), which makes the mean of a
    # group that of the others.
    factor = 1.0
    if scale_rewards == "batch":
        factor = 1 / (deviation_of_all(statistics) + 1e-4)
    idle_tokens = idle_sequences = 0
    trained: list[list[TokenSequence]] = []
    sizes: list[int] = []
    cut = 0
    for group in groups:
        cut += sum(finish_reason(trajectory) == "length" for trajectory in group)
        weights = [next(advantage_of) for _ in group]
        if not any(weight for weight in weights if math.isfinite(weight)):
            idle = [t for t in group if math.isfinite(t.reward)]
            idle_sequences, idle_tokens = idle_sequences + len(idle), idle_tokens + sum(map(sampled_tokens, idle))
            continue
        rewarded = sum(math.isfinite(weight) for weight in weights)
        by = factor * (rewarded / (rewarded - 1) if baseline == "leave one out" and rewarded > 1 else 1.0)
        weights = [weight * by for weight in weights]
        of_turns: list[list[float] | None] = [None] * len(group)
        if any(trajectory.shaped_rewards for trajectory in group):
            of_turns = [[each * by for each in found] for found in turn_advantages(group, scale_rewards is True)]
        of_group = []
        for trajectory, weight, of_turn in zip(group, weights, of_turns, strict=True):
            if not math.isfinite(weight) or (truncated == "mask" and finish_reason(trajectory) == "length"):
                continue
            advantage = weight if of_turn is None else of_turn
            _check_size(advantage, trajectory)
            if sequences := token_sequences(trajectory, advantage):
                of_group.append(sequences)
        if of_group:
            trained += of_group
            sizes.append(len(of_group))
    return TrainingBatch(trained, sizes, len(groups) - len(sizes), idle_tokens, idle_sequences, truncated=cut)


def supervised_batch(collection: TrajectoryCollection) -> TrainingBatch:
    """What `collection` can teach by its sampled tokens alone. Raises BackendError or MissingLogprobs where a turn lacks what
    training needs, or where no turn was sampled."""
    learned, cut = [], 0
    for group in collection.trajectories:
        for trajectory in group:
            cut += finish_reason(trajectory) == "length"
            sequences = token_sequences(trajectory)
            if not sequences:
                raise BackendError(
                    f"{where(trajectory)} has no turn that a policy sampled, so nothing can be learned from it."
                )
            learned.append(sequences)
    sizes = list(map(len, collection.trajectories))
    return TrainingBatch(learned, sizes, 0, truncated=cut, supervised=True)


LARGEST_ADVANTAGE = 1e15
"""Losses and gradients are float32, in which the square of 1e20 is infinite."""


def _check_size(advantage: float | Sequence[float], trajectory: Trajectory) -> None:
    """Raises BackendError for an advantage of which no finite loss can be made."""
    values = advantage if isinstance(advantage, Sequence) else [advantage]
    largest = max((abs(value) for value in values), default=0.0)
    if largest > LARGEST_ADVANTAGE:
        raise BackendError(
            f"{where(trajectory)} has an advantage of {largest:.3g}, for a reward of {trajectory.reward:.3g}; expected at most "
            f"{LARGEST_ADVANTAGE:.0e}, which is all that a float32 loss can take. Bound the reward and its parts, or let the "
            "adapter divide by the standard deviation of each group's rewards (scale_rewards: true)."
        )


def token_sequences(trajectory: Trajectory, advantage: float | Sequence[float] = math.nan) -> list[TokenSequence]:
    """The sampled turns of an episode, as few sequences as possible: a turn whose prompt begins with all of an earlier
    sequence carries that one on, any other begins a new one. Turns with `logprobs == []` are context.

    advantage: of the trajectory, or one for each sampled turn.
    """
    for item in trajectory.episode:
        if isinstance(item, DPOItem):
            raise BackendError(
                "this backend got a preference (DPOItem); expected episodes of EpisodeItems with rewards. "
                "Use a trajectory builder that makes episodes, or a backend that learns from preferences."
            )
    sequences: list[TokenSequence] = []
    places = sampled_turns(trajectory)
    of_turns = advantage if isinstance(advantage, Sequence) else [advantage] * len(places)
    for place, weight in zip(places, of_turns, strict=True):
        turn = SampledTurn.of(trajectory.episode[place])
        assert turn is not None
        prompt, reply, logprobs, temperature = _checked(turn, where(trajectory, place))
        sequence = next(
            (
                s
                for s in reversed(sequences)
                if s.temperature == temperature and len(s) <= len(prompt) and s.ids == prompt[: len(s)]
            ),
            None,
        )
        if sequence is None:
            sequence = TokenSequence([], [], [], temperature, [])
            sequences.append(sequence)
        context = prompt[len(sequence) :]
        sequence.ids += context + reply
        sequence.sampled += [False] * len(context) + [True] * len(reply)
        sequence.logprobs += [0.0] * len(context) + logprobs
        sequence.advantages += [0.0] * len(context) + [weight] * len(reply)
    return sequences


def _checked(turn: SampledTurn, where: str) -> tuple[list[int], list[int], list[float], float]:
    """Prompt ids, reply ids, logprobs and temperature of a sampled turn.

    Raises:
        MissingLogprobs: It has none, or none that can be read.
        BackendError: It has no ids, or ids and logprobs do not fit each other.
    """
    logprobs = turn.logprobs
    if logprobs is None:
        raise MissingLogprobs(
            f"{where} has no logprobs. Sample with the adapter's policy, or mark a turn that is not to be trained on "
            "with logprobs=[]."
        )
    if not turn.prompt_ids or not turn.ids:
        missing = MessageKey.PROMPT_TOKEN_IDS if turn.ids else MessageKey.TOKEN_IDS
        raise BackendError(
            f"{where} has {len(logprobs)} logprobs but no metadata[{missing!r}]: text is not tokenized again, as that can give "
            "other tokens than were sampled. Sample with the adapter's policy, which records the ids."
        )
    prompt, reply = list(turn.prompt_ids), list(turn.ids)
    if not all(type(token) is int and token >= 0 for token in prompt + reply):
        raise BackendError(f"{where} has token ids that are not whole numbers from 0 up.")
    if len(reply) != len(logprobs):
        raise BackendError(f"{where} has {len(reply)} token ids but {len(logprobs)} logprobs; expected one for each.")
    if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):  # rounding may exceed 0 a little
        raise BackendError(f"{where} has logprobs that are not finite numbers up to 0.")
    # Greedy replies carry their logprobs at temperature 1; where it is not told, 1 is what most samplers default to.
    return prompt, reply, logprobs, float(turn.temperature or 1.0)
