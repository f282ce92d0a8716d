"""The losses by name: values by hand, what they ignore, and their agreement with TRL's trainers."""

import math
from typing import get_args

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from trl_oracle import TEMPERATURE, batch, gradient, noise, small_model, trainer_of, trl_module  # noqa: E402

from finetune_nb.backends.local.config import LOSSES, LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.forward import score_tokens, token_logprobs  # noqa: E402
from finetune_nb.backends.local.losses.loss import policy_loss  # noqa: E402
from finetune_nb.config.base import changed  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


def test_token_logprobs_are_those_of_the_full_softmax_at_the_rows_temperature(model):
    ids_BT, attention_BT, mask_BT = batch()
    temperature_B = torch.linspace(0.5, 2.0, len(ids_BT))
    with torch.no_grad():
        logprobs_BT = token_logprobs(model, ids_BT, attention_BT, mask_BT, temperature_B)
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT).logits / temperature_B[:, None, None]
    for row, column in mask_BT.nonzero().tolist():
        expected = logits_BTV[row, column - 1].log_softmax(0)[ids_BT[row, column]]
        assert logprobs_BT[row, column].item() == pytest.approx(expected.item(), abs=1e-5)
    assert (logprobs_BT[~mask_BT] == 0).all()


def test_training_on_a_first_token_is_refused(model):
    ids_BT, attention_BT, mask_BT = batch()
    mask_BT[0, 0] = True
    with pytest.raises(ValueError, match="column 0"):
        token_logprobs(model, ids_BT, attention_BT, mask_BT)


def test_loss_and_clip_counts_by_hand():
    """Four tokens: unclipped, clipped high, clipped low, and beyond the bound on the side that is not clipped."""
    ratios_BT = torch.tensor([[1.1, 1.5], [0.5, 1.5]])
    value, statistics = policy_loss(
        ratios_BT.log(), torch.zeros(2, 2), torch.tensor([2.0, -1.0]), torch.ones(2, 2, dtype=torch.bool), clip_high=0.3
    )
    assert value.item() == pytest.approx((-2 * 1.1 - 2 * 1.3 + 0.8 + 1.5) / 4)
    assert (statistics.clipped_high, statistics.clipped_low, statistics.tokens) == (1, 1, 4)
    assert statistics.mean("ratio") == pytest.approx(4.6 / 4)
    expected_kl = sum(r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 1.5)) / 4
    assert statistics.mean("kl_old") == pytest.approx(expected_kl, rel=1e-5)


def test_positive_advantage_raises_the_probability_of_what_was_sampled():
    logprobs_BT = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    mask_BT = torch.ones(2, 1, dtype=torch.bool)
    value, _ = policy_loss(logprobs_BT, logprobs_BT.detach(), torch.tensor([1.0, -1.0]), mask_BT)
    value.backward()
    assert logprobs_BT.grad[0] < 0 < logprobs_BT.grad[1]  # descending the loss raises the first, lowers the second


@pytest.mark.parametrize("ignored", [float("nan"), float("inf"), 1e9])
def test_values_at_masked_positions_change_neither_loss_nor_gradient(ignored):
    logprobs_BT = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    mask_BT = torch.tensor([[True, True, False]])
    old_BT, reference_BT = torch.tensor([[-1.1, -1.9, ignored]]), torch.tensor([[-1.2, -1.7, ignored]])
    value, statistics = policy_loss(
        logprobs_BT, old_BT, torch.tensor([1.0]), mask_BT, kl_coef=0.1, reference_logprobs_BT=reference_BT
    )
    value.backward()
    short = logprobs_BT.detach()[:, :2].requires_grad_()
    expected, expected_statistics = policy_loss(
        short,
        old_BT[:, :2],
        torch.tensor([1.0]),
        mask_BT[:, :2],
        kl_coef=0.1,
        reference_logprobs_BT=reference_BT[:, :2],
    )
    expected.backward()
    assert value.item() == expected.item()
    assert logprobs_BT.grad.tolist() == [[*short.grad[0].tolist(), 0.0]]
    assert statistics == expected_statistics


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(loss):
    _, _, mask_BT = batch()
    logprobs_BT, old_BT, advantages_B = noise(mask_BT, 1, 2), noise(mask_BT, 1, 3), torch.linspace(-1, 1, 12)
    whole, statistics = policy_loss(logprobs_BT, old_BT, advantages_B, mask_BT, loss=loss, length=15)
    parts = [
        policy_loss(
            logprobs_BT[rows], old_BT[rows], advantages_B[rows], mask_BT[rows], loss=loss,
            batch_tokens=mask_BT.sum(), batch_sequences=12, length=15,
        )
        for rows in (slice(0, 5), slice(5, 12))
    ]  # fmt: skip
    assert sum(value.item() for value, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
    summed = parts[0][1] + parts[1][1]
    assert summed.tokens == statistics.tokens
    assert summed.kl_old == pytest.approx(statistics.kl_old, rel=1e-5)


def test_kl_needs_a_reference_and_unknown_losses_are_refused():
    tensors = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(*tensors, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"'gpro'.*expected one of grpo, dapo"):
        policy_loss(*tensors, loss="gpro")


# ── beside TRL ───────────────────────────────────────────────────────────────────────────────────────────────────────

TRL = {
    "grpo": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2, "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.28},  # the bound itself
    "sapo": {"loss_type": "sapo"},
}
"""Our name -> what TRL's config says for it."""


@pytest.mark.parametrize(("beta", "entropy"), [(0.0, 0.0), (0.04, 0.01)])
@pytest.mark.parametrize("loss", TRL)
def test_loss_and_gradient_agree_with_trl(model, loss, beta, entropy, tmp_path):
    """Two micro-batches with clipping active on both sides; of different numbers of tokens where TRL's mean allows it."""
    trl = trl_module()
    ids_BT, attention_BT, mask_BT = batch()
    advantages_B = torch.randn(12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        current_BT = token_logprobs(model, ids_BT, attention_BT, mask_BT, TEMPERATURE)
    old_BT, reference_BT = current_BT + noise(mask_BT, 0.5, 8), current_BT + noise(mask_BT, 0.3, 6)
    # TRL takes the mean of its micro-batches' means: of tokens in "bnpo" and in the entropy.
    halves = [slice(0, 6), slice(6, 12)]
    if loss in ("dapo", "cispo") and not entropy:
        halves = [slice(0, 5), slice(5, 12)]
    elif loss == "bnpo" or entropy:
        halves = [slice(0, 12)]

    trainer = trainer_of(
        trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, per_device_train_batch_size=12 // len(halves),
        gradient_accumulation_steps=len(halves), beta=beta, entropy_coef=entropy, use_bias_correction_kl=False, **TRL[loss],
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = len(halves)
    model.zero_grad()
    theirs = 0.0
    for rows in halves:
        value = trainer._compute_loss(
            trainer.model,
            {
                "prompt_ids": ids_BT[rows, :3], "prompt_mask": attention_BT[rows, :3],
                "completion_ids": ids_BT[rows, 3:], "completion_mask": attention_BT[rows, 3:],
                "tool_mask": mask_BT[rows, 3:].long(), "advantages": advantages_B[rows],
                "old_per_token_logps": old_BT[rows, 3:], "ref_per_token_logps": reference_BT[rows, 3:],
                "num_items_in_batch": mask_BT.sum(),
            },
        )  # fmt: skip
        value.backward()
        theirs += value.item()
    their_gradient = gradient(model)

    low, high = TRL[loss].get("epsilon", 0.2), TRL[loss].get("epsilon_high", 0.2)
    model.zero_grad()
    ours, clipped_low, clipped_high = 0.0, 0.0, 0.0
    for rows in halves:
        scores = score_tokens(
            model, ids_BT[rows], attention_BT[rows], mask_BT[rows], TEMPERATURE, entropies=entropy > 0
        )
        value, statistics = policy_loss(
            scores.logprobs_BT, old_BT[rows], advantages_B[rows], mask_BT[rows], loss=loss, clip_low=low,
            clip_high=high - 1 if loss == "cispo" else high, kl_coef=beta, reference_logprobs_BT=reference_BT[rows],
            entropy_coef=entropy, entropies_BT=scores.entropies_BT, batch_tokens=mask_BT.sum(), batch_sequences=12, length=12,
        )  # fmt: skip
        value.backward()
        ours += value.item()
        clipped_low, clipped_high = clipped_low + statistics.clipped_low, clipped_high + statistics.clipped_high
    our_gradient = gradient(model)

    assert clipped_high >= 3 or loss == "sapo"
    assert clipped_low >= 3 or loss in ("sapo", "cispo")
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert ((our_gradient - their_gradient).norm() / their_gradient.norm()).item() < 1e-6


def test_rloo_agrees_with_trl(model, tmp_path):
    trl = trl_module()
    ids_BT, attention_BT, _ = batch()
    mask_BT = attention_BT.bool()  # TRL's RLOO has no context inside a reply
    mask_BT[:, :3] = False
    advantages_B = torch.randn(12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        old_BT = token_logprobs(model, ids_BT, attention_BT, mask_BT, TEMPERATURE) + noise(mask_BT, 0.1, 5)
    trainer = trainer_of(
        trl.RLOOTrainer, trl.RLOOConfig, model, tmp_path, per_device_train_batch_size=12, epsilon=0.2, beta=0.0
    )
    model.zero_grad()
    theirs = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids_BT[:, :3], "prompt_mask": attention_BT[:, :3], "completion_ids": ids_BT[:, 3:],
            "completion_mask": attention_BT[:, 3:], "advantages": advantages_B,
            "old_logps": (old_BT * mask_BT).sum(1),
        },
    )  # fmt: skip
    theirs.backward()
    their_gradient = gradient(model)
    model.zero_grad()
    ours, statistics = policy_loss(
        token_logprobs(model, ids_BT, attention_BT, mask_BT, TEMPERATURE), old_BT, advantages_B, mask_BT, loss="rloo"
    )
    ours.backward()
    assert statistics.clipped_low + statistics.clipped_high >= 3
    # TRL takes the difference of two sums over a sequence, which are some ten times as large as it.
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ((gradient(model) - their_gradient).norm() / their_gradient.norm()).item() < 1e-5


# ── the other choices ────────────────────────────────────────────────────────────────────────────────────────────────


def test_entropies_are_those_of_the_full_distribution(model):
    ids_BT, attention_BT, mask_BT = batch()
    found = score_tokens(model, ids_BT, attention_BT, mask_BT, TEMPERATURE, entropies=True)
    logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT).logits / TEMPERATURE
    for row, column in mask_BT.nonzero().tolist():
        expected = torch.distributions.Categorical(logits=logits_BTV[row, column - 1]).entropy().item()
        assert found.entropies_BT[row, column].item() == pytest.approx(expected, abs=1e-5)
    assert (found.entropies_BT[~mask_BT] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_pulls_the_policy_back_to_the_reference(estimator):
    """The gradient of each estimator, averaged over what the policy samples, is that of the true divergence."""
    torch.manual_seed(0)
    logits, reference = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    true = (logits.softmax(0) * (logits.log_softmax(0) - reference.log_softmax(0))).sum()
    (expected,) = torch.autograd.grad(true, logits)
    probabilities = logits.softmax(0).detach()
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    total = torch.zeros(6, dtype=torch.float64)
    for token in range(6):
        logprob_BT = logits.log_softmax(0)[token].reshape(1, 1)
        value, _ = policy_loss(
            logprob_BT, logprob_BT.detach(), torch.zeros(1, dtype=torch.float64), mask_BT, kl_coef=1.0,
            kl_estimator=estimator, reference_logprobs_BT=reference.log_softmax(0)[token].reshape(1, 1),
        )  # fmt: skip
        total += probabilities[token] * torch.autograd.grad(value, logits)[0]
    if estimator == "k3":  # its gradient is that of the reverse divergence
        other = (reference.softmax(0) * (reference.log_softmax(0) - logits.log_softmax(0))).sum()
        (expected,) = torch.autograd.grad(other, logits)
    assert torch.allclose(total, expected, atol=1e-9)


def test_a_clipped_kl_gives_no_gradient_beyond_its_bound():
    logprobs_BT = torch.tensor([[-1.0, -9.0]], requires_grad=True)
    mask_BT, reference_BT = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-1.5, -1.0]])
    value, _ = policy_loss(
        logprobs_BT, logprobs_BT.detach(), torch.zeros(1), mask_BT, kl_coef=1.0, kl_clip=2.0,
        reference_logprobs_BT=reference_BT,
    )  # fmt: skip
    value.backward()
    assert logprobs_BT.grad[0, 0] != 0 and logprobs_BT.grad[0, 1] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_step_in_between_every_loss_is_the_policy_gradient(loss):
    """Where nothing has moved, the gradient is minus the advantage, by the mean that the loss takes."""
    _, _, mask_BT = batch()
    logprobs_BT = noise(mask_BT, 1, 2).requires_grad_()
    advantages_B = torch.linspace(-1, 1, 12)
    value, _ = policy_loss(logprobs_BT, logprobs_BT.detach(), advantages_B, mask_BT, loss=loss, length=15)
    value.backward()
    tokens_B1 = mask_BT.sum(1, keepdim=True)
    by = {"tokens": mask_BT.sum(), "sequences": 12 * tokens_B1, "length": 12 * 15}[LOSSES[loss].mean]
    if loss == "rloo":
        by = 12
    expected_BT = -advantages_B[:, None] * mask_BT / by
    assert torch.allclose(logprobs_BT.grad, expected_BT, atol=1e-7)


def test_a_loss_brings_its_defaults_and_what_is_given_counts():
    assert (LocalGRPOConfig().clip_low, LocalGRPOConfig().scale_rewards) == (0.2, True)
    gspo = LocalGRPOConfig(loss="gspo")
    assert (gspo.clip_low, gspo.clip_high) == (3e-4, 4e-4)
    assert LocalGRPOConfig(loss="gspo", clip_low=0.1).clip_low == 0.1
    assert (
        LocalGRPOConfig(loss="dr_grpo").scale_rewards is False
        and LocalGRPOConfig(loss="rloo").baseline == "leave one out"
    )
    assert LocalGRPOConfig(loss="reinforce++").scale_rewards == "batch"
    assert LocalGRPOConfig(loss="reinforce++", scale_rewards=True).scale_rewards is True
    assert set(get_args(LocalGRPOConfig.model_fields["loss"].annotation)) == set(LOSSES)


def test_a_loss_that_is_changed_brings_its_own_defaults_too():
    dapo = LocalGRPOConfig(clip_high=0.28)
    gspo = changed(dapo, {"loss": "gspo"}, "training")  # as a fork does
    assert (gspo.clip_low, gspo.clip_high) == (3e-4, 0.28)
    back = changed(gspo, {"loss": "dr_grpo"}, "training")
    assert (back.clip_low, back.clip_high, back.scale_rewards) == (0.2, 0.28, False)
