"""What the harness itself costs. Absolute figures are printed, in CPU seconds on one core; a test fails on ratios alone."""

import asyncio
import statistics
import subprocess
import sys
import time

import pytest

import finetune_nb as ft
from finetune_nb import Builder, load_config
from finetune_nb.evaluation.evaluate import EvaluationRun
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, sums
from finetune_nb.types import EvaluationRunConfig

HEAVY = ("torch", "matplotlib", "ipywidgets", "pandas", "pyarrow", "numpy", "IPython")


def cpu_of(code: str) -> float:
    """CPU seconds of a fresh interpreter, the smallest of five."""
    script = f"{code}\nimport time\nprint(time.process_time())"
    return min(
        float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
        for _ in range(5)
    )


@pytest.mark.benchmark(group="import")
def test_importing_costs_less_than_importing_pandas(benchmark):
    own = benchmark.pedantic(cpu_of, args=("import finetune_nb",), rounds=1)
    names = cpu_of(
        "import finetune_nb as ft\nft.TrajectoryBuilder, ft.Trainer, ft.FinetuneConfig, ft.EvaluationRunOutput"
    )
    obvious = cpu_of("import pydantic, numpy, pandas")
    benchmark.extra_info |= {"import_s": own, "with_the_seeds_names_s": names, "pandas_s": obvious, "target_s": 0.25}
    print(
        f"\nimport finetune_nb {own:.3f} s CPU, with the seed's names {names:.3f}; pydantic + numpy + pandas {obvious:.3f}"
    )
    assert own < obvious


def test_importing_loads_nothing_heavy():
    code = f"import sys, finetune_nb; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


@pytest.mark.benchmark(group="evaluation")
def test_a_do_nothing_workflow_costs_little_more_than_gathering_it(benchmark):
    rows = 5_000

    async def nothing(question):
        return question

    async def obvious():
        gate = asyncio.Semaphore(64)

        async def one(row):
            async with gate:
                return {**row, "output": await nothing(row["question"]), "score": 1.0}

        return await asyncio.gather(*map(one, sums(rows)))

    config = load_config(
        {
            "workflow": {"_type": "python_function"},
            "eval": {"general": {"max_concurrency": 64}, "evaluators": {"reward": {"_type": "python_function"}}},
        }
    )
    config.builder = Builder(config)
    config.builder.add("function", "workflow", nothing)
    config.builder.add("evaluator", "reward", lambda item: 1.0)
    config.builder.add("dataset", "train", sums(rows))

    def ours():
        started = time.process_time()
        output = asyncio.run(EvaluationRun(EvaluationRunConfig(config_file=config)).run_and_evaluate())
        assert len(output.eval_input.eval_input_items) == rows
        return time.process_time() - started

    def theirs():
        started = time.process_time()
        asyncio.run(obvious())
        return time.process_time() - started

    ours()
    own = benchmark.pedantic(ours, rounds=1)
    own = min(own, *(ours() for _ in range(4)))
    plain = min(theirs() for _ in range(5))
    benchmark.extra_info |= {"items_per_s": rows / own, "gather_items_per_s": rows / plain, "target_items_per_s": 5_000}
    print(f"\n{rows / own:,.0f} items/s CPU with recording and scoring; bare asyncio.gather {rows / plain:,.0f}")
    assert own < 25 * plain


@pytest.mark.benchmark(group="epochs")
def test_the_cost_of_an_epoch_does_not_grow_with_the_number_of_epochs_before(benchmark, tmp_path):
    """A run with 160 epochs behind it and a new one take turns, so that whatever else the machine does hits both."""
    rewards = {str(i): [0, 1, 0, 1, 0, 1, 0, 1] for i in range(100)}

    def make_run():
        builder = ScriptedBuilder(lambda epoch: rewards)
        return ft.Run(adapter=FakeAdapter(), builder=builder, curriculum={}, output_dir=tmp_path)

    async def cost(run):
        started = time.process_time()
        await run.next_epoch()
        return time.process_time() - started

    async def work():
        old, new = make_run(), make_run()
        behind = [await cost(old) for _ in range(160)]
        late, early = [], []
        for _ in range(40):
            late.append(await cost(old))
            early.append(await cost(new))
        await asyncio.to_thread(old.close)
        await asyncio.to_thread(new.close)
        return sum(behind) + sum(late), statistics.median(late), statistics.median(early)

    total, late, early = benchmark.pedantic(lambda: asyncio.run(work()), rounds=1)
    benchmark.extra_info |= {"200_epochs_s": total, "new_run_s": early, "after_160_epochs_s": late, "target_s": 3.0}
    print(
        f"\n200 epochs x 100 groups x 8: {total:.2f} s CPU; an epoch {early * 1e3:.1f} ms first, {late * 1e3:.1f} ms later"
    )
    assert late < 1.5 * early
