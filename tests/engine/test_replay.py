"""A journal that was exported and repeated: the same changes, at the same safe points, with the same selections."""

import time

import pytest
from detached import Weights
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.engine.live_settings import LiveSettings, journal_text, live_fields, read_journal
from finetune_nb.testing import sums
from finetune_nb.types import Change, CurriculumSettings


@pytest.fixture
def make_run(tmp_path, closing):
    def make(**options):
        settings = {
            "generations": 4,
            "output_dir": tmp_path,
            "adapter": Weights(),
            "deterministic": True,
            "curriculum": {"initial_percentile": 0.3, "expansion_interval": 2, "random_subsample": 0.8},
            **options,
        }
        return closing(ft.Run(guess, right, sums(8), **settings))

    return make


def steer(run):
    """Six epochs with changes of every kind: overtaken, back to automatic, of a component, and one that is never used."""
    steps = {
        0: [{"percentile": 0.9}],
        2: [{"percentile": 0.1}, {"percentile": 0.5, "min_reward_diff": 0.2}],
        3: [{"schedule": "automatic"}],
        5: [{"percentile": 0.7, "schedule": "automatic", "sort_ascending": True}],
    }
    for epoch in range(6):
        for changes in steps.get(epoch, ()):
            run.curriculum = changes
        if epoch == 1:
            run.live = {"builder.num_generations": 3, "llm.max_tokens": 2}
        ft.run_sync(run.next_epoch())
    run.curriculum = {"percentile": 1.0}
    return run


def selections(run):
    return [
        (
            epoch.curriculum,
            epoch.selection.kept.tolist(),
            epoch.selection.left_out(),
            epoch.selection.state,
            epoch.metrics.mean_reward,
        )
        for epoch in run
    ]


def test_a_replayed_journal_gives_the_same_selections_and_the_same_journal(make_run, tmp_path):
    run = steer(make_run(name="first"))
    journal = run.export(tmp_path / "made" / "journal.yaml")
    again = make_run(name="again", replay=journal)
    again.start(epochs=6)
    again.wait()
    assert selections(again) == selections(run)
    unlike = make_run(name="unlike")
    unlike.start(epochs=6)
    unlike.wait()
    assert selections(unlike) != selections(run)
    told = [[(c.field, c.new, c.epoch) for c in each.changes if c.epoch is not None] for each in (run, again)]
    assert sorted(told[0]) == sorted(told[1]) and len(told[0]) >= 9
    assert {c.source for c in again.changes} == {"replay"}


@pytest.mark.slow
def test_a_run_from_yaml_with_the_embedded_model_repeats_its_changes(tmp_path, closing):
    pytest.importorskip("torch")
    from finetune_nb.examples import calculator

    def make(name, **more):
        return closing(
            ft.Run.from_config(
                calculator.CONFIG,
                name=name,
                run__deterministic=True,
                finetuning__output_dir=str(tmp_path),
                finetuning__num_epochs=2,
                finetuning__run_configuration__validation_dataset=None,
                finetuning__curriculum_learning__enabled=True,
                trajectory_builders__my_builder__examples_per_epoch=6,
                trajectory_builders__my_builder__num_generations=4,
                **more,
            )
        )

    run = make("first")
    for epoch in range(2):
        if epoch == 1:
            run.curriculum = {"percentile": 1.0}
            run.live = {"adapter.learning_rate": 1e-3, "llm.temperature": 0.7}
        ft.run_sync(run.next_epoch())
    again = make("again", replay=run.export(tmp_path / "journal.yaml"))
    again.start()
    again.wait()
    assert selections(again) == selections(run) and len(again) == 2
    assert again.live == run.live
    assert len(run[0].selection.kept) < len(run[1].selection.kept)


def test_a_journal_that_was_written_is_read_as_it_was(tmp_path):
    now = round(time.time(), 3)
    changes = [
        Change(now, "code", "percentile", 0.3, 0.9, 0),
        Change(now, "panel", "random_subsample", None, 0.5, None),
        Change(now, "fork", "schedule", "automatic", "manual", 12),
    ]
    path = tmp_path / "journal.yaml"
    path.write_text(journal_text("a run", changes))
    assert path.read_text().startswith("run: a run\nchanges:\n")
    assert read_journal(path) == changes


def test_what_is_no_journal_or_does_not_fit_is_refused_before_anything_runs(make_run, tmp_path):
    def refused(text, words):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ft.ConfigError, match=words):
            make_run(replay=tmp_path / "wrong.yaml")

    refused("llms: {}", "no list `changes`")
    refused("changes: [{field: percentile}]", r"changes\[0\]")
    refused("changes: [{field: percentile, new: 0.5, epoch: -1}]", "epoch is -1")
    refused("changes: [{field: percentile, new: 5, epoch: 1}]", "percentile of epoch 1.*above 0 and at most 1")
    refused("changes: [{field: percentil, new: 0.5, epoch: 1}]", "percentile")
    refused("changes: [{field: llm.temperatur, new: 1, epoch: 1}]", "llm.temperature")
    refused("changes: [{field: !!python/name:os.system '', new: 1, epoch: 1}]", "tag")
    with pytest.raises(ft.ConfigError, match="cannot be read"):
        make_run(replay=tmp_path / "nowhere.yaml")
    with pytest.raises(ft.ConfigError, match=r"\.yaml"):
        make_run().export("journal.toml")


def test_changes_of_one_epoch_are_made_together_right_before_its_safe_point(make_run):
    fields = live_fields(make_run().config)
    controls = LiveSettings(CurriculumSettings(enabled=True, percentile=0.3), fields)
    controls.replay(
        [
            Change(0.0, "code", "percentile", 0.3, 0.9, 2),
            Change(0.0, "code", "min_reward_diff", 0.1, 0.2, None),
            Change(0.0, "code", "llm.temperature", 1.0, 0.5, 2),
        ]
    )
    assert controls.apply(1)[0].percentile == 0.3 and controls.take_live("rollouts", 1) == {}
    assert controls.take_live("training", 2) == {} and controls.take_live("rollouts", 2) == {"llm.temperature": 0.5}
    settings, resumed = controls.apply(2)
    assert (settings.percentile, settings.schedule, settings.min_reward_diff, resumed) == (0.9, "automatic", 0.1, True)
    assert controls.apply(3)[0] == settings
