"""The command line, `finetune-nb` or `python -m finetune_nb`.

`demo` trains the example before your eyes, `lab` opens the notebooks, `run` trains what a config says. `runs` lists what was
run; `show`, `find`, `report` and `compare` are for reading it. `art-server` trains for the NeMo Agent Toolkit's ART plugin.

Exit codes: 0 it is done; 1 it failed, and standard error says why, a tripwire paused the run, or `runs` found a run that cannot
be read; 2 the arguments are wrong; 130 it was interrupted. `lab` ends with JupyterLab's own code.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..errors import FinetuneError, MissingExtra
from ..redaction import error_text
from ..text import plain
from .output import complain, say, show_log_records

__all__ = [
    "main",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments. Default: those of this process.

    Returns:
        The exit code; the module's docstring lists them.

    Raises:
        SystemExit: The arguments are wrong, or only ask for help.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except FinetuneError as error:
        complain(f"finetune-nb: {error}")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        complain(f"finetune-nb: cannot write or read{where}: {error.strerror or error}")
    except KeyboardInterrupt:
        complain("finetune-nb: interrupted")
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        complain(f"finetune-nb: {error_text(error)}. This was not expected; --traceback shows where it happened.")
    return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="finetune-nb",
        description="Finetune LLM agents by reinforcement learning.",
        epilog="Exit codes: 0 done; 1 failed, or a run cannot be read; 2 wrong arguments; 130 interrupted.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error happened")
    parser.add_argument("--version", action="version", version=f"finetune_nb {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train the embedded model on the example, epoch by epoch")
    demo.add_argument("--seed", type=int, default=0, help="of draws, sampling and training (default 0)")
    demo.add_argument("--epochs", type=_positive, default=15, help="how many (default 15)")
    demo.add_argument(
        "--out", type=Path, default=Path("finetune-nb-demo"), help="folder for config, data, run and notebook"
    )
    demo.add_argument("--json", type=Path, help="write the figures to this file")
    demo.set_defaults(command=_demo)

    lab = commands.add_parser("lab", help="copy the notebooks here and open them in JupyterLab")
    lab.add_argument("folder", type=Path, nargs="?", default=Path("finetune-nb-notebooks"), help="where to copy them")
    lab.add_argument("--no-open", action="store_true", help="only copy")
    lab.set_defaults(command=_lab)

    run = commands.add_parser("run", help="train what a config says, a line an epoch")
    run.add_argument("config", type=Path, help="YAML file")
    run.add_argument("--set", type=_setting, action="append", default=[], metavar="PATH=VALUE", dest="settings",
                     help="a setting in place of the config's, such as finetuning.num_epochs=3; may be given again")  # fmt: skip
    run.add_argument("--import", action="append", default=[], metavar="FILE", dest="code",
                     help="a Python file or module that registers components; may be given again")  # fmt: skip
    run.add_argument("--name", help="the run's name (default: made from the date)")
    run.add_argument("--resume", action="store_true", help="continue the run of that name where its record ends")
    run.add_argument("--epochs", type=_positive, help="how many to run now (default: those that are left)")
    run.add_argument("--quiet", action="store_true", help="no line for each epoch")
    run.set_defaults(command=_run)

    show = commands.add_parser("show", help="print a run, a line an epoch, or one of its rollouts as a conversation")
    show.add_argument("run", type=Path, help="the run's folder")
    show.add_argument("name", nargs="?", help='a rollout or a group, such as "e3/q17/2"')
    show.add_argument("--epoch", type=int, help="the rollout's epoch; negative counts from the newest")
    show.add_argument("--example", help="its example (default: the one whose rewards differ most)")
    show.add_argument("--generation", type=int, help="its generation (default: the best)")
    show.set_defaults(command=_show)

    report = commands.add_parser("report", help="write a run as one HTML page")
    report.add_argument("run", type=Path, help="the run's folder")
    report.add_argument("--out", type=Path, help="the file (default: the run's name and .html, here)")
    report.add_argument("--no-browser", action="store_true", help="without the trajectory browser: a smaller file")
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="how far runs are above or below the first one")
    compare.add_argument("runs", type=Path, nargs="+", metavar="run", help="folders of two runs or more")
    compare.add_argument(
        "--rewards", choices=("own", "all"), help="by what was recorded, or scored by every run's reward"
    )
    compare.set_defaults(command=_compare)

    runs = commands.add_parser("runs", help="list the runs of a directory, newest first")
    runs.add_argument("directory", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    runs.add_argument("--archived", action="store_true", help="archived runs")
    runs.set_defaults(command=_runs)

    find = commands.add_parser("find", help="search the rollouts of a run, the newest epoch first")
    find.add_argument("run", type=Path, help="the run's folder")
    find.add_argument("text", nargs="?", help="a part of a text, in lower or upper case")
    find.add_argument("--regex", help="a regular expression in RE2's syntax, in place of the text")
    find.add_argument("--where", help="only these rollouts, such as \"reward < 0.5 and 'hacked' in labels\"")
    find.add_argument("--epoch", type=int, action="append", help="only this epoch; may be given again")
    find.add_argument("--limit", type=_positive, default=100, help="most hits shown (default 100); all are counted")
    find.set_defaults(command=_find)

    art = commands.add_parser("art-server", help="train for the NeMo Agent Toolkit's ART plugin, in place of `art run`")
    art.add_argument("--model", default="embedded", help='"embedded" (default), a Hugging Face directory or name')
    art.add_argument("--host", default="127.0.0.1", help="an address of this machine alone (default 127.0.0.1)")
    art.add_argument("--port", type=_positive, default=7999, help="as in the config (default 7999); 8000 is served too")
    art.add_argument("--out", type=Path, help="folder for the model after every training, as 0001, 0002, ...")
    art.add_argument("--learning-rate", type=_above_zero, help="in place of the config's (embedded model: 5e-4)")
    art.add_argument("--max-tokens", type=_positive, default=256, help="of a reply, where not asked for (default 256)")
    art.add_argument("--lora", action="store_true", help="train a LoRA adapter")
    art.add_argument("--seed", type=int, default=0, help="of sampling and training (default 0)")
    art.add_argument("--allow-inexact", action="store_true", help="also train on what was not sampled here")
    art.set_defaults(command=_art_server)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _setting(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not (path and equals):
        raise argparse.ArgumentTypeError(f"expected PATH=VALUE, found {text!r}")
    return path, value


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(arguments.seed, arguments.epochs, arguments.out, arguments.json)


def _lab(arguments: argparse.Namespace) -> int:
    from .demo import notebooks_folder

    if not arguments.no_open and importlib.util.find_spec("jupyterlab") is None:
        raise MissingExtra("opening the notebooks in JupyterLab", "lab")
    folder, source = arguments.folder, notebooks_folder()
    notebooks = sorted(source.glob("*.ipynb"))
    if not notebooks:
        raise FinetuneError(f"there are no notebooks in {source}. Install finetune_nb again: its wheel brings them.")
    # What notebooks show and link to.
    beside = [*sorted(source.glob("images/*")), *sorted(source.glob("reference/*.md"))]
    for original in [*notebooks, *beside]:
        copy = folder / original.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with copy.open("xb") as file:
                file.write(original.read_bytes())
            if copy.suffix == ".ipynb":
                _trust(copy)
            say(f"copied {copy}")
        except FileExistsError:
            say(f"{copy} is there already and stays as it is")
    if arguments.no_open:
        return 0
    return subprocess.call([sys.executable, "-m", "jupyterlab", str(folder)])


def _trust(notebook: Path) -> None:
    """JupyterLab shows the outputs of a notebook as they are meant to look only where it has been signed here."""
    try:
        import nbformat
        from nbformat.sign import NotebookNotary
    except ImportError:  # no JupyterLab here
        return

    NotebookNotary().sign(nbformat.read(notebook, as_version=4))


def _run(arguments: argparse.Namespace) -> int:
    from .train import run_config

    if arguments.resume and arguments.name is None:
        raise FinetuneError("--resume continues the run of that name: give it one, --name NAME.")
    return run_config(
        arguments.config,
        arguments.settings,
        arguments.code,
        arguments.name,
        arguments.resume,
        arguments.epochs,
        progress=not arguments.quiet,
    )


def _show(arguments: argparse.Namespace) -> int:
    from .look import show_run

    return show_run(arguments.run, arguments.name, arguments.epoch, arguments.example, arguments.generation)


def _report(arguments: argparse.Namespace) -> int:
    from .look import write_report

    return write_report(arguments.run, arguments.out, browser=not arguments.no_browser)


def _compare(arguments: argparse.Namespace) -> int:
    from .look import compare_runs

    return compare_runs(arguments.runs, arguments.rewards)


def _runs(arguments: argparse.Namespace) -> int:
    from ..store.runs import runs
    from ..text import number, one_line

    if not arguments.directory.is_dir():
        raise FinetuneError(f"there is no directory {arguments.directory}. Name the one that holds the runs.")
    table = runs(arguments.directory, arguments.archived)
    if table.empty:
        say(f"no run in {arguments.directory}")
        return 0
    lines, damaged = [], []
    for row in table.to_dict("records"):
        if isinstance(row["error"], str):
            damaged.append(f"{one_line(row['run'])} cannot be read: {one_line(row['error'], 1000)}")
            lines.append([one_line(row["run"]), "", "", "damaged", "", ""])
            continue
        parent = ""
        if row["parent"] is not None:
            parent = f"{one_line(row['parent'])} at {row['parent_epoch']}"
        reward, size = number(row["last_reward"]), f"{row['size'] / 1e6:.1f} MB"
        lines.append([one_line(row["run"]), str(row["epochs"]), reward, one_line(row["state"]), parent, size])
    say("\n".join(_aligned([["run", "epochs", "last_reward", "state", "parent", "size"], *lines])))
    for line in damaged:
        complain(line)
    return 1 if damaged else 0


def _find(arguments: argparse.Namespace) -> int:
    from ..frames.search import Search, query_of
    from ..store.labels import read_labels
    from ..store.store import RunStore
    from ..views.search import hit_line, search_headline

    query = query_of(arguments.text, arguments.regex, arguments.where)
    epochs = RunStore.open(arguments.run).epochs
    if arguments.epoch is not None:
        there = [epoch.index for epoch in epochs]
        if absent := sorted(set(arguments.epoch).difference(there)):
            known = f"epochs {there[0]} to {there[-1]}" if there else "no epoch"
            raise FinetuneError(f"there is no epoch {absent[0]}; the run has {known}.")
        epochs = [epoch for epoch in epochs if epoch.index in arguments.epoch]
    labels = [] if arguments.where is None else read_labels(arguments.run)
    search = Search(query, epochs, labels, arguments.limit)
    for part in search:
        for hit in part.hits:
            say(hit_line(hit))
    complain(search_headline(search))
    return 0


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, their columns one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _art_server(arguments: argparse.Namespace) -> int:
    import asyncio
    import logging

    show_log_records(logging.INFO, "%(message)s")
    from ..backends.art_server.server import serve

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "out", "traceback")}
    asyncio.run(serve(**given, folder=arguments.out, ready=say))
    return 0


if __name__ == "__main__":
    sys.exit(main())
