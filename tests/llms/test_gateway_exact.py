"""Recording through the gateway is exact, with a real model and real tools: the ids recorded are the ids sampled, and the
same weights give the recorded logprobs again."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
openai = pytest.importorskip("openai")

from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.examples.calculator.task import LEVELS, TOOLS, calculate, make_question  # noqa: E402
from finetune_nb.llms.call_recorder import CallRecorder  # noqa: E402
from finetune_nb.llms.client import PolicyLLM  # noqa: E402
from finetune_nb.llms.gateway import gateway  # noqa: E402
from finetune_nb.rollouts.episodes import drift, episode_from_steps  # noqa: E402
from finetune_nb.types import EpisodeKey, EvalInputItem, SamplingParams, Trajectory  # noqa: E402


@pytest.fixture
def llm():
    policy = LocalPolicy.load("embedded")
    policy.sampled = []
    sample = policy.sample

    async def keeping(ids, params, seed):
        found = await sample(ids, params, seed)
        policy.sampled.append((list(ids), list(found.ids), list(found.logprobs)))
        return found

    policy.sample = keeping
    return PolicyLLM(policy, sampling=SamplingParams(1.0, 24))


async def by_openai(question, llm):
    client, messages, remaining = llm.openai(), [{"role": "user", "content": question}], question
    for _ in range(5):
        answer = await client.chat.completions.create(model="x", messages=messages, tools=TOOLS)
        turn = answer.choices[0].message
        messages.append(turn)
        for call in turn.tool_calls or ():
            try:
                expression = str(json.loads(call.function.arguments).get("expression"))
            except (ValueError, AttributeError):
                expression = ""
            remaining = calculate(expression, remaining) or "no"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": remaining})
        if not turn.tool_calls:
            messages.append({"role": "user", "content": "again"})


async def by_langchain(question, llm):
    pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=llm.base_url, api_key=llm.api_key, model="x").bind_tools(TOOLS)
    messages, remaining = [HumanMessage(question)], question
    for _ in range(5):
        turn = await model.ainvoke(messages)
        messages.append(turn)
        for call in turn.tool_calls:
            remaining = calculate(str(call["args"].get("expression")), remaining) or "no"
            messages.append(ToolMessage(remaining, tool_call_id=call["id"]))
        if not turn.tool_calls:
            messages.append(HumanMessage("again"))


def answered(expression, remaining):
    """What the tool says to an expression that a model wrote."""
    return calculate(expression if isinstance(expression, str) else str(expression), remaining) or "no"


def expression_of(arguments):
    try:
        return str(json.loads(arguments).get("expression"))
    except (ValueError, AttributeError):
        return ""


FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


async def final_response(client, stream, **asked):
    if not stream:
        return await client.responses.create(model="x", tools=FLAT_TOOLS, **asked)
    async with client.responses.stream(model="x", tools=FLAT_TOOLS, **asked) as events:
        async for _ in events:
            pass
        return await events.get_final_response()


async def by_responses(question, llm):
    """Streams every other turn; refers to what is stored, or sends the whole conversation with the items as they came."""
    client, remaining, stored = llm.openai(), question, len(question) % 2 == 0
    given, previous, whole = [{"role": "user", "content": question}], None, []
    for turn in range(5):
        whole += given
        asked = {"input": given, "previous_response_id": previous} if stored and previous else {"input": whole}
        answer = await final_response(client, turn % 2 == 1, store=stored, **asked)
        given, previous = [], answer.id
        if not stored:
            whole += [item.model_dump(exclude_none=True) for item in answer.output]
        for item in answer.output:
            if item.type == "function_call":
                remaining = answered(expression_of(item.arguments), remaining)
                given.append({"type": "function_call_output", "call_id": item.call_id, "output": remaining})
        given = given or [{"role": "user", "content": "again"}]


async def by_messages(question, llm):
    anthropic = pytest.importorskip("anthropic")
    tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
    remaining, messages = question, [{"role": "user", "content": question}]
    http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
    async with anthropic.AsyncAnthropic(base_url=llm.base_url, api_key=llm.api_key, http_client=http) as client:
        for turn in range(5):
            asked = {"model": "x", "max_tokens": 24, "tools": tools, "messages": messages}
            if turn % 2:
                async with client.messages.stream(**asked) as events:
                    answer = await events.get_final_message()
            else:
                answer = await client.messages.create(**asked)
            results = []
            for block in answer.content:
                if block.type == "tool_use":
                    remaining = answered(block.input.get("expression"), remaining)
                    results.append({"type": "tool_result", "tool_use_id": block.id, "content": remaining})
            messages.append({"role": "assistant", "content": answer.content})
            messages.append({"role": "user", "content": results or "again"})


async def by_generate(question, llm):
    """Renders by itself: token ids are all that goes over the wire."""
    import httpx

    url = f"{llm.base_url.removesuffix('/v1')}/inference/v1/generate"
    messages, seen, sampled = [{"role": "user", "content": question}], None, []
    async with httpx.AsyncClient(trust_env=False, headers={"Authorization": f"Bearer {llm.api_key}"}) as client:
        for _ in range(5):
            prompt = llm.policy.render(messages, None, seen)
            asked = {"model": "x", "token_ids": prompt, "sampling_params": {"logprobs": 1, "max_tokens": 24, "seed": 7}}
            answer = (await client.post(url, json=asked, timeout=60)).json()
            (choice,) = answer["choices"]
            seen = [*prompt, *choice["token_ids"]]
            sampled.append((prompt, choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]))
            messages += [llm.policy.parse(choice["token_ids"]), {"role": "user", "content": "again"}]
    assert all(turn in llm.policy.sampled for turn in sampled)


async def rollouts(llm, workflow, count, at_once=16):
    rng, gate = random.Random(3), asyncio.Semaphore(at_once)

    async def one(n, question):
        async with gate:
            with CallRecorder(EpisodeKey("train", 0, n, 0), seed=1).recording([llm.policy]) as episode:
                await workflow(question, llm)
            return episode

    questions = [make_question(rng, rng.choice(LEVELS)) for _ in range(count)]
    episodes = await asyncio.gather(*(one(n, question) for n, question in enumerate(questions)))
    await gateway().close_clients()
    return episodes


def largest_difference(policy, recorded, rows=64):
    """Of a recorded logprob and that of a forward pass without a cache. With the policy's own number of threads: two of them
    wait for each other most of the time where a pass is this short and the machine busy."""
    worst, recorded = 0.0, sorted(recorded, key=lambda call: len(call[0]) + len(call[1]))
    with policy.exclusive.hold(), torch.inference_mode():
        for start in range(0, len(recorded), rows):
            batch = recorded[start : start + rows]
            width = max(len(prompt) + len(reply) for prompt, reply, _ in batch)
            ids = torch.tensor([prompt + reply + [0] * (width - len(prompt + reply)) for prompt, reply, _ in batch])
            logprobs = torch.log_softmax(policy.model(ids).logits.float(), -1)
            for row, (prompt, reply, known) in zip(logprobs, batch, strict=True):
                of_reply = row[len(prompt) - 1 : len(prompt + reply) - 1].gather(1, torch.tensor(reply)[:, None])[:, 0]
                worst = max(worst, (of_reply - torch.tensor(known)).abs().max().item())
    return worst


def check_exact(llm, episodes):
    """Everything recorded was sampled, everything sampled was recorded; returns the calls and the largest difference of a
    logprob."""
    calls = [call for episode in episodes for call in episode.calls]
    recorded = [(call.prompt_ids, call.response_ids, call.logprobs) for call in calls]
    assert sorted(recorded) == sorted(llm.policy.sampled)
    assert all(call.exact for call in calls)
    worst = largest_difference(llm.policy, recorded)
    assert worst < 1e-4
    return calls, worst


def check(llm, episodes):
    """The same, and no turn was rendered anew; returns turns, tool calls and the largest difference of a logprob."""
    calls, worst = check_exact(llm, episodes)
    carried = drifted = 0
    for n, episode in enumerate(episodes):
        item = EvalInputItem(id=n, input_obj="", expected_output_obj="", full_dataset_entry={})
        item.trajectory = episode.steps()
        turns = drift([Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=0.0)])
        carried, drifted = carried + turns[0], drifted + turns[1]
    assert (carried, drifted) == (len(calls) - len(episodes), 0)
    return len(calls), sum(len(call.reply.get("tool_calls") or ()) for call in calls), worst


PROTOCOLS = [by_openai, by_responses, by_messages]


@pytest.mark.parametrize("workflow", [*PROTOCOLS, pytest.param(by_langchain, marks=pytest.mark.slow)])
async def test_ids_and_logprobs_of_multi_turn_episodes_with_tools_are_those_of_the_model(llm, workflow):
    turns, tools, _ = check(llm, await rollouts(llm, workflow, 12))
    assert turns == 5 * 12
    assert tools > 12


@pytest.mark.parametrize("count", [12, pytest.param(250, marks=pytest.mark.slow)])
async def test_token_ids_that_a_client_renders_itself_are_recorded_as_they_came(llm, count):
    calls, worst = check_exact(llm, await rollouts(llm, by_generate, count, at_once=64))
    assert len(calls) == 5 * count
    print(f"\nby_generate: {count:,} episodes, {len(calls):,} turns: all ids as sampled, logprobs within {worst:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("workflow", PROTOCOLS)
async def test_episodes_at_once_are_recorded_exactly(llm, workflow):
    turns, tools, worst = check(llm, await rollouts(llm, workflow, 250, at_once=64))
    print(
        f"\n{workflow.__name__}: 250 episodes, {turns:,} turns, {tools:,} tool calls: all ids as sampled, logprobs within "
        f"{worst:.1e}"
    )
