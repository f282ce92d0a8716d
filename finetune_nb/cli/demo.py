"""The demo: runs the first notebook on a copy of the example's config and data, and tells in the terminal how it goes.

The notebook's kernel does the training; what is printed here is read from the run's own log files while they grow. It
leaves the executed notebook, an HTML page of it, and the run's folder.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import FinetuneError, MissingExtra
from ..examples import calculator
from ..store.json import finite
from ..store.runs import free_id
from ..types import as_float
from .output import complain, say, without_colours

__all__ = [
    "notebooks_folder",
    "run_demo",
]

_NOTEBOOK = "01_first_run.ipynb"


def run_demo(seed: int, epochs: int, out: Path, figures: Path | None = None) -> int:
    """Trains for `epochs` epochs in the folder `out`. `figures`: a JSON file to write. Returns the exit code. Raises
    MissingExtra where notebooks cannot be executed."""
    if any(importlib.util.find_spec(package) is None for package in ("nbclient", "nbconvert")):
        raise MissingExtra("the demo, which executes a notebook,", "lab")
    started = time.monotonic()
    nbformat = _nbformat()
    out.mkdir(parents=True, exist_ok=True)
    source = Path(calculator.CONFIG).parent
    shutil.copyfile(source / "config.yml", out / "config.yml")
    shutil.copytree(source / "data", out / "data", dirs_exist_ok=True)
    name = free_id(f"demo-seed{seed}", out / "runs")
    folder = out / "runs" / name
    notebook = nbformat.read(notebooks_folder() / _NOTEBOOK, as_version=4)
    set_parameters(notebook, CONFIG="config.yml", SEED=seed, EPOCHS=epochs, NAME=name)

    say(f"A transformer of 0.2 M weights learns to use its calculator: {epochs} epochs, seed {seed}.")
    say(f"Config and data are in {out}; starting a notebook kernel ...")
    error = asyncio.run(execute(notebook, out, folder))
    nbformat.write(notebook, out / "demo.ipynb")
    if error:
        complain(f"finetune-nb demo: the notebook failed; {out / 'demo.ipynb'} shows where.\n{error}")
        return 1
    (out / "demo.html").write_text(_page(notebook), encoding="utf-8")
    summary = _summary(folder, seed)
    summary["seconds"] = time.monotonic() - started
    before, after = summary["held_out_before"], summary["held_out_after"]
    say(f"Held-out questions, never trained on: {before:.3f} before, {after:.3f} after ({summary['seconds']:.0f} s).")
    say(f"Look at {out / 'demo.html'}, or open {out / 'demo.ipynb'} in JupyterLab.")
    if figures is not None:
        figures.parent.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(finite(summary), indent=2), encoding="utf-8")
    return 0


def _nbformat() -> Any:
    """The package. It loads a grammar of internationalized addresses (RFC 3987) with it, which no notebook's schema asks for,
    and which takes half of the demo's seconds before its kernel starts."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # jsonschema does without
    import nbformat

    return nbformat


def notebooks_folder() -> Path:
    """The tutorial notebooks: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "notebooks"
    return inside if inside.is_dir() else package.parent / "notebooks"


def set_parameters(notebook: Any, **values: Any) -> None:
    """Sets values in the cell that is tagged "parameters". What it sets beside them stays."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            others = [line for line in cell.source.splitlines() if line.partition(" = ")[0] not in values]
            cell.source = "\n".join([*others, *(f"{name} = {value!r}" for name, value in values.items())])
            return
    raise FinetuneError(f"{_NOTEBOOK} has no cell tagged 'parameters'.")


async def execute(notebook: Any, out: Path, folder: Path) -> str | None:
    """Runs the notebook in a kernel of this Python, telling of each epoch. Returns the error, if any."""
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    class Kernel(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            return [sys.executable, *super().format_kernel_cmd(extra_arguments)[1:]]

    client = NotebookClient(
        notebook,
        kernel_manager_class=Kernel,
        extra_arguments=["--IPKernelApp.log_level=40"],
        timeout=None,
        resources={"metadata": {"path": str(out)}},
    )
    teller = asyncio.create_task(_tell(folder))
    try:
        await client.async_execute()
    except (CellExecutionError, DeadKernelError) as error:
        return without_colours(str(error))
    finally:
        await asyncio.sleep(0.3)  # the teller's last look
        teller.cancel()
    return None


async def _tell(folder: Path) -> None:
    """Prints a line for every new record of the run's logs."""
    told = {"training_metrics.jsonl": 0, "validation_metrics.jsonl": 0}
    while True:
        for name in told:
            lines = _read(folder / name)
            for line in lines[told[name] :]:
                say(_validation_line(line) if name.startswith("validation") else _epoch_line(line))
            told[name] = len(lines)
        await asyncio.sleep(0.1)


def _epoch_line(line: dict[str, Any]) -> str:
    reward = as_float(line["avg_reward"])
    bar = "█" * round(20 * reward) if math.isfinite(reward) else ""
    scores = "  ".join(f"{name} {as_float(value):.2f}" for name, value in line["scores"].items() if name != "correct")
    teach = f"{line['groups_with_spread']}/{line['num_groups']} groups teach"
    return f"epoch {line['epoch']:>2}  reward {reward:.3f} {bar:<20}  {scores}  {teach}"


def _validation_line(line: dict[str, Any]) -> str:
    when = "before training" if line["policy_version"] == 0 else f"after update {line['policy_version']}"
    return f"held out  reward {as_float(line['avg_reward']):.3f} on {line['num_examples']} questions, {when}"


def _summary(folder: Path, seed: int) -> dict[str, Any]:
    validations = [as_float(line["avg_reward"]) for line in _read(folder / "validation_metrics.jsonl")]
    epochs = [
        {
            "epoch": line["epoch"],
            "mean_reward": as_float(line["avg_reward"]),
            "scores": line["scores"],
            "groups_with_spread": line["groups_with_spread"],
            "groups": line["num_groups"],
            "training": line["training"],
        }
        for line in _read(folder / "training_metrics.jsonl")
    ]
    before, after = (validations[0], validations[-1]) if validations else (math.nan, math.nan)
    return {"seed": seed, "held_out_before": before, "held_out_after": after, "epochs": epochs}


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log that may be growing."""
    if not path.exists():
        return []
    # Bytes, because the end of a growing file may lie inside a character.
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]


def _page(notebook: Any) -> str:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    return body
