"""Plots: what the artists hold, and that nothing outside the figure is touched."""

from __future__ import annotations

import base64
import io
import math
import pickle
import struct
import warnings
from dataclasses import replace
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import pytest
from factories import make_epoch, make_trajectory
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from records import Views, epoch_of, stored

from finetune_nb import plots
from finetune_nb.config import CurriculumSettings
from finetune_nb.errors import ConfigError
from finetune_nb.plots.axes import RunSeries, moving_mean
from finetune_nb.plots.figure import THEMES, Figure, drawable
from finetune_nb.types import GROUP_REASONS, Change, RolloutFailure

ALL = [getattr(plots, name) for name in plots.__all__]
OVER_EPOCHS = [plot for plot in ALL if plot is not plots.plot_groups]


def on(percentile: float) -> CurriculumSettings:
    return CurriculumSettings(enabled=True, percentile=percentile, expansion_interval=100)


def labelled(ax, label: str):
    """The artist with that label."""
    return next(artist for artist in [*ax.lines, *ax.collections, *ax.containers] if artist.get_label() == label)


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_mean_reward_is_a_line_with_its_range() -> None:
    ax = plots.plot_rewards([make_epoch([[0, 0], [1, 1]], 0), make_epoch([[1, 1, 0, 1]], 1)]).axes[0]
    line = labelled(ax, "mean of all trajectories")
    assert line.get_xdata().tolist() == [0, 1]
    assert line.get_ydata().tolist() == [0.5, 0.75]
    band = labelled(ax, "10–90 % of groups").get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.1, 0.9))


def test_groups_of_every_fate_are_drawn_and_named() -> None:
    codes = np.arange(len(GROUP_REASONS), dtype=np.int8)
    epoch = make_epoch([[1, 0]] * len(codes))
    epoch = replace(epoch, selection=replace(epoch.selection, reasons=codes, kept=np.array([0])))
    drawn = plots.plot_curriculum([epoch])
    assert drawn.png()
    assert set(legend(drawn)) >= {reason.value.replace("_", " ") for reason in GROUP_REASONS}
    assert plots.plot_groups([epoch]).alt_text.count("1 ") >= len(codes)


def test_missing_rewards_and_missing_epochs_are_gaps() -> None:
    epochs = [make_epoch([[1]], 0), make_epoch([[None]], 1), make_epoch([[1]], 2), make_epoch([[0]], 5)]
    line = labelled(plots.plot_rewards(epochs).axes[0], "mean of all trajectories")
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(line.get_ydata(), [1, math.nan, 1, math.nan, math.nan, 0])


def test_the_kept_groups_have_their_own_line_only_where_not_all_are_kept() -> None:
    figure = plots.plot_rewards([make_epoch([[1, 0], [0.5, 0]], 0, settings=on(0.5))])
    assert labelled(figure.axes[0], "mean of the kept groups").get_ydata().tolist() == [0.5]
    assert "mean of the kept groups" not in legend(plots.plot_rewards([make_epoch([[1, 0]])]))


def test_the_curriculum_is_a_step_line_on_its_own_axis_where_it_is_on() -> None:
    epochs = [
        make_epoch([[1, 0]], 0),
        make_epoch([[1, 0]], 1, settings=on(0.3)),
        make_epoch([[1, 0]], 2, settings=on(0.7)),
    ]
    figure = plots.plot_rewards(epochs)
    assert len(figure.axes) == 2
    line = figure.axes[1].lines[0]
    np.testing.assert_array_equal(line.get_ydata(orig=True), [math.nan, 0.3, 0.7])
    assert line.get_drawstyle() == "steps-mid"
    assert figure.axes[1].get_ylabel() == "curriculum percentile"
    assert "curriculum percentile" in legend(figure)
    assert len(plots.plot_rewards(epochs[:1]).axes) == 1


def test_validations_are_points_and_failed_ones_are_marked_not_drawn_at_zero() -> None:
    epochs = [make_epoch([[1]], 0, validation=0.25), make_epoch([[1]], 1, validation_error="OSError")]
    ax = plots.plot_rewards(epochs).axes[0]
    assert labelled(ax, "validation").get_offsets().tolist() == [[0, 0.25]]
    failed = labelled(ax, "validation failed")
    assert failed.get_offsets()[:, 0].tolist() == [1]
    assert failed.get_offset_transform() == ax.get_xaxis_transform()


def test_a_baseline_is_a_line_across() -> None:
    ax = plots.plot_rewards([make_epoch([[1]])], baseline=0.12).axes[0]
    assert labelled(ax, "baseline 0.12").get_ydata() == [0.12, 0.12]


def test_several_runs_are_told_apart_by_colour_line_and_marker() -> None:
    runs = {"a": [make_epoch([[1]], 0)], "b": [make_epoch([[0]], 0, validation=0.5)], "": []}
    figure = plots.plot_rewards(runs)
    first, second = (labelled(figure.axes[0], name) for name in "ab")
    assert (first.get_ydata().tolist(), second.get_ydata().tolist()) == ([1], [0])
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(first, look)() != getattr(second, look)()
    assert "a: 1" in figure.alt_text
    assert "b: 0" in figure.alt_text


def test_discrete_rewards_are_shares_that_add_up_with_failures_and_missing_ones() -> None:
    failures = [RolloutFailure("q0", 4, "E")]
    epochs = [make_epoch([[1, 0, 0, None]], 0, failures=failures), make_epoch([[1, 1]], 1)]
    ax = plots.plot_reward_distribution(epochs).axes[0]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}
    assert list(heights) == ["reward 0", "reward 1", "no reward", "failed"]
    np.testing.assert_allclose(list(heights.values()), [[0.4, 0], [0.2, 1], [0.2, 0], [0.2, 0]], atol=1e-9)
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    assert tops == pytest.approx([1.0, 1.0])


def test_continuous_rewards_are_violins_whose_median_and_range_are_marked() -> None:
    rewards = np.linspace(0, 1, 101).tolist()
    ax = plots.plot_reward_distribution([make_epoch([rewards], 0), make_epoch([rewards[:51]], 1)]).axes[0]
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([0.5, 0.25])
    bars = [c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection)]
    assert bars[0].get_segments()[0][:, 1].tolist() == pytest.approx([0.1, 0.9])
    violins = [c for c in ax.collections if c not in bars]
    for index, violin in enumerate(violins):
        across = violin.get_paths()[0].vertices[:, 0]
        assert index - 0.46 < across.min() < index < across.max() < index + 0.46


def test_many_epochs_show_evenly_spaced_violins_and_say_so() -> None:
    epochs = [make_epoch([np.linspace(0, 1, 20).tolist()], i) for i in range(100)]
    ax = plots.plot_reward_distribution(epochs).axes[0]
    assert [line.get_xdata()[0] for line in ax.lines] == list(range(0, 100, 5))
    assert ax.get_xlabel() == "epoch (1 in 5 is shown)"


def test_scores_are_lines_in_the_order_that_was_asked_for() -> None:
    epochs = [make_epoch([[1]], 0, scores={"a": 0.1, "b": 0.2}), make_epoch([[1]], 1, scores={"a": 0.3, "b": None})]
    assert legend(plots.plot_scores(epochs)) == ["a", "b"]
    figure = plots.plot_scores(epochs, ["b", "a"])
    assert legend(figure) == ["b", "a"]
    np.testing.assert_array_equal(labelled(figure.axes[0], "b").get_ydata(), [0.2, math.nan])
    with pytest.raises(ConfigError, match="no epoch has a score of 'aa'. Did you mean 'a'"):
        plots.plot_scores(epochs, ["aa"])


def test_stacked_scores_lie_on_top_of_one_another() -> None:
    epochs = [make_epoch([[1]], i, scores={"a": 0.25, "b": 0.5}) for i in range(2)]
    ax = plots.plot_scores(epochs, stacked=True).axes[0]
    ranges = [(c.get_paths()[0].vertices[:, 1].min(), c.get_paths()[0].vertices[:, 1].max()) for c in ax.collections]
    assert ranges == [(0, 0.25), (0.25, 0.75)]
    assert ax.collections[0].get_hatch() != ax.collections[1].get_hatch()


def change(epoch: int | None, field: str = "percentile", old=0.3, new=0.5) -> Change:
    return Change(0.0, "panel", field, old, new, epoch)


def run_of(*epochs, name: str = "run", changes: tuple[Change, ...] = ()) -> Views:
    run = Views(*epochs)
    run.id, run.changes = name, changes
    return run


def test_groups_are_counted_by_reason_beside_those_that_can_teach() -> None:
    figure = plots.plot_curriculum([make_epoch([[1, 0], [0.5, 0], [1, 1]], settings=on(0.5))])
    ax = figure.axes[0]
    assert {bars.get_label(): bars[0].get_height() for bars in ax.containers} == {
        "kept": 1,
        "no reward spread": 1,
        "beyond percentile": 1,
    }
    assert labelled(ax, "rewards differ").get_ydata().tolist() == [2]
    assert figure.axes[1].lines[0].get_ydata(orig=True).tolist() == [0.5]


def test_several_curricula_are_percentiles_and_shares_that_were_kept() -> None:
    runs = [run_of(make_epoch([[1, 0], [1, 0]], settings=on(p)), name=f"at {p}") for p in (0.5, 1.0)]
    ax = plots.plot_curriculum(runs).axes[0]
    assert [labelled(ax, f"at {p}: kept").get_ydata().tolist() for p in (0.5, 1.0)] == [[0.5], [1.0]]
    assert [labelled(ax, f"at {p}: percentile").get_ydata(orig=True).tolist() for p in (0.5, 1.0)] == [[0.5], [1.0]]


def test_every_live_change_is_marked_before_the_epoch_that_used_it_first() -> None:
    epochs = [make_epoch([[1, 0.5, 0, 0.1, 0.2, 0.3, 0.4]], i, settings=on(0.5), scores={"a": 1.0}) for i in range(4)]
    changes = (change(2), change(3, "sort_ascending", False, True), change(None), change(99))
    run = run_of(*epochs, changes=changes)
    for plot in OVER_EPOCHS:
        figure = plot(run, theme="light")
        assert labelled(figure.axes[0], "live change").get_offsets()[:, 0].tolist() == [1.5, 2.5], plot.__name__
        assert "Live changes: epoch 2: percentile 0.3 to 0.5; epoch 3: sort_ascending False to True" in figure.alt_text
        assert [text.get_text().strip() for text in figure.axes[0].texts] == ["percentile 0.5", "sort_ascending True"]
    many = run_of(*(make_epoch([[1, 0]], i) for i in range(9)), changes=tuple(change(i) for i in range(9)))
    assert not plots.plot_rewards(many).axes[0].texts  # they would cover one another


@pytest.mark.parametrize(("reward", "where"), [(1.0, "bottom"), (0.0, "top")])
def test_what_was_changed_is_written_where_the_lines_are_not(reward, where) -> None:
    epochs = [make_epoch([[reward, 0.5 + abs(reward - 0.5)]] if i else [[0.0, 0.0], [1.0, 1.0]], i) for i in range(4)]
    text = plots.plot_rewards(run_of(*epochs, changes=(change(3),))).axes[0].texts[0]
    assert text.get_va() == where


def test_the_map_places_groups_by_mean_and_spread_and_tells_their_reasons_by_colour_and_shape() -> None:
    groups = [[1, 0], [1, 0], [0.5, 0], [1, 1], [None, None]]
    figure = plots.plot_groups([make_epoch(groups, settings=on(0.5))])
    ax = figure.axes[0]
    kept, beyond = labelled(ax, "2 kept"), labelled(ax, "1 beyond the percentile")
    assert kept.get_offsets().tolist() == [[0.5, 1.0]]
    assert kept.get_sizes()[0] > beyond.get_sizes()[0]  # two groups lie there
    assert beyond.get_offsets().tolist() == [[0.25, 0.5]]
    assert kept.get_facecolor().tolist() != beyond.get_facecolor().tolist()
    assert not np.array_equal(kept.get_paths()[0].vertices, beyond.get_paths()[0].vertices)
    assert labelled(ax, "1 rewards hardly differ").get_offsets().tolist() == [[1.0, 0.0]]
    assert labelled(ax, "smallest spread that teaches").get_ydata() == [0.1, 0.1]
    assert ax.get_xlabel() == "mean reward of the group (1 groups have none)"


@pytest.mark.slow
def test_several_runs_have_a_map_and_a_distribution_each_on_one_scale() -> None:
    runs = [run_of(make_epoch([[1, 0]]), name="a"), run_of(make_epoch([[0.25, 0]]), name="b")]
    for plot in (plots.plot_groups, plots.plot_reward_distribution, plots.plot_advantages):
        figure = plot(runs)
        first, second = [ax for ax in figure.axes if ax.get_ylabel().startswith(("a: ", "b: "))]
        assert first.get_ylim() == second.get_ylim() and first.get_xlim() == second.get_xlim()
        given = matplotlib.figure.Figure().subplots(2, 1)
        assert plot(runs, ax=given) is given
        with pytest.raises(ConfigError, match="found 1 axes for 2 pictures"):
            plot(runs, ax=given[0])


def test_advantages_that_are_zero_are_a_share_and_no_part_of_the_violin() -> None:
    figure = plots.plot_advantages([make_epoch([[1, 0], [1, 1], [0, 0], [0, 0]])])
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.75]
    assert labelled(figure.axes[0], "median").get_ydata() == [pytest.approx(0, abs=1e-9)]
    low, high = labelled(figure.axes[0], "10–90 %").get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((-0.8 * 0.7070, 0.8 * 0.7070), abs=1e-3)  # of two values, ±0.707


def test_lengths_are_the_median_of_the_sampled_tokens_and_the_share_that_was_cut(tmp_path) -> None:
    epoch = epoch_of([[make_trajectory(1.0, "q", g, reply="x" * n) for g, n in enumerate((2, 4, 9))]])
    epoch.collection.trajectories[0][2].episode[-1].metadata["finish_reason"] = "length"
    for each in (epoch, stored(tmp_path, epoch)[0]):
        figure = plots.plot_lengths([each])
        assert labelled(figure.axes[0], "median").get_ydata().tolist() == [4]
        assert figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([1 / 3])


def test_training_metrics_have_a_picture_each_and_an_untrained_epoch_is_a_gap() -> None:
    epochs = [make_epoch([[1, 0]], 0, train={"kl": 0.1, "loss": 0.5, "mine": 7.0}), make_epoch([[0, 0]], 1, job=None)]
    figure = plots.plot_training(epochs)
    assert [ax.get_ylabel().partition("\n")[0] for ax in figure.axes] == ["loss", "KL"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [0.5, math.nan])
    assert plots.plot_training(epochs, ["mine"]).axes[0].lines[0].get_ydata()[0] == 7.0
    with pytest.raises(ConfigError, match="no epoch has a training metric 'lss'. Did you mean 'loss'"):
        plots.plot_training(epochs, ["lss"])


def test_a_run_draws_itself_and_others() -> None:
    run, other = (run_of(make_epoch([[1, 0]], 0, scores={"a": 1.0}), make_epoch([[1, 1]], 1), name=n) for n in "ab")
    for name in plots.__all__:
        assert getattr(run, name)().alt_text, name
        figure = getattr(run, name)(others=[other])
        assert "a" in figure.alt_text and "b" in figure.alt_text, name
    assert "1 kept" in run.plot_groups(epoch=0).alt_text


@pytest.mark.slow
@pytest.mark.parametrize("count", [45, 300])
def test_many_plots_leave_no_figure_and_no_memory_behind(count) -> None:
    import gc
    import tracemalloc

    import matplotlib.pyplot as plt

    epochs = [make_epoch([[1, 0]], i) for i in range(2)]
    sizes = []
    tracemalloc.start()
    for _ in range(3):
        for _ in range(count // 3):
            plots.plot_rewards(epochs)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert plt.get_fignums() == []
    assert sizes[2] - sizes[1] < 200_000


@pytest.mark.parametrize("plot", ALL)
def test_a_given_ax_is_drawn_on_and_returned_and_keeps_its_look(plot) -> None:
    ax = matplotlib.figure.Figure(facecolor="pink").add_subplot(facecolor="yellow")
    colour = ax.xaxis.label.get_color()
    assert plot([make_epoch([[1, 0]], settings=on(0.5), scores={"a": 1.0})], ax=ax) is ax
    assert ax.has_data()
    assert ax.get_facecolor() == matplotlib.colors.to_rgba("yellow")
    assert ax.xaxis.label.get_color() == colour


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("plot", ALL)
@pytest.mark.parametrize("theme", [None, "light", "dark"])
def test_figures_show_themselves_and_touch_nothing_global(plot, theme) -> None:
    import matplotlib.pyplot as plt

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figure = plot([make_epoch([[1, 0]], i, settings=on(0.5), scores={"a": 1.0}) for i in range(3)], theme=theme)
    data, about = figure._repr_mimebundle_()
    assert plt.get_fignums() == []
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == (before, backend)
    png = base64.b64decode(data["image/png"])
    assert struct.unpack(">II", png[16:24]) == (2 * about["image/png"]["width"], 2 * about["image/png"]["height"])
    assert data["text/plain"] == about["image/png"]["alt"] == figure.alt_text != ""
    assert figure.axes[0].get_xlabel().startswith("mean reward" if plot is plots.plot_groups else "epoch")
    assert figure.axes[0].get_ylabel() != ""


@pytest.mark.parametrize("plot", ALL)
def test_no_epoch_gives_a_picture_that_says_so(plot) -> None:
    figure = plot([])
    assert figure.png().startswith(b"\x89PNG")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no epoch yet"]


def test_epochs_without_scores_give_a_picture_that_says_so() -> None:
    figure = plots.plot_scores([make_epoch([[1, 0]], i) for i in range(3)])
    assert [text.get_text() for text in figure.axes[0].texts] == ["no scores"] and not figure.axes[0].lines
    assert figure.alt_text.endswith("no scores")


@pytest.mark.parametrize("plot", ALL)
def test_epochs_without_rewards_or_groups_can_be_drawn(plot) -> None:
    assert plot([make_epoch([], 0), make_epoch([[None, math.inf]], 1)]).png().startswith(b"\x89PNG")


@pytest.mark.parametrize("plot", ALL)
def test_the_legend_does_not_cover_the_data_and_lies_within_the_picture(plot) -> None:
    epochs = [make_epoch([[1, 0], [0.5, 0], [1, 1]], i, settings=on(0.5), scores={"a": 1.0}, validation=0.5,
                         failures=[RolloutFailure("q", 0, "E")]) for i in range(3)]  # fmt: skip
    figure = plot(run_of(*epochs, changes=(change(1),)))
    FigureCanvasAgg(figure).draw()
    box, data = figure.axes[0].get_legend().get_window_extent(), figure.axes[0].get_window_extent()
    assert box.y0 >= data.y1
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1 + 1
    assert box.y1 <= figure.bbox.y1 + 1


def test_names_of_others_are_shown_literally() -> None:
    name = "$\\frac{$ _<b>\x00\ud800"
    figure = plots.plot_scores([make_epoch([[1]], scores={name: 1.0, "_hidden": 0.5})])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of characters that its fonts do not have
        assert figure.png().startswith(b"\x89PNG")
    assert len(legend(figure)) == 2
    figure.alt_text.encode()


@pytest.mark.parametrize("plot", [*ALL, plots.plot_lengths])
def test_a_picture_has_a_title_with_the_name_of_its_run_or_how_many_there_are(plot) -> None:
    epochs = [make_epoch([[1, 0]], i, scores={"a": 1.0}) for i in range(2)]
    title = plot(run_of(*epochs)).get_suptitle()
    assert title.startswith("run · ") and title > "run · "
    assert plot({"a": epochs, "b": epochs}).get_suptitle().startswith("2 runs · ")


def test_the_axis_of_rewards_goes_from_0_to_1_where_they_do() -> None:
    within, beyond = [make_epoch([[0.4, 0.5]])], [make_epoch([[1.4, 1.5]])]
    for plot in (plots.plot_rewards, plots.plot_reward_distribution):
        assert plot(within).axes[0].get_ylim()[1] <= 1.05
    assert plots.plot_rewards(within).axes[0].get_ylim() == (-0.05, 1.05)
    assert plots.plot_rewards(beyond).axes[0].get_ylim() != (-0.05, 1.05)
    assert plots.plot_rewards(within, baseline=2.0).axes[0].get_ylim()[1] > 2
    assert plots.plot_rewards(within).axes[0].get_ylabel() == "reward"
    assert plots.plot_rewards([make_epoch([[1, 0]])]).axes[0].get_ylabel() == "reward (share with 1)"


def test_a_metric_that_never_changes_has_one_tick_and_no_invented_digits() -> None:
    epochs = [make_epoch([[1, 0]], i, train={"loss": 0.0, "kl": 0.25, "grad_norm": float(i)}) for i in range(3)]
    loss, kl, norm = plots.plot_training(epochs, ["loss", "kl", "grad_norm"]).axes
    assert (loss.get_ylim(), [text.get_text() for text in loss.get_yticklabels()]) == ((-1, 1), ["0"])
    assert kl.get_yticks().tolist() == [0.25] and len(norm.get_yticks()) > 2


def test_of_more_than_sixty_epochs_the_moving_mean_is_drawn_over_the_values() -> None:
    def drawn(count: int) -> Any:
        return plots.plot_rewards([make_epoch([[i % 2, i % 2]], i) for i in range(count)]).axes[0]

    assert drawn(60).get_xlabel() == "epoch"
    ax = drawn(200)
    assert ax.get_xlabel() == "epoch (bold: mean of 13 epochs)"
    values = labelled(ax, "mean of all trajectories").get_ydata()
    assert np.abs(values[10:-10] - 0.5).max() < 0.05
    raw = next(line for line in ax.lines if line.get_alpha())
    assert set(raw.get_ydata()) == {0.0, 1.0}
    holed = moving_mean(np.array([1.0, math.nan, 3.0, 5.0]), 3)
    assert np.isnan(holed).tolist() == [False, True, False, False] and holed[[0, 2, 3]].tolist() == [1.0, 4.0, 4.0]


def test_the_legend_of_many_runs_and_scores_fits() -> None:
    names = [f"a run with quite a long name {place}" for place in range(6)]
    scores = {"correct": 1.0, "short": 0.5, "used_tool": 0.25}
    figure = plots.plot_scores({name: [make_epoch([[1, 0]], i, scores=scores) for i in range(3)] for name in names})
    assert legend(figure) == [*names, *scores]
    FigureCanvasAgg(figure).draw()
    box, data = figure.axes[0].get_legend().get_window_extent(), figure.axes[0].get_window_extent()
    assert box.x1 <= figure.bbox.x1 + 1 and box.y0 >= data.y1
    assert data.height > 0.4 * figure.bbox.height


def test_a_fork_is_drawn_from_the_point_of_its_parent_where_it_began() -> None:
    parent = RunSeries("old", [make_epoch([[0.1 * i, 0.1 * i]], i) for i in range(5)], ())
    fork = RunSeries("new", [make_epoch([[0.9, 0.9]], i) for i in (3, 4)], (), ("old", 2))
    ax = plots.plot_rewards({"old": parent, "new": fork}).axes[0]
    joined = [
        line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 2
    ]
    assert joined == [[[2.0, pytest.approx(0.2)], [3.0, pytest.approx(0.9)]]]
    assert len(plots.plot_rewards({"new": fork}).axes[0].lines) == 1


def test_a_map_of_a_thousand_groups_is_a_density() -> None:
    rng = np.random.default_rng(0)
    epoch = make_epoch(rng.random((1000, 4)).tolist(), settings=on(0.5))
    figure = plots.plot_groups([epoch])
    (cells,) = figure.axes[0].images
    assert cells.get_array().shape == (20, 40, 4) and not figure.axes[0].collections[0].get_paths()
    assert any(text.startswith("1,000 kept") or " kept" in text for text in legend(figure))
    assert figure.png().startswith(b"\x89PNG")


def test_characters_without_a_font_are_named_by_their_numbers(monkeypatch) -> None:
    from finetune_nb.plots import figure

    monkeypatch.setattr(figure, "_drawable_characters", lambda: frozenset(range(32, 127)))
    assert drawable("東京 run") == "[U+6771 U+4EAC] run"
    assert drawable("日本語の文字") == "[U+65E5 U+672C U+8A9E …]"
    assert drawable("👩\u200d💻!") == "[U+1F469 U+1F4BB]!"
    assert drawable("plain") == "plain"


def test_an_unknown_theme_is_named() -> None:
    with pytest.raises(ConfigError, match="found theme 'solarized'; expected 'light', 'dark' or None"):
        plots.plot_rewards([], theme="solarized")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theme", "corner"), [("light", (255, 255, 255, 255)), ("dark", (17, 17, 17, 255)), (None, (255, 255, 255, 255))]
)
def test_a_picture_has_few_colours_and_its_background_exactly(theme, corner) -> None:
    figure = plots.plot_rewards([make_epoch([[1, 0], [i / 40, 1]], i) for i in range(40)], theme=theme)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=192)
    picture = Image.open(io.BytesIO(figure.png()))
    assert picture.mode == "P" and len(figure.png()) < 0.4 * len(drawn.getvalue())
    full, few = (np.asarray(each.convert("RGBA")).astype(int) for each in (Image.open(drawn), picture))
    assert tuple(few[0, 0]) == corner
    seen = full[..., 3] > 0
    assert np.abs(full - few)[seen].mean() < 2


def test_a_figure_can_be_pickled_with_its_text() -> None:
    figure = plots.plot_rewards([make_epoch([[1, 0]])])
    assert pickle.loads(pickle.dumps(figure)).alt_text == figure.alt_text


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour))
    return float(np.dot(list(parts), (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("name", THEMES)
def test_texts_and_colours_stand_out_from_the_background(name: str) -> None:
    theme = THEMES[name]
    for colour, least in [*((colour, 3.0) for colour in theme.colours), (theme.ink, 7.0)]:
        light, dark = sorted((luminance(colour), luminance(theme.background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, colour


def test_ipython_takes_the_picture_from_the_figure_itself() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, about = formatters.DisplayFormatter().format(plots.plot_rewards([make_epoch([[1, 0]])]))
    assert set(data) == {"image/png", "text/plain"}
    assert data["text/plain"] == "Mean reward per epoch: 0.5"
    assert about["image/png"]["width"] == 614


def test_the_figure_class_is_a_matplotlib_figure() -> None:
    assert issubclass(Figure, matplotlib.figure.Figure)
