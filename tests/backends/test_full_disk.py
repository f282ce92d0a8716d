"""A disk that is full while a model, a checkpoint or a report is written: an error of ours, and no target that is torn."""

from __future__ import annotations

import contextlib
import os
import random

import pytest

torch = pytest.importorskip("torch")
resource = pytest.importorskip("resource")


import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.art.adapter import OpenPipeArtAdapter, OpenPipeArtConfig  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.trl.job import TRLJob  # noqa: E402
from finetune_nb.errors import BackendError, StoreError  # noqa: E402
from finetune_nb.store.durable import model_directory  # noqa: E402
from finetune_nb.testing import FakeAdapter, sums  # noqa: E402


@contextlib.contextmanager
def full_after(count):
    """Within, no file gets longer than that many bytes."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def policy():
    return LocalPolicy.load("embedded", threads=1)


@pytest.mark.parametrize("count", [0, 100, 3_000, 20_000])
@pytest.mark.parametrize("kind", ["new", "empty", "older"])
def test_a_model_that_does_not_fit_leaves_the_target_as_it_was(policy, tmp_path, kind, count):
    target = tmp_path / "model"
    if kind == "empty":
        target.mkdir()
    if kind == "older":
        policy.save(target)
        (target / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with full_after(count), pytest.raises(BackendError, match="could not be written.*Make room"):
        policy.save(target)
    assert contents(tmp_path) == before
    assert target.exists() == (kind != "new") and len(list(tmp_path.iterdir())) == (kind != "new")


def test_a_model_is_saved_over_an_older_one_and_other_files_stay(policy, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (target / name).write_text("older")
    policy.save(target)
    assert (target / "notes.txt").read_text() == "mine"
    assert not list(target.glob("model-0*")) and not list(target.glob("*.index.json"))
    again = LocalPolicy.load(str(target), threads=1).model.state_dict()
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_weights_in_one_file_are_not_read_in_place_of_new_ones_in_several(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("older")
    with model_directory(tmp_path / "model") as unfinished:
        (unfinished / "model-00001-of-00001.safetensors").write_text("new")
        (unfinished / "extra").mkdir()
        (unfinished / "extra" / "template.jinja").write_text("new")
    assert set(contents(tmp_path / "model")) == {"model-00001-of-00001.safetensors", "extra/template.jinja"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("rust: No space"), ValueError("odd")]
)
def test_whatever_a_library_raises_while_it_writes_is_one_error_of_ours(tmp_path, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("older")

    def write(directory):
        with model_directory(directory) as unfinished:
            (unfinished / "config.json").write_text("half")
            raise error

    with pytest.raises(BackendError, match="could not be written"):
        write(tmp_path / "model")
    assert contents(tmp_path) == {"model/config.json": b"older"}


def test_what_a_crash_left_of_an_earlier_model_is_removed_by_the_next_one(tmp_path):
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "config.json").write_text("half")
    with model_directory(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("new")
    assert contents(tmp_path) == {"model/weights": b"new"}


def test_a_file_or_a_dangling_link_in_the_models_place_is_refused_and_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(BackendError, match="could not be written"), model_directory(tmp_path / name) as unfinished:
            (unfinished / "weights").write_text("new")
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


async def test_the_copy_of_arts_checkpoint_is_whole_or_not_there(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text("{}")
    (checkpoint / "adapter_model.safetensors").write_bytes(bytes(50_000))
    adapter = OpenPipeArtAdapter(OpenPipeArtConfig(base_model="any"), backend=object())
    adapter._checkpoint = str(checkpoint)
    with full_after(20_000), pytest.raises(BackendError, match="Make room"):
        await adapter.save(str(tmp_path / "copy"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    await adapter.save(str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(checkpoint)


@pytest.mark.parametrize("count", [10, 20_000])
def test_a_trl_job_that_does_not_fit_leaves_nothing(policy, tmp_path, count):
    job = TRLJob("run", "trl_sft", tmp_path / "trl", policy, 1)
    with full_after(count), pytest.raises(BackendError, match="Nothing was trained"):
        job.write({"threads": 1}, [{"messages": "?" * 100}])
    assert not contents(tmp_path)


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = ft.Run(solve, lambda item: random.random(), sums(3), output_dir=folder, name="run", adapter=FakeAdapter())
    ft.run_sync(run.next_epoch())
    yield run
    run.close()


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("name", ["r.html", "r.csv", "r.parquet", "r.jsonl", "r.yaml"])
@pytest.mark.parametrize("older", [False, True])
def test_a_report_that_does_not_fit_is_an_error_and_an_older_one_stays(run, tmp_path, name, older):
    path = tmp_path / name
    if older:
        path.write_text("older")
    if name == "r.yaml":
        run.live["llm.temperature"] = 0.5
    with full_after(10), pytest.raises(StoreError, match="could not be written.*Make room"):
        run.export(path)
    assert contents(tmp_path) == ({name: b"older"} if older else {})


def test_a_report_where_no_folder_can_be_made_is_an_error_of_ours(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        run.export(tmp_path / "file" / "inside" / "r.html")


def test_what_an_adapter_of_ones_own_says_of_a_full_disk_is_an_error_of_ours(tmp_path):
    class Full(FakeAdapter):
        def save(self, directory):
            raise OSError(28, os.strerror(28), directory)

    run = ft.Run(solve, lambda item: 1.0, sums(2), output_dir=tmp_path, adapter=Full())
    try:
        with pytest.raises(BackendError, match="No space left on device.*Make room"):
            run.save_model(tmp_path / "model")
    finally:
        run.close()
