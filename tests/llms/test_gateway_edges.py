"""The gateway's edge: what it reads before it knows the key, and how it treats malformed, endless and idle requests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from finetune_nb.llms import gateway as gateway_module
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.testing import ScriptedPolicy
from finetune_nb.types import EpisodeKey

BODY = json.dumps({"messages": [{"role": "user", "content": "3+4"}]}).encode()
PATHS = ["/e/0-0/v1/chat/completions", "/e/0-0/v1/completions", "/e/0-0/v1/models", "/nothing", "/", "*"]


class Address:
    """One rollout's address, for plain sockets."""

    def __init__(self, llm):
        parts = urlsplit(llm.base_url)
        self.place, self.path = (parts.hostname, parts.port), f"{parts.path}/chat/completions"
        self.key = f"Authorization: Bearer {llm.api_key}\r\n"

    def head(self, lines, path=None, method="POST", key=True):
        text = f"{method} {path or self.path} HTTP/1.1\r\nHost: x\r\n{self.key if key else ''}{lines}\r\n"
        return text.encode()


@pytest.fixture
def address():
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"), "tiny")
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        yield Address(llm)


@pytest.fixture
def impatient(monkeypatch):
    """A gateway of its own, which closes connections soon."""
    monkeypatch.setattr(gateway_module, "IDLE_SECONDS", 0.4)
    monkeypatch.setattr(gateway_module, "BODY_SECONDS", 0.4)
    monkeypatch.setattr(gateway_module, "_gateway", None)


def read_all(line):
    """What comes until the connection is closed."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := line.recv(65536):
            found += part
    return found


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def answered(address, *parts):
    with socket.create_connection(address.place, timeout=20) as line:
        for part in parts:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(part)
        return read_all(line)


def taken_before_the_answer(place, head, parts):
    """How many parts of a body were taken before the connection answered or broke."""
    with socket.create_connection(place, timeout=20) as line:
        line.sendall(head)
        for taken, part in enumerate(parts):
            line.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                return taken, line.recv(4096)
            line.settimeout(20)
            try:
                line.sendall(part)
            except OSError:
                return taken, b""
    return len(parts), b""


@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "DELETE"])
@pytest.mark.parametrize("path", PATHS)
def test_no_body_is_read_before_the_key_is_right(address, path, method):
    parts = [b"a" * 2**20] * 8
    head = address.head(f"Content-Length: {2**23}\r\n", path, method, key=False)
    taken, answer = taken_before_the_answer(address.place, head, parts)
    assert taken <= 1
    assert not answer or status_of(answer) == 401


def test_no_chunk_is_read_before_the_key_is_right(address):
    chunk = b"100000\r\n" + b"a" * 2**20 + b"\r\n"
    head = address.head("Transfer-Encoding: chunked\r\n", "/nothing", key=False)
    taken, _ = taken_before_the_answer(address.place, head, [chunk] * 8)
    assert taken <= 1


def test_nobody_is_asked_to_send_a_body_that_is_refused(address):
    head = address.head("Content-Length: 10000000\r\nExpect: 100-continue\r\n", key=False)
    answer = answered(address, head)
    assert status_of(answer) == 401
    assert b" 100 " not in answer


def test_a_small_body_without_the_key_gets_its_answer_and_the_connection_stays_open(address):
    connection = http.client.HTTPConnection(*address.place, timeout=20)
    for path in (address.path, "/nothing"):
        for _ in range(3):
            connection.request("POST", path, b"a" * 60_000, {"Authorization": "Bearer wrong"})
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (401, "invalid_api_key")
    connection.close()


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: -1\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: abc\r\n",
        "Content-Length: 0x10\r\n",
        "Content-Length: 1e3\r\n",
        "Content-Length: 5.0\r\n",
        "Content-Length: 1_000\r\n",
        "Content-Length: \r\n",
        "Content-Length: 5 5\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        f"Content-Length: {'9' * 400}\r\n",
        f"Content-Length: {'9' * 5000}\r\n",
        "Content-Length: ٣\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
    ],
)
def test_a_malformed_length_is_answered_with_400_and_the_connection_closed(address, lines, key):
    answer = answered(address, address.head(lines, key=key) + b"hello")
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1


def test_the_answer_to_a_malformed_length_says_what_was_found(address):
    answer = answered(address, address.head("Content-Length: -7\r\n"))
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], "(-7)" in error["message"]) == ("malformed_length", True)


@pytest.mark.parametrize("chunk", [b"-5\r\nhello\r\n", b"zz\r\n", b"\r\n", b"5\r\nhelloXX"])
def test_a_malformed_chunk_ends_the_connection_and_harms_nobody(address, chunk):
    head = address.head("Transfer-Encoding: chunked\r\n")
    answer = answered(address, head + chunk)
    assert not answer or status_of(answer) == 400
    good = answered(address, address.head(f"Content-Length: {len(BODY)}\r\nConnection: close\r\n") + BODY)
    assert status_of(good) == 200


def test_a_good_body_in_chunks_is_read(address):
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    answer = answered(address, address.head("Transfer-Encoding: chunked\r\nConnection: close\r\n") + chunks)
    assert status_of(answer) == 200


@pytest.mark.parametrize("lines", ["X-Long: " + "a" * 200_000 + "\r\n", "X-Many: a\r\n" * 20_000])
def test_headers_without_end_are_not_kept(address, lines):
    answer = answered(address, address.head(lines))
    assert not answer or status_of(answer) >= 400


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    "sent",
    ["", "POST / HTT", "POST / HTTP/1.1\r\nHost: x\r\n", "{head}Content-Length: 100\r\n\r\nab", "{head}"],
    ids=["nothing", "half a line", "half the headers", "half a body", "no end of the headers"],
)
def test_a_connection_that_stays_half_open_is_closed_after_a_time(impatient, address, sent):
    head = f"POST {address.path} HTTP/1.1\r\nHost: x\r\n{address.key}"
    started = time.monotonic()
    with socket.create_connection(address.place, timeout=20) as line:
        line.sendall(sent.replace("{head}", head).encode())
        assert read_all(line) == b""
    assert time.monotonic() - started < 15


def test_headers_that_come_a_byte_at_a_time_do_not_keep_a_connection(impatient, address):
    with socket.create_connection(address.place, timeout=20) as line:
        closed = False
        for _ in range(200):
            try:
                line.sendall(b"X")
            except OSError:
                closed = True
                break
            time.sleep(0.05)
    assert closed


def test_an_idle_connection_is_closed_after_a_time(impatient, address):
    with socket.create_connection(address.place, timeout=20) as line:
        line.sendall(address.head(f"Content-Length: {len(BODY)}\r\n") + BODY)
        assert b" 200 " in read_all(line)


@pytest.mark.slow
@pytest.mark.proof
async def test_a_model_that_thinks_longer_than_connections_may_idle_gets_its_answer_through(impatient):
    class Thoughtful(ScriptedPolicy):
        async def sample(self, ids, params, seed):
            await asyncio.sleep(1.5)
            return await super().sample(ids, params, seed)

    llm = PolicyLLM(Thoughtful(lambda messages, seed: "seven"), "tiny")
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        address = Address(llm)
        head = address.head(f"Content-Length: {len(BODY)}\r\nConnection: close\r\n")
        answer = await asyncio.to_thread(answered, address, head + BODY)
    assert status_of(answer) == 200
    assert len(episode.calls) == 1


def test_many_half_open_connections_hinder_nobody(address):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            line = stack.enter_context(socket.create_connection(address.place, timeout=20))
            line.sendall(b"POST / HTTP/1.1\r\n")
        good = answered(address, address.head(f"Content-Length: {len(BODY)}\r\nConnection: close\r\n") + BODY)
    assert status_of(good) == 200
