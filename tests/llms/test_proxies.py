"""A proxy in the environment: it never sees a call to the gateway, whatever library makes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import finetune_nb as ft
from finetune_nb.llms.gateway import gateway
from finetune_nb.llms.proxies import bypass_proxies
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

BODY = {"model": "x", "messages": [{"role": "user", "content": "3+4"}]}
VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch):
    """Every variable as it was, after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def proxy(no_proxies):
    """A proxy's address, and what it was asked."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def answer(self):
            asked.append(f"{self.command} {self.path}")
            self.send_error(502, "the proxy was asked")

        do_GET = do_POST = do_CONNECT = answer

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def header(llm):
    return {"Authorization": f"Bearer {llm.api_key}"}


def address(llm):
    return f"{llm.base_url}/chat/completions"


async def by_llm_openai(question, llm):
    await llm.openai().chat.completions.create(**BODY)
    return "done"


async def by_openai(question, llm):
    import openai

    async with openai.AsyncOpenAI(base_url=llm.base_url, api_key=llm.api_key) as client:
        await client.chat.completions.create(**BODY)
    return "done"


def by_sync_openai(question, llm):
    import openai

    with openai.OpenAI(base_url=llm.base_url, api_key=llm.api_key) as client:
        client.chat.completions.create(**BODY)
    return "done"


async def by_httpx(question, llm):
    import httpx

    async with httpx.AsyncClient() as client:
        (await client.post(address(llm), json=BODY, headers=header(llm))).raise_for_status()
    return "done"


def by_sync_httpx(question, llm):
    import httpx

    httpx.post(address(llm), json=BODY, headers=header(llm)).raise_for_status()
    return "done"


def by_requests(question, llm):
    import requests

    requests.post(address(llm), json=BODY, headers=header(llm), timeout=20).raise_for_status()
    return "done"


async def by_aiohttp(question, llm):
    import aiohttp  # pyright: ignore[reportMissingImports]

    async with aiohttp.ClientSession(trust_env=True) as session:
        answer = await session.post(address(llm), json=BODY, headers=header(llm))
        answer.raise_for_status()
    return "done"


def by_urllib(question, llm):
    request = urllib.request.Request(address(llm), json.dumps(BODY).encode(), header(llm))
    opener = urllib.request.build_opener()  # the one of urlopen keeps the proxies that it found first
    with opener.open(request, timeout=20) as answer:
        answer.read()
    return "done"


async def by_langchain(question, llm):
    import langchain_openai

    model = langchain_openai.ChatOpenAI(model="x", base_url=llm.base_url, api_key=llm.api_key, max_retries=0)
    await model.ainvoke(question)
    return "done"


def by_localhost(question, llm):
    request = urllib.request.Request(
        address(llm).replace("127.0.0.1", "localhost"), json.dumps(BODY).encode(), header(llm)
    )
    with urllib.request.build_opener().open(request, timeout=20) as answer:
        answer.read()
    return "done"


def by_a_process(question, llm):
    """An agent that is another program has the environment of this one."""
    program = (
        "import json, sys, urllib.request as u\n"
        "u.urlopen(u.Request(sys.argv[1], sys.argv[3].encode(), json.loads(sys.argv[2])), timeout=20).read()"
    )
    arguments = [sys.executable, "-c", program, address(llm), json.dumps(header(llm)), json.dumps(BODY)]
    subprocess.run(arguments, check=True, timeout=60)
    return "done"


WORKFLOWS = [
    by_llm_openai,
    by_openai,
    by_sync_openai,
    by_httpx,
    by_sync_httpx,
    by_requests,
    by_aiohttp,
    by_urllib,
    by_langchain,
    by_localhost,
    by_a_process,
]
LIBRARIES = {
    by_llm_openai: "openai",
    by_openai: "openai",
    by_sync_openai: "openai",
    by_httpx: "httpx",
    by_sync_httpx: "httpx",
    by_requests: "requests",
    by_aiohttp: "aiohttp",
    by_langchain: "langchain_openai",
}


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("variables", [("HTTP_PROXY", "HTTPS_PROXY"), ("http_proxy",), ("ALL_PROXY",)])
@pytest.mark.parametrize("workflow", WORKFLOWS)
async def test_a_proxy_in_the_environment_sees_no_call_of_a_rollout(
    proxy, monkeypatch, tmp_path, closing, workflow, variables
):
    needed = LIBRARIES.get(workflow)
    if needed is not None:
        pytest.importorskip(needed)
    url, asked = proxy
    for name in variables:
        monkeypatch.setenv(name, url)
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "seven"))
    run = closing(ft.Run(workflow, lambda item: 1.0, sums(1), generations=1, output_dir=tmp_path, adapter=adapter))
    result = await run.rollout(0)
    assert getattr(result, "error", None) is None
    assert asked == []


async def test_a_proxy_that_comes_into_the_environment_after_the_gateway_started_sees_nothing(
    proxy, monkeypatch, tmp_path, closing
):
    url, asked = proxy
    gateway()
    monkeypatch.setenv("HTTP_PROXY", url)
    run = closing(
        ft.Run(by_urllib, lambda item: 1.0, sums(1), generations=1, output_dir=tmp_path, adapter=FakeAdapter())
    )
    assert getattr(await run.rollout(0), "error", None) is None
    assert asked == []


def test_the_proxy_of_these_tests_is_asked_where_nothing_excepts_the_gateway(proxy, monkeypatch):
    url, asked = proxy
    monkeypatch.setenv("HTTP_PROXY", url)
    with pytest.raises(urllib.error.HTTPError, match="502"):
        urllib.request.build_opener().open(gateway().url, timeout=20)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "corp.example"}, "corp.example,127.0.0.1,localhost"),
        ({"no_proxy": "corp.example, .internal"}, "corp.example,.internal,127.0.0.1,localhost"),
        ({"no_proxy": "localhost,corp.example"}, "localhost,corp.example,127.0.0.1"),
        ({"NO_PROXY": "127.0.0.1,localhost"}, "127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_both_spellings_keep_what_is_in_either(no_proxies, monkeypatch, given, expected):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # a second time changes nothing
        bypass_proxies()
        assert (os.environ["NO_PROXY"], os.environ["no_proxy"]) == (expected, expected)


def test_two_different_lists_are_both_kept(no_proxies, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "a.example")
    monkeypatch.setenv("no_proxy", "b.example")
    bypass_proxies()
    assert os.environ["NO_PROXY"] == "a.example,127.0.0.1,localhost"
    assert os.environ["no_proxy"] == "b.example,127.0.0.1,localhost"


def test_without_a_proxy_the_environment_stays_as_it_is(no_proxies):
    bypass_proxies()
    assert "NO_PROXY" not in os.environ
    assert "no_proxy" not in os.environ
