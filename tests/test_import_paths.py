"""Import paths, `_type` names and entry points that somebody else's code, config or installation holds still work."""

import importlib
import importlib.util
import tomllib
from pathlib import Path

import pytest

import finetune_nb as ft

ROOT = Path(__file__).parents[1]
LINES = (Path(__file__).parent / "data" / "import_paths.txt").read_text(encoding="utf-8").splitlines()
PATHS = [line for line in LINES if line and not line.startswith("#")]

TYPES = {
    "llms": {
        "policy": {"adapter": "adapter"},
        "openai": {"model_name": "m"},
    },
    "workflow": {
        "python_function": {},
        "calculator_agent": {"llm": "policy"},
    },
    "eval.evaluators": {
        "python_function": {},
        "exact_match": {},
        "numeric_closeness": {},
        "contains": {},
        "regex": {"pattern": "a"},
        "weighted": {"weights": {"correct": 1.0}},
        "step_rewards": {},
        "calculator_reward": {},
        "calculator_episode": {"kind": "used_tool"},
    },
    "eval.general.dataset": {
        "json": {"file_path": "rows.json"},
        "jsonl": {"file_path": "rows.jsonl"},
        "csv": {"file_path": "rows.csv"},
        "parquet": {"file_path": "rows.parquet"},
    },
    "trajectory_builders": {
        "eval_traj_builder": {},
        "preference_builder": {},
        "nat_builder": {},
    },
    "trainer_adapters": {
        "local_grpo": {},
        "trl_dpo": {},
        "trl_sft": {},
        "tinker": {"model": "m"},
        "openpipe_art": {"base_model": "m"},
        "nat_adapter": {},
    },
    "trainers": {
        "epoch_trainer": {},
        "nat_trainer": {"config_file": "config.yml"},
    },
}
"""Section -> `_type` -> the fields that it must have."""
SINGLE = ("workflow", "eval.general.dataset")
"""Sections that are one component, and no mapping of names to components."""


def test_the_list_has_every_path_once():
    assert len(PATHS) > 150
    assert len(set(PATHS)) == len(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_an_import_path_of_somebody_elses_code_works(path):
    module, _, name = path.partition(":")
    if name:
        exec(f"from {module} import {name}", {})
    else:
        importlib.import_module(module)


@pytest.mark.parametrize(
    ("section", "type_name"), [(section, type_name) for section, types in TYPES.items() for type_name in types]
)
def test_a_type_name_of_somebody_elses_config_works(section, type_name):
    component = {"_type": type_name, **TYPES[section][type_name]}
    tree = component if section in SINGLE else {"mine": component}
    for key in reversed(section.split(".")):
        tree = {key: tree}
    found = ft.load_config(tree)
    for key in section.split("."):
        found = getattr(found, key)
    if section not in SINGLE:
        found = found["mine"]
    assert type(found).static_type() == type_name


def test_the_entry_points_lead_to_modules_that_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = [*project["scripts"].values(), *project["entry-points"]["nat.components"].values()]
    assert len(targets) == 2
    for target in targets:
        module = target.partition(":")[0]
        assert importlib.util.find_spec(module) is not None, target
