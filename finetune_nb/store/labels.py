"""Labels of rollouts, groups and epochs: a tag, a score and a note, with author and time, in a run's `run.db`.

Everything here needs a run's folder and nothing else, and works while another process writes the run: any number of processes
may label one folder at the same time, and each sees the labels of all.
"""

from __future__ import annotations

import getpass
import math
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..redaction import redacting_logger
from ..text import plain, short
from .database import LABELS_SINCE, change_beside, read, readable
from .folder import DATABASE
from .json import decode, encode
from .reader import as_store_error

__all__ = [
    "Label",
    "LabelChanges",
    "Labelled",
    "changed_since",
    "mean_scores",
    "new_labels",
    "put_labels",
    "read_labels",
    "remove_labels",
    "remove_labels_after",
    "scores_by_tag",
]

logger = redacting_logger(__name__)

LONGEST_TAG, LONGEST_NOTE = 100, 20_000
"""Characters."""
_warned: set[str] = set()


class Labelled(NamedTuple):
    """What a label is of, once its name was found in the record."""

    name: str
    """ "e3/q17/2", "e3/q17" or "e3"."""
    epoch: int
    example: Any = None
    """The example's id; None for an epoch."""
    generation: Any = None
    """Which rollout; None for a group or an epoch."""


@dataclass(frozen=True)
class Label:
    """What somebody says of a rollout, a group or an epoch. `name`, `tag` and `author` identify it."""

    name: str
    epoch: int
    example: Any
    """None for an epoch."""
    generation: int | str | None
    """None for a group or an epoch; "#2": the place of a rollout whose generation was not recorded."""
    tag: str
    score: float | None
    note: str
    author: str
    time: float
    """Seconds since 1970, UTC."""
    removed: bool = False
    """Whether it was taken away; only `changed_since` returns such labels."""

    @property
    def level(self) -> str:
        """ "rollout", "group" or "epoch"."""
        if self.generation is not None:
            return "rollout"
        return "epoch" if self.example is None else "group"


class LabelChanges(NamedTuple):
    """What has happened to the labels of a folder."""

    change: int
    """Grows with every change; 0 if there never was a label."""
    labels: list[Label]
    """Those that were set or removed since, in the order in which that happened."""


def read_labels(folder: Path, epochs: Iterable[int] | None = None) -> list[Label]:
    """Read the labels of a run.

    Args:
        folder: The run's folder. There may be none yet.
        epochs: Only labels of these epochs, their groups and rollouts. Default: all.

    Returns:
        The labels, oldest first.

    Raises:
        StoreError: `run.db` cannot be read.
    """
    wanted = None if epochs is None else set(epochs)
    labels = [label for label in changed_since(folder, 0).labels if not label.removed]
    return labels if wanted is None else [label for label in labels if label.epoch in wanted]


def scores_by_tag(labels: Iterable[Label], level: str = "rollout") -> dict[str, dict[str, float | None]]:
    """The tags of each labelled rollout by its name, in order of time, with the mean of a tag's scores; None for a tag without
    one. level: "group" or "epoch": those of groups or epochs instead."""
    return mean_scores((label.name, label.tag, label.score) for label in labels if label.level == level)


def mean_scores(labels: Iterable[tuple[str, str, float | None]]) -> dict[str, dict[str, float | None]]:
    """The same of the name, the tag and the score of each label; None or NaN for one without a score."""
    scores: dict[str, dict[str, list[float]]] = {}
    for name, tag, score in labels:
        of_tag = scores.setdefault(name, {}).setdefault(tag, [])
        if score is not None and not math.isnan(score):
            of_tag.append(float(score))
    found: dict[str, dict[str, float | None]] = {}
    for name, by_tag in scores.items():
        found[name] = {tag: math.fsum(each) / len(each) if each else None for tag, each in by_tag.items()}
    return found


def changed_since(folder: Path, change: int) -> LabelChanges:
    """Read what has happened to the labels of a run since an earlier look. Where nothing has, this takes about a millisecond,
    so it can be asked every second.

        known = changed_since(folder, 0)
        news = changed_since(folder, known.change)

    Args:
        folder: The run's folder. There may be none yet.
        change: `change` of the earlier answer; 0 for everything.

    Returns:
        The new `change`, and the labels that were set, changed or (`removed`) taken away since.

    Raises:
        StoreError: `run.db` cannot be read.
    """
    if not (folder / DATABASE).exists():
        return LabelChanges(0, [])

    def work(db: sqlite3.Connection) -> LabelChanges:
        if db.execute("PRAGMA user_version").fetchone()[0] < LABELS_SINCE:
            return LabelChanges(0, [])
        rows = db.execute("SELECT * FROM labels WHERE change > ? ORDER BY change, rowid", (change,)).fetchall()
        newest = db.execute("SELECT max(change) FROM labels").fetchone()[0]
        found = [label for row in rows if (label := _label_from_row(folder, row)) is not None]
        return LabelChanges(newest if isinstance(newest, int) else 0, found)

    with as_store_error(folder / DATABASE, "Nothing was changed."):
        return read(folder, work)


def new_labels(
    labelled: Iterable[Labelled], tag: str, score: float | None = None, note: str = "", author: str | None = None
) -> list[Label]:
    """Make labels of now, after checking what they say.

    Args:
        labelled: What to label.
        tag: A word or two in one line, at most 100 characters.
        score: Any finite number. None or NaN: no score.
        note: A text.
        author: Who says so. Default: the name of the user of this system.

    Returns:
        One label for each, not stored yet.

    Raises:
        ConfigError: One of them does not fit.
    """
    tag, author = _checked_word("tag", tag), _checked_word("author", _user() if author is None else author)
    if not isinstance(note, str) or len(note) > LONGEST_NOTE:
        found = f"{len(note):,} characters" if isinstance(note, str) else type(note).__name__
        raise ConfigError(f"the note of a label is {found}; expected a text of at most {LONGEST_NOTE:,} characters.")
    note = plain(readable(note))
    value = _checked_score(score)
    now = time.time()
    return [
        Label(plain(one.name), one.epoch, one.example, one.generation, tag, value, note, author, now)
        for one in labelled
    ]


def put_labels(folder: Path, labels: Sequence[Label]) -> int:
    """Store labels, all or none. One of the same name, tag and author is replaced.

    Args:
        folder: The run's folder.
        labels: As `new_labels` makes them.

    Returns:
        The new `change`, as in `changed_since`.

    Raises:
        StoreError: They cannot be written; nothing was changed.
    """

    def work(db: sqlite3.Connection) -> int:
        change = _next_change(db)
        rows = []
        for label in labels:
            example = None if label.example is None else encode(label.example)
            generation = None if label.generation is None else plain(label.generation)
            values = (label.name, label.tag, label.author, label.epoch, example, generation)
            rows.append((*values, label.score, label.note, label.time, 0, change))
        db.executemany(
            "INSERT OR REPLACE INTO labels (name, tag, author, epoch, example, generation, score, note, time, removed, "
            "change) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        return change

    return _change(folder, work)


def remove_labels(folder: Path, names: Iterable[str], tag: str | None = None, author: str | None = None) -> int:
    """Take labels away, all or none.

    Args:
        folder: The run's folder.
        names: Of the rollouts, groups and epochs.
        tag: Only labels with this tag. Default: every tag.
        author: Only labels by this author. Default: by whomever.

    Returns:
        How many were there.

    Raises:
        StoreError: They cannot be written; nothing was changed.
    """
    condition, values = "name = ? AND removed = 0", []
    for column, value in (("tag", tag), ("author", author)):
        if value is not None:
            condition += f" AND {column} = ?"
            values.append(_checked_word(column, value))

    def work(db: sqlite3.Connection) -> int:
        change, now, count = _next_change(db), time.time(), 0
        for name in names:
            query = f"UPDATE labels SET removed = 1, time = ?, change = ? WHERE {condition}"
            count += db.execute(query, (now, change, plain(name), *values)).rowcount
        return count

    return _change(folder, work)


def remove_labels_after(db: sqlite3.Connection, epoch: int) -> None:
    """Take away the labels of every later epoch. Call it inside a transaction of the run's writer."""
    db.execute(
        "UPDATE labels SET removed = 1, time = ?, change = ? WHERE epoch > ? AND removed = 0",
        (time.time(), _next_change(db), epoch),
    )


def _next_change(db: sqlite3.Connection) -> int:
    newest = db.execute("SELECT max(change) FROM labels").fetchone()[0]
    return (newest if isinstance(newest, int) else 0) + 1


def _change(folder: Path, work: Any) -> int:
    kept = "No label was changed. Where the folder cannot be written, label a copy of it; else call again."
    with as_store_error(folder / DATABASE, kept):
        return change_beside(folder, work)


def _label_from_row(folder: Path, row: sqlite3.Row) -> Label | None:
    """A row as a label; None, with a warning that is given once, where it is none: one bad row hides no other."""
    try:
        texts = [row[name] for name in ("name", "tag", "note", "author")]
        generation, score = row["generation"], row["score"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(generation, str | None):
            raise ValueError("a text is none")
        if not isinstance(row["epoch"], int) or not isinstance(row["time"], float):
            raise ValueError("a number is none")
        if score is not None and not (isinstance(score, float) and math.isfinite(score)):
            raise ValueError("its score is no number")
        return Label(
            name=row["name"],
            epoch=row["epoch"],
            example=None if row["example"] is None else decode(row["example"]),
            generation=int(generation) if generation is not None and generation.isdecimal() else generation,
            tag=row["tag"],
            score=score,
            note=row["note"],
            author=row["author"],
            time=row["time"],
            removed=bool(row["removed"]),
        )
    except (ValueError, TypeError) as error:
        told = f"{folder / DATABASE}: a label cannot be read: {error}."
        if told not in _warned:
            _warned.add(told)
            logger.warning("%s Every other label is shown.", told)
        return None


def _checked_word(what: str, value: Any) -> str:
    """A tag or an author. Raises ConfigError."""
    text = plain(readable(value)).strip() if isinstance(value, str) else ""
    if not text or len(text) > LONGEST_TAG or "\n" in text or "\t" in text:
        raise ConfigError(
            f"the {what} of a label is {short(repr(value), 80)}; expected one line of 1 to {LONGEST_TAG} characters, such as "
            f"{'hacked' if what == 'tag' else 'ann'!r}."
        )
    return text


def _checked_score(score: Any) -> float | None:
    """Raises ConfigError."""
    try:
        value = None if score is None else float(score)
    except (TypeError, ValueError, OverflowError):
        value = math.inf
    if value is None or math.isnan(value):
        return None
    if math.isinf(value) or isinstance(score, str):
        raise ConfigError(f"the score of a label is {short(repr(score), 80)}; expected a finite number, or None.")
    return value


def _user() -> str:
    """The user's name on this system, as far as it is known."""
    try:
        return plain(getpass.getuser()).strip()[:LONGEST_TAG] or "unknown"
    except Exception:  # there is none in some containers, and each Python raises something else
        return "unknown"
