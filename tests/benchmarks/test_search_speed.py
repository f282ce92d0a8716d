"""A search of recorded rollouts: CPU seconds beside a search through the trajectories, in one run. Targets are printed."""

from __future__ import annotations

import random

import pytest
from measuring import by_turns
from records import Views, epoch_of, stored

from finetune_nb.types import EpisodeItem, EpisodeItemRole, Trajectory

TEXT = "amber tokyo paris rome answer sum total river mountain cloud data model reward token policy group"
WORDS = TEXT.split()
EPOCHS, GROUPS, GENERATIONS = 8, 250, 8


def said(draw: random.Random, role: EpisodeItemRole, words: int) -> EpisodeItem:
    text = " ".join(draw.choices(WORDS, k=words))
    return EpisodeItem.model_construct(role=role, content=text, logprobs=None, metadata=None)


def groups(draw: random.Random) -> list[list[Trajectory]]:
    def rollout(group: int, generation: int) -> Trajectory:
        episode = [said(draw, EpisodeItemRole.USER, 8), said(draw, EpisodeItemRole.ASSISTANT, 45)]
        metadata = {"id": f"q{group}", "generation": generation}
        return Trajectory.model_construct(episode=episode, reward=1.0, shaped_rewards=None, metadata=metadata)

    return [[rollout(group, generation) for generation in range(GENERATIONS)] for group in range(GROUPS)]


@pytest.mark.benchmark(group="search")
def test_a_text_is_found_without_making_the_trajectories_and_in_the_newest_epoch_at_once(benchmark, tmp_path):
    draw = random.Random(0)
    made = groups(draw)
    needle = made[-1][-1].episode[1]
    made[-1][-1].episode[1] = needle.model_copy(update={"content": f"{needle.content} Bertelsmann"})
    run = Views(*stored(tmp_path, *(epoch_of(made, index) for index in range(EPOCHS))))

    def plainly() -> list[Trajectory]:
        trajectories = [each for epoch in run for group in epoch.collection.trajectories for each in group]
        return [each for each in trajectories if any("bertelsmann" in item.content.lower() for item in each.episode)]

    sides = {
        "search": lambda: run.find("bertelsmann").frame,
        "first": lambda: next(iter(run.find("bertelsmann"))),
        "plain": plainly,
    }
    found = benchmark.pedantic(by_turns, (3,), sides, rounds=1)
    rollouts = EPOCHS * GROUPS * GENERATIONS
    print(f"\n{rollouts:,} rollouts in {EPOCHS} epochs, s CPU: all {found['search']:.3f} (target 0.1), the newest epoch "
          f"{found['first']:.4f}; through the trajectories {found['plain']:.2f}")  # fmt: skip
    assert len(found.made["search"]) == len(found.made["plain"]) == EPOCHS
    assert len(found.made["first"].hits) == 1
    assert found.ratio("plain", "search") > 5
    assert found.ratio("search", "first") > 3
