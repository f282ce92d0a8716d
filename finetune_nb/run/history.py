"""A run as its records show it: frames, plots, rollouts, exports.

Everything here works on records that are in memory or read from disk, whoever's Trainer made them. Nothing here needs an
engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..engine.state import RunStatus
from ..errors import ConfigError, did_you_mean
from ..types import Epoch
from ..views.summary import run_html, run_text

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.group_comparison import GroupComparison
    from ..analysis.learning_signal import LearningSignal
    from ..types import Change
    from ..views.rollout import RolloutView
    from ..views.tokens import Heat

__all__ = [
    "RunHistory",
]

Columns = Sequence[str] | str | None


class RunHistory(ABC):
    """A run to look at. `run[3]` is the record of epoch 3, `len(run)` their number."""

    id: str
    """The run's name, and that of its folder."""

    @property
    @abstractmethod
    def records(self) -> Sequence[Epoch]:
        """One Epoch for each epoch that has ended."""

    @property
    @abstractmethod
    def partial(self) -> Epoch | None:
        """The epoch that has begun and is not complete."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The run's folder."""

    @property
    @abstractmethod
    def status(self) -> RunStatus:
        """What the run is doing at this moment, as one value."""

    @property
    def state(self) -> str:
        """What the run is doing, in a word."""
        return self.status.state

    @property
    def error(self) -> str | None:
        """What the last epoch raised."""
        return self.status.error

    @property
    def notice(self) -> str | None:
        """Why it is paused, or what it is about to do."""
        return self.status.notice

    @property
    def writer(self) -> str | None:
        """Which other process writes the run at the moment; None where none does."""
        return self.status.writer

    def _place(self) -> str:
        """The folder, and what is worth saying of it."""
        return str(self.folder)

    def _state_and_writer(self) -> str:
        status = self.status
        state, notice = status.state, status.notice or ""
        if notice:
            state = notice if notice.startswith(state) else f"{state}: {notice}"
        return f"{state}, written by {status.writer}" if status.writer else state

    @property
    def model(self) -> str | None:
        """What is trained, where that is known."""
        return None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> Epoch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Epoch]: ...

    def __getitem__(self, index: int | slice) -> Epoch | list[Epoch]:
        """An epoch by its number; negative: from the newest. A fork's numbers begin after its parent's."""
        records = self.records
        first = records[0].index if records else 0
        if isinstance(index, slice):
            start, stop = (
                max(0, bound - first) if bound is not None and bound >= 0 else bound
                for bound in (index.start, index.stop)
            )
            return list(records[start : stop : index.step])
        place = index - first if index >= 0 else index + len(records)
        if not 0 <= place < len(records):
            there = f"epochs {first} to {records[-1].index}" if records else "no epoch yet"
            raise IndexError(f"found run[{index}]; run {self.id!r} has {there}.")
        return records[place]

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────
    #
    # epoch: a number as in run[3], a slice, or several numbers; None: all. example: an id, or a list of ids. columns: the
    # names of those that are wanted, in their order. What is not asked for is not read from the disk.

    def trajectories(
        self, epoch: Any = None, example: Any = None, columns: Columns = None, *, partial: bool = False
    ) -> pd.DataFrame:
        """One row = one trajectory or one failed rollout. Columns: see frames.trajectories. partial: those of the epoch
        that did not finish, too."""
        from .. import frames

        left = self.partial if partial else None
        chosen = [*self.chosen(epoch), *([left] if left else [])]
        return self._of_example(frames.trajectories(chosen, example, columns), example)

    def messages(self, epoch: Any = None, example: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one message of an episode. Columns: see frames.messages."""
        from .. import frames

        return self._of_example(frames.messages(self.chosen(epoch), example, columns), example)

    def tokens(self, epoch: Any = None, example: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one token that the policy sampled. Columns: see frames.tokens. Of a long run there are many: ask for
        some epochs."""
        from .. import frames

        return self._of_example(frames.tokens(self.chosen(epoch), example, columns), example)

    def groups(self, epoch: Any = None, example: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one group of one epoch. Columns: see frames.groups."""
        from .. import frames

        return self._of_example(frames.groups(self.chosen(epoch), example, columns), example)

    def epochs(self, epoch: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one epoch. Columns: see frames.epochs."""
        from .. import frames

        return frames.epochs(self.chosen(epoch), columns)

    def chosen(self, epoch: Any = None) -> Sequence[Epoch]:
        """The records of those epochs: a number as in run[3], a slice, or several numbers; None: all."""
        if epoch is None:
            return self.records
        if isinstance(epoch, slice):
            return self[epoch]
        return [self[int(epoch)]] if isinstance(epoch, Integral) else [self[each] for each in epoch]

    def _of_example(self, frame: pd.DataFrame, example: Any) -> pd.DataFrame:
        """The frame. An empty one is right where an example was not drawn, and a trap where there is no such example."""
        if example is None or len(frame) or not self.records:
            return frame
        from .. import frames

        known = frames.groups(self.records, columns=["example"]).example.tolist()
        if not any(frames.is_example(each, example) for each in known):
            some = ", ".join(repr(each) for each in known[:5])
            near = did_you_mean(str(example), map(str, known)).partition("Known:")[0]
            raise ConfigError(f"run {self.id!r} has no example {example!r}; it has {some}, ... {near}".rstrip())
        return frame

    @property
    @abstractmethod
    def changes(self) -> Sequence[Change]:
        """Every change of the live settings, in order."""

    def journal(self, epoch: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one field of the live settings that somebody changed. Columns: see frames.journal. epoch: those that
        these epochs were the first to use."""
        from .. import frames

        used = None if epoch is None else {each.index for each in self.chosen(epoch)}
        return frames.journal([c for c in self.changes if used is None or c.epoch in used], columns)

    # ── one epoch, looked at ─────────────────────────────────────────────────────────────────────────────────────────

    def _epoch(self, epoch: int | None) -> Epoch:
        """The record to look at. None: the newest; the unfinished epoch counts where it is asked for by
        its number, or where there is no other."""
        try:
            return self[-1 if epoch is None else epoch]
        except IndexError:
            left = self.partial
            if left is None or epoch not in (None, left.index):
                raise
            return left

    def show(
        self,
        epoch: int | None = None,
        example: Any = None,
        generation: int | None = None,
        *,
        heat: Heat = "probability",
    ) -> RolloutView:
        """Show one rollout as a conversation, with its reward, its tokens and the rest of its group.

        epoch: its number; negative: from the newest; None = the newest. example: the example's id; None = the one whose
        rewards differ most. generation: None = the best of the group. heat: what tints the sampled tokens, their
        "probability" or, where the record has alternatives, the "entropy" of the choice. `.trajectory` of what is returned
        is the record itself. Raises IndexError for an epoch that is not there, RunError for an example or a generation.
        """
        from ..analysis.rollout_group import rollout_group
        from ..views.rollout import RolloutView

        group = rollout_group(self._epoch(epoch), example)
        return RolloutView(group, group.rollout(generation), heat)

    def compare_group(self, epoch: int | None = None, example: Any = None) -> GroupComparison:
        """The best and the worst rollout of one example side by side, with the place where they part.

        epoch, example: as in `show`. `.divergence` of what is returned says where they part, `.trajectories` are the two
        records. Raises IndexError for an epoch that is not there, RunError for an example, or one with a single rollout.
        """
        from ..analysis.group_comparison import compare_group
        from ..analysis.rollout_group import rollout_group

        return compare_group(rollout_group(self._epoch(epoch), example))

    def signal(self, epoch: int | None = None) -> LearningSignal:
        """Which groups of an epoch teach, why the others do not, and what larger or smaller groups would do.

        epoch: as in `show`. `.groups`, `.reasons` and `.sizes` of what is returned are DataFrames. The forecast is
        explained in spread_forecast.chance_of_spread. Raises IndexError for an epoch that is not there.
        """
        from ..analysis.learning_signal import learning_signal

        found = self._epoch(epoch)
        return learning_signal(found, [one for one in self.records if one.index < found.index])

    # ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────
    #
    # Each returns a figure, or draws on `ax`; options: theme ("light", "dark"; by default one that suits both) and those
    # of the function of that name in plots.py. others: runs to show beside this one.

    def plot_rewards(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Reward per epoch, with validation, curriculum and live changes."""
        from .. import plots

        return plots.plot_rewards([self, *others], ax=ax, **options)

    def plot_reward_distribution(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """How the rewards of each epoch are distributed."""
        from .. import plots

        return plots.plot_reward_distribution([self, *others], ax=ax, **options)

    def plot_curriculum(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """What became of each epoch's groups, the curriculum's percentile, and the live changes."""
        from .. import plots

        return plots.plot_curriculum([self, *others], ax=ax, **options)

    def plot_groups(self, epoch: Any = -1, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """A map of the groups, mean reward against spread, by what became of them. epoch: the newest by default; as in
        `trajectories`."""
        from .. import plots

        runs = {run.id: run.chosen(epoch) if run.records else [] for run in (self, *others)}
        return plots.plot_groups(runs, ax=ax, **options)

    def plot_advantages(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """How the advantages of each epoch are distributed, and how many trajectories have none."""
        from .. import plots

        return plots.plot_advantages([self, *others], ax=ax, **options)

    def plot_lengths(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """How many tokens the policy sampled for a trajectory, and how many were cut at the limit."""
        from .. import plots

        return plots.plot_lengths([self, *others], ax=ax, **options)

    def plot_training(
        self, names: Sequence[str] | None = None, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any
    ) -> Any:
        """What the training backend measured: loss, KL, clip fraction, gradient norm, ..."""
        from .. import plots

        return plots.plot_training([self, *others], names, ax=ax, **options)

    def plot_scores(
        self, names: Sequence[str] | None = None, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any
    ) -> Any:
        """The mean of every evaluator per epoch."""
        from .. import plots

        return plots.plot_scores([self, *others], names, ax=ax, **options)

    # ── taken away, shown ────────────────────────────────────────────────────────────────────────────────────────────

    def export(
        self,
        path: str | Path,
        frame: str | None = None,
        *,
        epoch: Any = None,
        example: Any = None,
        columns: Columns = None,
    ) -> Path:
        """Writes the run to a file, its kind told by its suffix, and returns its path.

        "report.html"; a frame ("trajectories" by default) as ".csv", ".parquet" or ".jsonl", of which the last has by
        default one line a trajectory with its messages; "journal.yaml", the live changes for `replay=` of another run.
        What .csv does to formulas: see export.py. Raises ConfigError for other suffixes.
        """
        from ..views.export import export

        return export(self, path, frame, {"epoch": epoch, "example": example, "columns": columns})

    def __repr__(self) -> str:
        return run_text(
            name=self.id, state=self._state_and_writer(), epochs=self.records, error=self.error, model=self.model
        )

    def _repr_html_(self) -> str:
        return run_html(
            name=self.id,
            state=self._state_and_writer(),
            epochs=self.records,
            error=self.error,
            folder=self._place(),
            model=self.model,
        )

    def _record(self) -> dict[str, Any]:
        """What the cell that started the run shows of it, by mime type: the summary, and the rewards as a picture for
        whoever shows no HTML."""
        from base64 import b64encode

        picture = b64encode(self.plot_rewards(theme="light").png()).decode("ascii")
        return {"text/plain": repr(self), "text/html": self._repr_html_(), "image/png": picture}
