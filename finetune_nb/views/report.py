"""Makes the HTML report of a run: plots, tables, a few trajectories and a browser of all in one self-contained file.

It fetches nothing, and its only script is the browser's; every text is escaped, and known secrets are masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

from ..analysis.run_comparison import compare_runs
from ..errors import StoreError
from ..redaction import redact_text
from ..store.folder import CONFIG
from ..text import count, number, plain, signed, trend
from ..types import Epoch
from .html import Html, PagePart, details, element, image, page, table, view
from .rollout import failure_html, trajectory_html
from .summary import epoch_html, run_html
from .tokens import PRE

__all__ = [
    "report_html",
]

MOST = 200
"""Most rows of a table; the newest are shown."""


def report_html(run: Any, browser: PagePart | None = None) -> str:
    """Make the report of a run.

    It says what came of the run, and has the plots with captions, the epochs and live changes as tables, the best, the median and
    the worst trajectory of the newest epoch, a failed rollout if there is one, the browser, and the configuration.

    Args:
        run: The run.
        browser: The trajectory browser; None: the report has none.

    Returns:
        An HTML document.
    """
    epochs: Sequence[Epoch] = run.records
    pieces = [_opening(run, epochs)]
    overview = Html(run_html(name=run.id, state=run.state, epochs=epochs, error=run.error, model=run.model))
    pieces.append(_section("Overview", overview))
    if epochs:
        pieces += [_section("Plots", element("div", *_pictures(run, epochs), class_="columns"))]
        pieces += [_section("The newest epoch", Html(epoch_html(epochs[-1])))]
        pieces += [_section("Trajectories of it", element("div", *_rollouts(epochs[-1]), class_="columns"))]
        if browser is not None:
            pieces += [element("section", element("h2", "Rollouts"), browser.html)]
        steered = any(epoch.curriculum.enabled for epoch in epochs)
        columns = [name for name in _OF_EPOCHS if steered or name != "percentile"]
        pieces += [_section("Epochs", Html(view(_frame(run.epochs(), "epochs", columns), wide=True)))]
    if run.changes:
        pieces += [_section("Live changes", Html(view(_frame(run.journal(), "changes"), wide=True)))]
    config = _config(run)
    if config:
        shown = details(f"config.yml, {count(len(config.splitlines()), 'line')}", element("pre", config, style=PRE))
        pieces.append(_section("Configuration", Html(view(shown))))
    return page(f"run {plain(run.id)}", *pieces, script=browser and browser.script)


def _opening(run: Any, epochs: Sequence[Epoch]) -> Html:
    """The title, and in a few sentences what came of the run."""
    title = element("h1", "Run ", plain(run.id))
    return Html(redact_text(element("header", title, element("p", verdict(epochs), class_="verdict"))))


def verdict(epochs: Sequence[Epoch]) -> str:
    """What came of a run: whether the reward of the examples that its first and newest epoch share rose, fell, or neither, and
    how that of held-out examples went."""
    if not epochs:
        return "No epoch has ended yet."
    first, newest = epochs[0], epochs[-1]
    if len(epochs) == 1:
        return f"One epoch has ended, with a mean reward of {number(newest.metrics.mean_reward)}."
    same_index = SimpleNamespace(index=first.index, statistics=newest.statistics)
    (found,) = compare_runs({"first": [first], "newest": [same_index]}).differences  # type: ignore[list-item]
    course = trend([epoch.metrics.mean_reward for epoch in epochs], none="has no value")
    both = f"of the {count(found.examples, 'example')} that epochs {first.index} and {newest.index} share"
    interval = f"{signed(found.mean)}, 95 % interval {signed(found.low)} to {signed(found.high)}"
    said = [f"The mean reward per epoch went {course} in {count(len(epochs), 'epoch')}."]
    if not found.examples:
        said.append("Its first and its newest epoch share no example, so that they cannot be compared.")
    elif found.is_clear:
        said.append(f"The reward {both} {'rose' if found.mean > 0 else 'fell'}: {interval}.")
    else:
        said.append(f"Whether the reward {both} changed is not clear: {interval}.")
    held_out = [v.mean_reward for epoch in epochs for v in epoch.validations if math.isfinite(v.mean_reward)]
    if len(held_out) > 1:
        said.append(f"On held-out examples it went {trend(held_out)}.")
    return " ".join(said)


def _config(run: Any) -> str:
    """The run's config as it is stored, without secrets; empty where there is none."""
    if run.folder is None:
        return ""
    try:
        return (run.folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


_OF_EPOCHS = (
    "epoch",
    "mean_reward",
    "validation_reward",
    "groups",
    "groups_with_spread",
    "kept_groups",
    "trained_groups",
    "failures",
    "rewards_missing",
    "reward_error",
    "percentile",
    "train_loss",
    "train_kl",
    "job",
    "reason",
    "seconds_total",
)


def _section(title: str | None, *body: Any) -> Html:
    """One section of the page, with known secrets masked."""
    made = element("section", title and element("h2", title), *body)
    return made if "data:image/png" in made else Html(redact_text(made))


def _pictures(run: Any, epochs: Sequence[Epoch]) -> Iterator[Html]:
    draws = [run.plot_rewards, run.plot_reward_distribution, run.plot_curriculum, run.plot_groups]
    draws += [run.plot_advantages, run.plot_lengths]
    if any(epoch.metrics.scores for epoch in epochs):
        draws.append(run.plot_scores)
    if any(epoch.train_metrics for epoch in epochs):
        draws.append(run.plot_training)
    for draw in draws:
        try:
            figure = draw()
        except StoreError as error:  # the file of an epoch is gone; all else is worth a report
            yield element("p", redact_text(f"{draw.__name__} is left out: {error}"))
            continue
        caption = redact_text(figure.alt_text)
        picture = image(figure.png(), caption, round(96 * figure.get_figwidth()))
        yield element("figure", picture, element("figcaption", caption))


def _rollouts(epoch: Epoch) -> Iterator[Html]:
    """The best, the median and the worst trajectory by finite reward, and a failed rollout."""
    trajectories = chain.from_iterable(epoch.collection.trajectories)
    scored = [trajectory for trajectory in trajectories if math.isfinite(trajectory.reward)]
    scored.sort(key=lambda trajectory: trajectory.reward)
    if scored:
        yield details("the best", Html(trajectory_html(scored[-1])), open=True)
        yield details("the median", Html(trajectory_html(scored[len(scored) // 2])))
        yield details("the worst", Html(trajectory_html(scored[0])))
    if epoch.collection.failures:
        yield details("a failed rollout", Html(failure_html(epoch.collection.failures[0])))


def _frame(frame: Any, noun: str, columns: Sequence[str] | None = None) -> Html:
    """A frame as a table: its newest rows, and the columns that have values."""
    shown = frame.tail(MOST)
    names, values = [], []
    for name in columns or frame.columns:
        if name in frame.columns and shown[name].notna().any():
            names.append(name.replace("_", " "))  # words, so that a narrow page can break the line
            column = shown[name].astype(object)
            values.append(
                [_cell(value) for value in column.where(column.notna(), None)]
            )  # pd.NA is neither equal nor unequal
    caption = f"the last {len(shown)} of {len(frame):,} {noun}" if len(shown) < len(frame) else None
    return table(list(zip(*values, strict=True)), names, caption)


def _cell(value: Any) -> Any:
    """A value in a table: numbers as they are, times to the second, empty if missing, anything else as text."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float | str):
        return value
    if hasattr(value, "strftime"):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return plain(value)
