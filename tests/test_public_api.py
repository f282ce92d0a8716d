"""The public surface, spelled out: a name, a parameter or a default that changes here changes somebody's code."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
from pathlib import Path

import pytest

import finetune_nb as ft
from finetune_nb import frames, plots, testing, tripwires

SEED = set(
    """
    TrajectoryBuilder TrainerAdapter Trainer TrajectoryBuilderConfig TrainerAdapterConfig TrainerConfig FinetuneConfig
    FinetuneRunConfig RewardFunctionConfig CurriculumLearningConfig Trajectory TrajectoryCollection EpisodeItem
    EpisodeItemRole DPOItem OpenAIMessage TrainingJobRef TrainingJobStatus TrainingStatusEnum EvaluationRun
    EvaluationRunConfig EvaluationRunOutput EvalInput EvalInputItem EvalOutput EvalOutputItem IntermediateStep Builder
    register_trajectory_builder register_trainer_adapter register_trainer
    register_evaluator register_function register_llm_provider EvaluatorBaseConfig FunctionBaseConfig LLMBaseConfig
    """.split()  # noqa: SIM905  # a list literal would be thirty-six lines
)
"""What code written for the finetuning harness imports."""

NOTEBOOK = {"Run", "load_config", "run_sync", "enable_nested_asyncio"}

INTERFACES = {
    "TrajectoryBuilder": {
        "__init__": "(self, trajectory_builder_config)",
        "initialize": "async (self, run_config)",
        "run_eval": "async (self)",
        "start_run": "abstract async (self, run_id, meta=None)",
        "finalize": "abstract async (self, run_id, meta=None)",
        "compute_reward": "async (self, output_item, meta=None)",
        "log_progress": "abstract (self, run_id, metrics, output_dir=None)",
    },
    "TrainerAdapter": {
        "__init__": "(self, adapter_config)",
        "initialize": "async (self, run_config)",
        "is_healthy": "abstract async (self)",
        "submit": "abstract async (self, trajectories)",
        "submit_chosen": "async (self, trajectories)",
        "status": "abstract async (self, ref)",
        "wait_until_complete": "abstract async (self, ref, poll_interval=10.0)",
        "log_progress": "abstract (self, ref, metrics, output_dir=None)",
    },
    "Trainer": {
        "__init__": "(self, trainer_config, **kwargs)",
        "bind_components": "async (self, trajectory_builder, trainer_adapter)",
        "initialize": "async (self, run_config)",
        "run_epoch": "abstract async (self, epoch, run_id)",
        "run": "abstract async (self, num_epochs)",
        "get_metrics": "abstract async (self, run_id)",
        "cleanup": "abstract async (self)",
        "log_progress": "abstract (self, epoch, metrics, output_dir=None)",
        "run_validation_evaluation": "async (self, epoch, run_id)",
        "apply_curriculum_learning": "(self, trajectory_collection, epoch)",
        "get_curriculum_state": "(self)",
    },
}
"""The three interfaces of the harness, word for word."""

ATTRIBUTES = {
    "TrajectoryBuilder": {"trajectory_builder_config", "run_config"},
    "TrainerAdapter": {"adapter_config", "run_config"},
    "Trainer": {
        "trainer_config",
        "run_config",
        "curriculum_config",
        "trajectory_builder",
        "trainer_adapter",
        "_curriculum_state",
    },
}

# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ft.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(ft, name) is not None


def test_all_holds_every_name_once_and_dir_shows_them():
    assert len(ft.__all__) == len(set(ft.__all__))
    assert dir(ft) == sorted(ft.__all__)


def test_the_names_of_the_harness_and_of_the_notebook_are_there():
    assert sorted((SEED | NOTEBOOK) - set(ft.__all__)) == []


def test_a_name_that_is_not_there_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match=r"'finetune_nb' has no attribute 'Trajectry'"):
        _ = ft.Trajectry


def test_type_checkers_see_exactly_the_public_names():
    tree = ast.parse(Path(ft.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen: set[str] = set()
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        module = importlib.import_module(f"finetune_nb.{statement.module}")
        for alias in statement.names:
            if alias.name == "*":
                seen |= {name for name in ft.__all__ if name in vars(module) and name in exported(module)}
            else:
                assert alias.asname == alias.name, "`import X as X` is how a type checker knows that X is public"
                assert getattr(ft, alias.name) is getattr(module, alias.name)
                seen.add(alias.name)
    assert seen == set(ft.__all__) - {"__version__"}


def exported(module) -> set[str]:
    """What `from module import *` brings."""
    return set(getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]))


def test_every_public_name_is_made_in_finetune_nb():
    strangers = [
        n for n in ft.__all__ if n != "__version__" and not getattr(ft, n).__module__.startswith("finetune_nb")
    ]
    assert strangers == []


# ── docstrings ───────────────────────────────────────────────────────────────────────────────────────────────────────


def own_docstring(thing) -> str | None:
    """Its docstring, and neither an inherited one nor the signature that @dataclass puts there."""
    text = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    return None if text and text.startswith(f"{thing.__name__}(") else text


def test_every_public_class_and_function_has_a_docstring():
    silent = {name for name in ft.__all__ if name != "__version__" and not own_docstring(getattr(ft, name))}
    assert silent == set()


# `_`-free methods that a subclass or a cell calls; those of the other classes are NAT's properties and validators.
@pytest.mark.parametrize("name", ["Run", "Policy", "TrajectoryBuilder", "TrainerAdapter", "Trainer"])
def test_every_method_of_the_contracts_and_of_run_has_a_docstring(name):
    members = {k: v for k, v in vars(getattr(ft, name)).items() if not k.startswith("_")}
    functions = {
        k: v.fget if isinstance(v, property) else getattr(v, "__func__", v)
        for k, v in members.items()
        if isinstance(v, property | classmethod | staticmethod) or inspect.isfunction(v)
    }
    assert functions
    assert [k for k, function in functions.items() if not function.__doc__] == []


# ── the three interfaces ─────────────────────────────────────────────────────────────────────────────────────────────


def signature(function) -> str:
    """As in the table above: parameter names and defaults, without annotations."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    words = ["abstract"] * getattr(function, "__isabstractmethod__", False)
    words += ["async"] * inspect.iscoroutinefunction(function)
    return " ".join([*words, str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))])


@pytest.mark.parametrize("name", INTERFACES)
def test_signatures_are_those_of_the_harness(name):
    interface = getattr(ft, name)
    assert {method: signature(getattr(interface, method)) for method in INTERFACES[name]} == INTERFACES[name]
    abstract = {method for method, text in INTERFACES[name].items() if text.startswith("abstract")}
    assert interface.__abstractmethods__ == abstract


@pytest.mark.parametrize("name", INTERFACES)
def test_attributes_are_those_of_the_harness(name):
    interface = getattr(ft, name)
    complete = type("Complete", (interface,), {m: lambda self: None for m in interface.__abstractmethods__})
    config = object()
    made = complete(config)
    assert set(vars(made)) == ATTRIBUTES[name]
    (config_name,) = [attribute for attribute in vars(made) if getattr(made, attribute) is config]
    assert config_name == next(iter(inspect.signature(interface).parameters))
    assert made.run_config is None


async def test_initialize_puts_the_reward_and_the_start_of_the_curriculum_in_place():
    from finetune_nb.testing import FakeAdapter, ScriptedBuilder

    trainer = ft.EpochTrainer(ft.TrainerConfig())
    builder, adapter = ScriptedBuilder(lambda epoch: {}), FakeAdapter()
    await trainer.bind_components(builder, adapter)
    config = ft.FinetuneConfig(
        reward_function=ft.RewardFunctionConfig(name="right"),
        curriculum_learning=ft.CurriculumLearningConfig(initial_percentile=0.4),
    )
    await trainer.initialize(config)
    assert trainer._curriculum_state == {
        "current_percentile": 0.4,
        "last_expansion_epoch": -1,
        "total_groups": 0,
        "included_groups": set(),
    }
    assert trainer.curriculum_config is config.curriculum_learning
    assert (trainer.run_config, builder.run_config, adapter.run_config) == (config, config, config)
    assert builder.trajectory_builder_config.reward.name == adapter.adapter_config.reward.name == "right"


async def test_the_default_reward_is_the_score_and_none_is_zero_as_in_the_harness():
    from finetune_nb.testing import ScriptedBuilder

    builder = ScriptedBuilder(lambda epoch: {})
    scores = [1, "0.5", None]
    items = [ft.EvalOutputItem(id="a", score=score, reasoning="") for score in scores]
    assert [await builder.compute_reward(item) for item in items] == [1.0, 0.5, 0.0]


def test_a_trainer_without_a_curriculum_says_so():
    class Plain(ft.Trainer):
        run_epoch = run = get_metrics = cleanup = log_progress = None  # type: ignore[assignment]

    with pytest.raises(NotImplementedError, match="Override to implement curriculum learning"):
        Plain(ft.TrainerConfig()).apply_curriculum_learning(ft.TrajectoryCollection(trajectories=[], run_id="r"), 0)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "standard"),
    {
        "ConfigError": ValueError,
        "DatasetError": ValueError,
        "WorkflowError": RuntimeError,
        "RolloutTimeout": TimeoutError,
        "MissingLogprobs": ValueError,
        "BackendError": RuntimeError,
        "StalePolicy": RuntimeError,
        "JobFailed": RuntimeError,
        "RunError": RuntimeError,
        "MissingExtra": ImportError,
    }.items(),
)
def test_every_error_is_also_the_standard_one_that_it_stands_for(name, standard):
    assert issubclass(getattr(ft, name), ft.FinetuneError)
    assert issubclass(getattr(ft, name), standard)


# ── what JupyterLab shows on Shift+Tab ───────────────────────────────────────────────────────────────────────────────


def public_functions():
    """(name, function) of everything public that is called: functions, and the methods of classes, inherited ones too."""
    for module in (ft, frames, plots, testing, tripwires):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing
            if not inspect.isclass(thing) or issubclass(thing, (BaseException, enum.Enum)):
                continue
            hooks = getattr(thing, "__pydantic_decorators__", None)
            hidden = {*hooks.field_validators, *hooks.model_validators, "model_post_init"} if hooks else set()
            ours = [base for base in thing.__mro__ if base.__module__.startswith("finetune_nb")]
            for method in dict.fromkeys(method for base in ours for method in vars(base)):
                function = getattr(thing, method)
                if not method.startswith("_") and method not in hidden and inspect.isroutine(function):
                    yield f"{name}.{method}", function


def undescribed(function):
    """Parameters that the docstring's section Args does not name."""
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "_")]
    section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", inspect.getdoc(function) or "", re.S | re.M)
    described = re.findall(r"^    \*{0,2}(\w[\w, ]*):", section[1], re.M) if section else []
    named = {name.strip() for names in described for name in names.split(",")}
    return [name for name in parameters if name not in named]


def test_every_public_function_describes_its_arguments():
    missing = {name: undescribed(function) for name, function in public_functions()}
    assert len(missing) > 100
    assert {name: left for name, left in missing.items() if left} == {}


def returns_in_silence(function):
    """Whether it returns something that its docstring does not describe."""
    returns = inspect.signature(function).return_annotation not in (None, "None", inspect.Signature.empty)
    return returns and not re.search(r"^(Returns|Yields):$", inspect.getdoc(function) or "", re.M)


def test_every_public_function_describes_what_it_returns():
    assert [name for name, function in public_functions() if returns_in_silence(function)] == []


def test_a_missing_description_would_be_noticed():
    def described(a, b) -> int:
        """Do it.

        Args:
            a: The first.
        """
        return 0

    assert undescribed(described) == ["b"]
    assert returns_in_silence(described)
    assert "Run.trajectories" in dict(public_functions()), "which Run inherits"


@pytest.mark.parametrize("name", ["open", "fork"])
def test_a_folder_is_trusted_only_where_somebody_says_so_by_name(name):
    trust = inspect.signature(getattr(ft.Run, name)).parameters["trust"]
    assert (trust.default, trust.kind) == (False, inspect.Parameter.KEYWORD_ONLY)
