"""An epoch's numbers are declared once, in EpochMetrics: frame, sinks and the Toolkit's log call them by its names."""

from __future__ import annotations

import dataclasses
import json

import pytest
from factories import make_epoch
from foreign_trainer import ten_groups
from small_agents import coin

import finetune_nb as ft
from finetune_nb import frames
from finetune_nb.config import CurriculumSettings
from finetune_nb.engine.sinks import metrics_of
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy
from finetune_nb.types import EpochMetrics

FULL = make_epoch(
    [[1, 0], [0.5, 0.25, None]],
    settings=CurriculumSettings(True, 0.5),
    validation=0.25,
    train={"kl": 0.1, "trained_groups": 1},
    scores={"tidy": 1.0},
)
FULL = dataclasses.replace(
    FULL, metrics=dataclasses.replace(FULL.metrics, mean_entropy=0.75, length_correlation=0.5, version_lag=1)
)
NUMBERS = [
    field for field in dataclasses.fields(EpochMetrics) if field.type in ("float", "int", "int | None", "float | None")
]


def test_sinks_get_these_names_in_this_order():
    assert list(metrics_of(FULL)) == [
        "reward/mean",
        "reward/min",
        "reward/max",
        "reward/kept",
        "reward/length_correlation",
        "groups/all",
        "groups/with_spread",
        "groups/kept",
        "groups/trained_on",
        "rollouts/finished",
        "rollouts/failed",
        "rollouts/sampled_tokens",
        "rollouts/entropy",
        "rollouts/replies_cut",
        "rollouts/drifted_turns",
        "rollouts/rewards_missing",
        "rollouts/version_lag",
        "curriculum/percentile",
        "validation/reward",
        "score/tidy",
        "train/kl",
        "train/trained_groups",
        "seconds/rollouts",
        "seconds/training",
        "seconds/total",
    ]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_a_number_is_a_column_and_reaches_the_sinks_where_it_has_a_log_name(field):
    value = getattr(FULL.metrics, field.name)
    assert frames.epochs([FULL])[field.name].tolist() == [value]
    logged = metrics_of(FULL)
    if "log" in field.metadata:
        assert logged[field.metadata["log"]] == value
    else:
        assert field.name in ("kept_trajectories", "continued_turns")


def test_a_number_that_older_records_lack_is_missing_and_not_zero():
    older = dataclasses.replace(FULL.metrics, continued_turns=None, drifted_turns=None)
    epoch = dataclasses.replace(FULL, metrics=older)
    frame = frames.epochs([epoch, FULL])
    assert frame.drifted_turns.isna().tolist() == [True, False]
    assert frame.continued_turns.dtype == "Int64"
    assert "rollouts/drifted_turns" not in metrics_of(epoch)


async def test_the_log_of_an_epoch_has_the_toolkits_names_first_and_then_ours(tmp_path):
    trainer = ft.EpochTrainer(ft.EpochTrainerConfig())
    await trainer.bind_components(ScriptedBuilder(ten_groups), FakeAdapter(policy=ScriptedPolicy(coin)))
    section = ft.CurriculumLearningConfig(enabled=True, initial_percentile=0.2, expansion_interval=100)
    await trainer.initialize(ft.FinetuneConfig(curriculum_learning=section, output_dir=tmp_path))
    await trainer.run_epoch(0, "by-hand")
    line = json.loads((tmp_path / "by-hand" / "training_metrics.jsonl").read_text())
    names = [name for name in line if name not in ("time", "timestamp", "epoch")]
    assert names == [
        "avg_reward",
        "min_reward",
        "max_reward",
        "num_trajectories",
        "num_groups",
        "filtered_trajectories",
        "filtered_groups",
        "filtered_avg_reward",
        "filtered_min_reward",
        "filtered_max_reward",
        "curriculum_percentile",
        "num_failures",
        "groups_with_spread",
        "sampled_tokens",
        "drifted_turns",
        "rewards_missing",
        "scores",
        "run_id",
        "training",
        "curriculum_state",
    ]
    assert (line["num_trajectories"], line["num_groups"], line["filtered_groups"]) == (20, 10, 2)
    assert line["avg_reward"] == pytest.approx(trainer.metrics.mean_reward)
    assert line["curriculum_percentile"] == 0.2
