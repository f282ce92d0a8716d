"""Makes the Config and the Builder of a run: from settings and functions, from a folder to continue it, or to fork it.

What no file can hold (functions, rows, ready components) is given again.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..components.builder import Builder
from ..components.environments import environment_from, environment_of, rows_of
from ..components.loading import load_config, load_received
from ..config.base import changed
from ..config.sections import Config, RewardFunctionConfig
from ..engine.continuation import ARGUMENTS
from ..engine.examples_seen import EXAMPLES, SeenExamples
from ..engine.run_writer import settings_in
from ..errors import ConfigError, RunError, StoreError
from ..interfaces import Environment
from ..rewards.evaluators import reward_name_of, weighted_reward
from ..rewards.functions import Rewards, evaluators_from
from ..rollouts.datasets import read_rows
from ..store.checkpoints import has_weights, newest_checkpoint
from ..store.durable import check_tree
from ..store.folder import CONFIG, checkpoint_folder, checkpoints
from ..store.reader import RunReader
from ..store.store import RunStore
from ..types import Change, CurriculumSettings

__all__ = [
    "Branch",
    "Obstacle",
    "add_component",
    "add_dataset",
    "branch_of",
    "config_of",
    "copy_for_fork",
    "components_from",
    "make_fork",
]


def config_of(
    store: RunReader,
    workflow: Callable[..., Any] | None,
    reward: Rewards | None,
    evaluators: Mapping[str, Callable[..., Any]] | None,
    datasets: Mapping[str, Any],
    trust: bool = False,
    ready: Mapping[str, Any] | None = None,
    override: Iterable[tuple[str, Any]] = (),
    env: Any = None,
) -> tuple[Config, Builder, Obstacle | None]:
    """The config of a run, and a builder with what was given again. datasets: by role. trust: the user has read config.yml and
    vouches for it. ready: components of the user's own by kind. override: values in the config of the Toolkit. env: the
    environment. What comes last is why the run can be opened but not resumed; None if it can."""
    tree, own = store.config_and_owner(trust)
    for dotted, value in override:
        tree = _with_override(tree, str(dotted), value)
    ready = {kind: component for kind, component in (ready or {}).items() if component is not None}
    tree = _with_known_types(tree, ready)
    problem = None
    try:
        config = load_config(tree) if own else load_received(tree)
    except ConfigError as error:  # somebody's components are not registered here: it can be read all the same
        config, problem = Config(), f"this run can be opened but not resumed here: {error}"
    unable = None
    if not own:
        unable = Obstacle(" ".join(filter(None, [_received(store), problem])), untrusted=True)
    elif problem is not None:
        unable = Obstacle(problem)
    config.finetuning.output_dir = store.folder.resolve().parent
    builder = Builder(config)
    if env is not None:
        section = config.run.environment
        if section is None:
            raise ConfigError("env= was passed for a run that was made without an environment. Leave it out.")
        builder.environment = environment_from(env, None if isinstance(env, Environment) else section.options)
    if workflow is not None:
        builder.add("function", "workflow", workflow)
    if reward is not None and own and config.run.environment is not None:
        reward = environment_of(builder).adapt_reward(reward)
    scores, _ = evaluators_from(reward, evaluators)
    for key, function in scores.items():
        builder.add("evaluator", key, function)
    for role, rows in datasets.items():
        if rows is not None:
            add_dataset(builder, role, rows)
    if problem is None:
        for kind, component in ready.items():
            add_component(builder, kind, component)
    return config, builder, unable


def _with_override(tree: Any, dotted: str, value: Any) -> Any:
    """The tree with a value of the Toolkit's config. Raises ConfigError for a run that was not made by from_nat."""
    tree = copy.deepcopy(tree)
    tuning = tree.get("finetuning") or {}
    trainer = (tree.get("trainers") or {}).get(tuning.get("trainer")) or {}
    if trainer.get("_type") != "nat_trainer":
        raise ConfigError(
            f"override: {dotted!r} is for runs that were made by Run.from_nat, whose settings are in a config of the Toolkit. "
            "This one was not: fork it with other settings, run.fork(...)."
        )
    if dotted == "finetuning.output_dir":
        raise ConfigError("override: 'finetuning.output_dir' was found; the run's folder stays where it is.")
    places = [(trainer.setdefault("override", {}), dotted.split("."), str(value))]
    section, *rest = dotted.split(".")
    if (section == "finetuning" and rest[0] in tuning) or dotted == "eval.general.max_concurrency":
        places.append((tree, [section, *rest], value))  # the run's own copy
    for node, path, new in places:
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = new
    return tree


_KNOWN_TYPES = {
    "trajectory_builder": "eval_traj_builder",
    "trainer_adapter": "local_grpo",
    "trainer": "epoch_trainer",
}


def _with_known_types(tree: Any, ready: Mapping[str, Any]) -> Any:
    """A config in which components that are given as objects have a section that can be read: the `_type` of the user's own
    may be registered nowhere, and the object's config takes its place anyhow."""
    if not isinstance(tree, Mapping):
        return tree
    names = tree.get("finetuning")
    changed_tree = dict(tree)
    for kind in ready:
        name = names.get(kind) if isinstance(names, Mapping) else None
        section = tree.get(f"{kind}s")
        if name is not None and isinstance(section, Mapping) and name in section:
            changed_tree[f"{kind}s"] = {**section, name: {"_type": _KNOWN_TYPES[kind]}}
    return changed_tree


@dataclass(frozen=True)
class Obstacle:
    """Why a run can be read, but not continued."""

    text: str
    untrusted: bool = False
    """Whether it is that the user has not said yet that they trust the folder."""


def _received(store: RunReader) -> str:
    """What is said where a folder is not this user's own."""
    place = store.folder / CONFIG
    return (
        f"found {place} without a signature of yours: the folder came from somebody else or from an older finetune_nb, or "
        "config.yml was edited. Expected a config that you wrote, because continuing sends requests, reads files and loads "
        "models as it says. The run can be read as it is. To continue it, read config.yml, then pass trust=True: "
        f"ft.Run.open({str(store.folder)!r}, ..., trust=True)."
    )


# ── forks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Branch:
    """Where a fork leaves its parent."""

    parent: str
    epoch: int
    state: dict[str, Any]
    """What resuming after that epoch needs, with the changed settings in it."""
    checkpoint: int | None
    """The epoch whose checkpoint has the weights after that one; None where the adapter keeps none here."""
    changes: tuple[Change, ...]
    """What was changed on the way."""


def branch_of(
    store: RunReader,
    epoch: int | None,
    curriculum: Mapping[str, Any] | None,
    training: Mapping[str, Any] | None,
    reward: tuple[str | None, str | None] | None = None,
) -> Branch:
    """epoch: None = the last one. training: what the fork's adapter is given anew. reward: digests of the old and the new one,
    if there is a new one. Raises RunError where that epoch is not
    there or its weights are gone, ConfigError for settings that do not fit."""
    indices = [each.index for each in store.epochs]
    if not indices:
        raise RunError(f"run {store.run_id!r} has no epoch to continue from. Run one first, or make a new Run.")
    if epoch is None:
        epoch = indices[-1]
    if epoch not in indices:
        raise RunError(
            f"found epoch={epoch!r}; run {store.run_id!r} has the epochs {indices[0]} to {indices[-1]}. A fork continues "
            "after one of them."
        )
    state, kept = store.state_of(epoch), checkpoints(store.folder)
    index = newest_checkpoint(store, epoch)
    if index is not None and not has_weights(store, index, epoch):
        raise RunError(
            f"the weights after epoch {epoch} of run {store.run_id!r} are not kept; checkpoints are there of epochs "
            f"{', '.join(map(str, kept)) or 'none'}. Fork from one of these; run.keep_checkpoints keeps more."
        )
    before = settings_in(state) or CurriculumSettings()
    after = before.steered(curriculum or {})  # as in a new Run
    changes = tuple(
        Change(time.time(), "fork", f.name, getattr(before, f.name), getattr(after, f.name), epoch + 1)
        for f in fields(after)
        if getattr(before, f.name) != getattr(after, f.name)
    )
    live = state.get("live") or {}
    state["live"] = {name: value for name, value in live.items() if name.partition(".")[2] not in (training or {})}
    if reward is not None:
        changes += (Change(time.time(), "fork", "evaluator.reward", *reward, epoch + 1),)
        state["live"] = {name: value for name, value in state["live"].items() if not name.startswith("reward.")}
    state["settings"] = {f.name: getattr(after, f.name) for f in fields(after)}
    if reward is None:  # by another one, nothing is known of how hard an example is
        before_it = [each for each in store.epochs if each.index <= epoch]
        state[EXAMPLES] = SeenExamples().visits(before_it, store.journal(), store.start()).as_json()
    if state.get("curriculum") and after.percentile != before.percentile:
        state["curriculum"]["current_percentile"] = after.percentile
    return Branch(store.run_id, epoch, state, index, changes)


def make_fork(parent: Path, branch: Branch, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
    """The folder of the fork: a run without epochs, that starts where the branch leaves the parent's folder, on a copy of
    its weights."""
    state = branch.state
    try:
        if branch.checkpoint is not None:
            weights, copied = (checkpoint_folder(place, branch.checkpoint) for place in (parent, folder))
            check_tree(parent, weights)
            shutil.copytree(weights, copied)
            state = {**state, "checkpoint": copied.name}
        with RunStore.create(folder, run_id, config, (branch.parent, branch.epoch), state) as store:
            for change in branch.changes:
                store.record_change(change)
    except (OSError, shutil.Error, StoreError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StoreError(f"no fork was made in {folder}: {error}. The run itself is as it was.") from error


def copy_for_fork(
    config: Config,
    builder: Builder,
    training: Mapping[str, Any] | None,
    components: Mapping[str, Any],
    reward: Rewards | None = None,
) -> tuple[Config, Builder]:
    """A config and a builder that share nothing with the given ones but functions and rows.

    training: other fields of the adapter's config. components: ready ones in place of the run's, by kind. reward: another one,
    as in Run. Raises ConfigError for a ready component that is not replaced: it has state, and cannot belong to two runs.
    """
    # The builder belongs to the run; what points at it points at the fork's own later.
    config = copy.deepcopy(config, {id(config.builder): None} if config.builder is not None else {})
    again = Builder(config)
    again.environment = builder.environment
    if reward is not None and config.run.environment is not None:
        reward = environment_of(again).adapt_reward(reward)
    replaced = set() if reward is None else _replace_reward(config, again, reward)
    for kind, name, component in builder.added():
        if kind == "evaluator" and name in replaced:
            continue
        if kind not in ARGUMENTS:
            again.add(kind, name, component)
        elif components.get(kind) is None:
            argument = ARGUMENTS[kind]
            raise ConfigError(
                f"this run's {argument} was given as an object, which has a state of its own and belongs to one run "
                f"only. Give the fork another one: fork({argument}=...)."
            )
    for kind, component in components.items():
        if component is not None and getattr(config.finetuning, kind) is not None:
            add_component(again, kind, component)
    if training:
        name = config.finetuning.trainer_adapter or ""
        config.trainer_adapters[name] = changed(config.trainer_adapters[name], training, "training")
    return config, again


def _replace_reward(config: Config, builder: Builder, reward: Rewards) -> set[str]:
    """Puts another reward into a config and its builder. Returns the names of the evaluators that were the old one, or are the
    new one."""
    old = reward_name_of(config)
    weighted = weighted_reward(config)
    gone = {old, *(weighted.weights if weighted is not None else ())}
    functions, sections = evaluators_from(reward, None)
    evaluators = {name: section for name, section in config.eval.evaluators.items() if name not in gone}
    if taken := [name for name in sections if name in evaluators]:
        raise ConfigError(f"evaluator {taken[0]!r} has the name of a part of the new reward. Choose another one.")
    added = load_config({"eval": {"evaluators": sections}}).eval.evaluators
    config.eval.evaluators = {**added, **evaluators}
    named = RewardFunctionConfig(name="reward")
    config.finetuning.reward_function = named
    for section in (
        *config.trajectory_builders.values(),
        *config.trainer_adapters.values(),
        *config.trainers.values(),
    ):
        if getattr(section, "reward", None) is not None:  # of its own, or put there when the run was opened
            section.reward = named  # type: ignore[attr-defined]
    for name, function in functions.items():
        builder.add("evaluator", name, function)
    return gone | set(functions)


def components_from(
    settings: Mapping[str, Any],
    functions: Mapping[str, Mapping[str, Callable[..., Any]]],
    rows: Mapping[str, Any],
    ready: Mapping[str, Any],
    environment: Environment | None = None,
) -> tuple[Config, Builder]:
    """A run's settings, plain functions, datasets and ready components, as a Config and the Builder that holds them.

    Args:
        settings: What the YAML of such a run would say.
        functions: Kind ("function", "evaluator") -> name -> function.
        rows: Role ("train", "validation") -> a dataset: a file's path, or rows. None: none.
        ready: Kind ("trajectory_builder", ...) -> a component of the user's own. None: the one that the settings name.
        environment: Where what is not given comes from.

    Raises:
        ConfigError: What `load_config` finds wrong with the settings.
    """
    config = load_config(settings)
    components = Builder(config)
    for kind, named in functions.items():
        for name, function in named.items():
            components.add(kind, name, function)
    run_config = config.finetuning.run_configuration
    assert run_config is not None
    components.environment = environment
    if rows.get("train") is not None:
        run_config.dataset = add_dataset(components, "train", rows["train"])
    elif environment is not None and rows_of(components, "environment:train"):
        run_config.dataset = "environment:train"
    if rows.get("validation") is not None:
        run_config.validation_dataset = add_dataset(components, "validation", rows["validation"])
    elif environment is not None and rows_of(components, "environment:validation"):
        run_config.validation_dataset = "environment:validation"
    for kind, component in ready.items():
        if component is not None:
            add_component(components, kind, component)
    adapter = ready.get("trainer_adapter")
    if adapter is not None and adapter.policy is None:
        config.llms.clear()
    return config, components


def add_component(builder: Builder, kind: str, component: Any) -> None:
    """Puts a ready-made trajectory builder, trainer adapter or trainer in the place of the one that the run names; its config
    is part of the run's."""
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
