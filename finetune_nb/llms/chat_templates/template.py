"""A tokenizer's chat template: renders messages in the shape that the template takes, and finds out what the template does
with a turn, by rendering small conversations with it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ...errors import BackendError, ConfigError
from ...redaction import redacting_logger
from ..tool_parsers import ToolParser, recognized
from .shapes import CALL_SHAPES, MessageShape, with_mappings

__all__ = [
    "ChatTemplate",
]

logger = redacting_logger(__name__)

PROBE = "finetunenbprobe"
"""A text that no template and no tokenizer treats specially."""
_PROBE_RESULT = {"role": "tool", "tool_call_id": "call_0_0", "content": f"{PROBE}result"}
_TOOL, _VALUE = "probed_tool", "probed_value"
_PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "A tool.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "A text."}},
                "required": ["x"],
            },
        },
    }
]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        end_ids: The tokens that end a reply.
        name: Of the model, for messages.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int], name: str) -> None:
        self.source = tokenizer.chat_template
        """As the tokenizer has it: a text, or several by name."""
        self.end_ids = frozenset(end_ids)
        self._tokenizer, self._name = tokenizer, name
        self._known_options: set[str] = set()

    # ── rendering ────────────────────────────────────────────────────────────────────────────────────────────────────

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as the text of a prompt.

        Args:
            messages: OpenAI messages; the arguments of tool calls as mappings.
            tools: OpenAI tool schemas.
            add_generation_prompt: Whether the text ends with the beginning of a reply.
            options: Variables of the template, such as enable_thinking.

        Returns:
            The text.

        Raises:
            ConfigError: The tokenizer has no chat template.
            BackendError: The template refuses the messages.
        """
        if not self.source:
            raise ConfigError(
                f"the tokenizer of {self._name!r} has no chat template, so messages "
                "cannot become a prompt. Use a chat (instruct) model, or put a chat_template.jinja into its directory."
            )
        self._check_options(options or {})
        shape = self._shape_for(messages)
        try:
            return self._render(shape, messages, tools, add_generation_prompt, options)
        except Exception as error:  # a template is a program that comes with the model
            # Arguments that are no JSON stay a text, which many templates cannot show.
            readable = [with_mappings(message) for message in messages]
            text = None
            if readable != list(messages):
                text = self._probed(shape, readable, tools, add_generation_prompt, options)
            if text is not None:
                return text
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise BackendError(
                f"the model's chat template refuses messages with the roles {roles}: {type(error).__name__}: {error}"
            ) from error

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for a variable that is a parameter of apply_chat_template, and warns, once, of one that the
        template does not use."""
        for name in options:
            if name in _parameters_of(type(self._tokenizer)):
                raise ConfigError(
                    f"chat_template_kwargs has {name!r}, which is no variable of the chat template but says how it is applied. "
                    "Leave it out."
                )
            if name not in self._known_options:
                self._known_options.add(name)
                if not re.search(rf"\b{re.escape(name)}\b", str(self.source)):
                    logger.warning(
                        "the chat template of %r does not use %r of chat_template_kwargs, which changes nothing then. Look up "
                        "its variables in tokenizer.chat_template.", self._name, name,
                    )  # fmt: skip

    def _render(
        self,
        shape: MessageShape,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        return self._tokenizer.apply_chat_template(
            shape.of(messages),
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(options or {}),
        )

    def _probed(self, *args: Any, **options: Any) -> str | None:
        """What is rendered; None where the template refuses it."""
        try:
            return self._render(*args, **options)
        except Exception:  # a template is a program that comes with the model
            return None

    # ── the shape of messages ────────────────────────────────────────────────────────────────────────────────────────

    def _shape_for(self, messages: Sequence[Mapping[str, Any]]) -> MessageShape:
        for message in messages:
            if message.get("tool_calls") or message.get("content") is None or message.get("role") == "tool":
                return self._shape_with_calls
        return self._plain_shape

    @cached_property
    def _plain_shape(self) -> MessageShape:
        """The shape of messages that all have content, and no calls."""
        asked = [{"role": "user", "content": PROBE}]
        usual = MessageShape(thought=self._name_of_thought)
        for shape in (usual, replace(usual, content_in_parts=True)):
            if PROBE in (self._probed(shape, asked, add_generation_prompt=True) or ""):
                return shape
        return usual

    @cached_property
    def _shape_with_calls(self) -> MessageShape:
        """The shape in which the template shows most of a turn with calls and of the result that follows it."""
        turn = self._probe_turn(_probe_call(0))
        best, most = self._best_shape([*turn, _PROBE_RESULT])
        if not most:  # there are templates without results of tools
            best, most = self._best_shape(turn)
        both = self._probed(best, self._probe_turn(_probe_call(0), _probe_call(1)))
        one_call = most > 0 and (both is None or (f"{PROBE}value0" in both and f"{PROBE}value1" not in both))
        return replace(best, one_call_a_turn=one_call)

    def _best_shape(self, messages: Sequence[Mapping[str, Any]]) -> tuple[MessageShape, int]:
        """The shape in which most of the probes in these messages are shown, and how much that is; 0 where all are refused."""
        best, most = self._plain_shape, 0
        for variant in CALL_SHAPES:
            shape = replace(variant, content_in_parts=best.content_in_parts, thought=best.thought)
            text = self._probed(shape, messages, add_generation_prompt=True)
            if text is None:
                continue
            shown = 1 + (f"{PROBE}value0" in text) + (f"{PROBE}result" in text)
            if shown > most:
                best, most = shape, shown
        return best, most

    def _probe_turn(self, *calls: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": PROBE}, {"role": "assistant", "content": None, "tool_calls": list(calls)}]

    @cached_property
    def _name_of_thought(self) -> str | None:
        """The field of a message in which the template looks for thoughts; None: reasoning_content, or nowhere."""
        text = str(self.source)
        if "reasoning_content" in text:
            return None
        for name in ("thinking", "reasoning"):
            if re.search(rf"""[.'"]{name}\b""", text):
                return name
        return None

    # ── what the template does with a turn ───────────────────────────────────────────────────────────────────────────

    @cached_property
    def closers(self) -> tuple[str, ...]:
        """The tokens that end a reply in the history, whatever comes after it; empty where the next turn's beginning is all
        that ends it."""
        ends = [token for token in self._after_reply if token in self.end_ids]
        found = ends or self._after_reply[:1]
        return tuple(self.text_of(token) for token in found)

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """The texts of the tokens that end a reply."""
        return tuple(filter(None, map(self.text_of, sorted(self.end_ids))))

    @cached_property
    def missing_end(self) -> tuple[int | None, str] | None:
        """The end of a turn, as the template writes it, if no reply would end there: the token, or None where it is no single
        token, and its text. None: replies end where turns do."""
        newest, user, _ = self._turns
        if newest is None or user is None:
            return None
        own = self._added_in(newest)
        if any(token in self.end_ids for token in self._after_reply) or (own and own[0] in self.end_ids):
            return None
        if self._after_reply:
            token = own[0] if own and own[0] in self._after_reply else self._after_reply[0]
            return token, self.text_of(token)
        written = newest.strip()
        if written:
            # The template ends turns with a text. One of the ends may be in it.
            return None if own or any(text in written for text in self.end_texts) else (None, written[:40])
        # Nothing ends a turn but the beginning of the next one.
        first = self._added_in(user)[:1]
        if not first or first[0] in self.end_ids or first[0] in self._opening_tokens:
            return None
        return first[0], self.text_of(first[0])

    @cached_property
    def _turns(self) -> tuple[str | None, str | None, str | None]:
        """What follows a reply: at the end of a conversation, before a user's turn, and before another reply."""
        asked = [{"role": "user", "content": f"{PROBE}question"}]
        replied = [*asked, {"role": "assistant", "content": PROBE + "reply"}]
        followed = [*replied, {"role": "user", "content": f"{PROBE}next"}]
        shape = self._plain_shape
        texts = (
            self._probed(shape, replied),
            self._probed(shape, followed, add_generation_prompt=True),
            self._probed(shape, replied, add_generation_prompt=True),
        )
        newest, user, reply = (_after(text, PROBE + "reply") for text in texts)
        return newest, None if user is None else user.partition(f"{PROBE}next")[0], reply

    @cached_property
    def _after_reply(self) -> list[int]:
        """The added tokens that follow a reply whatever comes next, the end of the turn first."""
        newest, user, reply = self._turns
        if newest is None or user is None or reply is None or not self._added_in(newest):
            return []
        found = self._added_in(_common_start(user, reply))
        return [token for token in found if token not in self._opening_tokens]

    @cached_property
    def _opening_tokens(self) -> frozenset[int]:
        """The added tokens that begin a reply."""
        asked = [{"role": "user", "content": PROBE}]
        with_opening = self._probed(self._plain_shape, asked, add_generation_prompt=True) or ""
        without = self._probed(self._plain_shape, asked) or ""
        return frozenset(self._added_in(with_opening[len(_common_start(with_opening, without)) :]))

    def _added_in(self, text: str) -> list[int]:
        """The ids of added tokens in a text, in order."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token in self._added]

    @cached_property
    def _added(self) -> dict[int, str]:
        found = self._tokenizer.added_tokens_decoder
        return {token: str(added.content) for token, added in found.items()}

    def text_of(self, token: int) -> str:
        """The text of one token, also of a special one."""
        return self._added.get(token) or self._tokenizer.decode([token])

    def encoded_after(self, token: int | None, text: str) -> list[int]:
        """The ids of a text that follows an added token; None: any. Some tokenizers treat the beginning of a text specially."""
        if token is None:
            token = min(self.end_ids, default=None)
        if token is not None:
            ids = self._tokenizer(self.text_of(token) + text, add_special_tokens=False)["input_ids"]
            if ids[:1] == [token]:
                return ids[1:]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    # ── tools ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def tool_parser(self) -> ToolParser | None:
        """The format in which the model calls tools, by how the template writes calls or asks for them; None for one that is
        not known."""
        function = {"name": _TOOL, "arguments": {"x": _VALUE}}
        turn = self._probe_turn({"id": "call_0_0", "type": "function", "function": function})
        written = _after(self._probed(self._shape_with_calls, turn, _PROBE_TOOLS), PROBE) or ""
        ends = [written.find(end, written.find(_VALUE)) for end in (*self.closers, *self.end_texts)]
        written = written[: min([at for at in ends if at >= 0], default=len(written))]
        asked = self._probed(self._plain_shape, turn[:1], _PROBE_TOOLS, True) or ""
        # Some templates write no calls, though the model has tokens for them.
        told = [asked] if _TOOL in asked else []
        return recognized(written, _TOOL, _VALUE, "\n".join([*told, *self._added.values()]))

    @cached_property
    def ends_calls(self) -> bool:
        """Whether a token that ends a reply comes between a call and its result."""
        text = self._probed(self._shape_with_calls, [*self._probe_turn(_probe_call(0)), _PROBE_RESULT], None, True)
        between = (_after(text, f"{PROBE}value0") or "").partition(f"{PROBE}result")[0]
        return any(end in between for end in (*self.closers, *self.end_texts))

    @cached_property
    def shows_results(self) -> bool:
        """Whether the results of calls are in a prompt."""
        turn = [*self._probe_turn(_probe_call(0)), _PROBE_RESULT]
        return _PROBE_RESULT["content"] in (self._probed(self._shape_with_calls, turn, None, True) or "")

    def shows_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a prompt is another one with these tools than without."""
        return self.render(messages, tools) != self.render(messages)


def _after(text: str | None, mark: str) -> str | None:
    """What follows the last mark in a text; None where there is none."""
    if text is None or mark not in text:
        return None
    return text.rpartition(mark)[2]


def _common_start(one: str, other: str) -> str:
    """What two texts begin with alike."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]


def _probe_call(number: int) -> dict[str, Any]:
    function = {"name": f"{PROBE}name", "arguments": {"x": f"{PROBE}value{number}"}}
    return {"id": f"call_0_{number}", "type": "function", "function": function}


@functools.cache
def _parameters_of(tokenizer: type) -> frozenset[str]:
    """What apply_chat_template takes for itself."""
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    return frozenset(each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD)
