"""Rollouts by the Toolkit's evaluation: counted for the Run that shows them, limited to one example for a trial, and turned
into trajectories by our builder.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nat.data_models.evaluate_runtime import EvaluationRunConfig
from nat.plugins.eval.runtime.evaluate import EvaluationRun as NatEvaluationRun

from ...config.sections import FinetuneConfig, FinetuneRunConfig
from ...errors import RunError
from ...hooks import wrap_method
from ...interfaces import Policy
from ...llms.call_recorder import CallRecorder
from ...llms.client import PolicyLLM
from ...llms.gateway import Endpoint, gateway
from ...rollouts.evaluation import evaluation_context, progress
from ...rollouts.trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig
from ...types import EpisodeKey, EvaluationRunOutput, LLMCall, RolloutFailure, SamplingParams, Trajectory
from .conversion import evaluation_from_nat, was_dropped

__all__ = [
    "EvaluatingBuilder",
    "EvaluationRun",
    "Evaluations",
    "SharedLLM",
    "finetuning_from_nat",
    "trying",
    "without_itself",
]

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
        self._episodes: dict[str, CallRecorder] = {}

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
        episode = CallRecorder(EpisodeKey(context.phase, context.epoch, number, context.generation), seed)
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


class EvaluationRun(NatEvaluationRun):
    """example: the only one that is run, by its id or its position in the dataset; all by default."""

    def __init__(self, config: Any, example: Any = None) -> None:
        super().__init__(config)
        self._example = example

    async def run_workflow_local(self, session_manager: Any, http_connection: Any = None) -> None:
        """Each item has a session of its own, whose end is the rollout's: what the Toolkit tells its callbacks leaves out
        those that failed."""
        self._choose()
        meter, items, ended = progress.get(), self.eval_input.eval_input_items, 0
        if meter is None:
            return await super().run_workflow_local(session_manager, http_connection)

        @asynccontextmanager
        async def session(original: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            nonlocal ended
            async with original(*args, **kwargs) as opened:
                try:
                    yield opened
                finally:
                    ended += 1
                    meter.done += 1

        wrap_method(session_manager, "session", session)
        meter.total += len(items)
        await super().run_workflow_local(session_manager, http_connection)
        meter.done += len(items) - ended  # not begun, because another one failed
        meter.failed += sum(map(was_dropped, items))

    async def run_workflow_remote(self) -> None:
        self._choose()
        await super().run_workflow_remote()

    def _choose(self) -> None:
        """Raises RunError for an example that is not there."""
        if self._example is None:
            return
        items = self.eval_input.eval_input_items
        found = [item for item in items if item.id == self._example]
        if not found and isinstance(self._example, int) and -len(items) <= self._example < len(items):
            found = [items[self._example]]
        if not found:
            raise RunError(
                f"no example {self._example!r}: the dataset has {len(items)} rows, with ids like {items[0].id!r}."
            )
        self.eval_input.eval_input_items = found[:1]


# ── our builder over it ──────────────────────────────────────────────────────────────────────────────────────────────


class EvaluatingBuilder(EvalTrajectoryBuilder):
    """Ours, whose generations are the Toolkit's evaluation runs. `run`: the Toolkit's run configuration."""

    run: Any = None
    reads_our_rows = False

    async def run_eval(self) -> EvaluationRunOutput:
        """One generation."""
        return await self._evaluate()

    async def rollout(self, example: Any, run_id: str) -> Trajectory | RolloutFailure:
        """One scored rollout of one example, by its id or its position. Raises RunError for one that is not there."""
        collection = await self.collect([await self._evaluate(example)], run_id)
        return collection.trajectories[0][0] if collection.trajectories else collection.failures[0]

    async def _evaluate(self, example: Any = None) -> EvaluationRunOutput:
        """Nothing is written down by the Toolkit: all generations would write the same files."""
        run, asked = self.run, self.run_config.run_configuration
        # A validation has its own dataset, and may have its own file; a config in memory is the Run's.
        dataset, own = (asked.dataset or run.dataset, asked.config_file) if asked is not None else (run.dataset, None)
        config = EvaluationRunConfig(
            config_file=own if isinstance(own, Path) else run.config_file,
            dataset=None if dataset is None else str(dataset),
            result_json_path=run.result_json_path,
            endpoint=run.endpoint,
            endpoint_timeout=run.endpoint_timeout,
            write_output=False,
        )
        with Evaluations.open() as calls:
            output = await EvaluationRun(config, example).run_and_evaluate()
            return evaluation_from_nat(output, calls.of_response, evaluation_context.get().generation)


async def trying(run_config: Any) -> EvaluatingBuilder:
    """A builder for rollouts by hand, over the evaluation that the Toolkit's FinetuneConfig names."""
    builder = EvaluatingBuilder(EvalTrajectoryBuilderConfig(num_generations=1, min_episode_length=1))
    builder.run = without_itself(run_config.run_configuration)
    await builder.initialize(finetuning_from_nat(run_config))
    return builder


# ── configs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def finetuning_from_nat(given: Any) -> FinetuneConfig:
    """The Toolkit's FinetuneConfig as ours; its config in memory stays where it is."""
    run = given.run_configuration
    values = given.model_dump(exclude={"run_configuration"})
    config = FinetuneConfig.model_validate(values)
    if run is not None:
        config.run_configuration = FinetuneRunConfig.model_validate(run.model_dump(exclude={"config_file"}))
    return config


def without_itself(run: Any) -> Any:
    """The run configuration with a config that does not hold it: `nat finetune` puts the one into the other, and whoever
    walks through that comes to no end."""
    config = run.config_file
    tuning = getattr(config, "finetuning", None)
    if tuning is None:
        return run
    plain = config.model_copy(update={"finetuning": tuning.model_copy(update={"run_configuration": None})})
    return run.model_copy(update={"config_file": plain})
