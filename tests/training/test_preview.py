import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from factories import make_epoch
from hypothesis import given, settings
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.config import CurriculumSettings
from finetune_nb.engine.live_settings import LiveSettings
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.training.curriculum import group_statistics, select, steer
from finetune_nb.training.metrics import has_signal
from finetune_nb.training.preview import preview, preview_input
from finetune_nb.types import CurriculumState, GroupReason

shares = st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0])
curricula = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "percentile": shares,
        "schedule": st.sampled_from(["automatic", "manual"]),
        "increment_percentile": shares,
        "expansion_interval": st.integers(1, 4),
        "min_reward_diff": st.sampled_from([0.0, 0.1, 0.5]),
        "sort_ascending": st.booleans(),
        "random_subsample": st.none() | shares,
    },
)
rewards = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, math.nan, math.inf])
groups = st.lists(st.lists(rewards, min_size=1, max_size=4), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(groups=groups, first=curricula, before=curricula, change=curricula, seed=st.integers(0, 3))
def test_preview_equals_what_the_engine_then_selects(groups, first, before, change, seed):
    epoch = make_epoch(groups)
    controls = LiveSettings(CurriculumSettings(enabled=True).updated(first))
    state = CurriculumState(controls.curriculum.percentile)

    def engine_selects(index):  # as the witness and the trainer do it
        nonlocal state
        chosen, resumed = controls.apply(index)
        selection = select(epoch.statistics, chosen, steer(state, chosen, index, resumed), index, seed)
        state = selection.state
        controls.note_percentile(selection.settings.percentile)
        return selection

    for index in range(3):
        if index == 1:
            controls.change(before)
        selection = engine_selects(index)
    vars(epoch).update(index=2, selection=selection)
    foreseen = preview(
        preview_input(epoch), controls.applied, controls.curriculum, controls.curriculum.steered(change), seed
    )
    unchanged = preview(preview_input(epoch), controls.applied, controls.curriculum, controls.curriculum, seed)
    if change:
        controls.change(change)
    then = engine_selects(3)
    assert foreseen.selection.kept.tolist() == then.kept.tolist()
    assert foreseen.selection.reasons.tolist() == then.reasons.tolist()
    assert foreseen.selection.state == then.state
    assert foreseen.unchanged.kept.tolist() == unchanged.selection.kept.tolist()
    assert foreseen.kept_groups == (len(then.kept), len(unchanged.selection.kept))
    teaching = set(np.flatnonzero(has_signal(epoch.statistics)).tolist())
    trained, rest = teaching & set(then.kept.tolist()), teaching & set(unchanged.selection.kept.tolist())
    assert foreseen.groups == (len(trained), len(rest))
    assert foreseen.moves == (len(trained - rest), len(rest - trained))
    assert foreseen.trajectories[0] == sum(len(groups[place]) for place in trained)
    assert sum(foreseen.counts.values()) == len(groups)


def fixed_run(tmp_path, **options):
    """Every epoch brings the same rewards."""
    dealt = {f"q{i}": [0.0, i / 10, 1.0] for i in range(10)} | {"flat": [0.5, 0.5, 0.5], "lost": [None, 0.0, 1.0]}
    adapter = FakeAdapter(policy=ScriptedPolicy(coin), delay=0.01)
    parts = dict(builder=ScriptedBuilder(lambda epoch: dealt), adapter=adapter)
    return ft.Run(guess, right, sums(4), name="fixed", output_dir=tmp_path, **parts, **options)


async def test_run_previews_what_its_next_epoch_does(tmp_path, closing):
    run = closing(fixed_run(tmp_path, curriculum={"initial_percentile": 0.3}))
    await run.next_epoch()
    found = run.preview(percentile=0.7, min_reward_diff=0.2)
    assert run.curriculum.percentile == 0.3 and not run.changes
    assert found.groups == (8, 4) and found.moves == (4, 0) and len(found.enters) == 4 and found.leaves == []
    assert found.counts == {
        GroupReason.KEPT: 8,
        GroupReason.NO_REWARD_SPREAD: 1,
        GroupReason.BEYOND_PERCENTILE: 3,
    }
    run.curriculum = {"percentile": 0.7, "min_reward_diff": 0.2}
    epoch = await run.next_epoch()
    assert epoch.selection.kept.tolist() == found.selection.kept.tolist()
    assert epoch.metrics.kept_trajectories == found.trajectories[0]
    took = found.training_seconds
    assert took[0] > took[1] > 0 and took[0] / took[1] == pytest.approx(found.tokens[0] / found.tokens[1])


async def test_preview_of_a_run_from_disk_counts_the_tokens_of_its_file(tmp_path, closing):
    run = closing(fixed_run(tmp_path, curriculum={}))
    await run.next_epoch()
    run.close()
    found = ft.Run.open(run.folder).preview(percentile=1.0)
    assert found.tokens[0] == 2 * found.trajectories[0]  # every scripted reply is "ok"
    assert "enter" in found._repr_html_() and "groups trained on" in repr(found)


async def test_preview_says_what_is_missing_or_wrong(tmp_path, closing):
    run = closing(fixed_run(tmp_path))
    with pytest.raises(RunError, match="no epoch has ended yet"):
        run.preview(percentile=0.5)
    await run.next_epoch()
    with pytest.raises(ConfigError, match=r"percentile is 2"):
        run.preview(percentile=2)
    assert run.preview().settings == run.curriculum
    assert "every group is kept" in run.preview()._repr_html_()


def test_training_time_is_missing_where_nothing_was_trained():
    epoch = make_epoch([[0.0, 1.0], [0.0, 1.0]], job=None, reason="none")
    then = CurriculumSettings(enabled=True, percentile=1.0)
    found = preview(preview_input(epoch), epoch.curriculum, epoch.curriculum, then, 0)
    assert np.isnan(found.training_seconds).all()
    assert "takes about" not in found._repr_html_()


def test_the_card_needs_no_style_sheet_and_its_histogram_is_an_image_with_words():
    epoch = make_epoch([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]])
    then = CurriculumSettings(enabled=True, percentile=0.5)
    card = preview(preview_input(epoch), epoch.curriculum, epoch.curriculum, then, 0)._repr_html_()
    bare = re.sub(r"<style>.*?</style>", "", card)
    assert "var(" not in bare and "<svg" not in bare
    assert 'alt="Groups by mean reward, 0.5 to 1: 1 trained on, ' in bare
    words = " ".join(re.sub(r"<[^>]*>", " ", bare).split())
    assert "1 group 0.5 mean reward of the group 1 1 trained on" in words


def test_card_escapes_nothing_unsafe_and_is_small_whatever_the_rewards_are():
    wild = [[math.inf, 0.0], [math.nan, math.nan], [-1e300, 1e300], [0.0, 1e-300], [5.0, 5.0]]
    epoch = make_epoch(wild)
    card = preview(preview_input(epoch), epoch.curriculum, epoch.curriculum, epoch.curriculum, 0)._repr_html_()
    assert "NaN" not in card and len(card) < 20_000
    none = make_epoch([])
    assert (
        "no group has a finite reward"
        in preview(preview_input(none), none.curriculum, none.curriculum, none.curriculum, 0)._repr_html_()
    )
    assert len(group_statistics([])) == 0
