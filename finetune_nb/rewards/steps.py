"""Rewards from the steps that a workflow pushed: each counts for the turn that it came after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..components.builder import Builder
from ..components.registry import register_evaluator
from ..config.base import EvaluatorBaseConfig
from ..text import text_of
from ..types import EvalInputItem, IntermediateStepType, as_float, is_model_call

__all__ = [
    "StepRewardsConfig",
    "step_rewards",
]


class StepRewardsConfig(EvaluatorBaseConfig, name="step_rewards"):
    """The values of steps that the workflow pushed, as rewards of turns; their sum is the score."""

    step: str | None = None
    """Name of the steps that count; None: every custom step with a value."""
    key: str = "value"
    """Where the value is in a step's metadata."""


def step_rewards(step: str | None = None, key: str = "value", **targets: Any) -> StepRewards:
    """Make a reward of the values of steps that the workflow pushed.

        run = ft.Run(play, reward=ft.step_rewards("move"), ...)

    Each value counts for the sampled turn before it (`Trajectory.shaped_rewards`); their sum is the reward. A turn without a
    step has the reward 0. A rollout without any such step has no reward.

    Args:
        step: Name of the steps that count. Default: every custom step with a value.
        key: Where the value is in a step's metadata.
        **targets: `target_functions` and `target_model`, if a run trains on the turns of some functions, or of one model, alone.

    Returns:
        The reward, for `Run`. It cannot rescore a recorded run: steps are not recorded.
    """
    return StepRewards(step, key, **targets)


class StepRewards:
    """The reward of `step_rewards`."""

    def __init__(
        self,
        step: str | None,
        key: str,
        target_functions: Sequence[str] | None = None,
        target_model: str | None = None,
    ) -> None:
        self.step, self.key = step, key
        self._functions, self._model = target_functions, target_model

    def __call__(self, item: EvalInputItem) -> list[float]:
        """One number for each sampled turn. Raises ValueError where there is no step, or one that has no number."""
        turns: list[float] = []
        found = 0
        for step in item.trajectory:
            if is_model_call(step, self._functions, self._model):
                turns.append(0.0)
            elif step.event_type == IntermediateStepType.CUSTOM_END and self.step in (None, step.name):
                metadata = step.metadata if isinstance(step.metadata, dict) else {}
                if self.key not in metadata and self.step is None:
                    continue
                value = metadata.get(self.key)
                if isinstance(value, bool) or not math.isfinite(as_float(value)):
                    raise ValueError(
                        f"step {step.name!r} has {self.key} {text_of(value)[:80]!r}; expected a finite number"
                    )
                if not turns:
                    raise ValueError(f"step {step.name!r} came before the first sampled turn, so no turn can earn it")
                turns[-1] += as_float(value)
                found += 1
        if not found:
            which = "custom step" if self.step is None else f"step {self.step!r}"
            raise ValueError(f"the workflow pushed no {which} with {self.key!r} in its metadata")
        return turns


@register_evaluator(config_type=StepRewardsConfig)
async def step_rewards_evaluator(config: StepRewardsConfig, builder: Builder):
    tuning = builder.config.finetuning
    yield StepRewards(config.step, config.key, tuning.target_functions, tuning.target_model)
