"""`finetune-nb run`: trains what a config says, a line an epoch, until it is done, interrupted, or paused by a tripwire."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..engine.state import ACTIVE, State
from ..errors import ConfigError
from ..run.run import Run
from ..text import count, number
from .output import complain, say, show_log_records

__all__ = [
    "import_code",
    "run_config",
]

INTERRUPTED = 130


def run_config(
    config: Path,
    settings: Sequence[tuple[str, str]] = (),
    code: Sequence[str] = (),
    name: str | None = None,
    resume: bool = False,
    epochs: int | None = None,
    progress: bool = True,
) -> int:
    """Make the run of a config and train it to its end.

    Args:
        config: A YAML file.
        settings: Dotted paths with the values to put there, as YAML.
        code: Python files or modules to import first; they register components.
        name: The run's name.
        resume: Whether the run of that name is continued where its record ends.
        epochs: How many to run now. None: those that are left.
        progress: Whether each epoch is a line on standard error.

    Returns:
        The exit code: 0 done, 1 paused by a tripwire, 130 interrupted.

    Raises:
        FinetuneError: The config or a file to import has mistakes, or an epoch failed.
    """
    if not config.is_file():
        raise ConfigError(f"there is no file {config}. Name the YAML file of the run.")
    show_log_records(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    for each in code:
        import_code(each)
    overrides = {path.replace(".", "__"): value for path, value in settings}
    run = Run.from_config(config, name=name, resume="auto" if resume else "never", **overrides)
    with closing(run):
        left = run.config.finetuning.num_epochs - len(run) if epochs is None else epochs
        if left < 1:
            say(f"{run.id}: all {count(len(run), 'epoch')} are done. --epochs N runs more.")
            return 0
        if progress:
            complain(f"{run.id}: {count(left, 'epoch')}, recorded in {run.folder}")
        until = run.next_index + left
        run.start(left)
        pauses = _stop_when_paused(run)
        run.wait(progress=progress)
        say(_outcome(run, until))
        for reason in pauses:
            complain(f"finetune-nb: {reason}")
        if run.next_index >= until:
            return 0
        return 1 if pauses else INTERRUPTED


def _stop_when_paused(run: Run) -> list[str]:
    """Ends a run that a tripwire has paused: in a terminal nobody is there to resume it. Returns a list that gets the reason."""
    reasons: list[str] = []

    def watch() -> None:
        while run.state in ACTIVE:
            if run.state == State.PAUSED and not reasons:
                reasons.append(run.notice or "paused")
                run.stop()
            time.sleep(0.1)

    threading.Thread(target=watch, name="ft-pauses", daemon=True).start()
    return reasons


def _outcome(run: Run, until: int) -> str:
    """What came of it, and what to do next."""
    metrics = [epoch.metrics.mean_reward for epoch in run]
    lines = [f"{run.id}: {run.next_index} of {count(until, 'epoch')}"]
    if metrics:
        lines[0] += f", mean reward {number(metrics[0])} in the first, {number(metrics[-1])} in the last"
    checked = [each for epoch in run for each in epoch.validations]
    if len(checked) > 1:
        lines.append(f"validation: {number(checked[0].mean_reward)} first, {number(checked[-1].mean_reward)} last")
    lines.append(
        f"finetune-nb show {shlex.quote(str(run.folder))}    finetune-nb report {shlex.quote(str(run.folder))}"
    )
    return "\n".join(lines)


def import_code(name: str) -> None:
    """Import a Python file, or a module by its dotted name.

    Raises:
        ConfigError: There is no such file or module.
    """
    path = Path(name)
    if path.suffix != ".py":
        sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(f"there is no module {name!r}. --import takes a .py file or a module's name.") from error
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"there is no file {path}. --import takes a .py file or a module's name.")
    if path.stem in sys.modules:
        raise ConfigError(f"{path} would hide the module {path.stem!r}, which is imported already. Rename the file.")
    sys.path.insert(0, str(path.resolve().parent))  # it may import what lies beside it
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
