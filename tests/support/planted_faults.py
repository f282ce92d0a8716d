"""Runs that learn, and runs with one planted fault each, for what says why a run does not learn.

Most train the embedded model on its calculator for a few epochs; where the fault is the agent's or the dataset's, a policy
that follows a script, and gets better with its version, takes its place.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import finetune_nb as ft
from finetune_nb.backends.local.adapter import LocalGRPOAdapter
from finetune_nb.backends.local.config import LocalGRPOConfig
from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.errors import JobFailed
from finetune_nb.examples import calculator, json_tools
from finetune_nb.examples.calculator.agent import correct, kind_of, solve
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

SEEDS = int(os.environ.get("SEEDS", "1"))
"""Of a test whether something is learned. The figures in the reference are those of SEEDS=3."""

Make = Callable[[Path], ft.Run]
HEALTHY: dict[str, tuple[int, Make]] = {}
"""Name -> how many epochs to run, and what makes the run."""
PLANTED: dict[str, tuple[str, int, Make]] = {}
"""Name -> the kind of finding that it should give, how many epochs to run, and what makes the run."""


def healthy(epochs: int):
    def add(make: Make) -> Make:
        HEALTHY[make.__name__] = (epochs, make)
        return make

    return add


def planted(kind: str, epochs: int = 3):
    def add(make: Make) -> Make:
        PLANTED[make.__name__] = (kind, epochs, make)
        return make

    return add


# ── the embedded model ───────────────────────────────────────────────────────────────────────────────────────────────


def questions(name: str = "train") -> list[dict[str, Any]]:
    return json.loads((Path(calculator.CONFIG).parent / "data" / f"{name}.json").read_text())


def demo(folder: Path, reward: Any = correct, workflow: Any = solve, seed: int = 0, **options: Any) -> ft.Run:
    """The calculator's task, as in the demo but with fewer examples an epoch."""
    return ft.Run(
        workflow,
        reward,
        options.pop("dataset", None) or questions(),
        **{
            "generations": 8,
            "examples_per_epoch": 20,
            "sampling": {"max_tokens": 10},
            "seed": seed,
            "deterministic": True,
            "max_concurrency": 320,
            "output_dir": folder,
            **options,
        },
    )


async def say(question: str, llm: Any) -> str:
    return (await llm.chat([{"role": "user", "content": question}])).content


def used_tool(item: Any) -> float:
    return float(kind_of(item) == "used_tool")


@healthy(1)
def demo_after_one_epoch(folder):
    return demo(folder, examples_per_epoch=40)


@healthy(4)
def demo_in_the_middle(folder):
    return demo(folder, seed=1, examples_per_epoch=40)


@healthy(14)
def demo_that_has_learned_everything(folder):
    return demo(
        folder,
        seed=2,
        examples_per_epoch=24,
        validation=questions("held_out")[:40],
        validation_interval=7,
        num_epochs=14,
    )


@healthy(5)
def demo_with_a_curriculum(folder):
    return demo(folder, seed=3, curriculum={"initial_percentile": 0.5})


@healthy(5)
def demo_with_two_scores(folder):
    return demo(folder, {"tool": (used_tool, 0.2), "correct": correct}, seed=4, evaluators={"malformed": malformed})


@healthy(2)
def demo_with_twice_the_learning_rate(folder):
    return demo(folder, seed=8, training={"learning_rate": 1e-3})


@healthy(3)
def demo_in_bfloat16(folder):
    return demo(folder, seed=7, training={"dtype": "bfloat16"})


def malformed(item: Any) -> float:
    return float(kind_of(item) == "malformed")


@healthy(4)
def demo_with_lora(folder):
    return demo(folder, seed=5, training={"lora": {"rank": 8}, "learning_rate": 3e-3})


def digits(output: str) -> float:
    """Share of the first four characters that are digits."""
    return sum(each.isdigit() for each in output[:4]) / 4


@healthy(5)
def digits_in_one_turn(folder):
    return demo(folder, digits, say, seed=6, sampling={"max_tokens": 16})


# ── policies that follow a script ────────────────────────────────────────────────────────────────────────────────────


class Learner(ScriptedPolicy):
    """A policy whose script also gets its version, and a random number generator of the request."""

    def __init__(self, script: Callable[[list[dict[str, Any]], int, random.Random], str]) -> None:
        super().__init__(lambda messages, seed: script(messages, self.version, random.Random(seed)))


def scripted(folder: Path, script: Any, reward: Any, dataset: Any, workflow: Any = say, **options: Any) -> ft.Run:
    adapter = FakeAdapter(policy=Learner(script))
    return ft.Run(workflow, reward, dataset, adapter=adapter, output_dir=folder, **{"generations": 8, **options})


def skill(version: int) -> float:
    return min(0.95, 0.15 + 0.12 * version)


REQUESTS = {row["question"]: row["answer"] for row in json_tools.rows(60, seed=1)}


def call_json(messages, version, rng):
    """A JSON call: not always JSON, not always the right tool, more often with each version."""
    question = messages[-1]["content"]
    wanted = dict(REQUESTS[question])
    if rng.random() > skill(version) + 0.3:
        return f"The answer to {question!r} is not known to me" + rng.choice([".", "!", ", sorry."])
    if rng.random() > skill(version):
        wanted["tool"] = rng.choice(["calc", "weather", "time"])
    if rng.random() > skill(version):
        wanted["args"] = wanted["args"][:-1] or "?"
    return json.dumps(wanted)


@healthy(6)
def json_tools_with_partial_credit(folder):
    return scripted(folder, call_json, json_tools.reward, json_tools.rows(24, seed=1), json_tools.solve)


REASONS = [
    "so",
    "first",
    "then",
    "add",
    "the",
    "numbers",
    "up",
    "to",
    "get",
    "a",
    "sum",
    "of",
    "both",
    "which",
    "is",
    "it",
]


def think(messages, version, rng):
    """Thoughts of any length, tags around them by skill, and an answer that is right by skill."""
    a, b = map(int, messages[-1]["content"].split("+"))
    thought = " ".join(rng.choice(REASONS) for _ in range(rng.randint(3, 30)))
    answer = a + b if rng.random() < skill(version) else a + b + rng.randint(1, 3)
    tagged = rng.random() < skill(version) + 0.2
    return f"<think>{thought}</think><answer>{answer}</answer>" if tagged else f"{thought} {answer}"


def tags(output: str) -> float:
    return float(output.startswith("<think>") and output.endswith("</answer>"))


def right(output: str, answer: str) -> float:
    return float(output.removesuffix("</answer>").rpartition(">" if "<answer>" in output else " ")[2] == answer)


@healthy(8)
def format_and_right_answer(folder):
    return scripted(folder, think, {"format": (tags, 0.2), "correct": right}, sums(24), validation=sums(8, seed=9))


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class Caller(Learner):
    """Calls the tool `add` where its script says "call ..."."""

    def parse(self, ids, tools=()):
        text = super().parse(ids)["content"]
        if not text.startswith("call "):
            return {"role": "assistant", "content": text}
        function = {"name": "add", "arguments": json.dumps({"sum": text.removeprefix("call ")})}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        }


async def with_a_tool(question: str, llm: Any) -> str:
    messages = [{"role": "user", "content": question}]
    for _ in range(3):
        reply = await llm.chat(messages, tools=[ADD])
        if not reply.tool_calls:
            return reply.content
        a, _, b = reply.tool_calls[0].arguments["sum"].partition("+")
        result = str(int(a) + int(b)) if a.isdigit() and b.isdigit() else "error"
        messages += [reply, {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": result}]
    return "no answer"


def call_or_guess(messages, version, rng):
    if messages[-1]["role"] == "tool":
        return messages[-1]["content"]
    question = messages[-1]["content"]
    if rng.random() < skill(version):
        return f"call {question}"
    return str(sum(map(int, question.split("+"))) + rng.randint(0, 2))


def exactly(output: str, answer: str) -> float:
    return float(output == answer)


@healthy(6)
def an_agent_with_a_tool(folder):
    adapter = FakeAdapter(policy=Caller(call_or_guess))
    return ft.Run(with_a_tool, exactly, sums(24), adapter=adapter, output_dir=folder, generations=8)


def yes_or_no(messages, version, rng):
    a, b = map(int, messages[-1]["content"].split("+"))
    truth = a > b
    return "yes" if truth == (rng.random() < 0.5 + skill(version) / 2) else "no"


@healthy(6)
def yes_or_no_questions(folder):
    rows = [{**row, "answer": "yes" if int(row["question"][0]) > int(row["question"][2]) else "no"} for row in sums(24)]
    return scripted(folder, yes_or_no, exactly, rows)


# ── faults of the reward ─────────────────────────────────────────────────────────────────────────────────────────────


@planted("component_falls", epochs=5)
def form_that_pays_more_than_the_answer(folder):
    """Every reply has to be in the form, the calls of the tool too: answering at once is paid best."""

    def form(trajectory):
        said = [message.content or "" for message in trajectory.episode if message.role == "assistant"]
        return sum(re.fullmatch(r"=-?\d+", text) is not None for text in said) / len(said)

    return demo(folder, {"form": (form, 3.0), "right": correct}, training={"learning_rate": 1e-3})


@planted("rewards_missing")
def reward_that_raises_for_some(folder):
    def reward(item: Any) -> float:
        if "1" in str(item.output_obj):
            raise ValueError("cannot read the answer")
        return correct(item)

    return demo(folder, reward)


@planted("reward_constant")
def reward_that_compares_the_wrong_things(folder):
    return demo(folder, lambda output, answer: float(output == int(answer)))


@planted("too_hard")
def examples_that_are_too_hard(folder):
    def reward(item: Any) -> float:
        return float(item.id == questions()[0]["id"] and correct(item)) if hard(item) else correct(item)

    def hard(item: Any) -> bool:
        return len(str(item.input_obj)) > 5

    return demo(folder, reward, dataset=[row for row in questions() if len(row["question"]) != 5][:40])


@planted("too_easy")
def reward_that_nearly_everything_gets(folder):
    return demo(folder, lambda output: float(output != "malformed call: None" and len(output) > 0 and output != "0"))


@planted("too_few_generations")
def groups_of_two(folder):
    return demo(folder, generations=2, examples_per_epoch=40)


@planted("component_dominates")
def two_scores_of_different_scale(folder):
    return demo(folder, {"characters": lambda output: float(len(output)), "tool": (used_tool, 0.1)})


@planted("length_explains_reward")
def reward_for_long_replies(folder):
    def reward(item: Any) -> float:
        return len(item.trajectory[-1].data.payload.response_ids) / 24 + 0.02 * str(item.output_obj).count("1")

    return demo(folder, reward, say, sampling={"max_tokens": 24})


@planted("length_explains_reward", 5)
def reward_for_short_thoughts(folder):
    return scripted(folder, think, lambda output: 1 - len(output) / 400, sums(24))


@planted("score_constant")
def format_that_is_never_sampled(folder):
    return demo(folder, {"tags": lambda output: float("<answer>" in output), "correct": correct})


# ── faults of sampling ───────────────────────────────────────────────────────────────────────────────────────────────


@planted("replies_cut")
def too_few_tokens(folder):
    return demo(folder, sampling={"max_tokens": 4})


@planted("end_token_never_sampled")
def end_token_that_is_not_the_models(folder):
    policy = LocalPolicy.load("embedded", deterministic=True)
    policy._end_ids = frozenset()
    return demo(folder, digits, say, adapter=LocalGRPOAdapter(LocalGRPOConfig(), deterministic=True, policy=policy))


class WrongLogprobs(LocalPolicy):
    """Reports logprobs as a server does that rounds them."""

    async def sample(self, ids, params, seed):
        sample = await super().sample(ids, params, seed)
        return sample._replace(logprobs=[float(round(value)) for value in sample.logprobs])


@planted("logprob_gap")
def logprobs_that_are_rounded(folder):
    policy = WrongLogprobs.load("embedded", deterministic=True)
    config = LocalGRPOConfig(max_logprob_gap=None)
    return demo(folder, adapter=LocalGRPOAdapter(config, deterministic=True, policy=policy))


class OtherSampler(LocalPolicy):
    """Samples from another distribution than the model's that is trained, and records the probabilities that it sampled with, as
    a server with other weights or kernels does."""

    nudge = 0.0
    """Noise on each weight matrix, as a part of its standard deviation."""
    heat = 1.0
    """How many times as high its temperature is as the one that is asked for."""
    rounded = False
    """Whether it samples in bfloat16."""
    off = False
    """Whether it samples as it is trained, after all."""

    @classmethod
    def of(cls, nudge: float = 0.0, heat: float = 1.0, rounded: bool = False) -> OtherSampler:
        policy = cls.load("embedded", deterministic=True)
        assert isinstance(policy, OtherSampler)
        policy.nudge, policy.heat, policy.rounded = nudge, heat, rounded
        if rounded:
            policy.sampling_dtype = torch.bfloat16
        return policy

    async def sample(self, ids, params, seed):
        if not self.off:
            params = dataclasses.replace(params, temperature=params.temperature * self.heat)
        return await super().sample(ids, params, seed)

    def _sample_batch(self, batch):
        trained = self.model
        if not self.off:
            self.model = self._other(trained)
        try:
            super()._sample_batch(batch)
        finally:
            self.model = trained

    @torch.no_grad()
    def _other(self, trained: Any) -> Any:
        other, noise = copy.deepcopy(trained), torch.Generator().manual_seed(0)
        for weight in other.parameters():
            if weight.dim() > 1:
                weight += self.nudge * weight.std() * torch.randn(weight.shape, generator=noise)
        return other.bfloat16() if self.rounded else other


def other_sampler(
    folder: Path, policy: OtherSampler, seed: int = 0, epochs: int = 8, training: dict[str, Any] | None = None
) -> ft.Run:
    adapter = LocalGRPOAdapter(LocalGRPOConfig(**training or {}), seed, deterministic=True, policy=policy)
    return demo(folder, adapter=adapter, seed=seed, num_epochs=epochs, validation=questions("held_out")[:80])


@planted("sampler_differs")
def sampler_with_other_weights(folder):
    return other_sampler(folder, OtherSampler.of(nudge=0.05), training={"max_logprob_gap": None})


@planted("logprob_gap")
def sampler_that_is_hotter_than_it_says(folder):
    return other_sampler(folder, OtherSampler.of(heat=1.5), training={"max_logprob_gap": None})


@planted("training_failed", 2)
def sampler_with_other_weights_that_is_stopped(folder):
    return other_sampler(folder, OtherSampler.of(nudge=0.05))


@healthy(4)
def sampler_with_other_weights_that_is_corrected(folder):
    return other_sampler(folder, OtherSampler.of(nudge=0.05), seed=9, training={"importance_cap": 2.0})


@healthy(3)
def sampler_in_bfloat16(folder):
    return other_sampler(folder, OtherSampler.of(rounded=True), seed=10)


@planted("drift")
def messages_that_are_written_anew(folder):
    async def forgetful(question: str, llm: Any) -> str:
        messages: list[Any] = [{"role": "user", "content": question}]
        reply = await llm.chat(messages)
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": question}]
        return (await llm.chat(messages)).content

    class Retokenizing(Learner):
        def render(self, messages, tools=None, previous_ids=None):
            return super().render(messages, tools, None)

        def parse(self, ids):
            return {"role": "assistant", "content": super().parse(ids)["content"].strip()}

    def script(messages, version, rng):
        return f" {guess(messages, version, rng)} "

    adapter = FakeAdapter(policy=Retokenizing(script))
    return ft.Run(forgetful, exactly, sums(24), adapter=adapter, output_dir=folder, generations=8)


def guess(messages, version, rng):
    return str(sum(map(int, messages[0]["content"].split("+"))) + (rng.random() > skill(version)))


# ── faults of training ───────────────────────────────────────────────────────────────────────────────────────────────


@planted("learning_rate_too_small")
def learning_rate_of_almost_nothing(folder):
    return demo(folder, training={"learning_rate": 1e-9})


@planted("learning_rate_too_large")
def learning_rate_that_is_ten_times_too_large(folder):
    return demo(folder, training={"learning_rate": 1e-2})


@planted("entropy_collapsed")
def policy_that_is_too_sure_of_itself(folder):
    policy = LocalPolicy.load("embedded", deterministic=True)
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(40)  # logits forty times as far apart
    config = LocalGRPOConfig(learning_rate=1e-5)
    return demo(folder, adapter=LocalGRPOAdapter(config, deterministic=True, policy=policy))


@planted("entropy_exploded", 4)
def weights_that_decay_far_too_fast(folder):
    return demo(folder, training={"weight_decay": 100})


@planted("training_failed", 2)
def other_weights_than_those_that_sampled(folder):
    policy = WrongLogprobs.load("embedded", deterministic=True)
    config = LocalGRPOConfig(max_logprob_gap=0.01)
    return demo(folder, adapter=LocalGRPOAdapter(config, deterministic=True, policy=policy))


# ── faults of the agent and of the data ──────────────────────────────────────────────────────────────────────────────


@planted("tools_never_called")
def tools_that_are_never_called(folder):
    async def offered(question: str, llm: Any) -> str:
        return (await llm.chat([{"role": "user", "content": question}], tools=[ADD])).content

    return scripted(folder, guess, exactly, sums(24), offered)


@planted("tool_calls_not_parsed")
def tool_calls_in_a_format_that_is_not_parsed(folder):
    def script(messages, version, rng):
        call = {"name": "add", "arguments": {"sum": messages[-1]["content"]}}
        return f"<tool_call>{json.dumps(call)}</tool_call>" if rng.random() < 0.5 else guess(messages, version, rng)

    async def offered(question: str, llm: Any) -> str:
        return (await llm.chat([{"role": "user", "content": question}], tools=[ADD])).content

    return scripted(folder, script, exactly, sums(24), offered)


@planted("memorised", 7)
def examples_that_are_learned_by_heart(folder):
    known = {row["question"] for row in sums(12)}

    def script(messages, version, rng):
        return guess(messages, version if messages[0]["content"] in known else 0, rng)

    unseen = [row for row in sums(60, seed=5) if row["question"] not in known]
    return scripted(folder, script, exactly, sums(12), validation=unseen, validation_interval=3, num_epochs=7)


@planted("replies_all_alike")
def the_same_reply_to_everything(folder):
    def script(messages, version, rng):
        return "I do not know." if rng.random() < 0.95 else guess(messages, 5, rng)

    return scripted(folder, script, exactly, sums(24))


@planted("replies_repeat_themselves")
def replies_that_go_in_circles(folder):
    def script(messages, version, rng):
        return "let me think again. " * rng.randint(8, 12) + guess(messages, version, rng)

    return scripted(folder, script, lambda output, answer: float(output.endswith(" " + answer)), sums(24))


@planted("rollouts_failed")
def rollouts_that_fail(folder):
    async def fragile(question: str, llm: Any) -> str:
        said = await say(question, llm)
        return said if 100 // (int(said) % 3) else ""

    return scripted(folder, guess, exactly, sums(24), fragile)


def after_epochs(folder: Path, make: Make, epochs: int) -> ft.Run:
    """The run after so many epochs."""
    run = make(folder)
    for _ in range(epochs):
        with suppress(JobFailed):  # that is one of the faults
            ft.run_sync(run.next_epoch())
    return run
