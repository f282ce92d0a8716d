"""Trajectories as an Arrow table: one row = one trajectory or one failed rollout.

Numbers are in columns of their own (token ids, logprobs as list columns); what has no column is JSON text, so the round
trip is faithful, but for tuples, which become lists, and OpenAI's logprob objects, which become their dicts. Known
secrets are masked in texts, not in token ids. The way back is trajectory_rows.py's, the file trajectory_files.py's.

    kind                   "trajectory" or "failure"
    group                  int32    position of the group in the collection, from 0; null for a failure
    example                string   the example's id as text; its exact value is metadata["id"]
    generation             int64    which of the group's rollouts, from 0
    reward                 double   NaN where there is none; null for a failure
    shaped_rewards         list     doubles
    error                  string   of the rollout or of its reward
    turns, tokens          int32    messages of the episode; tokens that the policy sampled
    policy_version         int64    the weights that sampled it
    finish_reason          string   of the last turn that has one
    scores                 string   JSON: what every evaluator said, by name
    metadata               string   JSON: the trajectory's metadata, all of it
    roles, contents        list     strings, one a message; role "preference" is a pair, all of it in `others`
    logprobs               list     of lists of floats (double where a float would lose digits); null: see `others`
    token_ids              list     of lists of ints; null where a message has none
    token_texts            list     of lists of strings: metadata["tokens"]
    prompt_token_ids       list     of lists of ints
    item_metadata          list     JSON: the rest of a message's metadata
    others                 list     JSON: what does not fit the columns above (foreign logprobs, lone surrogates)
    steps                  string   JSON: what a failed rollout had done
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from .redaction import redact_text, redact_texts
from .stored_json import encode_all, encode_steps
from .types import DPOItem, EpisodeItem, EpisodeItemRole, RolloutFailure, Trajectory, logprob_count

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["COLUMNS", "LISTED", "PREFERENCE", "table_of"]

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
