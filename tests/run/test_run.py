"""Run: epochs cell by cell, any Trainer, whatever goes wrong is said and the record stays."""

import asyncio
import json
import math
import threading
import time

import pytest
from foreign_trainer import ForeignTrainer, ten_groups
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums


def fake_of(run) -> FakeAdapter:
    return run._driver.adapter


# ── epochs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_epoch_collects_selects_trains_and_is_recorded(make_run):
    run = make_run()
    epoch = await run.next_epoch()
    assert (len(run), run[0], run[-1], epoch.index) == (1, epoch, epoch, 0)
    assert epoch.statistics.rewards.shape == (24,)
    assert epoch.metrics.trajectories == 24
    assert 0 < epoch.metrics.mean_reward < 1
    assert epoch.job.status == "completed"
    assert epoch.reason is None
    assert epoch.policy_versions == (0, 1)
    assert set(epoch.seconds) >= {"rollouts", "selection", "training", "total"}
    assert len(fake_of(run).submitted[0].trajectories) == 6


async def test_records_that_somebody_looks_at_do_not_grow_meanwhile(make_run):
    run = make_run()
    await run.next_epoch()
    before = run.records
    await run.next_epoch()
    assert len(before) == 1 and len(run.records) == 2


async def test_the_same_seed_gives_the_same_rewards_and_another_one_others(make_run):
    first, again, other = (make_run(seed=seed) for seed in (3, 3, 4))
    rewards = [
        [(await run.next_epoch()).statistics.rewards.tolist() for _ in range(2)] for run in (first, again, other)
    ]
    assert rewards[0] == rewards[1]
    assert rewards[0] != rewards[2]
    assert rewards[0][0] != rewards[0][1]


async def test_curriculum_keeps_groups_that_teach_and_says_why_the_others_are_left_out(make_run):
    run = make_run(
        builder=ScriptedBuilder(lambda epoch: {"a": [0, 1], "b": [1, 1], "c": [0.4, 0.6], "d": [None, None]}),
        curriculum=dict(initial_percentile=0.5),
    )
    epoch = await run.next_epoch()
    assert [t.metadata["id"] for (t, *_) in fake_of(run).submitted[0].trajectories] == ["a"]
    assert {reason.value: ids for reason, ids in epoch.selection.left_out().items()} == {
        "no_reward_spread": ["b"],
        "beyond_percentile": ["c"],
    }
    assert not epoch.selection.inferred
    assert epoch.metrics.failures == 2


async def test_nothing_left_to_train_on_is_an_epoch_with_its_reason_and_the_run_goes_on(make_run):
    run = make_run(builder=ScriptedBuilder(lambda epoch: {"a": [1, 1]} if epoch == 0 else {"a": [0, 1]}), curriculum={})
    first, second = await run.next_epoch(), await run.next_epoch()
    assert first.job is None
    assert first.reason == "no group is left to train on: 1 with no reward spread"
    assert second.job.status == "completed"


async def test_all_rollouts_failing_is_an_epoch_whose_reason_names_the_first_error(make_run):
    def broken(question, llm):
        raise ValueError("bad agent")

    epoch = await make_run(broken).next_epoch()
    assert epoch.reason == "all 24 rollouts failed; the first: ValueError: bad agent"
    assert math.isnan(epoch.metrics.mean_reward)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text", ValueError("broken")])
async def test_bad_rewards_are_never_trained_on_and_the_good_rest_is(make_run, value):
    def reward(item):
        if item.id == "sum-0":
            if isinstance(value, Exception):
                raise value
            return value
        return right(item)

    run = make_run(reward=reward)
    epoch = await run.next_epoch()
    trained = {t.metadata["id"] for group in fake_of(run).submitted[0].trajectories for t in group}
    assert trained == {f"sum-{i}" for i in range(1, 6)}
    assert epoch.job.status == "completed"
    assert epoch.metrics.trajectories == 24
    assert math.isfinite(epoch.metrics.mean_reward)


@pytest.mark.parametrize("outcome", ["failed", "canceled"])
async def test_a_job_that_ended_badly_stops_with_its_reason_and_is_recorded(make_run, outcome):
    run = make_run(adapter=FakeAdapter(policy=ScriptedPolicy(coin), outcome=outcome, message="out of luck"))
    with pytest.raises(ft.JobFailed, match=f"{outcome}: out of luck") as caught:
        await run.next_epoch()
    assert caught.value.epoch is run[0]
    assert run[0].job.status == outcome
    assert run.state == "failed"
    fake_of(run).outcome = ft.TrainingStatusEnum.COMPLETED
    assert (await run.next_epoch()).index == 1
    assert run.state == "ready"


async def test_an_unhealthy_backend_stops_before_the_first_rollout(make_run):
    calls = []
    run = make_run(lambda question: calls.append(1), adapter=FakeAdapter(healthy=False))
    with pytest.raises(ft.BackendError, match="not healthy"):
        await run.next_epoch()
    assert (calls, len(run)) == ([], 0)


async def test_an_adapter_that_refuses_leaves_the_collected_epoch_in_the_record(make_run):
    class Refusing(FakeAdapter):
        async def submit(self, trajectories):
            raise ft.StalePolicy("sampled by version 0, trained is 3")

    run = make_run(adapter=Refusing(policy=ScriptedPolicy(coin)))
    with pytest.raises(ft.StalePolicy):
        await run.next_epoch()
    assert run[0].metrics.trajectories == 24
    assert run[0].reason == "StalePolicy: sampled by version 0, trained is 3"


async def test_the_end_of_a_job_is_noticed_at_once(make_run):
    run = make_run(adapter=FakeAdapter(policy=ScriptedPolicy(coin), delay=0.2))
    epoch = await run.next_epoch()
    assert 0.2 <= epoch.seconds["training"] < 2 * 0.2


async def test_two_epochs_at_once_are_refused(make_run):
    run = make_run(adapter=FakeAdapter(policy=ScriptedPolicy(coin), delay=0.2))
    first = asyncio.create_task(run.next_epoch())
    await asyncio.sleep(0.1)
    assert run.state == "running"
    with pytest.raises(ft.RunError, match="the run is running"):
        await run.next_epoch()
    assert (await first).index == 0


async def test_an_aborted_epoch_cancels_its_job_and_the_run_goes_on(make_run):
    run = make_run(adapter=FakeAdapter(policy=ScriptedPolicy(coin), delay=30))
    task = asyncio.create_task(run.next_epoch())
    await asyncio.sleep(0.2)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 1
    fake_of(run).delay = 0
    assert (await run.next_epoch()).job.status == "completed"


async def test_aborting_while_a_sync_workflow_hangs_returns_within_a_second(make_run):
    release = threading.Event()
    run = make_run(lambda question, llm: release.wait(20))
    task = asyncio.create_task(run.next_epoch())
    await asyncio.sleep(0.2)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run.close()
    assert time.monotonic() - started < 1.5
    release.set()


# ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_validation_runs_before_every_interval_and_after_the_last_update(make_run):
    run = make_run(validation=sums(5, seed=9), validation_interval=2, num_epochs=4)
    for _ in range(4):
        await run.next_epoch()
    seen = [[(v.policy_version, v.examples) for v in epoch.validations] for epoch in (run[i] for i in range(4))]
    assert seen == [[(0, 5)], [], [(2, 5)], [(4, 5)]]


async def test_validation_touches_neither_the_run_nor_its_dataset(make_run):
    asked = []

    async def solve(question, llm, item):
        asked.append(item.id)
        await asyncio.sleep(0.01)
        return await guess(question, llm)

    rows = [{**row, "id": f"v-{i}"} for i, row in enumerate(sums(5, seed=9))]
    run = make_run(solve, validation=rows, generations=1, num_epochs=9)
    await run.next_epoch()
    assert sorted(asked[:5]) == [f"v-{i}" for i in range(5)]
    assert sorted(asked[5:]) == [f"sum-{i}" for i in range(6)]
    assert run[0].metrics.trajectories == 6
    assert run.config.finetuning.run_configuration.dataset == "train"


async def test_a_failed_validation_is_nan_with_its_error_and_the_epoch_goes_on(make_run, tmp_path):
    file = tmp_path / "validation.json"
    file.write_text(json.dumps(sums(3, seed=9)))
    run = make_run(validation=file, validation_interval=1)
    await run.next_epoch()
    file.unlink()
    epoch = await run.next_epoch()
    (validation,) = epoch.validations
    assert math.isnan(validation.mean_reward)
    assert "cannot be read" in validation.error
    assert epoch.job.status == "completed"


async def test_an_empty_validation_dataset_is_an_error_before_the_first_rollout(make_run):
    run = make_run(validation=[])
    with pytest.raises(ft.DatasetError, match="is empty"):
        await run.next_epoch()
    assert len(run) == 0


async def test_a_validation_whose_rewards_all_fail_says_so(make_run):
    def reward(item):
        if item.id.startswith("v"):
            raise ValueError("no reference")
        return right(item)

    rows = [{**row, "id": f"v-{i}"} for i, row in enumerate(sums(3, seed=9))]
    epoch = await make_run(reward=reward, validation=rows).next_epoch()
    (validation,) = epoch.validations
    assert math.isnan(validation.mean_reward)
    assert "no item has a score" in validation.error
    assert epoch.job.status == "completed"


async def test_validate_by_hand(make_run):
    run = make_run(validation=sums(5, seed=9))
    validation = await run.validate()
    assert (validation.policy_version, validation.examples, len(run)) == (0, 5, 0)
    with pytest.raises(ft.RunError, match="no validation dataset"):
        await make_run().validate()


# ── trying things ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_rollout_tries_one_example_by_position_or_id(make_run):
    run = make_run()
    by_position, by_id = await run.rollout(2), await run.rollout("sum-2")
    assert by_position.metadata["id"] == by_id.metadata["id"] == "sum-2"
    assert "sum-2" in by_position._repr_html_() or by_position.reward in (0.0, 1.0)
    assert len(run) == 0
    with pytest.raises(ft.RunError, match="no example 'sum-99'"):
        await run.rollout("sum-99")
    assert run.state == "new"  # a slip of the hand is no failure of the run


async def test_a_rollout_that_fails_is_shown_as_a_failure(make_run):
    failure = await make_run(lambda question, llm: None).rollout()
    assert isinstance(failure, ft.RolloutFailure)
    assert "returned nothing" in failure.error


async def test_chat_talks_to_the_policy(make_run):
    assert (await make_run().chat("3+4")).content in ("7", "8")


# ── curriculum ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_percentile_that_is_set_counts_from_the_next_selection_and_stays(make_run):
    run = make_run(builder=ScriptedBuilder(ten_groups), curriculum=dict(initial_percentile=0.1, expansion_interval=1))
    await run.next_epoch()
    assert run[0].curriculum.percentile == pytest.approx(0.3)  # as NAT: interval 1 expands at epoch 0
    run.curriculum = dict(percentile=0.5)
    assert (run.curriculum.schedule, run.curriculum.percentile) == ("manual", 0.5)
    for _ in range(3):
        epoch = await run.next_epoch()
    assert epoch.curriculum.percentile == 0.5
    assert len(epoch.selection.kept) == 5
    run.curriculum = dict(schedule="automatic")
    percentiles = [(await run.next_epoch()).curriculum.percentile for _ in range(3)]
    assert percentiles == pytest.approx([0.5, 0.7, 0.9])
    assert run.curriculum.percentile == pytest.approx(0.9)


async def test_a_change_during_the_rollouts_counts_for_that_epoch(make_run):
    gate = threading.Event()

    def solve(question, llm):
        gate.wait(5)
        return llm.chat([{"role": "user", "content": question}]).content

    run = make_run(solve, curriculum=dict(initial_percentile=1.0))
    task = asyncio.create_task(run.next_epoch())
    await asyncio.sleep(0.2)
    run.curriculum = dict(enabled=False)
    gate.set()
    epoch = await task
    assert epoch.curriculum.enabled is False
    assert len(epoch.selection.kept) == 6


async def test_a_bad_change_is_refused_and_nothing_changes(make_run):
    run = make_run(curriculum={})
    before = run.curriculum
    with pytest.raises(ft.ConfigError):
        run.curriculum = dict(percentile=1.5)
    with pytest.raises(ft.ConfigError, match="Did you mean 'percentile'"):
        run.curriculum = dict(percentil=0.5)
    assert run.curriculum == before


# ── somebody else's Trainer ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_foreign_trainer_is_driven_waited_for_and_logged(make_run):
    trainer = ForeignTrainer(ft.TrainerConfig())
    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=trainer, curriculum={})
    epoch = await run.next_epoch()
    assert epoch.job.status == "completed"
    assert epoch.selection.inferred
    assert [epoch.selection.example_ids[i] for i in epoch.selection.kept] == [str(i) for i in range(1, 10)]
    assert trainer.logged == [0]
    assert fake_of(run).progress
    run.close()
    assert trainer.cleaned
    assert "submit" not in vars(fake_of(run))


async def test_a_trainer_of_ours_whose_choice_is_narrowed_is_recorded_by_what_it_submitted(make_run):
    class HarderHalf(ft.EpochTrainer):
        def apply_curriculum_learning(self, trajectory_collection, epoch):
            kept = super().apply_curriculum_learning(trajectory_collection, epoch)
            return kept.model_copy(update={"trajectories": kept.trajectories[:3:-1]})

    trainer = HarderHalf(ft.EpochTrainerConfig())
    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=trainer)
    epoch = await run.next_epoch()
    submitted = [group[0].metadata["id"] for group in fake_of(run).submitted[0].trajectories]
    assert [epoch.selection.example_ids[i] for i in epoch.selection.kept] == submitted == list("987654")
    assert epoch.selection.inferred and epoch.metrics.kept_groups == 6
    assert run.groups().kept.tolist() == [False] * 4 + [True] * 6


async def test_a_foreign_trainer_that_returns_none_gives_an_epoch_without_a_job(make_run):
    class Choosy(ForeignTrainer):
        async def run_epoch(self, epoch, run_id):
            await self.collect(epoch, run_id)

    epoch = await make_run(builder=ScriptedBuilder(ten_groups), trainer=Choosy(ft.TrainerConfig())).next_epoch()
    assert epoch.job is None
    assert epoch.reason
    assert epoch.metrics.trajectories == 20


async def test_a_foreign_trainer_that_submits_late_is_matched_to_the_right_epoch(make_run):
    class Late(ForeignTrainer):
        held = None

        async def run_epoch(self, epoch, run_id):
            held, self.held = self.held, await self.collect(epoch, run_id)
            if held is not None:
                await self.trainer_adapter.submit(held)

    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=Late(ft.TrainerConfig()))
    for _ in range(3):
        await run.next_epoch()
    assert [run[i].job and run[i].job.status.value for i in range(3)] == ["completed", None, None]
    await run.next_epoch()
    assert run[1].job.status == "completed"
    assert run[0].job.status == "completed"


async def test_a_foreign_trainer_that_submits_in_the_background_is_caught_up_with(make_run):
    class Background(ForeignTrainer):
        async def run_epoch(self, epoch, run_id):
            collection = await self.collect(epoch, run_id)

            async def submit():
                await asyncio.sleep(0.05)
                await self.trainer_adapter.submit(collection)

            self.task = asyncio.create_task(submit())

    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=Background(ft.TrainerConfig()))
    await run.next_epoch()
    await asyncio.sleep(0.2)
    await run.next_epoch()
    assert run[0].job.status == "completed"
    assert len(run[0].selection.kept) == 10


async def test_a_trainer_that_trains_only_in_run_says_so(make_run):
    class Whole(ForeignTrainer):
        trains_in_run = True

    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=Whole(ft.TrainerConfig()))
    with pytest.raises(ft.RunError, match="Whole trains only in its run"):
        await run.next_epoch()
    with pytest.raises(ft.RunError, match="Whole trains only in its run"):
        _ = run.curriculum


async def test_a_trainer_that_trains_only_in_run_is_started_and_makes_one_epoch(make_run):
    class Whole(ForeignTrainer):
        trains_in_run = True

        async def run(self, num_epochs):
            collected = [await self.collect(n, "whole") for n in range(num_epochs)]
            groups = [group for collection in collected for group in collection.trajectories]
            ref = await self.trainer_adapter.submit(ft.TrajectoryCollection(trajectories=groups, run_id="whole"))
            return [await self.trainer_adapter.wait_until_complete(ref)]

    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=Whole(ft.TrainerConfig()))
    run.start(epochs=2)
    await run.wait_async()
    (epoch,) = run.records
    assert epoch.job.status == "completed"
    assert len(epoch.collection.trajectories) == 20
    assert len(epoch.selection.kept) == 20
    assert len(ft.Run.open(run.folder)[0].collection.trajectories) == 20


async def test_what_ended_a_run_of_its_own_before_any_job_is_raised(make_run):
    class Whole(ForeignTrainer):
        trains_in_run = True

        async def run(self, num_epochs):
            return [ft.TrainingJobStatus(run_id="r", backend="b", status="failed", message="no data")]

    run = make_run(builder=ScriptedBuilder(ten_groups), trainer=Whole(ft.TrainerConfig()))
    run.start()
    with pytest.raises(ft.JobFailed, match="no data"):
        await run.wait_async()


# ── the handle ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_frames_and_plots_of_a_run(make_run):
    run = make_run(validation=sums(3, seed=9), evaluators={"length": lambda item: len(item.output_obj)})
    await run.next_epoch()
    await run.next_epoch()
    assert len(run.trajectories()) == 48
    assert run.trajectories().score_length.notna().all()
    assert len(run.groups()) == 12
    assert run.epochs().mean_reward.tolist() == [run[0].metrics.mean_reward, run[1].metrics.mean_reward]
    assert run.plot_rewards().axes
    assert run.plot_reward_distribution().axes


async def test_reprs_show_the_state_and_never_raise(make_run):
    run = make_run(name="my-run")
    assert "my-run" in repr(run)
    await run.next_epoch()
    assert "my-run" in run._repr_html_()
    assert "reward" in run[0]._repr_html_()
    run.close()
    assert "closed" in repr(run)


async def test_a_closed_run_can_be_read_but_not_run(make_run):
    run = make_run()
    await run.next_epoch()
    run.close()
    run.close()
    assert len(run.trajectories()) == 24
    with pytest.raises(ft.RunError, match="is closed"):
        await run.next_epoch()


async def test_a_config_belongs_to_one_open_run(make_run):
    config = make_run().config
    with pytest.raises(ft.ConfigError, match="belongs to an open run"):
        ft.Run.from_config(config)


async def test_async_with_closes(make_run):
    async with make_run() as run:
        await run.next_epoch()
    assert run.state == "closed"


def test_run_sync_runs_an_epoch_from_a_script(make_run):
    run = make_run()
    assert ft.run_sync(run.next_epoch()).index == 0


async def test_an_existing_name_gets_a_number(make_run, tmp_path):
    (tmp_path / "mine").mkdir()
    assert make_run(name="mine").id == "mine-2"


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "x" * 200, "nul\0"])
async def test_a_name_that_is_no_folder_is_refused(make_run, name):
    with pytest.raises(ft.ConfigError, match="run name"):
        make_run(name=name)


async def test_logs_have_nats_names_and_keys(make_run, tmp_path):
    run = make_run(name="logged", curriculum=dict(initial_percentile=0.5))
    await run.next_epoch()
    folder = tmp_path / "logged"
    (line,) = [json.loads(text) for text in (folder / "training_metrics.jsonl").read_text().splitlines()]
    assert line["epoch"] == 0
    assert line["num_trajectories"] == 24
    assert line["training"]["status"] == "completed"
    assert isinstance(line["curriculum_state"]["included_groups"], int)
    assert (folder / "trajectory_builder_logged.jsonl").exists()


async def test_missing_arguments_are_said():
    with pytest.raises(ft.ConfigError, match="needs workflow, reward and dataset"):
        ft.Run(guess, right)


async def test_runs_are_compared_on_the_examples_that_they_share(make_run):
    first, second = make_run(), make_run(seed=1)
    for run in (first, second):
        await run.next_epoch()
    (difference,) = ft.compare([first, second]).differences
    assert (difference.run, difference.pairs) == (second.id, 6)
    with pytest.raises(ft.ConfigError, match="not against itself"):
        ft.compare([first, first])
