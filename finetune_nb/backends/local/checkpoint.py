"""Checkpoints of the local backend: all that training on needs, in a directory that is complete or is not there.

    manifest.json           a Manifest: what this is, where training stood, size and SHA-256 of the other files
    weights.safetensors     the trained weights in float32 (float64 stays), and the model's persistent buffers
    optimizer.safetensors   AdamW's step, exp_avg and exp_avg_sq of every weight that has taken a step, and the master that
                            takes the steps in place of a weight in half precision
    reference.safetensors   the weights that KL is measured from, unless the model's name gives them again

The reference never changes, so all checkpoints of a run share one copy of it by hard links, and each is still whole on
its own. Nothing is pickled, file names come from here and never from the manifest, and loading checks everything
before it changes anything. The caller decides when to save and what
to keep, and makes sure that nobody else is using the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import BackendError
from ...redaction import redact_text, redacting_logger
from ...store.durable import FileDigest, atomic_directory, digest_of, plain_file
from .lora import as_trained, is_lora, settings_of
from .losses.entropy import EntropyWeight
from .policy import LocalPolicy
from .training import Learner
from .weights import (
    all_tensors,
    check_like,
    dtype_name,
    fingerprint,
    frozen_tensors,
    optimizer_tensors,
    parameter_states,
    shortened,
    trained_tensors,
)

__all__ = [
    "Checkpoints",
    "Manifest",
    "Reference",
    "load_weights",
]

logger = redacting_logger(__name__)

FORMAT, FORMAT_VERSION = "finetune_nb.local_grpo.checkpoint", 1
MANIFEST, WEIGHTS, OPTIMIZER, REFERENCE = (
    "manifest.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "reference.safetensors",
)
LONGEST_MANIFEST = 1_000_000
"""Bytes; ours have a few thousand."""
NOT_ARCHITECTURE = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache"),
    }
)
"""Settings of a model's config that may differ: the same weights compute the same logits with any value of them."""

FileName = Literal["weights.safetensors", "optimizer.safetensors", "reference.safetensors"]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Reference(BaseModel):
    """How the weights that KL is measured from are found again."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    found: Literal["in_file", "by_model_name"]
    """"in_file": they are reference.safetensors. "by_model_name": loading the manifest's `model` gives them."""
    sha256: str | None = None
    """Of their names, shapes and values, to check what the name gives; None where they are in the file."""
    revision: str | None = None
    """The commit on the model hub; None for the embedded model."""


class EntropyState(BaseModel):
    """Where an entropy bonus with a target is."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    start: float
    coef: float
    entropy: float | None


class Manifest(BaseModel):
    """What manifest.json says."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["finetune_nb.local_grpo.checkpoint"]
    format_version: Literal[1]
    model: str | None
    """What the model was loaded from; None where it was handed over as an object."""
    architecture: dict[str, Any]
    """The settings that must agree with those of the model that is loaded into: its class, and what its config says."""
    dtype: str
    """Of the weights in training, such as "float32"."""
    frozen_sha256: str | None
    """Of the weights that are not trained and not stored; None where all are trained."""
    reference: Reference | None
    """None where KL plays no part."""
    policy_version: Count
    jobs: Count
    """Training jobs so far: the next one's order of trajectories is drawn by seed and this."""
    torch: str
    transformers: str
    files: dict[FileName, FileDigest]
    entropy: EntropyState | None = None
    """None, and not in the file, where the entropy has no target: older releases read it then."""


class Checkpoints:
    """Saves and loads what `learner` and its policy are; remembers where its KL reference is stored already."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._stored_reference: tuple[Path, FileDigest] | None = None
        self._fingerprints: dict[str, str | None] = {}

    # ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, directory: Path, jobs: int) -> int:
        """Bytes written; a reference that is shared with an earlier checkpoint is not among them.

        directory: a new one, or an older checkpoint, which is replaced. Raises BackendError where it is something else
        and where writing fails, for want of space for example; an older checkpoint is then still there.
        """
        learner, model = self.learner, self.learner.policy.model
        linked = 0
        with atomic_directory(directory, MANIFEST) as unfinished:
            seals: dict[FileName, FileDigest] = {
                WEIGHTS: _write(unfinished / WEIGHTS, trained_tensors(model), widen=True),
                OPTIMIZER: _write(unfinished / OPTIMIZER, optimizer_tensors(learner.optimizer, learner.trained)),
            }
            reference = self._reference()
            if reference is not None and reference.found == "in_file":
                shared = self._link_reference(unfinished / REFERENCE)
                seals[REFERENCE] = shared or _write(unfinished / REFERENCE, all_tensors(learner.reference), widen=True)
                linked = shared.bytes if shared else 0
            manifest = Manifest(
                format=FORMAT,
                format_version=FORMAT_VERSION,
                model=None if learner.policy.source is None else redact_text(learner.policy.source),
                architecture=_architecture(model),
                dtype=dtype_name(model),
                frozen_sha256=self._frozen_sha256(),
                reference=reference,
                policy_version=learner.policy.version,
                jobs=jobs,
                torch=torch.__version__,
                transformers=transformers.__version__,
                files=seals,
                entropy=self._entropy(),
            )
            left_out = {"entropy"} if manifest.entropy is None else None
            text = json.dumps(manifest.model_dump(exclude=left_out), indent=1, sort_keys=True) + "\n"
            (unfinished / MANIFEST).write_text(text, encoding="utf-8")
            written = sum(s.bytes for s in seals.values()) - linked + digest_of(unfinished / MANIFEST).bytes
        if REFERENCE in seals:
            self._stored_reference = (directory / REFERENCE, seals[REFERENCE])
        return written

    def _reference(self) -> Reference | None:
        learner, policy = self.learner, self.learner.policy
        if learner.reference is None:
            return None
        revision = getattr(policy.model.config, "_commit_hash", None)
        # A directory can be changed or deleted at any time; what ships with us or has a commit on the hub cannot.
        if self._stored_reference is None and (policy.source == "embedded" or (policy.source and revision)):
            return Reference(found="by_model_name", sha256=self._reference_sha256(), revision=revision)
        return Reference(found="in_file")

    def _entropy(self) -> EntropyState | None:
        weight = self.learner.entropy_weight
        if weight.entropy is None:
            return None
        return EntropyState(start=weight.start, coef=weight.coef, entropy=weight.entropy)

    def _reference_sha256(self) -> str | None:
        """Asked for only while the reference is what the model was loaded with."""
        if "reference" not in self._fingerprints:
            self._fingerprints["reference"] = fingerprint(all_tensors(self.learner.reference))
        return self._fingerprints["reference"]

    def _frozen_sha256(self) -> str | None:
        if "frozen" not in self._fingerprints:
            self._fingerprints["frozen"] = fingerprint(frozen_tensors(self.learner.policy.model))
        return self._fingerprints["frozen"]

    def _link_reference(self, path: Path) -> FileDigest | None:
        """The stored reference under one more name; None where that is not possible, or it is not what it was."""
        if self._stored_reference is None:
            return None
        stored, expected = self._stored_reference
        try:
            os.link(stored, path, follow_symlinks=False)
            if plain_file(path.parent, path.name) and digest_of(path) == expected:
                return expected
            logger.warning("%s has changed since it was written; the checkpoint gets a copy of its own", stored)
            path.unlink()
        except (OSError, BackendError) as error:  # deleted, another disk, a file system without links
            logger.info("the KL reference in %s cannot be shared and is written again: %s", stored, error)
            path.unlink(missing_ok=True)
        return None

    # ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, directory: Path) -> int:
        """Puts weights, optimizer, KL reference and policy version where they were; returns the jobs so far.

        On the same dtype, kind of device and number of threads, training on is then equal to the last digit; on others
        the values are moved and rounded. The learning rate and the other settings are the learner's own. Raises
        BackendError, and has changed nothing, for what is not a whole checkpoint of this architecture.
        """
        learner, model = self.learner, self.learner.policy.model
        manifest = _manifest(directory)
        targets = trained_tensors(model)
        weights = _weights(directory, manifest, model, self._frozen_sha256)
        tensors = _read(directory, OPTIMIZER, manifest)
        state = parameter_states(tensors, learner.trained, directory / OPTIMIZER)
        reference = self._read_reference(directory, manifest)
        if reference and learner.reference is None:
            learner.copy_reference()

        groups = learner.optimizer.state_dict()["param_groups"]  # ours: another learning rate may have been asked for
        # First, because it needs memory on the device; what follows does not.
        learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(weights[name])
            learner.trained.take_masters(tensors, weights)
            for name, target in all_tensors(learner.reference).items() if reference else ():
                target.copy_(reference[name])
        if reference:
            self._fingerprints.pop("reference", None)
            self._stored_reference = (directory / REFERENCE, manifest.files[REFERENCE])
        learner.moved = True
        if manifest.entropy is not None:
            learner.entropy_weight = EntropyWeight(**manifest.entropy.model_dump())
        elif learner.entropy_weight.entropy is not None:  # it goes back to before
            learner.entropy_weight = EntropyWeight(learner.config.entropy_coef)
        learner.policy.version = manifest.policy_version
        return manifest.jobs

    def _read_reference(self, directory: Path, manifest: Manifest) -> dict[str, Tensor]:
        """The reference's weights where they are in the file; {} where the learner's own is the right one already."""
        ours, theirs = self.learner.reference, manifest.reference
        if ours is None:
            if theirs is None or theirs.found == "by_model_name" or is_lora(self.learner.policy.model):
                return {}
            ours = self.learner.policy.model  # alike, and kl_coef may have been changed since, or be
        if theirs is None:
            logger.warning("%s was saved without KL; it is measured from the weights that were loaded first", directory)
            return {}
        if theirs.found == "in_file":
            weights = _read(directory, REFERENCE, manifest)
            check_like(weights, all_tensors(ours), directory / REFERENCE)
            return weights
        if manifest.dtype == dtype_name(ours) and theirs.sha256 != self._reference_sha256():
            at = f" at revision {theirs.revision}" if theirs.revision else ""
            raise BackendError(
                f"{directory / MANIFEST} measures KL from the initial weights of {_named(manifest)}{at}, but the "
                "model that is loaded now began with others. Load that model, or set kl_coef to 0."
            )
        return {}


def load_weights(policy: LocalPolicy, directory: Path) -> None:
    """Puts the weights of a checkpoint into a policy that nobody trains. Whoever calls holds `policy.exclusive`. Raises
    BackendError as `Checkpoints.load`."""
    manifest = _manifest(directory)
    weights = _weights(directory, manifest, policy.model, lambda: fingerprint(frozen_tensors(policy.model)))
    with torch.no_grad():
        for name, target in trained_tensors(policy.model).items():
            target.copy_(weights[name])
    policy.version = manifest.policy_version


def _weights(
    directory: Path, manifest: Manifest, model: Any, frozen_sha256: Callable[[], str | None]
) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, which fit the model. Raises BackendError for those of another one."""
    _check_architecture(manifest, model, directory)
    if manifest.dtype == dtype_name(model) and manifest.frozen_sha256 != frozen_sha256():
        raise BackendError(
            f"the weights that are not trained differ from those that {directory / MANIFEST} was saved with. Load "
            f"{_named(manifest)}, which the run began with."
        )
    weights = _read(directory, WEIGHTS, manifest)
    check_like(weights, trained_tensors(model), directory / WEIGHTS)
    return weights


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(path: Path, tensors: Mapping[str, Tensor], widen: bool = False) -> FileDigest:
    """widen: floating point tensors are written as float32 at least, which loses nothing."""
    on_cpu = {}
    for name, tensor in tensors.items():
        dtype = torch.promote_types(tensor.dtype, torch.float32) if widen and tensor.is_floating_point() else None
        on_cpu[name] = tensor.detach().to("cpu", dtype).contiguous()
    try:
        save_file(on_cpu, path)
    except safetensors.SafetensorError as error:  # so it reports a full disk, too
        raise OSError(f"{path}: {error}") from error
    return digest_of(path)


def _read(directory: Path, name: FileName, manifest: Manifest) -> dict[str, Tensor]:
    """Copies of the tensors, so that the file may go or change while they are in use."""
    path = plain_file(directory, name)
    expected = manifest.files.get(name)
    try:
        found = digest_of(path)
        if found != expected:
            raise BackendError(
                f"{path} is damaged or not of this checkpoint: {found.bytes} bytes with SHA-256 {found.sha256[:12]}…, "
                f"but {MANIFEST} says {f'{expected.bytes} bytes, {expected.sha256[:12]}…' if expected else 'nothing'}. "
                "Load another checkpoint."
            )
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, safetensors.SafetensorError) as error:
        raise BackendError(f"{path} cannot be read: {error}. Load another checkpoint.") from error


def _manifest(directory: Path) -> Manifest:
    path = plain_file(directory, MANIFEST)
    try:
        if path.stat().st_size > LONGEST_MANIFEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, ours at most {LONGEST_MANIFEST}")
        said = json.loads(path.read_bytes())
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version = said.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BackendError(
                f"{path} has format version {version}; this finetune_nb reads up to {FORMAT_VERSION}. Upgrade it."
            )
        return Manifest.model_validate(said)
    except ValidationError as error:
        wrong = "; ".join(f"{shortened('.'.join(map(str, e['loc'])))}: {e['msg']}" for e in error.errors()[:3])
        raise BackendError(f"{path} is not a checkpoint's manifest: {wrong}. Load another checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BackendError(f"{path} is not a checkpoint's manifest: {error}. Load another checkpoint.") from error


# ── what must agree ──────────────────────────────────────────────────────────────────────────────────────────────────


def _architecture(model: Any) -> dict[str, Any]:
    """The settings that decide what the weights compute, as JSON would give them back."""

    def relevant(settings: dict[str, Any]) -> dict[str, Any]:
        kept = {str(key): value for key, value in settings.items() if key not in NOT_ARCHITECTURE}
        return {key: relevant(value) if isinstance(value, dict) else value for key, value in kept.items()}

    inside = as_trained(model)
    settings = {"class": type(inside).__name__, **relevant(inside.config.to_diff_dict()), **settings_of(model)}
    return json.loads(json.dumps(settings, default=str))


def _check_architecture(manifest: Manifest, model: Any, directory: Path) -> None:
    """Where transformers differ, a setting counts only where both know it: its default may have been renamed."""
    theirs, ours = manifest.architecture, _architecture(model)
    same = manifest.transformers == transformers.__version__
    names = theirs.keys() | ours.keys() if same else theirs.keys() & ours.keys()
    differing = sorted(name for name in names if theirs.get(name) != ours.get(name))
    if "class" in differing:  # nothing else is worth reading then
        differing = ["class"]
    if differing:
        listed = "; ".join(
            f"{shortened(name)} is {shortened(theirs.get(name))} there, {shortened(ours.get(name))} here"
            for name in differing[:4]
        )
        raise BackendError(
            f"{directory / MANIFEST} is of another architecture than the model that is loaded: {listed}. "
            f"Load {_named(manifest)}, which it was saved from, or another checkpoint."
        )


def _named(manifest: Manifest) -> str:
    return "the model" if manifest.model is None else f"model {shortened(manifest.model)}"
