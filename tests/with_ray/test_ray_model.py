"""The embedded model, sampled by replicas in Ray's workers."""

import statistics

import pytest

import finetune_nb as ft
from finetune_nb.examples import calculator

pytestmark = pytest.mark.slow

EPOCHS = 6


def demo(folder, engine, seed, **overrides):
    overrides = {"run__seed": seed, "run__deterministic": False, "run__engine": engine, **overrides}
    overrides |= {"finetuning__run_configuration__validation_dataset": None, "finetuning__output_dir": str(folder)}
    return ft.Run.from_config(calculator.CONFIG, **overrides)


async def test_model_learns_as_it_does_locally_and_takes_hardly_longer(ray, tmp_path, closing, capsys):
    here = [closing(demo(tmp_path / "here", "local", seed)) for seed in (0, 1, 2)]
    there = closing(demo(tmp_path / "there", "ray", 0, run__ray={"workers": 2}))
    for _ in range(EPOCHS):  # by turns, so that whatever else the machine does slows both
        await here[0].next_epoch()
        await there.next_epoch()
    for run in here[1:]:
        for _ in range(EPOCHS):
            await run.next_epoch()

    means = [statistics.mean(epoch.metrics.mean_reward for epoch in run) for run in (*here, there)]
    ratios = [b.seconds["total"] / a.seconds["total"] for a, b in zip(here[0], there, strict=True)][1:]
    with capsys.disabled():
        print(f"\nmean reward of {EPOCHS} epochs: {[round(m, 3) for m in means[:3]]} here, {means[3]:.3f} on Ray")
        middle, each = statistics.median(ratios), [round(ratio, 2) for ratio in ratios]
        print(f"an epoch on Ray takes {each} of what it takes here, {middle:.2f} in the middle; target 1.15")
        for run in (here[0], there):
            print([{part: round(seconds, 2) for part, seconds in epoch.seconds.items()} for epoch in run])
    noise = 3 * 0.5 / (40 * 8 * EPOCHS) ** 0.5  # three standard errors of a mean of so many rewards of 0 or 1
    assert min(means[:3]) - noise <= means[3] <= max(means[:3]) + noise
    assert min(ratios) < 1.15  # on a busy machine single epochs take twice their time, here or there
    assert middle < 1.6

    assert not any(epoch.collection.failures for epoch in there)
    for epoch in there:
        versions = {t.metadata["policy_version"] for group in epoch.collection.trajectories for t in group}
        assert versions == {epoch.index}
        assert epoch.train_metrics["logprob_gap"] < 1e-4


async def test_replica_of_a_lora_policy_is_sent_the_adapter_alone(ray, tmp_path):
    import pickle

    from finetune_nb.backends.local.config import LoRAConfig
    from finetune_nb.backends.local.policy import LocalPolicy
    from finetune_nb.types import SamplingParams

    policy = LocalPolicy.load("embedded", lora=LoRAConfig(rank=2), seed=1)
    replica = pickle.loads(pickle.dumps(policy.replica()))()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=None, std=0.3)
    _, _, weights = policy.weights()
    assert weights
    assert all("lora_" in name for name in weights)
    replica.take(weights, 5)
    assert replica.version == 5
    prompt = policy.render([{"role": "user", "content": "what is 3 + 4 ?"}])
    params = SamplingParams(1.0, 8)
    ours, theirs = await policy.sample(prompt, params, 3), await replica.sample(prompt, params, 3)
    assert ours.ids == theirs.ids
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    with pytest.raises(ft.BackendError, match="does not fit the replica's model"):
        replica.take({"nothing": ("float32", weights[next(iter(weights))][1])}, 6)
