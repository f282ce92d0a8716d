"""What teaches and what does not: every reason, its history, and a forecast that is held against simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from factories import make_epoch
from hostile import HOSTILE, text_of, unsafe_tags
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.analysis.learning_signal import SIGNALS, LearningSignal, chance_of_spread, learning_signal
from finetune_nb.config import CurriculumSettings
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.text import plain
from finetune_nb.types import GroupReason, RolloutFailure

ON = CurriculumSettings(enabled=True, percentile=0.5, min_reward_diff=0.2, expansion_interval=100)
SIZES = (2, 4, 8, 16, 32)


def by_example(found: LearningSignal) -> dict[Any, str]:
    return dict(zip(found.groups.example, found.groups.signal.astype(str), strict=True))


# ── reasons ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_group_has_its_reason() -> None:
    rewards = {
        "teaches": [1, 0],
        "all_best": [1, 1],
        "all_worst": [0, 0],
        "all_equal": [0.5, 0.5],
        "little_spread": [0.5, 0.6],
        "beyond_percentile": [0.5, 0],
        "one_reward": [0.5, None],
        "no_reward": [None, None],
        "infinite_reward": [math.inf, 0],
    }
    failures = [RolloutFailure("failed", 0, "E"), RolloutFailure("failed", 1, "E"), RolloutFailure("teaches", 2, "E")]
    found = learning_signal(make_epoch(rewards, failures=failures, settings=ON))
    assert by_example(found) == {name: name for name in [*rewards, "failed"]}
    row = found.groups.set_index("example").loc["failed"]
    assert (row.rollouts, row.failures) == (0, 2)
    assert found.groups.set_index("example").failures["teaches"] == 1
    assert {"undecided", "subsampled", "not_submitted", *by_example(found)} == set(SIGNALS)
    assert {str(reason) for reason in GroupReason} - set(SIGNALS) == {"kept", "no_reward_spread"}


def test_without_a_curriculum_groups_without_spread_still_do_not_teach() -> None:
    found = learning_signal(make_epoch([[1, 0], [1, 1], [0.5, 0.6]]))
    assert by_example(found) == {"q0": "teaches", "q1": "all_best", "q2": "teaches"}


def test_best_and_worst_are_those_of_the_run_so_far() -> None:
    now = make_epoch([[0, 0], [0, 0]], 1)
    assert set(by_example(learning_signal(now)).values()) == {"all_equal"}
    assert set(by_example(learning_signal(now, [make_epoch([[1, 0]])])).values()) == {"all_worst"}


def test_an_example_has_its_history() -> None:
    earlier = [make_epoch({"a": [0, 0], "b": [1, 0]}, 0), make_epoch({"b": [1, 1]}, 1), make_epoch({"a": [1, 0]}, 2)]
    found = learning_signal(make_epoch({"a": [1, 1], "c": [1, 0]}, 3), earlier)
    rows = found.groups.set_index("example")
    assert rows.loc["a", ["epochs", "epochs_with_spread", "previous_mean"]].tolist() == [3, 1, 0.5]
    assert rows.epochs["c"] == 1
    assert math.isnan(rows.previous_mean["c"])
    shown = text_of(found._repr_html_())
    assert "a 2 0 → 0.5 → 1" in shown
    assert "1 of 3 epochs" in shown


def test_reasons_say_how_many_and_what_to_do() -> None:
    found = learning_signal(make_epoch([[1, 0], [1, 1], [0, 0], [0, 0]]))
    reasons = found.reasons.set_index("signal")
    assert reasons.groups.to_dict() == {"teaches": 1, "all_worst": 2, "all_best": 1}
    assert reasons.share["all_worst"] == 0.5
    assert "take harder examples" in reasons.what_to_do["all_best"]
    shown = text_of(found._repr_html_())
    for part in ("epoch 0 · 1 of 4 groups teach", "too hard as they are", "(q2, q3)", "larger or smaller groups"):
        assert part in shown
    assert repr(found).startswith(
        "epoch 0: 1 of 4 groups teach\n    1  their rewards differ, and they are trained on (q0)"
    )


def test_rollouts_cut_at_the_token_limit_are_pointed_at() -> None:
    epoch = make_epoch([[1, 0], [0, 0, 0]])
    for trajectory in epoch.collection.trajectories[1][:2]:
        trajectory.episode[-1].metadata = {"finish_reason": "length"}  # type: ignore[union-attr]
    assert "2 rollouts of them were cut at the token limit: raise max_tokens" in text_of(
        learning_signal(epoch)._repr_html_()
    )


def test_an_epoch_with_nothing_is_shown_too() -> None:
    for epoch in (make_epoch({}), make_epoch([[None, None]]), make_epoch({}, failures=[RolloutFailure(None, 0, "E")])):
        found = learning_signal(epoch)
        assert len(found.sizes) == 0
        assert "0 of" in repr(found)
        found._repr_html_()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_ids_are_text(text: str) -> None:
    found = learning_signal(make_epoch({text: [1, 0], text + "2": [0, 0]}, 1), [make_epoch({text: [1, 1]})])
    markup = found._repr_html_()
    markup.encode()
    repr(found).encode()
    assert " ".join(plain(text).split()) in text_of(markup)
    assert not unsafe_tags(markup)


@pytest.mark.slow
@pytest.mark.proof
def test_a_large_epoch_stays_below_200_kb() -> None:
    rng = np.random.default_rng(0)
    rewards = {f"'\u202e<{i}" + "\u202e" * 500: rng.integers(0, 2, 4).tolist() for i in range(2000)}
    epochs = [make_epoch(rewards, index) for index in range(3)]
    assert len(learning_signal(epochs[-1], epochs[:-1])._repr_html_().encode()) <= 200_000


# ── the forecast ─────────────────────────────────────────────────────────────────────────────────────────────────────


def truth(draw: Any, sizes: tuple[int, ...], alike: float, rng: np.random.Generator) -> np.ndarray:
    """Share of groups with spread by brute force: 2,000 fresh draws of groups."""
    rewards = draw(2_000, max(sizes), rng)
    return np.array([(np.ptp(rewards[:, :size], axis=1) > alike).mean() for size in sizes])


def binary(rates: Any) -> Any:
    def draw(groups: int, size: int, rng: np.random.Generator) -> np.ndarray:
        return (rng.random((groups, size)) < rates(groups, rng)[:, None]).astype(float)

    return draw


def graded(groups: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rewards 0, 0.5 and 1, in shares of each example's own."""
    shares = rng.dirichlet([0.6, 0.2, 0.3], groups).cumsum(axis=1)
    return (rng.random((groups, size, 1)) > shares[:, None, :2]).sum(axis=2) / 2.0


def continuous(groups: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """0 where it fails, else a number that is never the same."""
    rates = rng.beta(0.3, 1.0, groups)[:, None]
    return np.where(rng.random((groups, size)) < rates, rng.random((groups, size)), 0.0)


@pytest.mark.parametrize("observed", [4, 8])
@pytest.mark.parametrize(
    ("draw", "alike", "tolerance"),
    [
        (binary(lambda groups, rng: rng.beta(0.3, 0.6, groups)), 1e-9, 0.04),
        (binary(lambda groups, rng: rng.beta(2, 2, groups)), 1e-9, 0.04),
        (binary(lambda groups, rng: rng.beta(0.2, 3, groups)), 1e-9, 0.08),
        (binary(lambda groups, rng: np.full(groups, 0.05)), 1e-9, 0.08),
        (graded, 1e-9, 0.06),
        (graded, 0.6, 0.06),
        (continuous, 1e-9, 0.06),
        (continuous, 0.1, 0.08),
        (lambda groups, size, rng: rng.normal(size=(groups, size)), 1e-9, 0.01),
    ],
    ids=["spread-out", "middling", "hard", "all-alike", "graded", "graded-coarse", "continuous", "coarse", "normal"],
)
def test_the_expected_share_agrees_with_simulation(draw: Any, alike: float, tolerance: float, observed: int) -> None:
    rng = np.random.default_rng(1)
    found = np.mean(
        [chance_of_spread(list(draw(400, observed, rng)), SIZES, alike).mean(axis=0) for _ in range(4)], axis=0
    )
    assert np.abs(found - truth(draw, SIZES, alike, rng)).max() < tolerance


def test_examples_that_can_never_succeed_are_taken_for_hard_ones() -> None:
    """The known bias: a quarter of the examples is impossible, which eight rollouts cannot tell from improbable."""
    draw = binary(lambda groups, rng: rng.choice([0.0, 0.02, 0.5, 1.0], groups))
    rng = np.random.default_rng(1)
    found = chance_of_spread(list(draw(400, 8, rng)), SIZES).mean(axis=0)
    error = found - truth(draw, SIZES, 1e-9, rng)
    assert np.abs(error[:3]).max() < 0.04
    assert 0 < error[-1] < 0.15


def test_up_to_the_observed_size_it_is_the_share_of_subsets_with_spread() -> None:
    chances = chance_of_spread([np.array([1.0, 0, 0, 0])], [1, 2, 3, 4])
    assert chances.tolist() == [[0, 0.5, 0.75, 1]]
    assert chance_of_spread([np.array([0.0, 0.1, 0.3])], [2], alike=0.15)[0, 0] == pytest.approx(2 / 3)


def test_beyond_it_binary_rewards_follow_the_beta_binomial() -> None:
    groups = [np.array([1.0, 0]), np.array([0.0, 0]), np.array([1.0, 1]), np.array([0.0, 1])]
    # both right: 1/4 of the pairs within an example, 10/48 across, so a + b = (1/2 - 1/4) / (1/4 - 10/48) = 6, a = b = 3
    mixed = 1 - 2 * (4 * 5 * 6) / (8 * 9 * 10)
    equal = 1 - (5 * 6 * 7 + 3 * 4 * 5) / (8 * 9 * 10)
    assert chance_of_spread(groups, [3])[:, 0] == pytest.approx([mixed, equal, equal, mixed])
    groups = [np.array([0.0] * 8), np.array([1.0] * 8)]
    assert chance_of_spread(groups, [32]).max() < 1e-3
    assert chance_of_spread([np.array([1.0])], [2]).tolist() == [[0]]
    assert chance_of_spread([], [2]).shape == (0, 1)


def test_many_different_rewards_are_no_burden() -> None:
    rng = np.random.default_rng(0)
    chances = chance_of_spread(list(rng.random((500, 8))), SIZES)
    assert chances.shape == (500, 5)
    assert chances.min() > 0.99


def test_a_choice_has_its_cost_and_never_promises_less_for_more() -> None:
    epoch = make_epoch([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    sizes = learning_signal(epoch).sizes.set_index("generations")
    assert list(sizes.index) == [2, 4, 8, 16, 32]
    assert sizes.share[4] == 0.5
    assert sizes.share.is_monotonic_increasing and sizes.at_least.is_monotonic_increasing
    assert (sizes.at_least <= sizes.share).all() and sizes.at_least[32] == pytest.approx(0.5, abs=0.02)
    assert sizes.tokens[4] == epoch.metrics.sampled_tokens
    assert sizes.tokens[32] == 8 * sizes.tokens[4]
    assert sizes.seconds[8] == pytest.approx(2 * (0.7 + 0.5))
    assert sizes.tokens_per_teaching_group[4] == sizes.tokens[4] / 2
    shown = text_of(learning_signal(epoch)._repr_html_())
    assert "4 (now) 50% 50%" in shown


def test_the_forecast_counts_a_difference_as_the_curriculum_does() -> None:
    rewards = [[0.5, 0.6], [0.5, 0.9], [0.5, 0.7]]
    assert learning_signal(make_epoch(rewards)).sizes.share[0] == 1
    assert learning_signal(make_epoch(rewards, settings=ON)).sizes.share[0] == pytest.approx(2 / 3)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_signal_works_on_a_live_run_from_disk_and_with_somebody_elses_builder(tmp_path, closing) -> None:
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    run = closing(ft.Run(guess, right, dataset=sums(6), generations=4, adapter=adapter, output_dir=tmp_path, name="r"))
    await run.next_epoch()
    await run.next_epoch()
    live = run.signal()
    assert live.groups.epochs.tolist() == [2] * 6
    assert run.signal(epoch=0).groups.epochs.tolist() == [1] * 6
    run.close()
    assert ft.Run.open(tmp_path / "r").signal()._repr_html_() == live._repr_html_()

    builder = ScriptedBuilder(lambda epoch: {"a": [1, 0, None], "b": [0, 0], "c": [None, None]})
    other = closing(ft.Run(builder=builder, adapter=FakeAdapter(), output_dir=tmp_path, name="s"))
    await other.next_epoch()
    assert by_example(other.signal()) == {"a": "teaches", "b": "all_worst", "c": "failed"}
