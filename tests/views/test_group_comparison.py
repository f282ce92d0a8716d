"""Best against worst: which two are compared, where they part, and that it is said in so many words."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from factories import item, make_epoch, sampled
from hostile import HOSTILE, text_of, unsafe_tags
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.analysis.group_comparison import Divergence, GroupComparison, compare_group, first_divergence
from finetune_nb.analysis.rollout_group import rollout_group
from finetune_nb.errors import RunError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.text import plain
from finetune_nb.types import DPOItem, EpisodeItem, Epoch, Trajectory
from finetune_nb.views.tokens import TINTS


def of(*turns: EpisodeItem) -> Trajectory:
    return Trajectory(episode=list(turns), reward=0.0)


def epoch_of(*rollouts: tuple[float | None, list[EpisodeItem]], scores: dict[str, Any] | None = None) -> Epoch:
    epoch = make_epoch([[reward for reward, _ in rollouts]], scores=scores)
    for trajectory, (_, turns) in zip(epoch.collection.trajectories[0], rollouts, strict=True):
        trajectory.episode = turns
    return epoch


def compared(*rollouts: tuple[float | None, list[EpisodeItem]], **options: Any) -> GroupComparison:
    return compare_group(rollout_group(epoch_of(*rollouts, **options)))


def test_the_first_divergence_is_found_by_turn_character_and_token() -> None:
    asked = item("user", "2+2")
    a = of(asked, sampled(("The", -0.1), (" sum", -0.1), (" is 4", -0.5)))
    b = of(asked, sampled(("The", -0.1), (" sum", -0.1), (" is 5", -1.5)))
    assert first_divergence(a, b) == Divergence(turn=1, character=11, token=2)
    assert first_divergence(a, a) is None
    assert first_divergence(of(asked, item("assistant", "4a")), of(asked, item("assistant", "4b"))) == Divergence(
        1, 1, None
    )
    assert first_divergence(of(asked), of(asked, item("assistant", "4"))) == Divergence(1, 0, None)
    assert first_divergence(of(item("user", "x")), of(item("tool", "x"))) == Divergence(0, 1, None)


def test_tool_calls_part_by_what_they_ask_and_not_by_their_ids() -> None:
    def call(name: str, expression: str) -> EpisodeItem:
        function = {"name": "calculator", "arguments": expression}
        return item("assistant", "", logprobs=[-1.0], tool_calls=[{"id": name, "function": function}])

    assert first_divergence(of(call("c1", "1+1")), of(call("c2", "1+1"))) is None
    where = first_divergence(of(call("c1", "1+1")), of(call("c2", "1+2")))
    assert where is not None and (where.turn, where.token) == (0, None)


def test_best_and_worst_are_those_that_stay_together_longest() -> None:
    asked = item("user", "2+2")

    def reply(text: str) -> list[EpisodeItem]:
        return [asked, item("assistant", text)]

    found = compared((0.5, reply("half")), (1, reply("4")), (0, reply("5")), (1, reply("5 - 1 = 4")), (0, reply("6")))
    assert (found.best, found.worst) == (3, 2)
    assert found.divergence == Divergence(1, 1, None)
    assert [trajectory.reward for trajectory in found.trajectories] == [1, 0]


def test_rollouts_without_a_reward_count_only_where_there_are_no_others() -> None:
    asked = [item("user", "2+2")]
    found = compared((None, asked), (0.25, asked), (0.75, asked))
    assert (found.best, found.worst) == (2, 1)
    found = compared((None, asked), (0.25, asked))
    assert (found.best, found.worst) == (1, 0)
    with pytest.raises(RunError, match=r"q0 has 1 trajectory that finished in epoch 0; a comparison needs two"):
        compared((1.0, asked))


def test_the_view_says_where_they_part_and_what_the_rewards_are_made_of() -> None:
    asked = item("user", "2+2")
    end = item("tool", "no more")
    found = compared(
        (1, [asked, sampled(("=", -0.1), ("4", -0.5))]),
        (0, [asked, sampled(("=", -0.1), ("5", -2.0)), end]),
        scores={"correct": 0.5, "short": None},
    )
    shown = text_of(found._repr_html_())
    for part in (
        "epoch 0 · example q0",
        "best worst reward 1 0 advantage +0.707 -0.707 correct 0.5 0.5 short – – turns 2 3 sampled tokens 2 2",
        "they part at turn 1 (assistant), token 1: “4” (p 0.607) against “5” (p 0.135)",
        "user 2+2",
        "best · 1 · assistant · 2 tokens, mean logprob -0.3 = ◆ they part here 4 worst · 1 · assistant",
        "= ◆ they part here 5 best · 2 · (ended) worst · 2 · tool no more",
    ):
        assert part in shown
    assert repr(found).splitlines()[3].strip() == (
        "they part at turn 1 (assistant), token 1: “4” (p 0.607) against “5” (p 0.135)"
    )


def test_the_turn_where_they_part_has_tints_and_tool_calls() -> None:
    def calling(query: str) -> EpisodeItem:
        call = {"id": query, "type": "function", "function": {"name": "look", "arguments": f'{{"q": "{query}"}}'}}
        return sampled(("<call>", -0.1), ("same", -3.0), tool_calls=[call])

    asked = item("user", "2+2")
    found = compared((1, [asked, calling("alpha")]), (0, [asked, calling("beta")]))
    assert "they part at turn 1 (assistant), in its tool calls" in repr(found)
    markup = found._repr_html_()
    for query in ("alpha", "beta"):
        assert f'calls look {{"q": "{query}"}}' in text_of(markup)
    assert markup.count(f'{TINTS[4]}">same</u>') == 2
    other = compared((1, [asked, sampled(("a", -0.1), ("b", -9.0))]), (0, [asked, sampled(("a", -0.1), ("c", -1.0))]))
    assert TINTS[5] in other._repr_html_().partition("<table class=")[2]


def test_what_is_the_same_is_folded_and_twins_are_called_so() -> None:
    same = [item("user", "a"), item("assistant", "b"), item("user", "c")]
    found = compared((1, [*same, item("assistant", "d")]), (0, same))
    assert "they say the same until the worst one ends; the best one continues at turn 3" in repr(found)
    folds = ElementTree.fromstring(found._repr_html_()).findall(".//details/summary")
    assert [fold.text for fold in folds] == ["the first 3 turns, which are the same"]
    assert "both say the same" in repr(compared((1, same), (0, same)))
    assert "both say the same" in text_of(compared((1, same), (0, same))._repr_html_())


def test_preferences_are_compared_by_their_responses() -> None:
    a, b = (
        Trajectory(episode=[DPOItem(prompt="2+2", chosen_response=text, rejected_response="x")], reward=1.0)
        for text in "45"
    )
    assert first_divergence(a, b) is not None
    assert first_divergence(a, a) is None


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_on_both_sides(text: str) -> None:
    found = compared(
        (1, [sampled((text, -0.1), ("x", -1.0)), item("tool", text)]),
        (0, [sampled((text, -0.1), (text, -1.0)), item("assistant", text), item("user", text)]),
        scores={text: 1.0},
    )
    markup = found._repr_html_()
    markup.encode()
    repr(found).encode()
    assert " ".join(plain(text).split()) in text_of(markup)
    assert not unsafe_tags(markup)


@pytest.mark.parametrize(("turns", "size"), [(2, 1_000_000), (400, 3_000), (3_000, 10)])
def test_a_comparison_stays_below_200_kb(turns: int, size: int) -> None:
    asked = item("user", "'\u202e<" * (size // 3))
    found = compared((1, [asked] * turns), (0, [item("user", "no"), *[asked] * turns]))
    assert len(found._repr_html_().encode()) <= 200_000
    found = compared((1, [asked] * turns), (0, [asked] * (turns // 2)))
    assert len(found._repr_html_().encode()) <= 200_000
    assert math.isfinite(found.divergence.turn)  # type: ignore[union-attr]


async def test_it_works_on_a_live_run_and_from_disk(tmp_path, closing) -> None:
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    run = closing(ft.Run(guess, right, dataset=sums(4), generations=4, adapter=adapter, output_dir=tmp_path, name="r"))
    await run.next_epoch()
    live = run.compare_group()
    assert [trajectory.reward for trajectory in live.trajectories] == [1, 0]
    assert "they part at turn 1 (assistant), token" in repr(live)
    run.close()
    assert ft.Run.open(tmp_path / "r").compare_group(0)._repr_html_() == live._repr_html_()
