"""verifiers as it is installed: its environments in runs, and its clients at the gateway."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verifiers.v1 as vf
from intervals import reward_interval
from tool_calls import Calling

import finetune_nb as ft
from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.environments.verifiers.environment import Verifiers
from finetune_nb.environments.verifiers.serving import asking
from finetune_nb.errors import ConfigError
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.testing import FakeAdapter, ScriptedPolicy
from finetune_nb.types import EpisodeKey, SamplingParams

pytestmark = pytest.mark.slow
HERE = {"runtime": {"type": "subprocess"}}
TOKENIZER = Path(ft.__file__).parent / "backends" / "local" / "tiny" / "model"


def single(**taskset: Any) -> vf.Env:
    config = vf.SingleAgentEnvConfig(taskset={"id": "vf_sums", **taskset}, agent=HERE, id="single_agent")
    return vf.load_environment(config)


def sums(size: int = 4, **fields: Any) -> vf.Env:
    taskset = {"id": "vf_sums", "size": size, **fields.pop("taskset", {})}
    agent, asker = ({**HERE, **fields.pop(name, {})} for name in ("agent", "asker"))
    return vf.load_environment(vf.resolve_env_config({"taskset": taskset, "agent": agent, "asker": asker, **fields}))


def scripted(env: Any, script: Any = lambda messages, seed: "=1", **settings: Any) -> ft.Run:
    adapter = settings.pop("adapter", None) or FakeAdapter(policy=ScriptedPolicy(script))
    return ft.Run(env=env, adapter=adapter, generations=2, **settings)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the programs that serve tools


@pytest.fixture
def without_uv(monkeypatch):
    """Programs of harnesses run in this Python, which has what they need. uv would get it from an index."""
    from verifiers.v1.runtimes.subprocess import SubprocessRuntime

    async def prepare(self, script, env=None, *, activate=True):
        await self.write("program.py", script.encode())
        return [sys.executable, "program.py"]

    monkeypatch.setattr(SubprocessRuntime, "prepare_uv_script", prepare)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_reward_rises_in_three_epochs(tmp_path):
    run = ft.Run(env=single(size=32), training={"learning_rate": 1e-3}, output_dir=tmp_path)
    for _ in range(4):
        await run.next_epoch()
    frame = run.trajectories()
    print(frame.groupby("epoch").reward.mean().round(3).to_dict())
    assert frame.error.isna().all()
    before, after = (reward_interval(frame, epoch) for epoch in (0, 3))
    assert after[0] > before[1]
    assert (frame.reward == 2 * frame.score_correct).all() and (frame.score_bonus == 0).all()
    assert set(frame.score_calls.unique()) <= {0.0, 1.0, 2.0} and frame.score_calls.nunique() > 1
    run.close()


async def test_tasks_are_rows_and_their_fields_are_columns(tmp_path):
    async def solve(question, answer, llm):  # fields, by their names
        await llm.chat([{"role": "user", "content": question}])
        return answer

    run = scripted(single(size=5), env_options={"validation": 2}, output_dir=tmp_path)
    rows = run.config.builder.ready("dataset", "environment:train")
    assert [row["id"] for row in rows] == ["task-0", "task-1", "task-2"]
    held_out = run.config.builder.ready("dataset", "environment:validation")
    assert [row["id"] for row in held_out] == ["task-3", "task-4"]
    assert rows[0]["question"] == rows[0]["task"]["prompt"] and rows[0]["answer"] == rows[0]["task"]["answer"]
    run.close()
    own = scripted(single(size=2), output_dir=tmp_path / "own", reward=lambda output: float(len(output) > 0))
    await own.next_epoch()
    assert own.trajectories().reward.tolist() == [1.0] * 4
    own.close()
    agent = ft.Run(
        solve,
        env=single(size=2),
        reward=lambda output, answer: float(output == answer),
        adapter=FakeAdapter(policy=ScriptedPolicy()),
        generations=2,
        output_dir=tmp_path / "agent",
    )
    await agent.next_epoch()
    assert agent.trajectories().reward.tolist() == [1.0] * 4
    agent.close()


async def test_a_named_environment_continues_from_its_folder_alone(tmp_path):
    config = {"id": "single_agent", "agent": HERE, "taskset": {"size": 3}}
    run = scripted("verifiers:vf_sums", env_options={"config": config}, output_dir=tmp_path)
    await run.next_epoch()
    run.close()
    again = ft.Run.open(run.folder, adapter=FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "=1")))
    await again.next_epoch()
    frame = again.trajectories()
    assert frame.error.isna().all() and frame.groupby("epoch").size().tolist() == [6, 6]
    again.close()


async def test_what_breaks_in_their_code_is_a_row_with_its_reason(tmp_path):
    broken = ["setup", "harness", "reward", "finalize", None]
    run = scripted(sums(size=5, taskset={"broken": broken}), output_dir=tmp_path)
    await run.next_epoch()
    errors = run.trajectories().groupby("example").error.first()
    run.close()
    assert errors.fillna("").str.removeprefix("WorkflowError: vf_sums: ").tolist() == [
        "TaskError: task setup: LookupError: broken in setup",
        "HarnessError: harness 'vf_sums' exited 3: the program died",
        "TaskError: task SumsTask scoring: LookupError: broken in reward",
        "EnvError: SumsEnv.finalize(): LookupError: broken in finalize",
        "",
    ]


async def test_a_user_of_the_environment_asks_again_in_the_same_rollout(tmp_path):
    run = scripted(sums(size=2, rounds=3), output_dir=tmp_path)
    await run.next_epoch()
    said = run.messages().query("example == 'task-0' and generation == 0")
    assert said.role.tolist() == ["user", "assistant"] * 3
    assert said.query("role == 'user'").content.tolist()[1:] == ["1+1", "2+2"]
    run.close()


async def test_an_agent_that_is_not_trained_asks_the_model_and_teaches_nothing(tmp_path):
    env = sums(size=2, rounds=2, asked_by_model=True)
    run = scripted(env, lambda messages, seed: f"={len(messages)}", output_dir=tmp_path)
    epoch = await run.next_epoch()
    run.close()
    for group in epoch.collection.trajectories:
        for trajectory in group:
            assert [item.content for item in trajectory.episode if item.role.value == "user"][1] == "1+1"
            assert len([item for item in trajectory.episode if item.role.value == "assistant"]) == 2


async def test_what_has_several_rewards_or_another_model_is_refused_in_its_row(tmp_path):
    run = scripted(sums(size=1, trained=2), output_dir=tmp_path / "two")
    await run.next_epoch()
    assert run.trajectories().error.str.contains("2 agent runs that are trained").all()
    run.close()
    elsewhere = {"client": {"type": "eval", "base_url": "http://127.0.0.1:1/v1", "api_key_var": "NONE"}}
    run = scripted(sums(size=1, agent=elsewhere), output_dir=tmp_path / "elsewhere")
    await run.next_epoch()
    assert (
        run.trajectories().error.str.contains("agent 'agent' is trained, and its config has a client of its own").all()
    )
    run.close()


def test_mistakes_say_what_is_expected():
    with pytest.raises(ConfigError, match="no environment 'vf_nothing'"):
        scripted("verifiers:vf_nothing")
    with pytest.raises(ConfigError, match="refuses this config of 'vf_sums': taskset.sizes: Extra inputs"):
        scripted("verifiers:vf_sums", env_options={"config": {"taskset": {"sizes": 3}}})
    with pytest.raises(ConfigError, match="vf_sums' could not be loaded: OSError: the data set is gone"):
        scripted(single(size=0))
    with pytest.raises(ConfigError, match="has 3 tasks, too few for examples=3 and validation=1"):
        scripted(single(size=3), env_options={"examples": 3, "validation": 1})
    with pytest.raises(ConfigError, match="is infinite: say how many tasks"):
        scripted("verifiers:vf_facts")
    with pytest.raises(ConfigError, match=r"has agent\.retries; .* give retries= to Run"):
        scripted(sums(agent={"retries": {"max_retries": 2}}))
    with pytest.raises(ConfigError, match="env has a config already"):
        scripted(single(), env_options={"config": {"agent": HERE}})
    with pytest.raises(ConfigError, match="without renderer_model"):
        scripted(single(), env_options={"client": "train"})


@pytest.mark.parametrize("served", ["task", "taskset"])
async def test_a_harness_that_is_a_program_uses_tools_that_are_served(served, tmp_path, without_uv):
    def script(messages, seed):
        if messages[-1]["role"] == "tool":
            return f"It was {messages[-1]['content']}."
        name = messages[-1]["content"].removeprefix("Who was ").rstrip("?")
        return "facts_lookup " + json.dumps({"name": name})

    config = {"agent": {**HERE, "harness": {"id": "null"}}, "taskset": {"task": {"served": served}}}
    run = scripted(
        "verifiers:vf_facts",
        adapter=FakeAdapter(policy=Calling(script)),
        env_options={"examples": 1, "config": config},
        output_dir=tmp_path,
    )
    await run.next_epoch()
    frame = run.trajectories()
    assert frame.error.isna().all()
    assert frame.reward.tolist() == [1.0] * 2
    assert run.messages().query("role == 'tool'").content.tolist() == ["the first program"] * 2
    run.close()


# ── clients at the gateway ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("client", ["chat", "train"])
async def test_ids_and_log_probabilities_are_those_of_the_policy(client):
    """Two questions, each with tool calls where the policy makes them: what verifiers has in its trace is what was sampled."""
    policy = LocalPolicy.load("embedded", deterministic=True)
    llm = PolicyLLM(policy, "tiny", SamplingParams(1.0, 12))
    options = {"client": client, "renderer_model": str(TOKENIZER)} if client == "train" else {}
    harness = {
        "id": "vf_sums",
        "tools": client == "chat",
    }  # their renderer for models that they do not know has no tools
    environment = Verifiers(sums(size=6, rounds=2, agent={"harness": harness}), options)
    serving = await environment.serving()
    calls = 0
    for place, row in enumerate(environment.rows("train")):
        with CallRecorder(EpisodeKey("train", 0, place, 0), seed=1).recording([policy]) as recorder, asking(llm):
            episode = await serving.env.run_episode(environment.task_of(row), serving.context("tiny"))
        assert episode.ok, episode.traces[0].errors
        sampled = [node for node in episode.traces[0].nodes if node.sampled]
        assert len(sampled) == len(recorder.calls) >= 2
        for call, node in zip(recorder.calls, sampled, strict=True):
            calls += 1
            with torch.no_grad():
                logits = policy.model(torch.tensor([[*call.prompt_ids, *call.response_ids]])).logits[0].double()
            scored = logits.log_softmax(-1)[len(call.prompt_ids) - 1 : -1]
            forward = scored.gather(-1, torch.tensor(call.response_ids)[:, None])[:, 0]
            assert np.abs(forward.numpy() - call.logprobs).max() < 1e-5
            if client == "train":
                ids = [token for token, trained in zip(node.token_ids, node.mask, strict=True) if trained]
                assert ids == call.response_ids
                assert node.logprobs == call.logprobs
        if client == "train":
            (branch,) = episode.traces[0].branches
            last = recorder.calls[-1]
            assert branch.token_ids == [*last.prompt_ids, *last.response_ids]
    assert calls >= 12
    await environment.aclose()
    await gateway().close_clients()


async def test_a_workflow_can_be_pickled_and_plays_elsewhere():
    environment = pickle.loads(pickle.dumps(Verifiers(sums(size=2), {}).workflow)).of
    row = Verifiers(sums(size=2), {}).rows("train")[1]
    assert environment.task_of(row).data.answer == row["answer"]
    assert environment.name == "vf_sums"
