"""Log probabilities of a recorded trajectory's tokens under the weights that a policy has now, by a forward pass.

The token ids are those that were recorded, prompts included; no text is tokenized again.
"""

from __future__ import annotations

import torch

from ...errors import BackendError
from ...rollouts.episodes import sampled_turns
from ...training.batch import token_sequences
from ...types import Trajectory
from .forward import check_fits, collate, micro_batches
from .memory import ran_out
from .policy import LocalPolicy

__all__ = [
    "trajectory_logprobs",
]


def trajectory_logprobs(policy: LocalPolicy, trajectory: Trajectory, max_tokens: int = 4096) -> list[list[float]]:
    """Compute them. Whoever calls holds `policy.exclusive`.

    Args:
        policy: Has the weights.
        trajectory: An episode.
        max_tokens: Tokens, padding included, of one pass; a longer sequence is a pass of its own.

    Returns:
        For each sampled turn a list with one number a token: natural logarithms, at the temperature that the turn was sampled
        at (1 for a greedy one).

    Raises:
        BackendError: A turn has no token ids or no prompt ids, it is of another model, or memory runs out.
        MissingLogprobs: A sampled turn has none.
    """
    turns = len(sampled_turns(trajectory))
    # In place of an advantage each token carries the number of its turn: turns of one conversation share a sequence.
    sequences = token_sequences(trajectory, [float(turn) for turn in range(turns)])
    check_fits(sequences, policy)
    found: list[list[float]] = [[] for _ in range(turns)]
    try:
        with torch.no_grad():
            for batch, _ in micro_batches(sequences, max_tokens):
                tensors = collate(batch, policy.model.device)
                logprobs_BT = tensors.scores(policy.model).logprobs_BT
                of_turns = tensors.advantages_BT[tensors.mask_BT].tolist()
                for turn, logprob in zip(of_turns, logprobs_BT[tensors.mask_BT].tolist(), strict=True):
                    found[int(turn)].append(logprob)
    except Exception as error:
        if not ran_out(error):
            raise
        size = max(map(len, sequences))
        raise BackendError(
            f"a trajectory of {size:,} tokens does not fit into the memory of {policy.model.device} beside what is there. "
            "Expected room for one forward pass. Wait until the run has ended, or open it in another kernel with ft.Run.open."
        ) from error
    return found
