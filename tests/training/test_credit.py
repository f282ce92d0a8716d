"""Credit by turns: what shaped rewards mean, by hand, and what they leave as it is."""

import math

import numpy as np
import pytest

pytest.importorskip("torch")

from finetune_nb.errors import BackendError
from finetune_nb.rollouts.episodes import is_sampled, sampled_turns
from finetune_nb.training.batch import training_batch, turn_advantages
from finetune_nb.types import DPOItem, EpisodeItem, Trajectory, TrajectoryCollection


def rollout(reward, turns, shaped=None, tools=True, finish_reason="stop"):
    """A conversation whose turns sample token 10, 11, ... behind all that was said before."""
    episode, ids = [EpisodeItem(role="user", content="?")], [3]
    for turn in range(turns):
        metadata = {"prompt_token_ids": list(ids), "token_ids": [10 + turn], "temperature": 1.0}
        if turn == turns - 1:
            metadata["finish_reason"] = finish_reason
        episode.append(EpisodeItem(role="assistant", content="a", logprobs=[-1.0], metadata=metadata))
        ids += [10 + turn, 4]
        if tools and turn < turns - 1:
            episode.append(EpisodeItem(role="tool", content="t"))
    return Trajectory(episode=episode, reward=reward, shaped_rewards=shaped, metadata={"id": "q", "generation": 0})


@pytest.mark.parametrize(
    ("logprobs", "sampled"),
    [([-1.0], True), ([], False), ({"content": [{"token": "a", "logprob": -1.0}]}, True), ({"content": []}, False)],
)
def test_assistants_turn_without_a_logprob_was_not_sampled_in_whatever_form_they_come(logprobs, sampled):
    assert is_sampled(EpisodeItem(role="assistant", content="a", logprobs=logprobs)) is sampled
    assert not is_sampled(EpisodeItem(role="user", content="a", logprobs=logprobs))
    assert not is_sampled(DPOItem(prompt="a", chosen_response="b", rejected_response="c"))


def test_turn_has_the_advantage_of_what_was_still_to_earn_when_it_began():
    first = rollout(1.0, 2, [0.25, 0.75])
    second = rollout(0.5, 2, [0.5, 0.0])
    # to go: 1, 0.75 and 0.5, 0; means 0.75, 0.375
    assert turn_advantages([first, second], scale_rewards=False) == [[0.25, 0.375], [-0.25, -0.375]]
    deviation = math.sqrt(2 * 0.25**2) + 1e-4
    assert turn_advantages([first, second])[0] == pytest.approx([0.25 / deviation, 0.375 / deviation])


def test_turn_is_not_praised_for_what_was_earned_before_it():
    good, bad = turn_advantages([rollout(1.0, 2, [1.0, 0.0]), rollout(0.0, 2, [0.0, 0.0])], scale_rewards=False)
    assert (good, bad) == ([0.5, 0.0], [-0.5, 0.0])


def test_what_shaped_rewards_leave_is_earned_at_the_end():
    (first, _) = turn_advantages([rollout(1.0, 3, [0.2, 0.0, 0.0]), rollout(0.0, 3)], scale_rewards=False)
    assert first == pytest.approx([0.5, 0.4, 0.4])


def test_episode_that_ended_earlier_counts_with_what_it_had_to_earn_last():
    longer, shorter = turn_advantages([rollout(1.0, 3, [0.0, 0.5, 0.5]), rollout(0.2, 1, [0.2])], scale_rewards=False)
    assert longer == pytest.approx([0.4, 0.4, 0.5 - 0.35])
    assert shorter == pytest.approx([-0.4])


def test_values_that_come_one_a_message_belong_to_the_turn_before_them():
    per_message = rollout(1.0, 2, [0.1, 0.2, 0.3, 0.4])  # user, assistant, tool, assistant
    per_turn = rollout(1.0, 2, [0.6, 0.4])
    other = rollout(0.0, 2)
    expected = turn_advantages([per_turn, other])
    assert turn_advantages([per_message, other])[0] == pytest.approx(expected[0])


def test_shaped_rewards_of_zero_change_nothing():
    plain = [rollout(r, t) for r, t in ((1.0, 2), (0.0, 3), (0.5, 1), (math.nan, 2))]
    shaped = [t.model_copy(update={"shaped_rewards": [0.0] * len(sampled_turns(t))}) for t in plain]

    def learned(group):
        found = training_batch(TrajectoryCollection(trajectories=[group], run_id="r"))
        return [value for sequence in found.sequences() for value in sequence.advantages]

    assert learned(shaped) == pytest.approx(learned(plain))
    assert any(learned(plain))


def test_each_token_gets_the_advantage_of_its_turn_and_context_none():
    group = [rollout(1.0, 2, [1.0, 0.0]), rollout(0.0, 2, [0.0, 0.0])]
    first, _ = training_batch(TrajectoryCollection(trajectories=[group], run_id="r"), scale_rewards=False).sequences()
    assert first.ids == [3, 10, 4, 11]
    assert first.advantages == [0.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("shaped", [[1.0], [1.0] * 3, [math.nan, 0.0], [math.inf, 0.0]])
def test_shaped_rewards_that_fit_neither_turns_nor_messages_are_refused(shaped):
    with pytest.raises(BackendError, match=r"'q', generation 0 has .*shaped_rewards"):
        turn_advantages([rollout(1.0, 2, shaped), rollout(0.0, 2)])


@pytest.mark.parametrize(("truncated", "trained"), [("train", 3), ("mask", 2)])
def test_cut_episode_is_trained_on_as_configured_and_its_reward_counts_either_way(truncated, trained):
    group = [rollout(1.0, 1), rollout(0.0, 2), rollout(0.0, 1, finish_reason="length")]
    learned = training_batch(TrajectoryCollection(trajectories=[group], run_id="r"), False, truncated)
    assert (len(learned.trajectories), learned.truncated) == (trained, 1)
    assert next(learned.sequences()).advantages[-1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_steps_take_each_trajectory_once_and_cut_through_few_groups_where_these_stay_whole(steps):
    groups = [[rollout(float(i == 0), 1) for i in range(4)] for _ in range(5)]
    groups[2] = [rollout(1.0, 1), rollout(1.0, 1)]  # teaches nothing
    learned = training_batch(TrajectoryCollection(trajectories=groups, run_id="r"))
    assert (learned.sizes, learned.groups, learned.groups_without_signal) == ([4] * 4, 4, 1)
    orders = set()
    for seed in range(20):
        parts = learned.parts(steps, np.random.default_rng(seed), whole_groups=True)
        assert sorted(place for part in parts for place in part) == list(range(16))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sum(len({place // 4 for place in part}) for part in parts) <= 4 + steps - 1
        orders.add(tuple(place for part in parts for place in part))
        mixed = learned.parts(steps, np.random.default_rng(seed))
        assert [part.tolist() for part in mixed] == [
            part.tolist() for part in np.array_split(np.random.default_rng(seed).permutation(16), steps)
        ]
    assert len(orders) == 20


def one_turn(example, reward):
    made = rollout(reward, 1)
    made.metadata["id"] = example
    return made


GROUPS = [[one_turn("a", 1.0), one_turn("a", 0.0), one_turn("a", 0.5)],
          [one_turn("b", 1.0), one_turn("b", 1.0), one_turn("b", 1.0)],
          [one_turn("c", 3.0), one_turn("c", math.nan), one_turn("c", 1.0)]]  # fmt: skip


def advantages_of(**options):
    batch = training_batch(TrajectoryCollection(trajectories=GROUPS, run_id="r"), **options)
    return [sequence.advantages[-1] for sequence in batch.sequences()]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    """RLOO (arXiv 2402.14740): r_i minus the mean of the other rewards of its group."""
    found = advantages_of(scale_rewards=False, baseline="leave one out")
    assert found == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5, 3 - 1, 1 - 3])


def test_the_deviation_of_a_whole_batch_is_that_of_all_its_rewards():
    """As TRL's scale_rewards="batch": the sample standard deviation of all rewards, also of groups that teach nothing."""
    rewards = [1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 3.0, 1.0]
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) + 1e-4
    expected = [0.5, -0.5, 0.0, 1.0, -1.0]
    assert advantages_of(scale_rewards="batch") == pytest.approx([value / deviation for value in expected])


def test_what_teaches_nothing_is_counted_for_whoever_wants_it_in_the_mean():
    batch = training_batch(TrajectoryCollection(trajectories=GROUPS, run_id="r"))
    assert (batch.idle_tokens, batch.idle_sequences, batch.groups_without_signal) == (3, 3, 1)
