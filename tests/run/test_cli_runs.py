"""The commands that make a run and read it: run, show, report, compare."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import finetune_nb as ft
from finetune_nb.cli.main import main
from finetune_nb.cli.train import import_code
from finetune_nb.examples import calculator

SMALL = ["--set", "trajectory_builders.my_builder.examples_per_epoch=3", "--set", "eval.general.max_concurrency=8",
         "--set", "finetuning.num_epochs=2", "--set", "finetuning.run_configuration=null"]  # fmt: skip
TASK = """
import finetune_nb as ft
from words import WORD


class EchoConfig(ft.FunctionBaseConfig, name="echo_agent"):
    llm: str


@ft.register_function(config_type=EchoConfig)
async def echo(config: EchoConfig, builder: ft.Builder):
    async def solve(question, llm):
        return WORD + (await llm.chat([{"role": "user", "content": question}])).content

    yield solve
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """The example's config and data in an empty folder, which is the current one."""
    source = Path(calculator.CONFIG).parent
    shutil.copyfile(source / "config.yml", tmp_path / "config.yml")
    shutil.copytree(source / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return Path("config.yml")


def train(config, *more):
    return main(["run", str(config), "--name", "a", *SMALL, *more])


@pytest.mark.slow
@pytest.mark.proof
def test_a_config_is_trained_a_line_an_epoch_and_can_be_read_and_continued(config, capsys):
    assert train(config) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == "a: 2 epochs, recorded in runs/a"
    assert [line.split("  ")[0] for line in lines[1:]] == ["epoch 0", "epoch 1"]
    assert re.match(r"a: 2 of 2 epochs, mean reward [\d.]+ in the first, [\d.]+ in the last\n", said.out)
    assert "finetune-nb show runs/a" in said.out

    assert train(config, "--resume") == 0
    assert capsys.readouterr().out == "a: all 2 epochs are done. --epochs N runs more.\n"
    assert train(config, "--resume", "--epochs", "1", "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("a: 3 of 3 epochs, ")

    assert main(["show", "runs/a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run a  ready  3 epochs  runs/a" and [line[:7] for line in lines[1:]] == [
        "epoch 0",
        "epoch 1",
        "epoch 2",
    ]

    rollout = ft.Run.open("runs/a").trajectories(epoch=0).iloc[0]
    assert main(["show", "runs/a", rollout.trajectory]) == 0
    shown = capsys.readouterr().out
    assert (
        main(["show", "runs/a", "--epoch", "0", "--example", rollout.example, "--generation", str(rollout.generation)])
        == 0
    )
    assert shown == capsys.readouterr().out
    assert shown.startswith(f"epoch 0 · example {rollout.example} · generation {rollout.generation} · 8 rollouts")
    assert "── 0 user\n" in shown and re.search(r"── 1 assistant · \d+ tokens\n   \S", shown)

    assert main(["report", "runs/a"]) == 0
    assert capsys.readouterr().out == "a.html\n" and "<h1" in Path("a.html").read_text()
    assert main(["report", "runs/a", "--no-browser", "--out", "small.html"]) == 0
    assert Path("small.html").stat().st_size < Path("a.html").stat().st_size

    run = ft.Run.open("runs/a")
    run.close()
    shutil.copytree("runs/a", "runs/b")
    capsys.readouterr()
    assert main(["compare", "runs/a", "runs/b"]) == 0
    assert re.match(
        r"b against a: 0 \(95% interval 0 to 0; \d+ pairs of 9 examples\)", capsys.readouterr().out.replace("+", "")
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "none.yml"], "there is no file none.yml. Name the YAML file of the run."),
        (["run", "config.yml", "--resume"], "--resume continues the run of that name: give it one, --name NAME."),
        (["run", "config.yml", "--set", "finetuning.num_epoch=3"], "Did you mean 'num_epochs'?"),
        (["run", "config.yml", "--import", "nowhere.py"], "there is no file nowhere.py. --import takes a .py"),
        (["run", "config.yml", "--import", "no.such"], "there is no module 'no.such'. --import takes a .py"),
        (["run", "config.yml", "--import", "json.py"], "json.py would hide the module 'json'"),
        (["show", "nowhere"], "there is no run in nowhere"),
        (["report", "nowhere"], "there is no run in nowhere"),
        (["compare", "nowhere"], "there is no run in nowhere"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(config, capsys, arguments, expected):
    Path("json.py").touch()
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("finetune-nb: ") and expected in said and "Traceback" not in said


def test_a_setting_needs_a_value(capsys):
    with pytest.raises(SystemExit):
        main(["run", "config.yml", "--set", "seed"])
    assert "expected PATH=VALUE, found 'seed'" in capsys.readouterr().err


def test_an_error_inside_an_imported_module_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("needs_another.py").write_text("import a_package_that_is_nowhere\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_nowhere"):
        import_code("needs_another")


@pytest.mark.slow
@pytest.mark.proof
def test_a_paused_run_ends_and_says_why(config, capsys, monkeypatch):
    def pauses(run_epochs):
        def tripped(tripwires, epochs):
            return "the reward is odd"

        return tripped

    monkeypatch.setattr("finetune_nb.run.run.tripped", pauses(None))
    assert train(config) == 1
    said = capsys.readouterr()
    assert "finetune-nb: paused after epoch 0: the reward is odd" in said.err
    assert said.out.startswith("a: 1 of 2 epochs, ")


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(ft.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_nb", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_code_beside_the_config_is_imported_and_an_interrupt_ends_after_the_epoch(config, tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "words.py").write_text("WORD = 'said: '\n")
    echo = ["--import", "task.py", "--set", "workflow._type=echo_agent"]
    running = command("run", "config.yml", "--name", "a", *SMALL, *echo, "--set", "finetuning.num_epochs=1000")
    try:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("epoch 1 "):
                break
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert time.monotonic() - began < 60 and re.match(r"a: \d+ of 1,?000 epochs", out)
    outputs = ft.Run.open("runs/a").trajectories()
    assert outputs.output.str.startswith("said: ").all() and outputs.epoch.max() >= 1


def block(kind: str, word: str) -> str:
    """The block of the manual's page on terminals and scripts that has the word in it."""
    page = (Path(__file__).parents[2] / "notebooks/reference/terminal.md").read_text(encoding="utf-8")
    (found,) = [code for code in re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) if word in code]
    return found


@pytest.mark.slow
def test_the_script_of_the_manual_and_its_yaml_print_a_line_an_epoch_and_are_the_same_run(tmp_path):
    (tmp_path / "script.py").write_text(block("python", "argparse"))
    (tmp_path / "task.py").write_text(block("python", "register_function"))
    (tmp_path / "config.yml").write_text(block("yaml", "workflow"))
    rows = [{"question": f"{a}+{a + 1}", "answer": f"={2 * a + 1}"} for a in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    environment = {**os.environ, "PYTHONPATH": str(Path(ft.__file__).parents[1])}

    def lines_of(*arguments: str) -> list[str]:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [line.split("  ")[0] for line in done.stderr.splitlines() if line.startswith("epoch ")]

    assert lines_of("script.py", "--epochs", "1") == ["epoch 0"]
    assert lines_of("script.py", "--epochs", "1") == ["epoch 1"]
    assert "<h1" in (tmp_path / "sums.html").read_text()

    config = ["config.yml", "--import", "task.py", "--name", "again", "--set", "finetuning.num_epochs=2"]
    assert lines_of("-m", "finetune_nb", "run", *config) == ["epoch 0", "epoch 1"]
    columns = ["epoch", "example", "generation", "output", "reward"]
    by_script, by_yaml = (ft.Run.open(tmp_path / "runs" / name).trajectories()[columns] for name in ("sums", "again"))
    assert len(by_script) == 2 * 4 * 4
    assert by_script.equals(by_yaml)
