"""What the server answers over HTTP: the protocol's addresses and the model's. Only this machine is served, and no browser:
the protocol knows no key.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from tornado.ioloop import IOLoop
from tornado.web import Application, RequestHandler, stream_request_body

from ...errors import FinetuneError
from ...llms.gateway import Addresses, Completions, Endpoint, Models
from ...llms.openai_wire import Refused, WireRequest
from ...redaction import redact_text, redacting_logger
from ...types import TrainingJobRef

__all__ = [
    "application",
    "is_here",
]

logger = redacting_logger(__name__)

Body = dict[str, Any]


class TrainedModel(Addresses, Protocol):
    """What answers the routes: the model, asked as the gateway's addresses are, and ART's protocol."""

    adapter: Any

    async def register(self, body: Body) -> None: ...
    async def get_step(self, body: Body) -> int: ...
    async def prepare(self, body: Body) -> list[str]: ...
    async def delete_checkpoints(self, body: Body) -> None: ...
    async def train(self, body: Body, started: Callable[[TrainingJobRef], None]) -> Body: ...


def is_here(host: str) -> bool:
    """Whether a host name is this machine by itself, and not by an entry of somebody's name server."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return False


class _FromHere(RequestHandler):
    """Refuses what a page in a browser may have sent: the page's address is in the Origin header, a name that leads here by
    a name server's doing as the host."""

    def prepare(self) -> Any:
        host = urlsplit(f"//{self.request.host}").hostname or ""
        if "Origin" in self.request.headers or not is_here(host):
            raise Refused(403, "this server answers programs on this machine alone, and no web page.")
        return super().prepare()


@stream_request_body
class _Chat(_FromHere, Completions):
    def read(self, body: bytes, endpoint: Endpoint) -> WireRequest:
        """Log probabilities and ids come unasked, as from ART's server: without them nothing could be trained on."""
        return replace(super().read(body, endpoint), logprobs=True, tokens_as_ids=True)


class _OneModel(_FromHere, Models):
    pass


class _Protocol(_FromHere):
    """One request of the protocol: JSON in, JSON out, errors as FastAPI writes them."""

    def initialize(self, answer: Callable[..., Awaitable[Any]] | None, server: TrainedModel) -> None:
        self.answer, self.server = answer, server
        self.job: TrainingJobRef | None = None

    async def get(self) -> None:
        self.write({"status": "ok"})

    async def post(self) -> None:
        if self.answer is None:
            raise Refused(501, f"{self.request.path} is not offered here.")
        try:
            body = json.loads(self.request.body or b"null")
        except (ValueError, RecursionError) as error:
            raise Refused(422, f"the request's body is no JSON: {error}") from None
        given = body if isinstance(body, dict) else {}
        told = await (self.answer(given, self._started) if self.answer == self.server.train else self.answer(given))
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(told) + "\n")  # of a training: its stream, which has one line

    def _started(self, job: TrainingJobRef) -> None:
        self.job = job

    def on_connection_close(self) -> None:
        """Nobody waits for the job any more: it ends after the step at hand."""
        if self.job is not None:
            IOLoop.current().add_callback(self.server.adapter.cancel, self.job)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        status = (
            error.status if isinstance(error, Refused) else 400 if isinstance(error, FinetuneError) else status_code
        )
        self.set_status(status)
        self.finish({"detail": redact_text(str(error or self._reason))})

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        expected = isinstance(value, Refused | FinetuneError)
        logger.warning("%s: %s", self.request.path, value, exc_info=None if expected else value)


def application(server: TrainedModel) -> Application:
    """What the server answers, address by address."""
    answers = {
        "register": server.register,
        "_get_step": server.get_step,
        "_prepare_backend_for_training": server.prepare,
        "_delete_checkpoint_files": server.delete_checkpoints,
        "_train_model": server.train,
        "close": _nothing,
        r"_experimental_\w+": None,
    }
    routes: list[Any] = [
        # The empty group takes the place of the name in the gateway's addresses.
        (r"/v1/chat/completions()", _Chat, {"server": server, "chat": True}),
        (r"/v1/completions()", _Chat, {"server": server, "chat": False}),
        (r"/v1/models()(?:/(.+))?", _OneModel, {"server": server}),
        (r"/healthcheck", _Protocol, {"answer": None, "server": server}),
        *((f"/{path}", _Protocol, {"answer": answer, "server": server}) for path, answer in answers.items()),
    ]
    return Application(routes, log_function=lambda handler: None)


async def _nothing(body: dict[str, Any]) -> None:
    """A client has ended; the next one may continue."""
