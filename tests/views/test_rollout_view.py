"""A rollout in its group: tokens, thinking, siblings, in a bounded number of bytes; and found in any run."""

from __future__ import annotations

import asyncio
import math
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace
from typing import Any

import pytest
from factories import item, make_epoch, sampled
from hostile import HOSTILE, text_of, unsafe_tags
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.analysis.messages import Token, entropy_of, tokens_of
from finetune_nb.analysis.rollout_group import rollout_group
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.text import plain
from finetune_nb.types import EpisodeItem, Epoch, RolloutFailure, Trajectory
from finetune_nb.views.conversation import fair_shares
from finetune_nb.views.rollout import RolloutView, trajectory_html
from finetune_nb.views.tokens import MORE_LIKELY, TINTS, heat_legend, heat_map, token_table


def of(*turns: EpisodeItem, reward: float = 1.0) -> Trajectory:
    return Trajectory(episode=list(turns), reward=reward, metadata={"id": "q0", "generation": 0})


def spans_of(markup: str) -> list[tuple[str, str | None, str | None]]:
    """(text, style, title) of every token that has an element of its own."""
    found = []
    for pre in ElementTree.fromstring(markup).iter("pre"):
        if pre.get("class") == "ft-heat":
            found += [(span.text or "", span.get("style"), span.get("title")) for span in pre]
    return found


def view_of(epoch: Epoch, example: Any = None, generation: Any = None, **options: Any) -> RolloutView:
    group = rollout_group(epoch, example)
    return RolloutView(group, group.rollout(generation), **options)


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_tinted_by_probability_and_say_their_numbers_on_hover() -> None:
    turn = sampled(("The", -0.01), (" sum", -0.3), (" is", -1.0), (" 7", -2.0), ("!", -3.0), ("<|end|>", -7.0))
    spans = spans_of(trajectory_html(of(turn)))
    assert [text for text, _, _ in spans] == ["The", " sum", " is", " 7", "!", "<|end|>"]
    assert [tint for _, tint, _ in spans] == list(TINTS)
    assert spans[3][2] == "p 0.135, logprob -2"


def test_the_numbers_also_stand_in_a_folded_table_and_the_tints_are_explained() -> None:
    markup = trajectory_html(of(sampled((" 7", -2.0), ("\n", -0.1))))
    shown = text_of(markup)
    assert "2 tokens as a table # token probability logprob 0 ␣7 0.135 -2 1 ↵ 0.905 -0.1" in shown
    assert "probability of the sampled token: below 0.9 below 0.6" in shown
    assert "probability of the sampled token" not in text_of(trajectory_html(of(item("assistant", "7"))))


def test_of_many_tokens_the_table_has_the_least_likely() -> None:
    turn = sampled(*[(f"w{i} ", -0.01 if i % 100 else -5.0) for i in range(1000)])
    shown = text_of(trajectory_html(of(turn)))
    assert "the 20 least likely of 1,000 tokens" in shown
    assert all(f" {i} w{i}␣ 0.00674 -5" in shown for i in range(0, 1000, 100))


def test_alternatives_give_an_entropy_and_are_named() -> None:
    top = [{"token": " 7", "logprob": math.log(0.5)}, {"token": " 9", "logprob": math.log(0.25)}]
    content = [{"token": " 7", "logprob": math.log(0.5), "top_logprobs": top}]
    turn = EpisodeItem(role="assistant", content=" 7", logprobs={"content": content})  # type: ignore[arg-type]
    ((_, tint, title),) = spans_of(trajectory_html(of(turn)))
    assert title == "p 0.5, logprob -0.693, entropy 1.04, instead ␣9 0.25"
    assert tint == TINTS[2]
    group = rollout_group(make_epoch([[1]]))
    group = group.__class__(**{**vars(group), "trajectories": [of(turn)]})
    markup = RolloutView(group, 0, heat="entropy")._repr_html_()
    assert spans_of(markup)[0][1] == TINTS[3]
    assert "entropy in nats: above 0.1" in text_of(markup)


def test_changes_have_a_colour_for_each_direction_and_a_line_where_they_are_large() -> None:
    tokens = [Token(f" {change:g}", -1.0, change=change) for change in (0.05, 0.2, 5.0, -0.2, -5.0, math.nan)]
    markup = heat_map(tokens, 5_000, "change")
    spans = spans_of(f"<div>{markup}</div>")
    styles = {text: style for text, style, _ in spans}
    assert styles[" 0.05"] is None and styles[" nan"] is None
    assert (styles[" 0.2"], styles[" 5"]) == (MORE_LIKELY[1], MORE_LIKELY[5]) and "dotted" in styles[" 5"]
    assert (styles[" -0.2"], styles[" -5"]) == (TINTS[1], TINTS[5]) and "<u " in markup
    assert "changed by -5" in spans[4][2] and "changed" not in spans[5][2]
    table = text_of(token_table(tokens, 5_000))
    assert "change" in table and "+0.2" in table
    many = [Token(" x", -1.0, change=0.0)] * 500 + [Token(" much", -0.1, change=3.0)]
    table = text_of(token_table(many, 5_000))
    assert "much" in table and "most changed of 501" in table
    legend = text_of(heat_legend("change"))
    assert "less likely -0.1" in legend and "more likely +0.1" in legend


def test_openai_objects_and_dicts_give_the_same_tokens() -> None:
    entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.5}]}
    as_object = SimpleNamespace(token="a", logprob=-0.5, top_logprobs=[SimpleNamespace(token="b", logprob=-1.5)])
    as_completion = {"token": "a", "logprob": -0.5, "top_logprobs": {"b": -1.5}}
    found = [
        tokens_of(EpisodeItem.model_construct(role="assistant", content="a", logprobs=logprobs, metadata=None))
        for logprobs in ({"content": [entry]}, SimpleNamespace(content=[as_object]), [as_completion])
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0].alternatives == (("b", -1.5),)


@pytest.mark.parametrize(
    "logprobs", [3, "abc", {"content": 5}, [None, "x", {}, object()], {"content": None}, [10**400]]
)
def test_logprobs_of_any_kind_are_no_reason_to_fail(logprobs: Any) -> None:
    turn = EpisodeItem.model_construct(role="assistant", content="hello", logprobs=logprobs, metadata={"tokens": 3})
    assert all(math.isnan(token.logprob) for token in tokens_of(turn))
    assert "hello" in text_of(trajectory_html(of(turn)))


def test_the_entropy_takes_the_rest_as_one_token() -> None:
    assert entropy_of([math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(2))
    assert entropy_of([math.log(0.5)]) == pytest.approx(math.log(2))
    assert entropy_of([0.0, -math.inf]) == 0
    assert entropy_of([math.log(0.25)] * 3) < entropy_of([math.log(0.25)] * 4) + 1e-12
    assert math.isnan(entropy_of([]))
    assert Token("a", 1e-9).probability == 1


def test_tokens_that_are_parts_of_characters_do_not_replace_the_text() -> None:
    turn = item("assistant", "naïve 👩‍💻", logprobs=[-0.1] * 3, tokens=["na", "\ufffd", "\ufffd"])
    folds = folds_of(trajectory_html(of(turn)))
    assert folds["as it was sampled"].startswith("na��")
    assert "naïve 👩‍💻" in text_of(trajectory_html(of(turn)))


# ── thinking, tools ──────────────────────────────────────────────────────────────────────────────────────────────────


def folds_of(markup: str) -> dict[str, str]:
    folds = {}
    for fold in ElementTree.fromstring(markup).iter("details"):
        summary, *body = list(fold)
        folds[summary.text or ""] = " ".join("".join(part) for part in (each.itertext() for each in body))
        assert fold.get("open") is None
    return folds


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>a plan</think>\nZ", "Z"),
        ("a plan</think>Z", "Z"),
        ("<thinking>a plan</thinking>Z", "Z"),
    ],
)
def test_thinking_is_folded_in_texts_and_in_tokens(said: str, answer: str) -> None:
    plainly = trajectory_html(of(item("assistant", said)))
    tokens = trajectory_html(of(sampled(*((letter, -0.1) for letter in said))))
    for markup in (plainly, tokens):
        folds = folds_of(markup)
        assert "a plan" in folds["thinking, 6 characters"]
        whole = "".join(ElementTree.fromstring(markup).itertext())
        assert whole.count("a plan") == 1
        assert ("Z" in text_of(markup)) == bool(answer)
        assert "Z" not in folds["thinking, 6 characters"]


@pytest.mark.parametrize("said", ["<think>a plan", "<think>a plan</think>", "<think>a plan</think>\n"])
def test_a_reply_that_is_all_thinking_can_be_read_at_once(said: str) -> None:
    for turn in (item("assistant", said), sampled(*((letter, -0.1) for letter in said))):
        tree = ElementTree.fromstring(trajectory_html(of(turn)))
        folded = [fold for fold in tree.iter("details") if fold.get("open") is None]
        assert not any("a plan" in "".join(fold.itertext()) for fold in folded)
        assert "a plan" in "".join(tree.itertext())


def test_a_users_text_is_no_thinking() -> None:
    markup = trajectory_html(of(item("user", "<think>why</think> do you?")))
    assert folds_of(markup) == {}
    assert "<think>why</think> do you?" in text_of(markup)


def test_reasoning_content_is_folded() -> None:
    turn = item("assistant", "42", reasoning_content="six times seven")
    folds = folds_of(trajectory_html(of(turn)))
    assert folds == {"thinking, 15 characters": "six times seven"}


def test_a_turn_says_how_long_it_took() -> None:
    shown = text_of(trajectory_html(of(item("assistant", "42", seconds=0.25), item("assistant", "43", seconds=1.5))))
    assert "assistant · 2 tokens, mean logprob -0.5 · 0.25 s" in shown
    assert "model time 1.8 s in 2 turns" in shown


# ── a group ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_stands_in_its_group_with_advantage_and_siblings() -> None:
    failures = [RolloutFailure("q1", 4, "TimeoutError: 30 s"), RolloutFailure("q0", 4, "E")]
    epoch = make_epoch([[1, 1], [0, 1, 0, None]], 3, failures=failures, scores={"correct": 1.0, "short": 0.5})
    view = view_of(epoch)
    markup = view._repr_html_()
    shown = text_of(markup)
    for part in (
        "epoch 3 · example q1 · generation 1",
        "reward 1",
        "scores correct 1 · short 0.5",
        "advantage +1.15",
        "group 4 rollouts, rewards 0 to 1, 1 failed, kept",
        "generation reward advantage turns tokens ended with 1 1 +1.15 2 1 stop 0 0 -0.577 2 1 stop",
        "3 – – 2 1 stop 4 failed – TimeoutError: 30 s",
        "others in the group, best first generation 0 · reward 0 · advantage -0.577 · 2 turns, the last: 4",
        "generation 4 · failed error: TimeoutError: 30 s",
    ):
        assert part in shown
    assert len(folds_of(markup)) == 4
    assert view.trajectory is epoch.collection.trajectories[1][1]
    assert repr(view).splitlines()[:2] == [
        "epoch 3 · example q1 · generation 1 · 4 rollouts, rewards 0 to 1, 1 failed, kept",
        "  reward 1, advantage +1.15",
    ]


def test_the_example_is_the_one_that_differs_most_and_the_rollout_the_best_one() -> None:
    epoch = make_epoch({"a": [0.4, 0.5], "b": [0.2, 0.9], "c": [None]})
    assert view_of(epoch)._name() == "example b · generation 1"
    assert view_of(epoch, "a", 0)._name() == "example a · generation 0"
    assert view_of(epoch, "c")._name() == "example c · generation 0"


def test_ids_are_found_as_they_are_and_as_text() -> None:
    epoch = make_epoch({7: [1, 0], "8": [1, 0]})
    assert [view_of(epoch, example).group.example for example in (7, "7", 8, "8")] == [7, 7, "8", "8"]


def test_a_failed_rollout_is_shown_with_its_error() -> None:
    epoch = make_epoch([[1, 0]], failures=[RolloutFailure("q0", 2, "KeyError: 'x'"), RolloutFailure("q9", 0, "E")])
    view = view_of(epoch, "q0", 2)
    assert view.trajectory is None
    assert "error: KeyError: 'x'" in text_of(view._repr_html_())
    assert "failed: KeyError: 'x'" in repr(view)
    alone = view_of(epoch, "q9")
    assert alone.group.reason is None
    assert "error: E" in text_of(alone._repr_html_())


def test_what_is_not_there_is_said_with_what_is() -> None:
    epoch = make_epoch([[1, 0], [1, 0]])
    with pytest.raises(RunError, match=r"example='q11'; epoch 0 has q0, q1. Did you mean 'q1'"):
        view_of(epoch, "q11")
    with pytest.raises(RunError, match=r"generation=5; example q0 has the generations 0, 1 in epoch 0"):
        view_of(epoch, "q0", 5)
    with pytest.raises(RunError, match="no rollouts to look at"):
        view_of(make_epoch({}))
    with pytest.raises(RunError, match="example None has no rollouts in epoch 0"):
        view_of(make_epoch([[]]))
    with pytest.raises(ConfigError, match="heat='hue'; expected 'probability', 'entropy' or 'change'"):
        view_of(epoch, heat="hue")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_in_tokens_and_siblings(text: str) -> None:
    turn = sampled((text, -0.1), (text, -3.0), reasoning_content=text, tool_calls=[{"function": {"name": text}}])
    epoch = make_epoch({text: [1, 0]}, failures=[RolloutFailure(text, text, text)])  # type: ignore[arg-type]
    for trajectory in epoch.collection.trajectories[0]:
        trajectory.episode = [turn]
    markup = view_of(epoch)._repr_html_()
    markup.encode()
    repr(view_of(epoch)).encode()
    assert " ".join(plain(text).split()) in text_of(markup)
    assert not unsafe_tags(markup)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    ("tokens", "turns", "siblings"),
    [(10, 1, 8), (10, 2, 200), (3_000, 40, 8), (3_000, 1, 1), (50_000, 1, 4), (50_000, 100, 2)],
)
def test_a_view_stays_below_200_kb_and_counts_what_is_left_out(tokens: int, turns: int, siblings: int) -> None:
    turn = sampled(*[("'\u202e<", -1.5)] * (tokens // turns + 1))
    epoch = make_epoch([[place / siblings for place in range(siblings)]])
    for trajectory in epoch.collection.trajectories[0]:
        trajectory.episode = [turn] * turns
    markup = view_of(epoch)._repr_html_()
    assert len(markup.encode()) <= 200_000
    shown = sum(name.startswith("generation") for name in folds_of(markup))
    assert shown == siblings - 1 or f"{siblings - 1 - shown:,} of {siblings - 1:,} others are left out" in text_of(
        markup
    )
    assert len(repr(view_of(epoch))) < 20_000


SIZES = [(2, 20, 45_000), (4, 100, 65_000), (10, 150, 110_000), (47, 380, 185_000)]
"""Turns of the policy, tokens of each, and bytes of the view of eight such rollouts."""


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(("turns", "tokens", "most"), SIZES)
def test_every_turn_is_shown_and_bytes_are_spent_on_what_is_unlikely(turns: int, tokens: int, most: int) -> None:
    """Every eighth token is unlikely; the least likely one of each turn stands in the middle of it."""
    epoch = make_epoch([[place % 2 for place in range(8)]])
    for trajectory in epoch.collection.trajectories[0]:
        trajectory.episode = []
        for turn in range(turns):
            said = [(f" word{place}", -1.5 if place % 8 == 0 else -0.01) for place in range(tokens)]
            said[tokens // 2] = (f" odd-{turn}", -9.0)
            trajectory.episode += [sampled(*said), item("tool", "result " * 120)]
    markup = view_of(epoch)._repr_html_()
    assert len(markup.encode()) <= most
    shown = text_of(markup)
    for turn in range(turns):
        assert f"{2 * turn} · assistant" in shown and f"{2 * turn + 1} · tool" in shown
        assert f'{TINTS[5]}"> odd-{turn}</u>' in markup or f'{TINTS[5]}" title' in markup
        assert f"odd-{turn} " in shown
    is_cut = "left out…]" in shown.partition("others in the group")[0]
    assert is_cut == ("run.show(epoch=0, example='q0', generation=1, turn=N) shows turn N" in shown)


@pytest.mark.slow
@pytest.mark.proof
def test_a_turn_is_shown_at_full_length_where_it_is_asked_for() -> None:
    epoch = make_epoch([[1, 0]])
    long = [f"line {place} of a long text" for place in range(3_000)]
    for trajectory in epoch.collection.trajectories[0]:
        trajectory.episode = [
            item("user", "short"),
            item("tool", "\n".join(long)),
            *[item("assistant", "x " * 4_000)] * 9,
        ]
    assert "line 1500 of" not in text_of(view_of(epoch)._repr_html_())
    view = view_of(epoch, turn=1)._repr_html_()
    text = text_of(view)
    assert all(line in text for line in long)
    assert "from turn 1 of 11" in text and "0 · user" not in text and "10 · assistant" in text
    assert len(view.encode()) <= 200_000
    with pytest.raises(RunError, match=r"11 turns; found turn=11, expected 0 to 10"):
        view_of(epoch, turn=11)


def test_shares_are_fair() -> None:
    assert fair_shares([10, 100, 100], 110) == [10, 50, 50]
    assert fair_shares([1, 2], 10) == [1, 2]
    assert fair_shares([5, 5], -3) == [0, 0]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_show_works_on_a_live_run_and_on_the_same_run_from_disk(tmp_path, closing) -> None:
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    run = closing(ft.Run(guess, right, dataset=sums(4), generations=4, adapter=adapter, output_dir=tmp_path, name="r"))
    await run.next_epoch()
    await run.next_epoch()
    live = run.show(epoch=0)
    assert live.trajectory.reward == 1  # type: ignore[union-attr]
    assert "epoch 1" in repr(run.show())
    run.close()
    stored = ft.Run.open(tmp_path / "r")
    assert stored.show(epoch=0)._repr_html_() == live._repr_html_()
    assert "epoch 1" in repr(stored.show(epoch=-1))
    with pytest.raises(IndexError, match=r"run\[7\]"):
        stored.show(epoch=7)


async def test_show_works_on_an_epoch_that_did_not_come_to_its_end(tmp_path, closing) -> None:
    async def hang(question: str, llm: Any) -> str:
        reply = await guess(question, llm)
        if question == last:
            await asyncio.sleep(60)
        return reply

    rows = sums(4)
    last = rows[3]["question"]
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    run = closing(ft.Run(hang, right, dataset=rows, generations=2, adapter=adapter, output_dir=tmp_path, name="r"))
    task = asyncio.create_task(run.next_epoch())
    while run.progress.done < 6:
        await asyncio.sleep(0.01)
    run.abort()
    with pytest.raises(ft.EpochAborted):
        await task
    assert "undecided" in repr(run.show())
    assert "it was not scored before the epoch ended" in text_of(run.show(epoch=0)._repr_html_())


async def test_show_works_with_somebody_elses_builder(tmp_path, closing) -> None:
    builder = ScriptedBuilder(lambda epoch: {"a": [1, 0, None], "b": [0, 0]})
    run = closing(ft.Run(builder=builder, adapter=FakeAdapter(), output_dir=tmp_path, name="r"))
    await run.next_epoch()
    assert "epoch 0 · example a · generation 0 · 2 rollouts, rewards 0 to 1, 1 failed, kept" in repr(run.show())
