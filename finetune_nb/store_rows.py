"""The records of a run as rows of run.db, and back: an epoch, a selection, a validation, a change of the controls.

A record is JSON (stored_json.py) beside a few columns to query; arrays are bytes, little-endian. What is read may be
anybody's, so every value is looked at. The tables are in store_schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from .controls import Change
from .curriculum_settings import CurriculumSettings
from .stored_json import decode, encode
from .types import (
    GROUP_REASONS,
    CurriculumState,
    Epoch,
    EpochMetrics,
    GroupStatistics,
    Selection,
    TrainingJobStatus,
    Validation,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "change_from_row",
    "epoch_from_row",
    "epoch_to_row",
    "readable",
    "selection_from_json",
    "selection_to_json",
    "validation_from_json",
    "validation_to_row",
]

# ── an epoch ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_ARRAYS = {
    "rewards": "<f8",
    "offsets": "<i8",
    "counts": "<i8",
    "means": "<f8",
    "spreads": "<f8",
    "reasons": "|i1",
    "kept": "<i8",
}
"""Of a GroupStatistics and of a Selection, as they lie in the file."""
_metrics = TypeAdapter(EpochMetrics)
_status = TypeAdapter(TrainingJobStatus | None)
_numbers = TypeAdapter(dict[str, float])
_versions = TypeAdapter(tuple[int | None, int | None])


def epoch_to_row(epoch: Epoch) -> dict[str, Any]:
    """The columns of an epoch but `job_ref` and `state`."""
    statistics, selection = epoch.statistics, epoch.selection
    record = {
        "run_id": epoch.run_id,
        "example_ids": list(statistics.example_ids),
        **_about_selection(selection),
        "job": epoch.job and epoch.job.model_dump(mode="python"),
        "reason": epoch.reason,
        "metrics": asdict(epoch.metrics),
        "policy_versions": epoch.policy_versions,
        "started_at": epoch.started_at,
        "seconds": dict(epoch.seconds),
    }
    arrays = {name: getattr(statistics if hasattr(statistics, name) else selection, name) for name in _ARRAYS}
    return {
        "epoch": epoch.index,
        "started_at": epoch.started_at,
        "mean_reward": epoch.metrics.mean_reward,
        "trajectories": len(statistics.rewards),
        "failures": len(epoch.collection.failures),
        "groups": len(statistics),
        "job": epoch.job and str(epoch.job.status),
        "reason": readable(epoch.reason),
        "record": encode(record),
        **{name: array.astype(_ARRAYS[name], copy=False).tobytes() for name, array in arrays.items()},
    }


def _about_selection(selection: Selection) -> dict[str, Any]:
    """A selection but for its examples and arrays."""
    state = selection.state
    return {
        "settings": asdict(selection.settings),
        "curriculum_state": {**asdict(state), "included_groups": sorted(state.included_groups)},
        "inferred": selection.inferred,
    }


def _selection(
    record: Mapping[str, Any], example_ids: Sequence[Any], reasons: np.ndarray, kept: np.ndarray
) -> Selection:
    if len(reasons) != len(example_ids):
        raise ValueError("its arrays do not belong together")
    if len(kept) and not (kept.min() >= 0 and kept.max() < len(example_ids)):
        raise ValueError("it keeps groups that are not there")
    if len(reasons) and not (reasons.min() >= 0 and reasons.max() < len(GROUP_REASONS)):
        raise ValueError("it has reasons that are not known")
    state = record["curriculum_state"]
    curriculum = CurriculumState(
        float(state["percentile"]),
        int(state["last_expansion_epoch"]),
        int(state["total_groups"]),
        frozenset(map(int, state["included_groups"])),
    )
    settings = CurriculumSettings(**record["settings"])
    return Selection(example_ids, reasons, kept, curriculum, settings, bool(record["inferred"]))


def selection_to_json(selection: Selection, seconds: Mapping[str, float]) -> str:
    """The selection of an epoch that is not complete, and what each part of it took so far."""
    arrays = {"reasons": selection.reasons.tolist(), "kept": selection.kept.tolist()}
    record = {"example_ids": list(selection.example_ids), **arrays, **_about_selection(selection)}
    return encode({**record, "seconds": dict(seconds)})


def selection_from_json(text: str) -> tuple[Selection, dict[str, float]]:
    """The way back. Raises ValueError, KeyError, TypeError, OverflowError and FinetuneError for what does not fit."""
    import numpy as np

    record = decode(text, dict)
    reasons, kept = np.array(record["reasons"], np.int8), np.array(record["kept"], np.int64)
    selection = _selection(record, tuple(record["example_ids"]), reasons, kept)
    return selection, _numbers.validate_python(record["seconds"])


def epoch_from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Epoch but `collection`, and `failures`: how many. Raises ValueError, KeyError, TypeError and
    FinetuneError for what does not fit."""
    record = decode(row["record"], dict)
    arrays = {name: _array(row[name], dtype) for name, dtype in _ARRAYS.items()}
    kept, reasons = arrays.pop("kept"), arrays.pop("reasons")
    if not isinstance(record["example_ids"], list):
        raise ValueError("its example ids are no list")
    example_ids = tuple(record["example_ids"])
    groups, rows = len(example_ids), len(arrays["rewards"])
    offsets = arrays["offsets"]
    of_groups = {len(offsets) - 1, len(arrays["counts"]), len(arrays["means"]), len(arrays["spreads"]), len(reasons)}
    if of_groups != {groups} or offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("its arrays do not belong together")
    if (row["trajectories"], row["groups"]) != (rows, groups) or type(row["failures"]) is not int:
        raise ValueError("its counts do not fit its arrays")
    reason = record["reason"]
    if not (reason is None or isinstance(reason, str)) or not isinstance(record["run_id"], str):
        raise ValueError("a text is none")
    return {
        "index": int(row["epoch"]),
        "run_id": record["run_id"],
        "statistics": GroupStatistics(example_ids=example_ids, **arrays),
        "selection": _selection(record, example_ids, reasons, kept),
        "job": _status.validate_python(record["job"]),
        "reason": reason,
        "metrics": _metrics.validate_python(record["metrics"]),
        "policy_versions": _versions.validate_python(record["policy_versions"]),
        "started_at": float(record["started_at"]),
        "seconds": _numbers.validate_python(record["seconds"]),
        "failures": row["failures"],
    }


def _array(data: Any, dtype: str) -> np.ndarray:
    import numpy as np

    if not isinstance(data, bytes):
        raise ValueError("an array is no BLOB")
    return np.frombuffer(data, dtype)


# ── validations, changes ─────────────────────────────────────────────────────────────────────────────────────────────

_validation = TypeAdapter(Validation)


def validation_to_row(validation: Validation, epoch: int | None) -> tuple[Any, ...]:
    """epoch, mean_reward, error, record."""
    return epoch, validation.mean_reward, readable(validation.error), encode(asdict(validation))


def validation_from_json(record: Any) -> Validation:
    """The way back from the column `record`. Raises ValueError for what does not fit."""
    return _validation.validate_python(decode(record, dict))


def change_from_row(row: Mapping[str, Any]) -> Change:
    """A row of the journal. Raises ValueError for what does not fit."""
    values = {field.name: row[field.name] for field in fields(Change)}
    if not isinstance(values["time"], float) or not all(isinstance(values[name], str) for name in ("source", "field")):
        raise ValueError("a change of the journal is none")
    return Change(**{**values, "old": decode(values["old"]), "new": decode(values["new"])})


def readable(text: str | None) -> str | None:
    """Text for a column that people query: secrets masked, lone surrogates escaped. The JSON has the exact one."""
    return None if text is None else decode(encode(text)).encode("utf-8", "backslashreplace").decode()
