"""An environment of verifiers with its servers up, whose agents ask the model of the rollout that they run in."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from ...components.functions import WORKFLOW, running
from ...errors import ConfigError, RunError
from ...llms.call_recorder import current_episode
from ...types import InvocationNode

__all__ = [
    "Serving",
    "asking",
]

_llm: contextvars.ContextVar[Any] = contextvars.ContextVar("finetune_nb_verifiers_llm", default=None)


@contextmanager
def asking(llm: Any) -> Iterator[None]:
    """Agents that run inside ask that model."""
    token = _llm.set(llm)
    try:
        yield
    finally:
        _llm.reset(token)


class Serving:
    """An environment on one event loop, with the servers that its episodes share.

    Args:
        env: The environment.
        options: See VerifiersOptions.
    """

    def __init__(self, env: Any, options: Any) -> None:
        self.env = copy.copy(env)  # its servers are attributes, and belong to one loop
        self.options = options
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        # Without the context of the rollout that comes first: what its servers do is done for all.
        self._task = asyncio.create_task(self._serve(), context=contextvars.Context())

    @staticmethod
    async def on_this_loop(known: dict[Any, Serving], env: Any, options: Any) -> Serving:
        """The one of the running loop, made when it is first needed. known: those that there are, by loop."""
        loop = asyncio.get_running_loop()
        found = known.get(loop)
        if found is None:
            for closed in [each for each in known if each.is_closed()]:
                del known[closed]
            found = known[loop] = Serving(env, options)
        try:
            await asyncio.shield(found._ready)
        except Exception:
            known.pop(loop, None)  # the next rollout tries again
            raise
        return found

    @staticmethod
    async def close_on_this_loop(known: dict[Any, Serving]) -> None:
        """Takes the servers of the running loop down."""
        found = known.pop(asyncio.get_running_loop(), None)
        if found is not None:
            found._closing.set()
            await asyncio.wait([found._task])

    async def _serve(self) -> None:
        try:
            async with self.env.serving():
                clients = Clients(self.env._interception, self.context("").client)
                self.env._interception = clients
                self._ready.set_result(None)
                try:
                    await self._closing.wait()
                finally:
                    await clients.aclose()
        except Exception as error:
            if not self._ready.done():
                self._ready.set_exception(error)

    def context(self, model: str) -> Any:
        """What verifiers wants to know of the model. The address is another one in each rollout: see Clients."""
        from verifiers.v1.clients import ModelContext  # type: ignore[import-not-found]
        from verifiers.v1.configs.client import EvalClientConfig, TrainClientConfig  # type: ignore[import-not-found]

        about = {"base_url": "http://127.0.0.1/v1", "api_key_var": "FINETUNE_NB_NO_KEY"}
        if self.options.client == "train":
            renders = {"renderer_model_name": self.options.renderer_model, "renderer": self.options.renderer}
            client = TrainClientConfig(**about, **renders)
        else:
            client = EvalClientConfig(**about)
        return ModelContext(model=model, client=client)


class Clients:
    """verifiers' interception, with clients that ask the gateway for the rollout that an agent runs in.

    Args:
        inner: The environment's own interception.
        config: Of the client of agents that have none of their own.
    """

    def __init__(self, inner: Any, config: Any) -> None:
        self.inner, self.config = inner, config
        self._shared: Any = None

    @contextlib.asynccontextmanager
    async def acquire(self, session: Any) -> AsyncIterator[Any]:
        """A slot for one run of an agent."""
        agent = session.trace.agent
        async with self.inner.acquire(session) as slot:
            if session.ctx.client == self.config:
                session.client = self._client(agent.name, agent.trainable)
            elif agent.trainable:
                raise ConfigError(
                    f"agent {agent.name!r} is trained, and its config has a client of its own, whose model is another one. Leave "
                    "it out."
                )
            yield slot

    def _client(self, name: str, trainable: bool) -> Any:
        """A client of the rollout that runs here. Calls of an agent that is not trained are recorded as those of a function of
        its name."""
        llm, episode = _llm.get(), current_episode()
        if llm is None or episode is None:
            raise RunError("an agent of an environment was started outside of a rollout.")
        node = WORKFLOW if trainable else InvocationNode(function_id=name, function_name=name)
        with running(node):
            base_url, key = llm.base_url, str(llm.api_key)
        if self._shared is None:
            from verifiers.v1.clients import resolve_client  # type: ignore[import-not-found]

            self._shared = resolve_client(self.config)
        client = copy.copy(self._shared)
        if hasattr(client, "api_key"):
            client.base_url, client.api_key = base_url, key
        else:
            client.client = self._shared.client.copy(base_url=base_url, api_key=key)
        return RolloutClient(client, episode)

    async def aclose(self) -> None:
        """Closes the connections that all rollouts share."""
        if self._shared is not None:
            await self._shared.close()


class RolloutClient:
    """A client of verifiers whose requests are those of one rollout, whichever task of a server sends them.

    Args:
        client: The client.
        episode: The rollout.
    """

    def __init__(self, client: Any, episode: Any) -> None:
        self._client, self._episode = client, episode

    async def get_response(self, *args: Any, **options: Any) -> Any:
        with self._episode.current():
            return await self._client.get_response(*args, **options)

    async def relay(self, *args: Any, **options: Any) -> Any:
        with self._episode.current():
            return await self._client.relay(*args, **options)

    async def relay_aux(self, *args: Any, **options: Any) -> Any:
        with self._episode.current():
            return await self._client.relay_aux(*args, **options)
