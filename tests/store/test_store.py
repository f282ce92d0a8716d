"""RunStore: what is written comes back with the same values and types. What goes wrong is test_store_safety.py's."""

from __future__ import annotations

import math
import shutil
import sqlite3
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from factories import collected, item, make_epoch, make_trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_nb import frames, redaction
from finetune_nb.config import CurriculumSettings
from finetune_nb.errors import StoreError
from finetune_nb.store.folder import trajectory_file
from finetune_nb.store.reader import StoredEpoch
from finetune_nb.store.store import RunStore
from finetune_nb.types import (
    Change,
    DPOItem,
    EpisodeItem,
    EpisodeKey,
    Epoch,
    IntermediateStep,
    IntermediateStepPayload,
    IntermediateStepType,
    InvocationNode,
    LLMCall,
    RolloutFailure,
    SamplingParams,
    StreamEventData,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
    Validation,
)

CONFIG = {"run": {"seed": 0}, "llms": {"m": {"_type": "openai", "api_key": "${KEY}"}}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    with RunStore.create(folder, "run", CONFIG) as store:
        yield store


def epoch_of(trajectories, failures=(), index=0) -> Epoch:
    """An epoch whose collection is exactly this."""
    base = make_epoch({}, index)
    from finetune_nb.training.curriculum import group_statistics, select
    from finetune_nb.training.metrics import epoch_metrics
    from finetune_nb.types import CurriculumState

    collection = TrajectoryCollection.model_construct(trajectories=trajectories, run_id="run", failures=list(failures))
    statistics = group_statistics(trajectories)
    selection = select(statistics, CurriculumSettings(), CurriculumState(0.3), index, seed=0)
    metrics = epoch_metrics(collection, statistics, selection)
    return replace(base, collection=collection, statistics=statistics, selection=selection, metrics=metrics)


def stored(folder, trajectories, failures=()) -> TrajectoryCollection:
    """The same after a round trip through the files."""
    shutil.rmtree(folder, ignore_errors=True)
    with RunStore.create(folder, "run", CONFIG) as store:
        store.append(epoch_of(trajectories, failures), {})
    return RunStore.open(folder).epochs[0].collection


def same(a, b) -> bool:
    """Equality in which NaN equals NaN and 1 differs from True and 1.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if hasattr(a, "__dict__") and not isinstance(a, str | np.generic):
        return same({**vars(a)}, {**vars(b)})
    return a == b


def same_record(a: Epoch, b: Epoch) -> bool:
    names = [name for name in vars(a) if name not in ("collection", "_collection", "_columns")]
    return all(same(getattr(a, name), getattr(b, name)) for name in names)


# ── what is written comes back ───────────────────────────────────────────────────────────────────────────────────────


def test_an_epoch_comes_back_as_it_was(store, folder):
    rewards = {"a": [1.0, None, math.inf], 7: [0.0, 0.5], "7": [0.25, 0.25], None: [0.1, 0.9], "é\0": [-math.inf]}
    failure = RolloutFailure("z", 3, "TimeoutError: too slow \ud800")
    given = make_epoch(
        rewards,
        failures=[failure],
        settings=CurriculumSettings(enabled=True, percentile=0.5, schedule="manual"),
        scores={"len": 3, "reward": 0.5},
        validation=0.75,
    )
    store.append(given, {"trainer": {"current_percentile": 0.5}, "weights": "checkpoint-1"})
    store.close()
    found = RunStore.open(folder).epochs
    assert len(found) == 1 and isinstance(found[0], Epoch)
    assert same_record(given, found[0])
    assert same(given.collection, found[0].collection)
    assert same(given.collection.failures, found[0].collection.failures)


def test_a_stored_epoch_shows_the_same_frames_as_the_live_one(store, folder):
    live = [make_epoch([[1.0, 0.0], [None, 0.5]], index=i, scores={"len": 2}, validation=0.5) for i in range(3)]
    for epoch in live:
        store.append(epoch, {})
    read = RunStore.open(folder).epochs
    for frame in (frames.trajectories, frames.groups, frames.epochs):
        pd.testing.assert_frame_equal(frame(live), frame(read))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(codec=None), max_size=20)  # lone surrogates and NUL too
numbers = st.lists(st.floats() | st.floats(width=32), max_size=5)
id_lists = st.lists(st.integers(0, 200_000) | st.integers(), max_size=5)
metadatas = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "token_ids": st.none() | id_lists | json_values,
        "prompt_token_ids": st.none() | id_lists,
        "tokens": st.none() | st.lists(texts, max_size=4) | json_values,
        "tool_calls": json_values,
        "finish_reason": st.none() | st.just("stop") | json_values,
    },
)
foreign = st.fixed_dictionaries({"content": st.lists(st.fixed_dictionaries({"token": texts, "logprob": st.floats()}))})
messages = st.builds(
    EpisodeItem,
    role=st.sampled_from(["user", "assistant", "system", "tool", "function", "environment", "other"]),
    content=texts,
    logprobs=st.just([]) | numbers | foreign | st.lists(st.integers(-3, 0)),
    metadata=metadatas,
)
preferences = st.builds(
    DPOItem,
    prompt=texts | st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), max_size=2),
    chosen_response=texts,
    rejected_response=texts,
)
trajectories = st.builds(
    Trajectory,
    episode=st.lists(messages, max_size=3) | st.lists(preferences, min_size=1, max_size=2),
    reward=st.floats(),
    shaped_rewards=st.none() | st.lists(st.floats(), max_size=3),
    metadata=st.none() | st.dictionaries(st.sampled_from(["id", "generation", "scores", "x"]), json_values),
)


@pytest.mark.slow
@pytest.mark.proof
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(groups=st.lists(st.lists(trajectories, max_size=3), max_size=3))
def test_any_trajectory_comes_back_with_the_same_values_and_types(tmp_path, groups):
    from finetune_nb.store.batches import batches_of, collection_of_batches
    from finetune_nb.store.trajectories import read_trajectories, write_trajectories

    collection = TrajectoryCollection(trajectories=groups, run_id="run")
    write_trajectories(tmp_path, 0, "run", collection)
    assert same(read_trajectories(tmp_path, 0, "run", sum(map(len, groups)), len(groups)), collection)
    flat = [trajectory for group in groups for trajectory in group]
    assert same(collection_of_batches([batch for batch, _ in batches_of(collection, whole=True)], "run"), collection)
    batches = [batch for trajectory in flat for batch, _ in batches_of(collected([trajectory]), whole=False)]
    batched = [t for group in collection_of_batches(batches, "run").trajectories for t in group]
    assert sorted(map(repr, batched)) == sorted(map(repr, flat))


def test_logprobs_keep_every_digit(folder):
    digits = [-0.1, -1e-300, -math.pi, math.nan]
    exact = [float(np.float32(x)) for x in (-0.1, -2.5)]
    (group,) = stored(folder, [[make_trajectory(reply="x")]]).trajectories
    for values, width in ((digits, "double"), (exact, "float")):
        trajectory = Trajectory(episode=[item("assistant", "four", values)], reward=1.0)
        (group,) = stored(folder, [[trajectory]]).trajectories
        assert same(group[0].episode[0].logprobs, values)
        assert width in str(pq.read_schema(trajectory_file(folder, 0)).field("logprobs").type)


def test_objects_that_json_does_not_know_become_their_nearest_form(folder):
    class Odd:
        def __repr__(self):
            return "Odd()"

    metadata = {"id": "q", "numpy": np.float64(0.5), "set": {2, 1}, "tuple": (1, 2), "odd": Odd(), "path": Path("a/b")}
    metadata["itself"] = loop = []
    loop.append(1)
    (group,) = stored(folder, [[Trajectory(episode=[item("user", "x")], reward=0.0, metadata=metadata)]]).trajectories
    known = group[0].metadata
    assert known == {
        "id": "q",
        "numpy": 0.5,
        "set": [1, 2],
        "tuple": [1, 2],
        "odd": "Odd()",
        "path": "a/b",
        "itself": [1],
    }


def test_what_a_failed_rollout_had_done_is_kept(folder):
    call = LLMCall(
        EpisodeKey("train", 0, 1, 2), 0, "m", [{"role": "user", "content": "2+2"}], None, {"content": "4"}, [1, 2], [3],
        ["4"], [-0.5], "stop", 7, SamplingParams(stop=("\n",)), 0.25, True,
    )  # fmt: skip
    step = IntermediateStep(
        parent_id="root",
        function_ancestry=InvocationNode(function_id="f", function_name="f"),
        payload=IntermediateStepPayload(
            event_type=IntermediateStepType.LLM_END, data=StreamEventData(output="4", payload=call)
        ),
    )
    (failure,) = stored(folder, [], [RolloutFailure(4, 1, "ValueError: no", [step])]).failures
    assert failure.example_id == 4
    assert failure.steps[0].data.payload == call
    assert failure.steps[0].payload.UUID == step.payload.UUID


def test_a_group_without_trajectories_stays_in_its_place(folder):
    assert stored(folder, []).trajectories == []
    found = stored(folder, [[], [make_trajectory()], []])
    assert [len(group) for group in found.trajectories] == [0, 1, 0]


def test_columns_are_read_without_the_trajectories(store):
    failure = RolloutFailure("x", 1, "E: no")
    store.append(make_epoch([[1.0, 0.0]], failures=[failure], scores={"len": 2}), {})
    table = store.columns(0, ["reward", "generation", "error", "tokens", "turns"])
    assert table.to_pydict() == {
        "reward": [1.0, 0.0, None],
        "generation": [0, 1, 1],
        "error": [None, None, "E: no"],
        "tokens": [1, 1, None],
        "turns": [2, 2, None],
    }
    with pytest.raises(StoreError, match="'rewards'.*generation"):
        store.columns(0, ["rewards"])


def test_others_read_the_folder_with_pandas_and_sqlite(store, folder):
    store.append(make_epoch([[1.0, 0.0]]), {})
    frame = pd.read_parquet(folder / "trajectories")
    assert frame.reward.tolist() == [1.0, 0.0]
    with sqlite3.connect(folder / "run.db") as db:
        assert db.execute("SELECT epoch, mean_reward, trajectories, job FROM epochs").fetchall() == [
            (0, 0.5, 2, "completed")
        ]


def test_a_collection_that_nobody_holds_is_read_again_and_one_that_is_held_is_not(store, folder):
    for index in range(3):
        store.append(make_epoch([[1.0, 0.0]], index=index), {})
    first, second, _ = RunStore.open(folder).epochs
    held = first.collection
    assert first.collection is held
    address = id(second.collection)
    assert id(second.collection) == address  # a loop over one epoch reads it once
    assert first.collection is held


def test_a_stored_epoch_can_be_replaced_like_any_other(store):
    epoch = store.append(make_epoch([[1.0, 0.0]]), {})
    other = replace(epoch, reason="late")
    assert isinstance(epoch, StoredEpoch) and other.reason == "late"
    assert other.collection is epoch.collection


def test_an_amended_epoch_is_seen_by_readers_too(store, folder):
    store.append(make_epoch([[1.0, 0.0]], job=None, reason="the trainer submitted nothing"), {"at": 0})
    reader = RunStore.open(folder)
    assert reader.epochs[0].job is None
    status = TrainingJobStatus(run_id="run", backend="fake", status=TrainingStatusEnum.COMPLETED)
    assert store.amend(replace(store.epochs[0], job=status, reason=None)).job == status
    reader.refresh()
    assert [epoch.job for epoch in reader.epochs] == [status]
    assert reader.state() == {"at": 0}
    with pytest.raises(StoreError, match="no epoch 5"):
        store.amend(make_epoch([[1.0]], index=5))


def test_journal_events_validations_state_and_config_come_back(store, folder):
    change = Change(12.5, "panel", "percentile", 0.3, 0.8)
    assert store.record_change(change) == 0
    assert store.record_change(Change(13.0, "code", "random_subsample", None, 0.5)) == 1
    store.settle_change(0, 4)
    store.record_event("error", text="ValueError: \ud800\n", epoch=1)
    store.record_event("state", state="running")
    store.add_validation(Validation(0, 2, math.nan, 0, {"len": math.inf}, 0.5, "all failed"))
    store.set_state("paused")
    reader = RunStore.open(folder)
    assert reader.journal()[0] == replace(change, epoch=4)
    assert reader.journal()[1].old is None
    (event,) = reader.events("error")
    assert event["text"] == "ValueError: \ud800\n" and event["epoch"] == 1
    assert [e["kind"] for e in reader.events()] == ["error", "state"]
    assert same(
        asdict(reader.validations[0]), asdict(Validation(0, 2, math.nan, 0, {"len": math.inf}, 0.5, "all failed"))
    )
    assert (reader.run_id, reader.run_state, reader.parent) == ("run", "paused", None)
    assert reader.config() == CONFIG
    assert abs(reader.created_at - time.time()) < 60
    assert reader.size() >= (folder / "run.db").stat().st_size > 0


def test_a_fork_knows_its_parent_and_may_go_on_counting(folder):
    with RunStore.create(folder, "fork", CONFIG, parent=("run", 3)) as store:
        store.append(make_epoch([[1.0, 0.0]], index=4), {})
        assert store.parent == ("run", 3)
        with pytest.raises(StoreError, match="continues with epoch 5"):
            store.append(make_epoch([[1.0, 0.0]], index=0), {})


def test_the_state_of_every_epoch_can_be_asked_for(store):
    assert store.state() is None
    for index in range(3):
        store.append(make_epoch([[1.0, 0.0]], index=index), {"index": index, "nan": math.inf})
    assert store.state_of(1) == {"index": 1, "nan": math.inf}
    assert store.state() == store.state_of(2)
    with pytest.raises(StoreError, match="no completed epoch 9"):
        store.state_of(9)
    with pytest.raises(StoreError, match="cannot be stored"):
        store.append(make_epoch([[1.0]], index=3), {"included_groups": {1}})
    assert len(store.epochs) == 3


def test_secrets_are_masked_in_every_file(store, folder):
    redaction.remember_secret("hunter2-secret")
    redaction.remember_secret("31415926")
    trajectory = Trajectory(
        episode=[
            item("user", "my key is hunter2-secret"),
            item("assistant", "hunter2-secret", [-0.31415926], tokens=["hunter2", "-secret"]),
        ],
        reward=0.31415926,
        metadata={"id": "q", "reasoning": "it said hunter2-secret", "pi": 0.31415926},
    )
    store.begin_epoch(0, 1.0, 0)
    store.add_rollouts(0, collected([trajectory]))
    store.record_event("error", text="hunter2-secret refused")
    assert store.partial().collection.trajectories[0][0].metadata["pi"] == 0.31415926
    store.append(epoch_of([[trajectory]], [RolloutFailure("q", 0, "401: hunter2-secret")]), {})
    store.close()
    for path in folder.rglob("*.*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    found = RunStore.open(folder).epochs[0].collection.trajectories[0][0]
    assert found.episode[0].content == "my key is **********"
    assert found.reward == 0.31415926
    frame = pd.read_parquet(trajectory_file(folder, 0))
    assert "hunter2" not in frame.to_json()


# ── order, unfinished epochs ─────────────────────────────────────────────────────────────────────────────────────────


def test_epochs_are_recorded_in_order_each_once(store):
    with pytest.raises(StoreError, match="found epoch 1; run 'run' continues with epoch 0"):
        store.append(make_epoch([[1.0]], index=1), {})
    store.append(make_epoch([[1.0]]), {})
    with pytest.raises(StoreError, match="continues with epoch 1"):
        store.append(make_epoch([[0.5]]), {})
    with pytest.raises(StoreError, match="continues with epoch 1"):
        store.begin_epoch(0, 0.0, None)
    assert store.epochs[0].collection.trajectories[0][0].reward == 1.0


def test_an_unfinished_epoch_can_be_looked_at_until_it_is_complete(store, folder):
    assert store.partial() is None
    stamps = [store.partial_stamp()]
    assert stamps == [None]
    store.begin_epoch(0, 12.0, 3)
    stamps.append(store.partial_stamp())
    store.add_rollouts(0, collected([make_trajectory(1.0, "a", 0), make_trajectory(0.0, 1, 0)]))
    stamps.append(RunStore.open(folder).partial_stamp())
    store.add_rollouts(0, collected([make_trajectory(0.5, "a", 1)], [RolloutFailure("b", 0, "E: no")]))
    ref = TrainingJobRef(run_id="run", backend="fake", metadata={"job_id": "j1"})
    status = TrainingJobStatus(run_id="run", backend="fake", status=TrainingStatusEnum.RUNNING, progress=50.0)
    store.record_job(0, ref)
    store.record_status(0, status)
    store.add_validation(Validation(0, 3, 0.5, 8), epoch=0)
    partial = RunStore.open(folder).partial()
    assert (partial.index, partial.started_at, partial.policy_version) == (0, 12.0, 3)
    assert [[(t.metadata["id"], t.reward) for t in g] for g in partial.collection.trajectories] == [
        [("a", 1.0), ("a", 0.5)],
        [(1, 0.0)],
    ]
    assert (partial.job, partial.status) == (ref, status)
    assert [f.example_id for f in partial.collection.failures] == ["b"]
    assert len(partial.validations) == 1
    epoch = make_epoch({"a": [1.0, 0.0], "b": [0.5, 0.5]}, failures=[RolloutFailure("c", 1, "E")])
    stamps.append(store.partial_stamp())
    store.add_rollouts(0, epoch.collection, whole=True)
    stamps.append(store.partial_stamp())
    assert len(set(stamps)) == 5
    store.record_selection(0, epoch.selection, {"rollouts": 2.5})
    partial = RunStore.open(folder).partial()
    assert same(partial.collection, epoch.collection)
    assert (partial.selection.kept.tolist(), partial.seconds) == (epoch.selection.kept.tolist(), {"rollouts": 2.5})
    assert partial.selection.reasons.tolist() == epoch.selection.reasons.tolist()
    assert (partial.selection.state, partial.selection.settings) == (epoch.selection.state, epoch.selection.settings)
    store.append(make_epoch([[1.0]], validation=0.5), {})
    assert store.partial() is None and store.partial_stamp() is None
    assert len(store.epochs[0].validations) == 1
    with pytest.raises(StoreError, match="Call begin_epoch first"):
        store.add_rollouts(0, collected([make_trajectory()]))


def test_who_reads_an_unfinished_epoch_again_decodes_what_is_new_and_sees_what_was_replaced(store):
    store.begin_epoch(0, 12.0, 3)
    decoded = {}
    for generation in range(3):
        store.add_rollouts(0, collected([make_trajectory(None, "a", generation)]))
        again = store.partial(decoded).collection
        assert same(again, store.partial().collection) and len(decoded) == generation + 1
    first = list(again.trajectories[0])
    store.add_rollouts(0, collected([make_trajectory(None, "b", 0)]))
    assert all(a is b for a, b in zip(store.partial(decoded).collection.trajectories[0], first, strict=True))
    epoch = make_epoch({"a": [1.0, 0.0]})
    store.add_rollouts(0, epoch.collection, whole=True)
    assert same(store.partial(decoded).collection, epoch.collection) and len(decoded) == 1


def test_rollouts_of_examples_whose_ids_look_alike_are_not_one_group(store):
    store.begin_epoch(0, 1.0, None)
    mixed = [make_trajectory(1.0, 7), make_trajectory(0.0, "7"), make_trajectory(0.5, 7, 1)]
    store.add_rollouts(0, TrajectoryCollection(trajectories=[mixed], run_id="run"))
    groups = store.partial().collection.trajectories
    assert [[(t.metadata["id"], t.reward) for t in group] for group in groups] == [[(7, 1.0), (7, 0.5)], [("7", 0.0)]]


def test_an_epoch_that_begins_again_starts_empty(store):
    store.begin_epoch(0, 1.0, None)
    store.add_rollouts(0, collected([make_trajectory()]))
    store.begin_epoch(0, 2.0, None)
    assert store.partial().collection.trajectories == []
