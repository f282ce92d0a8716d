"""Reads the text of a message, and the tokens that were sampled for it.

Nothing here raises: records may also come from third-party components.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from ..llms.chat_messages import field_of
from ..rollouts.episodes import SampledTurn
from ..types import DPOItem, EpisodeItem, MessageKey, as_float, logprob_entries

__all__ = [
    "Token",
    "called_functions",
    "entropy_of",
    "preference_text",
    "said_text",
    "tokens_of",
]


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def said_text(item: EpisodeItem | DPOItem) -> str:
    """The whole message as one text: the sampled text if it is known, else its content and tool calls."""
    if isinstance(item, DPOItem):
        return preference_text(item)
    tokens = tokens_of(item)
    if tokens and tokens[0].text is not None:
        return "".join(token.text or "" for token in tokens)
    text = item.content if isinstance(item.content, str) else ""
    calls = called_functions(item)
    if not isinstance(calls, list) or not calls:
        return text
    return text + "\n→ calls " + json.dumps(calls, ensure_ascii=False, default=str)


def preference_text(item: DPOItem) -> str:
    """A preference as one text: its prompt, then both responses."""
    prompt = item.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message.role}: {message.content}" for message in prompt)
    return f"{prompt}\n\n✓ chosen: {item.chosen_response}\n\n✗ rejected: {item.rejected_response}"


def called_functions(item: EpisodeItem) -> Any:
    """The tool calls of a message without their ids, which differ in every rollout. A value that is no list is returned as is."""
    calls = (item.metadata or {}).get(MessageKey.TOOL_CALLS) or []
    if not isinstance(calls, list):
        return calls
    return [call.get("function", call) if isinstance(call, dict) else call for call in calls]


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Token(NamedTuple):
    """One sampled token."""

    text: str | None
    """None if it was not recorded."""
    logprob: float
    """Natural logarithm of its probability under the sampling distribution; NaN if missing."""
    entropy: float = math.nan
    """Of the policy in its place, in nats: as it was recorded, over the whole vocabulary; else of the alternatives that were,
    see `entropy_of`; NaN without either."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Other likely tokens at this position, with their logprobs; most likely first."""
    change: float = math.nan
    """What its logprob has changed by under other weights; NaN if nobody has asked."""

    @property
    def probability(self) -> float:
        """In [0, 1]; NaN if missing."""
        return math.exp(min(self.logprob, 0.0))


def tokens_of(item: EpisodeItem | DPOItem) -> list[Token]:
    """The sampled tokens of a message, in order; empty if the policy sampled none, or if the format of the record is not
    known."""
    turn = SampledTurn.of(item)
    if turn is None or isinstance(item, DPOItem):
        return []
    entries = logprob_entries(item.logprobs)
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        return []
    texts = _one_each(turn.tokens, len(entries))
    tops = _one_each(turn.alternatives, len(entries))
    entropies = _one_each(turn.entropies, len(entries))
    return [_token(*each) for each in zip(entries, texts, tops, entropies, strict=True)]


def entropy_of(logprobs: Iterable[float]) -> float:
    """Entropy in nats of a distribution of which the natural logprobs of some tokens are known.

    The remaining probability counts as one token: -sum p ln p - rest ln rest. This is a lower bound of the true entropy,
    tighter the less probability remains.

    Args:
        logprobs: Natural logprobs of distinct tokens. NaN is ignored.

    Returns:
        The entropy; NaN if no logprob is known.
    """
    known = [min(logprob, 0.0) for logprob in logprobs if not math.isnan(logprob)]
    if not known:
        return math.nan
    rest = 1.0 - math.fsum(map(math.exp, known))
    inside = math.fsum(-logprob * math.exp(logprob) for logprob in known if logprob > -math.inf)
    return inside - (rest * math.log(rest) if rest > 1e-12 else 0.0)


def _one_each(found: Any, count: int) -> Sequence[Any]:
    """Values recorded alongside the logprobs, one per token; all None if their number does not match."""
    if isinstance(found, Sequence) and not isinstance(found, str | bytes) and len(found) == count:
        return found
    return [None] * count


def _token(entry: Any, text: Any, top: Any, entropy: Any) -> Token:
    """Make one token.

    Args:
        entry: Its logprob, or the entry in OpenAI's format that holds it.
        text: Its text, if that was recorded alongside the logprobs.
        top: The most likely tokens at its position, if they were recorded alongside the logprobs.
        entropy: The policy's entropy there, if it was recorded.
    """
    if isinstance(entry, Real):
        logprob = as_float(entry)
    else:
        logprob, top = as_float(field_of(entry, "logprob")), field_of(entry, "top_logprobs")
        if not isinstance(text, str):
            text = field_of(entry, "token")
    if not isinstance(text, str):
        text = None

    recorded = as_float(entropy)
    others = []
    for other, value in _likely(top):
        if isinstance(other, str) and other != text and not math.isnan(value):
            others.append((other, value))
    if not others:
        return Token(text, logprob, recorded)
    others.sort(key=lambda pair: -pair[1])
    if math.isnan(recorded):
        recorded = entropy_of([logprob, *(value for _, value in others)])
    return Token(text, logprob, recorded, tuple(others))


def _likely(top: Any) -> list[tuple[Any, float]]:
    """(token, logprob) of the most likely tokens, from either of the two formats that servers send."""
    if isinstance(top, Mapping):  # {" 7": -0.2}, as in the completions API
        return [(token, as_float(logprob)) for token, logprob in top.items()]
    if isinstance(top, Sequence) and not isinstance(top, str | bytes):
        return [(field_of(entry, "token"), as_float(field_of(entry, "logprob"))) for entry in top]
    return []
