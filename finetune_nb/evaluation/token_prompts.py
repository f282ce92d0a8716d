"""TokenPrompts: conversations with a server that takes token ids as prompts, carried on behind the very ids it sampled.

A server that gets messages renders and tokenizes all of them anew at every turn, and what it then sees need not be what it
has sampled (drift). Here the conversation is rendered with the model's own tokenizer, so that only the new messages are
tokenized. What cannot go that way (pictures, options of chat alone) is left to the server's own chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..chat_tokenizer import ChatTokenizer
from ..redaction import redacting_logger

__all__ = ["TokenPrompts"]

logger = redacting_logger(__name__)

_SAMPLING = {
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "bad_words",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "return_token_ids",
}
"""Options that mean the same in completions as in chat completions."""
_NOT_TAKEN = (400, 404, 405, 415, 422, 501)
"""How servers answer that they have no completions, or take no ids there."""


class TokenPrompts:
    """tokenizer: of the server's model. name: of the llm, for messages."""

    def __init__(self, tokenizer: ChatTokenizer, name: str) -> None:
        self.tokenizer, self._name = tokenizer, name
        self._taken: bool | None = None

    def fit(self, messages: Sequence[Mapping[str, Any]], tools: Any, options: Mapping[str, Any]) -> bool:
        """Whether such a call can be made with token ids."""
        return (
            self._taken is not False
            and (not tools or self.tokenizer.reads_tool_calls)
            and options.keys() <= _SAMPLING
            and all(isinstance(message.get("content"), str | None) for message in messages)
        )

    def may_be_refused(self, error: Exception) -> bool:
        """Whether the error of a call may mean that the server takes no ids, so that its chat is worth a try. Once it has
        taken some it never does."""
        return self._taken is None and getattr(error, "status_code", None) in _NOT_TAKEN

    def taken(self) -> None:
        """The server has answered a call with token ids."""
        self._taken = True

    def refused(self, error: Exception) -> None:
        """It has refused one, and answered the same as messages: from now on it gets messages."""
        self._taken = False
        logger.warning(
            "the server of llm %r takes no token ids (%s: %s): it renders every turn itself, and turns that it tokenizes "
            "otherwise than it sampled them are trained on by themselves (drifted_turns in run.epochs()).",
            self._name, type(error).__name__, error,
        )  # fmt: skip

    def reply(self, ids: Sequence[int] | None, text: str, sequence: int) -> dict[str, Any]:
        """The assistant message of what was sampled; without ids, of its text."""
        if ids is None:
            return {"role": "assistant", "content": text}
        reply = self.tokenizer.parse(ids)
        for i, tool_call in enumerate(reply.get("tool_calls") or ()):
            tool_call["id"] = f"call_{sequence}_{i}"  # that of the parser comes again with the same reply
        return reply
