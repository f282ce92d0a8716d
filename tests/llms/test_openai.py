"""`_type: openai`, the real client against a server on this machine: what is sent, what is recorded, and what is said when
something goes wrong, without ever saying the key."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import traceback

import pytest

pytest.importorskip("openai")

from loopback import LoopbackServer, Refusal

import finetune_nb as ft
from finetune_nb.analysis.messages import tokens_of
from finetune_nb.config import EvaluatorBaseConfig, FunctionBaseConfig, TrainerAdapterConfig
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.openai import OpenAIModelConfig
from finetune_nb.redaction import MASK, remember_secret
from finetune_nb.rollouts.episodes import episode_from_steps
from finetune_nb.testing import FakeAdapter, sums
from finetune_nb.types import EpisodeKey, EvalInputItem

KEY = "sk-loopback-3f9a7c51d2"
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
CALL = {"id": "call_7", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}


class LoopbackAgentConfig(FunctionBaseConfig, name="loopback_agent"):
    llm: str


class LoopbackRewardConfig(EvaluatorBaseConfig, name="loopback_reward"):
    pass


class LoopbackAdapterConfig(TrainerAdapterConfig, name="loopback_adapter"):
    pass


@ft.register_function(config_type=LoopbackAgentConfig)
async def loopback_agent(config, builder):
    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    yield solve


@ft.register_evaluator(config_type=LoopbackRewardConfig)
async def loopback_reward(config, builder):
    yield lambda item: float(item.output_obj == item.expected_output_obj)


@ft.register_trainer_adapter(config_type=LoopbackAdapterConfig)
async def loopback_adapter(config, builder):
    yield FakeAdapter(config)


def coin(request):
    """Right or wrong, by the request's seed."""
    a, b = request.body["messages"][-1]["content"].split("+")
    return str(int(a) + int(b) + request.body["seed"] % 2)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPBACK_API_KEY", KEY)
    (tmp_path / "train.json").write_text(json.dumps(sums(4)))
    runs = []

    def make(base_url, generations=2, max_retries=0, **llm):
        run = ft.Run.from_config(
            {
                "llms": {
                    "remote": {
                        "_type": "openai",
                        "model_name": "tiny",
                        "base_url": base_url,
                        "api_key": "${LOOPBACK_API_KEY}",
                        "max_retries": max_retries,
                        **llm,
                    }
                },
                "workflow": {"_type": "loopback_agent", "llm": "remote"},
                "eval": {
                    "general": {"dataset": {"_type": "json", "file_path": str(tmp_path / "train.json")}},
                    "evaluators": {"right": {"_type": "loopback_reward"}},
                },
                "trajectory_builders": {"builder": {"_type": "eval_traj_builder", "num_generations": generations}},
                "trainer_adapters": {"adapter": {"_type": "loopback_adapter"}},
                "trainers": {"trainer": {"_type": "epoch_trainer"}},
                "finetuning": {
                    "enabled": True,
                    "trainer": "trainer",
                    "trajectory_builder": "builder",
                    "trainer_adapter": "adapter",
                    "reward_function": {"name": "right"},
                    "output_dir": str(tmp_path / "runs"),
                },
            }
        )
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.close()


@pytest.fixture
async def remote():
    """`await remote(server, ...)` is an llm of that server and an episode that records it."""
    builders = []

    async def connect(server, **options):
        settings = {"_type": "openai", "model_name": "tiny", "base_url": server.base_url, "api_key": KEY, **options}
        builder = ft.Builder(ft.load_config({"llms": {"remote": settings}}))
        builders.append(builder)
        return await builder.get_llm("remote"), CallRecorder(EpisodeKey("train", 3, 1, 2), seed=5)

    yield connect
    for builder in builders:
        await builder.close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ── what is sent, what is recorded ───────────────────────────────────────────────────────────────────────────────────


async def test_a_call_sends_messages_tools_logprobs_seed_sampling_and_key(remote):
    with LoopbackServer() as server:
        llm, episode = await remote(server, temperature=0.7, top_p=0.9, max_tokens=33)
        with episode.recording():
            await llm.chat([{"role": "user", "content": "3+4"}], tools=[TOOL], stop=("\n",))
            await llm.chat([{"role": "user", "content": "again"}])
    first, second = server.requests
    assert first.headers["authorization"] == f"Bearer {KEY}"
    seeds = [request.body.pop("seed") for request in (first, second)]
    assert first.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "3+4"}],
        "tools": [TOOL],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 33,
        "stop": ["\n"],
        "logprobs": True,
        "return_token_ids": True,
    }
    assert "tools" not in second.body
    assert "stop" not in second.body
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**31 for seed in seeds)


async def test_seeds_are_repeatable_and_can_be_set(remote):
    async def seeds(**options):
        with LoopbackServer() as server:
            llm, episode = await remote(server, **options)
            with episode.recording():
                for _ in range(2):
                    await llm.chat([{"role": "user", "content": "3+4"}])
            return [request.body["seed"] for request in server.requests]

    assert await seeds() == await seeds()
    assert await seeds(seed=100) == [100, 101]


async def test_a_call_is_recorded_exactly_where_the_server_gives_ids(remote):
    with LoopbackServer(lambda request: "seven") as server:
        llm, episode = await remote(server)
        with episode.recording():
            reply = await llm.chat([{"role": "user", "content": "3+4"}])
    (call,) = episode.calls
    assert (reply.content, reply.finish_reason) == ("seven", "stop")
    assert call.exact
    assert call.episode == EpisodeKey("train", 3, 1, 2)
    assert (call.model, call.sequence, call.policy_version) == ("tiny", 0, None)
    assert call.messages == [{"role": "user", "content": "3+4"}]
    assert call.reply == {"role": "assistant", "content": "seven"}
    assert call.prompt_ids == [ord(c) for c in "3+4"]
    assert call.response_ids == [ord(c) for c in "seven"]
    assert call.tokens == list("seven")
    assert call.logprobs == pytest.approx([-0.5, -0.51, -0.52, -0.53, -0.54])
    assert call.seconds > 0


@pytest.mark.parametrize(("server_gives", "options"), [(False, {}), (True, {"return_token_ids": False})])
async def test_a_call_without_ids_is_recorded_but_is_not_exact(remote, server_gives, options):
    with LoopbackServer(token_ids=server_gives) as server:
        llm, episode = await remote(server, **options)
        with episode.recording():
            await llm.chat([{"role": "user", "content": "3+4"}])
    (call,) = episode.calls
    assert not call.exact
    assert (call.prompt_ids, call.response_ids) == (None, None)
    assert call.logprobs == pytest.approx([-0.5, -0.51])


async def test_tool_calls_are_read_recorded_and_can_be_answered(remote):
    def agent(request):
        if request.body["messages"][-1]["role"] == "tool":
            return "it is " + request.body["messages"][-1]["content"]
        return {"role": "assistant", "content": None, "tool_calls": [CALL]}

    with LoopbackServer(agent) as server:
        llm, episode = await remote(server)
        with episode.recording():
            messages = [{"role": "user", "content": "3+4"}]
            reply = await llm.chat(messages, tools=[TOOL])
            (tool_call,) = reply.tool_calls
            messages += [reply, {"role": "tool", "tool_call_id": tool_call.id, "content": "7"}]
            answer = await llm.chat(messages, tools=[TOOL])
    assert (tool_call.id, tool_call.name, tool_call.arguments) == ("call_7", "add", {"a": 3})
    assert (reply.content, reply.finish_reason) == ("", "tool_calls")
    assert answer.content == "it is 7"
    assert episode.calls[0].reply["tool_calls"] == [CALL]
    assert server.requests[1].body["messages"] == [
        {"role": "user", "content": "3+4"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_7", "content": "7"},
    ]


async def test_what_the_model_thought_and_nearly_said_is_recorded_and_shown(remote):
    for name in ("reasoning_content", "reasoning"):
        with LoopbackServer(
            lambda request, name=name: {"role": "assistant", "content": "7", name: "3 and 4"}
        ) as server:
            llm, episode = await remote(server, top_logprobs=2)
            with episode.recording():
                reply = await llm.chat([{"role": "user", "content": "3+4"}])
        assert (server.requests[0].body["logprobs"], server.requests[0].body["top_logprobs"]) == (True, 2)
        assert reply.message == {"role": "assistant", "content": "7", "reasoning_content": "3 and 4"}
        assert episode.calls[0].top_logprobs == [{"7": -0.5, "α": -3.0}]
    item = EvalInputItem(
        id="q", input_obj="", expected_output_obj="", full_dataset_entry={}, trajectory=episode.steps()
    )
    turn = episode_from_steps(item.trajectory)[0][-1]
    assert turn.metadata["reasoning_content"] == "3 and 4"
    (token,) = tokens_of(turn)
    assert (token.text, token.logprob, token.alternatives) == ("7", -0.5, (("α", -3.0),))
    assert 0 < token.entropy < 1


async def test_without_top_logprobs_none_are_asked_for_or_recorded(remote):
    with LoopbackServer() as server:
        llm, episode = await remote(server)
        with episode.recording():
            await llm.chat([{"role": "user", "content": "3+4"}])
    assert "top_logprobs" not in server.requests[0].body
    assert episode.calls[0].top_logprobs is None


async def test_alternatives_that_were_asked_for_and_not_returned_are_one_warning(remote, caplog):
    def without(request):
        request.body.pop("top_logprobs")  # so that the server returns logprobs alone
        return "7"

    with LoopbackServer(without) as server:
        llm, episode = await remote(server, top_logprobs=2)
        with episode.recording():
            for _ in range(3):
                await llm.chat([{"role": "user", "content": "3+4"}])
    assert episode.calls[0].top_logprobs is None
    assert caplog.text.count("asked for top_logprobs=2 and returned none") == 1


def test_alternatives_without_logprobs_are_refused():
    with pytest.raises(ValueError, match="top_logprobs is 2 and logprobs is False"):
        OpenAIModelConfig(model="m", logprobs=False, top_logprobs=2)


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_epoch_of_a_run_has_ids_and_logprobs_of_every_turn(make_run):
    with LoopbackServer(coin) as server:
        epoch = await make_run(server.base_url).next_epoch()
    assert epoch.metrics.trajectories == len(server.requests) == 8
    assert epoch.job.status == "completed"
    assert len({request.body["seed"] for request in server.requests}) == 8
    for trajectory in (t for group in epoch.collection.trajectories for t in group):
        question, answer = trajectory.episode
        assert answer.metadata["exact"]
        assert answer.metadata["token_ids"] == [ord(c) for c in answer.content]
        assert answer.metadata["prompt_token_ids"] == [ord(c) for c in question.content]
        assert len(answer.logprobs) == len(answer.content)
        assert trajectory.metadata["policy_version"] is None


async def test_a_server_without_logprobs_makes_failures_that_say_so(make_run):
    with LoopbackServer(coin, logprobs=False) as server:
        run = make_run(server.base_url)
        epoch = await run.next_epoch()
    assert epoch.job is None
    assert epoch.metrics.failures == 8
    for failure in epoch.collection.failures:
        assert failure.error.startswith("MissingLogprobs: ")
        assert "sampled without logprobs" in failure.error
        assert len(failure.steps) == 1  # the call can still be looked at
    assert "MissingLogprobs" in epoch.reason


async def test_a_busy_server_is_asked_again(make_run):
    refusals = []

    def busy_twice(request):
        if len(refusals) < 2:
            refusals.append(request)
            return Refusal(503, "busy")
        return coin(request)

    with LoopbackServer(busy_twice) as server:
        epoch = await make_run(server.base_url, max_retries=2).next_epoch()
    assert epoch.metrics.failures == 0
    assert len(server.requests) == 10


async def test_a_server_that_stays_busy_makes_failures_that_say_so(make_run):
    with LoopbackServer(lambda request: Refusal(503, "busy")) as server:
        epoch = await make_run(server.base_url, generations=1, max_retries=1).next_epoch()
    assert epoch.metrics.failures == 4
    assert len(server.requests) == 8
    assert all("503" in failure.error for failure in epoch.collection.failures)


async def test_refused_connections_are_failures_and_the_run_goes_on(make_run):
    run = make_run(f"http://127.0.0.1:{closed_port()}/v1")
    first = await run.next_epoch()
    assert first.metrics.failures == 8
    assert first.job is None
    assert all("APIConnectionError" in failure.error for failure in first.collection.failures)
    assert "all 8 rollouts failed" in first.reason
    assert (await run.next_epoch()).index == 1
    assert run.state == "ready"


async def test_some_failed_requests_leave_the_other_rollouts(make_run):
    def sometimes(request):
        return Refusal(500, "boom") if request.body["seed"] % 3 == 0 else coin(request)

    with LoopbackServer(sometimes) as server:
        epoch = await make_run(server.base_url, generations=6).next_epoch()
    refused = sum(request.body["seed"] % 3 == 0 for request in server.requests)
    assert 0 < refused < 24
    assert epoch.metrics.failures == refused
    assert epoch.metrics.trajectories == 24 - refused
    assert epoch.job.status == "completed"


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_key_is_sent_and_otherwise_nowhere_to_be_seen(make_run, tmp_path, caplog):
    def indiscreet(request):
        return Refusal(401, f"Incorrect API key provided: {request.headers['authorization']}")

    with caplog.at_level(logging.DEBUG), LoopbackServer(indiscreet) as server:
        run = make_run(server.base_url)
        epoch = await run.next_epoch()
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
        seen = [
            repr(run),
            run._repr_html_(),
            repr(run.config),
            run.config._repr_html_(),
            repr(run.config.llms["remote"]),
            str(run.config.llms),
            repr(epoch.collection.failures),
            epoch.reason,
            epoch._repr_html_(),
            run.trajectories().to_json(),
            json.dumps(run.config.stored()),
            caplog.text,
            *(repr(vars(record)) for record in caplog.records),
            *(path.read_bytes().decode("latin-1") for path in (tmp_path / "runs").rglob("*") if path.is_file()),
        ]
        llm = run._driver.components.ready("llm_provider", "remote")
        seen += [repr(llm), repr(llm._config), str(vars(llm))]
    assert "401" in epoch.reason
    assert MASK in epoch.reason
    assert [text[:300] for text in seen if KEY in text] == []
    assert run.config.stored()["llms"]["remote"]["api_key"] == "${LOOPBACK_API_KEY}"


async def test_a_key_that_an_error_quotes_is_hidden_in_records_and_in_the_log(tmp_path, caplog):
    class Indiscreet(ft.EvalTrajectoryBuilder):
        evaluations = 0

        async def run_eval(self):
            self.evaluations += 1
            if self.evaluations == 1:
                raise RuntimeError(f"refused {KEY}")
            return await super().run_eval()

    def judge(item):
        raise RuntimeError(f"the judge refused {KEY}")

    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    remember_secret(KEY)
    builder = Indiscreet(ft.EvalTrajectoryBuilderConfig(num_generations=2))
    run = ft.Run(solve, judge, sums(2), builder=builder, adapter=FakeAdapter(), output_dir=tmp_path)
    epoch = await run.next_epoch()
    await asyncio.to_thread(run.close)
    (failure,) = epoch.collection.failures
    assert failure.error == f"RuntimeError: refused {MASK}"
    errors = [t.metadata["reward_error"] for group in epoch.collection.trajectories for t in group]
    assert errors == [f"RuntimeError: the judge refused {MASK}"] * 2
    assert "generation 0 failed" in caplog.text
    assert KEY not in caplog.text


async def test_a_key_that_a_server_repeats_reaches_no_cell(make_run):
    with LoopbackServer(lambda request: Refusal(401, f"no entry with {request.headers['authorization']}")) as server:
        run = make_run(server.base_url)
        with pytest.raises(Exception, match="no entry with") as caught:
            await run.chat("hello")
    shown = "".join(traceback.format_exception(caught.value)) + repr(run) + run._repr_html_()
    assert MASK in shown
    assert KEY not in shown


async def test_a_key_written_into_the_config_is_masked_where_it_is_stored():
    config = ft.load_config({"llms": {"remote": {"_type": "openai", "model_name": "tiny", "api_key": KEY}}})
    assert config.stored()["llms"]["remote"]["api_key"] == MASK
    assert KEY not in repr(config)
    with pytest.raises(ft.ConfigError) as caught:
        ft.load_config({"llms": {"remote": {"_type": "openai", "model_name": "tiny", "api_key": [KEY]}}})
    assert KEY not in str(caught.value)


async def test_a_server_of_ones_own_is_never_sent_the_key_of_openai(remote, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-meant-for-openai")
    with LoopbackServer() as server:
        llm, episode = await remote(server, api_key=None)
        with episode.recording():
            await llm.chat([{"role": "user", "content": "3+4"}])
    assert "sk-meant-for-openai" not in str(server.requests)
