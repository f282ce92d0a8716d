"""Conversations that somebody wrote as the tokens of a prompt and of the replies that a policy would sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BackendError
from ..text import short
from .chat_messages import plain_content
from .chat_tokenizer import ChatTokenizer, with_parsed_arguments

__all__ = [
    "LearnedTokens",
    "learned_tokens",
]


@dataclass(slots=True)
class LearnedTokens:
    """Tokens in one piece."""

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    """True for those that the assistant would sample: its text and its calls, with the token that ends its turn."""

    def cut(self, longest: int | None) -> bool:
        """Leaves out what comes after that many tokens; returns whether that was anything."""
        if longest is None or len(self.ids) <= longest:
            return False
        del self.ids[longest:], self.learned[longest:]
        return True


def learned_tokens(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[LearnedTokens]:
    """The tokens of a conversation, as a rollout would have them: each reply after the prompt that is rendered for it.

    A reply continues the tokens before it. Where the chat template leaves out something of an earlier turn, such as its
    thoughts, the prompt is rendered anew, and with it begins another piece.

    Args:
        tokenizer: What renders the rollouts.
        messages: OpenAI messages. An assistant's with "weight": 0 is not learned.
        tools: OpenAI tool schemas.
        options: Variables of the chat template.

    Returns:
        The pieces, each with something to learn.

    Raises:
        BackendError: The template refuses the messages, writes a reply otherwise than replies begin, or a reply has in its text
            a token at which replies end.
        ConfigError: There is no chat template.
    """
    options = dict(options or {})
    weights = [message.get("weight", 1) for message in messages]
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    pieces: list[LearnedTokens] = []
    piece = LearnedTokens()
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.render(messages[:place], tools, piece.ids or None, options, options)
        if not piece.ids or prompt[: len(piece.ids)] != piece.ids:
            piece = LearnedTokens()
            pieces.append(piece)
        reply = _reply(tokenizer, messages[: place + 1], tools, options)
        context = prompt[len(piece.ids) :]
        piece.ids += context + reply
        piece.learned += [False] * len(context) + [bool(weights[place])] * len(reply)
    return [piece for piece in pieces if any(piece.learned)]


def _reply(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    options: Mapping[str, Any],
) -> list[int]:
    """The tokens of the last message up to the one that ends it."""
    messages = [with_parsed_arguments(message) for message in messages]
    template, place = tokenizer.template, len(messages) - 1
    before = template.render(messages[:-1], tools, True, options)
    whole = template.render(messages, tools, False, options)
    if not whole.startswith(before):
        raise BackendError(
            f"the chat template writes message {place} otherwise than a reply begins, which is {short(before[-40:], 60)}: "
            "nothing that is sampled there could become it. Give its thoughts as reasoning_content, or chat_template_kwargs "
            "such as enable_thinking=False"
        )
    prompt, ids = tokenizer.encode(before), tokenizer.encode(whole)
    joined = ids[: len(prompt)] == prompt
    # Where the border is inside a token, the prompt ends there all the same when replies are sampled.
    reply = ids[len(prompt) :] if joined else template.encoded_after(None, whole[len(before) :])
    _check_shown(messages[-1], place, whole[len(before) :])
    end = next((position for position, token in enumerate(reply) if token in template.end_ids), None)
    if end is None:
        ending = _next_beginning(tokenizer, messages, tools, options, whole)
        return [*tokenizer.encode(whole[len(before) :].rstrip()), *ending]
    left = tokenizer.decode(reply[end + 1 :]).strip()
    if left:
        raise BackendError(
            f"message {place} has {template.text_of(reply[end])!r} in its text, at which replies end, before {short(left, 60)}"
        )
    return reply[: end + 1]


def _check_shown(message: Mapping[str, Any], place: int, text: str) -> None:
    """Raises BackendError where the template leaves out a call or the content: another reply would be learned."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        arguments = function.get("arguments")
        # Some templates write no names, where there is one tool alone.
        written = [function.get("name"), *(arguments.values() if isinstance(arguments, Mapping) else ())]
        if not any(str(each) in text for each in written if each not in (None, "")):
            raise BackendError(
                f"the chat template leaves out the call of {short(function.get('name'), 60)} in message {place}. Write it as the "
                "model would, in the content"
            )
    content = plain_content(message.get("content"))
    said = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    if said not in text:
        raise BackendError(f"the chat template leaves out the text of message {place}, {short(said, 60)}")


def _next_beginning(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    options: Mapping[str, Any],
    whole: str,
) -> list[int]:
    """The token that ends a reply after which the template writes nothing: that with which the next turn begins, if replies end
    there, or else the first at which they do."""
    template = tokenizer.template
    if messages[-1].get("tool_calls"):
        following = {"role": "tool", "content": "x", "tool_call_id": messages[-1]["tool_calls"][-1].get("id")}
    else:
        following = {"role": "user", "content": "x"}
    try:
        text = template.render([*messages, following], tools, False, options)
    except BackendError:  # not every template takes results of tools
        text = whole
    begins = tokenizer.encode(text[len(whole) :])[:1] if text.startswith(whole) else []
    ends = [token for token in begins if token in template.end_ids]
    return ends or sorted(template.end_ids)[:1]
