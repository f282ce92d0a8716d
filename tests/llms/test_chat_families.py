"""Conversations with the chat templates of many families: the ids that were sampled are kept as long as the template leaves
out nothing of them, and what is added is what the template puts after a reply."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from chat_families import CALL_ENDS, ENDS, ScriptedModel, drift_of, folder, spelled, template_of, tokenizer_of

from finetune_nb.errors import BackendError
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.types import EpisodeKey

if folder() is None:
    pytest.skip("the chat templates are those that TRL ships", allow_module_level=True)

PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string", "description": "what to compute"}}}
TOOLS = [{"type": "function", "function": {"name": "calc", "description": "computes", "parameters": PARAMETERS}}]
NO_TOOL_TURNS = {"cohere", "cohere2", "gemma", "gemma3", "llava_next"}
"""Templates that refuse messages of tools."""
STRIPS_THOUGHTS = {
    *("deepseek_r1_distill", "deepseekv3", "glm4moe", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"),
    *("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
    *("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"),
}
"""Templates that leave the thoughts of earlier turns out."""
DECORATING = ["qwen3", "glm4moe", "phi3_5", "qwen3_5_nothink", "gptoss", "gemma4_v5", "llama3_2", "qwen2_5"]
"""Those that are tested each time; the others are slow."""
FAMILIES = [name if name in DECORATING else pytest.param(name, marks=pytest.mark.slow) for name in ENDS]
SAID = ["3+4 is", " too ", "", "argue\n\n"]


class Talking(ScriptedModel):
    """Says what the script says; a reply with an even number calls the calculator where there is one."""

    def parse(self, ids, tools=None, tool_parser=None):
        number = len(self.sampled) - 1
        if not tools or number % 2:
            return super().parse(ids, ())
        function = {"name": "calc", "arguments": json.dumps({"expression": f"3+{number}"})}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def model_of(family, said, tools, cut):
    """A model that says that, spelled in other tokens than its tokenizer would."""
    ends = ENDS[family]
    tokenizer = tokenizer_of(template_of(family), ends, "<|begin|>")
    script = []
    for number, text in enumerate(said):
        end = CALL_ENDS.get(family, ends[0]) if tools and number % 2 == 0 else ends[0]
        script.append(spelled(tokenizer, text) + ([] if cut else tokenizer.convert_tokens_to_ids([end])))
    return Talking(tokenizer, tokenizer.convert_tokens_to_ids(ends), script)


async def conversation(model, tools):
    """The episode of an agent that answers calls, and asks on after all else; and the messages of each of its calls."""
    llm, asked = PolicyLLM(model), []
    messages = [{"role": "user", "content": "what is 3+4?"}]
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        for _ in model.script:
            asked.append(list(messages))
            reply = await llm.chat(messages, tools=tools)
            messages.append(reply.message)
            results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in reply.tool_calls]
            messages += results or [{"role": "user", "content": "and then?"}]
    return episode, asked


def check_what_was_added(model, episode, asked, tools, cut):
    """Each prompt begins with all that was seen and sampled before; what follows is the end of the whole conversation as the
    template writes it, from the end of the last reply's turn on."""
    ends = {*model.template.closers, *model.template.end_texts}
    for before, call, messages in zip(episode.calls, episode.calls[1:], asked[1:], strict=False):
        so_far = [*before.prompt_ids, *before.response_ids]
        assert call.prompt_ids[: len(so_far)] == so_far
        added = model.tokenizer.decode(call.prompt_ids[len(so_far) :])
        whole = model.tokenizer.decode(model.render(messages, tools))
        assert whole.endswith(added)
        assert model.tokenizer(added, add_special_tokens=False)["input_ids"] == call.prompt_ids[len(so_far) :]
        head = whole.removesuffix(added)
        if cut:
            assert not head.endswith(tuple(ends))
        elif not head.endswith(tuple(ends)):
            # The next turn's beginning ends turns, and another one was sampled.
            assert added.startswith(tuple(ends))


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
@pytest.mark.parametrize("tools", [TOOLS, None], ids=["tool loop", "user turns"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_no_turn_drifts_where_nothing_that_was_sampled_is_left_out(family, tools, cut):
    said = [text for text in SAID * 2 if text or not cut]  # a reply that was cut has a token at least
    model = model_of(family, said, tools, cut)
    if tools and family in NO_TOOL_TURNS:
        with pytest.raises(BackendError, match="refuses messages"):
            await conversation(model, tools)
        return
    episode, asked = await conversation(model, tools)
    assert drift_of(episode) == (len(model.script) - 1, 0)
    assert [(call.prompt_ids, call.response_ids) for call in episode.calls] == model.sampled
    check_what_was_added(model, episode, asked, tools, cut)


@pytest.mark.parametrize("family", FAMILIES)
async def test_thoughts_that_the_template_takes_out_are_drift(family):
    model = model_of(family, ["<think>\nhm\n</think>\n\n7", "8", "9"], None, False)
    episode, _ = await conversation(model, None)
    assert drift_of(episode) == (2, int(family in STRIPS_THOUGHTS))
    shown = model.tokenizer.decode(episode.calls[-1].prompt_ids)
    assert ("hm" in shown) == (family not in STRIPS_THOUGHTS)


async def test_thoughts_are_kept_within_a_tool_loop_and_taken_out_after_it():
    thought = "<think>\nhm\n</think>\n\n"
    model = model_of("qwen3", [thought, "7", "8"], TOOLS, False)
    read = Talking.parse

    def parse(ids, tools=None, tool_parser=None):
        message = read(model, ids, tools)
        return {**message, "reasoning_content": "hm"} if message.get("tool_calls") else message

    model.parse = parse
    llm = PolicyLLM(model)
    messages = [{"role": "user", "content": "what is 3+4?"}]
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        reply = await llm.chat(messages, tools=TOOLS)
        # Most libraries do not send back what was thought.
        called = {key: value for key, value in reply.message.items() if key != "reasoning_content"}
        messages += [called, {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "5"}]
        messages.append(await llm.chat(messages, tools=TOOLS))
        assert drift_of(episode) == (1, 0)
        await llm.chat([*messages, {"role": "user", "content": "and then?"}], tools=TOOLS)
    assert drift_of(episode) == (2, 1)
