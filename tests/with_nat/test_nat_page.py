"""notebooks/reference/nat.md against the Toolkit: every option has a line, and reaches the component that reads it."""

import typing
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import toolkit
from nat.data_models import finetuning as nat
from nat.plugins.customizer.dpo import config as dpo
from nat.plugins.openpipe import config as art
from pydantic import BaseModel

import finetune_nb as ft
from finetune_nb.backends.nat.opening import open_config

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "notebooks" / "reference" / "nat.md"
OPTIONS = {line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
CLASSES = {
    "": (nat.FinetuneConfig, art.ARTTrajectoryBuilderConfig, art.ARTTrainerAdapterConfig, art.ARTTrainerConfig),
    "dpo_traj_builder.": (dpo.DPOTrajectoryBuilderConfig,),
    "nemo_customizer_trainer.": (dpo.NeMoCustomizerTrainerConfig,),
    "nemo_customizer_trainer_adapter.": (dpo.NeMoCustomizerTrainerAdapterConfig,),
}


def section_of(field):
    """The config class that a field holds, if it holds one."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    return next(
        (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not BaseModel),
        None,
    )


def options_of(cls, prefix=""):
    for name, field in cls.model_fields.items():
        if name == "type" or (name == "reward" and cls is not nat.FinetuneConfig):
            continue  # set by the trainer, not by a config
        section = section_of(field)
        if section is None:
            yield prefix + name
        else:
            yield from options_of(section, f"{prefix}{name}.")


@pytest.mark.parametrize("prefix", CLASSES)
def test_every_option_of_the_toolkits_finetuning_has_a_line(prefix):
    found = {option for cls in CLASSES[prefix] for option in options_of(cls, prefix)}
    assert found
    assert sorted(found - OPTIONS) == []


def test_the_page_has_no_option_that_the_toolkit_has_not():
    found = {option for prefix, classes in CLASSES.items() for cls in classes for option in options_of(cls, prefix)}
    assert sorted(OPTIONS - found) == []


ART = {
    "trajectory_builders": {"builder": {"_type": "openpipe_art_traj_builder", "num_generations": 3}},
    "trainer_adapters": {
        "adapter": {
            "_type": "openpipe_art_trainer_adapter",
            "backend": {
                "ip": "127.0.0.88",
                "port": 7001,
                "name": "a_name",
                "project": "a_project",
                "base_model": "tiny",
                "api_key": "a-key-of-the-test",
                "delete_old_checkpoints": True,
                "init_args": {"max_seq_length": 64},
                "engine_args": {"tensor_parallel_size": 2},
                "server_config": {"log_file": "server.log"},
            },
            "training": {"learning_rate": 3e-6, "beta": 0.1},
        }
    },
}
DPO = {
    "trajectory_builders": {
        "builder": {
            "_type": "dpo_traj_builder",
            "ttc_step_name": "a_step",
            "exhaustive_pairs": False,
            "min_score_diff": 0.25,
            "max_pairs_per_turn": 3,
            "reward_from_score_diff": False,
            "require_multiple_candidates": False,
        }
    },
    "trainer_adapters": {
        "adapter": {
            "_type": "nemo_customizer_trainer_adapter",
            "entity_host": "http://127.0.0.1:9",
            "datastore_host": "http://127.0.0.1:10",
            "hf_token": "a-token-of-the-test",
            "namespace": "a_namespace",
            "dataset_name": "a_dataset",
            "dataset_output_dir": "a_folder",
            "create_namespace_if_missing": False,
            "customization_config": "meta/llama@v1",
            "hyperparameters": {
                "training_type": "dpo",
                "finetuning_type": "lora",
                "epochs": 7,
                "batch_size": 8,
                "learning_rate": 2e-6,
                "dpo": {
                    "ref_policy_kl_penalty": 0.2,
                    "preference_loss_weight": 0.7,
                    "preference_average_log_probs": True,
                    "sft_loss_weight": 0.3,
                },
            },
            "use_full_message_history": True,
            "deploy_on_completion": False,
            "deployment_config": {
                "image_name": "an/image",
                "image_tag": "9",
                "gpu": 2,
                "deployment_name": "a_deployment",
                "description": "a text",
            },
            "poll_interval_seconds": 3.0,
            "deployment_timeout_seconds": 99.0,
            "max_consecutive_status_failures": 5,
        }
    },
    "trainers": {
        "trainer": {
            "_type": "nemo_customizer_trainer",
            "num_runs": 4,
            "continue_on_collection_error": True,
            "deduplicate_pairs": False,
            "max_pairs": 12,
            "wait_for_completion": False,
        }
    },
}


def plain(config):
    dumped = config.model_dump(mode="json")
    return {key: value for key, value in dumped.items() if key not in ("type", "_type", "reward")}


def given(section):
    (config,) = section.values()
    return {key: value for key, value in config.items() if key != "_type"}


@pytest.mark.parametrize("sections", [ART, DPO], ids=["art", "dpo"])
async def test_every_option_reaches_the_toolkits_component(place, sections):
    path = toolkit.write_config(place, "http://127.0.0.1:9/v1", **sections)
    run = {"validation_interval": 5, "result_json_path": "$", "endpoint_timeout": 300}
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(open_config(path, [], place / "runs", run))
        configs = {
            "trajectory_builders": opened.builder.trajectory_builder_config,
            "trainer_adapters": opened.adapter.adapter_config,
            "trainers": opened.trainer.trainer_config,
        }
    for section in sections:
        expected, found = given(sections[section]), plain(configs[section])
        assert expected.keys() == found.keys()
        assert {key: found[key] for key in expected if not key.endswith(("key", "token"))} == {
            key: value for key, value in expected.items() if not key.endswith(("key", "token"))
        }


async def test_the_command_lines_options_reach_the_toolkits_run_configuration(place, closing):
    path = toolkit.write_config(place, "http://127.0.0.1:9/v1")
    rows = place / "rows.json"
    asked = {
        "result_json_path": "$.answer",
        "endpoint": "http://127.0.0.1:9/generate",
        "endpoint_timeout": 7,
        "validation_config_file": path,
    }
    run = closing(ft.Run.from_nat(path, dataset=rows, validation=rows, validation_interval=3, **asked))
    config = run.config.trainers["nat"]
    names = set(nat.FinetuneRunConfig.model_fields) - {"config_file", "override"}
    given = {name: getattr(config, name) for name in names}
    async with open_config(path, [], place / "runs", given) as opened:
        found = opened.finetuning.run_configuration
    assert str(found.dataset) == str(found.validation_dataset) == str(rows)
    assert (found.result_json_path, found.endpoint, found.endpoint_timeout) == tuple(asked.values())[:3]
    assert (found.validation_interval, str(found.validation_config_file)) == (3, str(path))
    assert opened.finetuning.enabled
