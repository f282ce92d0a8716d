"""The entropy of the policy at each sampled token: measured where the sampler has the logits, stored, and shown."""

from __future__ import annotations

import asyncio
import math
import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

import torch
from factories import collected, item, make_epoch, sampled

import finetune_nb as ft
from finetune_nb.analysis.messages import tokens_of
from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.frames import tokens
from finetune_nb.plots import plot_training
from finetune_nb.store.trajectory_table import COLUMNS, collection_of, table_of
from finetune_nb.testing import sums
from finetune_nb.training.curriculum import group_statistics, select
from finetune_nb.training.metrics import epoch_metrics
from finetune_nb.types import CurriculumSettings, CurriculumState, ReplyFormat, SamplingParams, Trajectory

PROMPT = "What is 12+34?"


@pytest.fixture(scope="module")
def policy() -> LocalPolicy:
    policy = LocalPolicy.load("embedded")
    policy.record_entropy = True
    return policy


def sampled_with(policy: LocalPolicy, *params: SamplingParams):
    async def all_at_once():
        ids = policy.encode(PROMPT)
        return ids, await asyncio.gather(*(policy.sample(ids, each, seed) for seed, each in enumerate(params)))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 0.3, 2.0), (0.0, 1.0)], ids=str)
def test_it_is_of_the_models_own_distribution_at_temperature_1_whatever_was_sampled_at(policy, temperatures):
    params = [SamplingParams(temperature=temperature, max_tokens=12) for temperature in temperatures]
    ids, samples = sampled_with(policy, *params)
    for sample in samples:
        with torch.inference_mode():
            logits = policy.model(torch.tensor([ids + sample.ids])).logits[0, len(ids) - 1 : -1]
        expected = torch.distributions.Categorical(logits=logits).entropy().numpy()
        assert len(sample.entropies) == len(sample.ids) == len(sample.logprobs)
        np.testing.assert_allclose(sample.entropies, expected, rtol=1e-3, atol=1e-3)
        assert expected.max() > 0.01  # there is something to measure
        assert sample.entropies == np.array(sample.entropies, np.float16).tolist()


def test_a_form_that_the_reply_is_held_to_does_not_change_what_is_measured(policy):
    pytest.importorskip("llguidance")
    form = ReplyFormat(schema='{"type": "integer"}')
    ids, (sample,) = sampled_with(policy, SamplingParams(max_tokens=3, reply_format=form))
    with torch.inference_mode():
        logits = policy.model(torch.tensor([ids])).logits[0, -1]
    assert sample.entropies[0] == pytest.approx(
        torch.distributions.Categorical(logits=logits).entropy().item(), abs=2e-3
    )


def test_what_is_sampled_is_the_same_with_and_without_it_and_without_it_nothing_is_recorded(policy):
    params = [SamplingParams(max_tokens=20), SamplingParams(temperature=0.7, max_tokens=20)]
    _, with_it = sampled_with(policy, *params)
    policy.record_entropy = False
    try:
        _, without = sampled_with(policy, *params)
    finally:
        policy.record_entropy = True
    assert [(each.ids, each.logprobs) for each in with_it] == [(each.ids, each.logprobs) for each in without]
    assert all(each.entropies is None for each in without)


def test_logits_of_minus_infinity_add_nothing():
    from finetune_nb.backends.local.sampling import SampleRequest, _note_entropies

    row = SampleRequest([1], SamplingParams(), 0)
    logprobs = torch.tensor([[0.0, 0.0, -math.inf]]).log_softmax(1)
    _note_entropies([row], logprobs.exp(), logprobs)
    assert row.entropies == [float(np.float16(math.log(2)))]


def test_replicas_record_it_too(policy):
    assert policy.replica()().record_entropy is True


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}], max_tokens=8)).content


def right(output, answer):
    return float(answer in output)


@pytest.mark.parametrize("on", [True, False])
def test_a_run_has_it_in_its_frames_its_plot_its_files_and_its_heat_map(tmp_path, on):
    config = {} if on else {"record_entropy": False}
    run = ft.Run(solve, right, sums(2), generations=2, output_dir=tmp_path, training=config)
    ft.run_sync(run.next_epoch())
    run.close()
    file = pq.read_table(run.folder / "trajectories" / "epoch-000000.parquet")
    for each in (run, ft.Run.open(run.folder)):
        tokens, messages, epochs = each.tokens(), each.messages(), each.epochs()
        assert len(tokens) > 4 and str(tokens.entropy.dtype) == "float64"
        markup = each.show(heat="entropy")._repr_html_()
        if not on:
            assert (
                tokens.entropy.isna().all() and epochs.mean_entropy.isna().all() and messages.mean_entropy.isna().all()
            )
            assert "neither the entropy" in markup
            continue
        assert tokens.entropy.notna().all() and tokens.entropy.between(0, math.log(400)).all()
        assert epochs.mean_entropy[0] == pytest.approx(tokens.entropy.mean())
        of_turns = tokens.groupby(["trajectory", "message"], observed=True).entropy.mean()
        in_messages = messages[messages.role == "assistant"].set_index(["trajectory", "message"]).mean_entropy
        pd.testing.assert_series_equal(in_messages, of_turns, check_names=False, check_index_type=False)
        assert "neither the entropy" not in markup and ">entropy</th>" in re.sub(r"<th [^>]*>", "<th>", markup)
        assert "entropy" in plot_training(each).alt_text
        pd.testing.assert_frame_equal(tokens, run.tokens())
    assert str(file.schema.field("entropies").type).count("halffloat") == 1
    assert [known for lists in file["entropies"].to_pylist() for known in lists if known] != [] or not on


# ── records that somebody else made ──────────────────────────────────────────────────────────────────────────────────


def test_values_that_float16_does_not_hold_are_stored_as_they_are():
    exact, inexact = [0.5, 2.0], [0.1, math.pi]
    turns = [sampled(("a", -0.5), ("b", -0.1), entropies=values) for values in (exact, inexact)]
    trajectories = [Trajectory(episode=[turn], reward=1.0, metadata={"id": "q"}) for turn in turns]
    column = COLUMNS["entropies"]
    assert str(table_of([trajectories[:1]], ()).schema.field("entropies").type).count("halffloat") == 1
    table = table_of([trajectories], ())
    assert "double" in str(table.schema.field("entropies").type) and "double" in column.wider
    assert table["entropies"].to_pylist() == [[exact], [inexact]]


@pytest.mark.parametrize(
    "odd", ["high", [1, 2], [0.5], [0.5, math.nan], [math.inf, -math.inf], {"a": 1}, [None, "x"]], ids=str
)
def test_what_is_no_list_of_numbers_is_kept_and_does_no_harm(odd):
    turn = sampled(("a", -0.5), ("b", -0.1), entropies=odd)
    trajectory = Trajectory(episode=[item("user", "?"), turn], reward=1.0, metadata={"id": "q"})
    epoch = make_epoch([[1.0, 0.0]])
    epoch.collection.trajectories[0][0].episode = trajectory.episode
    assert len(tokens_of(turn)) == 2
    found = tokens([epoch])
    assert len(found[found.generation == 0]) == 2
    back = collection_of(table_of([[trajectory]], ()), "run", 1).trajectories[0][0]
    assert repr(back.episode[1].metadata["entropies"]) == repr(odd)
    collection = collected([trajectory])
    statistics = group_statistics(collection.trajectories)
    selection = select(statistics, CurriculumSettings(), CurriculumState(0.5), 0, seed=0)
    mean = epoch_metrics(collection, statistics, selection).mean_entropy
    assert mean is None or 0.5 <= mean <= 1.5
