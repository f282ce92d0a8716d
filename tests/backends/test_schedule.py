"""The learning rate over the planned epochs."""

import pytest

pytest.importorskip("torch")

from finetune_nb.backends.local.training import rate


def whole_run(schedule, warmup=0.0, planned=4, steps=5, behind=0):
    return [
        rate(schedule, epoch + step / steps, planned, 1 / steps, warmup)
        for epoch in range(planned + behind)
        for step in range(steps)
    ]


def test_constant_rate_is_the_configured_one():
    assert set(whole_run("constant")) == {1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_falls_from_all_to_a_tenth_and_stays_there(schedule):
    rates = whole_run(schedule, behind=1)
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert min(rates[:20]) > 0.1
    assert rates[20:] == pytest.approx([0.1] * 5)


def test_halfway_is_halfway():
    assert rate("linear", 2, 4, 0.2) == pytest.approx(0.55)
    assert rate("cosine", 2, 4, 0.2) == pytest.approx(0.55)
    assert rate("cosine", 1, 4, 0.2) > rate("linear", 1, 4, 0.2)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_climbs_in_a_straight_line_and_its_first_step_is_not_lost(schedule):
    rates = whole_run(schedule, warmup=0.25)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
