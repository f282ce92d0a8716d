"""Searches the text of rollouts, an epoch at a time, the newest first.

No index is kept: the columns with the texts are read from each epoch's file and matched by Arrow, which takes no lock of
Python's while it does so. A regular expression is RE2's, whose time grows with the text alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..analysis.trajectory_names import trajectory_names
from ..errors import ConfigError, StoreError
from ..hooks import shown_by
from ..redaction import redacting_logger
from ..store.json import decode
from ..store.labels import Label
from ..text import short
from ..types import Epoch, MessageKey
from .columns import Column, columns_of, framed
from .conditions import condition_of
from .trajectories import EpochColumns, positions, trajectories

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "EpochHits",
    "Hit",
    "Query",
    "Search",
    "query_of",
    "rows_with",
    "search",
]

logger = redacting_logger(__name__)

AROUND = 60
"""Characters shown before and after a hit."""
LONGEST_HIT = 500
"""Characters of a hit that are shown."""
MOST_HITS = 10_000
"""Hits of which the text is kept, where nobody asks for more or fewer; the others are counted."""

COLUMNS = (
    Column("trajectory", "str"),
    Column("epoch", "int64"),
    Column("example", "object"),
    Column("generation", "Int64"),
    Column("reward", "float64"),
    Column("turn", "Int64"),
    Column("role", "category"),
    Column("hits", "int64"),
    Column("before", "str"),
    Column("hit", "str"),
    Column("after", "str"),
)
"""Columns of `Search.frame`."""


class Hit(NamedTuple):
    """A message with what was searched for; of a search by `where` alone, a rollout."""

    trajectory: str
    epoch: int
    example: Any
    generation: Any
    reward: float
    turn: int | None
    """Index of the message, from 0; None for the error of a rollout."""
    role: str
    """Of the message; "tool call" for the name and arguments of one, "thinking" for what the model thought, "error" for why a
    rollout or its reward failed."""
    hits: int
    """How often the message has it."""
    before: str
    """The text before the first hit, at most 60 characters."""
    hit: str
    after: str


class EpochHits(NamedTuple):
    """What was found in one epoch."""

    epoch: int
    searched: int
    """Rollouts, failed ones included."""
    rollouts: int
    """How many of them have a hit."""
    hits: list[Hit]
    """In the order of the rollouts, and of their messages."""
    left_out: int
    """Messages with a hit that are not in `hits`, as there were enough."""
    error: str | None = None
    """Why the epoch could not be searched."""


@dataclass(frozen=True)
class Query:
    """What is searched for."""

    text: str | None = None
    regex: str | None = None
    where: Callable[[pd.DataFrame], Any] | None = None
    """Which rollouts, by the frame of one epoch."""
    columns: tuple[str, ...] | None = None
    """Columns of `trajectories` that `where` looks at. None: all."""
    shown: str = ""
    """The search in words."""

    @property
    def pattern(self) -> str | None:
        """The regular expression, None without a text."""
        return re.escape(self.text) if self.text is not None else self.regex


def query_of(text: str | None = None, regex: str | None = None, where: Any = None) -> Query:
    """Check what is searched for.

    Args:
        text: As in `Run.find`.
        regex: As in `Run.find`.
        where: As in `Run.find`.

    Raises:
        ConfigError: Nothing is searched for, or it does not fit.
    """
    import pyarrow as pa

    if text is None and regex is None and where is None:
        raise ConfigError("nothing to search for: give text=, regex= or where=.")
    if text is not None and regex is not None:
        raise ConfigError("text= and regex= do not go together: write the text as a part of the regular expression.")
    for name, value in (("text", text), ("regex", regex)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {short(repr(value), 80)}; expected a text of at least one character.")
        if value is not None and value != value.encode("utf-8", "replace").decode():
            raise ConfigError(f"{name} is {short(repr(value), 80)}, which is no text: it has lone surrogates.")
    said = []
    if text is not None:
        said.append(f"text “{short(text, 80)}”")
    if regex is not None:
        try:
            _compute().match_substring_regex(pa.array([""]), pattern=regex, ignore_case=True)
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f"{short(repr(regex), 80)} is no regular expression: {short(error, 200)}. Expected RE2's syntax, which has "
                "neither look-around nor back references."
            ) from error
        said.append(f"regular expression “{short(regex, 80)}”")
    condition, columns = (None, None) if where is None else condition_of(where)
    if where is not None:
        said.append(short(where, 120) if isinstance(where, str) else "a condition")
    return Query(text, regex, condition, columns, " and ".join(said))


def search(
    epochs: Sequence[Epoch],
    query: Query,
    labels: Iterable[Label] = (),
    stopped: Callable[[], bool] = lambda: False,
    most: int = MOST_HITS,
) -> Iterator[EpochHits]:
    """Search epochs one by one, the newest first.

    Args:
        epochs: The records, in order.
        query: What to search for.
        labels: Labels that `where` can ask for.
        stopped: Asked before each epoch; True ends the search.
        most: Hits of which the text is kept, in all epochs together; the others are counted.

    Yields:
        What was found in each epoch, as soon as it is known. Memory holds one epoch's texts at a time. An epoch whose file is
        missing or damaged has an `error`.
    """
    labels = list(labels)
    for epoch in reversed(epochs):
        if stopped():
            return
        try:
            found = _search_epoch(epoch, query, labels, most)
        except StoreError as error:
            logger.warning("epoch %d is not searched: %s", epoch.index, error)
            found = EpochHits(epoch.index, 0, 0, [], 0, str(error))
        most -= len(found.hits)
        yield found


class Search:
    """A search of a run's rollouts; displays itself in a cell.

    Iterating gives an `EpochHits` for each epoch, the newest first, as soon as it is known. What was searched is kept, so
    that it is searched once.
    """

    def __init__(
        self, query: Query, epochs: Sequence[Epoch], labels: Sequence[Label] = (), most: int = MOST_HITS
    ) -> None:
        self.query = query
        self.epochs = len(epochs)
        """How many epochs are searched in all."""
        self.known: list[EpochHits] = []
        """What was found so far."""
        self._stopped = False
        self._parts = search(epochs, query, labels, lambda: self._stopped, most)

    def stop(self) -> None:
        """End the search before the next epoch; what was found stays."""
        self._stopped = True

    @property
    def complete(self) -> bool:
        """Whether every epoch was searched."""
        return len(self.known) == self.epochs

    @property
    def left_out(self) -> int:
        """Hits so far that are counted alone, as there were more than the limit."""
        return sum(part.left_out for part in self.known)

    def __iter__(self) -> Iterator[EpochHits]:
        place = 0
        while True:
            if place == len(self.known):
                part = next(self._parts, None)
                if part is None:
                    return
                self.known.append(part)
            yield self.known[place]
            place += 1

    @property
    def frame(self) -> pd.DataFrame:
        """One row = one message with a hit, of all epochs, the newest first; of a search by `where` alone, one row = one
        rollout. If there are more than the limit, `left_out` says how many are not in it.

        Columns: trajectory, epoch, example, generation, reward, turn, role, hits (how often the message has it), and the text
        before the first hit, the hit, and the text after it.
        """
        hits = [hit for part in self for hit in part.hits]
        found: dict[str, Any] = {}
        for column in COLUMNS:
            found |= columns_of(column, [getattr(hit, column.name) for hit in hits])
        return framed(found, None)

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.search:search_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.search:search_html", self)


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


_ROLES = (None, "tool call", "thinking", "error")
"""What the texts are that are searched: messages, which have a role of their own, and others."""


class _Matches(NamedTuple):
    """The texts of an epoch that match, K of them, in the order of the rollouts and of their messages."""

    rows: np.ndarray
    """(K) which rollout."""
    turns: np.ndarray
    """(K) which of its messages; -1 for none."""
    source: np.ndarray
    """(K) where its text lies: index of `texts`."""
    places: np.ndarray
    """(K) and where in there."""
    texts: Sequence[pa.Array]
    """As _ROLES names them."""

    def of(self, those: np.ndarray) -> _Matches:
        """Some of them. those: (K) bool."""
        return _Matches(self.rows[those], self.turns[those], self.source[those], self.places[those], self.texts)


def _search_epoch(epoch: Epoch, query: Query, labels: list[Label], room: int) -> EpochHits:
    """room: how many hits are looked at closely, at most."""
    import numpy as np

    columns = EpochColumns(epoch)
    total = columns.rows + epoch.metrics.failures
    matches = None
    if query.pattern is not None:
        matches = _matches(columns, query, query.pattern)
        if not len(matches.rows):
            return EpochHits(epoch.index, total, 0, [], 0)
    allowed = _allowed(epoch, query, labels, total)
    if matches is None:
        rows = np.flatnonzero(allowed)
        matches = _Matches(rows, np.full(len(rows), -1), np.zeros(len(rows), int), rows, ())
    else:
        matches = matches.of(allowed[matches.rows])
    hits = _hits(epoch, columns, matches.of(np.arange(len(matches.rows)) < room), query.pattern)
    return EpochHits(epoch.index, total, len(np.unique(matches.rows)), hits, len(matches.rows) - len(hits))


def _allowed(epoch: Epoch, query: Query, labels: Iterable[Label], total: int) -> np.ndarray:
    """(total) bool: which rollouts meet the condition; all where there is none."""
    import numpy as np

    if query.where is None:
        return np.ones(total, dtype=bool)
    frame = trajectories([epoch], columns=query.columns, labels=list(labels))
    allowed = np.asarray(query.where(frame), dtype=bool)
    if allowed.shape != (total,):
        raise ConfigError(f"where returned {allowed.shape} values; expected a bool for each of {total:,} rollouts.")
    return allowed


def rows_with(epoch: Epoch, query: Query, labels: Iterable[Label] = ()) -> np.ndarray:
    """Search an epoch for its rollouts alone.

    Args:
        epoch: Its record.
        query: What to search for.
        labels: Labels that its `where` can ask for.

    Returns:
        (R) bool: which rollouts have it, the trajectories in the collection's order, then the failed ones.
    """
    columns = EpochColumns(epoch)
    found = _allowed(epoch, query, labels, columns.rows + epoch.metrics.failures)
    if query.pattern is not None:
        import numpy as np

        has = np.zeros(len(found), dtype=bool)
        has[_matches(columns, query, query.pattern).rows] = True
        found &= has
    return found


def _hits(epoch: Epoch, columns: EpochColumns, matches: _Matches, pattern: str | None) -> list[Hit]:
    """Matches with their names and the text around each."""
    rows = matches.rows.tolist()
    if not rows:
        return []
    generations = columns.generations(columns.values(["generation"])["generation"])
    places = [*positions(columns.sizes).tolist(), *range(len(columns.failures))]
    examples, generations, places = (
        [values[row] for row in rows] for values in (columns.examples, generations, places)
    )
    names = trajectory_names(epoch.index, examples, generations, places)
    rewards = [float(epoch.statistics.rewards[row]) if row < columns.rows else math.nan for row in rows]
    turns = [None if turn < 0 else turn for turn in matches.turns.tolist()]
    roles, around = [""] * len(rows), [(0, "", "", "")] * len(rows)
    if pattern is not None:
        said, _ = _messages(columns.rollouts(["roles"]).column("roles"))
        texts = []
        for index, (source, place) in enumerate(zip(matches.source.tolist(), matches.places.tolist(), strict=True)):
            texts.append(matches.texts[source][place].as_py())
            roles[index] = _ROLES[source] or said[place].as_py()
        around = _around(texts, pattern)
    found = zip(names, examples, generations, rewards, turns, roles, around, strict=True)
    return [
        Hit(name, epoch.index, example, generation, reward, turn, role, *parts)
        for name, example, generation, reward, turn, role, parts in found
    ]


def _matches(columns: EpochColumns, query: Query, pattern: str) -> _Matches:
    """Every text of an epoch that has the pattern: messages, tool calls, thoughts, errors."""
    import numpy as np

    table = columns.rollouts(["contents", "item_metadata", "error"])
    contents, starts = _messages(table.column("contents"))
    metadata, _ = _messages(table.column("item_metadata"))
    errors = table.column("error").combine_chunks()
    calling, calls = _in_metadata(metadata, MessageKey.TOOL_CALLS, _calls, query)
    thinking, thoughts = _in_metadata(metadata, MessageKey.REASONING_CONTENT, _thought, query)

    # Which texts of each source have it, of which message they are, and of which rollout.
    texts = (contents, calls, thoughts, errors)
    hit = [np.flatnonzero(_has(each, pattern)) for each in texts]
    messages = np.concatenate([hit[0], calling[hit[1]], thinking[hit[2]]])
    rows_of_messages = np.searchsorted(starts, messages, side="right") - 1
    rows = np.concatenate([rows_of_messages, hit[3]])
    turns = np.concatenate([messages - starts[rows_of_messages], np.full(len(hit[3]), -1)])
    source = np.repeat(range(len(texts)), [len(each) for each in hit])
    order = np.lexsort((source, np.where(turns < 0, np.iinfo(np.int64).max, turns), rows))
    return _Matches(rows[order], turns[order], source[order], np.concatenate(hit)[order], texts)


def _in_metadata(metadata: pa.Array, key: str, read: Callable[[Any], str], query: Query) -> tuple[np.ndarray, pa.Array]:
    """The messages whose metadata, which are JSON, have that key, and the text that is read of its value. Of messages that
    cannot have the text that is searched for, some are left out."""
    import numpy as np
    import pyarrow as pa

    compute = _compute()
    likely = compute.match_substring(metadata, f'"{key}"')
    fragment = _plain_fragment(query.text)
    if fragment:
        has_fragment = compute.match_substring_regex(metadata, re.escape(fragment), ignore_case=True)
        likely = compute.and_(likely, has_fragment)
    places = np.flatnonzero(_filled(likely))
    texts = []
    for found in metadata.take(places).to_pylist():
        try:
            text = read(decode(found, dict).get(key))
        except ValueError:  # no JSON: the file is somebody else's
            text = ""
        texts.append(text.encode("utf-8", "backslashreplace").decode())  # JSON can escape a lone surrogate
    return places, pa.array(texts, pa.string())


def _messages(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """A column with a list a rollout -> (M) its entries, and (N + 1) where the entries of each rollout start."""
    import numpy as np

    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return lists.flatten(), starts


def _compute() -> Any:
    """Arrow's functions, most of which it makes when it is imported."""
    import pyarrow.compute

    return pyarrow.compute


def _has(texts: pa.Array, pattern: str) -> np.ndarray:
    """(M) bool: which texts have the pattern; a missing one has not."""
    return _filled(_compute().match_substring_regex(texts, pattern=pattern, ignore_case=True))


def _filled(matches: Any) -> np.ndarray:
    return matches.fill_null(False).to_numpy(zero_copy_only=False)


_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 _.,:;!?\[\]{}*+#%=@$^|~-]+")
"""What JSON may escape, and the parentheses that are put around arguments."""


def _plain_fragment(text: str | None) -> str:
    """The longest part of a text that the JSON of a call has as it is, so that it can be looked for there."""
    return max(_NOT_PLAIN.split(text or ""), key=len)


def _calls(known: Any) -> str:
    """The names and arguments of the calls of a message."""
    lines = []
    for call in known if isinstance(known, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else call
        name, arguments = "", call
        if isinstance(function, dict):
            name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        lines.append(f"{name if isinstance(name, str) else ''}({arguments})")
    return "\n".join(lines)


def _thought(known: Any) -> str:
    return known if isinstance(known, str) else ""


def _around(texts: Sequence[str], pattern: str) -> list[tuple[int, str, str, str]]:
    """How often each text has the pattern, and the text before the first hit, the hit, and the text after it."""
    import pyarrow as pa

    column = pa.array(texts, pa.string())
    times = _compute().count_substring_regex(column, pattern=pattern, ignore_case=True).to_pylist()
    bytes_before = _compute().find_substring_regex(column, pattern=pattern, ignore_case=True).to_pylist()
    # The hit alone: everything before it and after it is replaced by nothing.
    whole = rf"^(?s:.*?)((?:{pattern}))(?s:.*)$"
    hits = _compute().replace_substring_regex(column, pattern=rf"(?i){whole}", replacement=r"\1").to_pylist()
    found = []
    for text, count, start, hit in zip(texts, times, bytes_before, hits, strict=True):
        begin = len(text.encode()[: max(start, 0)].decode("utf-8", "ignore"))
        if not text.startswith(hit, begin):
            hit = ""  # an expression whose anchors mean something else inside of another one
        end = begin + len(hit)
        before, after = text[max(0, begin - AROUND) : begin], text[end : end + AROUND]
        found.append((count, before, hit[:LONGEST_HIT], after))
    return found
