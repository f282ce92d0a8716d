"""finetune_nb: finetuning LLM agents by reinforcement learning, from a notebook.

    import finetune_nb as ft

    run = ft.Run(workflow, reward, dataset="train.json")
    epoch = await run.next_epoch()

The public names, by what they are for. Each is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    # the notebook
    "run.comparison": ("compare",),
    "run.run": ("Run",),
    "store.runs": ("runs",),
    "rewards.from_trl": ("from_trl",),
    "rewards.functions": ("group_reward",),
    "rewards.judge": ("judge",),
    "rewards.labels": ("label_reward",),
    "rewards.length": ("length_penalty", "overlong_penalty"),
    "rewards.retrying": ("retrying",),
    "rewards.steps": ("step_rewards",),
    "engine.sinks": ("JsonlSink", "MetricsSink", "WandbSink"),
    "threads": ("enable_nested_asyncio", "run_sync"),
    "components.loading": ("load_config",),
    # what components are made of
    "interfaces": ("Environment", "Policy", "Trainer", "TrainerAdapter", "TrajectoryBuilder"),
    "components.builder": ("Builder",),
    "components.info": ("EvaluatorInfo", "FunctionInfo"),
    "rewards.base_evaluator": ("BaseEvaluator",),
    "llms.context": ("Context", "push_step"),
    "components.registry": (
        "register_evaluator",
        "register_function",
        "register_llm_provider",
        "register_trainer",
        "register_trainer_adapter",
        "register_trajectory_builder",
    ),
    "config": (
        "Config",
        "CurriculumLearningConfig",
        "CurriculumSettings",
        "EvaluatorBaseConfig",
        "FinetuneConfig",
        "FinetuneRunConfig",
        "FunctionBaseConfig",
        "LLMBaseConfig",
        "RewardFunctionConfig",
        "TrainerAdapterConfig",
        "TrainerConfig",
        "TrajectoryBuilderConfig",
    ),
    # the components that we ship
    "rollouts.trajectory_builder": ("EvalTrajectoryBuilder", "EvalTrajectoryBuilderConfig"),
    "training.trainer": ("EpochTrainer", "EpochTrainerConfig"),
    "rollouts.evaluation": ("EvaluationRun",),
    "rollouts.episodes": ("episode_from_steps",),
    # records
    "types": (
        "DPOItem",
        "Demonstration",
        "Demonstrations",
        "Epoch",
        "EpisodeItem",
        "EpisodeItemRole",
        "EvalInput",
        "EvalInputItem",
        "EvalOutput",
        "EvalOutputItem",
        "EvaluationRunConfig",
        "EvaluationRunOutput",
        "IntermediateStep",
        "IntermediateStepPayload",
        "IntermediateStepType",
        "LLMCall",
        "OpenAIMessage",
        "RolloutFailure",
        "RowError",
        "SamplingParams",
        "StreamEventData",
        "TTCEventData",
        "TrainingJobRef",
        "TrainingJobStatus",
        "TrainingStatusEnum",
        "Trajectory",
        "TrajectoryCollection",
        "Validation",
        "WarmUp",
        "WarmUpSettings",
    ),
    "errors": (
        "BackendError",
        "ConfigError",
        "DatasetError",
        "EpochAborted",
        "FinetuneError",
        "JobFailed",
        "MissingExtra",
        "MissingLogprobs",
        "RolloutTimeout",
        "RunError",
        "StalePolicy",
        "StoreError",
        "UnknownJob",
        "WorkflowError",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

if TYPE_CHECKING:
    from .components.builder import Builder as Builder
    from .components.info import EvaluatorInfo as EvaluatorInfo
    from .components.info import FunctionInfo as FunctionInfo
    from .components.loading import load_config as load_config
    from .components.registry import register_evaluator as register_evaluator
    from .components.registry import register_function as register_function
    from .components.registry import register_llm_provider as register_llm_provider
    from .components.registry import register_trainer as register_trainer
    from .components.registry import register_trainer_adapter as register_trainer_adapter
    from .components.registry import register_trajectory_builder as register_trajectory_builder
    from .config import Config as Config
    from .config import CurriculumLearningConfig as CurriculumLearningConfig
    from .config import CurriculumSettings as CurriculumSettings
    from .config import EvaluatorBaseConfig as EvaluatorBaseConfig
    from .config import FinetuneConfig as FinetuneConfig
    from .config import FinetuneRunConfig as FinetuneRunConfig
    from .config import FunctionBaseConfig as FunctionBaseConfig
    from .config import LLMBaseConfig as LLMBaseConfig
    from .config import RewardFunctionConfig as RewardFunctionConfig
    from .config import TrainerAdapterConfig as TrainerAdapterConfig
    from .config import TrainerConfig as TrainerConfig
    from .config import TrajectoryBuilderConfig as TrajectoryBuilderConfig
    from .engine.sinks import JsonlSink as JsonlSink
    from .engine.sinks import MetricsSink as MetricsSink
    from .engine.sinks import WandbSink as WandbSink
    from .errors import *  # noqa: F403
    from .interfaces import Environment as Environment
    from .interfaces import Policy as Policy
    from .interfaces import Trainer as Trainer
    from .interfaces import TrainerAdapter as TrainerAdapter
    from .interfaces import TrajectoryBuilder as TrajectoryBuilder
    from .llms.context import Context as Context
    from .llms.context import push_step as push_step
    from .rewards.base_evaluator import BaseEvaluator as BaseEvaluator
    from .rewards.from_trl import from_trl as from_trl
    from .rewards.functions import group_reward as group_reward
    from .rewards.judge import judge as judge
    from .rewards.labels import label_reward as label_reward
    from .rewards.length import length_penalty as length_penalty
    from .rewards.length import overlong_penalty as overlong_penalty
    from .rewards.retrying import retrying as retrying
    from .rewards.steps import step_rewards as step_rewards
    from .rollouts.episodes import episode_from_steps as episode_from_steps
    from .rollouts.evaluation import EvaluationRun as EvaluationRun
    from .rollouts.trajectory_builder import EvalTrajectoryBuilder as EvalTrajectoryBuilder
    from .rollouts.trajectory_builder import EvalTrajectoryBuilderConfig as EvalTrajectoryBuilderConfig
    from .run.comparison import compare as compare
    from .run.run import Run as Run
    from .store.runs import runs as runs
    from .threads import enable_nested_asyncio as enable_nested_asyncio
    from .threads import run_sync as run_sync
    from .training.trainer import EpochTrainer as EpochTrainer
    from .training.trainer import EpochTrainerConfig as EpochTrainerConfig
    from .types import *  # noqa: F403

__all__ = [*_MODULE_OF, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
