"""The journal of a run's changes as a YAML file, to read, to keep and to repeat in another run.

    run: first
    changes:
    - {time: '2026-01-31T12:00:00.000+00:00', source: code, field: percentile, old: 0.3, new: 0.8, epoch: 4}

`epoch` is the one that used a change first; null: none did, because another change came before, or the run ended. A replay
repeats those that were used, each at the safe point of that epoch; see Controls.repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .controls import Change
from .errors import ConfigError
from .yaml_text import dump_yaml, read_yaml

__all__ = ["journal_text", "read_journal"]

FIELDS = ("time", "source", "field", "old", "new", "epoch")


def journal_text(run_id: str, changes: Sequence[Change]) -> str:
    """The file's text."""
    return dump_yaml({"run": run_id, "changes": [_written(change) for change in changes]})


def _written(change: Change) -> dict[str, Any]:
    when = datetime.fromtimestamp(change.time, UTC).isoformat(timespec="milliseconds")
    old = float(f"{change.old:.12g}") if isinstance(change.old, float) else change.old  # 0.9, not 0.8999999999999999
    return {**{name: getattr(change, name) for name in FIELDS}, "time": when, "old": old}


def read_journal(path: str | Path) -> list[Change]:
    """The changes of a file that `run.export("journal.yaml")` wrote, in its order. Raises ConfigError for one that is
    none. Whether a run has such a field, and takes such a value, is asked when the change is repeated."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"replay: {path} cannot be read ({type(error).__name__}). Expected a journal that "
            'run.export("journal.yaml") wrote.'
        ) from None
    data = read_yaml(text, f"replay {path.name}")
    changes = data.get("changes") if isinstance(data, Mapping) else None
    if not isinstance(changes, list):
        raise ConfigError(f"replay {path.name}: found no list `changes`. Expected a journal that run.export wrote.")
    return [_read(entry, f"replay {path.name}, changes[{place}]") for place, entry in enumerate(changes)]


def _read(entry: Any, label: str) -> Change:
    if not isinstance(entry, Mapping) or not {"field", "new", "epoch"} <= entry.keys() <= {*FIELDS}:
        raise ConfigError(f"{label}: expected {', '.join(FIELDS)}, of which field, new and epoch are needed.")
    name, epoch = entry["field"], entry["epoch"]
    if not isinstance(name, str):
        raise ConfigError(f"{label}: field is {name!r}; expected the name of a setting.")
    if epoch is not None and (not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0):
        raise ConfigError(f"{label}: epoch is {epoch!r}; expected a whole number from 0, or null.")
    return Change(
        _seconds(entry.get("time")), str(entry.get("source", "")), name, entry.get("old"), entry["new"], epoch
    )


def _seconds(time: Any) -> float:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0
