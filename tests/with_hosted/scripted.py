"""A run without a model, and all that is shown of it. Executed in a hosted notebook's environment, as a script and as a cell;
prints what it saw as JSON."""

import json
import sys
import tempfile

import ipykernel
import ipywidgets

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums


async def guess(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def right(output, answer):
    return float(answer in output)


run = ft.Run(
    guess,
    right,
    sums(6),
    adapter=FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "12" if seed % 2 else "7")),
    generations=4,
    output_dir=tempfile.mkdtemp(),
)
run.start(epochs=2)
run.wait()
panel = run.panel()
plots = ("rewards", "reward_distribution", "curriculum", "groups", "advantages", "lengths", "training", "scores")
page = run.export(tempfile.mkdtemp() + "/report.html")
print(
    json.dumps(
        {
            "epochs": len(run),
            "rewards": len(run.trajectories()),
            "table": "<table" in run.epochs()._repr_html_(),
            "run": len(run._repr_html_()),
            "rollout": len(run.show()._repr_html_()),
            "plots": [getattr(run, f"plot_{name}")().png()[:4].hex() for name in plots],
            "report": page.stat().st_size,
            "panel": type(panel).__name__,
            "opened": len(ft.Run.open(run.folder).trajectories()),
            "versions": [sys.version.split()[0], ipykernel.__version__, ipywidgets.__version__],
            "torch": "torch" in sys.modules,
        }
    )
)
