"""Keys of rollouts: which rollout a key was made for, and which one sends it."""

from __future__ import annotations

import re

from .call_recorder import CallRecorder, current_episode

__all__ = [
    "RolloutKey",
    "rollouts_of",
    "secret_of",
]

_KEY = re.compile(r"Bearer ([\w-]+)(?:\.(\d{1,18}))?(?:\.(\d{1,18}))?", re.ASCII)


class RolloutKey(str):
    """The key of one rollout's addresses: the process's secret, and the rollout's number.

    Libraries write it into a header for every request, as a rule. If that is done by the code of another rollout, the
    header names that one too: a client that was made once and is used in several rollouts cannot be told from the
    address that it asks. What is written is a plain str.
    """

    @classmethod
    def of(cls, secret: str, episode: CallRecorder) -> RolloutKey:
        """The key of that rollout."""
        return cls(f"{secret}.{episode.number}")

    def __str__(self) -> str:
        plain = str.__str__(self)
        sender = current_episode()
        if sender is None or plain.endswith(f".{sender.number}"):
            return plain
        return f"{plain}.{sender.number}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def secret_of(header: str | None) -> str:
    """The secret in an Authorization header; empty where it holds no key."""
    match = _KEY.fullmatch(header or "")
    return "" if match is None else match[1]


def rollouts_of(header: str | None) -> list[int]:
    """The numbers of the rollouts that a header names: first the one whose key it is, then the one that sends it."""
    match = _KEY.fullmatch(header or "")
    if match is None:
        return []
    return [int(number) for number in match.groups()[1:] if number is not None]
