"""What the record of a run says of each example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import StoreError
from ..rollouts.difficulty import Visits
from ..types import Change, Epoch
from .live_settings import CHOSEN

__all__ = [
    "EXAMPLES",
    "SeenExamples",
    "examples_at_start",
]

EXAMPLES = "examples"
"""Key of the state that a fork starts with: what its parent's record says of each example."""


class SeenExamples:
    """Counts the visits of recorded epochs, each once."""

    def __init__(self) -> None:
        self._known: list[tuple[int, float]] = []
        self._visits = Visits()

    def visits(self, epochs: Sequence[Epoch], changes: Iterable[Change], start: Mapping[str, Any] | None) -> Visits:
        """What is known of each example.

        Args:
            epochs: The record.
            changes: The journal. An epoch that trained on rollouts that somebody chose is no visit.
            start: The state that a fork starts with; None: no fork.

        Returns:
            The visits. Whoever changes them copies them first.

        Raises:
            StoreError: The state is damaged.
        """
        chosen = {change.epoch for change in changes if change.field == CHOSEN}
        counted = [epoch for epoch in epochs if epoch.index not in chosen]
        names = [(epoch.index, epoch.started_at) for epoch in counted]
        if names[: len(self._known)] != self._known or not self._known:
            self._known, self._visits = [], examples_at_start(start)
        for epoch in counted[len(self._known) :]:
            self._visits.add(epoch.index, epoch.statistics)
        self._known = names
        return self._visits


def examples_at_start(start: Mapping[str, Any] | None) -> Visits:
    """What a fork knows of its parent's record. Raises StoreError where that is damaged."""
    record = (start or {}).get(EXAMPLES)
    if record is None:
        return Visits()
    try:
        return Visits.from_json(record)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"what this fork was told of its parent's examples cannot be read ({type(error).__name__}: {error}). Fork once more "
            "from the parent."
        ) from error
