"""What a reply of a vLLM server costs the kernel, beside httpx and the OpenAI client. The server is a process of its own that
does nothing but answer. Figures are printed; the test fails on ratios of one run alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from measuring import by_turns

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("aiohttp")
pytest.importorskip("torch")

from tiny_models import byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local.config import LoRAConfig  # noqa: E402
from finetune_nb.backends.local.lora import with_adapter  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.vllm.client import VLLMClient  # noqa: E402
from finetune_nb.backends.local.vllm.config import VLLMConfig  # noqa: E402
from finetune_nb.backends.local.vllm.replies import request_for, sample_in  # noqa: E402
from finetune_nb.backends.local.vllm.sampler import VLLMSampler  # noqa: E402
from finetune_nb.types import SamplingParams  # noqa: E402

pytestmark = pytest.mark.benchmark
CONNECTIONS, REQUESTS = 128, 512
PROMPT, TOKENS = list(range(100)), 24
PARAMS = SamplingParams(1.0, TOKENS)
SERVER = """
import asyncio, sys
body = sys.argv[1].encode()
answer = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body)
class Canned(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.came = transport, b""
    def data_received(self, data):
        self.came += data
        if self.came.endswith(b"}"):
            self.came = b""
            self.transport.write(answer)
async def main():
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def answered():
    """What vLLM 0.32 answers to such a request."""
    logprobs = {
        "text_offset": list(range(TOKENS)),
        "token_logprobs": [-1.2345678 - i / 7 for i in range(TOKENS)],
        "tokens": [" word"] * TOKENS,
        "top_logprobs": [{" word": -1.2345678 - i / 7} for i in range(TOKENS)],
    }
    choice = {
        "index": 0,
        "text": " word" * TOKENS,
        "logprobs": logprobs,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": list(range(TOKENS)),
        "prompt_logprobs": None,
        "prompt_token_ids": PROMPT,
    }
    usage = {"prompt_tokens": len(PROMPT), "total_tokens": len(PROMPT) + TOKENS, "completion_tokens": TOKENS}
    head = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1, "model": "adapter"}
    return {**head, "choices": [choice], "usage": usage}


@pytest.fixture
def root():
    process = subprocess.Popen([sys.executable, "-c", SERVER, json.dumps(answered())], stdout=subprocess.PIPE)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()
    process.stdout.close()


async def many(ask):
    """All requests, as many at once as there are connections."""
    left = iter(range(REQUESTS))

    async def caller():
        for seed in left:
            body = {**request_for(PROMPT, PARAMS, seed, (1,)), "model": "adapter"}
            sample = sample_in(await ask(body), "adapter", PROMPT, PARAMS, 1000)
            assert len(sample.ids) == TOKENS

    await asyncio.gather(*(caller() for _ in range(CONNECTIONS)))


def test_a_reply_costs_less_than_with_other_clients(root, tmp_path):
    policy = LocalPolicy(with_adapter(random_model(), LoRAConfig(rank=4)), byte_tokenizer(), threads=1)

    async def ours():
        """All that a policy's reply takes, from the ids on."""
        sampler = VLLMSampler(policy, VLLMConfig(url=root), None, tmp_path)
        sampler._client, sampler._checked = VLLMClient(root), True
        sampler.served.take(policy.weights_id, "adapter")
        left = iter(range(REQUESTS))

        async def caller():
            for seed in left:
                assert len((await sampler.submit(PROMPT, PARAMS, seed)).ids) == TOKENS

        await asyncio.gather(*(caller() for _ in range(CONNECTIONS)))
        await sampler._client.aclose()

    async def by_httpx():
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        async with httpx.AsyncClient(limits=limits, timeout=60.0, trust_env=False) as client:

            async def ask(body):
                return (await client.post(f"{root}/v1/completions", json=body)).json()

            await many(ask)

    async def by_openai():
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{root}/v1", api_key="x", http_client=http, timeout=60.0) as client:

            async def ask(body):
                own = ("prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs", "model")
                extra = {name: value for name, value in body.items() if name not in own}
                asked = {name: body[name] for name in own}
                return (await client.completions.create(**asked, extra_body=extra)).model_dump()

            await many(ask)

    found = by_turns(
        3,
        ours=lambda: asyncio.run(ours()),
        httpx=lambda: asyncio.run(by_httpx()),
        openai=lambda: asyncio.run(by_openai()),
    )
    mine, plain, sdk = (found[side] * 1e3 / REQUESTS for side in ("ours", "httpx", "openai"))
    print(
        f"\nCPU of a reply at {CONNECTIONS} connections: {mine:.2f} ms; with httpx {plain:.2f} ms, with the OpenAI client "
        f"{sdk:.2f} ms"
    )
    assert found.ratio("ours", "httpx") < 0.4
    assert found.ratio("ours", "openai") < 0.3
