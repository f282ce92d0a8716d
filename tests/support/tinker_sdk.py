"""The Tinker backend with the real SDK, against a service on 127.0.0.1 that follows the wire format and really learns.

Run by test_tinker.py in an environment that has the SDK; by hand:

    <python with finetune_nb[tinker]> -m pytest tests/support/tinker_sdk.py -m ""

Against a server that runs already, this prints what it does and must end with "sampled, trained, saved, resumed" (for SkyRL's
server there are tests, in with_skyrl):

    <python with finetune_nb[tinker]> tests/support/tinker_sdk.py http://127.0.0.1:8000 <base model> [<tokenizer directory>]
"""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from tinker_service import LONGEST, MODEL, EngineError, Http, TinkerService, adapter_archive

import finetune_nb as ft
from finetune_nb.backends.tinker.adapter import TinkerAdapter
from finetune_nb.backends.tinker.config import TinkerConfig
from finetune_nb.backends.tinker.errors import Full, Lost
from finetune_nb.errors import BackendError
from finetune_nb.types import EpisodeItem, SamplingParams, Trajectory, TrajectoryCollection

PROMPT = [3, 10, 4]  # ends with the token that opens the assistant's turn
SERVER_FAILED = {"error": "a worker died", "category": "server"}


@pytest.fixture
def service():
    with TinkerService() as service:
        yield service


@pytest.fixture
async def adapters(service):
    """Makes adapters on the service; each is closed when the test is over."""
    made = []

    def make(**settings):
        config = TinkerConfig(
            **{
                **{"model": MODEL, "base_url": service.base_url, "learning_rate": 0.1, "retry_delay": 0.0},
                **{"slot_timeout": 0.0, **settings},
            }
        )
        made.append(TinkerAdapter(config, tokenizer=byte_tokenizer()))
        return made[-1]

    yield make
    for adapter in made:
        await adapter.aclose()


def reward_of(ids):
    return float(ids[0] % 2)


async def rollouts(adapter, examples=2, generations=8, tokens=3):
    async def one(example, generation):
        prompt = [3, 20 + example, 4]
        seed = 100 * example + generation
        sample = await adapter.policy.sample(prompt, SamplingParams(1.0, tokens), seed)
        metadata = {"prompt_token_ids": prompt, "token_ids": sample.ids, "temperature": 1.0}
        turn = EpisodeItem(role="assistant", content="", logprobs=sample.logprobs, metadata=metadata)
        known = {"id": example, "generation": generation, "policy_version": adapter.policy.version}
        return Trajectory(episode=[turn], reward=reward_of(sample.ids), metadata=known)

    groups = [asyncio.gather(*(one(e, g) for g in range(generations))) for e in range(examples)]
    return TrajectoryCollection(trajectories=[list(g) for g in await asyncio.gather(*groups)], run_id="run")


async def train(adapter, trajectories=None):
    trajectories = trajectories or await rollouts(adapter)
    return await adapter.wait_until_complete(await adapter.submit(trajectories))


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_seed_samples_the_same_reply_with_its_logprobs(adapters):
    policy = adapters().policy
    params = SamplingParams(1.0, 5)
    one, again, other = [await policy.sample(PROMPT, params, seed) for seed in (1, 1, 2**40 + 2)]
    assert one == again != other
    assert one.logprobs == pytest.approx([-math.log(262)] * len(one.ids))


async def test_a_reply_ends_at_the_end_token_and_where_the_model_is_full(adapters, service):
    policy = adapters().policy
    await policy.sample(PROMPT, SamplingParams(1.0, 1), 0)
    service.model.logits[4, 1] = 100.0  # the end token follows at once
    ended = await policy.sample(PROMPT, SamplingParams(1.0, 5), 0)
    assert (ended.ids, ended.finish_reason) == ([1], "stop")
    full = await policy.sample([7] * (LONGEST - 2), SamplingParams(1.0, 50), 0)
    assert (len(full.ids), full.finish_reason) == (2, "length")
    with pytest.raises(BackendError, match=f"holds {LONGEST}"):
        await policy.sample([7] * LONGEST, SamplingParams(1.0, 1), 0)


async def test_stop_texts_go_with_the_text_of_the_end_token(adapters, service):
    await adapters().policy.sample(PROMPT, SamplingParams(1.0, 2, ("!",)), 0)
    assert service.asked("asample")[-1]["sampling_params"]["stop"] == ["!", "<|end|>"]


async def test_a_reply_is_asked_for_again_after_the_service_failed(adapters, service):
    policy = adapters().policy
    service.trouble["asample"] = [SERVER_FAILED, SERVER_FAILED]
    assert (await policy.sample(PROMPT, SamplingParams(1.0, 2), 0)).ids
    service.trouble["asample"] = [SERVER_FAILED] * 3
    with pytest.raises(BackendError, match="a worker died"):
        await policy.sample(PROMPT, SamplingParams(1.0, 2), 0)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_service_is_given_the_very_tokens_that_were_sampled(adapters, service):
    def turn(prompt, ids, logprobs):
        metadata = {"prompt_token_ids": prompt, "token_ids": ids}
        return EpisodeItem(role="assistant", content="", logprobs=logprobs, metadata=metadata)

    two_turns = [turn([3, 9], [5, 6], [-1.0, -2.0]), turn([3, 9, 5, 6, 8], [7], [-3.0])]
    group = [
        Trajectory(episode=two_turns, reward=1.0, metadata={"id": "q"}),
        Trajectory(episode=[turn([3, 9], [8], [-0.5])], reward=0.0, metadata={"id": "q"}),
    ]
    adapter = adapters(scale_rewards=False, max_logprob_gap=None)  # these were made up
    await train(adapter, TrajectoryCollection(trajectories=[group], run_id="run"))
    (asked,) = service.asked("forward_backward")
    given = asked["forward_backward_input"]
    assert given["loss_fn"] == "importance_sampling" and "loss_fn_config" not in given
    datum = next(d for d in given["data"] if len(d["model_input"]["chunks"][0]["tokens"]) == 5)
    assert datum["model_input"]["chunks"][0]["tokens"] == [3, 9, 5, 6, 8]
    inputs = {name: tensor["data"] for name, tensor in datum["loss_fn_inputs"].items()}
    assert inputs["target_tokens"] == [9, 5, 6, 8, 7]
    assert inputs["logprobs"] == [0.0, -1.0, -2.0, 0.0, -3.0]
    assert inputs["advantages"] == pytest.approx([0.0, 0.125, 0.125, 0.0, 0.125])  # 0.5, over four sampled tokens
    assert inputs["weights"] == [0.0, 1.0, 1.0, 0.0, 1.0]


async def test_finished_job_tells_what_it_did_and_the_new_weights_are_sampled(adapters, service):
    adapter = adapters(optimizer_steps=4, inner_epochs=2, loss="ppo")
    trajectories = await rollouts(adapter)
    before = await adapter.policy.sample(PROMPT, SamplingParams(1.0, 1), 0)
    status = await train(adapter, trajectories)
    metrics = status.metadata["metrics"]
    assert (status.status, status.progress, status.metadata["policy_version"]) == ("completed", 100.0, 1)
    assert metrics["optimizer_steps"] == 8 == len(service.asked("optim_step"))
    assert metrics["trained_tokens"] == 2 * sum(
        len(t.episode[0].logprobs) for g in trajectories.trajectories for t in g
    )
    assert metrics["logprob_gap"] < 1e-6 < metrics["kl"]
    assert metrics["grad_norm"] > 0 and math.isfinite(metrics["loss"]) and math.isnan(metrics["reference_kl"])
    after = await adapter.policy.sample(PROMPT, SamplingParams(1.0, 1), 0)
    assert after.logprobs[0] == pytest.approx(service.model.logprobs(4)[after.ids[0]])
    assert after.logprobs[0] != before.logprobs[0]
    assert adapter.policy.version == 1


async def test_trajectories_of_older_weights_or_another_temperature_are_refused(adapters):
    adapter = adapters()
    trajectories = await rollouts(adapter)
    await train(adapter, trajectories)
    with pytest.raises(BackendError, match="version 0, older than version 1"):
        await adapter.submit(trajectories)
    warm = await rollouts(adapter)
    for trajectory in warm.trajectories[0]:
        trajectory.episode[0].metadata["temperature"] = 0.5
    with pytest.raises(BackendError, match=r"temperature 0\.5"):
        await adapter.submit(warm)


@pytest.mark.parametrize("failing", ["forward_backward", "optim_step"])
async def test_job_that_the_service_failed_in_is_begun_again_as_if_it_had_not(adapters, service, failing):
    """optim_step of a failed forward_backward moves the weights all the same: momentum."""
    adapter = adapters(optimizer_steps=2)
    first = await rollouts(adapter)
    await train(adapter, first)
    second = await rollouts(adapter)
    service.trouble[failing] = [None, SERVER_FAILED]
    status = await train(adapter, second)
    assert (status.status, status.metadata["metrics"]["optimizer_steps"]) == ("completed", 2)
    assert len(service.asked("load_weights")) == 1
    with TinkerService() as calm:
        other = TinkerAdapter(
            adapter.adapter_config.model_copy(update={"base_url": calm.base_url}), tokenizer=byte_tokenizer()
        )
        await train(other, first)
        await train(other, second)
        np.testing.assert_array_equal(calm.model.logits, service.model.logits)
        await other.aclose()


async def test_job_that_fails_for_good_leaves_the_policy_as_it_was(adapters, service):
    adapter = adapters(retries=1)
    await train(adapter)
    before = service.model.logits
    trajectories = await rollouts(adapter)
    service.trouble["forward_backward"] = [SERVER_FAILED] * 2
    status = await train(adapter, trajectories)
    assert status.status == "failed" and "a worker died" in status.message
    assert (adapter.policy.version, status.metadata["metrics"]["optimizer_steps"]) == (1, 0)
    again = await rollouts(adapter)
    np.testing.assert_array_equal(service.model.logits, before)
    assert (await train(adapter, again)).status == "completed"
    assert adapter.policy.version == 2


async def test_job_on_what_other_weights_sampled_fails_and_trains_nothing(adapters, service):
    adapter = adapters()
    trajectories = await rollouts(adapter)
    for group in trajectories.trajectories:
        for trajectory in group:
            trajectory.episode[0].logprobs = [value - 0.5 for value in trajectory.episode[0].logprobs]
    status = await train(adapter, trajectories)
    assert status.status == "failed" and "differ from those in sampling by 0.5" in status.message
    assert adapter.policy.version == 0
    assert (await train(adapter)).status == "completed"


async def test_what_the_service_refuses_is_not_tried_again(adapters, service):
    adapter = adapters()
    service.trouble["forward_backward"] = [{"error": "this loss is unknown", "category": "user"}]
    status = await train(adapter)
    assert status.status == "failed" and "this loss is unknown" in status.message
    assert len(service.asked("forward_backward")) == 1


async def test_rate_limits_and_full_queues_are_waited_for_and_told(adapters, service):
    adapter = adapters()
    trajectories = await rollouts(adapter)
    service.trouble["forward_backward"] = [Http(429, "slow down"), {"try_again": "paused_capacity", "times": 400}]
    ref = await adapter.submit(trajectories)
    deadline = time.monotonic() + 30
    while "paused_capacity" not in ((status := await adapter.status(ref)).message or ""):
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.05)
    assert status.status == "running"
    for wait in service.waiting.values():
        wait["times"] = 0
    assert (await adapter.wait_until_complete(ref)).status == "completed"
    assert len(service.asked("forward_backward")) == 2


async def test_canceled_job_stops_between_two_steps_and_keeps_what_it_made(adapters, service):
    adapter = adapters(optimizer_steps=8)
    trajectories = await rollouts(adapter)
    service.trouble["forward_backward"] = [None, {"try_again": "active", "times": 10**6}]
    ref = await adapter.submit(trajectories)
    while not service.waiting:
        await asyncio.sleep(0.02)
    await adapter.cancel(ref)
    for wait in service.waiting.values():
        wait["times"] = 0
    status = await adapter.wait_until_complete(ref)
    assert (status.status, status.metadata["metrics"]["optimizer_steps"], adapter.policy.version) == ("canceled", 2, 1)


# ── checkpoints, health ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_checkpoint_goes_on_as_if_nothing_had_happened(adapters, service, tmp_path):
    adapter = adapters(optimizer_steps=2)
    await train(adapter)
    assert await adapter.save_checkpoint(tmp_path / "epoch-000000") < 1000
    trajectories = await rollouts(adapter)
    await train(adapter, trajectories)
    straight = service.model.logits
    resumed = adapters(optimizer_steps=2)
    with pytest.raises(Full, match="Slots are held"):
        await resumed.load_checkpoint(tmp_path / "epoch-000000")
    await adapter.aclose()
    await resumed.load_checkpoint(tmp_path / "epoch-000000")
    assert resumed.policy.version == 1
    assert [r.episode for g in (await rollouts(resumed)).trajectories for r in g] == [
        r.episode for g in trajectories.trajectories for r in g
    ]
    await train(resumed, trajectories)
    np.testing.assert_array_equal(service.model.logits, straight)


async def test_a_session_that_the_service_forgot_is_begun_anew_from_what_was_saved(adapters, service, tmp_path):
    adapter = adapters()
    await train(adapter)
    await adapter.save_checkpoint(tmp_path / "saved")
    weights = service.model.logits
    for forgotten in (service.models, service.samplers, service.archives):
        forgotten.clear()
    trajectories = await rollouts(adapter)
    np.testing.assert_array_equal(service.model.logits, weights)
    service.models.clear()
    status = await train(adapter, trajectories)
    assert (status.status, adapter.policy.version) == ("completed", 2)


async def test_weights_that_are_gone_are_never_replaced_by_older_ones(adapters, service):
    adapter = adapters()
    await train(adapter)
    adapter._service.drop()  # as when a session times out
    with pytest.raises(BackendError, match="version 1 are gone"):
        await adapter.policy.sample(PROMPT, SamplingParams(), 0)


async def of_version(adapter, version):
    return await adapter.policy.sample(PROMPT, SamplingParams(max_tokens=4), 5, version=version)


@pytest.mark.parametrize("failing", [False, True])
async def test_a_version_that_is_kept_is_sampled_while_newer_ones_are_made(adapters, service, failing):
    service.shares_weights = False
    adapter = adapters(max_staleness=1, sample_while_training=True)
    trajectories = await rollouts(adapter)
    assert await adapter.keep_sampling() == 0
    before = await of_version(adapter, 0)
    if failing:  # the job is begun again in another session, and so is the sampler
        service.trouble["forward_backward"] = [SERVER_FAILED]
    await train(adapter, trajectories)
    assert adapter.policy.version == 1
    assert await of_version(adapter, 0) == before
    newest = await adapter.policy.sample(PROMPT, SamplingParams(max_tokens=4), 5)
    assert newest.logprobs != before.logprobs
    assert await of_version(adapter, 0) == before
    stale = await train(adapter, trajectories)
    assert stale.status == "completed" and stale.metadata["metrics"]["logprob_gap"] > 1e-3
    await adapter.keep_sampling()
    with pytest.raises(BackendError, match="no sampler of policy version 0"):
        await of_version(adapter, 0)


async def test_health_is_asked_of_the_service(adapters, service, caplog):
    assert await adapters().is_healthy()
    assert not service.models  # no slot is taken yet
    assert not await adapters(model="tiny/tabel").is_healthy()
    assert "Did you mean 'tiny/table'?" in caplog.text
    assert not await adapters(base_url="http://127.0.0.1:9").is_healthy()
    assert "no Tinker service answers at http://127.0.0.1:9" in caplog.text
    service.trouble["asample"] = [{"sequences": "in a new format"}]
    assert not await adapters().is_healthy()
    assert 'pip install "tinker==0.38.0"' in caplog.text
    service.trouble["asample"] = [{"error": "only models in training", "category": "user"}]
    assert await adapters().is_healthy()


# ── as unkind as the real ones ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_gradient_is_the_same_from_a_service_that_sums_and_from_one_that_averages(adapters, service, caplog):
    adapter = adapters(learning_rate=1.0)
    collected = await rollouts(adapter, tokens=4)
    for group in collected.trajectories:  # replies and prompts of many lengths
        for place, trajectory in enumerate(group):
            turn = trajectory.episode[0]
            turn.metadata["token_ids"] = turn.metadata["token_ids"][: 1 + place % 3]
            turn.logprobs = turn.logprobs[: 1 + place % 3]
            turn.metadata["prompt_token_ids"] = [3, *[9] * place, *turn.metadata["prompt_token_ids"][-1:]]
    first = await train(adapter, collected)
    assert caplog.text.count("set loss_reduction") == 1
    with TinkerService(mean=True) as averaging:
        other = adapters(learning_rate=1.0, base_url=averaging.base_url, loss_reduction="sequence_mean")
        second = await train(other, collected)
        np.testing.assert_allclose(averaging.model.mean, service.model.mean, atol=1e-9)
        for name in ("loss", "grad_norm", "entropy", "importance_ratio"):
            assert second.metadata["metrics"][name] == pytest.approx(first.metadata["metrics"][name], rel=1e-5)
    assert math.isfinite(first.metadata["metrics"]["loss"])
    assert caplog.text.count("set loss_reduction") == 1  # not of the one whose reduction was named


async def test_a_service_that_takes_no_weights_is_sent_none(adapters, service):
    service.takes_weights = False
    adapter = adapters(retries=0)
    assert (await train(adapter)).status == "completed"
    assert len(service.asked("forward_backward")) == 2
    assert (await train(adapter)).status == "completed"
    assert len(service.asked("forward_backward")) == 3


async def test_a_slot_is_waited_for_and_the_run_says_so(adapters, service):
    first, second = adapters(), adapters(slot_timeout=60.0)
    await first.policy.sample(PROMPT, SamplingParams(1.0, 1), 0)
    told = []
    second.tell = told.append
    reply = asyncio.ensure_future(second.policy.sample(PROMPT, SamplingParams(1.0, 1), 0))
    while not told:
        await asyncio.sleep(0.02)
    assert "waiting for one" in told[0] and not reply.done()
    await first.aclose()
    assert (await reply).ids and told[-1] is None


async def test_the_model_of_a_process_that_died_is_unloaded(adapters, service, tmp_path):
    """The slot would be held until the session times out, which no test waits for."""
    client = """
import asyncio, os, sys
from byte_tokenizer import byte_tokenizer
from finetune_nb.backends.tinker.adapter import TinkerAdapter, TinkerConfig
from finetune_nb.types import SamplingParams
adapter = TinkerAdapter(TinkerConfig(model=sys.argv[1], base_url=sys.argv[2]), tokenizer=byte_tokenizer())
asyncio.run(adapter.policy.sample([3, 10, 4], SamplingParams(1.0, 1), 0))
os._exit(9)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", client, MODEL, service.base_url]
    died = await asyncio.to_thread(subprocess.run, command, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert died.returncode == 9 and len(service.models) == 1
    assert (await adapters().policy.sample(PROMPT, SamplingParams(1.0, 1), 0)).ids
    assert len(service.models) == 1
    with pytest.raises(Full):  # the model of one that lives is left alone
        await adapters().policy.sample(PROMPT, SamplingParams(1.0, 1), 0)


async def test_a_state_that_is_gone_is_told_at_once_and_once(adapters, service, tmp_path):
    adapter = adapters()
    await train(adapter)
    await adapter.save_checkpoint(tmp_path / "saved")
    for forgotten in (service.models, service.samplers, service.archives, service.states):
        forgotten.clear()
    replies = [adapter.policy.sample(PROMPT, SamplingParams(1.0, 1), seed) for seed in range(32)]
    found = await asyncio.gather(*replies, return_exceptions=True)
    assert all(isinstance(each, Lost) and "no longer has what that checkpoint names" in str(each) for each in found)
    assert len(service.asked("load_weights")) == 1
    assert not service.models  # no slot is held for nothing


async def test_no_reply_is_sampled_between_two_steps_of_a_job(adapters, service):
    adapter = adapters(optimizer_steps=4)
    trajectories = await rollouts(adapter)
    service.trouble["forward_backward"] = [None, None, {"try_again": "active", "times": 10**6}]
    ref = await adapter.submit(trajectories)
    while not service.waiting:
        await asyncio.sleep(0.02)
    asked = len(service.asked("asample"))
    reply = asyncio.ensure_future(adapter.policy.sample(PROMPT, SamplingParams(1.0, 3), 5))
    await asyncio.sleep(0.3)
    assert not reply.done() and len(service.asked("asample")) == asked
    for wait in service.waiting.values():
        wait["times"] = 0
    assert (await adapter.wait_until_complete(ref)).status == "completed"
    sample = await reply
    assert sample.logprobs[0] == pytest.approx(service.model.logprobs(4)[sample.ids[0]], abs=1e-6)


async def test_prompts_are_checked_against_the_base_model_where_the_service_says_nothing(adapters, service, tmp_path):
    service.tells_length = False
    with pytest.raises(BackendError, match="holds 64 together"):
        await adapters(context_length=64).policy.sample([7] * 64, SamplingParams(1.0, 1), 0)
    settings = {"model_type": "qwen3", "max_position_embeddings": 48}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    service.models.clear()
    with pytest.raises(BackendError, match="holds 48 together"):
        await adapters(base=str(tmp_path)).policy.sample([7] * 48, SamplingParams(1.0, 1), 0)


async def test_what_is_saved_on_the_service_follows_the_checkpoints(adapters, service, tmp_path):
    adapter = adapters()
    places = [tmp_path / "runs" / "run" / "checkpoints" / f"epoch-{epoch:06}" for epoch in range(3)]
    for place in places:
        await train(adapter)
        await adapter.save_checkpoint(place)
        await rollouts(adapter, 1, 1)
    assert len(service.states) == 3  # those before each job were deleted with the next one
    assert len(service.archives) == 1
    adapter.forget_checkpoints(places[:1])
    assert len(service.states) == 2
    branch = tmp_path / "runs" / "branch" / "checkpoints" / places[1].name
    shutil.copytree(places[1], branch)
    adapter.forget_checkpoints(places[:2])  # the first is gone already, the second is the branch's too
    assert len(service.states) == 2
    adapter.forget_checkpoints([branch, places[1]])
    assert len(service.states) == 1
    adapter.forget_checkpoints(places[2:])  # training would continue from there until the adapter is closed
    assert len(service.states) == 1
    await adapter.aclose()
    assert not service.states and not service.archives


async def test_the_adapter_comes_home_from_the_service(adapters, service, tmp_path):
    adapter = adapters()
    await train(adapter)
    saved = len(service.archives)
    await adapter.save(tmp_path / "model", prove=False)
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["base_model_name_or_path"]) == (["q_proj"], 4, MODEL)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert len(service.archives) == saved  # the one that was fetched is deleted
    service.packed = adapter_archive({"adapter_config.json": b"{}"})
    with pytest.raises(BackendError, match="no adapter_model"):
        await adapter.save(tmp_path / "other", prove=False)
    assert not (tmp_path / "other").exists()


async def test_a_failed_future_is_sorted_as_a_refused_request_is(adapters, service):
    adapter = adapters(retries=0)
    service.trouble["forward_backward"] = [EngineError("Loss functions ['ppo'] are not supported by the JAX backend")]
    status = await train(adapter)
    assert status.status == "failed" and "not supported by the JAX backend" in status.message
    assert "Is this SDK" not in status.message


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def ask(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def ask_through_the_gateway(question, llm):
    body = {"model": "policy", "messages": [{"role": "user", "content": question}]}
    headers = {"Authorization": f"Bearer {llm.api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{llm.base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def is_printable(item):
    return float(len(item.output_obj) == 1 and " " <= item.output_obj <= "~")  # a third of all tokens


ROWS = [{"id": i, "question": f"letter {i}?", "answer": ""} for i in range(4)]


async def test_an_epoch_ahead_needs_samplers_with_weights_of_their_own(make_run):
    run = make_run(name="ahead", max_staleness=1, sample_while_training=None)
    with pytest.raises(ft.ConfigError, match="sample_while_training: true if its samplers keep"):
        await run.next_epoch()


@pytest.fixture
def make_run(service, tmp_path, closing, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-top-secret")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def make(workflow=ask, max_staleness=0, sample_while_training=True, **options):
        config = TinkerConfig(
            model=MODEL,
            tokenizer=str(tmp_path / "tokenizer"),
            base_url=service.base_url,
            learning_rate=3.0,
            max_staleness=max_staleness,
            sample_while_training=(sample_while_training if max_staleness else None),
        )
        settings = {"generations": 16, "sampling": {"max_tokens": 1}, "output_dir": tmp_path, "seed": 1, **options}
        return closing(ft.Run(workflow, is_printable, ROWS, adapter=TinkerAdapter(config, seed=1), **settings))

    return make


async def test_a_run_of_a_few_epochs_raises_the_reward_and_goes_on_after_a_restart(
    make_run, service, tmp_path, closing
):
    run = make_run(name="letters")
    for _ in range(4):
        await run.next_epoch()
    rewards = run.epochs().mean_reward.tolist()
    print(f"mean reward of 64 rollouts: {' '.join(f'{r:.2f}' for r in rewards)}")
    assert rewards[0] < 0.5 and rewards[-1] > 0.8
    assert run.records[-1].policy_versions == (3, 4)
    weights = service.model.logits
    run.close()
    assert not service.models  # its slot is free again
    assert service.keys == {"tml-top-secret"}
    assert not [p for p in (tmp_path / "letters").rglob("*") if p.is_file() and b"tml-top-secret" in p.read_bytes()]
    again = closing(ft.Run.open(tmp_path / "letters", workflow=ask, reward=is_printable, dataset=ROWS))
    await again.chat("letter?")
    np.testing.assert_array_equal(service.model.logits, weights)
    epoch = await again.next_epoch()
    assert epoch.index == 4 and epoch.metrics.mean_reward > 0.8
    service.slots = 2
    branch = closing(again.fork(epoch=1))
    branched = await branch.next_epoch()
    assert branched.index == 2 and branched.policy_versions == (2, 3)


async def test_a_run_learns_from_what_was_sampled_while_the_epoch_before_trained(make_run, service, tmp_path):
    service.shares_weights = False
    run = make_run(name="ahead", max_staleness=1)
    run.start(6)
    await run.wait_async()
    rewards = run.epochs().mean_reward.tolist()
    print(f"mean reward of 64 rollouts, one version behind: {' '.join(f'{r:.2f}' for r in rewards)}")
    # Once all replies are right nothing is trained, and what is sampled is of the newest weights again.
    assert run.epochs().version_lag.tolist()[:3] == [0, 1, 1]
    assert rewards[0] < 0.5 and rewards[-1] > 0.8


async def test_a_run_that_is_deleted_leaves_nothing_on_the_service(make_run, service, tmp_path, closing, caplog):
    run = make_run(name="letters", generations=4)
    await run.next_epoch()
    assert len(service.states) == 1
    run.delete()
    assert not service.states and not service.archives and not service.models
    run = make_run(name="letters", generations=4)
    await run.next_epoch()
    run.close()
    assert len(service.states) == 1
    closing(ft.Run.open(tmp_path / "letters")).delete()  # by its config alone
    assert not service.states
    run = make_run(name="unreachable", generations=4)
    await run.next_epoch()
    run.close()
    service.__exit__()
    run.delete()
    assert "stays on the service" in caplog.text and not (tmp_path / "unreachable").exists()
    service.__enter__()


async def test_agents_on_other_libraries_are_recorded_exactly(make_run, service):
    run = make_run(ask_through_the_gateway)
    epoch = await run.next_epoch()
    trained = [d for asked in service.asked("forward_backward") for d in asked["forward_backward_input"]["data"]]
    assert epoch.job.status == "completed" and trained
    prompts = [asked["prompt"]["chunks"][0]["tokens"] for asked in service.asked("asample")]
    assert all(d["model_input"]["chunks"][0]["tokens"] in prompts for d in trained)  # replies have one token


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def against_skyrl(url, model, tokenizer=None):
    """One epoch's worth of everything that is asked of a service, against one that is running at `url`."""
    config = TinkerConfig(model=model, tokenizer=tokenizer, base_url=url, rank=8, learning_rate=1e-3, optimizer_steps=2)
    adapter = TinkerAdapter(config)
    assert await adapter.is_healthy(), "see the log"
    prompt = adapter.policy.render([{"role": "user", "content": "Say something."}])
    rng = np.random.default_rng(0)
    group = []
    for generation in range(4):
        sample = await adapter.policy.sample(prompt, SamplingParams(1.0, 16), generation)
        print(f"{sample.finish_reason:>7} {''.join(adapter.policy.tokens(sample.ids))!r}", flush=True)
        metadata = {"prompt_token_ids": prompt, "token_ids": sample.ids, "temperature": 1.0}
        turn = EpisodeItem(role="assistant", content="", logprobs=sample.logprobs, metadata=metadata)
        known = {"id": 0, "generation": generation, "policy_version": 0}
        group.append(Trajectory(episode=[turn], reward=float(rng.random()), metadata=known))
    status = await train(adapter, TrajectoryCollection(trajectories=[group], run_id="by-hand"))
    print(status.status, status.message, status.metadata["metrics"], flush=True)
    assert status.status == "completed" and adapter.policy.version == 1
    await adapter.policy.sample(prompt, SamplingParams(1.0, 4), 0)
    place = f"{time.strftime('%Y%m%d-%H%M%S')}-tinker-checkpoint"
    await adapter.save_checkpoint(place)
    await adapter.aclose()
    resumed = TinkerAdapter(config)
    await resumed.load_checkpoint(place)
    await resumed.policy.sample(prompt, SamplingParams(1.0, 4), 0)
    await resumed.aclose()
    print(f"sampled, trained, saved, resumed ({place})")


async def test_the_proof_by_hand_passes_here_too(service, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("tokenizer")
    await against_skyrl(service.base_url, MODEL, "tokenizer")
    assert "sampled, trained, saved, resumed" in capsys.readouterr().out


if __name__ == "__main__":
    asyncio.run(against_skyrl(*sys.argv[1:]))
