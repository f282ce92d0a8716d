"""`run.examples()` of 100,000 rollouts, beside the frame of their groups."""

import numpy as np
import pytest
from factories import make_epoch
from measuring import by_turns

from finetune_nb import frames
from finetune_nb.rollouts.difficulty import DifficultySettings, Visits

pytestmark = pytest.mark.measures
EPOCHS, GROUPS, GENERATIONS, EXAMPLES = 250, 50, 8, 5_000
LIMIT = 2.5


def test_it_takes_about_as_long_as_the_frame_of_the_groups():
    rng = np.random.default_rng(0)
    epochs = []
    for index in range(EPOCHS):
        drawn = rng.choice(EXAMPLES, GROUPS, replace=False).tolist()
        epochs.append(make_epoch({n: rng.integers(0, 2, GENERATIONS).astype(float).tolist() for n in drawn}, index))

    def made():
        visits = Visits()
        for epoch in epochs:
            visits.add(epoch.index, epoch.statistics)
        return frames.examples(visits, EPOCHS, DifficultySettings(), range(EXAMPLES))

    found = by_turns(3, examples=made, groups=lambda: frames.groups(epochs))
    assert found.made["examples"].rollouts.sum() == EPOCHS * GROUPS * GENERATIONS == 100_000
    print(f"\nexamples {found['examples']:.3f} CPU s, ratio to groups {found.ratio('examples', 'groups'):.2f}")
    assert found.ratio("examples", "groups") < LIMIT
