"""A run whose Trainer is somebody else's shows all that a run of ours shows, live and from its folder."""

import pytest
from foreign_trainer import ForeignTrainer, ten_groups

import finetune_nb as ft
from finetune_nb.testing import ScriptedBuilder

PLOTS = ("rewards", "reward_distribution", "curriculum", "groups", "advantages", "lengths", "training", "scores")


@pytest.fixture(params=["live", "from disk"])
async def foreign(request, make_run):
    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=ForeignTrainer(ft.TrainerConfig()), curriculum={})
    for _ in range(2):
        await run.next_epoch()
    if request.param == "live":
        return run
    run.close()
    return ft.Run.open(run.folder)


async def test_frames_say_what_its_trainer_chose_and_that_reasons_are_concluded(foreign):
    epochs, groups = foreign.epochs(), foreign.groups(epoch=1)
    assert epochs.inferred.all() and epochs.kept_groups.tolist() == [9, 9]
    assert groups[~groups.kept].example.tolist() == ["0"]
    trajectories = foreign.trajectories(epoch=0, example="3", columns=["reward", "selected"])
    assert trajectories.selected.all() and trajectories.reward.notna().all()
    assert set(foreign.messages(example="3").epoch) == {0, 1}
    assert foreign.tokens(epoch=0).trajectory.isin(foreign.trajectories(epoch=0).trajectory).all()
    assert foreign.journal().empty


@pytest.mark.parametrize("name", PLOTS)
async def test_every_plot_draws_it(foreign, name):
    figure = getattr(foreign, f"plot_{name}")(theme="dark")
    assert figure.axes and figure.alt_text and figure.png().startswith(b"\x89PNG")


async def test_views_show_it(foreign):
    assert "example 3" in foreign.show(epoch=1, example="3")._repr_html_()
    pair = foreign.compare_group(epoch=0, example="3")
    assert pair.trajectories[0].reward >= pair.trajectories[1].reward
    signal = foreign.signal()
    assert len(signal.groups) == 10 and "concluded" in signal._repr_html_()
    assert "epoch 1" in repr(foreign)


@pytest.mark.parametrize("suffix", ["html", "csv", "parquet", "jsonl"])
async def test_it_can_be_taken_away(foreign, tmp_path, suffix):
    path = foreign.export(tmp_path / f"foreign.{suffix}")
    assert path.stat().st_size > 1000
