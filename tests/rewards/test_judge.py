"""A model as the reward: whatever its server does, no reward is invented and none is lost that a further try could have."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter

import numpy as np
import openai
import pytest
from loopback import Fault, LoopbackServer, Refusal

import finetune_nb as ft
from finetune_nb.analysis.agreement import agreement, cohens_kappa
from finetune_nb.errors import ConfigError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy
from finetune_nb.types import EvalInputItem

ROWS = [{"id": f"q{n}", "question": f"{n}+1", "answer": str(n + 1)} for n in range(8)]


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def make_run(reward, folder, rows=ROWS, **options):
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "x" * (1 + seed % 9)))
    return ft.Run(solve, reward, rows, adapter=adapter, generations=3, output_dir=folder, **options)


def item(output="7", question="3+4", answer="7"):
    row = {"question": question, "answer": answer}
    return EvalInputItem(
        id="a", input_obj=question, expected_output_obj=answer, output_obj=output, full_dataset_entry=row
    )


def said(score, reasoning="because"):
    return json.dumps({"reasoning": reasoning, "score": score})


def shown(request):
    """What stands between the tags of the answer."""
    return request.body["messages"][-1]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0]


def client(server):
    return openai.AsyncOpenAI(base_url=server.base_url, api_key="key")


# ── a server that does what servers do ───────────────────────────────────────────────────────────────────────────────


class Counting:
    """A client that counts how many requests are under way at most: a server would count those, too, that were given up."""

    def __init__(self, client):
        self.client = client.with_options(max_retries=0)
        self.chat = self.completions = self
        self.running = self.most = 0

    def with_options(self, **options):
        return self

    async def create(self, **options):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.client.chat.completions.create(**options)
        finally:
            self.running -= 1


@pytest.mark.slow
@pytest.mark.parametrize("votes", [1, 2])
def test_through_errors_junk_and_time_outs_every_reward_is_the_judges(tmp_path, closing, votes):
    tries: Counter[str] = Counter()
    lock = threading.Lock()
    troubles = [
        Refusal(429, "slow down"), Refusal(500, "no"), "I cannot judge this.", Fault(seconds=0.6), said(7), Fault(), said("0.5")
    ]  # fmt: skip

    def reply(request):
        key = request.body["messages"][-1]["content"]
        with lock:
            number = tries[key]
            tries[key] += 1
        time.sleep(0.01)
        return troubles[number % len(troubles)] if number < len(troubles) else said(len(shown(request)) / 10)

    with LoopbackServer(reply) as server:
        asked = Counting(client(server))
        judge = ft.judge(
            "Is it long?", asked, model="m", votes=votes, retries=20, concurrency=3, timeout=0.4, wait=0.01
        )
        run = closing(make_run({"long": judge}, tmp_path, ROWS[:3]))
        ft.run_sync(run.next_epoch())
    frame = run.trajectories()
    assert frame.reward.notna().all()
    # A vote is the first readable score: "0.5" of the seventh try, or what comes after all troubles.
    possible = {0.5, *(n / 10 for n in range(1, 10))}
    if votes == 1:
        assert set(frame.reward) <= possible
    assert asked.most <= 3
    assert judge.usage.calls > 0 and judge.usage.retries > 0


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (lambda request: Refusal(429, "slow down"), "RateLimitError"),
        (lambda request: Refusal(401, "who are you"), "AuthenticationError"),
        (lambda request: "fine", "expected JSON with a score"),
        (lambda request: said(2), "the judge's score is 2; expected a number from 0 to 1"),
        (lambda request: said(True), "expected JSON with a score"),
        (lambda request: said(None), "expected JSON with a score"),
        (lambda request: '{"score": NaN}', "expected JSON with a score"),
        (lambda request: Fault(seconds=0.5), "TimeoutError"),
    ],
)
def test_what_no_further_try_helps_is_a_missing_reward_that_says_why(tmp_path, closing, reply, error):
    with LoopbackServer(reply) as server:
        seconds = 0.2 if error == "TimeoutError" else 60.0
        judge = ft.judge("Good?", client(server), model="m", retries=1, timeout=seconds, wait=0.01)
        run = closing(make_run(judge, tmp_path, ROWS[:2]))
        ft.run_sync(run.next_epoch())
    frame = run.trajectories()
    assert frame.reward.isna().all()
    assert frame.error.str.contains(error).all()


def test_a_refused_key_is_not_asked_again():
    with LoopbackServer(lambda request: Refusal(401, "no")) as server:
        judge = ft.judge("Good?", client(server), model="m", retries=5, wait=0.01)
        with pytest.raises(openai.AuthenticationError):
            asyncio.run(judge(item()))
        assert len(server.requests) == 1


def test_rewards_that_are_missing_can_be_had_later(tmp_path, closing):
    down = True

    def reply(request):
        return Refusal(503, "later") if down and "2+1" in request.body["messages"][-1]["content"] else said(0.25)

    with LoopbackServer(reply) as server:
        judge = ft.judge("Good?", client(server), model="m", retries=1, wait=0.01)
        run = closing(make_run(judge, tmp_path))
        ft.run_sync(run.next_epoch())
        assert run.trajectories().reward.isna().sum() == 3
        down = False
        before = len(server.requests)
        rescored = run.rescore(judge, only="failed")
        assert 1 <= len(server.requests) - before <= 3
    assert rescored.rewards_missing == (3, 0)
    assert rescored.rollouts().new_reward.tolist() == [0.25] * 24


# ── what it is shown, says and costs ─────────────────────────────────────────────────────────────────────────────────


async def ask_nothing(messages):
    return said(1)


async def test_it_is_shown_the_question_the_expected_answer_and_the_output():
    seen = []

    async def ask(messages):
        seen.extend(messages)
        return 'I think:\n```json\n{"reasoning": "polite {and} right", "score": "0.75"}\n```'

    verdict = await ft.judge("Is it polite?", ask, scale=(0, 1))(item("seven"))
    assert "Is it polite?" in seen[0]["content"] and "from 0 to 1" in seen[0]["content"]
    for text in ("<question>\n3+4", "<expected_answer>\n7", "<answer>\nseven"):
        assert text in seen[1]["content"]
    assert (verdict.score, verdict.reasoning) == (0.75, {"judge": "polite {and} right"})


async def test_the_same_content_is_judged_once():
    judge = ft.judge("Good?", ask_nothing)
    for output in ("a", "a", "b"):
        await judge(item(output))
    assert (judge.usage.calls, judge.usage.cached) == (2, 1)


async def test_several_votes_are_a_mean_with_their_spread():
    scores = iter([0.2, 0.4, 0.9])

    async def ask(messages):
        return said(next(scores))

    verdict = await ft.judge("Good?", ask, votes=3, concurrency=1)(item())
    assert verdict.score == pytest.approx(0.5)
    assert sorted(verdict.reasoning["votes"]) == [0.2, 0.4, 0.9]
    assert verdict.reasoning["spread"] == pytest.approx(0.7)
    assert verdict.reasoning["judge"] == ["because"] * 3


def test_its_words_are_kept_with_each_rollout_also_as_a_part_of_a_sum(tmp_path, closing):
    run = closing(make_run({"kind": ft.judge("Kind?", ask_nothing), "one": lambda output: 1.0}, tmp_path))
    ft.run_sync(run.next_epoch())
    trajectory = run[0].collection.trajectories[0][0]
    assert trajectory.metadata["reasonings"] == {"kind": {"judge": "because"}}
    assert "because" in run.show()._repr_html_()


def test_tokens_are_counted():
    with LoopbackServer(lambda request: said(1)) as server:
        judge = ft.judge("Good?", client(server), model="m")
        asyncio.run(judge(item()))
    assert judge.usage.completion_tokens > 0


def test_a_client_that_blocks_is_asked_in_a_thread():
    with LoopbackServer(lambda request: said(1)) as server:
        judge = ft.judge("Good?", openai.OpenAI(base_url=server.base_url, api_key="key"), model="m")
        assert asyncio.run(judge(item())).score == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (1, 0)}, "scale is"),
        ({"scale": (0, math.inf)}, "scale is"),
        ({"votes": 0}, "votes is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"concurrency": 0}, "concurrency is 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ft.judge("Good?", ask_nothing, **options)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ConfigError, match="got str"):
        ft.judge("Good?", "gpt-4")
    with pytest.raises(ConfigError, match="a client needs the model's name"):
        ft.judge("Good?", openai.AsyncOpenAI(api_key="key"))


@pytest.mark.slow
def test_a_long_reply_full_of_braces_is_read_in_no_time():
    async def ask(messages):
        return '{"a":' * 200_000

    started = time.process_time()
    with pytest.raises(ValueError, match="expected JSON with a score"):
        asyncio.run(ft.judge("Good?", ask, retries=0)(item()))
    assert time.process_time() - started < 5


# ── any async reward ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_any_async_reward_is_tried_again(tmp_path, closing):
    tries: Counter[str] = Counter()

    async def flaky(output, item):
        tries[item.id] += 1
        if tries[item.id] % 2:
            raise ConnectionError("gone")
        return 1.0

    run = closing(make_run(ft.retrying(flaky, retries=9, concurrency=1), tmp_path, ROWS[:1]))
    ft.run_sync(run.next_epoch())
    assert run.trajectories().reward.tolist() == [1.0] * 3


def test_an_error_that_no_further_try_helps_is_not_tried_again(tmp_path, closing):
    calls = []

    async def broken(output):
        calls.append(output)
        raise ValueError("wrong")

    run = closing(make_run(ft.retrying(broken), tmp_path))
    ft.run_sync(run.next_epoch())
    assert len(calls) == 24
    with pytest.raises(ConfigError, match="takes an async function"):
        ft.retrying(lambda output: 1.0)


# ── agreement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_kappa_is_that_of_cohens_formula():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, chance 0.5.
    first = np.array([True] * 25 + [False] * 25)
    second = np.array([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa(first, first) == 1.0
    assert math.isnan(cohens_kappa(first[:5], first[:5]))
    assert math.isnan(cohens_kappa(first[:0], first[:0]))


def test_a_planted_bias_is_recovered(tmp_path, closing):
    async def likes_long_answers(messages):
        length = len(messages[-1]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0])
        return said(min(1.0, 0.1 + 0.1 * length))

    run = closing(make_run(lambda output: 1.0, tmp_path))
    for _ in range(2):
        ft.run_sync(run.next_epoch())
    names = run.trajectories().trajectory.tolist()[::2]
    truth = {name: float(place % 2) for place, name in enumerate(names)}
    found = run.agreement(ft.judge("Good?", likes_long_answers), truth)
    assert len(found) == len(names) and found.missing == 0
    assert found.length_bias > 0.5
    lengths = found.frame.length
    assert found.frame.score.tolist() == [pytest.approx(min(1.0, 0.1 + 0.1 * n)) for n in lengths]
    assert found.bias == pytest.approx((found.frame.score - found.frame.label).mean())
    assert "Cohen's kappa" in repr(found) and "differ most" in found._repr_html_()


def test_only_labelled_rollouts_are_judged(tmp_path, closing):
    asked = []

    async def count(messages):
        asked.append(messages)
        return said(0.5)

    run = closing(make_run(lambda output: 1.0, tmp_path))
    ft.run_sync(run.next_epoch())
    run.agreement(ft.judge("Good?", count), {"e0/q1/0": 1, "e0/q2/1": 0})
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "there are no labels"),
        ({"e0/q1/0": "good"}, "expected a number"),
        ({"e0/q99/0": 1}, "of no recorded rollout"),
        ({"q1": 1}, "no label is of a recorded epoch"),
        ([1, 2], "a mapping from names"),
    ],
)
def test_labels_that_fit_nothing_are_refused(tmp_path, closing, labels, message):
    run = closing(make_run(lambda output: 1.0, tmp_path))
    ft.run_sync(run.next_epoch())
    with pytest.raises(ConfigError, match=message):
        run.agreement(lambda output: 1.0, labels)


def test_agreement_of_equal_scores_is_full():
    found = agreement(["a", "b", "c"], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1, 2, 3])
    assert (found.kappa, found.bias) == (1.0, 0.0)
    assert found.correlation == pytest.approx(1.0) and math.isnan(found.length_bias)
    assert "equal everywhere" in found._repr_html_()
