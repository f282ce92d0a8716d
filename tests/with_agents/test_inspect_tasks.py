"""Tasks of Inspect AI in runs, and runs as logs of Inspect."""

from __future__ import annotations

import json
import random

import pytest
from intervals import reward_interval
from tool_calls import Calling

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.examples.calculator.task import TOOLS, calculate, make_question
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

pytest.importorskip("inspect_ai")

from inspect_ai import Epochs, Task
from inspect_ai.agent import react
from inspect_ai.analysis import samples_df
from inspect_ai.dataset import Sample
from inspect_ai.log import (
    read_eval_log,
    read_eval_log_sample,
    read_eval_log_sample_summaries,
    write_eval_log,
)
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import Score, Target, accuracy, exact, includes, mean, scorer
from inspect_ai.solver import basic_agent, generate, solver, system_message, use_tools
from inspect_ai.tool import ToolError, tool

pytestmark = pytest.mark.slow
SUMS = [Sample(input="3+4", target="7", id="seven", metadata={"level": 1}), Sample(input="1+1", target="2")]


def scripted(task, script=lambda messages, seed: "7", **settings):
    adapter = settings.pop("adapter", None) or FakeAdapter(policy=ScriptedPolicy(script))
    return ft.Run(env=task, adapter=adapter, generations=2, **settings)


async def played(task, *args, **settings):
    run = scripted(task, *args, **settings)
    await run.next_epoch()
    return run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@tool
def calculator(remaining: str):
    async def execute(expression: str) -> str:
        """Does the operation.

        Args:
            expression: The operation, as it stands there: 12+7
        """
        result = calculate(expression, remaining)
        if result is None:
            raise ToolError("malformed")
        return result

    return execute


@solver
def with_calculator():
    async def solve(state, generate):
        state.tools = [calculator(state.input_text)]
        return await generate(state, max_tokens=12)

    return solve


@scorer(metrics=[accuracy()])
def says():
    async def score(state, target: Target):
        right = state.output.completion.removeprefix("=") == target.text
        return Score(value="C" if right else "I", answer=state.output.completion, explanation="what it said")

    return score


def make_sums(size=60):
    rng = random.Random(0)
    questions = [make_question(rng, 2) for _ in range(size)]
    samples = [Sample(input=each, target=calculate(each, each)) for each in questions]
    return Task(samples, solver=with_calculator(), scorer=says(), message_limit=12, name="sums")


async def test_the_reward_rises_in_three_epochs(tmp_path):
    run = ft.Run(env=make_sums(32), training={"learning_rate": 1e-3}, output_dir=tmp_path)
    for _ in range(4):
        await run.next_epoch()
    frame = run.trajectories()
    print(frame.groupby("epoch").reward.mean().round(3).to_dict())
    assert frame.error.isna().all()
    before, after = (reward_interval(frame, epoch) for epoch in (0, 3))
    assert after[0] > before[1]
    assert run.messages().query("role == 'assistant'").tool_calls.notna().any()
    run.close()


async def test_samples_are_rows_with_their_metadata_and_ids(tmp_path):
    run = await played(Task(SUMS, scorer=includes()), output_dir=tmp_path)
    rows = run.config.builder.ready("dataset", "environment:train")
    assert [(row["id"], row["question"], row["answer"]) for row in rows] == [("seven", "3+4", "7"), ("2", "1+1", "2")]
    assert rows[0]["level"] == 1
    assert run.trajectories().groupby("example").reward.mean().to_dict() == {"seven": 1.0, "2": 0.0}
    run.close()
    again = ft.Run.open(run.folder, env=Task(SUMS, scorer=includes()), adapter=FakeAdapter(policy=ScriptedPolicy()))
    await again.next_epoch()
    assert again.trajectories().error.isna().all()
    again.close()


@scorer(metrics={"*": [mean()]})
def several():
    async def score(state, target):
        return Score(value={"right": "P", "short": True, "cost": 0.25})

    return score


@scorer(metrics=[mean()])
def unscored():
    async def score(state, target):
        return Score.unscored(reason="grader_failed")

    return score


@pytest.mark.parametrize(
    ("scorers", "chosen", "reward", "parts"),
    [
        (several(), None, 1.75, {"several.right": 0.5, "several.short": 1.0, "several.cost": 0.25}),
        (several(), "several.right", 0.5, {"several.right": 0.5}),
        ([includes(), several()], None, 1.0, {"includes": 1.0, "several.cost": 0.25}),
        ([several(), exact()], "exact", 1.0, {"exact": 1.0, "several.right": 0.5}),
        (unscored(), None, None, {}),
    ],
)
async def test_the_value_of_a_scorer_is_the_reward_and_all_values_are_columns(scorers, chosen, reward, parts, tmp_path):
    task = Task(SUMS[:1], scorer=scorers)
    run = await played(task, output_dir=tmp_path, env_options={} if chosen is None else {"scorer": chosen})
    frame = run.trajectories()
    if reward is None:
        assert frame.reward.isna().all() and frame.error.str.contains("gave no number: unscored").all()
    else:
        assert frame.reward.tolist() == [reward] * 2
    for name, value in parts.items():
        assert frame[f"score_{name}"].tolist() == [value] * 2
    run.close()


def agents():
    add = TOOLS[0]["function"]["name"]
    assert add == "calculator"
    return {
        "react": react(tools=[calculator("3+4")], attempts=1),
        "basic_agent": basic_agent(tools=[calculator("3+4")]),
        "use_tools": [system_message("Use the tool."), use_tools(calculator("3+4")), generate()],
    }


@pytest.mark.parametrize("name", ["react", "basic_agent", "use_tools"])
async def test_agents_of_inspect_use_their_tools(name, tmp_path):
    def script(messages, seed):
        if messages[-1]["role"] == "tool" and messages[-1]["content"] == "7":
            return "7" if name == "use_tools" else "submit " + json.dumps({"answer": "7"})
        return "calculator " + json.dumps({"expression": "3+4"})

    made = agents()[name]
    task = Task(SUMS[:1], solver=made, scorer=includes(), message_limit=12)
    run = await played(task, adapter=FakeAdapter(policy=Calling(script)), output_dir=tmp_path)
    assert run.trajectories().error.isna().all()
    said = run.messages()
    assert "7" in said.query("role == 'tool'").content.tolist()
    run.close()


async def test_limits_end_an_episode_which_is_scored(tmp_path):
    @solver
    def forever():
        async def solve(state, generate):
            while True:
                state = await generate(state)
                state.messages.append(ChatMessageUser(content="again"))

        return solve

    for limits in ({"message_limit": 6}, {"turn_limit": 3}, {"time_limit": 2}):
        run = await played(
            Task(SUMS[:1], solver=forever(), scorer=includes(), **limits), output_dir=tmp_path / str(limits)
        )
        frame = run.trajectories()
        assert frame.error.isna().all() and frame.reward.tolist() == [1.0] * 2
        (limit,) = {json.loads(output)["limit"] for output in frame.output}
        assert f"{limit}_limit" in limits
        run.close()


async def test_what_a_scorer_asks_is_not_trained_on(tmp_path):
    @scorer(metrics=[mean()])
    def judge():
        async def score(state, target):
            asked = await get_model().generate([ChatMessageUser(content="Is it right?")])
            return Score(value=len(asked.completion))

        return score

    run = await played(Task(SUMS[:1], scorer=judge()), output_dir=tmp_path)
    assert run.trajectories().reward.tolist() == [1.0] * 2
    assert run.messages().query("role == 'user'").content.unique().tolist() == ["3+4"]
    run.close()


async def test_what_breaks_in_a_solver_or_a_scorer_is_a_row_with_its_reason(tmp_path):
    @solver
    def breaks():
        async def solve(state, generate):
            raise LookupError("no such page")

        return solve

    @scorer(metrics=[mean()])
    def broken():
        async def score(state, target):
            raise LookupError("no such key")

        return score

    for task, reason in (
        (Task(SUMS[:1], solver=breaks(), scorer=includes(), name="pages"), "pages: LookupError: no such page"),
        (Task(SUMS[:1], scorer=broken(), name="keys"), "keys: LookupError: no such key"),
    ):
        run = await played(task, output_dir=tmp_path / task.name)
        assert run.trajectories().error.tolist() == [f"WorkflowError: {reason}"] * 2
        run.close()


async def test_what_a_run_cannot_keep_is_refused():
    def task(**settings):
        return Task(SUMS, **{"scorer": includes(), **settings})

    with pytest.raises(ConfigError, match=r"epochs=3; .* give generations=3 to Run"):
        scripted(task(epochs=Epochs(3, "mean")))
    with pytest.raises(ConfigError, match="the task has sandbox"):
        scripted(task(sandbox="local"))
    with pytest.raises(ConfigError, match="the task has model, which a run does not keep"):
        scripted(task(model="mockllm/model"))
    with pytest.raises(ConfigError, match="no scorer 'exact'. Its scorers: includes"):
        scripted(task(), env_options={"scorer": "exact"})
    with pytest.raises(ConfigError, match="has no scorer: give reward="):
        await played(Task(SUMS))
    with pytest.raises(ConfigError, match="has 2 samples, too few"):
        scripted(task(), env_options={"validation": 2})
    with pytest.raises(ConfigError, match='Expected "inspect_ai:module:function"'):
        scripted("inspect_ai:nowhere:task")


async def test_a_named_task_continues_from_its_folder_alone(tmp_path):
    run = await played(
        "inspect_ai:test_inspect_tasks:make_sums", env_options={"make": {"size": 2}}, output_dir=tmp_path
    )
    run.close()
    again = ft.Run.open(run.folder, adapter=FakeAdapter(policy=ScriptedPolicy()))
    await again.next_epoch()
    assert again.trajectories().groupby("epoch").size().tolist() == [4, 4]
    again.close()


async def test_settings_of_the_task_reach_the_model(tmp_path):
    task = Task(SUMS[:1], scorer=includes(), config=GenerateConfig(temperature=0.25, max_tokens=3))
    run = scripted(task, output_dir=tmp_path)
    epoch = await run.next_epoch()
    (call, *_) = [
        item.metadata for item in epoch.collection.trajectories[0][0].episode if item.role.value == "assistant"
    ]
    assert "0.25" in json.dumps(call, default=str)
    run.close()


async def test_a_run_is_a_log_that_inspect_reads(tmp_path):
    """Written without Inspect, and read by its own reader: whole, by its header, and a sample at a time."""

    def script(messages, seed):
        return "7" if messages[-1]["role"] == "tool" else "calculator " + json.dumps({"expression": "3+4"})

    solver = [use_tools(calculator("3+4")), generate()]
    run = await played(
        Task(SUMS[:1], solver=solver, scorer=[several(), includes()]),
        adapter=FakeAdapter(policy=Calling(script)),
        output_dir=tmp_path,
    )
    path = str(run.export(tmp_path / "x.eval"))
    log = read_eval_log(path)
    assert log.status == "success" and log.results.completed_samples == 2
    means = {score.name: score.metrics["mean"].value for score in log.results.scores}
    assert means["reward"] == 1.75 and means["includes"] == 1.0 and means["several.cost"] == 0.25
    assert read_eval_log(path, header_only=True).eval.task == run.id
    sample = read_eval_log_sample(path, "e0/seven", 1)
    assert [each.role for each in sample.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = sample.messages[1].tool_calls
    assert (call.function, call.arguments) == ("calculator", {"expression": "3+4"})
    assert (sample.messages[2].text, sample.messages[2].tool_call_id) == ("7", call.id)
    assert sample.output.completion == "7" and sample.scores["reward"].value == 1.75
    assert sample.metadata["trajectory"] == "e0/seven/0"
    summaries = read_eval_log_sample_summaries(path)
    assert [(each.id, each.epoch) for each in summaries] == [("e0/seven", 1), ("e0/seven", 2)]
    write_eval_log(log, str(tmp_path / "y.eval"))
    assert read_eval_log(str(tmp_path / "y.eval")).samples[0].scores == log.samples[0].scores
    frame = samples_df(path)
    assert frame["score_reward"].tolist() == [1.75] * 2
    run.close()
