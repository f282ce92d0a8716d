"""The errors that finetune_nb raises, one tree, drawn here:

    FinetuneError
    ├── ConfigError      (ValueError)    a setting, a YAML file or an argument is wrong
    ├── DatasetError     (ValueError)    a dataset cannot be read, or its rows do not fit
    ├── WorkflowError    (RuntimeError)  an agent workflow cannot be called, or returned nothing
    ├── RolloutTimeout   (TimeoutError)  a rollout took longer than it was allowed to
    ├── MissingLogprobs  (ValueError)    a sampled turn has no logprobs, so it cannot be trained on
    ├── BackendError     (RuntimeError)  a training backend is unhealthy or refused the trajectories
    │   ├── StalePolicy  (RuntimeError)  trajectories were sampled by older weights than are trained
    │   ├── UnknownJob   (RuntimeError)  a training backend has no job of that id
    │   └── JobFailed    (RuntimeError)  a training job ended as failed or canceled
    ├── RunError         (RuntimeError)  a Run was asked for something that its state does not allow
    │   └── EpochAborted (RuntimeError)  the epoch that was waited for was aborted
    ├── StoreError       (RuntimeError)  a run's folder cannot be read or written
    └── MissingExtra     (ImportError)   an optional package is not installed; the message names the extra

Every message says what was found, what was expected, and what to do next. Catch `FinetuneError` for all of them; each is
also the standard error that it refines.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .text import plain

__all__ = [
    "BackendError",
    "ConfigError",
    "DatasetError",
    "EpochAborted",
    "FinetuneError",
    "JobFailed",
    "MissingExtra",
    "MissingLogprobs",
    "RolloutTimeout",
    "RunError",
    "StalePolicy",
    "StoreError",
    "UnknownJob",
    "UserCodeError",
    "WorkflowError",
    "did_you_mean",
    "is_transient",
]


class FinetuneError(Exception):
    """Base of every error that finetune_nb raises on purpose."""

    def __str__(self) -> str:
        return plain(super().__str__())  # a traceback sends it to a terminal


class ConfigError(FinetuneError, ValueError):
    """A setting, a YAML file or an argument is wrong."""


class DatasetError(FinetuneError, ValueError):
    """A dataset cannot be read, or its rows do not fit."""


class WorkflowError(FinetuneError, RuntimeError):
    """An agent workflow cannot be called with the given row, or it returned nothing."""


class UserCodeError(FinetuneError, RuntimeError):
    """Code that a user wrote raised something that is no Exception, such as SystemExit, or cancelled itself. Its cause is
    what was raised."""

    said: str = ""
    """What was raised, as text: "SystemExit: 2"."""


class RolloutTimeout(FinetuneError, TimeoutError):
    """A rollout took longer than `eval.general.item_timeout` seconds."""


class MissingLogprobs(FinetuneError, ValueError):
    """A turn that the policy sampled carries no logprobs."""


class BackendError(FinetuneError, RuntimeError):
    """A training backend is unhealthy, or refused what was submitted."""


class StalePolicy(BackendError):
    """Trajectories were sampled by an older policy version than the one that would be trained."""


class UnknownJob(BackendError):
    """A training backend has no job of the id that it was asked for."""


class JobFailed(BackendError):
    """A training job ended as failed or canceled. `epoch` is its Epoch record, where there is one."""

    epoch: object | None = None

    @classmethod
    def of(cls, epoch: int, status: Any) -> JobFailed:
        """The error for a job's last TrainingJobStatus."""
        return cls(f"epoch {epoch}: the training job {status.status}: {status.message or 'no reason given'}")


class RunError(FinetuneError, RuntimeError):
    """A Run was asked for something that its state does not allow."""


class EpochAborted(RunError):
    """The epoch that was waited for was aborted; what was collected until then is in `run.partial`."""


class StoreError(FinetuneError, RuntimeError):
    """A run's folder cannot be read or written; what was recorded before is kept."""


class MissingExtra(FinetuneError, ImportError):
    """An optional package is missing. package: what to install, where that is no extra of finetune_nb."""

    def __init__(self, what: str, extra: str, package: str | None = None) -> None:
        self.what, self.extra, self.package = what, extra, package
        install = package or f'"finetune_nb[{extra}]"'
        super().__init__(f"{what} needs packages that are not installed: pip install {install}")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str | None]]:
        return type(self), (self.what, self.extra, self.package)  # so that it can come from another process


_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}
_TRANSIENT_NAMES = {"APIConnectionError", "APITimeoutError", "ConnectError", "ReadTimeout", "ReadError"}
"""Errors of client libraries, which are not imported for that."""


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a lost connection, a time-out, a server that is busy."""
    if isinstance(error, RolloutTimeout):
        return False
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or getattr(error, "status_code", None) in _TRANSIENT_STATUS
        or type(error).__name__ in _TRANSIENT_NAMES
    )


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """A sentence for an error message: the nearest known name, and all of them; or that there is none."""
    names = sorted(str(name) for name in known)
    if not names:
        return "None is known."
    near = difflib.get_close_matches(str(found), names, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}."
