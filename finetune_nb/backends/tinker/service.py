"""A Tinker-compatible service as this backend uses it: one session, one model in training, one sampler of its weights.

Calls block, for threads that may wait. What goes wrong is sorted by what helps: `Refused` (change the request),
`Unavailable` (ask again later), `Gone` (begin a new session), `Misunderstood` (another version of the SDK). Weights live
on the service alone, so this module also knows which of its saved states holds which policy version, and never continues
with another one.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from typing import Any

from ...errors import BackendError, ConfigError, MissingExtra, did_you_mean
from ...redaction import redact_text, redacting_logger, remember_secret
from .config import TinkerConfig

__all__ = [
    "Gone",
    "Misunderstood",
    "Refused",
    "TESTED_SDK",
    "TinkerService",
    "Unavailable",
    "sdk",
    "sorted_error",
]

logger = redacting_logger(__name__)

TESTED_SDK = "0.24.1"
"""SDK 0.38.0 cannot sample from SkyRL's server, which itself pins this one at most."""
TELLING_SECONDS = 30.0
"""For so long at most the SDK tells the service of an error before it raises it; without its connection it would wait all
of it."""
REACH_SECONDS = 10.0
"""In which a service must answer that it is there. The SDK itself would keep knocking for five minutes."""


class Refused(BackendError):
    """The service does not do what it was asked for, however often it is asked."""


class Unavailable(BackendError):
    """The service failed, or did not answer; it may when it is asked again."""


class Gone(Unavailable):
    """The service has forgotten session, model or sampler, as it does when nobody has been heard of for minutes: this
    machine slept, or the service was started again."""


class Misunderstood(BackendError):
    """SDK and service do not understand each other."""


def sdk() -> Any:
    """The package `tinker`. Raises MissingExtra."""
    try:
        import tinker  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("the training backend tinker", "tinker") from error
    return tinker


class TinkerService:
    """seed: of the adapter's first weights.

    A model is opened when it is first needed: fresh, or from the saved state that `begin_from` names. After `drop` the next
    one is opened from the newest saved state, in a new session.
    """

    def __init__(self, config: TinkerConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.longest: int | None = None
        """Tokens that prompt and reply may have together, once connected; None where the service sets no bound."""
        self.paused: Callable[[str], None] = lambda why: None
        """Called by `result` when the service lets it wait in a queue."""
        self.closing = threading.Event()
        """Set: whoever waits for the service gives up."""
        self._why_paused: str | None = None
        self._lock = threading.RLock()
        self._client: Any = None
        self._model: Any = None
        self._samplers: dict[int, Any] = {}  # by policy version; the newest, and the one that is kept
        self._kept: int | None = None
        self._saved: tuple[str | None, int] = (None, 0)  # state and its policy version; None: as a fresh model is

    # ── the session ──────────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self) -> Any:
        """The SDK's client, once the service is known to be there and to offer the model.

        Raises MissingExtra, ConfigError without a key, and BackendError.
        """
        with self._lock:
            if self._client is None:
                tinker = sdk()
                url, key = self._address()
                self._reach(url, key)
                try:
                    client = tinker.ServiceClient(base_url=url, api_key=key)
                    offered = client.get_server_capabilities().supported_models
                except Exception as error:
                    raise sorted_error(error, f"connecting to {url or 'the Tinker service'}") from error
                models = {model.model_name: model.max_context_length for model in offered if model.model_name}
                if models and self.config.model not in models:
                    known = did_you_mean(self.config.model, models)
                    raise Refused(f"the service at {url} has no model {self.config.model!r}. {known}")
                self.longest = models.get(self.config.model)
                self._client = client
            return self._client

    def _address(self) -> tuple[str | None, str]:
        url = self.config.base_url or os.environ.get("TINKER_BASE_URL") or None
        given = self.config.api_key
        key = given.get_secret_value() if given is not None else os.environ.get("TINKER_API_KEY")
        if key:
            remember_secret(key)
        elif url is None:
            raise ConfigError(
                "the Tinker service wants a key: set TINKER_API_KEY, or api_key: ${TINKER_API_KEY} of the trainer adapter. "
                "For a server of your own set base_url."
            )
        return url, key or "tml-none"  # a server of one's own asks for none, but the SDK does

    def _reach(self, url: str | None, key: str) -> None:
        if url is None:
            return
        import httpx  # comes with the SDK

        try:
            httpx.get(f"{url.rstrip('/')}/api/v1/healthz", headers={"X-API-Key": key}, timeout=REACH_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"no Tinker service answers at {url}: {type(error).__name__}: {error}. Start it, or correct base_url."
            ) from error

    def probe(self) -> None:
        """Samples one token from the base model: an SDK and a service that do not understand each other are found out
        before any rollout. A service that samples from models in training only is taken to be well."""
        tinker, client = sdk(), self.connect()
        what = "sampling one token"
        try:
            try:
                sampler = client.create_sampling_client(base_model=self.config.model)
            except Exception as error:
                raise sorted_error(error, what) from error
            prompt = tinker.ModelInput.from_ints([0])
            self.result(sampler.sample(prompt, 1, tinker.SamplingParams(max_tokens=1)), what)
        except Refused as error:
            logger.info("the base model cannot be sampled, which training does not need: %s", error)

    # ── the model in training ────────────────────────────────────────────────────────────────────────────────────────

    def begin_from(self, state: str | None, version: int) -> None:
        """From now on the model in training is the saved `state` (None: a fresh one), which has that policy version."""
        with self._lock:
            self.drop()
            self._saved = (state, version)

    @property
    def saved(self) -> tuple[str | None, int]:
        """The newest saved state and its policy version; None: a fresh model's, which needs no saving."""
        return self._saved

    def model(self, version: int) -> Any:
        """The SDK's training client, whose weights have that policy version. Opens it if need be: that holds an adapter
        slot of the service until `drop` or `close`."""
        with self._lock:
            if self._model is None:
                state, saved_version = self._saved
                if saved_version != version:
                    raise BackendError(
                        f"the weights of policy version {version} are gone from the service; its newest saved state has "
                        f"version {saved_version}. Load a checkpoint to continue from there (Run: open it again)."
                    )
                self._model = self._open(state)
            return self._model

    def _open(self, state: str | None) -> Any:
        config, client = self.config, self.connect()
        try:
            model = client.create_lora_training_client(
                base_model=config.model, rank=config.rank, seed=self.seed % 2**31
            )
        except Exception as error:
            raise sorted_error(error, f"putting {config.model!r} into training") from error
        observer = getattr(model, "_queue_state_logger", None)
        if observer is not None:  # the SDK has no public way to hear of it
            model._queue_state_logger = _Pauses(observer, lambda why: setattr(self, "_why_paused", why))
        if state is not None:
            try:  # the first request of a model, or the service refuses it
                self.result(model.load_state_with_optimizer(state), f"loading the saved state {state}")
            except BackendError:
                self._unload(client, model)
                raise
        return model

    def save(self, name: str, version: int) -> str:
        """The saved state of the weights that have that policy version, and of their optimizer. Saves where none is."""
        with self._lock:
            state, saved_version = self._saved
            if state is None or saved_version != version:
                future = self.model(version).save_state(name, ttl_seconds=self.config.state_ttl)
                state = str(self.result(future, f"saving the weights as {name!r}").path)
                self._saved = (state, version)
            return state

    def keep(self, name: str, version: int) -> None:
        """Sees to it that `drop` can go back to that policy version."""
        if self._saved[1] != version:
            self.save(name, version)

    def sampler(self, version: int) -> Any:
        """The SDK's sampling client of the weights that have that policy version."""
        with self._lock:
            if version not in self._samplers:
                try:
                    sampler = self.model(version).save_weights_and_get_sampling_client()
                except BackendError:
                    raise
                except Exception as error:
                    raise sorted_error(error, "putting the weights up for sampling") from error
                kept = {old: each for old, each in self._samplers.items() if old == self._kept}
                self._samplers = {**kept, version: sampler}
            return self._samplers[version]

    def ready_sampler(self, version: int) -> Any:
        """The same where it is there already, else None; never waits."""
        return self._samplers.get(version)

    def keep_sampler(self, version: int) -> None:
        """Has the sampler of that policy version, and keeps it beside newer ones until another one is kept."""
        with self._lock:
            self._kept = version
            self.sampler(version)

    @property
    def kept_version(self) -> int | None:
        """The policy version whose sampler is kept."""
        return self._kept

    def revive(self, version: int, sampler: Any) -> None:
        """`sampler` is gone: forgets the session, where the weights of that policy version are saved to begin another one
        with. Several may find that out at once."""
        with self._lock:
            if self.ready_sampler(version) is sampler and self._saved[1] == version:
                logger.warning("the service has forgotten this session; going on from its saved state in a new one")
                self.drop(TELLING_SECONDS)

    def result(self, future: Any, what: str) -> Any:
        """What the SDK's future gives. Raises Refused, Unavailable (also after `step_timeout`) or Misunderstood."""
        pending = future.future() if hasattr(future, "future") else future
        deadline = time.monotonic() + self.config.step_timeout
        while not wait([pending], timeout=0.2).done:
            why, self._why_paused = self._why_paused, None
            if why:
                self.paused(why)
            if self.closing.is_set() or time.monotonic() > deadline:
                pending.cancel()
                why = "the adapter was closed" if self.closing.is_set() else "step_timeout"
                raise Unavailable(f"{what} has not ended after {self.config.step_timeout:g} s ({why})")
        try:
            return pending.result()
        except (Exception, CancelledError) as error:
            raise sorted_error(error, what) from error

    # ── letting go ───────────────────────────────────────────────────────────────────────────────────────────────────

    def drop(self, lingering: float = 0.0) -> None:
        """Forgets model, sampler and session: weights that were not saved are gone. lingering: seconds for which the
        session's connections stay for others who are at it."""
        with self._lock:
            client, model = self._client, self._model
            self._client = self._model = None
            self._samplers = {}
            if client is None:
                return
            if model is not None:
                self._unload(client, model)
            for holder in (getattr(client, name, None) for name in ("_session_holder", "_rest_holder")):
                if holder is not None:
                    # Ends the heartbeat, so that the service ends the session too.
                    timer = threading.Timer(lingering, holder.close)
                    timer.daemon = True
                    timer.start()

    def _unload(self, client: Any, model: Any) -> None:
        """Gives the model's adapter slot back at once; otherwise it is held until the session times out."""
        try:
            from tinker.lib.client_connection_pool_type import (  # pyright: ignore[reportMissingImports]
                ClientConnectionPoolType,
            )

            holder, request = client.holder, sdk().types.UnloadModelRequest(model_id=model.model_id)

            async def unload() -> None:
                with holder.aclient(ClientConnectionPoolType.TRAIN) as connection:
                    await connection.models.unload(request=request, timeout=REACH_SECONDS, max_retries=0)

            holder.run_coroutine_threadsafe(unload()).result(REACH_SECONDS)
        except Exception as error:  # it is a courtesy, and no part of the SDK's public face
            logger.info("model %s could not be unloaded (%s); its slot is free when its session has timed out",
                        getattr(model, "model_id", "?"), error)  # fmt: skip

    def close(self) -> None:
        """Ends the session; whoever waits for the service gives up."""
        self.closing.set()
        self.drop()


class _Pauses:
    """Hears of the service's queue as the SDK's own logger does, and passes it on."""

    def __init__(self, logger: Any, paused: Callable[[str], None]) -> None:
        self._logger, self._paused = logger, paused

    def on_queue_state_change(self, queue_state: Any, queue_state_reason: str | None) -> None:
        state = getattr(queue_state, "value", str(queue_state))
        if state != "active":
            self._paused(redact_text(f"the service lets it wait ({state}: {queue_state_reason or 'no reason given'})"))
        self._logger.on_queue_state_change(queue_state, queue_state_reason)


def sorted_error(error: BaseException, what: str) -> BackendError:
    """An error of the SDK as Refused, Unavailable or Misunderstood; one of ours stays."""
    if isinstance(error, BackendError):
        return error
    tinker = sdk()
    said = redact_text(f"{what}: {type(error).__name__}: {error}")
    status = getattr(error, "status_code", None)
    if isinstance(error, tinker.RequestFailedError):
        return Refused(said) if str(getattr(error, "category", "")) == "user" else Unavailable(said)
    if isinstance(error, tinker.APIStatusError) and isinstance(status, int):
        if status in (408, 409, 429) or status >= 500:
            return Unavailable(said)
        if status == 404:
            return Gone(said)
        if status in (401, 403):
            said += ". Check TINKER_API_KEY (api_key of the trainer adapter)."
        elif "adapter" in str(error).lower():
            said += ". Slots are held by other runs, and by dead ones until their session times out: wait, or end them."
        return Refused(said)
    if isinstance(error, tinker.APIConnectionError | TimeoutError | CancelledError):
        return Unavailable(said)
    if type(error).__name__ == "RetryableException":  # the service forgot the request
        return Unavailable(said)
    if re.search(r"status 404|[Mm]odel \S+ not loaded", str(error)):
        return Gone(said)
    if re.search(r"status 4\d\d", str(error)):  # how the SDK reports what it was answered in place of a result
        return Refused(said)
    return Misunderstood(
        f"{said}. Is this SDK (tinker {tinker.__version__}) one for that service? Tested is {TESTED_SDK}, the newest that "
        f'SkyRL\'s server takes: pip install "tinker=={TESTED_SDK}"'
    )
