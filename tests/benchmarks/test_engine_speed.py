"""What the harness itself costs. Absolute figures are printed, in CPU seconds on one core; a test fails on ratios alone."""

import asyncio
import subprocess
import sys
import time

import pytest
from measuring import Measured, by_turns

import finetune_nb as ft
from finetune_nb.components.builder import Builder
from finetune_nb.components.loading import load_config
from finetune_nb.rollouts.evaluation import EvaluationRun
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, sums
from finetune_nb.types import EvaluationRunConfig

HEAVY = ("torch", "matplotlib", "ipywidgets", "pandas", "pyarrow", "numpy", "IPython")


def cpu_of(code: str) -> float:
    """CPU seconds of a fresh interpreter."""
    script = f"{code}\nimport time\nprint(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.proof
@pytest.mark.benchmark(group="import")
def test_importing_costs_less_than_importing_pandas(benchmark):
    names = "import finetune_nb as ft\nft.TrajectoryBuilder, ft.Trainer, ft.FinetuneConfig, ft.EvaluationRunOutput"
    sides = {
        "own": lambda: cpu_of("import finetune_nb"),
        "names": lambda: cpu_of(names),
        "pandas": lambda: cpu_of("import pydantic, numpy, pandas"),
    }
    found = benchmark.pedantic(by_turns, (5,), sides, rounds=1)
    benchmark.extra_info |= {f"{side}_s": found[side] for side in sides} | {"target_s": 0.25}
    print(
        f"\nimport finetune_nb {found['own']:.3f} s CPU, with the seed's names {found['names']:.3f}; "
        f"pydantic + numpy + pandas {found['pandas']:.3f}"
    )
    assert found.ratio("own", "pandas") < 1


def test_importing_loads_nothing_heavy():
    code = f"import sys, finetune_nb; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


@pytest.mark.proof
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

        await asyncio.gather(*map(one, sums(rows)))

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

    async def ours():
        output = await EvaluationRun(EvaluationRunConfig(config_file=config)).run_and_evaluate()
        assert len(output.eval_input.eval_input_items) == rows

    # Neither returns what it made: asyncio.run takes the text of a result, which costs as much as making it.
    found = by_turns(5, own=lambda: asyncio.run(ours()), plain=lambda: asyncio.run(obvious()))
    benchmark.pedantic(lambda: asyncio.run(ours()), rounds=1)
    own, plain = rows / found["own"], rows / found["plain"]
    benchmark.extra_info |= {"items_per_s": own, "gather_items_per_s": plain, "target_items_per_s": 5_000}
    print(f"\n{own:,.0f} items/s CPU with recording and scoring; bare asyncio.gather {plain:,.0f}")
    assert found.ratio("own", "plain") < 25


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
        found = Measured({"late": [], "early": []})
        for _ in range(40):
            found.seconds["late"].append(await cost(old))
            found.seconds["early"].append(await cost(new))
        await asyncio.to_thread(old.close)
        await asyncio.to_thread(new.close)
        return sum(behind) + sum(found.seconds["late"]), found

    total, found = benchmark.pedantic(lambda: asyncio.run(work()), rounds=1)
    early, late = found["early"], found["late"]
    benchmark.extra_info |= {"200_epochs_s": total, "new_run_s": early, "after_160_epochs_s": late, "target_s": 3.0}
    print(
        f"\n200 epochs x 100 groups x 8: {total:.2f} s CPU; an epoch {early * 1e3:.1f} ms first, {late * 1e3:.1f} ms later"
    )
    assert found.ratio("late", "early") < 1.5


MEMORY = """
import collections, gc, resource, sys
import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, sums

async def agent(question, llm):
    reply = await llm.chat([{"role": "user", "content": question}])
    if question.startswith("9"):
        raise ValueError(f"no answer to {question}")
    return reply.content

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6

adapter = FakeAdapter()
adapter.submitted = collections.deque(maxlen=1)  # the fake itself keeps what it is given
options = {"adapter": adapter, "generations": 4, "output_dir": sys.argv[1]}
run = ft.Run(agent, lambda item: item.id.count("1"), sums(50), **options)
run.start(100)
run.wait()
warm = resident()
run.start(300)
run.wait()
assert len(run) == 400
print(resident() - warm)
run.close()
"""


@pytest.mark.benchmark(group="memory")
def test_three_hundred_epochs_in_the_background_keep_little_in_memory(benchmark, tmp_path):
    """Rollouts that call the model, failing ones among them, scored and stored: what they leave in a process of its own."""

    def work():
        command = [sys.executable, "-c", MEMORY, str(tmp_path)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    grown = benchmark.pedantic(work, rounds=1)
    benchmark.extra_info |= {"grown_mb": grown, "target_mb": 10}
    print(f"\n300 epochs of 50 x 4 rollouts: the process grows by {grown:+.1f} MB")
    assert grown < 10
