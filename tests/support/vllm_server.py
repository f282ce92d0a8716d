"""A server with vLLM's answers on 127.0.0.1: a small true model that samples, adapters that are read from their folders, and the
refusals of vLLM 0.32 word for word. It runs on a thread of its own.

As in vLLM, an adapter whose folder is gone when it has to be read again ends the engine.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from aiohttp import web
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from finetune_nb.backends.local.sampling import SampleRequest, sample_batch
from finetune_nb.backends.local.scoring import score
from finetune_nb.types import SamplingParams

__all__ = ["VLLMServer"]

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def _error(status: int, message: str, kind: str = "InternalServerError", param: str | None = None) -> web.Response:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return web.json_response({"error": error}, status=status)


class VLLMServer:
    """`with VLLMServer(model, tokenizer) as server:` answers at `server.url`.

    model: the base model, which is copied. Attributes may be changed at any time: they are how it behaves.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "base", port: int = 0) -> None:
        self.model, self.tokenizer, self.name = copy.deepcopy(model), tokenizer, name
        self.port = port
        self.max_model_len: int | None = None
        self.max_rank = 16
        self.loads_adapters = True
        self.reads_weights = True
        self.without_weights = False
        """As after a reload that failed: healthy, but the next request ends it."""
        self.raw_logprobs = False
        self.token_ids = True
        self.key: str | None = None
        self.seconds = 0.0
        """What a reply takes."""
        self.hold: threading.Event | None = None
        """Requests that come now are answered once it is set."""
        self.refusals: list[tuple[int, str]] = []
        """Answers to the next requests in place of replies."""
        self.finish_reason: str | None = None
        """In place of the true one."""
        self.dead = False
        self.resident = 2
        """Adapters that stay in memory; others are read again."""
        self.adapters: dict[str, str] = {}
        self.events: list[tuple[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        self.running = 0
        """Replies that are being sampled."""
        self._read: dict[str, Any] = {}
        self._adapted: Any = None
        self._one = threading.Lock()

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            app = web.Application(middlewares=[self._authorized])
            app.add_routes(
                [
                    web.get("/v1/models", self._models),
                    web.get("/health", self._health),
                    web.post("/v1/completions", self._completions),
                    web.post("/sleep", self._switch),
                    web.post("/wake_up", self._switch),
                    web.post("/collective_rpc", self._reload),
                    web.post("/reset_prefix_cache", self._switch),
                    web.post("/v1/load_lora_adapter", self._load),
                    web.post("/v1/unload_lora_adapter", self._unload),
                ]
            )
            self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(serve())
            self._loop.run_forever()
            self._loop.run_until_complete(self._runner.cleanup())
            self._loop.close()

        self._thread = threading.Thread(target=run, name="vllm", daemon=True)
        self._thread.start()
        ready.wait(10)

    def stop(self) -> None:
        """Nobody answers any more; whoever waits for a reply loses the connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def forget(self) -> None:
        """As after a restart: it has no adapter."""
        self.adapters.clear()
        self._read.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    # ── its answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    @web.middleware
    async def _authorized(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.dead else 200)

    async def _models(self, request: web.Request) -> web.Response:
        base = {"id": self.name, "root": f"/models/{self.name}", "parent": None, "max_model_len": self.max_model_len}
        adapters = [
            {"id": name, "root": place, "parent": self.name, "max_model_len": None}
            for name, place in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": [base, *adapters]})

    async def _switch(self, request: web.Request) -> web.Response:
        self.events.append(("switch", request.path))
        return web.Response(status=200)

    async def _reload(self, request: web.Request) -> web.Response:
        body = await request.json()
        place = Path(body["kwargs"]["weights_path"])
        if not self.reads_weights:
            return web.json_response({"detail": "Not Found"}, status=404)
        try:
            weights = load_file(place / "model.safetensors")
        except OSError as error:
            self.without_weights = True
            return _error(500, f"No weights found in {place}: {error}")
        self.model.load_state_dict(weights, strict=False)
        self.events.append(("reload", self.running))
        return web.json_response({"results": [None]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, place = body["lora_name"], Path(body["lora_path"])
        if not self.loads_adapters:
            return web.json_response({"detail": "Not Found"}, status=404)
        if name in self.adapters:
            said = f"The lora adapter '{name}' has already been loaded."
            said += " If you want to load the adapter in place, set 'load_inplace' to True."
            return _error(400, said, "InvalidUserInput")
        if not (place / "adapter_config.json").is_file():
            return _error(404, f"No adapter found for {place}", "NotFoundError")
        rank = json.loads((place / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return _error(
                500, f"Call to add_lora method failed: LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            )
        self.adapters[name] = str(place)
        self.events.append(("load", name))
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        place = self.adapters.pop(name)
        self.events.append(("unload", (name, os.path.isdir(place))))  # noqa: ASYNC240
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        place, hold = self.adapters.get(body["model"], ""), self.hold  # what it takes with it
        await asyncio.sleep(self.seconds)
        while hold is not None and not hold.is_set():
            await asyncio.sleep(0.01)
        if self.refusals:
            status, said = self.refusals.pop(0)
            return _error(status, said)
        if self.dead:
            return _error(500, DEAD)
        name, ids = body["model"], body["prompt"]
        if name != self.name and not place:
            said = f"The model `{name}` does not exist. Valid aliases: {self.name}."
            return _error(404, said, "NotFoundError", "model")
        vocabulary = self.model.config.vocab_size
        if max(ids) >= vocabulary:
            return _error(400, f"Token id {max(ids)} is out of vocabulary", "BadRequestError")
        if self.max_model_len is not None and len(ids) >= self.max_model_len:
            said = (
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(ids)} input tokens. Please reduce the length of the input prompt."
            )
            return _error(400, said, "BadRequestError", "input_tokens")
        self.running += 1
        try:
            answer = await asyncio.to_thread(self._sampled, body, place)
        finally:
            self.running -= 1
        return _error(500, DEAD) if answer is None else web.json_response(answer)

    def _sampled(self, body: dict[str, Any], place: str) -> dict[str, Any] | None:
        with self._one:
            model = self.model_with(place)
            if model is None or self.without_weights:
                self.dead = True
                return None
            params = SamplingParams(
                body["temperature"], body["max_tokens"], tuple(body.get("stop") or ()), body["logprobs"]
            )
            row = SampleRequest(body["prompt"], params, body["seed"])
            ends = frozenset() if body.get("ignore_eos") else frozenset(body["stop_token_ids"])
            sample_batch(model, [row], end_ids=ends, pad_id=0, text=self.tokenizer.decode)
            sample = row.sample()
            logprobs = sample.logprobs
            if self.raw_logprobs:
                (logprobs,) = score(model, body["prompt"], sample.ids, (1.0,))
        tops = None
        if sample.likeliest is not None:
            tops = [{f"token_id:{token}": value for token, value in top.items()} for top in sample.likeliest]
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(sample.ids, skip_special_tokens=True),
            "finish_reason": self.finish_reason or sample.finish_reason,
            "stop_reason": None,
            "logprobs": {
                "token_logprobs": logprobs,
                "tokens": [""] * len(logprobs),
                "top_logprobs": tops,
                "text_offset": [],
            },
        }
        if self.token_ids and body.get("return_token_ids"):
            choice |= {"token_ids": sample.ids, "prompt_token_ids": body["prompt"]}
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [choice],
        }

    def model_with(self, place: str) -> Any:
        """The model with the adapter of that folder, "" for none; None if it is gone."""
        if not place:
            return self.model
        if place not in self._read:
            if not os.path.isdir(place):
                return None
            self._read[place] = load_file(Path(place) / "adapter_model.safetensors")
            for old in list(self._read)[: -self.resident]:
                del self._read[old]
        if self._adapted is None:
            self._adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), place).eval()
        set_peft_model_state_dict(self._adapted, self._read[place])
        return self._adapted
