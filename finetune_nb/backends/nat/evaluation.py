"""Rollouts by the Toolkit's evaluation: counted for the Run that shows them, limited to one example for a trial, and turned
into trajectories by our builder.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from numbers import Real
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
from ...redaction import error_text, redact_text
from ...rollouts.evaluation import evaluation_context, progress
from ...rollouts.trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig
from ...text import text_of
from ...types import EpisodeKey, EvaluationRunOutput, LLMCall, RolloutFailure, SamplingParams, Trajectory
from ...user_code import contained
from .conversion import evaluation_error, evaluation_from_nat, steps_from_nat, workflow_error
from .versions import missing_package

__all__ = [
    "Evaluated",
    "EvaluatingBuilder",
    "EvaluationRun",
    "Evaluations",
    "Limit",
    "SharedLLM",
    "finetuning_from_nat",
    "limited",
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
        key = EpisodeKey(context.phase, context.epoch, number, context.generation)
        episode = CallRecorder(key, seed, version=context.version)
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


class Limit:
    """How many rollouts run at once, over all evaluations that share it.

    Args:
        most: Asked whenever a rollout begins or ends, since it may be changed while the run continues.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self.most = most
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        while self._running >= self.most():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                self._wake()  # if it was this one's turn, it is the next one's
                raise
        self._running += 1

    async def __aexit__(self, *exc: object) -> None:
        self._running -= 1
        self._wake()

    def _wake(self) -> None:
        places = self.most() - self._running
        while self._waiting and places > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                places -= 1


class _RolloutFailed(BaseException):
    """What a workflow raised, on its way past the Toolkit: an Exception would end the rollouts that have not begun."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class EvaluationRun(NatEvaluationRun):
    """An evaluation of the Toolkit in which a rollout that fails leaves the others alone, and no evaluator sees it.

    Args:
        config: The Toolkit's EvaluationRunConfig.
        example: The only one that is run, by its id or its position in the dataset. Default: all.
        limit: How many rollouts run at once, together with other evaluations. Default: what the Toolkit does.
    """

    def __init__(self, config: Any, example: Any = None, limit: Limit | None = None) -> None:
        super().__init__(config)
        self._example, self._limit = example, limit
        self.errors: list[tuple[Any, str]] = []
        """The items whose rollout failed, each with its error."""

    async def run_and_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            output = await super().run_and_evaluate(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        known = {id(item) for item in self.eval_input.eval_input_items}
        failed = [item for item, _ in self.errors if id(item) not in known]
        self.eval_input.eval_input_items += failed
        return output

    async def run_workflow_local(self, session_manager: Any, http_connection: Any = None) -> None:
        """Each item has a session of its own, whose end is the rollout's: what the Toolkit tells its callbacks leaves out
        those that failed."""
        self._choose()
        meter, items = progress.get(), self.eval_input.eval_input_items
        begun = iter(items)  # the Toolkit asks for their sessions in this order
        limit = self._limit or nullcontext()

        @asynccontextmanager
        async def session(original: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            item = next(begun)
            async with limit, original(*args, **kwargs) as opened:
                wrap_method(opened, "run", _contained_run)
                error: Exception | None = None
                try:
                    yield opened
                except _RolloutFailed as failed:
                    error = failed.error
                except Exception as raised:  # of the Toolkit's: no value at result_json_path, say
                    error = raised
                if error is not None:
                    item.output_obj, item.trajectory = None, []
                    self.errors.append((item, error_text(error)))
                if meter is not None:
                    meter.done += 1
                    meter.failed += error is not None

        wrap_method(session_manager, "session", session)
        if meter is not None:
            meter.total += len(items)
        await super().run_workflow_local(session_manager, http_connection)
        failed = {id(item) for item, _ in self.errors}
        done = [item for item in items if id(item) not in failed]
        if done:  # an evaluator may not expect that there is nothing at all
            self.eval_input.eval_input_items = done

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


class Evaluated:
    """One generation of a builder of the Toolkit's: which rollouts ended well, and which failed.

    Args:
        generation: Its number.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.failures: list[RolloutFailure] = []
        self.done: list[Any] = []
        """Items of the Toolkit's."""
        self.error: Exception | None = None
        """Why the whole generation failed."""

    def failed(self, error: Exception) -> Any:
        """The whole generation failed.

        Returns:
            An output without items, which a builder of the Toolkit's passes over.
        """
        from nat.data_models.evaluate_runtime import EvaluationRunOutput as NatOutput
        from nat.data_models.evaluator import EvalInput

        self.error = error
        self.failures = [RolloutFailure(None, self.generation, error_text(error))]
        return NatOutput.model_construct(
            workflow_output_file=None,
            evaluator_output_files=[],
            workflow_interrupted=False,
            eval_input=EvalInput(eval_input_items=[]),
            evaluation_results=[],
        )

    def take(self, output: Any, errors: Sequence[tuple[Any, str]], reward: str | None) -> None:
        """What the evaluation came to. A rollout whose reward has no number for a score is a failure: its score is taken out of
        `output`, for the Toolkit would train on it as 0.

        Args:
            output: What the Toolkit's evaluation returned.
            errors: The items whose rollout failed, each with its error.
            reward: Name of the evaluator whose score is the reward.
        """
        failed = {id(item): error for item, error in errors}
        unscored: dict[str, str] = {}
        for name, result in output.evaluation_results:
            if name == reward:
                scored = [item for item in result.eval_output_items if is_score(item)]
                left_out = [item for item in result.eval_output_items if not is_score(item)]
                unscored = {text_of(item.id): evaluation_error(item) or "none was given" for item in left_out}
                result.eval_output_items = scored
        for item in output.eval_input.eval_input_items:
            error = failed.get(id(item)) or workflow_error(item)
            if error is None and text_of(item.id) in unscored:
                error = f"no score by the reward {reward!r}: {unscored[text_of(item.id)]}"
            if error is None:
                self.done.append(item)
            else:
                steps = steps_from_nat(item.trajectory)
                self.failures.append(RolloutFailure(item.id, self.generation, redact_text(error), steps))


def is_score(item: Any) -> bool:
    """Whether an evaluator's verdict is a number that can be trained on."""
    score = item.score
    return isinstance(score, Real) and math.isfinite(score) and evaluation_error(item) is None


@asynccontextmanager
async def _contained_run(original: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """The run of a session, in which whatever the workflow raises is a _RolloutFailed."""

    async def result(original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await contained("the workflow", original(*args, **kwargs))
        except Exception as error:
            raise _RolloutFailed(error) from error

    async with original(*args, **kwargs) as runner:
        wrap_method(runner, "result", result)
        yield runner


# ── our builder over it ──────────────────────────────────────────────────────────────────────────────────────────────


class EvaluatingBuilder(EvalTrajectoryBuilder):
    """Ours, whose generations are the Toolkit's evaluation runs. `run`: the Toolkit's run configuration. `limit`: over the
    rollouts of all generations."""

    run: Any = None
    limit: Limit | None = None
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
            config_file=own if isinstance(own, Path) else limited(run.config_file, self.limit),
            dataset=None if dataset is None else str(dataset),
            result_json_path=run.result_json_path,
            endpoint=run.endpoint,
            endpoint_timeout=run.endpoint_timeout,
            write_output=False,
        )
        with Evaluations.open() as calls:
            evaluation = EvaluationRun(config, example, self.limit)
            output = await evaluation.run_and_evaluate()
            generation = evaluation_context.get().generation
            return evaluation_from_nat(output, calls.of_response, generation, evaluation.errors)


async def trying(run_config: Any) -> EvaluatingBuilder:
    """A builder for rollouts by hand, over the evaluation that the Toolkit's FinetuneConfig names."""
    builder = EvaluatingBuilder(EvalTrajectoryBuilderConfig(num_generations=1, min_episode_length=1))
    builder.run = without_itself(run_config.run_configuration)
    await builder.initialize(finetuning_from_nat(run_config))
    return builder


def limited(config: Any, limit: Limit | None) -> Any:
    """The Toolkit's config with the limit as its own; a file, whose limit is its own, as it is."""
    if limit is None or not hasattr(config, "eval"):
        return config
    general = config.eval.general.model_copy(update={"max_concurrency": limit.most()})
    return config.model_copy(update={"eval": config.eval.model_copy(update={"general": general})})


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
