"""An OpenAI-compatible server on 127.0.0.1 for tests: standard library only, a thread of its own, every request kept.

What it answers is a function of the request; one character is one token, whose id is its code point, but where a test
brings a tokenizer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # five, the default, makes the sixth of many clients wait a second


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: dict[str, Any]


@dataclass
class Refusal:
    """An answer that is an error."""

    status: int
    message: str = "no"


@dataclass
class Fault:
    """No answer, but a connection that is closed: after `seconds`, and after `sent` of the right answer (of 1)."""

    sent: float = 0.0
    seconds: float = 0.0


@dataclass
class LoopbackServer:
    """`with LoopbackServer() as server:` answers at `server.base_url`.

    reply: the text of a request's answer, an assistant message (a mapping), a Refusal or a Fault. logprobs: whether the server
    knows any. token_ids: whether it gives ids when it is asked for them, as vLLM does. takes_ids: whether completions take them
    as prompts. ids_of: the tokens of a completion's text.
    """

    reply: Callable[[Request], str | Mapping[str, Any] | Refusal | Fault] = lambda request: "ok"
    logprobs: bool = True
    token_ids: bool = True
    takes_ids: bool = True
    ids_of: Callable[[str], list[int]] = lambda text: [ord(c) for c in text]
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> LoopbackServer:
        server = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # the standard library's name
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                server.requests.append(request)
                reply = server.reply(request)
                fault = reply if isinstance(reply, Fault) else Fault(sent=1.0)
                status, answer = server.answer(request, "ok" if reply is fault else reply)
                content = json.dumps(answer).encode()
                time.sleep(fault.seconds)
                if not fault.sent:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("retry-after-ms", "1")  # so that retrying takes no time
                self.end_headers()
                self.wfile.write(content[: int(fault.sent * len(content))])
                self.close_connection = fault.sent < 1

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = _Http(("127.0.0.1", 0), Answer)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), name="loopback", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def answer(self, request: Request, reply: str | Mapping[str, Any] | Refusal) -> tuple[int, dict[str, Any]]:
        if isinstance(reply, Refusal):
            return reply.status, {"error": {"message": reply.message}}
        if request.path == "/v1/completions" and isinstance(reply, str):
            if isinstance(request.body["prompt"], list) and not self.takes_ids:
                return 400, {"error": {"message": "prompt must be a string"}}
            return 200, self.completion(request, reply)
        if request.path != "/v1/chat/completions":
            return 404, {"error": {"message": f"no such path: {request.path}"}}
        message = {"role": "assistant", "content": reply} if isinstance(reply, str) else dict(reply)
        sampled = message.get("content") or json.dumps(message.get("tool_calls"))
        choice: dict[str, Any] = {
            "index": 0,
            "message": message,
            "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
            "logprobs": None,
        }
        completion: dict[str, Any] = {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.body["model"],
            "choices": [choice],
        }
        prompt = sum(len(m.get("content") or "") for m in request.body["messages"])
        sizes = {"prompt_tokens": prompt, "completion_tokens": len(sampled), "total_tokens": prompt + len(sampled)}
        completion["usage"] = sizes
        if self.logprobs and request.body.get("logprobs"):
            top = request.body.get("top_logprobs", 0)
            choice["logprobs"] = {"content": [_token(position, c, top) for position, c in enumerate(sampled)]}
        if self.token_ids and request.body.get("return_token_ids"):
            completion["prompt_token_ids"] = [ord(c) for m in request.body["messages"] for c in m.get("content") or ""]
            choice["token_ids"] = [ord(c) for c in sampled]
        return 200, completion

    def completion(self, request: Request, text: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        ids = self.ids_of(text)
        if self.logprobs and "logprobs" in request.body:
            tokens = [_token(position, c, request.body["logprobs"]) for position, c in enumerate(text.ljust(len(ids)))]
            choice["logprobs"] = {
                "tokens": [token["token"] for token in tokens],
                "token_logprobs": [token["logprob"] for token in tokens],
                "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
                "text_offset": list(range(len(tokens))),
            }
        if self.token_ids and request.body.get("return_token_ids"):
            prompt = request.body["prompt"]
            choice["prompt_token_ids"] = prompt if isinstance(prompt, list) else [ord(c) for c in prompt]
            choice["token_ids"] = ids
        head = {"id": f"cmpl-{len(self.requests)}", "object": "text_completion", "created": int(time.time())}
        return {**head, "model": request.body["model"], "choices": [choice]}


def _token(position: int, text: str, top: int) -> dict[str, Any]:
    """Of the likeliest tokens the sampled one is the first."""
    logprob = -0.5 - position / 100
    tops = [
        {"token": text, "logprob": logprob},
        *({"token": chr(0x3B1 + i), "logprob": -3.0 - i} for i in range(top - 1)),
    ]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": tops[:top]}
