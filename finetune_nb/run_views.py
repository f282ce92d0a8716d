"""What can be seen of a run: tables, plots and how it shows itself, from its records alone.

Everything here works on records that are in memory or read from disk, whoever's Trainer made them. Running is run.py's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, StoreError
from .run_folder import DATABASE
from .store import RunStore
from .types import Epoch
from .viewer import run_html, run_text

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison

__all__ = ["RunViews", "compare", "runs"]


class RunViews(ABC):
    """A run to look at. `run[3]` is the record of epoch 3, `len(run)` their number."""

    id: str
    """The run's name, and that of its folder."""
    error: str | None = None
    """What the last epoch raised."""

    @property
    @abstractmethod
    def records(self) -> Sequence[Epoch]:
        """One Epoch for each epoch that has ended."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """All that the run leaves behind."""

    @property
    @abstractmethod
    def state(self) -> str:
        """What the run is doing, in a word."""

    @property
    def model(self) -> str | None:
        """What is trained, where that is known."""
        return None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Epoch:
        return self.records[index]

    def trajectories(self) -> pd.DataFrame:
        """One row = one trajectory or one failed rollout. Columns: see frames.trajectories."""
        from . import frames

        return frames.trajectories(self.records)

    def groups(self) -> pd.DataFrame:
        """One row = one group of one epoch. Columns: see frames.groups."""
        from . import frames

        return frames.groups(self.records)

    def epochs(self) -> pd.DataFrame:
        """One row = one epoch. Columns: see frames.epochs."""
        from . import frames

        return frames.epochs(self.records)

    def plot_rewards(self, ax: Any = None, **options: Any) -> Any:
        """Reward per epoch, with validation and curriculum. Returns a figure, or draws on `ax`."""
        from . import plots

        return plots.plot_rewards(self.records, ax=ax, **options)

    def plot_reward_distribution(self, ax: Any = None, **options: Any) -> Any:
        """How the rewards of each epoch are distributed. Returns a figure, or draws on `ax`."""
        from . import plots

        return plots.plot_reward_distribution(self.records, ax=ax, **options)

    def plot_scores(self, names: Sequence[str] | None = None, ax: Any = None, **options: Any) -> Any:
        """The mean of every evaluator per epoch. Returns a figure, or draws on `ax`."""
        from . import plots

        return plots.plot_scores(self.records, names=names, ax=ax, **options)

    def __repr__(self) -> str:
        return run_text(name=self.id, state=self.state, epochs=self.records, error=self.error)

    def _repr_html_(self) -> str:
        return run_html(
            name=self.id,
            state=self.state,
            epochs=self.records,
            error=self.error,
            folder=str(self.folder),
            model=self.model,
        )


def compare(runs: Sequence[RunViews], confidence: float = 0.95) -> Comparison:
    """Holds the other runs against the first one, on the examples that they have in common in the same epoch.

    Shows a table; `.frame` has the pairs, `.differences` the numbers with their bootstrap intervals, `.plot()` the curves.
    Raises ConfigError for fewer than two different runs.
    """
    from .comparison import compare_runs

    names = [run.id for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"a run is held against others, not against itself; got {', '.join(names)}.")
    return compare_runs({run.id: run.records for run in runs}, confidence)


def runs(directory: str | Path = "runs") -> pd.DataFrame:
    """The runs in a directory, newest first: one row = one run.

    Columns: run (its id), created_at (UTC), epochs, last_reward (mean reward of the last epoch, NaN without one), state,
    parent and parent_epoch (of a fork), size (bytes), folder, error (why a folder cannot be read; the rest is then missing).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for folder in sorted(Path(directory).glob(f"*/{DATABASE}")):
        row: dict[str, Any] = {"run": folder.parent.name, "folder": str(folder.parent)}
        try:
            store = RunStore.open(folder.parent)
            parent, parent_epoch = store.parent or (None, None)
            row |= {
                "created_at": store.created_at,
                "epochs": len(store.epochs),
                "last_reward": store.epochs[-1].metrics.mean_reward if store.epochs else None,
                "state": store.run_state,
                "parent": parent,
                "parent_epoch": parent_epoch,
                "size": store.size(),
            }
        except StoreError as error:
            row["error"] = str(error)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=list(_RUN_COLUMNS)).astype(_RUN_COLUMNS)
    frame["created_at"] = pd.to_datetime(frame.created_at, unit="s", utc=True)
    return frame.sort_values("created_at", ascending=False, ignore_index=True)


_RUN_COLUMNS = {
    "run": "object",
    "created_at": "float64",
    "epochs": "Int64",
    "last_reward": "float64",
    "state": "object",
    "parent": "object",
    "parent_epoch": "Int64",
    "size": "Int64",
    "folder": "object",
    "error": "object",
}
