"""Trying things by hand: one rollout of one example, one reply of the policy. Nothing here is recorded in any epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .config import Config
from .errors import RunError
from .evaluation.episode import Episode
from .evaluation.evaluate import EvaluationContext, dataset_of, evaluation_context, workflow_of
from .evaluation.recording import LLM, ChatReply, PolicyLLM
from .interfaces import TrainerAdapter, TrajectoryBuilder
from .registry import Builder
from .trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig
from .types import EpisodeKey, EvalInputItem, RolloutFailure, Trajectory

__all__ = ["Trial"]


class Trial:
    """Tries with a run's own components. Each try samples anew."""

    def __init__(self, config: Config, builder: Builder, run_id: str) -> None:
        self.config, self.builder, self.run_id = config, builder, run_id
        self._tries = 0

    async def preflight(self, reads_rows: bool = True) -> None:
        """Reads the datasets and binds the workflow, so that what is wrong there is said before the first rollout.
        reads_rows: whether the datasets are ours to read; somebody's own builder may have its rows from elsewhere."""
        if not reads_rows:
            return
        (await workflow_of(self.config, self.builder)).check(self._rows())
        run = self.config.finetuning.run_configuration
        if run and run.validation_dataset:
            dataset_of(self.config, self.builder, str(run.validation_dataset))

    def _rows(self) -> Sequence[EvalInputItem]:
        run = self.config.finetuning.run_configuration
        return dataset_of(self.config, self.builder, str(run.dataset) if run and run.dataset else None)

    async def rollout(self, example: Any, trajectory_builder: TrajectoryBuilder) -> Trajectory | RolloutFailure:
        """One scored rollout. example: position in the dataset, or id. Raises RunError for one that is not there.

        trajectory_builder: the run's. One whose rollouts are its own makes this one too, by `rollout(example, run_id)`.
        """
        make = getattr(trajectory_builder, "rollout", None)
        if make is not None:
            with self._trying():
                return await make(example, self.run_id)
        self._require_workflow()
        position = self._position_of(example)
        builder = EvalTrajectoryBuilder(EvalTrajectoryBuilderConfig(num_generations=1, min_episode_length=1))
        await builder.initialize(self.config.finetuning)
        with self._trying(lambda rows: [position]):
            collection = await builder.collect([await builder.run_eval()], self.run_id)
        return collection.trajectories[0][0] if collection.trajectories else collection.failures[0]

    def _position_of(self, example: Any) -> int:
        ids = [item.id for item in self._rows()]
        if example in ids:
            return ids.index(example)
        if isinstance(example, int) and -len(ids) <= example < len(ids):
            return example % len(ids)
        raise RunError(f"no example {example!r}: the dataset has {len(ids)} rows, with ids like {ids[0]!r}.")

    @contextmanager
    def _trying(self, draw: Callable[[int], Sequence[int]] | None = None) -> Iterator[None]:
        """Evaluations inside are the next try, and sample anew. draw: as in EvaluationContext."""
        self._tries += 1
        token = evaluation_context.set(EvaluationContext("try", self._tries, 0, draw))
        try:
            yield
        finally:
            evaluation_context.reset(token)

    async def chat(self, messages: Any, adapter: TrainerAdapter, **options: Any) -> ChatReply:
        """One reply to a text or to OpenAI messages, of the workflow's model, else of the adapter's policy. Raises RunError
        where there is neither."""
        if self.config.workflow is None and adapter.policy is not None:
            llm: LLM | None = PolicyLLM(adapter.policy)
        else:
            self._require_workflow()
            llm = (await workflow_of(self.config, self.builder)).llm
        if llm is None:
            raise RunError("this run's workflow uses no llm, so there is nothing to talk to.")
        self._tries += 1
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        episode = Episode(EpisodeKey("try", self._tries, 0, 0), self.config.run.seed)
        with episode.live([llm.policy] if llm.policy else []):
            return await llm.chat(messages, **options)

    def _require_workflow(self) -> None:
        if self.config.workflow is None:
            raise RunError(
                "this run's workflow is not its own: its trajectory builder runs one that is not known here, so there is "
                "nothing to try by hand. Run an epoch."
            )
