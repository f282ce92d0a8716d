"""TinkerPolicy: the model in training on a Tinker-compatible service, as the Policy that is sampled.

The service samples tokens and knows no chat: messages become ids here, with the model's own tokenizer and chat template.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Any

from ...errors import BackendError
from ...llms.chat_tokenizer import ChatTokenizer, check_prompt
from ...threads import in_daemon_thread
from ...types import EpisodeKey, Sample, SamplingParams
from .errors import Gone, Lost, Unavailable, sdk, sorted_error
from .service import TinkerService

__all__ = [
    "TinkerPolicy",
]


KEPT_REPLIES = 4


class TinkerPolicy(ChatTokenizer):
    """tokenizer: the model's, with its chat template. end_ids: the tokens that end a turn."""

    def __init__(self, service: TinkerService, tokenizer: Any, end_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, end_ids, service.config.tokenizer or service.config.model)
        self.version = 0
        self.recent: deque[tuple[int, list[int], Sample]] = deque(maxlen=KEPT_REPLIES)
        """The newest replies at temperature 1: policy version, prompt and reply."""
        self._service = service

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        """Nothing waits for an episode: the service forms batches as it likes."""
        return nullcontext()

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        """One reply of the newest weights, or of those of a version that is kept. The same ids, params, seed and weights give the
        same reply where the service is deterministic.

        A reply is cut, with "length", where the model holds no more tokens. Raises BackendError for a prompt that is
        empty or too long, where the service refuses, and where it fails more often than `retries`.
        """
        ids, service, sampler = list(ids), self._service, None
        for attempt in range(service.config.retries + 1):
            try:
                async with self._turn() if version is None else nullcontext():
                    sampler = service.ready_sampler(self.version if version is None else version)
                    if sampler is None and version is not None:
                        # Nothing but the job itself may touch the model now: it makes the sampler again before its first step.
                        raise Unavailable(f"the service has no sampler of policy version {version} any more")
                    if sampler is None:
                        sampler = await in_daemon_thread(service.sampler, self.version)
                    return await self._ask(sampler, ids, check_prompt(ids, params, service.longest, None), seed)
            except Unavailable as error:
                if isinstance(error, Gone) and sampler is not None and version is None:
                    await in_daemon_thread(service.revive, self.version, sampler)
                if attempt == service.config.retries:
                    raise
                await asyncio.sleep(service.config.retry_delay * 2**attempt)
        raise AssertionError("unreachable")

    def _turn(self) -> AbstractAsyncContextManager[None]:
        """Waits for a job that trains the weights that are sampled."""
        return self._service.turns.sampling() if self._service.shares_weights else nullcontext()

    async def _ask(self, sampler: Any, ids: list[int], params: SamplingParams, seed: int) -> Sample:
        tinker = sdk()
        stop: list[Any] = sorted(self._end_ids)
        if params.stop:  # the service takes texts or ids, not both
            stop = [*params.stop, *filter(None, map(self.tokenizer.decode, sorted(self._end_ids)))]
        asked = tinker.SamplingParams(
            max_tokens=params.max_tokens, temperature=params.temperature, seed=seed % 2**31, stop=stop or None
        )
        what = "sampling a reply"
        try:
            future = sampler.sample(tinker.ModelInput.from_ints(ids), 1, asked)
            pending = future.future() if hasattr(future, "future") else future
            (reply,) = (await asyncio.wrap_future(pending)).sequences
        except asyncio.CancelledError:
            raise
        except Exception as error:
            found = sorted_error(error, what)
            # What was put up for sampling is made again from the weights, which are still there or are not.
            raise (Gone(str(found)) if isinstance(found, Lost) else found) from error
        if reply.logprobs is None or len(reply.logprobs) != len(reply.tokens):
            raise BackendError(
                f"{what}: the service gave {len(reply.tokens)} tokens with {len(reply.logprobs or ())} logprobs; expected "
                "one each. Without them nothing can be trained on."
            )
        sample = Sample(list(reply.tokens), list(reply.logprobs), reply.stop_reason)
        if params.temperature == 1:
            self.recent.append((self.version, ids, sample))
        return sample
