"""The evaluation run: a workflow once over a dataset, under the recorder, and every evaluator's verdict on what came out.

A rollout that raises, hangs or returns nothing is a RolloutFailure; it leaves the others alone and no evaluator sees it.
Who starts the evaluation (a trajectory builder, a validation) says through `EvaluationContext` which generation it is,
which rows are drawn and where rollouts run; without one the whole dataset is run on a fresh executor.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import RolloutTimeout, WorkflowError
from ..interfaces import Policy
from ..loading import load_config
from ..redaction import redact_text, redacting_logger
from ..registry import Builder
from ..types import (
    EpisodeKey,
    EvalInput,
    EvalInputItem,
    EvaluationRunConfig,
    EvaluationRunOutput,
    RolloutFailure,
    UsageStats,
)
from .datasets import load_dataset
from .episode import Episode
from .evaluators import evaluate_items
from .executor import LocalExecutor, RolloutExecutor, RolloutRequest, RolloutResult
from .recording import LLM
from .workflow import Workflow

__all__ = ["EvaluationContext", "EvaluationRun", "Progress", "evaluation_context", "progress"]

logger = redacting_logger(__name__)


@dataclass(frozen=True)
class EvaluationContext:
    """What the caller knows about an evaluation and the evaluation does not."""

    phase: str = "try"
    epoch: int = 0
    generation: int = 0
    draw: Callable[[int], Sequence[int]] | None = None
    """Dataset size -> positions of the rows to run; None = all."""
    executor: RolloutExecutor | None = None


@dataclass
class Progress:
    """How far an epoch is: its rollouts, then its training job. Written by the engine, read by whoever shows it."""

    phase: str = ""
    done: int = 0
    failed: int = 0
    total: int = 0
    trained: float = 0.0
    """Of the training job, 0 to 100 %, as far as it tells."""
    job: str = ""
    """What the job says of itself, such as "step 3 of 8"."""
    started: float = field(default_factory=time.monotonic)
    on_result: Callable[[RolloutResult], None] | None = None
    """Called with every rollout as it ends, before it is scored."""
    gate: Callable[[], Awaitable[float]] | None = None
    """Awaited before every rollout: it returns when the run is not paused."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


_ALONE = EvaluationContext()
evaluation_context: ContextVar[EvaluationContext] = ContextVar("finetune_nb_evaluation", default=_ALONE)
progress: ContextVar[Progress | None] = ContextVar("finetune_nb_progress", default=None)


class EvaluationRun:
    """One evaluation. `await EvaluationRun(config).run_and_evaluate()`."""

    def __init__(self, config: EvaluationRunConfig) -> None:
        self.config = config

    async def run_and_evaluate(self) -> EvaluationRunOutput:
        source = self.config.config_file
        config = load_config(source, override=self.config.override) if isinstance(source, str | Path) else source
        assert isinstance(config, Config)
        if config.builder is not None:
            return await self._run(config, config.builder)
        async with Builder(config) as builder:
            return await self._run(config, builder)

    async def _run(self, config: Config, builder: Builder) -> EvaluationRunOutput:
        started = time.time()
        context, general = evaluation_context.get(), config.eval.general
        items = dataset_of(config, builder, self.config.dataset)
        positions = range(len(items)) if context.draw is None else context.draw(len(items))
        workflow = await workflow_of(config, builder)
        workflow.check(items)
        policies = [
            llm.policy for llm in builder.built("llm_provider") if isinstance(llm, LLM) and llm.policy is not None
        ]
        requests = [
            RolloutRequest(EpisodeKey(context.phase, context.epoch, n, context.generation), items[i].model_copy())
            for n, i in enumerate(positions)
        ]
        executor = context.executor or await builder.get_executor() or LocalExecutor(general.max_concurrency)
        meter = progress.get()
        if meter is not None:
            meter.total += len(requests)

        def on_result(result: RolloutResult) -> None:
            if meter is not None:
                meter.done += 1
                meter.failed += result.error is not None
                if meter.on_result is not None:
                    meter.on_result(result)

        gate = meter.gate if meter is not None and not config.run.deterministic else None
        rollout = Rollout(workflow, config.run.seed, policies, general.item_timeout, general.retries, gate)
        results = await executor.map(rollout, requests, on_result)

        done: list[EvalInputItem] = []
        failures: list[RolloutFailure] = []
        for result in results:
            item = result.request.item
            item.output_obj, item.trajectory = result.output, result.steps
            if result.error is None:
                done.append(item)
            else:
                failures.append(RolloutFailure(item.id, context.generation, redact_text(result.error), result.steps))
        if failures:
            logger.warning("%d of %d rollouts failed; the first: %s", len(failures), len(results), failures[0].error)
        verdicts = []
        for name in config.eval.evaluators:
            evaluator = await builder.get_evaluator(name)
            verdicts.append((name, await evaluate_items(evaluator, done, general.max_concurrency)))
        return EvaluationRunOutput.model_construct(
            workflow_output_file=None,
            evaluator_output_files=[],
            workflow_interrupted=False,
            eval_input=EvalInput.model_construct(eval_input_items=[r.request.item for r in results]),
            evaluation_results=verdicts,
            usage_stats=UsageStats(
                min_timestamp=started, max_timestamp=time.time(), total_runtime=time.time() - started
            ),
            profiler_results=None,
            failures=failures,
        )


class Rollout:
    """One run of the workflow on one row. Never raises: what goes wrong is the result's error."""

    def __init__(
        self,
        workflow: Workflow,
        seed: int = 0,
        policies: Sequence[Policy] = (),
        timeout: float | None = None,
        retries: int = 0,
        gate: Callable[[], Awaitable[float]] | None = None,
    ) -> None:
        self.workflow, self.seed, self.policies, self.timeout, self.retries = workflow, seed, policies, timeout, retries
        self.gate = gate

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "gate": None}  # a run is paused where it is driven, not where its rollouts run

    async def __call__(self, request: RolloutRequest) -> RolloutResult:
        if self.gate is not None:
            await self.gate()
        started = time.perf_counter()
        episode = Episode(request.key, self.seed)
        try:
            with episode.live(self.policies):
                if self.timeout is None:
                    output = await self._attempts(request, episode)
                else:
                    output = await self._timed(request, episode, self.timeout)
            error = None
            if output is None:
                error = f"WorkflowError: workflow {self.workflow.name!r} returned nothing"
        except asyncio.CancelledError as caught:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            output, error = None, f"{type(caught).__name__}: the workflow was cancelled from inside"
        except GeneratorExit:
            raise
        except BaseException as caught:  # SystemExit too: an agent must not take the run down
            output, error = None, f"{type(caught).__name__}: {caught}{_loop_hint(caught)}"
        return RolloutResult(request, output, episode.steps(), time.perf_counter() - started, error)

    async def _timed(self, request: RolloutRequest, episode: Episode, seconds: float) -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await self._attempts(request, episode)
        except TimeoutError as error:
            if not limit.expired():
                raise
            left = "" if self.workflow.is_async else " Its thread is left behind."
            raise RolloutTimeout(
                f"no answer after {seconds:g} s (eval.general.item_timeout), {len(episode.calls)} model calls.{left}"
            ) from error

    async def _attempts(self, request: RolloutRequest, episode: Episode) -> Any:
        if not self.retries:
            return await self.workflow(request.item)
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            retry=retry_if_exception(is_transient),
            reraise=True,
        ):
            with attempt:
                episode.restart()
                return await self.workflow(request.item)
        raise WorkflowError("no attempt was made")


def _loop_hint(error: BaseException | None) -> str:
    """What to do about a client that belongs to another event loop, where that is the cause somewhere."""
    first, seen = error, set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RuntimeError) and _OTHER_LOOP.search(str(error)):
            return (
                f"{'' if error is first else f' ({error})'}. Workflows run on the run's own event loop, and a client that "
                "was used in a cell belongs to the cell's. Make it inside the workflow, or take llm.openai()."
            )
        error = error.__cause__ or error.__context__
    return ""


_OTHER_LOOP = re.compile(r"different (event )?loop|Event loop is closed|non-thread-safe operation")
_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a lost connection, a time-out, a server that is busy."""
    if isinstance(error, RolloutTimeout):
        return False
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or getattr(error, "status_code", None) in _TRANSIENT_STATUS
        or type(error).__name__ in ("APIConnectionError", "APITimeoutError", "ConnectError", "ReadTimeout", "ReadError")
    )


def dataset_of(config: Config, builder: Builder, source: str | None = None) -> Sequence[EvalInputItem]:
    """The rows to evaluate on: `source` (a file, or the name of rows that the builder was given), else the config's."""
    ready = builder.ready("dataset", source or "train")
    return load_dataset(source if ready is None else ready, config.eval.general.dataset)


async def workflow_of(config: Config, builder: Builder) -> Workflow:
    """The config's workflow, with the llm that it names, or the only one that there is."""
    function = await builder.get_workflow()
    name = getattr(config.workflow, "llm", None) or (next(iter(config.llms)) if len(config.llms) == 1 else None)
    ready = builder.built("llm_provider")
    llm = await builder.get_llm(name) if name else ready[0] if len(ready) == 1 else None
    dataset = config.eval.general.dataset
    return Workflow(function, llm, dataset.structure.question_key if dataset else "question")
