"""Rollouts on a Ray cluster, beside the same ones in this process."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

import finetune_nb as ft
from finetune_nb.redaction import redact_text, remember_secret
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

pytestmark = pytest.mark.slow


def say(messages, seed):
    return messages[-1]["content"] + (" yes" if seed % 2 else " no")


async def twice(question, llm):
    first = await llm.chat([{"role": "user", "content": question}])
    second = await llm.chat([{"role": "user", "content": question}, first, {"role": "user", "content": "sure?"}])
    if question.startswith("0"):
        raise ValueError("no zeros")
    return second.content


def ends_well(item):
    return float(item.output_obj.endswith("yes"))


def make(tmp_path, engine, workflow=twice, reward=ends_well, rows=8, **options):
    adapter = options.pop("adapter", None) or FakeAdapter(policy=ScriptedPolicy(say))
    options = {"generations": 4, "output_dir": tmp_path, "ray": {"workers": 2}, **options}
    dataset = rows if isinstance(rows, list) else sums(rows)
    return ft.Run(workflow, reward, dataset, adapter=adapter, engine=engine, **options)


def told(epoch):
    groups = epoch.collection.trajectories
    found = {}
    for trajectory in (t for group in groups for t in group):
        key = trajectory.metadata["id"], trajectory.metadata["generation"]
        items = [item.model_dump() for item in trajectory.episode]
        for item in items:
            (item["metadata"] or {}).pop("seconds", None)
        found[key] = trajectory.reward, items
    return found, sorted((f.example_id, f.generation, f.error) for f in epoch.collection.failures)


@pytest.mark.proof
async def test_scripted_policy_gives_the_trajectories_that_it_gives_locally(ray, tmp_path, closing):
    here = await closing(make(tmp_path / "a", "local")).next_epoch()
    there = await closing(make(tmp_path / "b", "ray")).next_epoch()
    assert told(here) == told(there)
    assert there.collection.failures


@pytest.mark.proof
async def test_openai_clients_are_recorded_in_the_worker(ray, tmp_path, closing):
    async def ask(question, llm):
        reply = await llm.openai().chat.completions.create(
            model="policy", messages=[{"role": "user", "content": question}]
        )
        return reply.choices[0].message.content

    epoch = await closing(make(tmp_path, "ray", ask)).next_epoch()
    assert not epoch.collection.failures
    answers = [t.episode[-1] for group in epoch.collection.trajectories for t in group]
    assert {"".join(map(chr, item.metadata["token_ids"])) == item.content for item in answers} == {True}
    assert all(len(item.logprobs) == len(item.metadata["token_ids"]) > 0 for item in answers)


async def test_killed_worker_loses_nothing(ray, tmp_path, closing):
    async def tell(question, llm):
        await asyncio.sleep(0.3)
        return f"{(await llm.chat([{'role': 'user', 'content': question}])).content} {os.getpid()}"

    run = closing(make(tmp_path, "ray", tell, lambda item: 1.0, rows=12, max_concurrency=8))
    driver, killed = run._driver, []
    whole = asyncio.create_task(run.next_epoch())
    while not whole.done():
        await asyncio.sleep(0.05)
        executor = driver.components.ready("executor", "ray")
        if not killed and executor is not None and driver.progress.done > 10:
            pid = ray.get(executor._workers[0].actor.pid.remote(), timeout=30)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    epoch = await whole
    assert killed
    assert not epoch.collection.failures
    assert [len(group) for group in epoch.collection.trajectories] == [4] * 12
    assert driver.progress.done == driver.progress.total == 48


async def test_rollout_that_kills_its_worker_each_time_is_a_failure_that_says_so(ray, tmp_path, closing):
    async def die(question, llm):
        if question == "die":
            await asyncio.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return (await llm.chat([{"role": "user", "content": question}])).content

    rows = [{"id": i, "question": q, "answer": ""} for i, q in enumerate(["a", "b", "die"])]
    options = {"generations": 1, "ray": {"workers": 1, "tries": 2}}
    epoch = await closing(make(tmp_path, "ray", die, lambda item: 1.0, rows=rows, **options)).next_epoch()
    (failure,) = epoch.collection.failures
    assert failure.example_id == 2
    assert "its worker was lost 2 times" in failure.error
    assert len(epoch.collection.trajectories) == 2


async def test_abort_ends_the_rollouts_on_the_workers_and_the_next_epoch_begins(ray, tmp_path, closing):
    async def slowly(question, llm):
        if question == "wait":
            await asyncio.sleep(60)
        return (await llm.chat([{"role": "user", "content": question}])).content

    rows = [{"id": i, "question": q, "answer": ""} for i, q in enumerate(["a", "b", "wait"])]
    run = closing(make(tmp_path, "ray", slowly, lambda item: 1.0, rows=rows, generations=2))
    await run.rollout(example=0)
    run.start(epochs=1)
    while run._driver.progress.done < 4:
        await asyncio.sleep(0.05)
    began = time.monotonic()
    run.abort()
    await run.wait_async()
    assert time.monotonic() - began < 5
    assert len(run) == 0
    executor = run._driver.components.ready("executor", "ray")
    assert sum(worker.load for worker in executor._workers) == 0
    assert (await run.rollout(example=1)).reward == 1.0


async def test_thousand_short_rollouts_take_at_most_a_third_longer_than_the_ideal(ray, tmp_path, closing, capsys):
    async def sleep(question):
        await asyncio.sleep(0.2)
        return "ok"

    from finetune_nb.rollouts.rollout import Rollout
    from finetune_nb.rollouts.workflow import Workflow
    from finetune_nb.types import EpisodeKey, EvalInputItem, RolloutRequest

    run = closing(make(tmp_path, "ray", sleep, lambda item: 1.0, rows=2, max_concurrency=64))
    await run.rollout(example=0)
    executor = run._driver.components.ready("executor", "ray")
    item = EvalInputItem(id=0, input_obj="q", expected_output_obj="", full_dataset_entry={})
    requests = [RolloutRequest(EpisodeKey("train", 0, n, 0), item) for n in range(1000)]

    async def go():
        began = time.monotonic()
        await executor.map(Rollout(Workflow(sleep)), requests)
        return time.monotonic() - began

    seconds = sorted([await run._session.engine.run(go()) for _ in range(3)])[0]
    ideal = 1000 * 0.2 / 64
    with capsys.disabled():
        print(f"\n1,000 rollouts of 0.2 s, 64 at once: {seconds:.2f} s, ideal {ideal:.2f} s")
    assert seconds < 1.3 * ideal


async def test_cluster_that_is_too_small_is_an_error_at_once(ray, tmp_path, closing):
    run = closing(make(tmp_path / "a", "ray", ray={"workers": 100, "worker_cpus": 1}))
    with pytest.raises(ft.BackendError, match=r"found 2 CPU, 0 GPU .*expected 100 CPU: 100 x 1 for rollout workers"):
        await run.next_epoch()
    run = closing(make(tmp_path / "b", "ray", ray={"workers": 1, "worker_gpus": 1}))
    with pytest.raises(ft.BackendError, match="expected one node with 0.5 CPU and 1 GPU"):
        await run.next_epoch()


async def test_workflow_that_cannot_go_elsewhere_says_what_to_do(ray, tmp_path, closing):
    import threading

    lock = threading.Lock()

    async def locked(question):
        with lock:
            return "ok"

    with pytest.raises(ft.ConfigError, match="make clients, locks and files inside the workflow"):
        await closing(make(tmp_path / "a", "ray", locked)).next_epoch()

    async def unpackable(question):
        return threading.Lock()

    epoch = await closing(make(tmp_path / "b", "ray", unpackable, lambda item: 1.0)).next_epoch()
    assert not epoch.collection.trajectories
    assert "returned a lock, which cannot go to another process" in epoch.collection.failures[0].error


async def test_what_is_secret_here_is_hidden_in_the_workers_and_the_token_is_not_shown(ray, tmp_path, closing):
    async def leak(question, llm):
        await llm.chat([{"role": "user", "content": question}])
        return redact_text("sk-very-secret-key")  # as what a worker logs is

    remember_secret("sk-very-secret-key")
    seen = []
    run = closing(make(tmp_path, "ray", leak, lambda item: seen.append(item.output_obj) or 1.0, rows=1, generations=1))
    await run.next_epoch()
    assert seen == ["**********"]
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    assert redact_text(f"it is {token}") == "it is **********"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
