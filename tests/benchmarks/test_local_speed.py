"""Speed of the local backend with the embedded model, on one torch thread. Figures are printed (pytest -s); only ratios
of one run can fail.
"""

import asyncio
import random

import pytest
from measuring import by_turns

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.types import EpisodeItem, EpisodeKey, SamplingParams, Trajectory, TrajectoryCollection  # noqa: E402

pytestmark = pytest.mark.benchmark
ROWS, NEW = 320, 24


@pytest.fixture(scope="module")
def policy():
    policy = LocalPolicy.load("embedded", threads=1)
    policy._end_ids = frozenset()  # every reply has NEW tokens, so that both sides do the same work
    return policy


@pytest.fixture(scope="module")
def prompts(policy):
    """40 different ones, each for a group of 8."""
    questions = [f"{10 + i}{'+7' * (1 + i % 4)}" for i in range(ROWS // 8)]
    return [policy.render([{"role": "user", "content": q}]) for q in questions for _ in range(8)]


async def rollouts(policy, prompts):
    async def one(i, prompt):
        with policy.episode(EpisodeKey("train", 0, i // 8, i % 8)):
            return await policy.sample(prompt, SamplingParams(1.0, NEW), seed=i)

    return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))


@pytest.mark.proof
def test_concurrent_requests_are_sampled_at_four_fifths_of_the_speed_of_one_generate_or_more(policy, prompts):
    batch = policy.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}

    def generate():
        with policy.exclusive.hold(), torch.inference_mode():
            policy.model.generate(**batch, **lengths, do_sample=True, top_k=0, top_p=1.0)

    found = by_turns(9, ours=lambda: asyncio.run(rollouts(policy, prompts)), generate=generate)
    ours, theirs = (ROWS * NEW / found[side] for side in ("ours", "generate"))
    share = found.ratio("generate", "ours")
    print(f"\n{ROWS} concurrent requests: {ours:,.0f} tokens/s; one generate: {theirs:,.0f} tokens/s; {share:.0%}")
    assert share > 0.8  # what it comes to on a quiet machine is in notebooks/reference/measured.md


def test_concurrent_requests_are_sampled_at_least_five_times_faster_than_one_by_one(policy, prompts):
    async def one_by_one():
        for i, prompt in enumerate(prompts[::10]):
            await policy.sample(prompt, SamplingParams(1.0, NEW), seed=i)

    found = by_turns(
        3, together=lambda: asyncio.run(rollouts(policy, prompts)), alone=lambda: asyncio.run(one_by_one())
    )
    requests = len(prompts[::10])
    times = found.ratio("alone", "together") * ROWS / requests
    print(f"\none by one: {NEW * requests / found['alone']:,.0f} tokens/s; together {times:.0f} times faster")
    assert times > 5


@pytest.mark.proof
def test_agents_of_several_turns_share_batches_as_large_as_one_generate(policy, prompts):
    """32 agents of three turns, their tools between them a few milliseconds apart, beside three times one `generate` of 32
    rows, of the same prompts."""
    agents, turns = 32, 3
    sizes, asked = [], [{} for _ in range(turns)]
    run = policy.sampler._run

    def watched(batch):
        sizes.append(len(batch))
        run(batch)

    async def agent(i):
        with policy.episode(EpisodeKey("train", 0, i, 0)):
            ids = prompts[8 * i % ROWS]
            for turn in range(turns):
                asked[turn][i] = ids
                sample = await policy.sample(ids, SamplingParams(1.0, NEW), seed=10 * i + turn)
                await asyncio.sleep(0.0005 * (i % 7))  # a tool
                ids = [*ids, *sample.ids, *prompts[i][-4:]]

    async def all_agents():
        await asyncio.gather(*(agent(i) for i in range(agents)))

    asyncio.run(all_agents())
    rows = [[ids for _, ids in sorted(turn.items())] for turn in asked]
    batches = [policy.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt") for ids in rows]

    def generate():
        with policy.exclusive.hold(), torch.inference_mode():
            lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
            for batch in batches:
                policy.model.generate(**batch, **lengths, do_sample=True, top_k=0, top_p=1.0)

    policy.sampler._run = watched
    try:
        found = by_turns(9, ours=lambda: asyncio.run(all_agents()), generate=generate)
    finally:
        policy.sampler._run = run
    ours, theirs = (agents * NEW * turns / found[side] for side in ("ours", "generate"))
    share = found.ratio("generate", "ours")
    print(
        f"\n32 agents of 3 turns: {ours:,.0f} tokens/s; one generate of 32 a turn: {theirs:,.0f} tokens/s; {share:.0%}"
    )
    print(f"batches of {min(sizes)} to {max(sizes)}")
    assert share > 0.8


def test_training_step_costs_less_than_the_rollouts_that_it_learns_from(policy, prompts):
    samples = asyncio.run(rollouts(policy, prompts))
    groups = []
    for start in range(0, ROWS, 8):
        group = []
        for i in range(start, start + 8):
            metadata = {"prompt_token_ids": prompts[i], "token_ids": samples[i].ids, "temperature": 1.0}
            item = EpisodeItem(role="assistant", content="", logprobs=samples[i].logprobs, metadata=metadata)
            group.append(Trajectory(episode=[item], reward=float(i % 2), metadata={"id": start}))
        groups.append(group)
    adapter = LocalGRPOAdapter(LocalGRPOConfig(), policy=policy)

    async def epoch():
        collection = TrajectoryCollection(trajectories=groups, run_id="speed")
        return await adapter.wait_until_complete(await adapter.submit(collection))

    status = asyncio.run(epoch())
    assert status.metadata["metrics"]["optimizer_steps"] == 8
    found = by_turns(3, training=lambda: asyncio.run(epoch()), sampling=lambda: asyncio.run(rollouts(policy, prompts)))
    step, sampling = found["training"] / 8, found["sampling"]
    print(f"\n{step:.3f} s per optimizer step of {ROWS // 8} trajectories; rollouts {sampling:.3f} s")
    assert found.ratio("training", "sampling") < 8


@pytest.mark.proof
def test_whole_groups_train_faster_with_long_prompts_and_short_replies(policy):
    draw = random.Random(0)

    def ids(count):
        return [draw.randrange(1, policy.vocabulary) for _ in range(count)]

    def group(example):
        prompt, made = ids(200), []
        for i in range(8):
            metadata = {"prompt_token_ids": prompt, "token_ids": ids(12), "temperature": 1.0}
            item = EpisodeItem(role="assistant", content="", logprobs=[-1.0] * 12, metadata=metadata)
            made.append(Trajectory(episode=[item], reward=float(i % 2), metadata={"id": example}))
        return made

    collection = TrajectoryCollection(trajectories=[group(example) for example in range(12)], run_id="speed")

    def trained(whole_groups):
        config = LocalGRPOConfig(whole_groups=whole_groups, optimizer_steps=3, max_logprob_gap=None, learning_rate=1e-9)
        adapter = LocalGRPOAdapter(config, policy=policy)

        async def job():
            return await adapter.wait_until_complete(await adapter.submit(collection))

        return lambda: asyncio.run(job())

    found = by_turns(5, whole=trained(True), mixed=trained(False))
    assert all(status.metadata["metrics"]["optimizer_steps"] == 3 for status in found.made.values())
    ratio = found.ratio("whole", "mixed")
    print(f"\n96 replies of 12 tokens to 12 prompts of 200, 3 steps: {found['whole']:.2f} s CPU, drawn one by one "
          f"{found['mixed']:.2f}; {ratio:.2f}")  # fmt: skip
    assert ratio < 0.8


def test_recording_the_entropy_costs_little_of_the_sampling(policy, prompts):
    def sampled(recording):
        policy.record_entropy = recording
        try:
            samples = asyncio.run(rollouts(policy, prompts))
        finally:
            policy.record_entropy = False
        assert all((sample.entropies is not None) is recording for sample in samples)

    found = by_turns(9, recorded=lambda: sampled(True), plain=lambda: sampled(False))
    more = found.ratio("recorded", "plain") - 1
    print(f"\n{ROWS} concurrent requests: the entropies of all tokens take {more:.1%} more")
    assert more < 0.10  # the target is 0.03; runs on a shared machine differ by as much
