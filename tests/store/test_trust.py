"""A run folder is this user's own by its signature, and nothing is read, written or deleted through a link in it."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_nb.errors import StoreError
from finetune_nb.store import trust
from finetune_nb.store.checkpoints import Checkpoints
from finetune_nb.store.durable import check_inside, check_tree, remove_inside
from finetune_nb.store.folder import checkpoint_folder, checkpoints
from finetune_nb.store.json import forget_epochs
from finetune_nb.store.runs import archive_run, delete_run
from finetune_nb.store.store import RunStore
from finetune_nb.store.trust import DATA_DIRECTORY, SIGNATURE, is_signed, sign

CONFIG = {"run": {"seed": 0}}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data directory of a user."""
    place = tmp_path / "data"
    monkeypatch.setenv(DATA_DIRECTORY, str(place))
    monkeypatch.setattr(trust, "_told", set())
    return place


@pytest.fixture
def folder(tmp_path, data):
    """A run that this user made."""
    place = tmp_path / "runs" / "run"
    RunStore.create(place, "run", CONFIG).close()
    return place


@pytest.fixture
def precious(tmp_path):
    """A directory outside, of which nothing may be lost."""
    place = tmp_path / "precious"
    for name in ("epoch-000000", "epoch-000001"):
        (place / name).mkdir(parents=True)
        (place / name / "weights").write_text("mine")
    return place


def is_own(folder):
    return RunStore.open(folder).config_and_owner()[1]


def contents(place):
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in place.rglob("*"))


# ── the signature ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_was_made_here_is_own_also_moved_copied_and_archived(folder, tmp_path):
    assert is_own(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert is_own(tmp_path / "copy")
    assert is_own(archive_run(folder))


def test_another_process_of_the_same_user_knows_the_signature(folder):
    code = "import sys; from finetune_nb.store.store import RunStore; print(RunStore.open(sys.argv[1]).config_and_owner()[1])"
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_another_users_run_is_not_own(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_DIRECTORY, str(tmp_path / "theirs"))
    assert not is_own(folder)


@pytest.mark.parametrize(
    "change", ["missing", "empty", "of another run", "of another config", "a link", "long", "no text"]
)
def test_a_wrong_signature_is_none(folder, tmp_path, change):
    path = folder / SIGNATURE
    RunStore.create(tmp_path / "other", "other", CONFIG).close()
    RunStore.create(tmp_path / "another" / "run", "run", {"run": {"seed": 1}}).close()
    good = path.read_bytes()
    path.unlink()
    if change == "empty":
        path.touch()
    elif change == "of another run":
        shutil.copyfile(tmp_path / "other" / SIGNATURE, path)
    elif change == "of another config":
        shutil.copyfile(tmp_path / "another" / "run" / SIGNATURE, path)
    elif change == "a link":
        (tmp_path / "kept").write_bytes(good)
        path.symlink_to(tmp_path / "kept")
    elif change == "long":
        path.write_bytes(good.strip() + b"0" * 1000)
    elif change == "no text":
        path.write_bytes(b"\xff" * 64)
    assert not is_own(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), byte=st.binary(min_size=1, max_size=1))
def test_any_edit_of_the_config_ends_the_signature(folder, place, byte):
    text = (folder / "config.yml").read_bytes()
    place %= len(text) + 1
    edited = text[:place] + byte + text[place:]
    assert is_signed(folder, "run", text)
    assert not is_signed(folder, "run", edited)
    assert not is_signed(folder, "run2", text)


def test_trusting_signs_the_config_that_was_read_and_no_later_one(folder):
    config = folder / "config.yml"
    config.write_text(config.read_text() + "# theirs\n")
    assert RunStore.open(folder).config_and_owner(trust=True)[1]
    assert is_own(folder)
    config.write_text(config.read_text() + "# theirs again\n")
    assert not is_own(folder)


def test_a_link_in_the_place_of_the_signature_is_not_written_through(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (folder / SIGNATURE).unlink()
    (folder / SIGNATURE).symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        sign(folder, "run", b"")
    assert RunStore.open(folder).config_and_owner(trust=True)[1]  # for this time
    assert outside.read_text() == "mine"
    assert not is_own(folder)


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_key_is_random_and_its_owner_alone_can_read_it(folder, data):
    (key,) = data.iterdir()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32 and len(set(key.read_bytes())) > 8
    key.chmod(0o644)
    assert is_own(folder)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_the_key_is_in_the_users_data_directory(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_DIRECTORY, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("HOME", str(tmp_path))
    RunStore.create(tmp_path / "run", "run", CONFIG).close()
    assert is_own(tmp_path / "run")
    assert len(list(tmp_path.rglob(trust.KEY))) == 1


def test_processes_that_start_at_once_agree_on_one_key(data, tmp_path):
    code = "import sys; from finetune_nb.store import trust; print(trust._key().hex())"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    keys = {process.communicate()[0].strip() for process in started}
    assert keys == {(data / trust.KEY).read_bytes().hex()}
    assert [path.name for path in data.iterdir()] == [trust.KEY]


@pytest.mark.parametrize("trouble", ["no directory", "a file in the way", "a key of another length", "no home"])
def test_without_a_place_for_the_key_this_process_knows_its_runs_and_says_once_that_the_next_will_not(
    data, tmp_path, monkeypatch, caplog, trouble
):
    if trouble == "no directory":
        monkeypatch.setenv(DATA_DIRECTORY, "/proc/nothing/here")
    elif trouble == "a file in the way":
        data.write_text("")
    elif trouble == "a key of another length":
        data.mkdir()
        (data / trust.KEY).write_bytes(b"short")
    else:
        for name in (DATA_DIRECTORY, "XDG_DATA_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user whom the system does not list
    for name in ("a", "b"):
        RunStore.create(tmp_path / name, name, CONFIG).close()
        assert is_own(tmp_path / name)
    told = [record for record in caplog.records if "trust=True" in record.getMessage()]
    assert len(told) == 1
    monkeypatch.setattr(trust, "_own_key", os.urandom(32))  # the next process
    assert not is_own(tmp_path / "a")


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["../x", "a/../../x", "link/x", "link", "a/link/x", "a/pipe"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, precious, path):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "link").symlink_to(precious)
    (folder / "a" / "link").symlink_to(precious)
    os.mkfifo(folder / "a" / "pipe")
    with pytest.raises(StoreError):
        check_inside(folder, folder / path)
    with pytest.raises(StoreError):
        check_inside(folder, Path("/etc/passwd"))
    with pytest.raises(StoreError, match="symbolic link"):
        check_tree(folder, folder / "a")
    check_inside(folder, folder / "a" / "new" / "file")


def test_a_link_is_deleted_itself_and_never_what_it_leads_to(tmp_path, precious):
    folder = tmp_path / "folder"
    (folder / "plain" / "deep").mkdir(parents=True)
    (folder / "plain" / "deep" / "link").symlink_to(precious)
    (folder / "link").symlink_to(precious)
    before = contents(precious)
    for path in ("link/epoch-000000", "../precious", ""):
        with pytest.raises(StoreError):
            remove_inside(folder, folder / path)
    for path in ("link", "plain", "nothing"):
        remove_inside(folder, folder / path)
    assert list(folder.iterdir()) == []
    assert contents(precious) == before


def test_a_folder_that_is_itself_reached_through_a_link_is_worked_in_as_ever(tmp_path):
    (tmp_path / "disk" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    folder = tmp_path / "runs" / "run"
    check_inside(folder, folder / "checkpoints")
    remove_inside(folder, folder / "checkpoints")
    assert list((tmp_path / "disk" / "run").iterdir()) == []


def test_checkpoints_behind_a_link_are_not_this_runs_and_are_not_pruned(folder, precious):
    before = contents(precious)
    with RunStore.open(folder, write=True) as store:
        kept = Checkpoints(store, every=1, keep=1)
        (folder / "checkpoints").symlink_to(precious)
        with pytest.raises(StoreError, match="symbolic link"):
            checkpoints(folder)
        kept.prune()
        with pytest.raises(StoreError, match="symbolic link"):
            Checkpoints(store, every=1, keep=1)
    assert contents(precious) == before


def test_a_single_checkpoint_that_is_a_link_costs_nothing_outside(folder, precious):
    before = contents(precious)
    (folder / "checkpoints").mkdir()
    for epoch in range(2):
        checkpoint_folder(folder, epoch).symlink_to(precious / f"epoch-{epoch:06d}")
    with RunStore.open(folder, write=True) as store:
        Checkpoints(store, every=1, keep=1).prune()
    assert contents(precious) == before


@pytest.mark.parametrize("work", [delete_run, lambda folder: archive_run(folder, checkpoints=False)])
def test_deleting_and_archiving_a_run_leave_what_its_links_lead_to(folder, precious, work):
    before = contents(precious)
    (folder / "checkpoints").symlink_to(precious)
    (folder / "anything").symlink_to(precious)
    work(folder)
    assert not folder.exists()
    assert contents(precious) == before


def test_a_log_that_is_a_link_is_neither_read_nor_rewritten(folder, tmp_path):
    outside = tmp_path / "outside.jsonl"
    outside.write_text('{"epoch": 3}\n')
    log = folder / "training_metrics.jsonl"
    log.symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        forget_epochs(log, 0)
    assert outside.read_text() == '{"epoch": 3}\n'
