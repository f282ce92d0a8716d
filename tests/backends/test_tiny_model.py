"""The embedded model directory and its calculator task: what they hold, and the text format they agree on."""

import json
import random
from pathlib import Path

import pytest

from finetune_nb.examples.calculator import make_data, task

MODEL = Path(__file__).parents[2] / "finetune_nb" / "backends" / "local" / "tiny" / "model"


def read(name: str) -> list[dict]:
    return json.loads((make_data.DATA / f"{name}.json").read_text(encoding="utf-8"))


def test_first_operation_is_the_beginning_of_a_sum_and_none_of_anything_else():
    assert task.first_operation("12+7-3") == "12+7"
    assert task.first_operation("-5-3") == "-5-3"
    for nothing_to_do in ("16", "-16", "", "12+", "+3", "12*7", "1+2;3", "12+7-", "1 + 2", "\u0661+\u0662", "12+7\n"):
        assert task.first_operation(nothing_to_do) is None


def test_calculate_does_exactly_the_first_operation():
    assert task.calculate("12+7", "12+7-3") == "19-3"
    assert task.calculate("3-20", "3-20-4") == "-17-4"
    assert task.calculate("-17-4", "-17-4") == "-21"


@pytest.mark.parametrize(
    "call", ["", "7-3", "12+7-3", "12+8", " 12+7", "12+7 ", "7+12", "12", "__import__('os')", None]
)
def test_calculate_refuses_malformed_calls(call):
    assert task.calculate(call, "12+7-3") is None


def test_calculate_refuses_every_call_when_nothing_remains():
    assert task.calculate("16", "16") is None


def test_questions_have_as_many_operands_as_their_level():
    rng = random.Random(3)
    for level in task.LEVELS:
        question = task.make_question(rng, level)
        operands = [int(operand) for operand in question.replace("-", "+").split("+")]
        assert len(operands) == level
        assert all(1 <= operand <= task.LARGEST for operand in operands)


def test_data_files_are_what_the_script_writes_and_share_no_question():
    rows = make_data.splits()
    train, held_out = read("train"), read("held_out")
    assert (train, held_out) == (rows["train"], rows["held_out"])
    for split, per_level in ((train, 160), (held_out, 100), (rows["dev"], 100)):
        for level in task.LEVELS:
            assert sum(row["level"] == level for row in split) >= per_level
    everything = train + held_out + rows["dev"]
    assert len(held_out) == 400
    assert len({row["question"] for row in everything}) == len(everything)
    assert len({row["id"] for row in everything}) == len(everything)


def test_answers_in_the_data_are_right():
    for row in read("train") + read("held_out"):
        signed = row["question"].replace("-", "+-").split("+")
        assert row["answer"] == str(sum(int(number) for number in signed)), row


def call(arguments) -> dict:
    function = {"name": "calculator", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


CONVERSATION = [
    {"role": "system", "content": "Be right."},
    {"role": "user", "content": "12+7-3"},
    call({"expression": "12+7"}),
    {"role": "tool", "tool_call_id": "c", "content": "19-3"},
    call('{"expression": "19-3"}'),
    {"role": "tool", "tool_call_id": "c", "content": "16"},
    {"role": "assistant", "content": "=16"},
]
RENDERED = (
    "<|tools|>calculator<|end|><|system|>Be right.<|end|><|user|>12+7-3<|end|><|assistant|>>12+7<|end|>"
    "<|tool|>19-3<|end|><|assistant|>>19-3<|end|><|tool|>16<|end|><|assistant|>=16<|end|>"
)


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(MODEL)


def test_model_directory_is_small_and_holds_no_code():
    names = {path.name for path in MODEL.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 2_000_000
    assert not [name for name in names if Path(name).suffix not in {".json", ".safetensors", ".jinja"}]


def test_template_renders_every_role_and_the_names_of_the_tools(tokenizer):
    assert tokenizer.apply_chat_template(CONVERSATION, tools=task.TOOLS, tokenize=False) == RENDERED
    asked = tokenizer.apply_chat_template(
        CONVERSATION[:2], tools=task.TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|tools|>calculator<|end|><|system|>Be right.<|end|><|user|>12+7-3<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False) == "<|user|>12+7-3<|end|>"


def test_an_assistant_message_with_content_and_a_call_renders_its_content(tokenizer):
    both = {**call({"expression": "12+7"}), "content": "so be it"}
    assert tokenizer.apply_chat_template([both], tokenize=False) == "<|assistant|>so be it<|end|>"
    for empty in ("", None):
        silent = {"role": "assistant", "content": empty}
        assert tokenizer.apply_chat_template([silent], tokenize=False) == "<|assistant|><|end|>"


def test_template_only_appends(tokenizer):
    def ids(messages, **options):
        return tokenizer.apply_chat_template(messages, tools=task.TOOLS, return_dict=False, **options)

    everything = ids(CONVERSATION)
    for length in range(1, len(CONVERSATION) + 1):
        beginning = ids(CONVERSATION[:length])
        assert everything[: len(beginning)] == beginning
        if CONVERSATION[length - 1]["role"] == "assistant":
            prompt = ids(CONVERSATION[: length - 1], add_generation_prompt=True)
            assert everything[: len(prompt)] == prompt
    assert tokenizer.decode(everything) == RENDERED


@pytest.mark.parametrize("prefix", ["", "<|user|>3+12+7<|end|><|assistant|>"])
@pytest.mark.parametrize("ending", ["", "<|end|>", "<|end|><|pad|><|pad|>"])
def test_replies_parse_to_a_tool_call_or_to_content(tokenizer, prefix, ending):
    function = {"name": "calculator", "arguments": {"expression": "12+7"}}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    for text, message in ((">12+7", called), ("=16", {"role": "assistant", "content": "=16"})):
        reply = text + ending
        assert tokenizer.parse_response(reply, prefix=prefix) == message
        assert tokenizer.parse_response(tokenizer(reply)["input_ids"], prefix=prefix, tools=task.TOOLS) == message
        assert tokenizer.apply_chat_template([message], tokenize=False) == f"<|assistant|>{text}<|end|>"


def test_model_loads_and_mostly_copies_the_first_operation_when_it_calls_the_tool(model, tokenizer):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    assert len(tokenizer) == model.config.vocab_size
    rows = read("held_out")[:100]
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": row["question"]}] for row in rows],
        tools=task.TOOLS,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    replies = model.float().generate(**prompts, max_new_tokens=10)[:, prompts["input_ids"].shape[1] :]
    right = []
    for row, reply in zip(rows, replies, strict=True):
        for called in tokenizer.parse_response(reply, prefix="").get("tool_calls", []):
            expression = called["function"]["arguments"]["expression"]
            right.append(expression == task.first_operation(row["question"]))
    assert 20 <= len(right) <= 80, "the warm start both calls the tool and guesses"
    assert sum(right) / len(right) > 0.9
