"""The finished rollouts of some epochs as columns: rewards, replies, scores, tool calls, and their names.

A column is read from the epochs' files when it is asked for, and no trajectory objects are made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..store.arrays import to_python
from ..store.json import decode
from ..store.reader import trajectory_columns
from ..types import Epoch, as_float
from .trajectory_names import generations_of, trajectory_names

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RolloutColumns"]

_LOOKS_LIKE_CALL = re.compile(
    r"<tool_call|<\|tool_call|\[TOOL_CALLS\]|<function[=_]|<\|python_tag\|>"
    r"|\{\s*\"name\"\s*:\s*\"[^\"\n]{1,80}\"\s*,\s*\"(?:arguments|parameters)\""
)
"""How models of several families write a tool call, in text that nobody parsed."""


class RolloutColumns:
    """The N finished rollouts of some epochs, as columns.

    Args:
        epochs: Their records.
    """

    def __init__(self, epochs: Sequence[Epoch]) -> None:
        import numpy as np

        self._epochs = epochs
        self.rewards = np.concatenate([epoch.statistics.rewards for epoch in epochs])
        """(N,) float64, NaN where missing."""
        self.sizes = [int(size) for epoch in epochs for size in np.diff(epoch.statistics.offsets)]
        """Of each group, one epoch's after another's."""
        self.group_of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        """(N,)"""
        self._columns: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.rewards)

    def column(self, name: str) -> list[Any]:
        """(N,) a column of the trajectories' files."""
        if name not in self._columns:
            found: list[Any] = []
            for epoch in self._epochs:
                found += to_python(trajectory_columns(epoch, [name]).column(name).combine_chunks())
            self._columns[name] = found
        return self._columns[name]

    @cached_property
    def examples(self) -> list[str]:
        """(N,) the example of each, as text."""
        ids = [str(example) for epoch in self._epochs for example in epoch.statistics.example_ids]
        return [ids[group] for group in self.group_of.tolist()]

    @cached_property
    def cut(self) -> np.ndarray:
        """(N,) bool: whether the last reply was cut at the token limit."""
        import numpy as np

        return np.array([reason == "length" for reason in self.column("finish_reason")], dtype=bool)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Evaluator -> (N,) float64, NaN where it has no number."""
        import numpy as np

        parsed: dict[str | None, Mapping[str, Any]] = {None: {}}  # the same text comes again and again
        records = []
        for text in self.column("scores"):
            if text not in parsed:
                known = decode(text)
                parsed[text] = known if isinstance(known, dict) else {}
            records.append(parsed[text])
        names = dict.fromkeys(name for record in parsed.values() for name in record)
        return {name: np.array([as_float(record.get(name)) for record in records]) for name in names}

    @cached_property
    def replies(self) -> list[str]:
        """(N,) the text of the last message of the policy, "" without one."""
        found = []
        for roles, contents in zip(self.column("roles"), self.column("contents"), strict=True):
            said = [text for role, text in zip(roles, contents, strict=True) if role == "assistant"]
            found.append(said[-1] if said else "")
        return found

    @cached_property
    def offered(self) -> np.ndarray:
        """(N,) bool: whether the model was told of tools."""
        import numpy as np

        return np.array(['"tools":[{' in (text or "") for text in self.column("metadata")], dtype=bool)

    @cached_property
    def called(self) -> np.ndarray:
        """(N,) bool: whether a tool was called."""
        return self._says('"tool_calls":')

    @cached_property
    def looks_like_call(self) -> np.ndarray:
        """(N,) bool: whether a text of the policy looks like a tool call."""
        import numpy as np

        found = []
        for roles, contents in zip(self.column("roles"), self.column("contents"), strict=True):
            texts = [text for role, text in zip(roles, contents, strict=True) if role == "assistant" and text]
            found.append(any(_LOOKS_LIKE_CALL.search(text) for text in texts))
        return np.array(found, dtype=bool)

    @cached_property
    def drifted(self) -> np.ndarray:
        """(N,) bool: whether a turn was rendered anew instead of continuing the sampled ids."""
        return self._says('"drifted":true')

    def _says(self, mark: str) -> np.ndarray:
        """(N,) bool: whether the metadata of a message, as JSON, have that text."""
        import numpy as np

        return np.array(
            [any(mark in (text or "") for text in texts) for texts in self.column("item_metadata")], dtype=bool
        )

    def inside_groups(self, values: np.ndarray) -> np.ndarray:
        """(N,) the distance of each value to the mean of its group; NaN where one is missing."""
        import numpy as np

        there = np.isfinite(values)
        groups = len(self.sizes)
        sums = np.bincount(self.group_of[there], weights=values[there], minlength=groups)
        known = np.bincount(self.group_of[there], minlength=groups)
        return values - (sums / np.maximum(known, 1))[self.group_of]

    def names(self, those: np.ndarray, most: int = 10) -> tuple[str, ...]:
        """Name the first of some rollouts.

        Args:
            those: (N,) bool: which ones.
            most: How many to name at most.

        Returns:
            Names such as "e3/q17/2".
        """
        import numpy as np

        found: list[str] = []
        begin = 0
        for epoch in self._epochs:
            sizes = np.diff(epoch.statistics.offsets)
            end = begin + int(sizes.sum())
            chosen = np.flatnonzero(those[begin:end])[: most - len(found)].tolist()
            if chosen:
                places = np.concatenate([np.arange(size) for size in sizes])
                generations = generations_of(epoch, self.column("generation")[begin:end])
                found += trajectory_names(
                    epoch.index,
                    [self.examples[begin + place] for place in chosen],
                    [generations[place] for place in chosen],
                    [int(places[place]) for place in chosen],
                )
            begin = end
        return tuple(found)
