"""Datasets: rows from a file (JSON, JSONL, CSV, Parquet), a list of dicts, a DataFrame or a Dataset of Hugging Face, as
EvalInputItems.

Ids are kept as they are, missing ones are made from the row's position, and two rows with one id are an error: a group of
trajectories belongs to exactly one example. A row without its question stays in; its rollout is then a failure that says so.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.base import EvalDatasetBaseConfig
from ..errors import DatasetError, did_you_mean
from ..redaction import error_text, redacting_logger
from ..types import EvalInputItem

__all__ = [
    "load_dataset",
    "read_rows",
    "to_items",
]

TRL_COLUMNS = {"question": "prompt", "answer": "solution"}
"""What TRL calls the columns of question and answer."""
_SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def load_dataset(source: Any, config: EvalDatasetBaseConfig | None = None) -> Sequence[EvalInputItem]:
    """Items of a path, a list of dicts or a DataFrame. `config` names the columns; its own file serves where `source` is
    None. Raises DatasetError."""
    config = config or EvalDatasetBaseConfig()
    if source is None:
        source = config.file_path
    if not isinstance(source, str | Path):
        return to_items(read_rows(source), config)
    path = Path(source)
    try:
        stat = path.stat()
    except OSError as error:
        raise DatasetError(
            f"dataset file {str(path)!r} cannot be read: {error.strerror}. Looked in {Path.cwd()}."
        ) from error
    return _cached(path, stat.st_mtime_ns, stat.st_size, config.model_dump_json(exclude_unset=True), type(config))


@functools.lru_cache(maxsize=8)
def _cached(
    path: Path, mtime: int, size: int, config: str, kind: type[EvalDatasetBaseConfig]
) -> tuple[EvalInputItem, ...]:
    settings = kind.model_validate_json(config)
    return tuple(to_items(read_rows(path, settings.id_key), settings, where=f"dataset {path.name!r}"))


def read_rows(source: Any, id_key: str = "id") -> list[dict[str, Any]]:
    """Rows of a file, a list of dicts, or anything with `to_dict(orient="records")`, whose named index counts as columns."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return _rows_of_frame(source)
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping) and source and all(hasattr(each, "column_names") for each in source.values()):
            splits = ", ".join(map(repr, source))
            raise DatasetError(
                f"a {type(source).__name__} has several datasets: {splits}. Choose one of them by its name."
            )
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise DatasetError(
                f"a dataset is a file, a list of dicts, a DataFrame or a Dataset; got {type(source).__name__}."
            )
        return [_row(row, i, "the list") for i, row in enumerate(source)]
    path = Path(source)
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise DatasetError(f"dataset {path.name!r}: unknown kind of file. Expected one of {', '.join(_SUFFIXES)}.")
    try:
        return _read(path, kind, id_key)
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(f"dataset {path.name!r} is not readable as {kind}: {error_text(error)}") from error


def _read(path: Path, kind: str, id_key: str) -> list[dict[str, Any]]:
    if kind == "json":
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            raise DatasetError(f"dataset {path.name!r} holds a {type(rows).__name__}; expected a list of objects.")
        return [_row(row, i, path.name) for i, row in enumerate(rows)]
    if kind == "jsonl":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [_row(json.loads(line), i, path.name) for i, line in enumerate(lines) if line.strip()]
    import pandas as pd

    frame = pd.read_csv(path, dtype={id_key: str}) if kind == "csv" else pd.read_parquet(path)
    return _rows_of_frame(frame)


def _rows_of_frame(frame: Any) -> list[dict[str, Any]]:
    """The rows of a table. A named index, or each named level of one, is a column like any other; an unnamed one is none."""
    rows = [_without_nan(row) for row in frame.to_dict(orient="records")]
    index = getattr(frame, "index", None)
    levels = getattr(index, "names", None)
    if not rows or index is None or not levels:
        return rows
    columns = set(rows[0])
    left_out = []
    for level, name in reversed(list(enumerate(levels))):
        if name is None:
            if index.nlevels > 1 or index.tolist() != list(range(len(rows))):
                left_out.append("it has no name")
        elif str(name) in columns:
            left_out.append(f"there is a column {str(name)!r}, too")
        else:
            columns.add(str(name))
            values = index.get_level_values(level).tolist()
            rows = [_without_nan({name: value}) | row for value, row in zip(values, rows, strict=True)]
    if left_out:
        logger.warning(
            "the dataset's index is not among the rows' columns: %s. To keep it, give it a name of its own: "
            "frame.rename_axis('id').",
            "; ".join(dict.fromkeys(left_out)),
        )
    return rows


logger = redacting_logger(__name__)


def to_items(
    rows: Iterable[dict[str, Any]], config: EvalDatasetBaseConfig | None = None, where: str = "the dataset"
) -> list[EvalInputItem]:
    """Rows as items: `structure` names the columns of question and answer (with `disable`, the whole row is the input).

    A column that the config does not name itself may be missing: agent and reward may take others by their names. In place of
    one that is missing, the name that TRL has for it counts.
    """
    config = config or EvalDatasetBaseConfig()
    rows = [row for row in rows if _passes(row, config.filter)]
    if not rows:
        raise DatasetError(f"{where} is empty. At least one row is needed (after its filters).")
    structure, columns = config.structure, list(dict.fromkeys(key for row in rows for key in row))
    question, answer = structure.question_key, structure.answer_key
    named = {
        key: getattr(structure, key) for key in ("question_key", "answer_key") if key in structure.model_fields_set
    }
    for key, column in named.items():
        if column not in columns and not structure.disable:
            what = key.removesuffix("_key")
            raise DatasetError(
                f"{where} has no column {column!r} for the {what}. {did_you_mean(column, columns)} "
                f"Name it: {what}=... of Run, eval.general.dataset.structure.{key} in a config."
            )
    if "question_key" not in named and question not in columns:
        question = TRL_COLUMNS["question"]
    if "answer_key" not in named and answer not in columns:
        answer = TRL_COLUMNS["answer"]
    ids = _ids([row.get(config.id_key) for row in rows], where)
    return [
        EvalInputItem(
            id=row_id,
            input_obj=row if structure.disable else row.get(question),
            expected_output_obj=row.get(answer),
            full_dataset_entry=row,
        )
        for row_id, row in zip(ids, rows, strict=True)
    ]


def _ids(given: list[Any], where: str) -> list[Any]:
    taken = {str(value) for value in given if value is not None}
    ids = []
    for position, value in enumerate(given):
        if isinstance(value, list | dict):
            raise DatasetError(f"row {position} of {where} has the id {value!r:.60}; expected a text or a number.")
        if value is None:
            value, n = str(position), 0
            while value in taken:
                value, n = f"{position}-{n}", n + 1
            taken.add(value)
        ids.append(value)
    twice = [value for value, n in Counter(map(str, ids)).items() if n > 1]
    if twice:
        raise DatasetError(
            f"{where} has {len(twice)} ids more than once: {', '.join(map(repr, twice[:5]))}{' ...' if twice[5:] else ''}. "
            "Trajectories are grouped by id, so each row needs its own."
        )
    return ids


def _row(row: Any, position: int, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DatasetError(
            f"row {position} of {where} is a {type(row).__name__}; expected an object with named columns."
        )
    return dict(row)


def _without_nan(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A cell that a table leaves empty is None, as it is in JSON."""
    return {str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _passes(row: Mapping[str, Any], rules: Any) -> bool:
    allow = rules.allowlist.field if rules and rules.allowlist else {}
    deny = rules.denylist.field if rules and rules.denylist else {}
    return all(row.get(k) in values for k, values in allow.items()) and not any(
        row.get(k) in values for k, values in deny.items()
    )
