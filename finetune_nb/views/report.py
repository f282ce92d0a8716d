"""The HTML report of a run: plots, tables and a few trajectories in one file that needs nothing else.

No script, nothing that is fetched, every text escaped. The pieces are those of viewer.py, rollout_view.py and plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ..redaction import redact_text
from ..text import plain
from ..types import Epoch, RolloutFailure, Trajectory
from .html import Html, details, element, image, page, table, view
from .rollout import failure_html, trajectory_html
from .summary import epoch_html, run_html

__all__ = [
    "report_html",
]

MOST = 200
"""Rows of a table; of more, the newest."""


def report_html(run: Any) -> str:
    """The report of a run: how its rewards went, what its curriculum chose, what training measured, its epochs and live
    changes as tables, and the best, the median and the worst trajectory of the newest epoch, with a failed rollout if
    there is one."""
    epochs: Sequence[Epoch] = run.records
    pieces = [
        _section(None, Html(run_html(name=run.id, state=run.state, epochs=epochs, error=run.error, model=run.model)))
    ]
    if epochs:
        pieces += [_section("Plots", *(element("p", picture) for picture in _pictures(run, epochs)))]
        pieces += [_section("The newest epoch", Html(epoch_html(epochs[-1])))]
        pieces += [_section("Trajectories of it", *_rollouts(epochs[-1]))]
        steered = any(epoch.curriculum.enabled for epoch in epochs)
        columns = [name for name in _OF_EPOCHS if steered or name != "percentile"]
        pieces += [_section("Epochs", Html(view(_frame(run.epochs(), "epochs", columns))))]
    if run.changes:
        pieces += [_section("Live changes", Html(view(_frame(run.journal(), "changes"))))]
    return page(f"run {plain(run.id)}", *pieces)


_OF_EPOCHS = (
    "epoch",
    "mean_reward",
    "validation_reward",
    "groups",
    "groups_with_spread",
    "kept_groups",
    "failures",
    "percentile",
    "train_loss",
    "train_kl",
    "job",
    "reason",
    "seconds_total",
)


def _section(title: str | None, *body: Any) -> Html:
    """One part of the page; known secrets are masked in it."""
    made = element("section", title and element("h2", title), *body)
    return made if "data:image/png" in made else Html(redact_text(made))


def _pictures(run: Any, epochs: Sequence[Epoch]) -> Iterator[Html]:
    drawn = [run.plot_rewards(), run.plot_reward_distribution(), run.plot_curriculum(), run.plot_groups()]
    drawn += [run.plot_advantages(), run.plot_lengths()]
    if any(epoch.metrics.scores for epoch in epochs):
        drawn.append(run.plot_scores())
    if any(epoch.train_metrics for epoch in epochs):
        drawn.append(run.plot_training())
    for figure in drawn:
        yield image(figure.png(), redact_text(figure.alt_text), round(96 * figure.get_figwidth()))


def _rollouts(epoch: Epoch) -> Iterator[Html]:
    scored = sorted(
        (t for t in chain.from_iterable(epoch.collection.trajectories) if math.isfinite(t.reward)), key=_reward
    )
    chosen: dict[str, Trajectory | RolloutFailure] = {}
    if scored:
        chosen |= {"the best": scored[-1], "the median": scored[len(scored) // 2], "the worst": scored[0]}
    if epoch.collection.failures:
        chosen["a failed rollout"] = epoch.collection.failures[0]
    for name, rollout in chosen.items():
        shown = failure_html(rollout) if isinstance(rollout, RolloutFailure) else trajectory_html(rollout)
        yield details(name, Html(shown), open=name == "the best")


def _reward(trajectory: Trajectory) -> float:
    return trajectory.reward


def _frame(frame: Any, noun: str, columns: Sequence[str] | None = None) -> Html:
    """A frame as a table: its newest rows, and of the columns those that have a value."""
    shown = frame.tail(MOST)
    names = [n for n in columns or frame.columns if n in frame.columns and shown[n].notna().any()]
    values = [[None if value is None or value != value else value for value in shown[n].astype(object)] for n in names]
    rows = [[_cell(value) for value in row] for row in zip(*values, strict=True)]
    caption = f"the last {len(shown)} of {len(frame):,} {noun}" if len(shown) < len(frame) else None
    return table(rows, [name.replace("_", " ") for name in names], caption)  # words, which a narrow page can break


def _cell(value: Any) -> Any:
    """A value of a table: numbers as they are, a time to the second, all else as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return "" if value is None else str(value) if isinstance(value, bool) else value
    return f"{value:%Y-%m-%d %H:%M:%S}" if hasattr(value, "strftime") else plain(value)
