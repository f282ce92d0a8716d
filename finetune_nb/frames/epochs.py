"""Records -> tidy DataFrames: one row a group, an epoch, a change of the settings; and the one door to all frames.

Pure functions of a sequence of Epochs. Missing is NaN (<NA> in counting columns), never 0; failed rollouts have rows.
Columns and dtypes are the same for no epoch at all; only score_*, train_*, seconds_* and validation_score_* columns
depend on what there is. Rows are joined on `epoch` and `example`, or on `trajectory`. Works with pandas 2.2 and 3.
Trajectories are in rollout_frames.py, their messages in message_frames.py, their tokens in token_frames.py; how a list
becomes a column stands in columns.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING, Any

from ..text import plain
from ..types import Epoch
from .columns import asked_for, counts, floats, framed, join, objects, reasons, texts, wide
from .trajectories import failures_of, is_example

if TYPE_CHECKING:
    import pandas as pd

    from ..types import Change

__all__ = [
    "epochs",
    "groups",
    "journal",
]

_GROUPS: dict[str, Any] = {
    "epoch": "int64",
    "example": object,
    "group": "int64",
    "trajectories": "int64",
    "failures": "int64",
    **dict.fromkeys(("mean", "spread", "std", "min", "max"), "float64"),
    "kept": bool,
    "reason": "int8",
    "submitted_order": "int64",
}


def groups(epochs: Iterable[Epoch], example: Any = None, columns: Sequence[str] | str | None = None) -> pd.DataFrame:
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

    example, columns: as in `trajectories`.
    """
    import pandas as pd

    names = asked_for(columns, _GROUPS)

    parts = [_groups_of(epoch, example) for epoch in epochs]
    found: dict[str, Any] = {
        name: objects(list(chain.from_iterable(part[name] for part in parts)))
        if dtype is object
        else join((part[name] for part in parts), dtype)
        for name, dtype in _GROUPS.items()
    }
    for name in ("group", "submitted_order"):
        found[name] = pd.arrays.IntegerArray(found[name], found[name] < 0)
    found["reason"] = reasons(found["reason"])
    return framed(found, names)


def epochs(epochs: Iterable[Epoch], columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one epoch.

    ===================== ================ =====================================================================
    epoch                 int64            counts from 0
    started_at            datetime, UTC    when it began
    mean_reward           float64          over all finite rewards; so are min_reward and max_reward
    group_p10 ...         float64          10, 50 and 90 % quantiles of the groups' mean rewards
    kept_mean_reward      float64          over the groups that were trained on
    trajectories ...      int64            also groups, groups_with_spread (those that can teach), kept_trajectories,
                                           kept_groups, failures, sampled_tokens
    continued_turns       Int64            sampled turns that carry a conversation on; drifted_turns: those of them that
                                           were rendered anew instead of behind the sampled ids
    curriculum            bool             whether the curriculum was on
    percentile            float64          share of the groups with spread that is trained on, in (0, 1]; NaN where the
                                           curriculum was off: then all groups are
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

    columns: only these, in this order. Raises ConfigError for one that there is not.
    """
    import numpy as np
    import pandas as pd

    records = list(epochs)
    metrics = [epoch.metrics for epoch in records]
    last = [epoch.validations[-1] if epoch.validations else None for epoch in records]

    found: dict[str, Any] = {
        "epoch": np.array([epoch.index for epoch in records], dtype=np.int64),
        "started_at": pd.to_datetime(floats(epoch.started_at for epoch in records), unit="s", utc=True),
    }
    for name in ("mean_reward", "min_reward", "max_reward", "kept_mean_reward"):
        found[name] = floats(getattr(values, name) for values in metrics)
    for place, name in enumerate(("group_p10", "group_p50", "group_p90")):
        found[name] = floats(values.group_quantiles[place] for values in metrics)
    for name in _COUNTED:
        found[name] = np.array([getattr(values, name) for values in metrics], dtype=np.int64)
    for name in ("continued_turns", "drifted_turns"):
        found[name] = counts([getattr(values, name) for values in metrics])
    found |= {
        "curriculum": np.array([epoch.curriculum.enabled for epoch in records], dtype=bool),
        "percentile": floats(epoch.curriculum.percentile if epoch.curriculum.enabled else None for epoch in records),
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
    named = (
        [values.scores for values in metrics],
        [v.scores if v else {} for v in last],
        [epoch.train_metrics for epoch in records],
        [epoch.seconds for epoch in records],
    )
    for prefix, values in zip(_BY_NAME, named, strict=True):
        found |= {f"{prefix}{name}": column for name, column in wide(values).items()}
    return framed(found, None if columns is None else asked_for(columns, found, _BY_NAME))


def journal(changes: Iterable[Change], columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one field of the live settings that somebody changed, in order.

    ========== ================ ===============================================================================
    time       datetime, UTC    when it was asked for
    source     str              who: "code", "panel", "fork", ...
    field      str              of CurriculumSettings
    old, new   object           its values
    epoch      Int64            the epoch that used it first; <NA> while it is pending, or was replaced before that
    ========== ================ ===============================================================================

    columns: only these, in this order. Raises ConfigError for one that there is not.
    """
    import pandas as pd

    rows = list(changes)
    found = {
        "time": pd.to_datetime(floats(change.time for change in rows), unit="s", utc=True),
        "source": texts([change.source for change in rows]),
        "field": texts([change.field for change in rows]),
        "old": objects([change.old for change in rows]),
        "new": objects([change.new for change in rows]),
        "epoch": counts([change.epoch for change in rows]),
    }
    return framed(found, asked_for(columns, found))


_BY_NAME = ("score_", "validation_score_", "train_", "seconds_")
"""How columns begin whose number depends on what there is."""
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


def _groups_of(epoch: Epoch, only: Any) -> dict[str, Any]:
    """The columns of `groups` for one epoch; -1 where a position or a reason is missing."""
    import numpy as np

    statistics, selection = epoch.statistics, epoch.selection
    failures = [failure["id"] for failure in failures_of(epoch)]
    failed = Counter(map(_key, failures))
    by_group = [failed.pop(_key(example), 0) for example in statistics.example_ids]
    ids = {_key(example): example for example in failures}
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

    found = {
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
    if only is None:
        return found
    those = np.array([is_example(example, only) for example in found["example"]], dtype=bool)
    return {name: list(compress(v, those)) if isinstance(v, list) else v[those] for name, v in found.items()}


def _key(example: Any) -> Any:
    """An example's id as a dict key; ids that cannot be hashed stand for themselves by their text."""
    try:
        hash(example)
    except TypeError:
        return plain(example)
    return example
