"""How a series went, in words: one rule for cards, plots and the live curve."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from factories import make_epoch

from finetune_nb import plots
from finetune_nb.notebook.reward_curve import reward_curve
from finetune_nb.text import trend
from finetune_nb.views.summary import run_html


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "no values"),
        ([math.nan, math.inf], "no values"),
        ([0.5], "0.5"),
        ([math.nan, 0.5, -math.inf], "0.5"),
        ([0.3, 0.1, math.nan, 0.9], "from 0.3 to 0.9"),
        (np.array([0.3, 0.9, 0.9]), "from 0.3 to 0.9"),
    ],
)
def test_a_trend_goes_from_the_first_finite_value_to_the_last(values, expected) -> None:
    assert trend(values) == expected


def test_a_trend_names_its_lowest_and_highest_value_only_where_there_are_words_for_them() -> None:
    values = [0.3, 0.1, 1.0, 0.9]
    assert trend(values, highest="at best") == "from 0.3 to 0.9, at best 1"
    assert trend(values, lowest="lowest", highest="highest") == "from 0.3 to 0.9, lowest 0.1, highest 1"
    assert trend([0.5], lowest="lowest", highest="highest") == "0.5"
    assert trend([], none="none yet") == "none yet"


def test_a_card_a_plot_and_the_live_curve_say_the_same_of_the_same_rewards() -> None:
    epochs = [make_epoch([[reward]], index) for index, reward in enumerate([0.25, 1.0, None, 0.5])]
    card = run_html(name="r", state="idle", epochs=epochs)
    assert "mean reward from 0.25 to 0.5, at best 1" in card
    assert plots.plot_rewards(epochs).alt_text.endswith("from 0.25 to 0.5, lowest 0.25, highest 1")
    curve = ElementTree.fromstring(reward_curve(epochs)).find("svg")
    assert curve is not None
    assert curve.get("aria-label") == "Mean reward per epoch, from 0.25 to 0.5"
