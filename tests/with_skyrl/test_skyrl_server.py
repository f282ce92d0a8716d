"""The Tinker backend against SkyRL's server: it learns, what is recorded is exact, and it survives the death of either side."""

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from letters import letters_adapter, letters_run

from finetune_nb.backends.tinker.adapter import TinkerAdapter, TinkerConfig
from finetune_nb.backends.tinker.errors import Full
from finetune_nb.errors import BackendError
from finetune_nb.rollouts.episodes import SampledTurn
from finetune_nb.types import SamplingParams

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
EPOCHS = 8


@pytest.fixture
def make(server, model, tmp_path, closing):
    """Makes runs on the server; each is closed when the test is over."""

    def make(name="letters", adapter=None, **options):
        return closing(letters_run(server.url, model, tmp_path, name, adapter, **options))

    return make


@pytest.fixture(scope="session")
def learned(server, model, tmp_path_factory):
    """A run of some epochs, which is closed."""
    run = letters_run(server.url, model, tmp_path_factory.mktemp("runs"), "learned")
    run.start(EPOCHS)
    run.wait()
    yield run
    run.close()


def rewards(run):
    return run.epochs().mean_reward.tolist()


async def epochs(run, count):
    for _ in range(count):
        await run.next_epoch()
    return rewards(run)


def recorded(run, epoch):
    """Prompt, ids and log probabilities of each reply of an epoch."""
    for group in run[epoch].collection.trajectories:
        for trajectory in group:
            for item in trajectory.episode:
                turn = SampledTurn.of(item)
                if turn is not None:
                    yield turn.prompt_ids, turn.ids, turn.logprobs


def gaps(model, replies):
    """|log probability that the model gives - recorded|, of each token."""
    from finetune_nb.backends.local.scoring import score

    found = []
    for prompt, ids, logprobs in replies:
        (here,) = score(model, prompt, ids, (1.0,))
        found += np.abs(np.array(here) - np.array(logprobs)).tolist()
    return found


def test_it_learns_and_is_exact(learned):
    found = rewards(learned)
    print("mean reward:", " ".join(f"{reward:.3f}" for reward in found))
    assert np.mean(found[-2:]) > np.mean(found[:2]) + 0.05
    for record in learned.records:
        metrics = record.job.metadata["metrics"]
        assert metrics["logprob_gap"] < 1e-5
        assert metrics["importance_ratio"] == pytest.approx(1, abs=1e-5)
        assert np.isfinite(metrics["loss"])
        assert 3 < metrics["entropy"] < np.log(262)


async def test_a_fork_goes_on_as_the_run_did(learned, closing, server, model):
    branch = closing(learned.fork(epoch=3, adapter=letters_adapter(server.url, model)))
    await epochs(branch, 2)
    assert rewards(branch)[-2:] == rewards(learned)[4:6]


def _killed_after(checkpoints, url, model, folder):
    """Continues the run "killed" in a process of its own, which is killed once that many checkpoints are there."""
    command = [sys.executable, str(HERE / "letters.py"), url, str(model), str(folder), "killed", str(EPOCHS)]
    with (folder / "client.log").open("ab") as log:
        client = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    try:
        while len(list((folder / "killed" / "checkpoints").glob("epoch-*"))) < checkpoints:
            assert client.poll() is None and time.monotonic() < deadline, (folder / "client.log").read_text()
            time.sleep(0.05)
    finally:
        client.kill()
        client.wait()


async def test_a_client_that_is_killed_twice_goes_on_as_if_nothing_had_happened(learned, make, server, model, tmp_path):
    """Both slots are then held by the dead: they are unloaded."""
    for until in (1, 3):
        await asyncio.to_thread(_killed_after, until, server.url, model, tmp_path)
    began = time.monotonic()
    run = make("killed", resume="auto")
    await run.next_epoch()
    print(f"resumed and one epoch after {time.monotonic() - began:.1f} s")
    count = len(run)
    assert count < EPOCHS
    assert rewards(run) == rewards(learned)[:count]


async def test_the_adapter_comes_home(make, server, model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make()
    await epochs(run, 2)
    archives = server.archives()
    run.save_model(tmp_path / "adapter")
    run.save_model(tmp_path / "merged", merge=True)
    assert server.archives() == archives
    # What the third epoch records is sampled by the weights that were saved.
    await run.next_epoch()
    replies = list(recorded(run, 2))
    base = AutoModelForCausalLM.from_pretrained(model)
    assert max(gaps(base, replies)) > 0.1
    found = gaps(PeftModel.from_pretrained(base, tmp_path / "adapter"), replies)
    merged = gaps(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), replies)
    print(f"{len(found)} tokens: the adapter is off by {max(found):.2g} at most, the merged model by {max(merged):.2g}")
    assert max(found) < 1e-4
    assert max(merged) < 1e-4


async def test_what_is_saved_on_the_server_follows_the_run(make, server, model):
    before, archived = server.states(), server.archives()
    run = make("kept")
    run.config.run.keep_checkpoints = 1
    await epochs(run, 3)
    kept = set(server.states()) - set(before)
    assert len(kept) == 1
    assert len(set(server.archives()) - set(archived)) == 1
    branch = run.fork(epoch=2, adapter=letters_adapter(server.url, model))
    run.delete()
    assert set(server.states()) - set(before) == kept  # the branch begins there
    branch.delete()
    assert server.states() == before
    assert server.archives() == archived


async def test_a_server_that_dies_in_the_middle_of_an_epoch_is_waited_for(learned, make, server):
    run = make("restarted", {"retries": 30, "retry_delay": 0.5})
    await run.next_epoch()

    def restart():
        time.sleep(0.5)
        server.kill()
        server.start()

    await asyncio.gather(run.next_epoch(), asyncio.to_thread(restart))
    await run.next_epoch()
    assert not run[1].collection.failures
    assert rewards(run) == rewards(learned)[:3]


async def test_no_reply_is_sampled_between_two_steps_of_a_job(make):
    run = make("turns", {"optimizer_steps": 8})
    await run.next_epoch()
    adapter = run._driver.adapter
    policy, prompt = adapter.policy, adapter.policy.render([{"role": "user", "content": "letter 0?"}])
    assert policy.version == 1

    async def ask(seed):
        sample = await policy.sample(prompt, SamplingParams(1.0, 8), seed)
        return policy.version, seed, sample

    second = asyncio.ensure_future(run.next_epoch())
    found = []
    while not second.done():
        found.append(await ask(len(found)))
        await asyncio.sleep(0.05)
    after = [(seed, sample) for version, seed, sample in found if version == 2]
    await second
    for seed, sample in after:
        _, _, again = await ask(seed)
        assert again.ids == sample.ids
        np.testing.assert_allclose(again.logprobs, sample.logprobs, atol=1e-5)


async def test_a_slot_is_waited_for_and_the_hint_is_told(make, server, model):
    async def held():
        config = TinkerConfig(model=str(model), base_url=server.url, rank=8, slot_timeout=0)
        adapter = TinkerAdapter(config)
        await adapter.policy.sample([3, 10, 4], SamplingParams(1.0, 1), 0)
        return adapter

    adapters = [await held(), await held()]
    try:
        with pytest.raises(Full, match="Slots are held by other runs"):
            await held()
        waiting = make("waiting", {"slot_timeout": 120})
        first = asyncio.ensure_future(waiting.next_epoch())
        await asyncio.sleep(6)
        assert not first.done()
        await adapters.pop().aclose()
        await first
    finally:
        for adapter in adapters:
            await adapter.aclose()


async def test_states_that_are_gone_are_told_at_once_and_once(make, server, tmp_path):
    run = make("lost")
    await epochs(run, 2)
    run.close()
    for state in (server.folder / "checkpoints").glob("*/epoch-*"):
        state.rename(state.with_name(f"gone-{state.name}"))
    server.kill()
    (server.folder / "tinker.db").rename(server.folder / "tinker.old")
    for leftover in server.folder.glob("tinker.db-*"):
        leftover.unlink()
    server.start()
    asked = len(re.findall("load_weights", server.log()))
    again = make("lost", resume="auto")
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(BackendError, match="no longer has what that checkpoint names"):
            await again.next_epoch()
    print(f"told twice after {time.monotonic() - began:.1f} s")
    assert len(re.findall("load_weights", server.log())) - asked <= 2
