"""The panel's inputs: one set of widgets for the curriculum's settings, the live fields of components and the tripwires.

What a person moves goes, as one validated value, into the draft of the LiveSettings, and nowhere else. The kernel writes to
these widgets only inside a callback of theirs, when it brings those along that nobody has touched: a write from a cell
would send their messages the cell's way (see kernel.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.live_settings import LiveField, LiveSettings
from ..errors import FinetuneError
from ..tripwires import SpreadBelow, Tripwire, ValidationFalls
from ..types import CurriculumSettings

__all__ = [
    "Inputs",
    "TripwireInputs",
]

LABELS = {"description_width": "132px"}
PARTS = {"adapter": "training", "builder": "rollouts", "llm": "model", "eval": "rollouts"}


@dataclass(frozen=True)
class Input:
    """A widget of one setting. read: what the widget shows -> the setting; write: the way back."""

    name: str
    widget: Any
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


class Inputs:
    """The widgets of one run. changed: called after every change, with an error's text or None, and the input's name."""

    def __init__(self, live_settings: LiveSettings, changed: Callable[[str | None, str], None]) -> None:
        self._live_settings, self._changed = live_settings, changed
        self._turn = threading.RLock()  # callbacks may come on several threads
        self._writing = False
        asked = live_settings.curriculum
        self.curriculum = _curriculum(asked)
        self.live = [_live(field) for field in live_settings.live_fields]
        for each in self.all():
            each.widget.observe(lambda change, each=each: self._moved(each, change.new), "value")

    def all(self) -> Sequence[Input]:
        """Every input, in the order of the panel."""
        return (*self.curriculum, *self.live)

    @property
    def widgets(self) -> list[Any]:
        return [each.widget for each in self.all()]

    def _moved(self, moved: Input, value: Any) -> None:
        with self._turn:
            if self._writing:
                return
            said = None
            changes = {moved.name: moved.read(value)}
            if moved in self.curriculum and moved.name != "enabled" and not self._live_settings.drafted.enabled:
                changes["enabled"] = True  # or what was moved would do nothing
            try:
                self._live_settings.draft_changes(changes)
            except FinetuneError as error:
                said = str(error)
            self.sync_others(but=None if said else moved)
        self._changed(said, moved.name)

    def sync_others(self, but: Input | None = None) -> None:
        """Shows in every other input what the draft has, or else what is asked for. Only from a widget's callback."""
        with self._turn:
            values = {**vars(self._live_settings.drafted), **{f.name: f.value for f in self._live_settings.live_fields}}
            values |= self._live_settings.draft
            self._writing = True
            try:
                for each in self.all():
                    if each is not but and each.read(each.widget.value) != values[each.name]:
                        each.widget.value = each.write(values[each.name])
            finally:
                self._writing = False


def _curriculum(asked: CurriculumSettings) -> list[Input]:
    import ipywidgets as w

    common: dict[str, Any] = {"style": LABELS, "layout": w.Layout(width="auto")}
    share = {**common, "min": 0.01, "max": 1.0, "step": 0.01}
    toggles = {**LABELS, "button_width": "100px"}
    shown = vars(asked)
    made = [
        Input(
            "enabled",
            w.Checkbox(description="curriculum: train on a part of the groups", indent=False, layout=w.Layout(width="auto"),
                       tooltip="off: every group is trained on. Moving one of the inputs below switches it on"),
        ),
        Input(
            "percentile",
            w.FloatSlider(description="percentile", readout_format=".2f", **share,
                          tooltip="share of the groups with spread that is trained on"),
            lambda value: round(value, 4),
        ),
        Input(
            "schedule",
            w.ToggleButtons(description="schedule", options=["automatic", "manual"], style=toggles,
                            tooltips=["the percentile grows by itself", "it stays where it was put"]),
        ),
        Input(
            "increment_percentile",
            w.BoundedFloatText(description="grows by", **{**share, "step": 0.05}, tooltip="added at every expansion"),
        ),
        Input(
            "expansion_interval",
            w.BoundedIntText(description="every … epochs", min=1, max=100_000, **common,
                             tooltip="epochs between two expansions"),
        ),
        Input(
            "min_reward_diff",
            w.BoundedFloatText(description="smallest spread", min=0.0, max=1e9, step=0.05, **common,
                               tooltip="groups whose rewards lie closer together teach nothing"),
        ),
        Input(
            "sort_ascending",
            w.Dropdown(description="order", options=[("best rewards first", False), ("worst rewards first", True)], **common,
                       tooltip="which groups the percentile takes first, by their mean reward"),
        ),
        Input(
            "random_subsample",
            w.FloatSlider(description="drawn at random", readout_format=".2f", **share,
                          tooltip="share of the chosen groups that is drawn at random and trained on; 1: all of them"),
            lambda value: None if value >= 1 else round(value, 4),
            lambda value: 1.0 if value is None else value,
        ),
    ]  # fmt: skip
    for each in made:
        each.widget.value = each.write(shown[each.name])
    return made


def _live(field: LiveField) -> Input:
    """A widget for whatever kind of value the field has."""
    import ipywidgets as w

    when = {"rollouts": "the next epoch's rollouts", "training": "the next training job"}[field.safe_point]
    common: dict[str, Any] = {
        "description": field.label or field.name,
        "tooltip": f"{field.name}, counts from {when} on. {field.doc}".strip(),
        "style": LABELS,
        "layout": w.Layout(width="auto"),
    }
    value = field.value
    if isinstance(value, bool):
        return Input(field.name, w.Checkbox(value=value, **common))
    if isinstance(value, int):
        low = -(2**31) if field.minimum is None else int(field.minimum)
        high = 2**31 - 1 if field.maximum is None else int(field.maximum)
        return Input(field.name, w.BoundedIntText(value=value, min=low, max=high, **common))
    if isinstance(value, float):
        return Input(field.name, w.FloatText(value=value, step=None, **common))
    text = w.Text(value="" if value is None else str(value), continuous_update=False, **common)
    if value is None:  # a number that may be missing: what is empty is none
        return Input(
            field.name, text, lambda value: value.strip() or None, lambda value: "" if value is None else str(value)
        )
    return Input(field.name, text, write=str)


# ── tripwires ────────────────────────────────────────────────────────────────────────────────────────────────────────


class TripwireInputs:
    """Two tripwires to switch on. The run's own list is replaced, with those from code as they are."""

    def __init__(self, get: Callable[[], Sequence[Tripwire]], put: Callable[[list[Tripwire]], None]) -> None:
        import ipywidgets as w

        self._get, self._put = get, put
        spread = next((each for each in get() if isinstance(each, SpreadBelow)), None)
        falls = next((each for each in get() if isinstance(each, ValidationFalls)), None)
        wide, short = w.Layout(width="auto", flex="1 1 auto"), w.Layout(width="138px")
        style = {"description_width": "66px"}
        self.spread = w.Checkbox(
            bool(spread), description="few groups teach", indent=False, layout=wide,
            tooltip="pause the run if the share of groups whose rewards differ falls below that",
        )  # fmt: skip
        self.share = w.BoundedIntText(
            round(100 * spread.share) if spread else 20,
            min=1,
            max=100,
            description="below, %",
            tooltip="share of the groups whose rewards differ, in per cent",
            style=style,
            layout=short,
        )
        self.falls = w.Checkbox(
            bool(falls), description="validation falls", indent=False, layout=wide,
            tooltip="pause the run if the validation reward falls so many times in a row",
        )  # fmt: skip
        self.times = w.BoundedIntText(
            falls.times if falls else 3,
            min=1,
            max=1000,
            description="in a row",
            tooltip="how many validations in a row",
            style=style,
            layout=short,
        )
        for widget in self.widgets:
            widget.observe(lambda change: self._moved(), "value")

    @property
    def widgets(self) -> list[Any]:
        return [self.spread, self.share, self.falls, self.times]

    def _moved(self) -> None:
        own: list[Tripwire] = [each for each in self._get() if not isinstance(each, SpreadBelow | ValidationFalls)]
        chosen = [SpreadBelow(self.share.value / 100)] * self.spread.value + [
            ValidationFalls(self.times.value)
        ] * self.falls.value
        self._put([*chosen, *own])
