"""The finetuning examples of a checkout of NVIDIA/NeMo-Agent-Toolkit, ready to be run as they stand there.

Their configs get what their READMEs tell the user to fill in, addresses and paths; what was filled in is printed as a diff. The
examples are found through their own entry points, as after `pip install -e`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "art_config",
    "dpo_config",
    "dpo_games_config",
    "environment",
    "install",
]

ART, DPO = "rl_with_openpipe_art", "dpo_tic_tac_toe"
OVERRIDE = """\
import typing, typing_extensions
if not hasattr(typing, "override"):
    typing.override = typing_extensions.override
"""
"""The examples say that they need Python 3.11, and import what typing has from 3.12 on."""


def example(checkout: Path, name: str) -> Path:
    return checkout / "examples" / "finetuning" / name


def install(checkout: Path, name: str, folder: Path) -> list[str]:
    """What is put in front of the path so that an example is installed: its source, and a folder with its entry points."""
    place = example(checkout, name)
    project = tomllib.loads((place / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = folder / "site"
    about = site / f"{project['name']}-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n", encoding="utf-8")
    points = project["entry-points"]["nat.components"]
    lines = ["[nat.components]", *(f"{key} = {value}" for key, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (site / "sitecustomize.py").write_text(OVERRIDE, encoding="utf-8")
    return [str(site), str(place / "src")]


def environment(path: list[str], **more: str) -> dict[str, str]:
    """For a process that runs an example: with the path, and with what the READMEs have the user export."""
    known = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, sys.path)]),
        "PYTHONUNBUFFERED": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "unused-default-key",
    }
    return known | more


def games(checkout: Path, name: str, folder: Path, file: str = "data.json") -> Path:
    """The example's dataset. Where the checkout has only a pointer to it, for Git LFS: the same rows, as its README shows them,
    twelve games as X and twelve as O."""
    shipped = example(checkout, name) / "data" / file
    if not shipped.read_text(encoding="utf-8").startswith("version https://git-lfs"):
        return shipped.resolve()
    rows = [{"id": number + 1, "question": "XO"[number % 2], "answer": "Win!"} for number in range(24)]
    place = folder / file
    place.write_text(json.dumps(rows), encoding="utf-8")
    return place


def filled_in(shipped: Path, changes: Mapping[str, str], to: Path) -> Path:
    """The config with these texts in place of those; prints what that changes."""
    before = text = shipped.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{shipped} has no {old!r} any more"
        text = text.replace(old, new)
    to.write_text(text, encoding="utf-8")
    names = "as shipped", "filled in"
    print("\n".join(difflib.unified_diff(before.splitlines(), text.splitlines(), *names, lineterm="", n=0)))
    return to


def art_config(checkout: Path, folder: Path, host: str, file: str = "config.yml", data: str = "data.json") -> Path:
    """A config of the ART example. host: where the training server and the model are."""
    shipped = example(checkout, ART) / "configs" / file
    path = f"examples/finetuning/{ART}/src/{ART}/data/{data}"
    changes = {"http://localhost:8000": f"http://{host}:8000", path: str(games(checkout, ART, folder, data))}
    if 'ip: "0.0.0.0"' in shipped.read_text(encoding="utf-8"):
        changes['ip: "0.0.0.0"'] = f'ip: "{host}"'
    return filled_in(shipped, changes, folder / file)


def dpo_config(checkout: Path, folder: Path, llm: str, adapter: str | None = None) -> Path:
    """The config of the DPO example.

    llm: lines of `training_llm`, which the README says to point at a server. adapter: lines of the trainer adapter. Default: the
    shipped one, whose addresses come from the environment.
    """
    shipped = example(checkout, DPO) / "configs" / "config.yml"
    text = shipped.read_text(encoding="utf-8")
    changes = {
        "    _type: nim\n    model_name: meta/llama-3.1-8b-instruct\n": llm,
        f"examples/finetuning/{DPO}/data/data.json": str(games(checkout, DPO, folder)),
    }
    if adapter is not None:
        begin = text.index("    _type: nemo_customizer_trainer_adapter\n")
        changes[text[begin : text.index("\n\ntrainers:")]] = adapter
    return filled_in(shipped, changes, folder / "config.yml")


def dpo_games_config(checkout: Path, folder: Path) -> Path:
    """The DPO example's config that plays games with the model that two variables of the environment name."""
    shipped = example(checkout, DPO) / "configs" / "config_after_training.yml"
    changes = {f"examples/finetuning/{DPO}/data/data.json": str(games(checkout, DPO, folder))}
    return filled_in(shipped, changes, folder / shipped.name)
