"""Comparing runs: the same examples are paired, and an interval says whether a difference is more than luck."""

import math
import random

import numpy as np
import pytest
from factories import make_epoch

from finetune_nb.analysis.run_comparison import compare_runs
from finetune_nb.errors import ConfigError


def epochs(rewards, **options):
    return [make_epoch(groups, index, **options) for index, groups in enumerate(rewards)]


def test_groups_are_paired_by_epoch_and_example():
    a = epochs([[[0, 1], [0, 0]], [[1, 1]]])
    b = epochs([[[1, 1], [0, 1]], [[1, 1]]])
    frame = compare_runs({"a": a, "b": b}).frame
    assert frame.columns.tolist() == ["epoch", "example", "a", "b"]
    assert frame[["a", "b"]].to_numpy().tolist() == [[0.5, 1.0], [0.0, 0.5], [1.0, 1.0]]


def test_examples_that_only_one_run_has_do_not_count():
    a, b = epochs([[[0, 0], [1, 1]]]), epochs([[[1, 1]], [[1, 1]]])
    (difference,) = compare_runs({"a": a, "b": b}).differences
    assert (difference.mean, difference.pairs) == (1.0, 1)


def test_groups_without_a_finite_mean_are_no_pairs():
    a, b = epochs([[[math.nan], [0, 0]]]), epochs([[[1], [math.inf, 1]]])
    comparison = compare_runs({"a": a, "b": b})
    assert comparison.differences[0].pairs == 0
    assert math.isnan(comparison.differences[0].mean)
    assert "no example in common" in repr(comparison)


def test_a_constant_gain_is_clear_and_its_interval_is_a_point():
    a, b = epochs([[[0, 0]] * 10]), epochs([[[0.5, 0.5]] * 10])
    (difference,) = compare_runs({"a": a, "b": b}).differences
    assert (difference.mean, difference.low, difference.high) == (0.5, 0.5, 0.5)
    assert difference.is_clear


@pytest.mark.slow
@pytest.mark.proof
def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        gains = [rng.gauss(0.1, 0.3) for _ in range(40)]
        a, b = epochs([[[0.0]] * 40]), epochs([[[gain] for gain in gains]])
        (difference,) = compare_runs({"a": a, "b": b}, resamples=400).differences
        covered += difference.low <= 0.1 <= difference.high
    assert 0.88 <= covered / 200 <= 0.99


def test_examples_not_pairs_are_resampled():
    """Ten epochs of one example are one example: its interval must not shrink as if they were ten."""
    gains = [0.0, 1.0]
    once = compare_runs({"a": epochs([[[0.0], [0.0]]]), "b": epochs([[[g] for g in gains]])}).differences[0]
    often = compare_runs({"a": epochs([[[0.0], [0.0]]] * 10), "b": epochs([[[g] for g in gains]] * 10)}).differences[0]
    assert (once.low, once.high) == (often.low, often.high) == (0.0, 1.0)
    assert (once.examples, often.examples, often.pairs) == (2, 2, 20)


def test_the_interval_is_that_of_scipy():
    """The numbers are those of scipy.stats.bootstrap 1.17: paired sums and counts of the five examples, method
    "percentile", rng=np.random.default_rng(7)."""
    gains = [[0.25, -0.5, 0.0, 1.0, 0.5], [0.75, 0.25, -0.25, 0.5, 0.0], [0.5, 0.0, 0.25]]
    a, b = epochs([[[0.0] for _ in row] for row in gains]), epochs([[[gain] for gain in row] for row in gains])
    (difference,) = compare_runs({"a": a, "b": b}, confidence=0.9, resamples=1000, seed=7).differences
    assert (difference.low, difference.high) == pytest.approx((0.038461538461538464, 0.4791666666666667))


def test_one_example_has_an_interval_without_width():
    (difference,) = compare_runs({"a": epochs([[[0.0]]]), "b": epochs([[[0.5]]])}).differences
    assert (difference.low, difference.high, difference.examples) == (0.5, 0.5, 1)


def test_repeating_gives_the_same_interval_and_views_show_it():
    rng = np.random.default_rng(1)
    runs = {
        name: epochs([rng.random((20, 4)).tolist() for _ in range(3)]) for name in ("first", "<b>second</b>", "third")
    }
    one, two = compare_runs(runs), compare_runs(runs)
    assert one.differences == two.differences
    assert [d.run for d in one.differences] == ["<b>second</b>", "third"]
    assert "<b>second" not in one._repr_html_()
    assert len(one.plot().axes[0].get_lines()) >= 3


def test_one_run_or_an_odd_confidence_is_an_error():
    with pytest.raises(ConfigError, match="at least two runs"):
        compare_runs({"a": []})
    with pytest.raises(ConfigError, match="between 0 and 1"):
        compare_runs({"a": [], "b": []}, confidence=95)


def test_runs_without_epochs_compare_to_nothing():
    assert compare_runs({"a": [], "b": []}).differences[0].pairs == 0
