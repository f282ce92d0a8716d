"""Registering component types, and the Builder's life: once, lazily, in order, closed whatever happens."""

import asyncio
import copy
import logging
import sys
import types

import pytest

from finetune_nb.components.builder import Builder
from finetune_nb.components.loading import load_config
from finetune_nb.components.registry import (
    OUR_TYPES,
    config_class,
    register_evaluator,
    register_function,
    register_llm_provider,
    register_trainer,
    register_trainer_adapter,
    register_trajectory_builder,
    type_names,
)
from finetune_nb.config import (
    Config,
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
)
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.redaction import MASK


class RegLLMConfig(LLMBaseConfig, name="reg_llm"):
    adapter: str | None = None
    evaluator: str | None = None
    api_key: str = ""


class RegEvaluatorConfig(EvaluatorBaseConfig, name="reg_evaluator"):
    llm: str | None = None
    start: str = "fine"
    end: str = "fine"


class Component:
    def __init__(self, config):
        self.config = config


LOG: list[str] = []


@pytest.fixture(autouse=True)
def empty_log():
    LOG.clear()


@register_llm_provider(config_type=RegLLMConfig, framework_wrappers=["ignored"])
async def reg_llm(config: RegLLMConfig, builder: Builder):
    LOG.append("llm opens")
    if config.evaluator:
        await builder.get_evaluator(config.evaluator)
    await asyncio.sleep(0)
    yield Component(config)
    LOG.append("llm closes")


@register_evaluator(config_type=RegEvaluatorConfig)
async def reg_evaluator(config: RegEvaluatorConfig, builder: Builder):
    if config.llm:
        await builder.get_llm(config.llm)
    if config.start == "raises":
        raise OSError("no connection")
    if config.start == "yields nothing":
        return
    if config.start == "hangs":
        try:
            await asyncio.Event().wait()
        finally:
            LOG.append("stopped while opening")
    LOG.append("evaluator opens")
    yield Component(config)
    LOG.append("evaluator closes")
    if config.end == "raises":
        raise OSError(f"close of {config.llm} failed")
    if config.end == "yields twice":
        yield Component(config)


def made(**sections) -> Builder:
    evaluators = {name: RegEvaluatorConfig(**values) for name, values in sections.pop("evaluators", {}).items()}
    llms = {name: RegLLMConfig(**values) for name, values in sections.pop("llms", {}).items()}
    return Builder(Config(llms=llms, eval={"evaluators": evaluators}, **sections))  # type: ignore[arg-type]


# ── registering ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_registered_type_is_known_by_its_name():
    assert config_class("evaluator", "reg_evaluator") is RegEvaluatorConfig
    assert {"reg_evaluator", "exact_match"} <= set(type_names("evaluator"))
    assert "reg_evaluator" not in type_names("trainer")


def test_our_datasets_and_every_other_type_of_ours_stand_under_their_base_class():
    assert config_class("dataset", "jsonl").static_type() == "jsonl"
    for kind, names in OUR_TYPES.items():
        assert names, kind
        assert all(path.startswith("finetune_nb.") and path.count(":") == 1 for path in names.values())


async def test_registering_a_name_again_replaces_the_old_one():
    def cell(answer: int):
        class AgainConfig(EvaluatorBaseConfig, name="reg_again"):
            pass

        @register_evaluator(config_type=AgainConfig)
        async def again(config, builder):
            yield answer

        return AgainConfig

    first = cell(1)
    second = cell(2)
    assert config_class("evaluator", "reg_again") is second is not first
    async with Builder(load_config({"eval": {"evaluators": {"e": {"_type": "reg_again"}}}})) as builder:
        assert await builder.get_evaluator("e") == 2


def test_a_name_taken_from_another_module_is_logged(caplog):
    class TakenConfig(TrainerConfig, name="reg_taken"):
        pass

    class TakenToo(TrainerConfig, name="reg_taken"):
        pass

    async def build(config, builder):
        yield config

    TakenToo.__module__ = "somewhere.else"
    register_trainer(config_type=TakenConfig)(build)
    with caplog.at_level(logging.WARNING):
        register_trainer(config_type=TakenToo)(build)
    assert "'reg_taken' of" in caplog.text and "somewhere.else" in caplog.text


def test_what_is_no_async_generator_function_is_refused_at_once():
    async def coroutine(config, builder):
        return 1

    def generator(config, builder):
        yield 1

    for wrong in (coroutine, generator, lambda config, builder: 1):
        with pytest.raises(ConfigError, match="is not an async generator function"):
            register_evaluator(config_type=RegEvaluatorConfig)(wrong)  # type: ignore[type-var]


def test_a_config_of_another_kind_or_without_a_name_is_refused():
    class Nameless(EvaluatorBaseConfig):
        pass

    with pytest.raises(ConfigError, match="expected a subclass of TrainerConfig"):
        register_trainer(config_type=RegEvaluatorConfig)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='Nameless\\(EvaluatorBaseConfig, name="my_evaluator"\\)'):
        register_evaluator(config_type=Nameless)


def test_names_of_our_own_types_cannot_be_taken():
    class Mine(EvaluatorBaseConfig, name="exact_match"):
        pass

    with pytest.raises(ConfigError, match="is finetune_nb's own"):
        register_evaluator(config_type=Mine)


def test_one_of_our_types_is_imported_when_it_is_first_named(monkeypatch):
    monkeypatch.setitem(OUR_TYPES["evaluator"], "reg_lazy", "reg_lazy_module:LazyConfig")
    module = types.ModuleType("reg_lazy_module")
    monkeypatch.setitem(sys.modules, "reg_lazy_module", module)
    exec(
        "from finetune_nb.config import EvaluatorBaseConfig\n"
        "from finetune_nb.components.registry import register_evaluator\n"
        "class LazyConfig(EvaluatorBaseConfig, name='reg_lazy'):\n    pass\n"
        "@register_evaluator(config_type=LazyConfig)\n"
        "async def lazy(config, builder):\n    yield 'made'\n",
        module.__dict__,
    )
    assert load_config({"eval": {"evaluators": {"e": {"_type": "reg_lazy"}}}}).eval.evaluators["e"].type == "reg_lazy"


# ── the seed's registration samples ──────────────────────────────────────────────────────────────────────────────────


async def test_every_component_of_the_seed_s_samples_is_built_by_name(monkeypatch):
    class MyTrajectoryBuilderConfig(TrajectoryBuilderConfig, name="my_traj_builder"):
        num_generations: int = 2
        include_tool_calls: bool = True
        min_episode_length: int = 2

    class MyTrainerAdapterConfig(TrainerAdapterConfig, name="my_trainer_adapter"):
        backend: dict[str, str]

    class MyTrainerConfig(TrainerConfig, name="my_trainer"):
        pass

    class MyAgentConfig(FunctionBaseConfig, name="my_agent_workflow"):
        llm: str

    class MyEvaluatorConfig(EvaluatorBaseConfig, name="my_custom_evaluator"):
        pass

    @register_trajectory_builder(config_type=MyTrajectoryBuilderConfig)
    async def my_trajectory_builder(config: MyTrajectoryBuilderConfig, builder: Builder):
        yield Component(config)

    @register_trainer_adapter(config_type=MyTrainerAdapterConfig)
    async def my_trainer_adapter(config: MyTrainerAdapterConfig, builder: Builder):
        yield Component(config)

    @register_trainer(config_type=MyTrainerConfig)
    async def my_trainer(config: MyTrainerConfig, builder: Builder):
        yield Component(config)

    @register_function(config_type=MyAgentConfig)
    async def my_agent(config: MyAgentConfig, builder: Builder):
        llm = await builder.get_llm(config.llm)

        async def workflow(question):
            return llm

        yield workflow

    @register_evaluator(config_type=MyEvaluatorConfig)
    async def my_evaluator(config: MyEvaluatorConfig, builder: Builder):
        yield Component(config)

    monkeypatch.setenv("TRAINING_API_KEY", "training-key")
    config = load_config(
        {
            "llms": {"my_model": {"_type": "reg_llm"}},
            "workflow": {"_type": "my_agent_workflow", "llm": "my_model"},
            "eval": {"evaluators": {"my_reward": {"_type": "my_custom_evaluator"}}},
            "trajectory_builders": {"my_builder": {"_type": "my_traj_builder", "num_generations": 4}},
            "trainer_adapters": {
                "my_adapter": {"_type": "my_trainer_adapter", "backend": {"api_key": "${TRAINING_API_KEY}"}}
            },
            "trainers": {"my_trainer": {"_type": "my_trainer"}},
            "finetuning": {
                "enabled": True,
                "trainer": "my_trainer",
                "trajectory_builder": "my_builder",
                "trainer_adapter": "my_adapter",
                "reward_function": {"name": "my_reward"},
            },
        }
    )
    async with Builder(config) as builder:
        assert builder.config is config
        assert (await builder.get_trajectory_builder("my_builder")).config.num_generations == 4  # type: ignore[attr-defined]
        adapter = await builder.get_trainer_adapter("my_adapter")
        assert adapter.config.backend == {"api_key": "training-key"}  # type: ignore[attr-defined]
        assert (await builder.get_trainer("my_trainer")).config is config.trainers["my_trainer"]  # type: ignore[attr-defined]
        assert (await builder.get_evaluator("my_reward")).config is builder.get_evaluator_config("my_reward")
        workflow = await builder.get_workflow()
        assert workflow is await builder.get_function("<workflow>")
        assert await workflow("?") is await builder.get_llm("my_model")
        assert builder.get_trainer_adapter_config("my_adapter") is config.trainer_adapters["my_adapter"]
        assert builder.get_workflow_config() is config.workflow


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_component_is_built_when_it_is_first_asked_for_and_once():
    async with made(llms={"m": {}}) as builder:
        assert LOG == [] and builder.built("llm_provider") == [] and builder.ready("llm_provider", "m") is None
        first, second = await asyncio.gather(builder.get_llm("m"), builder.get_llm("m"))
        assert first is second is builder.ready("llm_provider", "m")
        assert builder.built("llm_provider") == [first]
        assert LOG == ["llm opens"]
    assert LOG == ["llm opens", "llm closes"]


async def test_components_close_newest_first_and_once():
    builder = made(llms={"m": {}}, evaluators={"e": {"llm": "m"}})
    await builder.get_evaluator("e")
    await builder.close()
    await builder.close()
    assert LOG == ["llm opens", "evaluator opens", "evaluator closes", "llm closes"]


async def test_every_component_is_closed_even_where_one_raises():
    builder = made(llms={"m": {}}, evaluators={"e": {"llm": "m", "end": "raises"}})
    await builder.get_evaluator("e")
    with pytest.raises(OSError, match="close of m failed") as caught:
        await builder.close()
    assert LOG[-1] == "llm closes"
    assert caught.value.__notes__ == ["while closing evaluator 'e'"]


async def test_several_errors_while_closing_come_as_a_group():
    builder = made(evaluators={"a": {"end": "raises"}, "b": {"end": "yields twice"}})
    await builder.get_evaluator("a")
    await builder.get_evaluator("b")
    with pytest.raises(ExceptionGroup) as caught:
        await builder.close()
    assert [type(error) for error in caught.value.exceptions] == [ConfigError, OSError]
    assert "yields twice" in str(caught.value.exceptions[0])


async def test_closing_goes_on_where_the_one_who_closes_is_canceled():
    builder = made(llms={"m": {}}, evaluators={"e": {"llm": "m"}})
    await builder.get_evaluator("e")
    closing = asyncio.create_task(builder.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await builder.close()
    assert LOG[-2:] == ["evaluator closes", "llm closes"]


async def test_a_generator_may_hold_a_task_group_open_across_its_yield():
    class GroupConfig(EvaluatorBaseConfig, name="reg_group"):
        pass

    @register_evaluator(config_type=GroupConfig)
    async def group(config, builder):
        async with asyncio.TaskGroup() as tasks, asyncio.timeout(60):
            tasks.create_task(asyncio.sleep(0))
            yield asyncio.current_task()

    builder = Builder(Config(eval={"evaluators": {"e": GroupConfig()}}))  # type: ignore[arg-type]
    task = await asyncio.create_task(builder.get_evaluator("e"))
    assert task is not asyncio.current_task()
    await asyncio.create_task(builder.close())


async def test_a_generator_that_yields_nothing_is_an_error():
    async with made(evaluators={"e": {"start": "yields nothing"}}) as builder:
        with pytest.raises(ConfigError, match="evaluator 'e' was registered by a function that yields no component"):
            await builder.get_evaluator("e")


async def test_a_component_that_could_not_be_built_can_be_asked_for_again():
    builder = made(evaluators={"e": {"start": "raises"}})
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            await builder.get_evaluator("e")
        assert caught.value.__notes__ == ["while building evaluator 'e'"]
    builder.config.eval.evaluators["e"].start = "fine"  # type: ignore[attr-defined]
    assert isinstance(await builder.get_evaluator("e"), Component)
    await builder.close()


async def test_closing_stops_what_is_still_opening():
    builder = made(evaluators={"e": {"start": "hangs"}})
    waiting = asyncio.create_task(builder.get_evaluator("e"))
    await asyncio.sleep(0.01)
    await builder.close()
    assert LOG == ["stopped while opening"]
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_one_who_waits_may_be_canceled_and_the_next_one_still_gets_the_component():
    async with made(llms={"m": {}}) as builder:
        impatient = asyncio.create_task(builder.get_llm("m"))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        assert isinstance(await builder.get_llm("m"), Component)
        assert LOG == ["llm opens"]


async def test_an_unknown_name_gets_a_suggestion():
    async with made(llms={"my_model": {}}) as builder:
        with pytest.raises(ConfigError, match="no llm_provider 'my_modl' in llms. Did you mean 'my_model'"):
            await builder.get_llm("my_modl")
        with pytest.raises(ConfigError, match="no trainer 't' in trainers. None is known"):
            builder.get_trainer_config("t")
        with pytest.raises(ConfigError, match="no function 'workflow'"):
            await builder.get_workflow()


@pytest.mark.parametrize("together", [False, True])
async def test_components_that_need_each_other_in_a_circle_are_an_error(together):
    async with made(llms={"m": {"evaluator": "e"}}, evaluators={"e": {"llm": "m"}}) as builder:
        asked = [builder.get_llm("m"), builder.get_evaluator("e")] if together else [builder.get_llm("m")]
        async with asyncio.timeout(5):
            errors = await asyncio.gather(*asked, return_exceptions=True)
    for error in errors:
        assert isinstance(error, ConfigError)
        assert "in a circle" in str(error) and "llm_provider 'm' -> " in str(error) and "evaluator 'e'" in str(error)


async def test_a_component_that_needs_itself_is_an_error():
    class SelfConfig(EvaluatorBaseConfig, name="reg_self"):
        pass

    @register_evaluator(config_type=SelfConfig)
    async def itself(config, builder):
        yield await builder.get_evaluator("e")

    async with Builder(Config(eval={"evaluators": {"e": SelfConfig()}})) as builder:  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="evaluator 'e' -> evaluator 'e'"):
            await builder.get_evaluator("e")


async def test_an_added_component_goes_before_the_config_s_and_is_not_closed():
    def reward(item):
        return 1.0

    async with made(evaluators={"e": {}, "f": {}}) as builder:
        builder.add("evaluator", "e", reward)
        builder.add("dataset", "train", [1, 2])
        assert await builder.get_evaluator("e") is reward
        assert builder.ready("dataset", "train") == [1, 2] and builder.ready("dataset", "other") is None
        other = await builder.get_evaluator("f")
        assert builder.built("evaluator") == [reward, other]
        with pytest.raises(ConfigError, match="has been built"):
            builder.add("evaluator", "f", reward)
        with pytest.raises(ConfigError, match="Did you mean 'evaluator'"):
            builder.add("evaluators", "f", reward)
    assert LOG == ["evaluator opens", "evaluator closes"]


async def test_a_plain_function_that_was_not_passed_again_is_named():
    config = load_config(
        {"workflow": {"_type": "python_function"}, "eval": {"evaluators": {"reward": {"_type": "python_function"}}}}
    )
    async with Builder(config) as builder:
        with pytest.raises(ConfigError, match="Pass it again: workflow="):
            await builder.get_workflow()
        with pytest.raises(ConfigError, match="Pass it again: reward="):
            await builder.get_evaluator("reward")
        builder.add("function", "workflow", print)
        assert await builder.get_workflow() is print


async def test_a_credential_that_was_not_stored_must_be_passed_again():
    stored = made(llms={"m": {"api_key": "sk-literal-key"}}).config.stored()
    assert stored["llms"]["m"]["api_key"] == MASK
    async with Builder(load_config(stored)) as builder:
        with pytest.raises(ConfigError, match="api_key was left out when the config was stored. Pass it again"):
            await builder.get_llm("m")
    async with Builder(load_config(stored, override=[("llms.m.api_key", "sk-literal-key")])) as builder:
        assert (await builder.get_llm("m")).config.api_key == "sk-literal-key"


async def test_a_framework_s_wrapper_cannot_be_asked_for():
    async with made(llms={"m": {}}) as builder:
        for wrapper in ("langchain", "crewai"):
            with pytest.raises(ConfigError, match=f"wrapper_type='{wrapper}'.*llm.base_url"):
                await builder.get_llm("m", wrapper_type=wrapper)


async def test_a_closed_builder_says_so():
    builder = made(llms={"m": {}})
    await builder.close()
    with pytest.raises(RunError, match="after its builder was closed"):
        await builder.get_llm("m")


def test_a_builder_works_on_one_event_loop():
    builder = made(llms={"m": {}, "n": {}})

    async def ask(name: str):
        return await builder.get_llm(name)

    asyncio.run(ask("m"))
    assert LOG == ["llm opens"]
    with pytest.raises(RunError, match="another event loop"):
        asyncio.run(ask("n"))


def test_a_copy_of_a_config_shares_the_live_builder():
    config = Config()
    config.builder = builder = Builder(config)
    twin = copy.deepcopy(config)
    assert twin is not config and twin.builder is builder
    assert config.model_copy(deep=True).builder is builder


async def test_a_config_whose_type_nobody_builds_is_an_error():
    class OrphanConfig(EvaluatorBaseConfig, name="reg_orphan"):
        pass

    async with Builder(Config(eval={"evaluators": {"e": OrphanConfig()}})) as builder:  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="has no _type 'reg_orphan'"):
            await builder.get_evaluator("e")
