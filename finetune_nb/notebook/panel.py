"""The control panel of a run: what it is doing, and what may be asked of it, as ipywidgets (their core controls only).

A cell's output has the static panel; the widgets mount themselves over it while the kernel lives (see mount.py).
One Panel a run; shown again, it is another view of the same widgets. Buttons ask the run, inputs go into the draft of its
LiveSettings; everything that is only looked at is written by a thread of the panel's own: at most two messages a second, and
at most ten more in answer to a person's own input. Where nobody sees widgets, `still` is what a panel would show.
"""

from __future__ import annotations

import base64
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ..engine.live_settings import LiveSettings
from ..engine.state import RunStatus
from ..errors import FinetuneError
from ..redaction import error_text, redact_text, redacting_logger
from ..training.preview import Preview
from ..types import Change, CurriculumSettings
from ..views.html import Html, element, image, view
from ..views.preview_card import preview_body
from ..views.summary import run_html, run_text
from .kernel import answering_a_widget, current_cell, has_frontend, no_frontend_message, route_to_subshell
from .panel_html import asked_html, log_html, note_html, record_html, spoken_html, status_html, style_html
from .panel_inputs import Input, Inputs, TripwireInputs

__all__ = [
    "PanelRun",
    "Panel",
    "StaticPanel",
    "panel_of",
]

logger = redacting_logger(__name__)

EVERY = 0.5
"""Seconds between two messages of the panel's own accord."""
ANSWER_EVERY = 0.1
"""Seconds between two answers to a person's input."""
LOG_LINES = 8
REFRESH_SECONDS = 2.0
"""How often a panel looks for what another process has added to the run that it shows."""
_numbers = iter(range(1, 1_000_000))


class PanelRun(Protocol):
    """What a panel needs of a run."""

    id: str
    tripwires: list[Any]

    @property
    def _recorded_in(self) -> object | None: ...

    @property
    def status(self) -> RunStatus: ...
    @property
    def folder(self) -> Path: ...
    @property
    def changes(self) -> Sequence[Change]: ...
    def log_lines(self, count: int = 20) -> list[str]: ...
    def preview(self, changes: CurriculumSettings, *, weights: Mapping[str, float]) -> Preview: ...
    def refresh(self) -> None: ...
    def start(self, epochs: int | None = None) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...
    def abort(self) -> None: ...


class Panel:
    """The panel of one run, as a cell shows it. `close()` takes it away; it also ends with its run."""

    def __init__(self, run: PanelRun, settings: LiveSettings) -> None:
        import ipywidgets as w

        from .mount import Mount

        self.run, self.settings, self.number = run, settings, next(_numbers)
        self._refreshed = 0.0
        self._said: str | None = None
        self._said_at: str | None = None
        self._outputs: list[Any] = []
        self._outputs_have = len(run.status.epochs)
        self._answer_due = threading.Event()
        self._wake = threading.Event()
        self._answered = self._wrote = 0.0
        self._written: dict[str, float] = {}
        self._drawn: tuple[Any, str] = (None, "")
        self.closed = False
        panel = weakref.ref(self)

        def weakly(call: Callable[[Panel], Any]) -> Callable[..., None]:
            """Widgets live as long as the kernel; they must not keep a run that nobody else holds."""

            def answer(*_: Any) -> None:
                found = panel()
                if found is not None and not found.closed:
                    found._press(lambda: call(found))

            return answer

        def changed(said: str | None, field: str) -> None:
            found = panel()
            if found is not None:
                found._answer(said, field)

        held = weakref.ref(run)
        self.inputs = Inputs(settings, changed)
        self.tripwires = TripwireInputs(_get_tripwires(held), _put_tripwires(held))
        parts = ("status", "spoken", "record", "answer", "log")
        self.shown = {name: w.HTML().add_class(f"ft-b-{name}") for name in parts}
        notes = {f"note {each.name}": w.HTML().add_class("ft-b-note") for each in self.inputs.all()}
        self.shown |= notes
        buttons = {
            "start": w.Button(
                description="Start", icon="play", button_style="primary", tooltip="run epochs in the background"
            ),
            "step": w.Button(
                description="Run one epoch", icon="step-forward", tooltip="run one epoch in the background"
            ),
            "pause": w.Button(
                description="Pause", icon="pause", tooltip="hold at the next safe point: rollouts in progress finish"
            ),
            "resume": w.Button(description="Resume", icon="play", button_style="primary", tooltip="continue"),
            "stop": w.Button(description="Stop", icon="stop", tooltip="end after the current epoch"),
            "abort": w.Button(
                description="Abort", icon="times", tooltip="end the running epoch now; what was collected is kept"
            ),
            "close": w.Button(description="Close", tooltip="remove the panel; the run continues"),
            "apply": w.Button(
                description="Apply", icon="check", button_style="primary", tooltip="ask for what was tried out"
            ),
            "revert": w.Button(description="Revert", icon="undo", tooltip="back to what is asked for"),
        }
        presses: dict[str, Callable[[Panel], Any]] = {
            "start": lambda p: p.run.start(p.epochs.value),
            "step": lambda p: p.run.start(1),
            "pause": lambda p: p.run.pause(),
            "resume": lambda p: p.run.resume(),
            "stop": lambda p: p.run.stop(),
            "abort": lambda p: p.run.abort(),
            "close": lambda p: p.close(),
            "apply": lambda p: p.settings.apply_draft(),
            "revert": lambda p: p.settings.drop_draft(),
        }
        for name, button in buttons.items():
            button.add_class(f"ft-b-{name}").layout.width = "136px" if name == "step" else "96px"
            button.on_click(weakly(presses[name]))
        status = run.status
        left = max(1, status.planned - status.next_index)
        self.epochs = w.BoundedIntText(left, min=1, max=100_000, description="epochs", layout=w.Layout(width="140px"),
                                       tooltip="how many epochs Start runs",
                                       style={"description_width": "56px"}).add_class("ft-b-epochs")  # fmt: skip
        self.at_once = w.Checkbox(
            settings.at_once, description="apply at once", indent=False, layout=w.Layout(width="auto"),
            tooltip="every change is asked for as it is made, without a press of Apply",
        )  # fmt: skip
        self.fold = w.ToggleButton(
            False,
            description="Settings",
            icon="sliders",
            tooltip="show or hide the settings",
            layout=w.Layout(width="110px"),
        ).add_class("ft-b-fold")
        self.at_once.observe(weakly(lambda p: p._set_at_once()), "value")
        self.buttons = buttons
        self._steering = [*self.inputs.widgets, *self.tripwires.widgets, *buttons.values(), self.epochs, self.at_once]
        self.view = self._layout(can_steer=status.read_only is None)
        self.mount = Mount(self.view, f"import finetune_nb as ft; ft.Run.open({str(run.folder)!r}).panel()")
        self._tree = [*_family(self.mount), *_family(self.view)]
        route_to_subshell(self._steering)
        self._close_widgets = weakref.finalize(self, _close_all, self._tree)
        self._close_widgets.atexit = False
        self.tick(first=True)
        threading.Thread(target=_serve, args=(panel, self._wake), name=f"ft-panel-{run.id}", daemon=True).start()

    def _layout(self, can_steer: bool) -> Any:
        import ipywidgets as w

        def heading(text: str) -> Any:
            return w.HTML(element("div", text, class_="ft-section")).add_class("ft-b-heading")

        buttons, shown, wires = self.buttons, self.shown, self.tripwires
        row = {"flex_flow": "row wrap", "align_items": "center"}
        asks = [buttons[name] for name in ("start", "step", "pause", "resume", "stop", "abort")]
        gap = w.Box(layout=w.Layout(flex="1 1 auto"))
        bar = w.HBox([*asks, self.epochs, gap, self.fold, buttons["close"]], layout=w.Layout(**row)).add_class(
            "ft-b-bar"
        )

        def with_note(each: Input) -> list[Any]:
            return [each.widget, self.shown[f"note {each.name}"]]

        curriculum = [part for each in self.inputs.curriculum for part in with_note(each)]
        fields = [part for each in self.inputs.live for part in with_note(each)]
        if fields:
            fields.insert(0, heading("components"))
        pairs = [w.HBox([wires.spread, wires.share]), w.HBox([wires.falls, wires.times])]
        left = w.VBox(
            [
                heading("curriculum"),
                *curriculum,
                *fields,
                w.HBox([buttons["apply"], buttons["revert"], self.at_once], layout=w.Layout(**row)),
                heading("pause the run when"),
                *pairs,
            ],
            layout=w.Layout(flex="0 1 360px", min_width="min(320px, 100%)"),
        ).add_class("ft-b-inputs")
        right = w.VBox(
            [shown["record"], shown["answer"]], layout=w.Layout(flex="1 1 420px", min_width="min(320px, 100%)")
        ).add_class("ft-b-seen")
        body = w.HBox([left, right] if can_steer else [right], layout=w.Layout(flex_flow="row wrap")).add_class(
            "ft-b-body"
        )
        parts = [
            w.HTML(style_html()).add_class("ft-b-style"),
            shown["status"],
            shown["spoken"],
            bar,
            body,
            shown["log"],
        ]
        return w.VBox(parts).add_class("ft-panel").add_class(f"ft-panel-{self.number}")

    # ── what a person does ───────────────────────────────────────────────────────────────────────────────────────────

    def _press(self, call: Callable[[], Any]) -> None:
        said = None
        try:
            with answering_a_widget():
                call()
        except FinetuneError as error:
            said = str(error)
        except Exception as error:
            logger.warning("a press of the panel failed", exc_info=True)
            said = error_text(error)
        if not self.closed:
            self.inputs.sync_others()
            self._answer(said)

    def _set_at_once(self) -> None:
        self.settings.at_once = self.at_once.value
        if self.at_once.value:
            self.settings.apply_draft()

    def _answer(self, said: str | None, field: str | None = None) -> None:
        self._said, self._said_at = said, field
        self._answer_due.set()
        self._wake.set()

    # ── what the panel shows ─────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, first: bool = False) -> float:
        """Writes at most one message, if one is due. Returns the seconds until it should be asked again."""
        now = time.monotonic()
        if self._answer_due.is_set() and now - self._answered >= ANSWER_EVERY:
            self._answer_due.clear()
            self._answered = now
            self._write("answer", self._answer_html())
            for each in self.inputs.all():  # at most two of them change: the one that had the last error, and the next
                self._write(f"note {each.name}", note_html(self._said if each.name == self._said_at else None))
        elif first or now - self._wrote >= EVERY:
            self._wrote = now
            route_to_subshell(self._steering)
            texts = self._texts()
            stale = [name for name, text in texts.items() if self.shown[name].value != text]
            for name in stale if first else sorted(stale, key=lambda name: self._written.get(name, 0.0))[:1]:
                self._write(name, texts[name])
        else:
            due = [EVERY - (now - self._wrote)]
            due += [ANSWER_EVERY - (now - self._answered)] if self._answer_due.is_set() else []
            return max(0.005, min(due))
        return 0.005

    def _write(self, name: str, text: str) -> None:
        if self.shown[name].value != text:
            self._written[name] = time.monotonic()
            self.shown[name].value = text

    def _texts(self) -> dict[str, str]:
        status, changes = self._status(), self.run.changes
        newest = status.epochs[-1] if status.epochs else None
        key = (len(status.epochs), newest, len(changes), sum(change.epoch is not None for change in changes))
        if self._drawn[0] != key:
            self._drawn = key, record_html(status.epochs, changes)
        texts = {"record": self._drawn[1], "log": log_html(self.run.log_lines(LOG_LINES))}
        if not self._answer_due.is_set():
            texts["answer"] = self._answer_html()
        if not status.active and len(status.epochs) != self._outputs_have:
            self._outputs_have = len(status.epochs)
            self._refresh_outputs()
        return {**texts, "status": status_html(status, self.number), "spoken": spoken_html(status)}

    def _status(self) -> RunStatus:
        """The state of the run, including what another process has added to it."""
        status = self.run.status
        if status.writer and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self.run.refresh()
            status = self.run.status
        return status

    def _answer_html(self) -> str:
        settings, preview = self.settings, None
        with suppress(FinetuneError):  # no epoch has ended yet, say
            preview = self.run.preview(settings.drafted, weights=settings.drafted_weights)
        own = [each for each in self.run.tripwires if each not in self._panel_tripwires()]
        return asked_html(
            settings.applied,
            settings.pending,
            settings.draft,
            settings.live_fields,
            settings.waiting,
            self.number,
            self._said if self._said_at is None else None,
            preview and preview_body(preview),
            len(own),
        )

    def _panel_tripwires(self) -> list[Any]:
        from ..tripwires import SpreadBelow, ValidationFalls

        return [each for each in self.run.tripwires if isinstance(each, SpreadBelow | ValidationFalls)]

    def close(self) -> None:
        """Removes the panel, wherever it is shown; the run continues."""
        self.closed = True
        self._wake.set()
        self._close_widgets()

    def __repr__(self) -> str:
        return f"Panel of {self.run!r}"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        # With an id, so that the static panel can be brought up to date when the run has ended.
        handle = display(self._repr_mimebundle_(), raw=True, display_id=True)
        if not self._stands_by_a_record():
            self._outputs = [*self._outputs[-9:], handle]

    def _refresh_outputs(self) -> None:
        """Brings the static panels of the newest cells that show this one up to date, for a saved notebook."""
        bundle = self._repr_mimebundle_() if self._outputs else {}
        for handle in self._outputs:
            handle.update(bundle, raw=True)

    def _stands_by_a_record(self) -> bool:
        """Whether this cell also has the record of `run.start()`, which stays up to date and is hidden under a panel."""
        return self.run._recorded_in is not None and self.run._recorded_in == current_cell()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The run as it is now, which a saved notebook shows; while the kernel lives, the widgets are put over it."""
        if self.closed:
            return StaticPanel(self.run)._repr_mimebundle_()
        if self._stands_by_a_record():
            text = f"The control panel of run {self.run.id} is here while its kernel lives; run.panel() brings it back."
            bundle: dict[str, Any] = {"text/plain": text, "text/html": view(element("div", text), styled=False)}
        else:
            bundle = StaticPanel(self.run)._repr_mimebundle_()
            bundle.pop("image/png", None)  # it is in the HTML
        return self.mount.over(bundle["text/plain"], Html(bundle["text/html"]), self.view.model_id)


def _get_tripwires(run: weakref.ref[PanelRun]) -> Callable[[], list[Any]]:
    def get() -> list[Any]:
        found = run()
        return [] if found is None else list(found.tripwires)

    return get


def _put_tripwires(run: weakref.ref[PanelRun]) -> Callable[[list[Any]], None]:
    def put(tripwires: list[Any]) -> None:
        found = run()
        if found is not None:
            found.tripwires = tripwires

    return put


def _serve(panel: weakref.ref[Panel], wake: threading.Event) -> None:
    """The panel's thread. It ends with the panel, and holds neither that nor the run while it sleeps."""
    pause = EVERY
    while True:
        wake.wait(pause)
        wake.clear()
        found = panel()
        if found is None or found.closed:
            return
        try:
            pause = found.tick()
        except Exception:
            if found.closed:
                return
            logger.warning("the panel could not be brought up to date", exc_info=True)
            pause = 5.0
        del found


def _family(widget: Any) -> Any:
    """The widget, its style and layout, and all below it."""
    for child in getattr(widget, "children", ()):
        yield from _family(child)
    for part in ("style", "layout"):
        found = getattr(widget, part, None)
        if hasattr(found, "close"):
            yield found
    yield widget


def _close_all(widgets: Sequence[Any]) -> None:
    for widget in reversed(widgets):
        with suppress(Exception):  # the kernel may be on its way out
            widget.close()


DPI = 120
"""Of the picture: a run may be shown in many cells."""


class StaticPanel:
    """A panel without widgets: the run as it was when this was made."""

    def __init__(self, run: PanelRun) -> None:
        status = run.status
        where = {"name": status.name, "state": status.state, "epochs": status.epochs, "error": status.error}
        self._text = run_text(**where)
        self._png: bytes | None = None
        body = [Html(run_html(**where))]
        if status.notice and not status.error:
            body.append(Html(view(status.notice, styled=False)))
        if status.epochs:
            from ..plots.curves import plot_rewards

            figure: Any = plot_rewards(SimpleNamespace(id=status.name, records=status.epochs, changes=run.changes))
            self._png = picture = figure.png(DPI)
            body.append(image(picture, redact_text(figure.alt_text), round(96 * figure.get_figwidth())))
        if absent := no_frontend_message():
            body.append(Html(view(element("div", absent, class_="ft-dim"), styled=False)))
        self._html = str(element("div", *body))

    def __repr__(self) -> str:
        return self._text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        found = {"text/plain": self._text, "text/html": self._html}
        return {**found, "image/png": base64.b64encode(self._png).decode("ascii")} if self._png else found


def panel_of(run: PanelRun, settings: LiveSettings, shown: Panel | None) -> Panel | StaticPanel:
    """The run's panel; without widgets where nobody would see them.

    Args:
        run: The run to steer.
        settings: Its live settings, which the inputs draft.
        shown: The panel that it has already, if any.
    """
    if not has_frontend():
        return StaticPanel(run)
    if shown is None or shown.closed:
        return Panel(run, settings)
    return shown
