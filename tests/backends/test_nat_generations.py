"""What a config of the NeMo Agent Toolkit with a single rollout an example is told before it runs. The Toolkit is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_nb.backends.nat.run import check_generations
from finetune_nb.errors import ConfigError


def tree(builder, adapter, generations):
    return {
        "trajectory_builders": {"b": {"_type": builder, "num_generations": generations}},
        "trainer_adapters": {"a": {"_type": adapter}},
        "finetuning": {"trajectory_builder": "b", "trainer_adapter": "a"},
    }


@pytest.mark.parametrize("adapter", ["finetune_nb_local_grpo", "openpipe_art_trainer_adapter"])
def test_a_group_of_one_is_refused_where_it_would_teach_nothing(adapter):
    with pytest.raises(ConfigError, match=r"trajectory_builders.b.num_generations is 1, so nothing would be learned"):
        check_generations(tree("finetune_nb_eval_traj_builder", adapter, "1"), Path("config.yml"))  # of an override


def test_the_toolkits_builder_makes_one_group_of_all_examples_which_is_said(caplog):
    check_generations(tree("openpipe_art_traj_builder", "openpipe_art_trainer_adapter", 1), Path("config.yml"))
    assert "trajectory_builders.b.num_generations is 1: the Toolkit then makes one group of all rollouts" in caplog.text


@pytest.mark.parametrize(
    ("builder", "adapter", "generations"),
    [
        ("finetune_nb_eval_traj_builder", "finetune_nb_local_grpo", 2),
        ("finetune_nb_eval_traj_builder", "somebodys_adapter", 1),
        ("dpo_traj_builder", "finetune_nb_trl_dpo", None),
    ],
)
def test_nothing_is_said_of_what_can_teach(builder, adapter, generations, caplog):
    check_generations(tree(builder, adapter, generations), Path("config.yml"))
    assert not caplog.text
