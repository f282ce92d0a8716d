"""A training job: its id, its daemon thread, its status. What the thread does is handed in as a function.

A status is made anew whenever something changes and is never altered: reading one needs no lock and changes nothing.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

from .daemons import leaving, start_daemon
from .experience import Experience
from .redaction import error_text, redacting_logger
from .types import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum

__all__ = ["Report", "TrainingJob"]

logger = redacting_logger(__name__)


class Report(Protocol):
    """What a job has done so far, filled in by whoever trains."""

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        ...

    @property
    def steps_planned(self) -> int:
        """0 as long as nobody knows."""
        ...

    def metrics(self) -> dict[str, float]:
        """What was measured, NaN where nothing was."""
        ...


class TrainingJob:
    """Starts after the job `before` has ended. Of `learned` only numbers are kept once it has ended itself."""

    def __init__(
        self,
        run_id: str,
        backend: str,
        policy_version: int,
        learned: Experience,
        report: Report,
        before: TrainingJob | None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.ref = TrainingJobRef(run_id=run_id, backend=backend, metadata={"job_id": self.id})
        self.report = report
        self.policy_version = policy_version
        self.canceled = threading.Event()
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # so that a waiter who is canceled does not cancel the job's end
        self._before = before
        self._trajectories, self._groups = len(learned.trajectories), learned.groups
        self._without_signal, self._truncated = learned.groups_without_signal, learned.truncated
        self._started = time.perf_counter()
        self._status = self._make(TrainingStatusEnum.PENDING, "waiting for the weights")

    def start(self, train: Callable[[], None]) -> None:
        """`train` fills in `report`, calls `stepped` after each step and returns early once `stopped()`."""
        start_daemon(lambda: self._work(train), "finetune_nb training")

    def cancel(self) -> None:
        """It stops before its next optimizer step; those that it has made stay."""
        self.canceled.set()

    def stopped(self) -> bool:
        """Whether it is to end before its next step."""
        return self.canceled.is_set() or leaving.is_set()

    def stepped(self) -> None:
        """Says which step has been made."""
        self.say(f"step {self.report.steps} of {self.report.steps_planned}")

    def say(self, message: str) -> None:
        """What the running job is at, or waits for."""
        self._status = self._make(TrainingStatusEnum.RUNNING, message)

    def status(self) -> TrainingJobStatus:
        """How it stands now; a copy."""
        return self._status.model_copy(deep=True)

    def _work(self, train: Callable[[], None]) -> None:
        try:
            while self._before is not None and not self.stopped():
                if wait([self._before.ended], timeout=0.05).done:
                    self._before = None
            self._started = time.perf_counter()
            train()
            self._status = self._last()
        except BaseException as error:  # the thread's last word: whoever waits must hear of it
            logger.exception("training job %s failed", self.id)
            self._status = self._make(TrainingStatusEnum.FAILED, error_text(error))
        finally:
            self._before = None
            self.ended.set_result(None)

    def _last(self) -> TrainingJobStatus:
        report = self.report
        if not self._trajectories:
            message = f"nothing to train on: none of {self._without_signal} groups has rewards that differ"
            return self._make(TrainingStatusEnum.COMPLETED, message)
        if report.steps == report.steps_planned > 0:
            return self._make(TrainingStatusEnum.COMPLETED, f"{report.steps} optimizer steps")
        message = f"canceled after {report.steps} of {report.steps_planned or 'the'} optimizer steps"
        return self._make(TrainingStatusEnum.CANCELED, message)

    def _make(self, status: TrainingStatusEnum, message: str) -> TrainingJobStatus:
        report = self.report
        progress = 100.0 * report.steps / report.steps_planned if report.steps_planned else 0.0
        metrics = {
            **report.metrics(),
            "trained_trajectories": self._trajectories if report.steps else 0,
            "trained_groups": self._groups if report.steps else 0,
            "groups_without_signal": self._without_signal,
            "truncated_trajectories": self._truncated,
            "seconds": time.perf_counter() - self._started,
        }
        return TrainingJobStatus(
            run_id=self.ref.run_id,
            backend=self.ref.backend,
            status=status,
            progress=100.0 if status == TrainingStatusEnum.COMPLETED else progress,
            message=message,
            metadata={"job_id": self.id, "policy_version": self.policy_version, "metrics": metrics},
        )
