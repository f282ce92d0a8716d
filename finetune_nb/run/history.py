"""A run as its records show it: frames, plots, rollouts, exports.

Everything here works on records that are in memory or read from disk, whoever's Trainer made them. Nothing here needs an
engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..engine.state import RunStatus
from ..errors import ConfigError, RunError, did_you_mean
from ..store.batches import DecodedBatches
from ..store.labels import Label, read_labels, remove_labels
from ..text import short
from ..types import Epoch
from ..views.summary import run_html, run_text
from .labelling import label_names, names_in

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.example_history import ExampleHistory
    from ..analysis.group_comparison import ComparedRollout, GroupComparison, RolloutComparison
    from ..analysis.learning_signal import LearningSignal
    from ..frames.search import Search
    from ..notebook.browser import Browser
    from ..rewards.labels import Tags
    from ..rollouts.preferences import Pairing
    from ..types import Change, Trajectory, TrajectoryCollection
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

    def read_partial(self, decoded: DecodedBatches | None = None) -> Epoch | None:
        """Read `partial` again and again while it grows.

        Args:
            decoded: A dict that is kept from call to call, empty at first: what it holds is not decoded again.

        Returns:
            The record, in which nothing may be changed; None where there is no unfinished epoch.
        """
        return self.partial

    def partial_stamp(self) -> Any:
        """Ask whether `partial` has other rollouts, at little cost.

        Returns:
            A value that changes when they do; None where there is no unfinished epoch.
        """
        left = self.partial
        return None if left is None else (left.index, left.metrics.trajectories, left.metrics.failures)

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
    def parent(self) -> tuple[str, int] | None:
        """Of a fork: the name of the run it was made of, and the epoch of that run after which it begins."""
        return None

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
    # What is not asked for is not read from the disk.

    def trajectories(
        self, epoch: Any = None, example: Any = None, columns: Columns = None, *, partial: bool = False
    ) -> pd.DataFrame:
        """One row = one trajectory or one failed rollout.

        Args:
            epoch: An epoch's number as in `run[3]`, a slice, or several numbers. Default: all.
            example: An example's id, or a list of ids. Default: all.
            columns: Only these columns, in this order. Default: all.
            partial: Whether to include those of the epoch that did not finish.

        Returns:
            The frame; its columns are those of `frames.trajectories`.

        Raises:
            ConfigError: There is no such column, or no such example.
            IndexError: There is no such epoch.
        """
        from .. import frames

        left = self.partial if partial else None
        chosen = [*self.chosen(epoch), *([left] if left else [])]
        labels = self._labels_for(chosen, columns)
        return self._of_example(frames.trajectories(chosen, example, columns, labels), example)

    def messages(self, epoch: Any = None, example: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one message of an episode.

        Args:
            epoch: An epoch's number as in `run[3]`, a slice, or several numbers. Default: all.
            example: An example's id, or a list of ids. Default: all.
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.messages`.

        Raises:
            ConfigError: There is no such column, or no such example.
            IndexError: There is no such epoch.
        """
        from .. import frames

        return self._of_example(frames.messages(self.chosen(epoch), example, columns), example)

    def tokens(self, epoch: Any = None, example: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one token that the policy sampled. Of a long run there are many: ask for some epochs.

        Args:
            epoch: An epoch's number as in `run[3]`, a slice, or several numbers. Default: all.
            example: An example's id, or a list of ids. Default: all.
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.tokens`.

        Raises:
            ConfigError: There is no such column, or no such example.
            IndexError: There is no such epoch.
        """
        from .. import frames

        return self._of_example(frames.tokens(self.chosen(epoch), example, columns), example)

    def groups(self, epoch: Any = None, example: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one group of one epoch.

        Args:
            epoch: An epoch's number as in `run[3]`, a slice, or several numbers. Default: all.
            example: An example's id, or a list of ids. Default: all.
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.groups`.

        Raises:
            ConfigError: There is no such column, or no such example.
            IndexError: There is no such epoch.
        """
        from .. import frames

        chosen = self.chosen(epoch)
        labels = self._labels_for(chosen, columns)
        return self._of_example(frames.groups(chosen, example, columns, labels), example)

    def epochs(self, epoch: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one epoch.

        Args:
            epoch: An epoch's number as in `run[3]`, a slice, or several numbers. Default: all.
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.epochs`.

        Raises:
            ConfigError: There is no such column.
            IndexError: There is no such epoch.
        """
        from .. import frames

        chosen = self.chosen(epoch)
        return frames.epochs(chosen, columns, self._labels_for(chosen, columns))

    def _labels_for(self, epochs: Sequence[Epoch], columns: Columns) -> Sequence[Label]:
        """The labels of these epochs, if a frame with these columns needs any."""
        wanted = [columns] if isinstance(columns, str) else columns
        if wanted is not None and not {"labels", "label_score"}.intersection(wanted):
            return ()
        return read_labels(self.folder, [each.index for each in epochs])

    def chosen(self, epoch: Any = None) -> Sequence[Epoch]:
        """Look up the records of some epochs.

        Args:
            epoch: A number as in `run[3]`, a slice, or several numbers. Default: all.

        Returns:
            The records.

        Raises:
            IndexError: There is no such epoch.
        """
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
        """One row = one field of the live settings that somebody changed.

        Args:
            epoch: Only the changes that these epochs were the first to use; as in `trajectories`. Default: all.
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.journal`.

        Raises:
            ConfigError: There is no such column.
            IndexError: There is no such epoch.
        """
        from .. import frames

        used = None if epoch is None else {each.index for each in self.chosen(epoch)}
        return frames.journal([c for c in self.changes if used is None or c.epoch in used], columns)

    # ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def label(
        self,
        name: Any,
        tag: str,
        *,
        score: float | None = None,
        note: str = "",
        author: str | None = None,
    ) -> None:
        """Label rollouts, groups or epochs. Labels are kept in the run's folder, and may be given while it is written.

            run.label("e3/q17/2", "hacked", note="prints the expected output")

        Args:
            name: "e3/q17/2", as in the column `trajectory` of `trajectories()`; "e3/q17" for a group, "e3" for an epoch.
                Several: a list of names, or a frame with the column `trajectory` or `name`.
            tag: A word or two, such as "hacked" or "flag".
            score: Any finite number.
            note: A text.
            author: Who says so. Default: the name of the user of this system. A label of the same name, tag and author is
                replaced.

        Raises:
            RunError: There is no such rollout, group or epoch, or no epoch yet.
            ConfigError: The tag, the score, the note or the author does not fit.
            StoreError: It cannot be written.
        """
        label_names(self, name, tag, score, note, author)

    def unlabel(self, name: Any, tag: str | None = None, *, author: str | None = None) -> int:
        """Take labels away.

        Args:
            name: As in `label`.
            tag: Only labels with this tag. Default: every tag.
            author: Only labels by this author. Default: by whomever.

        Returns:
            How many there were.

        Raises:
            ConfigError: The frame has no such column.
            StoreError: They cannot be written.
        """
        return remove_labels(self.folder, names_in(name), tag, author)

    def labels(self, epoch: Any = None, columns: Columns = None) -> pd.DataFrame:
        """One row = one label, by this process or another one, oldest first.

        Args:
            epoch: As in `trajectories`: labels of these epochs, their groups and rollouts. Default: all.
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.labels`.

        Raises:
            ConfigError: There is no such column.
            IndexError: There is no such epoch.
            StoreError: The folder cannot be read.
        """
        from .. import frames

        epochs = None if epoch is None else [each.index for each in self.chosen(epoch)]
        return frames.labels(read_labels(self.folder, epochs), columns)

    def preferences(
        self,
        labels: Any = None,
        *,
        tags: Tags | None = None,
        pairs: Pairing = "best_worst",
        max_pairs_per_example: int = 8,
    ) -> TrajectoryCollection:
        """Make preferences of labelled rollouts, for backends that learn from them (`trl_dpo`).

        Args:
            labels: What rollouts are worth: `run.labels()`, or some of its rows; a mapping from names of rollouts to numbers; or
                a frame with the columns `trajectory` and `label`, or `trajectory` and `reward`. Default: `run.labels()`.
            tags: Which labels count, as in `ft.label_reward`: {"good": 1, "hacked": 0} says what tags are worth. Default: the
                labels that have a score, if they all have one tag.
            pairs: "best_worst": the best rollout of an example against its worst, "all_pairs": each against each. They may be
                of different epochs.
            max_pairs_per_example: Of more pairs, those with the largest difference are taken.

        Returns:
            One trajectory a pair, with prompt, chosen and rejected response; its metadata name the two rollouts.

        Raises:
            RunError: There is no pair, or a label is of no rollout that finished.
            ConfigError: The labels do not say what rollouts are worth.
        """
        from .chosen import preferences, values_in

        values = values_in(self.labels() if labels is None else labels, tags)
        return preferences(values, self._epoch, self.id, pairs, max_pairs_per_example)

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
        epoch: int | str | None = None,
        example: Any = None,
        generation: int | None = None,
        *,
        heat: Heat = "probability",
        turn: int | None = None,
        weights: int | None = None,
    ) -> RolloutView:
        """Show one rollout as a conversation, with its reward, its tokens and the rest of its group.

            run.show("e2/q37/3")

        Args:
            epoch: Its number; negative counts from the newest. Default: the newest. Or a name, as in the column `trajectory` of
                `trajectories()`, that says the epoch, the example and the generation: "e2/q37/3", "e2/q37" or "e2".
            example: The example's id. Default: the one whose rewards differ most.
            generation: Which rollout of the group. Default: the best one.
            heat: What colours the sampled tokens: their "probability"; the "entropy" of the policy in their place, if that
                or the likely alternatives were recorded; or the "change" of their log probability, see `logprob_change`.
            turn: The first turn to show, from 0, at full length. Default: every turn, of which long ones are cut, and the rest
                of the group.
            weights: For the heat "change": the epoch after which the weights are taken. Default: the newest that are kept.

        Returns:
            A view that displays itself; its `.trajectory` is the record.

        Raises:
            IndexError: There is no such epoch.
            RunError: The epoch has no such example, the example no such generation, or the rollout no such turn.
            ConfigError: `heat` is none of the three, something is said by the name and once more, or `weights` without "change".
        """
        from ..analysis.rollout_group import rollout_group
        from ..views.rollout import RolloutView

        if isinstance(epoch, str):
            epoch, example, generation = self._named(epoch, example, generation)
        group = rollout_group(self._epoch(epoch), example)
        chosen = group.rollout(generation)
        if heat != "change":
            if weights is not None:
                raise ConfigError(f'found weights={weights!r}; it goes with heat="change" alone.')
            return RolloutView(group, chosen, heat, turn)
        if weights is None:
            weights = next(reversed(self.kept_weights()), None)
        changes = self.token_changes(group.finished(chosen), weights)
        return RolloutView(group, chosen, heat, turn, tuple(map(tuple, changes)), weights)

    def kept_weights(self) -> list[int]:
        """List the epochs whose weights are available; see `logprob_change`.

        Returns:
            Their numbers, oldest first.
        """
        return []

    def token_changes(self, trajectory: Trajectory, epoch: int | None = None) -> list[list[float]]:
        """As `logprob_change`, of a trajectory at hand.

        Args:
            trajectory: A record, such as `run.show(name).trajectory`.
            epoch: As in `logprob_change`.

        Returns:
            For each sampled turn a list with one number a token, in nats.

        Raises:
            As `logprob_change`.
        """
        raise RunError(f"{self.id!r} has records alone, and no weights: there is no model to ask.")

    def logprob_change(self, name: str, epoch: int | None = None) -> pd.DataFrame:
        """What training has made of one rollout: the log probability of each sampled token under later weights, minus the one
        when it was sampled.

            run.logprob_change("e0/q17/2", epoch=9).nlargest(10, "change")

        The weights come from a checkpoint and are loaded beside those of the run, which continues meanwhile. That needs room
        for a second copy of the model, which is released after two minutes. The adapter must be `local_grpo`, `trl_sft` or
        `trl_dpo`, and named in the config.

        Args:
            name: A name, as in the column `trajectory` of `trajectories()`; of a group ("e0/q17"), its best rollout.
            epoch: The weights are those after this epoch; negative counts from the newest. Default: the newest that are kept.

        Returns:
            The rollout's rows of `tokens()`, and `change`, in nats: above 0, the token has become more likely.

        Raises:
            IndexError: There is no such epoch.
            RunError: There is no such rollout, it failed, or the weights are not kept.
            ConfigError: The backend cannot do it.
            BackendError: The ids of the prompt or the reply were not recorded, the checkpoint does not fit, or memory runs out.
        """
        from ..analysis.rollout_group import rollout_group
        from .epoch_weights import tokens_with_changes

        number, example, generation = self._named(name, None, None)
        record = self._epoch(number)
        group = rollout_group(record, example)
        place = group.rollout(generation)
        changes = self.token_changes(group.finished(place), epoch)
        assert isinstance(place, int)  # it has finished
        return tokens_with_changes(record, group, place, changes)

    def compare(self, first: str, second: str) -> RolloutComparison:
        """Show two rollouts side by side, of any epochs, with the point where they diverge.

            run.compare("e0/q37/1", "e3/q37/2")

        Args:
            first: A name, as in the column `trajectory` of `trajectories()`; of a group ("e0/q37"), its best rollout.
            second: Another one.

        Returns:
            A view that displays itself; its `.divergence` is that point, its `.trajectories` are the two records.

        Raises:
            IndexError: There is no such epoch.
            RunError: There is no such rollout, or it failed, so that there is nothing to compare.
        """
        from ..analysis.group_comparison import compare_rollouts

        return compare_rollouts(self._compared(first), self._compared(second))

    def compare_group(self, epoch: int | str | None = None, example: Any = None) -> GroupComparison:
        """Show the best and the worst rollout of one example side by side, with the point where they diverge.

        Args:
            epoch: Its number; negative counts from the newest. Default: the newest. Or the name of a group, such as "e2/q37".
            example: The example's id. Default: the one whose rewards differ most.

        Returns:
            A view that displays itself; its `.divergence` is that point, its `.trajectories` are the two records.

        Raises:
            IndexError: There is no such epoch.
            RunError: The epoch has no such example, or fewer than two of its rollouts finished.
        """
        from ..analysis.group_comparison import compare_group
        from ..analysis.rollout_group import rollout_group

        if isinstance(epoch, str):
            epoch, example, _ = self._named(epoch, example, None)
        return compare_group(rollout_group(self._epoch(epoch), example))

    def find(
        self,
        text: str | None = None,
        *,
        regex: str | None = None,
        where: Any = None,
        epochs: Any = None,
        limit: int = 10_000,
    ) -> Search:
        """Search the rollouts: their messages, tool calls and thoughts, and the errors of failed ones.

            run.find("I cannot")
            run.find(where="reward < 0.5 and 'hacked' in labels")

        Args:
            text: A part of a text, in lower or upper case.
            regex: A regular expression in RE2's syntax, in lower or upper case.
            where: Only these rollouts: a condition on the columns of `trajectories()`, such as "reward < 0.5 and error != None"
                (comparisons joined by and, or, not; no code is run), or a function of the frame of one epoch that returns a
                bool for each row.
            epochs: As in `trajectories`. Default: all.
            limit: Hits of which the text is kept; the others are counted.

        Returns:
            The search, which displays the first hits. Iterating it gives the hits of one epoch after another, the newest first;
            its `.frame` has all; `.stop()` ends it.

        Raises:
            ConfigError: Nothing is searched for, or it does not fit.
            IndexError: There is no such epoch.
        """
        from ..frames.search import Search, query_of

        query = query_of(text, regex, where)
        return Search(query, self.chosen(epochs), [] if where is None else read_labels(self.folder), limit)

    def history(self, example: Any) -> ExampleHistory:
        """Show one example over the epochs: its rewards, and what its best rollout replied.

        Args:
            example: The example's id.

        Returns:
            A view that displays itself; its `.groups` and `.rollouts` are DataFrames.

        Raises:
            ConfigError: No epoch has such an example.
            RunError: No epoch has ended yet.
        """
        from ..analysis.example_history import ExampleHistory

        if not self.records:
            raise RunError(f"run {self.id!r} has no epoch yet, so there is no history. Run one, then ask again.")
        groups = self.groups(example=example)
        return ExampleHistory(groups.example.iloc[0], groups, self.trajectories(example=example))

    def _named(self, name: str, example: Any, generation: Any) -> tuple[int, Any, Any]:
        """Epoch, example and generation by a name; what it leaves open, as it was given."""
        from ..frames.names import find_names

        (found,) = find_names([name], self._epoch)
        for what, said, given in (("example", found.example, example), ("generation", found.generation, generation)):
            if said is not None and given is not None:
                raise ConfigError(f"{short(repr(name), 80)} says the {what}: leave {what}={given!r} out.")
        return (
            found.epoch,
            example if found.example is None else found.example,
            generation if found.generation is None else found.generation,
        )

    def _compared(self, name: str) -> ComparedRollout:
        """One side of a comparison."""
        from ..analysis.group_comparison import ComparedRollout
        from ..analysis.rollout_group import rollout_group

        epoch, example, generation = self._named(name, None, None)
        group = rollout_group(self._epoch(epoch), example)
        place = group.rollout(generation)
        if not isinstance(place, int):
            raise RunError(
                f"{short(repr(name), 80)} failed ({short(place.error, 200)}), so there is nothing to compare."
            )
        return ComparedRollout(name, group, place)

    def signal(self, epoch: int | None = None) -> LearningSignal:
        """Show which groups of an epoch teach, why the others do not, and what larger or smaller groups would do.

        Args:
            epoch: Its number; negative counts from the newest. Default: the newest.

        Returns:
            A view that displays itself; its `.groups`, `.reasons` and `.sizes` are DataFrames.

        Raises:
            IndexError: There is no such epoch.
        """
        from ..analysis.learning_signal import learning_signal

        found = self._epoch(epoch)
        return learning_signal(found, [one for one in self.records if one.index < found.index])

    def browse(self, epoch: int | None = None, example: Any = None, filter: Mapping[str, Any] | None = None) -> Browser:
        """Read the run's rollouts in a cell, without typing: the groups of an epoch, the conversation, its tokens.

        Press ? in it for the keys. It follows a run that trains. A saved notebook shows a static summary in its place.

        Args:
            epoch: Its number; negative counts from the newest. Default: the newest.
            example: The example's id. Default: the one whose rewards differ most.
            filter: Which rollouts are listed: a mapping with some of signal (as in `signal().groups`), failed, cut, missing
                (no reward), reward and turns (lowest and highest, None for no limit), label ("*": any), and text, regex and
                where, as in `find`. {"failed": False, "reward": (None, 0.5), "text": "sorry"}, say. Default: all.

        Returns:
            The browser, which displays itself; its `epoch`, `example`, `generation`, `filter` and `sort` are traits, its
            `selection` a DataFrame.

        Raises:
            IndexError: There is no such epoch.
            RunError: The epoch has no such example.
            ConfigError: The filter has a field or a value that does not fit.
        """
        from ..notebook.browser import Browser

        if epoch is not None and epoch < 0:
            epoch = self[epoch].index
        return Browser(self, epoch, example, filter)

    # ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plot_rewards(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Plot the reward per epoch, with validation, curriculum and live changes.

        Args:
            others: Runs to show beside this one.
            ax: Where to draw. Default: a new figure.
            **options: Of `plots.plot_rewards`: theme ("light" or "dark"; by default "light"), baseline.

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: The theme is unknown.
        """
        from .. import plots

        return plots.plot_rewards([self, *others], ax=ax, **options)

    def plot_reward_distribution(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Plot how the rewards of each epoch are distributed.

        Args:
            others: Runs to show beside this one.
            ax: One axes per run. Default: a new figure.
            **options: Of `plots.plot_reward_distribution`: theme ("light" or "dark"; by default "light").

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: The number of axes is wrong, or the theme is unknown.
        """
        from .. import plots

        return plots.plot_reward_distribution([self, *others], ax=ax, **options)

    def plot_curriculum(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Plot what became of each epoch's groups, the curriculum's percentile, and the live changes.

        Args:
            others: Runs to show beside this one.
            ax: Where to draw. Default: a new figure.
            **options: Of `plots.plot_curriculum`: theme ("light" or "dark"; by default "light").

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: The theme is unknown.
        """
        from .. import plots

        return plots.plot_curriculum([self, *others], ax=ax, **options)

    def plot_groups(self, epoch: Any = -1, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Plot a map of the groups, mean reward against spread, by what became of them.

        Args:
            epoch: As in `trajectories`. Default: the newest.
            others: Runs to show beside this one.
            ax: One axes per run. Default: a new figure.
            **options: Of `plots.plot_groups`: theme ("light" or "dark"; by default "light").

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: The number of axes is wrong, or the theme is unknown.
            IndexError: There is no such epoch.
        """
        from .. import plots

        runs = {run.id: run.chosen(epoch) if run.records else [] for run in (self, *others)}
        return plots.plot_groups(runs, ax=ax, **options)

    def plot_advantages(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Plot how the advantages of each epoch are distributed, and how many trajectories have none.

        Args:
            others: Runs to show beside this one.
            ax: One axes per run. Default: a new figure.
            **options: Of `plots.plot_advantages`: theme ("light" or "dark"; by default "light").

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: The number of axes is wrong, or the theme is unknown.
        """
        from .. import plots

        return plots.plot_advantages([self, *others], ax=ax, **options)

    def plot_lengths(self, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any) -> Any:
        """Plot how many tokens the policy sampled for a trajectory, and how many were cut at the limit.

        Args:
            others: Runs to show beside this one.
            ax: Where to draw. Default: a new figure.
            **options: Of `plots.plot_lengths`: theme ("light" or "dark"; by default "light").

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: The theme is unknown.
        """
        from .. import plots

        return plots.plot_lengths([self, *others], ax=ax, **options)

    def plot_training(
        self, names: Sequence[str] | None = None, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any
    ) -> Any:
        """Plot what the training backend measured: loss, KL, clip fraction, gradient norm, ...

        Args:
            names: Which metrics, in this order. Default: the usual ones that were measured, else all.
            others: Runs to show beside this one.
            ax: One axes per metric. Default: a new figure.
            **options: Of `plots.plot_training`: theme ("light" or "dark"; by default "light").

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: No epoch has a metric of that name, the number of axes is wrong, or the theme is unknown.
        """
        from .. import plots

        return plots.plot_training([self, *others], names, ax=ax, **options)

    def plot_scores(
        self, names: Sequence[str] | None = None, others: Sequence[RunHistory] = (), ax: Any = None, **options: Any
    ) -> Any:
        """Plot the mean of every evaluator per epoch.

        Args:
            names: Which scores, in this order. Default: all.
            others: Runs to show beside this one.
            ax: Where to draw. Default: a new figure.
            **options: Of `plots.plot_scores`: theme ("light" or "dark"; by default "light"), stacked.

        Returns:
            The new figure, or `ax`.

        Raises:
            ConfigError: No epoch has a score of that name, `stacked` with several runs, or the theme is unknown.
        """
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
        browser: bool | None = None,
        max_megabytes: float | None = None,
    ) -> Path:
        """Write the run to a file, in the format that its suffix names.

        "report.html", which has the trajectory browser in it, without a kernel; a frame as ".csv", ".parquet" or ".jsonl";
        "journal.yaml", the live changes for `replay=` of another run. In a .csv, a text that a spreadsheet would run as a formula
        gets a ' in front. "run.eval" is a log of Inspect AI, with every conversation and its scores.

        Args:
            path: The file; missing folders are created.
            frame: Which frame. Default: "trajectories", of which a .jsonl has one line each, with its messages.
            epoch: As in `trajectories`.
            example: As in `trajectories`.
            columns: As in `trajectories`.
            browser: Whether a report has the browser. Default: True.
            max_megabytes: How large the browser's data in a report may be, in units of 1,000,000 bytes. Rollouts that do not
                fit are left out, those of the newest epoch last, and the report says so. Default: 10.

        Returns:
            The path.

        Raises:
            ConfigError: The suffix or the frame is unknown, or the format does not take a frame, an epoch, an example, columns or
                a browser.
            IndexError: There is no such epoch.
        """
        from ..notebook.embedded import report_browser
        from ..views.export import export

        make = report_browser(self, path, browser, max_megabytes)
        return export(self, path, frame, {"epoch": epoch, "example": example, "columns": columns}, make)

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
