"""Writes a run to one file, its kind told by its suffix.

    .csv       rows of a frame, for a spreadsheet: a text that a spreadsheet would run as a formula (it begins with = + - @,
               a tab or a line break, and is no number) gets a ' before it, control characters are shown as pictures
    .parquet   rows of a frame, exactly
    .jsonl     one line a trajectory, with its messages in OpenAI's chat format; or rows of a frame
    .html      a report
    .yaml      the journal of live changes, for `replay=` of another run

A further kind is one more entry in EXPORTS. The file is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ConfigError, did_you_mean
from ..redaction import redact_texts
from ..rollouts.episodes import chat_fields
from ..store.durable import write_durably
from ..store.json import encode, finite
from ..text import plain
from ..types import EpisodeItem, Epoch

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "EXPORTS",
    "FRAMES",
    "export",
]

FRAMES = ("trajectories", "messages", "tokens", "groups", "epochs", "journal")


def export(run: Any, path: str | Path, frame: str | None = None, filters: Mapping[str, Any] | None = None) -> Path:
    """Writes a run to `path` and returns it. frame: one of FRAMES; None: what the kind of file holds by default. filters:
    arguments of that frame. Raises ConfigError for a suffix or a frame that there is not."""
    path = Path(path)
    write = EXPORTS.get(path.suffix.lower())
    if write is None:
        raise ConfigError(
            f"cannot export to {path.name!r}: its suffix says the kind. {did_you_mean(path.suffix, EXPORTS)}"
        )
    if frame is not None and frame not in FRAMES:
        raise ConfigError(f"there is no frame {frame!r}. {did_you_mean(frame, FRAMES)}")
    chosen = {name: value for name, value in (filters or {}).items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda file: write(run, file, frame, chosen))
    return path


def _csv(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    rows = _rows(run, frame, filters)
    for name in rows.columns:
        if not _is_plain(rows[name]):
            values = rows[name].astype(object)
            rows[name] = [value if value != value else _shielded(plain(value)) for value in values]
    rows.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _shielded(text: str) -> str:
    """With a ' before what a spreadsheet would run as a formula; numbers are none."""
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
        # An epoch at a time: the conversations of a long run are many.
        epochs = run.chosen(filters.get("epoch"))
        lines = chain.from_iterable(_conversations(run, epoch, filters) for epoch in epochs)
    else:
        rows = _rows(run, frame, filters)
        columns = [rows[name].astype(object).where(rows[name].notna(), None).tolist() for name in rows.columns]
        lines = (dict(zip(rows.columns, row, strict=True)) for row in zip(*columns, strict=True))
    for line in lines:
        file.write(encode(finite(line)).encode("utf-8") + b"\n")


def _conversations(run: Any, epoch: Epoch, filters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An epoch's trajectories and failures with all that there is to say of each."""
    from .. import frames

    rows = frames.trajectories([epoch])
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


def _html(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    from .report import report_html

    if frame is not None or filters:
        raise ConfigError("the HTML report shows the whole run: leave frame, epoch, example and columns out.")
    file.write(report_html(run).encode("utf-8"))


def _yaml(run: Any, file: BinaryIO, frame: str | None, filters: Mapping[str, Any]) -> None:
    from ..engine.live_settings import journal_text

    if frame not in (None, "journal") or filters:
        raise ConfigError("a .yaml file holds the whole journal: leave epoch, example and columns out.")
    file.write(journal_text(run.id, run.changes).encode("utf-8"))


EXPORTS: dict[str, Callable[[Any, BinaryIO, str | None, Mapping[str, Any]], None]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".html": _html,
    ".yaml": _yaml,
    ".yml": _yaml,
}
"""What writes a run into an open file, by suffix: (run, file, frame, filters)."""


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(run: Any, frame: str | None, filters: Mapping[str, Any]) -> pd.DataFrame:
    """The frame, its texts with known secrets masked, its objects as one plain type a column."""
    rows = getattr(run, frame or "trajectories")(**filters)
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
    """Texts, or whole numbers, as they are; anything mixed as JSON, so that 7 and "7" stay two."""
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
    """Whether it holds numbers or times."""
    return column.dtype.kind in "iufbM"
