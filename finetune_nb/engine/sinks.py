"""Metrics sinks: each epoch's numbers, handed to trackers such as trackio and wandb, or to a file.

A sink has three methods (MetricsSink). It is called on a thread of its own, in order: one that is slow, hangs or raises
holds nothing up and fails no epoch; what it raises is a warning. The run's own JSONL files are written in any case, and record
what a sink missed.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import ConfigError
from ..redaction import redacting_logger
from ..store.json import append_jsonl
from ..types import Epoch, EpochMetrics
from ..user_code import contained_call, raised_text

__all__ = [
    "JsonlSink",
    "MetricsSink",
    "SinkDispatcher",
    "WandbSink",
    "metrics_of",
]

logger = redacting_logger(__name__)


@runtime_checkable
class MetricsSink(Protocol):
    """Where the numbers of a run's epochs go."""

    def begin(self, run_id: str, config: Mapping[str, Any]) -> None:
        """Called once, before the first epoch that it sees.

        Args:
            run_id: Id of the run.
            config: The run's config as plain data, without secrets.
        """
        ...

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Called after an epoch has been recorded.

        Args:
            epoch: Its number, from 0.
            metrics: Numbers by name; see `metrics_of`.
        """
        ...

    def end(self) -> None:
        """The run is closed."""
        ...


class JsonlSink(MetricsSink):
    """Appends a line an epoch to a file: its time, run, epoch and metrics. Several runs may share the file.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._run_id = ""

    def begin(self, run_id: str, config: Mapping[str, Any]) -> None:
        self._run_id = run_id

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        append_jsonl(self.path, {"run": self._run_id, "epoch": epoch, **metrics})

    def end(self) -> None:
        pass


class WandbSink(MetricsSink):
    """Logs to whatever has wandb's shape: wandb, trackio.

        run.sinks.append(ft.WandbSink(trackio, project="sums"))

    Args:
        tracker: A module with `init(project=, name=, config=) -> run`, or a run that you have begun yourself, with
            `log(metrics, step=)` and `finish()`.
        **options: Of `init` (project, entity, resume, ...). The run's id is its name unless they give one.

    Raises:
        ConfigError: The tracker has another shape.
    """

    def __init__(self, tracker: Any, **options: Any) -> None:
        if not callable(getattr(tracker, "init", None)) and not callable(getattr(tracker, "log", None)):
            raise ConfigError(
                f"found {type(tracker).__name__}; expected a module with init(), such as trackio or wandb, or a run with log()."
            )
        self._tracker, self._options = tracker, {"project": "finetune_nb", **options}
        self._run: Any = None if callable(getattr(tracker, "init", None)) else tracker

    def begin(self, run_id: str, config: Mapping[str, Any]) -> None:
        if self._run is None:
            self._run = self._tracker.init(**{"name": run_id, "config": dict(config), **self._options})

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=epoch)

    def end(self) -> None:
        if self._run is not None:
            self._run.finish()


_GROUPS = ("reward", "groups", "rollouts")
"""How the log names of EpochMetrics begin, in the order in which they are logged."""


def _logged_fields() -> dict[str, str]:
    """Log name -> field of EpochMetrics, the names of each group together."""
    field_of = {field.metadata["log"]: field.name for field in fields(EpochMetrics) if "log" in field.metadata}
    names = sorted(field_of, key=lambda name: _GROUPS.index(name.partition("/")[0]))
    return {name: field_of[name] for name in names}


_LOGGED = _logged_fields()


def metrics_of(epoch: Epoch) -> dict[str, float]:
    """An epoch's numbers by name, in groups ("reward/mean", "train/loss", "seconds/total"). What is missing is left out:
    it would be drawn as 0, or stop a tracker that takes no NaN."""
    found: dict[str, Any] = {}
    for name, field in _LOGGED.items():
        found[name] = getattr(epoch.metrics, field)
        if name == "groups/kept":
            found["groups/trained_on"] = epoch.trained_groups
    if epoch.curriculum.enabled:
        found["curriculum/percentile"] = epoch.curriculum.percentile
    if epoch.validations:
        found["validation/reward"] = epoch.validations[-1].mean_reward

    # What there is of these depends on the evaluators and on the backend.
    named = {"score": epoch.metrics.scores, "train": epoch.train_metrics, "seconds": epoch.seconds}
    for group, values in named.items():
        for name, value in values.items():
            found[f"{group}/{name}"] = value

    return {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


class SinkDispatcher:
    """The sinks of one run at work. `sinks` may grow while the run continues; one that came late sees what comes after."""

    def __init__(self, sinks: Sequence[MetricsSink], run_id: str, config: Callable[[], Mapping[str, Any]]) -> None:
        self._sinks, self._run_id, self._config = sinks, run_id, config
        self._open: dict[int, _SinkThread] = {}

    def recorded(self, epoch: Epoch) -> None:
        """Hands an epoch to every sink, and waits for none."""
        for sink in self._sinks:
            if id(sink) not in self._open:
                self._open[id(sink)] = _SinkThread(sink, self._run_id, self._config())
            self._open[id(sink)].put(epoch.index, metrics_of(epoch))

    def close(self, seconds: float = 5.0) -> None:
        """Ends every sink; those that do not finish in that time are abandoned."""
        for outlet in self._open.values():
            outlet.put_end()
        for outlet in self._open.values():
            outlet.join(seconds)
        self._open.clear()


class _SinkThread:
    """One sink and its thread. The thread is a daemon: a tracker that hangs does not keep the interpreter."""

    def __init__(self, sink: MetricsSink, run_id: str, config: Mapping[str, Any]) -> None:
        self._sink, self._run_id, self._config = sink, run_id, config
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._begun, self._said = False, ""
        context = copy_context()  # so that warnings reach the run's log
        self._thread = threading.Thread(target=context.run, args=(self._work,), name=f"ft-sink-{run_id}", daemon=True)
        self._thread.start()

    def put(self, epoch: int, metrics: dict[str, float]) -> None:
        self._waiting.put((epoch, metrics))

    def put_end(self) -> None:
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("sink %s has not finished; it is abandoned", type(self._sink).__name__)

    def _work(self) -> None:
        while (given := self._waiting.get()) is not None:
            self._try(f"epoch {given[0]} is missing there", self._log, *given)
        if self._begun:
            self._try("it may not have ended well", self._sink.end)

    def _log(self, epoch: int, metrics: dict[str, float]) -> None:
        if not self._begun:
            self._sink.begin(self._run_id, self._config)
            self._begun = True
        self._sink.log(epoch, metrics)

    def _try(self, lost: str, work: Callable[..., None], *args: Any) -> None:
        try:
            contained_call("it", work, *args)
        except Exception as error:
            said = raised_text(error)
            level = logger.debug if said == self._said else logger.warning  # a tracker that is down is down every epoch
            level("sink %s failed (%s): %s; the run continues", type(self._sink).__name__, said, lost)
            self._said = said
