"""Replies that are held to a form: what is drawn fits, and what is recorded is how likely the model itself makes it."""

from __future__ import annotations

import asyncio
import builtins
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llguidance")

from tiny_models import byte_tokenizer, random_model  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import ConfigError, MissingExtra  # noqa: E402
from finetune_nb.llms.client import PolicyLLM  # noqa: E402
from finetune_nb.llms.constrained import ReplyGuides  # noqa: E402
from finetune_nb.testing import ScriptedPolicy, sums  # noqa: E402
from finetune_nb.types import ReplyFormat, SamplingParams  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.proof]  # they are exact, and each takes seconds

HEAD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
FOOT = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
HERMES = (
    HEAD
    + "{% for c in m.tool_calls or [] %}{{ '\n' if not loop.first }}<tool_call>\n"
    + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    + "\n</tool_call>{% endfor %}"
    + FOOT
)
ONE_BY_ONE = (
    HEAD
    + "{% for c in m.tool_calls or [] %}<call={{ c.function.name }}>{% for k, v in c.function.arguments | items %}"
    + "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</call>{% endfor %}"
    + FOOT
)
UNREADABLE = HEAD + "{% for c in m.tool_calls or [] %}calls {{ c.function.name }}{% endfor %}" + FOOT


def response_template(open_pattern, close, content, transform):
    call = {"open_pattern": open_pattern, "close_pattern": close, "repeats": True, "content": content}
    call["transform"] = {"type": "function", "function": transform}
    ends = {"close_pattern": r"<\|end\|>.*", "content": "text"}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {"tool_calls": call, "content": ends},
    }


READS_HERMES = response_template("<tool_call>\n", "\n</tool_call>", "json", "{content}")


class OneByOne(LocalPolicy):
    """Reads what ONE_BY_ONE writes."""

    def parse(self, ids):
        import re

        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        found = re.fullmatch(r"(?s)<call=(\w+)>(.*)</call>", text)
        if found is None:
            return {"role": "assistant", "content": text}
        arguments = dict(re.findall(r"(?s)<(\w+)>(.*?)</\1>", found[2]))
        function = {"name": found[1], "arguments": json.dumps(arguments)}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tool(name, required=(), /, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


DIGIT = {"type": "string", "pattern": "^[0-9]$"}
TOOLS = [tool("add", ["a", "b"], a=DIGIT, b=DIGIT), tool("unit", ["name"], name={"enum": ["m", "km"]})]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "digits": {"type": "array", "items": DIGIT, "maxItems": 3}},
    "required": ["ok", "digits"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "3+4"}]


def policy(template=HERMES, reads=READS_HERMES, kind=LocalPolicy):
    return kind(random_model(positions=1024), byte_tokenizer(template, reads), deterministic=True)


def sampled(policy, formats, temperature=1.0, max_tokens=400, **params):
    """One sample for each format, all in one batch."""
    prompt = policy.render(QUESTION, TOOLS)

    async def all_of_them():
        asked = [SamplingParams(temperature, max_tokens, reply_format=each, **params) for each in formats]
        return await asyncio.gather(*(policy.sample(prompt, one, seed=n) for n, one in enumerate(asked)))

    return prompt, asyncio.run(all_of_them())


def text_of(policy, sample):
    return policy.tokenizer.decode(sample.ids, skip_special_tokens=True)


def model_logprobs(policy, prompt, reply, temperature):
    """Of each token of the reply, and of all tokens in its place, by a plain forward pass."""
    with torch.inference_mode():
        logits = policy.model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, torch.tensor(reply)[:, None])[:, 0].tolist(), logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_a_reply_fits_its_schema_and_its_logprobs_are_the_models_own(temperature):
    p = policy()
    prompt, samples = sampled(p, [ReplyFormat(json.dumps(SCHEMA))] * 6, temperature)
    for sample in samples:
        known, _ = model_logprobs(p, prompt, sample.ids, temperature or 1.0)
        assert sample.logprobs == pytest.approx(known, abs=1e-4)
        assert sum(known) < -10  # the model by itself would not have written it
        assert sample.finish_reason == "stop"
        reply = json.loads(text_of(p, sample))
        assert set(reply) == {"ok", "digits"} and isinstance(reply["ok"], bool) and len(reply["digits"]) <= 3


def test_what_is_drawn_keeps_the_models_proportions_among_the_tokens_that_fit():
    p = policy()
    choice = ReplyFormat(json.dumps({"enum": ["m", "km", "cm"]}))
    prompt, samples = sampled(p, [choice] * 400)
    beginning = p.encode('"')
    texts = [text_of(p, sample) for sample in samples]
    _, logprobs = model_logprobs(p, prompt, [*beginning, *p.encode("m")], 1.0)
    chances = torch.softmax(torch.stack([logprobs[1, p.encode(c)[0]] for c in "mkc"]), 0)
    for text, chance in zip(['"m"', '"km"', '"cm"'], chances.tolist(), strict=True):
        assert texts.count(text) / 400 == pytest.approx(chance, abs=0.1)


def test_rows_without_a_form_are_what_they_are_alone():
    p = policy()
    _, mixed = sampled(p, [None, ReplyFormat(json.dumps(SCHEMA)), None], max_tokens=20)
    _, alone = sampled(p, [None, None, None], max_tokens=20)
    assert [mixed[0].ids, mixed[2].ids] == [alone[0].ids, alone[2].ids]


def test_a_required_call_is_one_of_the_tools_with_arguments_that_fit():
    p = policy()
    _, samples = sampled(p, [ReplyFormat(tools=json.dumps(TOOLS), required=True, parallel=False)] * 8)
    names = set()
    for sample in samples:
        (call,) = p.parse(sample.ids)["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        names.add(call["function"]["name"])
        assert set(arguments) == ({"a", "b"} if call["function"]["name"] == "add" else {"name"})
        assert all(value in [*"0123456789", "m", "km"] for value in arguments.values())
    assert names == {"add", "unit"}


def test_parallel_calls_are_several_in_the_way_the_template_writes_them():
    p = policy()
    asked = ReplyFormat(tools=json.dumps([TOOLS[1]]), required=True)
    _, samples = sampled(p, [asked] * 30, max_tokens=600)
    calls = [p.parse(sample.ids)["tool_calls"] for sample in samples if sample.finish_reason == "stop"]
    assert max(map(len, calls)) > 1
    assert {call["function"]["name"] for each in calls for call in each} == {"unit"}


def test_a_reply_may_be_a_call_or_a_text_that_fits():
    p = policy()
    asked = ReplyFormat(json.dumps(SCHEMA), json.dumps(TOOLS), parallel=False)
    _, samples = sampled(p, [asked] * 24)
    kinds = set()
    for sample in samples:
        reply = p.parse(sample.ids)
        if not reply.get("tool_calls"):
            assert set(json.loads(reply["content"])) == {"ok", "digits"}
        kinds.add(bool(reply.get("tool_calls")))
    assert kinds == {True, False}


def test_arguments_that_a_template_writes_one_by_one_are_held_to_their_schemas():
    p = policy(ONE_BY_ONE, None, OneByOne)
    wanted = tool("move", ["unit"], unit={"type": "string", "enum": ["m", "km"]}, up={"type": "boolean"})
    _, samples = sampled(p, [ReplyFormat(tools=json.dumps([wanted]), required=True)] * 8)
    forms = set()
    for sample in samples:
        (call,) = p.parse(sample.ids)["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["unit"] in ("m", "km") and arguments.get("up", "true").strip() in ("true", "false")
        forms.add(frozenset(arguments))
    assert forms == {frozenset({"unit"}), frozenset({"unit", "up"})}


def fits(policy, wanted, text):
    """Whether each token of the text fits in its place, and the reply may end after it."""
    guide = ReplyGuides(policy, policy.vocabulary, [1]).guide(wanted, policy.render(QUESTION))
    for token in [*policy.encode(text), 1]:
        fitting = np.ones(policy.vocabulary, dtype=bool)
        guide.mark(fitting)
        if not fitting[token]:
            return False
        guide.take(token)
    return True


def test_a_thought_that_the_prompt_opens_is_ended_before_the_form_begins():
    wanted = ReplyFormat(json.dumps({"enum": ["m"]}))
    thinking = policy(HERMES.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"))
    assert fits(thinking, wanted, 'hm, "m"?</think>\n\n"m"')
    assert not fits(thinking, wanted, '"m"')
    assert fits(policy(), wanted, '"m"')
    assert not fits(policy(), wanted, 'hm</think>"m"')


def test_the_likeliest_tokens_are_those_of_a_forward_pass_before_the_form():
    p = policy()
    formats = [ReplyFormat(json.dumps(SCHEMA)), None]
    prompt, samples = sampled(p, formats, max_tokens=12, top_logprobs=3)
    for sample in samples:
        _, logprobs = model_logprobs(p, prompt, sample.ids, 1.0)
        values, ids = logprobs.topk(3, -1)
        assert [list(top) for top in sample.likeliest] == ids.tolist()
        found = torch.tensor([list(top.values()) for top in sample.likeliest])
        assert torch.allclose(found, values, atol=1e-4)
    _, (without,) = sampled(p, [None], max_tokens=12)
    assert without.likeliest is None


def test_a_template_whose_calls_cannot_be_read_is_an_error_that_says_what_to_do():
    p = policy(UNREADABLE, None)
    with pytest.raises(ConfigError, match=r"no call of the tool 'add'.*Use tool_choice \"auto\""):
        sampled(p, [ReplyFormat(tools=json.dumps(TOOLS), required=True)])
    _, (sample,) = sampled(p, [ReplyFormat(json.dumps(SCHEMA))])
    assert json.loads(text_of(p, sample))


def test_a_schema_that_cannot_be_kept_is_an_error_that_names_why():
    with pytest.raises(ConfigError, match="nonsense"):
        sampled(policy(), [ReplyFormat(json.dumps({"type": "nonsense"}))])


def test_without_the_package_the_error_names_the_command(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r'pip install "finetune_nb\[structured\]"'):
        sampled(policy(), [ReplyFormat(json.dumps(SCHEMA))])


async def test_a_policy_that_holds_no_reply_to_a_form_is_not_asked_to():
    llm = PolicyLLM(ScriptedPolicy())
    with pytest.raises(ConfigError, match="reply_format cannot be kept"):
        await llm.chat(QUESTION, reply_format=ReplyFormat(json.dumps(SCHEMA)))


@pytest.mark.slow
async def test_a_run_trains_on_replies_that_were_held_to_a_form(tmp_path, closing):
    """The job compares the recorded log probabilities with those of its own forward pass."""
    pytest.importorskip("openai")
    from finetune_nb.examples.calculator.task import TOOLS as CALCULATOR

    async def solve(question, llm):
        create = llm.openai().chat.completions.create
        messages = [{"role": "user", "content": question}]
        turn = await create(model="x", messages=messages, tools=CALCULATOR, tool_choice="required", temperature=2.0)
        answer = await create(model="x", messages=messages, response_format={"type": "json_object"}, max_tokens=12)
        return turn.choices[0].message.tool_calls[0].function.name + answer.choices[0].message.content[:1]

    rewards = iter(range(100))
    run = closing(ft.Run(solve, lambda item: next(rewards), sums(2), generations=3, output_dir=tmp_path))
    epoch = await run.next_epoch()
    assert epoch.metrics.failures == 0
    assert (epoch.job.status, epoch.train_metrics["logprob_gap"] < 1e-4) == ("completed", True)
    outputs = [output for _, output in run.trajectories()[["example", "output"]].itertuples(index=False)]
    assert outputs == ["calculator{"] * 6
