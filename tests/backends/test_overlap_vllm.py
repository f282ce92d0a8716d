# ruff: noqa: F811
"""A vLLM server that samples one version of the weights while the next one is trained."""

import asyncio
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("aiohttp")

from test_vllm import DRAWN, PROMPT, changed, here, loads, make, model, sample, server, shared  # noqa: E402, F401
from tiny_models import byte_tokenizer  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError  # noqa: E402
from finetune_nb.types import ReplyFormat, SamplingParams  # noqa: E402


async def of_version(adapter, version, seed=1):
    return await adapter.policy.sample(PROMPT, DRAWN, seed, version=version)


def overlapping(make, **settings):
    return make(fresh=True, max_staleness=1, **settings)


@pytest.fixture
def busy():
    """Takes a policy's weights away from everybody else, as a job does, until the test is over."""
    ended, threads = threading.Event(), []

    def take(policy):
        taken = threading.Event()

        def hold():
            with policy.exclusive.hold():
                taken.set()
                ended.wait(30)

        threads.append(threading.Thread(target=hold))
        threads[-1].start()
        taken.wait(10)
        return ended

    yield take
    ended.set()
    for thread in threads:
        thread.join()


async def test_the_kept_version_and_the_newest_one_are_sampled(make):
    adapter = overlapping(make)
    changed(adapter.policy)
    version = await adapter.keep_sampling()
    assert version == adapter.policy.version
    before = await of_version(adapter, version)
    assert before.logprobs == pytest.approx(here(adapter.policy, before.ids), abs=1e-5)
    changed(adapter.policy)  # a job has ended
    assert await of_version(adapter, version) == before
    newest = await sample(adapter)
    assert newest.logprobs == pytest.approx(here(adapter.policy, newest.ids), abs=1e-5)
    assert newest.logprobs != pytest.approx(before.logprobs, abs=1e-3)
    assert await of_version(adapter, version) == before


async def test_the_kept_version_is_sampled_while_a_job_has_the_weights(make, busy):
    adapter = overlapping(make)
    version = await adapter.keep_sampling()
    busy(adapter.policy)
    replies = await asyncio.wait_for(asyncio.gather(*(of_version(adapter, version, seed) for seed in range(4))), 10)
    assert len({tuple(reply.ids) for reply in replies}) > 1


async def test_one_version_is_kept_and_older_ones_go(make, server):
    adapter = overlapping(make)
    for _ in range(5):
        await adapter.keep_sampling()
        await of_version(adapter, adapter.policy.version)
        changed(adapter.policy)
    await sample(adapter)
    assert len(loads(server)) == 6 and len(server.adapters) == 2
    assert not server.dead
    with pytest.raises(
        BackendError, match="replies of policy version 1 are asked for, and the vLLM server keeps version 4"
    ):
        await of_version(adapter, 1)


async def test_a_kept_version_that_the_server_has_lost_is_loaded_again(make, server):
    adapter = overlapping(make)
    changed(adapter.policy)
    version = await adapter.keep_sampling()
    before = await of_version(adapter, version)
    changed(adapter.policy)
    server.forget()
    assert await of_version(adapter, version) == before
    assert (await sample(adapter)).logprobs != before.logprobs
    server.stop()
    server.forget()
    server.start()
    again = await asyncio.gather(*(of_version(adapter, version) for _ in range(4)))
    assert all(reply == before for reply in again)


async def test_a_reply_that_is_held_to_a_form_is_refused_while_a_job_trains(make):
    adapter = overlapping(make)
    version = await adapter.keep_sampling()
    held = SamplingParams(reply_format=ReplyFormat(schema='{"type": "object"}'), max_tokens=4)
    with pytest.raises(ConfigError, match="Set max_staleness to 0, or leave the form out"):
        await adapter.policy.sample(PROMPT, held, 1, version=version)


async def test_weights_of_this_process_have_no_kept_version(make):
    with pytest.raises(ConfigError, match="holds one set of full weights"):
        await make(whole=True).keep_sampling()
    alone = LocalGRPOAdapter(LocalGRPOConfig())
    with pytest.raises(ConfigError, match="samples from the very weights that it trains"):
        await alone.keep_sampling()
    with pytest.raises(BackendError, match="this process samples the newest weights alone"):
        await of_version(alone, 0)


@pytest.mark.slow
@pytest.mark.proof
async def test_run_trains_each_epoch_on_what_the_version_before_sampled(server, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    server.seconds = 0.01

    async def ask(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    async with ft.Run(
        ask,
        lambda output: float(sum(map(ord, output)) % 97),
        [{"question": "one"}, {"question": "two"}],
        model=str(tmp_path / "model"),
        training={"lora": {"rank": 4}, "learning_rate": 0.01, "max_staleness": 1},
        sampler=server.url,
        sampling={"max_tokens": 4},
        generations=4,
        output_dir=tmp_path,
    ) as run:
        run.start(4)
        await run.wait_async()
        assert run.epochs().version_lag.tolist() == [0, 1, 1, 1]
        # The first epoch's tokens are of the weights that it trains, those of the others are not.
        gaps = run.epochs().train_logprob_gap.tolist()
        assert gaps[0] < 1e-4 and min(gaps[1:]) > 1e-3
        for epoch in (2, 3):
            trajectory = run.show(epoch=epoch).trajectory
            (sampled_by,) = run.token_changes(trajectory, epoch=epoch - 2)  # the weights after that epoch
            (trained,) = run.token_changes(trajectory, epoch=epoch - 1)
            assert max(map(abs, sampled_by)) < 1e-4 < max(map(abs, trained))
        assert "logprob_gap" not in [finding.kind for finding in run.diagnose()]
