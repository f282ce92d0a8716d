"""The Toolkit's own page on custom evaluators: its samples as they stand there, `finetune_nb` in place of `nat`."""

import importlib
import re
import sys
import typing

import pytest
import typing_extensions

import finetune_nb as ft
from finetune_nb.rewards.scoring import evaluate_items
from finetune_nb.testing import FakeAdapter, sums
from finetune_nb.types import EvalInputItem

pytestmark = pytest.mark.slow

PAGE = "extend/custom-components/custom-evaluator.md"


def code_of_page(checkout, page):
    """The Python samples of a page, in order. page: its path below docs/source."""
    text = (checkout / "docs" / "source" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def samples(checkout, tmp_path, monkeypatch):
    """A package with the page's modules, registered as the page says. Only `nat` is `finetune_nb` in their imports."""
    package = tmp_path / "page_of_evaluators"
    package.mkdir()
    files = {
        "evaluator_register": "register_similarity_evaluator(",
        "similarity_evaluator": "class SimilarityEvaluator(",
        "atif_only_evaluator_register": "register_atif_cosine_similarity_evaluator(",
    }
    blocks = code_of_page(checkout, PAGE)
    (package / "__init__.py").write_text("")
    for name, said in files.items():
        (code,) = [block for block in blocks if said in block]
        ours = re.sub(r"^((?:from|import) )nat\b", r"\1finetune_nb", code, flags=re.MULTILINE)
        assert "finetune_nb" in ours
        (package / f"{name}.py").write_text(ours)
    # Python 3.11 has no typing.override, which the page imports.
    monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("evaluator_register", "atif_only_evaluator_register"):
        importlib.import_module(f"{package.name}.{name}")
    yield
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def rows():
    about = {"input_obj": "q", "full_dataset_entry": {}}
    outputs = ["one two three", "one two", "nothing like it", None]
    return [
        EvalInputItem(id=n, output_obj=o, expected_output_obj="one two three", **about) for n, o in enumerate(outputs)
    ]


async def test_the_similarity_evaluator_scores(samples):
    config = ft.load_config({"eval": {"evaluators": {"s": {"_type": "similarity", "similarity_type": "cosine"}}}})
    async with ft.Builder(config) as builder:
        evaluator = await builder.get_evaluator("s")
        found = await evaluate_items(evaluator, rows())
    scores = [each.score for each in found.eval_output_items]
    assert scores[0] == pytest.approx(1.0)
    assert 0 < scores[1] < 1
    assert scores[2:] == [0.0, None]
    assert found.eval_output_items[3].error
    assert found.eval_output_items[0].reasoning["similarity_type"] == "cosine"


async def test_the_atif_evaluator_scores_the_rollouts_of_a_run(samples, closing, tmp_path):
    config = ft.load_config({"eval": {"evaluators": {"a": {"_type": "atif_cosine_similarity"}}}})

    async def workflow(question, llm):
        await llm.chat([{"role": "user", "content": question}])
        return str(eval(question))

    async with ft.Builder(config) as builder:
        evaluator = await builder.get_evaluator("a")
    run = closing(
        ft.Run(workflow, evaluator, dataset=sums(2), generations=2, adapter=FakeAdapter(), output_dir=tmp_path)
    )
    epoch = await run.next_epoch()
    (first, *_), _ = epoch.collection.trajectories
    assert first.reward == 1.0
    assert first.metadata["reasoning"] == {"comparison": "cosine-similarity", "trajectory_tool_call_count": 0}
