"""The Responses API of the gateway, asked by the OpenAI client: what it gets, what is recorded, what may be referred to."""

from __future__ import annotations

import json

import pytest
from calling_policy import Caller, episode, says

from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.llms.protocols import responses

openai = pytest.importorskip("openai")

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": None}
CHAT_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def counts(messages, seed):
    """Counts the messages that are seen."""
    return f"{len(messages)} of {'/'.join(message['role'][0] for message in messages)}"


@pytest.fixture(autouse=True)
async def close_clients():
    yield
    await gateway().close_clients()


def without_seconds(call):
    return [getattr(call, name) for name in call.__slots__ if name != "seconds"]


async def test_a_response_is_recorded_like_the_same_chat():
    llm = says("seven")
    with (by_chat := episode()).recording():
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3+4"}]
        await llm.openai().chat.completions.create(
            model="x", messages=messages, temperature=0.5, max_tokens=3, tools=[CHAT_TOOL]
        )
    with (by_responses := episode()).recording():
        answer = await llm.openai().responses.create(
            model="x", instructions="be brief", input="3+4", temperature=0.5, max_output_tokens=3, tools=[TOOL]
        )
    assert (answer.output_text, answer.status, answer.incomplete_details.reason) == (
        "sev",
        "incomplete",
        "max_output_tokens",
    )
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("<system>be brief<user>3+4"), 3)
    assert (answer.instructions, answer.model) == ("be brief", "tiny")
    (chat,), (response,) = by_chat.calls, by_responses.calls
    assert without_seconds(chat) == without_seconds(response)


async def test_a_stream_has_typed_events_that_end_with_the_same_response():
    llm = says('think|call {"a": 3}\ncall {"a": 4}')
    with episode().recording():
        stream = await llm.openai().responses.create(model="x", input="3+4", tools=[TOOL], stream=True)
        events = [event async for event in stream]
        async with llm.openai().responses.stream(model="x", input="3+4", tools=[TOOL]) as helped:
            final = await helped.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        *["response.output_item.added", "response.function_call_arguments.delta"],
        *["response.function_call_arguments.done", "response.output_item.done"],
        *["response.output_item.added", "response.function_call_arguments.delta"],
        *["response.function_call_arguments.done", "response.output_item.done"],
        "response.completed",
    ]
    thought, first, second = events[-1].response.output
    assert thought.content[0].text == "think"
    assert [(call.call_id, call.name, call.arguments) for call in (first, second)] == [
        ("call_0_0", "add", '{"a": 3}'),
        ("call_0_1", "add", '{"a": 4}'),
    ]
    assert [item.arguments for item in final.output[1:]] == ['{"a": 3}', '{"a": 4}']


async def test_a_text_streams_as_text_with_logprobs_where_they_are_asked_for():
    llm = says("seven")
    with episode().recording():
        plain = await llm.openai().responses.create(model="x", input="3+4")
        asked = {"include": ["message.output_text.logprobs"], "stream": True}
        stream = await llm.openai().responses.create(model="x", input="3+4", **asked)
        events = {event.type: event async for event in stream}
    assert plain.output[0].content[0].logprobs == []
    assert events["response.output_text.delta"].delta == events["response.output_text.done"].text == "seven"
    (part,) = events["response.completed"].response.output[0].content
    assert [(entry.token, entry.logprob) for entry in part.logprobs][:2] == [("s", -1.0), ("e", -1.0)]


async def test_what_is_stored_is_carried_on_after_the_sampled_ids_and_without_its_instructions():
    llm = PolicyLLM(Caller(counts))
    with (one := episode()).recording():
        create = llm.openai().responses.create
        first = await create(model="x", instructions="be brief", input="3+4")
        second = await create(model="x", previous_response_id=first.id, input=[{"role": "user", "content": "and?"}])
        third = await create(model="x", previous_response_id=second.id, input="so?")
    assert [call.reply["content"] for call in one.calls] == ["2 of s/u", "3 of u/a/u", "5 of u/a/u/a/u"]
    (_, (prompt, reply), (last, _)) = llm.policy.sampled
    assert last[: len(prompt + reply)] == [*prompt, *reply]
    assert third.previous_response_id == second.id


async def test_stored_responses_can_be_retrieved_and_deleted_and_others_are_unknown():
    llm = says("seven")
    with episode().recording():
        client = llm.openai()
        kept = await client.responses.create(model="x", input="3+4")
        dropped = await client.responses.create(model="x", input="3+4", store=False)
        assert (await client.responses.retrieve(kept.id)).output_text == "seven"
        await client.responses.delete(kept.id)
        for unknown in (kept.id, dropped.id, "resp_x"):
            with pytest.raises(openai.NotFoundError, match="send the conversation as input"):
                await client.responses.create(model="x", input="and?", previous_response_id=unknown)
    with episode(1).recording(), pytest.raises(openai.NotFoundError):
        await llm.openai().responses.retrieve(kept.id)


async def test_a_rollout_keeps_its_newest_responses_alone(monkeypatch):
    monkeypatch.setattr(responses, "MOST_RESPONSES", 2)
    llm = says("seven")
    with episode().recording():
        client = llm.openai()
        made = [await client.responses.create(model="x", input="3+4") for _ in range(3)]
        assert (await client.responses.retrieve(made[1].id)).id == made[1].id
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made[0].id)


@pytest.mark.parametrize("refers", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
async def test_items_that_come_back_are_one_turn_again(refers, one_by_one):
    """one_by_one: the output of each call right after it, as some libraries send them."""
    llm = PolicyLLM(Caller(lambda messages, seed: "hm|call {}\ncall {}" if len(messages) == 1 else "done"))
    with (one := episode()).recording():
        create = llm.openai().responses.create
        first = await create(model="x", input="3+4", tools=[TOOL])
        items = [item.model_dump(exclude_none=True) for item in first.output]
        if refers:
            items = [{"type": "item_reference", "id": item["id"]} for item in items]
        calls = [item for item in first.output if item.type == "function_call"]
        outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in calls]
        back = [items[0], items[1], outputs[0], items[2], outputs[1]] if one_by_one else [*items, *outputs]
        await create(model="x", input=[{"role": "user", "content": "3+4"}, *back], tools=[TOOL])
    before, after = one.calls
    assert [message["role"] for message in after.messages] == ["user", "assistant", "tool", "tool"]
    assert after.messages[1]["reasoning_content"] == "hm"
    assert after.prompt_ids[: len(before.prompt_ids + before.response_ids)] == [
        *before.prompt_ids,
        *before.response_ids,
    ]


async def test_input_may_be_written_as_libraries_write_it():
    llm = says("seven")
    with (one := episode()).recording():
        given = [
            {"role": "developer", "content": "be brief"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "3"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "3?"}]},
            {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "7"}]},
        ]
        await llm.openai().responses.create(
            model="x",
            input=given,
            tools=[{**TOOL, "strict": True}],
            truncation="auto",
            metadata={"a": "b"},
            service_tier="auto",
            include=["reasoning.encrypted_content"],
            text={"format": {"type": "text"}, "verbosity": "medium"},
            reasoning={"effort": "medium", "summary": "auto"},
        )
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert one.calls[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "3?", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    assert one.calls[0].tools == [CHAT_TOOL]
    assert one.calls[0].ignored == ("strict",)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": []}, "messages is missing"),
        ({"input": 3}, "input is no list of objects"),
        ({"input": [{"type": "computer_call"}]}, "no items of the type 'computer_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads text only"),
        ({"input": [{"type": "item_reference", "id": "fc_x"}]}, "send the item itself"),
        ({"tools": [{"type": "web_search"}]}, "no tool of the type 'web_search'"),
        ({"background": True}, "background is not offered here"),
        ({"conversation": "conv_x"}, "conversation is not offered here"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"text": {"format": {"type": "json_object"}}}, "cannot honour text.format="),
        ({"text": {"verbosity": "low"}}, "cannot honour text.verbosity="),
        ({"reasoning": {"effort": "high"}}, "cannot honour reasoning.effort="),
        ({"tool_choice": {"type": "function", "name": "add"}, "tools": [TOOL]}, "cannot honour tool_choice="),
        ({"temprature": 1}, "Did you mean 'temperature'"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_in_the_names_of_this_api(options, said):
    llm = says("seven")
    with (one := episode()).recording():
        body = {"input": "3+4", **options}
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            await llm.openai().responses.create(model="x", input="", extra_body=body)
    assert said in str(caught.value)
    assert one.calls == []


async def test_a_call_whose_arguments_are_no_json_comes_back_as_it_was():
    llm = PolicyLLM(Caller(lambda messages, seed: "call {a:" if len(messages) == 1 else "done"))
    with (one := episode()).recording():
        create = llm.openai().responses.create
        (call,) = (first := await create(model="x", input="3+4", tools=[TOOL])).output
        assert call.arguments == "{a:"
        with pytest.raises(ValueError):
            json.loads(call.arguments)
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "what?"}
        await create(model="x", previous_response_id=first.id, input=[output], tools=[TOOL])
    (prompt, reply), (second, _) = llm.policy.sampled
    assert second[: len(prompt + reply)] == [*prompt, *reply]
    assert len(one.calls) == 2
