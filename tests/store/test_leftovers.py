"""What a process that died has left in run folders is swept; what looks like it, and is not, stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from finetune_nb.store import folder as folders
from finetune_nb.store.durable import machine_id
from finetune_nb.store.folder import name_to_delete, process_lives, remove_leftovers
from finetune_nb.store.runs import delete_run, runs
from finetune_nb.store.store import RunStore

ANOTHER = "0" * 8
"""The id of another machine."""


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def whose(pid, machine=None):
    """A process as the names of leftovers have it."""
    return f"{pid}-{machine or machine_id()}"


def make(path, old=False):
    """A folder with a file in it, or a file where the name has a suffix of one."""
    if ".tmp-" in path.name:
        path.write_bytes(b"half")
    else:
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"half")
    if old:
        then = time.time() - 2 * folders.STALE
        os.utime(path, (then, then))
    return path


@pytest.fixture
def run(tmp_path):
    """A run's folder that nobody writes."""
    RunStore.create(tmp_path / "run", "run", {}).close()
    (tmp_path / "run" / "checkpoints").mkdir()
    return tmp_path / "run"


def opened(run):
    RunStore.open(run, write=True).close()


def test_leftovers_of_dead_processes_are_swept_when_a_run_is_opened_to_be_written(run):
    dead = whose(dead_process())
    left = [
        make(run / f".report.html.tmp-{dead}"),
        make(run / f".config.yml.tmp-{whose(os.getpid())}"),  # the lock says that no writer is at work
        make(run / "trajectories" / f".epoch-000001.parquet.tmp-{dead}"),
        make(run / "checkpoints" / ".epoch-000003.unfinished"),
        make(run.parent / f".deleted-other-pid{dead}-ab12"),
        make(run.parent / ".deleted-older-release-ab12", old=True),
        make(run.parent / f".deleted-of-another-host-pid{whose(os.getpid(), ANOTHER)}-ab12", old=True),
        make(run.parent / f".all.parquet.tmp-{whose(os.getpid(), ANOTHER)}", old=True),
        make(run.parent / f".report.html.tmp-{dead}"),
        make(run.parent / "archive" / ".run-until-7", old=True),
    ]
    opened(run)
    assert not [path for path in left if path.exists()]


def test_leftovers_are_swept_when_a_new_run_is_made(tmp_path):
    left = make(tmp_path / f".deleted-other-pid{whose(dead_process())}-ab12")
    RunStore.create(tmp_path / "new", "new", {}).close()
    assert not left.exists()


def test_what_is_in_progress_or_not_ours_stays(run):
    kept = [
        make(run / f".report.html.tmp-{whose(os.getpid())}"),
        make(run.parent / f".deleted-other-pid{whose(os.getpid())}-ab12"),
        make(run.parent / ".deleted-other-ab12"),
        make(run.parent / "archive" / ".run-until-7"),
        make(run.parent / ".deleted-photos", old=True),
        make(run.parent / "deleted-photos-ab12", old=True),
        make(run.parent / ".tmp-files", old=True),
        make(run.parent / ".cache", old=True),
        make(run / "checkpoints" / ".mine.unfinished", old=True),
        make(run / "checkpoints" / "epoch-000003"),
    ]
    opened(run)
    assert not [path for path in kept if not path.exists()]


def test_a_process_of_another_host_is_not_dead_because_its_id_is_not_in_use_here(run):
    dead = dead_process()
    kept = [
        make(run / f".report.html.tmp-{whose(dead, ANOTHER)}"),
        make(run.parent / f".all.parquet.tmp-{whose(dead, ANOTHER)}"),
        make(run.parent / f".deleted-other-pid{whose(dead, ANOTHER)}-ab12"),
        # Older releases did not say on which host.
        make(run.parent / f".all.parquet.tmp-{dead}"),
        make(run.parent / f".deleted-other-pid{dead}-ab12"),
    ]
    opened(run)
    assert not [path for path in kept if not path.exists()]


def test_a_checkpoint_that_was_moved_aside_and_not_replaced_gets_its_name_back(run):
    aside = make(run / "checkpoints" / ".epoch-000003.replaced")
    make(run / "checkpoints" / "epoch-000004")
    replaced = make(run / "checkpoints" / ".epoch-000004.replaced")
    opened(run)
    assert (run / "checkpoints" / "epoch-000003" / "weights").read_bytes() == b"half"
    assert not aside.exists() and not replaced.exists()


def test_no_link_is_followed(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    dead = whose(dead_process())
    (elsewhere / "precious").write_text("kept")
    make(elsewhere / ".epoch-000003.unfinished", old=True)
    make(elsewhere / ".run-until-7", old=True)
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(elsewhere)
    (run.parent / "archive").symlink_to(elsewhere)
    (run.parent / f".deleted-other-pid{dead}-ab12").symlink_to(elsewhere)
    (run.parent / f".report.html.tmp-{dead}").symlink_to(elsewhere / "precious")
    inside = make(run.parent / f".deleted-inner-pid{dead}-ab12")
    (inside / "link").symlink_to(elsewhere)
    opened(run)
    assert not inside.exists()
    assert {path.name for path in elsewhere.iterdir()} == {"precious", ".epoch-000003.unfinished", ".run-until-7"}
    assert (run.parent / f".deleted-other-pid{dead}-ab12").is_symlink()


def test_listing_runs_changes_nothing(run):
    left = make(run.parent / f".deleted-other-pid{whose(dead_process())}-ab12")
    assert runs(run.parent).run.tolist() == ["run"]
    assert left.exists()


def test_a_deletion_that_a_kill_broke_off_is_finished_by_the_next_writer(run):
    RunStore.create(run.parent / "gone", "gone", {}).close()
    code = (
        "import os, sys, shutil\nfrom pathlib import Path\nfrom finetune_nb.store import runs\n"
        "shutil.rmtree = lambda *args, **options: os._exit(9)\nruns.delete_run(Path(sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(run.parent / "gone")], timeout=60)
    assert killed.returncode == 9
    assert [path.name for path in run.parent.glob(".deleted-gone-*")]
    opened(run)
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def test_a_run_is_deleted_whole(run):
    delete_run(run)
    assert not list(run.parent.iterdir())


def test_the_hidden_name_says_whose_it_is(tmp_path):
    name = name_to_delete(tmp_path / "run").name
    assert name.startswith(f".deleted-run-pid{whose(os.getpid())}-")
    assert process_lives(os.getpid()) and not process_lives(dead_process())


def test_a_directory_that_is_not_there_is_no_trouble(tmp_path):
    remove_leftovers(tmp_path / "nowhere")
