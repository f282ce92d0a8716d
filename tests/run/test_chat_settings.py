"""What a run says of its model's chat template, and what its log says of it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import byte_tokenizer, random_model

import finetune_nb as ft
from finetune_nb.errors import ConfigError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|tool|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if brief is defined %}brief{% endif %}{% endif %}"
)
ROWS = [{"id": "a", "question": "3+4", "answer": "7"}]
TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def model(tmp_path):
    """A folder with a model whose template ends turns with another token than its tokenizer."""
    random_model().save_pretrained(tmp_path / "model")
    byte_tokenizer(TEMPLATE).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}], tools=TOOLS, max_tokens=2)).content


@pytest.mark.slow
@pytest.mark.proof
async def test_a_run_says_how_its_model_is_asked_and_its_log_what_is_of_no_use(model, tmp_path, closing):
    settings = {"tool_parser": "hermes", "chat_template_kwargs": {"brief": True}}
    run = closing(
        ft.Run(solve, lambda item: 1.0, ROWS, model=model, generations=2, output_dir=tmp_path / "runs", **settings)
    )
    epoch = await run.next_epoch()
    llm = run.config.llms["policy"]
    assert (llm.tool_parser, llm.chat_template_kwargs) == ("hermes", {"brief": True})
    turn = epoch.collection.trajectories[0][0].episode[-1]
    prompt = turn.metadata["prompt_token_ids"]
    assert byte_tokenizer().decode(prompt).endswith("<|assistant|>brief")
    said = " ".join(run.log_lines())
    assert "ends turns with '<|tool|>'" in said  # said while the model was loaded, before the run's folder was open
    assert said.count("leaves tools out") == 1


def test_a_format_of_tool_calls_that_is_not_known_is_refused_with_the_run(model, tmp_path):
    with pytest.raises(ConfigError, match="no tool_parser 'hermess'. Did you mean 'hermes'"):
        ft.Run(solve, lambda item: 1.0, ROWS, model=model, output_dir=tmp_path, tool_parser="hermess")
