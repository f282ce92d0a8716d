"""Checkpoints of the local backend: going on is never having stopped, and nothing half is ever seen or loaded."""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local import checkpoint  # noqa: E402
from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.models import EMBEDDED  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import BackendError  # noqa: E402
from finetune_nb.store import durable as publishing  # noqa: E402
from finetune_nb.types import EpisodeItem, SamplingParams, Trajectory, TrajectoryCollection  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WEIGHTS, OPTIMIZER, REFERENCE = "weights.safetensors", "optimizer.safetensors", "reference.safetensors"


def adapter(model="embedded", model_seed=0, kind="llama", positions=128, **settings):
    """`model`: what a config names, or "random" for one that is handed over."""
    settings = {"learning_rate": 1e-2, "optimizer_steps": 3, **settings}
    if model != "random":
        return LocalGRPOAdapter(LocalGRPOConfig(model=str(model), **settings), 5, deterministic=True)
    policy = LocalPolicy(random_model(kind, positions, model_seed), byte_tokenizer(), deterministic=True)
    return LocalGRPOAdapter(LocalGRPOConfig(**settings), 5, deterministic=True, policy=policy)


async def job(adapter):
    """Samples a little, and trains on it."""
    policy, groups = adapter.policy, []
    for example in range(3):
        prompt, group = [3, 10, 20 + example], []
        for generation in range(4):
            sample = await policy.sample(prompt, SamplingParams(1.0, 3), seed=10 * example + generation)
            known = {"prompt_token_ids": prompt, "token_ids": sample.ids, "temperature": 1.0}
            turn = EpisodeItem(role="assistant", content="", logprobs=sample.logprobs, metadata=known)
            reward = sum(sample.ids) % 7 + generation / 8
            about = {"id": example, "policy_version": policy.version}
            group.append(Trajectory(episode=[turn], reward=reward, metadata=about))
        groups.append(group)
    status = await adapter.wait_until_complete(
        await adapter.submit(TrajectoryCollection(trajectories=groups, run_id="run"))
    )
    assert status.status == "completed" and status.metadata["metrics"]["optimizer_steps"] == 3
    return status.metadata["metrics"]


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def weights(adapter):
    return {name: p.detach().clone() for name, p in adapter.policy.model.named_parameters()}


def state(adapter):
    """All that loading may change, as comparable values."""
    learner = adapter.learner
    moments = {k: {n: v.tolist() for n, v in s.items()} for k, s in learner.optimizer.state_dict()["state"].items()}
    reference = {} if learner.reference is None else {n: p.tolist() for n, p in learner.reference.named_parameters()}
    return {n: w.tolist() for n, w in weights(adapter).items()}, moments, reference, adapter.policy.version


def leftovers(directory):
    return [path.name for path in directory.parent.iterdir() if path.name.startswith(f".{directory.name}")]


async def trained(**arguments):
    made = adapter(**arguments)
    await job(made)
    return made


def in_new_process(body, *arguments):
    """A process that runs `body` with this file's names; its output is a pipe."""
    script = f"import asyncio, sys\nfrom test_local_checkpoint import *\nasync def main():\n{body}\nasyncio.run(main())"
    path = os.pathsep.join([str(HERE), str(HERE.parent / "support"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def is_mapped(directory):
    return str(directory) in Path("/proc/self/maps").read_text()


def same_file(one, other):
    return os.path.samefile(one / REFERENCE, other / REFERENCE)


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


RUNS = {
    "embedded": dict(model="embedded"),
    "embedded-kl": dict(model="embedded", kl_coef=0.1),
    "llama-kl": dict(model="random", kl_coef=0.1),
    "gpt2": dict(model="random", kind="gpt2", weight_decay=0.1, micro_batch_tokens=16),
}


async def go_on(directory):
    """Each run from its first checkpoint to its second. A model that is handed over begins elsewhere: weights and KL
    reference can only come from the checkpoint."""
    for name, made in RUNS.items():
        a = adapter(**made, model_seed=9)
        await a.load_checkpoint(directory / name / "one")
        await job(a)
        await a.save_checkpoint(directory / name / "again")


@pytest.mark.slow
async def test_going_on_in_a_new_process_is_equal_to_never_having_stopped(tmp_path):
    for name, made in RUNS.items():
        straight = await trained(**made)
        await straight.save_checkpoint(tmp_path / name / "one")
        await job(straight)
        await straight.save_checkpoint(tmp_path / name / "two")
    process = in_new_process("    await go_on(Path(sys.argv[1]))", tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for name in RUNS:
        one, two, again = (content(tmp_path / name / which) for which in ("one", "two", "again"))
        assert two[WEIGHTS] != one[WEIGHTS]
        assert again.keys() == two.keys()
        assert [file for file in two if again[file] != two[file]] == []


@pytest.mark.slow
@pytest.mark.proof
async def test_loading_goes_back_within_one_process(tmp_path):
    a = await trained(model="random", kl_coef=0.1)
    await a.save_checkpoint(tmp_path / "one")
    one = state(a)
    first = await job(a)
    two = state(a)
    await a.load_checkpoint(tmp_path / "one")
    assert state(a) == one
    again = await job(a)
    assert state(a) == two and two[0] != one[0]
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


async def test_order_of_trajectories_goes_on_with_the_number_of_jobs(tmp_path):
    a = await trained(model="random")
    await a.save_checkpoint(tmp_path / "one")
    manifest = tmp_path / "one" / "manifest.json"
    assert json.loads(manifest.read_text())["jobs"] == 1
    ends = []
    for jobs in (1, 2):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "jobs": jobs}))
        await a.load_checkpoint(tmp_path / "one")
        await job(a)
        ends.append(state(a))
    assert ends[0] != ends[1]


async def test_checkpoint_before_any_training_has_no_optimizer_state(tmp_path):
    fresh = adapter(model="random")
    await fresh.save_checkpoint(tmp_path / "zero")
    assert load_file(tmp_path / "zero" / OPTIMIZER) == {}
    later = await trained(model="random", model_seed=9)
    await later.load_checkpoint(tmp_path / "zero")
    assert state(later) == state(fresh)
    assert later.policy.version == 0


async def test_saving_waits_for_the_jobs_that_were_submitted(tmp_path):
    a = adapter(model="random")
    running = asyncio.create_task(job(a))
    while not a._jobs:
        await asyncio.sleep(0)
    await a.save_checkpoint(tmp_path / "one")
    assert running.done() or all(j.ended.done() for j in a._jobs.values())
    said = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert (said["jobs"], said["policy_version"]) == (1, 1)
    await running


async def test_loading_is_refused_while_a_job_is_at_work(tmp_path):
    a = await trained(model="random")
    await a.save_checkpoint(tmp_path / "one")
    await job(a)
    with a.policy.exclusive.hold():
        nothing = TrajectoryCollection(trajectories=[], run_id="run")
        ref = await a.submit(nothing)
        with pytest.raises(BackendError, match=r"'\w+' is at work; expected none"):
            await a.load_checkpoint(tmp_path / "one")
    await a.wait_until_complete(ref)
    await a.load_checkpoint(tmp_path / "one")
    assert a.policy.version == 1


async def test_settings_stay_those_of_the_adapter_that_loads(tmp_path):
    a = await trained(model="random", learning_rate=1e-2)
    await a.save_checkpoint(tmp_path / "one")
    b = adapter(model="random", learning_rate=1e-4, loss="grpo")
    await b.load_checkpoint(tmp_path / "one")
    assert b.learner.optimizer.param_groups[0]["lr"] == 1e-4
    assert (await job(b))["learning_rate"] == 1e-4


async def test_loaded_state_does_not_depend_on_the_files_any_more(tmp_path):
    a = await trained(model="random", kl_coef=0.1)
    await a.save_checkpoint(tmp_path / "one")
    await a.load_checkpoint(tmp_path / "one")
    assert not is_mapped(tmp_path)  # else a file that shrinks would end the process
    shutil.rmtree(tmp_path / "one")
    await job(a)


# ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_bytes_returned_are_those_on_disk_and_weights_are_float32(tmp_path):
    a = await trained(model="random", dtype="auto", kl_coef=0.1)
    written = await a.save_checkpoint(tmp_path / "one")
    assert written == sum(map(len, content(tmp_path / "one").values()))
    assert {str(t.dtype) for t in load_file(tmp_path / "one" / WEIGHTS).values()} == {"torch.float32"}
    assert leftovers(tmp_path / "one") == []


async def test_reference_of_a_model_that_was_handed_over_is_stored_once_for_all_checkpoints(tmp_path):
    a = await trained(model="random", kl_coef=0.1)
    first = await a.save_checkpoint(tmp_path / "one")
    await job(a)
    second = await a.save_checkpoint(tmp_path / "two")
    size = (tmp_path / "one" / REFERENCE).stat().st_size
    assert abs(first - second - size) < 1000 < size
    assert same_file(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    b = adapter(model="random", model_seed=9, kl_coef=0.1)
    await b.load_checkpoint(tmp_path / "two")
    assert state(b) == state(a)
    await b.save_checkpoint(tmp_path / "three")  # goes on sharing what it was loaded from
    assert same_file(tmp_path / "two", tmp_path / "three")


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!")])
async def test_stored_reference_that_is_gone_or_damaged_is_written_anew(tmp_path, spoil):
    a = await trained(model="random", kl_coef=0.1)
    await a.save_checkpoint(tmp_path / "one")
    spoil(tmp_path / "one" / REFERENCE)
    await a.save_checkpoint(tmp_path / "two")
    b = adapter(model="random", model_seed=9, kl_coef=0.1)
    await b.load_checkpoint(tmp_path / "two")
    assert state(b) == state(a)


@pytest.mark.slow
@pytest.mark.proof
async def test_reference_of_the_embedded_model_is_found_by_name_and_that_of_a_directory_is_stored(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    for model, found in (("embedded", "by_model_name"), (tmp_path / "model", "in_file")):
        await (await trained(model=model, kl_coef=0.1)).save_checkpoint(tmp_path / "one")
        manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
        assert (manifest["reference"]["found"], manifest["model"]) == (found, str(model))
        assert (tmp_path / "one" / REFERENCE).exists() == (found == "in_file")


async def test_reference_that_the_model_name_no_longer_gives_is_an_error(tmp_path):
    a = await trained(model="embedded", kl_coef=0.1)
    await a.save_checkpoint(tmp_path / "one")
    other = adapter(model="embedded", kl_coef=0.1)
    with torch.no_grad():
        next(other.policy.model.parameters()).add_(1.0)  # another release's model
    other._learner = None
    before = state(other)
    with pytest.raises(BackendError, match="measures KL from the initial weights of model 'embedded'"):
        await other.load_checkpoint(tmp_path / "one")
    assert state(other) == before
    without = adapter(model="embedded")
    await without.load_checkpoint(tmp_path / "one")
    assert without.policy.version == 1


async def test_weights_that_are_not_trained_are_not_stored_but_must_be_the_same(tmp_path):
    def partly(model_seed):
        made = adapter(model="random", model_seed=model_seed)
        made._policy.model.model.embed_tokens.weight.requires_grad_(False)
        return made

    a = partly(0)
    await job(a)
    await a.save_checkpoint(tmp_path / "one")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "one" / WEIGHTS)
    b = partly(0)
    await b.load_checkpoint(tmp_path / "one")
    assert state(b) == state(a)
    with pytest.raises(BackendError, match="not trained differ"):
        await partly(9).load_checkpoint(tmp_path / "one")
    with pytest.raises(BackendError, match="does not fit|not trained differ"):
        await adapter(model="random").load_checkpoint(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.proof
async def test_checkpoint_moves_between_dtypes_rounded_where_it_must(tmp_path):
    narrow = await trained(model="embedded", dtype="bfloat16", kl_coef=0.1)
    await narrow.save_checkpoint(tmp_path / "narrow")
    wide = adapter(model="embedded", dtype="float32", kl_coef=0.1)
    await wide.load_checkpoint(tmp_path / "narrow")
    again = adapter(model="embedded", dtype="bfloat16", kl_coef=0.1)
    await again.load_checkpoint(tmp_path / "narrow")
    assert state(again) == state(narrow)
    for name, value in weights(wide).items():
        assert value.dtype == torch.float32 and torch.equal(value, weights(narrow)[name].float())
    await job(wide)  # the optimizer's state moved, too
    await wide.save_checkpoint(tmp_path / "wide")
    await again.load_checkpoint(tmp_path / "wide")
    for name, value in weights(again).items():
        assert torch.equal(value, weights(wide)[name].bfloat16())
    await job(again)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (dict(kind="gpt2"), "'class' is 'LlamaForCausalLM' there, 'GPT2LMHeadModel' here"),
        (dict(positions=64), "'max_position_embeddings' is 128 there, 64 here"),
    ],
)
async def test_checkpoint_of_another_architecture_is_refused_with_what_differs(other, reason, tmp_path):
    await (await trained(model="random")).save_checkpoint(tmp_path / "one")
    b = adapter(model="random", **other)
    before = state(b)
    with pytest.raises(BackendError, match=reason):
        await b.load_checkpoint(tmp_path / "one")
    assert state(b) == before


def manifest_with(**changes):
    def spoil(directory):
        path = directory / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def tensors_with(name, change):
    """A file with other tensors, and a manifest that vouches for it."""

    def spoil(directory):
        tensors = load_file(directory / name)
        change(tensors)
        save_file(tensors, directory / name)
        files = json.loads((directory / "manifest.json").read_text())["files"]
        manifest_with(files={**files, name: publishing.digest_of(directory / name).model_dump()})(directory)

    return spoil


def first(tensors, prefix=""):
    return next(name for name in sorted(tensors) if name.startswith(prefix))


def linked_outside(name):
    def spoil(directory):
        (directory / name).rename(directory.parent / "elsewhere")
        (directory / name).symlink_to(directory.parent / "elsewhere")

    return spoil


def vouched(name, data):
    def spoil(directory):
        (directory / name).write_bytes(data)
        files = json.loads((directory / "manifest.json").read_text())["files"]
        manifest_with(files={**files, name: publishing.digest_of(directory / name).model_dump()})(directory)

    return spoil


DAMAGE = {
    "no directory": (shutil.rmtree, "manifest.json cannot be read: No such file"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "not a checkpoint's manifest"),
    "foreign manifest": (lambda d: (d / "manifest.json").write_text('{"a": 1}'), "its format is not"),
    "deep manifest": (lambda d: (d / "manifest.json").write_text("[" * 100_000), "not a checkpoint's manifest"),
    "huge manifest": (lambda d: (d / "manifest.json").write_text(" " * 2_000_000), "2000000 bytes"),
    "binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\x00"), "not a checkpoint's manifest"),
    "newer format": (manifest_with(format_version=2), "format version 2; .* reads up to 1. Upgrade"),
    "negative jobs": (manifest_with(jobs=-1), "'jobs': .*greater than or equal to 0"),
    "jobs of another type": (manifest_with(jobs=True), "'jobs': .*valid integer"),
    "huge version": (manifest_with(policy_version=10**400), "policy_version"),
    "unknown key": (manifest_with(extra=1), "'extra': "),
    "path in the manifest": (manifest_with(files={"../elsewhere": {"bytes": 1, "sha256": ""}}), "files"),
    "unsealed file": (manifest_with(files={}), "weights.safetensors is damaged .* says nothing"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "weights.safetensors cannot be read"),
    "truncated weights": (lambda d: os.truncate(d / WEIGHTS, 1000), "weights.safetensors is damaged"),
    "flipped bit": (lambda d: flip(d / OPTIMIZER), "optimizer.safetensors is damaged"),
    "linked weights": (linked_outside(WEIGHTS), "weights.safetensors is a symbolic link"),
    "linked reference": (linked_outside(REFERENCE), "reference.safetensors is a symbolic link"),
    "linked manifest": (linked_outside("manifest.json"), "manifest.json is a symbolic link"),
    "directory for a file": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), "is not a file"),
    "no safetensors": (vouched(WEIGHTS, b"\x80\x04."), "weights.safetensors cannot be read"),
    "lying header": (vouched(WEIGHTS, b"\xff" * 7 + b"\x7f{}"), "weights.safetensors cannot be read"),
    "missing weight": (tensors_with(WEIGHTS, lambda t: t.pop(first(t))), "is missing there; expected float32"),
    "another weight": (tensors_with(WEIGHTS, lambda t: t.update(x=torch.zeros(1))), "expected missing"),
    "another shape": (tensors_with(WEIGHTS, lambda t: t.update({first(t): torch.zeros(3)})), r"float32 \[3\] there"),
    "whole numbers": (tensors_with(WEIGHTS, lambda t: t.update({first(t): t[first(t)].long()})), "int64"),
    "half a state": (tensors_with(OPTIMIZER, lambda t: t.pop(first(t, "exp_avg_sq"))), "'exp_avg_sq/.* is missing"),
    "another reference": (tensors_with(REFERENCE, lambda t: t.pop(first(t))), "reference.safetensors does not fit"),
    "negative steps": (
        tensors_with(OPTIMIZER, lambda t: t.update({first(t, "step"): torch.tensor(-1.0)})),
        "-1.0 optimizer steps",
    ),
    "no steps": (
        tensors_with(OPTIMIZER, lambda t: t.update({first(t, "step"): torch.tensor(float("nan"))})),
        "nan optimizer steps",
    ),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with all its files; not to be changed."""
    directory = tmp_path_factory.mktemp("whole") / "one"

    async def save():
        await (await trained(model="random", kl_coef=0.1)).save_checkpoint(directory)

    asyncio.run(save())
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damaged_or_foreign_checkpoint_is_refused_by_name_and_changes_nothing(damage, whole, tmp_path):
    spoil, reason = DAMAGE[damage]
    spoiled = shutil.copytree(whole, tmp_path / "spoiled")
    spoil(spoiled)
    b = adapter(model="random", model_seed=9, kl_coef=0.1)
    before = state(b)
    with pytest.raises(BackendError, match=reason) as raised:
        await b.load_checkpoint(spoiled)
    assert str(spoiled) in str(raised.value)
    assert state(b) == before
    await b.load_checkpoint(whole)
    assert state(b) != before


# ── crashes, full disks, names that are taken ────────────────────────────────────────────────────────────────────────


async def test_older_checkpoint_is_replaced_and_anything_else_is_not(tmp_path):
    a = await trained(model="random")
    await a.save_checkpoint(tmp_path / "one")
    old = content(tmp_path / "one")
    await job(a)
    await a.save_checkpoint(tmp_path / "one")
    assert content(tmp_path / "one")[WEIGHTS] != old[WEIGHTS]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    for name in ("notes", "file", "link"):
        with pytest.raises(BackendError, match="is not a checkpoint"):
            await a.save_checkpoint(tmp_path / name)
    assert (tmp_path / "notes" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "notes", "one"]


class FullDisk:
    """Wraps functions; of all their calls, number `at` fails."""

    def __init__(self, at):
        self.left = at

    def wrap(self, function):
        def wrapped(*arguments, **named):
            self.left -= 1
            if self.left == -1:
                raise OSError(28, "No space left on device", str(arguments[0]))
            return function(*arguments, **named)

        return wrapped


@pytest.mark.slow
@pytest.mark.proof
async def test_failure_of_any_call_that_writes_leaves_a_whole_checkpoint_and_can_be_repeated(tmp_path, monkeypatch):
    a, checked = await trained(model="random", kl_coef=0.1), adapter(model="random", model_seed=9, kl_coef=0.1)
    one = tmp_path / "one"
    await a.save_checkpoint(one)
    await job(a)
    refused = at = 0
    while True:
        before, disk = content(one), FullDisk(at)
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "link"), (Path, "rename"), (Path, "mkdir"), (Path, "open")):
                patch.setattr(owner, name, disk.wrap(getattr(owner, name)))
            patch.setattr(checkpoint, "save_file", disk.wrap(lambda tensors, path: save_file(tensors, path)))
            results = await asyncio.gather(a.save_checkpoint(one), return_exceptions=True)
        if isinstance(results[0], BackendError):
            refused += 1
            assert "No space left on device" in str(results[0]) and "Nothing of it is left" in str(results[0])
            assert content(one) == before
        else:
            await checked.load_checkpoint(one)
            assert state(checked) == state(a)
        assert leftovers(one) == []
        if disk.left >= 0:
            break
        at += 1
    assert refused >= 12 and results[0] > 0


async def test_full_disk_is_a_clear_error_and_leaves_nothing_half(tmp_path):
    """The system's limit on a file's size stands for the disk: writing truly fails, in the middle of a file."""
    a = await trained(model="random")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(BackendError, match=r"could not be written: .*weights\.safetensors: .*MB are free"):
            await a.save_checkpoint(tmp_path / "one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    await job(a)
    await a.save_checkpoint(tmp_path / "one")


async def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    a = await trained(model="random")
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="could not be written"):
        await a.save_checkpoint(tmp_path / "file" / "one")


WRITER = """
import sys
from itertools import count
from pathlib import Path
from finetune_nb.store.durable import atomic_directory
for n in count():
    with atomic_directory(Path(sys.argv[1]), "first") as unfinished:
        for name in ("first", "second", "third"):
            (unfinished / name).write_text(str(n) * 1000)
    if n == 3:
        print("ready", flush=True)
"""


@pytest.mark.slow
@pytest.mark.proof
def test_killed_at_any_moment_the_name_stands_for_a_whole_directory_or_for_nothing(tmp_path):
    whole = 0
    for moment in range(8):
        one = tmp_path / str(moment) / "one"
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(one)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.00137 * moment)
            process.kill()
        assert {path.name for path in one.parent.iterdir()} <= {"one", ".one.unfinished", ".one.replaced"}
        if one.exists():
            whole += 1
            assert sorted(content(one)) == ["first", "second", "third"]
            assert len(set(content(one).values())) == 1
        with publishing.atomic_directory(one, "first") as unfinished:
            (unfinished / "first").write_text("")
        assert [path.name for path in one.parent.iterdir()] == ["one"]  # what the crash left is gone
    assert whole


async def test_nothing_in_a_checkpoint_is_pickled(whole):
    assert sorted(content(whole)) == ["manifest.json", OPTIMIZER, REFERENCE, WEIGHTS]
    for name, data in content(whole).items():
        assert data.lstrip()[:1] == b"{" if name == "manifest.json" else data[8:9] == b"{"


# ── weights alone ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 2}}, {"kl_coef": 0.1}], ids=["all", "lora", "kl"])
async def test_the_weights_alone_are_those_of_the_checkpoint_and_make_no_optimizer(tmp_path, settings):
    first = await trained(**settings)
    await first.save_checkpoint(tmp_path / "one")
    other = adapter(**settings)
    await other.load_weights(tmp_path / "one")
    assert other.policy.version == 1 and other._learner is None
    for name, weight in weights(first).items():
        assert torch.equal(weights(other)[name], weight)


async def test_weights_that_are_damaged_or_of_another_model_are_refused_and_change_nothing(tmp_path):
    first = await trained()
    await first.save_checkpoint(tmp_path / "one")
    other = adapter("random")
    before = weights(other)
    with pytest.raises(BackendError, match="another architecture"):
        await other.load_weights(tmp_path / "one")
    (tmp_path / "one" / WEIGHTS).write_bytes(b"nothing")
    again = adapter()
    with pytest.raises(BackendError, match="damaged"):
        await again.load_weights(tmp_path / "one")
    assert all(torch.equal(weights(other)[name], weight) for name, weight in before.items())
    assert again.policy.version == 0
