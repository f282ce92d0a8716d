"""What a chat template takes and does: null content, variables, ends of turns, tools that it leaves out; and the prompts that
are made after ids that were sampled."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")

import openai
from chat_families import ScriptedModel, drift_of, spelled, tokenizer_of
from tokenizers.processors import TemplateProcessing

from finetune_nb.errors import BackendError, ConfigError
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.chat_tokenizer import ChatTokenizer
from finetune_nb.llms.client import PolicyLLM, PolicyLLMConfig
from finetune_nb.llms.gateway import gateway
from finetune_nb.testing import ScriptedPolicy
from finetune_nb.types import EpisodeKey, SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = ["<|im_end|>", "<|endoftext|>"]
ASKED = {"role": "user", "content": "3+4?"}
SAID = {"role": "assistant", "content": "7"}
NEXT = {"role": "user", "content": "and then?"}
CALLED = {"id": "call_0_0", "type": "function", "function": {"name": "calc", "arguments": '{"x": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
RESULT = {"role": "tool", "tool_call_id": "call_0_0", "content": "5"}
TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}]


def model_of(template=CHATML, ends=ENDS, script=(), end_ids=None, begin=None):
    tokenizer = tokenizer_of(template, list(ends), begin)
    ids = tokenizer.convert_tokens_to_ids(list(ends if end_ids is None else end_ids))
    return ScriptedModel(tokenizer, ids, [spelled(tokenizer, text) for text in script])


def shown(model, messages, previous=None, **options):
    """What is rendered, as text; after `previous`, what is added to it."""
    if previous is None:
        return model.tokenizer.decode(model.render(messages, **options))
    so_far = [*model.render([ASKED], options.get("tools")), *spelled(model.tokenizer, previous)]
    ids = model.render(messages, previous_ids=so_far, **options)
    return model.tokenizer.decode(ids[len(so_far) :]) if ids[: len(so_far)] == so_far else None


@pytest.fixture
async def rollout():
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        yield episode
    await gateway().close_clients()


# ── shapes of messages ───────────────────────────────────────────────────────────────────────────────────────────────

JOINING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_CALLS = JOINING.replace("m['content'] +", "m['content'] + CALLS +")
AS_TEXT = WITH_CALLS.replace(
    "CALLS", "(m.tool_calls[0].function.name + m.tool_calls[0].function.arguments if m.tool_calls else '')"
)
AS_ITEMS = WITH_CALLS.replace(
    "CALLS", "(m.tool_calls[0].function.arguments.items() | list | string if m.tool_calls else '')"
)
ONE_CALL = JOINING.replace(
    "{{ '<|im", "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one!') }}{% endif %}{{ '<|im", 1
).replace(
    "m['content'] +", "(m.content or '') + (m.tool_calls[0].function.arguments | tojson if m.tool_calls else '') +"
)
IN_PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}|"
    "{% endfor %}"
)


def test_null_content_beside_calls_is_an_empty_text_where_a_template_joins_texts():
    model = model_of(JOINING)
    assert "<|im_start|>assistant\n<|im_end|>\n" in shown(model, [ASKED, CALLING, RESULT])
    assert shown(model, [ASKED, {"role": "assistant", "content": None}]).count("<|im_end|>") == 2
    assert shown(model, [ASKED, CALLING, {**RESULT, "content": None}]).endswith(
        "tool\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown(model, [ASKED, {"role": "assistant", "tool_calls": [CALLED]}, RESULT])


def test_null_content_stays_null_where_a_template_knows_it():
    template = CHATML.replace(
        "{{ m.content }}", "{{ 'null' if m.content is not defined or m.content is none else m.content }}"
    )
    assert "assistant\nnull<|im_end|>" in shown(model_of(template), [ASKED, CALLING, RESULT])


def test_arguments_are_the_text_or_the_mapping_that_the_template_takes():
    assert 'calc{"x": 1}' in shown(model_of(AS_TEXT), [ASKED, CALLING, RESULT])
    assert "[('x', 1)]" in shown(model_of(AS_ITEMS), [ASKED, CALLING, RESULT])


def test_arguments_that_are_no_json_are_shown_by_templates_that_take_mappings_alone():
    broken = {**CALLING, "tool_calls": [{**CALLED, "function": {"name": "calc", "arguments": "x=1"}}]}
    assert "[('INVALID_JSON', 'x=1')]" in shown(model_of(AS_ITEMS), [ASKED, broken, RESULT])
    assert "calcx=1" in shown(model_of(AS_TEXT), [ASKED, broken, RESULT])


def test_several_calls_are_turns_of_their_own_where_a_template_takes_one_a_turn():
    both = {**CALLING, "content": "so", "tool_calls": [CALLED, {**CALLED, "id": "call_0_1"}]}
    text = shown(model_of(ONE_CALL), [ASKED, both, RESULT, {**RESULT, "tool_call_id": "call_0_1"}])
    assert text.count('<|im_start|>assistant\n{"x": 1}') == 1 and text.count('so{"x": 1}') == 1
    assert shown(model_of(ONE_CALL), [ASKED, both, RESULT], "so<|im_end|>").startswith("\n<|im_start|>tool\n5")


def test_texts_are_given_in_parts_where_a_template_reads_parts_alone():
    assert shown(model_of(IN_PARTS), [ASKED, SAID, NEXT]) == "3+4?|7|and then?|"


def test_thoughts_have_the_name_that_the_template_reads():
    template = CHATML.replace("{{ m.content }}", "{{ m.get('thinking') or '' }}{{ m.content }}")
    thoughtful = {**SAID, "reasoning_content": "hm"}
    assert "assistant\nhm7<|im_end|>" in shown(model_of(template), [ASKED, thoughtful, NEXT])


def test_what_a_template_refuses_is_still_an_error_of_ours():
    with pytest.raises(BackendError, match="refuses messages with the roles user.*alternate"):
        model_of("{{ raise_exception('roles must alternate') }}").render([ASKED])


# ── after the ids that were sampled ──────────────────────────────────────────────────────────────────────────────────

NEWEST = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
"""Shows an empty thought in the newest turn alone, as Qwen3's template does."""
ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# <|user|><|assistant|> #}"
)
"""Nothing but the beginning of the next turn ends a turn, as in GLM-4.5's template."""
STRIPPING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
FORGETTING = CHATML.replace("in messages", "in messages[-2:]")


@pytest.mark.parametrize("template", [CHATML, NEWEST], ids=["appending", "decorating"])
@pytest.mark.parametrize(
    ("sampled", "content", "added"),
    [
        ("7<|im_end|>", "7", ""),
        ("7<|endoftext|>", "7", ""),
        ("7", "7", "<|im_end|>"),
        (" 7 \n<|im_end|>", " 7 \n", ""),
        ("  ", "  ", "<|im_end|>"),
        ("<|im_end|>", "", ""),
    ],
)
def test_what_follows_a_reply_is_added_to_what_was_sampled(template, sampled, content, added):
    messages = [ASKED, {"role": "assistant", "content": content}, NEXT]
    following = "\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(model_of(template), messages, sampled) == added + following


def test_a_template_without_a_token_at_the_end_of_a_turn_adds_all_that_follows():
    messages = [ASKED, SAID, {"role": "user", "content": "what is </s>?"}]
    model = model_of(ALPACA, ["</s>"])
    assert shown(model, messages, "7</s>") == "\n\n### user:\nwhat is </s>?\n\n### assistant:\n"
    assert shown(model, messages, "7") == "\n\n### user:\nwhat is </s>?\n\n### assistant:\n"


def test_one_letter_said_by_the_user_is_not_looked_for_in_the_template():
    messages = [ASKED, SAID, {"role": "user", "content": "i"}]
    assert shown(model_of(), messages, "7<|im_end|>") == "\n<|im_start|>user\ni<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [STRIPPING, FORGETTING])
def test_a_template_that_leaves_out_what_was_sampled_is_rendered_anew(template):
    said = "<think>hm</think>7" if template == STRIPPING else "7"
    messages = [ASKED, {"role": "assistant", "content": said}, NEXT]
    if template == FORGETTING:
        messages += [{"role": "assistant", "content": "8"}, NEXT]
    assert shown(model_of(template), messages, said + "<|im_end|>") is None


@pytest.mark.parametrize(
    ("sampled", "role", "added"),
    [
        ("7<|user|>", "user", "\nand <|user|>?"),
        ("7<|endoftext|>", "user", "<|user|>\nand <|user|>?"),
        ("7", "user", "<|user|>\nand <|user|>?"),
        ("7<|user|>", "system", "<|system|>\nand <|user|>?"),
    ],
)
def test_where_the_next_turn_ends_a_turn_its_beginning_is_added_unless_it_was_sampled(sampled, role, added):
    messages = [ASKED, SAID, {"role": role, "content": "and <|user|>?"}]
    assert shown(model_of(GLM, ["<|endoftext|>", "<|user|>"]), messages, sampled) == f"{added}<|assistant|>\n"


def test_thoughts_that_were_not_sampled_may_be_left_out():
    few_shot = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>hm</think>2"}]
    model = model_of(STRIPPING)
    so_far = [*model.render([*few_shot, ASKED]), *spelled(model.tokenizer, "7<|im_end|>")]
    ids = model.render([*few_shot, ASKED, SAID, NEXT], previous_ids=so_far)
    assert ids[: len(so_far)] == so_far


def test_a_call_ends_where_the_format_ends_it_if_no_end_token_follows():
    call = "{% set f = m.tool_calls[0].function %}{{ {'name': f.name, 'arguments': f.arguments} | tojson }}"
    either = (
        f"{{% if m.tool_calls %}}<tool_call>{call}</tool_call>{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}"
    )
    model = model_of(CHATML.replace("{{ m.content }}<|im_end|>", either))
    sampled = '<tool_call>{"name": "calc", "arguments": {"x": 1}}</tool_call><|im_end|>'
    assert shown(model, [ASKED, CALLING, RESULT], sampled).startswith("<|im_start|>tool\n5<|im_end|>")


# ── variables of the template ────────────────────────────────────────────────────────────────────────────────────────

SWITCHED = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
IN_SYSTEM = "{% if effort is defined %}<|im_start|>system\n{{ effort }}<|im_end|>\n{% endif %}" + CHATML
OFF = {"enable_thinking": False}
EMPTY_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


async def test_variables_of_a_run_and_of_a_call_reach_the_template(rollout):
    model = model_of(SWITCHED, script=["7<|im_end|>"] * 6)
    llm = PolicyLLM(model)
    await llm.chat([ASKED])
    await llm.chat([ASKED], chat_template_kwargs=OFF)
    llm.config = PolicyLLMConfig(adapter="a", chat_template_kwargs=OFF)
    llm.configured()
    await llm.chat([ASKED])
    await llm.chat([ASKED], chat_template_kwargs={"enable_thinking": True})
    create = llm.openai().chat.completions.create
    await create(model="x", messages=[ASKED])
    await create(model="x", messages=[ASKED], extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    prompts = [model.tokenizer.decode(ids) for ids, _ in model.sampled]
    assert [text.endswith(EMPTY_THOUGHT) for text in prompts] == [False, True, True, False, True, False]
    assert [call.chat_template_kwargs for call in rollout.calls][:3] == [None, OFF, OFF]


async def test_variables_that_change_between_turns_keep_the_ids_unless_they_change_earlier_turns(rollout):
    for template, name, drifted in ((SWITCHED, "enable_thinking", 0), (IN_SYSTEM, "effort", 1)):
        llm = PolicyLLM(model_of(template, script=["7<|im_end|>", "8<|im_end|>"]))
        with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
            reply = await llm.chat([ASKED], chat_template_kwargs={name: False})
            await llm.chat([ASKED, reply, NEXT], chat_template_kwargs={name: True})
        assert drift_of(episode) == (1, drifted)


async def test_variables_that_cannot_be_are_refused_and_those_of_no_effect_are_said(rollout, caplog):
    llm = PolicyLLM(model_of(SWITCHED, script=["7<|im_end|>"] * 2))
    with pytest.raises(ConfigError, match="chat_template_kwargs has 'tokenize'"):
        await llm.chat([ASKED], chat_template_kwargs={"tokenize": True})
    create = llm.openai().chat.completions.create
    for wrong in ({"tools": []}, {"chat_template": "x"}, "enable_thinking"):
        with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
            await create(model="x", messages=[ASKED], extra_body={"chat_template_kwargs": wrong})
    for _ in range(2):
        await llm.chat([ASKED], chat_template_kwargs={"enable_thinkin": False})
    assert caplog.text.count("does not use 'enable_thinkin'") == 1


async def test_a_policy_without_a_chat_template_takes_no_variables_and_no_tool_parser(rollout):
    llm = PolicyLLM(ScriptedPolicy())
    with pytest.raises(ConfigError, match="takes no chat_template_kwargs"):
        await llm.chat([ASKED], chat_template_kwargs=OFF)
    llm.tool_parser = "hermes"
    with pytest.raises(ConfigError, match="takes no tool_parser"):
        await llm.chat([ASKED])


# ── ends of turns ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "ends", "end_ids", "missing"),
    [
        (CHATML, ENDS, ["<|endoftext|>"], "<|im_end|>"),
        (CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}", ENDS, ["<|endoftext|>"], "<|im_end|>"),
        (GLM, ["<|endoftext|>"], ["<|endoftext|>"], "<|user|>"),
        (CHATML, ENDS, ENDS, None),
        (CHATML, ["<|im_end|>"], ["<|im_end|>"], None),
        (ALPACA, ["</s>"], ["</s>"], None),
        (CHATML.replace("<|im_end|>", "</s>"), ["</s>"], ["</s>"], None),
        (None, ["</s>"], ["</s>"], None),
    ],
)
def test_the_end_of_a_turn_ends_replies_and_that_is_said(template, ends, end_ids, missing, caplog):
    tokenizer = tokenizer_of(template or "", list(ends))
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids(list(end_ids))
    found = ChatTokenizer(tokenizer, ids, "m")
    expected = {*ids, *([tokenizer.convert_tokens_to_ids(missing)] if missing else [])}
    assert found._end_ids == expected
    assert (f"ends turns with {missing!r}" in caplog.text) == (missing is not None)
    assert ("eos_token_id" in caplog.text) == (missing is not None)


def test_an_end_of_a_turn_that_is_no_token_is_said(caplog):
    tokenizer = tokenizer_of("", ["</s>"])
    tokenizer.chat_template = CHATML
    assert ChatTokenizer(tokenizer, [tokenizer.eos_token_id], "m")._end_ids == {tokenizer.eos_token_id}
    assert "'<|im_end|>', which is no token" in caplog.text


# ── tools that are of no use ─────────────────────────────────────────────────────────────────────────────────────────


async def test_tools_that_a_template_leaves_out_are_said_once_with_the_way_out(rollout, caplog):
    llm = PolicyLLM(model_of(script=["7<|im_end|>"] * 4))
    for _ in range(2):
        await llm.chat([ASKED], tools=TOOLS)
    await llm.openai().chat.completions.create(model="x", messages=[ASKED], tools=TOOLS)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "leaves tools out" in said and "not told of calc" in said and "tool_parser = one of deepseek_v3" in said


async def test_tools_that_the_messages_tell_of_are_no_matter(rollout, caplog):
    llm = PolicyLLM(model_of(script=['<tool_call>{"name": "calc"}</tool_call><|im_end|>']))
    llm.tool_parser = "hermes"
    told = {"role": "system", "content": "You may call calc, so: <tool_call>..."}
    reply = await llm.chat([told, ASKED], tools=TOOLS)
    assert ([call.name for call in reply.tool_calls], caplog.text) == (["calc"], "")


async def test_calls_in_a_format_that_is_not_known_are_said_once_with_the_way_out(rollout, caplog):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    llm = PolicyLLM(model_of(template, script=["CALL calc<|im_end|>"] * 2))
    for _ in range(2):
        assert (await llm.chat([ASKED], tools=TOOLS)).content == "CALL calc"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "does not say in which format" in said and "tool_parser = one of" in said


# ── plain prompts, and texts that end replies ────────────────────────────────────────────────────────────────────────


def beginning(script):
    """A model whose tokenizer begins every text with <s>."""
    model = model_of(ends=["</s>"], begin="<s>", script=script)
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return model


async def test_a_plain_prompt_begins_as_the_tokenizer_begins_texts(rollout):
    model = beginning(["7</s>"] * 5)
    llm = PolicyLLM(model)
    create = llm.openai().completions.create
    text = model.tokenizer("arg 3+4", add_special_tokens=False)["input_ids"]
    for options in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        await create(model="x", prompt="arg 3+4", extra_body=options)
    await create(model="x", prompt=text)
    await llm.chat([ASKED])
    begin = model.tokenizer.bos_token_id
    prompts = [ids for ids, _ in model.sampled]
    assert prompts[:4] == [[begin, *text], [begin, *text], text, text]
    assert begin not in prompts[4]  # the chat template says how a conversation begins


async def test_a_prompt_that_goes_on_after_a_reply_begins_once(rollout):
    model = beginning(["7 too", "8</s>"])
    create = PolicyLLM(model).openai().completions.create
    first = await create(model="x", prompt="arg")
    await create(model="x", prompt=f"arg{first.choices[0].text} and")
    so_far = [*model.sampled[0][0], *model.sampled[0][1]]
    assert model.sampled[1][0][: len(so_far)] == so_far
    assert model.sampled[1][0].count(model.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("wrong", ["no", 1])
async def test_what_is_no_truth_value_is_refused(rollout, wrong):
    create = PolicyLLM(beginning([])).openai().completions.create
    with pytest.raises(openai.BadRequestError, match="add_special_tokens is .*; expected true or false"):
        await create(model="x", prompt="3", extra_body={"add_special_tokens": wrong})


async def test_special_tokens_on_top_of_a_chat_template_are_refused(rollout):
    create = PolicyLLM(model_of(script=["7<|im_end|>"])).openai().chat.completions.create
    await create(model="x", messages=[ASKED], extra_body={"add_special_tokens": False})
    with pytest.raises(openai.BadRequestError, match="cannot honour add_special_tokens"):
        await create(model="x", messages=[ASKED], extra_body={"add_special_tokens": True})


async def test_a_stop_text_is_no_part_of_a_reply_however_it_is_asked_for(rollout):
    script = ["3 STOP", "3 STOP", "4<|im_end|>"]
    model = model_of(script=script)
    llm = PolicyLLM(model, sampling=SamplingParams(stop=("STOP",)))
    reply = await llm.chat([ASKED], stop=("STOP",))
    answer = await llm.openai().chat.completions.create(model="x", messages=[ASKED])
    assert reply.content == reply.message["content"] == answer.choices[0].message.content == "3 "
    await llm.chat([ASKED, reply, NEXT])
    first, _, last = rollout.calls
    so_far = [*first.prompt_ids, *first.response_ids]
    assert model.tokenizer.decode(first.response_ids) == "3 STOP"  # the ids are those that were sampled
    assert last.prompt_ids[: len(so_far)] == so_far
    assert model.tokenizer.decode(last.prompt_ids[len(so_far) :]).startswith("<|im_end|>\n<|im_start|>user\nand then?")
