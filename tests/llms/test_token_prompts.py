"""A server that takes token ids is asked with them: a conversation goes on behind the very ids that were sampled, whatever
its chat template makes of earlier turns; what cannot go that way goes as messages."""

from __future__ import annotations

import pytest

pytest.importorskip("openai")
pytest.importorskip("transformers")

import openai
from byte_tokenizer import APPENDING, CALLS, byte_tokenizer
from loopback import LoopbackServer, Refusal

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.rollouts.episodes import drift, episode_from_steps
from finetune_nb.types import EpisodeKey, EvalInputItem, Trajectory

QUESTION = [{"role": "user", "content": "3+4"}]
TRIMMING = APPENDING.replace("m.content or ''", "(m.content or '') | trim")
"""A template that shows a turn otherwise than it was sampled, as many do."""
TOKENIZER = byte_tokenizer(TRIMMING, CALLS)
END = TOKENIZER.eos_token_id
CALC = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}


def ids_of(text, end=True):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"] + [END] * end


@pytest.fixture
async def remote(tmp_path):
    """`await remote(server)` is an llm of that server, asked with token ids, and an episode that records it."""
    TOKENIZER.save_pretrained(tmp_path)
    builders = []

    async def connect(server, **options):
        settings = {"model_name": "tiny", "base_url": server.base_url, "tokenizer": str(tmp_path), "max_retries": 0}
        builder = ft.Builder(ft.load_config({"llms": {"remote": {"_type": "openai", **settings, **options}}}))
        builders.append(builder)
        return await builder.get_llm("remote"), CallRecorder(EpisodeKey("train", 0, 0, 0))

    yield connect
    for builder in builders:
        await builder.close()


def drift_of(episode):
    steps = episode.steps()
    item = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={}, trajectory=steps)
    return drift([Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=0.0)])


@pytest.mark.parametrize("by_client", [False, True])
async def test_a_conversation_goes_on_behind_the_ids_that_were_sampled(remote, by_client):
    with LoopbackServer(lambda request: " seven ", ids_of=ids_of) as server:
        llm, episode = await remote(server)
        with episode.recording():
            messages, client = list(QUESTION), llm.openai()
            for _ in range(2):
                if by_client:
                    answer = await client.chat.completions.create(model="x", messages=messages)
                    messages.append(answer.choices[0].message.model_dump(exclude_none=True))
                else:
                    messages.append(await llm.chat(messages))
                messages.append({"role": "user", "content": "sure?"})
    first, second = server.requests
    assert {request.path for request in server.requests} == {"/v1/completions"}
    asked = ids_of("<|user|>3+4<|end|>\n<|assistant|>", end=False)
    assert first.body["prompt"] == asked
    assert second.body["prompt"] == [
        *asked,
        *ids_of(" seven "),
        *ids_of("\n<|user|>sure?<|end|>\n<|assistant|>", end=False),
    ]
    one, two = episode.calls
    assert (one.exact, two.exact, one.reply["content"]) == (True, True, "seven")  # the parser trims, too
    assert (two.prompt_ids, two.response_ids) == (second.body["prompt"], ids_of(" seven "))
    assert len(two.logprobs) == len(two.response_ids)
    assert drift_of(episode) == (1, 0)


async def test_tool_calls_are_read_from_the_ids_and_answered(remote):
    def agent(request):
        return "it is 7" if request.body["prompt"][-6:].count(TOKENIZER.convert_tokens_to_ids("<|tool|>")) else ">3+4"

    with LoopbackServer(agent, ids_of=ids_of) as server:
        llm, episode = await remote(server)
        with episode.recording():
            reply = await llm.chat(QUESTION, tools=[CALC])
            (call,) = reply.tool_calls
            answer = {"role": "tool", "tool_call_id": call.id, "content": "7"}
            last = await llm.chat([*QUESTION, reply, answer], tools=[CALC])
    assert (call.id, call.name, call.arguments) == ("call_0_0", "calc", {"expression": "3+4"})
    assert last.content == "it is 7"
    assert drift_of(episode) == (1, 0)


SWITCH = "{% if brief is defined %}brief{% endif %}"
SWITCHED = TRIMMING.replace("<|assistant|>{% endif %}", f"<|assistant|>{SWITCH}{{% endif %}}")


async def test_variables_of_the_chat_template_are_those_of_the_run_and_of_the_call(remote, tmp_path):
    with LoopbackServer(lambda request: "7", ids_of=ids_of) as server:
        byte_tokenizer(SWITCHED, CALLS).save_pretrained(tmp_path)
        llm, episode = await remote(server, chat_template_kwargs={"brief": True})
        with episode.recording():
            reply = await llm.chat(QUESTION)
            await llm.chat([*QUESTION, reply, *QUESTION], chat_template_kwargs={"other": 1})
    prompts = [TOKENIZER.decode(request.body["prompt"]) for request in server.requests]
    assert [text.endswith("<|assistant|>brief") for text in prompts] == [True, True]
    assert [call.chat_template_kwargs for call in episode.calls] == [{"brief": True}, {"brief": True, "other": 1}]
    assert drift_of(episode) == (1, 0)


async def test_a_server_that_renders_gets_the_variables_of_the_chat_template():
    settings = {"model_name": "m", "chat_template_kwargs": {"enable_thinking": False}}
    with LoopbackServer() as server:
        config = {"llms": {"m": {"_type": "openai", "base_url": server.base_url, **settings}}}
        async with ft.Builder(ft.load_config(config)) as builder:
            llm, episode = await builder.get_llm("m"), CallRecorder(EpisodeKey("train", 0, 0, 0))
            with episode.recording():
                await llm.chat(QUESTION)
                await llm.chat(QUESTION, chat_template_kwargs={"enable_thinking": True})
                create = llm.openai().completions.create
                await create(model="x", prompt="3+4", extra_body={"add_special_tokens": False})
    given = [request.body.get("chat_template_kwargs") for request in server.requests]
    assert given == [{"enable_thinking": False}, {"enable_thinking": True}, None]
    assert server.requests[2].body["add_special_tokens"] is False


async def test_the_format_of_tool_calls_can_be_named(remote, tmp_path):
    def agent(request):
        return '<tool_call>{"name": "calc", "arguments": {"expression": "3+4"}}</tool_call>'

    with LoopbackServer(agent, ids_of=ids_of) as server:
        llm, episode = await remote(server, tool_parser="hermes")
        with episode.recording():
            reply = await llm.chat(QUESTION, tools=[CALC])
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("calc", {"expression": "3+4"})]
    assert [request.path for request in server.requests] == ["/v1/completions"]


async def test_a_server_that_takes_no_ids_gets_messages_and_is_asked_with_ids_once(remote, caplog):
    with LoopbackServer(takes_ids=False) as server:
        llm, episode = await remote(server)
        with episode.recording():
            for _ in range(2):
                await llm.chat(QUESTION)
    asked = [request.path.removeprefix("/v1/") for request in server.requests]
    assert asked == ["completions", "chat/completions", "chat/completions"]
    assert caplog.text.count("takes no token ids") == 1
    assert [call.sequence for call in episode.calls] == [0, 1]


async def test_a_refusal_of_the_call_itself_is_that_of_the_servers_chat_and_settles_nothing(remote, caplog):
    replies = [Refusal(400, "the prompt is too long")] * 2
    with LoopbackServer(lambda request: replies.pop() if replies else "7", ids_of=ids_of) as server:
        llm, episode = await remote(server)
        with episode.recording():
            with pytest.raises(openai.BadRequestError, match="too long"):
                await llm.chat(QUESTION)
            await llm.chat(QUESTION)
            replies.append(Refusal(400, "the prompt is too long"))
            with pytest.raises(openai.BadRequestError, match="too long"):
                await llm.chat(QUESTION)  # it has taken ids before, so that is not what it refuses
    asked = [request.path.removeprefix("/v1/") for request in server.requests]
    assert asked == ["completions", "chat/completions", "completions", "completions"]
    assert "takes no token ids" not in caplog.text
    assert len(episode.calls) == 1


async def test_a_server_that_fails_is_not_asked_another_way(remote):
    with LoopbackServer(lambda request: Refusal(500, "boom")) as server:
        llm, episode = await remote(server)
        with episode.recording(), pytest.raises(openai.InternalServerError):
            await llm.chat(QUESTION)
    assert [request.path for request in server.requests] == ["/v1/completions"]


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (QUESTION, {"tool_choice": "none", "tools": [CALC]}),
        (QUESTION, {"response_format": {"type": "json_object"}}),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], {}),
    ],
)
async def test_what_only_chat_can_do_goes_as_messages(remote, messages, options):
    def reply(request):
        return {"role": "assistant", "content": "7"}

    with LoopbackServer(reply, token_ids=False) as server:
        llm, episode = await remote(server)
        with episode.recording():
            await llm.openai().chat.completions.create(model="x", messages=messages, **options)
    assert [request.path for request in server.requests] == ["/v1/chat/completions"]
    assert not episode.calls[0].exact


async def test_a_tokenizer_that_is_not_there_is_said_at_the_start(tmp_path):
    settings = {
        "_type": "openai",
        "model_name": "tiny",
        "base_url": "http://127.0.0.1:1/v1",
        "tokenizer": str(tmp_path),
    }
    async with ft.Builder(ft.load_config({"llms": {"remote": settings}})) as builder:
        with pytest.raises(ConfigError, match="Name a Hugging Face directory or hub model in `tokenizer`"):
            await builder.get_llm("remote")
