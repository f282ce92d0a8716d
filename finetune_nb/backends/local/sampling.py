"""Samples a batch of prompts with one KV cache: tensors and a loop.

A reply depends on its own prompt, parameters and seed, and on the weights: each request draws from a random stream of
its own, so what else is in the batch changes a logit's last bits and nothing more. Equal prompts are prefilled once,
and so is what all of them begin with.
Shapes are in the names: U different prompts, B rows (one a request), T tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError
from ...llms.constrained import Guide
from ...types import Sample, SamplingParams
from .families.caches import select_rows
from .families.passes import Batching, forward_of
from .families.positions import borders_of, last_length
from .prefill import prefill

__all__ = [
    "SampleRequest",
    "sample_batch",
]

COMPACT_BELOW = 0.75
"""Rows that have ended are cut out of the cache once at most this share still runs: cutting copies the whole cache."""


@dataclass(eq=False, slots=True)
class SampleRequest:
    """What to sample, and what has been sampled of it."""

    ids: Sequence[int]
    """The prompt, at least one token."""
    params: SamplingParams
    """`max_tokens` at least 1."""
    seed: int
    """Any integer; taken modulo 2**128."""
    gone: Callable[[], bool] = lambda: False
    """True once nobody waits any more: the row then ends early, with whatever it has."""
    guide: Guide | None = None
    """Which tokens fit the form that the reply must have; None: any."""
    reply: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[dict[int, float]] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: str | None = None

    @property
    def tokens(self) -> list[int]:
        """The prompt and what has been sampled."""
        return [*self.ids, *self.reply]

    def take(self, token: int, logprob: float, end_ids: frozenset[int], text: Callable[[list[int]], str]) -> None:
        """Adds a sampled token and sees whether the reply ends with it."""
        self.reply.append(token)
        self.logprobs.append(logprob)
        if self.guide is not None and token not in end_ids:
            self.guide.take(token)
        if token in end_ids or (self.params.stop and self._stops(text)):
            self.ended = "stop"
        elif len(self.reply) >= self.params.max_tokens:
            self.ended = "length"
        elif self.gone():
            self.ended = "gone"

    def _stops(self, text: Callable[[list[int]], str]) -> bool:
        # A token is at least one byte of text, so a stop text that ends here began in this tail.
        longest = max(len(stop.encode()) for stop in self.params.stop)
        tail = text(self.reply[-longest - 4 :])
        return any(stop in tail for stop in self.params.stop)

    def sample(self) -> Sample:
        reason = "length" if self.ended == "length" else "stop"
        likeliest = self.likeliest if self.params.top_logprobs else None
        # Of a row that was sampled with entropies there is one for each token.
        entropies = self.entropies if len(self.entropies) == len(self.reply) else None
        return Sample(self.reply, self.logprobs, reason, likeliest, entropies)


def sample_batch(
    model: Any,
    requests: Sequence[SampleRequest],
    *,
    end_ids: frozenset[int],
    pad_id: int,
    text: Callable[[list[int]], str],
    stopped: Callable[[], bool] = lambda: False,
    max_tokens: int = 131_072,
    batching: Batching = "padded",
    entropy: bool = False,
) -> None:
    """Fills in every request's reply.

    model: a Hugging Face causal language model in eval mode. end_ids: tokens that end a turn. text: ids -> text, for
    stop texts. stopped: asked before each token; True ends the batch early. max_tokens: rows times their longest
    possible length that one cache may hold; more requests are sampled in several goes. batching: how prompts of
    different lengths share one. entropy: note the entropy in the place of each token, see `_entropies`.
    """
    run = _Run(model, end_ids, pad_id, text, stopped, batching, borders_of(model), entropy)
    while requests:
        crossed: list[SampleRequest] = []
        for chunk in _chunks(requests, max_tokens, batching, run.borders):
            crossed += _sample_chunk(run, chunk)
        requests = crossed


@dataclass(frozen=True, slots=True)
class _Run:
    """What all chunks have in common."""

    model: Any
    end_ids: frozenset[int]
    pad_id: int
    text: Callable[[list[int]], str]
    stopped: Callable[[], bool]
    batching: Batching
    borders: tuple[int, ...]
    entropy: bool


def _chunks(
    requests: Sequence[SampleRequest], max_tokens: int, batching: Batching = "padded", borders: tuple[int, ...] = ()
) -> list[list[SampleRequest]]:
    """Requests of like length together, so that little is padded; within one length their order stays.

    Only of one length where batching is "equal", one alone where it is "alone", and never across a border of positions.
    """
    companies: dict[Any, list[SampleRequest]] = {}
    for request in sorted(requests, key=lambda r: len(r.ids) + r.params.max_tokens):
        length = len(request.tokens)
        company = {"equal": length, "alone": id(request)}.get(batching, last_length(length, borders))
        companies.setdefault(company, []).append(request)
    chunks: list[list[SampleRequest]] = []
    for company in companies.values():
        longest = 0
        chunks.append([])
        for request in company:
            longest = max(longest, len(request.ids) + request.params.max_tokens)
            if chunks[-1] and longest * (len(chunks[-1]) + 1) > max_tokens:
                chunks.append([])
            chunks[-1].append(request)
    return chunks


@torch.inference_mode()
def _sample_chunk(run: _Run, rows: list[SampleRequest]) -> list[SampleRequest]:
    """Samples on until every row has ended; those whose positions changed before are returned, to be begun anew."""
    device, forward = run.model.device, forward_of(run.model, run.batching)
    unique: dict[tuple[int, ...], int] = {}
    prompt_of_row = torch.tensor([unique.setdefault(tuple(row.tokens), len(unique)) for row in rows], device=device)
    logits_BV, cache, mask_UP = prefill(run.model, list(unique), run.pad_id, forward, run.batching)
    width, steps = mask_UP.shape[1], max(row.params.max_tokens - len(row.reply) for row in rows)
    until = last_length(width, run.borders)
    if len(unique) < len(rows):
        logits_BV = logits_BV[prompt_of_row]
        cache = select_rows(cache, prompt_of_row)
    # The mask of the longest possible reply at once; each step looks at its beginning.
    prompt_mask_BT = mask_UP[prompt_of_row]
    mask_BT = torch.cat([prompt_mask_BT, torch.ones((len(rows), steps), dtype=torch.long, device=device)], 1)
    next_position_B = prompt_mask_BT.sum(1)
    draws_BT = _uniforms(rows, steps).to(device)
    heat_B = torch.tensor([row.params.temperature for row in rows], device=device)
    scaled = any(row.params.temperature not in (0, 1) for row in rows)

    live, crossed = rows, []
    for step in range(steps):
        fitting_BV = _fitting(live, logits_BV)
        chosen_B, logprobs_B, logprobs_BV, drawn_BV = _choose(logits_BV, draws_BT[:, step], heat_B, fitting_BV)
        _note_likeliest(live, logprobs_BV)
        if run.entropy:
            if scaled:
                logprobs_BV = logits_BV.float().log_softmax(1)
            if scaled or fitting_BV is not None:
                drawn_BV = logprobs_BV.exp()
            _note_entropies(live, drawn_BV, logprobs_BV)
        del drawn_BV, logprobs_BV
        for row, token, logprob in zip(live, chosen_B.tolist(), logprobs_B.tolist(), strict=True):
            if row.ended is None:
                row.take(token, logprob, run.end_ids, run.text)
        running = [i for i, row in enumerate(live) if row.ended is None]
        most = COMPACT_BELOW * len(live)
        if until is not None and width + step + 1 > until:
            # The longest row, which may have ended, would decide on the positions of all.
            most = len(live) - 1
            crossed += [live[i] for i in running if len(live[i].tokens) > until]
            running = [i for i in running if len(live[i].tokens) <= until]
        if not running or run.stopped():
            break
        if len(running) <= most:
            keep = torch.tensor(running, device=device)
            live = [live[i] for i in running]
            cache = select_rows(cache, keep)
            chosen_B, mask_BT, next_position_B = chosen_B[keep], mask_BT[keep], next_position_B[keep]
            draws_BT, heat_B = draws_BT[keep], heat_B[keep]
        logits_BV, cache = forward(chosen_B[:, None], mask_BT[:, : width + step + 1], next_position_B[:, None], cache)
        next_position_B = next_position_B + 1
    return [] if run.stopped() else crossed


def _uniforms(rows: list[SampleRequest], steps: int) -> Tensor:
    """(B, steps) in [0, 1): row b's numbers come from its seed alone (Philox, a counter-based generator)."""
    draws_BT = np.zeros((len(rows), steps), dtype=np.float32)
    for draws_T, row in zip(draws_BT, rows, strict=True):
        count, begun = row.params.max_tokens, len(row.reply)
        of_reply = np.random.Generator(np.random.Philox(key=row.seed % 2**128)).random(count, dtype=np.float32)
        draws_T[: count - begun] = of_reply[begun:]
    return torch.from_numpy(draws_BT)


def _choose(
    logits_BV: Tensor, draws_B: Tensor, heat_B: Tensor, fitting_BV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) token ids, (B,) their log probabilities, (B, V) those of all tokens, and (B, V) the probabilities with which they
    were drawn. Temperature 0 takes the likeliest token,
    with its log probability at temperature 1; others invert the cumulative distribution at `draws_B`.

    fitting_BV: tokens that may be drawn; None: all. Log probabilities are those of the model, whatever may be drawn."""
    greedy_B = heat_B == 0
    logprobs_BV = (logits_BV / torch.where(greedy_B, 1.0, heat_B)[:, None]).log_softmax(1)
    drawn_BV = logprobs_BV
    if fitting_BV is not None:
        drawn_BV = logprobs_BV.masked_fill(~fitting_BV, -torch.inf).log_softmax(1)
    probabilities_BV = drawn_BV.exp()
    cumulative_BV = probabilities_BV.cumsum(1)
    total_B1 = cumulative_BV[:, -1:]
    if not total_B1.isfinite().all():
        raise BackendError("the model's logits are not finite: its weights have diverged. Start from saved ones.")
    # Strictly below the total, whatever rounding did: the found token then has a probability above 0.
    target_B1 = torch.minimum(draws_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    chosen_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
    chosen_B = torch.where(greedy_B, drawn_BV.argmax(1), chosen_B)
    return chosen_B, logprobs_BV.gather(1, chosen_B[:, None]).squeeze(1), logprobs_BV, probabilities_BV


def _fitting(rows: list[SampleRequest], logits_BV: Tensor) -> Tensor | None:
    """(B, V) the tokens that each row may take next; None where every row may take any."""
    if all(row.guide is None or row.ended is not None for row in rows):
        return None
    fitting_BV = np.ones(tuple(logits_BV.shape), dtype=bool)
    for fitting_V, row in zip(fitting_BV, rows, strict=True):
        if row.guide is not None and row.ended is None:
            row.guide.mark(fitting_V)
    return torch.from_numpy(fitting_BV).to(logits_BV.device)


def _note_likeliest(rows: list[SampleRequest], logprobs_BV: Tensor) -> None:
    """Writes down the likeliest tokens for those rows that want them."""
    most = max(row.params.top_logprobs for row in rows)
    if not most:
        return
    values_BK, ids_BK = logprobs_BV.topk(min(most, logprobs_BV.shape[1]), dim=1)
    for row, values, ids in zip(rows, values_BK.tolist(), ids_BK.tolist(), strict=True):
        wanted = row.params.top_logprobs
        if wanted and row.ended is None:
            row.likeliest.append(dict(zip(ids[:wanted], values[:wanted], strict=True)))


def _note_entropies(rows: list[SampleRequest], probabilities_BV: Tensor, logprobs_BV: Tensor) -> None:
    """Writes down for each row the entropy in nats of its next token.

    probabilities_BV (overwritten), logprobs_BV: those of the model itself, over its whole vocabulary, at temperature 1 and
    whatever form the reply is held to: so entropies of different temperatures and formats can be compared. They are rounded to
    float16, as they are stored.
    """
    products_BV = probabilities_BV.mul_(logprobs_BV)
    sums_B = products_BV.sum(1)
    if sums_B.isnan().any():
        # A token of probability 0 adds nothing, but 0 times minus infinity is NaN. Leaving NaN out takes twice as long.
        sums_B = products_BV.nansum(1)
    for row, entropy in zip(rows, sums_B.neg_().clamp_(min=0).half().tolist(), strict=True):
        if row.ended is None:
            row.entropies.append(entropy)
