"""A group's reason has the same name in every place that shows it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from factories import make_epoch

from finetune_nb import plots
from finetune_nb.analysis.reasons import REASONS
from finetune_nb.config import CurriculumSettings
from finetune_nb.training.preview import preview, preview_input
from finetune_nb.types import GROUP_REASONS, GroupReason

ABOUT_CURRICULUM = [
    reason for reason in GroupReason if reason not in (GroupReason.UNDECIDED, GroupReason.NOT_SUBMITTED)
]


@pytest.mark.parametrize("reason", ABOUT_CURRICULUM)
def test_a_reason_has_one_label_in_the_map_of_groups_and_in_a_preview(reason: GroupReason) -> None:
    epoch = make_epoch([[1, 0], [1, 0]])
    codes = np.array([GROUP_REASONS.index(reason)] * 2, dtype=np.int8)
    selection = replace(epoch.selection, reasons=codes, kept=np.flatnonzero(codes == 0))
    label = REASONS[reason].label
    assert f"2 {label}" in plots.plot_groups([replace(epoch, selection=selection)]).alt_text

    off = CurriculumSettings()
    if reason == GroupReason.KEPT:
        label = "trained on"  # a preview tells the kept groups that can teach from the others
    shown = replace(preview(preview_input(epoch), off, off, off, seed=0), selection=selection, unchanged=selection)
    assert f"2 {label}" in " ".join(re.sub(r"<[^>]*>", "", shown._repr_html_()).split())


def test_reasons_that_are_drawn_in_one_map_have_markers_of_their_own() -> None:
    assert len({reason.marker for reason in REASONS.values()}) == len(REASONS)
