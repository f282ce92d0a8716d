"""The Parquet file of an epoch, `trajectories/epoch-000003.parquet`: one row a trajectory or failed rollout.

Written so that a crash leaves all of it or none, and read without trusting it; others read it with pandas.read_parquet.
`COLUMNS` declares what it holds. The schema's metadata say which run and epoch it is and how many groups there were. A
batch of rollouts of an unfinished epoch is the same table as an Arrow stream. Every error is a StoreError.
"""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..errors import StoreError
from ..redaction import redact_texts, redacting_logger
from ..types import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    MessageKey,
    RolloutFailure,
    Trajectory,
    TrajectoryCollection,
    is_sampled,
    sampled_outcome,
)
from .durable import check_plain, write_durably
from .folder import trajectory_file
from .json import (
    FAILED,
    attempt,
    decode,
    decode_steps,
    encode,
    encode_all,
    encode_steps,
    note_replaced,
    plain,
)
from .nearest import (
    ROLES,
    all_of,
    is_whole,
    known_items,
    known_number,
    known_numbers,
    known_trajectories,
    preference,
    stored_text,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "COLUMNS",
    "DecodedBatches",
    "FORMAT",
    "LISTED",
    "PREFERENCE",
    "FileColumn",
    "batches_of",
    "collection_of",
    "collection_of_batches",
    "read_columns",
    "read_row_group",
    "read_trajectories",
    "table_of",
    "to_python",
    "write_trajectories",
]

logger = redacting_logger(__name__)

PREFERENCE = "preference"
"""The role of a message that is a pair of responses."""
LISTED: dict[str, tuple[str, type]] = {
    "token_ids": (MessageKey.TOKEN_IDS, int),
    "token_texts": (MessageKey.TOKENS, str),
    "prompt_token_ids": (MessageKey.PROMPT_TOKEN_IDS, int),
    "entropies": (MessageKey.ENTROPIES, float),
}
"""The columns that hold a list out of a message's metadata: its key there, and the type of its entries."""


ROWS_PER_PART = 512
"""So many rollouts are made columns at once: what was fetched from memory for one column is still near for the next, and only
so much of a large epoch exists twice."""


# ── trajectories -> columns ──────────────────────────────────────────────────────────────────────────────────────────


_OF_METADATA = ("id", "generation", "reward_error", "policy_version", "scores", "output")
"""Keys of a trajectory's metadata that have a column."""
_TOGETHER = 128
"""So many trajectories are looked at at once: each is looked at several times, and should not have to be fetched from memory
again."""


def _in_columns(trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], dict[str, list[Any]]]:
    """The trajectories as they can be stored, and what every file has a column of: values of their metadata, by key, and
    what their episodes came to.

    The usual turn's part of `sampled_outcome` is written out: of 100,000 trajectories, a call for each would be a tenth of
    the whole.
    """
    known: list[Trajectory] = []
    assistant, finish_reason = EpisodeItemRole.ASSISTANT, MessageKey.FINISH_REASON
    of_metadata: dict[str, list[Any]] = {name: [] for name in _OF_METADATA}
    turns: list[int] = []
    tokens: list[int] = []
    reasons: list[Any] = []
    for start in range(0, len(trajectories), _TOGETHER):
        some = known_trajectories(trajectories[start : start + _TOGETHER])
        known += some
        metadata = [trajectory.metadata or {} for trajectory in some]
        for name, values in of_metadata.items():
            values += [each.get(name) for each in metadata]
        for trajectory in some:
            count, reason = 0, None
            for item in trajectory.episode:
                if type(item) is EpisodeItem and type(logprobs := item.logprobs) is list:
                    if logprobs and item.role == assistant:
                        count += len(logprobs)
                        reason = item.metadata.get(finish_reason) if item.metadata else None
                elif is_sampled(item):
                    count, reason = sampled_outcome(trajectory)
                    break
            turns.append(len(trajectory.episode))
            tokens.append(count)
            reasons.append(reason)
    return known, {**of_metadata, "turns": turns, "tokens": tokens, "finish_reason": reasons}


class _Part(NamedTuple):
    """Some rollouts of a collection."""

    groups: Sequence[tuple[int, Sequence[Trajectory]]]
    """Groups, or parts of them, with their numbers."""
    failures: Sequence[RolloutFailure]


def _parts(groups: Sequence[Sequence[Trajectory]], failures: Sequence[RolloutFailure]) -> Iterator[_Part]:
    """The rollouts in parts of ROWS_PER_PART at most, the trajectories first; an empty part where there is none."""
    most = ROWS_PER_PART
    part: list[tuple[int, Sequence[Trajectory]]] = []
    size = 0
    for number, group in enumerate(groups):
        for start in range(0, len(group), most):
            some = group if len(group) <= most else group[start : start + most]
            if size + len(some) > most:
                yield _Part(part, ())
                part, size = [], 0
            part.append((number, some))
            size += len(some)
    yield _Part(part, failures[: most - size])
    for start in range(most - size, len(failures), most):
        yield _Part((), failures[start : start + most])


class _Rollouts:
    """Rollouts on their way into a table: the trajectories and, after them, the failures.

    Each method makes one column, with an entry a rollout.
    """

    def __init__(self, part: _Part) -> None:
        self._groups, self._failures = part
        self._trajectories, self._known = _in_columns(list(chain.from_iterable(group for _, group in part.groups)))
        self._nothing = [None] * len(part.failures)

    def known(self, name: str) -> list[Any]:
        """One of the columns of `_in_columns`; a failure has none of it."""
        return self._known[name] + self._nothing

    def of_metadata(self, key: str) -> list[Any]:
        """What the trajectories' metadata have under any other key."""
        return [(trajectory.metadata or {}).get(key) for trajectory in self._trajectories] + self._nothing

    def kind(self) -> pa.Array:
        return _array(["trajectory"] * len(self._trajectories) + ["failure"] * len(self._failures), "string")

    def group(self) -> pa.Array:
        numbers: list[Any] = []
        for number, group in self._groups:
            numbers += [number] * len(group)
        return _array(numbers + self._nothing, "int32")

    def example(self) -> pa.Array:
        return _texts(self._known["id"] + [failure.example_id for failure in self._failures])

    def generation(self) -> pa.Array:
        return _counts(self._known["generation"] + [failure.generation for failure in self._failures])

    def reward(self) -> pa.Array:
        return _array([known_number(each.reward, "reward") for each in self._trajectories] + self._nothing, "double")

    def shaped_rewards(self) -> pa.Array:
        rewards = [trajectory.shaped_rewards for trajectory in self._trajectories]
        return _array([known_numbers(each, "shaped_rewards") for each in rewards] + self._nothing, "list<double>")

    def error(self) -> pa.Array:
        return _texts(self._known["reward_error"] + [stored_text(failure.error) for failure in self._failures])

    def turns(self) -> pa.Array:
        return _array(self.known("turns"), "int32")

    def tokens(self) -> pa.Array:
        return _array(self.known("tokens"), "int32")

    def finish_reason(self) -> pa.Array:
        return _texts(self.known("finish_reason"))

    def metadata(self) -> pa.Array:
        known = [_without_output(trajectory.metadata) for trajectory in self._trajectories]
        for failure in self._failures:
            error = failure.error if isinstance(failure.error, str) else stored_text(failure.error)
            generation = int(failure.generation) if is_whole(failure.generation) else None
            known.append({"id": failure.example_id, "generation": generation, "error": error})
        return _json(known, "metadata")

    def output(self) -> pa.Array:
        return _json(self.known("output"), "metadata.output")

    def steps(self) -> pa.Array:
        steps = [encode_steps(failure.steps) for failure in self._failures]
        return _array([None] * len(self._trajectories) + steps, "string")

    # ── of messages ──────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def messages(self) -> _Messages:
        return _Messages(list(chain.from_iterable(trajectory.episode for trajectory in self._trajectories)))

    def as_lists(self, of_messages: pa.Array) -> pa.Array:
        """A column of the messages as lists, one a trajectory; a failure has none."""
        import pyarrow as pa

        offsets, failed = self._episodes
        return pa.ListArray.from_arrays(offsets, of_messages, mask=failed)

    @cached_property
    def _episodes(self) -> tuple[pa.Array, pa.Array]:
        """Where the messages of each rollout begin and end, and which rollouts failed."""
        sizes = self._known["turns"] + [0] * len(self._failures)
        failed = [False] * len(self._trajectories) + [True] * len(self._failures)
        return _offsets(sizes), _array(failed, "bool")


def _without_output(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """The metadata without what has a column of its own and can be long."""
    if not metadata or "output" not in metadata:
        return metadata
    return {name: value for name, value in metadata.items() if name != "output"}


class _Messages:
    """The messages of all trajectories, in order, on their way into a table.

    Each method makes one column, with an entry a message. Only what is asked for is worked out.
    """

    def __init__(self, items: Sequence[EpisodeItem | DPOItem]) -> None:
        self._items = known_items(items)
        self._single = [item if isinstance(item, EpisodeItem) else None for item in self._items]

    def roles(self) -> pa.Array:
        return _array([PREFERENCE if item is None else str(item.role) for item in self._single], "string")

    def contents(self) -> pa.Array:
        return _texts(self._contents)

    def logprobs(self) -> pa.Array:
        return self._logprobs[1]

    def token_ids(self) -> pa.Array:
        return self._listed["token_ids"][1]

    def token_texts(self) -> pa.Array:
        return self._listed["token_texts"][1]

    def prompt_token_ids(self) -> pa.Array:
        return self._listed["prompt_token_ids"][1]

    def entropies(self) -> pa.Array:
        return self._listed["entropies"][1]

    def item_metadata(self) -> pa.Array:
        """What of the metadata has no column of its own, or does not fit into it."""
        columns = [(key, self._listed[name][0]) for name, (key, _) in LISTED.items()]
        rest: list[Any] = []
        for place, metadata in enumerate(self._metadata):
            if metadata:
                metadata = metadata.copy()
                for key, lists in columns:
                    if lists[place] is not None:
                        del metadata[key]
                if self._texts[place] != self._contents[place]:
                    metadata.pop(MessageKey.TOKENS, None)
            rest.append(metadata)
        return _json(rest, "item_metadata")

    def others(self) -> pa.Array:
        """What fits into no column: pairs of responses, logprobs of another form, text that UTF-8 cannot say."""
        others: list[Any] = []
        for item, logprobs, content in zip(self._items, self._logprobs[0], self._contents, strict=True):
            other: dict[str, Any] = {}
            if not isinstance(item, EpisodeItem):
                other[PREFERENCE] = preference(item)
            else:
                if logprobs is None and item.logprobs is not None:
                    other["logprobs"] = item.logprobs
                if not _is_utf8(content):
                    other["content"] = content
            others.append(other or None)
        return _json(others, "messages")

    @cached_property
    def _metadata(self) -> list[dict[str, Any] | None]:
        return [None if item is None else item.metadata for item in self._single]

    @cached_property
    def _texts(self) -> list[str]:
        return ["" if item is None else item.content for item in self._single]

    @cached_property
    def _contents(self) -> list[str]:
        """The texts without the secrets in them."""
        return redact_texts(self._texts)

    @cached_property
    def _logprobs(self) -> tuple[list[Any], pa.Array]:
        return _lists([None if item is None else item.logprobs for item in self._single], float)

    @cached_property
    def _listed(self) -> Mapping[str, tuple[list[Any], pa.Array]]:
        """Of each column in LISTED: the lists that fit into it, None in place of the others, and the column."""
        found = {}
        for name, (key, kind) in LISTED.items():
            values = [metadata.get(key) if metadata else None for metadata in self._metadata]
            if name == "token_texts":
                # A text that had a secret in it is not spelt out in pieces either.
                for place, (text, content) in enumerate(zip(self._texts, self._contents, strict=True)):
                    if text != content:
                        values[place] = None
            found[name] = _lists(values, kind, "float16" if name == "entropies" else "float32")
        return found


# ── the columns ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FileColumn:
    """A column with one value a rollout."""

    type: str
    """Its Arrow type."""
    make: Callable[[Any], pa.Array]
    """Makes it of the _Rollouts that are to be written."""
    since: int = 1
    """The first FORMAT that has it. In a file of an earlier one, its values are missing."""
    required: bool = False
    """Whether every file since then must have it. Where a file lacks another one, its values are missing."""
    wider: str | None = None
    """The type that it has where a value does not fit into `type`."""


class MessageColumn(FileColumn):
    """A column with one list a trajectory, which has an entry for each message of the episode. `make` gets _Messages, and
    makes an array of the entries."""


COLUMNS: dict[str, FileColumn] = {
    "kind": FileColumn("string", _Rollouts.kind, required=True),
    "group": FileColumn("int32", _Rollouts.group, required=True),
    "example": FileColumn("string", _Rollouts.example),
    "generation": FileColumn("int64", _Rollouts.generation),
    "reward": FileColumn("double", _Rollouts.reward, required=True),
    "shaped_rewards": FileColumn("list<double>", _Rollouts.shaped_rewards),
    "error": FileColumn("string", _Rollouts.error),
    "turns": FileColumn("int32", _Rollouts.turns),
    "tokens": FileColumn("int32", _Rollouts.tokens),
    "policy_version": FileColumn("int64", lambda rollouts: _counts(rollouts.known("policy_version"))),
    "finish_reason": FileColumn("string", _Rollouts.finish_reason),
    "scores": FileColumn("string", lambda rollouts: _json(rollouts.known("scores"), "metadata.scores")),
    "output": FileColumn("string", _Rollouts.output, since=2),
    "metadata": FileColumn("string", _Rollouts.metadata, required=True),
    "steps": FileColumn("string", _Rollouts.steps),
    "roles": MessageColumn("list<string>", _Messages.roles, required=True),
    "contents": MessageColumn("list<string>", _Messages.contents, required=True),
    "logprobs": MessageColumn("list<list<float>>", _Messages.logprobs, wider="list<list<double>>"),
    "token_ids": MessageColumn("list<list<int32>>", _Messages.token_ids, wider="list<list<int64>>"),
    "token_texts": MessageColumn("list<list<string>>", _Messages.token_texts),
    "prompt_token_ids": MessageColumn("list<list<int32>>", _Messages.prompt_token_ids, wider="list<list<int64>>"),
    "entropies": MessageColumn("list<list<halffloat>>", _Messages.entropies, since=3, wider="list<list<double>>"),
    "item_metadata": MessageColumn("list<string>", _Messages.item_metadata),
    "others": MessageColumn("list<string>", _Messages.others),
}
"""All columns of the file. To add one, add its line, with the next number as `since`: older files then read as if they
had it with no value in it."""
FORMAT = max(column.since for column in COLUMNS.values())
"""What is written."""
OLDEST_READER = 1
"""The earliest FORMAT whose releases can read what is written, as they ignore columns that they do not know. To be raised
where a column gets another meaning."""


def table_of(
    groups: Sequence[Sequence[Trajectory]], failures: Sequence[RolloutFailure], names: Iterable[str] = tuple(COLUMNS)
) -> pa.Table:
    """Rollouts as a table: the trajectories in the groups' order and, after them, the failures.

    Args:
        groups: The trajectories.
        failures: The rollouts that failed.
        names: The columns to make. Default: all.

    Returns:
        The columns, in that order.
    """
    return _table_of(_Part(list(enumerate(groups)), failures), names)


def _table_of(part: _Part, names: Iterable[str] = tuple(COLUMNS)) -> pa.Table:
    import pyarrow as pa

    rollouts = _Rollouts(part)
    columns: dict[str, pa.Array] = {}
    for name in names:
        column = COLUMNS[name]
        if isinstance(column, MessageColumn):
            columns[name] = rollouts.as_lists(column.make(rollouts.messages))
        else:
            columns[name] = column.make(rollouts)
    return pa.table(columns)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of all rows, with the wider type of a column where any of the tables has that."""
    import pyarrow as pa

    wide = frozenset().union(*map(_wide_columns, tables))
    return pa.concat_tables([_widened(table, wide) for table in tables])


def _wide_columns(table: pa.Table) -> frozenset[str]:
    """The columns that have their wider type."""
    wide = [name for name in table.column_names if _is_wide(table, name)]
    return frozenset(wide)


def _is_wide(table: pa.Table, name: str) -> bool:
    wider = COLUMNS[name].wider
    return wider is not None and table.schema.field(name).type == _arrow_type(wider)


def _widened(table: pa.Table, wide: Iterable[str]) -> pa.Table:
    """The same with the wider type of those columns."""
    for name in wide:
        if not _is_wide(table, name):
            column = table.column(name).combine_chunks()
            table = table.set_column(table.column_names.index(name), name, _of_doubles_or_longs(column))
    return table


def _of_doubles_or_longs(array: pa.Array) -> pa.Array:
    import pyarrow as pa

    if pa.types.is_list(array.type):
        offsets = pa.array(array.offsets.to_numpy())  # of a slice, they cannot be taken as they are
        return pa.ListArray.from_arrays(offsets, _of_doubles_or_longs(array.values), mask=array.is_null())
    return pa.array(array.to_numpy().astype("int64" if pa.types.is_integer(array.type) else "float64"))


# ── values -> an array ───────────────────────────────────────────────────────────────────────────────────────────────


def _arrow_type(name: str) -> Any:
    """The type that Arrow calls that: "list<int64>"."""
    import pyarrow as pa

    if name.startswith("list<"):
        return pa.list_(_arrow_type(name.removeprefix("list<").removesuffix(">")))
    return pa.type_for_alias(name)


def _array(values: Sequence[Any], type: str) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, _arrow_type(type))


def _lists(values: Sequence[Any], kind: type, narrowest: str = "float32") -> tuple[list[Any], pa.Array]:
    """The values that are lists of `kind` and nothing else (None for all others), and the column of them. narrowest: the type
    for floats that it holds exactly."""
    import numpy as np
    import pyarrow as pa

    lists = [value if type(value) is list else None for value in values]
    try:
        flat = _flat(lists, kind, narrowest)
    except (TypeError, OverflowError, UnicodeError):
        # Some list has an entry that does not fit: find out which ones.
        lists = [value if value is not None and _fits(value, kind) else None for value in lists]
        flat = _flat(lists, kind, narrowest)
    absent = np.fromiter((value is None for value in lists), bool, len(lists))
    return lists, pa.ListArray.from_arrays(_offsets([len(value or ()) for value in lists]), flat, mask=pa.array(absent))


def _fits(value: list[Any], kind: type) -> bool:
    try:
        _flat([value], kind)
    except (TypeError, OverflowError, UnicodeError):
        return False
    return True


def _flat(lists: Sequence[list[Any] | None], kind: type, narrowest: str = "float32") -> pa.Array:
    """All entries, one list after another, in the narrowest type that holds them exactly."""
    import numpy as np
    import pyarrow as pa

    entries = list(chain.from_iterable(filter(None, lists)))
    if not {kind}.issuperset(map(type, entries)):
        raise TypeError
    if kind is str:
        return pa.array(entries, pa.string())
    if kind is int:
        whole = np.fromiter(entries, np.int64, len(entries))
        narrow = whole.astype(np.int32)
    else:
        whole = np.fromiter(entries, np.float64, len(entries))
        with np.errstate(over="ignore"):
            narrow = whole.astype(narrowest)
    exact = np.array_equal(narrow, whole, equal_nan=kind is float)
    return pa.array(narrow if exact else whole, from_pandas=False)


def _offsets(sizes: Sequence[int]) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    return pa.array(np.cumsum([0, *sizes], dtype=np.int64), pa.int32())


def _counts(values: Sequence[Any]) -> pa.Array:
    """Whole numbers; None for what is none, or does not fit into 64 bits."""
    known = values
    if not all_of({int, type(None)}, values):
        known = [int(value) if is_whole(value) else None for value in values]
    try:
        return _array(known, "int64")
    except OverflowError:
        return _array([None if value is None or abs(value) >= 2**63 else value for value in known], "int64")


def _json(values: Sequence[Any], field: str) -> pa.Array:
    return _array(encode_all(values, field), "string")


def _texts(values: Sequence[Any]) -> pa.Array:
    """Texts to read and to group by. What UTF-8 cannot say is written as an escape."""
    if all_of({str, type(None)}, values):
        texts = redact_texts(values)
    else:
        texts = [None if value is None else stored_text(value) for value in values]
    try:
        return _array(texts, "string")
    except UnicodeError:
        return _array([text and text.encode("utf-8", "backslashreplace").decode() for text in texts], "string")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


# ── table -> trajectories ────────────────────────────────────────────────────────────────────────────────────────────

_VALUES_AT_LEAST = 20_000_000
_VALUES_PER_BYTE = 1000
"""A file may claim that many values in a column, and that many for each of its bytes: a column of one value that is
repeated takes almost no bytes, and any memory."""
_EMPTY_GROUPS = 100_000
"""More of them than that are no record but an attack on the memory."""


def collection_of(table: pa.Table, run_id: str, groups: int | None) -> TrajectoryCollection:
    """The trajectories and failures of a table.

    Args:
        table: It has the columns of COLUMNS. Those that it lacks and need not have are missing values.
        run_id: Of the run that sampled them.
        groups: How many there were, empty ones too. None: group by example, in the order in which they first appear.

    Raises:
        ValueError: A value does not fit.
    """
    if groups is not None and not 0 <= groups <= len(table) + _EMPTY_GROUPS:
        raise ValueError(f"{groups} groups for {len(table)} rows")
    table = _completed(table, COLUMNS)
    of_rows = _values(table, ("kind", "group", "reward", "shaped_rewards", "output", "metadata", "steps"))
    of_messages = _values(table, ("roles", "contents", "logprobs", "item_metadata", "others", *LISTED))

    by_number: list[list[Trajectory]] = [[] for _ in range(groups or 0)]
    by_example: dict[str, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    for row, (values, lists) in enumerate(zip(of_rows, of_messages, strict=True)):
        try:
            kind, group, reward, shaped, output, metadata, steps = values
            if kind == "failure":
                failures.append(_failure(metadata, steps))
                continue
            if kind != "trajectory" or reward is None or None in lists or len({len(each) for each in lists}) != 1:
                raise ValueError("neither a trajectory nor a failure")
            known = None if metadata is None else decode(metadata, dict)
            if output is not None:
                known = {**(known or {}), "output": decode(output)}
            trajectory = Trajectory.model_construct(
                episode=[_item(*each) for each in zip(*lists, strict=True)],
                reward=reward,
                shaped_rewards=shaped,
                metadata=known,
            )
            if groups is None:
                by_example.setdefault(encode((known or {}).get("id")), []).append(trajectory)
            elif group is None or not 0 <= group < groups:
                raise ValueError(f"group {group} of {groups}")
            else:
                by_number[group].append(trajectory)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"row {row}: {type(error).__name__}: {error}") from error
    trajectories = list(by_example.values()) if groups is None else by_number
    return TrajectoryCollection.model_construct(trajectories=trajectories, run_id=run_id, failures=failures)


def _values(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of those columns, row by row."""
    columns = [to_python(table.column(name).combine_chunks()) for name in names]
    return zip(*columns, strict=True)


def _failure(metadata: Any, steps: Any) -> RolloutFailure:
    known = decode(metadata, dict)
    example, generation, error = known["id"], known["generation"], known["error"]
    if not (generation is None or type(generation) is int) or not isinstance(error, str):
        raise ValueError("a failure without generation or error")
    # A generation that was none is missing, not 0.
    return RolloutFailure(example, generation, error, [] if steps is None else decode_steps(steps))  # type: ignore[arg-type]


def _item(role: Any, content: Any, logprobs: Any, metadata: Any, others: Any, *listed: Any) -> EpisodeItem | DPOItem:
    other = {} if others is None else decode(others, dict)
    if role == PREFERENCE:
        return DPOItem.model_validate(other.get(PREFERENCE))
    content = other.get("content", content)
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"a message of role {role!r}")
    known = None if metadata is None else decode(metadata, dict)
    for (key, _), value in zip(LISTED.values(), listed, strict=True):
        if value is not None:
            known = {} if known is None else known
            known[key] = value
    logprobs = other.get("logprobs") if logprobs is None else logprobs
    return EpisodeItem.model_construct(role=ROLES[role], content=content, logprobs=logprobs, metadata=known)


def to_python(array: pa.Array) -> list[Any]:
    """Like `to_pylist`, which makes an object of Arrow's for every token on the way."""
    import pyarrow as pa

    if pa.types.is_list(array.type):
        entries = to_python(array.values)
        parts: list[Any] = [entries[start:stop] for start, stop in pairwise(array.offsets.to_pylist())]
        if array.null_count:
            for place, there in enumerate(array.is_valid().to_pylist()):
                if not there:
                    parts[place] = None
        return parts
    if array.null_count == 0 and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return array.to_numpy().tolist()
    if array.null_count == len(array):
        return [None] * len(array)
    return array.to_pylist()


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = b"finetune_nb"
"""Under which the schema's metadata say what the file is."""
TOKENS_PER_GROUP = 500_000
"""Tokens in a row group, about: to read one rollout, all of its row group is decoded."""
ROWS_PER_GROUP = 8192
"""At most, however short they are."""
CHARACTERS_PER_TOKEN = 4
"""About: of a message that was not sampled, the tokens were not counted."""


def _leaf(name: str) -> str:
    """The path of the column's values inside its lists, as Parquet spells it."""
    return name + ".list.element" * COLUMNS[name].type.count("list<")


_DICTIONARY = [_leaf(name) for name, column in COLUMNS.items() if "string" in column.type]
_DICTIONARY.append(_leaf("token_ids"))
"""Columns in which the same values come again and again. Prompt ids stay plain: those of a turn begin with those of the
turn before it, which zstd finds where bytes are aligned."""
_SPLIT = {_leaf("logprobs"): "BYTE_STREAM_SPLIT"}


def _storable(part: _Part) -> pa.Table:
    """The table of a part. A rollout that cannot be written is written with less: a failed one without its steps, then
    with its example and reward alone; no other rollout loses anything by it. What was left out is noted."""
    table = attempt(_table_of, part)
    if table is not FAILED:
        return table
    groups: list[tuple[int, Sequence[Trajectory]]] = []
    for number, group in part.groups:
        groups.append((number, [_with_less(trajectory) for trajectory in group]))
    return _table_of(_Part(groups, [_failure_with_less(failure) for failure in part.failures]))


def _with_less(trajectory: Trajectory) -> Trajectory:
    if attempt(lambda each: table_of([[each]], ()), trajectory) is not FAILED:
        return trajectory
    note_replaced("trajectory", "one that cannot be written: its messages are left out")
    metadata = attempt(lambda each: {name: each.metadata.get(name) for name in ("id", "generation")}, trajectory)
    known = {} if metadata is FAILED else plain(metadata, "metadata")
    reward = attempt(lambda each: known_number(each.reward, "reward"), trajectory)
    return Trajectory.model_construct(
        episode=[], reward=math.nan if reward is FAILED else reward, shaped_rewards=None, metadata=known
    )


def _failure_with_less(failure: RolloutFailure) -> RolloutFailure:
    if attempt(lambda each: table_of((), [each]), failure) is not FAILED:
        return failure
    note_replaced("steps", "those of a failed rollout that cannot be written")
    return RolloutFailure(plain(failure.example_id, "id"), failure.generation, stored_text(failure.error))


def write_trajectories(folder: Path, epoch: int, run_id: str, collection: TrajectoryCollection) -> int:
    """Writes an epoch's file. One that an earlier attempt left is replaced.

    Returns:
        The file's size in bytes.

    Raises:
        StoreError: It could not be written; the folder is then as it was.
    """
    import pyarrow as pa

    path = trajectory_file(folder, epoch)
    try:
        about = {
            "format": FORMAT,
            "reader": OLDEST_READER,
            "run_id": run_id,
            "collection": collection.run_id,
            "epoch": epoch,
            "groups": len(collection.trajectories),
        }
        check_plain(path.parent)
        path.parent.mkdir(exist_ok=True)
        write_durably(path, lambda file: _write_parts(file, collection, {KEY: encode(about)}))
        return os.stat(path).st_size
    except (OSError, pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(
            f"{path} could not be written: {type(error).__name__}: {error}. Epoch {epoch} is not recorded; everything "
            "before it is kept. Remove the cause (a full disk, say) and append the epoch again."
        ) from error


def _write_parts(file: BinaryIO, collection: TrajectoryCollection, metadata: Mapping[Any, Any]) -> None:
    """Writes a collection part by part, so that only a row group or two of it is in memory as columns."""
    wide: frozenset[str] = frozenset()
    while (wider := _write_with(file, collection, metadata, wide)) is not None:
        wide = wider  # a column cannot become wider in the middle of a file
        file.seek(0)
        file.truncate()


def _write_with(
    file: BinaryIO, collection: TrajectoryCollection, metadata: Mapping[Any, Any], wide: frozenset[str]
) -> frozenset[str] | None:
    """Writes a collection with the wider type of those columns and of those that need it in the first row group. If a later one
    needs it for others, the file is not complete: returns all of them, to begin with."""
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    with ExitStack() as stack:
        for table in _row_group_tables(map(_storable, _parts(collection.trajectories, collection.failures))):
            found = _wide_columns(table)
            if writer is None:
                wide |= found
                table = _widened(table, wide)
                writer = stack.enter_context(
                    pq.ParquetWriter(
                        file,
                        table.schema.with_metadata(metadata),
                        compression="zstd",
                        use_dictionary=_DICTIONARY,  # type: ignore[arg-type]  # the stubs know the bool only
                        column_encoding=_SPLIT,
                        write_statistics=False,
                        write_page_checksum=True,
                    )
                )
            elif not found <= wide:
                return wide | found
            writer.write_table(_widened(table, wide), row_group_size=ROWS_PER_GROUP)
    return None


def _row_group_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables with consecutive rows -> one a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) < 2 * ROWS_PER_GROUP:
            continue
        together = _joined(waiting)
        *bounds, last = _row_groups(together)[:-1]
        for start, stop in pairwise([*bounds, last]):
            yield together.slice(start, stop - start)
        waiting = [together.slice(last)]
    together = _joined(waiting)
    for start, stop in pairwise(_row_groups(together)):
        yield together.slice(start, stop - start)


def _row_groups(table: pa.Table) -> list[int]:
    """Where the row groups begin, and where the last one ends. Rollouts of one group stay together, as far as they fit."""
    import numpy as np
    import pyarrow.compute as pc

    contents = table.column("contents").combine_chunks()
    characters = np.zeros(len(contents.values) + 1, np.int64)
    lengths: Any = pc.call_function("binary_length", [contents.values])
    np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), out=characters[1:])
    read = np.diff(characters[contents.offsets.to_numpy()]) // CHARACTERS_PER_TOKEN
    sampled = pc.fill_null(table.column("tokens"), 0).to_numpy()
    tokens = np.maximum(read, sampled).tolist()
    group_of = pc.fill_null(table.column("group"), -1).to_pylist()

    bounds, size = [0], 0
    begin = 0  # of the group of rollouts that the row is in
    for row, cost in enumerate(tokens):
        if row and group_of[row] != group_of[row - 1]:
            begin = row
        if size and (size + cost > TOKENS_PER_GROUP or row - bounds[-1] >= ROWS_PER_GROUP):
            bounds.append(begin if begin > bounds[-1] else row)
            size = sum(tokens[bounds[-1] : row])
        size += cost
    return [*bounds, len(tokens)]


def read_trajectories(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> TrajectoryCollection:
    """The trajectories and failures of an epoch.

    Args:
        folder: The run's folder.
        epoch: Its number.
        run_id: Of the run.
        rows: How many of them there are, as run.db says.
        groups: In how many groups.

    Raises:
        StoreError: The file is missing, damaged, or not the one of that epoch.
    """
    with _reading(folder, epoch, run_id, rows, groups) as (file, about):
        return collection_of(_read(file, COLUMNS), about["collection"], groups)


def read_columns(folder: Path, epoch: int, run_id: str, rows: int, groups: int, names: Sequence[str]) -> pa.Table:
    """Some columns of an epoch, by their names in COLUMNS; nothing else is read.

    Args:
        folder: The run's folder.
        epoch: Its number.
        run_id: Of the run.
        rows: How many rows there are, as run.db says.
        groups: How many groups.
        names: The columns. One that the file need not have, and has not, comes as missing values.

    Raises:
        StoreError: There is no such column, or the file is missing, damaged, or not the one of that epoch.
    """
    if unknown := [name for name in names if name not in COLUMNS]:
        raise StoreError(f"found columns {unknown}; the file of an epoch has {', '.join(COLUMNS)}.")
    with _reading(folder, epoch, run_id, rows, groups) as (file, _):
        return _read(file, names)


def read_row_group(
    folder: Path, epoch: int, run_id: str, rows: int, groups: int, row: int, names: Iterable[str] = tuple(COLUMNS)
) -> tuple[int, pa.Table]:
    """The row group that a row is in: the smallest part of the file that can be read.

    Args:
        folder: The run's folder.
        epoch: Its number.
        run_id: Of the run.
        rows: How many rows there are, as run.db says.
        groups: How many groups.
        row: The row's place in the file, from 0.
        names: The columns. Default: all.

    Returns:
        The place in the file of the table's first row, and the table.

    Raises:
        StoreError: There is no such row, or the file is missing, damaged, or not the one of that epoch.
    """
    if not 0 <= row < rows:
        raise StoreError(f"found row {row}; epoch {epoch} has rows 0 to {rows - 1}.")
    with _reading(folder, epoch, run_id, rows, groups) as (file, _):
        first = 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if row < first + count:
                return first, _read(file, names, number)
            first += count
        raise ValueError(f"no row group has row {row}")


def _read(file: Any, names: Iterable[str], row_group: int | None = None) -> pa.Table:
    """Those columns: of one row group, or of the whole file."""
    there = set(file.schema_arrow.names)
    wanted = [name for name in names if name in there]
    lacking = [name for name in names if name not in there]
    if "roles" not in wanted and any(isinstance(COLUMNS[name], MessageColumn) for name in lacking):
        wanted.append("roles")  # how many messages there are is said by nothing else
    if row_group is None:
        table = file.read(wanted, use_threads=False)
    else:
        table = file.read_row_group(row_group, wanted, use_threads=False)
    table = _checked(table)
    return _completed(table, names) if lacking else table


def _completed(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """Those columns of the table; one that it lacks has missing values only."""
    import pyarrow as pa

    there = set(table.column_names)
    columns: dict[str, Any] = {}
    for name in names:
        type = _arrow_type(COLUMNS[name].type)
        if name in there:
            columns[name] = table.column(name)
        elif isinstance(COLUMNS[name], MessageColumn):
            # The lists are there, as long as the episodes; what is missing is what they say of each message.
            roles = table.column("roles").combine_chunks()
            nothing = pa.nulls(len(roles.values), type.value_type)
            columns[name] = pa.ListArray.from_arrays(roles.offsets, nothing, mask=roles.is_null())
        else:
            columns[name] = pa.nulls(len(table), type)
    return pa.table(columns)


def _check_columns(schema: pa.Schema, format: int) -> None:
    """Raises ValueError where a column has another type, or one is missing that every file of that format has. Columns
    that are not in COLUMNS are of a later release, and nobody asks for them."""
    types = {field.name: str(field.type).replace("element: ", "").replace("item: ", "") for field in schema}
    for name, column in COLUMNS.items():
        found, expected = types.get(name), [each for each in (column.type, column.wider) if each is not None]
        if found is None:
            if column.required and column.since <= format:
                raise ValueError(f"column {name} is missing, expected {expected[0]}; every file has it")
        elif found not in expected:
            raise ValueError(f"column {name} is {found}, expected {' or '.join(expected)}")


@contextmanager
def _reading(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open Parquet file and what it says of itself, once its columns and counts are found to be the expected ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trajectory_file(folder, epoch)
    try:
        check_plain(path.parent, path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            about = _about(file)
            _check_columns(file.schema_arrow, about["format"])
            found = (about["run_id"], about["epoch"], about["groups"], file.metadata.num_rows)
            if found != (run_id, epoch, groups, rows):
                raise ValueError(
                    "run, epoch, groups and rows are {!r}, {!r}, {!r}, {!r}".format(*found)
                    + f"; run.db says {run_id!r}, {epoch}, {groups}, {rows}"
                )
            _check_claims(file.metadata, path.stat().st_size)
            yield file, about
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


def _check_claims(about: Any, size: int) -> None:
    """Raises ValueError where reading the file would take more memory than an epoch can need."""
    most = _VALUES_AT_LEAST + _VALUES_PER_BYTE * size
    for column in range(about.num_columns):
        found = sum(about.row_group(group).column(column).num_values for group in range(about.num_row_groups))
        if found > most:
            raise ValueError(f"{found:,} values in a column of a file of {size:,} bytes; expected at most {most:,}")


def _about(file: Any) -> dict[str, Any]:
    """What the file says of itself. Raises ValueError where this release cannot read it."""
    about = decode(((file.schema_arrow.metadata or {}).get(KEY) or b"").decode("ascii", "replace"), dict)
    format = about.get("format")
    reader = about.get("reader", format)
    if type(format) is not int or type(reader) is not int or not reader <= FORMAT:
        raise ValueError(f"format {format!r}, expected {FORMAT}; update finetune_nb to read a newer one")
    if not isinstance(about.get("collection"), str):
        raise ValueError("it does not say which run it belongs to")
    return about


def _checked(table: pa.Table) -> pa.Table:
    table.validate(full=True)
    return table


# ── batches of an unfinished epoch ───────────────────────────────────────────────────────────────────────────────────


ROWS_PER_BATCH = 4096
"""At most: SQLite takes no value of more than a gigabyte."""


def batches_of(collection: TrajectoryCollection, whole: bool) -> Iterator[tuple[bytes, bool]]:
    """Rollouts of an unfinished epoch as bytes, in one batch or several.

    Args:
        collection: The rollouts.
        whole: Whether these are all of the epoch's, so that their groups are kept. They are then read again if all of these
            batches are there.

    Yields:
        A batch, and whether it is the last one.

    Raises:
        StoreError: A rollout cannot be written down.
    """
    import pyarrow as pa

    # A part ends where a group does not fit, so parts are counted and not rows.
    parts, together = list(_parts(collection.trajectories, collection.failures)), ROWS_PER_BATCH // ROWS_PER_PART
    count = math.ceil(len(parts) / together)
    about: dict[str, Any] = {"groups": len(collection.trajectories)}
    if count > 1:  # under another key, so that an earlier release does not take one of them for all
        about = {"set": uuid.uuid4().hex, "batches": count, "groups_in_all": len(collection.trajectories)}
    try:
        for number in range(1, count + 1):
            table = _joined(list(map(_storable, parts[(number - 1) * together : number * together])))
            if whole:
                table = table.replace_schema_metadata({KEY: encode(about)})
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
                writer.write_table(table)
            yield sink.getvalue().to_pybytes(), number == count
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(f"a rollout cannot be written down: {type(error).__name__}: {error}.") from error


DecodedBatches = dict[bytes, TrajectoryCollection]
"""Batches of rollouts, or all batches of a whole epoch, by the digest of their bytes."""


def collection_of_batches(
    batches: Sequence[bytes], run_id: str, decoded: DecodedBatches | None = None
) -> TrajectoryCollection:
    """The rollouts of several batches, grouped by example; those of a whole epoch are alone, and in their own groups.

    Args:
        batches: As `batches_of` makes them.
        run_id: Of the run.
        decoded: What earlier calls have decoded, which is not decoded again: whoever reads an epoch again and again while it
            grows keeps it, and changes nothing in what is returned. Left with the batches of this call.

    Raises:
        StoreError: No batch can be read.
    """
    import pyarrow as pa

    unreadable = (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError)
    read = _Batches(run_id, decoded)
    whole: dict[str, list[bytes]] = {}
    said: dict[str, dict[str, Any]] = {}
    others: list[tuple[int, bytes]] = []
    for number, batch in enumerate(batches):
        try:
            about = _about_batch(batch)
        except unreadable as error:
            read.note(number, error)
            continue
        if about is None:
            others.append((number, batch))
        else:
            name = str(about.get("set"))
            said[name] = about
            whole.setdefault(name, []).append(batch)

    # The newest one that was written to its end; an attempt that was not is passed over.
    for name, found in reversed(whole.items()):
        if len(found) == said[name].get("batches", 1):
            try:
                return read.decode(found, said[name]["groups" if len(found) == 1 else "groups_in_all"])
            except unreadable as error:
                read.note(batches.index(found[0]), error)

    groups: dict[Any, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    for number, batch in others:
        try:
            found = read.decode([batch], None)
        except unreadable as error:
            read.note(number, error)
            continue
        for group in found.trajectories:
            groups.setdefault(encode((group[0].metadata or {}).get("id")), []).extend(group)
        failures += found.failures
    if read.errors and not groups and not failures:
        raise read.errors[0]
    for each in read.errors:
        logger.warning("%s The other batches are shown.", each)
    return TrajectoryCollection.model_construct(trajectories=list(groups.values()), run_id=run_id, failures=failures)


class _Batches:
    """Decodes batches, and keeps what it decoded for the next time."""

    def __init__(self, run_id: str, decoded: DecodedBatches | None) -> None:
        self._run_id, self._decoded = run_id, decoded
        self._known = dict(decoded or {})
        self.errors: list[StoreError] = []
        if decoded is not None:
            decoded.clear()

    def decode(self, batches: Sequence[bytes], groups: int | None) -> TrajectoryCollection:
        """The rollouts of batches that belong together. groups: as `collection_of` takes it."""
        if self._decoded is None:
            return self._collection(batches, groups)
        digest = hashlib.blake2b(digest_size=16)
        for batch in batches:
            digest.update(batch)
        key = digest.digest()
        found = self._decoded[key] = self._known.get(key) or self._collection(batches, groups)
        return found

    def _collection(self, batches: Sequence[bytes], groups: int | None) -> TrajectoryCollection:
        return collection_of(_joined(list(map(_table_of_batch, batches))), self._run_id, groups)

    def note(self, number: int, error: Exception) -> None:
        """Notes that a batch cannot be read."""
        problem = f"{type(error).__name__}: {str(error)[:500]}"
        what = f"batch {number} of the rollouts of the unfinished epoch cannot be read: {problem}."
        self.errors.append(StoreError(f"{what} Completed epochs are not touched by that."))


def _about_batch(batch: bytes) -> dict[str, Any] | None:
    """What a batch of a whole epoch says of it; None for one of single rollouts."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(batch)) as reader:
        about = (reader.schema.metadata or {}).get(KEY)
    return None if about is None else decode(about.decode("ascii", "replace"), dict)


def _table_of_batch(batch: bytes) -> pa.Table:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(batch)) as reader:
        table = _checked(reader.read_all())
    # A batch does not say its format: a column that came later than the first one may be missing from any.
    _check_columns(table.schema, format=1)
    return table.replace_schema_metadata(None)
