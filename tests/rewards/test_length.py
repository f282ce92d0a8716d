"""A reward for the length of what was sampled."""

from __future__ import annotations

import os

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.testing import sums
from finetune_nb.types import EpisodeItem, Trajectory


def of_length(tokens):
    turn = EpisodeItem(role="assistant", content="a", logprobs=[-1.0] * tokens, metadata={"token_ids": [1] * tokens})
    return Trajectory(episode=[EpisodeItem(role="user", content="?"), turn], reward=0.0)


def test_it_falls_in_a_straight_line_as_in_dapos_paper():
    penalty = ft.overlong_penalty(100, margin=20)
    assert [penalty(of_length(tokens)) for tokens in (0, 80, 90, 100, 150)] == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_it_is_trls():
    trl = pytest.importorskip("trl.rewards") if not os.environ.get("CI") else __import__("trl.rewards").rewards
    theirs = trl.get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=15)
    ours = ft.overlong_penalty(50, margin=15)
    lengths = list(range(1, 70, 3))
    assert [ours(of_length(tokens)) for tokens in lengths] == pytest.approx(
        theirs([[1] * tokens for tokens in lengths])
    )


def test_all_turns_of_an_episode_count():
    turns = [of_length(6).episode[1], of_length(8).episode[1]]
    assert ft.overlong_penalty(20, margin=10)(Trajectory(episode=turns, reward=0.0)) == pytest.approx(-0.4)


async def test_it_is_a_part_of_a_reward(make_run):
    run = make_run(
        reward={"right": lambda output: 1.0, "length": (ft.overlong_penalty(2, margin=1), 0.5)}, dataset=sums(2)
    )
    await run.next_epoch()
    assert run.trajectories().score_length.between(-1, 0).all()


@pytest.mark.parametrize(("longest", "margin"), [(0, 1), (10, 0), (10, 11), (1.5, 1), (True, 1)])
def test_lengths_that_make_no_sense_are_refused(longest, margin):
    with pytest.raises(ConfigError, match="expected a"):
        ft.overlong_penalty(longest, margin)


def test_the_shortest_of_a_group_pays_nothing_and_the_longest_all():
    penalty = ft.length_penalty()
    assert penalty([of_length(tokens) for tokens in (30, 10, 20, 10)]) == [-1.0, 0.0, -0.5, 0.0]
    assert penalty([of_length(7)] * 3) == [0.0] * 3 and penalty([]) == []


async def test_lengths_are_compared_inside_each_group(make_run):
    run = make_run(reward={"right": lambda output: 1.0, "length": (ft.length_penalty(), 0.5)}, dataset=sums(2))
    await run.next_epoch()
    rows = run.trajectories()
    for _, group in rows.groupby("example", observed=True):
        assert group.score_length.max() == 0.0 and group.score_length.min() in (-1.0, 0.0)
    assert (rows.reward == 1.0 + 0.5 * rows.score_length).all()
