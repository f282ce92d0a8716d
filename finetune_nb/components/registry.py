"""The decorators that add a component to what `_type` in a config can name.

    @register_trainer(config_type=MyTrainerConfig)
    async def my_trainer(config: MyTrainerConfig, builder: Builder):
        yield MyTrainer(trainer_config=config)         # resumed after its yield when the run closes

A `_type` is looked up in `OUR_TYPES` first, then among what was registered.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config.base import (
    EvalDatasetBaseConfig,
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
    TypedBaseModel,
)
from ..errors import ConfigError, did_you_mean
from ..redaction import redacting_logger

__all__ = [
    "Build",
    "EXECUTORS",
    "KINDS",
    "OUR_TYPES",
    "PythonEvaluatorConfig",
    "PythonFunctionConfig",
    "Registration",
    "TRAINER_ADAPTERS",
    "WRAPPERS",
    "config_class",
    "register_evaluator",
    "register_function",
    "register_llm_provider",
    "register_trainer",
    "register_trainer_adapter",
    "register_trajectory_builder",
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

_EVALUATORS = "finetune_nb.rewards.evaluators"
_CALCULATOR = "finetune_nb.examples.calculator.agent"
_NAT = "finetune_nb.backends.nat.run"
_ENVIRONMENTS = "finetune_nb.components.environments"
OUR_TYPES: dict[str, dict[str, str]] = {
    "llm_provider": {
        "policy": "finetune_nb.llms.client:PolicyLLMConfig",
        "openai": "finetune_nb.llms.openai:OpenAIModelConfig",
    },
    "function": {
        "python_function": "finetune_nb.components.registry:PythonFunctionConfig",
        "environment": f"{_ENVIRONMENTS}:EnvironmentWorkflowConfig",
        "calculator_agent": f"{_CALCULATOR}:CalculatorAgentConfig",
    },
    "evaluator": {
        "python_function": "finetune_nb.components.registry:PythonEvaluatorConfig",
        "environment": f"{_ENVIRONMENTS}:EnvironmentRewardConfig",
        "exact_match": f"{_EVALUATORS}:ExactMatchConfig",
        "numeric_closeness": f"{_EVALUATORS}:NumericClosenessConfig",
        "contains": f"{_EVALUATORS}:ContainsConfig",
        "regex": f"{_EVALUATORS}:RegexConfig",
        "weighted": f"{_EVALUATORS}:WeightedConfig",
        "step_rewards": "finetune_nb.rewards.steps:StepRewardsConfig",
        "calculator_reward": f"{_CALCULATOR}:CalculatorRewardConfig",
        "calculator_episode": f"{_CALCULATOR}:CalculatorEpisodeConfig",
    },
    "dataset": {
        "json": "finetune_nb.config.base:EvalDatasetJsonConfig",
        "jsonl": "finetune_nb.config.base:EvalDatasetJsonlConfig",
        "csv": "finetune_nb.config.base:EvalDatasetCsvConfig",
        "parquet": "finetune_nb.config.base:EvalDatasetParquetConfig",
    },
    "trajectory_builder": {
        "eval_traj_builder": "finetune_nb.rollouts.trajectory_builder:EvalTrajectoryBuilderConfig",
        "preference_builder": "finetune_nb.rollouts.preferences:PreferenceBuilderConfig",
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
        "epoch_trainer": "finetune_nb.training.trainer:EpochTrainerConfig",
        "nat_trainer": f"{_NAT}:NatTrainerConfig",
    },
}
"""kind -> `_type` -> "module:config class". Importing the module registers the component."""

EXECUTORS = {"ray": "finetune_nb.backends.ray.executor:ray_executor"}
"""`run.engine` -> what builds the RolloutExecutor of an engine elsewhere."""
TRAINER_ADAPTERS = {"ray": "finetune_nb.backends.ray.trainer_adapter:ray_trainer"}
"""`run.engine` -> what builds the trainer adapter of an engine that trains elsewhere."""
WRAPPERS = {"langchain": "finetune_nb.llms.langchain:chat_model"}
"""Framework -> what makes its chat model of an llm."""

Build = Callable[[Any, Any], AsyncGenerator[Any, None]]


@dataclass(frozen=True)
class Registration:
    """What a `_type` names: its config, and what builds the component."""

    config_type: type[TypedBaseModel]
    build: Build


registered: dict[str, dict[str, Registration]] = {kind: {} for kind in KINDS}


def type_names(kind: str) -> list[str]:
    """Every `_type` of a kind, ours and registered ones."""
    return sorted({*OUR_TYPES[kind], *registered[kind]})


def config_class(kind: str, type_name: str) -> type[TypedBaseModel]:
    """The config class that `_type: type_name` names. Imports our own module where it is one of ours. Raises
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


logger = redacting_logger(__name__)

F = TypeVar("F", bound=Callable[..., AsyncGenerator[Any, None]])


def _decorator(kind: str, config_type: Any) -> Callable[[F], F]:
    base = KINDS[kind]
    if not (isinstance(config_type, type) and issubclass(config_type, base)):
        raise ConfigError(f"register_{kind}: config_type is {config_type!r}; expected a subclass of {base.__name__}.")
    name = config_type.static_type()
    if name is None:
        raise ConfigError(
            f"register_{kind}: {config_type.__name__} has no _type. "
            f'Name it: class {config_type.__name__}({base.__name__}, name="my_{kind}").'
        )
    ours, _, known_as = OUR_TYPES[kind].get(name, "").partition(":")
    if ours and getattr(sys.modules.get(ours), known_as, None) is not config_type:
        raise ConfigError(f"register_{kind}: _type {name!r} is finetune_nb's own (in {ours}). Choose another name.")

    def register(build: F) -> F:
        if not inspect.isasyncgenfunction(build):
            raise ConfigError(
                f"register_{kind}: {getattr(build, '__name__', build)!r} is not an async generator function. "
                "Write `async def` and hand over the component with `yield`, once; no other decorator below this one."
            )
        before = registered[kind].get(name)
        if before is not None and before.config_type.__module__ != config_type.__module__:
            old, new = before.config_type.__module__, config_type.__module__
            logger.warning("%s %r of %s is replaced by that of %s", kind, name, old, new)
        registered[kind][name] = Registration(config_type, build)
        return build

    return register


def register_trajectory_builder(config_type: type[TrajectoryBuilderConfig], **_: Any) -> Callable[[F], F]:
    """Register an async generator function `(config, builder)` that yields a TrajectoryBuilder.

    A name that is registered again (a notebook cell that runs twice) replaces the old one.

    Args:
        config_type: Its config class; its `name=` is the `_type` in a YAML file.
        **_: Further keyword arguments of the Toolkit's decorators, which are ignored.

    Returns:
        The decorator.

    Raises:
        ConfigError: config_type does not fit or its name is taken, or the function is not an async generator function.
    """
    return _decorator("trajectory_builder", config_type)


def register_trainer_adapter(config_type: type[TrainerAdapterConfig], **_: Any) -> Callable[[F], F]:
    """Register an async generator function `(config, builder)` that yields a TrainerAdapter.

    A name that is registered again (a notebook cell that runs twice) replaces the old one.

    Args:
        config_type: Its config class; its `name=` is the `_type` in a YAML file.
        **_: Further keyword arguments of the Toolkit's decorators, which are ignored.

    Returns:
        The decorator.

    Raises:
        ConfigError: config_type does not fit or its name is taken, or the function is not an async generator function.
    """
    return _decorator("trainer_adapter", config_type)


def register_trainer(config_type: type[TrainerConfig], **_: Any) -> Callable[[F], F]:
    """Register an async generator function `(config, builder)` that yields a Trainer.

    A name that is registered again (a notebook cell that runs twice) replaces the old one.

    Args:
        config_type: Its config class; its `name=` is the `_type` in a YAML file.
        **_: Further keyword arguments of the Toolkit's decorators, which are ignored.

    Returns:
        The decorator.

    Raises:
        ConfigError: config_type does not fit or its name is taken, or the function is not an async generator function.
    """
    return _decorator("trainer", config_type)


def register_evaluator(config_type: type[EvaluatorBaseConfig], **_: Any) -> Callable[[F], F]:
    """Register an async generator function `(config, builder)` that yields an evaluator.

    A name that is registered again (a notebook cell that runs twice) replaces the old one.

    Args:
        config_type: Its config class; its `name=` is the `_type` in a YAML file.
        **_: Further keyword arguments of the Toolkit's decorators, which are ignored.

    Returns:
        The decorator.

    Raises:
        ConfigError: config_type does not fit or its name is taken, or the function is not an async generator function.
    """
    return _decorator("evaluator", config_type)


def register_function(config_type: type[FunctionBaseConfig], **_: Any) -> Callable[[F], F]:
    """Register an async generator function `(config, builder)` that yields a workflow: a function, sync or async.

    A name that is registered again (a notebook cell that runs twice) replaces the old one.

    Args:
        config_type: Its config class; its `name=` is the `_type` in a YAML file.
        **_: Further keyword arguments of the Toolkit's decorators, which are ignored.

    Returns:
        The decorator.

    Raises:
        ConfigError: config_type does not fit or its name is taken, or the function is not an async generator function.
    """
    return _decorator("function", config_type)


def register_llm_provider(config_type: type[LLMBaseConfig], **_: Any) -> Callable[[F], F]:
    """Register an async generator function `(config, builder)` that yields a language model.

    A name that is registered again (a notebook cell that runs twice) replaces the old one.

    Args:
        config_type: Its config class; its `name=` is the `_type` in a YAML file.
        **_: Further keyword arguments of the Toolkit's decorators, which are ignored.

    Returns:
        The decorator.

    Raises:
        ConfigError: config_type does not fit or its name is taken, or the function is not an async generator function.
    """
    return _decorator("llm_provider", config_type)


class PythonFunctionConfig(FunctionBaseConfig, name="python_function"):
    """Stands for a plain function of a notebook, which `Builder.add` supplies."""


class PythonEvaluatorConfig(EvaluatorBaseConfig, name="python_function"):
    """Stands for a plain reward function of a notebook, which `Builder.add` supplies."""


@register_function(config_type=PythonFunctionConfig)
async def _python_function(config: PythonFunctionConfig, builder: Any) -> AsyncGenerator[Any, None]:
    raise ConfigError("the workflow is a plain Python function, which no file can hold. Pass it again: workflow=...")
    yield


@register_evaluator(config_type=PythonEvaluatorConfig)
async def _python_evaluator(config: PythonEvaluatorConfig, builder: Any) -> AsyncGenerator[Any, None]:
    raise ConfigError("the evaluator is a plain Python function, which no file can hold. Pass it again: reward=...")
    yield
