"""Training on rollouts that somebody chose: what was sampled in them becomes more likely, whatever it earned."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sampled_turns import by_first_token, collection, rollouts, train, trajectory, turn  # noqa: E402
from tiny_models import byte_tokenizer, random_model, weights  # noqa: E402

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.forward import token_logprobs  # noqa: E402
from finetune_nb.backends.local.losses.loss import policy_loss, supervised_loss  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import BackendError  # noqa: E402
from finetune_nb.training.batch import supervised_batch  # noqa: E402
from finetune_nb.types import EpisodeItem, Trajectory  # noqa: E402


def adapter(**settings):
    policy = LocalPolicy(random_model(), byte_tokenizer())
    return LocalGRPOAdapter(LocalGRPOConfig(**settings), policy=policy)


def mean_logprob(policy, prompt, reply):
    ids = torch.tensor([[*prompt, *reply]])
    mask = torch.tensor([[False] * len(prompt) + [True] * len(reply)])
    with torch.inference_mode():
        return token_logprobs(policy.model, ids, torch.ones_like(ids), mask).sum().item() / len(reply)


async def submit(a, chosen):
    return await a.wait_until_complete(await a.submit_chosen(chosen))


def test_the_supervised_loss_is_minus_the_mean_logprob_and_pulls_as_grpo_does_with_advantage_one():
    logprobs_BT = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, float("nan"), -4.0]], requires_grad=True)
    mask_BT = torch.tensor([[True, True, False], [True, False, True]])
    value, statistics = supervised_loss(logprobs_BT, mask_BT)
    assert value.item() == pytest.approx((1 + 2 + 3 + 4) / 4) and statistics.tokens == 4
    assert math.isnan(statistics.mean("kl_old")) and math.isnan(statistics.mean("gap"))
    value.backward()
    pulled, logprobs_BT.grad = logprobs_BT.grad.clone(), None
    policy_loss(logprobs_BT, logprobs_BT.detach(), torch.ones(2), mask_BT)[0].backward()
    assert torch.allclose(pulled, logprobs_BT.grad)
    parts = [supervised_loss(logprobs_BT[row : row + 1], mask_BT[row : row + 1], 4)[0].item() for row in (0, 1)]
    assert sum(parts) == pytest.approx(value.item())


def test_a_batch_has_every_chosen_trajectory_whatever_its_reward():
    one, other = turn([3], [5, 6], [-1.0, -2.0]), turn([3], [7], [-1.0], finish_reason="length")
    chosen = collection([trajectory(1.0, one), trajectory(float("nan"), other)], [trajectory(0.0, one)])
    batch = supervised_batch(chosen)
    assert batch.supervised and len(batch.trajectories) == 3 and batch.truncated == 1
    assert [sum(sequence.sampled) for sequence in batch.sequences()] == [2, 1, 2]
    nobody = Trajectory(
        episode=[EpisodeItem(role="assistant", content="said", logprobs=[])], reward=1.0, metadata={"id": "q"}
    )
    with pytest.raises(BackendError, match="no turn that a policy sampled"):
        supervised_batch(collection([nobody]))


async def test_chosen_replies_become_more_likely_though_their_rewards_are_equal():
    a = adapter(learning_rate=1e-3, optimizer_steps=1, inner_epochs=5)
    made = await rollouts(a, by_first_token, examples=2)
    chosen = collection(*[[group[0].model_copy(update={"reward": 0.0})] for group in made.trajectories])
    replies = [
        (t.episode[0].metadata["prompt_token_ids"], t.episode[0].metadata["token_ids"]) for (t,) in chosen.trajectories
    ]
    before = [mean_logprob(a.policy, *each) for each in replies]
    status = await submit(a, chosen)
    after = [mean_logprob(a.policy, *each) for each in replies]
    assert all(new > old for new, old in zip(after, before, strict=True))
    metrics = status.metadata["metrics"]
    assert status.status == "completed" and a.policy.version == 1
    assert (metrics["optimizer_steps"], metrics["trained_trajectories"], metrics["trained_tokens"]) == (5, 2, 60)
    assert math.isnan(metrics["kl"]) and math.isnan(metrics["clip_fraction"]) and math.isnan(metrics["logprob_gap"])
    assert sum(before) / 2 < -metrics["loss"] < sum(after) / 2  # the mean over steps that make them likelier
    await a.aclose()


async def test_rollouts_of_older_weights_can_be_chosen_and_grpo_goes_on_afterwards():
    a = adapter(learning_rate=1e-3)
    old = await rollouts(a, by_first_token)
    assert (await train(a, old)).status == "completed"
    assert (await submit(a, old)).status == "completed" and a.policy.version == 2
    status = await train(a, await rollouts(a, by_first_token))
    assert status.status == "completed" and status.metadata["metrics"]["logprob_gap"] < 1e-3
    await a.aclose()


async def test_what_cannot_be_learned_is_refused_before_anything_is_started():
    a = adapter()
    before = weights(a)
    text_alone = turn([3], [5], [-1.0])
    del text_alone.metadata["token_ids"]
    inexact = turn([3], [5], [-1.0], exact=False)
    foreign = turn([3], [10**6], [-1.0])
    for bad, said in (
        (text_alone, "not tokenized again"),
        (inexact, "not exact"),
        (foreign, "sampled by another model"),
    ):
        with pytest.raises(BackendError, match=said):
            await a.submit_chosen(collection([trajectory(1.0, bad)]))
    assert torch.equal(before, weights(a)) and a.policy.version == 0
    await a.aclose()


# ── log probabilities of recorded tokens ─────────────────────────────────────────────────────────────────────────────


async def test_each_token_gets_its_own_log_probability_whatever_conversation_its_turn_belongs_to():
    a = adapter(micro_batch_tokens=8)
    one = turn([3, 10], [5, 6], [-1.0, -1.0])
    goes_on = turn([3, 10, 5, 6, 9], [7], [-1.0])  # the prompt holds all of the turn before
    elsewhere = turn([4], [8, 9, 10], [-1.0] * 3, temperature=0.5)
    masked = EpisodeItem(role="assistant", content="said", logprobs=[])
    found = await a.token_logprobs(trajectory(1.0, one, masked, goes_on, elsewhere))
    expected = []
    for each in (one, goes_on, elsewhere):
        prompt, reply = each.metadata["prompt_token_ids"], each.metadata["token_ids"]
        with torch.inference_mode():
            logits = a.policy.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / each.metadata["temperature"]).log_softmax(-1).gather(1, torch.tensor(reply)[:, None])
        expected.append(logprobs[:, 0].tolist())
    assert [len(each) for each in found] == [2, 1, 3]
    for ours, plain in zip(found, expected, strict=True):
        assert ours == pytest.approx(plain, abs=1e-5)


async def test_trl_s_adapters_say_the_same_of_the_same_weights(tmp_path):
    pytest.importorskip("trl")
    from finetune_nb.backends.trl.adapter import TRLAdapter
    from finetune_nb.backends.trl.config import TRLSFTConfig

    a = adapter()
    rollout = trajectory(1.0, turn([3, 10], [5, 6], [-1.0, -1.0]))
    expected = await a.token_logprobs(rollout)
    first = TRLAdapter(TRLSFTConfig(), policy=a.policy)
    await first.save_checkpoint(tmp_path / "one")
    other = TRLAdapter(TRLSFTConfig(), policy=LocalPolicy(random_model(seed=1), byte_tokenizer()))
    assert await other.token_logprobs(rollout) != expected
    await other.load_weights(tmp_path / "one")
    assert (await other.token_logprobs(rollout))[0] == pytest.approx(expected[0], abs=1e-6)


async def test_a_model_that_is_another_one_and_ids_that_are_missing_are_refused():
    a = adapter()
    with pytest.raises(BackendError, match="Was it sampled by another model"):
        await a.token_logprobs(trajectory(1.0, turn([3], [10**6], [-1.0])))
    with pytest.raises(BackendError, match="prompt_token_ids"):
        await a.token_logprobs(trajectory(1.0, turn(None, [5], [-1.0])))
