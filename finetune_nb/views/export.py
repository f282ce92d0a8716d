"""Writes a run to a file, in the format given by the file's suffix.

    .csv       rows of a frame, for a spreadsheet: a text that a spreadsheet would run as a formula (it begins with = + - @,
               a tab or a line break, and is not a number) is prefixed with ', control characters become visible symbols
    .parquet   rows of a frame, unchanged
    .jsonl     one line per trajectory, with its messages in OpenAI's chat format; or rows of a frame
    .html      a report
    .yaml      the journal of live changes, for `replay=` of another run
    .eval      a log of Inspect AI, with every conversation and its scores

To add a format, add an entry to EXPORTS. The file is written to a temporary name and renamed once it is complete.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ConfigError, StoreError, did_you_mean
from ..redaction import error_text, redact_texts, redacting_logger
from ..store.durable import write_durably
from ..store.json import encode, finite
from ..store.labels import read_labels
from ..text import plain
from ..types import EpisodeItem, Epoch, chat_fields

if TYPE_CHECKING:
    import pandas as pd

    from .html import PagePart

__all__ = [
    "EXPORTS",
    "FRAMES",
    "export",
]

logger = redacting_logger(__name__)

FRAMES = ("trajectories", "messages", "tokens", "groups", "epochs", "journal", "labels")


def export(
    run: Any,
    path: str | Path,
    frame: str | None = None,
    filters: Mapping[str, Any] | None = None,
    browser: Callable[[], PagePart | None] | None = None,
) -> Path:
    """Write a run to a file.

    Args:
        run: The run.
        path: The file. Its suffix selects the format; missing folders are created.
        frame: Which frame to write, one of FRAMES. Default: depends on the format.
        filters: Arguments for that frame.
        browser: Makes the trajectory browser of a report. None: it has none.

    Returns:
        The path.

    Raises:
        ConfigError: The suffix or the frame is unknown, or the format does not take a frame or filters.
        StoreError: The file cannot be written, because the disk is full for example. An older file of that name is then as it
            was.
    """
    path = Path(path)
    write = EXPORTS.get(path.suffix.lower())
    if write is None:
        raise ConfigError(
            f"cannot export to {path.name!r}: the suffix must name a known format. {did_you_mean(path.suffix, EXPORTS)}"
        )
    if write is _html:
        write = partial(_html, browser=browser)
    if frame is not None and frame not in FRAMES:
        raise ConfigError(f"there is no frame {frame!r}. {did_you_mean(frame, FRAMES)}")
    chosen = {name: value for name, value in (filters or {}).items() if value is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda file: write(run, file, frame, chosen))
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error_text(error)}. Expected a folder that can be written, with room for the file. "
            "What had the name before is as it was. Make room, or choose another place, then export again."
        ) from error
    return path


def _csv(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    rows = _rows(run, frame, filters)
    for name in rows.columns:
        if not _is_plain(rows[name]):
            values = rows[name].astype(object)
            rows[name] = [value if value != value else _shielded(plain(value)) for value in values]
    rows.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _shielded(text: str) -> str:
    """Prefix a text with ' if a spreadsheet would run it as a formula. Numbers stay as they are."""
    if text[:1] not in ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠") or not text:
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _parquet(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    _rows(run, frame, filters).to_parquet(file, index=False)


def _jsonl(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    if frame is None and "columns" not in filters:
        lines = _all_conversations(run, filters)
    else:
        rows = _rows(run, frame, filters)
        columns = [rows[name].astype(object).where(rows[name].notna(), None).tolist() for name in rows.columns]
        lines = (dict(zip(rows.columns, row, strict=True)) for row in zip(*columns, strict=True))
    for line in lines:
        file.write(encode(finite(line)).encode("utf-8") + b"\n")


def _all_conversations(run: Any, filters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One epoch at a time: a long run has many conversations."""
    epochs = _with_rollouts(run, filters.get("epoch"))
    return chain.from_iterable(_conversations(run, epoch, filters) for epoch in epochs)


def _with_rollouts(run: Any, epoch: Any) -> list[Epoch]:
    """Those epochs whose rollouts can be read; of the others a warning says so. Raises StoreError where there is none: a
    file whose folder was deleted is gone, and what is still in memory is worth writing."""
    found: list[Epoch] = []
    missing: list[StoreError] = []
    for each in run.chosen(epoch):
        try:
            each.collection  # noqa: B018
        except StoreError as error:
            missing.append(error)
            logger.warning("epoch %d is left out of the export: %s", each.index, error)
        else:
            found.append(each)
    if missing and not found:
        raise missing[0]
    return found


def _conversations(run: Any, epoch: Epoch, filters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An epoch's trajectories and failures: the row of each in the frame, with its messages."""
    from .. import frames

    rows = frames.trajectories([epoch], labels=read_labels(run.folder, [epoch.index]))
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    rollouts = [*chain.from_iterable(epoch.collection.trajectories), *epoch.collection.failures]
    for record, rollout in zip(records, rollouts, strict=True):
        if "example" in filters and not frames.is_example(record["example"], filters["example"]):
            continue
        items = getattr(rollout, "episode", ())
        yield {**record, "messages": [_message(item) for item in items]}


def _message(item: Any) -> dict[str, Any]:
    if not isinstance(item, EpisodeItem):
        return item.model_dump()
    return {"role": str(item.role), "content": item.content, **chat_fields(item.metadata)}


def _html(
    run: Any,
    file: BinaryIO,
    frame: str | None,
    filters: Mapping[str, Any],
    browser: Callable[[], PagePart | None] | None = None,
) -> None:
    from .report import report_html

    if frame is not None or filters:
        raise ConfigError("the HTML report shows the whole run: omit frame, epoch, example and columns.")
    file.write(report_html(run, browser and browser()).encode("utf-8"))


def _yaml(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    from ..engine.live_settings import journal_text

    if frame not in (None, "journal") or filters:
        raise ConfigError("a .yaml file holds the whole journal: omit epoch, example and columns.")
    file.write(journal_text(run.id, run.changes).encode("utf-8"))


def _inspect_log(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    from ..store.inspect_log import write_inspect_log

    if frame is not None or "columns" in filters:
        raise ConfigError("a .eval file holds whole conversations: omit frame and columns.")
    write_inspect_log(file, run.id, _all_conversations(run, filters))


EXPORTS: dict[str, Callable[[Any, BinaryIO, str | None, Mapping[str, Any]], None]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".html": _html,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".eval": _inspect_log,
}
"""The function that writes a run to an open file, by suffix. Called with (run, file, frame, filters)."""


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(run: Any, frame: str | None, filters: Mapping[str, Any]) -> pd.DataFrame:
    """The frame, with known secrets masked, and object columns converted to one plain type each."""
    try:
        rows = getattr(run, frame or "trajectories")(**filters)
    except StoreError:
        there = [epoch.index for epoch in _with_rollouts(run, filters.get("epoch"))]
        rows = getattr(run, frame or "trajectories")(**{**filters, "epoch": there})
    for name in rows.columns:
        column = rows[name]
        kind = str(column.dtype)
        if kind == "object":
            rows[name] = _of_one_type(column.tolist())
        elif kind == "category":
            names = column.cat.categories.tolist()
            masked = redact_texts(names)
            if masked != names:
                rows[name] = column.astype(object).map(dict(zip(names, masked, strict=True)))
        elif kind in ("str", "string"):
            texts = [text if text == text else "" for text in column.tolist()]  # NaN is missing
            rows[name] = column.where(column.isna(), redact_texts(texts))
    return rows


def _of_one_type(values: list[Any]) -> list[Any]:
    """Texts or integers as they are; mixed values as JSON, so that 7 and "7" stay distinct."""
    kinds = {type(value) for value in values if value is not None and value == value}
    if kinds <= {str}:
        masked = redact_texts([value if isinstance(value, str) else "" for value in values])
        texts = []
        for value, text in zip(values, masked, strict=True):
            texts.append(plain(text) if isinstance(value, str) else None)
        return texts
    if kinds == {int} and all(abs(value) < 2**63 for value in values if isinstance(value, int)):
        return values
    return [None if isinstance(value, float) and math.isnan(value) else encode(value) for value in values]


def _is_plain(column: Any) -> bool:
    """Whether the column holds numbers or times."""
    return column.dtype.kind in "iufbM"
