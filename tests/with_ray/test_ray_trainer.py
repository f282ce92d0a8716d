"""The trainer in an actor of the cluster: it trains as in the kernel, and outlives a kernel that is killed."""

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import finetune_nb as ft
from finetune_nb.backends.local.config import LocalGRPOConfig
from finetune_nb.backends.ray.trainer_adapter import RayTrainerAdapter
from finetune_nb.backends.ray.trainer_link import actor_name
from finetune_nb.components.builder import Builder
from finetune_nb.examples import calculator
from finetune_nb.store.store import RunStore
from finetune_nb.types import EpisodeItem, SamplingParams, Trajectory, TrajectoryCollection

pytestmark = pytest.mark.slow

EPOCHS = 3
KERNEL = Path(__file__).with_name("killed_kernel.py")


def actors():
    import ray

    return [named["name"] for named in ray.util.list_named_actors(all_namespaces=True)]


async def no_actor_left():
    for _ in range(100):
        if not actors():
            return True
        await asyncio.sleep(0.1)
    return False


def pid_of(folder):
    import ray

    return ray.get(ray.get_actor(actor_name(folder), "finetune_nb").pid.remote())


def killed(folder, ray, until):
    """The exit code of a kernel that was working in `folder` until then."""
    address = ray.get_runtime_context().gcs_address
    return subprocess.run([sys.executable, KERNEL, folder, address, until], timeout=300).returncode


def sampled(epoch):
    found = [(t.metadata["id"], t.metadata["generation"], t.reward) for g in epoch.collection.trajectories for t in g]
    return sorted(found)


@pytest.mark.proof
async def test_it_trains_as_in_the_kernel_and_workers_sample_its_weights(ray, tmp_path, closing, capsys):
    overrides = {"run__deterministic": False, "finetuning__run_configuration__validation_dataset": None}
    here = closing(ft.Run.from_config(calculator.CONFIG, finetuning__output_dir=tmp_path / "here", **overrides))
    overrides |= {"run__engine": "ray", "run__ray": {"workers": 1, "trainer": True}}
    there = closing(ft.Run.from_config(calculator.CONFIG, finetuning__output_dir=tmp_path / "there", **overrides))
    cpu = []
    for _ in range(EPOCHS):
        await here.next_epoch()
        started = time.process_time()
        await there.next_epoch()
        cpu.append(time.process_time() - started)
    means = [statistics.mean(epoch.metrics.mean_reward for epoch in run) for run in (here, there)]
    with capsys.disabled():
        print(f"\nmean reward of {EPOCHS} epochs: {means[0]:.3f} in the kernel, {means[1]:.3f} in an actor")
        print(f"the kernel's CPU for an epoch with its trainer in an actor: {statistics.median(cpu):.2f} s")
        for run in (here, there):
            print([{part: round(seconds, 2) for part, seconds in epoch.seconds.items()} for epoch in run])
    assert abs(means[0] - means[1]) < 3 * 0.5 * 2**0.5 / (40 * 8 * EPOCHS) ** 0.5  # standard errors of the difference
    for epoch in there:
        versions = {t.metadata["policy_version"] for group in epoch.collection.trajectories for t in group}
        assert versions == {epoch.index}
        assert epoch.policy_versions == (epoch.index, epoch.index + 1)
        assert epoch.train_metrics["logprob_gap"] < 1e-4
        assert not epoch.collection.failures
    assert "in an actor of the Ray cluster" in there._driver.policy_told
    assert (await there.chat("what is 3 + 4 ?")).finish_reason == "stop"
    assert (there.save_model(tmp_path / "model") / "config.json").is_file()
    assert actors() == [actor_name(there.folder)]
    there.close()
    assert await no_actor_left()


async def rollouts(policy):
    """Two groups, in which a reply is right or wrong by chance."""

    async def one(example, generation):
        prompt = policy.render([{"role": "user", "content": f"what is {example} + 4 ?"}])
        sample = await policy.sample(prompt, SamplingParams(1.0, 8), seed=100 * example + generation)
        metadata = {"prompt_token_ids": prompt, "token_ids": sample.ids, "temperature": 1.0}
        turn = EpisodeItem(role="assistant", content="", logprobs=sample.logprobs, metadata=metadata)
        about = {"id": example, "policy_version": policy.version}
        return Trajectory(episode=[turn], reward=float(generation % 2), metadata=about)

    groups = [await asyncio.gather(*(one(example, generation) for generation in range(4))) for example in (1, 2)]
    return TrajectoryCollection(trajectories=groups, run_id="run")


async def test_it_answers_while_it_trains_and_is_canceled_between_steps(ray, tmp_path, capsys, monkeypatch):
    section = {"_type": "local_grpo", "lora": {"rank": 2}, "inner_epochs": 5000}
    run = {"engine": "ray", "ray": {"trainer": True}}
    config = ft.load_config({"run": run, "trainer_adapters": {"mine": section}})
    async with Builder(config) as builder:
        adapter = await builder.get_trainer_adapter("mine")
        monkeypatch.chdir(tmp_path)  # the same path is another folder in each process
        with pytest.raises(ft.BackendError, match="the trainer's actor does not see /proc/self/cwd, where checkpoints"):
            await adapter.initialize(ft.FinetuneConfig(output_dir="/proc/self/cwd"))
        await adapter.initialize(ft.FinetuneConfig(output_dir=tmp_path))
        policy = adapter.policy
        before = policy.weights_id
        assert before == policy.weights_id
        first = await rollouts(policy)

        async def until_it_steps(ref):
            while (status := await adapter.status(ref)).metadata["metrics"]["optimizer_steps"] < 1:
                assert status.status in ("pending", "running"), status.message
                await asyncio.sleep(0.05)
            return status

        job = await adapter.submit(first)
        status = await until_it_steps(job)
        assert status.status == "running"
        assert policy.weights_id != policy.weights_id  # nobody may rely on what it was
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            await adapter.status(job)
            seconds.append(time.perf_counter() - started)
        with capsys.disabled():
            print(f"\na status while a job trains takes {1000 * statistics.median(seconds):.1f} ms")
        await adapter.cancel(job)
        last = await adapter.wait_until_complete(job)
        assert last.status == "canceled"
        assert policy.version == 1
        assert policy.weights_id != before

        _, version, weights = await asyncio.to_thread(policy.weights)
        assert version == 1
        assert all("lora_" in name for name in ray.get(weights))
        with pytest.raises(ft.StalePolicy, match="sampled by policy version 0, older than version 1"):
            await adapter.submit(first)

        adapter.adapter_config.learning_rate = 1e-5  # as a live change does it
        job = await adapter.submit(await rollouts(policy))
        assert (await until_it_steps(job)).metadata["metrics"]["learning_rate"] == pytest.approx(1e-5)
        with pytest.raises(ft.BackendError, match="is at work; expected none while a checkpoint is loaded"):
            await adapter.load_checkpoint(tmp_path / "nothing")
        os.kill(await adapter._link._actor.pid.remote(), signal.SIGKILL)
        last = await adapter.wait_until_complete(job)
        assert last.status == "failed"
        assert "open its folder again" in last.message
        assert (await adapter.status(job)).status == "failed"
        with pytest.raises(ft.BackendError, match="the trainer's actor was lost"):
            await adapter.is_healthy()
    assert await no_actor_left()


async def test_killed_kernel_finds_actor_and_job_again(ray, tmp_path, closing, caplog):
    folder = tmp_path / "run"
    assert killed(tmp_path, ray, "job") == -signal.SIGKILL
    pid = pid_of(folder)
    with RunStore.open(folder) as store:
        left = store.partial()
    assert left.job is not None

    run = closing(ft.Run.open(folder))
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.policy_versions, epoch.job.status) == (0, (0, 1), "completed")
    assert epoch.job.metadata["job_id"] == left.job.metadata["job_id"]
    assert epoch.train_metrics["optimizer_steps"] == 6 * 8
    assert len(sampled(epoch)) == 16 * 8
    assert pid_of(folder) == pid

    stranger = RayTrainerAdapter(LocalGRPOConfig(), run.config.run, folder)  # the folder's lock has told it no
    await stranger.open()
    stranger.end()
    assert pid_of(folder) == pid

    run.close()
    assert await no_actor_left()

    assert killed(tmp_path, ray, "job") == -signal.SIGKILL  # in epoch 1; and now the actor goes, too
    os.kill(pid_of(folder), signal.SIGKILL)
    assert await no_actor_left()
    again = closing(ft.Run.open(folder))
    epoch = await again.next_epoch()
    assert (epoch.index, epoch.policy_versions, epoch.job.status) == (1, (1, 2), "completed")
    assert epoch.train_metrics["logprob_gap"] < 1e-4
    assert "is gone, and its training job with it: a new one continues from the newest checkpoint" in caplog.text
    assert "epoch 1 is run again: its training job cannot be found" in caplog.text


async def test_actor_that_has_the_last_epochs_weights_is_taken_without_a_checkpoint(ray, tmp_path, closing):
    folder = tmp_path / "run"
    assert killed(tmp_path, ray, "epoch") == -signal.SIGKILL
    pid = pid_of(folder)
    assert not list(folder.glob("checkpoints/*"))
    run = closing(ft.Run.open(folder))
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.policy_versions) == (1, (1, 2))
    assert epoch.train_metrics["logprob_gap"] < 1e-4
    assert pid_of(folder) == pid


async def test_actor_whose_weights_the_record_does_not_know_is_replaced(ray, tmp_path, closing, caplog):
    folder = tmp_path / "run"
    assert killed(tmp_path, ray, "unrecorded") == -signal.SIGKILL
    pid = pid_of(folder)
    run = closing(ft.Run.open(folder))
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.policy_versions) == (0, (0, 1))
    assert pid_of(folder) != pid
    assert "its weights are not those that the record ends with" in caplog.text


async def test_kernel_that_ends_without_closing_its_run_leaves_no_actor(ray, tmp_path):
    assert killed(tmp_path, ray, "exit") == 0
    assert await no_actor_left()


async def test_more_than_the_cluster_has_is_an_error_at_once(ray, tmp_path, closing):
    for asked, told in (({"trainer_cpus": 64}, "64 CPU"), ({"trainer_gpus": 1}, "1 CPU and 1 GPU")):
        ray_settings = {"workers": 1, "trainer": True, **asked}
        options = {"engine": "ray", "ray": ray_settings, "output_dir": tmp_path}
        run = closing(ft.Run(lambda question: "ok", lambda item: 1.0, [{"question": "1"}], **options))
        started = time.perf_counter()
        with pytest.raises(ft.BackendError, match=f"expected one node with {told}, for the trainer"):
            await run.next_epoch()
        assert time.perf_counter() - started < 30
    both = {"workers": 3, "trainer": True}
    options = {"engine": "ray", "ray": both, "output_dir": tmp_path}
    run = closing(ft.Run(lambda question: "ok", lambda item: 1.0, [{"question": "1"}], **options))
    with pytest.raises(
        ft.BackendError, match="expected 2.5 CPU: 1 x 1 for the trainer and 3 x 0.5 for rollout workers"
    ):
        await run.next_epoch()
    assert not actors()
