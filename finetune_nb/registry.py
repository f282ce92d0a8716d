"""The decorators that add a component to what `_type` in a config can name.

    @register_trainer(config_type=MyTrainerConfig)
    async def my_trainer(config: MyTrainerConfig, builder: Builder):
        yield MyTrainer(trainer_config=config)         # resumed after its yield when the run closes

The names stand in type_names.py; making live components is builder.py's (`Builder` is importable from here too).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from .builder import Builder
from .component import (
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
)
from .errors import ConfigError
from .redaction import redacting_logger
from .type_names import KINDS, OUR_TYPES, Registration, registered

__all__ = [
    "Builder",
    "PythonEvaluatorConfig",
    "PythonFunctionConfig",
    "register_evaluator",
    "register_function",
    "register_llm_provider",
    "register_trainer",
    "register_trainer_adapter",
    "register_trajectory_builder",
]

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
    """Registers an async generator function `(config, builder)` that yields a TrajectoryBuilder.

    A name that is registered again (a notebook cell that runs twice) replaces the old one. Raises ConfigError for
    anything but an async generator function. Further keyword arguments, which NAT's decorators know, are ignored. All
    of this holds for the other decorators too.
    """
    return _decorator("trajectory_builder", config_type)


def register_trainer_adapter(config_type: type[TrainerAdapterConfig], **_: Any) -> Callable[[F], F]:
    """Registers an async generator function `(config, builder)` that yields a TrainerAdapter."""
    return _decorator("trainer_adapter", config_type)


def register_trainer(config_type: type[TrainerConfig], **_: Any) -> Callable[[F], F]:
    """Registers an async generator function `(config, builder)` that yields a Trainer."""
    return _decorator("trainer", config_type)


def register_evaluator(config_type: type[EvaluatorBaseConfig], **_: Any) -> Callable[[F], F]:
    """Registers an async generator function `(config, builder)` that yields an evaluator."""
    return _decorator("evaluator", config_type)


def register_function(config_type: type[FunctionBaseConfig], **_: Any) -> Callable[[F], F]:
    """Registers an async generator function `(config, builder)` that yields a workflow: a function, sync or async."""
    return _decorator("function", config_type)


def register_llm_provider(config_type: type[LLMBaseConfig], **_: Any) -> Callable[[F], F]:
    """Registers an async generator function `(config, builder)` that yields a language model."""
    return _decorator("llm_provider", config_type)


class PythonFunctionConfig(FunctionBaseConfig, name="python_function"):
    """Stands for a plain function of a notebook, which `Builder.add` supplies."""


class PythonEvaluatorConfig(EvaluatorBaseConfig, name="python_function"):
    """Stands for a plain reward function of a notebook, which `Builder.add` supplies."""


@register_function(config_type=PythonFunctionConfig)
async def _python_function(config: PythonFunctionConfig, builder: Builder) -> AsyncGenerator[Any, None]:
    raise ConfigError("the workflow is a plain Python function, which no file can hold. Pass it again: workflow=...")
    yield


@register_evaluator(config_type=PythonEvaluatorConfig)
async def _python_evaluator(config: PythonEvaluatorConfig, builder: Builder) -> AsyncGenerator[Any, None]:
    raise ConfigError("the evaluator is a plain Python function, which no file can hold. Pass it again: reward=...")
    yield
