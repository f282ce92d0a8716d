"""Records -> tidy DataFrames: one row a trajectory (or failed rollout), a group, an epoch.

Pure functions of a sequence of Epochs. Missing is NaN (<NA> in counting columns), never 0; failed rollouts have rows.
Columns and dtypes are the same for no epoch at all; only score_*, train_*, seconds_* and validation_score_* columns
depend on what there is. Works with pandas 2.2 and 3. How a list becomes a
column stands in columns.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from .columns import categories, counts, floats, join, objects, reasons, texts, wide
from .html import plain
from .metrics import advantages
from .stored_json import decode
from .types import EpisodeItemRole, Epoch, Trajectory, logprob_values

if TYPE_CHECKING:
    import pandas as pd

    from .controls import Change

__all__ = ["epochs", "groups", "journal", "trajectories"]


def trajectories(epochs: Iterable[Epoch]) -> pd.DataFrame:
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
    """
    import numpy as np
    import pandas as pd

    parts = [_rollouts_of(epoch) for epoch in epochs]

    def values(name: str) -> list[Any]:
        return list(chain.from_iterable(part[name] for part in parts))

    columns: dict[str, Any] = {
        "epoch": join((part["epoch"] for part in parts), np.int64),
        "example": objects(values("example")),
        "generation": counts(values("generation")),
        "trajectory": texts(values("trajectory")),
        "reward": join((part["reward"] for part in parts), np.float64),
        "advantage": join((part["advantage"] for part in parts), np.float64),
        "selected": join((part["reason"] == 0 for part in parts), bool),
        "reason": reasons(join((part["reason"] for part in parts), np.int8)),
        "error": texts(values("error")),
        "turns": counts(values("turns")),
        "tokens": counts(values("tokens")),
        "policy_version": counts(values("policy_version")),
        "finish_reason": categories(values("finish_reason")),
    }
    columns |= {f"score_{name}": column for name, column in wide(values("scores")).items()}
    return pd.DataFrame(columns, copy=False)


def groups(epochs: Iterable[Epoch]) -> pd.DataFrame:
    """One row = one group of one epoch; behind them, one for each example that has failed rollouts and no group.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id
    group            Int64      the group's position in the collection, from 0; <NA> where there is none
    trajectories     int64      rollouts that finished
    failures         int64      rollouts of the example that failed
    mean             float64    of the rewards that are there; NaN where there is none
    spread           float64    largest minus smallest reward; NaN where there is none or one is infinite
    std              float64    sample standard deviation (ddof=1); NaN for fewer than two rewards
    min, max         float64    smallest and largest reward
    kept             bool       whether the group was trained on
    reason           category   GroupReason: why it was, or was not
    submitted_order  Int64      place in the order of submission, from 0; <NA> where it was not submitted
    ================ ========== =============================================================================
    """
    import numpy as np
    import pandas as pd

    parts = [_groups_of(epoch) for epoch in epochs]
    dtypes = {
        "epoch": np.int64,
        "example": object,
        "group": np.int64,
        "trajectories": np.int64,
        "failures": np.int64,
        **dict.fromkeys(("mean", "spread", "std", "min", "max"), np.float64),
        "kept": bool,
        "reason": np.int8,
        "submitted_order": np.int64,
    }
    columns: dict[str, Any] = {
        name: objects(list(chain.from_iterable(part[name] for part in parts)))
        if dtype is object
        else join((part[name] for part in parts), dtype)
        for name, dtype in dtypes.items()
    }
    for name in ("group", "submitted_order"):
        columns[name] = pd.arrays.IntegerArray(columns[name], columns[name] < 0)
    columns["reason"] = reasons(columns["reason"])
    return pd.DataFrame(columns, copy=False)


def epochs(epochs: Iterable[Epoch]) -> pd.DataFrame:
    """One row = one epoch.

    ===================== ================ =====================================================================
    epoch                 int64            counts from 0
    started_at            datetime, UTC    when it began
    mean_reward           float64          over all finite rewards; so are min_reward and max_reward
    group_p10 ...         float64          10, 50 and 90 % quantiles of the groups' mean rewards
    kept_mean_reward      float64          over the groups that were trained on
    trajectories ...      int64            also groups, groups_with_spread (those that can teach), kept_trajectories,
                                           kept_groups, failures, sampled_tokens
    curriculum            bool             whether the curriculum was on
    percentile            float64          share of the groups with spread that is trained on, in (0, 1]
    schedule              str              "automatic" or "manual"
    inferred              bool             someone else's Trainer chose; the reasons are concluded
    validation_reward     float64          of the epoch's last validation; validation_examples counts its items
    validation_error      str              why there is none
    job                   str              the training job's status; NaN where nothing was submitted
    reason                str              why nothing was submitted
    policy_version        Int64            the weights that sampled; policy_version_after: those after training
    score_<name>          float64          mean of evaluator <name>; validation_score_<name>: on the validation dataset
    train_<metric>        float64          what the backend measured
    seconds_<part>        float64          what each part took: rollouts, selection, training, validation, total
    ===================== ================ =====================================================================
    """
    import numpy as np
    import pandas as pd

    records = list(epochs)
    metrics = [epoch.metrics for epoch in records]
    last = [epoch.validations[-1] if epoch.validations else None for epoch in records]

    columns: dict[str, Any] = {
        "epoch": np.array([epoch.index for epoch in records], dtype=np.int64),
        "started_at": pd.to_datetime(floats(epoch.started_at for epoch in records), unit="s", utc=True),
    }
    for name in ("mean_reward", "min_reward", "max_reward", "kept_mean_reward"):
        columns[name] = floats(getattr(values, name) for values in metrics)
    for place, name in enumerate(("group_p10", "group_p50", "group_p90")):
        columns[name] = floats(values.group_quantiles[place] for values in metrics)
    for name in _COUNTED:
        columns[name] = np.array([getattr(values, name) for values in metrics], dtype=np.int64)
    columns |= {
        "curriculum": np.array([epoch.curriculum.enabled for epoch in records], dtype=bool),
        "percentile": floats(epoch.curriculum.percentile for epoch in records),
        "schedule": texts([epoch.curriculum.schedule for epoch in records]),
        "inferred": np.array([epoch.selection.inferred for epoch in records], dtype=bool),
        "validation_reward": floats(v and v.mean_reward for v in last),
        "validation_examples": counts([v and v.examples for v in last]),
        "validation_error": texts([v and v.error for v in last]),
        "job": texts([epoch.job and str(epoch.job.status) for epoch in records]),
        "reason": texts([epoch.reason for epoch in records]),
        "policy_version": counts([epoch.policy_versions[0] for epoch in records]),
        "policy_version_after": counts([epoch.policy_versions[1] for epoch in records]),
    }
    for prefix, values in {
        "score_": [values.scores for values in metrics],
        "validation_score_": [v.scores if v else {} for v in last],
        "train_": [epoch.train_metrics for epoch in records],
        "seconds_": [epoch.seconds for epoch in records],
    }.items():
        columns |= {f"{prefix}{name}": column for name, column in wide(values).items()}
    return pd.DataFrame(columns, copy=False)


def journal(changes: Iterable[Change]) -> pd.DataFrame:
    """One row = one field of the live settings that somebody changed, in order.

    ========== ================ ===============================================================================
    time       datetime, UTC    when it was asked for
    source     str              who: "code", "panel", "fork", ...
    field      str              of CurriculumSettings
    old, new   object           its values
    epoch      Int64            the epoch that used it first; <NA> while it is pending, or was replaced before that
    ========== ================ ===============================================================================
    """
    import pandas as pd

    rows = list(changes)
    columns = {
        "time": pd.to_datetime(floats(change.time for change in rows), unit="s", utc=True),
        "source": texts([change.source for change in rows]),
        "field": texts([change.field for change in rows]),
        "old": objects([change.old for change in rows]),
        "new": objects([change.new for change in rows]),
        "epoch": counts([change.epoch for change in rows]),
    }
    return pd.DataFrame(columns, copy=False)


_COUNTED = (
    "trajectories",
    "groups",
    "groups_with_spread",
    "kept_trajectories",
    "kept_groups",
    "failures",
    "sampled_tokens",
)


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rollouts_of(epoch: Epoch) -> dict[str, Any]:
    """The columns of `trajectories` for one epoch: its trajectories, then its failures. Reason -1: missing."""
    import numpy as np

    statistics = epoch.statistics
    sizes = np.diff(statistics.offsets)
    columns, failures = _from_file(epoch) or _from_memory(epoch)
    names = columns["generation"]
    if None in names:  # then the place in the group tells the trajectories of an example apart
        places = chain.from_iterable(map(range, sizes.tolist()))
        names = [f"#{place}" if name is None else name for place, name in zip(places, names, strict=True)]
    for column in columns.values():
        column += [None] * len(failures)

    generations = [failure["generation"] for failure in failures]
    examples = list(chain.from_iterable(map(repeat, statistics.example_ids, sizes.tolist())))
    examples += [failure["id"] for failure in failures]
    rows, nan = len(statistics.rewards), np.full(len(failures), math.nan)
    columns["generation"][rows:] = generations
    columns["error"][rows:] = [failure["error"] for failure in failures]
    names = [*names[:rows], *generations]
    return columns | {
        "epoch": np.full(len(examples), epoch.index),
        "example": examples,
        "trajectory": [f"e{epoch.index}/{example}/{name}" for example, name in zip(examples, names, strict=True)],
        "reward": np.concatenate([statistics.rewards, nan]),
        "advantage": np.concatenate([advantages(statistics), nan]),
        "reason": np.concatenate([np.repeat(epoch.selection.reasons, sizes), np.full(len(failures), -1, np.int8)]),
    }


def _from_file(epoch: Epoch) -> tuple[dict[str, list[Any]], list[dict[str, Any]]] | None:
    """What `_read` finds, and the failures, from the columns of a stored epoch's file: no trajectory is made. None where
    there is no file, or its columns do not say all."""
    read = getattr(epoch, "columns", None)
    if read is None:
        return None
    names = ["generation", "error", "policy_version", "scores", "turns", "tokens", "finish_reason"]
    table = read([*names, "metadata"])
    rows = len(epoch.statistics.rewards)
    columns = {name: table.column(name).slice(0, rows).to_pylist() for name in names}
    texts = {text for name in ("error", "finish_reason") for text in columns[name] if text is not None}
    if None in columns["generation"] or any("\\ud" in text for text in texts):  # a name, or half a character, was cut
        return None
    known = {text: None if text is None else decode(text) for text in set(columns["scores"])}
    columns["scores"] = [known[text] for text in columns["scores"]]
    return columns, [decode(text, dict) for text in table.column("metadata").slice(rows).to_pylist()]


def _from_memory(epoch: Epoch) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
    collection = epoch.collection
    failures = [{"id": f.example_id, "generation": f.generation, "error": f.error} for f in collection.failures]
    return _read(list(chain.from_iterable(collection.trajectories))), failures


def _read(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """What stands in the trajectories themselves. In one pass: of 100,000, fetching each from memory is the cost."""
    assistant = EpisodeItemRole.ASSISTANT
    generation, error, policy_version, scores, turns, tokens, finish_reason = ([] for _ in range(7))
    for trajectory in trajectories:
        get = (trajectory.metadata or {}).get
        sampled, reason = 0, None
        for item in trajectory.episode:
            logprobs = getattr(item, "logprobs", None)  # a preference has none
            if logprobs is not None and item.role == assistant:  # type: ignore[union-attr]
                sampled += len(logprobs if type(logprobs) is list else logprob_values(logprobs) or ())
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


def _groups_of(epoch: Epoch) -> dict[str, Any]:
    """The columns of `groups` for one epoch; -1 where a position or a reason is missing."""
    import numpy as np

    statistics, selection = epoch.statistics, epoch.selection
    failures = epoch.collection.failures if epoch.metrics.failures else []  # reading a file for nothing
    failed = Counter(_key(failure.example_id) for failure in failures)
    by_group = [failed.pop(_key(example), 0) for example in statistics.example_ids]
    ids = {_key(failure.example_id): failure.example_id for failure in failures}
    alone = [ids[key] for key in failed]
    total, extra = len(statistics), len(alone)

    present = np.isfinite(statistics.rewards)
    sizes = np.diff(statistics.offsets)
    group_of = np.repeat(np.arange(total), sizes)
    low, high = np.full(total, math.nan), np.full(total, math.nan)
    if len(statistics.rewards):
        starts, filled = statistics.offsets[:-1][sizes > 0], sizes > 0  # reduceat has no notion of an empty slice
        low[filled] = np.fmin.reduceat(statistics.rewards, starts)
        high[filled] = np.fmax.reduceat(statistics.rewards, starts)
    deviation = np.where(present, statistics.rewards, 0.0) - np.where(present, statistics.means[group_of], 0.0)
    squares = np.bincount(group_of, weights=deviation**2, minlength=total)
    several = np.isfinite(statistics.spreads) & (statistics.counts > 1)
    order = np.full(total, -1, dtype=np.int64)
    order[selection.kept] = np.arange(len(selection.kept))

    def padded(values: Any, missing: Any) -> Any:
        return np.concatenate([values, np.full(extra, missing)])

    return {
        "epoch": np.full(total + extra, epoch.index),
        "example": [*statistics.example_ids, *alone],
        "group": padded(np.arange(total), -1),
        "trajectories": padded(sizes, 0),
        "failures": np.array([*by_group, *failed.values()], dtype=np.int64),
        "mean": padded(statistics.means, math.nan),
        "spread": padded(statistics.spreads, math.nan),
        "std": padded(np.sqrt(np.where(several, squares, math.nan) / np.maximum(statistics.counts - 1, 1)), math.nan),
        "min": padded(low, math.nan),
        "max": padded(high, math.nan),
        "kept": padded(selection.reasons == 0, False),
        "reason": padded(selection.reasons, -1),
        "submitted_order": padded(order, -1),
    }


def _key(example: Any) -> Any:
    """An example's id as a dict key; ids that cannot be hashed stand for themselves by their text."""
    try:
        hash(example)
    except TypeError:
        return plain(example)
    return example
