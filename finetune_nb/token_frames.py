"""Sampled tokens -> a tidy DataFrame, unfolded from the trajectories when somebody asks. frames.py names all frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import asked_for, counts, floats, framed, join, texts
from .rollout_frames import logprobs_of
from .types import EpisodeItem, Epoch, Trajectory
from .unfolding import (
    ROLLOUT,
    Part,
    Source,
    chained,
    lengths_of,
    messages_in,
    of_rollouts,
    places,
    source_of,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["tokens"]


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
