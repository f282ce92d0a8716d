"""Messages -> a tidy DataFrame, unfolded from the trajectories when somebody asks. frames.py names all frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from ..store.json import decode, encode
from ..types import DPOItem, EpisodeItem, Epoch, IntermediateStep, LLMCall, Trajectory
from .columns import asked_for, categories, counts, floats, framed, join, texts
from .trajectories import (
    ROLLOUT,
    Part,
    Source,
    chained,
    lengths_of,
    logprobs_of,
    messages_in,
    of_rollouts,
    places,
    source_of,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "messages",
    "tokens",
]

_MESSAGES: dict[str, Callable[[list[Any]], Any]] = {
    "role": categories,
    "content": texts,
    "tool_calls": texts,
    "tool_call_id": texts,
    "name": texts,
    "finish_reason": categories,
    "prompt_tokens": counts,
    "tokens": counts,
    "mean_logprob": floats,
    "seconds": floats,
}
"""What a message itself says."""


def messages(epochs: Iterable[Epoch], example: Any = None, columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one message of an episode, in its order; behind those of an epoch's trajectories, those of its failed
    rollouts as far as their last model call tells them.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id
    generation       Int64      which of the group's rollouts, from 0
    trajectory       category   as in `trajectories`, to join on
    failed           bool       whether the rollout failed
    message          int64      its place in the episode, from 0
    role             category   "user", "assistant", "system", "tool", ...; "preference" for a pair of responses
    content          str        its text; of a preference the pair, as JSON
    tool_calls       str        the tools that it calls, as JSON; NaN for none
    tool_call_id     str        which call it answers
    name             str        of the tool that speaks
    finish_reason    category   why the turn ended: "stop", "length", "tool_calls", ...
    prompt_tokens    Int64      tokens of the prompt that the turn was sampled behind
    tokens           Int64      tokens that the policy sampled; 0 for a turn of an assistant that it did not
    mean_logprob     float64    of those tokens, natural logarithm; NaN without any
    seconds          float64    that the model call took
    ================ ========== =============================================================================

    example, columns: as in `trajectories`.
    """
    known = (*ROLLOUT, "failed", "message", *_MESSAGES)
    names = asked_for(columns, known)
    wanted = set(names or known)
    parts = [_messages_of(epoch, example, wanted) for epoch in epochs]
    found = of_rollouts(parts)
    found["failed"] = join((part.columns["failed"] for part in parts), bool)
    found["message"] = join((places(part.rows) for part in parts), "int64")
    for name, make in _MESSAGES.items():
        if name in wanted:
            found[name] = make(list(chain.from_iterable(part.columns[name] for part in parts)))
    return framed(found, names or known)


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _messages_of(epoch: Epoch, example: Any, wanted: set[str]) -> Part:
    import numpy as np

    source = source_of(epoch, example, failures=True)
    found = _messages_from_file(source, wanted)
    if found is None:
        found = _message_columns([list(map(_message, t.episode)) for t in source.trajectories])
    columns, rows = found
    failed = _message_columns([_told_by(steps) for steps in source.steps])
    for name in columns:
        columns[name] = [*columns[name], *failed[0][name]]
    columns["failed"] = np.repeat([False, True], [rows.sum(), failed[1].sum()])
    return Part(epoch.index, source.rollouts, np.concatenate([rows, failed[1]]), columns)


def _message_columns(episodes: Sequence[list[tuple[Any, ...]]]) -> tuple[dict[str, Any], np.ndarray]:
    import numpy as np

    turns = list(chain.from_iterable(episodes))
    columns = zip(*turns, strict=True) if turns else repeat(())
    return dict(zip(_MESSAGES, map(list, columns), strict=False)), np.array(list(map(len, episodes)), dtype=np.int64)


def _message(item: EpisodeItem | DPOItem) -> tuple[Any, ...]:
    """The values of _MESSAGES for one message."""
    if isinstance(item, DPOItem):
        return ("preference", encode(item.model_dump()), *[None] * (len(_MESSAGES) - 2))
    metadata = item.metadata or {}
    sampled = logprobs_of(item)
    prompt = metadata.get("prompt_token_ids")
    return (
        str(item.role),
        item.content,
        *_said_in(metadata),
        len(prompt) if isinstance(prompt, list) else None,
        None if sampled is None else len(sampled),
        _mean(sampled),
        metadata.get("seconds"),
    )


def _said_in(metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    calls = metadata.get("tool_calls")
    return (encode(calls) if calls else None, *map(metadata.get, ("tool_call_id", "name", "finish_reason")))


def _told_by(steps: Sequence[IntermediateStep]) -> list[tuple[Any, ...]]:
    """The messages of a failed rollout: the prompt of its last recorded model call, and the reply."""
    calls = [step.data.payload for step in steps if step.data and isinstance(step.data.payload, LLMCall)]
    if not calls:
        return []
    last = calls[-1]
    context = [(str(m.get("role")), _text(m.get("content")), *_said_in(m), *[None] * 4) for m in last.messages]
    reply = {**last.reply, "finish_reason": last.finish_reason}
    logprobs = last.logprobs
    sizes = (None if ids is None else len(ids) for ids in (last.prompt_ids, logprobs))
    return [
        *context,
        ("assistant", _text(reply.get("content")), *_said_in(reply), *sizes, _mean(logprobs), last.seconds),
    ]


def _mean(logprobs: Sequence[float] | None) -> float | None:
    try:
        return sum(logprobs) / len(logprobs) if logprobs else None
    except TypeError:  # somebody's list of something else
        return None


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "" if content is None else encode(content)


def _messages_from_file(source: Source, wanted: set[str]) -> tuple[dict[str, Any], np.ndarray] | None:
    """The wanted columns, and how many messages each trajectory has."""
    import numpy as np

    said = wanted & {"tool_calls", "tool_call_id", "name", "finish_reason", "seconds"}
    sampled = wanted & {"tokens", "mean_logprob"}
    needed = ["roles", *["contents"] * ("content" in wanted), *["logprobs"] * bool(sampled)]
    needed += [*["item_metadata"] * bool(said), *["prompt_token_ids"] * ("prompt_tokens" in wanted)]
    table = source.table(needed)
    if table is None:
        return None
    roles = messages_in(table, "roles")
    columns: dict[str, Any] = {"role": roles.to_pylist()}
    if "content" in wanted:
        columns["content"] = messages_in(table, "contents").to_pylist()
    if said:
        known = [{} if text is None else decode(text, dict) for text in messages_in(table, "item_metadata").to_pylist()]
        columns |= (
            zip(_SAID, zip(*map(_said_in, known), strict=True), strict=True) if known else dict.fromkeys(_SAID, ())
        )
        columns["seconds"] = [metadata.get("seconds") for metadata in known]
    if "prompt_tokens" in wanted:
        columns["prompt_tokens"] = messages_in(table, "prompt_token_ids").value_lengths().to_pylist()
    if sampled:
        lists = messages_in(table, "logprobs")
        lengths, flat = lengths_of(lists), lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), weights=flat, minlength=len(lengths))
        there = (np.array(columns["role"], dtype=object) == "assistant") & np.array(lists.is_valid())
        columns["tokens"] = [n if ok else None for n, ok in zip(lengths.tolist(), there.tolist(), strict=True)]
        means = np.divide(sums, lengths, out=np.full(len(sums), math.nan), where=there & (lengths > 0))
        columns["mean_logprob"] = means.tolist()
    return columns, lengths_of(table.column("roles").combine_chunks())


_SAID = ("tool_calls", "tool_call_id", "name", "finish_reason")


def tokens(epochs: Iterable[Epoch], example: Any = None, columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one token that the policy sampled. Failed rollouts have none here: nothing of them is trained on.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id
    generation       Int64      which of the group's rollouts, from 0
    trajectory       category   as in `trajectories`, to join on
    message          int64      the turn's place in the episode, from 0
    position         int64      the token's place in its turn, from 0
    token_id         Int64      in the policy's vocabulary; <NA> where only its logprob is known
    token            str        its text
    logprob          float64    natural logarithm of the probability with which it was sampled
    ================ ========== =============================================================================

    example, columns: as in `trajectories`. What each token was worth:
    `run.tokens(epoch=3).merge(run.trajectories(epoch=3, columns=["trajectory", "advantage"]), on="trajectory")`.
    """
    known = (*ROLLOUT, "message", "position", "token_id", "token", "logprob")
    names = asked_for(columns, known)
    wanted = set(names or known)
    parts = [_tokens_of(epoch, example, wanted) for epoch in epochs]
    found = of_rollouts(parts)
    found["message"] = join((part.columns["message"] for part in parts), "int64")
    found["position"] = join((part.columns["position"] for part in parts), "int64")
    found["logprob"] = join((part.columns["logprob"] for part in parts), "float64")
    if "token_id" in wanted:
        found["token_id"] = counts(chained(part.columns["token_id"] for part in parts))
    if "token" in wanted:
        found["token"] = texts(chained(part.columns["token"] for part in parts))
    return framed(found, names or known)


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tokens_of(epoch: Epoch, example: Any, wanted: set[str]) -> Part:
    source = source_of(epoch, example, failures=False)
    found = _tokens_from_file(source, wanted)
    columns, rows = _tokens_from_memory(source.trajectories) if found is None else found
    return Part(epoch.index, source.rollouts, rows, columns)


def _tokens_from_memory(trajectories: Sequence[Trajectory]) -> tuple[dict[str, Any], np.ndarray]:
    import numpy as np

    logprobs: list[list[float]] = []
    ids: list[Any] = []
    pieces: list[Any] = []
    turns, rows = [], []
    for trajectory in trajectories:
        total = 0
        for place, item in enumerate(trajectory.episode):
            sampled = logprobs_of(item) if isinstance(item, EpisodeItem) else None
            if not sampled:
                continue
            metadata, count = item.metadata or {}, len(sampled)  # type: ignore[union-attr]
            logprobs.append(sampled)
            ids.append(_one_each(metadata.get("token_ids"), count))
            pieces.append(_one_each(metadata.get("tokens") or _said_with(item.logprobs), count))  # type: ignore[union-attr]
            turns.append(place)
            total += count
        rows.append(total)
    lengths = np.array(list(map(len, logprobs)), dtype=np.int64)
    columns = {
        "message": np.repeat(np.array(turns, dtype=np.int64), lengths),
        "position": places(lengths),
        "logprob": floats(chained(logprobs)),
        "token_id": chained(ids),
        "token": chained(pieces),
    }
    return columns, np.array(rows, dtype=np.int64)


def _one_each(values: Any, count: int) -> list[Any]:
    return values if isinstance(values, list) and len(values) == count else [None] * count


def _said_with(logprobs: Any) -> list[Any] | None:
    """The tokens' texts where logprobs came as OpenAI's objects."""
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else getattr(logprobs, "content", logprobs)
    if not isinstance(content, list) or not content or isinstance(content[0], float):
        return None
    return [each.get("token") if isinstance(each, Mapping) else getattr(each, "token", None) for each in content]


def _tokens_from_file(source: Source, wanted: set[str]) -> tuple[dict[str, Any], np.ndarray] | None:
    import numpy as np
    import pyarrow as pa

    listed = {"token_id": "token_ids", "token": "token_texts"}
    listed = {name: column for name, column in listed.items() if name in wanted}
    table = source.table(["roles", "logprobs", *listed.values(), *["item_metadata"] * bool(listed)])
    if table is None:
        return None
    messages, lists = lengths_of(table.column("roles").combine_chunks()), messages_in(table, "logprobs")
    lengths = lengths_of(lists)
    sampled = (lengths > 0) & (np.array(messages_in(table, "roles").to_pylist(), dtype=object) == "assistant")
    those, lengths = pa.array(sampled), lengths[sampled]
    columns: dict[str, Any] = {
        "message": np.repeat(places(messages)[sampled], lengths),
        "position": places(lengths),
        "logprob": lists.filter(those).flatten().to_numpy(zero_copy_only=False).astype(np.float64),
    }
    for name, column in listed.items():
        found = messages_in(table, column).filter(those)
        if np.array_equal(lengths_of(found), lengths):
            columns[name] = found.flatten().to_pylist()
            continue
        rest = messages_in(table, "item_metadata").filter(those).to_pylist()
        if found.null_count < len(found) or any('"token' in (text or "") for text in rest):
            return None  # of some they are missing, or they did not fit into the column
        columns[name] = [None] * int(lengths.sum())
    of = np.repeat(np.arange(len(messages)), messages)[sampled]
    return columns, np.bincount(of, weights=lengths, minlength=len(messages)).astype(np.int64)
