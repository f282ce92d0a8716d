"""The keyword form of a run: plain functions, rows and ready components, as a Config and a Builder that holds them.

From here on a run from functions and a run from YAML are the same thing. Run's docstring says what each argument means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .config import Config
from .errors import ConfigError
from .evaluation.datasets import read_rows
from .interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from .loading import load_config
from .registry import Builder

__all__ = ["add_component", "add_dataset", "from_functions"]


def from_functions(
    workflow: Callable[..., Any] | None,
    reward: Callable[..., Any] | None,
    dataset: Any,
    *,
    model: str,
    generations: int,
    examples_per_epoch: int | None,
    validation: Any,
    validation_interval: int,
    evaluators: Mapping[str, Callable[..., Any]],
    curriculum: Mapping[str, Any] | None,
    sampling: Mapping[str, Any],
    training: Mapping[str, Any],
    num_epochs: int,
    max_concurrency: int,
    item_timeout: float | None,
    retries: int,
    seed: int,
    deterministic: bool,
    engine: str,
    ray: Mapping[str, Any],
    output_dir: str,
    builder: TrajectoryBuilder | None,
    adapter: TrainerAdapter | None,
    trainer: Trainer | None,
) -> tuple[Config, Builder]:
    """Raises ConfigError for arguments that do not go together, and for what load_config finds wrong."""
    if builder is None and (workflow is None or reward is None or dataset is None):
        raise ConfigError(
            "Run needs workflow, reward and dataset, or a builder= of your own. See help(finetune_nb.Run)."
        )
    if adapter is not None and (training or model != "embedded"):
        raise ConfigError("adapter= brings its own model and settings: leave model= and training= out.")
    scores = {"reward": reward, **evaluators} if reward is not None else dict(evaluators)
    settings: dict[str, Any] = {
        "llms": {"policy": {"_type": "policy", "adapter": "adapter", **sampling}},
        "eval": {
            "general": {"max_concurrency": max_concurrency, "item_timeout": item_timeout, "retries": retries},
            "evaluators": {key: {"_type": "python_function"} for key in scores},
        },
        "trajectory_builders": {
            "builder": {
                "_type": "eval_traj_builder",
                "num_generations": generations,
                "examples_per_epoch": examples_per_epoch,
            }
        },
        "trainer_adapters": {"adapter": {"_type": "local_grpo", "model": model, **training}},
        "trainers": {"trainer": {"_type": "epoch_trainer"}},
        "finetuning": {
            "enabled": True,
            "trainer": "trainer",
            "trajectory_builder": "builder",
            "trainer_adapter": "adapter",
            "num_epochs": num_epochs,
            "output_dir": output_dir,
            "curriculum_learning": {"enabled": True, **curriculum} if curriculum is not None else {},
            "run_configuration": {"validation_interval": validation_interval},
        },
        "run": {"seed": seed, "deterministic": deterministic, "engine": engine, "ray": dict(ray)},
    }
    if workflow is not None:
        settings["workflow"] = {"_type": "python_function"}
    if reward is not None:
        settings["finetuning"]["reward_function"] = {"name": "reward"}
    config = load_config(settings)
    components = Builder(config)
    if workflow is not None:
        components.add("function", "workflow", workflow)
    for key, function in scores.items():
        components.add("evaluator", key, function)
    run_config = config.finetuning.run_configuration
    assert run_config is not None
    if dataset is not None:
        run_config.dataset = add_dataset(components, "train", dataset)
    if validation is not None:
        run_config.validation_dataset = add_dataset(components, "validation", validation)
    for kind, component in (("trajectory_builder", builder), ("trainer_adapter", adapter), ("trainer", trainer)):
        if component is not None:
            add_component(components, kind, component)
    if adapter is not None and adapter.policy is None:
        config.llms.clear()
    return config, components


def add_component(builder: Builder, kind: str, component: Any) -> None:
    """Puts a ready-made trajectory builder, trainer adapter or trainer in the place of the one that the run names; its config
    stands in the run's."""
    config = builder.config
    section, own_config = {
        "trajectory_builder": (config.trajectory_builders, "trajectory_builder_config"),
        "trainer_adapter": (config.trainer_adapters, "adapter_config"),
        "trainer": (config.trainers, "trainer_config"),
    }[kind]
    name = getattr(config.finetuning, kind)
    section[name] = getattr(component, own_config)
    builder.add(kind, name, component)


def add_dataset(builder: Builder, role: str, dataset: Any) -> str:
    """A file's path as it is; rows under the name of their role."""
    if isinstance(dataset, str | Path):
        return str(dataset)
    builder.add("dataset", role, read_rows(dataset))
    return role
