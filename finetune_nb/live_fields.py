"""Settings of components that may be changed while a run goes on: those whose config field is marked as live.

    learning_rate: float = Field(default=5e-4, gt=0, json_schema_extra={"live": "training"})

The mark names the safe point at which a change is taken over: "rollouts" (the next epoch's) or "training" (the next
job's). The value is put into the component's own config; a component that has derived something from it has a method
`configured()`, which is called then. Asking for a change is controls.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .component import changed
from .config import Config
from .controls import LiveField
from .registry import Builder

__all__ = ["AT_TRAINING", "live_fields", "live_names", "put"]

SAFE_POINTS = ("rollouts", "training")
AT_TRAINING: dict[str, Any] = {"live": "training"}
"""The mark of a setting that the next training job reads."""


def live_names(section: BaseModel) -> list[str]:
    """The live settings of one component's config."""
    return [name for name, info in type(section).model_fields.items() if _safe_point(info) in SAFE_POINTS]


def _safe_point(info: FieldInfo) -> Any:
    extra = info.json_schema_extra
    return extra.get("live") if isinstance(extra, dict) else None


def live_fields(config: Config) -> list[LiveField]:
    """The live fields of the components that a run uses, by the part that they play: adapter, builder, llm, eval."""
    found = []
    for part, (_, _, section) in _sections(config).items():
        for name, info in type(section).model_fields.items():
            safe_point = _safe_point(info)
            if safe_point not in SAFE_POINTS:
                continue
            limits = {
                kind: getattr(m, kind) for m in info.metadata for kind in ("gt", "ge", "lt", "le") if hasattr(m, kind)
            }
            found.append(
                LiveField(
                    name=f"{part}.{name}",
                    value=getattr(section, name),
                    safe_point=str(safe_point),
                    label=name.replace("_", " "),
                    doc=info.description or "",
                    minimum=limits.get("ge", limits.get("gt")),
                    maximum=limits.get("le", limits.get("lt")),
                    check=lambda value, section=section, name=name, part=part: getattr(
                        changed(section, {name: value}, part), name
                    ),
                )
            )
    return found


def put(config: Config, builder: Builder, values: Mapping[str, Any]) -> None:
    """Puts changed values into the configs that the components hold."""
    sections = _sections(config)
    for name, value in values.items():
        part, _, field = name.partition(".")
        kind, component, section = sections[part]
        setattr(section, field, value)
        configured = getattr(builder.ready(kind, component), "configured", None) if kind else None
        if configured is not None:
            configured()


def _sections(config: Config) -> dict[str, tuple[str, str, BaseModel]]:
    """Part -> kind and name of the component, and its config."""
    tuning = config.finetuning
    parts = {
        "adapter": ("trainer_adapter", tuning.trainer_adapter, config.trainer_adapters),
        "builder": ("trajectory_builder", tuning.trajectory_builder, config.trajectory_builders),
        "llm": ("llm_provider", config.llm_of_workflow, config.llms),
    }
    found: dict[str, tuple[str, str, BaseModel]] = {
        part: (kind, name, section[name]) for part, (kind, name, section) in parts.items() if name and name in section
    }
    return {**found, "eval": ("", "", config.eval.general)}
