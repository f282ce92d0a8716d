"""The local training backend: what it learns from, what it refuses, and the life of its jobs."""

import asyncio
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sampled_turns import PROMPT, by_first_token, collection, rollouts, train, trajectory, turn  # noqa: E402
from tiny_models import byte_tokenizer, random_model, weights  # noqa: E402

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.forward import micro_batches  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import BackendError, MissingLogprobs, StalePolicy  # noqa: E402
from finetune_nb.training.batch import token_sequences, training_batch  # noqa: E402
from finetune_nb.types import (  # noqa: E402
    DPOItem,
    EpisodeItem,
    SamplingParams,
    TrainingJobRef,
)

HERE = Path(__file__).parent


def adapter(kind="llama", seed=0, deterministic=False, model=None, **settings):
    policy = LocalPolicy(model or random_model(kind), byte_tokenizer(), deterministic=deterministic)
    return LocalGRPOAdapter(LocalGRPOConfig(**settings), seed, deterministic, policy=policy)


# ── trajectories as sequences ────────────────────────────────────────────────────────────────────────────────────────


def test_turns_that_carry_a_conversation_on_become_one_sequence():
    (sequence,) = token_sequences(
        trajectory(1.0, turn([3, 4], [5, 6], [-1.0, -2.0]), turn([3, 4, 5, 6, 7], [8], [-3.0]))
    )
    assert sequence.ids == [3, 4, 5, 6, 7, 8]
    assert sequence.sampled == [False, False, True, True, False, True]
    assert sequence.logprobs == [0.0, 0.0, -1.0, -2.0, 0.0, -3.0]


def test_turn_whose_history_was_rewritten_begins_a_sequence_of_its_own():
    first, second = token_sequences(trajectory(1.0, turn([3, 4], [5, 6], [-1, -2]), turn([3, 4, 5, 9], [8], [-3])))
    assert (first.ids, second.ids) == ([3, 4, 5, 6], [3, 4, 5, 9, 8])
    assert second.sampled == [False] * 4 + [True]


def test_two_conversations_in_turns_become_two_sequences():
    one, other = [turn([3], [5], [-1]), turn([3, 5, 4], [6], [-1])], [turn([9], [5], [-1]), turn([9, 5, 4], [6], [-1])]
    sequences = token_sequences(trajectory(1.0, one[0], other[0], one[1], other[1]))
    assert [s.ids for s in sequences] == [[3, 5, 4, 6], [9, 5, 4, 6]]


def test_several_replies_to_one_prompt_and_other_temperatures_are_kept_apart():
    sequences = token_sequences(trajectory(1.0, turn([3], [5], [-1]), turn([3], [6], [-1])))
    assert [s.ids for s in sequences] == [[3, 5], [3, 6]]
    hot = turn([3, 5], [6], [-1], temperature=2.0)
    assert [s.temperature for s in token_sequences(trajectory(1.0, turn([3], [5], [-1]), hot))] == [1.0, 2.0]
    (greedy,) = token_sequences(trajectory(1.0, turn([3], [5], [-1], temperature=0)))
    assert greedy.temperature == 1.0


def test_turn_with_empty_logprobs_is_context():
    given = EpisodeItem(role="assistant", content="given", logprobs=[])
    user = EpisodeItem(role="user", content="hello")
    (sequence,) = token_sequences(trajectory(1.0, given, user, turn([3, 4], [5], [-1.0])))
    assert sequence.ids == [3, 4, 5]
    assert token_sequences(trajectory(1.0, given)) == []


def test_openai_logprobs_are_understood():
    item = turn([3], [5, 6], {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]})
    assert token_sequences(trajectory(1.0, item))[0].logprobs == [0.0, -0.5, -0.25]


@pytest.mark.parametrize(
    ("item", "error", "reason"),
    [
        (EpisodeItem(role="assistant", content="a", logprobs=[-1.0]), BackendError, "no metadata.*token_ids"),
        (turn(None, [5], [-1.0]), BackendError, "prompt_token_ids"),
        (turn([3], [5, 6], [-1.0]), BackendError, "2 token ids but 1 logprobs"),
        (turn([3], [5], [math.nan]), BackendError, "not finite"),
        (turn([3], [-5], [-1.0]), BackendError, "whole numbers"),
        (turn([3], ["5"], [-1.0]), BackendError, "whole numbers"),
        (turn([3], [5], {"content": None}), MissingLogprobs, "no logprobs"),
        (DPOItem(prompt="a", chosen_response="b", rejected_response="c"), BackendError, "preference"),
    ],
)
def test_turn_that_cannot_be_trained_on_is_refused_with_its_place(item, error, reason):
    with pytest.raises(error, match=reason) as raised:
        token_sequences(trajectory(1.0, item, example="q17"))
    assert isinstance(item, DPOItem) or "'q17'" in str(raised.value)


def test_trajectories_without_reward_and_groups_without_spread_teach_nothing():
    def group(*rewards):
        return [trajectory(reward, turn([3], [5], [-1.0])) for reward in rewards]

    learned = training_batch(
        collection(group(1, 0, math.nan), group(1, 1), group(math.nan), group(0, math.inf), group())
    )
    assert (len(learned.trajectories), learned.groups, learned.groups_without_signal) == (2, 1, 4)
    assert [s.advantages[-1] for s in learned.sequences()] == pytest.approx([0.7071, -0.7071], abs=1e-3)
    unscaled = training_batch(collection(group(1, 0, math.nan)), scale_rewards=False)
    assert [s.advantages for s in unscaled.sequences()] == [[0.0, 0.5], [0.0, -0.5]]


def test_micro_batches_hold_every_sequence_once_and_stay_within_their_tokens():
    rng = np.random.default_rng(0)
    sequences = [
        token_sequences(trajectory(1.0, turn([3] * int(n), [5], [-1.0])))[0] for n in rng.integers(1, 60, size=50)
    ]
    batches = [batch for batch, shared in micro_batches(sequences, 64) if not shared]
    assert sorted(map(id, sequences)) == sorted(id(s) for batch in batches for s in batch)
    assert all(len(batch) * max(map(len, batch)) <= 64 for batch in batches)
    assert [len(batch) for batch, _ in micro_batches(sequences[:2], 1)] == [1, 1]  # too long is still trained, alone


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
async def test_training_makes_rewarded_replies_likelier(kind):
    a = adapter(kind, learning_rate=3e-3)
    means = []
    for _ in range(8):
        trajectories = await rollouts(a, by_first_token, generations=16, tokens=1)
        means.append(np.mean([t.reward for group in trajectories.trajectories for t in group]))
        status = await train(a, trajectories)
        assert status.status == "completed", status.message
    assert 1 - means[-1] < 0.5 * (1 - means[0])  # half the mistakes, or fewer
    assert a.policy.version == 8


def test_learning_rate_of_the_embedded_model_is_not_taken_for_another_in_silence(tmp_path, caplog):
    random_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for settings in ({"learning_rate": 5e-4}, {}):
        assert "learning_rate" not in caplog.text
        LocalGRPOAdapter(LocalGRPOConfig(model=str(tmp_path), **settings), 0)._load()
    assert "learning_rate is not set" in caplog.text
    caplog.clear()
    LocalGRPOAdapter(LocalGRPOConfig(), 0)._load()
    assert "learning_rate" not in caplog.text


async def test_finished_job_tells_what_it_did():
    a = adapter(optimizer_steps=4)
    trajectories = await rollouts(a, by_first_token)
    trajectories.trajectories.append([trajectory(1.0, turn([3], [5], [-1.0]))] * 2)
    status = await train(a, trajectories)
    metrics = status.metadata["metrics"]
    assert (status.status, status.progress, status.metadata["policy_version"]) == ("completed", 100.0, 1)
    assert {name: metrics[name] for name in ("optimizer_steps", "trained_groups", "groups_without_signal")} == {
        "optimizer_steps": 4,
        "trained_groups": 4,
        "groups_without_signal": 1,
    }
    assert metrics["trained_trajectories"] == 32
    assert metrics["trained_tokens"] == sum(
        len(t.episode[0].logprobs) for g in trajectories.trajectories[:4] for t in g
    )
    assert metrics["logprob_gap"] < 1e-4
    assert metrics["grad_norm"] > 0 and metrics["kl"] > 0 and metrics["seconds"] > 0
    assert metrics["learning_rate"] == 5e-4
    assert math.isnan(metrics["reference_kl"])
    assert math.isfinite(metrics["loss"]) and 0 <= metrics["clip_fraction"] <= 1


@pytest.mark.parametrize(("allowed", "lag"), [(None, 0), (0.6, 0), (0.1, 1), (0.1, 0)])
async def test_logprobs_that_are_not_the_policys_stop_the_run_before_a_step(allowed, lag):
    a = adapter(max_logprob_gap=allowed, max_staleness=1)
    trajectories = await rollouts(a, by_first_token)
    a.policy.version = lag  # one later, what older weights sampled may differ
    for t in (t for group in trajectories.trajectories for t in group):
        t.episode[0].logprobs = [value - 0.5 for value in t.episode[0].logprobs]
    before = weights(a)
    status = await train(a, trajectories)
    assert status.metadata["metrics"]["logprob_gap"] == pytest.approx(0.5, abs=1e-3)
    if (allowed, lag) != (0.1, 0):
        assert status.status == "completed"
        return
    assert status.status == "failed" and torch.equal(before, weights(a)) and a.policy.version == 0
    for cause in ("0.5 nats", "max_logprob_gap", "chat template", "stale", "adapter", "Nothing was trained"):
        assert cause in status.message


async def test_size_of_micro_batches_changes_nothing_but_rounding():
    after = []
    for tokens in (4096, 24):
        a = adapter(micro_batch_tokens=tokens, weight_decay=0.1)
        await train(a, await rollouts(a, by_first_token))
        after.append(weights(a))
    assert torch.allclose(*after, atol=2e-5)
    assert not torch.allclose(after[0], weights(adapter()), atol=2e-4)


@pytest.mark.slow
@pytest.mark.proof
async def test_kl_holds_the_policy_to_its_initial_weights():
    reached = []
    for kl_coef in (1e-9, 5.0):
        a = adapter(kl_coef=kl_coef, learning_rate=3e-3)
        for _ in range(4):
            status = await train(a, await rollouts(a, by_first_token, generations=16))
        reached.append(status.metadata["metrics"]["reference_kl"])
    assert 0 < reached[1] < 0.5 * reached[0]


async def test_optimizer_state_lives_on_over_epochs():
    a = adapter(optimizer_steps=2)
    for epoch in range(1, 4):
        await train(a, await rollouts(a, by_first_token))
        (state, *_) = a.learner.optimizer.state.values()
        assert state["step"].item() == 2 * epoch


@pytest.mark.slow
@pytest.mark.proof
async def test_the_same_seed_trains_the_same_weights_to_the_last_digit():
    async def run(seed):
        a = adapter(deterministic=True, seed=seed)
        for _ in range(2):
            await train(a, await rollouts(a, by_first_token))
        return weights(a)

    assert torch.equal(await run(1), await run(1))
    assert not torch.equal(await run(1), await run(2))


async def test_groups_without_signal_leave_the_weights_as_they_are():
    a = adapter()
    before = weights(a)
    status = await train(a, await rollouts(a, lambda ids: 1.0))
    assert status.status == "completed"
    assert "nothing to train on" in status.message
    assert status.metadata["metrics"]["groups_without_signal"] == 4
    assert math.isnan(status.metadata["metrics"]["loss"])
    assert torch.equal(before, weights(a)) and a.policy.version == 0


async def test_loss_that_is_not_finite_fails_the_job_and_leaves_the_weights_as_they_were():
    a = adapter(max_logprob_gap=None)
    trajectories = await rollouts(a, by_first_token)
    for t in trajectories.trajectories[0]:
        t.episode[0].logprobs = [-1e4 for _ in t.episode[0].logprobs]  # a ratio beyond float32
    a.adapter_config.optimizer_steps = 1
    before = weights(a)
    status = await train(a, trajectories)
    assert status.status == "failed"
    assert "step 1 of 1" in status.message and "learning_rate" in status.message
    assert torch.equal(before, weights(a)) and a.policy.version == 0
    after = await train(a, await rollouts(a, by_first_token))
    assert after.status == "completed"


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_submit_returns_at_once_and_status_can_be_asked_again_and_again():
    a = adapter(optimizer_steps=30, micro_batch_tokens=64)
    trajectories = await rollouts(a, by_first_token, examples=8)
    ref = await a.submit(trajectories)
    seen = []
    while (status := await a.status(ref)).status in ("pending", "running"):
        seen.append(status.progress)
        await asyncio.sleep(0.002)
    ended = time.monotonic()
    assert seen == sorted(seen) and len(set(seen)) > 3
    assert seen[0] < 0.5  # most of the job came after its submission
    status.metadata["metrics"].clear()
    assert (await a.status(ref)).metadata["metrics"] and await a.status(ref) == await a.wait_until_complete(ref)
    assert time.monotonic() - ended < 0.05


async def test_waiting_ends_with_the_job_whatever_the_poll_interval():
    a = adapter(optimizer_steps=20)
    ref = await a.submit(await rollouts(a, by_first_token))
    waiting = asyncio.create_task(a.wait_until_complete(ref, poll_interval=60))
    while (await a.status(ref)).status in ("pending", "running"):
        await asyncio.sleep(0.001)
    ended = time.monotonic()
    await waiting
    assert time.monotonic() - ended < 0.05


async def test_waiter_that_is_cancelled_leaves_the_job_alone():
    a = adapter(optimizer_steps=20)
    ref = await a.submit(await rollouts(a, by_first_token))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(a.wait_until_complete(ref), 0.001)
    assert (await a.wait_until_complete(ref)).status == "completed"


async def test_canceled_job_stops_between_steps_and_keeps_those_it_made():
    a = adapter(optimizer_steps=32, inner_epochs=200)
    before = weights(a)
    ref = await a.submit(await rollouts(a, by_first_token))
    while (await a.status(ref)).progress == 0:
        await asyncio.sleep(0.002)
    await a.cancel(ref)
    status = await a.wait_until_complete(ref)
    assert status.status == "canceled"
    assert 0 < status.progress < 100
    assert a.policy.version == status.metadata["policy_version"] == 1
    assert not torch.equal(before, weights(a))
    a.adapter_config.inner_epochs = 1
    assert (await train(a, await rollouts(a, by_first_token))).status == "completed"


async def test_job_canceled_before_it_starts_changes_nothing():
    a = adapter()
    trajectories = await rollouts(a, by_first_token)
    with a.policy.exclusive.hold():
        ref = await a.submit(trajectories)
        assert (await a.status(ref)).status == "pending"
        await a.cancel(ref)
        assert (await a.wait_until_complete(ref)).status == "canceled"
    assert a.policy.version == 0


async def test_second_job_waits_for_the_first_and_its_stale_trajectories_fail():
    a = adapter()
    trajectories = await rollouts(a, by_first_token)
    with a.policy.exclusive.hold():  # else the first may have ended before the second is submitted
        refs = [await a.submit(trajectories), await a.submit(trajectories)]
    first, second = [await a.wait_until_complete(ref) for ref in refs]
    assert refs[0].metadata["job_id"] != refs[1].metadata["job_id"]
    assert (first.status, second.status) == ("completed", "failed")
    assert "StalePolicy" in second.message and a.policy.version == 1


@pytest.mark.parametrize(("version", "allowed"), [(5, 0), (4, 1), (3, 2)])
async def test_staleness_is_counted_in_versions_and_newer_is_never_right(version, allowed):
    for staleness in range(3):
        a = adapter(max_staleness=staleness)
        a.policy.version = 5
        trajectories = await rollouts(a, by_first_token)
        for t in trajectories.trajectories[0]:
            t.metadata["policy_version"] = version
        if staleness >= allowed:
            assert (await train(a, trajectories)).status == "completed"
        else:
            with pytest.raises(StalePolicy, match=f"version {version}, older than version 5"):
                await a.submit(trajectories)
    trajectories.trajectories[0][0].metadata["policy_version"] = 7
    with pytest.raises(StalePolicy, match="newer"):
        await a.submit(trajectories)


async def test_trajectories_of_another_model_are_refused():
    a = adapter()
    foreign = [trajectory(float(i), turn([3], [5 + 400 * i], [-1.0])) for i in range(2)]
    with pytest.raises(BackendError, match=r"token id 405.*262"):
        await a.submit(collection(foreign))
    long = [trajectory(float(i), turn([3] * 200, [5], [-1.0])) for i in range(2)]
    with pytest.raises(BackendError, match=r"201 tokens.*128"):
        await a.submit(collection(long))


async def test_job_of_another_adapter_is_unknown():
    with pytest.raises(BackendError, match="no training job 'abc'"):
        await adapter().status(TrainingJobRef(run_id="r", backend="local_grpo", metadata={"job_id": "abc"}))


@pytest.mark.slow
@pytest.mark.proof
async def test_replies_wait_for_the_end_of_training_and_come_from_the_new_weights():
    a = adapter(optimizer_steps=30, inner_epochs=5, learning_rate=1e-2)
    trajectories = await rollouts(a, by_first_token)
    before = await a.policy.sample(PROMPT, SamplingParams(0, 5), 0)
    ref = await a.submit(trajectories)
    while (await a.status(ref)).status == "pending":
        await asyncio.sleep(0.001)
    reply = await a.policy.sample(PROMPT, SamplingParams(0, 5), 0)
    assert (await a.status(ref)).status == "completed"
    assert reply == await a.policy.sample(PROMPT, SamplingParams(0, 5), 0) != before


async def test_closing_cancels_what_runs():
    a = adapter(optimizer_steps=32, inner_epochs=500)
    ref = await a.submit(await rollouts(a, by_first_token))
    await asyncio.wait_for(a.aclose(), 5)
    assert (await a.status(ref)).status == "canceled"


@pytest.mark.slow
def test_interpreter_ends_quietly_and_soon_while_a_job_trains():
    script = (
        "import sys, asyncio, time; sys.path[:0] = sys.argv[1:]\n"
        "from test_local_adapter import *\n"
        "async def main():\n"
        "    a = adapter(optimizer_steps=32, inner_epochs=10**6)\n"
        "    ref = await a.submit(await rollouts(a, by_first_token)); await asyncio.sleep(0.5)\n"
        "    print((await a.status(ref)).status.value)\n"
        "asyncio.run(main())\n"
    )
    paths = [str(HERE), str(HERE.parent / "support"), "."]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "running"), done.stderr


# ── the rest of the adapter ──────────────────────────────────────────────────────────────────────────────────────────


async def test_trained_model_is_saved_where_from_pretrained_finds_it(tmp_path):
    a = adapter("qwen2")
    await train(a, await rollouts(a, by_first_token))
    assert await a.save(tmp_path / "model") == tmp_path / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), a.policy.model.parameters(), strict=True))
    again = LocalGRPOAdapter(LocalGRPOConfig(model=str(tmp_path / "model")))
    assert await again.is_healthy()
    prompt = again.policy.render([{"role": "user", "content": "hi"}])
    params = SamplingParams(1.0, 5)
    assert (await again.policy.sample(prompt, params, 3)).ids == (await a.policy.sample(prompt, params, 3)).ids


async def test_model_that_cannot_be_loaded_is_not_healthy_and_the_log_says_why(caplog):
    assert not await LocalGRPOAdapter(LocalGRPOConfig(model="./nowhere")).is_healthy()
    assert "'./nowhere' cannot be loaded" in caplog.text


def test_progress_is_logged_as_json_lines_with_null_for_missing(tmp_path):
    a = adapter()
    ref = TrainingJobRef(run_id="../run", backend="local_grpo", metadata={"job_id": "1"})
    a.log_progress(ref, {"loss": math.nan, "epoch": 0}, str(tmp_path))
    a.log_progress(ref, {"loss": 0.5, "epoch": 1}, str(tmp_path))
    first, second = map(json.loads, (tmp_path / "trainer_adapter_.._run.jsonl").read_text().splitlines())
    assert first.pop("timestamp") <= second["timestamp"]
    assert first == {"run_id": "../run", "backend": "local_grpo", "loss": None, "epoch": 0}


@pytest.mark.parametrize(
    "setting",
    [{"learning_rate": 0}, {"learning_rate": math.inf}, {"clip_low": 1.0}, {"loss": "ppo"}, {"optimizer_steps": 0}],
)
def test_setting_out_of_range_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        LocalGRPOConfig(**setting)


def test_config_is_readable_without_torch_and_the_adapter_names_the_extra():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from finetune_nb.backends.local.adapter import LocalGRPOAdapter\n"
        "from finetune_nb.backends.local.config import LocalGRPOConfig\n"
        "from finetune_nb.errors import MissingExtra\n"
        "adapter = LocalGRPOAdapter(LocalGRPOConfig())\n"
        "try: adapter.policy\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert 'pip install "finetune_nb[local]"' in done.stdout, done.stderr


async def test_turns_with_ids_that_are_not_exact_are_refused_unless_allowed():
    group = [trajectory(float(n), turn(PROMPT, [20 + n], [-1.0], exact=False)) for n in range(2)]
    with pytest.raises(BackendError, match="not exact"):
        await adapter().submit(collection(group))
    trainer = adapter(allow_inexact=True, max_logprob_gap=None)  # these logprobs are made up
    status = await trainer.wait_until_complete(await trainer.submit(collection(group)))
    assert status.status == "completed"
