"""A validation lies where the epoch lies that samples from the validated policy, in every picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from factories import make_epoch

from finetune_nb import plots
from finetune_nb.notebook.reward_curve import reward_curve
from finetune_nb.plots.axes import validation_epoch
from finetune_nb.types import Epoch


def validated(policy_version: int | None, versions: tuple[int | None, int | None]) -> Epoch:
    """Epoch 3 with one validation, of that policy version."""
    epoch = make_epoch([[1, 0]], 3, validation=0.25)
    validation = replace(epoch.validations[0], policy_version=policy_version)
    return replace(epoch, validations=(validation,), policy_versions=versions)


@pytest.mark.parametrize(
    ("policy_version", "versions", "expected"),
    [
        (7, (7, 8), 3),
        (8, (7, 8), 4),
        (7, (7, 7), 3),
        (7, (7, None), 3),
        (None, (None, None), 3),
        (8, (None, 8), 4),
    ],
    ids=["before the update", "after the update", "not updated", "unfinished", "unknown", "unknown before"],
)
def test_only_a_validation_of_the_updated_policy_lies_at_the_next_epoch(policy_version, versions, expected) -> None:
    epoch = validated(policy_version, versions)
    assert validation_epoch(epoch, epoch.validations[0]) == expected


def test_the_plot_and_the_live_curve_put_a_validation_at_the_same_epoch() -> None:
    epoch, following = validated(8, (7, 8)), make_epoch([[1, 0]], 4)
    axes = plots.plot_rewards([epoch, following]).axes[0]
    (stars,) = [points for points in axes.collections if points.get_label() == "validation"]
    assert stars.get_offsets().tolist() == [[4, 0.25]]
    curve = ElementTree.fromstring(reward_curve([epoch, following])).find("svg")
    *_, last_dot = curve.iter("circle")
    (diamond,) = [path for path in curve.iter("path") if path.get("class") == "ft-check"]
    assert diamond.get("d").startswith(f"M{last_dot.get('cx')} ")
