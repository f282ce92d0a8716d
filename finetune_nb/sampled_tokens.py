"""The tokens of a turn, each with its text, logprob and, where the record has alternatives, entropy.

Reads what recorders leave behind: floats with texts and alternatives beside them (`metadata["tokens"]` and
`["top_logprobs"]`), or OpenAI's logprobs, as dicts or as objects, with their `top_logprobs`. How tokens are shown is
heat_map.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from .types import EpisodeItem

__all__ = ["Token", "entropy_of", "tokens_of"]


class Token(NamedTuple):
    """One sampled token."""

    text: str | None
    """None where the record does not say."""
    logprob: float
    """Natural logarithm, of the distribution that it was sampled from; NaN where it is missing."""
    entropy: float = math.nan
    """In nats, see `entropy_of`; NaN without alternatives."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Other tokens that were likely in that place, with their logprobs; likeliest first."""

    @property
    def probability(self) -> float:
        """In [0, 1]; NaN where it is missing."""
        return math.exp(min(self.logprob, 0.0))


def tokens_of(item: EpisodeItem) -> list[Token]:
    """The sampled tokens of a message, in order; empty where the policy sampled none, or where the record is of a kind
    that is not known. Never raises: records come from others."""
    logprobs = item.logprobs
    entries = logprobs.get("content") if isinstance(logprobs, Mapping) else getattr(logprobs, "content", logprobs)
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        return []
    texts, tops = (_beside(item, name, len(entries)) for name in ("tokens", "top_logprobs"))
    return [_token(entry, text, top) for entry, text, top in zip(entries, texts, tops, strict=True)]


def _beside(item: EpisodeItem, name: str, count: int) -> Sequence[Any]:
    """What the metadata has of that name, one entry a token; None each where there is nothing that fits."""
    found = (item.metadata or {}).get(name)
    if isinstance(found, Sequence) and not isinstance(found, str | bytes) and len(found) == count:
        return found
    return [None] * count


def entropy_of(logprobs: Iterable[float]) -> float:
    """Entropy in nats of a distribution of which some tokens' natural logprobs are known, the rest taken as one token:
    -sum p ln p - rest ln rest. A lower bound of the true entropy, the closer the less is left. NaN without any."""
    known = [min(logprob, 0.0) for logprob in logprobs if not math.isnan(logprob)]
    if not known:
        return math.nan
    rest = 1.0 - math.fsum(map(math.exp, known))
    inside = math.fsum(-logprob * math.exp(logprob) for logprob in known if logprob > -math.inf)
    return inside - (rest * math.log(rest) if rest > 1e-12 else 0.0)


def _token(entry: Any, text: Any, top: Any) -> Token:
    own = None
    if isinstance(entry, Real):
        logprob = _number(entry)
    else:
        own, logprob = _get(entry, "token"), _number(_get(entry, "logprob"))
        top = _get(entry, "top_logprobs")
    text = text if isinstance(text, str) else own if isinstance(own, str) else None
    if isinstance(top, Mapping):  # {" 7": -0.2}, as completions have them
        found = [(other, _number(value)) for other, value in top.items()]
    elif isinstance(top, Sequence) and not isinstance(top, str | bytes):
        found = [(_get(other, "token"), _number(_get(other, "logprob"))) for other in top]
    else:
        return Token(text, logprob)
    others = sorted(
        ((other, value) for other, value in found if isinstance(other, str) and other != text and value == value),
        key=lambda pair: -pair[1],
    )
    entropy = entropy_of([logprob, *(value for _, value in others)]) if others else math.nan
    return Token(text, logprob, entropy, tuple(others))


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.nan
