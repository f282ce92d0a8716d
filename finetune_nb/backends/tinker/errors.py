"""Errors of a Tinker-compatible service, sorted by what helps."""

from __future__ import annotations

import re
from concurrent.futures import CancelledError
from typing import Any

from ...errors import BackendError, MissingExtra
from ...redaction import redact_text

__all__ = [
    "Full",
    "Gone",
    "Lost",
    "Misunderstood",
    "OLDEST_SDK",
    "Refused",
    "Unavailable",
    "WeightsRefused",
    "sdk",
    "sorted_error",
]

OLDEST_SDK, NEWEST_SDK = "0.24.1", "0.38.0"
"""Of the versions that are tested."""
NO_SLOT = re.compile(r"maximum number of .{0,40}adapters|no (free )?(adapter )?slots?\b", re.IGNORECASE)
LOST = re.compile(r"checkpoint .{0,300}not found|checkpoint not found|checkpoint creation failed", re.IGNORECASE)
GONE = re.compile(r"status 404|model \S+ not loaded|model not found|session not found", re.IGNORECASE)


class Refused(BackendError):
    """The service does not do what it was asked for, however often it is asked."""


class Full(Refused):
    """All adapter slots of the service are held. One is free again when its model is unloaded, or its session has ended."""


class Lost(Refused):
    """What was saved on the service is no longer there."""


class WeightsRefused(Refused):
    """A Datum may have no weights for its tokens."""


class Unavailable(BackendError):
    """The service failed, or did not answer; it may when it is asked again."""


class Gone(Unavailable):
    """The service has forgotten session, model or sampler, as it does when nobody has been heard of for minutes: this
    machine slept, or the service was started again."""


class Misunderstood(BackendError):
    """SDK and service do not understand each other."""


def sdk() -> Any:
    """The package `tinker`. Raises MissingExtra."""
    try:
        import tinker  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("the training backend tinker", "tinker") from error
    return tinker


def sorted_error(error: BaseException, what: str) -> BackendError:
    """An error of the SDK as one of the above; one of ours stays.

    Services report the same error in two ways: as the status of the request, and as the status of its result, which the SDK
    puts into the text of a ValueError.
    """
    if isinstance(error, BackendError):
        return error
    tinker, text = sdk(), str(error)
    said = redact_text(f"{what}: {type(error).__name__}: {text}")
    status = getattr(error, "status_code", None)
    if isinstance(error, tinker.RequestFailedError):
        if NO_SLOT.search(text):
            return _full(said)
        return Refused(said) if str(getattr(error, "category", "")) == "user" else Unavailable(said)
    if isinstance(error, tinker.APIStatusError) and isinstance(status, int):
        return _by_status(status, text, said)
    if isinstance(error, tinker.APIConnectionError | TimeoutError | CancelledError):
        return Unavailable(said)
    if type(error).__name__ == "RetryableException":  # the service forgot the request
        return Unavailable(said)
    if LOST.search(text):
        return Lost(said)
    if GONE.search(text):
        return Gone(said)
    found = re.search(r"status (4\d\d)", text)
    if found:
        return _by_status(int(found[1]), text, said)
    return Misunderstood(
        f"{said}. Is this SDK (tinker {tinker.__version__}) one for that service? Tested are {OLDEST_SDK} and {NEWEST_SDK}, both "
        f'with SkyRL\'s server: pip install "tinker=={NEWEST_SDK}"'
    )


def _by_status(status: int, text: str, said: str) -> BackendError:
    if NO_SLOT.search(text):
        return _full(said)
    if status in (408, 409, 425, 429) or (status >= 500 and not LOST.search(text)):
        return Unavailable(said)
    if LOST.search(text):
        return Lost(said)
    if status == 404:
        return Gone(said)
    if status in (401, 403):
        said += ". Check TINKER_API_KEY (api_key of the trainer adapter)."
    if status == 402:
        said += ". The account cannot pay for it: see the service's billing page."
    return Refused(said)


def _full(said: str) -> Full:
    return Full(
        f"{said}. Slots are held by other runs, and by dead ones until their session times out: wait, or end them."
    )
