"""Recorded calls as an episode: turns that carry a conversation on, turns that have drifted, ids that are not exact."""

from __future__ import annotations

import pytest

from finetune_nb.errors import BackendError
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.rollouts.episodes import drift, episode_from_steps
from finetune_nb.testing import ScriptedPolicy, make_trajectory
from finetune_nb.training.jobs import check_exact
from finetune_nb.types import EpisodeKey, EvalInputItem, Trajectory


class Forgetful(ScriptedPolicy):
    """Renders every conversation anew, and writes old turns in capitals: a chat template that rewrites the past."""

    def render(self, messages, tools=None, previous_ids=None):
        return super().render([{**m, "content": m["content"].upper()} for m in messages[:-1]] + messages[-1:], tools)


async def trajectory(policy, turns=3, anew=False):
    llm, messages = PolicyLLM(policy), []
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        for n in range(turns):
            messages = [] if anew else messages
            messages.append({"role": "user", "content": f"turn {n}"})
            messages.append(await llm.chat(messages))
    item = EvalInputItem(
        id="q", input_obj="", expected_output_obj="", full_dataset_entry={}, trajectory=episode.steps()
    )
    return Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=1.0, metadata={"id": "q"})


async def test_turns_behind_the_sampled_ids_have_not_drifted():
    assert drift([await trajectory(ScriptedPolicy())]) == (2, 0)


async def test_turns_whose_prompt_was_rendered_anew_are_counted_and_marked():
    found = await trajectory(Forgetful())
    assert drift([found, found]) == (4, 4)
    assert [item.metadata.get("drifted") for item in found.episode if item.role == "assistant"] == [None, True, True]


async def test_a_conversation_that_starts_anew_carries_nothing_on():
    assert drift([await trajectory(Forgetful(), anew=True)]) == (0, 0)


def test_ids_that_are_not_exact_are_refused_unless_allowed():
    inexact, exact = make_trajectory(1.0, "q"), make_trajectory(1.0, "p")
    inexact.episode[1].metadata["exact"] = False
    check_exact([exact], False)
    check_exact([inexact], True)
    with pytest.raises(
        BackendError, match=r"turn 1 of example 'q', generation 0, has token ids that are not exact.*allow"
    ):
        check_exact([exact, inexact], False)
