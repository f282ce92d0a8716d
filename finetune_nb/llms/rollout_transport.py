"""A transport for OpenAI clients that are made once: each request goes to the rollout whose code sends it."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any, Literal
from weakref import WeakKeyDictionary

from ..errors import RunError
from .call_recorder import current_episode
from .client import LLM
from .gateway import Endpoint, gateway
from .openai_wire import error_body

__all__ = [
    "RolloutTransport",
]


class RolloutTransport:
    """Sends each request to the model of the rollout whose code makes it, with that rollout's address and key.

    A client with this transport can be made once, in a cell or a module, and used by all rollouts at once, on any event
    loop:

        from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        from finetune_nb.llms.rollout_transport import RolloutTransport

        http = DefaultAsyncHttpxClient(transport=RolloutTransport())
        client = AsyncOpenAI(base_url=RolloutTransport.base_url, api_key="none", http_client=http)

        async def workflow(question, llm):
            messages = [{"role": "user", "content": question}]
            return (await client.chat.completions.create(model="policy", messages=messages)).choices[0].message.content

    It is a transport of httpx and of httpx2, for their sync and async clients: `OpenAI` takes one with
    `DefaultHttpxClient`, LangChain's `ChatOpenAI` as `http_async_client` and `http_client`.

    The rollout is found by its context variable, which tasks, `asyncio.to_thread` and the thread of a sync workflow have.
    A thread that was started otherwise has it with `contextvars.copy_context().run`. Where there is no rollout, a request
    is answered with an error that says so, and sent nowhere.

    Args:
        llm: The model that is asked. Default: the one that the rollout's workflow has.
    """

    base_url = "http://rollout.invalid/v1"
    """For the client. No such host exists: a client without this transport reaches nobody."""

    def __init__(self, llm: LLM | None = None) -> None:
        self._llm = llm
        self._of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Any]] = WeakKeyDictionary()
        self._of_threads: dict[str, Any] = {}
        self._lock = threading.Lock()

    async def handle_async_request(self, request: Any) -> Any:
        """Sends one request of an async client."""
        library = _library(request)
        try:
            endpoint = _current_endpoint(self._llm)
        except RunError as error:
            return _refusal(library, error)
        return await self._async_transport(library).handle_async_request(_addressed(library, request, endpoint))

    def handle_request(self, request: Any) -> Any:
        """Sends one request of a sync client."""
        library = _library(request)
        try:
            endpoint = _current_endpoint(self._llm)
        except RunError as error:
            return _refusal(library, error)
        return self._sync_transport(library).handle_request(_addressed(library, request, endpoint))

    def _async_transport(self, library: Any) -> Any:
        """The connections of the running event loop: they cannot be used on another one."""
        loop = asyncio.get_running_loop()
        with self._lock:
            transports = self._of_loops.get(loop)
            if transports is None:
                transports = self._of_loops[loop] = {}
                gateway().close_with_clients(self.aclose)
            if library.__name__ not in transports:
                transports[library.__name__] = library.AsyncHTTPTransport(verify=False)  # plain HTTP: no certificates
            return transports[library.__name__]

    def _sync_transport(self, library: Any) -> Any:
        with self._lock:
            if library.__name__ not in self._of_threads:
                self._of_threads[library.__name__] = library.HTTPTransport(verify=False)
            return self._of_threads[library.__name__]

    async def aclose(self) -> None:
        """Closes the connections of the running event loop. They are opened again when they are needed."""
        with self._lock:
            transports = self._of_loops.pop(asyncio.get_running_loop(), {})
        for transport in transports.values():
            await transport.aclose()

    def close(self) -> None:
        """Closes the connections of sync clients. They are opened again when they are needed."""
        with self._lock:
            transports, self._of_threads = self._of_threads, {}
        for transport in transports.values():
            transport.close()

    def __enter__(self) -> RolloutTransport:
        return self

    def __exit__(self, *raised: object) -> Literal[False]:
        self.close()
        return False

    async def __aenter__(self) -> RolloutTransport:
        return self

    async def __aexit__(self, *raised: object) -> Literal[False]:
        await self.aclose()
        return False


def _library(request: Any) -> Any:
    """The package that the request is of, httpx or httpx2: a transport of the other one does not take it."""
    return sys.modules[type(request).__module__.partition(".")[0]]


def _current_endpoint(llm: LLM | None) -> Endpoint:
    episode = current_episode()
    if episode is None:
        raise RunError(
            "this client asks the model of the rollout that uses it, and no rollout runs here. Use it inside the workflow; "
            "start threads there with contextvars.copy_context().run, or with asyncio.to_thread."
        )
    episode.require_running()
    if llm is not None:
        return llm._endpoint(episode)
    if episode.llm is None:
        raise RunError(
            f"the rollout of {episode.name} has no llm that this client could ask: the config names none for its workflow."
        )
    return episode.llm._endpoint(episode)


def _addressed(library: Any, request: Any, endpoint: Endpoint) -> Any:
    """The request as it is sent to that address."""
    target = request.url.raw_path.decode("ascii")
    _, version, rest = target.partition("/v1/")
    path = rest if version else target.lstrip("/")
    url = library.URL(f"{endpoint.base_url}/{path}")
    headers = library.Headers(request.headers)
    headers["Host"] = url.netloc.decode("ascii")
    headers["Authorization"] = f"Bearer {endpoint.api_key}"
    return library.Request(request.method, url, headers=headers, stream=request.stream, extensions=request.extensions)


def _refusal(library: Any, error: RunError) -> Any:
    """An error as the gateway answers it: a client would ask again after an exception, and report a lost connection."""
    return library.Response(403, json=error_body(str(error), 403, "no_rollout"), headers={"x-should-retry": "false"})
