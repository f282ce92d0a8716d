"""What is committed can be read, whatever the values are; what cannot be stored costs its own field, and is named."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import itertools
import json
import logging
import math
import shutil
import sqlite3
import types
import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import collected, item, make_epoch, make_trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import epoch_of

from finetune_nb import frames
from finetune_nb.store.json import DEEPEST, decode, encode, encode_all, finite, noting_replaced, plain
from finetune_nb.store.store import RunStore
from finetune_nb.store.trajectory_table import table_of
from finetune_nb.types import (
    Change,
    DPOItem,
    EpisodeItem,
    IntermediateStep,
    IntermediateStepPayload,
    InvocationNode,
    LLMCall,
    RolloutFailure,
    SamplingParams,
    StreamEventData,
    TrainingJobRef,
    TrainingJobStatus,
    Trajectory,
    Validation,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    with RunStore.create(folder, "run", {}) as store:
        yield store


# ── values of any type ───────────────────────────────────────────────────────────────────────────────────────────────


class Silent:
    """Its text cannot be made."""

    def __repr__(self):
        raise RuntimeError("no text")


class Exits:
    def __repr__(self):
        raise SystemExit(3)


class NoText:
    def __repr__(self):
        return 7  # type: ignore[return-value]


class Listed:
    """Looks like an array, and is none."""

    def tolist(self):
        return self


class Unequal(type):
    """A class whose classes can neither be compared nor be found in a set."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(cls, other):
        raise KeyError("compared")


class OfUnequal(metaclass=Unequal):
    pass


class Broken(collections.abc.Mapping):
    """A mapping that cannot be looked at."""

    def __getitem__(self, key):
        raise OSError

    def __iter__(self):
        raise GeneratorExit

    def __len__(self):
        return 1


class Color(enum.Enum):
    RED = b"\xff"


@dataclasses.dataclass
class Point:
    x: object = 1
    y: object = b"\xff"


def circular():
    found: list = [1]
    found.append(found)
    return {"itself": found}


def doubled(times=70):
    """Of a hundred bytes or so, and 2**70 values."""
    found: list = []
    for _ in range(times):
        found = [found, found]
    return found


def deep(levels):
    found = None
    for _ in range(levels):
        found = {"in": [found]}
    return found


ODD = {
    "bytes": b"\xff\x01",
    "bytearray": bytearray(b"\xfe"),
    "memoryview": memoryview(b"\xfd"),
    "half a character": "\ud800",
    "half a character as a key": {"\udcff": 1},
    "sets": {1, "a", b"\xff", frozenset({2})},
    "numpy": [
        np.float32(0.5),
        np.arange(3),
        np.array([object()]),
        np.str_("x"),
        np.datetime64("2020-01-01"),
        np.bool_(1),
    ],
    "structured": np.zeros(2, [("a", "f8"), ("b", "V3")]),
    "circular": circular(),
    "deep": deep(5000),
    "long": 10**5000,
    "negative": [-(10**5000), 1.5],
    "keys": {1: "a", "1": "b", None: 1, False: 2, math.nan: 3, (1, 2): 4, b"\xff": 5, frozenset(): 6, 1.5: 7},
    "two nans": {float("nan"): 1, float("nan"): 2},
    "silent": Silent(),
    "exits": Exits(),
    "no text": NoText(),
    "key of no text": {Exits(): 1},
    "listed": Listed(),
    "of a class that cannot be compared": OfUnequal(),
    "broken": Broken(),
    "enum": Color.RED,
    "dataclass": Point(),
    "class": Point,
    "function": circular,
    "generator": (x for x in ()),
    "endless": itertools.count(),
    "dates": [datetime.datetime.now(), datetime.timedelta(1), datetime.date(2020, 1, 1), datetime.time()],
    "numbers": [decimal.Decimal("NaN"), fractions.Fraction(1, 3), 1j, math.inf, -math.inf, math.nan, -0.0, 2**70],
    "others": [
        uuid.UUID(int=3),
        Path("a"),
        range(3),
        ...,
        NotImplemented,
        types.SimpleNamespace(a=b"\xff"),
        ValueError("x"),
    ],
    "collections": [collections.Counter("aab"), collections.OrderedDict(b=1), collections.deque([b"\xff"])],
    "model": TrainingJobStatus.model_construct(run_id=b"\xff", metadata={"a": {1}}),
}


@pytest.mark.parametrize("name", ODD)
def test_any_value_becomes_text_in_its_own_field_and_the_others_stay(name):
    around = {"before": [1, "é", None], "odd": ODD[name], "after": {"x": 0.5}}
    found = decode(encode(around))
    assert found["before"] == [1, "é", None] and found["after"] == {"x": 0.5}
    assert found.keys() == around.keys()
    for text in encode_all([around, None, {"plain": 1}]):
        assert text is None or decode(text if isinstance(text, str) else text.decode())
    assert json.loads(json.dumps(finite(around), allow_nan=False))["after"] == {"x": 0.5}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
NOT_PLAIN = st.sampled_from(
    [10**600, -(10**600), {9, 2}, {1: 2, "1": 3}, b"a", np.float64(0.5), Color.RED, (1, {2: 3, "2": 4}), [[{9, 2}]]]
)


@given(st.lists(PLAIN | st.tuples(PLAIN) | NOT_PLAIN, max_size=6))
def test_values_that_are_encoded_together_are_encoded_as_each_by_itself(values):
    together = encode_all(values)
    alone = [None if value is None else encode(value) for value in values]
    assert [text.decode() if isinstance(text, bytes) else text for text in together] == alone


def test_values_of_too_many_levels_are_encoded_as_each_by_itself():
    for levels in (DEEPEST - 1, DEEPEST, DEEPEST + 1, DEEPEST + 2):
        deep = [0.5]
        for _ in range(levels):
            deep = {"in": [deep]} if isinstance(deep, list) else [deep]
        texts = [text.decode() if isinstance(text, bytes) else text for text in encode_all([deep, {"a": 1}])]
        assert texts == [encode(deep), encode({"a": 1})]


def test_a_trajectory_that_is_not_what_it_should_be_costs_no_other_in_its_part_a_value():
    names = ["example", "policy_version", "turns", "tokens"]
    groups = [[make_trajectory(0.5, f"q{number}", 0, policy_version=number)] for number in range(300)]
    expected = table_of(groups, [], names).to_pylist()
    expected[140] |= {"example": None, "policy_version": None}
    (odd,) = groups[140]
    groups[140] = [Trajectory.model_construct(episode=tuple(odd.episode), reward=0.5, metadata="nothing")]
    assert table_of(groups, [], names).to_pylist() == expected


@pytest.mark.slow
@pytest.mark.proof
def test_a_value_that_holds_another_one_again_and_again_ends():
    with noting_replaced() as replaced:
        text = encode({"doubled": doubled(), "after": 1})
    assert decode(text)["after"] == 1 and len(text) < 50_000_000
    assert any("too many values" in what for what in replaced.values())


def test_keys_that_are_the_same_text_lose_no_value():
    with noting_replaced() as replaced:
        found = plain({1: "a", "1": "b", "1 (2)": "c", None: "d", "null": "e"}, "scores")
    assert found == {"1": "a", "1 (2)": "b", "1 (2) (2)": "c", "null": "d", "null (2)": "e"}
    assert set(replaced.values()) == {"several keys with the same text"}


def test_texts_of_long_values_are_short_and_differ():
    one, other = b"\xff" * 10_000 + b"\x01", b"\xff" * 10_000 + b"\x02"
    assert len(plain(one)) < 300 and plain(one) != plain(other)
    assert plain(10**5000) != plain(10**5000 + 1) and len(plain(10**5000)) < 300


def test_what_is_stored_as_text_is_noted_by_its_field_and_what_has_a_nearest_form_is_not():
    with noting_replaced() as replaced:
        encode({"a": {"digest": b"\xff"}, "b": [[b"\xff"], 1], "c": {1}, "d": np.arange(2), "e": (1,), "f": b"text"})
    assert replaced == {"a.digest": "bytes", "b[][]": "bytes"}


def test_plain_data_is_written_as_deep_as_it_can_be_read():
    at_most = deep(DEEPEST // 2)
    assert decode(encode(at_most)) == at_most
    assert decode(encode({"é": at_most["in"]})) == {"é": at_most["in"]}


# ── in every place of a record ───────────────────────────────────────────────────────────────────────────────────────


def step_of(value) -> IntermediateStep:
    payload = IntermediateStepPayload.model_construct(
        event_type="TOOL_END",
        event_timestamp=0.0,
        metadata={"m": value},
        data=StreamEventData(input=value, output=value, payload=value),
        usage_info=value,
        UUID="u",
    )
    ancestry = InvocationNode(function_id="f", function_name="f")
    return IntermediateStep.model_construct(parent_id="p", function_ancestry=ancestry, payload=payload)


def call_of(value) -> IntermediateStep:
    call = LLMCall(
        None, 0, "m", [{"role": "user", "content": value, "more": value}], [{"tool": value}], {"content": value}, None,
        None, None, None, None, None, SamplingParams(), 0.0, False,
    )  # fmt: skip
    step = step_of(None)
    step.payload.data = StreamEventData(payload=call)
    return step


def write_everywhere(folder, value) -> None:
    """A run of two epochs that has the value in every place that other people fill."""
    episode = [
        item("user", "2+2"),
        EpisodeItem.model_construct(
            role="assistant", content="4", logprobs=[-0.5], metadata={"tool_calls": [value], "name": value, "x": value}
        ),
        EpisodeItem.model_construct(role="tool", content=value, logprobs=value, metadata={"token_ids": value}),
    ]
    metadata = {
        "id": value,
        "generation": value,
        "scores": {"s": value},
        "reward_error": value,
        "m": [value, {"k": value}],
    }
    groups = [
        [Trajectory.model_construct(episode=episode, reward=1.0, shaped_rewards=[0.5], metadata=metadata)],
        [make_trajectory(0.5, "q", 0)],
    ]
    steps = [step_of(value), call_of(value), step_of("plain")]
    failures = [RolloutFailure(value, 0, "ValueError", steps), RolloutFailure("q", 1, "ValueError", [step_of("plain")])]
    job = TrainingJobStatus.model_construct(
        run_id="run",
        backend="b",
        status="completed",
        progress=None,
        message=value,
        metadata={"metrics": {"loss": value}, "k": value},
    )
    with RunStore.create(folder, "run", {}) as store:
        for index in range(2):
            base = epoch_of(groups, index)
            collection = base.collection.model_copy(update={"failures": failures})
            validation = Validation(index, value, 0.5, 3, {"s": value, "t": 1.0}, 0.0, None)
            metrics = replace(base.metrics, scores={"s": value, "t": 1.0}, failures=2)
            epoch = replace(
                base, collection=collection, job=job, metrics=metrics, validations=(validation,),
                policy_versions=(value, 1), seconds={"total": value, "training": 1.0}, reason=value,
            )  # fmt: skip
            store.begin_epoch(index, 0.0, value)
            store.add_rollouts(index, collection)
            store.add_rollouts(index, collection, whole=True)
            store.record_selection(index, epoch.selection, {})
            store.record_job(index, TrainingJobRef.model_construct(run_id="run", backend="b", metadata={"job": value}))
            store.record_status(index, job)
            store.add_validation(validation, index)
            store.record_change(Change(0.0, "code", "lr", value, value, None))
            store.record_event("told", value=value)
            left = RunStore.open(folder).partial()
            assert left.job.backend == "b" and left.status.backend == "b" and left.selection is not None
            assert len(left.collection.trajectories) == 2 and len(left.collection.failures) == 2
            store.append(epoch, {"index": index})
        store.add_validation(validation)
        store.amend(epoch)


def read_everywhere(folder) -> None:
    """Every reader's road through it."""
    reader = RunStore.open(folder)
    assert [epoch.index for epoch in reader.epochs] == [0, 1] and reader.state() == {"index": 1}
    for epoch in reader.epochs:
        assert epoch.job.status == "completed" and epoch.metrics.scores["t"] == 1.0 and epoch.seconds["training"] == 1.0
        assert epoch.validations[0].mean_reward == 0.5 and epoch.validations[0].scores["t"] == 1.0
        collection = epoch.collection
        odd, usual = collection.trajectories
        assert usual[0].metadata["id"] == "q" and usual[0].reward == 0.5
        assert [each.content for each in odd[0].episode[:2]] == ["2+2", "4"] and odd[0].episode[1].logprobs == [-0.5]
        assert odd[0].metadata.keys() == {"id", "generation", "scores", "reward_error", "m"}
        assert [failure.error for failure in collection.failures] == ["ValueError"] * 2
        assert collection.failures[0].steps[-1].data.output == "plain" and len(collection.failures[1].steps) == 1
        assert len(collection.failures[0].steps) == 3
        assert epoch.statistics.example_ids[1] == "q"
    assert len(reader.journal()) == 2 and len(reader.validations) == 1 and len(reader.events("told")) == 2
    for frame in (frames.trajectories, frames.groups, frames.epochs):
        assert len(frame(reader.epochs))
    with RunStore.open(folder, write=True) as again:
        again.append(make_epoch([[1.0]], index=2), {})


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("name", ODD)
def test_an_odd_value_in_every_place_of_a_run_costs_nothing_else(folder, name):
    write_everywhere(folder, ODD[name])
    read_everywhere(folder)


FOR_HYPOTHESIS = sorted(ODD.keys() - {"of a class that cannot be compared"})  # hypothesis compares classes itself


def odd_of(name):
    return ODD[name]


def array_of(found):
    array = np.empty(len(found), object)
    for place, value in enumerate(found):  # numpy would look into the values if it were given all of them
        array[place] = value
    return array


texts = st.text(st.characters(codec=None), max_size=8)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | texts | st.binary(max_size=8)
    | st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.decimals() | st.fractions() | st.uuids()
    | st.sampled_from(FOR_HYPOTHESIS).map(odd_of) | st.sampled_from([10**599, 1e300])
)  # fmt: skip
keys = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=4) | st.tuples(texts, texts)
anything = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(keys, children, max_size=3)
        | st.lists(children, max_size=2).map(lambda found: Point(*found[:2]))
        | st.lists(children, max_size=2).map(lambda found: types.SimpleNamespace(found=found))
        | st.lists(children, max_size=2).map(array_of)
        | st.lists(st.integers() | texts | st.binary(max_size=4), max_size=3).map(frozenset)
    ),
    max_leaves=6,
)
HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@pytest.mark.slow
@pytest.mark.proof
@settings(max_examples=15, deadline=None, suppress_health_check=HEALTH)
@given(value=anything)
def test_any_nested_value_in_every_place_leaves_a_run_that_can_be_read(tmp_path, value):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    write_everywhere(tmp_path / "run", value)
    read_everywhere(tmp_path / "run")


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=HEALTH)
@given(value=anything)
def test_hundreds_of_nested_values_leave_runs_that_can_be_read(tmp_path, value):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    write_everywhere(tmp_path / "run", value)
    read_everywhere(tmp_path / "run")


def test_one_warning_names_each_field(store, folder, caplog):
    job = TrainingJobStatus(run_id="run", backend="b", status="completed", metadata={"digest": b"\xff", "loss": 0.5})  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "finetune_nb"):
        for index in range(3):
            trajectory = make_trajectory(1.0, "q", 0, checked={"by": Silent()})
            epoch = replace(epoch_of([[trajectory, trajectory]], index), job=job)
            store.append(epoch, {})
    said = [record.getMessage() for record in caplog.records]
    assert sum("job.metadata.digest" in each and "bytes" in each for each in said) == 1
    assert sum("metadata.checked.by" in each and "Silent" in each for each in said) == 1
    assert len(said) == 1
    assert RunStore.open(folder).epochs[2].job.metadata == {"digest": "b'\\xff'", "loss": 0.5}


def test_an_epoch_of_which_something_was_replaced_is_shown_as_it_is_on_the_disk(store, folder):
    given_ = epoch_of([[make_trajectory(1.0, b"\xff", 0)]])  # type: ignore[arg-type]
    found = store.append(given_, {})
    assert found.collection.trajectories[0][0].metadata["id"] == found.statistics.example_ids[0] == "b'\\xff'"


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    "name",
    [
        "reward",
        "shaped_rewards",
        "episode",
        "metadata",
        "role",
        "content",
        "message",
        "preference",
        "error",
        "steps",
        "generation",
    ],
)
def test_a_rollout_that_was_made_without_checks_costs_no_other(store, folder, name):
    usual = make_trajectory(1.0, "q", 0)
    message = EpisodeItem.model_construct(role="user", content="x", logprobs=None, metadata=None)
    odd = Trajectory.model_construct(
        episode=[message], reward=0.5, shaped_rewards=None, metadata={"id": "q", "generation": 1}
    )
    failure = RolloutFailure("q", 2, "no", [])
    if name in ("reward", "shaped_rewards", "episode", "metadata"):
        setattr(odd, name, Silent())
    elif name in ("role", "content"):
        setattr(message, name, b"\xff")
    elif name == "message":
        odd.episode[:] = [{"role": "user", "content": "as a dict"}]  # type: ignore[list-item]
    elif name == "preference":
        odd.episode[:] = [DPOItem.model_construct(prompt=3, chosen_response=b"\xff", rejected_response=None)]  # type: ignore[list-item]
    else:
        failure = replace(failure, **{name: Silent()})
    base = epoch_of([[usual, make_trajectory(0.5, "q", 1)]])
    collection = base.collection.model_copy(update={"trajectories": [[usual, odd]], "failures": [failure]})
    metrics = replace(base.metrics, failures=1)
    store.begin_epoch(0, 0.0, None)
    store.add_rollouts(0, collection)
    store.append(replace(base, collection=collection, metrics=metrics), {})
    found = RunStore.open(folder).epochs[0].collection
    assert found.trajectories[0][0].episode == usual.episode and found.failures[0].example_id == "q"
    if name != "metadata":
        assert found.trajectories[0][1].metadata == {"id": "q", "generation": 1}


def test_a_step_that_cannot_be_read_again_is_left_out_and_said(store, folder, caplog):
    bad = IntermediateStep.model_construct(parent_id=3, function_ancestry=None, payload=step_of("x").payload)  # type: ignore[arg-type]
    base = epoch_of([[make_trajectory(1.0, "q", 0)]])
    failures = [RolloutFailure("q", 1, "no", [step_of("kept"), bad, step_of("kept too")])]
    collection = base.collection.model_copy(update={"failures": failures})
    store.append(replace(base, collection=collection, metrics=replace(base.metrics, failures=1)), {})
    steps = RunStore.open(folder).epochs[0].collection.failures[0].steps
    assert [step.data.output for step in steps] == ["kept", "kept too"]
    assert "steps" in caplog.text


# ── rows that cannot be read ─────────────────────────────────────────────────────────────────────────────────────────


def five_epochs(folder):
    with RunStore.create(folder, "run", {}) as store:
        for index in range(5):
            epoch = make_epoch([[1.0, 0.0]], index=index, validation=0.5)
            store.append(epoch, {"index": index})
            store.record_change(Change(0.0, "code", "percentile", 0.1, 0.2, index))
            store.add_validation(Validation(index, 0, 0.5, 3))
    return folder


def execute(folder, *statements):
    with closing(sqlite3.connect(folder / "run.db")) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize(
    "damage",
    [
        "record = '{}'",
        "record = '['",
        "record = x'00'",
        "rewards = x'00'",
        "offsets = x''",
        "failures = 'many'",
        "started_at = x'ff', record = 7",
    ],
)
def test_a_bad_row_hides_no_other_epoch_and_is_named(folder, damage, where, caplog):
    execute(five_epochs(folder), f"UPDATE epochs SET {damage} WHERE epoch = {where}")
    reader = RunStore.open(folder)
    epochs = reader.epochs
    assert [epoch.index for epoch in epochs] == [0, 1, 2, 3, 4]
    assert f"epoch {where}" in caplog.text and "run.db" in caplog.text
    assert f"epoch {where} of the table epochs cannot be read" in epochs[where].reason
    assert f"epoch-00000{where}.parquet" in epochs[where].reason
    for epoch in epochs:
        if epoch.index != where:
            assert epoch.metrics.mean_reward == 0.5 and epoch.collection.trajectories
    assert math.isnan(epochs[where].metrics.mean_reward)
    shown = frames.epochs(epochs)
    assert shown.reason[where] == epochs[where].reason and shown.mean_reward.notna().sum() == 4
    assert len(frames.trajectories(epochs)) == 8
    with RunStore.open(folder, write=True) as writer:
        assert writer.append(make_epoch([[1.0]], index=5), {}).index == 5
    reader.refresh()
    assert len(reader.epochs) == 6


def test_bad_rows_of_validations_changes_and_states_hide_no_other(folder, caplog):
    execute(
        five_epochs(folder),
        "UPDATE validations SET record = '{' WHERE place IN (1, 2)",
        "UPDATE changes SET old = 'none' WHERE place = 3",
        "UPDATE changes SET time = x'00' WHERE place = 4",
        "UPDATE epochs SET state = 'none' WHERE epoch = 4",
    )
    reader = RunStore.open(folder)
    assert (
        len(reader.epochs) == 5
        and sum(len(epoch.validations) for epoch in reader.epochs) + len(reader.validations) == 8
    )
    changes = reader.journal()
    assert [change.field for change in changes] == ["percentile"] * 3 + ["row.unreadable"] * 2
    assert reader.state() == {"index": 3}
    for row in ("row 1 of the table validations", "row 3 of the table changes", "row 4 of the table epochs"):
        assert row in caplog.text
    caplog.clear()
    reader.journal()
    assert not caplog.text  # said once


def test_a_bad_batch_of_an_unfinished_epoch_hides_no_other(store, folder, caplog):
    store.begin_epoch(0, 0.0, None)
    for generation in range(3):
        store.add_rollouts(0, collected([make_trajectory(0.25, "q", generation)]))
    store.record_job(0, TrainingJobRef(run_id="run", backend="b", metadata={"job_id": "j"}))
    with closing(sqlite3.connect(folder / "run.db")) as db:
        db.execute("UPDATE rollouts SET data = x'00' WHERE batch = 2")
        db.execute("UPDATE unfinished SET job_ref = '{}'")
        db.commit()
    left = RunStore.open(folder).partial()
    assert [each.metadata["generation"] for each in left.collection.trajectories[0]] == [0, 2]
    assert left.job is None and "batch 1" in caplog.text and "of epoch 0 of the table unfinished" in caplog.text


def test_an_error_of_a_trajectory_file_names_the_row(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune_nb.errors import StoreError
    from finetune_nb.store.folder import trajectory_file

    path = trajectory_file(five_epochs(folder), 0)
    table = pq.read_table(path)
    place = table.schema.get_field_index("metadata")
    pq.write_table(table.set_column(place, "metadata", pa.array(["{}", "{"])), path)
    epochs = RunStore.open(folder).epochs
    with pytest.raises(StoreError, match="epoch-000000.parquet.*row 1"):
        epochs[0].collection  # noqa: B018
    assert epochs[1].collection.trajectories
