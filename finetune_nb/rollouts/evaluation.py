"""The evaluation run: a workflow once over a dataset, recorded, and every evaluator's verdict on what came out.

A rollout that raises, hangs or returns nothing is a RolloutFailure; it leaves the others alone and no evaluator sees it. Its
caller (a trajectory builder, a validation) says through `EvaluationContext` which generation it is, which rows are drawn and
where rollouts run; without one the whole dataset is run on a fresh executor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..components.builder import Builder
from ..components.environments import rows_of
from ..components.loading import load_config
from ..config.sections import Config
from ..interfaces import RolloutExecutor
from ..llms.client import LLM
from ..llms.proxies import bypass_proxies
from ..redaction import redact_text, redacting_logger
from ..rewards.scoring import score
from ..text import told_once
from ..types import (
    EpisodeKey,
    EvalInput,
    EvalInputItem,
    EvaluationRunConfig,
    EvaluationRunOutput,
    RolloutFailure,
    RolloutRequest,
    RolloutResult,
    Trajectory,
    UsageStats,
)
from .datasets import load_dataset
from .episodes import episode_from_steps
from .executor import LocalExecutor
from .rollout import Rollout
from .workflow import Workflow

__all__ = [
    "EvaluationContext",
    "EvaluationRun",
    "Progress",
    "evaluation_context",
    "progress",
    "whole_trajectory",
]

logger = redacting_logger(__name__)


@dataclass(frozen=True)
class EvaluationContext:
    """What the caller knows about an evaluation and the evaluation does not."""

    phase: str = "try"
    epoch: int = 0
    generation: int = 0
    draw: Callable[[Sequence[EvalInputItem]], Sequence[int]] | None = None
    """The dataset -> positions of the rows to run; None = all."""
    executor: RolloutExecutor | None = None
    trajectory_of: Callable[[EvalInputItem], Trajectory] | None = None
    """Makes the trajectory of a finished rollout, for rewards that ask for it. None: all model calls are in it."""
    is_part: bool = False
    """Whether there are further rollouts of each example elsewhere. Rewards that compare them are then left to the caller."""
    version: int | None = None
    """The policy version that is sampled; None: the newest one at each call."""


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

    def ended(self, result: RolloutResult) -> None:
        """Counts a rollout that has ended."""
        self.done += 1
        self.failed += result.error is not None
        if self.on_result is not None:
            self.on_result(result)

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.monotonic() - self.started


_ALONE = EvaluationContext()
evaluation_context: ContextVar[EvaluationContext] = ContextVar("finetune_nb_evaluation", default=_ALONE)
progress: ContextVar[Progress | None] = ContextVar("finetune_nb_progress", default=None)


class EvaluationRun:
    """One evaluation. `await EvaluationRun(config).run_and_evaluate()`."""

    def __init__(self, config: EvaluationRunConfig) -> None:
        self.config = config

    async def run_and_evaluate(self) -> EvaluationRunOutput:
        """Run the rollouts, and score those that ended well.

        Returns:
            The items, the evaluators' verdicts, and what went wrong in a rollout, in `failures`.

        Raises:
            ConfigError: Something is wrong with the config.
            DatasetError: Something is wrong with the dataset.
            WorkflowError: The workflow cannot be run on the dataset.
        """
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
        positions = range(len(items)) if context.draw is None else context.draw(items)
        requests = [
            RolloutRequest(EpisodeKey(context.phase, context.epoch, n, context.generation), items[i].model_copy())
            for n, i in enumerate(positions)
        ]
        workflow = await workflow_of(config, builder)
        workflow.check(items)
        results = await self._roll_out(config, builder, workflow, requests)
        done, failures = _outcome(results, context.generation)
        evaluators = {name: await builder.get_evaluator(name) for name in config.eval.evaluators}
        groups = None if context.is_part else [[place] for place in range(len(done))]
        trajectory_of = context.trajectory_of or whole_trajectory
        found = await score(evaluators, done, groups, None, general.max_concurrency, trajectory_of)
        return EvaluationRunOutput.model_construct(
            workflow_output_file=None,
            evaluator_output_files=[],
            workflow_interrupted=False,
            eval_input=EvalInput.model_construct(eval_input_items=[r.request.item for r in results]),
            evaluation_results=list(found.items()),
            usage_stats=UsageStats(
                min_timestamp=started, max_timestamp=time.time(), total_runtime=time.time() - started
            ),
            profiler_results=None,
            failures=failures,
            unfinished={name: each for name, each in evaluators.items() if name not in found},
        )

    async def _roll_out(
        self, config: Config, builder: Builder, workflow: Workflow, requests: Sequence[RolloutRequest]
    ) -> list[RolloutResult]:
        """All results, in the order of the requests, counted for whoever shows how far it is."""
        general, meter = config.eval.general, progress.get()
        llms = [llm for llm in builder.built("llm_provider") if isinstance(llm, LLM)]
        policies = [llm.policy for llm in llms if llm.policy is not None]
        own = evaluation_context.get().executor
        executor = own or await builder.get_executor() or _executor_of(builder, general.max_concurrency)
        version = evaluation_context.get().version
        # A pause would change which rollouts share a batch, and with it the last digit.
        gate = meter.gate if meter is not None and not config.run.deterministic else None
        # Clients read the environment when they are made, which may be before they are given an address.
        bypass_proxies()
        run = config.run
        rollout = Rollout(
            workflow, run.seed, policies, general.item_timeout, general.retries, gate, run.gateway.ignore, version
        )
        if meter is not None:
            meter.total += len(requests)
        return await executor.map(rollout, requests, None if meter is None else meter.ended)


def whole_trajectory(item: EvalInputItem) -> Trajectory:
    """The trajectory of a finished rollout with all its model calls, before it is scored. Raises ValueError where there are
    none."""
    episode, _ = episode_from_steps(item.trajectory)
    return Trajectory(episode=episode, reward=math.nan, metadata={"id": item.id})


_executors: WeakKeyDictionary[Builder, LocalExecutor] = WeakKeyDictionary()


def _executor_of(builder: Builder, max_concurrency: int) -> LocalExecutor:
    """One executor for all evaluations of a run, so that its limit holds for all of them together."""
    executor = _executors.setdefault(builder, LocalExecutor(max_concurrency))
    executor.max_concurrency = max_concurrency  # it may be changed while the run continues
    return executor


def _outcome(results: Sequence[RolloutResult], generation: int) -> tuple[list[EvalInputItem], list[RolloutFailure]]:
    """The items with what the workflow made of them, without those that failed; and their failures."""
    done: list[EvalInputItem] = []
    failures: list[RolloutFailure] = []
    for result in results:
        item = result.request.item
        item.output_obj, item.trajectory = result.output, result.steps
        if result.error is None:
            done.append(item)
        else:
            failures.append(RolloutFailure(item.id, generation, redact_text(result.error), result.steps))
    if failures:
        errors = [failure.error for failure in failures]
        logger.warning("%d of %d rollouts failed; %s", len(failures), len(results), told_once(errors))
    return done, failures


_items: WeakKeyDictionary[Builder, dict[str, tuple[Any, Any, Sequence[EvalInputItem]]]] = WeakKeyDictionary()
"""Of rows that a builder was given: by name the rows, what names their columns, and the items that were made of them."""


def dataset_of(config: Config, builder: Builder, source: str | None = None) -> Sequence[EvalInputItem]:
    """The rows to evaluate on: `source` (a file, or the name of rows that the builder was given), else the config's."""
    name, columns = source or "train", config.eval.general.dataset
    rows = rows_of(builder, name)
    if rows is None:
        return load_dataset(source, columns)
    of_builder = _items.setdefault(builder, {})
    kept = of_builder.get(name)
    if kept is None or kept[0] is not rows or kept[1] != columns:
        named = columns and columns.model_copy(deep=True)  # the config's own may be changed
        kept = of_builder[name] = (rows, named, tuple(load_dataset(rows, columns)))
    return kept[2]


async def workflow_of(config: Config, builder: Builder) -> Workflow:
    """The config's workflow, with the llm that it asks; else the only one that was given ready-made."""
    function, name = await builder.get_workflow(), config.llm_of_workflow
    ready = builder.built("llm_provider")
    llm = await builder.get_llm(name) if name else ready[0] if len(ready) == 1 else None
    dataset = config.eval.general.dataset
    return Workflow(function, llm, dataset.structure.question_key if dataset else "question")
