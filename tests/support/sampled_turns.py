"""Turns with their token ids, given or sampled, and trajectories and collections of them to train on."""

from __future__ import annotations

import asyncio

from finetune_nb.types import EpisodeItem, EpisodeKey, SamplingParams, Trajectory, TrajectoryCollection

PROMPT = [3, 10, 11]


def turn(prompt, ids, logprobs, **metadata):
    """An assistant's turn: the ids of its prompt, those that were sampled, and their logprobs."""
    metadata = {"prompt_token_ids": prompt, "token_ids": ids, "temperature": 1.0, **metadata}
    return EpisodeItem(role="assistant", content="", logprobs=logprobs, metadata=metadata)


def trajectory(reward, *turns, example="q", version=0):
    return Trajectory(episode=list(turns), reward=reward, metadata={"id": example, "policy_version": version})


def collection(*groups):
    return TrajectoryCollection(trajectories=[list(group) for group in groups], run_id="run")


async def rollouts(adapter, reward, examples=4, generations=8, tokens=6):
    """One sampled turn each; `reward(ids)` is what it earns."""

    async def one(example, generation):
        prompt = [*PROMPT, 20 + example]
        with adapter.policy.episode(EpisodeKey("train", 0, example, generation)):  # batches form when all wait
            sample = await adapter.policy.sample(prompt, SamplingParams(1.0, tokens), seed=100 * example + generation)
        answer = turn(prompt, sample.ids, sample.logprobs)
        return trajectory(reward(sample.ids), answer, example=example, version=adapter.policy.version)

    groups = [asyncio.gather(*(one(e, g) for g in range(generations))) for e in range(examples)]
    return collection(*await asyncio.gather(*groups))


def by_first_token(ids):
    return float(ids[0] % 2)


async def train(adapter, trajectories):
    return await adapter.wait_until_complete(await adapter.submit(trajectories))
