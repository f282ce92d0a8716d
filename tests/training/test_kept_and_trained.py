"""Groups that were kept and groups that were trained on are told apart wherever groups are counted."""

from __future__ import annotations

import itertools
import re

import pytest
from factories import make_epoch

import finetune_nb as ft
from finetune_nb import frames
from finetune_nb.config import CurriculumSettings
from finetune_nb.engine.sinks import metrics_of
from finetune_nb.notebook.panel_html import record_html
from finetune_nb.testing import sums
from finetune_nb.training.preview import preview, preview_input
from finetune_nb.types import DPOItem

ONE_OF_THREE = {"trained_groups": 1, "optimizer_steps": 2, "loss": 0.1}
NONE = {"trained_groups": 0, "optimizer_steps": 0}


def words(markup):
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", markup, flags=re.S).split())


def preview_of(epoch, **changes):
    settings = epoch.curriculum
    return preview(preview_input(epoch), settings, settings, settings.steered(changes), seed=0)


def test_a_job_says_on_how_many_of_the_kept_groups_it_trained():
    epoch = make_epoch([[1, 0], [1, 1], [0, 0]], train=ONE_OF_THREE)
    assert (epoch.metrics.kept_groups, epoch.trained_groups, epoch.trained) == (3, 1, True)
    assert "trained on 1 of 3 kept groups in 0.50 s" in repr(epoch)
    card = words(epoch._repr_html_())
    assert "3 of 3 kept" in card and "1 trained on" in card and "3 trained on" not in card
    row = frames.epochs([epoch]).iloc[0]
    assert (row.kept_groups, row.trained_groups) == (3, 1)
    logged = metrics_of(epoch)
    assert (logged["groups/kept"], logged["groups/trained_on"]) == (3, 1)
    assert "kept trained on" in words(record_html([epoch], [])) and " 3 1 0 " in words(record_html([epoch], []))


@pytest.mark.parametrize("train", [NONE, {"optimizer_steps": 0}, {"trained_groups": 0.0}])
def test_where_no_step_was_made_nothing_is_said_to_be_trained(train):
    epoch = make_epoch([[1, 1], [0, 0]], train=train, message="nothing to train on: none of 2 groups")
    assert epoch.trained_groups == 0 and not epoch.trained
    assert "trained in" not in repr(epoch) and "not trained: nothing to train on" in repr(epoch)
    without_message = make_epoch([[1, 1]], train=train)
    assert "not trained: no optimizer step was made" in repr(without_message)


def test_a_backend_that_does_not_count_its_groups_is_not_spoken_for():
    epoch = make_epoch([[1, 0], [1, 1]])
    assert epoch.trained_groups is None and epoch.trained
    assert "trained in 0.50 s" in repr(epoch) and "trained on" not in words(epoch._repr_html_())
    assert frames.epochs([epoch]).trained_groups.isna().all()
    assert "groups/trained_on" not in metrics_of(epoch)


def test_an_epoch_without_a_job_trained_on_nothing():
    epoch = make_epoch([[1, 1]], job=None, reason="none left")
    assert epoch.trained_groups == 0 and not epoch.trained
    assert frames.epochs([epoch]).trained_groups.tolist() == [0]


def test_a_preview_counts_only_groups_that_can_teach():
    epoch = make_epoch([[1, 0], [1, 1], [0, 0, 0], [None, None]], train=ONE_OF_THREE)
    found = preview_of(epoch)
    assert (found.kept_groups, found.groups, found.trajectories) == ((4, 4), (1, 1), (2, 2))
    assert "1 of 4 groups trained on, 4 kept" in repr(found)
    card = words(found._repr_html_())
    assert "3 kept, but their rewards do not differ" in card and "1 trained on" in card
    # the pace is that of the groups that the job trained on
    assert found.training_seconds[0] == pytest.approx(epoch.seconds["training"])


def test_a_group_that_cannot_teach_neither_enters_nor_leaves():
    epoch = make_epoch([[1, 0], [1, 1]], settings=CurriculumSettings(enabled=True, percentile=1.0))
    found = preview_of(epoch, enabled=False)
    assert (found.kept_groups, found.groups, found.moves, found.enters) == ((2, 1), (1, 1), (0, 0), [])


def test_preferences_teach_though_a_group_has_only_one_reward():
    epoch = make_epoch([[1.0], [0.5]])
    for group in epoch.collection.trajectories:
        group[0].episode = [DPOItem(prompt="q", chosen_response="a", rejected_response="b")]
    assert preview_of(epoch).groups == (2, 2)


@pytest.mark.parametrize("same", [0, 3, 5])
def test_the_local_backend_and_a_preview_agree(tmp_path, closing, same):
    turns = itertools.count()

    def reward(item):
        return 1.0 if int(item.id.rpartition("-")[2]) < same else float(next(turns) % 3)

    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    options = dict(generations=6, output_dir=tmp_path, sampling={"max_tokens": 4})
    run = closing(ft.Run(solve, reward, sums(5), **options))
    epoch = ft.run_sync(run.next_epoch())
    assert epoch.trained_groups == 5 - same == epoch.train_metrics["trained_groups"]
    assert run.preview().groups == (5 - same, 5 - same)
    assert ("trained in" in repr(epoch)) == (same == 0)
    assert ("not trained: nothing to train on" in repr(epoch)) == (same == 5)
