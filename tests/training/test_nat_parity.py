"""Dumps of nvidia-nat-core 1.9.0's models validate as ours, and ours as NAT's.

NAT lives in a venv of its own, whose python FINETUNE_NB_NAT_PYTHON names; models travel between the two as JSON.
"""

import json
import os
import subprocess

import pytest
from pydantic import BaseModel

from finetune_nb import config as ours
from finetune_nb import types

pytestmark = [pytest.mark.slow, pytest.mark.proof]

TYPES = [
    "EpisodeItem",
    "DPOItem",
    "OpenAIMessage",
    "Trajectory",
    "TrajectoryCollection",
    "TrainingJobRef",
    "TrainingJobStatus",
]
CONFIGS = ["RewardFunctionConfig", "CurriculumLearningConfig", "FinetuneRunConfig", "FinetuneConfig"]
BASES = [
    "TrainerConfig",
    "TrajectoryBuilderConfig",
    "TrainerAdapterConfig",
    "EvaluatorBaseConfig",
    "FunctionBaseConfig",
]
BASES += ["LLMBaseConfig"]
DATASETS = ["EvalDatasetJsonConfig", "EvalDatasetJsonlConfig", "EvalDatasetCsvConfig", "EvalDatasetParquetConfig"]
EVALUATION = ["EvalInputItem", "EvalInput", "EvalOutputItem", "EvalOutput", "IntermediateStep"]
OURS: dict[str, type[BaseModel]] = {
    **{name: getattr(types, name) for name in TYPES + EVALUATION},
    **{name: getattr(ours, name) for name in [*CONFIGS, *BASES, *DATASETS, "EvalGeneralConfig"]},
}

NAT_SIDE = '''
import importlib, json, sys
from pydantic import BaseModel

MODULES = """nat.data_models.finetuning nat.data_models.evaluator nat.data_models.function nat.data_models.llm
nat.data_models.dataset_handler nat.data_models.evaluate_config nat.data_models.intermediate_step
nat.plugins.eval.data_models.evaluator_io""".split()

def find(name):
    for module in MODULES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            pass
    raise SystemExit("NAT has no " + name)

from nat.data_models.invocation_node import InvocationNode
out = {}
for name, given in json.load(sys.stdin).items():
    model = find(name)
    for values in given:
        dump = model.model_validate(values).model_dump(mode="json")
        out.setdefault(name, []).append(dump)
json.dump({"dumps": out, "defaults": {
    name: find(name)().model_dump(mode="json") for name in out
    if all(not field.is_required() for field in find(name).model_fields.values())
}}, sys.stdout)
'''

STEP = {
    "parent_id": "root",
    "function_ancestry": {"function_id": "f", "function_name": "agent", "parent_id": None, "parent_name": None},
    "payload": {
        "event_type": "LLM_END",
        "event_timestamp": 2.5,
        "span_event_timestamp": 1.5,
        "name": "my_model",
        "data": {"input": "1+1", "output": "2"},
        "UUID": "u-1",
    },
}
ITEM = {
    "id": "q1",
    "input_obj": "1+1",
    "expected_output_obj": "2",
    "trajectory": [STEP],
    "full_dataset_entry": {"a": 1},
}
VERDICT = {"id": "q1", "score": 0.5, "reasoning": {"why": "half"}, "error": None}
EPISODE = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2", "logprobs": [-0.5], "metadata": {"token_ids": [7]}},
]
PAIR = {"prompt": [{"role": "user", "content": "1+1"}], "chosen_response": "2", "rejected_response": "3"}
TRAJECTORIES = [
    {"episode": EPISODE, "reward": 0.5, "shaped_rewards": [0.25, 0.25], "metadata": {"id": "q1"}},
    {"episode": [PAIR], "reward": 1.0},
]
CURRICULUM = {"enabled": True, "initial_percentile": 1.0, "expansion_interval": 1, "random_subsample": 0.5}
RUN = {"config_file": "train.yaml", "override": [["a.b", "3"]], "validation_dataset": "held_out.json"}
NAMED = {"trainer": "t", "trajectory_builder": "b", "trainer_adapter": "a", "reward_function": {"name": "r"}}

GIVEN = {
    "RewardFunctionConfig": [{"name": "r"}],
    "CurriculumLearningConfig": [{}, CURRICULUM],
    "FinetuneRunConfig": [RUN],
    "FinetuneConfig": [{}, {"enabled": True, **NAMED, "curriculum_learning": CURRICULUM, "run_configuration": RUN}],
    "OpenAIMessage": [{"role": "user", "content": "1+1"}],
    "DPOItem": [PAIR, {**PAIR, "prompt": "1+1"}],
    "EpisodeItem": EPISODE,
    "Trajectory": TRAJECTORIES,
    "TrajectoryCollection": [{"trajectories": [TRAJECTORIES], "run_id": "run"}],
    "TrainingJobRef": [{"run_id": "run", "backend": "local", "metadata": {"job_id": "j"}}],
    "TrainingJobStatus": [{"run_id": "run", "backend": "local", "status": "completed", "progress": 100.0}],
    "IntermediateStep": [STEP],
    "EvalInputItem": [ITEM],
    "EvalInput": [{"eval_input_items": [ITEM]}],
    "EvalOutputItem": [VERDICT, {**VERDICT, "score": None, "error": "no answer"}],
    "EvalOutput": [{"average_score": 0.5, "eval_output_items": [VERDICT]}],
    "TrainerConfig": [{}, {"reward": {"name": "r"}}],
    "TrajectoryBuilderConfig": [{}],
    "TrainerAdapterConfig": [{}],
    "EvaluatorBaseConfig": [{}],
    "FunctionBaseConfig": [{}, {"name": "agent"}],
    "LLMBaseConfig": [{}, {"api_type": "responses"}],
    **{name: [{}, {"file_path": "x", "filter": {"allowlist": {"field": {"a": [1, "b"]}}}}] for name in DATASETS},
    "EvalGeneralConfig": [{}, {"max_concurrency": 2, "workflow_alias": "w"}],
}

ONE_SIDED = {
    "EvalGeneralConfig": {
        *("item_timeout", "retries"),  # ours
        *("output", "profiler", "validate_llm_endpoints", "per_input_user_id"),  # NAT's
    }
}


def nat(given: dict) -> dict:
    """What NAT makes of the given values: each model's dump, and the defaults of those that need nothing."""
    python = os.environ.get("FINETUNE_NB_NAT_PYTHON")
    if not python:
        if os.environ.get("CI"):
            pytest.fail("set FINETUNE_NB_NAT_PYTHON to the python of a venv with nvidia-nat-core and -eval 1.9.0")
        pytest.skip("FINETUNE_NB_NAT_PYTHON does not name the python of a venv with nvidia-nat-core and -eval 1.9.0")
    done = subprocess.run(
        [python, "-c", NAT_SIDE], input=json.dumps(given), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def answer() -> dict:
    return nat(GIVEN)


def dump(name: str, values: dict) -> dict:
    return OURS[name].model_validate(values).model_dump(mode="json")


def common(name: str, values: dict) -> dict:
    """Without the fields that only one side has."""
    return {key: value for key, value in values.items() if key not in ONE_SIDED.get(name, ())}


def test_every_model_that_is_shared_is_compared():
    assert set(GIVEN) == set(OURS)


@pytest.mark.parametrize("name", GIVEN)
def test_dumps_of_nat_s_models_validate_as_ours_with_the_same_values(answer, name):
    for theirs in answer["dumps"][name]:
        mine = dump(name, theirs)
        if name in ("IntermediateStep", "EvalInputItem", "EvalInput"):
            mine, theirs = without_none(mine), without_none(theirs)  # NAT's usage and trace records are plain data here
        assert common(name, mine) == common(name, theirs)


def test_dumps_of_ours_validate_as_nat_s():
    mine = {name: [dump(name, values) for values in given] for name, given in GIVEN.items()}
    theirs = nat(mine)["dumps"]
    assert {name: len(dumps) for name, dumps in theirs.items()} == {name: len(given) for name, given in GIVEN.items()}
    for name in CONFIGS + DATASETS + TYPES:
        assert [dump(name, values) for values in theirs[name]] == mine[name]


@pytest.mark.parametrize("name", [*CONFIGS, *DATASETS, *BASES, "EvalGeneralConfig"])
def test_defaults_are_nat_s(answer, name):
    if name not in answer["defaults"]:
        assert any(field.is_required() for field in OURS[name].model_fields.values())
    else:
        mine = OURS[name]().model_dump(mode="json")
        assert common(name, mine) == common(name, answer["defaults"][name])


def without_none(node):
    if isinstance(node, dict):
        return {key: without_none(child) for key, child in node.items() if child is not None}
    return [without_none(child) for child in node] if isinstance(node, list) else node
