"""`ft.compare` where the runs' rewards differ: each looks good under its own, so they are compared under each."""

from __future__ import annotations

import numpy as np
import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

ROWS = sums(8)


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def close_to(output, answer):
    return -abs(int(output) - int(answer)) / 10


def short(output):
    return 1.0 - len(output) / 5


async def asked(output, answer):
    return float(output == answer)


def adapter(shift=0):
    return FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: str((seed + shift) % 120)))


def make_run(folder, reward, name, shift=0, epochs=2):
    run = ft.Run(solve, reward, ROWS, generations=3, adapter=adapter(shift), output_dir=folder, name=name, seed=1)
    for _ in range(epochs):
        ft.run_sync(run.next_epoch())
    return run


def mean_gain(first, other):
    """The mean difference of the groups' means, by a plain loop."""
    gains = [
        other[epoch].after.means[group] - first[epoch].after.means[group]
        for epoch in range(2)
        for group in range(len(ROWS))
    ]
    return float(np.mean(gains))


@pytest.mark.parametrize(
    "rewards",
    [(close_to, short), ({"close": close_to, "short": (short, 0.1)}, {"close": close_to, "short": (short, 3.0)})],
)
def test_runs_with_different_rewards_are_compared_under_each(tmp_path, closing, rewards):
    a, b = (
        closing(make_run(tmp_path, each, name, 7 * i)) for i, (each, name) in enumerate(zip(rewards, "ab", strict=True))
    )
    comparison = ft.compare([a, b])
    assert list(comparison.under) == ["a", "b"] and comparison.notice is None
    for name, reward in zip("ab", rewards, strict=True):
        (difference,) = comparison.under[name]
        assert difference.pairs == 16
        assert difference.mean == pytest.approx(mean_gain(a.rescore(reward), b.rescore(reward)), abs=1e-12)
    assert comparison.under["a"] != comparison.under["b"]
    assert "by the reward of a, b against a" in repr(comparison) and "by the reward of" in comparison._repr_html_()


def test_runs_with_one_reward_are_compared_by_what_they_recorded(tmp_path, closing):
    a, b = closing(make_run(tmp_path, close_to, "a")), closing(make_run(tmp_path, close_to, "b", 7))
    comparison = ft.compare([a, b])
    assert comparison.under == {} and comparison.notice is None
    b.close()
    reopened = ft.compare([a, ft.Run.open(b.folder)])
    assert reopened.under == {} and reopened.notice is None
    assert reopened.differences == comparison.differences


def test_a_reward_that_may_cost_is_called_only_where_that_is_asked_for(tmp_path, closing):
    a, b = closing(make_run(tmp_path, close_to, "a")), closing(make_run(tmp_path, asked, "b", 7))
    comparison = ft.compare([a, b])
    assert comparison.under == {} and 'ft.compare(..., rewards="all")' in comparison.notice
    assert "the rewards differ" in repr(comparison) and "the rewards differ" in comparison._repr_html_()
    everything = ft.compare([a, b], rewards="all")
    assert everything.under["b"][0].mean == pytest.approx(mean_gain(a.rescore(asked), b.rescore(asked)), abs=1e-12)
    own = ft.compare([a, b], rewards="own")
    assert own.under == {} and own.notice is None
    with pytest.raises(ConfigError, match="rewards is 'both'; expected 'all', 'own', or None"):
        ft.compare([a, b], rewards="both")


def test_a_run_that_was_opened_without_its_reward_is_named(tmp_path, closing):
    a, b = closing(make_run(tmp_path, close_to, "a")), make_run(tmp_path, short, "b", 7)
    b.close()
    read = closing(ft.Run.open(b.folder))
    assert "that of b is not known here" in ft.compare([a, read]).notice
    with pytest.raises(ConfigError, match=r"that of b is not known here.* Run\.open\(folder, workflow, reward\)"):
        ft.compare([a, read], rewards="all")


def test_a_fork_with_another_reward_is_compared_on_the_epochs_of_both(tmp_path, closing):
    run = closing(make_run(tmp_path, close_to, "a", epochs=3))
    fork = closing(run.fork(epoch=0, reward=short, adapter=adapter()))
    for _ in range(2):
        ft.run_sync(fork.next_epoch())
    (difference,) = ft.compare([run, fork]).under[fork.id]
    assert difference.pairs == 16 and difference.mean == 0.0  # nothing is trained here, so the rollouts are the same
