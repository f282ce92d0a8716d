"""An epoch that is sampled while the epoch before it trains: what happens when, which weights sample, and what becomes of it
when something ends before its time."""

import asyncio
import time

import pytest
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.errors import BackendError, ConfigError, JobFailed, RunError
from finetune_nb.llms.call_recorder import current_episode
from finetune_nb.notebook.panel_html import status_html
from finetune_nb.testing import FakeAdapter, FakeAdapterConfig, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.training.trainer import EpochTrainer


class KeptWeights(ScriptedPolicy):
    """A policy of which the kept version and the newest one can be sampled, and no other."""

    def __init__(self):
        super().__init__(coin)
        self.kept = None
        self.asked = []

    async def sample(self, ids, params, seed, version=None):
        assert version in (None, self.kept), f"version {version} is asked for, and {self.kept} is kept"
        self.asked.append((current_episode().key.phase, current_episode().key.epoch, version))
        return await super().sample(ids, params, seed)


class Jobs(FakeAdapter):
    """An adapter whose jobs end when they are let go; `events` has what happened, in order."""

    def __init__(self, staleness=1):
        super().__init__(FakeAdapterConfig(max_staleness=staleness), policy=KeptWeights())
        self.events = []
        self.let_go = []
        """Jobs, by number, that may end; "all": any."""

    async def keep_sampling(self):
        self.policy.kept = self.policy.version
        return self.policy.version

    async def submit(self, trajectories):
        self.events.append(f"submit {len(self.submitted)}")
        return await super().submit(trajectories)

    async def _train(self):
        number = len(self.submitted) - 1
        while number not in self.let_go and "all" not in self.let_go:
            await asyncio.sleep(0.002)
        if self.outcome == "completed":
            self.policy.version += 1
        self.events.append(f"end {number}")


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@pytest.fixture
def jobs():
    return Jobs()


@pytest.fixture
def make_run(tmp_path, closing, jobs):
    def make(workflow=None, **options):
        async def noted(question, llm):
            jobs.events.append(f"rollout {current_episode().key.epoch}")
            return await guess(question, llm)

        settings = {"generations": 2, "output_dir": tmp_path, "adapter": jobs, "name": "ahead", "num_epochs": 3}
        return closing(ft.Run(workflow or noted, right, sums(4), **{**settings, **options}))

    return make


def sampled_ahead(run, count=8):
    """Whether all rollouts of the next epoch have ended."""
    return lambda: run.status.ahead is not None and run.status.ahead.done == count


# ── order and versions ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_epoch_is_sampled_while_the_epoch_before_it_trains(make_run, jobs):
    run = make_run()
    run.start()
    for epoch in (0, 1):
        await asyncio.to_thread(until, sampled_ahead(run))
        assert run.status.next_index == epoch and run.status.phase == "training"
        assert f"end {epoch}" not in jobs.events
        jobs.let_go.append(epoch)
        await asyncio.to_thread(until, lambda epoch=epoch: len(run) == epoch + 1)
    jobs.let_go.append("all")
    run.wait()

    expected = []
    for epoch in range(3):
        ahead = [f"rollout {epoch + 1}"] * 8 if epoch < 2 else []
        expected += [*(["rollout 0"] * 8 if epoch == 0 else []), f"submit {epoch}", *ahead, f"end {epoch}"]
    assert jobs.events == expected


async def test_records_have_the_version_that_sampled_and_how_far_it_was_behind(make_run, jobs):
    jobs.let_go.append("all")
    run = make_run(num_epochs=4)
    run.start()
    run.wait()
    epochs = run.epochs()
    assert epochs.policy_version.tolist() == [0, 0, 1, 2]
    assert epochs.version_lag.tolist() == [0, 1, 1, 1]
    assert epochs.policy_version_after.tolist() == [1, 2, 3, 4]
    of_trajectories = run.trajectories().groupby("epoch").policy_version.unique()
    assert [versions.tolist() for versions in of_trajectories] == [[0], [0], [1], [2]]
    assert "1 sampled, 2 before training, 3 after it" in run[2]._repr_html_()
    # All rollouts that ran ahead asked for the version that was kept; the first epoch's are of the newest.
    assert {(epoch, version) for _, epoch, version in jobs.policy.asked} == {(0, None), (1, 0), (2, 1), (3, 2)}


async def test_an_opened_run_shows_the_same(make_run, jobs, tmp_path):
    jobs.let_go.append("all")
    run = make_run()
    run.start()
    run.wait()
    expected = run.epochs()
    await asyncio.to_thread(run.close)
    opened = ft.Run.open(tmp_path / "ahead")
    assert opened.epochs().equals(expected)


async def test_times_of_an_epoch_do_not_count_what_overlapped_as_rollouts_or_pace(make_run, jobs):
    run = make_run(num_epochs=2)
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    await asyncio.sleep(0.5)
    jobs.let_go.append("all")
    run.wait()
    seconds = run[1].seconds
    assert seconds["ahead"] >= 0.5
    assert seconds["rollouts"] < seconds["ahead"]
    assert seconds["total"] >= seconds["ahead"]


@pytest.mark.parametrize("staleness", [0, 1])
async def test_single_epochs_and_the_last_one_begin_nothing_ahead(make_run, staleness):
    jobs = Jobs(staleness)
    jobs.let_go.append("all")
    run = make_run(adapter=jobs)
    await run.next_epoch()
    await run.next_epoch()
    run.start(1)
    run.wait()
    assert run.epochs().version_lag.tolist() == [0, 0, 0]
    assert all(version is None for _, _, version in jobs.policy.asked)


async def test_validation_is_of_the_newest_weights_and_comes_after_the_rollouts(make_run, jobs):
    jobs.let_go.append("all")
    run = make_run(validation=sums(2, seed=9), validation_interval=1)
    run.start()
    run.wait()
    assert [[check.policy_version for check in epoch.validations] for epoch in run] == [[0], [1], [2, 3]]
    phases = [phase for phase, epoch, _ in jobs.policy.asked if phase == "validation" or epoch == 1]
    assert phases == ["validation"] * 2 + ["train"] * 8 + ["validation"] * 6
    assert all(version is None for phase, _, version in jobs.policy.asked if phase == "validation")


async def test_trainer_without_a_run_overlaps_too(tmp_path, jobs, make_run):
    jobs.let_go.append("all")
    run = make_run()
    await run._session.ask(run._driver.open)
    trainer = run._driver.trainer
    assert isinstance(trainer, EpochTrainer)
    statuses = await run._session.ask(lambda: trainer.run(3))
    assert [status.status for status in statuses] == ["completed"] * 3
    versions = [{t.metadata["policy_version"] for g in each.trajectories for t in g} for each in jobs.submitted]
    assert versions == [{0}, {0}, {1}]


# ── live changes ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_live_change_is_used_at_the_next_safe_point_of_each_part(make_run, jobs):
    run = make_run(curriculum={"enabled": True, "min_reward_diff": 0.0})
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    run.live["builder.num_generations"] = 3  # epoch 1 is sampled already
    run.curriculum = {"percentile": 0.5}  # and not yet selected
    jobs.let_go.append("all")
    run.wait()
    assert run.epochs().trajectories.tolist() == [8, 8, 12]
    assert run.epochs().percentile.tolist()[1:] == [0.5, 0.5]
    assert dict(zip(run.journal().field, run.journal().epoch, strict=True)) == {
        "builder.num_generations": 2,
        "percentile": 1,
        "schedule": 1,
    }


# ── pause, stop, abort, failure ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_pause_holds_rollouts_of_the_next_epoch_and_lets_the_job_end(make_run, jobs):
    began = []
    hold = asyncio.Event()

    async def slow(question, llm):
        began.append(current_episode().key.epoch)
        while len(began) > 8 and not hold.is_set():
            await asyncio.sleep(0.005)
        return await guess(question, llm)

    run = make_run(slow, max_concurrency=2)
    run.start()
    await asyncio.to_thread(until, lambda: began.count(1) == 2)
    run.pause()
    hold.set()
    jobs.let_go.append(0)
    await asyncio.to_thread(until, lambda: len(run) == 1 and run.state == "paused")
    await asyncio.sleep(0.1)
    assert began.count(1) == 2  # those that had begun
    assert run.status.next_index == 1 and (run.status.phase, run.status.done) == ("rollouts", 2)
    jobs.let_go.append("all")
    run.resume()
    run.wait()
    assert run.epochs().trajectories.tolist() == [8, 8, 8]
    assert run.epochs().version_lag.tolist() == [0, 1, 1]


async def test_stop_finishes_the_epoch_that_is_sampled_already(make_run, jobs):
    run = make_run(num_epochs=5)
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    run.stop()
    assert run.notice == "ends after epoch 1, whose rollouts have begun"
    jobs.let_go.append("all")
    run.wait()
    assert run.epochs().version_lag.tolist() == [0, 1] and run.state == "ready"
    assert not jobs.policy.live
    run.start(2)
    run.wait()
    assert run.epochs().version_lag.tolist() == [0, 1, 0, 1]


async def test_abort_ends_both_and_the_next_start_runs_both_again(make_run, jobs):
    run = make_run()
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    run.abort()
    with pytest.raises(RunError):
        run.start()
    await asyncio.to_thread(until, lambda: run.state == "ready")
    assert not jobs.policy.live and run.status.ahead is None
    assert len(run) == 0 and run.partial.index == 0 and run.partial.metrics.trajectories == 8
    jobs.let_go.append("all")
    run.start()
    run.wait()
    assert [epoch.index for epoch in run] == [0, 1, 2]
    assert run.epochs().trajectories.tolist() == [8, 8, 8]
    assert run.epochs().version_lag.tolist() == [0, 1, 1]


async def test_a_failed_job_ends_the_rollouts_ahead_and_says_what_was_dropped(make_run, jobs, caplog):
    run = make_run()
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    jobs.outcome = "failed"
    jobs.let_go.append(0)
    with pytest.raises(JobFailed):
        run.wait()
    assert [str(epoch.job.status) for epoch in run] == ["failed"]
    assert "epoch 1 is not run now: 8 rollouts that had ended ahead of it are dropped" in caplog.text
    assert run.status.ahead is None and not jobs.policy.live
    jobs.outcome = "completed"
    jobs.let_go.append("all")
    run.start()
    run.wait()
    assert [epoch.index for epoch in run] == [0, 1, 2]
    assert run.epochs().version_lag.tolist() == [0, 0, 1]
    assert run.epochs().policy_version.tolist() == [0, 0, 0]


async def test_a_failed_job_ends_rollouts_that_are_running(make_run, jobs):
    canceled = []

    async def hangs(question, llm):
        if current_episode().key.epoch == 1:
            try:
                await asyncio.sleep(60)
            finally:
                canceled.append(question)
        return await guess(question, llm)

    run = make_run(hangs)
    jobs.outcome = "failed"
    run.start()
    await asyncio.to_thread(until, lambda: run.status.ahead is not None and len(jobs.policy.live) == 8)
    jobs.let_go.append("all")
    with pytest.raises(JobFailed):
        run.wait()
    assert len(canceled) == 8 and not jobs.policy.live


async def test_what_goes_wrong_in_rollouts_ahead_is_the_error_of_their_own_epoch(make_run, jobs):
    async def breaks(question, llm):
        if current_episode().key.epoch == 1:
            raise ValueError("no tool")
        return await guess(question, llm)

    jobs.let_go.append("all")
    run = make_run(breaks)
    run.start()
    run.wait()
    assert run.epochs().failures.tolist() == [0, 8, 0]
    assert run[0].trained and not run[1].trained and run[2].trained
    # No job was submitted in epoch 1, so that nothing was sampled ahead of epoch 2.
    assert run.epochs().version_lag.tolist()[2] == 0


async def test_a_workflow_that_cannot_begin_ahead_leaves_the_epoch_before_whole(make_run, jobs, monkeypatch):
    begin = ft.EvalTrajectoryBuilder.start_run

    async def begins_once(self, run_id, meta=None):
        if meta["epoch"] == 1 and "policy_version" in meta:
            raise ConfigError("the dataset is gone")
        await begin(self, run_id, meta)

    monkeypatch.setattr(ft.EvalTrajectoryBuilder, "start_run", begins_once)
    jobs.let_go.append("all")
    run = make_run()
    run.start()
    with pytest.raises(ConfigError, match="the dataset is gone"):
        run.wait()
    assert len(run) == 1 and run[0].trained
    run.start()  # in its turn it begins
    run.wait()
    assert len(run) == 3


async def test_a_run_that_is_closed_meanwhile_leaves_nothing_behind(make_run, jobs):
    run = make_run()
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    await asyncio.to_thread(run.close)
    assert not jobs.policy.live


async def test_rollouts_ahead_come_into_the_folder_with_their_own_epoch(make_run, jobs, tmp_path):
    run = make_run()
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    assert run.partial is None or run.partial.index == 0
    jobs.let_go.append(0)
    await asyncio.to_thread(until, lambda: len(run) == 1 and run.partial is not None)
    assert run.partial.index == 1
    jobs.let_go.append("all")
    run.wait()


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_panel_shows_the_epoch_that_trains_and_the_one_that_is_sampled(make_run, jobs):
    run = make_run()
    run.start()
    await asyncio.to_thread(until, sampled_ahead(run))
    shown = status_html(run.status, 1)
    assert "epoch 0 · training" in shown and "epoch 1 · rollouts" in shown and "8 of 8 rollouts" in shown
    assert "epoch 1 rollouts 8 of 8" in run._progress_line(False).text
    jobs.let_go.append("all")
    run.wait()
    assert "rollouts" not in status_html(run.status, 1)


# ── what cannot be ───────────────────────────────────────────────────────────────────────────────────────────────────


class Sequential(FakeAdapter):
    keep_sampling = ft.TrainerAdapter.keep_sampling


async def test_a_backend_that_cannot_keep_a_version_at_the_moment_trains_all_the_same(make_run, jobs, caplog):
    async def away():
        raise BackendError("the server is away")

    jobs.keep_sampling = away
    jobs.let_go.append("all")
    run = make_run()
    run.start()
    run.wait()
    assert run.epochs().version_lag.tolist() == [0, 0, 0]
    assert "epoch 1 is not sampled while epoch 0 trains: BackendError: the server is away" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"adapter": Jobs(2)}, "max_staleness of the trainer adapter is 2; expected 0, or 1"),
        ({"adapter": Sequential(FakeAdapterConfig(max_staleness=1))}, "Sequential cannot sample while it trains"),
        ({"builder": ScriptedBuilder(lambda epoch: {"a": [0.0, 1.0]})}, "ScriptedBuilder does not say that it samples"),
        ({"deterministic": True}, "max_staleness 1 with run.deterministic"),
    ],
)
async def test_what_cannot_overlap_is_refused_before_the_first_rollout(make_run, jobs, options, problem):
    run = make_run(**options)
    with pytest.raises(ConfigError, match=problem):
        await run.next_epoch()
    assert not jobs.events and len(run) == 0


@pytest.mark.parametrize(
    ("training", "options", "problem"),
    [
        ({}, {}, "without a sampler.*on one device"),
        ({"lora": {}}, {"engine": "ray"}, "a worker holds one version of the weights"),
        ({}, {"sampler": "http://127.0.0.1:1/v1"}, "without lora"),
        ({"lora": {}}, {"sampler": {"url": "http://127.0.0.1:1/v1", "sleep": True}}, "sampler.sleep"),
        ({"max_staleness": 2}, {}, "found max_staleness 2; expected 0, or 1"),
        ({"lora": {}}, {"sampler": "http://127.0.0.1:1/v1", "deterministic": True}, "run.deterministic"),
    ],
)
def test_a_backend_that_cannot_overlap_is_refused_when_the_config_is_read(tmp_path, training, options, problem):
    with pytest.raises(ConfigError, match=problem):
        ft.Run(guess, right, sums(4), training={"max_staleness": 1, **training}, output_dir=tmp_path, **options)
