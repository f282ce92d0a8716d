"""Our components among the Toolkit's: `nat finetune` trains with them, and the notebook with the same config."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toolkit
import yaml
from nat.data_models import finetuning as nat

import finetune_nb as ft
from finetune_nb.backends.nat import conversion as nouns

pytestmark = [pytest.mark.slow, pytest.mark.proof]

OURS = {
    "llms": {"model": {"_type": "finetune_nb_policy", "adapter": "adapter", "max_tokens": 8}},
    "trajectory_builders": {"builder": {"_type": "finetune_nb_eval_traj_builder", "num_generations": 2}},
    "trainer_adapters": {"adapter": {"_type": "finetune_nb_local_grpo", "learning_rate": 1e-3, "threads": 1}},
    "trainers": {"trainer": {"_type": "finetune_nb_epoch_trainer"}},
}


def percentiles(lines):
    return [
        (
            line["filtered_groups"],
            line["num_groups"],
            round(line["filtered_avg_reward"], 6),
            line["curriculum_percentile"],
        )
        for line in lines
    ]


def lines_of(path: Path):
    return [json.loads(text) for text in path.read_text().splitlines()]


async def test_nat_finetune_and_the_notebook_select_the_same_groups_for_the_same_rewards(place, closing):
    path = toolkit.write_config(place, "", **OURS)
    noted = place / "submitted.jsonl"
    code = (
        f"import pathlib, toolkit; toolkit.note_submitted(pathlib.Path({str(noted)!r}));"
        "from nat.cli.main import run_cli; run_cli()"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, "finetune", "--config_file", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(toolkit.__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Finetuning completed successfully" in done.stdout + done.stderr
    assert (place / "runs" / "model" / "model.safetensors").exists()  # what was trained outlives the process
    (theirs,) = (place / "runs").glob("*/training_metrics.jsonl")
    run = closing(ft.Run.from_nat(path, name="notebook"))
    run.start()
    await run.wait_async()
    selected = [[epoch.selection.example_ids[i] for i in epoch.selection.kept] for epoch in run]
    assert selected[0] == ["q5", "q4"]
    assert [[example for example, _ in groups] for groups in lines_of(noted)] == selected
    assert all(first == second for groups in lines_of(noted) for first, second in groups)
    mine = place / "runs" / "notebook" / "training_metrics.jsonl"
    assert percentiles(lines_of(mine)) == percentiles(lines_of(theirs))
    assert [line["filtered_groups"] for line in lines_of(mine)] == [2, 4, 4]
    assert [line["training"]["status"] for line in lines_of(theirs)] == ["completed"] * 3
    assert [line["training"].keys() for line in lines_of(theirs)] == [
        line["training"].keys() for line in lines_of(mine)
    ]


async def test_a_langchain_agent_evaluated_by_the_toolkit_is_trained_on_exact_ids(place, closing):
    run = closing(ft.Run.from_nat(toolkit.write_config(place, "", **OURS), name="exact"))
    first = await run.next_epoch()
    assert first.job.status == "completed"
    assert first.policy_versions == (0, 1)
    assert not first.selection.inferred
    for group in first.collection.trajectories:
        for trajectory in group:
            turn = trajectory.episode[-1]
            assert turn.role == "assistant"
            assert len(turn.metadata["token_ids"]) == len(turn.logprobs) > 0
            assert turn.metadata["exact"]
            assert trajectory.metadata["policy_version"] == 0
    replies = {t.episode[-1].content for group in first.collection.trajectories for t in group}
    assert len(replies) > 1  # it is sampled, and not the same for all
    second = await run.next_epoch()
    assert second.policy_versions == (1, 2)
    run.curriculum = {"percentile": 1.0}
    assert len((await run.next_epoch()).selection.kept) == 5
    run.save_model(place / "model")
    assert (place / "model" / "config.json").exists()


async def test_a_rollout_that_the_toolkit_dropped_is_a_failure_and_no_reward_of_zero(place, closing, monkeypatch):
    monkeypatch.setattr(toolkit, "RAISES_FOR", "what is q1?")
    run = closing(ft.Run.from_nat(toolkit.write_config(place, "", **OURS)))
    epoch = await run.next_epoch()
    assert [failure.example_id for failure in epoch.collection.failures] == ["q1", "q1"]
    assert (run.progress.total, run.progress.done, run.progress.failed) == (12, 12, 2)
    assert epoch.metrics.trajectories == 10


async def test_the_reward_is_the_one_that_the_config_names_also_in_a_validation(place, closing):
    first = {"_type": "test_table", "rewards": {key: [0.0] for key in toolkit.REWARDS}}
    second = {"_type": "test_table", "rewards": {key: [1.0, 0.5] for key in toolkit.REWARDS}}
    path = toolkit.write_config(place, "", **OURS)
    config = yaml.safe_load(path.read_text())
    config["eval"]["evaluators"] = {"other": first, "table": second}
    path.write_text(yaml.safe_dump(config))
    run = closing(ft.Run.from_nat(path, validation=place / "rows.json", name="two"))
    epoch = await run.next_epoch()
    assert epoch.metrics.mean_reward > 0
    assert epoch.validations[0].mean_reward > 0
    run.close()
    assert ft.Run.open(place / "runs" / "two")[0].metrics.mean_reward == epoch.metrics.mean_reward


async def test_one_example_is_tried_and_the_policy_is_talked_to(place, closing):
    run = closing(ft.Run.from_nat(toolkit.write_config(place, "", **OURS)))
    tried = await run.rollout("q2")
    assert tried.metadata["id"] == "q2"
    assert tried.reward in toolkit.REWARDS["q2"]
    assert tried.episode[-1].metadata["exact"]
    replies = {(await run.rollout("q2")).episode[-1].content for _ in range(8)}
    assert len(replies) > 1  # each is sampled anew
    assert (await run.chat("1+1")).message["role"] == "assistant"
    assert len(run) == 0


async def test_our_trainer_drives_the_toolkits_builder_and_adapter(place, closing):
    from loopback import LoopbackServer

    with LoopbackServer() as llm, toolkit.ArtServer() as art:
        path = toolkit.write_config(place, llm.base_url, trainers=OURS["trainers"])
        run = closing(ft.Run.from_nat(path))
        epoch = await run.next_epoch()
        run.close()
    assert epoch.job.status == "completed"
    assert not epoch.selection.inferred
    assert art.trained() == [["what is q5?", "what is q4?"]]


# ── nouns ────────────────────────────────────────────────────────────────────────────────────────────────────────────

PAIR = nat.DPOItem(prompt=[nat.OpenAIMessage(role="user", content="1+1")], chosen_response="2", rejected_response="3")
EPISODE = [
    nat.EpisodeItem(role="system", content="s"),
    nat.EpisodeItem(role="user", content="1+1", metadata={"a": [1, {"b": None}]}),
    nat.EpisodeItem(
        role="assistant",
        content="",
        logprobs={"content": [{"token": "2", "bytes": [50], "logprob": -0.5, "top_logprobs": [{"token": "3"}]}]},
        metadata={"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}], "token_ids": [7]},
    ),
    nat.EpisodeItem(role="tool", content="4", metadata={"tool_call_id": "c"}),
    nat.EpisodeItem(role="assistant", content="4", logprobs=[]),
]


@pytest.mark.parametrize(
    "trajectory",
    [
        nat.Trajectory(episode=EPISODE, reward=0.1 + 0.2, shaped_rewards=[0.1, 0.2], metadata={"id": 3, "x": {"y": 1}}),
        nat.Trajectory(episode=[PAIR, PAIR.model_copy(update={"prompt": "1+1"})], reward=-math.inf),
        nat.Trajectory(episode=[PAIR], reward=1e-300, metadata={}),
    ],
)
def test_trajectories_go_both_ways_without_loss(trajectory):
    ours = nouns.trajectory_from_nat(trajectory)
    assert isinstance(ours, ft.Trajectory)
    assert isinstance(ours.episode[0], ft.DPOItem | ft.EpisodeItem)
    assert nouns.trajectory_to_nat(ours) == trajectory
    assert ft.Trajectory.model_validate(ours.model_dump()) == ours
    assert nouns.trajectory_from_nat(nouns.trajectory_to_nat(ours)) == ours


def test_a_missing_reward_stays_missing():
    trajectory = nat.Trajectory(episode=[PAIR], reward=math.nan)
    assert math.isnan(nouns.trajectory_to_nat(nouns.trajectory_from_nat(trajectory)).reward)


@pytest.mark.parametrize("status", [each.value for each in nat.TrainingStatusEnum])
def test_jobs_go_both_ways_without_loss(status):
    given = nat.TrainingJobStatus(
        run_id="r", backend="b", status=status, progress=12.5, message="m", metadata={"metrics": {"loss": 0.25}}
    )
    ours = nouns.status_from_nat(given)
    assert isinstance(ours.status, ft.TrainingStatusEnum)
    assert nouns.status_to_nat(ours) == given
    ref = nat.TrainingJobRef(run_id="r", backend="b", metadata={"job_id": "j"})
    assert nouns.ref_to_nat(nouns.ref_from_nat(ref)) == ref


def test_a_collection_goes_both_ways_without_loss():
    given = nat.TrajectoryCollection(trajectories=[[nat.Trajectory(episode=EPISODE, reward=1.0)], []], run_id="r")
    assert nouns.collection_to_nat(nouns.collection_from_nat(given)) == given
