"""The Toolkit's builder and adapter as ours, so that a Run drives and observes them like any other.

Each bridge holds one of the Toolkit's components. The Toolkit's trainer reaches its builder and adapter through the bridges:
the Run sees our nouns, and the Toolkit gets its own objects back. Faults of the Toolkit that can be mended without changing a
result are mended here, each with a comment.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...config.sections import FinetuneConfig
from ...hooks import resolve, wrap_method
from ...interfaces import Policy, TrainerAdapter, TrajectoryBuilder
from ...redaction import redacting_logger
from ...text import text_of, told_once
from ...types import (
    DPOItem,
    RolloutFailure,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from ...user_code import contained
from .conversion import (
    collection_from_nat,
    collection_to_nat,
    ref_from_nat,
    ref_to_nat,
    status_from_nat,
    status_to_nat,
    steps_from_nat,
    trajectory_from_nat,
)
from .versions import ART_ADAPTER, is_one_of, mend_adapter, pass_on_beta, with_progress

if TYPE_CHECKING:
    from .evaluation import Evaluated, Limit

__all__ = [
    "NatAdapter",
    "NatBuilder",
    "unwrap",
]

logger = redacting_logger(__name__)

POLL_SECONDS = 0.1
"""Between two looks at a job that is a task of this process: asking often costs nothing."""


class NatBuilder(TrajectoryBuilder):
    """A TrajectoryBuilder of the Toolkit.

    Args:
        nat: It.
        limit: How many of its rollouts run at once, over all generations. Default: as many as the Toolkit runs, the config's
            max_concurrency in each generation.
    """

    def __init__(self, nat: Any, limit: Limit | None = None) -> None:
        super().__init__(nat.trajectory_builder_config)
        self.nat, self._limit = nat, limit
        self._evaluated: list[Any] = []  # of the generations of this epoch, in order
        self._collection = 0  # which one this is, for trainers that collect several times before they train
        self._collecting = False
        self._ask_start, self._ask_finalize = nat.start_run, nat.finalize
        default = resolve("nat.finetuning.interfaces.trajectory_builder:TrajectoryBuilder").run_eval
        if getattr(type(nat), "run_eval", None) is default:
            wrap_method(nat, "run_eval", self._counted)
        self._known: dict[int, tuple[Any, Trajectory]] = {}  # by id of the Toolkit's trajectory, which is kept with it
        self._theirs: Any = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """The Toolkit's is initialized by its own trainer, or by NatTrainer's owner."""
        self.run_config = run_config

    async def start_run(self, run_id: str, meta: dict | None = None) -> None:
        self._evaluated, self._collecting = [], True
        await self._ask_start(run_id=run_id, meta=meta)

    async def finalize(self, run_id: str, meta: dict | None = None) -> TrajectoryCollection:
        self._collection = (meta or {}).get("run_number", 0)
        try:
            self._theirs = await self._ask_finalize(run_id=run_id, meta=meta)
        except BaseException:
            await self.aclose(run_id)
            raise
        finally:
            self._collecting = False
        errors = [each.error for each in self._evaluated]
        if errors and None not in errors:
            raise errors[0]
        unrewarded = _without_rewards(self._theirs)
        collection = collection_from_nat(self._theirs, self.ours)
        collection.failures = [*self._failures(collection, unrewarded), *unrewarded]
        return collection

    def _failures(self, collection: TrajectoryCollection, unrewarded: Sequence[RolloutFailure]) -> list[RolloutFailure]:
        """The rollouts of the epoch that the Toolkit's builder left out: it says of none why."""
        made: set[tuple[str, Any]] = {(text_of(failure.example_id), failure.generation) for failure in unrewarded}
        for trajectory in chain.from_iterable(collection.trajectories):
            about = trajectory.metadata or {}
            has_pairs = any(isinstance(item, DPOItem) for item in trajectory.episode)
            if has_pairs or "id" not in about or "generation" not in about:
                return [failure for each in self._evaluated for failure in each.failures]
            made.add((text_of(about["id"]), about["generation"]))
        found: list[RolloutFailure] = []
        for each in self._evaluated:
            found += each.failures
            for item in each.done:
                if (text_of(item.id), each.generation) not in made:
                    found.append(RolloutFailure(item.id, each.generation, _LEFT_OUT, steps_from_nat(item.trajectory)))
        return found

    def ours(self, trajectory: Any) -> Trajectory:
        """The same object for the same trajectory, so that what was submitted is found in what was collected."""
        if id(trajectory) not in self._known:
            self._known[id(trajectory)] = (trajectory, self._named(trajectory_from_nat(trajectory)))
        return self._known[id(trajectory)][1]

    async def _counted(self, original: Callable[[], Any]) -> Any:
        """The Toolkit's evaluation as its builders ask for it, with its rollouts counted for whoever shows a Run. A generation
        that fails is evaluated without a result: the others are as good as before."""
        from .evaluation import Evaluated

        evaluated = Evaluated(len(self._evaluated))
        if not self._collecting:  # a validation
            output = await self._evaluate(evaluated)
            if evaluated.failures:
                logger.warning("validation: %s", told_once(failure.error for failure in evaluated.failures))
            return output
        self._evaluated.append(evaluated)
        try:
            return await contained("run_eval", self._evaluate(evaluated))
        except Exception as error:
            logger.exception("generation %d failed", evaluated.generation)
            return evaluated.failed(error)

    async def _evaluate(self, evaluated: Evaluated) -> Any:
        from nat.data_models.evaluate_runtime import EvaluationRunConfig

        from .evaluation import EvaluationRun, limited

        run = self.nat.run_config.run_configuration
        asked = {name: getattr(run, name) for name in _ASKED}
        asked["config_file"] = limited(run.config_file, self._limit)
        # Nothing is written down by the Toolkit: credentials as they are, and every generation into the same files.
        evaluation = EvaluationRun(EvaluationRunConfig(**asked, write_output=False), limit=self._limit)
        output = await evaluation.run_and_evaluate()
        reward = self.nat.run_config.reward_function
        evaluated.take(output, evaluation.errors, reward and reward.name)
        return output

    async def rollout(self, example: Any, run_id: str) -> Trajectory | RolloutFailure:
        """One scored rollout of one example, by its id or its position. Raises RunError for one that is not there."""
        from .evaluation import trying

        return await (await trying(self.nat.run_config)).rollout(example, run_id)

    def _named(self, trajectory: Trajectory) -> Trajectory:
        """With its example's id under the key that all trajectories have it under: pairs of the Toolkit's builder for DPO have it
        under another one. Their generation is the number of the collection that they come from."""
        about = trajectory.metadata or {}
        if "example_id" not in about or "id" in about:
            return trajectory
        metadata = {"id": about["example_id"], "generation": self._collection, **about}
        return trajectory.model_copy(update={"metadata": metadata})

    def forget(self) -> None:
        self._known.clear()
        self._theirs = None

    def route_through_bridge(self) -> None:
        """From now on whoever asks the Toolkit's builder asks this one."""

        async def finalize(_: Any, run_id: str, meta: dict | None = None) -> Any:
            await self.finalize(run_id=run_id, meta=meta)
            return self._theirs

        wrap_method(self.nat, "start_run", lambda _, run_id, meta=None: self.start_run(run_id=run_id, meta=meta))
        wrap_method(self.nat, "finalize", finalize)

    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.nat.log_progress(run_id, metrics, output_dir)

    async def aclose(self, run_id: str | None = None) -> None:
        """Cancels evaluations that are still going on, of one run or of all. The Toolkit's builder forgets none that
        failed ("already in progress", says the next), lets the others run on, and its trainer's cleanup fails on them.
        """
        runs = getattr(self.nat, "evaluation_runs", None)
        if not isinstance(runs, dict):
            return
        left = []
        for name in [name for name in runs if run_id in (None, name)]:
            tasks = runs.pop(name)
            left += tasks if isinstance(tasks, list) else [tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


_LEFT_OUT = (
    "the Toolkit's builder made no trajectory of it: no model call of the target functions and model, fewer than two "
    "messages, or no logprobs. Its log says which"
)
_ASKED = ("config_file", "dataset", "result_json_path", "endpoint", "endpoint_timeout", "override")
"""What of a run configuration an evaluation is given."""


def _without_rewards(collection: Any) -> list[RolloutFailure]:
    """Takes trajectories whose reward is no finite number out of a collection of the Toolkit's: it would train on them, and
    its curriculum's order would hang on where they are."""
    failures: list[RolloutFailure] = []
    for group in collection.trajectories:
        for trajectory in group:
            if not math.isfinite(trajectory.reward):
                about = trajectory.metadata or {}
                error = f"the reward is {trajectory.reward}"
                failures.append(RolloutFailure(about.get("id"), about.get("generation", 0), error))
        group[:] = [trajectory for trajectory in group if math.isfinite(trajectory.reward)]
    collection.trajectories[:] = [group for group in collection.trajectories if group]
    return failures


class NatAdapter(TrainerAdapter):
    """A TrainerAdapter of the Toolkit. Its jobs get an id of their own (`metadata["job_id"]`), and their last status is
    kept: the Toolkit's ART adapter answers once and has then forgotten the job."""

    def __init__(self, nat: Any, builder: NatBuilder | None = None) -> None:
        super().__init__(nat.adapter_config)
        self.nat, self._builder = nat, builder
        self._ask_submit, self._ask_wait, self._ask_status = nat.submit, nat.wait_until_complete, nat.status
        self._theirs: dict[int, Any] = {}  # by id of our collection, while it is being submitted
        self._newest: tuple[Any, TrainingJobRef] | None = None  # the Toolkit's ref, and ours
        self._ended: dict[str, TrainingJobStatus] = {}
        self._jobs = 0
        mend_adapter(nat)

    @property
    def policy(self) -> Policy | None:  # type: ignore[override]  # an attribute there
        """Of one of ours that the Toolkit's trainer trains with (as_nat.py). Others have no weights here."""
        ours = getattr(self.nat, "ours", None)
        return None if ours is None else ours.policy

    def __getattr__(self, name: str) -> Any:
        """`save` of such a one: who has none cannot save its model."""
        ours = getattr(self.__dict__.get("nat"), "ours", None)
        if name == "save" and ours is not None:
            return ours.save
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """The Toolkit's is initialized by its own trainer, or by NatTrainer's owner."""
        self.run_config = run_config

    async def is_healthy(self) -> bool:
        return await self.nat.is_healthy()

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        theirs = self._theirs.get(id(trajectories))
        pass_on_beta(self.nat)
        await self._forget_ended(trajectories.run_id)
        given = await self._ask_submit(collection_to_nat(trajectories) if theirs is None else theirs)
        if self._builder is not None:
            self._builder.forget()
        self._jobs += 1
        own = f"{given.backend}-{self._jobs}"
        metadata = {"job_id": own, **(given.metadata or {}), _OWN_ID: own}
        ref = TrainingJobRef(run_id=given.run_id, backend=given.backend, metadata=metadata)
        self._newest = (given, ref)
        return ref

    async def _forget_ended(self, run_id: str) -> None:
        """The status of a job of that run that has ended and that nobody waited for: the Toolkit's ART adapter takes no other
        job before it was asked for."""
        task = getattr(self.nat, "training_jobs", {}).get(run_id)
        if task is not None and task.done() and self._newest is not None:
            await self.status(self._newest[1])

    def ours(self, ref: Any) -> TrainingJobRef:
        """The Toolkit's ref of a job as the Run knows it."""
        given, known = self._newest or (None, None)
        return known if known is not None and given == ref else ref_from_nat(ref)

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        job = _job_of(ref)
        return self._ended.get(job) or self._keep(job, status_from_nat(await self._ask_status(_plain(ref))))

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        job = _job_of(ref)
        if job in self._ended:
            return self._ended[job]
        if is_one_of(self.nat, {ART_ADAPTER}):
            poll_interval = min(poll_interval, POLL_SECONDS)
        waited = await self._ask_wait(_plain(ref), poll_interval)
        return self._ended.get(job) or self._keep(job, status_from_nat(waited))

    def _keep(self, job: str, status: TrainingJobStatus) -> TrainingJobStatus:
        if status.status not in (TrainingStatusEnum.PENDING, TrainingStatusEnum.RUNNING):
            self._ended[job] = status
        return status

    async def cancel(self, ref: TrainingJobRef) -> None:
        """Cancels a job that is a task of this process; the Toolkit has no other way."""
        task = getattr(self.nat, "training_jobs", {}).get(ref.run_id)
        if task is not None:
            task.cancel()

    def route_through_bridge(self) -> None:
        """From now on whoever asks the Toolkit's adapter asks this one."""

        async def submit(_: Any, trajectories: Any) -> Any:
            convert = self._builder.ours if self._builder is not None else trajectory_from_nat
            ours = collection_from_nat(trajectories, convert)
            self._theirs[id(ours)] = trajectories
            try:
                await self.submit(ours)
            finally:
                del self._theirs[id(ours)]
            assert self._newest is not None
            return self._newest[0]

        async def wait_until_complete(_: Any, ref: Any, poll_interval: float = 10.0) -> Any:
            return status_to_nat(await self.wait_until_complete(self.ours(ref), poll_interval))

        async def status(_: Any, ref: Any) -> Any:
            return with_progress(self.nat, status_to_nat(await self.status(self.ours(ref))))

        wrap_method(self.nat, "submit", submit)
        wrap_method(self.nat, "status", status)
        wrap_method(self.nat, "wait_until_complete", wait_until_complete)

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.nat.log_progress(_plain(ref), metrics, output_dir)

    async def aclose(self) -> None:
        tasks = list(getattr(self.nat, "training_jobs", {}).values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_OWN_ID = "finetune_nb_job"
"""The key of the id that a job was given here."""


def _job_of(ref: TrainingJobRef) -> str:
    metadata = ref.metadata or {}
    return f"{ref.run_id}/{metadata.get(_OWN_ID, metadata.get('job_id'))}"


def _plain(ref: TrainingJobRef) -> Any:
    """A ref as the Toolkit's adapter gave it."""
    metadata = dict(ref.metadata or {})
    own = metadata.pop(_OWN_ID, None)
    if own is not None and metadata.get("job_id") == own:
        del metadata["job_id"]
    return ref_to_nat(ref.model_copy(update={"metadata": metadata or None}))


def unwrap(component: Any, bridge: Callable[[Any], Any]) -> Any:
    """The component of ours that one of the Toolkit's holds (ours.py), else a bridge to it."""
    held = getattr(component, "ours", None)
    return bridge(component) if held is None else held
