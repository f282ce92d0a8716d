"""How the curriculum of a run reaches its Trainer: ours takes the settings themselves, any other the section it knows."""

from __future__ import annotations

import pytest
from agents import coin, guess, right
from foreign_trainer import ForeignTrainer, ten_groups

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums


@pytest.fixture
def make_run(tmp_path, closing):
    def make(**options):
        adapter = FakeAdapter(policy=ScriptedPolicy(coin))
        builder = ScriptedBuilder(ten_groups)
        settings = {"builder": builder, "adapter": adapter, "output_dir": tmp_path, "generations": 2, **options}
        return closing(ft.Run(guess, right, sums(6), **settings))

    return make


class Noting(ForeignTrainer):
    """Keeps something of its own in the curriculum's state."""

    async def initialize(self, run_config):
        await super().initialize(run_config)
        self._curriculum_state["my_own"] = "kept"


async def test_a_trainer_of_ours_selects_with_the_settings_of_the_run_percentile_and_schedule_among_them(make_run):
    trainer = ft.EpochTrainer(ft.EpochTrainerConfig())
    run = make_run(trainer=trainer, curriculum=dict(initial_percentile=0.1, min_reward_diff=0.2))
    run.curriculum = dict(percentile=0.5, min_reward_diff=0.3)
    epoch = await run.next_epoch()
    # The trainer's own choice has them already: nothing is put back when the record is made.
    assert trainer.selection.settings == run.curriculum == epoch.curriculum
    assert (trainer.selection.settings.percentile, trainer.selection.settings.schedule) == (0.5, "manual")
    run.curriculum = dict(schedule="automatic")
    epoch = await run.next_epoch()
    assert trainer.selection.settings == run.curriculum == epoch.curriculum
    assert trainer.selection.settings.schedule == "automatic"


async def test_a_trainer_of_ours_has_the_section_as_well_for_its_log(make_run):
    trainer = ft.EpochTrainer(ft.EpochTrainerConfig())
    run = make_run(trainer=trainer, curriculum=dict(initial_percentile=0.1))
    run.curriculum = dict(percentile=0.5, min_reward_diff=0.3)
    await run.next_epoch()
    assert trainer.curriculum_config == ft.CurriculumLearningConfig(
        enabled=True, initial_percentile=0.1, min_reward_diff=0.3
    )
    assert trainer.get_curriculum_state()["current_percentile"] == 0.5


async def test_a_trainer_of_ours_without_a_run_goes_by_its_section(tmp_path):
    trainer = ft.EpochTrainer(ft.EpochTrainerConfig())
    section = ft.CurriculumLearningConfig(enabled=True, initial_percentile=0.2, expansion_interval=100)
    await trainer.bind_components(ScriptedBuilder(ten_groups), FakeAdapter(policy=ScriptedPolicy(coin)))
    await trainer.initialize(ft.FinetuneConfig(curriculum_learning=section, output_dir=tmp_path))
    await trainer.run_epoch(0, "by-hand")
    assert trainer.curriculum_settings is None
    assert len(trainer.selection.kept) == 2
    # Whoever drives it by hand steers it by the section, as in the NeMo Agent Toolkit.
    trainer.curriculum_config = section.model_copy(update={"enabled": False})
    await trainer.run_epoch(1, "by-hand")
    assert len(trainer.selection.kept) == 10


async def test_somebody_elses_trainer_gets_the_section_and_the_state_and_nothing_more(make_run):
    trainer = Noting(ft.TrainerConfig())
    run = make_run(trainer=trainer, curriculum=dict(initial_percentile=0.1))
    run.curriculum = dict(percentile=0.5, min_reward_diff=0.3)
    epoch = await run.next_epoch()
    assert trainer.curriculum_config == ft.CurriculumLearningConfig(
        enabled=True, initial_percentile=0.1, min_reward_diff=0.3
    )
    assert trainer._curriculum_state["current_percentile"] == 0.5
    assert trainer._curriculum_state["my_own"] == "kept"
    assert not hasattr(trainer, "curriculum_settings")
    assert epoch.curriculum == run.curriculum
