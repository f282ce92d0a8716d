"""Epochs of given trajectories, as records in memory or on the disk, and a run that is looked at through them."""

from __future__ import annotations

from pathlib import Path

from factories import item

from finetune_nb.config import CurriculumSettings
from finetune_nb.engine.state import RunStatus
from finetune_nb.run.history import RunHistory
from finetune_nb.store.store import RunStore
from finetune_nb.training.curriculum import group_statistics, select
from finetune_nb.training.metrics import epoch_metrics
from finetune_nb.types import (
    CurriculumState,
    EpisodeKey,
    Epoch,
    IntermediateStep,
    IntermediateStepPayload,
    InvocationNode,
    LLMCall,
    RolloutFailure,
    SamplingParams,
    StreamEventData,
    Trajectory,
    TrajectoryCollection,
)

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}


def epoch_of(groups: list[list[Trajectory]], index: int = 0) -> Epoch:
    """An epoch of these very trajectories."""
    statistics = group_statistics(groups)
    collection = TrajectoryCollection.model_construct(trajectories=groups, run_id="run", failures=[])
    selection = select(statistics, CurriculumSettings(), CurriculumState(0.3), index, 0)
    metrics = epoch_metrics(collection, statistics, selection)
    return Epoch(index, "run", collection, statistics, selection, None, None, metrics, (), (0, 0), 0.0, {})


def with_tool(example="q0", generation=0, reward=1.0) -> Trajectory:
    """A conversation of five messages: a masked turn, a tool call, its result, an answer."""
    episode = [
        item("user", "2+2"),
        item("assistant", "hm", logprobs=[]),
        item("assistant", "", logprobs=[-1.0, -3.0], finish_reason="tool_calls", tool_calls=[CALL], seconds=0.5,
             token_ids=[7, 8], tokens=["<ca", "ll>"], prompt_token_ids=[1, 2, 3]),
        item("tool", "4", tool_call_id="c1", name="add"),
        item("assistant", "4", logprobs=[-0.25], finish_reason="stop", token_ids=[9], tokens=["4"]),
    ]  # fmt: skip
    return Trajectory(episode=episode, reward=reward, metadata={"id": example, "generation": generation})


def failed(example="q0", generation=9) -> RolloutFailure:
    """A rollout that made one model call before it failed."""
    call = LLMCall(EpisodeKey("train", 0, 0, 9), 0, "m", [{"role": "user", "content": "2+2"}], None,
                   {"role": "assistant", "content": "5"}, [1, 2], [3, 4], ["5", "."], [-1.0, -2.0], "length", 0,
                   SamplingParams(), 0.25, True)  # fmt: skip
    step = IntermediateStep(
        parent_id="root",
        function_ancestry=InvocationNode(function_id="f", function_name="f"),
        payload=IntermediateStepPayload(event_type="LLM_END", data=StreamEventData(payload=call)),  # type: ignore[arg-type]
    )
    return RolloutFailure(example, generation, "TimeoutError: too slow", [step])


def stored(tmp_path, *epochs: Epoch) -> list[Epoch]:
    """The epochs as a run on the disk has them."""
    with RunStore.create(tmp_path / "run", "run", {}) as store:
        for epoch in epochs:
            store.append(epoch, {})
    return list(RunStore.open(tmp_path / "run").epochs)


class Views(RunHistory):
    """A run to look at, from records alone."""

    id, folder, status, partial, changes = "run", Path("none"), RunStatus("run", "ready", (), 0, 0), None, ()  # type: ignore[assignment]

    def __init__(self, *records: Epoch) -> None:
        self._records = records

    @property
    def records(self):
        return self._records
