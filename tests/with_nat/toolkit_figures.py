"""The Toolkit's ART or DPO example from its README's first step to its last, on the CPU: games before training, and after.

    .venv-nat/bin/python tests/with_nat/toolkit_figures.py CHECKOUT --seed 0 --seed 1 --seed 2
    .venv-nat/bin/python tests/with_nat/toolkit_figures.py CHECKOUT --example dpo --seed 0 --seed 1 --seed 2

The model is the small player, or any Hugging Face directory (--model). `finetune-nb art-server` plays with it, and trains it in
the ART example; in the DPO example TRL does. Only the server is seeded: the examples' opponents draw their moves from Python's
own generator.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import toolkit_examples

NAT = [sys.executable, "-c", "from nat.cli.main import run_cli; run_cli()", "--log-level", "warning"]
"""At its own level, info, the Toolkit writes the config into its log, finds the config within it, and comes to no end."""


@contextmanager
def art_server(model: Path, host: str, folder: Path, *options: str) -> Iterator[Path]:
    """`finetune-nb art-server` on an address of its own; the folder of the models of its steps."""
    models = folder / "models"
    command = [sys.executable, "-m", "finetune_nb", "art-server", "--model", str(model), "--host", host]
    command += ["--port", "7623", "--out", str(models), *options]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=toolkit_examples.environment([]), stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert server.stdout is not None
        try:
            said = server.stdout.readline()
            assert f"http://{host}:7623" in said, (folder / "server.log").read_text()
            yield models
        finally:
            server.terminate()
            server.wait(60)
            server.stdout.close()


def nat(*arguments: str, path: list[str], folder: Path, **more: str) -> str:
    """Runs a command of the Toolkit's; what it said. Raises AssertionError if it failed."""
    done = subprocess.run(
        [*NAT, *arguments],
        cwd=folder,
        env=toolkit_examples.environment(path, **more),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said


def held_out(checkout: Path, folder: Path, host: str, when: str, path: list[str]) -> float:
    """Mean of 72 games: a game that is won counts 1, a draw a half."""
    config = toolkit_examples.art_config(checkout, folder, host, f"config_{when}_train.yml", "eval_data.json")
    nat("eval", "--config_file", str(config), "--reps", "3", path=path, folder=folder)
    (output,) = (folder / f".tmp/nat/examples/rl_openpipe/eval/{when}_train").rglob("percent_games_won_output.json")
    return json.loads(output.read_text())["average_score"]


def train(checkout: Path, model: Path, seed: int, folder: Path, learning_rate: str | None, host: str) -> dict:
    path = toolkit_examples.install(checkout, toolkit_examples.ART, folder)
    options = [
        "--seed",
        str(seed),
        "--max-tokens",
        "40",
        *(["--learning-rate", learning_rate] if learning_rate else []),
    ]
    began = time.monotonic()
    with art_server(model, host, folder, *options) as models:
        before = held_out(checkout, folder, host, "pre", path)
        config = toolkit_examples.art_config(checkout, folder, host)
        nat("finetune", "--config_file", str(config), path=path, folder=folder)
        after = held_out(checkout, folder, host, "post", path)
        steps = len(list(models.iterdir()))
    (metrics,) = (folder / ".tmp/nat/finetuning/tic_tac_toe").rglob("training_metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "seed": seed,
        "held_out_before": before,
        "held_out_after": after,
        "reward": [round(line["avg_reward"], 3) for line in lines],
        "trajectories": [line["num_trajectories"] for line in lines],
        "steps": steps,
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime),
    }


TRAINED_HERE = """\
    _type: finetune_nb_trl_dpo
    model: {model}
    epochs: 5
    batch_size: 8
    learning_rate: {learning_rate}
    device: cpu
    threads: 1
"""
"""The trainer adapter of the DPO example."""


def prefer(checkout: Path, model: Path, seed: int, folder: Path, learning_rate: str | None, host: str) -> dict:
    """The DPO example: its pairs are collected from the model's games, and TRL learns them."""
    path = toolkit_examples.install(checkout, toolkit_examples.DPO, folder)
    options = ["--seed", str(seed), "--max-tokens", "40"]
    llm = f"    _type: openai\n    model_name: small_player\n    base_url: http://{host}:8000/v1\n"
    adapter = TRAINED_HERE.format(model=model, learning_rate=learning_rate or "1.0e-3")
    config = toolkit_examples.dpo_config(checkout, folder, llm, adapter)
    began = time.monotonic()
    with art_server(model, host, folder, *options):
        before = outcomes(checkout, folder, host, path)
        nat("finetune", "--config_file", str(config), path=path, folder=folder)
    trained = folder / ".tmp/nat/finetuning/dpo_tic_tac_toe/model"
    with art_server(trained, host, folder, *options):
        after = outcomes(checkout, folder, host, path)
    return {
        "seed": seed,
        "held_out_before": before,
        "held_out_after": after,
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime),
    }


def outcomes(checkout: Path, folder: Path, host: str, path: list[str]) -> float:
    """Mean outcome of 72 games of the model that is served, by the example's own evaluator."""
    config = toolkit_examples.dpo_games_config(checkout, folder)
    served = {"CUSTOMIZER_LLM_MODEL_NAME": "small_player", "CUSTOMIZER_NIM_URL": f"http://{host}:8000/v1"}
    nat("eval", "--config_file", str(config), "--reps", "3", path=path, folder=folder, **served)
    written = [*(folder / ".tmp/nat/dpo_tic_tac_toe/eval_after_training").rglob("game_outcome_output.json")]
    newest = max(written, key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())["average_score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of NVIDIA/NeMo-Agent-Toolkit")
    parser.add_argument("--example", choices=("art", "dpo"), default="art")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; by default the small player is made")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument(
        "--learning-rate", default="1e-3", help="in place of the config's; '' for the config's (default 1e-3)"
    )
    parser.add_argument("--host", default="127.0.0.90")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = arguments.model
        if model is None:
            import small_player

            sys.path.insert(0, str(toolkit_examples.example(arguments.checkout, toolkit_examples.ART) / "src"))
            model = small_player.make_player(Path(place) / "player")
        for seed in arguments.seed or [0]:
            folder = Path(place) / f"seed{seed}"
            folder.mkdir()
            figures_of = train if arguments.example == "art" else prefer
            figures = figures_of(arguments.checkout, model, seed, folder, arguments.learning_rate, arguments.host)
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
