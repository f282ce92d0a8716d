"""The curriculum's settings: as a section of the config (`CurriculumLearningConfig`, names and defaults of
nvidia-nat-core 1.9.0) and as the value that a run holds and changes while it lives (`CurriculumSettings`).

Which groups they select is curriculum.py's.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from .errors import ConfigError, did_you_mean

__all__ = ["CurriculumLearningConfig", "CurriculumSettings"]


class CurriculumLearningConfig(BaseModel):
    """Which groups of an epoch are trained on: those whose rewards differ, the best `percentile` of them first."""

    enabled: bool = False
    """False: every group is trained on, whatever the rest says."""
    initial_percentile: float = 0.3
    """Share of the groups with spread that the first epochs train on, in (0, 1]."""
    increment_percentile: float = 0.2
    """Added to the share at every expansion, in (0, 1]."""
    expansion_interval: int = Field(default=5, ge=1)
    """Epochs between two expansions."""
    min_reward_diff: float = Field(default=0.1, ge=0)
    """A group whose rewards lie closer together teaches nothing and is left out. At least 0 (NAT: unchecked)."""
    sort_ascending: bool = False
    """True: low mean rewards (hard examples) first."""
    random_subsample: float | None = Field(default=None, gt=0, le=1)
    """Share of the selected groups that is drawn at random, in (0, 1] (NAT: unchecked); None: all."""

    @model_validator(mode="after")
    def validate_percentiles(self) -> CurriculumLearningConfig:
        for name in ("initial_percentile", "increment_percentile"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1")
        return self


@dataclass(frozen=True)
class CurriculumSettings:
    """The curriculum at one moment of a run. A value: `updated` makes another one. Wrong values raise ConfigError."""

    enabled: bool = False
    percentile: float = 0.3
    """Share of the groups with spread that is trained on, in (0, 1]."""
    schedule: Literal["automatic", "manual"] = "automatic"
    """Whether the percentile grows by itself, or stays where it was put."""
    increment_percentile: float = 0.2
    """Added at every automatic expansion, in (0, 1]."""
    expansion_interval: int = 5
    """Epochs between two expansions, at least 1."""
    min_reward_diff: float = 0.1
    """Smallest spread of a group's rewards that teaches, at least 0."""
    sort_ascending: bool = False
    """True: low mean rewards (hard examples) first."""
    random_subsample: float | None = None
    """Share of the selected groups that is drawn at random, in (0, 1]; None: all."""

    def __post_init__(self) -> None:
        for name in ("enabled", "sort_ascending"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        self._check("schedule", self.schedule in ("automatic", "manual"), "'automatic' or 'manual'")
        self._check(
            "expansion_interval", _is(numbers.Integral, self.expansion_interval, 1), "a whole number of at least 1"
        )
        self._check("min_reward_diff", _is(numbers.Real, self.min_reward_diff, 0), "a number of at least 0")
        for name in ("percentile", "increment_percentile", "random_subsample"):
            value = getattr(self, name)
            if name != "random_subsample" or value is not None:
                self._check(name, _is(numbers.Real, value, 0) and 0 < value <= 1, "a number above 0 and at most 1")
        # A numpy number would make two equal settings print and store differently.
        object.__setattr__(self, "expansion_interval", int(self.expansion_interval))
        for name in ("percentile", "increment_percentile", "min_reward_diff", "random_subsample"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"curriculum: {name} is {getattr(self, name)!r}; expected {expected}.")

    @classmethod
    def from_config(cls, config: CurriculumLearningConfig) -> CurriculumSettings:
        """The settings with which a run starts."""
        values = config.model_dump()
        return cls(percentile=values.pop("initial_percentile"), **values)

    def to_config(self, initial_percentile: float) -> CurriculumLearningConfig:
        """The same as a config section; `initial_percentile` is where the run started."""
        values = dataclasses.asdict(self)
        del values["percentile"], values["schedule"]
        return CurriculumLearningConfig(initial_percentile=initial_percentile, **values)

    def updated(self, changes: Mapping[str, Any] | CurriculumSettings) -> CurriculumSettings:
        """These settings with `changes`, the rest as it is. A percentile given without a schedule stays where it is
        put: the schedule becomes "manual"."""
        if isinstance(changes, CurriculumSettings):
            return changes
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name == "initial_percentile":
                raise ConfigError(
                    "curriculum: initial_percentile is where a run starts. To change a run, set percentile."
                )
            if name not in known:
                raise ConfigError(f"curriculum: {name!r} is not a setting. {did_you_mean(name, known)}")
        manual = {"schedule": "manual"} if "percentile" in changes else {}
        return dataclasses.replace(self, **{**manual, **changes})

    def resumes_after(self, before: CurriculumSettings) -> bool:
        """Whether the schedule goes on from this percentile, an interval from now: it is automatic, and was not before
        or has been given another percentile."""
        return self.schedule == "automatic" and (before.schedule == "manual" or before.percentile != self.percentile)


def _is(kind: type, value: Any, least: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value >= least  # type: ignore[arg-type, operator]
