"""The cell that made a run is run again, in the same kernel: the new object continues the run."""

import time

import pytest

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, sums


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def make(folder, reward=1.0, **parts):
    parts.setdefault("adapter", FakeAdapter(delay=0.2))
    return ft.Run(
        solve, lambda item: reward, sums(3), generations=2, output_dir=folder, name="r", resume="auto", **parts
    )


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("kept", ["idle", "shown", "panel"])
def test_a_run_whose_first_object_is_kept_is_continued_with_the_new_functions(kept, tmp_path):
    first = make(tmp_path)
    ft.run_sync(first.next_epoch())
    shown = {"shown": first._repr_html_, "panel": first.panel, "idle": lambda: None}[kept]()
    again = make(tmp_path, reward=2.0)
    ft.run_sync(again.next_epoch())
    assert again.epochs().mean_reward.tolist() == [1.0, 2.0]
    assert first.state == "closed" and (shown is None) == (kept == "idle")
    again.close()


def test_the_epoch_that_runs_in_the_background_is_finished_first(tmp_path):
    first = make(tmp_path)
    first.start(3)
    while not first.progress.done:
        time.sleep(0.01)
    again = make(tmp_path, reward=2.0)
    recorded = len(again)
    assert recorded >= 1 and again.partial is None  # nothing of it is lost
    ft.run_sync(again.next_epoch())
    assert again.epochs().mean_reward.tolist() == [1.0] * recorded + [2.0]
    again.close()


def test_the_same_adapter_object_may_be_passed_again(tmp_path):
    adapter = FakeAdapter()
    first = make(tmp_path, adapter=adapter)
    ft.run_sync(first.next_epoch())
    again = make(tmp_path, adapter=adapter)
    ft.run_sync(again.next_epoch())
    assert len(again) == 2
    again.close()


@pytest.mark.parametrize("part", ["adapter", "builder", "trainer"])
def test_one_component_object_in_two_open_runs_is_refused_until_the_first_is_closed(part, tmp_path):
    from finetune_nb.training.trainer import EpochTrainer, EpochTrainerConfig

    made = {
        "adapter": FakeAdapter,
        "builder": lambda: ft.EvalTrajectoryBuilder(ft.EvalTrajectoryBuilderConfig(num_generations=2)),
        "trainer": lambda: EpochTrainer(EpochTrainerConfig()),
    }[part]()

    def run(name):
        return ft.Run(
            solve, lambda item: 1.0, sums(2), output_dir=tmp_path, name=name, **{"adapter": FakeAdapter(), part: made}
        )

    first, second = run("first"), run("second")
    ft.run_sync(first.next_epoch())
    with pytest.raises(ft.RunError, match="belongs to run 'first'"):
        ft.run_sync(second.next_epoch())
    first.close()
    ft.run_sync(second.next_epoch())
    second.close()


def test_ids_that_are_equal_as_numbers_are_different_examples(tmp_path):
    rows = [{"id": id, "question": f"{n}+1", "answer": str(n + 1)} for n, id in enumerate((1, 1.0, True))]
    run = ft.Run(solve, lambda item: 1.0, rows, generations=2, output_dir=tmp_path, adapter=FakeAdapter())
    epoch = ft.run_sync(run.next_epoch())
    questions = [{item.episode[0].content for item in group} for group in epoch.collection.trajectories]
    assert questions == [{"0+1"}, {"1+1"}, {"2+1"}]
    assert len(run.trajectories(example=1.0)) == len(run.trajectories(example="True")) == 2
    run.close()
