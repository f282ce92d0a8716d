"""The Parquet file of an epoch, `trajectories/epoch-000003.parquet`: written so that a crash leaves none or all of it,
and read without trusting it. Others read it with pandas.read_parquet.

Columns are those of trajectory_table.py; the schema's metadata say which run and epoch it is and how many groups there
were. A batch of rollouts of an unfinished epoch is the same table as an Arrow stream. Every error is a StoreError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..redaction import redact_text, redact_texts
from ..types import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    RolloutFailure,
    Trajectory,
    TrajectoryCollection,
    logprob_count,
)
from .durable import check_plain, write_durably
from .folder import trajectory_file
from .json import decode, decode_steps, encode, encode_all, encode_steps

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "COLUMNS",
    "LISTED",
    "PREFERENCE",
    "batch_of",
    "collection_of",
    "collection_of_batches",
    "read_columns",
    "read_trajectories",
    "table_of",
    "write_trajectories",
]

PREFERENCE = "preference"
"""The role of a message that is a pair of responses."""
LISTED = {"token_ids": int, "tokens": str, "prompt_token_ids": int}
"""What of a message's metadata has a column."""
_INTS = ("list<list<int32>>", "list<list<int64>>")
COLUMNS: dict[str, tuple[str, ...]] = {
    "kind": ("string",),
    "group": ("int32",),
    "example": ("string",),
    "generation": ("int64",),
    "reward": ("double",),
    "shaped_rewards": ("list<double>",),
    "error": ("string",),
    "turns": ("int32",),
    "tokens": ("int32",),
    "policy_version": ("int64",),
    "finish_reason": ("string",),
    "scores": ("string",),
    "metadata": ("string",),
    "steps": ("string",),
    "roles": ("list<string>",),
    "contents": ("list<string>",),
    "logprobs": ("list<list<float>>", "list<list<double>>"),
    "token_ids": _INTS,
    "token_texts": ("list<list<string>>",),
    "prompt_token_ids": _INTS,
    "item_metadata": ("list<string>",),
    "others": ("list<string>",),
}
"""Every column and the types that it may have."""


# ── trajectories -> table ────────────────────────────────────────────────────────────────────────────────────────────


def table_of(groups: Sequence[Sequence[Trajectory]], failures: Sequence[RolloutFailure]) -> pa.Table:
    """The rows, in the groups' order; behind them the failures."""
    import pyarrow as pa

    rows = [trajectory for group in groups for trajectory in group]
    metadata = [trajectory.metadata or {} for trajectory in rows]
    items = list(chain.from_iterable(trajectory.episode for trajectory in rows))
    nothing = [None] * len(failures)
    tokens, reasons = _sampled(rows)
    errors = [_text(failure.error) for failure in failures]
    columns: dict[str, Any] = {
        "kind": pa.array(["trajectory"] * len(rows) + ["failure"] * len(failures), pa.string()),
        "group": pa.array([g for g, group in enumerate(groups) for _ in group] + nothing, pa.int32()),
        "example": _texts([m.get("id") for m in metadata] + [failure.example_id for failure in failures]),
        "generation": _counts([m.get("generation") for m in metadata] + [f.generation for f in failures]),
        "reward": pa.array([float(t.reward) for t in rows] + nothing, pa.float64()),
        "shaped_rewards": pa.array([t.shaped_rewards for t in rows] + nothing, pa.list_(pa.float64())),
        "error": _texts([m.get("reward_error") for m in metadata] + errors),
        "turns": pa.array([len(t.episode) for t in rows] + nothing, pa.int32()),
        "tokens": pa.array(tokens + nothing, pa.int32()),
        "policy_version": _counts([m.get("policy_version") for m in metadata] + nothing),
        "finish_reason": _texts(reasons + nothing),
        "scores": _json([m.get("scores") for m in metadata] + nothing),
        "metadata": _json([t.metadata for t in rows] + [_of_failure(failure) for failure in failures]),
        "steps": pa.array([None] * len(rows) + [encode_steps(f.steps) for f in failures], pa.string()),
    }
    sizes = [len(t.episode) for t in rows] + [0] * len(failures)
    offsets = _offsets(sizes)
    absent = pa.array([False] * len(rows) + [True] * len(failures), pa.bool_())
    for name, values in _messages(items).items():
        columns[name] = pa.ListArray.from_arrays(offsets, values, mask=absent)
    return pa.table(columns)


def _of_failure(failure: RolloutFailure) -> dict[str, Any]:
    return {"id": failure.example_id, "generation": failure.generation, "error": failure.error}


def _sampled(rows: Sequence[Trajectory]) -> tuple[list[int | None], list[Any]]:
    """Tokens that the policy sampled, and the last finish reason, of each trajectory."""
    assistant = EpisodeItemRole.ASSISTANT
    tokens: list[int | None] = []
    reasons: list[Any] = []
    for trajectory in rows:
        sampled, reason = 0, None
        for item in trajectory.episode:
            logprobs = getattr(item, "logprobs", None)
            if logprobs is not None and item.role == assistant:  # type: ignore[union-attr]
                sampled += logprob_count(logprobs)
                reason = (item.metadata or {}).get("finish_reason", reason)  # type: ignore[union-attr]
        tokens.append(sampled)
        reasons.append(reason)
    return tokens, reasons


def _messages(items: Sequence[EpisodeItem | DPOItem]) -> dict[str, Any]:
    """Columns of the messages, one row each."""
    import pyarrow as pa

    single = [item if isinstance(item, EpisodeItem) else None for item in items]
    metadata = [None if item is None else item.metadata for item in single]
    texts = ["" if item is None else item.content for item in single]
    contents = redact_texts(texts)
    logprobs, logprob_column = _lists([None if item is None else item.logprobs for item in single], float)
    listed: dict[str, list[Any]] = {}
    columns: dict[str, Any] = {}
    for name, kind in LISTED.items():
        values = [m.get(name) if m else None for m in metadata]
        if name == "tokens":  # a text that had a secret in it is not spelt out in pieces either
            values = [v if a == b else None for v, a, b in zip(values, texts, contents, strict=True)]
        listed[name], columns["token_texts" if name == "tokens" else name] = _lists(values, kind)

    rest: list[Any] = []
    others: list[Any] = []
    for place, item in enumerate(items):
        found, other = metadata[place], {}
        if found:
            found = {k: v for k, v in found.items() if k not in listed or listed[k][place] is None}
            if texts[place] != contents[place]:
                found.pop("tokens", None)
        if not isinstance(item, EpisodeItem):
            other = {PREFERENCE: item.model_dump()}
        else:
            if logprobs[place] is None and item.logprobs is not None:
                other["logprobs"] = item.logprobs
            if not _is_utf8(contents[place]):
                other["content"] = contents[place]
        rest.append(found)
        others.append(other or None)
    return {
        "roles": pa.array([PREFERENCE if item is None else str(item.role) for item in single], pa.string()),
        "contents": _texts(contents),
        "logprobs": logprob_column,
        **columns,
        "item_metadata": _json(rest),
        "others": _json(others),
    }


def _lists(values: Sequence[Any], kind: type) -> tuple[list[Any], Any]:
    """The values that are lists of `kind` and nothing else (None for all others), and the column of them."""
    import pyarrow as pa

    lists = [value if type(value) is list else None for value in values]
    try:
        flat = _flat(lists, kind)
    except (TypeError, OverflowError, UnicodeError):
        lists = [value if value is not None and _fits(value, kind) else None for value in lists]
        flat = _flat(lists, kind)
    absent = pa.array([value is None for value in lists], pa.bool_())
    return lists, pa.ListArray.from_arrays(_offsets([len(value or ()) for value in lists]), flat, mask=absent)


def _fits(value: list[Any], kind: type) -> bool:
    try:
        _flat([value], kind)
    except (TypeError, OverflowError, UnicodeError):
        return False
    return True


def _flat(lists: Sequence[list[Any] | None], kind: type) -> Any:
    """All entries one behind the other, in the narrowest type that holds them exactly."""
    import numpy as np
    import pyarrow as pa

    entries = list(chain.from_iterable(value for value in lists if value))
    if not set(map(type, entries)) <= {kind}:
        raise TypeError
    if kind is str:
        return pa.array(entries, pa.string())
    if kind is int:
        whole = np.array(entries, np.int64)
        narrow = whole.astype(np.int32)
    else:
        whole = np.array(entries, np.float64)
        with np.errstate(over="ignore"):
            narrow = whole.astype(np.float32)
    return pa.array(narrow if np.array_equal(narrow, whole, equal_nan=kind is float) else whole, from_pandas=False)


def _offsets(sizes: Sequence[int]) -> Any:
    import numpy as np
    import pyarrow as pa

    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return pa.array(offsets).cast(pa.int32())


def _counts(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.array([v if type(v) is int and -(2**63) <= v < 2**63 else None for v in values], pa.int64())


def _json(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.array(encode_all(values), pa.string())


def _texts(values: Sequence[Any]) -> Any:
    """To read and to group by; what UTF-8 cannot say is written as an escape."""
    import pyarrow as pa

    if {str, type(None)}.issuperset(map(type, values)):
        texts = redact_texts(values)
    else:
        texts = [None if value is None else _text(value) for value in values]
    try:
        return pa.array(texts, pa.string())
    except UnicodeError:
        return pa.array([t and t.encode("utf-8", "backslashreplace").decode() for t in texts], pa.string())


def _text(value: Any) -> str:
    return redact_text(value if isinstance(value, str) else str(value))


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def collection_of(table: pa.Table, run_id: str, groups: int | None) -> TrajectoryCollection:
    """The trajectories and failures of a table whose columns are those of COLUMNS.

    groups: how many there were, empty ones too; None: by example, in the order in which they first appear.
    Raises ValueError where a value does not fit.
    """
    if groups is not None and not 0 <= groups <= len(table) + _EMPTY_GROUPS:
        raise ValueError(f"{groups} groups for {len(table)} rows")
    columns = {name: _pythonic(table.column(name).combine_chunks()) for name in COLUMNS if name not in _DERIVED}
    out: list[list[Trajectory]] = [[] for _ in range(groups or 0)]
    by_example: dict[str, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    messages = list(zip(*(columns[name] for name in _OF_MESSAGES), strict=True))
    alone = zip(*(columns[name] for name in _OF_ROWS), strict=True)
    for (kind, group, reward, shaped, metadata, steps), lists in zip(alone, messages, strict=True):
        if kind == "failure":
            known = decode(metadata, dict)
            example, generation, error = known["id"], known["generation"], known["error"]
            if type(generation) is not int or not isinstance(error, str):
                raise ValueError("a failure without generation or error")
            failures.append(RolloutFailure(example, generation, error, decode_steps(steps)))
            continue
        known = None if metadata is None else decode(metadata, dict)
        if kind != "trajectory" or reward is None or None in lists or len({len(values) for values in lists}) != 1:
            raise ValueError("a row that is neither a trajectory nor a failure")
        trajectory = Trajectory.model_construct(
            episode=[_item(*values) for values in zip(*lists, strict=True)],
            reward=reward,
            shaped_rewards=shaped,
            metadata=known,
        )
        if groups is None:
            by_example.setdefault(encode((known or {}).get("id")), []).append(trajectory)
        elif group is None or not 0 <= group < groups:
            raise ValueError(f"group {group} of {groups}")
        else:
            out[group].append(trajectory)
    trajectories = list(by_example.values()) if groups is None else out
    return TrajectoryCollection.model_construct(trajectories=trajectories, run_id=run_id, failures=failures)


_EMPTY_GROUPS = 100_000
"""More of them than that are no record but an attack on the memory."""
_OF_ROWS = ("kind", "group", "reward", "shaped_rewards", "metadata", "steps")
_OF_MESSAGES = (
    "roles",
    "contents",
    "logprobs",
    "token_ids",
    "token_texts",
    "prompt_token_ids",
    "item_metadata",
    "others",
)
_DERIVED = COLUMNS.keys() - {*_OF_ROWS, *_OF_MESSAGES}
"""Columns that repeat what stands in others, for those who read the file with other tools."""
_ROLES = {str(role): role for role in EpisodeItemRole}


def _item(
    role: Any, content: Any, logprobs: Any, ids: Any, texts: Any, prompt_ids: Any, metadata: Any, others: Any
) -> Any:
    other = {} if others is None else decode(others, dict)
    if role == PREFERENCE:
        return DPOItem.model_validate(other.get(PREFERENCE))
    content = other.get("content", content)
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"a message of role {role!r}")
    found = None if metadata is None else decode(metadata, dict)
    for name, value in (("token_ids", ids), ("tokens", texts), ("prompt_token_ids", prompt_ids)):
        if value is not None:
            found = {} if found is None else found
            found[name] = value
    logprobs = other.get("logprobs") if logprobs is None else logprobs
    return EpisodeItem.model_construct(role=_ROLES[role], content=content, logprobs=logprobs, metadata=found)


def _pythonic(array: Any) -> list[Any]:
    """Like to_pylist, which makes an object of Arrow's for every token on the way."""
    import pyarrow as pa

    if pa.types.is_list(array.type):
        entries = _pythonic(array.values)
        offsets = array.offsets.to_pylist()
        parts = [entries[start:stop] for start, stop in pairwise(offsets)]
        if array.null_count:
            parts = [part if there else None for part, there in zip(parts, array.is_valid().to_pylist(), strict=True)]
        return parts
    if array.null_count == 0 and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return array.to_numpy().tolist()
    if pa.types.is_integer(array.type) and array.null_count == len(array):
        return [None] * len(array)
    return array.to_pylist()


FORMAT = 1
KEY = b"finetune_nb"
ROWS_PER_GROUP = 8192
"""So that a reader of whole rows does not need all memory at once."""
_AS_TEXT = ("kind", "example", "error", "finish_reason", "scores", "metadata", "steps")
_DICTIONARY = [*_AS_TEXT, *(f"{name}.list.element" for name in ("roles", "contents", "item_metadata", "others"))]
_DICTIONARY += ["token_texts.list.element.list.element", "token_ids.list.element.list.element"]
_SPLIT = {"logprobs.list.element.list.element": "BYTE_STREAM_SPLIT"}
"""Prompt ids stay plain: a turn's begin with those of the turn before, which zstd finds where bytes are aligned."""


def write_trajectories(folder: Path, epoch: int, run_id: str, collection: TrajectoryCollection) -> int:
    """Writes an epoch's file in place of one that an append left behind which did not come to its end. Returns its size
    in bytes. Raises StoreError; the folder is then as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trajectory_file(folder, epoch)
    try:
        table = table_of(collection.trajectories, collection.failures)
        groups = len(collection.trajectories)
        about = {"format": FORMAT, "run_id": run_id, "collection": collection.run_id, "epoch": epoch, "groups": groups}
        table = table.replace_schema_metadata({KEY: encode(about)})
        check_plain(path.parent)
        path.parent.mkdir(exist_ok=True)
        write_durably(
            path,
            lambda file: pq.write_table(
                table,
                file,
                row_group_size=ROWS_PER_GROUP,
                compression="zstd",
                use_dictionary=_DICTIONARY,  # type: ignore[arg-type]  # the stubs know the bool only
                column_encoding=_SPLIT,
                write_statistics=False,
                write_page_checksum=True,
            ),
        )
        return os.stat(path).st_size
    except (OSError, pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(
            f"{path} could not be written: {type(error).__name__}: {error}. Epoch {epoch} is not recorded; everything "
            "before it is kept. Remove the cause (a full disk, say) and append the epoch again."
        ) from error


def read_trajectories(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> TrajectoryCollection:
    """The trajectories of an epoch. rows, groups: how many run.db says that there are. Raises StoreError."""
    with _reading(folder, epoch, run_id, rows, groups) as file:
        return collection_of(_checked(file.read(list(COLUMNS), use_threads=False)), _about(file)["collection"], groups)


def read_columns(folder: Path, epoch: int, run_id: str, rows: int, groups: int, names: Sequence[str]) -> pa.Table:
    """Some columns of an epoch, by the names in trajectory_table.py; nothing else is read. Raises StoreError."""
    if unknown := [name for name in names if name not in COLUMNS]:
        raise StoreError(f"found columns {unknown}; the file of an epoch has {', '.join(COLUMNS)}.")
    with _reading(folder, epoch, run_id, rows, groups) as file:
        return _checked(file.read(list(names), use_threads=False))


@contextmanager
def _reading(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> Iterator[Any]:
    """The open Parquet file, once its columns and counts are found to be the expected ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trajectory_file(folder, epoch)
    try:
        check_plain(path.parent, path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            types = {
                field.name: str(field.type).replace("element: ", "").replace("item: ", "")
                for field in file.schema_arrow
            }
            for name, allowed in COLUMNS.items():
                if types.get(name) not in allowed:
                    raise ValueError(f"column {name} is {types.get(name, 'missing')}, expected {' or '.join(allowed)}")
            about = _about(file)
            found = (about["run_id"], about["epoch"], about["groups"], file.metadata.num_rows)
            if found != (run_id, epoch, groups, rows):
                raise ValueError(
                    "run, epoch, groups and rows are {!r}, {!r}, {!r}, {!r}".format(*found)
                    + f"; run.db says {run_id!r}, {epoch}, {groups}, {rows}"
                )
            yield file
    except StoreError:
        raise
    except FileNotFoundError:
        problem, cause = "it is missing", None
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        problem, cause = f"it cannot be read: {type(error).__name__}: {str(error)[:500]}", error
    else:
        return
    raise StoreError(
        f"{path}: {problem}. The trajectories of epoch {epoch} are lost unless you have a copy of that file; its "
        "numbers and all other epochs can be read."
    ) from cause


def _about(file: Any) -> dict[str, Any]:
    about = decode(((file.schema_arrow.metadata or {}).get(KEY) or b"").decode("ascii", "replace"), dict)
    if about.get("format") != FORMAT:
        raise ValueError(f"format {about.get('format')!r}, expected {FORMAT}; update finetune_nb to read a newer one")
    if not isinstance(about.get("collection"), str):
        raise ValueError("it does not say which run it belongs to")
    return about


def _checked(table: pa.Table) -> pa.Table:
    table.validate(full=True)
    return table


# ── batches of an unfinished epoch ───────────────────────────────────────────────────────────────────────────────────


def batch_of(collection: TrajectoryCollection, whole: bool) -> bytes:
    """Rollouts as bytes. whole: these are all of the epoch's, and their groups are kept. Raises StoreError for what
    cannot be written down."""
    import pyarrow as pa

    try:
        table = table_of(collection.trajectories, collection.failures)
        if whole:
            table = table.replace_schema_metadata({KEY: encode({"groups": len(collection.trajectories)})})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(f"a rollout cannot be written down: {type(error).__name__}: {error}.") from error


def collection_of_batches(batches: Sequence[bytes], run_id: str) -> TrajectoryCollection:
    """The rollouts of several batches, grouped by example; a whole one is alone, and in its own groups. Raises
    StoreError."""
    import pyarrow as pa

    groups: dict[Any, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    try:
        for batch in batches:
            with pa.ipc.open_stream(pa.BufferReader(batch)) as reader:
                table = _checked(reader.read_all())
            if about := (table.schema.metadata or {}).get(KEY):
                return collection_of(table, run_id, int(decode(about.decode("ascii", "replace"), dict)["groups"]))
            found = collection_of(table, run_id, None)
            for group in found.trajectories:
                groups.setdefault(encode((group[0].metadata or {}).get("id")), []).extend(group)
            failures += found.failures
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"the rollouts of the unfinished epoch cannot be read: {type(error).__name__}: {str(error)[:500]}. "
            "Completed epochs are not touched by that."
        ) from error
    return TrajectoryCollection.model_construct(trajectories=list(groups.values()), run_id=run_id, failures=failures)
