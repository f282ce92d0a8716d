"""The server that speaks `art run`'s protocol: what requests become, what is trained, what is refused and how."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.netutil import bind_sockets

pytest.importorskip("torch")

from finetune_nb.backends.art_server import server as server_module
from finetune_nb.backends.art_server.payload import AnsweredCalls, SentGroup, collection_of
from finetune_nb.backends.art_server.server import ArtServer, serve
from finetune_nb.backends.local.adapter import LocalGRPOAdapter
from finetune_nb.backends.local.config import LocalGRPOConfig
from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.cli.main import main
from finetune_nb.errors import BackendError, ConfigError
from finetune_nb.training.batch import token_sequences

MODEL = {
    "name": "trainer_run",
    "project": "trainer_project",
    "entity": None,
    "config": None,
    "trainable": True,
    "base_path": ".art",
    "base_model": "Qwen/Qwen2.5-7B-Instruct",
    "_internal_config": {
        "init_args": None,
        "engine_args": None,
        "trainer_args": {"learning_rate": 0.0001, "beta": 0.1},
    },
}
SYSTEM = {"role": "system", "content": "Answer."}


class Client:
    """What the Toolkit's plugin and its agents ask."""

    def __init__(self, server: ArtServer, port: int) -> None:
        self.server, self.url = server, f"http://127.0.0.1:{port}"

    async def ask(self, path, body=None, **headers):
        content = None if body is None else json.dumps(body)
        method = "GET" if body is None else "POST"
        request = HTTPRequest(self.url + path, method, headers, content, request_timeout=120)
        return json.loads((await AsyncHTTPClient().fetch(request)).body)

    async def refused(self, path, body=None, **headers):
        with pytest.raises(HTTPClientError) as caught:
            await self.ask(path, body, **headers)
        return caught.value.code, json.loads(caught.value.response.body)

    async def chat(self, content, **options):
        messages = [SYSTEM, {"role": "user", "content": content}]
        body = {"model": "anything", "messages": messages, "max_tokens": 8, "temperature": 1.0, **options}
        return (await self.ask("/v1/chat/completions", body))["choices"][0]

    async def game(self, reward, questions=("1+1", "2+3")):
        """A trajectory as the Toolkit makes one of an agent that asks every turn by itself: one conversation."""
        said = [SYSTEM]
        for question in questions:
            choice = await self.chat(question)
            said += [{"role": "user", "content": question}, choice]
        return {"messages_and_choices": said, "tools": None, "additional_histories": [], "reward": reward}

    async def train(self, *groups, kl_penalty_coef=0.0, **changes):
        body = {
            "model": {**MODEL, **changes},
            "trajectory_groups": [{"trajectories": group, "exceptions": [], "metadata": {}} for group in groups],
            "config": {"learning_rate": 5e-05, "kl_penalty_coef": kl_penalty_coef},
            "dev_config": {},
            "verbose": False,
        }
        return await self.ask("/_train_model", body)


@asynccontextmanager
async def serving(**options):
    adapter = LocalGRPOAdapter(LocalGRPOConfig(threads=1))
    server = ArtServer(adapter, **options)
    http = server_module.http_server(server)
    sockets = bind_sockets(0, "127.0.0.1")
    http.add_sockets(sockets)
    try:
        yield Client(server, sockets[0].getsockname()[1])
    finally:
        http.stop()
        await http.close_all_connections()
        await adapter.aclose()


async def test_a_game_is_trained_on_the_prompts_and_ids_that_were_sampled():
    async with serving() as client:
        await client.ask("/register", MODEL)
        group = [await client.game(reward) for reward in (1.0, 0.0)]
        calls = [call for endpoint in client.server._endpoints for call in endpoint.episode.calls]
        sent = [SentGroup.model_validate({"trajectories": group})]
        collection, turns, unknown = collection_of(sent, AnsweredCalls(calls), client.server.policy, "r")
        assert (turns, unknown) == (4, 0)
        sequences = [s for t in collection.trajectories[0] for s in token_sequences(t, 1.0)]
        # Each turn stands behind the prompt that was seen, not behind the conversation that ART would render.
        assert [s.ids for s in sequences] == [[*call.prompt_ids, *call.response_ids] for call in calls]
        before = [p.detach().clone() for p in client.server.policy.model.parameters()]
        metrics = await client.train(group)
        assert metrics["num_gradient_steps"] == metrics["data/step_num_gradient_steps"] > 0
        assert metrics["loss/learning_rate"] == pytest.approx(1e-4)  # the user's, which stands in no request's config
        after = client.server.policy.model.parameters()
        assert any(not a.equal(b) for a, b in zip(before, after, strict=True))
        assert await client.ask("/_get_step", MODEL) == 1
        assert (await client.ask("/v1/models"))["data"][0]["id"] == "trainer_run@1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer_args", "asked", "used"),
    [({"beta": 0.25}, 0.0, 0.25), ({}, 0.5, 0.5), ({"beta": 0}, 0.5, 0.0), ({}, 0.0, 0.0)],
)
async def test_beta_of_the_config_is_the_weight_of_the_kl_divergence(trainer_args, asked, used):
    model = {"_internal_config": {"trainer_args": {"learning_rate": 1e-3, **trainer_args}}}
    async with serving() as client:
        for _ in range(2):  # in the first job the weights are still the reference's
            group = [await client.game(reward) for reward in (1.0, 0.0)]
            metrics = await client.train(group, kl_penalty_coef=asked, **model)
            assert client.server.adapter.adapter_config.kl_coef == used
        assert (metrics.get("loss/kl_policy_ref", 0.0) > 0) == (used > 0)


async def test_a_beta_that_is_no_weight_is_refused():
    async with serving() as client:
        group = [await client.game(reward) for reward in (1.0, 0.0)]
        body = {"_internal_config": {"trainer_args": {"beta": -1}}}
        with pytest.raises(HTTPClientError) as caught:
            await client.train(group, **body)
        assert "beta, the weight of the KL divergence, is -1" in json.loads(caught.value.response.body)["detail"]


async def test_a_game_sampled_with_alternatives_is_trained_on_as_any_other():
    async with serving() as client:
        choice = await client.chat("1+1", logprobs=True, top_logprobs=2)
        assert [len(each["top_logprobs"]) for each in choice["logprobs"]["content"]] == [2] * len(
            choice["logprobs"]["content"]
        )
        other = await client.chat("1+1", logprobs=True, top_logprobs=2)
        told = [
            {"messages_and_choices": [SYSTEM, {"role": "user", "content": "1+1"}, each], "reward": reward}
            for each, reward in ((choice, 1.0), (other, 0.0))
        ]
        assert (await client.train(told))["num_gradient_steps"] > 0


async def test_the_protocols_other_requests_are_answered_as_art_run_does():
    async with serving() as client:
        assert await client.ask("/healthcheck") == {"status": "ok"}
        assert await client.ask("/register", MODEL) is None
        assert await client.ask("/_get_step", MODEL) == 0
        assert await client.ask("/_prepare_backend_for_training", {"model": MODEL, "config": None}) == [
            "http://127.0.0.1:8000/v1",
            "default",
        ]
        assert await client.ask("/_delete_checkpoint_files", {"model": MODEL, "steps_to_keep": [0]}) is None
        assert await client.ask("/close", {}) is None
        assert (await client.refused("/_experimental_push_to_s3", {}))[0] == 501
        assert await client.refused("/_get_step", {"name": "a"}) == (422, {"detail": "project: Field required"})


async def test_log_probabilities_and_ids_come_unasked():
    async with serving() as client:
        choice = await client.chat("1+1")
        assert choice["logprobs"]["content"]
        assert all(token["token"].startswith("token_id:") for token in choice["logprobs"]["content"])
        same = await client.chat("1+1", logprobs=False)
        assert same["logprobs"]["content"]


async def test_what_was_not_sampled_here_is_not_trained_on_unless_it_is_asked_for():
    async with serving() as other:
        group = [await other.game(reward) for reward in (1.0, 0.0)]
    async with serving() as client:
        body = {"model": MODEL, "trajectory_groups": [{"trajectories": group}]}
        code, answer = await client.refused("/_train_model", body)
        assert code == 400
        assert "4 of 4 sampled turns were not sampled by this server" in answer["detail"]
        assert client.server.policy.version == 0
    async with serving(allow_inexact=True) as client:
        # The prompt is rendered anew: the whole conversation, which is not what was asked, and so the job notices.
        one_turn = [await other_turn(client, reward) for reward in (1.0, 0.0)]
        client.server._endpoints[-1].episode.calls.clear()
        assert (await client.train(one_turn))["num_gradient_steps"] > 0


async def other_turn(client, reward):
    return await client.game(reward, ["1+1"])


async def test_trajectories_of_weights_that_are_no_more_are_refused():
    async with serving() as client:
        group = [await client.game(reward) for reward in (1.0, 0.0)]
        await client.train(group)
        code, answer = await client.refused(
            "/_train_model", {"model": MODEL, "trajectory_groups": [{"trajectories": group}]}
        )
        assert (code, "were not sampled by this server" in answer["detail"]) == (400, True)


async def test_a_group_whose_rewards_are_alike_takes_no_step():
    async with serving() as client:
        metrics = await client.train([await client.game(1.0), await client.game(1.0)])
        assert metrics["num_gradient_steps"] == 0
        assert await client.ask("/_get_step", MODEL) == 0


async def test_another_model_is_not_trained_on_the_same_weights():
    async with serving() as client:
        await client.train([await client.game(1.0), await client.game(0.0)])
        code, answer = await client.refused("/register", {**MODEL, "name": "second"})
        assert code == 400
        assert "trains trainer_project/trainer_run" in answer["detail"]


async def test_every_step_is_written_and_can_be_loaded(tmp_path):
    async with serving(folder=tmp_path) as client:
        for _ in range(2):
            await client.train([await client.game(1.0), await client.game(0.0)])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0001", "0002"]
        loaded = LocalPolicy.load(str(tmp_path / "0002"), threads=1)
        trained = client.server.policy.model.state_dict()
        assert all(value.equal(trained[name]) for name, value in loaded.model.state_dict().items())
        await client.ask("/_delete_checkpoint_files", {"model": MODEL, "steps_to_keep": [2]})
        assert [path.name for path in tmp_path.iterdir()] == ["0002"]
    with pytest.raises(ConfigError, match="is not empty"):
        await serve(folder=tmp_path)


async def test_a_page_in_a_browser_is_refused():
    async with serving() as client:
        assert (await client.refused("/_get_step", MODEL, Origin="https://example.com"))[0] == 403
        assert (await client.refused("/v1/models", Host="rebound.example.com"))[0] == 403
        assert await client.ask("/healthcheck", Host="0.0.0.0:7999") == {"status": "ok"}


async def test_two_calls_with_the_same_tokens_are_told_apart_by_the_message_before():
    async with serving() as client:
        await client.chat("1+1")
        (call,) = client.server._endpoints[-1].episode.calls
        from dataclasses import replace

        other = replace(call, messages=[SYSTEM, {"role": "user", "content": "other"}], prompt_ids=[1, 2])
        tokens = [f"token_id:{i}" for i in call.response_ids]
        answered = AnsweredCalls([call, other])
        assert answered.find(tokens, call.logprobs, "1+1") is call
        assert answered.find(call.tokens, call.logprobs, "other") is other
        assert answered.find(tokens, call.logprobs, "neither") is None
        assert answered.find(tokens[:-1], call.logprobs[:-1], "1+1") is None


def test_a_turn_without_log_probabilities_is_named():
    group = SentGroup.model_validate(
        {"trajectories": [{"messages_and_choices": [{"message": {"content": "2"}}], "reward": 1.0}]}
    )
    with pytest.raises(BackendError, match="group 0, trajectory 0 has a choice without logprobs"):
        collection_of([group], AnsweredCalls(), None, "r")


def test_an_address_that_others_reach_is_refused(capsys):
    assert main(["art-server", "--host", "0.0.0.0"]) == 1
    assert "host is '0.0.0.0'; expected an address of this machine alone" in capsys.readouterr().err


async def test_a_port_that_is_taken_is_named():
    sockets = bind_sockets(0, "127.0.0.1")
    port = sockets[0].getsockname()[1]
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be had"):
        await asyncio.wait_for(serve(port=port), 120)
    sockets[0].close()


async def test_a_connection_that_sends_nothing_is_closed_after_a_time(monkeypatch):
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "BATCH_SECONDS", 0.3)
    async with serving() as client:
        host, port = client.url.removeprefix("http://").split(":")
        for sent in (b"", b"POST /train HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
