"""A run as its panel knows it: where it stands, in one value, and the few things that a panel does beside pressing what the
run itself offers. Loaded by `run.panel()`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .controls import Controls
from .errors import RunError
from .kernel import is_seen
from .panel import Panel
from .panel_html import Doing
from .preview import Preview, preview
from .states import ACTIVE
from .still import Still

if TYPE_CHECKING:
    from .live_run import LiveRun

__all__ = ["Helm", "panel_of"]

REFRESH_SECONDS = 2.0
"""How often a panel looks for what another process has added to the run that it shows."""


def panel_of(run: LiveRun) -> Panel | Still:
    """The run's panel, made where there is none; without widgets where nobody would see them."""
    if not is_seen():
        return Still(Helm(run))
    if run._panel is None or run._panel.closed:
        run._panel = Panel(Helm(run))
    return run._panel


class Helm:
    """What a Panel steers by."""

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self._refreshed = 0.0

    @property
    def controls(self) -> Controls:
        return self.run._controls

    def doing(self) -> Doing:
        """Where the run stands."""
        run, looked_at = self.run, self._why_only_looked_at()
        if looked_at and run.writer and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            run.refresh()
        progress, state = run.progress, run.state
        live = state in ACTIVE and run._driver.at_work
        return Doing(
            name=run.id,
            state=state,
            epochs=run.records,
            next_index=run.next_index,
            planned=run.planned,
            phase=progress.phase if live else "",
            done=progress.done if live else 0,
            failed=progress.failed if live else 0,
            total=progress.total if live else 0,
            trained=progress.trained if live else 0.0,
            job=progress.job if live else "",
            seconds=progress.seconds if live else 0.0,
            notice=run.notice,
            error=run.error,
            looked_at=looked_at,
        )

    def _why_only_looked_at(self) -> str | None:
        run = self.run
        if run._closed:
            return "This run is closed: it can be looked at. Run.open goes on with it."
        if run._unable:
            return run._unable
        if run.writer:
            return f"Another process writes this run ({run.writer}): it can be looked at here, and steered there."
        try:
            run._driver.require_single_epochs()
        except RunError as error:
            return str(error)
        return None

    def preview(self) -> Preview | None:
        """What the draft would do; None before the first epoch."""
        basis, controls = self.run._preview_basis(), self.controls
        if basis is None:
            return None
        return preview(basis, controls.applied, controls.curriculum, controls.drafted, self.run.config.run.seed)

    def ask(self) -> None:
        """Asks for what is in the draft."""
        self.controls.ask_for_draft()
        self.run._write_journal()
