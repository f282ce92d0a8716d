"""Which `_type` names there are, kind by kind. Our own stand here as strings; their modules are imported when they are
first asked for, so that a config which needs no torch loads none. Others come in through registry.py's decorators.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .component import (
    EvalDatasetBaseConfig,
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
    TypedBaseModel,
)
from .errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .builder import Builder

__all__ = [
    "EXECUTORS",
    "KINDS",
    "OUR_TYPES",
    "TRAINER_ADAPTERS",
    "Build",
    "Registration",
    "config_class",
    "registered",
    "type_names",
]

KINDS: dict[str, type[TypedBaseModel]] = {
    "llm_provider": LLMBaseConfig,
    "function": FunctionBaseConfig,
    "evaluator": EvaluatorBaseConfig,
    "dataset": EvalDatasetBaseConfig,
    "trajectory_builder": TrajectoryBuilderConfig,
    "trainer_adapter": TrainerAdapterConfig,
    "trainer": TrainerConfig,
}
"""The kinds of components, and the base class of each kind's configs."""

_EVALUATORS = "finetune_nb.evaluation.evaluators"
_CALCULATOR = "finetune_nb.examples.calculator.agent"
_NAT = "finetune_nb.backends.nat.run"
OUR_TYPES: dict[str, dict[str, str]] = {
    "llm_provider": {
        "policy": "finetune_nb.evaluation.recording:PolicyLLMConfig",
        "openai": "finetune_nb.evaluation.openai:OpenAIModelConfig",
    },
    "function": {
        "python_function": "finetune_nb.registry:PythonFunctionConfig",
        "calculator_agent": f"{_CALCULATOR}:CalculatorAgentConfig",
    },
    "evaluator": {
        "python_function": "finetune_nb.registry:PythonEvaluatorConfig",
        "exact_match": f"{_EVALUATORS}:ExactMatchConfig",
        "numeric_closeness": f"{_EVALUATORS}:NumericClosenessConfig",
        "contains": f"{_EVALUATORS}:ContainsConfig",
        "regex": f"{_EVALUATORS}:RegexConfig",
        "weighted": f"{_EVALUATORS}:WeightedConfig",
        "calculator_reward": f"{_CALCULATOR}:CalculatorRewardConfig",
        "calculator_episode": f"{_CALCULATOR}:CalculatorEpisodeConfig",
    },
    "dataset": {
        "json": "finetune_nb.component:EvalDatasetJsonConfig",
        "jsonl": "finetune_nb.component:EvalDatasetJsonlConfig",
        "csv": "finetune_nb.component:EvalDatasetCsvConfig",
        "parquet": "finetune_nb.component:EvalDatasetParquetConfig",
    },
    "trajectory_builder": {
        "eval_traj_builder": "finetune_nb.trajectory_builder:EvalTrajectoryBuilderConfig",
        "preference_builder": "finetune_nb.preferences:PreferenceBuilderConfig",
        "nat_builder": f"{_NAT}:NatBuilderConfig",
    },
    "trainer_adapter": {
        "local_grpo": "finetune_nb.backends.local.adapter:LocalGRPOConfig",
        "trl_dpo": "finetune_nb.backends.trl.adapter:TRLDPOConfig",
        "trl_sft": "finetune_nb.backends.trl.adapter:TRLSFTConfig",
        "tinker": "finetune_nb.backends.tinker.adapter:TinkerConfig",
        "nat_adapter": f"{_NAT}:NatAdapterConfig",
        "openpipe_art": "finetune_nb.backends.art.adapter:OpenPipeArtConfig",
    },
    "trainer": {
        "epoch_trainer": "finetune_nb.trainer:EpochTrainerConfig",
        "nat_trainer": f"{_NAT}:NatTrainerConfig",
    },
}
"""kind -> `_type` -> "module:config class". Importing the module registers the component."""

EXECUTORS = {"ray": "finetune_nb.backends.ray.executor:ray_executor"}
"""`run.engine` -> what builds the RolloutExecutor of an engine elsewhere."""
TRAINER_ADAPTERS = {"ray": "finetune_nb.backends.ray.trainer_adapter:ray_trainer"}
"""`run.engine` -> what builds the trainer adapter of an engine that trains elsewhere."""

Build = Callable[[Any, "Builder"], AsyncGenerator[Any, None]]


@dataclass(frozen=True)
class Registration:
    """What a `_type` stands for: its config, and what builds the component."""

    config_type: type[TypedBaseModel]
    build: Build


registered: dict[str, dict[str, Registration]] = {kind: {} for kind in KINDS}


def type_names(kind: str) -> list[str]:
    """Every `_type` of a kind, ours and registered ones."""
    return sorted({*OUR_TYPES[kind], *registered[kind]})


def config_class(kind: str, type_name: str) -> type[TypedBaseModel]:
    """The config class that `_type: type_name` stands for. Imports our own module where it is one of ours. Raises
    ConfigError for an unknown name, and what the import raises (MissingExtra) where a package is missing."""
    if type_name not in registered[kind] and type_name in OUR_TYPES[kind]:
        module, _, name = OUR_TYPES[kind][type_name].partition(":")
        return getattr(importlib.import_module(module), name)
    try:
        return registered[kind][type_name].config_type
    except KeyError:
        raise ConfigError(
            f"{kind} has no _type {type_name!r}. {did_you_mean(type_name, type_names(kind))} "
            "If it is your own, import or run the code that registers it first."
        ) from None
