"""One record a line, appended: the seed's log files. Values that JSON does not know are written so that any reader takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .run_folder import append_line, write_durably
from .stored_json import encode

__all__ = ["append_jsonl", "finite", "forget_epochs"]


def append_jsonl(path: Path, line: Mapping[str, Any]) -> None:
    """Appends one record with its time stamp. NaN is written as null, so that every reader takes it; known secrets are
    masked. Raises OSError, and StoreError for a link in the file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"), **finite(line)}
    append_line(path, encode(record))


def forget_epochs(path: Path, first: int) -> None:
    """Takes the lines of that epoch and later ones out of a log, and a line that was cut off; others stay."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _epoch_of(line) < first]
    if len(kept) < len(lines):
        write_durably(path, lambda file: file.write("".join(kept).encode()))


def _epoch_of(line: str) -> float:
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -math.inf
    return epoch if isinstance(epoch, int) else -math.inf


def finite(value: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
