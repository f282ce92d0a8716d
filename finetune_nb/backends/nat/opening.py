"""A config of the Toolkit, opened: its own WorkflowBuilder makes trainer, builder and adapter as `nat finetune` does.

What keeps the Toolkit from working as pip installs it is said here before anything runs, with the pin that heals it.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from ...config.sections import NAMED, unknown_names
from ...errors import ConfigError, DatasetError, MissingExtra
from ...hooks import resolve
from ...redaction import is_text, names_credential, plain_data, redact_text, remember_secret
from ...text import text_of
from ..import_guard import undo_side_effects
from .versions import PLUGINS, missing_package, pin_of

__all__ = [
    "Opened",
    "check_names",
    "finetuning_section",
    "open_config",
    "read_config",
]


class Opened:
    """The components of a config, and its `finetuning` section with the run configuration in it."""

    def __init__(self, trainer: Any, builder: Any, adapter: Any, finetuning: Any) -> None:
        self.trainer, self.builder, self.adapter, self.finetuning = trainer, builder, adapter, finetuning


def require_nat() -> None:
    """Raises MissingExtra, or ConfigError, where the Toolkit is not installed, or not so that it can work."""
    if importlib.util.find_spec("nat") is None or not _has("nat.plugins.eval"):
        raise MissingExtra("a config of the NeMo Agent Toolkit", "nat")
    if not _has("nat.plugins.profiler"):
        raise ConfigError(
            "without nvidia-nat-profiler the Toolkit records no model call, without a word: there would be no trajectory to "
            f"train on. {pin_of('profiler')}"
        )
    if importlib.util.find_spec("langchain_core") is None:
        raise ConfigError(
            "the Toolkit's evaluation imports langchain_core, which its own packages do not install: "
            f"ModuleNotFoundError at the first rollout. {pin_of('langchain')}"
        )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def read_config(path: Path, override: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The config's tree with the overrides in it, read by the Toolkit; its credentials are remembered, so that no log
    shows them. Raises ConfigError."""
    require_nat()
    import logging

    import click
    from nat.cli.cli_utils.config_override import load_and_override_config

    for dotted, value in override:
        if names_credential(tuple(dotted.split("."))):
            remember_secret(str(value))
    # At INFO it writes the whole config with every secret into the log.
    log = logging.getLogger("nat.cli.cli_utils.config_override")
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        tree = load_and_override_config(path, tuple((dotted, str(value)) for dotted, value in override))
    except (OSError, ValueError, click.ClickException) as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {redact_text(str(error))}") from None
    finally:
        log.setLevel(level)

    def remember(where: Any, node: Any) -> Any:
        if is_text(node) and names_credential(where):
            remember_secret(node)
        return node

    plain_data(tree, remember)
    return tree


def finetuning_section(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The `finetuning` section. Raises ConfigError where there is none, or it is switched off."""
    section = tree.get("finetuning")
    if not isinstance(section, Mapping) or not section.get("enabled"):
        raise ConfigError(
            f"config {str(path)!r} has no finetuning section that is enabled; expected finetuning.enabled: true with "
            "trainer, trajectory_builder and trainer_adapter, as `nat finetune` does."
        )
    return dict(section)


def check_names(tree: Mapping[str, Any], path: Path) -> None:
    """Checks that what the `finetuning` section names is there. The Toolkit says of a misspelt reward, after an epoch, that
    there were no trajectories.

    Raises:
        ConfigError: Something is named that no section has.
    """
    section, evaluation = tree["finetuning"], tree.get("eval") or {}
    named = {field: section.get(field) for field in NAMED}
    sections = {field: tree.get(title) or {} for field, title in NAMED.items()}
    reward = section.get("reward_function")
    if isinstance(reward, Mapping) and isinstance(evaluation, Mapping):
        named["reward_function.name"] = reward.get("name")
        sections["reward_function.name"] = evaluation.get("evaluators") or {}
    for field, problem in unknown_names(named, sections):
        raise ConfigError(f"config {str(path)!r}: finetuning.{field}: {problem}")


@asynccontextmanager
async def open_config(
    path: Path,
    override: Sequence[tuple[str, str]],
    output_dir: Path,
    run: Mapping[str, Any],
) -> AsyncIterator[Opened]:
    """The components that the config names, for as long as the context lasts.

    output_dir: goes before the config's. run: fields of the Toolkit's FinetuneRunConfig, as the command line gives them.
    """
    tree = read_config(path, override)
    finetuning_section(tree, path)
    with undo_side_effects():
        from nat.builder.workflow_builder import WorkflowBuilder
        from nat.data_models.config import Config
        from nat.data_models.finetuning import FinetuneRunConfig
        from nat.runtime.loader import PluginTypes, discover_and_register_plugins, discover_entrypoints
        from nat.utils.data_models.schema_validator import validate_schema

        discover_entrypoints.cache_clear()  # a cell may have installed a package since
        discover_and_register_plugins(PluginTypes.CONFIG_OBJECT)
        draw_without_pyplot()
        check_types(tree, path)
        try:
            config = validate_schema(tree, Config)
        except Exception as error:
            raise ConfigError(f"config {str(path)!r}: {redact_text(str(error))}") from error
    check_ids(config, run.get("dataset"))
    tuning = config.finetuning
    # The Toolkit puts the config into itself here; each of its evaluations then fails to write it down, with a traceback.
    evaluated = config.model_copy(update={"finetuning": tuning.model_copy()})
    tuning.run_configuration = FinetuneRunConfig(config_file=evaluated, **run)
    tuning.output_dir = output_dir
    async with AsyncExitStack() as stack:
        try:
            builder = await stack.enter_async_context(WorkflowBuilder.from_config(config=config))
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        trajectory_builder = await builder.get_trajectory_builder(tuning.trajectory_builder)
        adapter = await builder.get_trainer_adapter(tuning.trainer_adapter)
        trainer = await builder.get_trainer(
            tuning.trainer, trajectory_builder=trajectory_builder, trainer_adapter=adapter
        )
        check_art(adapter)
        yield Opened(trainer, trajectory_builder, adapter, tuning)


def check_types(tree: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for a `_type` of a plugin that is not installed, or could not be imported: the Toolkit says
    only that it does not know it."""
    from nat.cli.type_registry import GlobalTypeRegistry

    registry = GlobalTypeRegistry.get()
    known = {
        "trainers": registry.get_registered_trainers,
        "trainer_adapters": registry.get_registered_trainer_adapters,
        "trajectory_builders": registry.get_registered_trajectory_builders,
    }
    for section, registered in known.items():
        names = {info.local_name for info in registered()} | {info.full_type for info in registered()}
        for name, component in (tree.get(section) or {}).items():
            kind = component.get("_type") if isinstance(component, Mapping) else None
            if kind is None or kind in names:
                continue
            needs = next((pin_of(part) for start, part in PLUGINS.items() if str(kind).startswith(start)), None)
            if needs is not None:
                raise ConfigError(
                    f"config {str(path)!r}: {section}.{name} is of type {kind!r}, whose plugin is not installed, or could "
                    f"not be imported. {needs}"
                )


def check_ids(config: Any, file: str | None) -> None:
    """Raises DatasetError for a dataset that has two rows of one id: the Toolkit evaluates the first, and says nothing.

    Args:
        config: The Toolkit's config.
        file: A dataset in place of the config's.
    """
    from nat.data_models.dataset_handler import EvalDatasetJsonConfig

    dataset = EvalDatasetJsonConfig(file_path=file) if file else config.eval.general.dataset
    place = getattr(dataset, "file_path", None)
    if place is None or not hasattr(dataset, "parser") or not Path(place).is_file():
        return  # rows that are made or fetched by the Toolkit, or are not there, which it says itself
    try:
        parse, options = dataset.parser()
        ids = [text_of(value) for value in parse(place, **options)[dataset.id_key]]
    except Exception:
        return  # the Toolkit says what is wrong with the file when it reads it
    twice = [example for example, count in Counter(ids).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{str(place)!r} has {len(twice)} ids more than once: {', '.join(map(repr, twice[:5]))}. Expected an id of its own "
            f"for each row, in {dataset.id_key!r}: the Toolkit would leave out every row but the first."
        )


def check_art(adapter: Any) -> None:
    """Raises ConfigError where the Toolkit's ART adapter has an `art` that cannot train."""
    if type(adapter).__module__ != "nat.plugins.openpipe.trainer_adapter":
        return
    if not hasattr(resolve("art:TrainableModel"), "train"):
        version = importlib.metadata.version("openpipe-art")
        raise ConfigError(
            f"the Toolkit's ART adapter calls TrainableModel.train, which openpipe-art {version} does not have: every "
            f"submit would raise AttributeError. {pin_of('art')}. Or train with finetune_nb's own adapter for the current "
            "openpipe-art (_type: openpipe_art)."
        )


# ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_without_pyplot() -> None:
    """The ART plugin draws its plot after every epoch, from the run's thread: on figures of its own from now on, so that
    it neither needs a backend nor touches what a cell is drawing."""
    module: Any = sys.modules.get("nat.plugins.openpipe.trainer")
    if module is not None and not isinstance(module.plt, _OwnFigures):
        module.plt = _OwnFigures()


class _OwnFigures:
    """The four calls of pyplot that the ART plugin's trainer makes, on figures that pyplot does not know of."""

    def __init__(self) -> None:
        self._figure: Any = None

    def subplots(self, **kwargs: Any) -> tuple[Any, Any]:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._figure = Figure(**kwargs)
        FigureCanvasAgg(self._figure)
        return self._figure, self._figure.subplots()

    def tight_layout(self) -> None:
        self._figure.tight_layout()

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        self._figure.savefig(*args, **kwargs)

    def close(self, figure: Any) -> None:
        self._figure = None
