"""Under `Run.from_nat` the Toolkit's own components lose no failure, and every setting that is taken has an effect."""

import time

import pytest
import toolkit

import finetune_nb as ft

pytestmark = [pytest.mark.slow, pytest.mark.proof]

REWARDS: dict[str, list[float | None]] = {"q0": [0.0, 1.0], "q1": [1.0, 0.0], "q2": [0.0, 1.0]}


def config(place, llm, rewards=REWARDS, finetuning=None, **sections):
    """A config in which every group is trained on."""
    every = {"curriculum_learning": {"enabled": False}, **(finetuning or {})}
    return toolkit.write_config(place, llm.base_url, rewards, finetuning=every, **sections)


def sent(art):
    """What the last training job was sent: by question the rewards."""
    groups = [body for path, body in art.requests if path == "/_train_model"][-1]["trajectory_groups"]
    found = {}
    for trajectory in (each for group in groups for each in group["trajectories"]):
        question = next(m["content"] for m in trajectory["messages_and_choices"] if m.get("role") == "user")
        found.setdefault(question, []).append(trajectory["reward"])
    return found


async def test_a_rollout_that_fails_under_the_toolkits_builder_is_a_row_with_its_error(
    place, llm, art, closing, monkeypatch
):
    monkeypatch.setattr(toolkit, "RAISES_FOR", "what is q1?")
    run = closing(ft.Run.from_nat(config(place, llm)))
    epoch = await run.next_epoch()
    rows = run.trajectories()
    failed = rows[rows.error.notna()]
    assert failed.trajectory.tolist() == ["e0/q1/0", "e0/q1/1"]
    assert set(failed.error) == {"RuntimeError: this agent has no answer"}
    assert failed.reward.isna().all()
    assert (epoch.metrics.trajectories, epoch.metrics.failures) == (4, 2)
    assert (run.progress.total, run.progress.done, run.progress.failed) == (6, 6, 2)
    assert sent(art).keys() == {"what is q0?", "what is q2?"}


async def test_a_reward_that_is_missing_is_trained_on_by_nobody(place, llm, art, closing):
    run = closing(ft.Run.from_nat(config(place, llm, REWARDS | {"q1": [1.0, None]})))
    await run.next_epoch()
    rows = run.trajectories().set_index("trajectory")
    (missing,) = rows.index[rows.reward.isna()]
    assert missing.startswith("e0/q1/")
    assert rows.error[missing] == "no score by the reward 'table': none was given"
    assert rows.reward.dropna().tolist().count(0.0) == 2
    assert sorted(sent(art).pop("what is q1?", [1.0])) == [1.0]
    assert sorted(sent(art)["what is q0?"]) == [0.0, 1.0]


async def test_max_concurrency_bounds_all_generations_together_and_is_live(place, llm, art, closing):
    running = most = 0
    reply = llm.reply

    def slow(request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return reply(request) if callable(reply) else reply

    llm.reply = slow
    rewards = {f"q{n}": [0.0, 1.0] for n in range(8)}
    run = closing(ft.Run.from_nat(config(place, llm, rewards)))
    assert run.live["eval.max_concurrency"] == 4
    found = []
    for limit in (4, 1, 6):
        most = 0
        run.live["eval.max_concurrency"] = limit
        await run.next_epoch()
        found.append(most)
    assert found[1] == 1
    assert found[0] <= 4 < found[2] <= 6


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"reward_function": {"name": "tabel"}},
            "finetuning.reward_function.name: 'tabel'.*eval.evaluators.*'table'",
        ),
        ({"trainer": "trianer"}, "finetuning.trainer: 'trianer'.*'trainer'"),
        ({"trajectory_builder": "bulider"}, "finetuning.trajectory_builder: 'bulider'.*'builder'"),
        ({"trainer_adapter": "adaptor"}, "finetuning.trainer_adapter: 'adaptor'.*'adapter'"),
    ],
)
def test_a_name_that_is_misspelt_is_an_error_before_the_first_rollout(place, llm, section, said):
    with pytest.raises(ft.ConfigError, match=said):
        ft.Run.from_nat(config(place, llm, finetuning=section))
    assert llm.requests == []


async def test_learning_rate_and_beta_of_the_config_reach_the_backend(place, llm, art, closing):
    adapter = {
        "_type": "openpipe_art_trainer_adapter",
        "backend": {"ip": "127.0.0.88", "port": 7999, "base_model": "tiny"},
        "training": {"learning_rate": 3e-6, "beta": 0.25},
    }
    run = closing(ft.Run.from_nat(config(place, llm, trainer_adapters={"adapter": adapter})))
    for _ in range(2):
        await run.next_epoch()
        asked = [body for path, body in art.requests if path == "/_train_model"][-1]["config"]
        assert (asked["learning_rate"], asked["kl_penalty_coef"]) == (3e-6, 0.25)


async def test_no_file_of_an_evaluation_holds_a_credential(place, llm, art, closing):
    path = config(place, llm)
    run = closing(ft.Run.from_nat(path))
    await run.next_epoch()
    written = [each for each in place.rglob("*") if each.is_file() and each != path]
    assert written
    assert not [each for each in written if b"sk-not-to-be-seen" in each.read_bytes()]


async def test_a_validation_follows_the_last_epochs_training(place, llm, art, closing):
    path = config(place, llm, finetuning={"num_epochs": 2})
    run = closing(ft.Run.from_nat(path, validation=place / "rows.json"))
    first, last = await run.next_epoch(), await run.next_epoch()
    assert (len(first.validations), len(last.validations)) == (1, 1)
    paths = [path for path, _ in art.requests]
    assert paths.count("/_train_model") == 2
    asked_before = len(llm.requests)
    assert asked_before == 3 * (1 + 2 + 2 + 1)  # validated, two generations, two generations, validated


async def test_what_is_live_is_what_takes_effect(place, llm, art, closing):
    run = closing(ft.Run.from_nat(config(place, llm)))
    assert list(run.live) == ["eval.max_concurrency"]
