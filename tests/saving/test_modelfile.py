"""Ollama's Modelfile: read as Ollama reads it, and its template carried out as Go would, beside the chat template itself."""

import re

import pytest

pytest.importorskip("transformers")

from byte_tokenizer import byte_tokenizer
from chat_families import ENDS, template_of, tokenizer_of

from finetune_nb.saving.modelfile import TEMPLATE_NOTE, modelfile, turns_of
from finetune_nb.types import SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n{% endif %}" + CHATML
BEGINNING = "{{ bos_token }}" + CHATML
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "What is 3+4?"},
    {"role": "assistant", "content": "It is {7}.\n\n```\n7\n```"},
    {"role": "user", "content": "Sure? \"'"},
]
SYSTEM = {"role": "system", "content": "Be short."}


INSTRUCTION = re.compile(r'#[^\n]*\n|\n|([A-Z]+) (?:(\w+) )?(?:"""(.*?)"""|"([^"\n]*)"|([^"\n]+))\n', re.DOTALL)


def read(text):
    """Instructions of a Modelfile, by Ollama's documentation: NAME value, NAME \"\"\"lines\"\"\", and # comments."""
    found, position = [], 0
    while position < len(text):
        match = INSTRUCTION.match(text, position)
        assert match, text[position:]
        position = match.end()
        if match[1]:
            found.append((match[1], match[2], next(value for value in match.groups()[2:] if value is not None)))
    return found


def carried_out(template, messages):
    """What Go makes of a template of `range .Messages`, `if eq .Role`, `else if`, `end` and `.Content`."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    texts, actions = parts[::2], parts[1::2]
    start = actions.index("range .Messages")
    text = "".join(texts[: start + 1])
    for message in messages:
        depth, taken, done = 0, True, False
        for action, after in zip(actions[start + 1 :], texts[start + 1 :][1:], strict=True):
            if match := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', action):
                depth, taken = 1, not done and match[1] == message["role"]
                done = done or taken
            elif action == "end" and depth == 0:
                break
            elif action == "end":
                depth, taken = 0, True
            else:
                assert action == ".Content", action
                text += message["content"] if taken else ""
            text += after if taken else ""
    return text + texts[-1]


def prompt(lines, messages):
    """A request's prompt: SYSTEM stands in for a system message that is missing."""
    values = {name: value for name, _, value in lines}
    if "SYSTEM" in values and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": values["SYSTEM"]}, *messages]
    return carried_out(values["TEMPLATE"], messages)


def lines_of(tokenizer, sampling=None, ends=()):
    text, notes = modelfile("model-q8_0.gguf", tokenizer, ends, sampling)
    return read(text), notes


@pytest.mark.parametrize(
    "template", [CHATML, OWN_SYSTEM, BEGINNING, WITHOUT_SYSTEM], ids=["chatml", "own_system", "begin", "inst"]
)
def test_template_makes_the_same_prompts_as_the_chat_template(template):
    tokenizer = byte_tokenizer(template)
    tokenizer.bos_token = "<|pad|>"
    lines, notes = lines_of(tokenizer)
    assert notes == [] and lines[0] == ("FROM", None, "./model-q8_0.gguf")
    talks = [TALK[:1], TALK]
    if template != WITHOUT_SYSTEM:
        talks += [[SYSTEM, *talk] for talk in talks]
    for talk in talks:
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert prompt(lines, talk) == expected


def test_token_that_llama_cpp_puts_in_front_is_not_there_twice():
    from tokenizers import processors

    tokenizer = byte_tokenizer(BEGINNING)
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    lines, _ = lines_of(tokenizer)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|pad|>" + prompt(lines, TALK)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
        CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.index }}"),
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML,
        CHATML.replace("<|im_end|>", '"""'),
        CHATML.replace("<|im_end|>", "{{ '{{' }}"),
        "{{ raise_exception('no') }}",
        "no turn at all",
    ],
    ids=["thoughts", "counts", "tools", "quotes", "braces", "refuses", "constant"],
)
def test_template_that_does_more_is_left_to_ollama_and_told(template):
    lines, notes = lines_of(byte_tokenizer(template))
    assert notes == [TEMPLATE_NOTE] and {name for name, *_ in lines} == {"FROM"}


@pytest.mark.parametrize("name", ["gemma", "cohere", "llama3", "qwen2_5_vl"])
def test_template_of_a_known_model_is_taken_over_exactly(name):
    tokenizer = tokenizer_of(template_of(name), ENDS[name], "<|begin|>")
    lines, _ = lines_of(tokenizer)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert prompt(lines, TALK) in (rendered, rendered.removeprefix("<|begin|>"))


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "gptoss"])
def test_template_of_a_known_model_with_thoughts_or_tools_is_left_out(name):
    assert turns_of(tokenizer_of(template_of(name), ENDS[name])) is None


def test_sampling_and_ends_are_parameters():
    sampling = SamplingParams(0.7, stop=("END", "</a>"))
    lines, notes = lines_of(byte_tokenizer(CHATML), sampling, ["<|im_end|>", "END"])
    assert [value for name, key, value in lines if key == "stop"] == ["<|im_end|>", "END", "</a>"]
    assert ("PARAMETER", "temperature", "0.7") in lines and ("PARAMETER", "repeat_penalty", "1") in lines
    assert notes == []


def test_stop_text_that_a_modelfile_cannot_hold_is_told():
    lines, notes = lines_of(byte_tokenizer(CHATML), SamplingParams(stop=("\n", 'say "x"')))
    assert not any(key == "stop" for _, key, _ in lines) and len(notes) == 2 and "'\\n'" in notes[0]
