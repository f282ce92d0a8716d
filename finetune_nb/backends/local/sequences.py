"""Trajectories -> token sequences that can be trained on: ids, which of them the policy sampled, with what log
probability, and the advantage of the trajectory. Ids are taken as they were sampled; no text is ever tokenized again.

Which groups are handed over is the curriculum's choice, made before; here only those are left out that cannot teach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...curriculum import group_statistics
from ...errors import BackendError, MissingLogprobs
from ...metrics import advantages
from ...types import DPOItem, EpisodeItem, EpisodeItemRole, Trajectory, TrajectoryCollection, logprob_values

__all__ = ["Experience", "TokenSequence", "experience", "micro_batches", "token_sequences"]


@dataclass(slots=True)
class TokenSequence:
    """T tokens that the policy saw and sampled in one piece."""

    ids: list[int]
    """(T,)"""
    sampled: list[bool]
    """(T,) True for tokens that the policy sampled; the others are context."""
    logprobs: list[float]
    """(T,) when sampled, at `temperature`; 0.0 for context, where it is ignored."""
    temperature: float
    """At which the logprobs hold, above 0."""
    advantage: float = math.nan

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Experience:
    """What one training job learns from."""

    trajectories: list[list[TokenSequence]] = field(repr=False)
    """Those with a reward and a sampled token, in groups whose rewards differ; each has at least one sequence."""
    groups: int
    """Groups that they belong to."""
    groups_without_signal: int
    """Groups of which nothing is trained on: their rewards do not differ, are missing or infinite."""

    def sequences(self) -> Iterator[TokenSequence]:
        return (sequence for trajectory in self.trajectories for sequence in trajectory)


def experience(collection: TrajectoryCollection, scale_rewards: bool = True) -> Experience:
    """What `collection` can teach. Raises BackendError or MissingLogprobs where a turn lacks what training needs.

    scale_rewards: advantages are divided by the standard deviation of their group's rewards.
    """
    groups = collection.trajectories
    advantage_of = iter(advantages(group_statistics(groups), scale=scale_rewards).tolist())
    trained: list[list[TokenSequence]] = []
    with_signal = 0
    for group in groups:
        weights = [next(advantage_of) for _ in group]
        if not any(weight for weight in weights if math.isfinite(weight)):
            continue
        of_group = []
        for trajectory, weight in zip(group, weights, strict=True):
            sequences = token_sequences(trajectory) if math.isfinite(weight) else []
            for sequence in sequences:
                sequence.advantage = weight
            if sequences:
                of_group.append(sequences)
        trained += of_group
        with_signal += bool(of_group)
    return Experience(trained, with_signal, len(groups) - with_signal)


def token_sequences(trajectory: Trajectory) -> list[TokenSequence]:
    """The sampled turns of an episode, as few sequences as possible: a turn whose prompt begins with all of an earlier
    sequence carries that one on, any other begins a new one. Turns with `logprobs == []` are context."""
    sequences: list[TokenSequence] = []
    for turn, item in enumerate(trajectory.episode):
        if isinstance(item, DPOItem):
            raise BackendError(
                "local_grpo got a preference (DPOItem); expected episodes of EpisodeItems with rewards. "
                "Use a trajectory builder that makes episodes, or a backend that learns from preferences."
            )
        if item.role != EpisodeItemRole.ASSISTANT:
            continue
        logprobs = logprob_values(item.logprobs)
        if logprobs == []:
            continue
        prompt, reply, temperature = _sampled_ids(item, logprobs, _where(trajectory, turn))
        assert logprobs is not None
        sequence = next(
            (
                s
                for s in reversed(sequences)
                if s.temperature == temperature and len(s) <= len(prompt) and s.ids == prompt[: len(s)]
            ),
            None,
        )
        if sequence is None:
            sequence = TokenSequence([], [], [], temperature)
            sequences.append(sequence)
        context = prompt[len(sequence) :]
        sequence.ids += context + reply
        sequence.sampled += [False] * len(context) + [True] * len(reply)
        sequence.logprobs += [0.0] * len(context) + logprobs
    return sequences


def _sampled_ids(item: EpisodeItem, logprobs: list[float] | None, where: str) -> tuple[list[int], list[int], float]:
    """Prompt ids, reply ids and temperature of a sampled turn."""
    metadata = item.metadata or {}
    if logprobs is None:
        raise MissingLogprobs(
            f"{where} has no logprobs. Sample with the adapter's policy, or mark a turn that is not to be trained on "
            "with logprobs=[]."
        )
    prompt, reply = metadata.get("prompt_token_ids"), metadata.get("token_ids")
    if not prompt or not reply:
        missing = "metadata['token_ids']" if not reply else "metadata['prompt_token_ids']"
        raise BackendError(
            f"{where} has {len(logprobs)} logprobs but no {missing}: text is not tokenized again, as that can give "
            "other tokens than were sampled. Sample with the adapter's policy, which records the ids."
        )
    prompt, reply = list(prompt), list(reply)
    if not all(type(token) is int and token >= 0 for token in prompt + reply):
        raise BackendError(f"{where} has token ids that are not whole numbers from 0 up.")
    if len(reply) != len(logprobs):
        raise BackendError(f"{where} has {len(reply)} token ids but {len(logprobs)} logprobs; expected one for each.")
    if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):  # rounding may exceed 0 a little
        raise BackendError(f"{where} has logprobs that are not finite numbers up to 0.")
    # Greedy replies carry their logprobs at temperature 1; where it is not told, 1 is what most samplers default to.
    return prompt, reply, float(metadata.get("temperature") or 1.0)


def _where(trajectory: Trajectory, turn: int) -> str:
    metadata = trajectory.metadata or {}
    return f"turn {turn} of example {metadata.get('id')!r}, generation {metadata.get('generation')}"


def micro_batches(sequences: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[TokenSequence]]:
    """Splits an optimizer batch so that rows times longest row stay within `max_tokens`, a sequence that is longer by
    itself excepted. Sequences of like length come together, so that little is padded."""
    batch: list[TokenSequence] = []
    for sequence in sorted(sequences, key=len):
        if batch and len(sequence) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
