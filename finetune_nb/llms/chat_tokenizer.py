"""What transformers knows of a model's tokenizer, also where the model itself is somewhere else. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BackendError, ConfigError
from ..redaction import redacting_logger
from ..types import SamplingParams

__all__ = [
    "ChatTokenizer",
    "check_prompt",
    "load_tokenizer",
    "response_template",
]


def load_tokenizer(name_or_dir: str) -> tuple[Any, list[int]]:
    """A tokenizer from a Hugging Face directory or hub name, and the tokens that end a turn. Raises ConfigError, and
    ImportError without transformers."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer of {name_or_dir!r} cannot be loaded: {error} Name a Hugging Face directory or hub model in "
            "`tokenizer` where the service calls the model otherwise."
        ) from error
    found = {tokenizer.eos_token_id}
    try:
        ends = GenerationConfig.from_pretrained(name_or_dir).eos_token_id
        found.update(ends if isinstance(ends, list) else [ends])
    except (OSError, ValueError):  # not every tokenizer has a model beside it
        pass
    return tokenizer, sorted(token for token in found if isinstance(token, int))


def response_template(tokenizer: Any) -> Any:
    """The tokenizer's response template, compiled once where `parse_response` would do it for every reply; None without
    one. Raises whatever transformers does where it is not one."""
    template = getattr(tokenizer, "response_template", None)
    if not template:
        return None
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError:  # it is not transformers' public API
        return template
    return load_response_template(template)


logger = redacting_logger(__name__)

OPENINGS = 1024
"""Rendered openings of conversations that are kept, for the other rollouts of their group."""


class ChatTokenizer:
    """tokenizer: a transformers tokenizer. end_ids: the tokens that end a turn. name: of the model, for messages."""

    def __init__(self, tokenizer: Any, end_ids: Collection[int], name: str) -> None:
        self.tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._name = name
        self._response_template = _response_template(tokenizer)
        self._token_text: dict[int, str] = {}
        self._openings: dict[tuple[str, str], list[int]] = {}

    @property
    def reads_tool_calls(self) -> bool:
        """Whether `parse` finds tool calls: the tokenizer has a response template."""
        return self._response_template is not None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        previous_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Prompt ids for the next assistant turn. With `previous_ids` only what follows the last assistant message is
        rendered, after them; the whole conversation is rendered where the chat template rewrites what came before.

        Raises ConfigError without a chat template, BackendError where the template refuses the messages.
        """
        messages = [_with_parsed_arguments(message) for message in messages]
        if previous_ids is None:
            return self._opening(messages, tools)
        text = self._render_text(messages, tools, add_generation_prompt=True)
        continued = self._continue(messages, tools, text, list(previous_ids))
        return self.encode(text) if continued is None else continued

    def _opening(self, messages: list[dict[str, Any]], tools: Any) -> list[int]:
        """Prompt ids without earlier ones. The rollouts of a group begin alike: one is rendered for all of them."""
        template = str(self.tokenizer.chat_template)
        try:
            key = (template, json.dumps((messages, tools)))
        except (TypeError, ValueError, RecursionError):  # no JSON, which a template may yet take
            key = None
        if key is None or "strftime_now" in template:  # it shows the time, which changes
            return self.encode(self._render_text(messages, tools, add_generation_prompt=True))
        ids = self._openings.get(key)
        if ids is None:
            ids = self.encode(self._render_text(messages, tools, add_generation_prompt=True))
            if len(self._openings) >= OPENINGS:
                self._openings.clear()
            self._openings[key] = ids
        return list(ids)

    def _continue(
        self, messages: list[dict[str, Any]], tools: Any, text: str, previous_ids: list[int]
    ) -> list[int] | None:
        """`previous_ids` and what the template puts after the last assistant message; None where it rewrites more."""
        last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
        if last is None or not previous_ids:
            return None
        until_reply = self._render_text(messages[: last + 1], tools, add_generation_prompt=False)
        if not text.startswith(until_reply):
            return None
        # The reply's end token is the last one in the text, with at most whitespace after it that the policy, having
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
                f"the tokenizer of {self._name!r} has no chat template, so messages "
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
        if self.reads_tool_calls:
            try:
                raw = self.tokenizer.decode(list(ids), skip_special_tokens=False)
                parsed = self.tokenizer.parse_response(raw, schema=self._response_template, prefix="")
                message = _openai_message(parsed, ids)
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


def check_prompt(
    ids: Sequence[int], params: SamplingParams, longest: int | None, vocabulary: int | None
) -> SamplingParams:
    """`params`, with a reply that the model can hold after the prompt.

    longest: tokens that prompt and reply may have together; None: no bound. vocabulary: ids are below it; None: unknown. Raises
    BackendError for a prompt that is empty, too long or of unknown tokens, and for parameters out of their range.
    """
    if not ids or min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary):
        found = f"ids from {min(ids)} to {max(ids)}" if ids else "no ids"
        end = "" if vocabulary is None else vocabulary - 1
        raise BackendError(f"the prompt has {found}; expected at least one id, each in 0..{end}")
    if params.max_tokens < 1 or not params.temperature >= 0:
        raise BackendError(
            f"max_tokens is {params.max_tokens} and temperature {params.temperature}; expected at least 1 and 0"
        )
    if longest is None:
        return params
    if len(ids) >= longest:
        raise BackendError(
            f"the prompt has {len(ids)} tokens, but this model holds {longest} together with the reply. "
            "Shorten the conversation, or end the episode before it grows so long."
        )
    return replace(params, max_tokens=min(params.max_tokens, longest - len(ids)))


def _response_template(tokenizer: Any) -> Any:
    """What `parse_response` reads replies by; None without a response template that works, which is tried out here."""
    if not getattr(tokenizer, "response_template", None):
        return None
    try:
        template = response_template(tokenizer)
        tokenizer.parse_response("", schema=template, prefix="")
    except Exception as error:
        logger.warning("the tokenizer's response template does not work, so no tool calls will be seen: %s", error)
        return None
    return template


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
