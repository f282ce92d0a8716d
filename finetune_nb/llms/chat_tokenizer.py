"""What transformers knows of a model's tokenizer, also where the model itself is somewhere else. Needs no torch."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BackendError, ConfigError
from ..redaction import redacting_logger
from ..types import SamplingParams
from .chat_templates.kept_ids import continued
from .chat_templates.template import ChatTemplate
from .tool_parsers import TOOL_PARSERS, ToolParser, parser_named

__all__ = [
    "ChatTokenizer",
    "check_prompt",
    "load_tokenizer",
    "response_template",
    "with_parsed_arguments",
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
    """Renders conversations as token ids, and reads replies.

    Args:
        tokenizer: A transformers tokenizer.
        end_ids: The tokens that end a turn. The one at which the chat template ends turns is added.
        name: Of the model, for messages.
        samples: Whether replies end at these tokens; False where a server decides where they end.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int], name: str, samples: bool = True) -> None:
        self.tokenizer = tokenizer
        self._name = name
        self._end_ids = frozenset(end_ids)
        self._template = ChatTemplate(tokenizer, self._end_ids, name)
        self._response_template = _response_template(tokenizer)
        self._typed_by_tools = _reads_types(type(tokenizer))
        self._token_text: dict[int, str] = {}
        self._openings: dict[tuple[str, str], list[int]] = {}
        self._checked_tools = self._warned_of_tools = False
        self._end_turns(samples)

    def _end_turns(self, samples: bool) -> None:
        """Makes the token at which the chat template ends turns one of those that end a reply."""
        missing = self._template.missing_end if self._template.source else None
        if missing is None:
            return
        token, text = missing
        known = ", ".join(map(repr, self._template.end_texts)) or "nothing"
        if token is None:
            logger.warning(
                "the chat template of %r ends turns with %r, which is no token of its tokenizer: replies end at %s alone, and "
                "one that passes its turn's end runs on to max_tokens. Add the token to the tokenizer, or give it in `stop`.",
                self._name, text, known,
            )  # fmt: skip
            return
        self._end_ids |= {token}
        self._template = ChatTemplate(self.tokenizer, self._end_ids, self._name)
        cure = f"Add its id, {token}, to eos_token_id in the model's generation_config.json"
        logger.warning(
            "the chat template of %r ends turns with %r, but its tokenizer and generation config end replies at %s alone. %s",
            self._name, text, known,
            f"Here {text!r} ends them, too. {cure}, for whoever else serves it." if samples else f"{cure} of the server.",
        )  # fmt: skip

    @property
    def reads_tool_calls(self) -> bool:
        """Whether `parse` finds tool calls by itself: the tokenizer has a response template, or its chat template writes them
        in a format that is known."""
        return self._response_template is not None or self.template.tool_parser is not None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        previous_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        previous_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids for the next assistant turn.

        Args:
            messages: OpenAI chat messages.
            tools: OpenAI tool schemas.
            previous_ids: Prompt and reply of the turn before, exactly as sampled. If given, only what follows the last
                assistant message is rendered, after them; the whole conversation is rendered where the chat template leaves
                out something that was sampled.
            chat_template_kwargs: Variables of the chat template, such as enable_thinking.
            previous_template_kwargs: Those of the turn before.

        Returns:
            The ids.

        Raises:
            ConfigError: There is no chat template.
            BackendError: The template refuses the messages.
        """
        messages = [with_parsed_arguments(message) for message in messages]
        options, before = chat_template_kwargs or {}, previous_template_kwargs or {}
        if tools and not self._checked_tools:
            self._check_tools(messages, tools)
        if previous_ids is None:
            return self._opening(messages, tools, options)
        continued = self._continue(messages, tools, list(previous_ids), options, before)
        return self.encode(self._render_text(messages, tools, options)) if continued is None else continued

    def _opening(self, messages: list[dict[str, Any]], tools: Any, options: Mapping[str, Any]) -> list[int]:
        """Prompt ids without earlier ones. The rollouts of a group begin alike: one is rendered for all of them."""
        template = str(self.tokenizer.chat_template)
        try:
            key = (template, json.dumps((messages, tools, options)))
        except (TypeError, ValueError, RecursionError):  # no JSON, which a template may yet take
            key = None
        if key is None or "strftime_now" in template:  # it shows the time, which changes
            return self.encode(self._render_text(messages, tools, options))
        ids = self._openings.get(key)
        if ids is None:
            ids = self.encode(self._render_text(messages, tools, options))
            if len(self._openings) >= OPENINGS:
                self._openings.clear()
            self._openings[key] = ids
        return list(ids)

    def _continue(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        previous_ids: list[int],
        options: Mapping[str, Any],
        options_before: Mapping[str, Any],
    ) -> list[int] | None:
        """`previous_ids` and what the template puts after the last assistant message; None where it leaves out something that
        was sampled."""
        if not previous_ids or not any(message.get("role") == "assistant" for message in messages):
            return None
        return continued(self.template, messages, tools, previous_ids, options, options_before)

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template, as it is now."""
        if self._template.source != self.tokenizer.chat_template:
            self._template = ChatTemplate(self.tokenizer, self._end_ids, self._name)
        return self._template

    def _render_text(self, messages: Sequence[dict[str, Any]], tools: Any, options: Mapping[str, Any]) -> str:
        return self.template.render(messages, tools, True, options)

    def parse(
        self, ids: Sequence[int], tools: Sequence[dict[str, Any]] | None = None, tool_parser: str | None = None
    ) -> dict[str, Any]:
        """The message that a reply is. Never raises for what the model wrote.

        Args:
            ids: Token ids of the reply.
            tools: The tools that were offered; without any, a reply is taken as it is. None: not known.
            tool_parser: The format of tool calls. None: that of the tokenizer's response template, else the one in which the
                chat template writes them.

        Returns:
            An OpenAI assistant message. A reply whose calls cannot be read is plain content.

        Raises:
            ConfigError: There is no such format.
        """
        parser = self.template.tool_parser if tool_parser is None else parser_named(tool_parser)
        by_template = tool_parser is None and self._response_template is not None
        if tools and parser is None and not by_template:
            self._warn_of_tools(
                "does not say in which format the model calls tools, so what it calls stays plain text. Name the format"
            )
        read = self._read_by_template if by_template else self._read_by_parser
        try:
            message = read(ids, tools, parser)
            if message is not None:
                return message
        except Exception as error:
            logger.debug("a reply's tool calls cannot be read: %s: %s", type(error).__name__, error)
        return {"role": "assistant", "content": self.tokenizer.decode(list(ids), skip_special_tokens=True)}

    def _read_by_template(
        self, ids: Sequence[int], tools: Sequence[dict[str, Any]] | None, parser: ToolParser | None
    ) -> dict[str, Any] | None:
        """The message, read by the tokenizer's response template; None where it is none."""
        raw = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        typed = {"tools": list(tools)} if tools and self._typed_by_tools else {}
        parsed = self.tokenizer.parse_response(raw, schema=self._response_template, prefix="", **typed)
        return _openai_message(parsed, ids)

    def _read_by_parser(
        self, ids: Sequence[int], tools: Sequence[dict[str, Any]] | None, parser: ToolParser | None
    ) -> dict[str, Any] | None:
        """The message, read in a format of tool calls; None for a reply that is taken as it is."""
        if parser is None or not (tools is None or tools or parser.whole_reply):
            return None
        said = list(ids[:-1] if ids and ids[-1] in self._end_ids else ids)
        parsed = parser.read(self.tokenizer.decode(said, skip_special_tokens=False), tools or ())
        if not parsed.calls and not parser.whole_reply:
            return None
        content = parsed.content
        for special in self.tokenizer.all_special_tokens:
            content = content.replace(special, "")
        calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in parsed.calls]
        content = content.strip() or (None if calls else "")
        return _openai_message({"content": content, "tool_calls": calls, "reasoning_content": parsed.thought}, ids)

    def _check_tools(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
        """Says so, once, if the model hears nothing of its tools, or of what they return."""
        self._checked_tools = True
        if not self.template.shows_tools(messages, tools):
            names = [str(_function_of(tool).get("name")) for tool in tools]
            text = self.template.render(messages, tools)
            if not all(re.search(rf"\b{re.escape(name)}\b", text) for name in names):
                self._warn_of_tools(
                    f"leaves tools out, and the messages do not name them, so the model is not told of {', '.join(names)}. Use "
                    "a model whose template takes tools; or tell of them in the system message, with how they are called, and "
                    "name that format"
                )
        elif not self.template.shows_results:
            self._warn_of_tools(
                "leaves out what tools return, or refuses it. Use a model whose template takes messages of tools; or send the "
                "results as messages of the user, and name the format in which tools are called"
            )

    def _warn_of_tools(self, problem: str) -> None:
        if not self._warned_of_tools:
            self._warned_of_tools = True
            known = ", ".join(sorted(TOOL_PARSERS))
            logger.warning("the chat template of %r %s: tool_parser = one of %s.", self._name, problem, known)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; a token that is part of a character only shows as U+FFFD."""
        known = self._token_text
        for token in set(ids) - known.keys():
            known[token] = self.tokenizer.decode([token])
        return [known[token] for token in ids]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a plain text, without a chat template.

        Args:
            text: The text.
            add_special_tokens: Whether the tokenizer adds what it begins, or ends, a text with.
        """
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

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


def _function_of(tool: dict[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def _reads_types(tokenizer: type) -> bool:
    """Whether `parse_response` gives arguments the types that the tools' schemas say."""
    parse = getattr(tokenizer, "parse_response", None)
    return parse is not None and "tools" in inspect.signature(parse).parameters


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
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
