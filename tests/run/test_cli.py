"""The command line: what it says, what it copies and never overwrites, and how it reads logs that are still growing."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from factories import make_epoch, make_trajectory
from nbformat.sign import NotebookNotary
from records import epoch_of, stored

import finetune_nb as ft
from finetune_nb.cli import demo
from finetune_nb.cli.main import main


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    """A folder of notebooks in place of ours."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("01_first_run.ipynb", "02_read_trajectories.ipynb"):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(name)])
        nbformat.write(notebook, folder / name)
    (folder / "README.md").write_text("not a notebook")
    monkeypatch.setattr(demo, "notebooks_folder", lambda: folder)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    return folder


# ── finetune-nb ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"finetune_nb {ft.__version__}\n"


def test_the_module_can_be_run():
    command = [sys.executable, "-m", "finetune_nb", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("finetune_nb ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: command"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--epochs", "0"], "--epochs: expected a whole number of at least 1, found '0'"),
        (["demo", "--epochs", "many"], "--epochs: expected a whole number of at least 1, found 'many'"),
        (["demo", "--seed", "one"], "--seed: invalid int value: 'one'"),
        (["demo", "--sed", "1"], "unrecognized arguments: --sed"),
        (["lab", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_bad_arguments_are_named(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_and_no_traceback(monkeypatch, capsys):
    def fail(*args):
        raise ft.ConfigError("the config is odd. Repair it.")

    monkeypatch.setattr(demo, "run_demo", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "finetune-nb: the config is odd. Repair it.\n"


def test_an_interrupt_ends_with_the_usual_code(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "finetune-nb: interrupted\n"


def test_the_demo_gets_its_arguments(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(demo, "run_demo", lambda *args: given.append(args) or 0)
    assert main(["demo", "--seed", "3", "--epochs", "2", "--out", str(tmp_path), "--json", "f.json"]) == 0
    assert main(["demo"]) == 0
    assert given == [(3, 2, tmp_path, Path("f.json")), (0, 15, Path("finetune-nb-demo"), None)]


def test_the_demo_reads_its_notebook_without_a_grammar_that_takes_seconds_to_load():
    code = """if True:
        import sys
        from finetune_nb.cli import demo
        nbformat = demo._nbformat()
        nbformat.validate(nbformat.read(demo.notebooks_folder() / "01_first_run.ipynb", as_version=4))
        sys.exit("lark" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ── lab ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lab_copies_the_notebooks(notebooks, tmp_path, capsys):
    target = tmp_path / "new" / "folder"
    assert main(["lab", "--no-open", str(target)]) == 0
    assert sorted(p.name for p in target.iterdir()) == ["01_first_run.ipynb", "02_read_trajectories.ipynb"]
    assert (target / "01_first_run.ipynb").read_bytes() == (notebooks / "01_first_run.ipynb").read_bytes()
    assert capsys.readouterr().out.count("copied ") == 2
    copy, notary = nbformat.read(target / "01_first_run.ipynb", as_version=4), NotebookNotary()
    assert notary.check_signature(copy)  # else JupyterLab shows its outputs without their colours and pictures
    copy.cells[0].outputs = [nbformat.v4.new_output("display_data", data={"text/html": "<script>"})]
    assert not notary.check_signature(copy)


def test_lab_copies_the_pictures_and_the_reference_that_notebooks_show_and_link_to(notebooks, tmp_path):
    for name, content in (("reference/scale.md", b"# Scale"), ("images/panel.png", b"\x89PNG")):
        (notebooks / name).parent.mkdir()
        (notebooks / name).write_bytes(content)
    assert main(["lab", "--no-open", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here" / "reference" / "scale.md").read_text() == "# Scale"
    assert (tmp_path / "here" / "images" / "panel.png").read_bytes() == b"\x89PNG"


def test_lab_never_overwrites_and_says_so(notebooks, tmp_path, capsys):
    target = tmp_path / "mine"
    target.mkdir()
    mine = target / "01_first_run.ipynb"
    mine.write_text("my own work")
    assert main(["lab", "--no-open", str(target)]) == 0
    assert mine.read_text() == "my own work"
    assert (target / "02_read_trajectories.ipynb").exists()
    assert f"{mine} is there already and stays as it is" in capsys.readouterr().out


def test_lab_leaves_even_a_dangling_link_as_it_is(notebooks, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    elsewhere = tmp_path / "elsewhere.ipynb"
    (target / "01_first_run.ipynb").symlink_to(elsewhere)
    assert main(["lab", "--no-open", str(target)]) == 0
    assert not elsewhere.exists()


def test_without_jupyterlab_the_extra_is_named_and_nothing_is_copied(notebooks, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "jupyterlab" else find(name, *more)
    )
    assert main(["lab", str(tmp_path / "here")]) == 1
    assert 'pip install "finetune_nb[lab]"' in capsys.readouterr().err and not (tmp_path / "here").exists()
    assert main(["lab", "--no-open", str(tmp_path / "here")]) == 0


def test_lab_opens_the_folder_unless_told_not_to(notebooks, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(subprocess, "call", lambda command: opened.append(command) or 7)
    assert main(["lab", str(tmp_path / "here")]) == 7
    assert opened == [[sys.executable, "-m", "jupyterlab", str(tmp_path / "here")]]


def test_a_folder_that_cannot_be_made_is_one_line(notebooks, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main(["lab", "--no-open", str(file)]) == 1
    assert capsys.readouterr().err == f"finetune-nb: cannot write or read {file}: File exists\n"


def test_no_notebooks_at_all_is_an_error(notebooks, tmp_path, capsys):
    for notebook in notebooks.glob("*.ipynb"):
        notebook.unlink()
    assert main(["lab", "--no-open", str(tmp_path / "here")]) == 1
    assert "there are no notebooks in" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_our_own_notebooks_are_looked_for_beside_the_package_or_in_it():
    folder = demo.notebooks_folder()
    assert folder.name == "notebooks"
    assert folder.is_dir()


# ── the demo's readers ───────────────────────────────────────────────────────────────────────────────────────────────


def training(epoch, reward=0.5, **scores):
    return {
        "epoch": epoch,
        "avg_reward": reward,
        "scores": {"correct": reward, **scores},
        "groups_with_spread": 3,
        "num_groups": 4,
        "training": {"status": "completed"},
    }


def validation(reward, version):
    return {"avg_reward": reward, "num_examples": 8, "policy_version": version}


def write(path: Path, *lines, rest: bytes = b""):
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + rest)


HALF_WRITTEN = [
    b"",
    b"{",
    b'{"epoch": 2, "avg_rew',
    '{"epoch": 2, "name": "é'.encode()[:-1],
    json.dumps(training(2)).encode(),
]


@pytest.mark.parametrize("rest", HALF_WRITTEN)
def test_a_half_written_line_is_left_for_later(rest, tmp_path):
    write(tmp_path / "training_metrics.jsonl", training(0), training(1, None), rest=rest)
    write(tmp_path / "validation_metrics.jsonl", validation(0.25, 0), validation(0.75, 2), rest=rest)
    summary = demo._summary(tmp_path, seed=3)
    assert [line["epoch"] for line in summary["epochs"]] == [0, 1]
    assert math.isnan(summary["epochs"][1]["mean_reward"])
    assert (summary["seed"], summary["held_out_before"], summary["held_out_after"]) == (3, 0.25, 0.75)


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes('{"text": "a\u2028b\u0085c"}\n'.encode())
    assert demo._read(tmp_path / "log.jsonl") == [{"text": "a\u2028b\u0085c"}]


def test_a_summary_without_any_log_has_no_numbers(tmp_path):
    summary = demo._summary(tmp_path / "nowhere", seed=0)
    assert summary["epochs"] == []
    assert math.isnan(summary["held_out_before"])
    assert math.isnan(summary["held_out_after"])


async def test_the_teller_tells_each_line_once_and_when_it_is_complete(tmp_path, capsys):
    log, held_out = tmp_path / "training_metrics.jsonl", tmp_path / "validation_metrics.jsonl"
    teller = asyncio.create_task(demo._tell(tmp_path))
    try:
        await asyncio.sleep(0.15)
        write(held_out, validation(None, 0))
        write(log, training(0, 0.5, tools=0.25), rest=b'{"epoch": 1, "avg')
        await asyncio.sleep(0.25)
        write(log, training(0, 0.5, tools=0.25), training(1, None, tools=None))
        write(held_out, validation(None, 0), validation(0.75, 2))
        await asyncio.sleep(0.25)
        assert not teller.done(), teller
    finally:
        teller.cancel()
    told = [" ".join(line.replace("█", "").split()) for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == [
        "epoch 0 reward 0.500 tools 0.25 3/4 groups teach",
        "epoch 1 reward nan tools nan 3/4 groups teach",
        "held out reward 0.750 on 8 questions, after update 2",
        "held out reward nan on 8 questions, before training",
    ]


def test_parameters_are_put_into_the_tagged_cell_of_a_notebook():
    cells = [
        nbformat.v4.new_code_cell("first"),
        nbformat.v4.new_code_cell("SEED = 0", metadata={"tags": ["parameters"]}),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    demo.set_parameters(notebook, SEED=3, NAME="demo")
    assert [cell.source for cell in notebook.cells] == ["first", "SEED = 3\nNAME = 'demo'"]
    with pytest.raises(ft.FinetuneError, match="no cell tagged 'parameters'"):
        demo.set_parameters(nbformat.v4.new_notebook(cells=cells[:1]), SEED=3)


def test_runs_lists_a_directory(tmp_path, capsys):
    from factories import make_epoch

    from finetune_nb.store.store import RunStore

    assert main(["runs", str(tmp_path)]) == 0
    assert "no run in" in capsys.readouterr().out
    with RunStore.create(tmp_path / "one", "one", {}) as store:
        store.append(make_epoch([[1.0, 0.5]]), {})
    RunStore.create(tmp_path / "two", "two", {}, parent=("one", 0)).close()
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0.75" in shown and "one at 0" in shown and "MB" in shown
    assert main(["runs", str(tmp_path / "nowhere")]) == 1
    assert "no directory" in capsys.readouterr().err


# ── finetune-nb find ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def searched(tmp_path) -> str:
    """The folder of a run of two epochs, in which a model says what no terminal should be sent."""
    hostile = make_trajectory(0.5, "q0", 0, "the word is \x1b[31mTokyo")
    stored(tmp_path, epoch_of([[hostile]]), make_epoch([[1.0, 0.0]], 1))
    return str(tmp_path / "run")


def test_find_prints_a_line_a_hit_and_how_many_there_are(searched, capsys):
    assert main(["find", searched, "tokyo"]) == 0
    told = capsys.readouterr()
    assert told.out == "e0/q0/0  reward 0.5  turn 1 assistant: the word is ␛[31m«Tokyo»\n"
    assert told.err == "1 hit in 1 of 3 rollouts\n"


def test_find_takes_a_regex_a_condition_epochs_and_a_limit(searched, capsys):
    assert main(["find", searched, "--regex", "T.ky", "--where", "reward > 0.1", "--epoch", "0"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    read_and_label = ft.Run.open(searched)
    read_and_label.label("e1/q0/1", "odd")
    assert main(["find", searched, "--where", "'odd' in labels"]) == 0
    assert capsys.readouterr().out == "e1/q0/1  reward 0\n"
    assert main(["find", searched, "2+2", "--limit", "1"]) == 0
    assert capsys.readouterr().err == "3 hits in 3 of 3 rollouts; the first 1 are shown\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to search for"),
        (["x", "--epoch", "7"], "no epoch 7; the run has epochs 0 to 1"),
        (["--regex", "("], "no regular expression"),
        (["--where", "__import__('os')"], "no condition"),
    ],
)
def test_find_says_what_is_wrong(searched, capsys, arguments, said):
    assert main(["find", searched, *arguments]) == 1
    assert said in capsys.readouterr().err
