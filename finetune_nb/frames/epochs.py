"""Groups, epochs and changes of live settings as DataFrames."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..store.labels import Label
from ..text import plain
from ..training.metrics import deviations
from ..types import Epoch, EpochMetrics, Validation
from .columns import Column, asked_for, column_of, columns_of, framed
from .labels import NO_LABELS, Labelling, labels_by_name
from .trajectories import REASONS, EpochColumns, chosen, is_example

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..types import Change, CurriculumSettings, GroupStatistics

__all__ = [
    "EPOCHS",
    "GROUPS",
    "JOURNAL",
    "epochs",
    "groups",
    "journal",
]

GROUPS = (
    Column("epoch", "int64"),
    Column("example", "object"),
    Column("group", "Int64"),
    Column("trajectories", "int64"),
    Column("failures", "int64"),
    Column("mean", "float64"),
    Column("spread", "float64"),
    Column("std", "float64"),
    Column("min", "float64"),
    Column("max", "float64"),
    Column("kept", "bool"),
    Column("reason", "category", categories=REASONS),
    Column("submitted_order", "Int64"),
    Column("labels", "object"),
    Column("label_score", "float64"),
)
"""Columns of `groups`. The labels are those of the group itself, not of its rollouts."""


def _at(place: int) -> Callable[[Sequence[Any]], Any]:
    return lambda values: values[place]


def _percentile(curriculum: CurriculumSettings) -> float | None:
    return curriculum.percentile if curriculum.enabled else None


def _of_last(name: str, missing: Any = None) -> Callable[[Sequence[Validation]], Any]:
    return lambda validations: getattr(validations[-1], name) if validations else missing


def _status(job: Any) -> str | None:
    return None if job is None else str(job.status)


_DTYPES = {"float": "float64", "float | None": "float64", "int": "int64", "int | None": "Int64", "str | None": "str"}
"""The dtype of a field of EpochMetrics, by its annotation."""
_QUANTILES = ("group_p10", "group_p50", "group_p90")


def _metrics_columns() -> list[Column]:
    """A column for each number and text of EpochMetrics, in declaration order."""
    columns = []
    for field in fields(EpochMetrics):
        source = f"metrics.{field.name}"
        if field.name == "group_quantiles":
            for place, name in enumerate(_QUANTILES):
                columns.append(Column(name, "float64", source=source, make=_at(place)))
        elif field.type in _DTYPES:
            columns.append(Column(field.name, _DTYPES[field.type], source=source))
    return columns


EPOCHS = (
    Column("epoch", "int64", source="index"),
    Column("kind", "str", source="kind"),
    Column("started_at", "datetime, UTC", source="started_at"),
    *_metrics_columns(),
    Column("trained_groups", "Int64", source="trained_groups"),
    Column("curriculum", "bool", source="curriculum.enabled"),
    Column("percentile", "float64", source="curriculum", make=_percentile),
    Column("schedule", "str", source="curriculum.schedule"),
    Column("inferred", "bool", source="selection.inferred"),
    Column("validation_reward", "float64", source="validations", make=_of_last("mean_reward")),
    Column("validation_examples", "Int64", source="validations", make=_of_last("examples")),
    Column("validation_missing", "Int64", source="validations", make=_of_last("rewards_missing")),
    Column("validation_error", "str", source="validations", make=_of_last("error")),
    Column("job", "str", source="job", make=_status),
    Column("reason", "str", source="reason"),
    Column("policy_version", "Int64", source="policy_versions", make=_at(0)),
    Column("policy_version_after", "Int64", source="policy_versions", make=_at(1)),
    Column("labels", "object"),
    Column("label_score", "float64"),
    Column("score_<name>", "float64", source="metrics.scores"),
    Column("validation_score_<name>", "float64", source="validations", make=_of_last("scores", {})),
    Column("train_<metric>", "float64", source="train_metrics"),
    Column("seconds_<part>", "float64", source="seconds"),
)
"""Columns of `epochs`. The sources are attributes of Epoch; the labels are those of the epoch itself."""
JOURNAL = (
    Column("time", "datetime, UTC", source="time"),
    Column("source", "str", source="source"),
    Column("field", "str", source="field"),
    Column("old", "object", source="old"),
    Column("new", "object", source="new"),
    Column("epoch", "Int64", source="epoch"),
)
"""Columns of `journal`. The sources are attributes of Change."""


def groups(
    epochs: Iterable[Epoch],
    example: Any = None,
    columns: Sequence[str] | str | None = None,
    labels: Iterable[Label] = (),
) -> pd.DataFrame:
    """One row = one group of one epoch, then one for each example with failed rollouts and no group.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id
    group            Int64      the group's position in the collection, from 0; <NA> if there is none
    trajectories     int64      rollouts that finished
    failures         int64      rollouts of the example that failed
    mean             float64    mean of the known rewards; NaN if there are none
    spread           float64    largest minus smallest reward; NaN if there are none or one is infinite
    std              float64    sample standard deviation (ddof=1); NaN for fewer than two rewards
    min              float64    smallest reward
    max              float64    largest reward
    kept             bool       whether the group was selected for training
    reason           category   GroupReason: why it was kept or not
    submitted_order  Int64      position in the order of submission, from 0; <NA> if it was not submitted
    labels           object     the tags of the group's own labels, a tuple: ("hard",); () if it has none
    label_score      float64    the mean of these tags' scores; NaN if it has none
    ================ ========== =============================================================================

    Args:
        epochs: The records.
        example: Only the groups of this example, or of a list of examples. Default: all.
        columns: Only these columns, in this order. Default: all.
        labels: Labels, of which those of these groups are shown.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    names = asked_for(columns, [column.name for column in GROUPS])
    labelled = labels_by_name(labels, "group")
    parts = [_groups_of(epoch, example, labelled) for epoch in epochs]
    found = {column.name: column_of(column, [part[column.name] for part in parts]) for column in GROUPS}
    return framed(found, names)


def epochs(
    epochs: Iterable[Epoch], columns: Sequence[str] | str | None = None, labels: Iterable[Label] = ()
) -> pd.DataFrame:
    """One row = one epoch.

    ======================= ============== =====================================================================
    epoch                   int64          counts from 0
    kind                    str            "rollouts", or "warm_up" for an epoch that learned demonstrations
    started_at              datetime, UTC  when it began
    mean_reward             float64        over all finite rewards
    min_reward              float64        the smallest of them
    max_reward              float64        the largest of them
    kept_mean_reward        float64        over the groups that were kept
    group_p10               float64        10% quantile of the groups' mean rewards
    group_p50               float64        their median
    group_p90               float64        their 90% quantile
    trajectories            int64          rollouts that finished
    groups                  int64          groups of trajectories
    groups_with_spread      int64          groups whose rewards differ: only these can teach
    kept_trajectories       int64          trajectories in the groups that were kept
    kept_groups             int64          groups that were kept: selected for training
    failures                int64          rollouts that failed
    sampled_tokens          int64          tokens that the policy sampled
    mean_entropy            float64        mean entropy of the policy at those tokens (nats); NaN if it was not recorded
    replies_cut             Int64          trajectories whose last reply was cut at the token limit
    length_correlation      float64        how the reward goes with the number of sampled tokens, from -1 to 1, among whole
                                           replies of one group with as many messages; NaN if too few differ
    continued_turns         Int64          sampled turns that continue a conversation
    drifted_turns           Int64          those of them that were rendered anew instead of continuing the sampled ids
    rewards_missing         Int64          trajectories without a reward
    reward_error            str            the most frequent reason why a reward is missing; NaN if none is
    version_lag             Int64          policy versions by which the weights that sampled are older than those that were
                                           trained: 1 with max_staleness 1, <NA> if that is not known
    trained_groups          Int64          kept groups that the job trained on: their rewards differ. 0 if nothing was
                                           trained; <NA> if the backend does not say
    curriculum              bool           whether the curriculum was on
    percentile              float64        share of the groups with spread to train on, in (0, 1]; NaN if the
                                           curriculum was off: then all groups are kept
    schedule                str            "automatic" or "manual"
    inferred                bool           whether the reasons were inferred from what another Trainer chose
    validation_reward       float64        mean reward of the epoch's last validation
    validation_examples     Int64          how many examples have a reward
    validation_missing      Int64          how many have none, failed rollouts among them
    validation_error        str            why it failed; NaN if it did not
    job                     str            the training job's status; NaN if nothing was submitted
    reason                  str            why nothing was submitted
    policy_version          Int64          the weights that were sampled from
    policy_version_after    Int64          the weights after training
    labels                  object         the tags of the epoch's own labels, a tuple; () if it has none
    label_score             float64        the mean of these tags' scores; NaN if it has none
    score_<name>            float64        mean of evaluator <name>
    validation_score_<name> float64        the same on the validation dataset
    train_<metric>          float64        <metric> as measured by the backend
    seconds_<part>          float64        duration of each part: rollouts, selection, training, validation, total; of the
                                           total, ahead is what overlapped with the epoch before, and paused a pause
    ======================= ============== =====================================================================

    Args:
        epochs: The records.
        columns: Only these columns, in this order. Default: all.
        labels: Labels, of which those of these epochs are shown.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    records = list(epochs)
    labelled = labels_by_name(labels, "epoch")
    of_records = [labelled.get(f"e{record.index}", NO_LABELS) for record in records]
    found = _of_records(
        EPOCHS, records, {"labels": [t for t, _ in of_records], "label_score": [s for _, s in of_records]}
    )
    names = asked_for(columns, found, [column.prefix for column in EPOCHS if column.prefix])
    return framed(found, names)


def journal(changes: Iterable[Change], columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one change of one live setting, in order.

    ========== ================ ===============================================================================
    time       datetime, UTC    when it was requested
    source     str              who changed it: "code", "panel", "fork", ...
    field      str              name of the setting
    old        object           its value before
    new        object           its new value
    epoch      Int64            the epoch that used it first; <NA> while it is pending, or if replaced before that
    ========== ================ ===============================================================================

    Args:
        changes: The changes, in order.
        columns: Only these columns, in this order. Default: all.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    found = _of_records(JOURNAL, list(changes))
    return framed(found, asked_for(columns, found))


def _of_records(
    columns: Sequence[Column], records: Sequence[Any], given: Mapping[str, Sequence[Any]] = {}
) -> dict[str, Any]:
    """The columns of records, one row per record. given: the values of those without a source."""
    found: dict[str, Any] = {}
    for column in columns:
        if column.source is None:
            found |= columns_of(column, given[column.name])
            continue
        values = list(map(attrgetter(column.source), records))
        if column.make is not None:
            values = list(map(column.make, values))
        found |= columns_of(column, values)
    return found


# ── one epoch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _groups_of(epoch: Epoch, only: Any, labelled: Mapping[str, Labelling]) -> dict[str, Any]:
    """The values of GROUPS for one epoch: its groups, then the examples that only have failed rollouts."""
    import numpy as np

    statistics, selection = epoch.statistics, epoch.selection
    total = len(statistics)

    # A failed rollout counts in the group of its example; examples without a group get a row of their own.
    failed_ids = [failure["id"] for failure in EpochColumns(epoch).failures]
    failed = Counter(map(_key, failed_ids))
    failures = [failed.pop(_key(example), 0) for example in statistics.example_ids]
    id_of = {_key(example): example for example in failed_ids}
    alone = [id_of[key] for key in failed]
    failures += failed.values()
    extra = len(alone)

    sizes = np.diff(statistics.offsets)
    low, high = _extremes(statistics, sizes)
    order: list[int | None] = [None] * (total + extra)
    for place, group in enumerate(selection.kept.tolist()):
        order[group] = place

    def padded(values: Any, missing: Any) -> Any:
        return np.concatenate([values, np.full(extra, missing)])

    examples = [*statistics.example_ids, *alone]
    labels = [NO_LABELS] * len(examples)
    if labelled:
        labels = [labelled.get(f"e{epoch.index}/{plain(example)}", NO_LABELS) for example in examples]
    found = {
        "epoch": np.full(total + extra, epoch.index),
        "example": examples,
        "group": [*range(total), *[None] * extra],
        "trajectories": padded(sizes, 0),
        "failures": np.array(failures, dtype=np.int64),
        "mean": padded(statistics.means, math.nan),
        "spread": padded(statistics.spreads, math.nan),
        "std": padded(deviations(statistics), math.nan),
        "min": padded(low, math.nan),
        "max": padded(high, math.nan),
        "kept": padded(selection.reasons == 0, False),
        "reason": padded(selection.reasons, -1),
        "submitted_order": order,
        "labels": [tags for tags, _ in labels],
        "label_score": np.array([score for _, score in labels], dtype=np.float64),
    }
    if only is None:
        return found
    return chosen(found, np.array([is_example(example, only) for example in found["example"]], dtype=bool))


def _extremes(statistics: GroupStatistics, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest reward of each group; NaN if it has none."""
    import numpy as np

    low, high = np.full(len(sizes), math.nan), np.full(len(sizes), math.nan)
    filled = sizes > 0  # reduceat does not support empty slices
    if filled.any():
        starts = statistics.offsets[:-1][filled]
        low[filled] = np.fmin.reduceat(statistics.rewards, starts)
        high[filled] = np.fmax.reduceat(statistics.rewards, starts)
    return low, high


def _key(example: Any) -> Any:
    """An example's id as a dict key. For an id that cannot be hashed, its text."""
    try:
        hash(example)
    except TypeError:
        return plain(example)
    return example
