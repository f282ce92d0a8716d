"""Checkpoints that only name what a service keeps: that is deleted with them."""

import pytest
from detached import Weights
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.config.base import TrainerAdapterConfig
from finetune_nb.errors import BackendError, StoreError
from finetune_nb.store.store import RunStore
from finetune_nb.testing import sums


class ElsewhereConfig(TrainerAdapterConfig, name="saves_elsewhere"):
    """Of an adapter whose checkpoints are names."""

    saves_elsewhere = True


class Elsewhere(Weights):
    """Notes what it is asked to forget; while it is `away`, it cannot."""

    def __init__(self):
        super().__init__()
        self.adapter_config = ElsewhereConfig()
        self.forgotten, self.away = [], False

    def forget_checkpoints(self, directories):
        if self.away:
            raise BackendError("nobody answers")
        assert all((directory / "version").exists() for directory in directories)  # not deleted before
        self.forgotten += [directory.name for directory in directories]


@pytest.fixture
def adapter():
    return Elsewhere()


@pytest.fixture
async def run(tmp_path, closing, adapter):
    run = closing(ft.Run(guess, right, sums(6), adapter=adapter, generations=4, output_dir=tmp_path, name="run"))
    run.config.run.keep_checkpoints = 1
    await run.next_epoch()
    await run.next_epoch()
    return run


async def test_what_an_old_checkpoint_names_goes_with_it_or_stays_with_it(run, adapter, caplog):
    assert adapter.forgotten == ["epoch-000000"]
    adapter.away = True
    await run.next_epoch()
    assert "no checkpoint was deleted" in caplog.text
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["epoch-000001", "epoch-000002"]
    adapter.away = False
    await run.next_epoch()
    assert adapter.forgotten == ["epoch-000000", "epoch-000001", "epoch-000002"]
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["epoch-000003"]


@pytest.mark.parametrize("end", [lambda run: run.delete(), lambda run: run.archive(checkpoints=False)])
async def test_a_run_that_is_deleted_takes_it_along(run, adapter, end):
    end(run)
    assert adapter.forgotten == ["epoch-000000", "epoch-000001"]


async def test_a_run_that_another_writes_keeps_it(run, adapter):
    run.close()
    with RunStore.open(run.folder, write=True), pytest.raises(StoreError):
        run.delete()
    assert adapter.forgotten == ["epoch-000000"]
    run.archive()
    assert adapter.forgotten == ["epoch-000000"]


async def test_a_run_is_deleted_although_nobody_answers_and_the_log_says_so(run, adapter, caplog):
    adapter.away = True
    run.delete()
    assert not run.folder.exists()
    assert "stays on the service: nobody answers" in caplog.text
