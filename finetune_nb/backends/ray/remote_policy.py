"""The policy that is trained in an actor, as the kernel has it: it renders and parses here, and samples there.

Workers that roll out have replicas; new weights go to them through the object store and never come here.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ...llms.chat_tokenizer import ChatTokenizer
from ...types import EpisodeKey, Sample, SamplingParams
from .trainer_actor import Face, RunState

__all__ = [
    "RemotePolicy",
]


class RemotePolicy(ChatTokenizer):
    """ask: a method of the actor and its arguments -> its answer, on any event loop. get: the same for threads that may
    wait, with the RunState that came with it. in_doubt: whether the weights may be others than those that the last answer
    spoke of."""

    constrains = True
    """Replies are held to `SamplingParams.reply_format`."""

    def __init__(
        self,
        face: Face,
        ask: Callable[..., Awaitable[Any]],
        get: Callable[[str], tuple[Any, RunState]],
        in_doubt: Callable[[], bool],
    ) -> None:
        self._show(face)
        self._ask, self._get, self._in_doubt = ask, get, in_doubt
        self._actor = 0
        self._standing = RunState(-1, 0)
        self._hearing = threading.Lock()

    def _show(self, face: Face) -> None:
        super().__init__(face.tokenizer, face.end_ids, face.name)
        self.description = f"{face.description}, in an actor of the Ray cluster"

    @property
    def version(self) -> int:
        return self._standing.version

    @property
    def weights_id(self) -> Any:
        return object() if self._in_doubt() else (self._actor, self._standing.weights_id)

    def moved(self, face: Face) -> None:
        """Another actor has the weights now."""
        self._show(face)
        with self._hearing:
            self._actor += 1
            self._standing = RunState(-1, 0)

    def heard(self, standing: RunState) -> None:
        """What came with an answer; one that was overtaken by a newer one says nothing."""
        with self._hearing:
            self._standing = max(self._standing, standing)

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int) -> Sample:
        """As the actor's policy samples."""
        return await self._ask("sample", list(ids), params, seed)

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        return nullcontext()

    def replica(self) -> Any:
        """Object ref of what makes a replica."""
        (ref,), _ = self._get("replica")
        return ref

    def weights(self) -> tuple[Any, int, Any]:
        """`weights_id`, `version`, and the object ref of what training changes. Waits for a job at work."""
        (ref,), standing = self._get("weights")
        return (self._actor, standing.weights_id), standing.version, ref
