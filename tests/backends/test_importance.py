"""Importance sampling between sampler and trainer: its weights, its agreement with TRL's, and what a training job makes of it."""

import functools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pydantic import ValidationError  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402
from trl_oracle import TEMPERATURE, batch, gradient, noise, small_model, trainer_of, trl_module  # noqa: E402

from finetune_nb.backends.local.config import ImportanceBounds, LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.forward import token_logprobs  # noqa: E402
from finetune_nb.backends.local.losses.importance import importance_weights, mismatch  # noqa: E402
from finetune_nb.backends.local.losses.loss import policy_loss  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.training import Learner, TrainingReport  # noqa: E402
from finetune_nb.errors import BackendError  # noqa: E402
from finetune_nb.training.batch import TokenSequence, TrainingBatch  # noqa: E402

# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LOG_RATIO = torch.tensor([[0.5, 3.0, 0.25], [1.0, 1.0, 7.0]]).log()
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("bounds", "weights", "beyond"),
    [
        (ImportanceBounds(cap=2.0), [[0.5, 2.0, 0.25], [1, 1, 1]], 1),
        (ImportanceBounds(cap=2.0, floor=0.4), [[0.5, 2.0, 0.4], [1, 1, 1]], 2),
        (ImportanceBounds(cap=2.0, floor=0.4, beyond="mask"), [[0.5, 0, 0], [1, 1, 1]], 2),
        (ImportanceBounds(floor=0.4, beyond="mask"), [[0.5, 3.0, 0], [1, 1, 1]], 1),
        (ImportanceBounds(cap=2.0, level="sequence"), [[0.375] * 3, [1, 1, 1]], 0),
        (ImportanceBounds(cap=0.3, level="sequence"), [[0.3] * 3, [0.3, 0.3, 1]], 5),
        (ImportanceBounds(floor=0.5, level="sequence", beyond="mask"), [[0.0] * 3, [1, 1, 1]], 3),
    ],
)
def test_weights_by_hand(bounds, weights, beyond):
    found_BT, beyond_BT = importance_weights(LOG_RATIO, MASK, bounds)
    assert torch.allclose(found_BT, torch.tensor(weights, dtype=torch.float32))
    assert beyond_BT.sum() == beyond


def test_a_ratio_that_is_no_float_any_more_is_bounded_too():
    huge = torch.tensor([[200.0, -200.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    for bounds, expected in [
        (ImportanceBounds(cap=2.0, floor=0.5), [2.0, 0.5]),
        (ImportanceBounds(cap=2.0, beyond="mask"), [0.0, 0.0]),
    ]:
        assert importance_weights(huge, mask, bounds)[0].tolist() == [pytest.approx(expected)]


def test_mismatch_by_hand():
    logs = [torch.tensor([2.0, 0.5]).log(), torch.tensor([1.0]).log()]
    found = mismatch(logs)
    assert found.mean_ratio == pytest.approx(3.5 / 3) and found.largest_ratio == pytest.approx(2.0)
    assert found.effective_samples == pytest.approx(3.5**2 / (3 * 5.25))
    assert found.gap == pytest.approx(2 * math.log(2) / 3)
    of_sequences = mismatch([torch.tensor([2.0, 3.0]).log(), torch.tensor([1.0]).log()], "sequence")
    assert of_sequences.largest_ratio == pytest.approx(6.0)
    assert of_sequences.effective_samples == pytest.approx(49 / (2 * 37))
    assert all(math.isnan(value) for value in (mismatch([]).gap, mismatch([]).effective_samples))
    far = mismatch([torch.tensor([5000.0, 0.0])])
    assert far.effective_samples == pytest.approx(0.5) and math.isfinite(far.largest_ratio)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"importance_cap": 1.0, "importance_floor": 1.0}, "a floor below the cap"),
        ({"importance_level": "sequence"}, "nothing is corrected"),
        ({"importance_beyond": "mask"}, "nothing is corrected"),
        ({"importance_cap": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        LocalGRPOConfig(**settings)


# ── beside TRL ───────────────────────────────────────────────────────────────────────────────────────────────────────

MODES = {
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "mask"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "mask"),
}


@pytest.mark.parametrize(
    ("mode", "loss"), [*((mode, "dapo") for mode in MODES), ("sequence_mask", "grpo"), ("token_truncate", "cispo")]
)
def test_value_and_gradient_agree_with_trl(mode, loss, tmp_path):
    """TRL compares the sampler's log probabilities with its own, weighs, and takes the loss after the weights have moved."""
    trl = trl_module()
    level, beyond = MODES[mode]
    cap, floor = (1.4, 0.7) if level == "token" else (1.5, 0.7)
    model = small_model(tmp_path / "model")
    ids_BT, attention_BT, mask_BT = batch()
    with torch.no_grad():
        sampler_BT = token_logprobs(model, ids_BT, attention_BT, mask_BT, TEMPERATURE) + noise(mask_BT, 0.3, 8)
    rewards = [1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.2, 0.4, 0.9, 0.0]
    clip = {"epsilon_high": 1.05} if loss == "cispo" else {"epsilon": 0.02, "epsilon_high": 0.03}

    trainer = trainer_of(
        trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, reward=lambda completions, **_: rewards,
        per_device_train_batch_size=12, beta=0.0, loss_type=loss, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=cap, vllm_importance_sampling_clip_min=floor, **clip,
    )  # fmt: skip
    lengths = attention_BT.sum(1).tolist()
    replies = [row[3:length] for row, length in zip(ids_BT.tolist(), lengths, strict=True)]
    trainer.use_vllm = True  # only what it makes of the sampler's log probabilities: none is started
    trainer._generate = lambda prompts: (
        [row[:3] for row in ids_BT.tolist()], replies,
        [row[3:length] for row, length in zip(mask_BT.long().tolist(), lengths, strict=True)], ["x"] * 12,
        [row[3:length] for row, length in zip(sampler_BT.tolist(), lengths, strict=True)], {}, None, None,
    )  # fmt: skip
    scored = trainer._generate_and_score_completions([{"prompt": "1"}] * 12)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        old_BT = token_logprobs(model, ids_BT, attention_BT, mask_BT, TEMPERATURE)
        for place, weight in enumerate(model.parameters()):  # a step that others have made
            weight += noise(weight, 0.01, 100 + place)

    model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, scored)
    theirs.backward()
    their_gradient = gradient(model)

    weights_BT, beyond_BT = importance_weights(
        old_BT - sampler_BT, mask_BT, ImportanceBounds(cap, floor, level, beyond)
    )
    model.zero_grad()
    ours, statistics = policy_loss(
        token_logprobs(model, ids_BT, attention_BT, mask_BT, TEMPERATURE), old_BT, scored["advantages"][:, None] * weights_BT,
        mask_BT, loss=loss, clip_low=0.02, clip_high=0.05 if loss == "cispo" else 0.03,
    )  # fmt: skip
    ours.backward()
    assert beyond_BT.sum() >= 3 and statistics.clipped_high >= 2
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    assert ((gradient(model) - their_gradient).norm() / their_gradient.norm()).item() < 1e-6


# ── a training job ───────────────────────────────────────────────────────────────────────────────────────────────────


def learner(**settings):
    policy = LocalPolicy(random_model("llama"), byte_tokenizer())
    return Learner(policy, LocalGRPOConfig(learning_rate=1e-3, optimizer_steps=3, **settings))


def own_logprobs(ids, sampled):
    """Of the learner's model before it has learned anything: all learners begin alike."""
    with POLICY.exclusive.hold(), torch.no_grad():
        mask_BT, attention_BT = torch.tensor([sampled]), torch.ones(1, len(ids), dtype=torch.long)
        return token_logprobs(POLICY.model, torch.tensor([ids]), attention_BT, mask_BT)[0]


POLICY = learner().policy


@functools.cache
def sequences(spread=0.4, prompt=9):
    """Twelve sequences of two turns, sampled by somebody whose log probabilities differ from the learner's."""
    rng, made = np.random.default_rng(0), []
    for place in range(12):
        lengths = prompt, int(rng.integers(2, 6)), 2, int(rng.integers(2, 6))
        ids = [*range(40, 40 + prompt), *rng.integers(40, 90, sum(lengths[1:])).tolist()]
        sampled = [False] * lengths[0] + [True] * lengths[1] + [False] * lengths[2] + [True] * lengths[3]
        found, moved = own_logprobs(ids, sampled).tolist(), rng.normal(0, spread, len(ids))
        logprobs = [min(own + by, 0.0) if on else 0.0 for own, by, on in zip(found, moved, sampled, strict=True)]
        advantages = [(-1.0) ** place if on else 0.0 for on in sampled]
        made.append(TokenSequence(ids, sampled, logprobs, 1.0, advantages))
    return made


def train(learner, made):
    report = TrainingReport()
    with learner.policy.exclusive.hold():  # one thread: the model is tiny
        learner.train(TrainingBatch([[each] for each in made], [1] * 3, 0), np.random.default_rng(0), report)
    return report.metrics(), torch.cat([p.detach().flatten() for p in learner.policy.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch_tokens", [4096, 40])
def test_a_corrected_job_trains_like_one_whose_tokens_were_weighed_by_hand(level, micro_batch_tokens):
    """Prompts are shared with the larger micro-batches."""
    corrected = learner(
        importance_cap=1.3, importance_floor=0.8, importance_level=level, micro_batch_tokens=micro_batch_tokens
    )
    given = sequences()
    metrics, weights = train(corrected, given)

    by_hand = learner()
    weighed, ratios, beyond = [], [], 0
    for each in given:
        mask, own = torch.tensor(each.sampled), own_logprobs(each.ids, each.sampled)
        ratio = torch.where(mask, own - torch.tensor(each.logprobs), 0.0)
        if level == "sequence":
            ratio = ratio.sum().expand_as(ratio)
            ratios.append(ratio[:1].exp())
        else:
            ratios.append(ratio[mask].exp())
        weight = ratio.exp().clamp(0.8, 1.3)
        beyond += int(((weight != ratio.exp()) & mask).sum())
        weighed.append(
            TokenSequence(each.ids, each.sampled, own.tolist(), 1.0, (torch.tensor(each.advantages) * weight).tolist())
        )
    expected, expected_weights = train(by_hand, weighed)

    start = torch.cat([p.detach().flatten() for p in POLICY.model.parameters()])
    uncorrected = train(learner(max_logprob_gap=None), given)[1]
    moved = (expected_weights - start).norm()
    assert (weights - expected_weights).norm() < 1e-3 * moved < 1e-2 * (uncorrected - weights).norm()
    assert metrics["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    everything = torch.cat(ratios)
    assert metrics["importance_ratio"] == pytest.approx(everything.mean().item(), rel=1e-4)
    assert metrics["importance_ratio_max"] == pytest.approx(everything.max().item(), rel=1e-4)
    effective = (everything.sum() ** 2 / (len(everything) * (everything**2).sum())).item()
    assert metrics["effective_samples"] == pytest.approx(effective, rel=1e-4)
    assert metrics["importance_bounded"] == pytest.approx(beyond / sum(sum(each.sampled) for each in given))
    assert 0.1 < metrics["logprob_gap"] < 0.5


def test_without_a_correction_the_first_batch_is_compared_all_the_same():
    plain = learner(max_logprob_gap=None)
    metrics, _ = train(plain, sequences())
    assert math.isnan(metrics["importance_bounded"])
    assert 0.5 < metrics["effective_samples"] < 0.98 and metrics["importance_ratio_max"] > 1.5
    exact = learner()
    metrics, _ = train(exact, sequences(0.0))
    assert metrics["effective_samples"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["importance_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["logprob_gap"] < 1e-5 < metrics["rounding_gap"]


def test_where_sampler_and_trainer_agree_a_correction_changes_nothing():
    one, other = learner(), learner(importance_cap=2.0)
    assert torch.allclose(train(one, sequences(0.0))[1], train(other, sequences(0.0))[1], atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "half", "spread", "stops"),
    [
        ({}, False, 1e-3, False),
        ({}, False, 0.1, True),  # 0.08 nats in the mean: rounding of bfloat16, but not of float32
        ({}, True, 0.1, False),
        ({}, True, 0.4, True),
        ({"importance_cap": 2.0}, False, 0.4, False),
        ({"importance_cap": 2.0}, False, 3.0, True),
        ({"importance_cap": 2.0, "max_logprob_gap": 0.01}, False, 0.4, True),
    ],
)
def test_how_far_apart_they_may_be_depends_on_the_dtype_and_on_a_correction(settings, half, spread, stops):
    made = learner(**settings)
    if half:
        made.policy.sampling_dtype = torch.bfloat16
    before = torch.cat([p.detach().flatten() for p in made.policy.model.parameters()])
    given = sequences(spread)
    if not stops:
        assert not torch.equal(train(made, given)[1], before)
        return
    cure = "beyond what importance sampling can correct" if made.config.importance.on else "importance_cap=2.0"
    with pytest.raises(BackendError, match=f"Nothing was trained.*{cure}"):
        train(made, given)
    assert torch.equal(torch.cat([p.detach().flatten() for p in made.policy.model.parameters()]), before)


def test_a_job_that_is_stopped_while_it_compares_changes_nothing():
    made = learner(importance_cap=2.0)
    report, asked = TrainingReport(), []
    given = TrainingBatch([[each] for each in sequences()], [1] * 3, 0)
    made.train(given, np.random.default_rng(0), report, stopped=lambda: bool(asked.append(1)) or True)
    assert asked == [1] and report.steps == 0
