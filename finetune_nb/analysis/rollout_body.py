"""What one rollout says, whole, as a small record and binary columns: its turns, their texts, tokens and alternatives.

Works on any record: a trajectory of this package or of somebody else's builder, or a failed rollout, of which the messages of
the last model call are known. Nothing here raises for what a record holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np

from ..llms.chat_messages import content_text
from ..rollouts.episodes import SampledTurn, call_from_step
from ..store.reader import StoredEpoch
from ..store.trajectory_table import COLUMNS, collection_of
from ..text import as_json, short, text_of
from ..types import DPOItem, EpisodeItem, EpisodeItemRole, Epoch, MessageKey, RolloutFailure, Trajectory, as_float
from .browse_index import packed_texts
from .messages import preference_text, tokens_of

__all__ = [
    "RolloutBody",
    "RolloutRows",
    "rollout_body",
    "rollout_json",
]

ALTERNATIVES = 5
"""Most alternatives that are shown of a token."""
SHOWN = tuple(name for name in COLUMNS if name not in ("token_ids", "prompt_token_ids"))
"""The columns of a file that a body needs. The prompts' ids are most of a long rollout, and nobody reads them."""
KEPT_GROUPS = 3
"""Row groups that are kept decoded: those of two rollouts that are compared, and one more."""


@dataclass(frozen=True)
class RolloutBody:
    """One rollout."""

    about: dict[str, Any]
    """Plain values: turns, scores, reasonings, error, facts."""
    columns: list[bytes]
    """Texts of the turns (a blob, then offsets), texts of the tokens (the same), logprobs (float32), entropies (float32;
    empty if none is known), where each token's alternatives begin (uint32; empty if there are none), the alternatives' texts
    (a blob, then offsets) and their logprobs (float32)."""


# ── a record -> its body ─────────────────────────────────────────────────────────────────────────────────────────────


def rollout_body(rollout: Trajectory | RolloutFailure) -> RolloutBody:
    """Read a rollout.

    Args:
        rollout: Its record.

    Returns:
        All of it, nothing cut.
    """
    if isinstance(rollout, RolloutFailure):
        items, facts = _messages_of(rollout), {"error": text_of(rollout.error)}
    else:
        items = [_item(each) for each in rollout.episode]
        facts = _facts(rollout)
    texts: list[str] = []
    tokens = _Tokens()
    turns: list[dict[str, Any]] = []
    names = _tool_names(items)
    for item in items:
        start = len(tokens.logprobs)
        tokens.add(item.tokens)
        turns.append({**_turn(item, names), "start": start, "stop": len(tokens.logprobs)})
        texts.append(item.text)
    return RolloutBody({"turns": turns, **facts}, [*packed_texts(texts), *tokens.packed()])


@dataclass
class _Tokens:
    """Sampled tokens as columns of T entries. Of 20,000 tokens, an object for each would be the cost."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    alternatives: dict[int, Sequence[tuple[str, float]]] = field(default_factory=dict)
    """By place; only where there are any."""

    @classmethod
    def of(cls, item: EpisodeItem) -> _Tokens:
        """The tokens of a message."""
        turn, logprobs = SampledTurn.of(item), item.logprobs
        if turn is None:
            return cls()
        if turn.alternatives is None and type(logprobs) is list and set(map(type, logprobs)) <= {float}:
            # What this package records.
            texts, entropies = turn.tokens, turn.entropies
            if type(texts) is not list or len(texts) != len(logprobs) or not set(map(type, texts)) <= {str}:
                texts = [""] * len(logprobs)
            if type(entropies) is not list or len(entropies) != len(logprobs):
                entropies = [math.nan] * len(logprobs)
            if not set(map(type, entropies)) <= {float}:
                entropies = [as_float(each) for each in entropies]
            return cls(texts, logprobs, entropies)
        tokens = tokens_of(item)
        return cls(
            [token.text or "" for token in tokens],
            [token.logprob for token in tokens],
            [token.entropy for token in tokens],
            {place: token.alternatives for place, token in enumerate(tokens) if token.alternatives},
        )

    def add(self, others: _Tokens) -> None:
        start = len(self.logprobs)
        self.texts += others.texts
        self.logprobs += others.logprobs
        self.entropies += others.entropies
        self.alternatives |= {start + place: found for place, found in others.alternatives.items()}

    def packed(self) -> list[bytes]:
        entropies = np.array(self.entropies, "<f4")
        columns = [
            *packed_texts(self.texts),
            np.array(self.logprobs, "<f4").tobytes(),
            b"" if np.isnan(entropies).all() else entropies.tobytes(),
        ]
        if not self.alternatives:
            return [*columns, b"", b"", b"", b""]
        counts = np.zeros(len(self.logprobs) + 1, "<u4")
        texts: list[str] = []
        logprobs: list[float] = []
        for place, found in sorted(self.alternatives.items()):
            counts[place + 1] = len(found[:ALTERNATIVES])
            texts += [text for text, _ in found[:ALTERNATIVES]]
            logprobs += [logprob for _, logprob in found[:ALTERNATIVES]]
        starts = np.cumsum(counts, dtype="<u4").tobytes()
        return [*columns, starts, *packed_texts(texts), np.array(logprobs, "<f4").tobytes()]


@dataclass(frozen=True)
class _Item:
    """A message of any kind of record."""

    role: str
    text: str
    metadata: Mapping[str, Any]
    tokens: _Tokens = field(default_factory=lambda: _Tokens())
    sampled: bool | None = None
    """Whether the policy sampled it; None where nobody would expect it."""


def _item(item: Any) -> _Item:
    if isinstance(item, DPOItem):
        return _Item("preference", preference_text(item), {})
    metadata = item.metadata if isinstance(item.metadata, Mapping) else {}
    text = content_text(item.content)
    if item.role != EpisodeItemRole.ASSISTANT:
        return _Item(text_of(item.role), text, metadata)
    tokens = _Tokens.of(item)
    return _Item("assistant", text, metadata, tokens, bool(tokens.logprobs))


def _messages_of(failure: RolloutFailure) -> list[_Item]:
    """The messages of the last model call that a failed rollout made, with its reply."""
    calls = [call for step in failure.steps or () if (call := call_from_step(step)) is not None]
    if not calls:
        return []
    last = calls[-1]
    items = [_Item(text_of(each.get("role")), content_text(each.get("content")), each) for each in last.messages]
    reply = {**last.reply, MessageKey.FINISH_REASON: last.finish_reason}
    item = EpisodeItem.model_construct(
        role=EpisodeItemRole.ASSISTANT,
        content=content_text(reply.get("content")),
        logprobs=last.logprobs,
        metadata={**reply, MessageKey.TOKENS: last.tokens, MessageKey.TOKEN_IDS: last.response_ids},
    )
    return [*items, _item(item)]


def _facts(trajectory: Trajectory) -> dict[str, Any]:
    """What is known of a finished rollout beside its messages."""
    metadata = trajectory.metadata or {}
    words = {}
    found = metadata.get("reasonings")
    for name, said in found.items() if isinstance(found, Mapping) else ():
        if said:
            words[short(name, 80)] = text_of(said)
    if metadata.get("reasoning"):
        words = {"reward": text_of(metadata["reasoning"]), **words}
    scores = metadata.get("scores")
    output = metadata.get("output")
    facts = {
        "scores": {short(n, 80): _finite(v) for n, v in scores.items()} if isinstance(scores, Mapping) else {},
        "words": words,
        "shaped": [_finite(each) for each in trajectory.shaped_rewards or ()],
        "output": None if output is None else text_of(output) if isinstance(output, str) else as_json(output),
        "version": None if metadata.get("policy_version") is None else short(metadata["policy_version"], 40),
        "error": None,
    }
    if metadata.get("reward_error") or (isinstance(trajectory.reward, float) and math.isnan(trajectory.reward)):
        facts["error"] = text_of(metadata.get("reward_error") or "no reward; no reason was recorded")
    return facts


def _finite(value: Any) -> float | str | None:
    """A number that JSON can carry; the text of any other value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None if value is None else short(value, 80)
    value = float(value)
    return value if math.isfinite(value) else short(value, 20)


def _tool_names(items: Sequence[_Item]) -> dict[str, str]:
    """Names of the called tools by call id, as a tool's result may only have the id."""
    names = {}
    for item in items:
        for call in _listed(item.metadata.get(MessageKey.TOOL_CALLS)):
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                names[text_of(call.get("id"))] = short(function.get("name"), 80)
    return names


def _turn(item: _Item, names: Mapping[str, str]) -> dict[str, Any]:
    """A turn without its text and tokens."""
    metadata = item.metadata
    calls = []
    for call in _listed(metadata.get(MessageKey.TOOL_CALLS)):
        function = call.get("function") if isinstance(call, Mapping) else None
        name, arguments = None, call
        if isinstance(function, Mapping):
            name, arguments = short(function.get("name"), 80), function.get("arguments")
        calls.append({"name": name, "arguments": arguments if isinstance(arguments, str) else as_json(arguments)})
    thought = metadata.get(MessageKey.REASONING_CONTENT) or metadata.get("reasoning")
    seconds, finish = metadata.get(MessageKey.SECONDS), metadata.get(MessageKey.FINISH_REASON)
    name = names.get(text_of(metadata.get(MessageKey.TOOL_CALL_ID))) or metadata.get(MessageKey.NAME)
    sampled = "".join(item.tokens.texts)
    if not sampled:
        shown = "text"
    else:
        shown = "tokens" if item.text.strip() in sampled else "both"
    conversation = metadata.get(MessageKey.CONVERSATION, 0)
    return {
        "role": short(item.role, 40),
        "name": None if name is None else short(name, 80),
        "shown": shown,
        "sampled": item.sampled,
        "calls": calls,
        "thought": thought if isinstance(thought, str) else None,
        "finish": None if finish is None else short(finish, 40),
        "seconds": float(seconds) if isinstance(seconds, Real) and math.isfinite(seconds) else None,
        "conversation": conversation if isinstance(conversation, int) else 0,
    }


def _listed(calls: Any) -> list[Any]:
    """Tool calls as a list: third-party records may have a single call, or none."""
    if isinstance(calls, list | tuple):
        return list(calls)
    return [calls] if calls else []


def rollout_json(rollout: Trajectory | RolloutFailure) -> str:
    """The whole record as JSON, indented by two."""
    if isinstance(rollout, RolloutFailure):
        found: dict[str, Any] = {
            "example_id": rollout.example_id,
            "generation": rollout.generation,
            "error": rollout.error,
            "steps": [step.model_dump(mode="python") for step in rollout.steps or ()],
        }
    else:
        found = rollout.model_dump(mode="python")
    try:
        return json.dumps(found, ensure_ascii=False, indent=2, default=text_of)
    except (TypeError, ValueError, RecursionError):
        return as_json(found)


# ── a row -> its record ──────────────────────────────────────────────────────────────────────────────────────────────


class RolloutRows:
    """Reads single rollouts of epochs. The parts of files that were decoded last are kept: the next rollout is mostly in one
    of them."""

    def __init__(self) -> None:
        self._kept: list[tuple[Epoch, int, Any]] = []
        self._in_memory: tuple[Epoch, list[Trajectory | RolloutFailure]] | None = None

    def rollout(self, epoch: Epoch, row: int, whole: bool = False) -> Trajectory | RolloutFailure:
        """One rollout.

        Args:
            epoch: The record of its epoch.
            row: Its place in the epoch: the trajectories in order, then the failures.
            whole: Whether the ids of tokens and prompts are wanted, too.

        Returns:
            Its record.

        Raises:
            StoreError: The epoch's file is missing or damaged, or has no such row.
            IndexError: The epoch is in memory, and has no such row.
        """
        read = epoch.row_group if isinstance(epoch, StoredEpoch) else None
        if read is None:
            if row < 0:
                raise IndexError(f"found row {row}")
            kept = self._in_memory
            if kept is None or kept[0] is not epoch:
                collection = epoch.collection
                rollouts = [*(each for group in collection.trajectories for each in group), *collection.failures]
                kept = self._in_memory = (epoch, rollouts)
            return kept[1][row]
        first, table = read(row, tuple(COLUMNS)) if whole else self._part(epoch, row, read)
        found = collection_of(table.take([row - first]), "", None)
        return found.failures[0] if found.failures else found.trajectories[0][0]

    def rollouts(self, epoch: Epoch, rows: Sequence[int]) -> list[Trajectory | RolloutFailure]:
        """The rollouts of one example, which are read together where they lie together. As `rollout` for each of the rows."""
        read = epoch.row_group if isinstance(epoch, StoredEpoch) else None
        if read is not None and rows:
            parts = [self._part(epoch, row, read) for row in rows]
            first, table = parts[0]
            if all(part is table for _, part in parts):
                order = sorted(rows)  # in a file, failures come last
                found = collection_of(table.take([row - first for row in order]), "", None)
                if len(found.trajectories) <= 1:
                    by_row = dict(zip(order, [*chain(*found.trajectories), *found.failures], strict=True))
                    return [by_row[row] for row in rows]
        return [self.rollout(epoch, row) for row in rows]

    def _part(self, epoch: Epoch, row: int, read: Any) -> tuple[int, Any]:
        kept = list(self._kept)  # other threads may replace it
        for entry in kept:
            if entry[0] is epoch and entry[1] <= row < entry[1] + len(entry[2]):
                self._kept = [entry, *(each for each in kept if each is not entry)]
                return entry[1], entry[2]
        first, table = read(row, SHOWN)
        self._kept = [(epoch, first, table), *kept][:KEPT_GROUPS]
        return first, table
