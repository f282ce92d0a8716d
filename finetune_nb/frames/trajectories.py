"""Trajectories and failed rollouts -> a tidy DataFrame; and what the frames of messages and tokens say of each rollout.

Of an epoch that is on disk only the columns of its file are read that the frame is asked for, and no trajectory is made.
frames.py names all frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from ..store.json import decode, decode_steps
from ..training.metrics import advantages
from ..types import EpisodeItem, EpisodeItemRole, Epoch, IntermediateStep, Trajectory, logprob_values
from .columns import asked_for, categories, counts, framed, join, objects, reasons, repeated, texts, wide

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "Part",
    "ROLLOUT",
    "Rollouts",
    "Source",
    "chained",
    "failures_of",
    "is_example",
    "lengths_of",
    "logprobs_of",
    "messages_in",
    "of_rollouts",
    "places",
    "rollouts_of",
    "source_of",
    "trajectories",
]

ROLLOUT = ("epoch", "example", "generation", "trajectory")
"""The columns that say whose a row is."""


class Part(NamedTuple):
    """What one epoch adds to a frame."""

    epoch: int
    rollouts: Rollouts
    """Only those that were asked for."""
    rows: np.ndarray
    """How many rows of the frame each of them has."""
    columns: dict[str, Any]


class Source(NamedTuple):
    """An epoch's rollouts, before they are unfolded: in memory, or columns of a file that are read when asked for."""

    epoch: Epoch
    rollouts: Rollouts
    those: np.ndarray
    """(N + F) bool: which trajectories and failures were asked for."""

    def table(self, names: Sequence[str]) -> pa.Table | None:
        """Those columns of the trajectories that were asked for; None where there is no file, or `others` of it has
        what does not fit into columns."""
        read = getattr(self.epoch, "columns", None)
        if read is None:
            return None
        table = read([*names, "others"]).slice(0, len(self.epoch.statistics.rewards))
        table = table.filter(self.those[: len(table)])
        others = messages_in(table, "others")
        return table if others.null_count == len(others) else None

    @property
    def trajectories(self) -> list[Trajectory]:
        everything = chain.from_iterable(self.epoch.collection.trajectories)
        return [trajectory for trajectory, ok in zip(everything, self.those.tolist(), strict=False) if ok]

    @property
    def steps(self) -> list[list[IntermediateStep]]:
        """What each failed rollout that was asked for had done."""
        rows = len(self.epoch.statistics.rewards)
        those = self.those[rows:].tolist()
        if not any(those):
            return []
        read = getattr(self.epoch, "columns", None)
        if read is None:
            return [failure.steps for failure in compress(self.epoch.collection.failures, those)]
        return [decode_steps(text) for text in compress(read(["steps"]).column("steps").slice(rows).to_pylist(), those)]


def source_of(epoch: Epoch, example: Any, failures: bool) -> Source:
    """The rollouts of an epoch, and of these the ones of some examples. failures: whether those that failed count, too."""
    import numpy as np

    found = rollouts_of(epoch, ["generation"], named=True)
    total, rows = len(found.examples), len(epoch.statistics.rewards)
    those = (
        np.ones(total, bool) if example is None else np.array([is_example(e, example) for e in found.examples], bool)
    )
    those[rows:] &= failures
    generations = [*found.columns["generation"], *(failure["generation"] for failure in found.failures)]
    examples, names, generations = (list(compress(v, those)) for v in (found.examples, found.names, generations))
    return Source(epoch, Rollouts(examples, names, {"generation": generations}, []), those)


def of_rollouts(parts: Sequence[Part]) -> dict[str, Any]:
    """The columns that say whose a row is."""
    import numpy as np

    times = join((part.rows for part in parts), "int64")
    rollouts = [part.rollouts for part in parts]
    generations = counts(chained(each.columns["generation"] for each in rollouts))
    return {
        "epoch": np.repeat(join((np.full(len(part.rows), part.epoch) for part in parts), "int64"), times),
        "example": objects(objects(chained(each.examples for each in rollouts)).to_numpy().repeat(times)),
        "generation": generations.repeat(times),
        "trajectory": repeated(chained(each.names for each in rollouts), times),
    }


def chained(parts: Iterable[list[Any]]) -> list[Any]:
    """Lists behind one another."""
    return list(chain.from_iterable(parts))


def places(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the groups of that size."""
    import numpy as np

    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def messages_in(table: pa.Table, name: str) -> Any:
    """A column of lists, one a trajectory, as an array of messages."""
    return table.column(name).combine_chunks().flatten()


def lengths_of(lists: Any) -> np.ndarray:
    """Of each list; 0 for a missing one."""
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype("int64")


def _listed(make: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda parts: make(list(chain.from_iterable(parts)))


def _joined(dtype: Any) -> Callable[[list[Any]], Any]:
    return lambda parts: join(parts, dtype)


_COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "epoch": _joined("int64"),
    "example": _listed(objects),
    "generation": _listed(counts),
    "trajectory": _listed(texts),
    "reward": _joined("float64"),
    "advantage": _joined("float64"),
    "selected": _joined("bool"),
    "reason": lambda parts: reasons(join(parts, "int8")),
    "error": _listed(texts),
    "turns": _listed(counts),
    "tokens": _listed(counts),
    "policy_version": _listed(counts),
    "finish_reason": _listed(categories),
}
_IN_TRAJECTORIES = ("generation", "error", "policy_version", "scores", "turns", "tokens", "finish_reason")
"""What stands in the trajectories themselves; all else is known from the epoch's statistics and selection."""


def trajectories(
    epochs: Iterable[Epoch], example: Any = None, columns: Sequence[str] | str | None = None
) -> pd.DataFrame:
    """One row = one trajectory, in the collection's order, or, behind those of its epoch, one failed rollout.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id, as it stands in the dataset
    generation       Int64      which of the group's rollouts, from 0
    trajectory       str        "e3/q17/2": epoch, example, generation ("#2": its place, where that is unknown)
    reward           float64    NaN where there is none; `error` then says why
    advantage        float64    (r - mean) / std within the group, trained on or not; NaN without reward
    selected         bool       whether its group was trained on
    reason           category   GroupReason: why its group was trained on or not; NaN for a failure
    error            str        what went wrong with the rollout or with its reward; NaN where nothing did
    turns            Int64      messages of the episode
    tokens           Int64      tokens that the policy sampled
    policy_version   Int64      the weights that sampled it
    finish_reason    category   of the last turn that has one: "stop", "length", ...
    score_<name>     float64    what evaluator <name> said; NaN where it is no number
    ================ ========== =============================================================================

    example: only those of this one, or of a list of them. columns: only these, in this order. Raises ConfigError for a
    column that there is not.
    """
    names = asked_for(columns, _COLUMNS, ["score_"])
    wanted = {"scores" if name.startswith("score_") else name for name in names or (*_COLUMNS, "scores")}
    parts = [_rollouts_of(epoch, example, wanted) for epoch in epochs]
    found = {name: make([part[name] for part in parts]) for name, make in _COLUMNS.items() if name in wanted}
    if "scores" in wanted:
        scores = list(chain.from_iterable(part["scores"] for part in parts))
        found |= {f"score_{name}": column for name, column in wide(scores).items()}
    return framed(found, names)


def _rollouts_of(epoch: Epoch, example: Any, wanted: set[str]) -> dict[str, Any]:
    """The wanted columns for one epoch: its trajectories, then its failures. Reason -1: missing."""
    import numpy as np

    rollouts = rollouts_of(epoch, [name for name in _IN_TRAJECTORIES if name in wanted], "trajectory" in wanted)
    statistics, failures = epoch.statistics, rollouts.failures
    nan, sizes = np.full(len(failures), math.nan), np.diff(statistics.offsets)
    out: dict[str, Any] = {"example": rollouts.examples, "trajectory": rollouts.names, **rollouts.columns}
    for name, column in rollouts.columns.items():
        column += [failure.get(name) for failure in failures]
    out["epoch"] = np.full(len(rollouts.examples), epoch.index)
    out["reward"] = np.concatenate([statistics.rewards, nan])
    if "advantage" in wanted:
        out["advantage"] = np.concatenate([advantages(statistics), nan])
    failed = np.full(len(failures), -1, np.int8)
    out["reason"] = np.concatenate([np.repeat(epoch.selection.reasons, sizes), failed])
    out["selected"] = out["reason"] == 0
    if example is None:
        return out
    those = np.fromiter((is_example(each, example) for each in rollouts.examples), bool, len(rollouts.examples))
    return {name: v[those] if isinstance(v, np.ndarray) else list(compress(v, those)) for name, v in out.items()}


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Rollouts(NamedTuple):
    """An epoch's trajectories in order and, behind them, its failures."""

    examples: list[Any]
    """(N + F) the id of each one's example."""
    names: list[str]
    """(N + F) "e3/q17/2"; empty where they were not asked for."""
    columns: dict[str, list[Any]]
    """(N) what was asked for."""
    failures: list[dict[str, Any]]
    """(F) id, generation, error."""


def rollouts_of(epoch: Epoch, names: Sequence[str], named: bool) -> Rollouts:
    """What the trajectories of an epoch say themselves. names: of _IN_TRAJECTORIES. named: with their names."""
    import numpy as np

    sizes = np.diff(epoch.statistics.offsets)
    columns = _read(epoch, [*names, "generation"] if named and "generation" not in names else names)
    failures = failures_of(epoch)
    examples = list(chain.from_iterable(map(repeat, epoch.statistics.example_ids, sizes.tolist())))
    examples += [failure["id"] for failure in failures]
    labels: list[str] = []
    if named:
        generations = [*columns["generation"], *(failure["generation"] for failure in failures)]
        if None in generations:  # then the place in the group tells the trajectories of an example apart
            places = chain(chain.from_iterable(map(range, sizes.tolist())), range(len(failures)))
            generations = [f"#{at}" if name is None else name for at, name in zip(places, generations, strict=True)]
        labels = [f"e{epoch.index}/{of}/{name}" for of, name in zip(examples, generations, strict=True)]
    return Rollouts(examples, labels, {name: columns[name] for name in names}, failures)


def failures_of(epoch: Epoch) -> list[dict[str, Any]]:
    """`id`, `generation` and `error` of each failed rollout. Of an epoch on disk no trajectory is read for it."""
    if not epoch.metrics.failures:
        return []
    read = getattr(epoch, "columns", None)
    if read is None:
        return [{"id": f.example_id, "generation": f.generation, "error": f.error} for f in epoch.collection.failures]
    known = read(["metadata"]).column("metadata").slice(len(epoch.statistics.rewards)).to_pylist()
    return [decode(text, dict) for text in known]


def is_example(found: Any, asked: Any) -> bool:
    """Whether an id is the one that was asked for, or is in the list of those. 1, True and "1" are three ids."""
    if isinstance(asked, list | set | frozenset) and type(found) is not type(asked):
        return any(is_example(found, each) for each in asked)
    try:
        return bool(found == asked) and isinstance(found, bool) == isinstance(asked, bool)
    except Exception:  # ids may be anybody's objects
        return False


def _read(epoch: Epoch, names: Sequence[str]) -> dict[str, list[Any]]:
    if not names:
        return {}
    found = _from_file(epoch, names)
    return _from_memory(list(chain.from_iterable(epoch.collection.trajectories))) if found is None else found


def _from_file(epoch: Epoch, names: Sequence[str]) -> dict[str, list[Any]] | None:
    """Columns of a stored epoch's file. None where there is no file, or its columns do not say all."""
    read = getattr(epoch, "columns", None)
    if read is None:
        return None
    table, rows = read(list(names)), len(epoch.statistics.rewards)
    columns = {name: table.column(name).slice(0, rows).to_pylist() for name in names}
    said = {text for name in ("error", "finish_reason") for text in columns.get(name, ()) if text is not None}
    if None in columns.get("generation", ()) or any("\\ud" in text for text in said):
        return None  # a name, or half a character, was cut
    if "scores" in columns:
        known = {text: None if text is None else decode(text) for text in set(columns["scores"])}
        columns["scores"] = [known[text] for text in columns["scores"]]
    return columns


def _from_memory(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """The same from the trajectories. In one pass: of 100,000, fetching each from memory is the cost."""
    assistant = EpisodeItemRole.ASSISTANT
    generation, error, policy_version, scores, turns, tokens, finish_reason = ([] for _ in range(7))
    for trajectory in trajectories:
        get = (trajectory.metadata or {}).get
        sampled, reason = 0, None
        for item in trajectory.episode:
            logprobs = getattr(item, "logprobs", None)  # a preference has none
            if logprobs is not None and item.role == assistant:  # type: ignore[union-attr]
                sampled += len(logprobs if type(logprobs) is list else logprobs_of(item) or ())  # type: ignore[arg-type]
                reason = (item.metadata or {}).get("finish_reason", reason)  # type: ignore[union-attr]
        generation.append(get("generation"))
        error.append(get("reward_error"))
        policy_version.append(get("policy_version"))
        scores.append(get("scores"))
        turns.append(len(trajectory.episode))
        tokens.append(sampled)
        finish_reason.append(reason)
    return {
        "generation": generation,
        "error": error,
        "policy_version": policy_version,
        "scores": scores,
        "turns": turns,
        "tokens": tokens,
        "finish_reason": finish_reason,
    }


def logprobs_of(item: EpisodeItem) -> list[float] | None:
    """One float a sampled token; None where nothing could have been sampled, or nobody can read them."""
    if item.role != EpisodeItemRole.ASSISTANT or item.logprobs is None:
        return None
    if type(item.logprobs) is list and (not item.logprobs or type(item.logprobs[0]) is float):
        return item.logprobs
    try:
        return logprob_values(item.logprobs)
    except (TypeError, ValueError, KeyError):
        return None
