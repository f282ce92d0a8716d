"""What a request through the gateway costs. Figures are printed, in CPU seconds of the whole process (client, server and
policy); a test fails on a ratio of one run alone."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from urllib.parse import urlsplit

import pytest
from measuring import by_turns

openai = pytest.importorskip("openai")

from finetune_nb.llms.call_recorder import CallRecorder  # noqa: E402
from finetune_nb.llms.client import PolicyLLM  # noqa: E402
from finetune_nb.llms.gateway import gateway  # noqa: E402
from finetune_nb.testing import ScriptedPolicy  # noqa: E402
from finetune_nb.types import EpisodeKey  # noqa: E402

pytestmark = pytest.mark.benchmark
REQUESTS = 100
BODY = {"model": "x", "messages": [{"role": "user", "content": "3+4"}]}


ANSWER = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "created": 0,
    "model": "x",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "seven"}}],
}


class Canned(asyncio.Protocol):
    """The barest server there is: one answer to whatever came."""

    body = json.dumps(ANSWER).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def connection_made(self, transport):
        self.transport, self.came = transport, b""

    def data_received(self, data):
        self.came += data
        if self.came.endswith(b"}"):
            self.came = b""
            self.transport.write(self.answer)


@pytest.fixture
def canned():
    """The address of such a server, on a thread of its own as the gateway is."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(loop.create_server(Canned, "127.0.0.1", 0), loop).result()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.proof
def test_a_request_through_the_gateway_costs_less_than_the_openai_client_that_makes_it(canned):
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"))

    async def rounds(ask):
        for _ in range(REQUESTS):
            await ask()

    async def by_chat():
        with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
            await rounds(lambda: llm.chat(BODY["messages"]))

    async def by_openai():
        with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
            client = llm.openai()
            await rounds(lambda: client.chat.completions.create(**BODY))
        await gateway().close_clients()

    def by_http():
        with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
            parts, key = urlsplit(llm.base_url), llm.api_key
            connection = http.client.HTTPConnection(parts.hostname, parts.port)
            for _ in range(REQUESTS):
                headers = {"Authorization": f"Bearer {key}"}
                connection.request("POST", f"{parts.path}/chat/completions", json.dumps(BODY), headers)
                assert connection.getresponse().read()
            connection.close()

    async def client_alone():
        http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=None)
        async with openai.AsyncOpenAI(base_url=canned, api_key="x", http_client=http, timeout=None) as client:
            await rounds(lambda: client.chat.completions.create(**BODY))

    found = by_turns(
        7,
        chat=lambda: asyncio.run(by_chat()),
        http=by_http,
        openai=lambda: asyncio.run(by_openai()),
        alone=lambda: asyncio.run(client_alone()),
    )
    chat, plain, sdk, alone = (found[side] * 1e3 / REQUESTS for side in ("chat", "http", "openai", "alone"))
    print(
        f"\nCPU of a request: llm.chat {chat:.3f} ms, plain HTTP through the gateway {plain:.2f} ms, the OpenAI client "
        f"through it {sdk:.2f} ms; the client's own, at a server that does nothing, {alone:.2f} ms"
    )
    assert found.ratio("http", "alone") < 1
    assert found.ratio("openai", "alone") < 3
