"""Weights in bfloat16 and float16 are trained as float32 weights are: no step is lost, and a run continues exactly."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from sampled_turns import by_first_token, collection, rollouts, train, trajectory, turn  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.training import FLOAT16_SCALE  # noqa: E402
from finetune_nb.store.durable import digest_of  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.proof]  # they are exact, and each takes seconds

HALF = ["bfloat16", "float16"]
SMALL = {"learning_rate": 1e-6, "optimizer_steps": 4, "micro_batch_tokens": 64}
"""A learning rate usual for real models, of which bfloat16 rounds nearly every step away."""


def stored(directory, dtype, seed=0):
    """A model with a tokenizer, as its users have it."""
    random_model(seed=seed).to(getattr(torch, dtype)).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def adapter(model, dtype, **settings):
    config = LocalGRPOConfig(model=model, dtype=dtype, device="cpu", **{**SMALL, **settings})
    return LocalGRPOAdapter(config, seed=3, deterministic=True)


def fixed(seed=0, reward=1.0):
    """Trajectories that any policy may learn from: their logprobs are not looked at."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for example in range(3):
        prompt = [3, 10, 20 + example]
        replies = torch.randint(3, 262, (4, 5), generator=generator).tolist()
        groups.append(
            [trajectory(reward * i, turn(prompt, ids, [-5.0] * 5), example=example) for i, ids in enumerate(replies)]
        )
    return collection(*groups)


async def metrics_of(a, trajectories):
    status = await train(a, trajectories)
    assert status.status == "completed", status.message
    return status.metadata["metrics"]


def weights(a):
    return {name: p.detach().clone() for name, p in a.policy.model.named_parameters()}


def everything(a):
    """Weights, masters and AdamW's state."""
    state = [value for values in a.learner.optimizer.state.values() for value in values.values()]
    return [*weights(a).values(), *[p.detach().clone() for p in a.learner.trained.parameters], *state]


def far(one, other):
    """How far two sets of weights lie apart, as a share of the way that the first has come from the random ones."""
    start = dict(random_model().named_parameters())
    way = torch.cat([(one[name].float() - start[name]).flatten() for name in start])
    apart = torch.cat([(one[name].float() - other[name].float()).flatten() for name in start])
    return (apart.norm() / way.norm()).item()


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", HALF)
async def test_steps_below_the_spacing_of_the_weights_add_up(dtype, tmp_path):
    model = stored(tmp_path, "float32")
    moved = {}
    for kind in ("float32", dtype):
        a = adapter(model, kind, max_logprob_gap=None, max_staleness=99)
        before = weights(a)
        for seed in range(4):
            await metrics_of(a, fixed(seed))
        after = a.learner.trained.by_name
        moved[kind] = {name: after[name].detach() - before[name].float() for name in before}
    share = {
        kind: sum(int((change != 0).sum()) for change in changes.values()) / sum(c.numel() for c in changes.values())
        for kind, changes in moved.items()
    }
    assert share[dtype] > 0.95 * share["float32"] > 0.5
    # And they go where they go in float32: AdamW's first steps are as long as the learning rate, whatever the gradient.
    exact, found = (torch.cat([c.flatten() for c in moved[kind].values()]) for kind in ("float32", dtype))
    assert torch.nn.functional.cosine_similarity(exact, found, dim=0) > (0.97 if dtype == "float16" else 0.85)


@pytest.mark.parametrize("dtype", HALF)
async def test_model_has_the_values_of_its_masters_rounded(dtype, tmp_path):
    a = adapter(stored(tmp_path, "float32"), dtype)
    await metrics_of(a, await rollouts(a, by_first_token))
    masters = a.learner.trained.masters
    assert masters.keys() == weights(a).keys()
    for name, weight in weights(a).items():
        assert weight.dtype == getattr(torch, dtype) and masters[name].dtype == torch.float32
        assert torch.equal(weight, masters[name].to(weight.dtype))
    assert all(p.grad is None for p in [*a.policy.model.parameters(), *masters.values()])


async def test_float32_weights_are_trained_without_copies(tmp_path):
    a = adapter(stored(tmp_path, "float32"), "float32")
    assert a.learner.trained.masters == {}
    assert all(p is q for p, q in zip(a.learner.trained.parameters, a.policy.model.parameters(), strict=True))


async def test_gradients_of_many_micro_batches_are_added_up_in_float32(tmp_path):
    model, changes = stored(tmp_path, "float32"), []
    for tokens in (8, 4096):
        a = adapter(
            model, "bfloat16", micro_batch_tokens=tokens, optimizer_steps=1, max_logprob_gap=None, max_staleness=9
        )
        await metrics_of(a, fixed())
        changes.append({name: master.detach().clone() for name, master in a.learner.trained.masters.items()})
    assert far(*changes) < 0.3


async def test_weights_that_somebody_else_puts_into_the_model_are_trained_from_there(tmp_path):
    a = adapter(stored(tmp_path, "float32"), "bfloat16", max_logprob_gap=None, max_staleness=9)
    await metrics_of(a, fixed())
    other = LocalPolicy(random_model(seed=7).bfloat16(), byte_tokenizer())
    a.policy.take(other.weights()[2], 5)
    await metrics_of(a, fixed(1))
    for name, p in other.model.named_parameters():
        assert torch.allclose(a.learner.trained.masters[name], p.float(), atol=1e-4)


@pytest.mark.parametrize("reward", [1e-6, 1e3])
async def test_gradients_too_small_or_too_large_for_float16_are_trained_on(reward, tmp_path):
    model, norms = stored(tmp_path, "float32"), []
    for dtype in ("float32", "float16"):
        # The gradient is as large as the rewards.
        a = adapter(model, dtype, optimizer_steps=1, max_logprob_gap=None, max_staleness=9, scale_rewards=False)
        norms.append((await metrics_of(a, fixed(reward=reward)))["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert (a.learner._scale < FLOAT16_SCALE) == (reward > 1)


# ── how many have moved ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", *HALF])
async def test_share_of_weights_that_a_job_has_moved_is_among_its_metrics(dtype, tmp_path):
    a = adapter(stored(tmp_path, "float32"), dtype, max_logprob_gap=None, max_staleness=9)
    before = {name: value.detach().clone() for name, value in a.learner.trained.by_name.items()}
    share = (await metrics_of(a, fixed()))["weights_moved"]
    changed = [value != before[name] for name, value in a.learner.trained.by_name.items()]
    assert share == pytest.approx(sum(int(c.sum()) for c in changed) / sum(c.numel() for c in changed))
    assert share > 0.5


async def test_share_is_near_zero_where_steps_are_lost_in_rounding(tmp_path):
    a = adapter(stored(tmp_path, "float32"), "float32", learning_rate=1e-13, max_logprob_gap=None, max_staleness=9)
    assert (await metrics_of(a, fixed()))["weights_moved"] < 0.01


async def test_share_of_large_weights_is_measured_on_some_of_them(monkeypatch, tmp_path):
    a = adapter(stored(tmp_path, "float32"), "float32", max_logprob_gap=None, max_staleness=9)
    monkeypatch.setattr("finetune_nb.backends.local.weights.MOST_SAMPLED", 100)
    sample = a.learner.trained.sample()
    assert max(values.numel() for values in sample) <= 100
    with torch.no_grad():
        for weight in a.policy.model.parameters():
            weight.view(-1)[: weight.numel() // 2] += 1
    assert a.learner.trained.share_changed(sample) == pytest.approx(0.5, abs=0.02)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", HALF)
async def test_run_that_was_resumed_equals_one_that_was_not(dtype, tmp_path):
    model = stored(tmp_path / "model", "float32")
    straight = adapter(model, dtype)
    await metrics_of(straight, await rollouts(straight, by_first_token))
    await straight.save_checkpoint(tmp_path / "one")
    resumed = adapter(model, dtype)
    await resumed.load_checkpoint(tmp_path / "one")
    for a in (straight, resumed):
        await metrics_of(a, await rollouts(a, by_first_token))
    assert all(torch.equal(*pair) for pair in zip(everything(straight), everything(resumed), strict=True))
    await straight.save_checkpoint(tmp_path / "two")
    await resumed.save_checkpoint(tmp_path / "again")
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert digest_of(tmp_path / "two" / file) == digest_of(tmp_path / "again" / file)


async def test_checkpoint_without_masters_is_continued_from_its_weights(tmp_path):
    """As they were written before there were masters, with AdamW's means in bfloat16."""
    a = adapter(stored(tmp_path / "model", "float32"), "bfloat16")
    await metrics_of(a, await rollouts(a, by_first_token))
    await a.save_checkpoint(tmp_path / "one")
    path, manifest = tmp_path / "one" / "optimizer.safetensors", tmp_path / "one" / "manifest.json"
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith("master/")}
    save_file({name: t if name.startswith("step/") else t.bfloat16() for name, t in tensors.items()}, path)
    said = json.loads(manifest.read_text())
    said["files"]["optimizer.safetensors"] = digest_of(path).model_dump()
    manifest.write_text(json.dumps(said))
    again = adapter(str(tmp_path / "model"), "bfloat16")
    await again.load_checkpoint(tmp_path / "one")
    assert all(torch.equal(p, weights(a)[name]) for name, p in weights(again).items())
    for name, master in again.learner.trained.masters.items():
        assert torch.equal(master, weights(a)[name].float())
    await metrics_of(again, await rollouts(again, by_first_token))


async def test_saving_and_loading_in_the_trained_dtype_changes_nothing(tmp_path):
    for dtype in HALF:
        a = adapter(stored(tmp_path / dtype, dtype), dtype)
        await metrics_of(a, await rollouts(a, by_first_token))
        await a.save(tmp_path / "saved")
        again = LocalPolicy.load(tmp_path / "saved", device="cpu", dtype=dtype)
        for name, p in again.model.named_parameters():
            assert torch.equal(p, weights(a)[name])


async def test_model_that_came_in_float32_is_saved_with_all_that_it_has_learned(tmp_path):
    a = adapter(stored(tmp_path / "model", "float32"), "bfloat16")
    await metrics_of(a, await rollouts(a, by_first_token))
    await a.save(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, p in saved.named_parameters():
        assert torch.equal(p, a.learner.trained.masters[name])
