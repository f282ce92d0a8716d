"""A Tinker-compatible service on 127.0.0.1 for tests: standard library and numpy, the wire format of the tinker SDK 0.24.

It really learns, with a model that is as small as one can be: the logits of the next token are the row of a table that the
last token names. forward_backward adds up true gradients, optim_step is AdamW, states and samplers are copies. Its
manners are those of the real ones: a state is loaded into a new model only, adapter slots are few and held until they are
given back, a name is saved under once, a Datum is looked at before it is believed. Trouble is ordered with `trouble`.
"""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

MODEL, VOCABULARY, LONGEST = "tiny/table", 262, 96
LOSSES = {"importance_sampling": set(), "ppo": {"clip_low_threshold", "clip_high_threshold"}}


class Http(Exception):
    """An answer that is a status and no result."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class UserError(Exception):
    """A future that ends with category "user"."""


@dataclass
class TableModel:
    """logits[last token] are the next token's, (V, V); AdamW's state beside it."""

    logits: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    mean: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    square: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    gradient: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    updates: int = 0
    requests: int = 0

    def logprobs(self, last: int, temperature: float = 1.0) -> np.ndarray:
        scaled = self.logits[last] / temperature
        return scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()

    def forward_backward(self, data: list[dict[str, Any]], loss: str, bounds: dict[str, float]) -> dict[str, Any]:
        total, outputs = 0.0, []
        for datum in data:
            inputs = [token for chunk in datum["model_input"]["chunks"] for token in chunk["tokens"]]
            given = {name: tensor["data"] for name, tensor in datum["loss_fn_inputs"].items()}
            if given.keys() != {"target_tokens", "logprobs", "advantages"}:
                raise UserError(f"loss_fn_inputs are {sorted(given)}")
            if {len(values) for values in given.values()} != {len(inputs)}:
                raise UserError("loss_fn_inputs and model_input differ in length")
            found = []
            for last, target, old, advantage in zip(
                inputs, given["target_tokens"], given["logprobs"], given["advantages"], strict=True
            ):
                new = self.logprobs(last)
                found.append(float(new[target]))
                if not advantage:
                    continue
                ratio = np.exp(new[target] - old)
                kept, slope = ratio * advantage, ratio * advantage
                if loss == "ppo":
                    clipped = np.clip(ratio, bounds["clip_low_threshold"], bounds["clip_high_threshold"]) * advantage
                    kept, slope = (kept, slope) if kept <= clipped else (clipped, 0.0)
                total -= kept
                self.gradient[last] += slope * np.exp(new)  # minus the gradient of the objective
                self.gradient[last, target] -= slope
            outputs.append({"logprobs": {"data": found, "dtype": "float32", "shape": [len(found)]}})
        return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": {"loss:sum": float(total)}}

    def optim_step(self, adam: dict[str, float]) -> dict[str, Any]:
        gradient, norm = self.gradient, float(np.linalg.norm(self.gradient))
        if adam["grad_clip_norm"] and norm > adam["grad_clip_norm"]:
            gradient = gradient * (adam["grad_clip_norm"] / norm)
        self.updates += 1
        beta1, beta2 = adam["beta1"], adam["beta2"]
        self.mean = beta1 * self.mean + (1 - beta1) * gradient
        self.square = beta2 * self.square + (1 - beta2) * gradient**2
        mean, square = self.mean / (1 - beta1**self.updates), self.square / (1 - beta2**self.updates)
        self.logits = self.logits * (1 - adam["learning_rate"] * adam["weight_decay"])
        self.logits = self.logits - adam["learning_rate"] * mean / (np.sqrt(square) + adam["eps"])
        self.gradient = np.zeros_like(self.gradient)
        return {"metrics": {"grad_norm:mean": norm}}

    def sample(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        if len(prompt) + params["max_tokens"] > LONGEST:
            raise UserError("prompt and reply are too long")
        rng, temperature, stop = (
            np.random.default_rng(params.get("seed")),
            params["temperature"],
            params.get("stop") or [],
        )
        tokens: list[int] = []
        found: list[float] = []
        while len(tokens) < params["max_tokens"] and not (tokens and tokens[-1] in stop):
            likely = self.logprobs((prompt + tokens)[-1], temperature or 1.0)
            tokens.append(int(rng.choice(VOCABULARY, p=np.exp(likely)) if temperature else likely.argmax()))
            found.append(float(likely[tokens[-1]]))
        return {"tokens": tokens, "logprobs": found, "stop_reason": "stop" if tokens[-1] in stop else "length"}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@dataclass
class TinkerService:
    """`with TinkerService() as service:` answers at `service.base_url`. slots: models that may be in training at once.

    trouble["forward_backward"] = [...] is what happens to the next requests of that name, one each: a dict becomes the
    future's answer, `{"try_again": reason, "times": n}` makes it wait first, an Http is answered at once, None is nothing.
    """

    slots: int = 1
    trouble: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    models: dict[str, TableModel] = field(default_factory=dict)
    states: dict[str, TableModel] = field(default_factory=dict)
    samplers: dict[str, TableModel] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)

    def __enter__(self) -> TinkerService:
        service, self._futures, self._numbers, self._lock = self, {}, itertools.count(), threading.Lock()
        self.waiting: dict[str, dict[str, Any]] = {}

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # the standard library's name
                self.give({})

            def do_POST(self) -> None:
                self.give(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def give(self, body: dict[str, Any]) -> None:
                status = 200
                service.keys.add(self.headers.get("X-API-Key", ""))
                try:
                    with service._lock:
                        answer = service.answer(self.path.removeprefix("/api/v1/"), body)
                except Http as refusal:
                    status, answer = refusal.status, {"detail": refusal.detail}
                if isinstance(answer, dict) and answer.get("type") == "try_again":
                    time.sleep(0.02)  # a real service holds the question for up to a minute
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = _Http(("127.0.0.1", 0), Answer)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), name="tinker service", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def asked(self, name: str) -> list[dict[str, Any]]:
        return [body for path, body in self.requests if path == name]

    @property
    def model(self) -> TableModel:
        """The one in training."""
        (model,) = self.models.values()
        return model

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        match path:
            case "healthz":
                return {"status": "ok"}
            case "get_server_capabilities":
                return {"supported_models": [{"model_name": MODEL, "max_context_length": LONGEST}]}
            case "client/config":
                return {}
            case "telemetry":
                return {"status": "accepted"}
            case "session_heartbeat":
                return {}
            case "retrieve_future":
                return self.retrieve(body["request_id"])
        self.requests.append((path, body))
        ordered = self.trouble[path].pop(0) if self.trouble[path] else None
        if isinstance(ordered, Http):
            raise ordered
        if path == "create_session":
            return {"session_id": f"session-{next(self._numbers)}"}
        if path == "create_sampling_session":
            name = f"sampler-{next(self._numbers)}"
            self.samplers[name] = TableModel()
            return {"sampling_session_id": name}
        request_id = str(next(self._numbers))
        if isinstance(ordered, dict) and "try_again" in ordered:
            self.waiting[request_id] = ordered
            ordered = None
        if ordered is None:
            try:
                ordered = self.result(path, body)
            except UserError as error:
                ordered = {"error": str(error), "category": "user"}
        self._futures[request_id] = ordered
        return {"request_id": request_id}

    def retrieve(self, request_id: str) -> Any:
        if request_id not in self._futures:
            raise Http(404, "no such future")
        wait = self.waiting.get(request_id)
        if wait and wait["times"]:
            wait["times"] -= 1
            return {"type": "try_again", "request_id": request_id, "queue_state": wait["try_again"]}
        return self._futures[request_id]

    def result(self, path: str, body: dict[str, Any]) -> Any:
        if path == "asample":
            sampler = self.samplers.get(body["sampling_session_id"])
            if sampler is None:
                raise Http(404, "no such sampler")
            prompt = [token for chunk in body["prompt"]["chunks"] for token in chunk["tokens"]]
            return {"sequences": [sampler.sample(prompt, body["sampling_params"])], "type": "sample"}
        if path == "create_model":
            if len(self.models) >= self.slots:
                raise Http(400, "Maximum number of LoRA adapters reached")
            name = f"model-{next(self._numbers)}"
            self.models[name] = TableModel()
            return {"model_id": name, "type": "create_model"}
        model = self.models.get(body["model_id"])
        if model is None:
            raise Http(404, "no such model")
        model.requests += 1
        match path:
            case "unload_model":
                del self.models[body["model_id"]]
                return {"type": "unload_model", "model_id": body["model_id"]}
            case "forward_backward":
                asked = body["forward_backward_input"]
                bounds = asked.get("loss_fn_config") or {}
                if bounds.keys() != LOSSES[asked["loss_fn"]]:
                    raise UserError(f"loss_fn_config of {asked['loss_fn']} is {bounds}")
                return model.forward_backward(asked["data"], asked["loss_fn"], bounds)
            case "optim_step":
                return model.optim_step(body["adam_params"])
            case "save_weights":
                state = f"tinker://{body['model_id']}/weights/{body['path']}"
                if state in self.states:
                    raise Http(409, "a state of that name exists")
                self.states[state] = copy.deepcopy(model)
                return {"path": state, "type": "save_weights"}
            case "load_weights":
                if model.requests > 1:
                    raise Http(400, "LoadWeights is not permitted but as a model's first request")
                if body["path"] not in self.states:
                    raise Http(404, f"there is no {body['path']}")
                self.models[body["model_id"]] = loaded = copy.deepcopy(self.states[body["path"]])
                loaded.requests, loaded.gradient = 1, np.zeros_like(loaded.gradient)
                return {"path": body["path"], "type": "load_weights"}
            case "save_weights_for_sampler":
                name = f"sampler-{next(self._numbers)}"
                self.samplers[name] = copy.deepcopy(model)
                return {"sampling_session_id": name, "type": "save_weights_for_sampler"}
        raise Http(404, f"no such path: {path}")
