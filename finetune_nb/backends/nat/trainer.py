"""The Toolkit's trainer as ours. Its settings are the Toolkit's own; its builder and adapter are reached through bridges."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

from ...config.sections import CurriculumLearningConfig, FinetuneConfig
from ...errors import BackendError
from ...hooks import wrap_method
from ...interfaces import Trainer
from ...redaction import redact_text, redacting_logger
from ...threads import in_daemon_thread
from ...types import TrainingJobRef, TrainingJobStatus, TrajectoryCollection
from .bridges import NatAdapter, NatBuilder
from .conversion import collection_from_nat, collection_to_nat, status_from_nat
from .versions import TRAINS_IN_RUN, forget_validations, is_one_of, mend_trainer

__all__ = [
    "NatTrainer",
]

logger = redacting_logger(__name__)


class NatTrainer(Trainer):
    """A Trainer of the Toolkit, with its builder and its adapter.

    Args:
        nat: It.
        builder: Its builder.
        adapter: Its adapter.
        finetuning: The Toolkit's FinetuneConfig, with the run configuration in it.
        seed: Of what it draws at random.
    """

    def __init__(self, nat: Any, builder: NatBuilder, adapter: NatAdapter, finetuning: Any, seed: int = 0) -> None:
        self.nat, self._finetuning = nat, finetuning
        super().__init__(nat.trainer_config)
        self.trajectory_builder, self.trainer_adapter = builder, adapter
        self.trains_in_run = is_one_of(nat, TRAINS_IN_RUN)
        mend_trainer(nat, seed)
        self._ask_log, self._ask_validation = nat.log_progress, nat.run_validation_evaluation
        self._validated: dict[str, Any] = {}
        self._failed_validations: set[int] = set()
        self._logs: list[asyncio.Future[None]] = []
        builder.route_through_bridge()
        adapter.route_through_bridge()
        wrap_method(nat, "log_progress", lambda _, *args, **kwargs: self.log_progress(*args, **kwargs))
        wrap_method(nat, "run_validation_evaluation", self._lead_validation)

    @property
    def shown_as(self) -> str:
        return type(self.nat).__name__

    # What a Run reads and sets here is the Toolkit's own: its next selection goes by it.

    @property
    def _curriculum_state(self) -> dict[str, Any]:
        return None if self.trains_in_run else self.nat._curriculum_state  # type: ignore[return-value]

    @_curriculum_state.setter
    def _curriculum_state(self, state: dict[str, Any]) -> None:  # type: ignore  # an attribute there
        if state is not None:
            self.nat._curriculum_state = state

    @property
    def curriculum_config(self) -> CurriculumLearningConfig:
        return self.nat.curriculum_config

    @curriculum_config.setter
    def curriculum_config(self, config: CurriculumLearningConfig) -> None:  # type: ignore
        if config is not None and not self.trains_in_run:
            self.nat.curriculum_config = config

    async def initialize(self, run_config: FinetuneConfig) -> None:
        self.run_config = run_config
        try:
            await self.nat.initialize(self._finetuning)
        except (ConnectionError, OSError) as error:
            raise BackendError(
                f"{type(self.nat).__name__}.initialize: {type(error).__name__}: {redact_text(str(error))}. Start the "
                "training backend that the config names, then run the epoch again."
            ) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "aiohttp"):
                raise
            raise BackendError(
                f"{type(self.nat).__name__} does not reach its training backend: {type(error).__name__}: "
                f"{redact_text(str(error))}. Start it, then run the epoch again."
            ) from error
        await self.trajectory_builder.initialize(run_config)
        await self.trainer_adapter.initialize(run_config)

    async def run_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """The Toolkit's epoch. After the last one there is a validation, which the Toolkit leaves out."""
        self._name(run_id)
        try:
            given = await self.nat.run_epoch(epoch, run_id)
        finally:
            await self._logged()
        ref = None if given is None else self.trainer_adapter.ours(given)  # type: ignore[attr-defined]
        run = self._finetuning.run_configuration
        if run.validation_dataset and epoch == self.run_config.num_epochs - 1 and not self.trains_in_run:
            if ref is not None:
                await self.trainer_adapter.wait_until_complete(ref)
            await self.run_validation_evaluation(epoch, run_id)
        return ref

    async def run(self, num_epochs: int) -> list[TrainingJobStatus]:
        try:
            return [status_from_nat(status) for status in await self.nat.run(num_epochs)]
        finally:
            await self._logged()

    def _name(self, run_id: str) -> None:
        """The Toolkit's trainer invents a run id when it is initialized; its logs then bear the Run's."""
        if hasattr(self.nat, "_run_id"):
            self.nat._run_id = run_id

    async def get_metrics(self, run_id: str) -> dict[str, Any]:
        return await self.nat.get_metrics(run_id)

    async def cleanup(self) -> None:
        await self.trajectory_builder.aclose()  # type: ignore[attr-defined]
        await self.nat.cleanup()
        await self.trainer_adapter.aclose()  # type: ignore[attr-defined]

    def log_progress(self, epoch: int, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Into the Run's folder, while the epoch continues: a plot takes a second. A log or a plot that fails is a warning; the
        Toolkit lets it end the epoch before it is trained on."""
        folder = output_dir or (None if self.trains_in_run else str(self._folder(metrics)))
        forget_validations(self.nat, self._failed_validations)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._log(epoch, metrics, folder)
        else:
            before = self._logs[-1:]
            self._logs.append(asyncio.ensure_future(self._log_after(before, epoch, metrics, folder)))

    async def _log_after(self, before: list[asyncio.Future[None]], *args: Any) -> None:
        await asyncio.gather(*before)
        await in_daemon_thread(self._log, *args)

    def _log(self, epoch: int, metrics: dict[str, Any], folder: str | None) -> None:
        try:
            self._ask_log(epoch, metrics, folder)
        except Exception:
            logger.warning("epoch %d: the Toolkit's log could not be written", epoch, exc_info=True)

    async def _logged(self) -> None:
        """Waits for what is still being written."""
        logs, self._logs = self._logs, []
        await asyncio.gather(*logs)

    def _folder(self, metrics: dict[str, Any]) -> Path:
        run_id = getattr(self.nat, "_run_id", None) or metrics.get("run_id") or ""
        return Path(self.run_config.output_dir) / run_id

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """The Toolkit's; where it failed, or an item has no score, the mean is missing, and not 0."""
        self._validated = metrics = await self._ask_validation(epoch, run_id)
        if metrics.get("error") or not metrics.get("num_examples"):
            metrics = {**metrics, "avg_reward": math.nan, "min_reward": math.nan, "max_reward": math.nan}
            metrics.setdefault("error", "no item has a score by the reward function")
            self._failed_validations.add(epoch)
        return metrics

    async def _lead_validation(self, _: Any, epoch: int, run_id: str) -> dict[str, Any]:
        await self.run_validation_evaluation(epoch, run_id)
        return self._validated

    def apply_curriculum_learning(
        self, trajectory_collection: TrajectoryCollection, epoch: int
    ) -> TrajectoryCollection:
        """The Toolkit's choice of the Toolkit's trajectories, as it makes it within an epoch."""
        theirs = self.nat.apply_curriculum_learning(collection_to_nat(trajectory_collection), epoch)
        return collection_from_nat(theirs)
