"""`Builder` makes the live components of a config by name and closes them.

It starts the async generator that was registered for a `_type`, hands out what that yields, and resumes it after its yield
when the run closes. It knows no run and no epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from ..config.base import (
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
    TypedBaseModel,
)
from ..config.sections import Config
from ..errors import ConfigError, RunError, did_you_mean
from ..hooks import resolve
from ..redaction import MASK, KeyPath, is_text, plain_data
from ..user_code import as_exception
from .functions import Function
from .info import FunctionInfo
from .registry import EXECUTORS, KINDS, TRAINER_ADAPTERS, WRAPPERS, Build, config_class, registered

if TYPE_CHECKING:
    from ..interfaces import RolloutExecutor, Trainer, TrainerAdapter, TrajectoryBuilder

__all__ = [
    "Builder",
]

Key = tuple[str, str]
"""A component: its kind and its name in the config."""


@dataclass
class _Live:
    """One component and the task that keeps its generator."""

    key: Key
    ready: asyncio.Future[Any]
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


_under_construction: ContextVar[tuple[Builder, Key] | None] = ContextVar("finetune_nb_building", default=None)


class Builder:
    """Makes the components of a config by name: each once, when it is first asked for, on the loop that asks first.

    A component's generator lives in a task of its own, from its start to its end, so that it may hold task groups and
    time limits open across its yield. Use it as `async with Builder(config) as builder`, or call `close()`.

    The getters raise ConfigError for a name that the config does not have, and for components that need each other in a
    circle; RunError on another event loop than the first one's, and after `close`; and what building the component raises.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_folder: Path | None = None
        """The folder of the run that it builds for; None outside a run."""
        self.environment: Any = None
        """The run's Environment, once it is given or made; None: it has none, or none that was needed yet."""
        self.doing: str | None = None
        """What a component makes the run wait for, in words for people; a waiting cell and the panel show it."""
        self._added: dict[Key, Any] = {}
        self._live: dict[Key, _Live] = {}
        self._built: list[_Live] = []  # in the order in which they became ready
        self._needs: dict[Key, set[Key]] = {}  # of each component under construction
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Task[None] | None = None

    def add(self, kind: str, name: str, component: Any) -> None:
        """Put in a ready-made component, which takes precedence over the config's of that name.

        The builder does not close it.

        Args:
            kind: One of KINDS, such as "trainer_adapter".
            name: Its name in the config.
            component: The component itself.

        Raises:
            ConfigError: The kind is unknown, the config's component has been built already, or it is a trainer adapter of
                a run that trains elsewhere.
        """
        if kind not in KINDS:
            raise ConfigError(f"there is no kind of component {kind!r}. {did_you_mean(kind, KINDS)}")
        if (kind, name) in self._live:
            raise ConfigError(
                f"{kind} {name!r} has been built from the config already. Add components before they are used."
            )
        if kind == "trainer_adapter" and self.config.run.trains_elsewhere:
            raise ConfigError(
                "found run.ray.trainer and a trainer adapter that was given as an object; expected its settings, since an "
                "object cannot go to the cluster. Leave run.ray.trainer out, or adapter=."
            )
        self._added[kind, name] = component

    def added(self) -> list[tuple[str, str, Any]]:
        """List the components that were put in ready-made.

        Returns:
            Kind, name and component of each.
        """
        return [(*key, component) for key, component in self._added.items()]

    def ready(self, kind: str, name: str) -> Any | None:
        """Look up a component without building it.

        Args:
            kind: One of KINDS.
            name: Its name in the config.

        Returns:
            The component if it was added or has been built, else None.
        """
        if (kind, name) in self._added:
            return self._added[kind, name]
        return next((live.ready.result() for live in self._built if live.key == (kind, name)), None)

    def built(self, kind: str) -> list[Any]:
        """Every component of a kind that was added or has been built.

        Args:
            kind: One of KINDS.

        Returns:
            The components: those that were added, then those that were built, in the order in which they became ready.
        """
        added = [component for (of_kind, _), component in self._added.items() if of_kind == kind]
        return added + [live.ready.result() for live in self._built if live.key[0] == kind]

    async def get_llm(self, name: str, wrapper_type: Any = None) -> Any:
        """Get a language model, built on first use.

        Args:
            name: Its name in the section `llms`.
            wrapper_type: A framework whose model is wanted: "langchain", or the Toolkit's LLMFrameworkEnum.LANGCHAIN, for a
                ChatOpenAI. It can be made once and used by all rollouts: each call is recorded in the rollout that makes it.

        Returns:
            The model.

        Raises:
            ConfigError: There is no such model, or none for that framework; or components need each other in a circle.
            MissingExtra: The framework is not installed.
            RunError: The builder is closed, or works on another event loop.
        """
        if wrapper_type is not None and str(wrapper_type) not in WRAPPERS:
            raise ConfigError(
                f"get_llm({name!r}, wrapper_type={str(wrapper_type)!r}): models are wrapped for {', '.join(WRAPPERS)} here. "
                "Leave wrapper_type out, and give llm.base_url and llm.api_key to that framework's OpenAI client in the workflow."
            )
        llm = await self._get("llm_provider", name)
        return llm if wrapper_type is None else resolve(WRAPPERS[str(wrapper_type)])(llm)

    def get_max_concurrency(self) -> int:
        """Get how many rollouts run at once.

        Returns:
            `eval.general.max_concurrency`.
        """
        return self.config.eval.general.max_concurrency

    async def get_function(self, name: str) -> Any:
        """Get a function, built on first use.

        Args:
            name: Its name in the section `functions`. The config's workflow is called "workflow" (in the Toolkit: "<workflow>").

        Returns:
            The function, to be called as it was written. Model calls in it are recorded as its own
            (`finetuning.target_functions`).

        Raises:
            ConfigError: There is no such function; or components need each other in a circle.
            RunError: The builder is closed, or works on another event loop.
        """
        return await self._get("function", "workflow" if name == "<workflow>" else name)

    async def get_workflow(self) -> Any:
        """Get the workflow of the config, built on first use.

        Returns:
            The workflow.

        Raises:
            ConfigError: The config has no workflow, or components need each other in a circle.
            RunError: The builder is closed, or works on another event loop.
        """
        return await self._get("function", "workflow")

    async def get_evaluator(self, name: str) -> Any:
        """Get an evaluator. It is built on first use.

        Args:
            name: Its name in the section `eval.evaluators`.

        Returns:
            The evaluator.

        Raises:
            ConfigError: There is no such evaluator; or components need each other in a circle.
            RunError: The builder is closed, or works on another event loop.
        """
        return await self._get("evaluator", name)

    async def get_trajectory_builder(self, name: str) -> TrajectoryBuilder:
        """Get a trajectory builder, not yet initialized. It is built on first use.

        Args:
            name: Its name in the section `trajectory_builders`.

        Returns:
            The trajectory builder.

        Raises:
            ConfigError: There is no such trajectory builder; or components need each other in a circle.
            RunError: The builder is closed, or works on another event loop.
        """
        return await self._get("trajectory_builder", name)

    async def get_trainer_adapter(self, name: str) -> TrainerAdapter:
        """Get a trainer adapter, not yet initialized. It is built on first use.

        Args:
            name: Its name in the section `trainer_adapters`.

        Returns:
            The trainer adapter.

        Raises:
            ConfigError: There is no such trainer adapter; or components need each other in a circle.
            RunError: The builder is closed, or works on another event loop.
        """
        return await self._get("trainer_adapter", name)

    async def get_trainer(self, name: str) -> Trainer:
        """Get a trainer, not yet bound to its two components. It is built on first use.

        Args:
            name: Its name in the section `trainers`.

        Returns:
            The trainer.

        Raises:
            ConfigError: There is no such trainer; or components need each other in a circle.
            RunError: The builder is closed, or works on another event loop.
        """
        return await self._get("trainer", name)

    async def get_executor(self) -> RolloutExecutor | None:
        """Get what runs rollouts, if `run.engine` names an engine elsewhere.

        Returns:
            The executor. None: rollouts run on the event loop of whoever asks for them.

        Raises:
            RunError: The builder is closed, or works on another event loop.
        """
        kind = self.config.run.engine_kind
        return await self._get("executor", kind) if kind in EXECUTORS else None

    def get_llm_config(self, name: str) -> LLMBaseConfig:
        """Get the config of a language model, built or not.

        Args:
            name: Its name in the section `llms`.

        Returns:
            The config.

        Raises:
            ConfigError: There is none of that name.
        """
        return self._config_of("llm_provider", name)

    def get_function_config(self, name: str) -> FunctionBaseConfig:
        """Get the config of a workflow, built or not.

        Args:
            name: Its name. The config's own is called "workflow" (in the Toolkit: "<workflow>").

        Returns:
            The config.

        Raises:
            ConfigError: There is none of that name.
        """
        return self._config_of("function", "workflow" if name == "<workflow>" else name)

    def get_workflow_config(self) -> FunctionBaseConfig:
        """Get the config of the workflow, built or not.

        Returns:
            The config.

        Raises:
            ConfigError: There is none.
        """
        return self._config_of("function", "workflow")

    def get_evaluator_config(self, name: str) -> EvaluatorBaseConfig:
        """Get the config of an evaluator, built or not.

        Args:
            name: Its name in the section `eval.evaluators`.

        Returns:
            The config.

        Raises:
            ConfigError: There is none of that name.
        """
        return self._config_of("evaluator", name)

    def get_trajectory_builder_config(self, name: str) -> TrajectoryBuilderConfig:
        """Get the config of a trajectory builder, built or not.

        Args:
            name: Its name in the section `trajectory_builders`.

        Returns:
            The config.

        Raises:
            ConfigError: There is none of that name.
        """
        return self._config_of("trajectory_builder", name)

    def get_trainer_adapter_config(self, name: str) -> TrainerAdapterConfig:
        """Get the config of a trainer adapter, built or not.

        Args:
            name: Its name in the section `trainer_adapters`.

        Returns:
            The config.

        Raises:
            ConfigError: There is none of that name.
        """
        return self._config_of("trainer_adapter", name)

    def get_trainer_config(self, name: str) -> TrainerConfig:
        """Get the config of a trainer, built or not.

        Args:
            name: Its name in the section `trainers`.

        Returns:
            The config.

        Raises:
            ConfigError: There is none of that name.
        """
        return self._config_of("trainer", name)

    def _config_of(self, kind: str, name: str) -> Any:
        config = self.config
        title, section = {
            "llm_provider": ("llms", config.llms),
            "function": (
                "functions",
                config.functions | ({} if config.workflow is None else {"workflow": config.workflow}),
            ),
            "evaluator": ("eval.evaluators", config.eval.evaluators),
            "dataset": ("the config", {}),
            "trajectory_builder": ("trajectory_builders", config.trajectory_builders),
            "trainer_adapter": ("trainer_adapters", config.trainer_adapters),
            "trainer": ("trainers", config.trainers),
        }[kind]
        if name not in section:
            known = {*section, *(added for of_kind, added in self._added if of_kind == kind)}
            raise ConfigError(f"there is no {kind} {name!r} in {title}. {did_you_mean(name, known)}")
        return section[name]

    async def _get(self, kind: str, name: str) -> Any:
        key = (kind, name)
        if key in self._added:
            return self._added[key]
        if self.config._received:
            raise RunError(
                f"{kind} {name!r} was asked for of a config that came with a run's folder and is not trusted yet; expected one "
                "that you wrote. Read it, then open the run with trust=True, or load the config yourself."
            )
        loop = asyncio.get_running_loop()
        if self._closing is not None:
            raise RunError(
                f"{kind} {name!r} was asked for after its builder was closed. Make a new Builder, or a new Run."
            )
        if self._loop not in (None, loop):
            raise RunError(
                f"{kind} {name!r} was asked for on another event loop than the one its builder works on. Ask there, or make a "
                "Builder here."
            )
        self._check_cycle(key)
        live = self._live.get(key)
        if live is None:
            if kind == "executor":
                config, build = self.config.run, resolve(EXECUTORS[name])
            else:
                config = self._config_of(kind, name)
                build = _build_of(kind, name, config)
                if kind == "trainer_adapter" and self.config.run.trains_elsewhere:
                    build = resolve(TRAINER_ADAPTERS[self.config.run.engine_kind])
            self._loop = loop
            live = self._live[key] = _Live(key, loop.create_future())
            self._needs[key] = set()
            live.task = loop.create_task(self._keep(live, build(config, self)), name=f"{kind} {name}")
        # Shielded: whoever waits may be canceled, and the component is still wanted by the next one.
        return await asyncio.shield(live.ready)

    def _check_cycle(self, key: Key) -> None:
        parent = _under_construction.get()
        if parent is None or parent[0] is not self or parent[1] not in self._needs:
            return
        road = self._road(key, parent[1])
        if road:
            names = " -> ".join(f"{kind} {name!r}" for kind, name in (parent[1], *road))
            raise ConfigError(f"components need each other in a circle: {names}. Take one of these references out.")
        self._needs[parent[1]].add(key)

    def _road(self, start: Key, end: Key, seen: frozenset[Key] = frozenset()) -> tuple[Key, ...]:
        """From `start` to `end` along what components under construction wait for; empty where there is no road."""
        if start == end:
            return (end,)
        for key in sorted(self._needs.get(start, set()) - seen):
            road = self._road(key, end, seen | {start})
            if road:
                return (start, *road)
        return ()

    async def _keep(self, live: _Live, generator: AsyncGenerator[Any, None]) -> None:
        """A component's whole life, in one task: up to its yield, until it is closed, and after its yield."""
        kind, name = live.key
        _under_construction.set((self, live.key))
        try:
            component = await anext(generator, None)
            if component is None:
                raise ConfigError(
                    f"{kind} {name!r} was registered by a function that yields no component. Yield it, once."
                )
        except BaseException as caught:
            task = asyncio.current_task()
            if isinstance(caught, asyncio.CancelledError) and task is not None and task.cancelling():
                live.ready.cancel()
                raise
            error = as_exception(caught, f"{kind} {name!r}")
            del self._live[live.key]  # so that it can be tried again, once the cause is gone
            error.add_note(f"while building {kind} {name!r}")
            live.ready.set_exception(error)
            live.ready.exception()  # seen, also where nobody waits any more
            return
        finally:
            del self._needs[live.key]
        if isinstance(component, FunctionInfo):
            component = component.single_fn
        if kind == "function" and name != "workflow":
            component = Function(component, name)
        self._built.append(live)
        live.ready.set_result(component)
        try:
            await live.closing.wait()
            if await anext(generator, None) is not None:
                raise ConfigError(f"{kind} {name!r} was registered by a function that yields twice. Yield once.")
        finally:
            await generator.aclose()

    async def close(self) -> None:
        """Resume every component's generator after its yield, the newest first, each once.

        All of them are resumed even if one raises. Closing again does nothing more.

        Raises:
            RunError: The builder works on another event loop.
            Exception: What a component raised; an ExceptionGroup, if several did.
        """
        if self._loop not in (None, asyncio.get_running_loop()):
            raise RunError(
                "the builder was closed on another event loop than the one it works on. Await close() there."
            )
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close_all(), name="close components")
        # Shielded: who is canceled while closing must not leave the rest open.
        await asyncio.shield(self._closing)

    async def _close_all(self) -> None:
        unfinished = [live.task for live in self._live.values() if live.task is not None and not live.ready.done()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        errors: list[Exception] = []
        for live in reversed(self._built):
            live.closing.set()
            assert live.task is not None
            for ended in await asyncio.gather(live.task, return_exceptions=True):
                if isinstance(ended, BaseException):
                    error = as_exception(ended, f"{live.key[0]} {live.key[1]!r}")
                    error.add_note(f"while closing {live.key[0]} {live.key[1]!r}")
                    errors.append(error)
        self._live.clear()
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("several components could not be closed", errors)

    async def __aenter__(self) -> Builder:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Builder:
        return self  # live components cannot be copied


def _build_of(kind: str, name: str, config: TypedBaseModel) -> Build:
    type_name = type(config).static_type()
    if type_name is not None and type_name not in registered[kind]:
        config_class(kind, type_name)  # imports our own module, which registers it, or says what is known
    if type_name is None or type_name not in registered[kind]:
        raise ConfigError(
            f"{kind} {name!r}: nothing is registered that builds a {type(config).__name__}. Use register_{kind}."
        )

    def refuse_mask(path: KeyPath, node: Any) -> Any:
        text = node.get_secret_value() if isinstance(node, SecretStr) else node
        if is_text(text) and MASK in text:
            where = ".".join(map(str, path))
            raise ConfigError(f"{kind} {name!r}: {where} was left out when the config was stored. Pass it again.")
        return node

    plain_data(config, refuse_mask)
    return registered[kind][type_name].build
