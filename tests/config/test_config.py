"""Config models, redaction, and load_config: the seed's YAML, mistakes, secrets."""

import copy
import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from finetune_nb.components.loading import load_config
from finetune_nb.components.registry import (
    register_evaluator,
    register_function,
    register_llm_provider,
    register_trainer,
    register_trainer_adapter,
    register_trajectory_builder,
)
from finetune_nb.config import (
    Config,
    CurriculumLearningConfig,
    CurriculumSettings,
    EvalDatasetJsonConfig,
    EvaluatorBaseConfig,
    FinetuneConfig,
    FinetuneRunConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    RunSettings,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
)
from finetune_nb.config.yaml import dump_yaml
from finetune_nb.errors import ConfigError
from finetune_nb.redaction import MASK, is_credential, redact, redact_text

SECRET = "sk-live-0123456789"


class BackendConfig(BaseModel):
    endpoint: str
    api_key: str
    timeout: int = 3600
    learning_rate: float = 1e-5
    batch_size: int = 4

    @field_validator("api_key")
    @classmethod
    def no_blanks(cls, value: str) -> str:
        if " " in value:
            raise ValueError(f"the key {value} holds a blank")
        return value


class Extras(BaseModel):
    model_config = ConfigDict(extra="allow")

    temperature: float = 1.0


class CfgAdapterConfig(TrainerAdapterConfig, name="cfg_adapter"):
    backend: BackendConfig
    hf_token: SecretStr | None = None
    extras: Extras = Field(default_factory=Extras)
    stages: list[BackendConfig] = []
    by_name: dict[str, BackendConfig | None] = {}
    headers: dict[str, str] = {}
    max_tokens: int = 16


class CfgBuilderConfig(TrajectoryBuilderConfig, name="cfg_builder"):
    num_generations: int = Field(default=2, ge=1)


class CfgTrainerConfig(TrainerConfig, name="cfg_trainer"):
    warmup: int = Field(default=0, alias="warmup_epochs")


class CfgEvaluatorConfig(EvaluatorBaseConfig, name="cfg_evaluator"):
    pass


class CfgWorkflowConfig(FunctionBaseConfig, name="cfg_workflow"):
    llm: str = "my_model"


class CfgLLMConfig(LLMBaseConfig, name="cfg_llm"):
    model_name: str
    base_url: str | None = None


@register_trainer_adapter(config_type=CfgAdapterConfig)
async def adapter(config, builder):
    yield config


@register_trajectory_builder(config_type=CfgBuilderConfig)
async def trajectory_builder(config, builder):
    yield config


@register_trainer(config_type=CfgTrainerConfig)
async def trainer(config, builder):
    yield config


@register_evaluator(config_type=CfgEvaluatorConfig)
async def evaluator(config, builder):
    yield config


@register_function(config_type=CfgWorkflowConfig)
async def workflow(config, builder):
    yield config


@register_llm_provider(config_type=CfgLLMConfig)
async def llm(config, builder):
    yield config


YAML = """
llms:
  my_model:
    _type: cfg_llm
    model_name: gpt-4
    base_url: http://localhost:8000/v1
workflow:
  _type: cfg_workflow
  llm: my_model
eval:
  general:
    max_concurrency: 8
    output_dir: .tmp/finetuning/eval
    dataset:
      _type: json
      file_path: data/train.json
  evaluators:
    my_reward:
      _type: cfg_evaluator
trajectory_builders:
  my_builder:
    _type: cfg_builder
    num_generations: 4
trainer_adapters:
  my_adapter:
    _type: cfg_adapter
    backend:
      endpoint: http://training-server:8080
      api_key: ${CFG_TRAINING_API_KEY}
      learning_rate: 1e-5
      batch_size: 8
trainers:
  my_trainer:
    _type: cfg_trainer
finetuning:
  enabled: true
  trainer: my_trainer
  trajectory_builder: my_builder
  trainer_adapter: my_adapter
  reward_function:
    name: my_reward
  num_epochs: 20
  output_dir: .tmp/finetuning/output
  curriculum_learning:
    enabled: true
    initial_percentile: 0.3
    increment_percentile: 0.2
    expansion_interval: 5
"""


@pytest.fixture(autouse=True)
def training_key(monkeypatch):
    monkeypatch.setenv("CFG_TRAINING_API_KEY", SECRET)


def mistakes(source, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, **kwargs)
    return str(caught.value)


# ── the seed's YAML ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_complete_yaml_becomes_typed_config():
    config = load_config(YAML)
    backend = config.trainer_adapters["my_adapter"].backend  # type: ignore[attr-defined]
    assert backend.api_key == SECRET
    assert backend.learning_rate == 1e-5 and isinstance(backend.learning_rate, float)
    assert config.trajectory_builders["my_builder"] == CfgBuilderConfig(num_generations=4)
    assert config.eval.general.dataset == EvalDatasetJsonConfig(file_path="data/train.json")
    assert config.finetuning.curriculum_learning.expansion_interval == 5
    assert config.run == RunSettings(engine="local", seed=0, deterministic=False)


def test_a_file_a_text_and_a_mapping_give_the_same(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(YAML)
    from_text = load_config(YAML)
    assert load_config(file) == from_text
    assert load_config(str(file)) == from_text
    assert load_config(from_text) is from_text
    tree = from_text.stored()
    assert load_config(tree).stored() == tree


def test_loading_leaves_the_given_mapping_as_it_was():
    tree = {"run": {"seed": 3}, "general": None, "trainers": {"t": {"_type": "cfg_trainer"}}}
    before = copy.deepcopy(tree)
    load_config(tree)
    assert tree == before


def test_a_type_field_always_holds_the_class_s_own_name():
    assert CfgBuilderConfig(type="else").type == "cfg_builder" == CfgBuilderConfig.static_type()
    assert CfgBuilderConfig().model_dump(by_alias=True)["_type"] == "cfg_builder"
    assert TrainerConfig().type == "unknown"


def test_the_config_of_a_component_can_be_given_ready_made():
    config = load_config({"trainers": {"t": CfgTrainerConfig(warmup_epochs=2)}})
    assert config.trainers["t"].warmup == 2  # type: ignore[attr-defined]


def test_an_alias_is_how_a_field_is_given_and_stored():
    config = load_config({"trainers": {"t": {"_type": "cfg_trainer", "warmup_epochs": 2}}})
    assert config.stored()["trainers"]["t"] == {"_type": "cfg_trainer", "reward": None, "warmup_epochs": 2}
    assert "warmup_epochs" in mistakes({"trainers": {"t": {"_type": "cfg_trainer", "warmup": 2}}})


def test_relative_dataset_is_looked_for_here_and_then_beside_the_yaml(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.json").write_text("[]")
    (tmp_path / "train.yaml").write_text(YAML)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    beside = load_config(tmp_path / "train.yaml").eval.general.dataset
    assert beside is not None and Path(beside.file_path) == tmp_path / "data/train.json"
    (elsewhere / "data").mkdir()
    (elsewhere / "data/train.json").write_text("[]")
    here = load_config(tmp_path / "train.yaml").eval.general.dataset
    assert here is not None and here.file_path in ("data/train.json", Path("data/train.json"))


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_misspelt_keys_are_found_at_every_depth_and_reported_together():
    text = (
        YAML.replace("num_epochs", "num_epoch")
        .replace("batch_size", "batchsize")
        .replace("finetuning:\n", "finetunig:\n")
    )
    text += "finetuning:\n  num_epoch: 2\n"
    message = mistakes(text)
    assert "3 mistakes" in message
    assert "trainer_adapters.my_adapter.backend.batchsize: this key is not known. Did you mean 'batch_size'?" in message
    assert "finetunig: this key is not known. Did you mean 'finetuning'?" in message
    assert "finetuning.num_epoch: this key is not known. Did you mean 'num_epochs'?" in message


def test_misspelt_keys_are_found_in_lists_and_dicts_of_models():
    backend = {"endpoint": "x", "api_key": "y"}
    adapter = {"_type": "cfg_adapter", "backend": backend}
    adapter["stages"] = [backend, {**backend, "bach_size": 1}]
    adapter["by_name"] = {"a": None, "b": {**backend, "timout": 1}}
    message = mistakes({"trainer_adapters": {"a": adapter}})
    assert "trainer_adapters.a.stages.1.bach_size" in message
    assert "trainer_adapters.a.by_name.b.timout" in message
    assert "2 mistakes" in message


def test_models_that_allow_extras_and_plain_dicts_take_any_key():
    adapter = {"_type": "cfg_adapter", "backend": {"endpoint": "x", "api_key": "y"}}
    config = load_config({"trainer_adapters": {"a": {**adapter, "extras": {"top_p": 0.9}, "headers": {"X-Any": "1"}}}})
    assert config.stored()["trainer_adapters"]["a"]["extras"] == {"temperature": 1.0, "top_p": 0.9}


def test_a_misspelt_required_key_is_reported_with_the_missing_one():
    message = mistakes(
        {"trainer_adapters": {"a": {"_type": "cfg_adapter", "backend": {"endpont": "x", "api_key": "y"}}}}
    )
    assert "backend.endpont: this key is not known. Did you mean 'endpoint'?" in message
    assert "backend.endpoint: is required." in message


def test_unknown_type_names_kind_path_and_what_is_registered():
    message = mistakes(YAML.replace("_type: cfg_trainer", "_type: cfg_triner"))
    assert "trainers.my_trainer._type: trainer has no _type 'cfg_triner'. Did you mean 'cfg_trainer'?" in message
    assert "epoch_trainer" in message


def test_a_component_without_a_type_is_a_mistake():
    assert "trainers.t: has no _type" in mistakes({"trainers": {"t": {"warmup_epochs": 1}}})
    assert "workflow: found a str; expected a mapping" in mistakes({"workflow": "agent"})


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"function_groups": {"f": {"_type": "x"}}}, "function_groups"),
        ({"general": {"use_uvloop": True}}, "general"),
        ({"eval": {"general": {"profiler": {"x": 1}}}}, "eval.general.profiler"),
        ({"eval": {"general": {"per_input_user_id": False}}}, "eval.general.per_input_user_id"),
        ({"eval": {"general": {"dataset": {"_type": "xls"}}}}, "eval.general.dataset._type"),
        ({"eval": {"general": {"dataset": {"_type": "json", "remote_file_path": "x"}}}}, "dataset.remote_file_path"),
        ({"finetuning": {"run_configuration": {"endpoint": "http://x"}}}, "finetuning.run_configuration.endpoint"),
        ({"workflow": {"_type": "cfg_workflow", "middleware": ["m"]}}, "workflow.middleware"),
        ({"workflow": {"_type": "cfg_workflow", "llm": "file://prompt.txt"}}, "workflow.llm"),
    ],
)
def test_what_only_nat_can_do_is_refused_when_it_is_asked_for(tree, path):
    message = mistakes(tree)
    assert f"{path}: NAT " in message and "finetune_nb does not" in message


def test_what_only_nat_can_do_may_stand_there_unused():
    general = {"output": None, "profiler": None, "validate_llm_endpoints": False, "per_input_user_id": True}
    assert load_config({"general": None, "functions": {}, "eval": {"general": general}}) == Config()


def test_wrong_values_are_told_with_path_and_value():
    message = mistakes({"finetuning": {"num_epochs": 0}, "run": {"engine": "locl"}})
    assert "finetuning.num_epochs: Input should be greater than or equal to 1 (found 0)." in message
    assert "run.engine: there is no engine 'locl'. Did you mean 'local'?" in message


def test_references_that_lead_nowhere_are_found_when_finetuning_is_on():
    text = YAML.replace("trainer: my_trainer", "trainer: my_triner").replace("name: my_reward", "name: reward")
    message = mistakes(text)
    assert "finetuning.trainer: 'my_triner' is not one of trainers. Did you mean 'my_trainer'?" in message
    assert "finetuning.reward_function.name: 'reward' is not one of eval.evaluators." in message
    load_config(text.replace("  enabled: true\n  trainer", "  enabled: false\n  trainer"))


def test_one_generation_under_a_curriculum_that_needs_spread_is_refused():
    text = YAML.replace("num_generations: 4", "num_generations: 1")
    assert "trajectory_builders.my_builder.num_generations: 1 rollout" in mistakes(text)
    load_config(text, override=[("finetuning.curriculum_learning.min_reward_diff", "0")])
    load_config(text, override=[("finetuning.curriculum_learning.enabled", "false")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n", "found nothing"),
        ("- a\n- b\n", "found a list"),
        ("run:\n  seed: 1\n  seed: 2\n", "'seed' occurs twice (line 3"),
        ("run: !!python/object/apply:os.getcwd []\n", "is not allowed"),
        ("run: [1\n", "not valid YAML"),
        ("run: *nothing\n", "undefined alias"),
        ("run: &a [*a]\n", "contains itself"),
        ("run: " + "[" * 500 + "\n", "deep in each other"),
        ("a: 1\n---\nb: 2\n", "another document"),
    ],
)
def test_yaml_that_is_no_config_is_refused(text, expected):
    assert expected in mistakes(text)


def test_anchors_that_expand_to_a_billion_values_are_refused():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in pairwise("abcdefghi")]
    assert "anchors expand" in mistakes("\n".join(lines))  # written out, these are 10**9 values


def test_ordinary_anchors_and_merge_keys_work():
    text = "trainers:\n  a: &a {_type: cfg_trainer, warmup_epochs: 3}\n  b: {<<: *a, warmup_epochs: 4}\n"
    assert [config.warmup for config in load_config(text).trainers.values()] == [3, 4]  # type: ignore[attr-defined]


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path):
    assert "FileNotFoundError" in mistakes(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "UTF-8" in mistakes(tmp_path / "binary.yaml")


def test_yaml_errors_quote_no_line():
    message = mistakes(f"api_key: {SECRET}\napi_key: other-{SECRET}\n")
    assert SECRET not in message and "api_key" in message


# ── environment and overrides ────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_variable_is_named_with_its_path_and_once(monkeypatch):
    monkeypatch.delenv("CFG_TRAINING_API_KEY")
    message = mistakes(YAML)
    path = "trainer_adapters.my_adapter.backend.api_key"
    assert f"{path}: the environment variable CFG_TRAINING_API_KEY is not set." in message
    assert "mistakes" not in message


def test_a_variable_may_have_a_default_and_stand_inside_a_text(monkeypatch):
    monkeypatch.setenv("CFG_HOST", "example")
    config = load_config(
        {"llms": {"m": {"_type": "cfg_llm", "model_name": "${CFG_NO:-tiny}", "base_url": "http://${CFG_HOST}/v1"}}}
    )
    assert (config.llms["m"].model_name, config.llms["m"].base_url) == ("tiny", "http://example/v1")  # type: ignore[attr-defined]


def test_a_number_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("CFG_SEED", "17")
    config = load_config({"run": {"seed": "${CFG_SEED}"}})
    assert config.run.seed == 17
    assert config.stored()["run"]["seed"] == "${CFG_SEED}"
    assert config.redacted()["run"]["seed"] == MASK
    config.run.seed = 18
    assert config.stored()["run"]["seed"] == 18


def test_a_doubled_dollar_keeps_the_text_also_through_the_store(monkeypatch):
    monkeypatch.setenv("CFG_PRIVATE", "do-not-read")
    config = load_config({"llms": {"m": {"_type": "cfg_llm", "model_name": "$${CFG_PRIVATE}"}}})
    assert config.llms["m"].model_name == "${CFG_PRIVATE}"  # type: ignore[attr-defined]
    assert load_config(config.stored()).llms["m"].model_name == "${CFG_PRIVATE}"  # type: ignore[attr-defined]


def test_overrides_are_read_as_yaml_scalars_and_may_create_a_section():
    override = [
        ("finetuning.num_epochs", "3"),
        ("run.deterministic", "true"),
        ("finetuning.run_configuration.validation_interval", 2),
        ("llms.my_model.model_name", "a: b"),
        ("trainer_adapters.my_adapter.backend.learning_rate", "2e-4"),
        ("finetuning.target_functions", "[x, <workflow>]"),
        ("functions", "{x: {_type: cfg_workflow}}"),
    ]
    config = load_config(YAML, override=override)
    assert config.finetuning.num_epochs == 3 and config.run.deterministic is True
    assert config.finetuning.run_configuration is not None
    assert config.finetuning.run_configuration.validation_interval == 2
    assert config.llms["my_model"].model_name == "a: b"  # type: ignore[attr-defined]
    assert config.trainer_adapters["my_adapter"].backend.learning_rate == 2e-4  # type: ignore[attr-defined]
    assert config.finetuning.target_functions == ["x", "<workflow>"]


@pytest.mark.parametrize(
    "path", ["finetuning.num_epoch", "finetunig.num_epochs", "llms.my_modl.model_name", "run.seed.x"]
)
def test_an_override_of_an_unknown_path_is_an_error(path):
    assert path.split(".")[0] in mistakes(YAML, override=[("run.seed", 1), (path, "3")])


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_view_of_a_config_shows_a_secret():
    config = load_config(YAML)
    adapter = config.trainer_adapters["my_adapter"]
    views = [repr(config), str(config), config._repr_html_(), repr(adapter), str(adapter), repr(config.eval)]
    views += [dump_yaml(config.stored()), str(config.redacted()), repr(config._placeholders)]
    for view in views:
        assert SECRET not in view
    assert config.stored()["trainer_adapters"]["my_adapter"]["backend"]["api_key"] == "${CFG_TRAINING_API_KEY}"
    assert config.redacted()["trainer_adapters"]["my_adapter"]["backend"]["api_key"] == MASK


def test_a_secret_in_the_text_of_the_config_is_hidden_too():
    literal = "literal-credential-77"
    adapter = {"_type": "cfg_adapter", "backend": {"endpoint": f"http://x/{literal}", "api_key": literal}}
    adapter |= {"hf_token": "hf_abcdef_123", "headers": {"Authorization": "Bearer abc"}}
    config = load_config({"trainer_adapters": {"a": adapter}})
    for view in (repr(config), repr(config.trainer_adapters["a"]), dump_yaml(config.stored()), config._repr_html_()):
        assert literal not in view and "hf_abc" not in view and "Bearer" not in view
    assert config.stored()["trainer_adapters"]["a"]["hf_token"] == MASK


def test_a_short_literal_credential_does_not_spoil_the_stored_config():
    adapter = {"_type": "cfg_adapter", "backend": {"endpoint": "http://ollama:11434", "api_key": "ollama"}}
    backend = load_config({"trainer_adapters": {"a": adapter}}).stored()["trainer_adapters"]["a"]["backend"]
    assert (backend["endpoint"], backend["api_key"]) == ("http://ollama:11434", MASK)


def test_a_credential_in_a_ready_made_component_is_remembered():
    adapter = CfgAdapterConfig(
        backend=BackendConfig(endpoint="x", api_key="ready-made-key"), hf_token=SecretStr("hf-ready-1")
    )
    load_config({"trainer_adapters": {"a": adapter}})
    assert redact_text("ready-made-key hf-ready-1") == f"{MASK} {MASK}"


def test_a_secret_that_a_validator_copied_elsewhere_is_stored_as_its_placeholder():
    config = load_config(YAML)
    config.trainer_adapters["my_adapter"].headers = {"X-Route": f"to {SECRET}"}  # type: ignore[attr-defined]
    stored = config.stored()["trainer_adapters"]["my_adapter"]
    assert stored["headers"] == {"X-Route": "to ${CFG_TRAINING_API_KEY}"}


def test_validation_errors_hide_the_credentials_that_they_are_about():
    text = YAML.replace("${CFG_TRAINING_API_KEY}", "a b c 12 34").replace("batch_size: 8", "batch_size: many")
    message = mistakes(text)
    assert "a b c 12 34" not in message and f"the key {MASK} holds a blank" in message
    assert "backend.batch_size" in message and "'many'" in message
    with pytest.raises(ValidationError) as caught:
        CfgAdapterConfig(backend={"endpoint": SECRET, "api_key": [SECRET]})  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


def test_a_config_error_keeps_no_pydantic_error_as_its_context():
    with pytest.raises(ConfigError) as caught:
        load_config(YAML.replace("${CFG_TRAINING_API_KEY}", "a b c"))
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_known_secrets_are_replaced_inside_any_text():
    load_config(YAML)
    assert redact_text(f"401 for {SECRET}, retry") == f"401 for {MASK}, retry"
    assert redact({"url": f"http://x?k={SECRET}", "n": [1, SECRET]}) == {"url": f"http://x?k={MASK}", "n": [1, MASK]}
    assert redact({"note": "psst-hidden"}, secrets=["hidden"]) == {"note": f"psst-{MASK}"}


@pytest.mark.parametrize(
    "key", ["api_key", "apiKey", "X-Api-Key", "hf_token", "token", "client_secret", "PASSWORD", "Authorization"]
)
def test_keys_that_name_a_credential(key):
    assert is_credential(key)
    assert redact({key: "x"}) == {key: MASK}


@pytest.mark.parametrize(
    "key", ["max_tokens", "token_ids", "num_tokens", "tokens", "prompt_token_ids", "pad_token", "secretary"]
)
def test_keys_that_name_none(key):
    assert redact({key: "x"}) == {key: "x"}


def test_a_credential_that_is_no_text_stays():
    assert redact({"token": 5, "password": None}) == {"token": 5, "password": None}


# ── a config that lives ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_config_that_holds_itself_can_be_copied_shown_and_stored():
    config = load_config(YAML)
    config.finetuning.run_configuration = FinetuneRunConfig(config_file=config)
    config.builder = live = object()  # type: ignore[assignment]
    tuning = copy.deepcopy(config.finetuning)
    inner = tuning.run_configuration.config_file  # type: ignore[union-attr]
    assert isinstance(inner, Config) and inner is not config and inner.builder is live
    assert inner.trainers == config.trainers and inner.trainers is not config.trainers
    assert inner.stored() == config.stored()
    assert SECRET not in repr(config) + repr(config.finetuning)
    assert load_config(config.stored()).finetuning.num_epochs == 20


def test_dumps_of_the_finetuning_section_validate_again():
    tuning = FinetuneConfig(run_configuration=FinetuneRunConfig(override=(("a", "b"),)))
    assert FinetuneConfig.model_validate(tuning.model_dump()) == tuning
    assert FinetuneConfig.model_validate_json(tuning.model_dump_json()) == tuning


def test_finetuning_that_is_enabled_needs_its_three_components():
    with pytest.raises(ValidationError, match="trajectory_builder, trainer_adapter"):
        FinetuneConfig(enabled=True, trainer="t")


@pytest.mark.parametrize(
    "change",
    [
        {"random_subsample": 0},
        {"random_subsample": 1.5},
        {"min_reward_diff": -0.1},
        {"initial_percentile": 0},
        {"expansion_interval": 0},
    ],
)
def test_curriculum_values_out_of_range_are_refused(change):
    with pytest.raises(ValidationError):
        CurriculumLearningConfig(**change)


# ── CurriculumSettings ───────────────────────────────────────────────────────────────────────────────────────────────

shares = st.floats(0, 1, exclude_min=True)
settings = st.builds(
    CurriculumSettings,
    enabled=st.booleans(),
    percentile=shares,
    schedule=st.sampled_from(["automatic", "manual"]),
    increment_percentile=shares,
    expansion_interval=st.integers(1, 100),
    min_reward_diff=st.floats(0, 10),
    sort_ascending=st.booleans(),
    random_subsample=st.none() | shares,
)


@given(settings, settings, st.sets(st.sampled_from([field.name for field in dataclasses.fields(CurriculumSettings)])))
def test_an_update_changes_what_it_names_and_keeps_the_rest(before, other, names):
    after = before.updated({name: getattr(other, name) for name in names})
    for name in names:
        assert getattr(after, name) == getattr(other, name)
    kept = {field.name for field in dataclasses.fields(before)} - names
    if "percentile" in names and "schedule" not in names:
        assert after.schedule == "manual"
        kept -= {"schedule"}
    assert all(getattr(after, name) == getattr(before, name) for name in kept)


@given(settings)
def test_settings_survive_the_way_through_the_config(before):
    section = before.to_config(initial_percentile=before.percentile)
    assert CurriculumSettings.from_config(section) == dataclasses.replace(before, schedule="automatic")


def test_a_percentile_alone_makes_the_schedule_manual():
    assert CurriculumSettings().updated({"percentile": 0.5}).schedule == "manual"
    assert CurriculumSettings().updated({"percentile": 0.5, "schedule": "automatic"}).schedule == "automatic"
    whole = CurriculumSettings(percentile=0.9)
    assert CurriculumSettings().updated(whole) == whole


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"percentil": 0.5}, "Did you mean 'percentile'"),
        ({"initial_percentile": 0.5}, "set percentile"),
        ({"percentile": 0}, "is 0; expected a number above 0"),
        ({"percentile": float("nan")}, "is nan; expected"),
        ({"percentile": "0.5"}, "is '0.5'; expected"),
        ({"percentile": True}, "is True; expected"),
        ({"expansion_interval": 1.5}, "is 1.5; expected a whole number"),
        ({"enabled": 1}, "is 1; expected True or False"),
        ({"schedule": "auto"}, "is 'auto'; expected 'automatic' or 'manual'"),
        ({"min_reward_diff": float("inf")}, "is inf; expected"),
    ],
)
def test_a_wrong_setting_says_what_was_found_and_expected(change, expected):
    with pytest.raises(ConfigError, match=expected):
        CurriculumSettings().updated(change)


def test_numpy_numbers_become_plain_ones():
    numpy = pytest.importorskip("numpy")
    changed = CurriculumSettings().updated({"percentile": numpy.float32(0.5), "expansion_interval": numpy.int64(3)})
    assert repr(changed) == repr(CurriculumSettings(percentile=0.5, schedule="manual", expansion_interval=3))


def test_importing_the_config_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, finetune_nb.components.loading, finetune_nb.components.registry;"
        "print([m for m in ('numpy', 'pandas', 'torch', 'matplotlib', 'pyarrow', 'ruamel.yaml') if m in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stdout.strip() == "[]"


def test_overrides_of_a_complete_config_are_refused_with_what_to_do():
    from finetune_nb.run.run import Run

    config = load_config({"run": {"seed": 1}})
    with pytest.raises(ConfigError, match="this Config is complete. Change its fields"):
        Run.from_config(config, run__seed=2)
    assert config.run.seed == 1
