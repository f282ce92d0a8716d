"""A large epoch is made columns, and written, part by part."""

from __future__ import annotations

import pytest
from factories import collected, item, make_epoch, make_trajectory
from records import epoch_of, failed, stored

from finetune_nb.errors import StoreError
from finetune_nb.rollouts.episodes import SampledTurn
from finetune_nb.store import batches, trajectories, trajectory_table
from finetune_nb.store.store import RunStore
from finetune_nb.types import TrajectoryCollection


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(trajectory_table, "ROWS_PER_PART", 2)
    monkeypatch.setattr(batches, "PARTS_PER_BATCH", 2)


@pytest.fixture
def store(tmp_path):
    with RunStore.create(tmp_path / "run", "run", {}) as store:
        store.begin_epoch(0, 0.0, 0)
        yield store


def left(tmp_path):
    unfinished = RunStore.open(tmp_path / "run").partial()
    assert unfinished is not None
    return unfinished.collection


def columns(tmp_path, name):
    return RunStore.open(tmp_path / "run").columns(0, [name]).column(name)


def sampled_turn(message):
    turn = SampledTurn.of(message)
    assert turn is not None
    return turn


def named(collection):
    return [[(each.metadata["id"], each.metadata["generation"]) for each in group] for group in collection.trajectories]


def test_groups_are_cut_anywhere_and_failures_come_last(tmp_path):
    epoch = make_epoch([[1, 0, 1, 0, 1], [], [0], [1, 1]], failures=[failed(generation=g) for g in range(5, 10)])
    (record,) = stored(tmp_path, epoch)
    assert named(record.collection) == named(epoch.collection)
    assert [failure.generation for failure in record.collection.failures] == [5, 6, 7, 8, 9]
    assert columns(tmp_path, "kind").to_pylist() == ["trajectory"] * 8 + ["failure"] * 5


@pytest.mark.parametrize(("place", "times"), [(0, 1), (3, 1), (8, 2)])
def test_a_column_that_needs_its_wider_type_late_has_it_from_the_beginning(tmp_path, monkeypatch, place, times):
    monkeypatch.setattr(trajectories, "ROWS_PER_GROUP", 2)
    written, write_with = [], trajectories._write_with

    def counted(*arguments):
        written.append(arguments)
        return write_with(*arguments)

    monkeypatch.setattr(trajectories, "_write_with", counted)
    exact, ids = -0.1, [2**40, 7]  # neither fits into 32 bits
    rollouts = [make_trajectory(1.0, "q", generation, "4") for generation in range(9)]
    rollouts[place].episode = [item("assistant", "ab", logprobs=[exact, -0.5], token_ids=ids, entropies=[0.1, 1e-9])]
    (record,) = stored(tmp_path, epoch_of([rollouts]))
    turns = [sampled_turn(each.episode[-1]) for each in record.collection.trajectories[0]]
    assert (turns[place].logprobs, turns[place].ids, turns[place].entropies) == ([exact, -0.5], ids, [0.1, 1e-9])
    assert [turn.logprobs for turn in turns if turn is not turns[place]] == [[-0.5]] * 8
    assert str(columns(tmp_path, "logprobs").type).count("double") == 1
    assert len(written) == times  # a second time only where what is written first does not need it


def test_a_whole_unfinished_epoch_is_read_from_all_of_its_batches(store, tmp_path):
    whole = make_epoch([[1, 0, 1], [0, 1, 1], [], [1, 1, 0]], failures=[failed()]).collection
    store.add_rollouts(0, collected([make_trajectory(None, "q0", 0)]))
    store.add_rollouts(0, whole, True)
    assert named(left(tmp_path)) == named(whole)
    assert len(left(tmp_path).failures) == 1
    decoded = {}
    found = [RunStore.open(tmp_path / "run").partial(decoded) for _ in range(2)]
    assert found[0] and found[1] and found[0].collection is found[1].collection


@pytest.mark.parametrize("whole", [True, False])
def test_no_rollout_is_lost_where_groups_do_not_fill_parts(store, tmp_path, whole):
    rollouts = make_epoch([[1, 0, 1]] * 8, failures=[failed()]).collection
    store.add_rollouts(0, rollouts, whole)
    assert named(left(tmp_path)) == named(rollouts)
    assert len(left(tmp_path).failures) == 1


def test_batches_of_an_attempt_that_was_cut_off_are_passed_over(store, tmp_path, monkeypatch):
    whole = make_epoch([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).collection
    store.add_rollouts(0, collected([make_trajectory(None, "q0", 0)]))
    written = batches.batches_of

    def full_disk(collection, whole):
        for batch, is_last in written(collection, whole):
            if is_last:
                raise StoreError("the disk is full")
            yield batch, is_last

    with monkeypatch.context() as patched:
        patched.setattr("finetune_nb.store.store.batches_of", full_disk)
        with pytest.raises(StoreError, match="full"):
            store.add_rollouts(0, whole, True)
    assert named(left(tmp_path)) == [[("q0", 0)]]  # what had come in before
    store.add_rollouts(0, whole, True)
    assert named(left(tmp_path)) == named(whole)


def test_many_rollouts_that_came_in_together_are_all_there(store, tmp_path):
    finished = [make_trajectory(None, f"q{g % 3}", g) for g in range(11)]
    store.add_rollouts(0, TrajectoryCollection.model_construct(trajectories=[finished], run_id="run", failures=[]))
    assert sorted(map(len, named(left(tmp_path)))) == [3, 4, 4]


def test_the_file_of_the_run_gives_back_the_space_of_unfinished_epochs(store, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_nb.store.store._MOST_UNUSED", 100_000)
    words = " ".join(str(n**3) for n in range(20_000))
    whole = collected([make_trajectory(1.0, "q", g, words[g:]) for g in range(8)])
    store.add_rollouts(0, whole, True)
    store.begin_epoch(0, 0.0, 0)
    store.close()
    assert (tmp_path / "run" / "run.db").stat().st_size < 200_000
