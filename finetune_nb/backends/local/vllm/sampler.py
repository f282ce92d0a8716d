"""VLLMSampler: replies of a policy, sampled by a vLLM server with the weights that are trained here.

The policy renders and trains. The server gets token ids, and gives token ids and the log probability of each. Before a reply is
asked for, the server is up, is known to be the right one, and has the newest weights.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ....errors import BackendError, ConfigError
from ....redaction import redacting_logger
from ....threads import in_daemon_thread, interpreter_exiting, start_daemon
from ....types import EpisodeKey, Sample, SamplingParams
from ..lora import is_lora, settings_of
from ..models import ADAPTER_CONFIG, EMBEDDED, no_progress_bars, write
from ..scoring import score
from .adapters import ServedAdapters
from .client import ServerGone, VLLMClient, message_of, require_aiohttp, says_dead
from .config import VLLMConfig
from .process import VLLMProcess
from .proof import prove
from .replies import check_params, request_for, sample_in
from .weights import ServedWeights

if TYPE_CHECKING:
    from ..policy import LocalPolicy

__all__ = ["VLLMSampler"]

logger = redacting_logger(__name__)

MOST_STARTS, STARTS_SECONDS = 3, 3600.0
"""A server of our own is started so often in so many seconds."""
MOST_LOST = 3
"""How often one request is sent again after the server has lost its adapter, or has ended."""
BUSY_SECONDS = (0.1, 5.0)
"""What is waited before a full server is asked again: it doubles from the first to the second."""
PROOFS = 2
"""Versions of the weights that are compared on each server: a fresh adapter changes nothing, so the second one shows that it is
applied."""
BUSY = (429, 502, 503, 504)
KEPT_SECONDS = 0.2
"""How often it is looked whether a lost version is there again."""


class KeptVersion(NamedTuple):
    """A version of the weights that is sampled while newer ones are made."""

    version: int
    weights_id: Any
    name: str
    """What the server calls it."""


class VLLMSampler:
    """Takes the place of a policy's own sampling: see `LocalPolicy.sampler`.

    Args:
        policy: What is trained: a LoRA adapter, or all weights.
        config: The server's settings.
        process: A server of our own; None for one that runs.
        folder: Where trained weights are written, which the server reads.
    """

    def __init__(self, policy: LocalPolicy, config: VLLMConfig, process: VLLMProcess | None, folder: Path) -> None:
        self.policy, self.config, self.process = policy, config, process
        self.lora = is_lora(policy.model)
        self.served = ServedAdapters(folder) if self.lora else ServedWeights(folder)
        """The trained weights, as the server has them."""
        self.temporary: Path | None = None
        """A folder that is deleted at the end."""
        self.tell: Callable[[str | None], None] = lambda text: None
        self._kept: KeptVersion | None = None
        self._client: VLLMClient | None = None
        self._base = ""  # what the server that was compared calls the base model
        self._checked = False  # whether nothing has happened since that speaks against that server
        self._proofs = 0
        self._starts: list[float] = []
        self._longest = policy.longest
        self._lock = threading.Lock()
        self._preparing: Future[None] | None = None
        self._awake = threading.Event()
        self._awake.set()
        self._closed = False

    @classmethod
    def of(
        cls,
        policy: LocalPolicy,
        config: VLLMConfig,
        run_folder: Path | None = None,
        tell: Callable[[str | None], None] = lambda text: None,
    ) -> VLLMSampler:
        """Has a server sample that policy. It is started, or asked, by `prepare` or by the first reply.

        Args:
            policy: What is trained.
            config: The server's settings.
            run_folder: Where the server's log goes, and adapters unless `config.folder` says otherwise. None: a temporary folder.
            tell: Told what a run has to wait for, in words; None: nothing any more.

        Raises:
            ConfigError: The model cannot be served, or there is no vLLM in the environment that the settings name.
            MissingExtra: aiohttp is not installed.
        """
        require_aiohttp()
        folder = Path(tempfile.mkdtemp(prefix="finetune_nb-")) if run_folder is None else run_folder
        place, process = folder.absolute() / "vllm", None
        try:
            if config.url is None:
                rank = settings_of(policy.model)["lora"]["rank"] if is_lora(policy.model) else None
                process = VLLMProcess(config, _served_model(policy), rank, config.dtype or policy.dtype, place)
                if process.cpu and policy.source == "embedded":
                    raise ConfigError(
                        "vLLM cannot serve the embedded model on a CPU: it has no kernel for attention heads of 16. Name a real "
                        "model, or leave sampler out."
                    )
        except BaseException:
            if run_folder is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        sampler = cls(policy, config, process, config.folder or place)
        sampler.tell = tell
        sampler.temporary = folder if run_folder is None else None
        policy.sampler = sampler
        return sampler

    @property
    def description(self) -> str:
        """Where replies are sampled, in words."""
        if self.process is None:
            return f"sampled by vLLM at {self.config.root}"
        return f"sampled by vLLM, a server of its own on the {'CPU' if self.process.cpu else 'GPU'}"

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        """Nothing waits for others: the server batches requests as they come."""
        return nullcontext()

    # ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def submit(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        """One reply with the newest weights, or with those of a version that is kept. A request that the server lost, because it
        ended or forgot the adapter, is sent again.

        Raises:
            BackendError: The server cannot be reached, or is full, for `patience` seconds; it is too slow, refuses the
                request, or was told to give it up.
            ConfigError: It does not sample this model as it is trained; the message names the option that is missing.
        """
        check_params(params)
        ids, vocabulary = list(ids), self.policy.vocabulary
        body = request_for(ids, params, seed, self.policy.end_ids)
        if params.reply_format is not None:
            if version is not None:
                raise ConfigError(
                    "a reply that is held to a form is asked for while a job trains; its log probabilities are computed by the "
                    "model that is trained, which has other weights by then. Set max_staleness to 0, or leave the form out."
                )
            grammar = await in_daemon_thread(self.policy.reply_guides.grammar, params.reply_format, ids)
            body["structured_outputs"] = {"grammar": grammar}
        lost, pause, deadline = 0, BUSY_SECONDS[0], None
        while True:
            name = await (self._name() if version is None else self._name_of_kept(version))
            try:
                status, answer = await self._asked(name, body)
            except ServerGone as gone:
                status, answer = 0, str(gone)
            if status == 200:
                sample = sample_in(answer, name, ids, params, vocabulary)
                return sample if params.reply_format is None else await self._scored(sample, ids, params)
            said = message_of(answer)
            if status == 404 and name in said:  # it was started anew, or somebody unloaded the adapter
                if self.served.forget_name(name):
                    self._checked = False
            elif status == 0 or says_dead(answer):
                self._checked = False
            elif status in BUSY:
                deadline = deadline or time.monotonic() + self.config.patience
                if time.monotonic() + pause > deadline:
                    raise BackendError(
                        f"the vLLM server was full for {self.config.patience:g} s ({status}: {said}). Run fewer rollouts at once "
                        "(max_concurrency), raise the server's --max-num-queued-reqs, or raise sampler.patience."
                    )
                await asyncio.sleep(pause)
                pause = min(2 * pause, BUSY_SECONDS[1])
                continue
            else:
                raise BackendError(f"the vLLM server refuses a request ({status}: {said})")
            lost += 1
            if lost > MOST_LOST:
                where = "See its log." if self.process is None else f"Its log: {self.process.log}"
                raise BackendError(f"the vLLM server has lost a request {lost} times ({said}). {where}")

    async def _asked(self, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        client, seconds = self._client, self.config.request_timeout
        assert client is not None  # a name was given, and so there is a server
        with self.served.under_way.asking(name):
            try:
                return await client.complete({**body, "model": name}, seconds)
            except TimeoutError:
                raise BackendError(
                    f"the vLLM server gave no reply within {seconds:g} s (sampler.request_timeout). Give it more time, fewer "
                    "rollouts at once (max_concurrency), or shorter replies (max_tokens)."
                ) from None

    async def _scored(self, sample: Sample, ids: list[int], params: SamplingParams) -> Sample:
        """With the model's own log probabilities: those of a reply that is held to a form are of what the form leaves."""

        def scored() -> list[float]:
            with self.policy.exclusive.hold(self._is_over):
                return score(self.policy.model, ids, sample.ids, (params.temperature or 1.0,))[0]

        return sample._replace(logprobs=await in_daemon_thread(scored), likeliest=None)

    # ── the server has the newest weights ────────────────────────────────────────────────────────────────────────────

    async def _name(self) -> str:
        """What the server calls the newest weights, once it has them."""
        while True:
            name = self.served.name_of(self.policy.weights_id)
            if name is not None and self._checked and self._awake.is_set():
                return name
            try:
                await asyncio.wrap_future(self._prepared())
            except (BackendError, ConfigError) as error:
                # One of its own for each caller: one that is raised in many tasks would gather all their tracebacks.
                raise type(error)(*error.args) from None

    async def _name_of_kept(self, version: int) -> str:
        """What the server calls the version that is kept, once it has it."""
        kept = self._kept
        if kept is None or kept.version != version:
            raise BackendError(
                f"replies of policy version {version} are asked for, and the vLLM server keeps "
                f"{'none' if kept is None else f'version {kept.version}'}. Run the epoch again."
            )
        while True:
            if self._checked and self._awake.is_set() and self.served.name_of(kept.weights_id) == kept.name:
                return kept.name
            preparing = asyncio.wrap_future(self._prepared())
            # Newest weights that are missing, too, are there only when the job at work has ended. Nobody here waits for those.
            ended, _ = await asyncio.wait([preparing], timeout=KEPT_SECONDS)
            for each in ended:
                if isinstance(error := each.exception(), BackendError | ConfigError):
                    raise type(error)(*error.args) from None

    def keep(self, version: int) -> None:
        """Keeps the weights as they are now, which have that version, on the server until another version is kept. Called when
        no job is at work. Blocks; raises as `submit`."""
        while True:
            self.prepare()
            weights_id = self.policy.weights_id
            name = self.served.name_of(weights_id)
            if name is not None:
                break
        self._kept = KeptVersion(version, weights_id, name)
        if isinstance(self.served, ServedAdapters):
            self.served.pinned = name

    def prepare(self) -> None:
        """Waits until the server is up and has the newest weights. Blocks; raises as `submit`."""
        self._prepared().result()

    def _prepared(self) -> Future[None]:
        """Done when the server is up and has the newest weights; one thread sees to it for all who wait."""
        with self._lock:
            if self._preparing is None or self._preparing.done():
                future = self._preparing = Future[None]()
                future.set_running_or_notify_cancel()  # so that a waiter who is cancelled does not end it for the others

                def work() -> None:
                    try:
                        self._prepare_again()
                    except BaseException as error:
                        known = isinstance(error, BackendError | ConfigError)
                        future.set_exception(error.with_traceback(None) if known else BackendError(f"vLLM: {error}"))
                    else:
                        future.set_result(None)

                start_daemon(work, "finetune_nb vllm", self._awake.set)
            return self._preparing

    def _prepare_again(self) -> None:
        """As `_prepare`, also where the server ends in the meantime."""
        try:
            for attempt in range(MOST_LOST):
                try:
                    self._prepare()
                    return
                except ServerGone:
                    self._checked = False
                    if attempt == MOST_LOST - 1:
                        raise
        finally:
            self.tell(None)

    def _prepare(self) -> None:
        while not self._awake.wait(0.5):
            self._require_open()
        if self.served.name_of(self.policy.weights_id) is None:
            self._checked = False  # it may have been started anew since the last epoch, with another model
        client, kept = self._up(), self._kept
        if (
            kept is not None
            and self.served.name_of(kept.weights_id) is None
            and isinstance(self.served, ServedAdapters)
        ):
            self.served.load_again(client, kept.weights_id, kept.name)
        if self.served.name_of(self.policy.weights_id) is not None:
            return
        started = time.perf_counter()
        with self.policy.exclusive.hold(self._is_over) as alone:
            if not alone:
                self._require_open()
            weights_id, version = self.policy.weights_id, self.policy.version
            try:
                name = self.served.load(client, self._base, weights_id, self._save, self._is_over)
            except ServerGone:
                raise
            except BackendError:
                if self.process is not None and not self.lora:
                    self.process.stop()  # it has no weights any more
                raise
        if self._proofs < PROOFS or not self.lora:
            try:
                self._prove(client, name, adapted=True)
            except BaseException:
                self.served.drop(client, name)
                raise
            self._proofs += 1
        self.served.take(weights_id, name)
        logger.info("vLLM has policy version %d after %.2f s", version, time.perf_counter() - started)
        self.served.clean(client)

    def _save(self, directory: Path) -> None:
        model = self.policy.model
        if self.lora:
            model.save_pretrained(directory, save_embedding_layers=False)
        else:
            with no_progress_bars():
                write(model, directory, model.dtype, False, {})

    def _up(self) -> VLLMClient:
        """A server that answers and was found to be the right one; one of our own is started if none runs."""
        self._require_open()
        if self._client is not None and self._checked and (self.process is None or self.process.running):
            return self._client
        client = self._reached() if self.process is None else self._started(self.process)
        base, longest = _base_of(client)
        bounds = [bound for bound in (self._longest, longest) if bound is not None]
        self.policy.longest = min(bounds, default=None)
        if base != self._base and self.lora:  # without an adapter, only the weights that are loaded next are known here
            self.tell("vLLM answers its first request, which takes long")
            self._prove(client, base, adapted=False)
        self._client, self._base, self._checked = client, base, True
        return client

    def _prove(self, client: VLLMClient, name: str, adapted: bool) -> None:
        try:
            dtype = self.config.dtype or self.policy.dtype
            prove(client, self.policy, name, adapted, dtype, self.config.startup_seconds, self._is_over)
        except ConfigError:
            raise
        except BackendError as error:
            if self.process is None or not self.process.has_failed():
                raise
            # One that has replied before is started again; one that ends with its first reply would do it every time.
            replied = self._proofs > 0 or (adapted and self.lora)  # an adapter is compared after its base
            kind = ServerGone if replied else BackendError
            raise kind(self.process.death()) from error

    def _started(self, process: VLLMProcess) -> VLLMClient:
        """A server of our own that serves."""
        if self._client is not None:
            if process.running and _is_healthy(self._client):
                return self._client
            process.stop()
            logger.warning("%s. It is started again.", process.death())
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < STARTS_SECONDS]
        if len(self._starts) >= MOST_STARTS:
            raise BackendError(
                f"{process.death(f'has ended {MOST_STARTS} times in {STARTS_SECONDS / 60:g} minutes')}. Mend the cause, then "
                "open the run again: nothing that was trained is lost."
            )
        self._starts.append(now)
        self._lost_all()
        client = process.start()
        process.wait(client, self._is_over, self.tell)
        return client

    def _reached(self) -> VLLMClient:
        """The server that runs, once it answers: it may be starting again."""
        client = self._client
        if client is None:
            key = self.config.api_key
            client = VLLMClient(str(self.config.root), None if key is None else key.get_secret_value())
        deadline = time.monotonic() + self.config.patience
        while True:
            try:
                served = {model.get("id") for model in client.models()}
                break
            except ServerGone as gone:
                if time.monotonic() > deadline:
                    raise BackendError(
                        f"{gone} for {self.config.patience:g} s (sampler.patience). Start it, then run the epoch again: nothing "
                        "that was trained is lost."
                    ) from gone
                self.tell(f"waiting for the vLLM server at {client.root}")
                self._require_open()
                time.sleep(0.1)
        if not self.served.names & served:
            self._lost_all()
        return client

    def _lost_all(self) -> None:
        """The server may be another one: it has none of our adapters."""
        self.served.forget()
        self._proofs, self._base = 0, ""

    # ── memory, and the end ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, the server gives its memory to whoever trains, if it was asked to (`sleep`)."""
        client = self._client
        if not self.config.sleep or client is None:
            yield
            return
        self._awake.clear()
        try:
            while len(self.served.under_way) and not self._is_over():
                time.sleep(0.02)
            self._switch(client, "/sleep?level=1")
            try:
                yield
            finally:
                self._switch(client, "/wake_up")
        finally:
            self._awake.set()

    def _switch(self, client: VLLMClient, path: str) -> None:
        try:
            status, answer = client.ask("POST", path, timeout=300.0)
        except ServerGone:
            self._checked = False
            return
        if status in (404, 405):
            raise ConfigError(
                f"the vLLM server at {client.root} cannot sleep ({status}). Start it with --enable-sleep-mode and the "
                "environment variable VLLM_SERVER_DEV_MODE=1, or leave sampler.sleep out."
            )
        if status != 200:
            raise BackendError(f"the vLLM server answers {path} with {status}: {message_of(answer)}")

    async def aclose(self) -> None:
        """Ends a server of our own, and takes the adapters off one that runs."""
        self._closed = True
        self._awake.set()
        preparing, client = self._preparing, self._client
        if preparing is not None and not preparing.done():
            await asyncio.wait([asyncio.wrap_future(preparing)], timeout=30.0)
        if client is not None:
            await client.aclose()
        await in_daemon_thread(self._end)

    def _end(self) -> None:
        if self.process is not None:
            self.process.stop()
        self.served.close(self._client if self.process is None else None)
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _is_over(self) -> bool:
        return self._closed or interpreter_exiting.is_set()

    def _require_open(self) -> None:
        if self._is_over():
            raise BackendError("the vLLM server is not asked any more: the run is closed")


def _served_model(policy: LocalPolicy) -> str:
    """The base model's directory or name, as a server on this machine reads it. Raises ConfigError where it has none."""
    source = str(EMBEDDED) if policy.source == "embedded" else policy.source
    if source is None:
        raise ConfigError(
            "the policy was made of a model in memory, which no server can load. Load it from a directory, or give the url of a "
            "server that has it."
        )
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"model is {source!r}, an adapter, which was added to its model's weights; expected a whole model, which a server "
            "can load. Save it with merge=True, and name that directory."
        )
    return source


def _base_of(client: VLLMClient) -> tuple[str, int | None]:
    """What a server calls its base model, and the tokens that it holds. Raises BackendError where it has none."""
    for model in client.models():
        if model.get("parent") is None and isinstance(model.get("id"), str):
            longest = model.get("max_model_len")
            return model["id"], longest if isinstance(longest, int) else None
    raise BackendError(
        f"the vLLM server at {client.root} serves no model. Start it with the one that is trained: vllm serve MODEL."
    )


def _is_healthy(client: VLLMClient) -> bool:
    try:
        return client.ask("GET", "/health", timeout=10.0)[0] == 200
    except ServerGone:
        return False
