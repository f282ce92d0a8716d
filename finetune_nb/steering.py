"""Steering a run: its live settings, what others would do, and the panel that does the same by hand.

A change is put into the Controls, which any thread may do; the engine takes it over at its safe point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import CurriculumSettings
from .controls import LiveField
from .errors import ConfigError, RunError, did_you_mean
from .run_on_disk import RunOnDisk

if TYPE_CHECKING:
    from .preview import Basis, Preview

__all__ = ["Steering"]


class Steering(RunOnDisk):
    """A run whose settings can be changed while it goes on."""

    _basis: Basis | None = None

    @property
    def curriculum(self) -> CurriculumSettings:
        """The settings that the next selection uses. Set it to a dict of changes, or to whole CurriculumSettings: they
        count from the next selection, also that of an epoch whose rollouts are running. A dict switches the curriculum on
        unless it says `enabled`. A percentile that is set stays ("manual") until `schedule="automatic"`."""
        self._driver.require_single_epochs()
        return self._controls.curriculum

    @curriculum.setter
    def curriculum(self, changes: Mapping[str, Any] | CurriculumSettings) -> None:
        self._driver.require_single_epochs()
        self._change(_switched_on(changes))

    @property
    def live(self) -> dict[str, Any]:
        """The settings of components that may be changed while the run goes on, by name: `adapter.learning_rate`, ..."""
        return {field.name: field.value for field in self._controls.live_fields}

    @live.setter
    def live(self, changes: Mapping[str, Any]) -> None:
        if unknown := [name for name in changes if name not in self.live]:
            raise ConfigError(f"{unknown[0]!r} cannot be changed live. {did_you_mean(unknown[0], self.live)}")
        self._change(changes)

    def _change(self, changes: Mapping[str, Any] | CurriculumSettings) -> None:
        self._controls.change(changes)
        self._write_journal()

    def _write_journal(self) -> None:
        """Writes down what was asked for."""
        if self._driver.is_open:
            self._driver.recorder.journal(self._controls)

    @property
    def live_fields(self) -> tuple[LiveField, ...]:
        """The same with limits and descriptions."""
        return self._controls.live_fields

    # ── before it is done ────────────────────────────────────────────────────────────────────────────────────────────

    def preview(self, changes: Mapping[str, Any] | CurriculumSettings | None = None, **more: Any) -> Preview:
        """What other curriculum settings would do: `run.preview(percentile=0.5)`. Nothing is changed.

        The next selection is made on the newest epoch's rewards, with these settings and with those that are in force:
        which groups enter and leave, and why; trajectories, tokens and seconds of training. Shows itself as a card. Raises
        RunError before the first epoch, ConfigError for settings that do not fit.
        """
        from .preview import preview

        self._driver.require_single_epochs()
        if not isinstance(changes, CurriculumSettings):
            changes = {**(changes or {}), **more}
        asked = self._controls.curriculum
        settings = asked.updated(_switched_on(changes)) if changes else asked
        basis = self._preview_basis()
        if basis is None:
            raise RunError("there is nothing to preview on: no epoch has ended yet. Run one, then ask again.")
        return preview(basis, self._controls.applied, asked, settings, self.config.run.seed)

    def _preview_basis(self) -> Basis | None:
        """What previews are made on: put together once an epoch."""
        from .preview import basis_of

        newest, basis = next(reversed(self.records), None), self._basis
        if newest is not None and (basis is None or basis.statistics is not newest.statistics):
            self._basis = basis = basis_of(newest)
        return basis


def _switched_on(changes: Mapping[str, Any] | CurriculumSettings) -> Mapping[str, Any] | CurriculumSettings:
    return changes if isinstance(changes, CurriculumSettings) else {"enabled": True, **changes}
