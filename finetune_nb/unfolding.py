"""An epoch's rollouts before they are unfolded into messages and tokens: those that were asked for, in memory or as columns
of a file, and whose a row of the frame then is.

Of an epoch that is on disk only those columns are read that are asked for, and no trajectory is made; where a value has
no column of its own (a preference, half a character) the trajectories are read after all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, NamedTuple

from .columns import counts, join, objects, repeated
from .rollout_frames import Rollouts, is_example, rollouts_of
from .stored_json import decode_steps
from .types import Epoch, IntermediateStep, Trajectory

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = [
    "ROLLOUT",
    "Part",
    "Source",
    "chained",
    "lengths_of",
    "messages_in",
    "of_rollouts",
    "places",
    "source_of",
]

ROLLOUT = ("epoch", "example", "generation", "trajectory")
"""The columns that say whose a row is."""


class Part(NamedTuple):
    """What one epoch adds to a frame."""

    epoch: int
    rollouts: Rollouts
    """Only those that were asked for."""
    rows: np.ndarray
    """How many rows of the frame each of them has."""
    columns: dict[str, Any]


class Source(NamedTuple):
    """An epoch's rollouts, before they are unfolded: in memory, or columns of a file that are read when asked for."""

    epoch: Epoch
    rollouts: Rollouts
    those: np.ndarray
    """(N + F) bool: which trajectories and failures were asked for."""

    def table(self, names: Sequence[str]) -> pa.Table | None:
        """Those columns of the trajectories that were asked for; None where there is no file, or `others` of it has
        what does not fit into columns."""
        read = getattr(self.epoch, "columns", None)
        if read is None:
            return None
        table = read([*names, "others"]).slice(0, len(self.epoch.statistics.rewards))
        table = table.filter(self.those[: len(table)])
        others = messages_in(table, "others")
        return table if others.null_count == len(others) else None

    @property
    def trajectories(self) -> list[Trajectory]:
        everything = chain.from_iterable(self.epoch.collection.trajectories)
        return [trajectory for trajectory, ok in zip(everything, self.those.tolist(), strict=False) if ok]

    @property
    def steps(self) -> list[list[IntermediateStep]]:
        """What each failed rollout that was asked for had done."""
        rows = len(self.epoch.statistics.rewards)
        those = self.those[rows:].tolist()
        if not any(those):
            return []
        read = getattr(self.epoch, "columns", None)
        if read is None:
            return [failure.steps for failure in compress(self.epoch.collection.failures, those)]
        return [decode_steps(text) for text in compress(read(["steps"]).column("steps").slice(rows).to_pylist(), those)]


def source_of(epoch: Epoch, example: Any, failures: bool) -> Source:
    """The rollouts of an epoch, and of these the ones of some examples. failures: whether those that failed count, too."""
    import numpy as np

    found = rollouts_of(epoch, ["generation"], named=True)
    total, rows = len(found.examples), len(epoch.statistics.rewards)
    those = (
        np.ones(total, bool) if example is None else np.array([is_example(e, example) for e in found.examples], bool)
    )
    those[rows:] &= failures
    generations = [*found.columns["generation"], *(failure["generation"] for failure in found.failures)]
    examples, names, generations = (list(compress(v, those)) for v in (found.examples, found.names, generations))
    return Source(epoch, Rollouts(examples, names, {"generation": generations}, []), those)


def of_rollouts(parts: Sequence[Part]) -> dict[str, Any]:
    """The columns that say whose a row is."""
    import numpy as np

    times = join((part.rows for part in parts), "int64")
    rollouts = [part.rollouts for part in parts]
    generations = counts(chained(each.columns["generation"] for each in rollouts))
    return {
        "epoch": np.repeat(join((np.full(len(part.rows), part.epoch) for part in parts), "int64"), times),
        "example": objects(objects(chained(each.examples for each in rollouts)).to_numpy().repeat(times)),
        "generation": generations.repeat(times),
        "trajectory": repeated(chained(each.names for each in rollouts), times),
    }


def chained(parts: Iterable[list[Any]]) -> list[Any]:
    """Lists behind one another."""
    return list(chain.from_iterable(parts))


def places(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the groups of that size."""
    import numpy as np

    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def messages_in(table: pa.Table, name: str) -> Any:
    """A column of lists, one a trajectory, as an array of messages."""
    return table.column(name).combine_chunks().flatten()


def lengths_of(lists: Any) -> np.ndarray:
    """Of each list; 0 for a missing one."""
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype("int64")
