"""What a request through the gateway costs. Figures are printed, in CPU seconds of the whole process (client, server and
policy); a test fails on a ratio of one run alone."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

from finetune_nb.evaluation.gateway import gateway  # noqa: E402
from finetune_nb.evaluation.recording import Episode, PolicyLLM  # noqa: E402
from finetune_nb.testing import ScriptedPolicy  # noqa: E402
from finetune_nb.types import EpisodeKey  # noqa: E402

pytestmark = pytest.mark.benchmark
REQUESTS, ROUNDS = 100, 4
BODY = {"model": "x", "messages": [{"role": "user", "content": "3+4"}]}


def cpu(work):
    """CPU seconds a request, the best of several rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        times.append((time.process_time() - started) / REQUESTS)
    return min(times)


def test_a_request_through_the_gateway_costs_less_than_the_openai_client_that_makes_it():
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"))

    async def rounds(ask):
        for _ in range(REQUESTS):
            await ask()

    async def by_chat():
        with Episode(EpisodeKey("train", 0, 0, 0)).live():
            await rounds(lambda: llm.chat(BODY["messages"]))

    async def by_openai():
        with Episode(EpisodeKey("train", 0, 0, 0)).live():
            client = llm.openai()
            await rounds(lambda: client.chat.completions.create(**BODY))
        await gateway().close_clients()

    def by_http():
        with Episode(EpisodeKey("train", 0, 0, 0)).live():
            parts, key = urlsplit(llm.base_url), llm.api_key
            connection = http.client.HTTPConnection(parts.hostname, parts.port)
            for _ in range(REQUESTS):
                headers = {"Authorization": f"Bearer {key}"}
                connection.request("POST", f"{parts.path}/chat/completions", json.dumps(BODY), headers)
                assert connection.getresponse().read()
            connection.close()

    async def client_alone():
        """The client's own share: its answer comes from memory."""
        answer = {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": "x",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "seven"}}],
        }
        transport = httpx2.MockTransport(lambda request: httpx2.Response(200, json=answer))
        async with openai.AsyncOpenAI(
            base_url="http://127.0.0.1", api_key="x", http_client=httpx2.AsyncClient(transport=transport)
        ) as client:
            await rounds(lambda: client.chat.completions.create(**BODY))

    by_http(), asyncio.run(by_openai())  # warm
    chat = cpu(lambda: asyncio.run(by_chat()))
    plain = cpu(by_http)
    sdk = cpu(lambda: asyncio.run(by_openai()))
    alone = cpu(lambda: asyncio.run(client_alone()))
    print(
        f"\nCPU of a request: llm.chat {chat * 1e3:.3f} ms, plain HTTP through the gateway {plain * 1e3:.2f} ms, "
        f"the OpenAI client through it {sdk * 1e3:.2f} ms, of which {alone * 1e3:.2f} ms are the client's own"
    )
    assert plain < 2 * alone
    assert sdk < 4 * alone
