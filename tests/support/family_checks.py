"""What sampling and training have to give, computed the plain way: one forward pass over one sequence at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from byte_tokenizer import byte_tokenizer
from torch import Tensor

from finetune_nb.backends.local.config import LocalGRPOConfig, LoRAConfig
from finetune_nb.backends.local.families.positions import borders_of
from finetune_nb.backends.local.lora import with_adapter
from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.backends.local.training import Learner, TrainingReport
from finetune_nb.training.batch import TokenSequence, TrainingBatch
from finetune_nb.types import EpisodeKey, Sample, SamplingParams

__all__ = [
    "Turn",
    "logprobs_alone",
    "made_policy",
    "plain_gradient",
    "plain_logprobs",
    "sampled_episodes",
    "trained_gradient",
]

LENGTHS = (3, 9, 9, 20, 5, 30)
"""Tokens of the prompts that are sampled together."""


@dataclass
class Turn:
    """One reply."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    sample: Sample

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.sample.ids]


def made_policy(model: Any, lora: bool = False) -> LocalPolicy:
    """A policy of that model; with an adapter whose weights are drawn, all that matter, so that it changes something."""
    if lora:
        model = with_adapter(model, LoRAConfig(rank=4), seed=0)
        generator = torch.Generator().manual_seed(1)
        for weight in _used(model, "lora_B"):
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return LocalPolicy(model, byte_tokenizer(), deterministic=True)


def _used(model: Any, kind: str) -> list[Tensor]:
    """Weights of that kind which logits depend on. Of some layers a model reads the weight and never calls the layer: their
    adapters learn nothing, and stay 0."""
    weights = [weight for name, weight in model.named_parameters() if kind in name]
    logits = model(torch.arange(3, 12)[None], use_cache=False).logits
    gradients = torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)
    return [w for w, gradient in zip(weights, gradients, strict=True) if gradient is not None and bool(gradient.any())]


async def sampled_episodes(policy: LocalPolicy, turns: int = 2) -> list[list[Turn]]:
    """Episodes that are sampled together, of different lengths; the longest have one turn."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 262, (length,), generator=generator).tolist() for length in LENGTHS]

    async def episode(number: int, ids: list[int]) -> list[Turn]:
        made = []
        params = SamplingParams(1.0, 5 + 2 * number)
        with policy.episode(EpisodeKey("train", 0, number, 0)):
            for turn in range(1 if len(ids) >= 20 else turns):
                seed = 10 * number + turn
                made.append(Turn(ids, params, seed, await policy.sample(ids, params, seed)))
                ids = [*made[-1].ids, 3, 7]  # what the environment says
        return made

    return await asyncio.gather(*(episode(number, ids) for number, ids in enumerate(prompts)))


async def logprobs_alone(policy: LocalPolicy, turn: Turn) -> list[float]:
    """Of the same reply, sampled alone."""
    alone = await policy.sample(turn.prompt, turn.params, turn.seed)
    assert alone.ids == turn.sample.ids
    return alone.logprobs


def plain_logprobs(model: Any, ids: list[int], begin: int) -> Tensor:
    """Of the tokens from `begin` on: a plain pass over the sequence alone.

    Where positions change with the length of a sequence, the tokens that come before the change are those of a plain pass over
    what comes before it.
    """
    parts = []
    for border in borders_of(model):
        if begin <= border < len(ids):
            parts.append(_of_pass(model, ids[: border + 1], begin, ids[:border]))
            begin = border + 1
    if begin < len(ids):
        parts.append(_of_pass(model, ids, begin, ids))
    return torch.cat(parts)


def _of_pass(model: Any, ids: list[int], begin: int, given: list[int]) -> Tensor:
    logprobs_TV = model(torch.tensor([given]), use_cache=False).logits[0].float().log_softmax(-1)
    return logprobs_TV[begin - 1 : len(ids) - 1].gather(1, torch.tensor(ids[begin:])[:, None]).squeeze(1)


def _sequence(episode: list[Turn], number: int) -> TokenSequence:
    """All turns of an episode as they are trained on, with an advantage of its own for each turn."""
    ids = episode[-1].ids
    sampled, logprobs, advantages = [False] * len(ids), [0.0] * len(ids), [0.0] * len(ids)
    for order, turn in enumerate(episode):
        begin, end = len(turn.prompt), len(turn.ids)
        sampled[begin:end] = [True] * (end - begin)
        logprobs[begin:end] = turn.sample.logprobs
        advantages[begin:end] = [1.0 - 0.5 * number + 0.3 * order] * (end - begin)
    return TokenSequence(ids, sampled, logprobs, 1.0, advantages)


def trained_gradient(
    policy: LocalPolicy, episodes: list[list[Turn]], **settings: Any
) -> tuple[dict[str, Tensor], TrainingReport]:
    """Of an optimizer step of the training backend, by weight, and what the step reports. The step is taken."""
    # Twice each, so that prompts are shared where a model's can be.
    trajectories = [[_sequence(episode, number)] for number, episode in enumerate(episodes) for _ in range(2)]
    batch = TrainingBatch(trajectories, sizes=[2] * len(episodes), groups_without_signal=0)
    settings = {"optimizer_steps": 1, "learning_rate": 1e-3, "micro_batch_tokens": 100, "max_grad_norm": 1e9} | settings
    learner, report = Learner(policy, LocalGRPOConfig(**settings)), TrainingReport()
    gradient: dict[str, Tensor] = {}
    learner.optimizer.register_step_pre_hook(lambda *_: gradient.update(_gradient(policy.model)))
    learner.check(batch)
    learner.train(batch, np.random.default_rng(0), report)
    return gradient, report


def plain_gradient(policy: LocalPolicy, episodes: list[list[Turn]]) -> dict[str, Tensor]:
    """The same, with plain passes one sequence at a time: of minus the mean of advantage times log probability."""
    policy.model.zero_grad()
    sequences = [_sequence(episode, number) for number, episode in enumerate(episodes)]
    tokens = sum(sum(sequence.sampled) for sequence in sequences)
    for sequence in sequences:
        begin = sequence.sampled.index(True)
        logprobs = plain_logprobs(policy.model, list(sequence.ids), begin)
        advantages = torch.tensor(sequence.advantages[begin:]) * torch.tensor(sequence.sampled[begin:])
        (-(advantages * logprobs).sum() / tokens).backward()
    gradient = _gradient(policy.model)
    policy.model.zero_grad()
    return gradient


def _gradient(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
