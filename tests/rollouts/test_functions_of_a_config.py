"""Functions and models of a config, by their names: what `finetuning.target_functions` and `target_model` pick is trained."""

import asyncio
import json

import httpx
import pytest

import finetune_nb as ft
from finetune_nb.components.functions import WORKFLOW, current_function
from finetune_nb.testing import FakeAdapter, sums


class AgentConfig(ft.FunctionBaseConfig, name="planning_agent"):
    llm: str = "actor"
    critic: str = "critic"


class SearchConfig(ft.FunctionBaseConfig, name="search_by_model"):
    llm: str = "actor"
    way: str = "async"


class ScoreConfig(ft.EvaluatorBaseConfig, name="length_of_the_answer"):
    pass


class AdapterConfig(ft.TrainerAdapterConfig, name="adapter_that_trains_nothing"):
    pass


@ft.register_function(config_type=AgentConfig)
async def agent(config, builder):
    actor, critic = await builder.get_llm(config.llm), await builder.get_llm(config.critic)
    search = await builder.get_function("search")

    async def solve(question):
        found = await search.ainvoke(f"search {question}")
        draft = await actor.chat([{"role": "user", "content": f"{question} {found}"}])
        await critic.chat([{"role": "user", "content": f"judge {question}"}])
        return draft.content

    yield solve


@ft.register_function(config_type=SearchConfig)
async def search(config, builder):
    llm = await builder.get_llm(config.llm)

    async def by_chat(query):
        return (await llm.chat([{"role": "user", "content": query}])).content

    async def by_http(query):
        body = {"model": llm.name, "messages": [{"role": "user", "content": query}]}
        headers = {"Authorization": f"Bearer {llm.api_key}"}
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{llm.base_url}/chat/completions", json=body, headers=headers)
        return answer.json()["choices"][0]["message"]["content"]

    async def by_tasks(query):
        return await asyncio.create_task(by_chat(query))

    if config.way == "langchain":
        chat = await builder.get_llm(config.llm, wrapper_type="langchain")

        async def by_langchain(query):
            return (await chat.ainvoke([("user", query)])).text

        yield ft.FunctionInfo.from_fn(by_langchain, description="searches")
        return
    yield {"async": by_chat, "http": by_http, "tasks": by_tasks}[config.way]


@ft.register_evaluator(config_type=ScoreConfig)
async def score(config, builder):
    yield lambda item: float(len(item.output_obj))


@ft.register_trainer_adapter(config_type=AdapterConfig)
async def adapter(config, builder):
    yield FakeAdapter(config)


def config(tmp_path, way="async", **finetuning):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(sums(2)))
    return {
        "llms": {name: {"_type": "policy", "adapter": "ad"} for name in ("actor", "critic")},
        "functions": {"search": {"_type": "search_by_model", "way": way}},
        "workflow": {"_type": "planning_agent"},
        "eval": {
            "general": {"dataset": {"_type": "json", "file_path": str(rows)}},
            "evaluators": {"r": {"_type": "length_of_the_answer"}},
        },
        "trajectory_builders": {"tb": {"_type": "eval_traj_builder", "num_generations": 2}},
        "trainer_adapters": {"ad": {"_type": "adapter_that_trains_nothing"}},
        "trainers": {"t": {"_type": "epoch_trainer"}},
        "finetuning": {
            "enabled": True,
            "trainer": "t",
            "trajectory_builder": "tb",
            "trainer_adapter": "ad",
            "reward_function": {"name": "r"},
            "output_dir": str(tmp_path / "runs"),
            **finetuning,
        },
    }


async def asked(run):
    """What each rollout of the next epoch asked in the turns that are trained on: the first word of each prompt."""
    epoch = await run.next_epoch()
    await asyncio.to_thread(run.close)
    assert epoch.metrics.failures == 0, epoch.reason
    found = []
    for trajectory in (each for group in epoch.collection.trajectories for each in group):
        prompts = [item.content for item in trajectory.episode if item.role == "user"]
        found.append(["search" if "search" in p.split()[0] else "judge" if "judge" in p else "solve" for p in prompts])
    assert len(found) == 4
    return found


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({}, ["solve", "judge"]),
        ({"target_functions": ["<workflow>", "search"]}, ["search", "solve", "judge"]),
        ({"target_functions": ["search"]}, ["search"]),
        ({"target_model": "actor"}, ["solve"]),
        ({"target_model": "critic"}, ["judge"]),
        ({"target_model": "actor", "target_functions": ["<workflow>", "search"]}, ["search", "solve"]),
    ],
)
async def test_what_is_trained_is_what_those_functions_ask_of_that_model(tmp_path, settings, turns):
    assert await asked(ft.Run.from_config(config(tmp_path, **settings))) == [turns] * 4


@pytest.mark.parametrize("way", ["http", "tasks", "langchain"])
async def test_a_function_is_known_by_whichever_way_it_asks(tmp_path, way):
    run = ft.Run.from_config(config(tmp_path, way, target_functions=["search"]))
    assert await asked(run) == [["search"]] * 4


def test_a_name_that_can_never_match_is_refused_with_the_config(tmp_path):
    for wrong in ({"target_functions": ["serach"]}, {"target_model": "acter"}):
        with pytest.raises(ft.errors.ConfigError, match=r"Did you mean 'search'\?|Did you mean 'actor'\?"):
            ft.Run.from_config(config(tmp_path, **wrong))


def test_an_adapter_that_two_models_are_sampled_from_names_neither(tmp_path):
    with pytest.raises(ft.errors.ConfigError, match="'actor', 'critic' are sampled from"):
        ft.Run.from_config(config(tmp_path, target_model="ad"))


def test_the_adapters_name_stands_for_its_only_model(tmp_path):
    tree = config(tmp_path, target_model="ad")
    del tree["llms"]["critic"]
    assert ft.load_config(tree).finetuning.target_model == "actor"


async def test_a_framework_for_which_no_model_is_wrapped_is_refused(tmp_path):
    async with ft.Builder(ft.load_config(config(tmp_path))) as builder:
        assert builder.get_max_concurrency() == 8
        with pytest.raises(ft.ConfigError, match="wrapper_type='crewai'.*wrapped for langchain here"):
            await builder.get_llm("actor", wrapper_type="crewai")


def test_outside_of_every_function_it_is_the_workflow_that_runs():
    assert current_function() is WORKFLOW


@pytest.mark.parametrize("name", ["workflow", "<workflow>"])
def test_no_function_can_have_the_workflows_name(name):
    with pytest.raises(ft.ConfigError, match=f"functions.{name}.*is the name of the workflow.*Rename it"):
        ft.load_config({"functions": {name: {"_type": "search_by_model"}}})
