"""Checkpoints of the Tinker backend: a small file that says which saved state of the service they are.

    manifest.json    a Manifest: the state's address on the service, and where training stood

Weights and optimizer stay on the service, under the name recorded here; without the service a checkpoint is nothing.
Copies of the file are as good as the file: a branch of a run starts from the very same state.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import BackendError
from ...store.durable import atomic_directory, plain_file
from ...store.folder import ARCHIVE, CHECKPOINTS

__all__ = [
    "MANIFEST",
    "Manifest",
    "named_elsewhere",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
LONGEST_MANIFEST = 100_000
"""Bytes; ours have a few hundred."""
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Manifest(BaseModel):
    """What manifest.json says."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["finetune_nb.tinker.checkpoint"] = "finetune_nb.tinker.checkpoint"
    format_version: Literal[1] = 1
    state: Annotated[str, Field(pattern=r"^tinker://[\w.:/-]+$", max_length=1000)]
    """Where the service keeps weights and optimizer."""
    model: str
    rank: int
    """Of the LoRA adapter; a state fits a model of the same name and rank."""
    service: str | None
    """Its base_url; None: Thinking Machines' own."""
    policy_version: Count
    jobs: Count
    """Training jobs so far: the next one's order of trajectories is drawn by seed and this."""


def write_manifest(directory: Path, manifest: Manifest) -> int:
    """Writes it to `directory`, a new one or an older checkpoint; returns the bytes written. Raises BackendError."""
    text = json.dumps(manifest.model_dump(), indent=1) + "\n"
    with atomic_directory(directory, MANIFEST) as unfinished:
        (unfinished / MANIFEST).write_text(text, encoding="utf-8")
    return len(text.encode())


def read_manifest(directory: Path, model: str, rank: int) -> Manifest:
    """What `directory` is a checkpoint of. Raises BackendError where it is none, or one of another model."""
    path = plain_file(directory, MANIFEST)
    try:
        if path.stat().st_size > LONGEST_MANIFEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, ours at most {LONGEST_MANIFEST}")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))[:80]}: {e['msg']}" for e in error.errors()[:3])
        raise BackendError(f"{path} is not a checkpoint of this backend: {wrong}. Load another checkpoint.") from error
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} is not a checkpoint of this backend: {error}. Load another checkpoint.") from error
    if (manifest.model, manifest.rank) != (model, rank):
        raise BackendError(
            f"{path} is of model {manifest.model!r} with rank {manifest.rank}; expected {model!r} with rank {rank}, as the "
            "trainer adapter says. Set them alike, or load another checkpoint."
        )
    return manifest


def named_elsewhere(state: str, directories: Collection[Path]) -> bool:
    """Whether a checkpoint beside these names that state too: another one of the run, or one of a run in the same folder, such
    as a fork's."""
    runs = {directory.parents[2] for directory in directories if len(directory.parents) > 2}
    ours = {directory / MANIFEST for directory in directories}
    for root in runs:
        for pattern in (f"*/{CHECKPOINTS}/*/{MANIFEST}", f"{ARCHIVE}/*/{CHECKPOINTS}/*/{MANIFEST}"):
            for path in root.glob(pattern):
                if path in ours:
                    continue
                with suppress(OSError, ValueError):
                    if path.stat().st_size <= LONGEST_MANIFEST and f'"{state}"' in path.read_text("utf-8"):
                        return True
    return False
