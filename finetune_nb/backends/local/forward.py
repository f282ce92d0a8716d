"""Token sequences -> tensors -> log probabilities, the prompt of a group computed once where that saves enough.

Sequences that begin with the same prompt share its forward and backward pass: the prompt runs as a row of its own, and
each reply runs after a copy of its keys and values. Gradients flow through the copies, so this is the same sum in
another order. Shapes are in the names: U different prompts of P tokens, B sequences of T tokens, padded on the right. Column t
always speaks of token t, so column 0, which nothing predicts, is never trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BackendError
from ...training.batch import TokenSequence
from .families.caches import select_rows
from .families.passes import forward_parameters, logits_only
from .families.positions import borders_of
from .prefill import prefill

__all__ = [
    "TokenBatch",
    "TokenScores",
    "check_fits",
    "collate",
    "micro_batches",
    "score_tokens",
    "token_logprobs",
]

WORTH_SHARING = 1 / 3
"""Prompts are shared where this part of all tokens is saved: a pass of their own costs something, too."""

WORTH_CUTTING = 512
"""Tokens of padding that a micro-batch more must save. Its passes cost what 250 tokens do (embedded model, CPU)."""

Batch = Sequence[TokenSequence]


class TokenScores(NamedTuple):
    """What a forward pass says of B sequences of T tokens; 0 where the policy did not sample the token."""

    logprobs_BT: Tensor
    """Log probability of each token given those before it."""
    entropies_BT: Tensor | None = None
    """Entropy in nats of the distribution that each token was drawn from, if it was asked for."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A micro-batch. Id 0 fills padded positions: the attention mask hides it, so that it needs no token of its own."""

    ids_BT: Tensor
    attention_BT: Tensor
    mask_BT: Tensor
    """True for tokens that the policy sampled."""
    old_logprobs_BT: Tensor
    advantages_BT: Tensor
    temperature_B: Tensor
    prompts: Sequence[Sequence[int]] = ()
    """The tokens before the columns of `ids_BT`, each prompt once; empty where they are whole sequences."""
    prompt_of_row_B: Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens of a pass over it, padding included."""
        return self.ids_BT.numel() + len(self.prompts) * max(map(len, self.prompts), default=0)

    def scores(self, model: Any, entropies: bool = False) -> TokenScores:
        """(B, T) as `score_tokens`."""
        if self.prompt_of_row_B is None:
            return self._of_whole_sequences(model, entropies)
        _, cache, mask_UP = prefill(model, self.prompts)
        cache = select_rows(cache, self.prompt_of_row_B)
        attention = torch.cat([mask_UP[self.prompt_of_row_B], self.attention_BT], 1)
        positions_BT = (attention.cumsum(1) - 1)[:, mask_UP.shape[1] :]
        return score_tokens(
            model, self.ids_BT, attention, self.mask_BT, self.temperature_B, entropies=entropies,
            past_key_values=cache, position_ids=positions_BT, use_cache=True,
        )  # fmt: skip

    def _of_whole_sequences(self, model: Any, entropies: bool) -> TokenScores:
        """One pass; where positions change with the length of a sequence, one more for the tokens before each change."""
        last = self.ids_BT.shape[1] - 1
        borders = [border for border in borders_of(model) if border <= last]
        if not borders:
            return score_tokens(
                model, self.ids_BT, self.attention_BT, self.mask_BT, self.temperature_B, entropies=entropies
            )
        columns_T = torch.arange(last + 1, device=self.ids_BT.device)
        logprobs_BT, begin = torch.zeros_like(self.old_logprobs_BT), 1
        entropies_BT = torch.zeros_like(self.old_logprobs_BT) if entropies else None
        for known in sorted({*borders, last}):
            # Tokens that come after `begin` to `known` others.
            mask_BT = self.mask_BT & (columns_T >= begin) & (columns_T <= known)
            if mask_BT.any():
                found = score_tokens(
                    model, self.ids_BT[:, : known + 1], self.attention_BT[:, : known + 1], mask_BT[:, : known + 1],
                    self.temperature_B, fed=known, entropies=entropies,
                )  # fmt: skip
                logprobs_BT = logprobs_BT + pad(found.logprobs_BT, (0, last - known))
                if entropies_BT is not None and found.entropies_BT is not None:
                    entropies_BT = entropies_BT + pad(found.entropies_BT, (0, last - known))
            begin = known + 1
        return TokenScores(logprobs_BT, entropies_BT)


def check_fits(sequences: Iterable[TokenSequence], policy: Any) -> None:
    """Raises BackendError for sequences that a LocalPolicy's model cannot hold."""
    for sequence in sequences:
        if max(sequence.ids) >= policy.vocabulary:
            raise BackendError(
                f"a trajectory has token id {max(sequence.ids)}, but the model knows {policy.vocabulary} tokens. "
                "Was it sampled by another model?"
            )
        if policy.longest is not None and len(sequence) > policy.longest:
            raise BackendError(
                f"a trajectory has {len(sequence)} tokens, but the model holds {policy.longest}. End the episode before it grows "
                "so long, or leave the trajectory out."
            )


def micro_batches(
    sequences: Batch, max_tokens: int, sharing: bool = False
) -> Iterator[tuple[list[TokenSequence], bool]]:
    """Splits an optimizer batch, and says of each part whether its prompts are shared.

    Rows times longest row stay within `max_tokens`, and with them prompts times longest prompt where they are shared; a
    sequence that is longer by itself excepted. Those of like length, or of one prompt, come together, and short ones
    are not padded to long ones where that would cost much. sharing: whether the model can.
    """
    shared = sharing and _saved(sequences) >= WORTH_SHARING
    for part in [sorted(sequences, key=_by_prompt)] if shared else _of_like_length(sorted(sequences, key=len)):
        yield from _within(part, max_tokens, shared)


def _of_like_length(sequences: Batch) -> Iterator[Batch]:
    """Cuts sorted sequences where that saves the most padding, as long as it saves enough."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    saved = np.arange(1, len(lengths)) * (lengths[-1:] - lengths[:-1])
    if not saved.size or saved.max() < WORTH_CUTTING:
        yield sequences
        return
    cut = int(saved.argmax()) + 1
    yield from _of_like_length(sequences[:cut])
    yield from _of_like_length(sequences[cut:])


def _within(sequences: Batch, max_tokens: int, shared: bool) -> Iterator[tuple[list[TokenSequence], bool]]:
    """Those of one order, in micro-batches of at most so many tokens."""
    batch: list[TokenSequence] = []
    prompts, longest_prompt, longest = set(), 0, 0
    for sequence in sequences:
        prompt = _prompt(sequence) if shared else ()
        longest, longest_prompt = max(longest, len(sequence) - len(prompt)), max(longest_prompt, len(prompt))
        size = (len(batch) + 1) * longest + len(prompts | {prompt}) * longest_prompt
        if batch and size > max_tokens:
            yield batch, shared
            batch, prompts = [], set()
            longest, longest_prompt = len(sequence) - len(prompt), len(prompt)
        batch.append(sequence)
        prompts.add(prompt)
    if batch:
        yield batch, shared


def _prompt(sequence: TokenSequence) -> tuple[int, ...]:
    """All before the first sampled token but one: the last one's logits speak of what was sampled."""
    return tuple(sequence.ids[: max(sequence.sampled.index(True) - 1, 0)])


def _by_prompt(sequence: TokenSequence) -> tuple[Any, ...]:
    prompt = _prompt(sequence)
    return len(prompt), prompt, len(sequence)


def _saved(sequences: Batch) -> float:
    """The part of all tokens that need not be computed."""
    prompts = [_prompt(sequence) for sequence in sequences]
    if min(map(len, prompts)) == 0:
        return 0.0
    return (sum(map(len, prompts)) - sum(map(len, set(prompts)))) / sum(map(len, sequences))


def collate(batch: Batch, device: torch.device | str = "cpu", shared: bool = False) -> TokenBatch:
    """The tensors of a micro-batch. shared: as `micro_batches` said."""
    prompts = [_prompt(sequence) if shared else () for sequence in batch]
    begins = list(map(len, prompts))
    shape = (len(batch), max(len(sequence) - begin for sequence, begin in zip(batch, begins, strict=True)))
    ids_BT, attention_BT, mask_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    old_BT, advantages_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for row, (sequence, begin) in enumerate(zip(batch, begins, strict=True)):
        end = len(sequence) - begin
        ids_BT[row, :end] = sequence.ids[begin:]
        attention_BT[row, :end] = 1
        mask_BT[row, :end] = sequence.sampled[begin:]
        old_BT[row, :end] = sequence.logprobs[begin:]
        advantages_BT[row, :end] = sequence.advantages[begin:]
    temperature_B = np.array([sequence.temperature for sequence in batch], np.float32)
    arrays = (ids_BT, attention_BT, mask_BT, old_BT, advantages_BT, temperature_B)
    ids, attention, mask, old, advantages, temperature = (torch.from_numpy(array).to(device) for array in arrays)
    tensors = TokenBatch(ids, attention, mask, old, advantages, temperature)
    if not shared:
        return tensors
    place: dict[tuple[int, ...], int] = {}
    prompt_of_row_B = torch.tensor([place.setdefault(prompt, len(place)) for prompt in prompts], device=device)
    return replace(tensors, prompts=list(place), prompt_of_row_B=prompt_of_row_B)


def token_logprobs(
    model: Any,
    ids_BT: Tensor,
    attention_BT: Tensor,
    mask_BT: Tensor,
    temperature_B: Tensor | float = 1.0,
    **options: Any,
) -> Tensor:
    """(B, T) float32, as in `score_tokens`."""
    return score_tokens(model, ids_BT, attention_BT, mask_BT, temperature_B, **options).logprobs_BT


def score_tokens(
    model: Any,
    ids_BT: Tensor,
    attention_BT: Tensor,
    mask_BT: Tensor,
    temperature_B: Tensor | float = 1.0,
    fed: int | None = None,
    entropies: bool = False,
    **before: Any,
) -> TokenScores:
    """(B, T) float32 log probability of each masked token given those before it, at the temperature at which it was
    sampled (> 0), and the entropy of that distribution; 0 where `mask_BT` is False.

    `model` is any Hugging Face causal language model. Its output layer runs only at columns that some row trains on:
    with a large vocabulary that layer is most of the cost. fed: columns that the model is given; the last one, of which
    nothing is predicted here, may be left out. None: all. entropies: whether they are computed. before: what the forward pass is
    to know of tokens before these (`past_key_values`, `position_ids`); `attention_BT` then covers them too.
    """
    columns_K = mask_BT.any(0).nonzero().squeeze(1)
    if columns_K.numel() and columns_K[0] == 0:
        raise ValueError("mask_BT trains on column 0, but nothing predicts a first token: put the prompt before it")
    before_K = columns_K - 1  # the logits at t - 1 speak of token t
    ids_BF = ids_BT[:, :fed]
    inputs = {"input_ids": ids_BF, "attention_mask": attention_BT[:, :fed], "use_cache": False, **before}
    inputs |= logits_only(model)
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = before_K
    logits_BKV = model(**inputs).logits
    if logits_BKV.shape[1] == ids_BF.shape[1]:  # all columns: more than those asked for, as column 0 has none before it
        logits_BKV = logits_BKV[:, before_K]
    temperature_B11 = torch.as_tensor(temperature_B, dtype=torch.float32, device=ids_BT.device).reshape(-1, 1, 1)
    logits_BKV = logits_BKV.float() / temperature_B11
    total_BK = logits_BKV.logsumexp(2)

    def spread(values_BK: Tensor) -> Tensor:
        masked_BK = torch.where(mask_BT[:, columns_K], values_BK, 0.0)
        return torch.zeros(ids_BT.shape, device=ids_BT.device).index_copy(1, columns_K, masked_BK)

    logprobs_BT = spread(logits_BKV.gather(2, ids_BT[:, columns_K, None]).squeeze(2) - total_BK)
    if not entropies:
        return TokenScores(logprobs_BT)
    probabilities_BKV = (logits_BKV - total_BK[:, :, None]).exp()
    # A token that cannot be drawn (-inf) adds nothing: 0 * -inf would be NaN.
    expected_BK = (probabilities_BKV * logits_BKV.clamp(min=torch.finfo(torch.float32).min)).sum(2)
    return TokenScores(logprobs_BT, spread(total_BK - expected_BK))
