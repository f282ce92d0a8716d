"""What `diagnose` says of records: each finding on both sides of its limit, its evidence, and how it shows itself."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from pathlib import Path

import pytest
from factories import item
from records import epoch_of

import finetune_nb as ft
from finetune_nb.analysis import diagnosis as limits
from finetune_nb.analysis.diagnosis import Diagnosis, Finding, diagnosis, epoch_warnings
from finetune_nb.text import number
from finetune_nb.training.curriculum import group_statistics
from finetune_nb.training.metrics import length_correlation
from finetune_nb.types import RolloutFailure, TrainingJobStatus, TrainingStatusEnum, Trajectory, Validation

DATA = Path(__file__).parents[1] / "data"


def rollout(
    example, generation, reward, reply="4", *, reason="stop", length=None, messages=(), **metadata
) -> Trajectory:
    """A question and a reply of `length` tokens."""
    logprobs = [-0.5] * (length or len(reply) or 1)
    turn = item("assistant", reply, logprobs=logprobs, finish_reason=reason)
    about = {"id": example, "generation": generation, **metadata}
    if math.isnan(reward):
        about["reward_error"] = "ValueError: no number <b>here</b>"
    return Trajectory.model_construct(
        episode=[item("user", example), *messages, turn], reward=reward, shaped_rewards=None, metadata=about
    )


def epoch(make, index=0, groups=10, size=8, **metrics):
    """An epoch of the rollouts `make(group, generation)`."""
    made = epoch_of([[make(g, k) for k in range(size)] for g in range(groups)], index)
    return dataclasses.replace(made, metrics=dataclasses.replace(made.metrics, **metrics)) if metrics else made


def mixed(group, generation):
    """A rollout of a group that teaches, with a reply of its own."""
    return rollout(f"q{group}", generation, float(generation % 2), f"{group} and {generation}")


def trained(made, status="completed", message=None, **metrics):
    """The epoch, with a training job."""
    job = TrainingJobStatus(
        run_id="run", backend="b", status=TrainingStatusEnum(status), message=message, metadata={"metrics": metrics}
    )
    return dataclasses.replace(made, job=job)


def kinds(*epochs, weights=None):
    return {finding.kind for finding in diagnosis("run", epochs, weights)}


def finding(kind, *epochs, weights=None) -> Finding:
    return diagnosis("run", epochs, weights)[kind]


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_epoch_that_teaches_has_no_finding():
    found = diagnosis("run", [epoch(mixed)])
    assert not found and len(found) == 0 and list(found) == [] and found.findings == ()
    assert repr(found).startswith("epoch 0: nothing was found that keeps it from learning")


def test_missing_rewards_are_a_finding_from_a_twentieth_on_and_critical_from_half_on():
    def missing(count):
        def make(group, generation):
            place = 8 * group + generation
            return rollout(f"q{group}", generation, math.nan if place < count else float(generation % 2), str(place))

        return epoch(make)

    assert "rewards_missing" not in kinds(missing(3))  # of 80
    few, many = finding("rewards_missing", missing(4)), finding("rewards_missing", missing(40))
    assert (few.severity, many.severity) == ("warning", "critical")
    assert (few.number, many.number) == (0.05, 0.5)
    assert few.evidence == ("e0/q0/0", "e0/q0/1", "e0/q0/2", "e0/q0/3")
    assert "4 of 80 rewards are missing (5 %): ValueError: no number" in few.sentence
    assert 'only="failed"' in few.next_step


def test_rollouts_that_failed_are_counted_and_named():
    made = epoch(mixed)
    made.collection.failures = [RolloutFailure("q7", k, "TimeoutError: too slow", []) for k in range(5)]
    made = dataclasses.replace(made, metrics=dataclasses.replace(made.metrics, failures=5))
    found = finding("rollouts_failed", made)
    assert "5 of 85 rollouts failed (6 %), most often with TimeoutError: too slow" in found.sentence
    assert found.evidence[:2] == ("e0/q7/0", "e0/q7/1")


@pytest.mark.parametrize(
    ("rewards", "kind"),
    [
        (lambda g, k: 0.5, "reward_constant"),
        (lambda g, k: float(g > 0 or k > 0), "too_easy"),
        (lambda g, k: float(g == 0 and k == 0), "too_hard"),
        (lambda g, k: float(k % 2) if g == 0 else 0.5, "too_coarse"),
    ],
)
def test_why_groups_do_not_differ_is_told_apart(rewards, kind):
    found = finding(kind, epoch(lambda g, k: rollout(f"q{g}", k, rewards(g, k), f"{g} {k}")))
    assert found.evidence and found.severity in ("critical", "warning")
    assert kinds(epoch(lambda g, k: rollout(f"q{g}", k, rewards(g, k), f"{g} {k}"))) == {kind}


def test_a_quarter_of_the_groups_is_enough_to_teach():
    def teaching(count):
        return epoch(lambda g, k: rollout(f"q{g}", k, float(k % 2) if g < count else 0.0, f"{g} {k}"), groups=20)

    assert kinds(teaching(5)) == set()
    assert kinds(teaching(4)) == {"too_hard"}


def test_examples_that_became_easy_are_information_and_those_that_were_easy_from_the_start_a_fault():
    hard = epoch(mixed)
    easy = [epoch(lambda g, k: rollout(f"q{g}", k, 1.0, f"{g} {k}"), index) for index in (1, 2, 3)]
    assert finding("too_easy", hard, *easy).severity == "info"
    assert diagnosis("run", easy, records=[hard, *easy])["too_easy"].severity == "info"
    nearly = epoch(lambda g, k: rollout(f"q{g}", k, float(g > 0 or k > 0), f"{g} {k}"))
    assert finding("too_easy", nearly, *easy).severity != "info"


def test_small_groups_are_a_finding_where_larger_ones_would_teach():
    def pairs(index):
        return epoch(lambda g, k: rollout(f"q{g}", k, float((g + k) % 5 == 0), f"{g} {k}"), index, groups=30, size=2)

    found = finding("too_few_generations", pairs(0))
    assert "of the groups teach with 2 generations, and about" in found.sentence and found.next_step.startswith(
        "generations=8"
    )
    alone = epoch(lambda g, k: rollout(f"q{g}", k, float(g % 2), f"{g} {k}"), size=1)
    assert finding("too_few_generations", alone).severity == "critical"


def scored(group, generation, **scores):
    return rollout(f"q{group}", generation, sum(scores.values()), f"{group} {generation}", scores=scores)


def test_a_component_that_outweighs_another_is_a_finding_and_one_that_seldom_differs_is_none():
    def make(scale, seldom=False):
        def one(g, k):
            tidy = float(k % 3 == 0) if not seldom or g == 0 else 0.0
            return scored(g, k, long=scale * float(k % 2), tidy=tidy)

        return epoch(one)

    weights = {"long": 1.0, "tidy": 1.0}
    found = finding("component_dominates", make(50.0), weights=weights)
    assert found.number > 0.99 and "'long' decides the reward" in found.sentence and "'tidy'" in found.sentence
    assert "run.rescore(weights={'long': 0.05})" in found.next_step
    assert "component_dominates" not in kinds(make(10.0), weights=weights)
    assert "component_dominates" not in kinds(make(50.0, seldom=True), weights=weights)
    assert "component_dominates" not in kinds(make(50.0))  # evaluators that are no part of the reward


def test_a_score_that_was_never_above_0_is_a_finding_if_it_is_part_of_the_reward():
    made = epoch(lambda g, k: scored(g, k, tags=0.0, right=float(k % 2)))
    assert finding("score_constant", made, weights={"tags": 1.0, "right": 1.0}).severity == "warning"
    assert "score_constant" not in kinds(made)
    once = epoch(lambda g, k: scored(g, k, tags=1.0, right=float(k % 2)))
    assert "score_constant" not in kinds(once, made, weights={"tags": 1.0, "right": 1.0})
    assert "score_constant" not in kinds(once, weights={"tags": 1.0, "right": 1.0})  # everything has the format


# ── length ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def correlation(*rollouts):
    import numpy as np

    groups = [list(rollouts)]
    tokens = np.array([len(each.episode[-1].logprobs) for each in rollouts])
    messages = np.array([len(each.episode) for each in rollouts])
    cut = np.array([each.episode[-1].metadata["finish_reason"] == "length" for each in rollouts])
    return length_correlation(group_statistics(groups), tokens, messages, cut)


def test_a_reward_of_the_length_correlates_with_it_and_its_opposite_with_the_opposite():
    lengths = range(1, 33)
    assert correlation(*(rollout("q", k, 0.1 * k, length=k) for k in lengths)) == pytest.approx(1)
    assert correlation(*(rollout("q", k, -3.0 * k, length=k) for k in lengths)) == pytest.approx(-1)
    assert abs(correlation(*(rollout("q", k, float(k // 2 % 2), length=k) for k in lengths))) < 0.2


def test_replies_of_more_turns_and_replies_that_were_cut_are_not_compared_by_length():
    turn = item("assistant", "hm")
    asked = [rollout("q", k, 0.0, length=k % 2 + 1) for k in range(16)]
    called = [rollout("q", k, 1.0, length=20 + k % 2, messages=[turn]) for k in range(16, 32)]
    assert correlation(*asked, *called) == pytest.approx(0, abs=1e-9)
    assert correlation(*asked, *(rollout("q", k, 1.0, length=20 + k % 2) for k in range(16, 32))) > 0.9
    cut = [rollout("q", k, 0.0, length=64, reason="length") for k in range(16)]
    whole = [rollout("q", k, float(k % 2), length=k // 2 % 3 + 1) for k in range(32)]
    assert correlation(*whole, *cut) == pytest.approx(correlation(*whole))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e300])
def test_it_does_not_depend_on_the_scale_of_the_rewards(scale):
    assert correlation(*(rollout("q", k, scale * k, length=k) for k in range(1, 33))) == pytest.approx(1)


def test_too_few_rollouts_say_nothing_and_missing_rewards_do_not_count():
    assert correlation(*(rollout("q", k, 0.1 * k, length=k) for k in range(1, 16))) is None
    assert correlation(*(rollout("q", k, 1.0, length=k) for k in range(1, 33))) is None  # no spread
    assert correlation(*(rollout("q", k, 0.1 * k, length=5) for k in range(1, 33))) is None  # all as long
    missing = [rollout("q", k, math.nan, length=k) for k in range(40)]
    assert correlation(*(rollout("q", k, 0.1 * k, length=k) for k in range(1, 33)), *missing) == pytest.approx(1)


def test_the_length_must_explain_the_reward_in_every_one_of_the_newest_epochs():
    def of_length(index):
        return epoch(lambda g, k: rollout(f"q{g}", k, -0.1 * (k + g), "x" * (k + g + 1)), index)

    found = finding("length_explains_reward", of_length(0), of_length(1))
    assert found.number == pytest.approx(1) and "shorter is better" in found.sentence
    other = epoch(lambda g, k: rollout(f"q{g}", k, float(k // 2 % 2), "x" * (k + g + 1)), 1)
    assert "length_explains_reward" not in kinds(of_length(0), other)
    assert epoch_warnings(of_length(0).metrics) == [found.sentence]
    assert epoch_warnings(other.metrics) == []


# ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cut_replies_are_a_finding_from_a_fifth_on_and_another_one_where_no_reply_ends():
    def cut(count):
        def make(g, k):
            return rollout(f"q{g}", k, float(k % 2), f"{g} {k}", reason="length" if 8 * g + k < count else "stop")

        return epoch(make)

    assert kinds(cut(15)) == set() and epoch_warnings(cut(15).metrics) == []
    assert finding("replies_cut", cut(16)).severity == "warning"
    assert epoch_warnings(cut(16).metrics) == ["16 of 80 replies cut at the token limit"]
    assert finding("replies_cut", cut(40)).severity == "critical"
    assert kinds(cut(80)) == {"end_token_never_sampled"}


TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_tools_that_are_offered_and_not_called_are_told_from_calls_that_are_not_parsed():
    def make(reply, **metadata):
        return epoch(lambda g, k: rollout(f"q{g}", k, float(k % 2), f"{reply} {g} {k}", **metadata))

    assert kinds(make("no")) == set()
    assert kinds(make("no", tools=TOOLS)) == {"tools_never_called"}
    written = make('<tool_call>{"name": "add", "arguments": {}}</tool_call>', tools=TOOLS)
    assert kinds(written) == {"tool_calls_not_parsed"}
    call = item(
        "assistant", "", tool_calls=[{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    )
    called = epoch(lambda g, k: rollout(f"q{g}", k, float(k % 2), f"{g} {k}", messages=[call], tools=TOOLS))
    assert kinds(called) == set()


def test_one_reply_to_all_questions_is_a_finding_unless_it_is_the_right_one():
    def make(reward):
        return epoch(lambda g, k: rollout(f"q{g}", k, reward(g, k), "I do not know." if k < 7 else f"{g}"))

    found = finding("replies_all_alike", make(lambda g, k: float(k == 7)))
    assert found.number == 0.875 and "to 10 questions: 'I do not know.'" in found.sentence
    assert "replies_all_alike" not in kinds(make(lambda g, k: float(k < 7 or g > 0)))


def test_replies_that_say_the_same_again_and_again_are_a_finding():
    def make(loops):
        return epoch(
            lambda g, k: rollout(f"q{g}", k, float(k % 2), f"{g} {k} " + "think again. " * (20 if k < loops else 1))
        )

    assert kinds(make(1)) == set()
    assert kinds(make(2)) == {"replies_repeat_themselves"}


# ── the policy and its training ──────────────────────────────────────────────────────────────────────────────────────


def few_teach(index, entropy, teaching=2):
    def make(g, k):
        return rollout(f"q{g}", k, float(k % 2) if g < teaching else 0.0, f"{g} {k}")

    return epoch(make, index, mean_entropy=entropy)


def test_entropy_that_falls_to_nothing_is_a_finding_unless_the_task_is_mastered():
    assert "entropy_collapsed" in kinds(few_teach(0, 0.8), few_teach(1, 0.01))
    assert "entropy_collapsed" not in kinds(few_teach(0, 0.8), few_teach(1, 0.3))
    assert kinds(few_teach(0, 0.8, 3), few_teach(1, 0.01, 3)) == set()
    assert "entropy_collapsed" not in kinds(epoch(mixed, mean_entropy=0.8), epoch(mixed, 1, mean_entropy=0.01))
    solved = [epoch(lambda g, k: rollout(f"q{g}", k, 1.0, f"{g} {k}"), i, mean_entropy=0.01) for i in (1, 2, 3)]
    assert kinds(few_teach(0, 0.8), *solved) == {"too_easy"}


def test_entropy_that_grows_far_above_its_lowest_is_a_finding():
    assert "entropy_exploded" in kinds(epoch(mixed, mean_entropy=0.4), epoch(mixed, 1, mean_entropy=1.1))
    assert kinds(epoch(mixed, mean_entropy=0.7), epoch(mixed, 1, mean_entropy=1.1)) == set()
    assert kinds(epoch(mixed, mean_entropy=4.0)) == set()  # a model's own


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"kl": 0.01, "weights_moved": 1.0, "logprob_gap": 1e-6}, set()),
        ({"kl": 0.3, "weights_moved": 1.0}, {"learning_rate_too_large"}),
        ({"kl": 0.01, "clip_fraction": 0.4}, {"learning_rate_too_large"}),
        ({"kl": 1e-9, "weights_moved": 0.9}, {"learning_rate_too_small"}),
        ({"kl": 1e-3, "weights_moved": 0.01}, {"learning_rate_too_small"}),
        ({"kl": 0.01, "logprob_gap": 0.05}, {"logprob_gap"}),
        ({"kl": 0.01, "logprob_gap": 0.005, "rounding_gap": 1e-3}, {"logprob_gap"}),
        ({"kl": 0.01, "logprob_gap": 0.03, "rounding_gap": 0.05, "effective_samples": 0.99}, set()),
        ({"kl": 0.01, "effective_samples": 0.97, "importance_ratio_max": 4.0}, {"sampler_differs"}),
        ({"kl": 0.01, "logprob_gap": 0.2, "effective_samples": 0.97, "importance_bounded": 0.0}, set()),
        ({"kl": 0.01, "effective_samples": 0.4, "importance_bounded": 0.3}, {"sampler_differs"}),
        ({"kl": math.nan, "clip_fraction": math.nan, "weights_moved": math.nan}, set()),
        ({}, set()),
    ],
)
def test_what_training_measured_is_a_finding_beyond_its_limit(metrics, expected):
    epochs = [trained(epoch(mixed, index), learning_rate=1e-4, **metrics) for index in range(3)]
    assert kinds(*epochs) == expected
    for each in diagnosis("run", epochs):
        assert "learning_rate" not in each.kind or 'run.live["adapter.learning_rate"] = ' in each.next_step


def test_a_job_that_failed_is_a_finding_with_its_message():
    found = finding("training_failed", epoch(mixed), trained(epoch(mixed, 1), "failed", "BackendError: out of memory"))
    assert (
        found.severity == "critical" and "BackendError: out of memory" in found.sentence and found.evidence == ("e1",)
    )


def test_drift_is_a_finding_from_a_tenth_of_the_continued_turns_on():
    assert kinds(epoch(mixed, continued_turns=100, drifted_turns=9)) == set()
    assert kinds(epoch(mixed, continued_turns=100, drifted_turns=10)) == {"drift"}
    assert kinds(epoch(mixed, continued_turns=4, drifted_turns=4)) == set()


def test_validation_that_does_not_follow_training_is_a_finding():
    def run(before, after):
        epochs = []
        for index, share in enumerate([2, 4, 6]):
            made = epoch(lambda g, k, share=share: rollout(f"q{g}", k, float(k < share), f"{g} {k}"), index)
            checks = {0: before, 2: after}
            if index in checks:
                made = dataclasses.replace(made, validations=(Validation(index, 0, checks[index], 8),))
            epochs.append(made)
        return epochs

    assert kinds(*run(0.2, 0.21)) == {"memorised"}
    assert kinds(*run(0.2, 0.6)) == set()
    assert kinds(*run(0.2, math.nan)) == set()


# ── the object ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_findings_are_sorted_by_severity_and_stand_in_a_frame():
    made = epoch(lambda g, k: rollout(f"q{g}", k, 0.0, f"{g} {k}", reason="length" if k < 2 else "stop"))
    found = diagnosis("run", [made])
    assert [each.kind for each in found] == ["reward_constant", "replies_cut"]
    frame = found.frame()
    assert frame.columns.tolist() == ["kind", "severity", "sentence", "number", "next_step", "evidence"]
    assert frame.severity.tolist() == ["critical", "warning"]
    assert frame.number.dtype == "float64" and frame.evidence[1].startswith("e0/q0/0 e0/q0/1")
    with pytest.raises(KeyError):
        found["drift"]
    assert len(diagnosis("run", []).frame()) == 0


def test_what_could_not_be_looked_at_is_said():
    assert diagnosis("run", []).unchecked == ("nothing: no epoch has a rollout that finished",)
    assert repr(diagnosis("run", [])).startswith("no epoch: nothing to look at yet")
    said = " ".join(diagnosis("run", [epoch(mixed)]).unchecked)
    assert "entropy" in said and "learning rate" in said and "validation" in said
    measured = [trained(epoch(mixed, i, mean_entropy=0.5), kl=0.01) for i in range(2)]
    checked = [dataclasses.replace(each, validations=(Validation(each.index, 0, 0.5, 8),)) for each in measured]
    assert diagnosis("run", checked).unchecked == ()


def test_an_epoch_in_which_every_rollout_failed_is_looked_at_too():
    lost = epoch_of([])
    lost.collection.failures = [RolloutFailure("q", 0, "E: x", [])]
    lost = dataclasses.replace(lost, metrics=dataclasses.replace(lost.metrics, failures=1))
    assert kinds(lost) == {"rollouts_failed"}
    assert kinds(epoch(mixed), dataclasses.replace(lost, index=1)) == set()  # 1 of 81


def test_text_of_users_and_models_is_shown_as_text():
    bad = "<script>alert(1)</script>\n\x1b[31m"
    made = epoch(lambda g, k: rollout(f"{bad}{g}", k, math.nan, bad))
    markup, text = diagnosis(bad, [made])._repr_html_(), repr(diagnosis(bad, [made]))
    assert "<script" not in markup and "<b>here" not in markup and "&lt;script&gt;" in markup
    assert "\x1b" not in text and "\x1b" not in markup


def test_a_run_can_be_asked_for_some_epochs_and_from_the_disk_and_what_older_releases_recorded_is_enough(
    make_run, tmp_path
):
    run = make_run(reward=lambda item: 0.0)
    for _ in range(2):
        ft.run_sync(run.next_epoch())
    found = run.diagnose(0)
    assert found.epochs == (0,) and found["reward_constant"].number == 0
    assert repr(ft.Run.open(run.folder).diagnose()) == repr(run.diagnose())
    with pytest.raises(IndexError):
        run.diagnose(7)
    with zipfile.ZipFile(DATA / "run_of_format_1.zip") as file:
        file.extractall(tmp_path)
    older = ft.Run.open(tmp_path / "runs" / "first").diagnose()
    assert isinstance(older, Diagnosis) and len(older.epochs) > 2
    assert "rewards_missing" in [each.kind for each in older]
    assert any(each.startswith("entropy") for each in older.unchecked)


def test_warnings_of_an_epoch_stand_on_its_card_and_in_its_line():
    made = epoch(lambda g, k: rollout(f"q{g}", k, float(k % 2), f"{g} {k}", reason="length" if k < 4 else "stop"))
    assert "40 of 80 replies cut at the token limit" in repr(made)
    assert "40 of 80 replies cut at the token limit" in made._repr_html_()
    quiet = few_teach(0, 0.02)
    assert f"entropy {number(0.02)} nats a token: the policy hardly explores" in repr(quiet)
    mastered = epoch(lambda g, k: rollout(f"q{g}", k, float(g + k > 0), f"{g} {k}"), mean_entropy=0.02)
    assert epoch_warnings(mastered.metrics) == []
    assert epoch_warnings(epoch(mixed).metrics) == []


def test_every_limit_is_used():
    import inspect

    source = inspect.getsource(limits)
    for name in [name for name in vars(limits) if name.isupper() and name != "CHECKS"]:
        assert source.count(name) > 1, name
