"""The trajectory browser of a run: what its page asks for is answered here, and what a person does there can be read.

The page asks, the kernel answers: on whatever thread a widget's message arrives, with data that it reads itself from the
records. Nothing here prints, waits for a cell or touches an event loop. Where nobody sees widgets, the static summary is all.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import traitlets

from ..analysis.browse_index import (
    SIGNAL_NAMES,
    SORTS,
    BrowseFilter,
    BrowseIndex,
    browse_index,
    group_order,
    leading,
    least_likely,
    matching,
    means_before,
    packed,
)
from ..analysis.learning_signal import SIGNALS
from ..analysis.rollout_body import RolloutRows, rollout_body, rollout_json
from ..engine.state import ACTIVE
from ..errors import ConfigError, FinetuneError, RunError, did_you_mean
from ..frames.names import find_names
from ..frames.search import Query, query_of, rows_with
from ..redaction import error_text, redacting_logger
from ..store.batches import DecodedBatches
from ..store.labels import Label, Labelled, changed_since, new_labels, put_labels, read_labels, remove_labels
from ..text import one_line, short, text_of
from ..types import Epoch, Trajectory, same_id
from .browser_html import browser_html, browser_text
from .kernel import has_frontend

if TYPE_CHECKING:
    import pandas as pd

    from .mounted import Mounted

__all__ = [
    "BrowsedRun",
    "Browser",
    "Source",
    "words_of_signals",
]

logger = redacting_logger(__name__)

KEPT_INDEXES = 4
"""Indexes of epochs that are kept: the page keeps its own."""
HISTORY = 256
"""Most groups whose history is asked for at a time."""
HISTORY_EPOCHS = 64
"""Most epochs of a history."""
KEPT_CHANGES = 64
"""Rollouts of which the changes of tokens are kept."""
WAITING_CHANGES = 8
"""Rollouts that may wait for theirs; of more, those that were asked for last."""


class BrowsedRun(Protocol):
    """What a browser needs of a run."""

    id: str

    @property
    def records(self) -> Sequence[Epoch]: ...

    def partial_stamp(self) -> Any: ...

    def read_partial(self, decoded: DecodedBatches) -> Epoch | None: ...


class Source:
    """The epochs of a run, with what was read of them last. Used by several threads."""

    def __init__(self, run: BrowsedRun) -> None:
        # A run that trains holds a model: a browser must not keep it when nobody else does. Its records stay readable.
        steerable = getattr(getattr(run, "status", None), "read_only", "") is None
        self._run: Callable[[], BrowsedRun | None] = weakref.ref(run) if steerable else lambda: run
        self._records: Sequence[Epoch] = run.records
        self.folder: Path | None = getattr(run, "folder", None)
        self._indexes: dict[int, tuple[Epoch, BrowseIndex]] = {}
        self._least: dict[bool, tuple[Epoch, np.ndarray]] = {}
        self._history: tuple[Epoch, np.ndarray] | None = None
        self._hits: tuple[Epoch, Query, np.ndarray] | None = None
        self._unfinished: Epoch | None = None
        self._looking = threading.Lock()
        self._seen: Any = None
        """What was seen of the unfinished epoch, as `partial_stamp` has it."""
        self._look_after = 0.0
        self._decoded: DecodedBatches = {}
        self._version = 0
        self.rows = RolloutRows()

    @property
    def run(self) -> BrowsedRun | None:
        """None when nobody else holds it any more."""
        return self._run()

    def records(self, refresh: bool = False) -> Sequence[Epoch]:
        """The epochs that have ended.

        Args:
            refresh: Whether to look for what another process has added.
        """
        run = self.run
        if run is not None:
            if refresh and getattr(run, "writer", None):
                run.refresh()  # type: ignore[attr-defined]  # a run that somebody writes has it
            self._records = run.records
        return self._records

    def shown(self, refresh: bool = False) -> list[Epoch]:
        """The epochs that have ended, and after them the one that has begun, once a rollout of it is in the folder.

        Args:
            refresh: Whether to look for what has been added. What has come to the epoch that has begun is read meanwhile, and
                is there the next time; at once where there is no other.
        """
        records = list(self.records(refresh))
        if refresh:
            self._look(wait=not records)
        left = self._unfinished
        if left is not None and not (records and records[-1].index >= left.index):
            records.append(left)
        elif refresh:
            self._unfinished = None
        return records

    def _look(self, wait: bool) -> None:
        """Reads the unfinished epoch, if it has changed. At most a tenth of the time goes there."""
        run = self.run
        stamp = None if run is None else run.partial_stamp()
        if run is None or stamp == self._seen or time.monotonic() < self._look_after:
            return
        if stamp is None and self._unfinished is not None and getattr(run, "state", "") in ACTIVE:
            return  # it has ended a moment ago, and is about to be among the records
        if not self._looking.acquire(blocking=False):
            return

        def look() -> None:
            began, left = time.monotonic(), None
            try:
                if stamp is None:
                    self._decoded.clear()
                else:
                    left = run.read_partial(self._decoded)
            except FinetuneError:
                logger.warning("the epoch that has not ended cannot be read", exc_info=True)
            finally:
                has_rollouts = left is not None and left.metrics.trajectories + left.metrics.failures
                self._unfinished, self._seen, self._version = left if has_rollouts else None, stamp, self._version + 1
                self._look_after = time.monotonic() + 9 * (time.monotonic() - began)
                self._looking.release()

        if wait or stamp is None:
            look()
        else:
            threading.Thread(target=look, name="ft-unfinished", daemon=True).start()

    def version(self, epoch: Epoch) -> int | None:
        """Of the unfinished epoch: another number whenever its rollouts are others. None for an epoch that has ended."""
        return self._version if epoch is self._unfinished else None

    def epoch(self, number: int) -> Epoch:
        """Raises IndexError where there is no such epoch."""
        records = self.shown()
        for record in reversed(records):
            if record.index == number:
                return record
        there = f"epochs {records[0].index} to {records[-1].index}" if records else "no epoch yet"
        raise IndexError(f"found epoch {number}; the run has {there}.")

    def earlier(self, epoch: Epoch) -> list[Epoch]:
        return [each for each in self.records() if each.index < epoch.index]

    def index(self, number: int) -> BrowseIndex:
        epoch = self.epoch(number)
        known = self._indexes.get(number)
        if known is not None and known[0] is epoch:
            return known[1]
        earlier = self.earlier(epoch)
        index = browse_index(epoch, earlier, means_before(epoch, earlier))
        kept = [(key, value) for key, value in list(self._indexes.items()) if key != number]
        self._indexes = dict([*kept[-(KEPT_INDEXES - 1) :], (number, (epoch, index))])
        return index

    def least(self, number: int, calls: bool = False) -> np.ndarray:
        epoch = self.epoch(number)
        known = self._least.get(calls)
        if known is None or known[0] is not epoch:
            known = self._least[calls] = (epoch, least_likely(epoch, calls))
        return known[1]

    def history(self, number: int) -> np.ndarray:
        """(E, G) the mean reward of each group's example in the last epochs up to this one; NaN where it was not drawn."""
        epoch, index = self.epoch(number), self.index(number)
        if self._history is not None and self._history[0] is epoch:
            return self._history[1]
        records = [*self.earlier(epoch), epoch][-HISTORY_EPOCHS:]
        group_of = {text_of(example): group for group, example in enumerate(index.examples)}
        found = np.full((len(records), len(index.examples)), np.nan, np.float32)
        for row, record in enumerate(records):
            means = np.where(np.isinf(record.statistics.means), np.nan, record.statistics.means)
            groups = [group_of.get(text_of(example), -1) for example in record.statistics.example_ids]
            known = np.array(groups, np.int64) >= 0
            found[row, np.array(groups, np.int64)[known]] = means[known]
        self._history = (epoch, found)
        return found

    def hits(self, number: int, wanted: BrowseFilter) -> np.ndarray | None:
        """(R,) which rows of an epoch have the filter's text and meet its condition; None where it has neither."""
        query = _query_of(wanted)
        if query is None:
            return None
        epoch = self.epoch(number)
        if wanted.where is not None:  # labels change
            labels = [] if self.folder is None else read_labels(self.folder, [number])
            return rows_with(epoch, query, labels)
        if self._hits is None or self._hits[0] is not epoch or self._hits[1] != query:
            self._hits = (epoch, query, rows_with(epoch, query))
        return self._hits[2]

    def matching(self, number: int, wanted: BrowseFilter) -> np.ndarray:
        """(N,) which rollouts of an epoch the filter lets through."""
        index = self.index(number)
        hits = self.hits(number, wanted)
        labelled = None if wanted.label is None else self.labelled(number, wanted.label)
        return matching(index, wanted, hits, labelled)

    def labels(self, number: int) -> list[tuple[Label, int]]:
        """The labels of an epoch, each with what it is of: the place of a rollout or a group; 0 for the epoch."""
        if self.folder is None:
            return []
        index = self.index(number)
        groups = {text_of(example): group for group, example in enumerate(index.examples)}
        found = []
        for label in read_labels(self.folder, [number]):
            place: int | None = 0
            if label.level != "epoch":
                place = group = groups.get(text_of(label.example))
                if group is not None and label.level == "rollout":
                    place = _rollout_or_none(index, group, label.generation)
            if place is not None:
                found.append((label, place))
        return found

    def labels_and_tags(self, number: int) -> dict[str, Any]:
        """The labels of an epoch as plain values, and all tags of the run."""
        if self.folder is None:
            return {"epoch": number, "labels": [], "tags": [], "change": 0}
        known = changed_since(self.folder, 0)
        found = []
        for label, place in self.labels(number):
            found.append([label.level, place, label.tag, label.score, label.note, label.author, label.time])
        tags = sorted({label.tag for label in known.labels if not label.removed})
        return {"epoch": number, "labels": found, "tags": tags, "change": known.change}

    def labelled(self, number: int, tag: str) -> np.ndarray:
        """(N,) which rollouts have a label, they themselves, their group or, where its name is given, their epoch; "*": any."""
        index = self.index(number)
        found = np.zeros(len(index), dtype=bool)
        for label, place in self.labels(number):
            if tag not in ("*", label.tag):
                continue
            if label.level == "rollout":
                found[place] = True
            elif label.level == "group":
                found[index.starts[place] : index.starts[place + 1]] = True
            elif tag != "*":  # or every rollout of the epoch would have one
                found[:] = True
        return found

    def order(self, number: int, found: np.ndarray, sort: str) -> np.ndarray:
        return group_order(self.index(number), found, sort, self._least_for(number, sort))

    def leading(self, number: int, found: np.ndarray, sort: str) -> np.ndarray:
        return leading(self.index(number), found, sort, self._least_for(number, sort))

    def _least_for(self, number: int, sort: str) -> np.ndarray | None:
        return self.least(number, sort == "call") if sort in ("unlikely", "call") else None


def words_of_signals() -> list[dict[str, str]]:
    """What the page says of each signal, in the order of SIGNAL_NAMES."""
    return [{"name": name, "meaning": SIGNALS[name][0], "advice": SIGNALS[name][1]} for name in SIGNAL_NAMES]


def _query_of(wanted: BrowseFilter) -> Query | None:
    """What the filter searches for; None: nothing. Raises ConfigError where it cannot be searched for."""
    if wanted.text is None and wanted.regex is None and wanted.where is None:
        return None
    return query_of(wanted.text, wanted.regex, wanted.where)


class _Changes:
    """Computes what tokens have changed by, one rollout after the other in a thread of its own, and tells the page."""

    def __init__(self, source: Source, tell: Callable[[Mapping[str, Any], Sequence[bytes]], None]) -> None:
        self._source, self._tell = source, tell
        self._turn = threading.Lock()
        self._waiting: list[tuple[Any, Epoch, int, int | None]] = []
        self._at_work = False
        self._kept: list[tuple[Epoch, int, Epoch | None, bytes]] = []

    def ask(self, number: Any, epoch: Epoch, row: int, weights: int | None) -> None:
        """Asks for one rollout.

        Args:
            number: The id of the message that asked, which the answer names.
            epoch: Its epoch.
            row: Its row in that.
            weights: The epoch after which the weights are taken. None: the newest that are kept.
        """
        with self._turn:
            self._waiting.append((number, epoch, row, weights))
            dropped, self._waiting = self._waiting[:-WAITING_CHANGES], self._waiting[-WAITING_CHANGES:]
            begins, self._at_work = not self._at_work, True
        for each in dropped:
            self._tell({"event": "change", "of": each[0], "problem": "other rollouts were asked for since"}, ())
        if begins:
            threading.Thread(target=self._work, name="ft-changes", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._turn:
                if not self._waiting:
                    self._at_work = False
                    return
                number, epoch, row, weights = self._waiting.pop()  # what is looked at now
            found: dict[str, Any] = {"event": "change", "of": number}
            values = b""
            try:
                values = self._values(epoch, row, weights)
            except (FinetuneError, IndexError) as error:
                found["problem"] = one_line(str(error), 600)
            except Exception as error:
                logger.warning("the changes of a rollout could not be computed", exc_info=True)
                found["problem"] = one_line(error_text(error), 600)
            self._tell(found, [values])

    def _values(self, epoch: Epoch, row: int, weights: int | None) -> bytes:
        """(T,) float32, one for each sampled token of the rollout."""
        run = self._source.run
        changes = getattr(run, "token_changes", None)
        if changes is None:
            where = "..." if self._source.folder is None else repr(str(self._source.folder))
            raise RunError(
                f"no variable holds the run any more, and its model went with it. Keep it: run = ft.Run.open({where}), then "
                "run.browse()."
            )
        record = None if weights is None else self._source.epoch(weights)
        for known, known_row, known_record, values in list(self._kept):
            if known is epoch and known_row == row and record is not None and known_record is record:
                return values
        rollout = self._source.rows.rollout(epoch, row, whole=True)
        if not isinstance(rollout, Trajectory):
            raise RunError("this rollout failed, so that there is nothing to compute.")
        values = np.array([value for turn in changes(rollout, weights) for value in turn], "<f4").tobytes()
        self._kept = [(epoch, row, record, values), *self._kept][:KEPT_CHANGES]
        return values


class Browser(traitlets.HasTraits):
    """Reads the rollouts of a run in a cell. Its traits follow what is shown, and set it.

    `browser.epoch = 3`, `browser.open("e3/q17/2")` and the like move every view of it; `browser.observe(call, "example")`
    calls you when a person opens another example.
    """

    epoch: int | None = traitlets.Int(None, allow_none=True)  # type: ignore[assignment]
    """The epoch that is shown; None before the first one has ended."""
    example: Any = traitlets.Any(None)
    """The id of the example that is shown; None: the first one of the list."""
    generation: Any = traitlets.Any(None)
    """The rollout of the example that is shown: its generation, or "#2" for the third one where none was recorded. None: the
    first one that the filter lets through."""
    filter: dict[str, Any] = traitlets.Dict()  # type: ignore[assignment]
    """Which rollouts are listed: `analysis.browse_index.BrowseFilter` by field, such as {"failed": True}; {}: all."""
    sort: str = traitlets.Unicode("spread")  # type: ignore[assignment]
    """By what the examples are sorted: a key of `analysis.browse_index.SORTS`."""

    def __init__(
        self, run: BrowsedRun, epoch: int | None = None, example: Any = None, filter: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._source = Source(run)
        self._name = run.id
        self._searches = 0
        self._heard = threading.local()  # whether this thread is doing what the page said
        self._widget: Mounted | None = None
        self._changes = _Changes(self._source, self._tell)
        self.closed = False
        records = self._source.shown(refresh=True)
        if epoch is None and records:
            ended = [record for record in records if self._source.version(record) is None]
            epoch = (ended or records)[-1].index
        self.filter = dict(filter or {})
        self.epoch = epoch
        self.example = example
        if has_frontend():
            from .mounted import Mounted

            self._widget = Mounted(self._answer)
        self.observe(self._tell_where, ["epoch", "example", "generation", "filter", "sort"])

    # ── from Python ──────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, name: str) -> None:
        """Show a rollout, a group or an epoch. A filter that would hide it is taken off.

        Args:
            name: Its name, as the column `trajectory` of `run.trajectories()` has it: "e3/q17/2"; "e3/q17" is a group, "e3" an
                epoch.

        Raises:
            RunError: It is not such a name, or nothing of the epoch has it.
            IndexError: There is no such epoch.
        """
        (found,) = find_names([name], self._source.epoch)
        index = self._source.index(found.epoch)
        example = generation = None
        rollouts = slice(None)
        if found.example is not None:
            group = _group_of(index, found.example)
            example, rollouts = index.examples[group], slice(index.starts[group], index.starts[group + 1])
            if found.generation is not None:
                rollout = _rollout_of(index, group, found.generation)
                generation, rollouts = index.generation_of(rollout), slice(rollout, rollout + 1)
        if not self._source.matching(found.epoch, BrowseFilter.of(self.filter))[rollouts].any():
            self.filter = {}
        with self.hold_trait_notifications():
            self.epoch = found.epoch
            self.example = example
            self.generation = generation

    @property
    def selection(self) -> pd.DataFrame:
        """What is listed, as `run.trajectories()` has it: the rollouts of the shown epoch that the filter lets through, in the
        order of the list. Empty before the first epoch has ended."""
        from .. import frames

        if self.epoch is None:
            return frames.trajectories([])
        index = self._source.index(self.epoch)
        found = self._source.matching(self.epoch, BrowseFilter.of(self.filter))
        order = self._source.order(self.epoch, found, self.sort)
        starts = index.starts.tolist()
        places = [np.arange(starts[group], starts[group + 1]) for group in order.tolist()]
        places = np.concatenate(places).astype(np.int64) if places else np.empty(0, np.int64)
        frame = frames.trajectories([self._source.epoch(self.epoch)])
        return frame.iloc[index.rows[places[found[places]]]].reset_index(drop=True)

    def close(self) -> None:
        """Takes the view away; the static summary stays."""
        self.closed = True
        if self._widget is not None:
            self._widget.dispose()
            self._widget = None

    @traitlets.validate("epoch")
    def _valid_epoch(self, proposal: Mapping[str, Any]) -> int | None:
        if proposal["value"] is not None:
            self._source.epoch(proposal["value"])
        return proposal["value"]

    @traitlets.validate("example")
    def _valid_example(self, proposal: Mapping[str, Any]) -> Any:
        if proposal["value"] is None or self.epoch is None:
            return None
        index = self._source.index(self.epoch)
        return index.examples[_group_of(index, proposal["value"])]

    @traitlets.validate("filter")
    def _valid_filter(self, proposal: Mapping[str, Any]) -> dict[str, Any]:
        wanted = BrowseFilter.of(proposal["value"])
        _query_of(wanted)
        return wanted.as_dict()

    @traitlets.validate("sort")
    def _valid_sort(self, proposal: Mapping[str, Any]) -> str:
        if proposal["value"] not in SORTS:
            raise ConfigError(f"found sort={proposal['value']!r}. {did_you_mean(str(proposal['value']), SORTS)}")
        return proposal["value"]

    # ── shown ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def __repr__(self) -> str:
        return browser_text(self._name, self._source.shown(), self._there())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Text and HTML; where somebody sees widgets, the view is put over the HTML."""
        records, epoch = self._source.shown(), self._there()
        index = None if epoch is None else self._source.index(epoch)
        still = browser_html(self._name, records, index, self._line())
        if self._widget is None:
            return {"text/plain": repr(self), "text/html": str(still)}
        _one_per_cell(self)
        return self._widget.bundle(repr(self), still)

    def _there(self) -> int | None:
        """The epoch that is shown; another one where it is gone, as it was aborted and is run again."""
        records = self._source.shown()
        if self.epoch is None or any(record.index == self.epoch for record in records):
            return self.epoch
        return records[-1].index if records else None

    def _line(self) -> str:
        """The line of Python that opens such a browser again."""
        folder = self._source.folder
        where = f"ft.Run.open({str(folder)!r})" if folder else "run"
        return f"{where}.browse()" if self.epoch is None else f"{where}.browse(epoch={self.epoch})"

    # ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tell_where(self, change: Mapping[str, Any]) -> None:
        """Python has set a trait: the page follows."""
        if self._widget is not None and not getattr(self._heard, "now", False):
            event = "filter" if change["name"] in ("filter", "sort") else "at"
            self._widget.tell({"event": event, **self._where()})

    def _where(self) -> dict[str, Any]:
        """Where the browser stands, in plain values."""
        group = rollout = None
        epoch = self._there()
        if epoch is not None and epoch == self.epoch and self.example is not None:
            index = self._source.index(epoch)
            group = index.group_of_example(self.example)
            if group is not None and self.generation is not None:
                rollout = _rollout_or_none(index, group, self.generation)
        return {"epoch": epoch, "group": group, "rollout": rollout, "filter": self.filter, "sort": self.sort}

    def _tell(self, content: Mapping[str, Any], buffers: Sequence[bytes] = ()) -> None:
        """Tells the page something that it is to hear later than an answer."""
        widget = self._widget
        if widget is None:
            return
        try:
            widget.tell(content, buffers)
        except Exception:  # the channel may have been closed meanwhile
            if not self.closed:
                logger.warning("the trajectory browser could not send what was asked for", exc_info=True)

    @contextmanager
    def _as_heard(self) -> Iterator[None]:
        self._heard.now = True
        try:
            yield
        finally:
            self._heard.now = False

    def _answer(self, asked: Mapping[str, Any]) -> None:
        """Answers one message of the page, which comes from a browser and may say anything."""
        widget, number = self._widget, asked.get("id")
        if widget is None:
            return
        op = asked.get("op")
        answer = _ANSWERS.get(op) if isinstance(op, str) else None
        buffers: Sequence[bytes] = ()
        if answer is None:
            found: dict[str, Any] = {"problem": f"the kernel does not know {short(op, 40)!r}"}
        else:
            try:
                found, buffers = answer(self, asked)
            except FinetuneError as error:
                found = {"problem": one_line(str(error))}
            except Exception as error:
                logger.warning("the trajectory browser could not answer", exc_info=True)
                found = {"problem": one_line(error_text(error))}
        try:
            widget.tell({"id": number, **found}, buffers)
        except Exception:  # the channel may have been closed meanwhile
            if not self.closed:
                logger.warning("the trajectory browser could not send its answer", exc_info=True)

    def _hello(self, asked: Mapping[str, Any]) -> _Answer:
        return {
            "run": short(self._name, 80),
            "line": self._line(),
            "signals": words_of_signals(),
            "sorts": SORTS,
            **self._where(),
            **self._epochs(),
        }, ()

    def _epochs(self) -> dict[str, Any]:
        """The epochs in short, and a text that changes when they do."""
        run, records = self._source.run, self._source.shown(refresh=True)
        epochs = []
        for record in records:
            metrics, version = record.metrics, self._source.version(record)
            mean = metrics.mean_reward if np.isfinite(metrics.mean_reward) else None
            epochs.append([record.index, mean, metrics.trajectories, metrics.failures, version, record.started_at])
        state = "" if run is None else getattr(run, "state", "")
        last = f"{records[-1].index} {records[-1].started_at} {epochs[-1][4]}" if records else ""
        return {
            "stamp": f"{len(records)} {last} {state}",
            "epochs": epochs,
            "state": short(state, 80),
            "unfinished": "running" if state in ACTIVE else "not finished",
        }

    def _news(self, asked: Mapping[str, Any]) -> _Answer:
        found = self._epochs()
        news: dict[str, Any] = {} if found["stamp"] == asked.get("stamp") else found
        folder, epoch = self._source.folder, asked.get("epoch")
        if folder is not None and isinstance(epoch, int) and changed_since(folder, _whole(asked, "change")).labels:
            news |= self._labels_of(epoch)
        return news, ()

    def _index(self, asked: Mapping[str, Any]) -> _Answer:
        index = self._source.index(_whole(asked, "epoch"))
        record = self._source.epoch(index.epoch)
        about = {
            "epoch": index.epoch,
            "inferred": record.selection.inferred,
            "version": self._source.version(record),
            "started": record.started_at,
        }
        return about, packed(index, [text_of(example) for example in index.examples])

    def _view(self, asked: Mapping[str, Any]) -> _Answer:
        """Which groups are listed in which order, and which rollouts."""
        epoch, sort = _whole(asked, "epoch"), asked.get("sort", "recorded")
        wanted = BrowseFilter.of(asked.get("filter"))
        found = self._source.matching(epoch, wanted)
        order = self._source.order(epoch, found, sort)
        with self._as_heard():
            self.filter = wanted.as_dict()
            self.sort = sort
        version = self._source.version(self._source.epoch(epoch))
        about = {"rollouts": int(found.sum()), "version": version}
        first = self._source.leading(epoch, found, sort)[order]
        return about, [order.tobytes(), found.astype(np.uint8).tobytes(), first.tobytes()]

    def _asked(self, asked: Mapping[str, Any]) -> tuple[Epoch, BrowseIndex, int]:
        """The rollout that a message speaks of, by its place in the index or its row in the file. Of an unfinished epoch by its
        name, if that epoch has gained others since the page saw it."""
        epoch = self._source.epoch(_whole(asked, "epoch"))
        index = self._source.index(epoch.index)
        version = asked.get("version")
        if version is not None and version != self._source.version(epoch):
            group = index.group_of_example(asked.get("example"))
            found = None if group is None else _rollout_or_none(index, group, asked.get("generation"))
            if found is None:
                raise RunError(f"epoch {epoch.index} was run again: this rollout is not in it any more.")
            return epoch, index, found
        if "rollout" in asked:
            return epoch, index, _rollout(asked, index)
        places = np.flatnonzero(index.rows == _whole(asked, "row"))
        if not len(places):
            raise IndexError(f"found row {asked['row']}; epoch {epoch.index} has rows 0 to {len(index) - 1}")
        return epoch, index, int(places[0])

    def _body(self, asked: Mapping[str, Any]) -> _Answer:
        epoch, index, place = self._asked(asked)
        body = rollout_body(self._source.rows.rollout(epoch, int(index.rows[place])))
        return body.about, body.columns

    def _raw(self, asked: Mapping[str, Any]) -> _Answer:
        epoch, index, place = self._asked(asked)
        return {"text": rollout_json(self._source.rows.rollout(epoch, int(index.rows[place]), whole=True))}, ()

    def _python(self, asked: Mapping[str, Any]) -> _Answer:
        """The line of Python that shows a rollout."""
        _, index, place = self._asked(asked)
        return {"text": f"run.show({index.name_of(place)!r})"}, ()

    def _weights(self, asked: Mapping[str, Any]) -> _Answer:
        """The epochs whose weights are available."""
        run = self._source.run
        kept = getattr(run, "kept_weights", None)
        return {"epochs": [] if kept is None else kept()}, ()

    def _change(self, asked: Mapping[str, Any]) -> _Answer:
        """What the tokens of a rollout have changed by under the weights of an epoch. That takes longer than an answer may: a
        message with the id of this one follows."""
        epoch, index, place = self._asked(asked)
        weights = None if asked.get("weights") is None else _whole(asked, "weights")
        self._changes.ask(asked.get("id"), epoch, int(index.rows[place]), weights)
        return {}, ()

    def _history(self, asked: Mapping[str, Any]) -> _Answer:
        """The mean rewards of some groups' examples over the epochs."""
        index = self._source.index(_whole(asked, "epoch"))
        groups = [group for group in asked.get("groups", ())[:HISTORY] if group in range(len(index.examples))]
        means = self._source.history(index.epoch)[:, groups]
        known = [[None if np.isnan(mean) else round(float(mean), 4) for mean in column] for column in means.T]
        return {"groups": groups, "means": known}, ()

    def _labels(self, asked: Mapping[str, Any]) -> _Answer:
        return self._labels_of(_whole(asked, "epoch")), ()

    def _labels_of(self, epoch: int) -> dict[str, Any]:
        """The labels of an epoch as plain values, and all tags of the run."""
        return self._source.labels_and_tags(epoch)

    def _label(self, asked: Mapping[str, Any]) -> _Answer:
        """A person labels a rollout, its group or its epoch, or takes a label away."""
        folder = self._source.folder
        epoch, index, rollout = self._asked(asked)
        if folder is None:
            raise RunError("this run has no folder, in which labels are kept.")
        if self._source.version(epoch) is not None:
            raise RunError(
                f"epoch {epoch.index} is not complete: if it is run again, its rollouts are others. Label them when it has ended."
            )
        level, tag = asked.get("level"), asked.get("tag")
        name = Labelled(f"e{index.epoch}", index.epoch)
        if level != "epoch":
            example = index.examples[int(index.groups_of[rollout])]
            name = Labelled(f"{name.name}/{text_of(example)}", index.epoch, example)
        if level == "rollout":
            name = Labelled(index.name_of(rollout), index.epoch, name.example, index.generation_of(rollout))
        if asked.get("remove"):
            remove_labels(folder, [name.name], tag, asked.get("author"))
        else:
            put_labels(folder, new_labels([name], tag, asked.get("score"), asked.get("note") or ""))  # type: ignore[arg-type]  # it checks
        return self._labels_of(index.epoch), ()

    def _search(self, asked: Mapping[str, Any]) -> _Answer:
        """Looks for a text in every epoch, the nearest first, and tells the page of each; another search ends it."""
        text, near = asked.get("text"), asked.get("epoch")
        self._searches += 1
        if not isinstance(text, str) or not text or not isinstance(near, int):
            return {}, ()
        records = sorted(self._source.shown(), key=lambda record: abs(record.index - near))
        arguments = (self._searches, query_of(text), [record.index for record in records])
        threading.Thread(target=self._search_epochs, args=arguments, name="ft-search", daemon=True).start()
        return {}, ()

    def _search_epochs(self, number: int, query: Query, epochs: Sequence[int]) -> None:
        """In a thread of its own: bodies are answered meanwhile."""
        for epoch in [*epochs, None]:
            widget = self._widget
            if number != self._searches or widget is None:
                return
            found: dict[str, Any] = {"event": "hits", "text": query.text}
            try:
                if epoch is None:
                    found["done"] = True
                else:
                    found |= {"epoch": epoch, "rollouts": int(rows_with(self._source.epoch(epoch), query).sum())}
                widget.tell(found)
            except Exception:  # a damaged file hides no other epoch
                logger.warning("an epoch could not be searched", exc_info=True)

    def _ready(self, asked: Mapping[str, Any]) -> _Answer:
        return {}, ()

    def _at(self, asked: Mapping[str, Any]) -> _Answer:
        """A person has opened a rollout."""
        _, index, rollout = self._asked(asked)
        group = int(index.groups_of[rollout])
        with self._as_heard(), self.hold_trait_notifications():
            self.epoch = index.epoch
            self.example = index.examples[group]
            self.generation = index.generation_of(rollout)
        return {}, ()


_Answer = tuple[dict[str, Any], Sequence[bytes]]
_ANSWERS: dict[str, Callable[[Browser, Mapping[str, Any]], _Answer]] = {
    "ready": Browser._ready,
    "hello": Browser._hello,
    "news": Browser._news,
    "index": Browser._index,
    "view": Browser._view,
    "body": Browser._body,
    "weights": Browser._weights,
    "change": Browser._change,
    "raw": Browser._raw,
    "python": Browser._python,
    "history": Browser._history,
    "labels": Browser._labels,
    "label": Browser._label,
    "search": Browser._search,
    "at": Browser._at,
}
"""What a page may ask."""


def _whole(asked: Mapping[str, Any], name: str) -> int:
    value = asked.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"found {name}={short(value, 40)!r} in a message of the page; expected a whole number.")
    return value


def _rollout(asked: Mapping[str, Any], index: BrowseIndex) -> int:
    value = _whole(asked, "rollout")
    if not 0 <= value < len(index):
        raise IndexError(f"found rollout {value}; epoch {index.epoch} has rollouts 0 to {len(index) - 1}")
    return value


# ── names of rollouts ────────────────────────────────────────────────────────────────────────────────────────────────


def _group_of(index: BrowseIndex, example: Any) -> int:
    group = index.group_of_example(example)
    if group is None:
        known = [text_of(each) for each in index.examples]
        some = ", ".join(short(each, 40) for each in known[:5])
        near = did_you_mean(text_of(example), known).partition("Known:")[0]
        raise RunError(f"found example {short(example, 80)!r}; epoch {index.epoch} has {some}, ... {near}".rstrip())
    return group


def _rollout_or_none(index: BrowseIndex, group: int, generation: Any) -> int | None:
    places = range(int(index.starts[group]), int(index.starts[group + 1]))
    return next((place for place in places if same_id(index.generation_of(place), generation)), None)


def _rollout_of(index: BrowseIndex, group: int, generation: Any) -> int:
    places = range(int(index.starts[group]), int(index.starts[group + 1]))
    if generation is None and len(places):
        return places[0]
    found = _rollout_or_none(index, group, generation)
    if found is None:
        known = ", ".join(text_of(index.generation_of(place)) for place in places[:12])
        raise RunError(
            f"found generation {generation!r}; example {short(index.examples[group], 80)} has {known} in epoch {index.epoch}."
        )
    return found


# ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_shown: dict[str, tuple[str, list[weakref.ref[Browser]]]] = {}
"""By a cell's id: its last execution, and the browsers that this shows."""


def _one_per_cell(browser: Browser) -> None:
    """Closes the browser that this cell showed before: run again, a cell makes a new one, and the old one would live on unseen
    in kernel and page."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    try:
        parent = kernel.get_parent("shell")  # type: ignore[union-attr]
        cell, execution = parent["metadata"]["cellId"], parent["header"]["msg_id"]
    except (AttributeError, KeyError, TypeError):  # a front end that does not say which cell it is
        return
    before, browsers = _shown.get(cell, (execution, []))
    if before != execution:
        for each in browsers:
            found = each()
            if found is not None and found is not browser:
                found.close()
        browsers = []
    _shown[cell] = (execution, [*browsers, weakref.ref(browser)])
