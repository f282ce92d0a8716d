"""A Tinker-compatible service as this backend uses it: one session, one model in training, one sampler of its weights.

Calls block, for threads that may wait. Weights live on the service alone, so this module also knows which of its saved states
holds which policy version, and never continues with another one.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

from ...errors import BackendError, ConfigError, did_you_mean
from ...redaction import redact_text, redacting_logger, remember_secret
from .config import TinkerConfig
from .errors import Full, Gone, Lost, Refused, Unavailable, sdk, sorted_error
from .rest import REACH_SECONDS, ServiceRest, is_hosted
from .slots import HeldSlot, dead_models
from .turns import Turns

__all__ = ["TinkerService"]

logger = redacting_logger(__name__)

TELLING_SECONDS = 30.0
"""For so long at most the SDK tells the service of an error before it raises it; without its connection it would wait all
of it."""
PARTING_SECONDS = 3.0
"""In which a service must answer once the adapter is closed."""
SLOT_SECONDS = 5.0
"""Between two attempts to get an adapter slot."""


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
        self.tell: Callable[[str | None], None] = lambda text: None
        """Told what a run has to wait for, in words; None: nothing any more."""
        self.takes_weights = not is_hosted(self.config.service_url())
        """Whether a Datum may have weights for its tokens. Thinking Machines' service knows none; found out of others."""
        self.hinted = False
        """Whether it was said how the service seems to reduce losses."""
        self.turns = Turns()
        self.closing = threading.Event()
        """Set: whoever waits for the service gives up."""
        self._why_paused: str | None = None
        self._lock = threading.RLock()
        self._client: Any = None
        self._model: Any = None
        self._samplers: dict[int, Any] = {}  # by policy version; the newest, and the one that is kept
        self._kept: int | None = None
        self._saved: tuple[str | None, int] = (None, 0)  # state and its policy version; None: as a fresh model is
        self._unnamed: set[str] = set()  # states that no checkpoint names
        self._lost: tuple[str, Lost] | None = None  # a state that is not there any more
        self._held: HeldSlot | None = None

    # ── the session ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def shares_weights(self) -> bool:
        """Whether a sampler may see the weights of a job that is under way, so that the two take turns."""
        return not self.config.samples_while_training()

    def rest(self) -> ServiceRest:
        """What the SDK does not reach. Raises ConfigError without a key."""
        # Who closes a run waits for some seconds only.
        return ServiceRest(*self._address(), PARTING_SECONDS if self.closing.is_set() else REACH_SECONDS)

    def connect(self) -> Any:
        """The SDK's client, once the service is known to be there and to offer the model.

        Raises MissingExtra, ConfigError without a key, and BackendError.
        """
        with self._lock:
            if self._client is None:
                tinker = sdk()
                url, key = self._address()
                if url is not None:
                    self.rest().reach()
                what = f"connecting to {url or 'the Tinker service'}"
                try:
                    client = tinker.ServiceClient(base_url=url, api_key=key)
                    offered = self._offered(client, what)
                except Exception as error:
                    raise sorted_error(error, what) from error
                models = {model.model_name: model.max_context_length for model in offered if model.model_name}
                if models and self.config.model not in models:
                    known = did_you_mean(self.config.model, models)
                    raise Refused(f"the service at {url} has no model {self.config.model!r}. {known}")
                self.longest = self.config.context_length or models.get(self.config.model) or self._length_of_base()
                self._client = client
            return self._client

    def _offered(self, client: Any, what: str) -> Any:
        """The models that the service offers."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # newer SDKs ask by a RestClient, older ones have none that does
            return self._value(client.get_server_capabilities(), what).supported_models

    def _length_of_base(self) -> int | None:
        """Tokens that the base model holds, by its config on this machine; None where it is not here, or does not say."""
        try:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(self.config.base or self.config.model, local_files_only=True)
            length = getattr(config.get_text_config(), "max_position_embeddings", None)
        except Exception as error:  # of many kinds: no such folder, no such architecture, files that cannot be read
            logger.info("how many tokens %r holds is not known here: %s", self.config.model, error)
            length = None
        if not isinstance(length, int) or length < 1:
            logger.warning(
                "neither the service nor this machine knows how many tokens %r holds, so longer prompts cannot be refused. Set "
                "context_length of the trainer adapter, or base to a copy of the model.", self.config.model,
            )  # fmt: skip
            return None
        return length

    def _address(self) -> tuple[str | None, str]:
        url = self.config.service_url()
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

    def probe(self) -> None:
        """Samples one token from the base model: an SDK and a service that do not understand each other are found out
        before any rollout. A service that samples from models in training only is taken to be well."""
        tinker, client = sdk(), self.connect()
        what = "sampling one token"
        try:
            try:
                sampler = self._value(client.create_sampling_client(base_model=self.config.model), what)
            except Exception as error:
                raise sorted_error(error, what) from error
            _allow_missing_ids(sampler)
            prompt = tinker.ModelInput.from_ints([0])
            self.result(sampler.sample(prompt, 1, tinker.SamplingParams(max_tokens=1)), what)
        except Refused as error:
            logger.info("the base model cannot be sampled, which training does not need: %s", error)

    # ── the model in training ────────────────────────────────────────────────────────────────────────────────────────

    def begin_from(self, state: str | None, version: int) -> None:
        """From now on the model in training is the saved `state` (None: a fresh one), which has that policy version."""
        with self._lock:
            self.drop()
            self._saved, self._lost = (state, version), None

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
        if self._lost is not None and self._lost[0] == state:
            raise self._lost[1]
        client = self.connect()
        url = self.rest().url
        # Slots that dead processes of this machine still hold.
        for model in dead_models(url):
            self._courtesy(lambda model=model: self._leave(model), f"model {model} of a process that has ended")
        model = self._create(client)
        self._held = HeldSlot(url, str(model.model_id))
        observer = getattr(model, "_queue_state_logger", None)
        if observer is not None:  # the SDK has no public way to hear of it
            model._queue_state_logger = _Pauses(observer, lambda why: setattr(self, "_why_paused", why))
        if state is not None:
            try:
                self._load(model, state)
            except BaseException:
                self._unload(model)
                raise
        return model

    def _create(self, client: Any) -> Any:
        """A fresh model; waits for a slot where all are held. Raises BackendError."""
        config, what = self.config, f"putting {self.config.model!r} into training"
        began, told = time.monotonic(), False
        try:
            while True:
                try:
                    made = client.create_lora_training_client(
                        base_model=config.model, rank=config.rank, seed=self.seed % 2**31
                    )
                    return self._value(made, what)
                except Exception as error:
                    full = sorted_error(error, what)
                    if not isinstance(full, Full):
                        raise full from error
                waited = time.monotonic() - began
                if waited >= config.slot_timeout or self.closing.is_set():
                    raise Full(f"{full} Waited {waited:.0f} s for one (slot_timeout).") from full
                why = f"all adapter slots of the service are held; waiting for one since {waited:.0f} s"
                if not told:
                    logger.warning("%s (slot_timeout: %g s)", why, config.slot_timeout)
                    told = True
                self.tell(why)
                self.paused(why)
                self.closing.wait(min(SLOT_SECONDS, config.slot_timeout - waited))
        finally:
            self.tell(None)

    def _load(self, model: Any, state: str) -> None:
        """Raises BackendError; Lost where the state is gone for good, which is then known."""
        what = f"loading the saved state {state}"
        try:
            with warnings.catch_warnings():
                # The call that replaces this one in newer SDKs makes a request that SkyRL's server does not know.
                warnings.simplefilter("ignore", FutureWarning)
                future = model.load_state_with_optimizer(
                    state
                )  # the first request of a model, or the service refuses it
            self.result(future, what)
        except Exception as error:
            found = sorted_error(error, what)
            if isinstance(found, Lost):
                found = Lost(
                    f"{found}. The service no longer has what that checkpoint names, and nothing else has. Continue from an "
                    "older checkpoint (run.fork), or start a new run."
                )
                self._lost = (state, found)
            raise found from error

    def save(self, name: str, version: int) -> str:
        """The saved state of the weights that have that policy version, and of their optimizer, for a checkpoint that names
        it. Saves where none is."""
        with self._lock:
            state = self._save(name, version)
            self._unnamed.discard(state)
            return state

    def _save(self, name: str, version: int) -> str:
        state, saved_version = self._saved
        if state is not None and saved_version == version:
            return state
        what = f"saving the weights as {name!r}"
        try:
            future = self.model(version).save_state(name, ttl_seconds=self.config.state_ttl)
        except Exception as error:
            raise sorted_error(error, what) from error
        new = str(self.result(future, what).path)
        self._saved = (new, version)
        self._unnamed.add(new)
        if state is not None and state in self._unnamed:
            self._unnamed.discard(state)
            self._courtesy(lambda: self.rest().delete(state), f"the saved state {state}")
        return new

    def forget(self, state: str) -> None:
        """Deletes a saved state that no checkpoint names any more; while training would continue from it, it stays. Raises
        BackendError where the service cannot be asked."""
        with self._lock:
            if state == self._saved[0] and not self.closing.is_set():
                self._unnamed.add(state)
                return
        self.rest().delete(state)

    def keep(self, name: str, version: int) -> None:
        """Sees to it that `drop` can go back to that policy version."""
        with self._lock:
            if self._saved[1] != version:
                self._save(name, version)

    def sampler(self, version: int) -> Any:
        """The SDK's sampling client of the weights that have that policy version."""
        with self._lock:
            if version not in self._samplers:
                model, what = self.model(version), "putting the weights up for sampling"
                old = self._archives(model) if self.shares_weights else []
                try:
                    sampler = self._value(model.save_weights_and_get_sampling_client(), what)
                except Exception as error:
                    found = sorted_error(error, what)
                    if isinstance(found, Gone) and self._saved[1] == version:
                        self.drop(TELLING_SECONDS)  # the next attempt opens the saved state
                    raise found from error
                _allow_missing_ids(sampler)
                kept = {number: each for number, each in self._samplers.items() if number == self._kept}
                self._samplers = {**kept, version: sampler}
                self._delete_archives(model, old)
            return self._samplers[version]

    def archive(self, name: str, version: int, place: Path, longest: int) -> None:
        """Writes an archive of the weights that have that policy version to `place`. Raises BackendError, also where it has more
        than `longest` bytes."""
        with self._lock:
            model, what = self.model(version), f"saving the weights as {name!r}"
            try:
                self.result(model.save_weights_for_sampler(name, ttl_seconds=self.config.state_ttl), what)
            except Exception as error:
                raise sorted_error(error, what) from error
            path = f"tinker://{model.model_id}/sampler_weights/{name}"
        try:
            self.rest().download(path, place, longest)
        finally:
            self._courtesy(lambda: self.rest().delete(path), f"the archive {path}")

    def _archives(self, model: Any) -> list[str]:
        """The names of what was put up for sampling of a model before now."""
        found: list[str] = []
        self._courtesy(
            lambda: found.extend(self.rest().archives(str(model.model_id))), f"the archives of model {model.model_id}"
        )
        return found

    def _delete_archives(self, model: Any, names: list[str]) -> None:
        for name in names:
            path = f"tinker://{model.model_id}/sampler_weights/{name}"
            self._courtesy(lambda path=path: self.rest().delete(path), f"the archive {path}")

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
        """What the SDK's future gives. Raises what `sorted_error` makes of its error, and Unavailable after `step_timeout`."""
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

    def _value(self, given: Any, what: str) -> Any:
        """What older SDKs return themselves, and newer ones return a future of."""
        return self.result(given, what) if hasattr(given, "result") else given

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
                self._unload(model)
            for holder in (getattr(client, name, None) for name in ("_session_holder", "_rest_holder")):
                if holder is not None:
                    # Ends the heartbeat, so that the service ends the session too.
                    timer = threading.Timer(lingering, holder.close)
                    timer.daemon = True
                    timer.start()

    def _unload(self, model: Any) -> None:
        held, self._held = self._held, None
        self._courtesy(lambda: self._leave(str(model.model_id)), f"model {model.model_id}")
        if held is not None:
            held.forget()

    def _leave(self, model: str) -> None:
        """Gives a model's adapter slot back, and deletes what was put up for sampling of it."""
        rest = self.rest()
        rest.unload(model)
        if self.shares_weights:
            for name in rest.archives(model):
                rest.delete(f"tinker://{model}/sampler_weights/{name}")

    def _courtesy(self, ask: Callable[[], Any], of_what: str) -> None:
        """Asks the service to let go of something. Nothing depends on it: what a service keeps is in nobody's way for long."""
        try:
            ask()
        except Lost:
            pass  # it has let go already
        except BackendError as error:
            logger.info("%s is left to the service: %s", of_what, error)

    def close(self) -> None:
        """Ends the session; whoever waits for the service gives up."""
        self.closing.set()
        with self._lock:
            self.drop()
            for state in sorted(self._unnamed):
                self._courtesy(lambda state=state: self.rest().delete(state), f"the saved state {state}")
            self._unnamed.clear()


def _allow_missing_ids(sampler: Any) -> None:
    """Lets an SDK from 0.27 on sample from a service that gives its replies no ids, such as SkyRL's: they would name what the
    service recorded of a reply, which nothing here asks for, but the SDK insists on them."""
    send = getattr(sampler, "_send_asample_request", None)
    if send is None:
        return

    async def send_with_ids(request_id: int, num_samples: int, *args: Any) -> Any:
        promise = await send(request_id, num_samples, *args)
        if promise is not None and getattr(promise, "sample_sequence_ids", ()) is None:
            promise = promise.model_copy(update={"sample_sequence_ids": [""] * num_samples})
        return promise

    sampler._send_asample_request = send_with_ids


class _Pauses:
    """Hears of the service's queue as the SDK's own logger does, and passes it on."""

    def __init__(self, logger: Any, paused: Callable[[str], None]) -> None:
        self._logger, self._paused = logger, paused

    def on_queue_state_change(self, queue_state: Any, queue_state_reason: str | None) -> None:
        state = getattr(queue_state, "value", str(queue_state))
        if state != "active":
            self._paused(redact_text(f"the service lets it wait ({state}: {queue_state_reason or 'no reason given'})"))
        self._logger.on_queue_state_change(queue_state, queue_state_reason)
