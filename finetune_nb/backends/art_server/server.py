"""A server of `art run`'s protocol and of an OpenAI-compatible model, both over one policy of the local backend.

What is sampled here is kept until it has been trained on.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from ...errors import BackendError, ConfigError
from ...llms.call_recorder import CallRecorder
from ...llms.client import PolicyLLM
from ...llms.gateway import IDLE_SECONDS, Endpoint, Gateway, sample
from ...llms.openai_wire import Refused, WireRequest
from ...redaction import redacting_logger
from ...threads import in_daemon_thread
from ...types import EpisodeKey, LLMCall, SamplingParams, TrainingJobRef, TrainingStatusEnum
from .payload import AnsweredCalls, Model, TrainRequest, collection_of
from .routes import application, is_here

__all__ = [
    "ArtServer",
    "HEALTH_PORT",
    "serve",
]

logger = redacting_logger(__name__)

HEALTH_PORT = 8000
"""The Toolkit's plugin asks this port whether the backend is healthy, whatever its config says."""
LARGEST_REQUEST = 2**30
"""Bytes of a training request: every sampled token is some 100 of them."""
BATCH_SECONDS = 600.0
"""How long the body of a request may take: a batch can be long, and the line slow."""
CALLS_AN_EPISODE, EPISODES = 10_000, 10
"""Bounds of what is kept of calls that nobody trains on."""
_METRICS = {
    "loss": "loss/train",
    "grad_norm": "loss/grad_norm",
    "kl": "loss/kl_div",
    "reference_kl": "loss/kl_policy_ref",
    "learning_rate": "loss/learning_rate",
    "trained_tokens": "data/step_trainer_tokens",
    "trained_trajectories": "data/step_num_trajectories",
    "trained_groups": "data/step_num_groups_trainable",
}
"""A job's metrics, and what ART calls them."""


class ArtServer:
    """One model, sampled and trained.

    adapter: a LocalGRPOAdapter. folder: where the model is written after every training, as 0001, 0002, ...; None: nowhere.
    learning_rate: in place of the one that requests bring. sampling: for what requests leave open. allow_inexact: also
    trains on turns that were not sampled here, whose prompts are rendered anew.
    """

    def __init__(
        self,
        adapter: Any,
        folder: Path | None = None,
        learning_rate: float | None = None,
        sampling: SamplingParams = SamplingParams(),
        allow_inexact: bool = False,
    ) -> None:
        self.adapter, self.policy = adapter, adapter.policy
        self.folder, self.learning_rate, self.sampling, self.allow_inexact = (
            folder,
            learning_rate,
            sampling,
            allow_inexact,
        )
        adapter.adapter_config.allow_inexact = allow_inexact
        self.address: tuple[str, int] = ("127.0.0.1", HEALTH_PORT)
        """Where the model is asked."""
        self.model: Model | None = None
        self._written: set[int] = set()
        self._training = asyncio.Lock()
        self._endpoints: deque[Endpoint] = deque(maxlen=EPISODES)
        self._next_episode()

    # ── the model, asked as the gateway's addresses are ──────────────────────────────────────────────────────────────

    def authorized(self, header: str | None) -> bool:
        """The protocol has a key that everybody knows."""
        return True

    def find(self, name: str, header: str | None = None, client_port: int = 0) -> Endpoint:
        newest = self._endpoints[-1]
        if len(newest.episode.calls) >= CALLS_AN_EPISODE:
            newest = self._next_episode()
        return newest

    async def sample(self, endpoint: Endpoint, request: WireRequest) -> list[LLMCall]:
        return await sample(endpoint, request)

    def _next_episode(self) -> Endpoint:
        version = self.policy.version
        name = f"{self.model.name if self.model else 'policy'}@{version}"
        number = sum(endpoint.episode.key.epoch == version for endpoint in self._endpoints)
        episode = CallRecorder(EpisodeKey("train", version, number, 0), self.adapter.seed)
        endpoint = Endpoint(name, episode, PolicyLLM(self.policy, name, self.sampling), cast(Gateway, self))
        self._endpoints.append(endpoint)
        return endpoint

    # ── the protocol ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def register(self, body: dict[str, Any]) -> None:
        self._take(body)

    async def get_step(self, body: dict[str, Any]) -> int:
        self._take(body)
        return self.policy.version

    async def prepare(self, body: dict[str, Any]) -> list[str]:
        self._take(body.get("model"))
        return ["http://{}:{}/v1".format(*self.address), "default"]

    async def delete_checkpoints(self, body: dict[str, Any]) -> None:
        """Of the models that this server has written, all but those of the steps to keep, and the newest."""
        self._take(body.get("model"))
        keep = {*body.get("steps_to_keep", ()), max(self._written, default=0)}
        for step in self._written - keep:
            await in_daemon_thread(_remove, self._place(step))
            self._written.discard(step)

    async def train(self, body: dict[str, Any], started: Callable[[TrainingJobRef], None]) -> dict[str, float]:
        """One training job on what is sent; its metrics as ART names them. started: called with the job."""
        request = await in_daemon_thread(_read, TrainRequest, body)
        self._take(body["model"])
        async with self._training:
            answered = AnsweredCalls(call for endpoint in self._endpoints for call in endpoint.episode.calls)
            run_id = f"{request.model.project}/{request.model.name}"
            collection, turns, unknown = await in_daemon_thread(
                collection_of, request.trajectory_groups, answered, self.policy, run_id
            )
            if unknown and not self.allow_inexact:
                raise BackendError(
                    f"{unknown} of {turns} sampled turns were not sampled by this server: it was started anew meanwhile, or "
                    "another one was asked. Their prompts are not known, and training on others teaches something else. "
                    "Collect them here, or start the server with --allow-inexact."
                )
            rate = self.learning_rate or request.learning_rate
            if rate is not None:
                self.adapter.adapter_config.learning_rate = float(rate)
            self.adapter.adapter_config.kl_coef = request.kl_coef
            ref = await self.adapter.submit(collection)
            started(ref)
            status = await self.adapter.wait_until_complete(ref)
            if status.status != TrainingStatusEnum.COMPLETED:
                raise BackendError(status.message or f"the training job is {status.status}.")
            metrics = status.metadata["metrics"]
            if metrics["optimizer_steps"]:
                await self._stepped()
        steps = float(metrics["optimizer_steps"])
        told = {name: float(metrics[ours]) for ours, name in _METRICS.items() if math.isfinite(metrics[ours])}
        logger.info("step %d of %s: %s", self.policy.version, run_id, status.message)
        # Both spellings: clients up to 0.3 take the short one.
        return {"num_gradient_steps": steps, "data/step_num_gradient_steps": steps, **told}

    async def _stepped(self) -> None:
        """The weights are others now: what the old ones sampled cannot be trained on any more."""
        self._endpoints.clear()
        self._next_episode()
        if self.folder is not None:
            step = self.policy.version
            await self.adapter.save(self._place(step), dtype=self.policy.dtype)
            self._written.add(step)

    def _place(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{step:04d}"

    def _take(self, body: Any) -> None:
        """The model that a request speaks of. Raises BackendError for another one than was trained so far."""
        model, known = _read(Model, body), self.model
        if known is not None and (model.project, model.name) == (known.project, known.name):
            return
        if known is not None and self.policy.version:
            raise BackendError(
                f"this server trains {known.project}/{known.name} and has one set of weights; {model.project}/{model.name} "
                "was asked for. Give that name, or start the server anew."
            )
        self.model = model
        self._endpoints[-1].llm.name = f"{model.name}@{self.policy.version}"
        trained = self.adapter.adapter_config.model
        if model.base_model != trained:
            logger.warning(
                "the config names the model %r; this server trains %r in its place.", model.base_model, trained
            )
        unread = sorted(model.trainer_args.keys() - {"learning_rate", "beta"})
        if unread:
            logger.warning("not read here, see the options of finetune-nb art-server: training.%s", ", .".join(unread))


def _read(kind: Any, body: Any) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refused(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _is_filled(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


# ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def http_server(server: ArtServer) -> HTTPServer:
    """An HTTP server of the protocol's paths, to be started on the running event loop."""
    return HTTPServer(
        application(server),
        max_body_size=LARGEST_REQUEST,
        idle_connection_timeout=IDLE_SECONDS,
        body_timeout=BATCH_SECONDS,
    )


async def serve(
    model: str = "embedded",
    *,
    host: str = "127.0.0.1",
    port: int = 7999,
    folder: Path | None = None,
    learning_rate: float | None = None,
    max_tokens: int = 256,
    lora: bool = False,
    seed: int = 0,
    allow_inexact: bool = False,
    ready: Callable[[str], None] = lambda text: None,
) -> None:
    """Serves until it is cancelled. ready: told once, in words, where. Raises ConfigError and MissingExtra."""
    from ..local.adapter import LocalGRPOAdapter
    from ..local.config import LocalGRPOConfig

    if not is_here(host) or host in ("0.0.0.0", "::"):
        raise ConfigError(
            f"host is {host!r}; expected an address of this machine alone, such as 127.0.0.1: there is no key."
        )
    if folder is not None and await in_daemon_thread(_is_filled, folder):
        raise ConfigError(
            f"{folder} is not empty. Name another folder with --out; --model {folder}/0001, say, continues from a model in it."
        )
    values = {"model": model, **({"lora": {}} if lora else {})}
    adapter = LocalGRPOAdapter(LocalGRPOConfig.model_validate(values), seed=seed)
    await in_daemon_thread(lambda: adapter.policy)
    server = ArtServer(adapter, folder, learning_rate, SamplingParams(max_tokens=max_tokens), allow_inexact)
    server.address = (host, HEALTH_PORT)
    http = http_server(server)
    try:
        for each in dict.fromkeys((port, HEALTH_PORT)):
            try:
                http.add_sockets(bind_sockets(each, host))
            except OSError as error:
                why = " The Toolkit's plugin asks it whatever its config says." if each == HEALTH_PORT else ""
                raise ConfigError(f"port {each} of {host} cannot be had: {error.strerror}.{why} Free it.") from error
        ready(
            f"{model!r} is trained at http://{host}:{port} (trainer_adapters.*.backend: ip {host}, port {port}) and asked at "
            f"http://{host}:{HEALTH_PORT}/v1 (llms.*.base_url)"
        )
        await asyncio.Event().wait()
    finally:
        http.stop()
        await http.close_all_connections()
        await adapter.aclose()
