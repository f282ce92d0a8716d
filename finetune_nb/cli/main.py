"""The command line: `finetune-nb demo` trains the example before your eyes, `finetune-nb lab` opens the notebooks,
`finetune-nb runs` lists what was run, `finetune-nb art-server` trains for the NeMo Agent Toolkit's ART plugin."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import FinetuneError

__all__ = [
    "main",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except FinetuneError as error:
        print(f"finetune-nb: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"finetune-nb: cannot write or read{where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("finetune-nb: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune-nb", description="Finetune LLM agents by reinforcement learning.")
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

    runs = commands.add_parser("runs", help="list the runs of a directory, newest first")
    runs.add_argument("directory", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    runs.add_argument("--archived", action="store_true", help="archived runs")
    runs.set_defaults(command=_runs)

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


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(arguments.seed, arguments.epochs, arguments.out, arguments.json)


def _lab(arguments: argparse.Namespace) -> int:
    from .demo import notebooks_folder

    folder, source = arguments.folder, notebooks_folder()
    notebooks = sorted(source.glob("*.ipynb"))
    if not notebooks:
        raise FinetuneError(f"there are no notebooks in {source}. Install finetune_nb again: its wheel brings them.")
    for original in [*notebooks, *sorted(source.glob("reference/*.md"))]:  # notebooks link to the reference
        copy = folder / original.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with copy.open("xb") as file:
                file.write(original.read_bytes())
            if copy.suffix == ".ipynb":
                _trust(copy)
            print(f"copied {copy}")
        except FileExistsError:
            print(f"{copy} is there already and stays as it is")
    if arguments.no_open:
        return 0
    return subprocess.call([sys.executable, "-m", "jupyterlab", str(folder)])


def _trust(notebook: Path) -> None:
    """JupyterLab shows the outputs of a notebook as they are meant to look only where it has been signed here."""
    import nbformat
    from nbformat.sign import NotebookNotary

    NotebookNotary().sign(nbformat.read(notebook, as_version=4))


def _runs(arguments: argparse.Namespace) -> int:
    from ..store.runs import runs
    from ..text import number

    if not arguments.directory.is_dir():
        raise FinetuneError(f"there is no directory {arguments.directory}. Name the one that holds the runs.")
    table = runs(arguments.directory, arguments.archived)
    if table.empty:
        print(f"no run in {arguments.directory}")
        return 0
    shown = table[["run", "epochs", "last_reward", "state", "parent", "size", "error"]].copy()
    shown["last_reward"] = [number(value) for value in table.last_reward]
    shown["size"] = [f"{size / 1e6:.1f} MB" if size == size else "" for size in table["size"].astype(float)]
    shown["parent"] = [f"{p} at {e}" if p else "" for p, e in zip(table.parent, table.parent_epoch, strict=True)]
    print(shown.fillna("").to_string(index=False))
    return 0


def _art_server(arguments: argparse.Namespace) -> int:
    import asyncio
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from ..backends.art_server.server import serve

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "out")}
    asyncio.run(serve(**given, folder=arguments.out, ready=lambda text: print(text, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
