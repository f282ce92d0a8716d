"""A Run over the Toolkit's own trainer: three components of ours that represent it in a Config, which
`Run.from_nat` makes.

The trainer's component opens the Toolkit's config and keeps it open; the other two take their parts from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ...components.builder import Builder
from ...components.registry import register_trainer, register_trainer_adapter, register_trajectory_builder
from ...config.base import RewardFunctionConfig, TrainerAdapterConfig, TrainerConfig, TrajectoryBuilderConfig
from ...errors import ConfigError
from ...redaction import redacting_logger
from .bridges import NatAdapter, NatBuilder, unwrap
from .opening import check_names, finetuning_section, open_config, read_config
from .trainer import NatTrainer

__all__ = [
    "NatAdapterConfig",
    "NatBuilderConfig",
    "NatTrainerConfig",
    "settings_of",
]

logger = redacting_logger(__name__)

NAME = "nat"
"""What the three are called in the Config."""
GROUP_ADAPTERS = ("finetune_nb_local_grpo", "openpipe_art_trainer_adapter")
"""Adapters that learn from how the rewards in a group differ."""


class NatTrainerConfig(TrainerConfig, name="nat_trainer"):
    """The trainer that a config of the NeMo Agent Toolkit names, with its builder and its adapter."""

    config_file: Path
    """The config for `nat finetune`."""
    dataset: str | None = None
    """A dataset file in place of the config's."""
    override: dict[str, Any] = Field(default_factory=dict)
    """Values in place of the config's, nested as it is; each as text, as on the Toolkit's command line."""
    result_json_path: str = "$"
    """As the command line takes it; so what follows."""
    endpoint: str | None = None
    """Where the workflow runs, if not in this process."""
    endpoint_timeout: int = 300
    """Seconds."""
    validation_dataset: str | None = None
    """A file of rows to validate on; None: no validation."""
    validation_interval: int = Field(default=5, ge=1)
    """Epochs between two validations."""
    validation_config_file: str | None = None
    """A config to validate with in place of `config_file`."""


class NatBuilderConfig(TrajectoryBuilderConfig, name="nat_builder"):
    """The trajectory builder of a nat_trainer."""


class NatAdapterConfig(TrainerAdapterConfig, name="nat_adapter"):
    """The trainer adapter of a nat_trainer."""


def settings_of(
    path: str | Path, override: Iterable[tuple[str, Any]] = (), output_dir: str | Path | None = None, **run: Any
) -> dict[str, Any]:
    """The Config, as a mapping for load_config, of a Run over the Toolkit's config at `path`.

    override: pairs of dotted path and value, as `nat finetune --override`. run: fields of NatTrainerConfig. Raises
    ConfigError and MissingExtra.
    """
    pairs = [(str(dotted), str(value)) for dotted, value in override]
    place = Path(path).expanduser()
    tree = read_config(place, pairs)
    section = finetuning_section(tree, place)
    check_names(tree, place)
    check_generations(tree, place)
    kept = ("num_epochs", "output_dir", "curriculum_learning", "target_functions", "target_model")
    tuning: dict[str, Any] = {key: section[key] for key in kept if section.get(key) is not None}
    if output_dir is not None:
        tuning["output_dir"] = str(output_dir)
    own = {key: value if isinstance(value, int) else str(value) for key, value in run.items() if value is not None}
    tuning["run_configuration"] = {key: own[key] for key in ("validation_dataset", "validation_interval") if key in own}
    general = (tree.get("eval") or {}).get("general") or {}
    return {
        "eval": {"general": {"max_concurrency": general.get("max_concurrency", 8)}},
        "trainers": {
            NAME: {"_type": "nat_trainer", "config_file": str(place.resolve()), "override": _nested(pairs), **own}
        },
        "trajectory_builders": {NAME: {"_type": "nat_builder"}},
        "trainer_adapters": {NAME: {"_type": "nat_adapter"}},
        "finetuning": {
            "enabled": True,
            "trainer": NAME,
            "trajectory_builder": NAME,
            "trainer_adapter": NAME,
            **tuning,
        },
    }


def check_generations(tree: Mapping[str, Any], path: Path) -> None:
    """Says before the first epoch what a single rollout of each example teaches.

    Raises:
        ConfigError: Nothing: a group of one has nothing to be compared with.
    """
    section = tree["finetuning"]
    builder, adapter = (
        (tree.get(f"{part}s") or {}).get(section.get(part)) or {} for part in ("trajectory_builder", "trainer_adapter")
    )
    field = f"config {str(path)!r}: trajectory_builders.{section.get('trajectory_builder')}.num_generations is 1"
    if str(builder.get("num_generations")) != "1":
        return
    if builder.get("_type") == "openpipe_art_traj_builder":
        logger.warning(
            "%s: the Toolkit then makes one group of all rollouts of an epoch, and each is compared with the mean over all "
            "examples. Where some examples are harder than others, it is mostly that which is learned. With 2 or more, the "
            "rollouts of each example are compared with each other.",
            field,
        )
    elif builder.get("_type") == "finetune_nb_eval_traj_builder" and adapter.get("_type") in GROUP_ADAPTERS:
        raise ConfigError(
            f"{field}, so nothing would be learned: an adapter of type {adapter['_type']} compares the rollouts of an example "
            f"with each other. Set it to at least 2."
        )


def _nested(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Dotted paths as a tree, in which a credential is known by its key and is not stored."""
    tree: dict[str, Any] = {}
    for dotted, value in pairs:
        *parents, last = dotted.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"the override {dotted!r} leads through another override. Give one of the two.")
        node[last] = value
    return tree


def _pairs(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out = []
    for key, value in tree.items():
        out += _pairs(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return out


@register_trainer(config_type=NatTrainerConfig)
async def nat_trainer(config: NatTrainerConfig, builder: Builder):
    run = {
        "dataset": config.dataset,
        "result_json_path": config.result_json_path,
        "endpoint": config.endpoint,
        "endpoint_timeout": config.endpoint_timeout,
        "validation_dataset": config.validation_dataset,
        "validation_interval": config.validation_interval,
        "validation_config_file": config.validation_config_file,
    }
    output_dir, general = Path(builder.config.finetuning.output_dir), builder.config.eval.general
    async with open_config(config.config_file, _pairs(config.override), output_dir, run) as opened:
        from .evaluation import Limit

        limit = Limit(lambda: general.max_concurrency)  # it may be changed while the run continues
        if hasattr(opened.builder, "ours"):
            opened.builder.ours.limit = limit
        if hasattr(opened.trainer, "ours"):  # ours.py's: then the Run needs no bridge to it
            for component in (opened.builder, opened.adapter):
                await component.initialize(opened.finetuning)
            trainer = opened.trainer.ours
            reward = opened.finetuning.reward_function
            trainer.reward = reward and RewardFunctionConfig(name=reward.name)
            await trainer.bind_components(
                unwrap(opened.builder, lambda nat: NatBuilder(nat, limit)), unwrap(opened.adapter, NatAdapter)
            )
            yield trainer
        else:
            trajectory_builder = NatBuilder(opened.builder, limit)
            adapter = NatAdapter(opened.adapter, trajectory_builder)
            yield NatTrainer(opened.trainer, trajectory_builder, adapter, opened.finetuning, builder.config.run.seed)


@register_trajectory_builder(config_type=NatBuilderConfig)
async def nat_builder(config: NatBuilderConfig, builder: Builder):
    yield (await _trainer(builder)).trajectory_builder


@register_trainer_adapter(config_type=NatAdapterConfig)
async def nat_adapter(config: NatAdapterConfig, builder: Builder):
    yield (await _trainer(builder)).trainer_adapter


async def _trainer(builder: Builder) -> Any:
    name = builder.config.finetuning.trainer
    if name is None or not isinstance(builder.config.trainers.get(name), NatTrainerConfig):
        raise ConfigError("_type nat_builder and nat_adapter go with a trainer of type nat_trainer. Use Run.from_nat.")
    return await builder.get_trainer(name)
