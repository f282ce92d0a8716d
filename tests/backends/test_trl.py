"""Training by TRL in a process of its own: preferences and chosen trajectories move the policy that is sampled; a job is
canceled by ending its process; what goes wrong there is said here."""

from __future__ import annotations

import asyncio
import json
import os
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tiny_models import byte_tokenizer, random_model  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.trl.adapter import TRLAdapter  # noqa: E402
from finetune_nb.backends.trl.config import TRLDPOConfig, TRLSFTConfig  # noqa: E402
from finetune_nb.backends.trl.rows import best_of_groups, preference_rows, supervised_rows  # noqa: E402
from finetune_nb.config import FinetuneConfig  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError, UnknownJob  # noqa: E402
from finetune_nb.testing import FakeAdapter, make_trajectory  # noqa: E402
from finetune_nb.types import DPOItem, TrainingJobRef, Trajectory, TrajectoryCollection  # noqa: E402

PROMPT = [{"role": "user", "content": "3+4"}]


def collection(*groups):
    return TrajectoryCollection(trajectories=[list(group) for group in groups], run_id="run")


def preference(chosen="yes", rejected="no", prompt=PROMPT):
    return Trajectory(
        episode=[DPOItem(prompt=prompt, chosen_response=chosen, rejected_response=rejected)],
        reward=1.0,
        metadata={"id": "q"},
    )


async def adapter(config, tmp_path, policy=None):
    made = TRLAdapter(config, policy=policy or LocalPolicy(random_model(), byte_tokenizer()))
    await made.initialize(FinetuneConfig(output_dir=tmp_path))
    return made


def logprob(policy, text, prompt=PROMPT):
    """Of the reply `text` and its end."""
    context, reply = policy.render(prompt), [*policy.encode(text), policy.tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = policy.model(torch.tensor([context + reply])).logits[0, len(context) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None]).sum().item()


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_preference_is_a_row_of_messages_or_of_text():
    assert preference_rows(collection([preference()], [preference(prompt="3+4=")])) == [
        {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
        {"prompt": "3+4=", "chosen": "yes", "rejected": "no"},
    ]
    with pytest.raises(BackendError, match="Use the trajectory builder preference_builder"):
        preference_rows(collection([make_trajectory(1.0)]))


def test_a_prompt_that_ends_with_its_own_response_is_given_without_it():
    retried = [*PROMPT, {"role": "assistant", "content": "9"}, {"role": "user", "content": "again"}]
    said = [*retried, {"role": "assistant", "content": "yes"}]
    (row,) = preference_rows(collection([preference(prompt=said)]))
    assert row["prompt"] == retried
    (row,) = preference_rows(collection([preference("other", prompt=said)]))
    assert row["prompt"] == said


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({}, {"sigmoid": 1.0}),
        ({"sft_loss_weight": 0.5, "preference_loss_weight": 2.0}, {"sigmoid": 2.0, "sft": 0.5}),
        ({"preference_average_log_probs": True}, {"sigmoid_norm": 1.0}),
        ({"preference_loss_weight": 0.0, "sft_loss_weight": 1.0}, {"sft": 1.0}),
    ],
)
def test_the_weights_of_the_losses_are_given_to_trl(given, loss):
    settings = TRLDPOConfig(**given).settings(0)
    assert dict(zip(settings["loss_type"], settings["loss_weights"], strict=True)) == loss


def test_weights_that_would_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="both 0"):
        TRLDPOConfig(preference_loss_weight=0)


def test_chosen_trajectories_are_the_best_of_each_group_above_the_bound():
    groups = collection(
        [make_trajectory(0.2, "p", 0), make_trajectory(0.9, "p", 1), make_trajectory(0.9, "p", 2)],
        [make_trajectory(0.1, "q"), make_trajectory(float("nan"), "q", 1)],
    )
    assert [t.metadata["generation"] for t in best_of_groups(groups, 0.5, True)] == [1]
    assert [t.metadata["generation"] for t in best_of_groups(groups, None, False)] == [0, 1, 2, 0]


def test_sampled_ids_are_rows_and_turns_that_carry_on_are_one():
    one, two = make_trajectory(1.0, reply="ab"), make_trajectory(1.0, reply="cd")
    two.episode[1].metadata["prompt_token_ids"] = [0, 97, 98, 5]
    both = Trajectory(episode=[*one.episode, *two.episode], reward=1.0)
    assert supervised_rows([both]) == [{"input_ids": [0, 97, 98, 5, 99, 100], "completion_mask": [0, 1, 1, 0, 1, 1]}]
    two.episode[1].metadata["prompt_token_ids"] = [7]
    assert [row["input_ids"] for row in supervised_rows([both])] == [[0, 97, 98], [7, 99, 100]]


def test_without_ids_the_text_is_the_row():
    one = make_trajectory(1.0, "3+4", reply="seven")
    del one.episode[1].metadata["token_ids"]
    row = {"prompt": PROMPT, "completion": [{"role": "assistant", "content": "seven"}]}
    assert supervised_rows([one]) == [row]
    assert supervised_rows([one, make_trajectory(1.0, "3+4", reply="seven")]) == [row, row]


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
async def test_with_a_weight_for_them_the_chosen_responses_are_learned_by_themselves(tmp_path):
    gains = []
    for weight in (0.0, 5.0):
        loss = {"sft_loss_weight": weight} if weight else {}
        config = TRLDPOConfig(learning_rate=2e-3, epochs=4, batch_size=4, device="cpu", threads=1, **loss)
        trainer = await adapter(config, tmp_path / f"{weight}")
        before = logprob(trainer.policy, "yes")
        ref = await trainer.submit(collection(*[[preference()] for _ in range(8)]))
        assert (await trainer.wait_until_complete(ref)).status == "completed"
        gains.append(logprob(trainer.policy, "yes") - before)
        await trainer.aclose()
    assert gains[1] > gains[0] + 0.5


@pytest.mark.slow
async def test_twenty_labelled_pairs_move_the_policy_their_way(tmp_path):
    """Replies that the policy sampled, of which people say which they like: those become more likely than the others."""
    config = TRLDPOConfig(learning_rate=2e-3, epochs=4, batch_size=4, device="cpu", threads=1)
    trainer = await adapter(config, tmp_path)
    policy = trainer.policy

    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    rows = [{"id": f"q{place}", "question": f"{place}+1", "answer": ""} for place in range(20)]
    run = ft.Run(
        solve,
        lambda output: 0.0,
        rows,
        generations=2,
        adapter=FakeAdapter(policy=policy),
        sampling={"max_tokens": 8},
        output_dir=tmp_path,
    )
    await run.next_epoch()
    for place in range(20):
        liked = place % 2
        run.label(f"e0/q{place}/{liked}", "liked", author="ann")
        run.label(f"e0/q{place}/{1 - liked}", "disliked", author="bob")
    pairs = run.preferences(tags={"liked": 1, "disliked": 0})
    items = [pair.episode[0] for group in pairs.trajectories for pair in group]
    assert len(items) == 20

    def margins():
        found = []
        for each in items:
            prompt = [message.model_dump() for message in each.prompt]
            found.append(
                logprob(policy, each.chosen_response, prompt) - logprob(policy, each.rejected_response, prompt)
            )
        return np.array(found)

    before = margins()
    status = await trainer.wait_until_complete(await trainer.submit(pairs))
    assert status.status == "completed", status.message
    grown = margins() - before
    print(f"\n20 labelled pairs: the margin grew by {grown.mean():.2f} nats in the mean, in {(grown > 0).sum()} of 20")
    assert grown.mean() > 1 and (grown > 0).sum() >= 18
    await trainer.aclose()
    run.close()


@pytest.mark.slow
async def test_preferences_move_the_policy_that_is_sampled(tmp_path):
    config = TRLDPOConfig(learning_rate=1e-2, epochs=6, batch_size=4, device="cpu", threads=1)
    trainer = await adapter(config, tmp_path)
    assert await trainer.is_healthy()
    policy = trainer.policy
    before = logprob(policy, "yes") - logprob(policy, "no")
    ref = await trainer.submit(collection([preference() for _ in range(8)]))
    running = await trainer.status(ref)
    assert running.status == "running"
    with pytest.raises(BackendError, match="is at work; expected none beside another one"):
        await trainer.submit(collection([preference()]))
    status = await trainer.wait_until_complete(ref)
    assert (status.status, status.progress, status.message) == ("completed", 100.0, "trained on 8 rows")
    metrics = status.metadata["metrics"]
    assert metrics["optimizer_steps"] == 12
    assert metrics["rows"] == 8
    assert metrics["rewards/accuracies"] == 1.0
    assert 0 < metrics["loss"] < 0.69
    assert policy.version == 1
    assert logprob(policy, "yes") - logprob(policy, "no") > before + 1
    assert await trainer.status(ref) == status
    folder = tmp_path / "run" / "trl" / ref.metadata["job_id"]
    assert {path.name for path in folder.iterdir()} == {"job.json", "data.jsonl", "progress.jsonl", "worker.log"}
    assert len((folder / "progress.jsonl").read_text().splitlines()) == 13
    await trainer.aclose()


@pytest.mark.slow
async def test_chosen_trajectories_move_the_policy_and_a_checkpoint_brings_it_back(tmp_path):
    config = TRLSFTConfig(learning_rate=1e-2, epochs=8, min_reward=0.5, lora_rank=4, device="cpu", threads=1)
    trainer = await adapter(config, tmp_path)
    policy = trainer.policy
    context, reply = policy.render(PROMPT), [*policy.encode("yes"), policy.tokenizer.eos_token_id]

    def rollout(reward, generation):
        found = make_trajectory(reward, "3+4", generation, reply="yes?")
        found.episode[1].metadata |= {"prompt_token_ids": context, "token_ids": reply}
        return found

    before = logprob(policy, "yes")
    await trainer.save_checkpoint(tmp_path / "checkpoint")
    status = await trainer.wait_until_complete(await trainer.submit(collection([rollout(1.0, 0), rollout(0.0, 1)])))
    assert (status.status, status.message) == ("completed", "trained on 1 rows")
    after = logprob(policy, "yes")
    assert after > before + 0.5
    await trainer.load_checkpoint(tmp_path / "checkpoint")
    assert (policy.version, logprob(policy, "yes"), trainer._submitted) == (0, pytest.approx(before, abs=1e-5), 0)
    with pytest.raises(BackendError, match="no checkpoint of trl_sft"):
        await trainer.load_checkpoint(tmp_path)
    await trainer.aclose()


async def test_a_checkpoint_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path):
    trainer = await adapter(TRLDPOConfig(device="cpu", threads=1), tmp_path)
    place = tmp_path / "epoch-000000"
    size = await trainer.save_checkpoint(place)
    assert size == await trainer.save_checkpoint(place) == sum(file.stat().st_size for file in place.iterdir())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    with pytest.raises(BackendError, match="exists and is not a checkpoint"):
        await trainer.save_checkpoint(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter-1.txt").read_text() == "years of work"
    await trainer.aclose()


async def test_a_canceled_job_ends_its_process_and_leaves_the_policy_as_it_was(tmp_path):
    trainer = await adapter(TRLDPOConfig(epochs=100_000, device="cpu", threads=1), tmp_path)
    before = logprob(trainer.policy, "yes")
    ref = await trainer.submit(collection([preference()]))
    process = trainer._jobs[ref.metadata["job_id"]]._process
    await trainer.cancel(ref)
    await trainer.cancel(ref)
    started = time.monotonic()
    status = await trainer.wait_until_complete(ref)
    assert time.monotonic() - started < 20
    assert (status.status, trainer.policy.version) == ("canceled", 0)
    assert logprob(trainer.policy, "yes") == before
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
async def test_a_job_is_canceled_in_the_middle_of_its_steps(tmp_path):
    trainer = await adapter(TRLDPOConfig(epochs=100_000, device="cpu", threads=1), tmp_path)
    ref = await trainer.submit(collection([preference()]))
    while "step" not in ((status := await trainer.status(ref)).message or ""):
        assert status.status == "running"
        await asyncio.sleep(0.05)
    assert 0 < status.progress < 100
    await trainer.cancel(ref)
    status = await trainer.wait_until_complete(ref)
    assert (status.status, trainer.policy.version) == ("canceled", 0)
    assert status.metadata["metrics"]["optimizer_steps"] >= 1


@pytest.mark.slow
async def test_what_went_wrong_in_the_process_is_said_with_its_last_lines(tmp_path):
    trainer = await adapter(TRLDPOConfig(options={"loss_type": "sygmoid"}, device="cpu", threads=1), tmp_path)
    status = await trainer.wait_until_complete(await trainer.submit(collection([preference()])))
    assert status.status == "failed"
    assert "sygmoid" in status.message
    assert "the process ended with code 1" in status.message
    assert "accelerate/commands" not in status.message
    assert trainer.policy.version == 0


async def test_what_cannot_be_learned_from_starts_nothing(tmp_path):
    trainer = await adapter(TRLSFTConfig(min_reward=2.0, device="cpu"), tmp_path)
    with pytest.raises(BackendError, match="a reward of at least 2 in 1 groups"):
        await trainer.submit(collection([make_trajectory(1.0)]))
    with pytest.raises(UnknownJob):
        await trainer.status(TrainingJobRef(run_id="run", backend="trl_sft", metadata={"job_id": "x"}))
    assert not (tmp_path / "run").exists()


def test_a_policy_with_a_lora_adapter_is_refused_before_anything_is_written(tmp_path):
    pytest.importorskip("peft")
    from finetune_nb.backends.local.config import LoRAConfig
    from finetune_nb.backends.local.lora import with_adapter

    policy = LocalPolicy(with_adapter(random_model(), LoRAConfig(rank=2)), byte_tokenizer())
    with pytest.raises(ConfigError, match=r"policy.save\(directory, merge=True\), then model=directory"):
        TRLAdapter(TRLSFTConfig(device="cpu"), policy=policy)
    policy.save(tmp_path, merge=True)
    merged = TRLAdapter(TRLSFTConfig(device="cpu", model=str(tmp_path))).policy
    assert not hasattr(merged.model, "peft_config")


@pytest.mark.slow
async def test_two_processes_train_one_model(tmp_path):
    trainer = await adapter(TRLDPOConfig(learning_rate=1e-2, epochs=6, processes=2, device="cpu", threads=1), tmp_path)
    policy = trainer.policy
    before = logprob(policy, "yes") - logprob(policy, "no")
    rows = collection([preference() for _ in range(8)])
    status = await trainer.wait_until_complete(await trainer.submit(rows))
    assert status.status == "completed", status.message
    assert logprob(policy, "yes") - logprob(policy, "no") > before


@pytest.mark.slow
@pytest.mark.proof
async def test_a_run_from_yaml_learns_from_preferences(tmp_path):
    rows = [{"id": i, "question": f"{i}+4-2", "answer": str(i + 2)} for i in range(1, 7)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run = ft.Run.from_config(
        {
            "llms": {"m": {"_type": "policy", "adapter": "trl", "max_tokens": 24}},
            "workflow": {"_type": "calculator_agent", "llm": "m"},
            "eval": {
                "general": {"dataset": {"_type": "json", "file_path": str(tmp_path / "train.json")}},
                "evaluators": {"right": {"_type": "calculator_reward"}},
            },
            "trajectory_builders": {
                "b": {"_type": "preference_builder", "num_generations": 8, "exhaustive_pairs": False}
            },
            "trainer_adapters": {"trl": {"_type": "trl_dpo", "learning_rate": 1e-4, "device": "cpu", "threads": 1}},
            "trainers": {"t": {"_type": "epoch_trainer"}},
            "finetuning": {
                "enabled": True,
                "trainer": "t",
                "trajectory_builder": "b",
                "trainer_adapter": "trl",
                "reward_function": {"name": "right"},
                "output_dir": str(tmp_path / "runs"),
            },
        }
    )
    epoch = await run.next_epoch()
    assert epoch.job.status == "completed"
    assert epoch.policy_versions == (0, 1)
    assert epoch.train_metrics["optimizer_steps"] >= 1
    await asyncio.to_thread(run.close)
