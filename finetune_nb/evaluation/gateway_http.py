"""What the gateway answers to HTTP requests: keys, addresses, sizes, errors. Tornado serves it, which Jupyter brings along.

Answers are whole when they begin: a stream is sent in one piece, so an error is always an HTTP status, and a client that
has gone before its answer leaves no record.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any, Protocol

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from ..errors import BackendError, ConfigError, FinetuneError
from ..redaction import redact_text, redacting_logger
from ..types import LLMCall
from .wire import Refused, WireRequest, answer_of, error_body, events_of, read_request

if TYPE_CHECKING:
    from .gateway import Endpoint
    from .recording import LLM

__all__ = ["LARGEST_REQUEST", "Addresses", "Completions", "Models", "http_server"]

logger = redacting_logger(__name__)

LARGEST_REQUEST = 32 * 2**20
"""Bytes of a request's body; a conversation of a million tokens has some five million."""
_TOO_LARGE = Refused(413, f"the request is too large; the most is {LARGEST_REQUEST} bytes.", "request_too_large")


class Addresses(Protocol):
    """What is served: the gateway, or whoever answers as it does."""

    def authorized(self, header: str | None) -> bool: ...

    def find(self, name: str) -> Endpoint:
        """Raises Refused for a name that is no address."""
        ...

    async def sample(self, endpoint: Endpoint, request: WireRequest) -> list[LLMCall]: ...


def http_server(server: Addresses) -> HTTPServer:
    """A server of that gateway's addresses, to be started on the running event loop."""
    routes = [
        (r"/e/([\w-]+)/v1/chat/completions", Completions, {"server": server, "chat": True}),
        (r"/e/([\w-]+)/v1/completions", Completions, {"server": server, "chat": False}),
        (r"/e/([\w-]+)/v1/models(?:/(.+))?", Models, {"server": server}),
        (r".*", _Nothing, {"server": server}),
    ]
    app = Application(routes, log_function=lambda handler: None)
    return HTTPServer(app, max_body_size=2 * LARGEST_REQUEST)


class _Api(RequestHandler):
    """What all addresses share: the key, and errors as OpenAI clients read them."""

    def initialize(self, server: Addresses) -> None:
        self.server = server

    def prepare(self) -> None:
        if not self.server.authorized(self.request.headers.get("Authorization")):
            raise Refused(401, "the key is wrong or missing. Take llm.api_key.", "invalid_api_key")

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
        self.finish(error_body(redact_text(str(refused)), refused.status, refused.code, refused.param))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, Refused | HTTPError | FinetuneError):
            logger.warning("a model call through the gateway failed: %s: %s", type(value).__name__, value)


@stream_request_body
class Completions(_Api):
    """Chat completions and completions."""

    def initialize(self, server: Addresses, chat: bool = True) -> None:
        super().initialize(server)
        self.chat, self.gone = chat, False
        self.parts: list[bytes] = []
        self.size = 0
        self.task: asyncio.Task[list[LLMCall]] | None = None

    def prepare(self) -> None:
        super().prepare()
        if int(self.request.headers.get("Content-Length") or 0) > LARGEST_REQUEST:
            raise _TOO_LARGE

    def data_received(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size <= LARGEST_REQUEST:
            self.parts.append(chunk)
        elif not self._finished:  # it came in chunks, and did not say before how large it is
            self.parts.clear()
            self.send_error(413, exc_info=(Refused, _TOO_LARGE, None))

    async def post(self, name: str) -> None:
        if self._finished:
            return
        endpoint = self.server.find(name)
        request = self.read(b"".join(self.parts), endpoint.llm)
        again, key = _identity(self.request, self.parts)
        self.parts = []
        if again and key in endpoint.answered:
            request, calls = endpoint.answered[key]
        else:
            calls = await self._sampled(endpoint, request)
            if self.gone:
                return
            if not all(endpoint.episode.record(call) for call in calls):
                raise Refused(
                    410, "the rollout ended, or was begun again, before there was an answer.", "episode_closed"
                )
            endpoint.answered[key] = request, calls
        name, created = f"{endpoint.id}-{calls[0].sequence}", int(time.time())
        if request.stream:
            self.set_header("Content-Type", "text/event-stream; charset=utf-8")
            self.set_header("Cache-Control", "no-cache")
            self.finish(b"".join(events_of(request, calls, name, created)))
        else:
            self.finish(json.dumps(answer_of(request, calls, name, created), ensure_ascii=False).encode())

    def read(self, body: bytes, llm: LLM) -> WireRequest:
        return read_request(body, self.chat, llm.sampling, llm.takes_options)

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


class Models(_Api):
    """The one model that an address has."""

    def get(self, name: str, model: str | None = None) -> None:
        llm = self.server.find(name).llm
        entry = {"id": llm.name, "object": "model", "created": 0, "owned_by": "finetune_nb"}
        self.finish(entry if model else {"object": "list", "data": [entry]})


class _Nothing(_Api):
    def prepare(self) -> None:
        super().prepare()
        known = "chat/completions, completions and models under /e/{episode}/v1"
        raise Refused(404, f"there is nothing at {self.request.path}; there are {known}.", "unknown_url")


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
    asked_wrongly = isinstance(error, ConfigError) or (isinstance(error, BackendError) and error.__cause__ is None)
    return Refused(400 if asked_wrongly else 500, text)
