"""A preview's card is drawn whatever the rewards are."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from factories import make_epoch

from finetune_nb.config import CurriculumSettings
from finetune_nb.training.preview import preview, preview_input


@pytest.mark.parametrize("reward", [0.0, 1.0, -3e15, 1e300])
def test_groups_that_all_have_one_reward_are_one_bar_however_large_it_is(reward: float) -> None:
    settings = CurriculumSettings()
    found = preview(preview_input(make_epoch([[reward, reward], [reward]])), settings, settings, settings, seed=0)
    assert unquote(found._repr_html_()).count('<rect x="6.0"') == 1


def test_one_very_large_reward_leaves_the_others_in_the_first_bar() -> None:
    settings = CurriculumSettings()
    found = preview(preview_input(make_epoch([[0.25], [0.5], [1e300]])), settings, settings, settings, seed=0)
    assert unquote(found._repr_html_()).count('<rect x="6.0"') == 1
    assert "3</strong> kept, but their rewards do not differ" in found._repr_html_()
