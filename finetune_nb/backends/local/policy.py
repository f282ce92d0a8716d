"""LocalPolicy: any Hugging Face causal language model as the Policy that is sampled and trained."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ...llms.chat_tokenizer import ChatTokenizer, check_prompt
from ...llms.constrained import ReplyGuides
from ...store.durable import model_directory
from ...threads import in_daemon_thread, interpreter_exiting
from ...types import EpisodeKey, Sample, SamplingParams
from . import models
from .batching import Batcher, Request
from .config import LoRAConfig
from .families.kinds import batching_of
from .families.mending import mend
from .families.passes import Batching
from .lora import as_trained
from .replica import Replica, trained_weights, with_weights
from .sampling import SampleRequest, sample_batch
from .weights import dtype_name

__all__ = [
    "Exclusive",
    "LocalPolicy",
    "Sampler",
]


class Sampler(Protocol):
    """What a policy's replies are sampled by: its own model in this process, or a server that has its weights."""

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        """Entered for as long as a rollout lives."""
        ...

    async def submit(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        """One reply; the prompt and the parameters have been checked. version: of the weights; None: the newest. Raises
        BackendError where there are none of that version."""
        ...


class Exclusive:
    """`with exclusive.hold():` alone with the weights, on `threads` torch threads (None: torch's own setting)."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """True once alone; False if `given_up()` became true while waiting, and then nothing is held."""
        while not (held := self._lock.acquire(timeout=0.05)):
            if given_up():
                break
        if not held:
            yield False
            return
        try:
            with _torch_threads(self.threads):
                yield True
        finally:
            self._lock.release()


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    # Also where nothing changes: a thread that never set a count has the machine's, not the one that was set elsewhere.
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SMALL = 10_000_000
"""Weights below which one torch thread is used: operations are too short to share, and on a busy machine the threads of
so many short operations wait for each other most of the time (measured: up to forty times slower)."""


class LocalPolicy(ChatTokenizer):
    """Samples and renders for one model; its weights are shared with whoever trains it.

    deterministic: batches form by what the episodes do and never by the clock, so that a repeat is equal to the last
    digit. threads: torch threads while sampling or training; None: 1 for a small model, else 2 where deterministic and
    what torch is set to where not.
    """

    constrains = True
    """Replies are held to `SamplingParams.reply_format`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        deterministic: bool = False,
        threads: int | None = None,
        device: str = "auto",
        batching: Batching | None = None,
        record_entropy: bool = False,
    ) -> None:
        super().__init__(tokenizer, _end_ids(model, tokenizer), model.config.name_or_path or "the model")
        self.weights_id = 0
        """Another one whenever the weights may be others, also where they are put back to an older version."""
        self.version = 0
        self.device = device
        """As it was asked for: replicas look for theirs by it."""
        self.stored_dtype: Any = model.dtype
        """Of the model's files, and of those that `save` writes."""
        self.sampling_dtype: Any = model.dtype
        """Of the weights in sampling; another one where something else than this model samples."""
        self.source: str | None = None
        """The name or directory that `load` was given; None for a model that was handed over."""
        text_config = model.config.get_text_config()
        self.longest: int | None = getattr(text_config, "max_position_embeddings", None)
        """Tokens that prompt and reply may have together; None where the model sets no bound."""
        self.vocabulary: int = text_config.vocab_size
        """Tokens that the model knows; ids are below it."""
        self.model = model.eval()  # training too: dropout would make it see another policy than was sampled
        mend(self.model)
        if threads is None:
            threads = 1 if model.num_parameters() < SMALL else 2 if deterministic else None
        self.exclusive = Exclusive(threads)
        with self.exclusive.hold():
            self.batching: Batching = batching or batching_of(self.model)
            """How prompts of different lengths are sampled together; it depends on what the model's layers keep."""
        self.record_entropy = record_entropy
        """Whether samples have the entropy in the place of each token."""
        self.sampler: Sampler = Batcher(self._sample_batch, deterministic)
        self.reply_guides = ReplyGuides(self, self.vocabulary, self._end_ids)

    @classmethod
    def load(
        cls,
        name_or_dir: str | Path = "embedded",
        device: str = "auto",
        dtype: str = "auto",
        deterministic: bool = False,
        threads: int | None = None,
        lora: LoRAConfig | None = None,
        seed: int = 0,
    ) -> LocalPolicy:
        """A policy from a Hugging Face model directory or hub name, or "embedded" for the one that ships.

        device: a torch device; "auto": cuda, else mps, else cpu. dtype: a torch dtype's name; "auto": see
        `models.chosen_dtype`. lora: a fresh adapter, drawn by `seed`, is what is trained. Raises ConfigError where there
        is no such model, device or dtype.
        """
        model, tokenizer, stored_dtype = models.load(name_or_dir, device, dtype, lora, seed)
        policy = cls(model, tokenizer, deterministic=deterministic, threads=threads, device=device)
        policy.source, policy.stored_dtype = str(name_or_dir), stored_dtype
        return policy

    @property
    def version(self) -> int:
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self.weights_id += 1

    @property
    def dtype(self) -> str:
        """Of the weights in memory, such as "float32"; `save` writes them exactly in it."""
        return dtype_name(self.model)

    @property
    def description(self) -> str:
        """What is sampled and trained, where and in which dtype, in words."""
        what = f"{self.source or type(as_trained(self.model)).__name__}: {models.described(self.model, self.exclusive.threads)}"
        where = getattr(self.sampler, "description", None)
        return what if where is None else f"{what}; {where}"

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return self._end_ids

    # ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        """Entered for as long as a rollout lives: batches wait until every live episode waits for a reply."""
        return self.sampler.episode(key)

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        """One reply. The same ids, params, seed and weights give the same reply; the logprobs' last digits depend on the batch,
        too, unless the policy is deterministic. version: of the weights, see `TrainerAdapter.keep_sampling`; None: the newest.

        A reply is cut, with "length", where the model holds no more tokens. Raises BackendError for a prompt that is
        empty, too long or of unknown tokens, and where the model fails; ConfigError for a reply format that cannot be kept,
        and MissingExtra where the package for it is not installed.
        """
        ids = list(ids)
        params = check_prompt(ids, params, self.longest, self.vocabulary)
        if params.reply_format is not None:
            await in_daemon_thread(self.reply_guides.prepare, params.reply_format, ids)
        return await self.sampler.submit(ids, params, seed, version)

    def _sample_batch(self, batch: list[Request]) -> None:
        rows = [
            SampleRequest(
                r.ids, r.params, r.seed, r.future.cancelled, self.reply_guides.guide(r.params.reply_format, r.ids)
            )
            for r in batch
        ]
        with self.exclusive.hold(
            lambda: interpreter_exiting.is_set() or all(r.future.cancelled() for r in batch)
        ) as alone:
            asked = [row for row in rows if not row.gone()]
            if not alone or not asked:
                return
            sample_batch(
                self.model,
                asked,
                end_ids=self._end_ids,
                pad_id=self.tokenizer.pad_token_id or 0,
                text=functools.partial(self.tokenizer.decode, skip_special_tokens=False),
                stopped=interpreter_exiting.is_set,
                batching=self.batching,
                entropy=self.record_entropy,
            )
        for request, row in zip(batch, rows, strict=True):
            if row.ended is not None:
                request.settle(row.sample())

    # ── replicas in other processes ──────────────────────────────────────────────────────────────────────────────────

    def replica(self) -> Callable[[], LocalPolicy]:
        """Makes a replica elsewhere, without the trained weights. Waits for a batch at work. Raises ConfigError where a server
        samples: a replica would sample by itself."""
        if not isinstance(self.sampler, Batcher):
            raise ConfigError(
                "the policy is sampled by a server, and replicas of it would sample by themselves. Use engine='local', or leave "
                "sampler out."
            )
        with self.exclusive.hold():
            return functools.partial(_from_parts, Replica.of(self))

    def weights(self) -> tuple[int, int, Any]:
        """`weights_id`, `version`, and the trained weights for a replica's `take`. Waits for a batch at work."""
        with self.exclusive.hold():
            return self.weights_id, self.version, trained_weights(self.model)

    def take(self, weights: Any, version: int) -> None:
        """Samples from these weights from now on; a batch at work ends with the old ones."""
        with self.exclusive.hold():
            with_weights(self.model, weights)
            self.version = version

    def save(
        self,
        directory: str | Path,
        merge: bool = False,
        dtype: str | None = None,
        values: Callable[[], Mapping[str, Any]] = dict,
    ) -> Path:
        """Writes model and tokenizer; `from_pretrained` and `LocalPolicy.load` read them. Waits for a batch at work.

        Args:
            directory: Where to. An older model there is replaced once all of this one is written.
            merge: Add an adapter to the model's weights; otherwise it is written alone, with its model's name.
            dtype: Of the weights in the files, such as "float32". Default: the one that the model was stored in.
            values: Gives weights by name that are written in place of the model's own, such as more exact ones.

        Returns:
            The directory.

        Raises:
            BackendError: It cannot be written, because the disk is full for example, or what would be written is not the
                model. What was there is then as it was.
            ConfigError: There is no such dtype.
        """
        directory = Path(directory)
        stored = self.stored_dtype if dtype in (None, "auto") else models.chosen_dtype(dtype, "cpu", trains_all=True)
        models.check_place(self.model, directory, merge)
        with self.exclusive.hold(), model_directory(directory) as unfinished:
            with models.no_progress_bars():
                models.write(self.model, unfinished, stored, merge, values())
            self.tokenizer.save_pretrained(unfinished)
        return directory

    def save_description(self, directory: str | Path, merge: bool = False) -> None:
        """Writes config and tokenizer as `save` would, without any weight, so that somebody can tell whether they take it.

        Args:
            directory: Where to; it is there.
            merge: As in `save`: an adapter that would be written alone is described by its own config.
        """
        models.write_config(self.model, Path(directory), merge)
        self.tokenizer.save_pretrained(directory)


def _from_parts(parts: Replica) -> LocalPolicy:
    model = parts.model()
    policy = LocalPolicy(
        model,
        parts.tokenizer,
        threads=parts.threads,
        device=parts.device,
        batching=parts.batching,
        record_entropy=parts.record_entropy,
    )
    policy.source = f"a replica of {parts.config.name_or_path or parts.kind.__name__}"
    return policy


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn, by the tokenizer and by the model's own generation settings."""
    found = {tokenizer.eos_token_id}
    for config in (model.config, getattr(model, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(token for token in found if isinstance(token, int))
