"""Entropy that is asked for and was not recorded is said, and not shown as certainty."""

from __future__ import annotations

import re

import pytest
from factories import item, make_epoch, sampled

from finetune_nb.analysis.rollout_group import rollout_group
from finetune_nb.views.rollout import RolloutView

TOP = [{"7": -0.5, "8": -1.5}]
SAID = "no turn has an entropy: neither the entropy nor the likely alternatives of the tokens were recorded"


def shown(*episode, heat):
    epoch = make_epoch([[1.0, 0.0]])
    epoch.collection.trajectories[0][0].episode = list(episode)
    group = rollout_group(epoch)
    view = RolloutView(group, 0, heat)
    words = re.sub(r"<style.*?</style>|<[^>]+>", " ", view._repr_html_(), flags=re.S)
    return " ".join(words.split()), repr(view)


@pytest.mark.parametrize(
    "episode",
    [
        [item("user", "3+4"), sampled(("7", -0.5))],
        [item("user", "3+4"), item("assistant", "7", logprobs=[-0.5])],
        [item("user", "3+4"), item("assistant", "7", logprobs=[])],
    ],
    ids=["no alternatives", "no texts of tokens", "nothing sampled"],
)
def test_a_rollout_without_alternatives_says_that_it_has_no_entropy_and_how_to_get_it(episode):
    for text in shown(*episode, heat="entropy"):
        assert SAID in text and "top_logprobs: 5" in text
    for text in shown(*episode, heat="probability"):
        assert "an entropy" not in text


def test_where_some_turns_have_none_their_number_is_said():
    turns = [sampled(("7", -0.5), top_logprobs=TOP), item("user", "and 4+4?"), sampled(("8", -0.5))]
    for text in shown(item("user", "3+4"), *turns, heat="entropy"):
        assert "1 of 2 sampled turns have no entropy" in text


@pytest.mark.parametrize("recorded", [{"top_logprobs": TOP}, {"entropies": [0.75]}], ids=["alternatives", "entropies"])
def test_where_every_turn_has_one_nothing_is_said(recorded):
    for text in shown(item("user", "3+4"), sampled(("7", -0.5), **recorded), heat="entropy"):
        assert "no entropy" not in text and "an entropy" not in text
