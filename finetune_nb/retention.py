"""Which checkpoints of a run are worth their disk space: the newest, the best, and those that something was built on.
A pure rule over epoch numbers; what a checkpoint is, and deleting one, are left to others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .errors import ConfigError

__all__ = ["to_keep"]


def to_keep(epochs: Sequence[int], last: int, best: int | None, pinned: Collection[int]) -> set[int]:
    """The epochs whose checkpoints stay: always some of `epochs`, those that have a checkpoint now, in any order.

    last: how many of the newest stay (0: none for being new; to go on with a run takes the newest one). best: the
    epoch that did best on validation; None where nothing was validated. pinned: epochs that must not go, for example
    because a run was forked from them. Raises ConfigError for a negative `last`.
    """
    if last < 0:
        raise ConfigError(f"the number of newest checkpoints to keep is {last}; expected 0 or more")
    there = set(epochs)
    newest = sorted(there, reverse=True)[:last]
    return there & {*newest, *pinned, *([] if best is None else [best])}
