"""Messages and their sampled tokens as DataFrames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..store.arrays import to_python
from ..store.json import decode, encode
from ..store.trajectory_table import LISTED, PREFERENCE, table_of
from ..types import DPOItem, EpisodeItem, EpisodeItemRole, Epoch, IntermediateStep, LLMCall, Trajectory, logprob_values
from .columns import Column, asked_for, column_of, framed, sources_of
from .trajectories import KEYS, EpochColumns, FramePart, Rollouts, key_columns, positions

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "MESSAGES",
    "TOKENS",
    "messages",
    "tokens",
]


class _Lists(NamedTuple):
    """A column of lists, one per message."""

    column: pa.Array
    odd: Mapping[int, Any]
    """Values that did not fit into the column, by message index: a list of another type, or not a list at all."""

    def lengths(self) -> list[int | None]:
        """Length of each list; None for a message without one."""
        found = self.column.value_lengths().to_pylist()
        for place, value in self.odd.items():
            found[place] = len(value) if isinstance(value, list) else None
        return found

    def means(self) -> np.ndarray:
        """Mean of each list; NaN if it is missing or empty."""
        import numpy as np

        lengths = _lengths(self.column)
        numbers = self.column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        places = np.repeat(np.arange(len(lengths)), lengths)
        sums = np.bincount(places, weights=numbers, minlength=len(lengths))
        found = np.divide(sums, lengths, out=np.full(len(sums), math.nan), where=lengths > 0)
        for place, value in self.odd.items():
            found[place] = _mean(value)
        return found

    def entries(self, places: np.ndarray, sizes: np.ndarray) -> Any:
        """The entries of the lists at the given indices, concatenated. sizes: the expected length of each; the entries of
        a list of another length are missing, as they cannot be matched."""
        import numpy as np

        chosen = self.column.take(places)
        if self.odd.keys().isdisjoint(places.tolist()) and np.array_equal(_lengths(chosen), sizes):
            flat = chosen.flatten()
            is_text = str(flat.type) == "string"
            return flat.to_pylist() if is_text or flat.null_count else flat.to_numpy()
        found: list[Any] = []
        for place, value, size in zip(places.tolist(), to_python(chosen), sizes.tolist(), strict=True):
            value = self.odd.get(place, value)
            fits = isinstance(value, list) and len(value) == size
            found += value if fits else [None] * size
        return found


def _as_json(values: list[Any]) -> list[str | None]:
    """Each value as JSON; None if it is empty."""
    return [encode(value) if value else None for value in values]


MESSAGES = (
    *KEYS,
    Column("failed", "bool"),
    Column("message", "int64"),
    Column("role", "category", source="roles"),
    Column("content", "str", source="contents"),
    Column("tool_calls", "str", source="item_metadata", key="tool_calls", make=_as_json),
    Column("tool_call_id", "str", source="item_metadata", key="tool_call_id"),
    Column("name", "str", source="item_metadata", key="name"),
    Column("finish_reason", "category", source="item_metadata", key="finish_reason"),
    Column("prompt_tokens", "Int64", source="prompt_token_ids", make=_Lists.lengths),
    Column("tokens", "Int64", source="logprobs", make=_Lists.lengths, only="assistant"),
    Column("mean_logprob", "float64", source="logprobs", make=_Lists.means, only="assistant"),
    Column("mean_entropy", "float64", source="entropies", make=_Lists.means, only="assistant"),
    Column("seconds", "float64", source="item_metadata", key="seconds"),
)
"""Columns of `messages`."""
TOKENS = (
    *KEYS,
    Column("message", "int64"),
    Column("position", "int64"),
    Column("token_id", "Int64", source="token_ids"),
    Column("token", "str", source="token_texts"),
    Column("logprob", "float64", source="logprobs"),
    Column("entropy", "float64", source="entropies"),
)
"""Columns of `tokens`."""


def messages(epochs: Iterable[Epoch], example: Any = None, columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one message of an episode, in order. After the trajectories of an epoch come its failed rollouts, with the
    messages of their last model call.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id
    generation       Int64      which of the group's rollouts, from 0
    trajectory       category   as in `trajectories`, to join on
    failed           bool       whether the rollout failed
    message          int64      its index in the episode, from 0
    role             category   "user", "assistant", "system", "tool", ...; "preference" for a pair of responses
    content          str        its text; for a preference the pair, as JSON
    tool_calls       str        its tool calls, as JSON; NaN for none
    tool_call_id     str        the call that it answers
    name             str        name of the tool that it comes from
    finish_reason    category   why the turn ended: "stop", "length", "tool_calls", ...
    prompt_tokens    Int64      tokens in the prompt of the sampled turn
    tokens           Int64      tokens that the policy sampled; 0 for an assistant turn that it did not sample
    mean_logprob     float64    mean logprob of those tokens (natural logarithm); NaN if there are none
    mean_entropy     float64    mean entropy of the policy at those tokens (nats); NaN if it was not recorded
    seconds          float64    duration of the model call
    ================ ========== =============================================================================

    Args:
        epochs: The records.
        example: Only the messages of this example, or of a list of examples. Default: all.
        columns: Only these columns, in this order. Default: all. Only the data that they need is read.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    names = asked_for(columns, [column.name for column in MESSAGES])
    wanted = [column for column in MESSAGES if names is None or column.name in names]
    parts: list[FramePart] = []
    for epoch in epochs:
        parts += _messages_of(epoch, example, wanted)
    return framed(_found(wanted, parts), [column.name for column in MESSAGES] if names is None else names)


def tokens(epochs: Iterable[Epoch], example: Any = None, columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one token that the policy sampled. Failed rollouts have none: they are not trained on.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id
    generation       Int64      which of the group's rollouts, from 0
    trajectory       category   as in `trajectories`, to join on
    message          int64      the turn's index in the episode, from 0
    position         int64      the token's position in its turn, from 0
    token_id         Int64      id in the policy's vocabulary; <NA> if only its logprob is known
    token            str        its text
    logprob          float64    natural logarithm of the probability with which it was sampled
    entropy          float64    entropy of the policy in its place (nats), over its whole vocabulary at temperature 1; NaN if
                                it was not recorded
    ================ ========== =============================================================================

    To get the advantage of each token:
    `run.tokens(epoch=3).merge(run.trajectories(epoch=3, columns=["trajectory", "advantage"]), on="trajectory")`.

    Args:
        epochs: The records.
        example: Only the tokens of this example, or of a list of examples. Default: all.
        columns: Only these columns, in this order. Default: all. Only the data that they need is read.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    names = asked_for(columns, [column.name for column in TOKENS])
    wanted = [column for column in TOKENS if names is None or column.name in names]
    parts = [_tokens_of(epoch, example, wanted) for epoch in epochs]
    return framed(_found(wanted, parts), [column.name for column in TOKENS] if names is None else names)


def _found(wanted: Sequence[Column], parts: Sequence[FramePart]) -> dict[str, Any]:
    """The wanted columns of all parts, and the columns of KEYS."""
    found = key_columns(parts)
    for column in wanted:
        if column not in KEYS:
            found[column.name] = column_of(column, [part.columns[column.name] for part in parts])
    return found


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _messages_of(epoch: Epoch, example: Any, wanted: Sequence[Column]) -> list[FramePart]:
    """The messages of the epoch's trajectories, then those of its failed rollouts."""
    columns = EpochColumns(epoch)
    names = _needed(wanted)
    table = columns.trajectories(["generation", *names])
    rollouts = Rollouts.of(columns, table)
    chosen = columns.of_example(example)
    there, failed = chosen[: columns.rows], chosen[columns.rows :]

    parts = [_messages_in(table.filter(there), epoch, rollouts.first(there), wanted)]
    if failed.any():
        episodes = [_as_far_as_known(steps) for steps in columns.steps(failed)]
        table = table_of([episodes], [], names)
        parts.append(_messages_in(table, epoch, rollouts.last(failed), wanted, failed=True))
    return parts


def _messages_in(
    table: pa.Table, epoch: Epoch, rollouts: Rollouts, wanted: Sequence[Column], failed: bool = False
) -> FramePart:
    import numpy as np

    found = _Messages(table)
    values: dict[str, Any] = {
        "failed": np.full(len(found.roles), failed),
        "message": positions(found.rows),
    }
    for column in wanted:
        if column.source is not None:
            values[column.name] = found.values(column)
    return FramePart(epoch.index, rollouts, found.rows, values)


def _as_far_as_known(steps: Sequence[IntermediateStep]) -> Trajectory:
    """A failed rollout as a trajectory: the prompt and the reply of its last recorded model call."""
    episode: list[EpisodeItem | DPOItem] = []
    calls = [step.data.payload for step in steps if step.data and isinstance(step.data.payload, LLMCall)]
    if calls:
        last = calls[-1]
        for message in last.messages:
            episode.append(_item(str(message.get("role")), message))
        reply = {**last.reply, "finish_reason": last.finish_reason}
        about = {"prompt_token_ids": last.prompt_ids, "seconds": last.seconds}
        episode.append(_item(EpisodeItemRole.ASSISTANT, reply, last.logprobs, **about))
    return Trajectory.model_construct(episode=episode, reward=math.nan, shaped_rewards=None, metadata=None)


def _item(role: str, message: Mapping[str, Any], logprobs: list[float] | None = None, **about: Any) -> EpisodeItem:
    content = message.get("content")
    if content is None:
        content = ""
    elif not isinstance(content, str):
        content = encode(content)
    said = {key: message[key] for key in _SAID if key in message}
    return EpisodeItem.model_construct(role=role, content=content, logprobs=logprobs, metadata={**said, **about})


_SAID = [column.key for column in MESSAGES if column.key is not None and column.key != "seconds"]
"""The fields of a chat message, besides its text, that an item keeps in its metadata."""


def _tokens_of(epoch: Epoch, example: Any, wanted: Sequence[Column]) -> FramePart:
    import numpy as np

    columns = EpochColumns(epoch)
    table = columns.trajectories(list(dict.fromkeys(["generation", "logprobs", *_needed(wanted)])))
    there = columns.of_example(example)[: columns.rows]
    rollouts = Rollouts.of(columns, table).first(there)
    found = _Messages(table.filter(there))

    # A turn without sampled tokens has no row.
    lengths = np.array([length or 0 for length in found.lists("logprobs").lengths()], dtype=np.int64)
    lengths[found.roles != EpisodeItemRole.ASSISTANT] = 0
    turns = np.flatnonzero(lengths)
    sizes = lengths[turns]
    values: dict[str, Any] = {
        "message": np.repeat(positions(found.rows)[turns], sizes),
        "position": positions(sizes),
    }
    for column in wanted:
        if column.source is not None:
            values[column.name] = found.lists(column.source).entries(turns, sizes)
    trajectory_of_turn = np.repeat(np.arange(len(found.rows)), found.rows)
    rows = np.bincount(trajectory_of_turn, weights=lengths, minlength=len(found.rows)).astype(np.int64)
    return FramePart(epoch.index, rollouts, rows, values)


def _needed(wanted: Sequence[Column]) -> list[str]:
    """The columns of the file that the wanted columns are made from."""
    names = ["roles", "others", *sources_of(wanted)]
    if not LISTED.keys().isdisjoint(names):
        names.append("item_metadata")  # holds the lists that did not fit into their columns
    return list(dict.fromkeys(names))


class _Messages:
    """The messages of some trajectories, in order, read from the columns of the file."""

    def __init__(self, table: pa.Table) -> None:
        import numpy as np

        self._table = table
        self.rows = _lengths(table.column("roles").combine_chunks())
        """Number of messages of each trajectory."""
        self.roles = np.array(self._column("roles").to_pylist(), dtype=object)

    def _column(self, name: str) -> pa.Array:
        """A column of the file, with one entry per message."""
        return self._table.column(name).combine_chunks().flatten()

    def values(self, column: Column) -> Any:
        """The values of a column of the frame."""
        import numpy as np

        values: Any
        if column.source in ("logprobs", *LISTED):
            values = self.lists(column.source)
        elif column.source == "contents":
            values = self._contents()
        elif column.key is not None:
            values = [metadata.get(column.key) for metadata in self._metadata]
        else:
            values = self.roles.tolist()
        if column.make is not None:
            values = column.make(values)
        if column.only is None:
            return values
        there = self.roles == column.only
        if isinstance(values, np.ndarray):
            return np.where(there, values, math.nan)
        return [value if has_one else None for value, has_one in zip(values, there.tolist(), strict=True)]

    def lists(self, source: str) -> _Lists:
        """A column of the file whose entries are lists, with the values that did not fit into it."""
        column = self._column(source)
        odd: dict[int, Any] = {}
        if source == "logprobs":
            for place, other in self._others.items():
                if "logprobs" in other:
                    odd[place] = _readable(other["logprobs"])
            return _Lists(column, odd)

        if source == "token_texts":
            # Logprobs in OpenAI's format include the tokens' texts.
            lengths = column.value_lengths().to_pylist()
            for place, other in self._others.items():
                if not lengths[place]:
                    odd[place] = _texts_in(other.get("logprobs"))
        key, _ = LISTED[source]
        for place, metadata in self._metadata_with(key):
            if metadata.get(key):
                odd[place] = metadata[key]
        return _Lists(column, odd)

    def _contents(self) -> list[Any]:
        contents = self._column("contents").to_pylist()
        for place, other in self._others.items():
            if PREFERENCE in other:
                contents[place] = encode(other[PREFERENCE])
            elif "content" in other:
                contents[place] = other["content"]
        return contents

    @cached_property
    def _others(self) -> dict[int, dict[str, Any]]:
        """Values that fit into no column, by message index."""
        texts = self._column("others")
        if texts.null_count == len(texts):
            return {}
        return {place: decode(text, dict) for place, text in enumerate(texts.to_pylist()) if text is not None}

    @cached_property
    def _metadata(self) -> list[dict[str, Any]]:
        return [{} if text is None else decode(text, dict) for text in self._column("item_metadata").to_pylist()]

    def _metadata_with(self, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and metadata of each message whose metadata have that key. Few do, so only texts that contain the key are
        parsed."""
        mark = f'"{key}"'
        for place, text in enumerate(self._column("item_metadata").to_pylist()):
            if text is not None and mark in text:
                yield place, decode(text, dict)


def _readable(logprobs: Any) -> list[float] | None:
    """One number per token, from any known format; None if the format is not known."""
    if type(logprobs) is list and (not logprobs or type(logprobs[0]) is float):
        return logprobs
    try:
        return logprob_values(logprobs)
    except (TypeError, ValueError, KeyError):
        return None


def _texts_in(logprobs: Any) -> list[Any] | None:
    """The tokens' texts, if the logprobs are in OpenAI's format."""
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else logprobs
    if not isinstance(content, list) or not all(isinstance(each, Mapping) for each in content):
        return None
    return [each.get("token") for each in content]


def _mean(numbers: list[float] | None) -> float:
    try:
        return sum(numbers) / len(numbers) if numbers else math.nan
    except TypeError:  # a list of something other than numbers
        return math.nan


def _lengths(lists: pa.Array) -> np.ndarray:
    """Length of each list; 0 for a missing one."""
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype("int64")
