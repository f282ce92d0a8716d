"""How the curriculum of a run reaches its Trainer: ours takes the settings themselves, any other the section it knows."""

from __future__ import annotations

import pytest
from foreign_trainer import ForeignTrainer, ten_groups
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.engine.observer import curriculum_of, set_curriculum
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.types import CurriculumState


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


# ── state and settings, in and out of any Trainer ────────────────────────────────────────────────────────────────────


async def initialized(trainer: ft.Trainer, section: ft.CurriculumLearningConfig | None = None) -> ft.Trainer:
    await trainer.bind_components(ScriptedBuilder(ten_groups), FakeAdapter(policy=ScriptedPolicy(coin)))
    await trainer.initialize(ft.FinetuneConfig(curriculum_learning=section or ft.CurriculumLearningConfig()))
    return trainer


HALFWAY = CurriculumState(percentile=0.6, last_expansion_epoch=4, total_groups=10, included_groups=frozenset({0, 2}))


@pytest.mark.parametrize("kind", [ft.EpochTrainer, Noting])
async def test_a_state_that_is_put_in_comes_out_again_and_the_settings_stay(kind):
    trainer = await initialized(kind(ft.EpochTrainerConfig()))
    section = trainer.curriculum_config
    assert curriculum_of(trainer) == CurriculumState(percentile=0.3)
    set_curriculum(trainer, HALFWAY)
    assert curriculum_of(trainer) == HALFWAY
    assert trainer.curriculum_config is section
    assert getattr(trainer, "curriculum_settings", None) is None


async def test_settings_are_put_in_with_the_percentile_that_the_run_started_with():
    section = ft.CurriculumLearningConfig(enabled=True, initial_percentile=0.2)
    trainer = await initialized(ft.EpochTrainer(ft.EpochTrainerConfig()), section)
    settings = ft.CurriculumSettings(enabled=True, percentile=0.6, schedule="manual", sort_ascending=True)
    set_curriculum(trainer, HALFWAY, settings)
    assert trainer.curriculum_settings == settings
    assert trainer.curriculum_config == section.model_copy(update={"sort_ascending": True})


async def test_keys_of_a_trainers_own_and_the_dict_itself_stay():
    trainer = await initialized(Noting(ft.TrainerConfig()))
    held = trainer._curriculum_state  # by somebody who shares it, such as a trainer that wraps another one
    set_curriculum(trainer, HALFWAY, ft.CurriculumSettings(enabled=True))
    assert held is trainer._curriculum_state
    assert held == {
        "current_percentile": 0.6,
        "last_expansion_epoch": 4,
        "total_groups": 10,
        "included_groups": {0, 2},
        "my_own": "kept",
    }


class WithoutState(ForeignTrainer):
    async def initialize(self, run_config):
        await super().initialize(run_config)
        self._curriculum_state = self.curriculum_config = None


async def test_a_trainer_that_keeps_no_state_of_a_curriculum_is_left_alone(make_run):
    trainer = WithoutState(ft.TrainerConfig())
    run = make_run(trainer=trainer, curriculum={})
    epoch = await run.next_epoch()
    assert epoch.job.status == "completed"
    assert curriculum_of(trainer) is None
    assert (trainer._curriculum_state, trainer.curriculum_config) == (None, None)


async def test_a_state_that_nobody_can_read_is_a_config_error():
    trainer = await initialized(ForeignTrainer(ft.TrainerConfig()))
    trainer._curriculum_state = {"percentile": 0.5}
    with pytest.raises(ft.ConfigError, match="expected a mapping with current_percentile"):
        curriculum_of(trainer)
