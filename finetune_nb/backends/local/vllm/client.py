"""A client of one vLLM server: what is asked once goes over the standard library, replies go over aiohttp.

With many connections aiohttp takes a fraction of the CPU time of other clients: see tests/benchmarks/test_vllm_client_speed.py.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.error
import urllib.request
import weakref
from contextlib import suppress
from typing import Any

from ....errors import BackendError, MissingExtra

__all__ = [
    "ServerGone",
    "VLLMClient",
    "message_of",
    "require_aiohttp",
    "says_dead",
]

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerGone(BackendError):
    """Nobody answers at the server's address."""


class VLLMClient:
    """root: the server's address, without /v1. key: None, or what it was started with."""

    def __init__(self, root: str, key: str | None = None) -> None:
        self.root = root
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    # ── what is asked now and then, from any thread ──────────────────────────────────────────────────────────────────

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
        """Status and answer, which is parsed where it is JSON. Raises ServerGone where nobody answers."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, content, self._headers, method=method)
        try:
            with _DIRECT.open(request, timeout=timeout) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error.read())
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerGone(f"the vLLM server at {self.root} does not answer: {reason}") from error

    def models(self) -> list[dict[str, Any]]:
        """What it serves: base models, and adapters with the name of their `parent`. Raises ServerGone, and BackendError where
        what answers is no such server."""
        status, answer = self.ask("GET", "/v1/models", timeout=10.0)
        if status in (401, 403):
            raise BackendError(
                f"the vLLM server at {self.root} refuses our key ({status}). Give the one that it was started with: "
                "sampler={'url': ..., 'api_key': ...}."
            )
        if status in (502, 503, 504):  # a proxy whose server is starting
            raise ServerGone(f"the vLLM server at {self.root} is not ready ({status}: {message_of(answer)})")
        models = answer.get("data") if isinstance(answer, dict) else None
        if status != 200 or not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise BackendError(
                f"{self.root}/v1/models answers {status} ({message_of(answer)}), which is no list of models. Expected the "
                "address of a vLLM server."
            )
        return models

    # ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def complete(self, body: dict[str, Any], timeout: float | None) -> tuple[int, Any]:
        """Status and answer of /v1/completions. When the caller is cancelled, the server stops sampling.

        Raises:
            ServerGone: Nobody answers, or the connection was lost.
            TimeoutError: There was no answer in time.
        """
        import aiohttp

        try:
            async with self._session().post(
                f"{self.root}/v1/completions",
                data=json.dumps(body).encode(),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as answer:
                return answer.status, _parsed(await answer.read())
        except aiohttp.ClientError as error:
            raise ServerGone(f"the vLLM server at {self.root} does not answer: {error}") from error

    def _session(self) -> Any:
        """That of the running event loop: connections belong to a loop."""
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            import aiohttp

            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return session

    async def aclose(self) -> None:
        """Closes the connections of all loops that still run."""
        here = asyncio.get_running_loop()
        for loop, session in list(self._sessions.items()):
            if loop is here:
                await session.close()
            elif loop.is_running():
                with suppress(RuntimeError):  # it has ended a moment ago
                    asyncio.run_coroutine_threadsafe(session.close(), loop)
            else:
                session.detach()
        self._sessions.clear()


def says_dead(answer: Any) -> bool:
    """Whether the server says that its engine has ended: it will end itself a moment later."""
    said = message_of(answer)
    return "EngineCore" in said or "EngineDead" in said


def require_aiohttp() -> None:
    """Raises MissingExtra without the package that replies are asked for with."""
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise MissingExtra("sampling with vLLM", "vllm") from error


def message_of(answer: Any) -> str:
    """What an answer says of an error, shortened."""
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        text = error.get("message") if isinstance(error, dict) else error
        answer = text if isinstance(text, str) else json.dumps(answer)
    return " ".join(str(answer).split())[:400]


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")
