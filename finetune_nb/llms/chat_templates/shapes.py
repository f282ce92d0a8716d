"""The forms in which chat templates take what the OpenAI format of messages leaves open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CALL_SHAPES",
    "MessageShape",
    "with_mappings",
]


@dataclass(frozen=True)
class MessageShape:
    """How a template takes messages."""

    content_is_text: bool = False
    """Content that is missing or null is given as an empty text: some templates join it to other texts."""
    content_in_parts: bool = False
    """Content is given as a list of parts: templates of models that see pictures read nothing else."""
    arguments_are_text: bool = False
    """The arguments of a call stay the JSON text that they are."""
    ids_are_short: bool = False
    """The ids of calls have nine letters and digits, as Mistral's templates demand."""
    one_call_a_turn: bool = False
    """A turn with several calls is given as several turns."""
    thought: str | None = None
    """The field in which the template looks for what was thought; None: reasoning_content, or nowhere."""

    def of(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages in this shape."""
        shaped: list[dict[str, Any]] = []
        for message in messages:
            shaped += self._turns(dict(message))
        return shaped

    def _turns(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """A message as one turn or, for several calls, as several."""
        has_both = message.get("content") and message.get("tool_calls")
        # gpt-oss's template refuses a turn that has content, thoughts and calls.
        if self.thought and message.get("reasoning_content") and self.thought not in message and not has_both:
            message[self.thought] = message["reasoning_content"]
        if self.content_is_text and message.get("content") is None:
            message["content"] = ""
        if self.content_in_parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if self.ids_are_short and message.get("tool_call_id"):
            message["tool_call_id"] = _short_id(message["tool_call_id"])
        if not isinstance(message.get("tool_calls"), list):
            return [message]
        calls = [self._call(call) for call in message["tool_calls"]]
        if not self.one_call_a_turn or len(calls) < 2:
            return [{**message, "tool_calls": calls}]
        turns = [{**message, "tool_calls": [call]} for call in calls]
        for turn in turns[1:]:
            turn["content"] = "" if self.content_is_text else None
        return turns

    def _call(self, call: Any) -> Any:
        """A call of a turn in this shape."""
        if not isinstance(call, Mapping):
            return call
        call = dict(call)
        if self.ids_are_short and call.get("id"):
            call["id"] = _short_id(call["id"])
        function = call.get("function")
        if self.arguments_are_text and isinstance(function, Mapping) and not isinstance(function.get("arguments"), str):
            arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
            call["function"] = {**function, "arguments": arguments}
        return call


CALL_SHAPES = (
    MessageShape(),
    MessageShape(content_is_text=True),
    MessageShape(ids_are_short=True),
    MessageShape(arguments_are_text=True),
    MessageShape(content_is_text=True, ids_are_short=True),
    MessageShape(content_is_text=True, arguments_are_text=True),
    MessageShape(ids_are_short=True, arguments_are_text=True),
    MessageShape(content_is_text=True, ids_are_short=True, arguments_are_text=True),
)
"""What is tried with a template that takes turns with calls, the OpenAI format itself first."""


def with_mappings(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls all have mappings for arguments, also those that are no JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    written = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and not isinstance(function.get("arguments"), Mapping):
            arguments = function.get("arguments")
            function = {**function, "arguments": {"INVALID_JSON": arguments} if arguments else {}}
            call = {**call, "function": function}
        written.append(call)
    return {**message, "tool_calls": written}


def _short_id(name: Any) -> str:
    """Nine letters and digits for the id of a call, always the same."""
    text = str(name)
    if len(text) == 9 and text.isalnum():
        return text
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()[:9]
