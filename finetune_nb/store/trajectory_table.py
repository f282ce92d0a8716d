"""Rollouts as an Arrow table, one row a trajectory or failed rollout, and back. `COLUMNS` declares what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ..redaction import redact_texts
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
from .arrays import (
    array_of,
    arrow_type,
    counts_of,
    is_utf8,
    json_of,
    lists_of,
    of_doubles_or_longs,
    offsets_of,
    texts_of,
    to_python,
)
from .json import FAILED, attempt, decode, decode_steps, encode, encode_steps, note_replaced, plain
from .nearest import (
    ROLES,
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
    "FORMAT",
    "KEY",
    "LISTED",
    "OLDEST_READER",
    "PREFERENCE",
    "FileColumn",
    "MessageColumn",
    "Part",
    "check_columns",
    "checked",
    "collection_of",
    "completed",
    "joined",
    "parts",
    "storable",
    "table_of",
    "wide_columns",
    "widened",
]

KEY = b"finetune_nb"
"""Under which the metadata of a table's schema say what it is."""
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


class Part(NamedTuple):
    """Some rollouts of a collection."""

    groups: Sequence[tuple[int, Sequence[Trajectory]]]
    """Groups, or parts of them, with their numbers."""
    failures: Sequence[RolloutFailure]


def parts(groups: Sequence[Sequence[Trajectory]], failures: Sequence[RolloutFailure]) -> Iterator[Part]:
    """The rollouts in parts of ROWS_PER_PART at most, the trajectories first; an empty part where there is none."""
    most = ROWS_PER_PART
    part: list[tuple[int, Sequence[Trajectory]]] = []
    size = 0
    for number, group in enumerate(groups):
        for start in range(0, len(group), most):
            some = group if len(group) <= most else group[start : start + most]
            if size + len(some) > most:
                yield Part(part, ())
                part, size = [], 0
            part.append((number, some))
            size += len(some)
    yield Part(part, failures[: most - size])
    for start in range(most - size, len(failures), most):
        yield Part((), failures[start : start + most])


class _Rollouts:
    """Rollouts on their way into a table: the trajectories and, after them, the failures.

    Each method makes one column, with an entry a rollout.
    """

    def __init__(self, part: Part) -> None:
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
        return array_of(["trajectory"] * len(self._trajectories) + ["failure"] * len(self._failures), "string")

    def group(self) -> pa.Array:
        numbers: list[Any] = []
        for number, group in self._groups:
            numbers += [number] * len(group)
        return array_of(numbers + self._nothing, "int32")

    def example(self) -> pa.Array:
        return texts_of(self._known["id"] + [failure.example_id for failure in self._failures])

    def generation(self) -> pa.Array:
        return counts_of(self._known["generation"] + [failure.generation for failure in self._failures])

    def reward(self) -> pa.Array:
        return array_of([known_number(each.reward, "reward") for each in self._trajectories] + self._nothing, "double")

    def shaped_rewards(self) -> pa.Array:
        rewards = [trajectory.shaped_rewards for trajectory in self._trajectories]
        return array_of([known_numbers(each, "shaped_rewards") for each in rewards] + self._nothing, "list<double>")

    def error(self) -> pa.Array:
        return texts_of(self._known["reward_error"] + [stored_text(failure.error) for failure in self._failures])

    def turns(self) -> pa.Array:
        return array_of(self.known("turns"), "int32")

    def tokens(self) -> pa.Array:
        return array_of(self.known("tokens"), "int32")

    def finish_reason(self) -> pa.Array:
        return texts_of(self.known("finish_reason"))

    def metadata(self) -> pa.Array:
        known = [_without_output(trajectory.metadata) for trajectory in self._trajectories]
        for failure in self._failures:
            error = failure.error if isinstance(failure.error, str) else stored_text(failure.error)
            generation = int(failure.generation) if is_whole(failure.generation) else None
            known.append({"id": failure.example_id, "generation": generation, "error": error})
        return json_of(known, "metadata")

    def output(self) -> pa.Array:
        return json_of(self.known("output"), "metadata.output")

    def steps(self) -> pa.Array:
        steps = [encode_steps(failure.steps) for failure in self._failures]
        return array_of([None] * len(self._trajectories) + steps, "string")

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
        return offsets_of(sizes), array_of(failed, "bool")


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
        return array_of([PREFERENCE if item is None else str(item.role) for item in self._single], "string")

    def contents(self) -> pa.Array:
        return texts_of(self._contents)

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
        return json_of(rest, "item_metadata")

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
                if not is_utf8(content):
                    other["content"] = content
            others.append(other or None)
        return json_of(others, "messages")

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
        return lists_of([None if item is None else item.logprobs for item in self._single], float)

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
            found[name] = lists_of(values, kind, "float16" if name == "entropies" else "float32")
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
    "policy_version": FileColumn("int64", lambda rollouts: counts_of(rollouts.known("policy_version"))),
    "finish_reason": FileColumn("string", _Rollouts.finish_reason),
    "scores": FileColumn("string", lambda rollouts: json_of(rollouts.known("scores"), "metadata.scores")),
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
    return _table_of(Part(list(enumerate(groups)), failures), names)


def _table_of(part: Part, names: Iterable[str] = tuple(COLUMNS)) -> pa.Table:
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


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of all rows, with the wider type of a column where any of the tables has that."""
    import pyarrow as pa

    wide = frozenset().union(*map(wide_columns, tables))
    return pa.concat_tables([widened(table, wide) for table in tables])


def wide_columns(table: pa.Table) -> frozenset[str]:
    """The columns that have their wider type."""
    wide = [name for name in table.column_names if _is_wide(table, name)]
    return frozenset(wide)


def _is_wide(table: pa.Table, name: str) -> bool:
    wider = COLUMNS[name].wider
    return wider is not None and table.schema.field(name).type == arrow_type(wider)


def widened(table: pa.Table, wide: Iterable[str]) -> pa.Table:
    """The same with the wider type of those columns."""
    for name in wide:
        if not _is_wide(table, name):
            column = table.column(name).combine_chunks()
            table = table.set_column(table.column_names.index(name), name, of_doubles_or_longs(column))
    return table


def storable(part: Part) -> pa.Table:
    """The table of a part. A rollout that cannot be written is written with less: a failed one without its steps, then
    with its example and reward alone; no other rollout loses anything by it. What was left out is noted."""
    table = attempt(_table_of, part)
    if table is not FAILED:
        return table
    groups: list[tuple[int, Sequence[Trajectory]]] = []
    for number, group in part.groups:
        groups.append((number, [_with_less(trajectory) for trajectory in group]))
    return _table_of(Part(groups, [_failure_with_less(failure) for failure in part.failures]))


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


# ── table -> trajectories ────────────────────────────────────────────────────────────────────────────────────────────

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
    table = completed(table, COLUMNS)
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


def completed(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """Those columns of the table; one that it lacks has missing values only."""
    import pyarrow as pa

    there = set(table.column_names)
    columns: dict[str, Any] = {}
    for name in names:
        type = arrow_type(COLUMNS[name].type)
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


def check_columns(schema: pa.Schema, format: int) -> None:
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


def checked(table: pa.Table) -> pa.Table:
    """The same table. Raises ArrowInvalid, a ValueError, where what was read does not hold together."""
    table.validate(full=True)
    return table
