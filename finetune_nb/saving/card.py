"""The model card of a trained model: what it was made of, and how. It names no path of this machine and no text of a dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config.sections import Config
from ..plots.axes import validation_epoch
from ..text import count, number, one_line
from ..types import Epoch, Validation

__all__ = [
    "Training",
    "is_ours",
    "model_card",
    "public_name",
    "training_of",
]

MARK = "<!-- written by finetune_nb -->"
"""By which a card is known again. One without it is somebody's own text, and is left alone."""
OF_PEFT = "# Model Card for Model ID"
"""The empty card that PEFT writes beside an adapter."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Training:
    """What a card says of a training."""

    base: str | None
    """The base model's name on the hub; None where it has none."""
    method: str
    """The trainer adapter's type."""
    settings: dict[str, Any]
    epochs: int
    """Those that trained."""
    trajectories: int
    rewards: tuple[float, float] | None
    """Mean rewards of the first and of the last epoch's rollouts."""
    held_out: tuple[tuple[str, Validation], ...]
    """The first and the last validation that has a reward, with the words for when it was."""


def training_of(config: Config, epochs: Sequence[Epoch]) -> Training:
    """What a run's record says of its training.

    Args:
        config: Of the run.
        epochs: Its records, oldest first.
    """
    section = config.trainer_adapters.get(config.finetuning.trainer_adapter or "")
    model = getattr(section, "model", None)
    settings = {name: getattr(section, name, None) for name in ("loss", "learning_rate")}
    settings["LoRA rank"] = getattr(getattr(section, "lora", None), "rank", None)
    trained = [epoch for epoch in epochs if epoch.trained]
    seen = [epoch for epoch in epochs if epoch.metrics.mean_reward == epoch.metrics.mean_reward]  # not NaN
    return Training(
        base=public_name(model),
        method=str(getattr(section, "type", "unknown")),
        settings={name: value for name, value in settings.items() if value is not None},
        epochs=len(trained),
        trajectories=sum(epoch.metrics.trajectories for epoch in trained),
        rewards=(seen[0].metrics.mean_reward, seen[-1].metrics.mean_reward) if seen else None,
        held_out=tuple(_held_out(epochs)),
    )


def public_name(model: Any) -> str | None:
    """A model's name on the hub; None for a folder of this machine, and for the embedded model."""
    name = str(model)
    return name if _HUB_NAME.fullmatch(name) and ".." not in name and not Path(name).exists() else None


def _held_out(epochs: Sequence[Epoch]) -> Iterable[tuple[str, Validation]]:
    found = [
        (validation_epoch(epoch, validation), validation)
        for epoch in epochs
        for validation in epoch.validations
        if validation.mean_reward == validation.mean_reward
    ]
    found.sort(key=lambda each: each[0])
    for place, validation in found[:1] + found[1:][-1:]:
        yield ("before training" if place == 0 else f"after {count(place, 'epoch')}"), validation


def is_ours(card: str) -> bool:
    """Whether a card is nobody's own text."""
    return MARK in card or OF_PEFT in card


def model_card(training: Training, is_adapter: bool, base: str | None = None) -> str:
    """The card, as the hub reads it: a block of YAML, then Markdown.

    Args:
        training: What is known of the training.
        is_adapter: Whether the model is an adapter alone.
        base: The adapter's base model. Default: the one of the training.
    """
    from huggingface_hub import ModelCardData

    base = public_name(base) or training.base
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["finetune_nb", "reinforcement-learning"] + (["lora"] if is_adapter else []),
    )
    lines = ["---", data.to_yaml(), "---", MARK, "", "# Model card", ""]
    model = "This adapter" if is_adapter else "This model"
    of = f"[{_escaped(base)}](https://huggingface.co/{base})" if base else "a model that is not on the hub"
    lines += [f"{model} was made of {of} by reinforcement learning, with `finetune_nb` {__version__}.", ""]
    lines += ["| training | |", "|---|---|", _row("method", training.method)]
    lines += [_row(name.replace("_", " "), value) for name, value in training.settings.items()]
    lines += [_row("epochs trained", training.epochs), _row("rollouts trained on", training.trajectories)]
    if training.rewards is not None:
        first, last = map(number, training.rewards)
        lines.append(_row("mean reward of rollouts", f"{first} in the first epoch, {last} in the last one"))
    if training.held_out:
        lines += ["", "| held-out questions | mean reward | questions |", "|---|---|---|"]
        lines += [
            f"| {when} | {number(validation.mean_reward)} | {validation.examples:,} |"
            for when, validation in training.held_out
        ]
    return "\n".join(lines) + "\n"


def _row(name: str, value: Any) -> str:
    return f"| {_escaped(name)} | {_escaped(number(value) if isinstance(value, float) else value)} |"


def _escaped(value: Any) -> str:
    """A text that is only a text in Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&$])", r"\\\1", one_line(value))
