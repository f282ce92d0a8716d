"""The worker: a process of the cluster that does rollouts, as many at once as it is sent. It has a recorder and a gateway of
its own, and a replica of the policy where the policy has replicas.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...llms.proxies import bypass_proxies
from ...redaction import remember_secret
from ...threads import in_daemon_thread
from ...types import RolloutRequest
from .cluster import ray_package
from .nodes import look
from .parcel import Parcel, PolicyParcel, packed_answer, unpacked

__all__ = [
    "RolloutWorker",
]

GATHER_SECONDS = 0.004
"""Rollouts that end within this time of each other go back together."""
KEPT = 8
"""Parcels that are kept unpacked: those of an epoch's generations, and of a validation beside it."""


class RolloutWorker:
    """An async actor. secrets: what it hides in its logs. folders: where the notebook finds modules; those that are here
    too, on the same machine or a shared disk, are looked into as well."""

    def __init__(self, secrets: Sequence[str], folders: Sequence[str]) -> None:
        for secret in secrets:
            remember_secret(secret)
        sys.path += [folder for folder in folders if folder not in sys.path and os.path.isdir(folder)]
        self._rollouts: OrderedDict[str, Any] = OrderedDict()
        self._replicas: dict[str, Any] = {}
        self._weights: dict[str, str] = {}  # of each replica: the object whose weights are in it
        self._unpacking = asyncio.Lock()
        self._tasks: dict[int, list[asyncio.Task[None]]] = {}

    async def hello(self) -> dict[str, Any]:
        """That it is there, and on which node."""
        return look(ray_package())

    async def clock(self) -> float:
        """What time it is there."""
        return time.time()

    async def pid(self) -> int:
        return os.getpid()

    async def run(
        self, number: int, parcel: Parcel, requests: Sequence[tuple[int, RolloutRequest]]
    ) -> AsyncIterator[list[tuple[int, bytes]]]:
        """Rolls out the requests, all at once, and gives what has ended, by the places that came with them."""
        rollout = await self._rollout(parcel)
        ended: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue()

        async def one(place: int, request: RolloutRequest) -> None:
            try:
                result = await rollout(request)
                answer = packed_answer(result.output, result.steps, result.seconds, result.error)
            except BaseException:
                ended.put_nowait(None)  # canceled: nobody wants any of them
                raise
            ended.put_nowait((place, answer))

        tasks = self._tasks[number] = [asyncio.create_task(one(*request)) for request in requests]
        try:
            left = len(tasks)
            while left:
                answers = [await ended.get()]
                if left > 1:
                    await asyncio.sleep(GATHER_SECONDS)
                while not ended.empty():
                    answers.append(ended.get_nowait())
                left -= len(answers)
                yield [answer for answer in answers if answer is not None]
        finally:
            self._tasks.pop(number, None)
            for task in tasks:
                task.cancel()

    async def cancel(self, number: int) -> None:
        """Ends rollouts that nobody wants any more."""
        for task in self._tasks.get(number, ()):
            task.cancel()

    async def _rollout(self, parcel: Parcel) -> Any:
        async with self._unpacking:
            for policy in parcel.policies:
                await self._replica(policy)
            if parcel.key not in self._rollouts:
                bypass_proxies()  # of this process; see EvaluationRun
                content = await parcel.content
                self._rollouts[parcel.key] = unpacked(content, self._replicas)
                while len(self._rollouts) > KEPT:
                    self._rollouts.popitem(last=False)
            self._rollouts.move_to_end(parcel.key)
            return self._rollouts[parcel.key]

    async def _replica(self, policy: PolicyParcel) -> None:
        """Puts the weights of that version into the replica, which is made if there is none yet."""
        if policy.name not in self._replicas:
            make = await policy.replica
            self._replicas[policy.name] = await in_daemon_thread(make)
        replica, object_id = self._replicas[policy.name], policy.weights.hex()
        if self._weights.get(policy.name) != object_id:
            weights = await policy.weights
            await in_daemon_thread(replica.take, weights, policy.version)
            self._weights[policy.name] = object_id
