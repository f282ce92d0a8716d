"""Small true things for tests and for trying things out: a policy that says what a script says, a builder that deals out
given rewards, an adapter that trains nothing, and a dataset of sums. Public: use them in your own tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from .config.base import TrainerAdapterConfig, TrajectoryBuilderConfig
from .errors import UnknownJob, did_you_mean
from .interfaces import Policy, TrainerAdapter, TrajectoryBuilder
from .types import (
    EpisodeItem,
    EpisodeItemRole,
    EpisodeKey,
    MessageKey,
    RolloutFailure,
    Sample,
    SamplingParams,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)

__all__ = [
    "FakeAdapter",
    "FakeAdapterConfig",
    "ScriptedBuilder",
    "ScriptedPolicy",
    "make_trajectory",
    "sums",
]


class ScriptedPolicy(Policy):
    """A policy whose replies come from a script. One token a character; every token has logprob -1.

    Args:
        script: Any function `script(messages, seed)` that returns the reply. Default: the reply is "ok".
    """

    def __init__(self, script: Callable[[list[dict[str, Any]], int], str] | None = None) -> None:
        self.version = 0
        self.script = script or (lambda messages, seed: "ok")
        self.live: set[EpisodeKey] = set()
        """The rollouts that are going on."""
        self._rendered: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        previous_ids: Sequence[int] | None = None,
    ) -> list[int]:
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        new = messages[last + 1 :] if previous_ids is not None else messages
        text = "".join(f"<{m['role']}>{m.get('content') or ''}" for m in new)
        ids = [*(previous_ids or ()), *map(ord, text)]
        self._rendered[tuple(ids)] = list(messages)
        return ids

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        """Reply as the script says.

        Args:
            ids: Token ids of the prompt.
            params: Sampling parameters.
            seed: What the script gets beside the messages.
            version: Of the weights; a script says the same in every version.

        Returns:
            Token ids of the reply, one a character.
        """
        await asyncio.sleep(0)
        whole = self.script(self._rendered.get(tuple(ids), []), seed)
        text = whole[: params.max_tokens]
        return Sample([ord(c) for c in text], [-1.0] * len(text), "stop" if text == whole else "length")

    def parse(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"role": "assistant", "content": "".join(map(chr, ids))}

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [chr(i) for i in ids]

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    @contextlib.contextmanager
    def episode(self, key: EpisodeKey) -> Iterator[None]:
        self.live.add(key)
        try:
            yield
        finally:
            self.live.discard(key)


class FakeAdapterConfig(TrainerAdapterConfig, name="fake"):
    """The settings of a FakeAdapter."""

    max_staleness: int = Field(default=0, ge=0)
    """Policy versions by which a trajectory may be older than the weights that it trains. 1: an epoch is sampled while the
    epoch before it trains."""


class FakeAdapter(TrainerAdapter):
    """An adapter whose jobs train nothing: they complete, fail or are canceled as asked. Its policy can be sampled meanwhile.

    `submitted` is every collection that was handed over, in order.

    Args:
        adapter_config: Its config. Default: an empty one.
        policy: What is sampled; its version counts the completed jobs. Default: a ScriptedPolicy.
        outcome: The status in which jobs end.
        delay: Seconds that a job takes.
        healthy: What `is_healthy` returns.
        message: The message of every status.
    """

    def __init__(
        self,
        adapter_config: TrainerAdapterConfig | None = None,
        *,
        policy: Any = None,
        outcome: str = "completed",
        delay: float = 0.0,
        healthy: bool = True,
        message: str | None = None,
    ) -> None:
        super().__init__(adapter_config or TrainerAdapterConfig())
        self.policy = ScriptedPolicy() if policy is None else policy
        self.outcome, self.delay, self.healthy, self.message = TrainingStatusEnum(outcome), delay, healthy, message
        self.submitted: list[TrajectoryCollection] = []
        self.progress: list[dict[str, Any]] = []
        """What log_progress was told."""
        self._jobs: dict[str, asyncio.Task[None]] = {}

    async def is_healthy(self) -> bool:
        return self.healthy

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        self.submitted.append(trajectories)
        job_id = uuid.uuid4().hex
        self._jobs[job_id] = asyncio.create_task(self._train())
        return TrainingJobRef(run_id=trajectories.run_id, backend="fake", metadata={"job_id": job_id})

    async def submit_chosen(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        return await self.submit(trajectories)

    async def keep_sampling(self) -> int:
        assert self.policy is not None
        return self.policy.version

    async def _train(self) -> None:
        await asyncio.sleep(self.delay)
        if self.outcome == TrainingStatusEnum.COMPLETED and self.policy is not None:
            self.policy.version += 1

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        job = self._job(ref)
        state = self.outcome if job.done() else TrainingStatusEnum.RUNNING
        if job.cancelled():
            state = TrainingStatusEnum.CANCELED
        metadata = {"metrics": {"loss": 0.0}} if state == TrainingStatusEnum.COMPLETED else None
        return TrainingJobStatus(
            run_id=ref.run_id, backend="fake", status=state, message=self.message, metadata=metadata
        )

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        await asyncio.wait([self._job(ref)])
        return await self.status(ref)

    async def cancel(self, ref: TrainingJobRef) -> None:
        """Cancel a job.

        Args:
            ref: What `submit` returned.

        Raises:
            UnknownJob: There is no such job.
        """
        self._job(ref).cancel()

    def _job(self, ref: TrainingJobRef) -> asyncio.Task[None]:
        job_id = str((ref.metadata or {}).get("job_id"))
        if job_id not in self._jobs:
            raise UnknownJob(f"this adapter has no training job {job_id!r}. {did_you_mean(job_id, self._jobs)}")
        return self._jobs[job_id]

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.progress.append(metrics)

    async def aclose(self) -> None:
        for job in self._jobs.values():
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await job


class ScriptedBuilder(TrajectoryBuilder):
    """A builder that runs nothing and returns given rewards.

    Args:
        rewards: A function of the epoch that returns the rewards of each group, by example id; None is a failed rollout.
        config: Its config. Default: an empty one.
    """

    def __init__(
        self,
        rewards: Callable[[int], Mapping[Any, Sequence[float | None]]],
        config: TrajectoryBuilderConfig | None = None,
    ) -> None:
        super().__init__(config or TrajectoryBuilderConfig())
        self.rewards = rewards
        self.progress: list[dict[str, Any]] = []

    async def start_run(self, run_id: str, meta: dict | None = None) -> None:
        pass

    async def finalize(self, run_id: str, meta: dict | None = None) -> TrajectoryCollection:
        groups, failures = [], []
        for example, rewards in self.rewards((meta or {}).get("epoch", 0)).items():
            group = []
            for generation, reward in enumerate(rewards):
                if reward is None:
                    failures.append(RolloutFailure(example, generation, "RuntimeError: scripted failure"))
                else:
                    group.append(make_trajectory(reward, example, generation, run_id))
            if group:
                groups.append(group)
        return TrajectoryCollection(trajectories=groups, run_id=run_id, failures=failures)

    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.progress.append(metrics)


def make_trajectory(
    reward: float, example: Any = "0", generation: int = 0, run_id: str = "run", reply: str = "ok", **metadata: Any
) -> Trajectory:
    """Make a trajectory: a question and a sampled reply, one token a character.

    Args:
        reward: Its reward.
        example: Id of the example, which is the question too.
        generation: Which rollout of the group, from 0.
        run_id: Id of the run.
        reply: The sampled reply.
        **metadata: Further keys of `Trajectory.metadata`.

    Returns:
        The trajectory.
    """
    return Trajectory(
        episode=[
            EpisodeItem(role=EpisodeItemRole.USER, content=str(example)),
            EpisodeItem(
                role=EpisodeItemRole.ASSISTANT,
                content=reply,
                logprobs=[-1.0] * len(reply),
                metadata={
                    MessageKey.TOKEN_IDS: [ord(c) for c in reply],
                    MessageKey.PROMPT_TOKEN_IDS: [0],
                    MessageKey.TEMPERATURE: 1.0,
                },
            ),
        ],
        reward=reward,
        metadata={"id": example, "generation": generation, "run_id": run_id, **metadata},
    )


def sums(rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Make a dataset of sums: question "3+4", answer "7".

    Args:
        rows: How many.
        seed: The same seed gives the same sums.

    Returns:
        Rows with id, question and answer.
    """
    rng = random.Random(seed)
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(rows)]
    return [{"id": f"sum-{i}", "question": f"{a}+{b}", "answer": str(a + b)} for i, (a, b) in enumerate(pairs)]
