"""A run is continued with other settings, functions, rows or components than it had: said in the journal, or refused."""

import shutil

import pytest

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, sums


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def ones(item):
    return 1.0


def twos(item):
    return 2.0


class Shaping(ft.EvalTrajectoryBuilder):
    async def compute_reward(self, output_item, meta=None):
        return 100 + await super().compute_reward(output_item, meta)


def shaping():
    return Shaping(ft.EvalTrajectoryBuilderConfig(num_generations=2))


def epoch_of(folder, reward=ones, dataset=None, **settings):
    settings.setdefault("adapter", FakeAdapter())
    if "builder" not in settings:
        settings.setdefault("generations", 2)
    rows = sums(2) if dataset is None else dataset
    run = ft.Run(solve, reward, rows, name="r", output_dir=folder, resume="auto", **settings)
    ft.run_sync(run.next_epoch())
    run.close()
    return run


def resumed(run):
    return {c.field: (c.old, c.new, c.epoch) for c in run.changes if c.source == "resume"}


def test_a_setting_that_differs_is_in_the_journal_once_with_its_first_epoch(tmp_path):
    epoch_of(tmp_path, sampling={"temperature": 1.0})
    run = epoch_of(tmp_path, sampling={"temperature": 0.5})
    (change,) = resumed(run).values()
    assert change == (1.0, 0.5, 1)
    again = epoch_of(tmp_path, sampling={"temperature": 0.5})
    assert resumed(again) == resumed(run)
    back = epoch_of(tmp_path, sampling={"temperature": 1.0})
    assert [(c.new, c.epoch) for c in back.changes if c.source == "resume"] == [(0.5, 1), (1.0, 3)]
    assert "resume" in set(back.journal().source)


def test_functions_and_rows_that_differ_are_in_the_journal(tmp_path):
    epoch_of(tmp_path)
    assert resumed(epoch_of(tmp_path)) == {}
    run = epoch_of(tmp_path, reward=twos, dataset=sums(3))
    assert set(resumed(run)) == {"evaluator.reward", "dataset.train"}
    assert any("evaluator.reward" in line for line in run.log_lines())


def test_a_run_with_a_builder_of_its_own_needs_it_to_continue(tmp_path):
    epoch_of(tmp_path, builder=shaping())
    with pytest.raises(ft.RunError, match=r"made with a builder of its own.*Pass builder="):
        epoch_of(tmp_path)
    opened = ft.Run.open(tmp_path / "r", solve, ones, dataset=sums(2), adapter=FakeAdapter())
    assert opened.epochs().mean_reward.tolist() == [101.0]  # it can be read
    with pytest.raises(ft.RunError, match="made with a builder of its own"):
        ft.run_sync(opened.next_epoch())
    opened.close()
    opened = ft.Run.open(tmp_path / "r", solve, ones, dataset=sums(2), adapter=FakeAdapter(), builder=shaping())
    ft.run_sync(opened.next_epoch())
    assert opened.epochs().mean_reward.tolist() == [101.0, 101.0]
    opened.close()


def test_a_component_of_another_class_is_refused(tmp_path):
    epoch_of(tmp_path, builder=shaping())
    other = ft.EvalTrajectoryBuilder(ft.EvalTrajectoryBuilderConfig(num_generations=2))
    with pytest.raises(ft.RunError, match=r"found .*EvalTrajectoryBuilder"):
        epoch_of(tmp_path, builder=other)


def test_a_fork_needs_a_builder_too_and_may_be_given_another_one(tmp_path):
    run = epoch_of(tmp_path, builder=shaping())
    with pytest.raises(ft.FinetuneError, match="builder"):
        run.fork(adapter=FakeAdapter())
    plain = ft.EvalTrajectoryBuilder(ft.EvalTrajectoryBuilderConfig(num_generations=2))
    fork = run.fork(adapter=FakeAdapter(), builder=plain, name="other")
    ft.run_sync(fork.next_epoch())
    assert fork.epochs().mean_reward.tolist()[-1] == 1.0
    fork.close()


def test_what_differs_is_noted_once_where_the_run_goes_back_to_an_older_checkpoint(tmp_path):
    """The record is taken up twice then: when the run is opened, and once more without its newest epochs."""

    def opened(temperature):
        run = ft.Run(
            solve,
            lambda item: float(len(item.output_obj)),
            sums(2),
            generations=2,
            name="r",
            output_dir=tmp_path,
            resume="auto",
            sampling={"temperature": temperature, "max_tokens": 4},
        )
        run.config.run.checkpoint_every = 2
        return run

    run = opened(1.0)
    for _ in range(2):
        ft.run_sync(run.next_epoch())
    shutil.copytree(
        run.folder, tmp_path / "killed"
    )  # as a process that was killed leaves it: epoch 1 has no checkpoint
    run.close()
    shutil.rmtree(tmp_path / "r")
    (tmp_path / "killed").rename(tmp_path / "r")
    (tmp_path / "r" / "lock").unlink()

    again = opened(0.5)
    ft.run_sync(again.next_epoch())
    assert [epoch.index for epoch in again] == [0, 1]  # it went back
    noted = [(c.field.rpartition(".")[2], c.old, c.new, c.epoch) for c in again.changes if c.source == "resume"]
    assert noted.count(("temperature", 1.0, 0.5, 1)) == len([each for each in noted if each[0] == "temperature"]) == 1
    again.close()


def test_a_component_that_the_config_makes_of_the_same_class_is_the_same(tmp_path):
    plain = ft.EvalTrajectoryBuilder(ft.EvalTrajectoryBuilderConfig(num_generations=2))
    epoch_of(tmp_path, builder=plain)
    opened = ft.Run.open(tmp_path / "r", solve, ones, dataset=sums(2), adapter=FakeAdapter())
    ft.run_sync(opened.next_epoch())
    assert len(opened) == 2
    opened.close()


def test_a_fork_of_a_run_that_was_opened_without_its_builder_is_refused_before_its_first_epoch(tmp_path):
    epoch_of(tmp_path, builder=shaping())
    opened = ft.Run.open(tmp_path / "r", solve, ones, dataset=sums(2), adapter=FakeAdapter())
    fork = opened.fork(adapter=FakeAdapter(), name="other")
    with pytest.raises(ft.RunError, match="made with a builder of its own"):
        ft.run_sync(fork.next_epoch())
    fork.close()
    opened.close()
