"""One training job: a call of `backend.train`, as a task of the event loop that submitted it."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from ...redaction import error_text
from ...types import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum

__all__ = [
    "ArtJob",
    "is_number",
]


class ArtJob:
    """train: returns what ART measured, an art.TrainResult. trajectories: how many it trains on."""

    def __init__(self, run_id: str, train: Coroutine[Any, Any, Any], trajectories: int) -> None:
        self.id = uuid.uuid4().hex
        self.ref = TrainingJobRef(run_id=run_id, backend="openpipe_art", metadata={"job_id": self.id})
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # so that a waiter who is canceled does not cancel the job's end
        self._trajectories, self._canceled = trajectories, False
        self._task = asyncio.create_task(train, name=f"art-{self.id}")
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # seen, also where nobody asks any more
        self.ended.set_result(None)

    def cancel(self) -> None:
        """Stops waiting for ART; whether a remote service continues is its affair."""
        if not self._task.done():
            self._canceled = True
            self._task.cancel()

    def status(self) -> TrainingJobStatus:
        """Its current status. `metadata` of a completed one: metrics, and ART's step."""
        task = self._task
        if not task.done():
            return self._make(TrainingStatusEnum.RUNNING)
        if task.cancelled() or self._canceled:
            return self._make(TrainingStatusEnum.CANCELED, "the job was canceled")
        if (error := task.exception()) is not None:
            return self._make(TrainingStatusEnum.FAILED, error_text(error))
        result = task.result()
        measured = {name: float(value) for name, value in (result.metrics or {}).items() if is_number(value)}
        metrics = {"trajectories": float(self._trajectories), **measured}
        return self._make(TrainingStatusEnum.COMPLETED, metrics=metrics, step=result.step)

    def _make(self, status: TrainingStatusEnum, message: str | None = None, **metadata: Any) -> TrainingJobStatus:
        return TrainingJobStatus(
            run_id=self.ref.run_id,
            backend=self.ref.backend,
            status=status,
            progress=100.0 if status == TrainingStatusEnum.COMPLETED else None,
            message=message,
            metadata={"job_id": self.id, **metadata},
        )


def is_number(value: Any) -> bool:
    """Whether it is a finite number: ART's metrics and an evaluator's scores may be anything."""
    return isinstance(value, int | float) and math.isfinite(value)
