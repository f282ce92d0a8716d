"""How far two ways to score the same rollouts agree: a judge and a person, say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..hooks import shown_by

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..rewards.labels import Tags

__all__ = [
    "Agreement",
    "agreement",
    "cohens_kappa",
]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Scores beside labels of the same rollouts; displays itself in a cell."""

    frame: pd.DataFrame
    """One row a labelled rollout that has a score: trajectory, label, score, difference (score - label), length (characters of
    the output); those that differ most first."""
    kappa: float
    """Cohen's kappa of score and label, each above the middle of the scale or not: 1 is full agreement, 0 that of chance. NaN
    where all are on one side."""
    correlation: float
    """Pearson's; NaN where one side does not vary."""
    rank_correlation: float
    """Spearman's."""
    bias: float
    """Mean of score - label."""
    length_bias: float
    """Correlation of score - label with the output's length."""
    missing: int
    """Labelled rollouts without a score."""

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.agreement:agreement_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.agreement:agreement_html", self)


def agreement(
    names: Sequence[str],
    labels: Sequence[float],
    scores: Sequence[float],
    lengths: Sequence[int],
    scale: tuple[float, float] = (0.0, 1.0),
) -> Agreement:
    """Compare scores with labels.

    Args:
        names: (N,) the rollouts.
        labels: (N,) what a person says.
        scores: (N,) what a judge says, NaN where it says nothing.
        lengths: (N,) characters of each output.
        scale: Lowest and highest value of both; its middle separates good from bad for Cohen's kappa.

    Returns:
        The agreement.
    """
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame({"trajectory": list(names), "label": labels, "score": scores, "length": lengths})
    missing = int(frame.score.isna().sum())
    frame = frame.dropna(subset=["label", "score"]).reset_index(drop=True)
    frame.insert(3, "difference", frame.score - frame.label)
    order = np.argsort(-frame.difference.abs().to_numpy(), kind="stable")
    frame = frame.iloc[order].reset_index(drop=True)
    middle = sum(scale) / 2
    label, score = frame.label.to_numpy(dtype=float), frame.score.to_numpy(dtype=float)
    return Agreement(
        frame=frame,
        kappa=cohens_kappa(label > middle, score > middle),
        correlation=_correlation(label, score),
        rank_correlation=_correlation(frame.label.rank().to_numpy(), frame.score.rank().to_numpy()),
        bias=float(np.mean(score - label)) if len(frame) else math.nan,
        length_bias=_correlation(score - label, frame.length.to_numpy(dtype=float)),
        missing=missing,
    )


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa of two ratings with the same categories: (observed - chance) / (1 - chance).

    J. Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960).

    Args:
        first: (N,) categories.
        second: (N,) categories.

    Returns:
        From -1 to 1; NaN without ratings, and where both give one and the same category to all.
    """
    import numpy as np

    if not len(first):
        return math.nan
    categories = np.unique(np.concatenate([first, second]))
    observed = float(np.mean(first == second))
    chance = sum(float(np.mean(first == each) * np.mean(second == each)) for each in categories)
    return math.nan if math.isclose(chance, 1.0) else (observed - chance) / (1 - chance)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; NaN where one side does not vary."""
    import numpy as np

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def labels_of(labels: Any, tags: Tags | None = None) -> dict[str, float]:
    """Labels by the name of the trajectory.

    Args:
        labels: A mapping or a Series from names such as "e3/q17/2" to numbers or booleans; a frame with the columns
            `trajectory` and `label`; or one with `name`, `tag` and `score`, as `run.labels()` returns it.
        tags: Of such a frame, which labels count, as in `label_reward`. None: those that have a score, if they have one tag.

    Raises:
        ConfigError: It is none of these, a label is no number, or the tags do not say which labels count.
    """
    if hasattr(labels, "columns") and {"name", "tag", "score"} <= set(labels.columns):
        labels = _values_of_tags(labels, tags)
    elif tags is not None:
        raise ConfigError("tags= chooses among the labels of run.labels(); these are numbers already: leave it out.")
    elif hasattr(labels, "columns"):
        if not {"trajectory", "label"} <= set(labels.columns):
            raise ConfigError(
                f"the frame of labels has the columns {', '.join(map(str, labels.columns))}; expected trajectory and label, "
                "or those of run.labels()."
            )
        labels = dict(zip(labels["trajectory"], labels["label"], strict=True))
    elif hasattr(labels, "to_dict"):
        labels = labels.to_dict()
    if not isinstance(labels, Mapping):
        raise ConfigError(
            f"labels are a mapping from names of trajectories to numbers, or a frame; got {type(labels).__name__}."
        )
    found = {}
    for name, value in labels.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the label of {name!r} is {value!r:.60}; expected a number.") from error
    if not found:
        raise ConfigError("there are no labels. Label some rollouts, by the column `trajectory` of run.trajectories().")
    return found


def _values_of_tags(frame: Any, tags: Tags | None) -> dict[str, float]:
    """Of each labelled rollout in the frame, what its labels amount to. Labels of groups and epochs are left out."""
    from ..rewards.labels import checked_tags, label_value
    from ..store.labels import mean_scores

    if "level" in frame.columns:
        frame = frame[frame["level"] == "rollout"]
    if tags is None:
        frame = frame[frame["score"].notna()]
        scored = list(dict.fromkeys(frame["tag"].tolist()))
        if len(scored) != 1:
            found = f"scores of {', '.join(map(repr, scored[:5]))}" if scored else "no label with a score"
            raise ConfigError(
                f"found {found}; expected those of one tag. Say which labels count, and as what: "
                'tags="good", or tags={"good": 1, "hacked": 0}.'
            )
        tags = scored[0]
    wanted = checked_tags(tags)
    scores = mean_scores(zip(frame["name"].tolist(), frame["tag"].tolist(), frame["score"].tolist(), strict=True))
    values: dict[str, float] = {}
    for name, by_tag in scores.items():
        value = label_value(by_tag, wanted)
        if value is not None:
            values[name] = value
    if scores and not values:
        raise ConfigError(f"no label has one of the tags {', '.join(map(repr, wanted))}. Label some rollouts with it.")
    return values
