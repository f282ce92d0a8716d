"""Frames and plots: seconds and bytes beside the obvious way, in one run. Targets are printed."""

from __future__ import annotations

import random
from dataclasses import replace

import pandas as pd
import pytest
from factories import make_epoch
from measuring import by_turns
from records import epoch_of, stored

from finetune_nb import frames, plots
from finetune_nb.types import EpisodeItem, EpisodeItemRole, Trajectory

TOKENS = 64


def rollout(group, generation, tokens, draw):
    metadata = {"token_ids": [draw.randrange(50_000) for _ in range(tokens)], "tokens": ["tok"] * tokens}
    turn = EpisodeItem.model_construct(
        role=EpisodeItemRole.ASSISTANT, content="4", logprobs=[-draw.random() for _ in range(tokens)], metadata=metadata
    )
    about = {"id": f"q{group}", "generation": generation, "scores": {"a": 1.0}, "policy_version": 0}
    return Trajectory.model_construct(episode=[turn], reward=draw.random(), shaped_rewards=None, metadata=about)


def groups(count, tokens):
    draw = random.Random(0)
    return [[rollout(g, k, tokens, draw) for k in range(8)] for g in range(count // 8)]


@pytest.mark.proof
@pytest.mark.benchmark(group="views")
def test_100000_trajectories_become_a_frame_faster_and_smaller_than_their_dumps(benchmark, tmp_path):
    rollouts = groups(100_000, 8)
    epoch = epoch_of(rollouts)
    read = stored(tmp_path, epoch)
    sides = {
        "own": lambda: frames.trajectories([epoch]),
        "read": lambda: frames.trajectories(read),
        "plain": lambda: pd.DataFrame([t.model_dump() for group in rollouts for t in group]),
    }
    found = benchmark.pedantic(by_turns, (3, True), sides, rounds=1)  # garbage is collected, as in a notebook
    own, plain = found.made["own"], found.made["plain"]
    size, plain_size = (f.memory_usage(deep=True).sum() / 1e6 for f in (own, plain))
    print(f"\n100,000 trajectories: read from the folder {found['read']:.2f} s CPU, from memory {found['own']:.2f} s, "
          f"{size:.0f} MB (targets 0.20 s, 25 MB); of model_dump: {found['plain']:.2f} s, {plain_size:.0f} MB")  # fmt: skip
    assert len(own) == 100_000
    pd.testing.assert_frame_equal(found.made["read"], own)
    assert found.ratio("plain", "own") > 2
    assert found.ratio("own", "read") > 1.5  # no trajectory is made, or looked at
    assert size < 25


@pytest.mark.benchmark(group="views")
def test_the_frame_of_trajectories_costs_little_beside_that_of_their_tokens(benchmark, tmp_path):
    epoch = epoch_of(groups(10_000, TOKENS))
    read = stored(tmp_path, epoch)
    found = {}
    for name, epochs in (("memory", [epoch]), ("disk", read)):
        found[name] = by_turns(
            3,
            trajectories=lambda epochs=epochs: frames.trajectories(epochs),
            tokens=lambda epochs=epochs: frames.tokens(epochs),
            logprobs=lambda epochs=epochs: frames.tokens(epochs, columns=["trajectory", "logprob"]),
        )
        assert len(found[name].made["tokens"]) == 10_000 * TOKENS
    benchmark.pedantic(lambda: frames.tokens(read), rounds=1)
    print(f"\n10,000 trajectories of {TOKENS} tokens, s CPU (targets 0.03 and 0.5): " + "; ".join(
        f"from {name} trajectories {of['trajectories']:.3f}, tokens {of['tokens']:.2f}, their logprobs alone "
        f"{of['logprobs']:.2f}" for name, of in found.items()
    ))  # fmt: skip
    assert found["memory"].ratio("tokens", "trajectories") > 3
    assert found["disk"].ratio("logprobs", "tokens") < 1


@pytest.mark.benchmark(group="views")
def test_ten_thousand_epochs_are_drawn_in_time_that_grows_more_slowly_than_they_do(benchmark):
    one = make_epoch([[1, 0], [1, 1]], validation=0.5)
    epochs = [replace(one, index=index, validations=one.validations * (index % 50 == 0)) for index in range(10_000)]
    found = by_turns(
        5,
        few=lambda: plots.plot_rewards(epochs[:100]).png(),
        drawn=lambda: plots.plot_rewards(epochs),
        many=lambda: plots.plot_rewards(epochs).png(),
    )
    benchmark.pedantic(lambda: plots.plot_rewards(epochs).png(), rounds=1)
    print(
        f"\nplot_rewards of 10,000 epochs: {found['drawn']:.2f} s CPU, as PNG {found['many']:.2f} s (target 0.3 s); "
        f"of 100: {found['few']:.2f} s as PNG"
    )
    assert found.ratio("many", "few") < 20
