"""What models are asked while the Toolkit evaluates, found again by the id of each reply.

The Toolkit makes a workflow's model once an evaluation, so all its rollouts share one address of the gateway, and one
Episode of ours. Which rollout a reply belongs to is told by its id, which LangChain keeps in the Toolkit's steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ...evaluation.episode import Episode
from ...evaluation.evaluate import evaluation_context
from ...evaluation.gateway import Endpoint, gateway
from ...evaluation.recording import PolicyLLM
from ...interfaces import Policy
from ...types import EpisodeKey, LLMCall, SamplingParams

__all__ = ["Evaluations", "SharedLLM"]

_current: ContextVar[Evaluations | None] = ContextVar("finetune_nb_nat_evaluation", default=None)
_numbers = itertools.count()


class SharedLLM(PolicyLLM):
    """A policy that is looked up at every call: it is there once its adapter is initialized."""

    def __init__(self, find: Callable[[], Policy], name: str, sampling: SamplingParams) -> None:
        self._find, self.name, self.sampling, self.config = find, name, sampling, None

    @property
    def policy(self) -> Policy:  # type: ignore[override]  # an attribute there
        return self._find()


class Evaluations:
    """The addresses that were given out in one evaluation, and what was asked there."""

    def __init__(self) -> None:
        self._episodes: dict[str, Episode] = {}

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Evaluations]:
        """Addresses that code inside asks for are known to this one."""
        evaluation = cls()
        token = _current.set(evaluation)
        try:
            yield evaluation
        finally:
            _current.reset(token)

    @staticmethod
    @contextmanager
    def address(llm: PolicyLLM, seed: int) -> Iterator[Endpoint]:
        """An address for that model, until the evaluation's workflow is taken down."""
        context, evaluation = evaluation_context.get(), _current.get()
        # The same key would sample the same replies again, and a builder that is not ours says nothing of itself.
        number = next(_numbers) if evaluation is None else len(evaluation._episodes)
        episode = Episode(EpisodeKey(context.phase, context.epoch, number, context.generation), seed)
        endpoint = gateway().endpoint(episode, llm)
        if evaluation is not None:
            evaluation._episodes[endpoint.id] = episode
        try:
            yield endpoint
        finally:
            episode.end()

    def of_response(self, response_id: str) -> LLMCall | None:
        """The recorded call that was answered under that id; None where it is none of ours."""
        address, _, sequence = response_id.removeprefix("chatcmpl-").rpartition("-")
        episode: Any = self._episodes.get(address)
        if episode is None or not sequence.isdigit():
            return None
        return next((call for call in episode.calls if call.sequence == int(sequence)), None)
