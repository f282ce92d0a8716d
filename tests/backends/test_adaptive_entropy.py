"""The entropy bonus with a target: its weight from step to step, beside TRL's, over checkpoints and live changes."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pydantic import ValidationError  # noqa: E402
from sampled_turns import by_first_token, rollouts, train  # noqa: E402
from trl_oracle import TEMPERATURE, batch, gradient, noise, small_model, trainer_of, trl_module  # noqa: E402

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.forward import score_tokens  # noqa: E402
from finetune_nb.backends.local.losses.entropy import EntropyWeight  # noqa: E402
from finetune_nb.backends.local.losses.loss import policy_loss  # noqa: E402


def test_the_weight_grows_while_the_entropy_is_low_and_counts_only_then():
    weight = EntropyWeight(0.01)
    counted = []
    for entropy in (0.5, 0.1, 0.2, 0.3, 0.3, 0.1):
        counted.append(weight.weight(0.2))
        weight.step(entropy, 0.2, 0.005, 0.02)
    assert counted == pytest.approx([0, 0, 0.01, 0.015, 0, 0])
    assert weight.coef == pytest.approx(0.01)
    for _ in range(9):
        weight.step(0.1, 0.2, 0.005, 0.02)
    assert weight.weight(0.2) == 0.02
    for _ in range(9):
        weight.step(0.3, 0.2, 0.005, 0.02)
    assert weight.coef == 0.0
    assert EntropyWeight(0.01).weight(None) == 0.01


def test_a_setting_that_is_changed_begins_anew():
    weight = EntropyWeight(0.01)
    weight.step(0.1, 0.2, 0.005, 1.0)
    weight.follow(0.01)
    assert weight.weight(0.2) == pytest.approx(0.015)
    weight.follow(0.1)
    assert weight.weight(0.2) == 0.1


def test_a_start_above_the_largest_weight_is_refused():
    with pytest.raises(ValidationError, match="above entropy_coef_max"):
        LocalGRPOConfig(entropy_coef=2.0, entropy_target=0.2)
    assert LocalGRPOConfig(entropy_coef=2.0).entropy_coef == 2.0  # fixed


def test_values_and_gradients_agree_with_trl_step_by_step(tmp_path):
    """The target lies between the entropies of the steps, so that the bonus comes and goes."""
    trl = trl_module()
    model = small_model(tmp_path / "model")
    ids_BT, attention_BT, mask_BT = batch()
    advantages_B = torch.randn(12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = score_tokens(model, ids_BT, attention_BT, mask_BT, TEMPERATURE, entropies=True)
    old_BT, target = found.logprobs_BT + noise(mask_BT, 0.1, 8), found.entropies_BT.sum().item() / mask_BT.sum().item()
    trainer = trainer_of(
        trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, per_device_train_batch_size=12, beta=0.0, loss_type="dapo",
        use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=target, entropy_coef_delta=0.05, entropy_coef_max=0.2,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    weight, counted = EntropyWeight(0.1), []
    for scale in (0.9, 1.2, 1.3, 1.2, 0.8, 0.9, 1.3, 1.2):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)  # larger logits have less entropy
        model.zero_grad()
        theirs = trainer._compute_loss(
            trainer.model,
            {
                "prompt_ids": ids_BT[:, :3], "prompt_mask": attention_BT[:, :3], "completion_ids": ids_BT[:, 3:],
                "completion_mask": attention_BT[:, 3:], "tool_mask": mask_BT[:, 3:].long(), "advantages": advantages_B,
                "old_per_token_logps": old_BT[:, 3:], "num_items_in_batch": mask_BT.sum(),
            },
        )  # fmt: skip
        theirs.backward()
        their_gradient = gradient(model)
        model.zero_grad()
        scores = score_tokens(model, ids_BT, attention_BT, mask_BT, TEMPERATURE, entropies=True)
        counted.append(weight.weight(target))
        ours, statistics = policy_loss(
            scores.logprobs_BT,
            old_BT,
            advantages_B,
            mask_BT,
            entropy_coef=counted[-1],
            entropies_BT=scores.entropies_BT,
        )
        ours.backward()
        weight.step(statistics.mean("entropy"), target, 0.05, 0.2)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
        assert ((gradient(model) - their_gradient).norm() / their_gradient.norm()).item() < 1e-6
        assert weight.coef == pytest.approx(trainer.entropy_coef)
    assert min(counted) == 0 and max(counted) > 0.1 and len(set(counted)) >= 4


def adapter(model=None, **settings):
    return LocalGRPOAdapter(LocalGRPOConfig(optimizer_steps=4, **settings))


async def job(a):
    return (await train(a, await rollouts(a, by_first_token))).metadata["metrics"]


@pytest.mark.slow
@pytest.mark.proof
async def test_a_job_changes_the_weight_at_each_step_and_a_checkpoint_keeps_it(tmp_path):
    a = adapter(entropy_target=50.0, entropy_coef=0.01)  # always below it
    assert (await job(a))["entropy_coef"] == pytest.approx(0.025)  # 0 at first, then 0.015, 0.02, 0.025
    await a.save_checkpoint(tmp_path / "one")
    assert (await job(a))["entropy_coef"] == pytest.approx(0.045)
    b = adapter(entropy_target=50.0, entropy_coef=0.01)
    await b.load_checkpoint(tmp_path / "one")
    assert (await job(b))["entropy_coef"] == pytest.approx(0.045)
    await a.load_checkpoint(tmp_path / "one")
    assert (await job(a))["entropy_coef"] == pytest.approx(0.045)

    fixed = adapter(entropy_coef=0.01)
    assert (await job(fixed))["entropy_coef"] == 0.01
    await fixed.save_checkpoint(tmp_path / "two")
    assert "entropy" not in json.loads((tmp_path / "two" / "manifest.json").read_text())
    await a.load_checkpoint(tmp_path / "two")
    assert (await job(a))["entropy_coef"] == pytest.approx(0.025)
    assert math.isnan((await job(adapter()))["entropy_coef"])
