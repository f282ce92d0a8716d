"""One rollout: the workflow once on one row, recorded, with its time limit and its further attempts.

A rollout that raises, hangs or returns nothing is a result with an error.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..errors import RolloutTimeout, WorkflowError, is_transient
from ..interfaces import Policy
from ..llms.call_recorder import CallRecorder
from ..text import text_of
from ..types import RolloutRequest, RolloutResult
from ..user_code import contained, raised_text
from .workflow import Workflow

__all__ = [
    "Rollout",
]


PATIENCE = 1.0
"""Seconds that a workflow gets to clean up after its time is up, or its epoch was aborted."""


class Rollout:
    """One run of the workflow on one row. Never raises: what goes wrong is the result's error.

    seed: the run's. policies: they wait for the rollout when they form batches. timeout: seconds for all attempts
    together; None: as long as it likes. retries: attempts after a transient failure. gate: awaited before it begins. ignore:
    parameters of requests to the gateway that are left out of account. version: the policy version that is sampled; None: the
    newest.
    """

    def __init__(
        self,
        workflow: Workflow,
        seed: int = 0,
        policies: Sequence[Policy] = (),
        timeout: float | None = None,
        retries: int = 0,
        gate: Callable[[], Awaitable[float]] | None = None,
        ignore: Sequence[str] = (),
        version: int | None = None,
    ) -> None:
        self.workflow, self.seed, self.policies, self.timeout, self.retries = workflow, seed, policies, timeout, retries
        self.gate = gate
        self.ignore = frozenset(ignore)
        self.version = version

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "gate": None}  # a run is paused where it is driven, not where its rollouts run

    async def __call__(self, request: RolloutRequest) -> RolloutResult:
        if self.gate is not None:
            await self.gate()
        started = time.perf_counter()
        episode = CallRecorder(request.key, self.seed, ignore=self.ignore, version=self.version)
        try:
            with episode.recording(self.policies):
                if self.timeout is None:
                    output = await self._attempts(request, episode)
                else:
                    output = await self._timed(request, episode, self.timeout)
            error = None
            if output is None:
                error = f"WorkflowError: workflow {self.workflow.name!r} returned nothing"
        except Exception as caught:
            output, error = None, raised_text(caught) + _loop_hint(caught)
        return RolloutResult(request, output, episode.steps(), time.perf_counter() - started, error)

    async def _timed(self, request: RolloutRequest, episode: CallRecorder, seconds: float) -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await self._attempts(request, episode)
        except TimeoutError as error:
            if not limit.expired():
                raise
            left = "" if self.workflow.is_async else " Its thread keeps running until it returns."
            raise RolloutTimeout(
                f"no answer after {seconds:g} s (eval.general.item_timeout), {len(episode.calls)} model calls.{left}"
            ) from error

    async def _attempts(self, request: RolloutRequest, episode: CallRecorder) -> Any:
        if not self.retries:
            return await self._once(request)
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            retry=retry_if_exception(is_transient),
            reraise=True,
        ):
            with attempt:
                episode.restart()
                return await self._once(request)
        raise WorkflowError("no attempt was made")

    async def _once(self, request: RolloutRequest) -> Any:
        return await contained("the workflow", self.workflow(request.item), PATIENCE)


def _loop_hint(error: BaseException | None) -> str:
    """What to do about a client that belongs to another event loop, where that is the cause somewhere."""
    first, seen = error, set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RuntimeError) and _OTHER_LOOP.search(text_of(error)):
            named = "" if error is first else f" ({text_of(error)})"
            return (
                f"{named}. Workflows run on the run's own event loop, and a client that was used in "
                "a cell belongs to the cell's. Make it inside the workflow, or take llm.openai()."
            )
        error = error.__cause__ or error.__context__
    return ""


_OTHER_LOOP = re.compile(r"different (event )?loop|Event loop is closed|non-thread-safe operation")
