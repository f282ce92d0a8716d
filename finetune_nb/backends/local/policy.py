"""LocalPolicy: any Hugging Face causal language model as the Policy that is sampled and trained.

Chat messages become token ids and sampled ids become messages here. When requests are sampled together is batching.py's
business, how is sampling.py's. A conversation is carried on behind the very ids that were sampled, never re-tokenized:
training then sees what the policy saw.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BackendError, ConfigError
from ...redaction import redacting_logger
from ...types import EpisodeKey, Sample, SamplingParams
from . import models
from .batching import Batcher, Request
from .daemons import leaving
from .exclusive import Exclusive
from .lora import as_trained, is_lora, merged_tensors
from .sampling import SampleRequest, sample_batch

if TYPE_CHECKING:
    from .adapter import LoRAConfig

__all__ = ["LocalPolicy"]

logger = redacting_logger(__name__)

SMALL = 10_000_000
"""Weights below which one torch thread is used: operations are too short to share, and on a busy machine the threads of
so many short operations wait for each other most of the time (measured: up to forty times slower)."""


class LocalPolicy:
    """Samples and renders for one model; its weights are shared with whoever trains it.

    deterministic: batches form by what the episodes do and never by the clock, so that a repeat is equal to the last
    digit. threads: torch threads while sampling or training; None: 1 for a small model, else 2 where deterministic and
    what torch is set to where not.
    """

    def __init__(self, model: Any, tokenizer: Any, *, deterministic: bool = False, threads: int | None = None) -> None:
        self.version = 0
        self.source: str | None = None
        """The name or directory that `load` was given; None for a model that was handed over."""
        self.model = model.eval()  # training too: dropout would make it see another policy than was sampled
        self.tokenizer = tokenizer
        if threads is None:
            threads = 1 if model.num_parameters() < SMALL else 2 if deterministic else None
        self.exclusive = Exclusive(threads)
        self._end_ids = _end_ids(model, tokenizer)
        self._reads_tool_calls = _reads_tool_calls(tokenizer)
        self._token_text: dict[int, str] = {}
        self._batcher = Batcher(self._sample_batch, deterministic)

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
        model, tokenizer = models.load(name_or_dir, device, dtype, lora, seed)
        policy = cls(model, tokenizer, deterministic=deterministic, threads=threads)
        policy.source = str(name_or_dir)
        return policy

    @property
    def description(self) -> str:
        """What is sampled and trained, where and in which dtype, in words."""
        return f"{self.source or type(as_trained(self.model)).__name__}: {models.described(self.model, self.exclusive.threads)}"

    @property
    def longest(self) -> int | None:
        """Tokens that prompt and reply may have together; None where the model sets no bound."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows; ids are below it."""
        return self.model.config.get_text_config().vocab_size

    # ── text and tokens ──────────────────────────────────────────────────────────────────────────────────────────────

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        previous_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Prompt ids for the next assistant turn. With `previous_ids` only what follows the last assistant message is
        rendered, behind them; the whole conversation is rendered where the chat template rewrites what came before.

        Raises ConfigError without a chat template, BackendError where the template refuses the messages.
        """
        messages = [_with_parsed_arguments(message) for message in messages]
        text = self._render_text(messages, tools, add_generation_prompt=True)
        if previous_ids is not None:
            continued = self._continue(messages, tools, text, list(previous_ids))
            if continued is not None:
                return continued
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continue(
        self, messages: list[dict[str, Any]], tools: Any, text: str, previous_ids: list[int]
    ) -> list[int] | None:
        """`previous_ids` and what the template puts behind the last assistant message; None where it rewrites more."""
        last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
        if last is None or not previous_ids:
            return None
        until_reply = self._render_text(messages[: last + 1], tools, add_generation_prompt=False)
        if not text.startswith(until_reply):
            return None
        # The reply's end token is the last one in the text, with at most whitespace behind it that the policy, having
        # ended its turn, never sampled: a newline, say, which has to stand between the turns all the same.
        for end_id in self._end_ids:
            end = self.tokenizer.decode([end_id])
            at = until_reply.rfind(end) if end else -1
            if at < 0 or until_reply[at + len(end) :].strip():
                continue
            # Tokenized together with the end token: some tokenizers treat the beginning of a text specially.
            ids = self.tokenizer(text[at:], add_special_tokens=False)["input_ids"]
            if ids[:1] != [end_id]:
                return None
            return previous_ids + (ids[1:] if previous_ids[-1] in self._end_ids else ids)
        return None

    def _render_text(self, messages: Sequence[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {self.model.config.name_or_path or 'the model'!r} has no chat template, so messages "
                "cannot become a prompt. Use a chat (instruct) model, or put a chat_template.jinja into its directory."
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program that comes with the model
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise BackendError(
                f"the model's chat template refuses messages with the roles {roles}: {type(error).__name__}: {error}"
            ) from error

    def parse(self, ids: Sequence[int]) -> dict[str, Any]:
        """Reply ids -> OpenAI assistant message. Tool calls are recognised where the tokenizer has a response template;
        a reply that it cannot read is plain content. Never raises, whatever the model wrote."""
        if self._reads_tool_calls:
            try:
                raw = self.tokenizer.decode(list(ids), skip_special_tokens=False)
                message = _openai_message(self.tokenizer.parse_response(raw, prefix=""), ids)
                if message is not None:
                    return message
            except Exception as error:
                logger.debug("the response template cannot read a reply: %s: %s", type(error).__name__, error)
        return {"role": "assistant", "content": self.tokenizer.decode(list(ids), skip_special_tokens=True)}

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; a token that is part of a character only shows as U+FFFD."""
        known = self._token_text
        for token in set(ids) - known.keys():
            known[token] = self.tokenizer.decode([token])
        return [known[token] for token in ids]

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text: no chat template, no token at its beginning that is not in it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    # ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        """Entered for as long as a rollout lives: batches wait until every live episode waits for a reply."""
        return self._batcher.episode(key)

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int) -> Sample:
        """One reply. The same ids, params, seed and weights give the same reply; the logprobs' last digits depend on
        the batch, too, unless the policy is deterministic.

        A reply is cut, with "length", where the model holds no more tokens. Raises BackendError for a prompt that is
        empty, too long or of unknown tokens, and where the model fails.
        """
        ids = list(ids)
        if not ids or not all(0 <= token < self.vocabulary for token in (min(ids), max(ids))):
            found = f"ids from {min(ids)} to {max(ids)}" if ids else "no ids"
            raise BackendError(f"the prompt has {found}; expected at least one id, each in 0..{self.vocabulary - 1}")
        if params.max_tokens < 1 or not params.temperature >= 0:
            raise BackendError(
                f"max_tokens is {params.max_tokens} and temperature {params.temperature}; expected at least 1 and 0"
            )
        if self.longest is not None:
            if len(ids) >= self.longest:
                raise BackendError(
                    f"the prompt has {len(ids)} tokens, but this model holds {self.longest} together with the reply. "
                    "Shorten the conversation, or end the episode before it grows so long."
                )
            params = replace(params, max_tokens=min(params.max_tokens, self.longest - len(ids)))
        return await self._batcher.submit(ids, params, seed)

    def _sample_batch(self, batch: list[Request]) -> None:
        rows = [SampleRequest(r.ids, r.params, r.seed, r.future.cancelled) for r in batch]
        with self.exclusive.hold(lambda: leaving.is_set() or all(r.future.cancelled() for r in batch)) as alone:
            asked = [row for row in rows if not row.gone()]
            if not alone or not asked:
                return
            sample_batch(
                self.model,
                asked,
                end_ids=self._end_ids,
                pad_id=self.tokenizer.pad_token_id or 0,
                text=functools.partial(self.tokenizer.decode, skip_special_tokens=False),
                stopped=leaving.is_set,
            )
        for request, row in zip(batch, rows, strict=True):
            if row.ended is not None:
                request.settle(row.sample())

    def save(self, directory: str | Path, merge: bool = False) -> Path:
        """Writes model and tokenizer; `from_pretrained` and `LocalPolicy.load` read them. Waits for a batch at work.

        merge: an adapter is added to the model's weights; otherwise it is written alone, with its model's name.
        """
        directory = Path(directory)
        with self.exclusive.hold():
            with models.no_progress_bars():
                if merge and is_lora(self.model):
                    as_trained(self.model).save_pretrained(directory, state_dict=merged_tensors(self.model))
                else:
                    self.model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        return directory


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn, by the tokenizer and by the model's own generation settings."""
    found = {tokenizer.eos_token_id}
    for config in (model.config, getattr(model, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(token for token in found if isinstance(token, int))


def _reads_tool_calls(tokenizer: Any) -> bool:
    """Whether the tokenizer has a response template that works, which is tried out here once."""
    if not getattr(tokenizer, "response_template", None):
        return False
    try:
        tokenizer.parse_response("", prefix="")
    except Exception as error:
        logger.warning("the tokenizer's response template does not work, so no tool calls will be seen: %s", error)
        return False
    return True


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends tool call arguments as a JSON string; chat templates expect the dict. Anything else stays."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        try:
            arguments = json.loads(function["arguments"])
        except (KeyError, TypeError, ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict):
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _openai_message(parsed: Any, ids: Sequence[int]) -> dict[str, Any] | None:
    """What a response template found, as an OpenAI message; None where that is not one. Call ids are a hash of the
    reply: repeatable, but the same reply later in a conversation has them again."""
    content = parsed.get("content")
    if not isinstance(content, str | None):
        return None
    message: dict[str, Any] = {"role": "assistant", "content": content}
    digest = hashlib.blake2b(repr(list(ids)).encode(), digest_size=6).hexdigest()
    calls = []
    for i, call in enumerate(parsed.get("tool_calls") or ()):
        name, arguments = call["function"]["name"], call["function"].get("arguments", {})
        if not isinstance(name, str):
            return None
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {"id": f"call_{digest}_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    if calls:
        message["tool_calls"] = calls
    elif content is None:
        message["content"] = ""
    thinking = parsed.get("reasoning_content") or parsed.get("thinking")
    if isinstance(thinking, str):
        message["reasoning_content"] = thinking
    return message
