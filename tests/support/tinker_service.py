"""A Tinker-compatible service on 127.0.0.1 for tests: standard library and numpy, the wire formats of the tinker SDKs 0.24
(JSON) and 0.38 (protobuf, by the SDK's own messages).

It really learns, with a model that is as small as one can be: the logits of the next token are the row of a table that the
last token names. forward_backward adds up true gradients, optim_step is AdamW, states and samplers are copies. Its
manners are those of SkyRL's server: a state is loaded into a new model only, adapter slots are few and held until they are
given back, and one that is not free fails the future of the request; a failed future is a status 400; a name is saved under
once, a Datum is looked at before it is believed; no loss is summed up, and replies have no ids. A sampler has no weights of its
own: what it was made of is loaded into the model in training, where later steps change it. Trouble is ordered with `trouble`.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import tarfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

MODEL, VOCABULARY, LONGEST = "tiny/table", 262, 96
PATHS = {
    *("create_session", "create_sampling_session", "asample", "create_model", "unload_model", "forward_backward"),
    *("optim_step", "save_weights", "load_weights", "save_weights_for_sampler"),
}
LOSSES = {"importance_sampling": set(), "ppo": {"clip_low_threshold", "clip_high_threshold"}}


class Http(Exception):
    """An answer that is a status and no result."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class UserError(Exception):
    """A future that ends with category "user"."""


class EngineError(Exception):
    """A future that fails as SkyRL's do: the question for its result has status 400."""


@dataclass
class Redirect:
    """An answer that leads elsewhere."""

    location: str


def adapter_archive(files: dict[str, bytes] | None = None) -> bytes:
    """A packed adapter, as SkyRL writes it: its config names no layers."""
    import safetensors.numpy

    if files is None:
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        matrices = {
            f"{layer}.lora_A.weight": np.zeros((4, 8), np.float32),
            f"{layer}.lora_B.weight": np.zeros((8, 4), np.float32),
        }
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "target_modules": None}
        files = {
            "adapter_model.safetensors": safetensors.numpy.save(matrices),
            "adapter_config.json": json.dumps(config).encode(),
            "README.md": b"---",
        }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@dataclass
class TableModel:
    """logits[last token] are the next token's, (V, V); AdamW's state beside it."""

    logits: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    mean: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    square: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    gradient: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY)))
    updates: int = 0
    requests: int = 0
    loaded: str = ""
    """The sampler whose weights were loaded last."""

    def logprobs(self, last: int, temperature: float = 1.0) -> np.ndarray:
        scaled = self.logits[last] / temperature
        return scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()

    def forward_backward(
        self, data: list[dict[str, Any]], loss: str, bounds: dict[str, float], takes_weights: bool, mean: bool
    ) -> dict[str, Any]:
        outputs = []
        for datum in data:
            inputs = [token for chunk in datum["model_input"]["chunks"] for token in chunk["tokens"]]
            given = {name: tensor["data"] for name, tensor in datum["loss_fn_inputs"].items()}
            weights = given.pop("weights", None) if takes_weights else None
            if given.keys() != {"target_tokens", "logprobs", "advantages"}:
                raise UserError(f"loss_fn_inputs are {sorted(given)}")
            if {len(values) for values in given.values()} != {len(inputs)}:
                raise UserError("loss_fn_inputs and model_input differ in length")
            if weights is None:
                weights = [1.0] * len(inputs)
            divisor = sum(weights) * len(data) if mean else 1.0
            found, losses = [], []
            for last, target, old, advantage, weight in zip(
                inputs, given["target_tokens"], given["logprobs"], given["advantages"], weights, strict=True
            ):
                new = self.logprobs(last)
                found.append(float(new[target]))
                losses.append(0.0)
                advantage = advantage * weight
                if not advantage:
                    continue
                ratio = np.exp(new[target] - old)
                kept, slope = ratio * advantage, ratio * advantage
                if loss == "ppo":
                    clipped = np.clip(ratio, bounds["clip_low_threshold"], bounds["clip_high_threshold"]) * advantage
                    kept, slope = (kept, slope) if kept <= clipped else (clipped, 0.0)
                losses[-1] -= float(kept)
                slope /= divisor
                self.gradient[last] += slope * np.exp(new)  # minus the gradient of the objective
                self.gradient[last, target] -= slope
            outputs.append(
                {
                    name: {"data": values, "dtype": "float32", "shape": [len(values)]}
                    for name, values in (("logprobs", found), ("elementwise_loss", losses))
                }
            )
        return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": {}}

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
        return {"metrics": {"skyrl.ai/grad_norm": norm}}

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
    takes_weights: a Datum may have weights. mean: of sequences and of their tokens, not the sum. tells_length: how many tokens
    the model holds. shares_weights: a sampler has no weights of its own.

    trouble["forward_backward"] = [...] is what happens to the next requests of that name, one each: a dict becomes the
    future's answer, `{"try_again": reason, "times": n}` makes it wait first, an Http is answered at once, an EngineError
    fails the future, None is nothing.
    """

    slots: int = 1
    takes_weights: bool = True
    mean: bool = False
    tells_length: bool = True
    shares_weights: bool = True
    trouble: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    models: dict[str, TableModel] = field(default_factory=dict)
    states: dict[str, TableModel] = field(default_factory=dict)
    samplers: dict[str, TableModel] = field(default_factory=dict)
    """What was put up for sampling, by the name of its sampling session."""
    archives: dict[str, TableModel] = field(default_factory=dict)
    """The same, and what was saved by a name, by address."""
    packed: bytes | None = None
    """What every archive is downloaded as. None: a small adapter."""
    keys: set[str] = field(default_factory=set)

    def __enter__(self) -> TinkerService:
        service, self._futures, self._numbers, self._lock = self, {}, itertools.count(), threading.Lock()
        self.waiting: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set()
        self._of_sampler: dict[str, str] = {}  # the model whose weights a sampler has

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # the standard library's name
                self.give("GET", {})

            def do_DELETE(self) -> None:
                self.give("DELETE", {})

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if "protobuf" in self.headers.get("Content-Type", ""):
                    self.give("POST", gradient_request(content, self.headers.get("Content-Encoding")))
                else:
                    self.give("POST", json.loads(content or b"{}"))

            def give(self, method: str, body: dict[str, Any]) -> None:
                status, location = 200, None
                service.keys.add(self.headers.get("X-API-Key", ""))
                try:
                    with service._lock:
                        answer = service.answer(self.path.removeprefix("/api/v1/"), body, method)
                except Http as refusal:
                    status, answer = refusal.status, {"detail": refusal.detail}
                if isinstance(answer, dict) and answer.get("type") == "try_again":
                    time.sleep(0.02)  # a real service holds the question for up to a minute
                if isinstance(answer, Redirect):
                    status, location, answer = 302, answer.location, b""
                kind = "application/json"
                if isinstance(answer, bytes):
                    content, kind = answer, "application/octet-stream"
                elif "protobuf" in self.headers.get("Accept", "") and (packed := result_message(answer)) is not None:
                    content, kind = packed, "application/x-protobuf"
                else:
                    content = json.dumps(answer).encode()
                self.send_response(status)
                if location is not None:
                    self.send_header("Location", location)
                self.send_header("Content-Type", kind)
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

    def answer(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        match path.split("/"):
            case ["healthz"]:
                return {"status": "ok"}
            case ["get_server_capabilities"]:
                length = {"max_context_length": LONGEST} if self.tells_length else {}
                return {"supported_models": [{"model_name": MODEL, **length}]}
            case ["client", "config"]:
                return {}
            case ["telemetry"]:
                return {"status": "accepted"}
            case ["session_heartbeat"]:
                return {}
            case ["samplers", _]:
                return {"sampler_id": path.split("/")[1], "base_model": MODEL}
            case ["get_info"]:
                name = {"base_model": MODEL, "model_name": MODEL, "lora_config": {"rank": 8}}
                return {"model_id": body["model_id"], "status": "created", "model_data": name}
            case ["retrieve_future"]:
                return self.retrieve(body["request_id"])
            case ["training_runs", model, "checkpoints", *rest]:
                self.requests.append((f"{method} checkpoints", {"path": path}))
                return self.checkpoint(method, model, rest)
        if path not in PATHS:  # newer SDKs ask for more, and do without
            raise Http(404, "Not Found")
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
            except EngineError as error:
                ordered = error
        self._futures[request_id] = ordered
        return {"request_id": request_id, "model_id": body.get("model_id")}

    def checkpoint(self, method: str, model: str, rest: list[str]) -> Any:
        """What was saved of a model: listed, fetched, deleted."""
        match method, rest:
            case "GET", []:
                found = [*self.states, *self.archives]
                found = [path.removeprefix("tinker://").split("/") for path in found if path.split("/")[2] == model]
                kinds = {"weights": "training", "sampler_weights": "sampler"}
                return {
                    "checkpoints": [{"checkpoint_id": name, "checkpoint_type": kinds[kind]} for _, kind, name in found]
                }
            case "GET", [name, "archive"] if f"tinker://{model}/sampler_weights/{name}" in self.archives:
                return Redirect(f"{self.base_url}/api/v1/training_runs/{model}/checkpoints/{name}/download")
            case "GET", [_, "download"]:
                return self.packed if self.packed is not None else adapter_archive()
            case "DELETE", [kind, name]:
                path = f"tinker://{model}/{kind}/{name}"
                if (self.states if kind == "weights" else self.archives).pop(path, None) is not None:
                    return {}
        raise Http(404, f"Checkpoint not found: {model}/{'/'.join(rest)}")

    def retrieve(self, request_id: str) -> Any:
        if request_id not in self._futures:
            raise Http(404, "no such future")
        wait = self.waiting.get(request_id)
        if wait and wait["times"]:
            wait["times"] -= 1
            return {"type": "try_again", "request_id": request_id, "queue_state": wait["try_again"]}
        found = self._futures[request_id]
        if isinstance(found, EngineError):
            raise Http(400, str(found))
        return found

    def result(self, path: str, body: dict[str, Any]) -> Any:
        if path == "asample":
            name = body["sampling_session_id"]
            sampler = self.samplers.get(name)
            if sampler is None:
                raise Http(404, "Sampling session not found")
            of_model = self._of_sampler.get(name)
            if of_model is not None:
                sampler = self._loaded(of_model, name, sampler)
            prompt = [token for chunk in body["prompt"]["chunks"] for token in chunk["tokens"]]
            return {"sequences": [sampler.sample(prompt, body["sampling_params"])], "type": "sample"}
        if path == "create_model":
            if len(self.models) >= self.slots:
                raise EngineError(f"Maximum number of LoRA adapters ({self.slots + 1}) reached")
            name = f"model-{next(self._numbers)}"
            self.models[name] = TableModel()
            self._known.add(name)
            return {"model_id": name, "type": "create_model"}
        model = self.models.get(body["model_id"])
        if model is None:
            if body["model_id"] not in self._known:
                raise Http(404, "Model not found")
            raise EngineError(f"Model {body['model_id']} not loaded")
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
                return model.forward_backward(asked["data"], asked["loss_fn"], bounds, self.takes_weights, self.mean)
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
                    raise Http(404, f"Checkpoint not found: {body['path']}")
                self.models[body["model_id"]] = loaded = copy.deepcopy(self.states[body["path"]])
                loaded.requests, loaded.gradient = 1, np.zeros_like(loaded.gradient)
                return {"path": body["path"], "type": "load_weights"}
            case "save_weights_for_sampler":
                name = body.get("path") or f"ss{next(self._numbers)}"
                address = f"tinker://{body['model_id']}/sampler_weights/{name}"
                if address in self.archives:
                    raise Http(409, "a checkpoint of that name exists")
                self.archives[address] = copy.deepcopy(model)
                if body.get("path"):
                    return {"path": address, "type": "save_weights_for_sampler"}
                sampler = f"sampler-{next(self._numbers)}"
                self.samplers[sampler] = self.archives[address]
                self._of_sampler[sampler] = body["model_id"]
                return {"sampling_session_id": sampler, "type": "save_weights_for_sampler"}
        raise Http(404, f"no such path: {path}")

    def _loaded(self, name: str, sampler: str, weights: TableModel) -> TableModel:
        """The model in training, with the weights of that sampler if it was not the last one that was sampled: it has them for
        as long as no step is made. Elsewhere it keeps those that it was made with."""
        if not self.shares_weights:
            return weights
        model = self.models.get(name)
        if model is None:
            raise EngineError(f"Model {name} not loaded")
        if model.loaded != sampler:
            model.logits, model.loaded = weights.logits.copy(), sampler
        return model


# ── protobuf ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def gradient_request(content: bytes, encoding: str | None) -> dict[str, Any]:
    """The body of a forward_backward that newer SDKs send, as older ones send it."""
    from tinker.proto import tinker_public_pb2 as messages  # pyright: ignore[reportMissingImports]

    if encoding == "zstd":
        import zstandard  # pyright: ignore[reportMissingImports]

        content = zstandard.ZstdDecompressor().decompress(content, max_output_size=1 << 28)
    message = messages.ForwardBackwardRequest()
    message.ParseFromString(content)
    kinds = {messages.DTYPE_FLOAT32: np.float32, messages.DTYPE_INT64: np.int64}
    data = []
    for datum in message.data:
        chunks = [
            {"tokens": np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist()} for chunk in datum.model_input
        ]
        inputs = {
            name: {"data": np.frombuffer(tensor.dense, kinds[tensor.dtype]).tolist()}
            for name, tensor in datum.loss_fn_inputs.items()
        }
        data.append({"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs})
    asked: dict[str, Any] = {"data": data, "loss_fn": message.loss_fn}
    if message.loss_fn_config:
        asked["loss_fn_config"] = dict(message.loss_fn_config)
    return {"model_id": message.model_id, "forward_backward_input": asked}


def result_message(answer: Any) -> bytes | None:
    """The result of a sample or forward_backward, as newer SDKs want it; None: of something else."""
    from tinker.proto import tinker_public_pb2 as messages  # pyright: ignore[reportMissingImports]

    if not isinstance(answer, dict):
        return None
    if isinstance(answer.get("sequences"), list):
        sampled = messages.SampleResponse()
        reasons = {"stop": messages.STOP_REASON_STOP, "length": messages.STOP_REASON_LENGTH}
        for each in answer["sequences"]:
            sampled.sequences.append(
                messages.SampledSequence(
                    stop_reason=reasons[each["stop_reason"]],
                    tokens=np.array(each["tokens"], np.int32).tobytes(),
                    logprobs=np.array(each["logprobs"], np.float32).tobytes(),
                )
            )
        return sampled.SerializeToString()
    if "loss_fn_outputs" not in answer:
        return None
    result = messages.ForwardBackwardOutput()
    result.loss_fn_output_type = answer["loss_fn_output_type"]
    for name, value in answer["metrics"].items():
        result.metrics[name] = value
    record = result.loss_fn_outputs.add()
    record.num_datums = len(answer["loss_fn_outputs"])
    for name in answer["loss_fn_outputs"][0]:
        arrays = [np.array(each[name]["data"], np.float32) for each in answer["loss_fn_outputs"]]
        offsets = np.cumsum([0, *(array.nbytes for array in arrays)]).astype(np.int64)
        tensor = messages.BatchedTensor(
            data=b"".join(array.tobytes() for array in arrays), offsets=offsets.tobytes(), dtype=messages.DTYPE_FLOAT32
        )
        record.fields[name].CopyFrom(tensor)
    return result.SerializeToString()
