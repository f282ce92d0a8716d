"""The prompt of a later turn, made of the ids that were seen and sampled so far and of what the template puts after them.

What a template writes around a turn may change when the turn is no longer the newest: an empty thought is left out, another
token ends it. The ids are kept all the same, as long as everything that was sampled is still there. To tell, the texts of
the replies are replaced by marks that no template knows, and looked for in what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BackendError
from ..chat_messages import plain_content
from .template import ChatTemplate

__all__ = [
    "continued",
]

_TAG = re.compile(r"(</?think(?:ing)?>)")
MARK = "finetunenbmark"


@dataclass(frozen=True)
class _Mark:
    text: str
    kind: str
    """"content", "thought" or "call"."""


class _Marker:
    """Makes marks, and replies that have them in place of their texts."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []
        self.earlier = 0
        """How many of the marks are not the last reply's."""

    def ends(self, text: str) -> tuple[int | None, int | None]:
        """Where the last mark of the last reply's calls ends in a text, and where the last one of the rest of it; None where
        there is none."""
        calls: list[int] = []
        others: list[int] = []
        for mark in self.marks[self.earlier :]:
            at = text.rfind(mark.text)
            if at >= 0:
                (calls if mark.kind == "call" else others).append(at + len(mark.text))
        return max(calls, default=None), max(others, default=None)

    def _new(self, kind: str) -> str:
        text = f"{MARK}{len(self.marks)}x"
        self.marks.append(_Mark(text, kind))
        return text

    def marked(self, message: Mapping[str, Any], closed: bool = False, with_content: bool = True) -> dict[str, Any]:
        """A reply with marks for texts.

        Args:
            message: The reply.
            closed: Whether its content ends with a mark in any case.
            with_content: Whether it keeps its content.
        """
        marked = dict(message)
        if message.get("reasoning_content"):
            marked["reasoning_content"] = self._new("thought")
        content = plain_content(message.get("content")) if with_content else None
        if isinstance(content, str) or closed:
            marked["content"] = self._marked_text(content if isinstance(content, str) else "", closed)
        elif not with_content:
            marked["content"] = None
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            marked["tool_calls"] = [self._marked_call(call) for call in calls]
        return marked

    def _marked_text(self, text: str, closed: bool) -> str:
        """A text with a mark for each piece of it between thinking tags."""
        pieces = _TAG.split(text)
        for i in range(0, len(pieces), 2):
            is_last = i == len(pieces) - 1
            opened = i > 0 and not pieces[i - 1].startswith("</")
            shut = not is_last and pieces[i + 1].startswith("</")
            said = pieces[i].strip()
            if said or (closed and is_last):
                mark = self._new("thought" if opened or shut else "content")
                before, _, after = pieces[i].partition(said) if said else (pieces[i], "", "")
                pieces[i] = before + mark + ("" if closed and is_last else after)
        return "".join(pieces)

    def _marked_call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        return {**call, "function": {**function, "arguments": {"x": self._new("call")}}}


def continued(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    previous_ids: Sequence[int],
    options: Mapping[str, Any],
    options_before: Mapping[str, Any],
) -> list[int] | None:
    """The prompt of the next turn, beginning with the ids so far.

    Args:
        template: The chat template.
        messages: The conversation, with at least one reply.
        tools: Its tools.
        previous_ids: Prompt and reply of the turn before, exactly as seen and sampled.
        options: The template's variables.
        options_before: Those that the ids so far were rendered with.

    Returns:
        The ids. None where the template leaves out something that was sampled, refuses the messages, or shows nothing of the
        last reply.
    """
    found = _what_follows(template, messages, tools, options, options_before)
    if found is None:
        return None
    text, after_content = found
    end = _end_of_turn(template, text, after_content)
    last_id = previous_ids[-1]
    if end is None and not after_content:
        return None
    if last_id not in template.end_ids:
        # The reply was cut. Its turn is ended as the template ends one.
        rest = text if after_content or end is None else text[end[0] :]
        return [*previous_ids, *template.encoded_after(None, rest)]
    if end is not None:
        at, ending = end
        # The end that was sampled takes the place of the template's. Where nothing but the next turn's beginning ends a turn,
        # another beginning than the sampled one is still to come.
        takes_place = ending == template.text_of(last_id) or ending in template.closers
        text = text[at + len(ending) :] if takes_place else text[at:]
    return [*previous_ids, *template.encoded_after(last_id, text)]


def _end_of_turn(template: ChatTemplate, text: str, after_content: bool) -> tuple[int, str] | None:
    """Where the last reply's turn ends in the text that follows it, and the token that ends it: "" for a turn that ends with
    its last call. None where nothing ends it."""
    endings = (*template.closers, *template.end_texts)
    if after_content and not template.closers:
        # Nothing but the next turn's beginning ends a turn, and that may be no end of replies.
        start = len(text) - len(text.lstrip())
        return next(((start, ending) for ending in endings if text.startswith(ending, start)), None)
    if after_content or template.ends_calls:
        found = [(text.find(ending), ending) for ending in endings if ending in text]
        return min(found, default=None)
    # Without an end of its own, that of a later turn would be found, or what somebody says.
    closing = template.tool_parser.closing if template.tool_parser is not None else ""
    if not closing or closing not in text:
        return None
    return text.index(closing) + len(closing), ""


def _what_follows(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    options_before: Mapping[str, Any],
) -> tuple[str, bool] | None:
    """What the template puts after the text of the last reply, and whether that begins where the reply's content ends; if
    not, the closing of its last call is first in it. None: see `continued`."""
    last = max(i for i, message in enumerate(messages) if message.get("role") == "assistant")
    has_calls = bool(messages[last].get("tool_calls"))

    def rendered(closed: bool, with_content: bool) -> tuple[str, _Marker, list[dict[str, Any]]]:
        marker = _Marker()
        marked = [_marked(marker, message, False, True) for message in messages[:last]]
        marker.earlier = len(marker.marks)
        marked.append(_marked(marker, messages[last], closed, with_content))
        return template.render([*marked, *messages[last + 1 :]], tools, True, options), marker, marked

    try:
        text, marker, marked = rendered(closed=not has_calls, with_content=True)
        if options != options_before:
            so_far = template.render(marked, tools, False, options)
            if so_far != template.render(marked, tools, False, options_before):
                return None
        if any(mark.text not in text for mark in marker.marks):
            prompt = template.render(marked[:last], tools, True, options) if last else ""
            reply = template.render(marked, tools, False, options)
            if _left_out(marker, prompt, reply, text):
                return None
        calls_end, others_end = marker.ends(text)
        if has_calls and calls_end is None:
            # The template shows no calls: the reply ends where its content does.
            text, marker, _ = rendered(closed=True, with_content=True)
            calls_end, others_end = marker.ends(text)
        elif calls_end is not None and others_end is not None and others_end > calls_end:
            # The template writes the content of a turn after its calls and their results.
            text, marker, _ = rendered(closed=False, with_content=False)
            calls_end, others_end = marker.ends(text)
    except BackendError:
        return None
    if calls_end is not None:
        return text[calls_end:], False
    return None if others_end is None else (text[others_end:], True)


def _marked(marker: _Marker, message: Mapping[str, Any], closed: bool, with_content: bool) -> dict[str, Any]:
    return marker.marked(message, closed, with_content) if message.get("role") == "assistant" else dict(message)


def _left_out(marker: _Marker, prompt: str, reply: str, text: str) -> bool:
    """Whether something that was sampled is in the conversation no more.

    Args:
        marker: The marks of the replies.
        prompt: The conversation that the last reply was sampled after.
        reply: The same with the last reply, the newest turn there.
        text: The whole conversation.
    """
    for number, mark in enumerate(marker.marks):
        if mark.text in text:
            continue
        # What the template never showed is not lost now. But the thoughts of the last reply have been sampled.
        is_last = number >= marker.earlier
        if mark.text in (reply if is_last else prompt) or (is_last and mark.kind == "thought"):
            return True
    return False
