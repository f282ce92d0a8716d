"""Labels rollouts, groups and epochs of a run by their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, RunError
from ..store.labels import new_labels, put_labels
from ..text import short
from ..types import Epoch

__all__ = [
    "label_names",
    "names_in",
]


def label_names(run: Any, name: Any, tag: str, score: float | None, note: str, author: str | None) -> None:
    """Label what the names mean, all or none. run: a RunHistory; the other arguments are those of its `label`."""
    from ..frames.names import find_names

    records = {epoch.index: epoch for epoch in run.records}

    def epoch_of(number: int) -> Epoch:
        if number in records:
            return records[number]
        if not records:
            raise RunError(
                f"run {run.id!r} has no epoch yet, so there is nothing to label. Run one, then label its rollouts."
            )
        left = run.partial
        if left is not None and left.index == number:
            raise RunError(
                f"epoch {number} is not complete: if it is run again, its rollouts are others. Label them then."
            )
        raise RunError(
            f"found epoch {number} in a name; run {run.id!r} has epochs {min(records)} to {max(records)}. If another process "
            "writes it, run.refresh() shows what it has added."
        )

    names = names_in(name)
    new_labels((), tag, score, note, author)  # says what is wrong with them before any name is looked up
    labels = new_labels(find_names(names, epoch_of), tag, score, note, author)
    if labels:
        put_labels(run.folder, labels)


def names_in(name: Any) -> list[str]:
    """The names that were given.

    Args:
        name: One, several, or a frame with the column `trajectory` or `name`.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(name, str):
        return [name]
    columns = getattr(name, "columns", None)
    if columns is not None:
        column = next((each for each in ("trajectory", "name") if each in columns), None)
        if column is None:
            raise ConfigError(
                f"the frame has the columns {short(', '.join(map(str, columns)), 200)}; expected `trajectory` or `name`."
            )
        name = name[column].tolist()
    if not isinstance(name, Iterable):
        raise ConfigError(
            f"found {short(repr(name), 80)}; expected a name such as 'e3/q17/2', several, or a frame of rollouts."
        )
    return list(dict.fromkeys(str(each) for each in name))
