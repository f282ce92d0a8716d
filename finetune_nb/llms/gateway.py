"""The gateway: a server on 127.0.0.1 that speaks the APIs of OpenAI and Anthropic, so that agents written with any client
library are recorded.

Every rollout has an address of its own for every model that it asks (`/e/{episode}/v1`): which rollout a request belongs
to does not depend on threads, tasks or libraries. Its key is the rollout's too, so that a client that was made in one
rollout and is used in another is refused. A request becomes the same call that `llm.chat` makes, recorded in the
same CallRecorder, with the token ids that were seen and sampled. No HTTP library is patched.

The server has a thread and an event loop of its own, so that an agent that blocks the run's loop gets its answer too. It is
started when an address is first asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from ..components.functions import WORKFLOW, current_function, running
from ..errors import BackendError, ConfigError, FinetuneError, MissingExtra
from ..redaction import redact_text, redacting_logger, remember_secret
from ..types import InvocationNode, LLMCall, SamplingParams
from .call_recorder import CallRecorder, without_stop
from .openai_wire import Refused, WireRequest, answer_of, error_body, events_of, read_request
from .protocols import generate, messages, responses
from .protocols.options import Abilities
from .protocols.responses import ResponseStore
from .proxies import bypass_proxies
from .rollout_keys import RolloutKey, rollouts_of, secret_of
from .senders import sender_on, watch_connections

__all__ = [
    "Addresses",
    "AskedModel",
    "Completions",
    "Endpoint",
    "Gateway",
    "Generate",
    "LARGEST_REQUEST",
    "Messages",
    "Models",
    "Responses",
    "gateway",
    "http_server",
    "running_gateway",
    "sample",
]


class AskedModel(Protocol):
    """What the gateway needs of a model: `llms.client.LLM` has it."""

    name: str
    sampling: SamplingParams
    takes_options: bool

    async def call(
        self,
        episode: CallRecorder,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
        **options: Any,
    ) -> LLMCall: ...

    async def complete(
        self, episode: CallRecorder, prompt: str | list[int], params: SamplingParams, **options: Any
    ) -> LLMCall: ...


@dataclass(eq=False)
class Endpoint:
    """One address: a model, asked by one rollout. Closed when the rollout ends."""

    id: str
    episode: CallRecorder
    llm: AskedModel
    gateway: Gateway = field(repr=False)
    function: InvocationNode = field(default_factory=lambda: WORKFLOW, repr=False)
    """The function that asked for the address: what is called here is recorded as called by it."""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set, repr=False)
    """Requests that are being answered. Touched on the gateway's loop alone."""
    answered: dict[str, tuple[WireRequest, list[LLMCall], int]] = field(default_factory=dict, repr=False)
    """What was answered and when (Unix seconds), by request. One that comes again because its answer got lost is not sampled
    again."""
    responses: ResponseStore = field(default_factory=ResponseStore, repr=False)
    """What clients of the Responses API may refer to."""

    def abilities(self, library: str = "") -> Abilities:
        """What can be done for a request of that client library."""
        policy = getattr(self.llm, "policy", None)
        template = None
        if hasattr(self.llm, "chat_template_kwargs"):
            template = getattr(getattr(policy, "tokenizer", None), "chat_template", None)
        return Abilities(
            self.llm.sampling,
            self.llm.takes_options,
            getattr(policy, "constrains", False),
            self.episode.ignore,
            getattr(self.llm, "tool_parser", None),
            template if isinstance(template, str) else "",
            library,
        )

    @property
    def base_url(self) -> str:
        """For any client of OpenAI's API, and of Anthropic's."""
        return f"{self.gateway.url}/e/{self.id}/v1"

    @property
    def api_key(self) -> str:
        """The rollout's: its addresses have one key. Never show or store it."""
        return RolloutKey.of(self.gateway.api_key, self.episode)

    def openai(self, **options: Any) -> Any:
        """An AsyncOpenAI for the running event loop."""
        return self.gateway.async_client().copy(base_url=self.base_url, api_key=self.api_key, **options)

    def sync_openai(self, **options: Any) -> Any:
        """An OpenAI client, for any thread."""
        return self.gateway.sync_client().copy(base_url=self.base_url, api_key=self.api_key, **options)

    def close(self) -> None:
        """From now on the address answers 410, and what is being answered is canceled."""
        self.gateway.forget(self)


class Gateway:
    """The server of this process. `gateway()` is the one that is running."""

    def __init__(self) -> None:
        self.api_key = secrets.token_urlsafe(32)
        remember_secret(self.api_key)
        self._seal = secrets.token_bytes(16)
        self._numbers = itertools.count()
        self._open: dict[str, Endpoint] = {}
        self._lock = threading.Lock()
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()
        self._sync_client: Any = None
        self._closers: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Callable[[], Awaitable[None]]]]
        self._closers = WeakKeyDictionary()
        started: Future[int] = Future()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, args=(started,), name="finetune_nb gateway", daemon=True).start()
        self.port = started.result()
        self.url = f"http://127.0.0.1:{self.port}"

    def __repr__(self) -> str:
        return f"Gateway({self.url}, {len(self._open)} open)"

    def _serve(self, started: Future[int]) -> None:
        asyncio.set_event_loop(self.loop)

        async def start() -> None:
            try:
                sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
                http_server(self).add_sockets(sockets)
            except BaseException as error:
                started.set_exception(error)
                raise
            started.set_result(sockets[0].getsockname()[1])

        self.loop.run_until_complete(start())
        self.loop.run_forever()

    # ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────

    def endpoint(self, episode: CallRecorder, llm: AskedModel) -> Endpoint:
        """The address of that model for that rollout, and for the function that asks for it."""
        function = current_function()
        watch_connections(self.port)
        with self._lock:
            for endpoint in episode.endpoints:
                if isinstance(endpoint, Endpoint) and endpoint.llm is llm and endpoint.function is function:
                    return endpoint
            bypass_proxies()  # the proxy may have come into the environment after the rollout's start
            endpoint = Endpoint(self._sealed(next(self._numbers)), episode, llm, self, function)
            self._open[endpoint.id] = endpoint
            episode.endpoints.append(endpoint)
            return endpoint

    def find(self, name: str, header: str | None = None, client_port: int = 0) -> Endpoint:
        """The address of that name, for a request.

        Args:
            name: The address's.
            header: The request's Authorization header.
            client_port: The other end of its connection.

        Returns:
            The address.

        Raises:
            Refused: 410 for an address, or with a key, whose rollout has ended; 403 if the request comes from another
                rollout than the address's; 404 for an address that never was.
        """
        endpoint = self._open.get(name)
        if endpoint is None:
            number = name.partition("-")[0]
            if number.isascii() and number.isdigit() and hmac.compare_digest(name, self._sealed(int(number[:20]))):
                raise Refused(410, _ENDED, "episode_closed")
            raise Refused(404, "there is no such rollout. Take llm.base_url inside the workflow.", "unknown_episode")
        own, named = endpoint.episode.number, rollouts_of(header)
        if named[:1] not in ([], [own]) and not self._has_addresses(named[0]):
            raise Refused(410, _KEY_ENDED, "episode_closed")
        sender = sender_on(self.port, client_port)
        if {own, *named} != {own} or sender not in (None, own):
            raise Refused(
                403,
                f"the client's calls went to another rollout's address, that of {endpoint.episode.name}. {_ANEW}",
                "other_rollout",
            )
        return endpoint

    def _has_addresses(self, rollout: int) -> bool:
        return any(endpoint.episode.number == rollout for endpoint in list(self._open.values()))

    def forget(self, endpoint: Endpoint) -> None:
        """Closes an address: it answers 410 from now on, and what is being answered there is canceled."""

        def cancel() -> None:
            for task in endpoint.tasks:
                task.cancel()

        if self._open.pop(endpoint.id, None) is not None:
            self.loop.call_soon_threadsafe(cancel)

    def _sealed(self, number: int) -> str:
        """The name of the address of that number: it cannot be guessed, and is known again after it was forgotten."""
        return f"{number}-{hashlib.blake2b(b'%d' % number, key=self._seal, digest_size=12).hexdigest()}"

    # ── clients ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def async_client(self) -> Any:
        """The client whose connections all rollouts on the running event loop share: a new one would take longer to
        make than the embedded model to answer."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            openai = _openai()
            # Proxies of the environment must not see what goes to 127.0.0.1.
            http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=None)
            client = openai.AsyncOpenAI(base_url=self.url, api_key=self.api_key, http_client=http, timeout=None)
            self._clients[loop] = client
        return client

    def sync_client(self) -> Any:
        """The same for threads."""
        with self._lock:
            if self._sync_client is None:
                openai = _openai()
                http = openai.DefaultHttpxClient(trust_env=False, timeout=None)
                self._sync_client = openai.OpenAI(
                    base_url=self.url, api_key=self.api_key, http_client=http, timeout=None
                )
            return self._sync_client

    def close_with_clients(self, close: Callable[[], Awaitable[None]]) -> None:
        """Has that called, once, when the clients of the running event loop are closed."""
        self._closers.setdefault(asyncio.get_running_loop(), []).append(close)

    async def close_clients(self) -> None:
        """Closes the client of the running event loop, and what else is to be closed with it."""
        loop = asyncio.get_running_loop()
        client = self._clients.pop(loop, None)
        if client is not None:
            await client.close()
        for close in self._closers.pop(loop, []):
            await close()

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────────────────

    def authorized(self, header: str | None) -> bool:
        """Whether a request brings the key of one of this process's rollouts."""
        return hmac.compare_digest(secret_of(header).encode(), self.api_key.encode())

    async def sample(self, endpoint: Endpoint, request: WireRequest) -> list[LLMCall]:
        return await sample(endpoint, request)


_ANEW = (
    "Make the client anew in each rollout, inside the workflow, or take llm.openai() there. A client that is made once for "
    "all rollouts takes RolloutTransport of finetune_nb.llms.rollout_transport."
)
_ENDED = (
    "this rollout has ended: its address is closed. If the client was made once and kept, the client's calls went to another "
    f"rollout's address. {_ANEW} If a task of the rollout itself has called, await it before the workflow returns."
)
_KEY_ENDED = (
    "the key is that of a rollout that has ended: the client takes its key from one rollout and its address from another. "
    f"{_ANEW}"
)


async def sample(endpoint: Endpoint, request: WireRequest) -> list[LLMCall]:
    """One call a choice, not yet recorded."""
    llm, episode, options = endpoint.llm, endpoint.episode, request.options

    def ask() -> Coroutine[Any, Any, LLMCall]:
        if request.prompt is not None:
            return llm.complete(episode, request.prompt, request.params, **options)
        assert request.messages is not None
        return llm.call(episode, request.messages, request.tools, request.params, **options)

    with episode.current(), running(endpoint.function):
        if request.choices == 1:
            return [_as_asked(await ask(), request, llm)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask()) for _ in range(request.choices)]
    return [_as_asked(task.result(), request, llm) for task in tasks]


def _as_asked(call: LLMCall, request: WireRequest, llm: AskedModel) -> LLMCall:
    """The call with its reply as the request wants it. The ids stay those that were sampled."""
    if request.ignored:
        _say_once(request.ignored)
        call = replace(call, ignored=request.ignored)
    tool_calls = call.reply.get("tool_calls")
    policy = getattr(llm, "policy", None)
    if tool_calls and policy is not None:
        if not request.calls_tools:
            text = policy.decode(call.response_ids or ())
            call = replace(call, reply={"role": "assistant", "content": text})
        elif not request.parallel:
            call = replace(call, reply={**call.reply, "tool_calls": tool_calls[:1]})
    return without_stop(call)


_said: set[str] = set()


def _say_once(ignored: tuple[str, ...]) -> None:
    """Says which parameters are not honoured, each one once a process."""
    new = [name for name in ignored if name not in _said]
    _said.update(new)
    if new:
        logger.warning(
            "client libraries ask for %s, which is ignored in sampling. Each turn's record names what was (metadata "
            '"ignored").',
            ", ".join(new),
        )


_gateway: Gateway | None = None
_process: int | None = None
_starting = threading.Lock()


def gateway() -> Gateway:
    """The gateway of this process, started if need be."""
    global _gateway, _process
    with _starting:
        if _gateway is None or _process != os.getpid():  # a fork has no threads of its parent's
            _gateway, _process = Gateway(), os.getpid()
        return _gateway


def running_gateway() -> Gateway | None:
    """The gateway of this process, if it has been started."""
    return _gateway if _process == os.getpid() else None


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingExtra("llm.openai()", "openai") from error
    return openai


logger = redacting_logger(__name__)

LARGEST_REQUEST = 32 * 2**20
"""Bytes of a request's body; a conversation of a million tokens has some five million."""
_TOO_LARGE = Refused(413, f"the request is too large; the most is {LARGEST_REQUEST} bytes.", "request_too_large")
ALLOWANCE = 2**16
"""Bytes of a refused request's body that are read, and dropped, before the answer: a client that is still sending when the
connection is closed may not see the answer."""
LARGEST_HEADERS = 2**16
"""Bytes of a request's first line and headers."""
IDLE_SECONDS = 60.0
"""A connection is closed when its next request has not come by then with all its headers."""
BODY_SECONDS = 60.0
"""A connection is closed when a request's body has not come by then."""


class Addresses(Protocol):
    """What is served: the gateway, or whoever answers as it does."""

    def authorized(self, header: str | None) -> bool: ...

    def find(self, name: str, header: str | None = None, client_port: int = 0) -> Endpoint:
        """Raises Refused for a name that is no address, or none for a request with that Authorization header from that
        port."""
        ...

    async def sample(self, endpoint: Endpoint, request: WireRequest) -> list[LLMCall]: ...


def http_server(server: Addresses) -> HTTPServer:
    """A server of that gateway's addresses, to be started on the running event loop."""
    routes = [
        (r"/e/([\w-]+)/v1/chat/completions", Completions, {"server": server, "chat": True}),
        (r"/e/([\w-]+)/v1/completions", Completions, {"server": server, "chat": False}),
        (r"/e/([\w-]+)/v1/responses", Responses, {"server": server}),
        (r"/e/([\w-]+)/v1/responses/([\w-]+)", StoredResponse, {"server": server}),
        # Anthropic's client adds the version to its base_url.
        (r"/e/([\w-]+)/v1(?:/v1)?/messages", Messages, {"server": server}),
        (r"/e/([\w-]+)/v1(?:/v1)?/messages/count_tokens", CountTokens, {"server": server}),
        # vLLM has it beside the version; some clients add it to base_url.
        (r"/e/([\w-]+)(?:/v1)?/inference/v1/generate", Generate, {"server": server}),
        (r"/e/([\w-]+)/v1/models(?:/(.+))?", Models, {"server": server}),
        (r".*", _Nothing, {"server": server}),
    ]
    app = Application(routes, log_function=lambda handler: None)
    return HTTPServer(
        app,
        max_body_size=2 * LARGEST_REQUEST,
        max_header_size=LARGEST_HEADERS,
        idle_connection_timeout=IDLE_SECONDS,
        body_timeout=BODY_SECONDS,
    )


@stream_request_body
class _Api(RequestHandler):
    """What all addresses share: the key, which is checked before any body is read, and errors as OpenAI clients read
    them."""

    def initialize(self, server: Addresses) -> None:
        self.server = server
        self.refused: Refused | None = None

    def prepare(self) -> None:
        length = _body_length(self.request.headers)
        self.refused = self.refusal(length)
        if self.refused is None:
            return
        if length is None or length > ALLOWANCE:
            raise self.refused
        # Whatever the method is, this is what is called when the little body has been read.
        setattr(self, str(self.request.method).lower(), self._refuse)

    def refusal(self, length: int | None) -> Refused | None:
        """Why a request is refused by its headers alone. length: of its body in bytes; None = sent in chunks."""
        if not self.server.authorized(self.key()):
            return Refused(401, "the key is wrong or missing. Take llm.api_key.", "invalid_api_key")
        return None

    def key(self) -> str | None:
        """The Authorization header; where there is none, what it would be with Anthropic's."""
        headers = self.request.headers
        header = headers.get("Authorization")
        if header is None and (key := headers.get("x-api-key")) is not None:
            return f"Bearer {key}"
        return header

    def _refuse(self, *path: Any) -> None:
        assert self.refused is not None
        raise self.refused

    def data_received(self, chunk: bytes) -> None:
        """Drops it."""

    def endpoint(self, name: str) -> Endpoint:
        """The address of that name. Raises Refused where there is none for this request."""
        client: Any = self.request.connection
        return self.server.find(name, self.key(), client.context.address[1])

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Content-Type", "application/json")

    def compute_etag(self) -> None:
        return None

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        if isinstance(error, HTTPError):
            error = Refused(status_code, f"{self.request.method} {self.request.path}: {error.reason or self._reason}")
        refused = error if isinstance(error, Refused) else _refusal(error)
        self.set_status(refused.status)
        # The model has been asked as often as it makes sense; a client that asks again would only multiply that.
        self.set_header("x-should-retry", "false")
        self.finish(self.error_of(redact_text(str(refused)), refused))

    def error_of(self, message: str, refused: Refused) -> dict[str, Any]:
        """The body of an error, as clients of the API read it."""
        return error_body(message, refused.status, refused.code, refused.param)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, Refused | HTTPError | FinetuneError):
            logger.warning("a model call through the gateway failed: %s: %s", type(value).__name__, value)


class Completions(_Api):
    """Chat completions and completions."""

    def initialize(self, server: Addresses, chat: bool = True) -> None:
        super().initialize(server)
        self.chat, self.gone = chat, False
        self.parts: list[bytes] = []
        self.size = 0
        self.task: asyncio.Task[list[LLMCall]] | None = None

    def refusal(self, length: int | None) -> Refused | None:
        refused = super().refusal(length)
        if refused is None and length is not None and length > LARGEST_REQUEST:
            return _TOO_LARGE
        return refused

    def data_received(self, chunk: bytes) -> None:
        if self.refused is not None:
            return
        self.size += len(chunk)
        if self.size <= LARGEST_REQUEST:
            self.parts.append(chunk)
        elif not self._finished:  # it came in chunks, and did not say before how large it is
            self.parts.clear()
            self.send_error(413, exc_info=(Refused, _TOO_LARGE, None))

    async def post(self, name: str) -> None:
        if self._finished:
            return
        endpoint = self.endpoint(name)
        request = self.read(b"".join(self.parts), endpoint)
        again, key = _identity(self.request, self.parts)
        self.parts = []
        if again and key in endpoint.answered:
            request, calls, created = endpoint.answered[key]
        else:
            calls = await self._sampled(endpoint, request)
            if self.gone:
                return
            if not all(endpoint.episode.record(call) for call in calls):
                raise Refused(
                    410, "the rollout ended, or was begun again, before there was an answer.", "episode_closed"
                )
            created = int(time.time())
            endpoint.answered[key] = request, calls, created
        self.answer(endpoint, request, calls, f"{endpoint.id}-{calls[0].sequence}", created)

    def read(self, body: bytes, endpoint: Endpoint) -> WireRequest:
        return read_request(body, self.chat, endpoint.abilities(self.library()))

    def library(self) -> str:
        return self.request.headers.get("User-Agent", "")

    def answer(self, endpoint: Endpoint, request: WireRequest, calls: list[LLMCall], name: str, created: int) -> None:
        """Sends what was sampled. name: unique among answers."""
        if request.stream:
            self.finish_stream(events_of(request, calls, name, created))
        else:
            self.finish_json(answer_of(request, calls, name, created))

    def finish_stream(self, events: Iterator[bytes]) -> None:
        self.set_header("Content-Type", "text/event-stream; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.finish(b"".join(events))

    def finish_json(self, answer: dict[str, Any]) -> None:
        self.finish(json.dumps(answer, ensure_ascii=False).encode())

    async def _sampled(self, endpoint: Endpoint, request: WireRequest) -> list[LLMCall]:
        self.task = asyncio.create_task(self.server.sample(endpoint, request))
        endpoint.tasks.add(self.task)
        self.task.add_done_callback(endpoint.tasks.discard)
        try:
            return await self.task
        except asyncio.CancelledError:
            raise Refused(410, "the rollout ended before there was an answer.", "episode_closed") from None

    def on_connection_close(self) -> None:
        self.gone = True
        if self.task is not None:
            self.task.cancel()


class Responses(Completions):
    """OpenAI's Responses API."""

    def read(self, body: bytes, endpoint: Endpoint) -> WireRequest:
        return responses.read(body, endpoint.abilities(self.library()), endpoint.responses, endpoint.episode)

    def answer(self, endpoint: Endpoint, request: WireRequest, calls: list[LLMCall], name: str, created: int) -> None:
        answer = responses.answer_of(request, calls[0], name, created)
        endpoint.responses.keep(request, calls[0], answer)
        if request.stream:
            self.finish_stream(responses.events_of(request, answer))
        else:
            self.finish_json(answer)


class StoredResponse(_Api):
    """A response that was given before."""

    def get(self, name: str, response: str) -> None:
        self.finish(self.endpoint(name).responses.find(response).answer)

    def delete(self, name: str, response: str) -> None:
        self.endpoint(name).responses.forget(response)
        self.finish({"id": response, "object": "response", "deleted": True})


class _Anthropic:
    """Errors as Anthropic's clients read them."""

    def error_of(self, message: str, refused: Refused) -> dict[str, Any]:
        return messages.error_body(message, refused.status)


class Messages(_Anthropic, Completions):
    """Anthropic's Messages API."""

    def read(self, body: bytes, endpoint: Endpoint) -> WireRequest:
        return messages.read(body, endpoint.abilities(self.library()))

    def answer(self, endpoint: Endpoint, request: WireRequest, calls: list[LLMCall], name: str, created: int) -> None:
        answer = messages.answer_of(request, calls[0], name)
        if request.stream:
            self.finish_stream(messages.events_of(answer))
        else:
            self.finish_json(answer)


class CountTokens(Messages):
    """How many tokens a request's prompt has. Nothing is sampled."""

    async def post(self, name: str) -> None:
        if self._finished:
            return
        endpoint = self.endpoint(name)
        request = self.read(b"".join(self.parts), endpoint)
        policy = getattr(endpoint.llm, "policy", None)
        if policy is None or request.messages is None:
            raise Refused(501, "the model's tokenizer is not known here, so tokens cannot be counted.")
        messages, tools = request.messages, request.tools
        ids = policy.render(messages, tools, endpoint.episode.previous_ids(messages, tools))
        self.finish_json({"input_tokens": len(ids)})


class Generate(Completions):
    """Token ids in, token ids and log probabilities out, as vLLM has it."""

    def read(self, body: bytes, endpoint: Endpoint) -> WireRequest:
        return generate.read(body, endpoint.abilities(self.library()))

    async def _sampled(self, endpoint: Endpoint, request: WireRequest) -> list[LLMCall]:
        policy: Any = getattr(endpoint.llm, "policy", None)
        calls = await super()._sampled(endpoint, request)
        return [generate.until_stop_token(call, request, policy.decode) for call in calls]

    def answer(self, endpoint: Endpoint, request: WireRequest, calls: list[LLMCall], name: str, created: int) -> None:
        self.finish_json(generate.answer_of(request, calls, name, created))

    def error_of(self, message: str, refused: Refused) -> dict[str, Any]:
        return generate.error_body(message, refused.status, refused.param)


class Models(_Api):
    """The one model that an address has."""

    def get(self, name: str, model: str | None = None) -> None:
        llm = self.endpoint(name).llm
        longest = getattr(getattr(llm, "policy", None), "longest", None)
        # As vLLM tells it: tokens that prompt and reply may have together, null where that is not known.
        entry = {"id": llm.name, "object": "model", "created": 0, "owned_by": "finetune_nb", "max_model_len": longest}
        self.finish(entry if model else {"object": "list", "data": [entry]})


class _Nothing(_Api):
    def refusal(self, length: int | None) -> Refused | None:
        known = "chat/completions, completions and models, responses, messages, and inference/v1/generate under /e/{episode}/v1"
        nothing = Refused(404, f"there is nothing at {self.request.path}; there are {known}.", "unknown_url")
        return super().refusal(length) or nothing


_DIGITS = re.compile(r"[0-9]{1,18}")


def _body_length(headers: HTTPHeaders) -> int | None:
    """The length of a request's body in bytes, 0 where it has none.

    Returns:
        The length; None for a body that is sent in chunks.

    Raises:
        Refused: 400 if the headers do not say one length in one way.
    """
    lengths, encodings = headers.get_list("Content-Length"), headers.get_list("Transfer-Encoding")
    if len(lengths) + len(encodings) > 1:
        raise _malformed("says more than once how its body ends", [*lengths, *encodings])
    if encodings:
        if encodings[0].lower() != "chunked":
            raise _malformed("has an unknown Transfer-Encoding", encodings)
        return None
    if not lengths:
        return 0
    if not _DIGITS.fullmatch(lengths[0]):
        raise _malformed("has a Content-Length that is no number of bytes", lengths)
    return int(lengths[0])


def _malformed(problem: str, found: list[str]) -> Refused:
    shown = ", ".join(found)[:80]
    expected = "expected one Content-Length in digits, or Transfer-Encoding: chunked."
    return Refused(400, f"the request {problem} ({shown}); {expected}", "malformed_length")


def _identity(request: HTTPServerRequest, body: list[bytes]) -> tuple[bool, str]:
    """Whether a request may be one that was answered before, and by what it is known again: the client's idempotency
    key, else what it asks."""
    key = request.headers.get("Idempotency-Key")
    if key:
        return True, f"key {key}"
    digest = hashlib.blake2b(digest_size=16)
    for part in body:
        digest.update(part)
    return request.headers.get("x-stainless-retry-count", "0") != "0", digest.hexdigest()


def _refusal(error: BaseException | None) -> Refused:
    """How a call that failed is answered: by whose fault it was."""
    while isinstance(error, BaseExceptionGroup):  # of several choices
        error = error.exceptions[0]
    if error is None:
        return Refused(500, "no answer")
    text = f"{type(error).__name__}: {error}"
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 600:
        return Refused(status, f"the model's server refused: {text}", "upstream_error")
    if type(error).__name__ == "APITimeoutError" or isinstance(error, TimeoutError):
        return Refused(504, f"the model's server did not answer in time: {text}", "upstream_timeout")
    if type(error).__name__ == "APIConnectionError" or isinstance(error, ConnectionError):
        return Refused(502, f"the model's server cannot be reached: {text}", "upstream_error")
    asked_wrongly = isinstance(error, ConfigError | MissingExtra) or (
        isinstance(error, BackendError) and error.__cause__ is None
    )
    return Refused(400 if asked_wrongly else 500, text)
