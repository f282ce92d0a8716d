"""A Run over the Toolkit's own components: its ART plugin, its Customizer's trainer, its evaluation of a LangChain agent."""

import asyncio
import importlib.util
import json
import time

import matplotlib
import pytest
import toolkit

import finetune_nb as ft

pytestmark = [pytest.mark.slow, pytest.mark.proof]


@pytest.fixture
def run(place, llm, art, closing):
    return closing(ft.Run.from_nat(toolkit.write_config(place, llm.base_url), name="nat"))


async def test_an_epoch_of_the_toolkits_trainer_is_an_epoch_like_any_other(run, art, place, llm):
    backend = matplotlib.get_backend()
    epoch = await run.next_epoch()
    assert art.trained() == [["what is q5?", "what is q4?"]]
    assert [epoch.selection.example_ids[i] for i in epoch.selection.kept] == ["q5", "q4"]
    assert epoch.selection.left_out()["no_reward_spread"] == ["q3"]
    assert epoch.selection.inferred
    assert epoch.job.status == "completed"
    assert epoch.seconds["training"] < 5  # the Toolkit waits for 10 at least
    rows = run.trajectories()
    assert rows.groupby("example").reward.mean().round(3).to_dict() == {
        key: round(sum(rewards) / 2, 3) for key, rewards in toolkit.REWARDS.items()
    }
    assert rows.selected.sum() == 4
    episode = run[0].collection.trajectories[0][0].episode
    assert [(item.role.value, item.content) for item in episode] == [
        ("system", "Answer."),
        ("user", "what is q0?"),
        ("assistant", "ok"),
    ]
    assert run.plot_rewards().axes
    folder = place / "runs" / "nat"
    (line,) = [json.loads(text) for text in (folder / "training_metrics.jsonl").read_text().splitlines()]
    assert (line["run_id"], line["num_groups"]) == ("nat", 6)
    assert (folder / "reward_plot.png").stat().st_size > 10_000
    assert matplotlib.get_backend() == backend
    run.close()
    assert not [path for path in folder.rglob("*") if path.is_file() and b"sk-not-to-be-seen" in path.read_bytes()]


async def test_a_live_change_reaches_the_toolkits_next_selection(run, art):
    await run.next_epoch()
    run.curriculum = {"percentile": 1.0, "sort_ascending": True}
    epoch = await run.next_epoch()
    assert art.trained()[1] == [f"what is q{n}?" for n in (0, 1, 2, 4, 5)]
    assert epoch.curriculum.percentile == 1.0
    assert (run.journal().epoch == 1).all()


async def test_rollouts_are_counted_while_the_toolkit_evaluates(run, llm):
    reply, seen = llm.reply, []

    def noting(request):
        seen.append((run.progress.done, run.progress.total))
        return reply(request) if callable(reply) else reply

    llm.reply = noting
    await run.next_epoch()
    assert (run.progress.done, run.progress.total, run.progress.failed) == (12, 12, 0)
    assert max(done for done, _ in seen) < 12
    assert {total for _, total in seen} <= {6, 12}


async def test_one_example_is_tried_by_the_toolkits_workflow(run):
    by_id, by_position = await run.rollout("q2"), await run.rollout(-1)
    assert (by_id.metadata["id"], by_position.metadata["id"]) == ("q2", "q5")
    assert [(item.role.value, item.content) for item in by_id.episode] == [
        ("system", "Answer."),
        ("user", "what is q2?"),
        ("assistant", "ok"),
    ]
    assert by_id.reward in toolkit.REWARDS["q2"]
    assert len(run) == 0
    with pytest.raises(ft.RunError, match="no example 'q9': the dataset has 6 rows, with ids like 'q0'"):
        await run.rollout("q9")
    with pytest.raises(ft.RunError, match="not its own"):  # its model is behind the Toolkit's client
        await run.chat("1+1")


async def test_a_run_selects_as_nat_finetune_does(place, llm, art, closing):
    from nat.data_models.finetuning import FinetuneRunConfig
    from nat.finetuning.finetuning_runtime import finetuning_main
    from nat.runtime.loader import load_config

    path = toolkit.write_config(place, llm.base_url)
    config = load_config(path)
    from nat.plugins.openpipe.trainer_adapter import ARTTrainerAdapter

    quick = ARTTrainerAdapter.wait_until_complete.__defaults__
    ARTTrainerAdapter.wait_until_complete.__defaults__ = (0.05,)
    try:
        await finetuning_main(FinetuneRunConfig(config_file=config))
    finally:
        ARTTrainerAdapter.wait_until_complete.__defaults__ = quick
    theirs = art.trained()
    art.requests.clear()
    toolkit.start_anew()
    run = closing(ft.Run.from_nat(path))
    run.start()
    await run.wait_async()
    assert art.trained() == theirs
    assert len(theirs) == 3
    assert [len(groups) for groups in theirs] == [2, 4, 4]


async def test_a_run_goes_on_from_its_folder_where_the_toolkit_would_begin_anew(run, place, art, closing):
    await run.next_epoch()
    run.curriculum = {"percentile": 0.8}
    await run.next_epoch()
    run.close()
    again = closing(ft.Run.open(place / "runs" / "nat"))
    epoch = await again.next_epoch()
    assert epoch.index == 2
    assert epoch.curriculum.percentile == 0.8
    assert [len(groups) for groups in art.trained()] == [2, 4, 4]


async def test_a_failed_job_is_said_and_the_next_epoch_runs(run, art):
    art.fails = True
    with pytest.raises(ft.JobFailed) as caught:
        await run.next_epoch()
    assert caught.value.epoch.job.status == "failed"
    art.fails = False
    assert (await run.next_epoch()).job.status == "completed"


async def test_an_aborted_epoch_leaves_nothing_that_keeps_the_next_one_or_the_end_from_working(run, llm):
    going = asyncio.Event()
    loop, reply = asyncio.get_running_loop(), llm.reply

    def slow(request):
        loop.call_soon_threadsafe(going.set)
        time.sleep(0.5)
        return "ok"

    llm.reply = slow
    run.start(epochs=1)
    await asyncio.wait_for(going.wait(), 120)
    run.abort()
    await run.wait_async()
    assert len(run) == 0
    llm.reply = reply
    assert (await run.next_epoch()).job.status == "completed"
    run.close()  # the Toolkit's cleanup raises where an evaluation is left


async def test_a_backend_that_is_not_there_is_said(place, llm, closing):
    run = closing(ft.Run.from_nat(toolkit.write_config(place, llm.base_url)))
    with pytest.raises(ft.BackendError, match="does not reach its training backend"):
        await run.next_epoch()


async def test_a_validation_that_failed_is_missing_and_not_zero(place, llm, art, closing):
    path = toolkit.write_config(place, llm.base_url)
    run = closing(ft.Run.from_nat(path, validation=place / "not-there.json"))
    epoch = await run.next_epoch()
    (check,) = epoch.validations
    assert check.mean_reward != check.mean_reward
    assert check.error
    assert epoch.job.status == "completed"


# ── a trainer that trains only in its run() ──────────────────────────────────────────────────────────────────────────


def customizer(place, outcome="completed"):
    toolkit.PairsAdapter.submitted.clear()
    return toolkit.write_config(
        place,
        "http://127.0.0.1:9/v1",
        trajectory_builders={"builder": {"_type": "test_pairs"}},
        trainer_adapters={"adapter": {"_type": "test_pairs_adapter", "outcome": outcome}},
        trainers={"trainer": {"_type": "nemo_customizer_trainer", "num_runs": 2}},
    )


async def test_the_customizers_trainer_is_started_and_its_preferences_are_kept(place, closing):
    run = closing(ft.Run.from_nat(customizer(place), name="pairs"))
    run.start()
    await run.wait_async()
    (epoch,) = run.records
    assert epoch.job.status == "completed"
    assert epoch.metrics.trajectories == 6  # of two runs
    (submitted,) = toolkit.PairsAdapter.submitted
    assert sum(map(len, submitted.trajectories)) == 6
    run.close()
    stored = ft.Run.open(place / "runs" / "pairs")[0].collection.trajectories[4][0].episode[0]
    assert stored == ft.DPOItem(prompt="1+1", chosen_response="2", rejected_response="?")


async def test_what_it_cannot_do_says_why(place, closing):
    run = closing(ft.Run.from_nat(customizer(place)))
    with pytest.raises(ft.RunError, match=r"NeMoCustomizerTrainer trains only in its run\(\).*Use run.start"):
        await run.next_epoch()
    with pytest.raises(ft.RunError, match="NeMoCustomizerTrainer trains only"):
        run.curriculum = {"percentile": 0.5}


async def test_its_failed_job_is_raised(place, closing):
    run = closing(ft.Run.from_nat(customizer(place, "failed")))
    run.start()
    with pytest.raises(ft.JobFailed):
        await run.wait_async()
    assert run[0].job.status == "failed"


# ── what keeps it from working ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "pin"),
    [
        ("nat.plugins.profiler", "nvidia-nat-profiler==1.9.0"),
        ("langchain_core", r"nvidia-nat-langchain\[openai\]==1.9.0"),
    ],
)
def test_a_package_that_the_toolkit_does_not_install_itself_is_named(place, llm, monkeypatch, module, pin):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    with pytest.raises(ft.ConfigError, match=pin):
        ft.Run.from_nat(toolkit.write_config(place, llm.base_url))


async def test_an_unknown_plugin_is_named_with_its_pin(place, llm, closing):
    path = toolkit.write_config(place, llm.base_url, trainers={"trainer": {"_type": "openpipe_art_trainre"}})
    run = closing(ft.Run.from_nat(path))
    with pytest.raises(ft.ConfigError, match=r"trainers.trainer is of type.*openpipe-art==0.5.17"):
        await run.next_epoch()


INSTALLED_LATER = """
from nat.cli.register_workflow import register_function
from nat.data_models.function import FunctionBaseConfig


class LateConfig(FunctionBaseConfig, name="test_installed_later"):
    pass


@register_function(config_type=LateConfig)
async def agent(config, builder):
    async def answer(question: str) -> str:
        return question

    yield answer
"""


async def test_a_package_that_a_cell_installs_after_the_first_try_is_found(place, llm, art, closing, monkeypatch):
    path = toolkit.write_config(place, llm.base_url, workflow={"_type": "test_installed_later"})
    run = closing(ft.Run.from_nat(path))
    with pytest.raises(ft.ConfigError, match="test_installed_later"):
        await run.next_epoch()
    site = place / "site"
    about = site / "installed_later-1.dist-info"
    about.mkdir(parents=True)
    (site / "installed_later.py").write_text(INSTALLED_LATER)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-later\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[nat.components]\ninstalled_later = installed_later\n")
    monkeypatch.syspath_prepend(site)
    epoch = await run.next_epoch()
    assert "no model call" in str(epoch)  # of an agent that asks none


def test_a_config_without_finetuning_is_refused(place, llm):
    path = toolkit.write_config(place, llm.base_url, finetuning={"enabled": False})
    with pytest.raises(ft.ConfigError, match="finetuning.enabled: true"):
        ft.Run.from_nat(path)


def test_overrides_are_the_toolkits_and_their_secrets_are_not_stored(place, llm, closing):
    path = toolkit.write_config(place, llm.base_url)
    override = [("finetuning.num_epochs", 7), ("llms.model.api_key", "sk-another-secret")]
    run = closing(ft.Run.from_nat(path, override=override))
    assert run.config.finetuning.num_epochs == 7
    assert "sk-another-secret" not in json.dumps(run.config.stored(), default=str)
    assert "sk-another-secret" not in repr(run.config)
