"""`run.train_on`: one training job on recorded rollouts that somebody chose, recorded as an epoch."""

import pytest

import finetune_nb as ft
from finetune_nb.errors import BackendError, ConfigError, JobFailed, RunError
from finetune_nb.interfaces import TrainerAdapter
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import DPOItem


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def spread(output):
    return float(sum(map(ord, output)) % 5)


def new_run(folder, adapter=None, **options):
    policy = ScriptedPolicy(lambda messages, seed: f"reply {seed % 1009}")
    adapter = adapter or FakeAdapter(policy=policy)
    return ft.Run(solve, spread, sums(3), generations=3, output_dir=folder, name="run", adapter=adapter, **options)


@pytest.fixture
def run(tmp_path):
    run = new_run(tmp_path)
    for _ in range(2):
        ft.run_sync(run.next_epoch())
    yield run
    run.close()


def test_one_job_gets_exactly_the_chosen_rollouts(run):
    adapter = run._driver.adapter
    jobs = len(adapter.submitted)
    epoch = ft.run_sync(run.train_on(["e0/sum-1/2", "e1/sum-1/2", "e1/sum-0/0"]))
    assert len(adapter.submitted) == jobs + 1
    handed = [t for group in adapter.submitted[-1].trajectories for t in group]
    assert [t.metadata["chosen_from"] for t in handed] == ["e0/sum-1/2", "e1/sum-1/2", "e1/sum-0/0"]
    for trajectory in handed:
        epoch_, example, generation = trajectory.metadata["chosen_from"].split("/")
        recorded = run.show(f"{epoch_}/{example}/{generation}").trajectory
        assert trajectory.episode == recorded.episode and trajectory.reward == recorded.reward
    assert epoch.index == 2 and epoch.trained and epoch.job.status == "completed"


def test_the_folder_knows_of_it(run):
    ft.run_sync(run.train_on(["e0/sum-1/2", "e1/sum-1/2"]))
    run.close()
    again = ft.Run.open(run.folder)
    assert len(again) == 3
    frame = again.trajectories(epoch=2)
    assert frame.trajectory.tolist() == ["e2/sum-1/0", "e2/sum-1/1"]  # numbered anew: both were generation 2
    assert frame.selected.all() and frame.reason.tolist() == ["kept"] * 2 and frame.policy_version.tolist() == [0, 1]
    assert [t.metadata["chosen_from"] for t in again[2].collection.trajectories[0]] == ["e0/sum-1/2", "e1/sum-1/2"]
    (change,) = [change for change in again.changes if change.field == "train_on"]
    assert (change.new, change.epoch, change.source) == ("2 chosen rollouts", 2, "code")
    assert again[2].policy_versions == (2, 3) and not again[2].selection.inferred


def test_the_run_goes_on_and_continues_after_it(run, tmp_path):
    ft.run_sync(run.train_on(["e0/sum-1/2"]))
    assert run.state == "ready"
    after = ft.run_sync(run.next_epoch())
    assert after.index == 3 and len(after.statistics) == 3
    ft.run_sync(run.train_on(run.trajectories(epoch=3)))
    run.close()
    assert [epoch.index for epoch in ft.Run.open(run.folder)] == [0, 1, 2, 3, 4]


def test_a_frame_of_labels_chooses(run):
    run.label(["e0/sum-1/2", "e1/sum-0/1"], "good")
    run.label("e1/sum-0/1", "good", author="ann")
    run.label("e1/sum-0/2", "bad")
    labels = run.labels()
    epoch = ft.run_sync(run.train_on(labels[labels.tag == "good"]))
    assert epoch.metrics.trajectories == 2  # each rollout once


def test_a_journal_with_it_can_be_replayed(run, tmp_path):
    run.curriculum = {"percentile": 0.5}
    ft.run_sync(run.train_on(["e0/sum-1/2"]))
    ft.run_sync(run.next_epoch())
    journal = run.export(tmp_path / "journal.yaml")
    other = new_run(tmp_path / "other", replay=journal)
    ft.run_sync(other.next_epoch())
    assert not [change for change in other.changes if change.field == "train_on"]
    other.close()


@pytest.mark.parametrize(
    ("rollouts", "error", "said"),
    [
        ([], ConfigError, "no rollout was chosen"),
        (["e0/sum-1"], RunError, "the name of a group"),
        (["e0"], RunError, "the name of an epoch"),
        (["e0/sum-1/9"], RunError, "has the generations"),
        (["e9/sum-1/0"], IndexError, "epochs 0 to 1"),
        (3, ConfigError, "expected a name"),
    ],
)
def test_what_is_no_rollout_is_refused_and_nothing_is_trained(run, rollouts, error, said):
    with pytest.raises(error, match=said):
        ft.run_sync(run.train_on(rollouts))
    assert len(run) == 2 and run.state == "ready" and len(run._driver.adapter.submitted) == 2


def test_tags_are_for_preferences(run):
    with pytest.raises(ConfigError, match="preferences alone"):
        ft.run_sync(run.train_on(["e0/sum-1/2"], tags="good"))


@pytest.mark.parametrize("submit_chosen", [TrainerAdapter.submit_chosen, None])
def test_an_adapter_that_cannot_says_so_before_anything_is_done(tmp_path, submit_chosen):
    class RewardsAlone(FakeAdapter):
        initialized = 0

        async def initialize(self, run_config):
            type(self).initialized += 1
            await super().initialize(run_config)

    RewardsAlone.submit_chosen = submit_chosen
    run = new_run(tmp_path, RewardsAlone())
    ft.run_sync(run.next_epoch())
    run.close()
    again = ft.Run.open(run.folder, solve, spread, dataset=sums(3), adapter=RewardsAlone())
    with pytest.raises(
        ConfigError, match="RewardsAlone cannot train on rollouts that were chosen.*local_grpo.*trl_dpo"
    ):
        ft.run_sync(again.train_on(["e0/sum-1/2"]))
    assert len(again) == 1 and again.state == "ready" and RewardsAlone.initialized == 1
    again.close()


@pytest.mark.parametrize(
    "section",
    [{"_type": "openpipe_art", "base_model": "m"}, {"_type": "tinker", "model": "m", "base_url": "http://127.0.0.1:1"}],
    ids=lambda section: section["_type"],
)
def test_the_adapters_of_other_backends_cannot_either_and_contact_nobody(tmp_path, section):
    settings = {
        "trainer_adapters": {"adapter": section},
        "trajectory_builders": {"builder": {"_type": "eval_traj_builder"}},
        "trainers": {"trainer": {"_type": "epoch_trainer"}},
        "finetuning": {
            "enabled": True,
            "trainer": "trainer",
            "trajectory_builder": "builder",
            "trainer_adapter": "adapter",
            "output_dir": str(tmp_path),
        },
    }
    run = ft.Run.from_config(settings, name="run")
    with pytest.raises(ConfigError, match="cannot train on rollouts that were chosen.*local_grpo"):
        ft.run_sync(run.train_on(["e0/sum-1/2"]))
    assert not run.folder.exists()
    run.close()


def test_nor_can_a_trainer_on_a_cluster(tmp_path):
    run = ft.Run(solve, spread, sums(3), output_dir=tmp_path, name="run", engine="ray", ray={"trainer": True})
    with pytest.raises(ConfigError, match="Ray cluster.*cannot train on rollouts that were chosen"):
        ft.run_sync(run.train_on(["e0/sum-1/2"]))
    run.close()


def test_what_the_adapter_refuses_is_raised_and_the_run_goes_on(tmp_path):
    class Refusing(FakeAdapter):
        async def submit_chosen(self, trajectories):
            raise BackendError("these cannot be learned")

    run = new_run(tmp_path, Refusing())
    ft.run_sync(run.next_epoch())
    with pytest.raises(BackendError, match="these cannot be learned"):
        ft.run_sync(run.train_on(["e0/sum-1/2"]))
    assert len(run) == 1 and not [change for change in run.changes if change.field == "train_on"]
    assert ft.run_sync(run.next_epoch()).index == 1
    run.close()


def test_a_job_that_fails_is_recorded_and_raised(run):
    run._driver.adapter.outcome = "failed"
    with pytest.raises(JobFailed) as failed:
        ft.run_sync(run.train_on(["e0/sum-1/2"]))
    assert failed.value.epoch.index == 2 and len(run) == 3 and not run[2].trained


def test_preferences_go_to_an_adapter_that_takes_them(tmp_path):
    class Preferences(FakeAdapter):
        takes_preferences = True

    adapter = Preferences(policy=ScriptedPolicy(lambda messages, seed: f"reply {seed % 1009}"))
    run = new_run(tmp_path, adapter)
    ft.run_sync(run.next_epoch())
    run.label("e0/sum-1/0", "good")
    run.label("e0/sum-1/1", "bad")
    epoch = ft.run_sync(run.train_on(run.labels(), tags={"good": 1, "bad": 0}))
    ((pair,),) = adapter.submitted[-1].trajectories
    (preference,) = pair.episode
    assert isinstance(preference, DPOItem)
    assert preference.chosen_response == run.show("e0/sum-1/0").trajectory.episode[-1].content
    assert epoch.metrics.trajectories == 1
    assert run.journal().new.tolist()[-1] == "1 preference"
    run.close()
