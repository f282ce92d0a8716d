"""Faults of the Toolkit 1.9, one by one: what becomes of each under `Run.from_nat`.

notebooks/reference/nat.md has them as a table, with the test of each.
"""

import asyncio
import json
import logging
import math
import random
import threading
from types import SimpleNamespace

import faulty  # noqa: F401  # registers its components
import pytest
import toolkit
from matplotlib.axes import Axes
from nat.data_models import finetuning as nat
from nat.plugins.customizer.dpo.config import NeMoCustomizerTrainerAdapterConfig
from nat.plugins.customizer.dpo.trainer_adapter import NeMoCustomizerTrainerAdapter
from nat.plugins.eval.runtime.evaluate import EvaluationRun
from nat.plugins.openpipe.trainer import ARTTrainer
from nat.plugins.openpipe.trainer_adapter import ARTTrainerAdapter

import finetune_nb as ft
from finetune_nb.backends.nat.bridges import NatAdapter
from finetune_nb.backends.nat.conversion import collection_from_nat

pytestmark = pytest.mark.slow

OURS = {
    "llms": {"model": {"_type": "finetune_nb_policy", "adapter": "adapter", "max_tokens": 4}},
    "trajectory_builders": {"builder": {"_type": "finetune_nb_eval_traj_builder", "num_generations": 2}},
    "trainer_adapters": {"adapter": {"_type": "finetune_nb_local_grpo", "threads": 1}},
    "trainers": {"trainer": {"_type": "finetune_nb_epoch_trainer"}},
}
SPREAD = {"q0": [0.0, 1.0], "q1": [1.0, 0.0], "q2": [0.0, 1.0]}
ALL = {"curriculum_learning": {"enabled": False}}


@pytest.fixture
def run_of(place, llm, closing):
    """A run over the ART plugin, with these sections in place of the config's."""

    def make(rewards=SPREAD, finetuning=ALL, options=None, **sections):
        path = toolkit.write_config(place, llm.base_url, rewards, finetuning=finetuning, **sections)
        return closing(ft.Run.from_nat(path, name="faults", **(options or {})))

    return make


@pytest.fixture
def folder(place):
    return place / "runs" / "faults"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def failing(monkeypatch, which):
    """From now on those evaluations fail, by number."""
    ask, count = EvaluationRun.run_and_evaluate, iter(range(100))

    async def run_and_evaluate(self, *args, **kwargs):
        if next(count) in which:
            raise RuntimeError("this evaluation failed")
        return await ask(self, *args, **kwargs)

    monkeypatch.setattr(EvaluationRun, "run_and_evaluate", run_and_evaluate)


async def test_a_generation_that_fails_leaves_the_others(run_of, art, monkeypatch):
    builder = {"_type": "openpipe_art_traj_builder", "num_generations": 3}
    run = run_of(trajectory_builders={"builder": builder})
    failing(monkeypatch, {1})
    epoch = await run.next_epoch()
    assert (epoch.metrics.trajectories, epoch.metrics.failures) == (6, 1)
    assert [failure.error for failure in epoch.collection.failures] == ["RuntimeError: this evaluation failed"]
    assert epoch.job.status == "completed"


async def test_after_an_epoch_whose_generations_all_failed_the_next_one_runs(run_of, art, monkeypatch):
    run = run_of()
    failing(monkeypatch, {0, 1})
    with pytest.raises(RuntimeError, match="this evaluation failed"):
        await run.next_epoch()
    assert (await run.next_epoch()).job.status == "completed"
    run.close()


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_score_that_is_a_text_is_no_reward(run_of, art):
    run = run_of({**SPREAD, "q1": [1.0, "n/a"]})
    epoch = await run.next_epoch()
    assert (epoch.metrics.trajectories, epoch.metrics.failures) == (5, 1)
    assert [failure.error for failure in epoch.collection.failures] == [
        "no score by the reward 'table': none was given"
    ]


async def test_a_reward_that_is_not_finite_is_trained_on_by_nobody(run_of, art):
    builder = {"_type": "test_shaping_builder", "num_generations": 2}
    run = run_of({"q0": [0.0, 1.0], "q1": [0.5, 1.0]}, {}, trajectory_builders={"builder": builder})
    epoch = await run.next_epoch()
    rows = run.trajectories().set_index("trajectory")
    failed = rows[rows.error.notna()]
    assert set(failed.error) == {"the reward is nan"}
    assert failed.example.tolist() == ["q0"]
    assert epoch.job.status == "completed"
    assert art.trained() == [["what is q1?"]]


# ── the curriculum ───────────────────────────────────────────────────────────────────────────────────────────────────

SUBSAMPLE = {"curriculum_learning": {"enabled": True, "initial_percentile": 1.0, "random_subsample": 0.5}}


async def test_a_subsample_is_drawn_by_the_runs_seed_and_recorded_as_it_was_submitted(run_of, art):
    rewards = {f"q{n}": [n / 10, n / 10 + 0.3] for n in range(8)}
    drawn = []
    for _ in range(2):
        toolkit.start_anew()
        art.requests.clear()
        random.seed(len(drawn))  # as a process may leave it
        run = run_of(rewards, SUBSAMPLE)
        epochs = [await run.next_epoch() for _ in range(2)]
        run.close()
        drawn.append(art.trained())
        for epoch, submitted in zip(epochs, art.trained(), strict=True):
            kept = {f"what is {epoch.selection.example_ids[i]}?" for i in epoch.selection.kept}
            assert kept == set(submitted)
            assert len(submitted) == 4
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_none_is_refused_before_the_first_rollout(run_of, llm, share):
    with pytest.raises(ft.ConfigError, match="random_subsample"):
        run_of(finetuning={"curriculum_learning": {"enabled": True, "random_subsample": share}})
    assert llm.requests == []


async def test_groups_without_a_signal_that_are_trained_on_are_named(run_of, art):
    run = run_of({"q0": [0.0, 1.0], "q1": [0.5, 0.5]})
    await run.next_epoch()
    assert len(art.trained()[0]) == 2  # as `nat finetune` does with the curriculum off
    groups = run.groups().set_index("example")
    assert groups.spread.to_dict() == {"q0": 1.0, "q1": 0.0}
    assert "q1" in str(run.signal(epoch=0)._repr_html_())


# ── agents that the Toolkit's parser drops ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("agent", [{"_type": "test_insisting_agent", "llm": "model"}, {"_type": "test_silent_agent"}])
async def test_a_rollout_that_the_toolkits_parser_drops_is_a_row_that_says_so(run_of, art, agent):
    run = run_of(workflow=agent)
    epoch = await run.next_epoch()
    assert epoch.metrics.trajectories == 0
    rows = run.trajectories()
    assert len(rows) == 6
    assert rows.error.str.contains("the Toolkit's builder made no trajectory of it").all()


async def test_our_builder_trains_on_a_user_who_says_the_same_thing_twice(place, closing):
    agent = {"_type": "test_insisting_agent", "llm": "model"}
    run = closing(ft.Run.from_nat(toolkit.write_config(place, "", SPREAD, workflow=agent, **OURS)))
    epoch = await run.next_epoch()
    assert epoch.metrics.failures == 0
    for trajectory in (each for group in epoch.collection.trajectories for each in group):
        said = [(item.role.value, item.content) for item in trajectory.episode if item.role == "user"]
        assert said == [("user", f"what is {trajectory.metadata['id']}?")] * 2


async def test_rows_with_one_id_are_refused(run_of, art, place):
    run = run_of()
    rows = [{"id": "q0", "question": "what is q0?", "answer": answer} for answer in ("a", "b")]
    (place / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ft.DatasetError, match="rows.json' has 1 ids more than once: 'q0'"):
        await run.next_epoch()
    assert art.trained() == []


async def test_no_evaluator_sees_a_rollout_that_failed(run_of, art, monkeypatch):
    monkeypatch.setattr(toolkit, "RAISES_FOR", "what is q1?")
    await run_of().next_epoch()
    assert toolkit._seen == {"q0": 2, "q2": 2}


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_loggers_keep_their_levels(run_of, art):
    kept = logging.getLogger("nat.eval.of_a_plugin")
    before = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict if name.startswith("nat")}
    await run_of().next_epoch()
    assert (kept.level, kept.propagate) == (logging.NOTSET, True)
    after = {name: logging.getLogger(name).level for name in before}
    assert after == before


async def test_a_log_that_cannot_be_written_costs_no_training(run_of, art, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(ARTTrainer, "_log_metrics_to_file", full)
    epoch = await run_of().next_epoch()
    assert epoch.job.status == "completed"
    assert len(art.trained()) == 1


async def test_the_run_continues_while_the_toolkit_draws_its_plot(run_of, art, monkeypatch):
    draw, trained = ARTTrainer._create_reward_plot, threading.Event()
    waited = []

    def slow(self, *args):
        waited.append(trained.wait(60))
        return draw(self, *args)

    monkeypatch.setattr(ARTTrainer, "_create_reward_plot", slow)
    ask = ARTTrainerAdapter.submit

    async def submit(self, trajectories):
        ref = await ask(self, trajectories)
        trained.set()
        return ref

    monkeypatch.setattr(ARTTrainerAdapter, "submit", submit)
    await run_of().next_epoch()
    assert waited == [True]


async def test_the_plot_and_the_history_have_the_curriculum(run_of, art, folder, monkeypatch):
    drawn, plot = [], Axes.plot

    def noting(self, x, y, *args, **kwargs):
        drawn.append((kwargs.get("label"), list(y)))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", noting)
    run = run_of(toolkit.REWARDS, {})
    for _ in range(2):
        await run.next_epoch()
    newest = dict(drawn[-3:])
    assert newest["Curriculum %"] == pytest.approx([40.0, 80.0])
    assert len(newest["Filtered Avg Reward (Curriculum)"]) == 2
    history = json.loads((folder / "reward_history.json").read_text())
    assert [entry["curriculum_percentile"] for entry in history] == pytest.approx([0.4, 0.8])


async def test_the_log_does_not_grow_with_the_dataset_and_has_the_outcome_of_the_training(run_of, art, folder):
    run = run_of(toolkit.REWARDS, {})
    await run.next_epoch()
    (line,) = lines_of(folder / "training_metrics.jsonl")
    assert line["curriculum_state"]["included_groups"] == 2
    assert run.epochs().job.tolist() == ["completed"]
    (of_builder,) = lines_of(folder / "trajectory_builder_faults.jsonl")
    (of_adapter,) = lines_of(folder / "trainer_adapter_faults.jsonl")
    assert of_builder["num_generations"] == 2
    assert of_adapter["status"] == "completed"


# ── validations ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_missing_score_of_a_validation_takes_nothing_from_the_others(run_of, art, place, folder):
    rewards = {"q0": [1.0], "q1": [None], "q2": [1.0]}
    run = run_of(rewards, options={"validation": place / "rows.json"})
    check = await run.validate()
    assert check.mean_reward == 1.0
    assert check.error is None


async def test_a_failed_validation_is_no_zero_in_the_toolkits_history(run_of, art, place, folder):
    run = run_of(options={"validation": place / "not-there.json"})
    (check,) = (await run.next_epoch()).validations
    assert math.isnan(check.mean_reward)
    assert not (folder / "validation_history.json").exists()


async def test_a_validation_writes_no_credential(run_of, art, place):
    run = run_of(options={"validation": place / "rows.json"})
    await run.validate()
    written = [each for each in place.rglob("*") if each.is_file() and each.name != "config.yml"]
    assert written
    assert not [each for each in written if b"sk-not-to-be-seen" in each.read_bytes()]


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_canceled_job_ends_the_epoch_as_a_failed_one_does(run_of, art, monkeypatch):
    run, ask = run_of(), ARTTrainerAdapter.submit

    async def submit(self, trajectories):
        ref = await ask(self, trajectories)
        self.training_jobs[ref.run_id].cancel()
        return ref

    monkeypatch.setattr(ARTTrainerAdapter, "submit", submit)
    with pytest.raises(ft.JobFailed) as caught:
        await run.next_epoch()
    assert caught.value.epoch.job.status == "canceled"


async def test_the_metrics_of_a_finished_run_have_its_jobs(run_of, art):
    run = run_of()
    await run.next_epoch()
    metrics = await run._driver.trainer.get_metrics("faults")
    assert [job["status"]["status"] for job in metrics["jobs"]] == ["completed"]


async def test_a_model_server_that_answers_with_an_error_is_not_healthy(run_of, art):
    art.broken = True
    run = run_of()
    with pytest.raises(ft.BackendError, match="ConnectionError: Failed to connect to ART backend"):
        await run.next_epoch()
    art.broken = False
    assert (await run.next_epoch()).job.status == "completed"


@pytest.fixture
async def art_adapter(place, art):
    """The ART plugin's adapter under our bridge, registered with the server."""
    from nat.plugins.openpipe.config import ARTTrainerAdapterConfig

    backend = {"ip": "127.0.0.88", "port": 7999, "name": "n", "project": "p", "base_model": "tiny", "api_key": "k"}
    adapter = NatAdapter(ARTTrainerAdapter(ARTTrainerAdapterConfig(backend=backend)))
    await adapter.nat.initialize(SimpleNamespace(reward_function=None))
    return adapter


def conversation(*items, reward=1.0):
    logprobs = {"content": [{"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
    episode = []
    for role, content, metadata in items:
        of_role = logprobs if role == "assistant" else None
        episode.append(nat.EpisodeItem(role=role, content=content, logprobs=of_role, metadata=metadata))
    return nat.Trajectory(episode=episode, reward=reward)


CALL = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
GOOD = conversation(
    ("user", "1+1", None),
    ("assistant", "", {"tool_calls": [CALL]}),
    ("tool", "2", {"tool_call_id": "c1"}),
    ("assistant", "2", None),
)
BAD = conversation(("user", "1+1", None), ("assistant", "a", None), ("assistant", "b", None))


def collection_of(*groups):
    return collection_from_nat(nat.TrajectoryCollection(trajectories=list(map(list, groups)), run_id="r"))


async def test_an_invalid_trajectory_leaves_the_others_and_messages_of_tools_stay_what_they_are(art_adapter, art):
    ref = await art_adapter.submit(collection_of([GOOD, BAD], [BAD]))
    assert (await art_adapter.wait_until_complete(ref)).status == "completed"
    (body,) = [body for path, body in art.requests if path == "/_train_model"]
    ((sent,),) = [group["trajectories"] for group in body["trajectory_groups"]]
    user, asked, tool, answer = sent["messages_and_choices"]
    assert user["role"] == "user"
    (call,) = asked["message"]["tool_calls"]
    assert (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) == ("c1", "add", {"a": 1})
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    assert answer["message"]["content"] == "2"
    with pytest.raises(ValueError, match="Consecutive assistant messages"):
        await art_adapter.submit(collection_of([BAD]))


async def test_a_job_that_nobody_waited_for_is_in_the_way_of_none(art_adapter, art):
    first = await art_adapter.submit(collection_of([GOOD]))
    task = art_adapter.nat.training_jobs["r"]
    await asyncio.wait([task], timeout=60)
    second = await art_adapter.submit(collection_of([GOOD]))
    found = [await art_adapter.wait_until_complete(ref) for ref in (first, second)]
    assert [status.status.value for status in found] == ["completed", "completed"]
    assert first.metadata["job_id"] != second.metadata["job_id"]


# ── NeMo Customizer ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def customizer():
    config = NeMoCustomizerTrainerAdapterConfig(
        entity_host="http://127.0.0.1:9", datastore_host="http://127.0.0.1:9", namespace="n", customization_config="c"
    )
    return NatAdapter(NeMoCustomizerTrainerAdapter(config))


async def test_a_customizer_that_nobody_serves_is_not_healthy(customizer, llm):
    assert not await customizer.is_healthy()
    customizer.nat.adapter_config.entity_host = llm.base_url
    assert await customizer.is_healthy()


async def test_a_customizers_job_without_a_progress_is_waited_for(customizer):
    found = iter([("running", None), ("completed", None)])

    async def status(ref):
        value, progress = next(found)
        return nat.TrainingJobStatus(run_id=ref.run_id, backend="nemo", status=value, progress=progress)

    customizer._ask_status = status
    customizer.route_through_bridge()
    customizer.nat.adapter_config.deploy_on_completion = False
    ref = ft.TrainingJobRef(run_id="r", backend="nemo", metadata={"job_id": "j"})
    ended = await customizer.wait_until_complete(ref, poll_interval=0.01)
    assert (ended.status, ended.progress) == ("completed", None)
