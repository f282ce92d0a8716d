"""A rollout with the weights of an earlier epoch, loaded from its checkpoint beside those of the run."""

import os
import shutil

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.store.folder import checkpoints
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def differs(output):
    """A reward with a spread in nearly every group, so that every epoch trains."""
    return float(sum(map(ord, output)) % 7)


@pytest.fixture
def run(tmp_path):
    options = dict(generations=3, name="run", sampling={"max_tokens": 6}, deterministic=True)
    with_epochs = ft.Run(solve, differs, sums(3), output_dir=tmp_path, **options)
    for _ in range(2):
        ft.run_sync(with_epochs.next_epoch())
    yield with_epochs
    with_epochs.close()


def version(rollout):
    return rollout.metadata["policy_version"]


@pytest.mark.slow
def test_a_rollout_uses_the_weights_of_the_epoch_and_leaves_nothing_behind(run):
    before = sorted(os.listdir(run.folder.parent)), sorted(os.listdir(run.folder))
    assert [version(ft.run_sync(run.rollout("sum-1", epoch=epoch))) for epoch in (0, 1, -1)] == [1, 2, 2]
    assert version(ft.run_sync(run.rollout("sum-1"))) == 2
    assert (sorted(os.listdir(run.folder.parent)), sorted(os.listdir(run.folder))) == before
    assert len(run) == 2 and run.state == "ready"
    shutil.rmtree(checkpoints(run.folder)[0])
    with pytest.raises(RunError, match="weights after epoch 0.*not kept"):
        ft.run_sync(run.rollout("sum-1", epoch=0))
    with pytest.raises(IndexError):
        ft.run_sync(run.rollout("sum-1", epoch=5))


def test_a_component_that_was_given_as_an_object_cannot_be_loaded_again(tmp_path):
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: f"reply {seed % 7}"))
    run = ft.Run(solve, differs, sums(2), generations=3, output_dir=tmp_path, adapter=adapter)
    ft.run_sync(run.next_epoch())
    with pytest.raises((ConfigError, RunError), match="given as an object|not kept"):
        ft.run_sync(run.rollout("sum-1", epoch=0))
    run.close()
