"""Finds the environment that `ft.Run(env=...)` names, and makes it part of a run's config.

`ENVIRONMENTS` names the classes, one a kind of environment of other people. A config has the section `run.environment`, and
components of `_type: environment` are the environment's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ..config.base import EvaluatorBaseConfig, FunctionBaseConfig
from ..config.sections import Config, EnvironmentSettings
from ..errors import ConfigError, MissingExtra, RunError, did_you_mean
from ..hooks import resolve
from ..interfaces import Environment
from ..user_code import contained_call
from .builder import Builder
from .registry import register_evaluator, register_function

__all__ = [
    "ENVIRONMENTS",
    "ROLES",
    "EnvironmentRewardConfig",
    "EnvironmentWorkflowConfig",
    "environment_from",
    "environment_of",
    "rows_of",
    "section_of",
]

ENVIRONMENTS = {
    "reasoning_gym": "finetune_nb.environments.reasoning_gym:ReasoningGym",
    "textarena": "finetune_nb.environments.textarena:TextArena",
    "gem": "finetune_nb.environments.gem:Gem",
    "skyrl_gym": "finetune_nb.environments.skyrl_gym:SkyRLGym",
    "gymnasium": "finetune_nb.environments.gymnasium:Gymnasium",
    "verifiers": "finetune_nb.environments.verifiers.environment:Verifiers",
    "inspect_ai": "finetune_nb.environments.inspect_ai:InspectTask",
    "text": "finetune_nb.environments.text:TextEnvironment",
    "trl": "finetune_nb.environments.trl:ToolEnvironment",
}
"""Kind, which is what a name begins with, -> "module:class" of a subclass of Environment. Objects are offered to the classes
in this order."""


def environment_from(given: Any, options: Mapping[str, Any] | None = None) -> Environment:
    """Make an environment.

    Args:
        given: Its name, "<kind>:<name>"; or an object or a class that one of the kinds takes; or an Environment.
        options: As `env_options` of Run.

    Returns:
        The environment.

    Raises:
        ConfigError: There is no such kind or name, no kind takes the object, or an option does not fit.
        MissingExtra: Its package is not installed.
    """
    options = dict(options or {})
    if isinstance(given, Environment):
        if options:
            raise ConfigError("env is an Environment, which has its options already: leave env_options out.")
        return given
    if isinstance(given, str):
        kind, colon, name = given.partition(":")
        if not colon or kind not in ENVIRONMENTS or not name:
            known = ", ".join(f'"{each}:..."' for each in ENVIRONMENTS)
            raise ConfigError(
                f"there is no environment {given!r}. {did_you_mean(kind, ENVIRONMENTS)} Expected one of {known}; or an object or "
                "class: something with reset() and step(text), say."
            )
        found = _class_of(kind)
        return _made(found, name, options, f'the environment "{given}"')
    offered = given
    if inspect.isroutine(given) or isinstance(given, functools.partial):  # one is made to see what it is
        offered = contained_call("the function that is given as env", given)
    for kind in ENVIRONMENTS:
        found = _class_of(kind)
        if found.takes(offered):
            if offered is not given:
                with contextlib.suppress(Exception):
                    offered.close()
            return _made(found, given, options, f"an environment of {kind}")
    raise ConfigError(
        f"env is {_name_of(given)!r}, which no kind of environment takes. Expected a name such as "
        f'"{next(iter(ENVIRONMENTS))}:...", or an object or class that belongs to one of: {", ".join(ENVIRONMENTS)}.'
    )


def section_of(given: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the config says of an environment.

    Args:
        given: As it was given to Run.
        options: As `env_options` of Run.

    Returns:
        The section `run.environment`.

    Raises:
        ConfigError: The options are no plain data, so that no file could hold them.
    """
    options = dict(options or {})
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env_options are written to config.yml, and these cannot be: {error}. Expected plain data; put anything else into "
            "the object or class that is given as env."
        ) from None
    named = isinstance(given, str)
    return {"name": given if named else _name_of(given), "is_object": not named, "options": options}


def environment_of(builder: Builder) -> Environment:
    """The environment of a run, made when it is first needed.

    Args:
        builder: The run's components.

    Raises:
        ConfigError: The run has none, or it was given as an object and is not there.
        MissingExtra: Its package is not installed.
        RunError: The config came with a folder that is not trusted.
    """
    if builder.environment is None:
        section = _section(builder.config)
        if builder.config._received:
            raise RunError(
                f"environment {section.name!r} is named by a config that came with a run's folder and is not trusted yet. Read "
                "it, then open the run with trust=True."
            )
        if section.is_object:
            raise ConfigError(
                f"the environment {section.name!r} was given as an object or a class, which no file can hold. Pass it again: "
                "env=..."
            )
        builder.environment = environment_from(section.name, section.options)
    return builder.environment


def rows_of(builder: Builder, name: str) -> list[dict[str, Any]] | None:
    """Find the rows of a dataset by its name in the config.

    Args:
        builder: The run's components.
        name: The name.

    Returns:
        Rows that were given under that name, or the environment's tasks; None for another name, such as a file's.
    """
    known = builder.ready("dataset", name)
    if known is None and builder.config.run.environment is not None and name in ROLES:
        known = environment_of(builder).rows(ROLES[name])
        builder.add("dataset", name, known)
    return known


ROLES = {"environment:train": "train", "environment:validation": "validation"}
"""What a config calls the tasks of the run's environment -> their role."""


def _section(config: Config) -> EnvironmentSettings:
    section = config.run.environment
    if section is None:
        raise ConfigError(
            "a component of _type: environment needs run.environment in the config, with the environment's name."
        )
    return section


def _class_of(kind: str) -> type[Environment]:
    return resolve(ENVIRONMENTS[kind])


def _made(found: type[Environment], given: Any, options: Mapping[str, Any], what: str) -> Environment:
    try:
        return found(given, options)
    except MissingExtra:
        raise
    except ImportError as error:
        raise MissingExtra(f"{what} ({error})", "", found.package) from error


def _name_of(given: Any) -> str:
    kind = given if isinstance(given, type) else type(given)
    if isinstance(given, Mapping):
        return "{" + ", ".join(map(str, given)) + "}"
    return getattr(given, "__qualname__", None) or kind.__qualname__


class EnvironmentWorkflowConfig(FunctionBaseConfig, name="environment"):
    """The agent of `run.environment`."""


class EnvironmentRewardConfig(EvaluatorBaseConfig, name="environment"):
    """The reward of `run.environment`."""


@register_function(config_type=EnvironmentWorkflowConfig)
async def _environment_workflow(config: EnvironmentWorkflowConfig, builder: Builder) -> AsyncGenerator[Any, None]:
    environment = environment_of(builder)
    yield environment.workflow
    await environment.aclose()


@register_evaluator(config_type=EnvironmentRewardConfig)
async def _environment_reward(config: EnvironmentRewardConfig, builder: Builder) -> AsyncGenerator[Any, None]:
    yield environment_of(builder).reward
