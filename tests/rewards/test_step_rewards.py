"""Steps that a workflow pushes: what evaluators see of them, and rewards of turns that are made of their values."""

import asyncio
import math

import pytest

import finetune_nb as ft
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.rollouts.episodes import sampled_turns
from finetune_nb.store.json import decode_steps, encode_steps
from finetune_nb.testing import FakeAdapter, sums
from finetune_nb.types import EpisodeKey

Type = ft.IntermediateStepType


async def ask(llm, text):
    await llm.chat([{"role": "user", "content": text}])


async def two_moves(question, llm):
    """The second move is worth twice what the first one is."""
    worth = float(question.split("+")[0])
    await ask(llm, question)
    ft.push_step("move", value=worth, board="x..")
    await asyncio.sleep(0)
    await ask(llm, f"{question} again")
    ft.push_step("move", value=2 * worth)
    ft.push_step("note", about="the end")
    return "done"


@pytest.fixture
def run_of(closing, tmp_path):
    def make(workflow, reward=None, **settings):
        reward = ft.step_rewards("move") if reward is None else reward
        settings = {"adapter": FakeAdapter(), "dataset": sums(2), "generations": 2, **settings}
        return closing(ft.Run(workflow, reward, output_dir=tmp_path, **settings))

    return make


async def errors(run):
    epoch = await run.next_epoch()
    rollouts = [each for group in epoch.collection.trajectories for each in group]
    assert rollouts
    assert all(math.isnan(each.reward) for each in rollouts)
    return {each.metadata["reward_error"] for each in rollouts}


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_value_counts_for_the_turn_before_it_and_their_sum_is_the_reward(run_of):
    epoch = await run_of(two_moves).next_epoch()
    worths = {row["id"]: float(row["question"].split("+")[0]) for row in sums(2)}
    assert len(epoch.collection.trajectories) == 2
    for trajectory in (each for group in epoch.collection.trajectories for each in group):
        worth = worths[trajectory.metadata["id"]]
        assert trajectory.shaped_rewards == [worth, 2 * worth]
        assert trajectory.reward == 3 * worth
        assert len(sampled_turns(trajectory)) == 2


async def test_a_turn_without_a_step_has_no_reward_of_its_own(run_of):
    async def late(question, llm):
        await ask(llm, question)
        await ask(llm, f"{question} again")
        ft.push_step("move", value=0.5)
        return "done"

    epoch = await run_of(late).next_epoch()
    assert epoch.collection.trajectories[0][0].shaped_rewards == [0.0, 0.5]


async def test_a_rollout_without_such_a_step_has_no_reward_and_says_so(run_of):
    found = await errors(run_of(two_moves, ft.step_rewards("mvoe")))
    assert found == {"ValueError: the workflow pushed no step 'mvoe' with 'value' in its metadata"}


async def rollout_that_pushed(value):
    """A finished rollout with that step, and no model call."""
    recorder = CallRecorder(EpisodeKey("train", 0, 0, 0))
    with recorder.recording():
        ft.push_step("move", value=value)
    about = {"input_obj": "", "expected_output_obj": "", "full_dataset_entry": {}}
    return ft.EvalInputItem(id="q", trajectory=recorder.steps(), **about)


@pytest.mark.parametrize("value", [math.nan, math.inf, "much", True, None])
async def test_a_value_that_is_no_number_is_no_reward(value):
    with pytest.raises(ValueError, match=f"'move' has value '{value}'; expected a finite number"):
        ft.step_rewards("move")(await rollout_that_pushed(value))


async def test_a_step_before_the_first_turn_can_be_earned_by_none():
    with pytest.raises(ValueError, match="'move' came before the first sampled turn"):
        ft.step_rewards()(await rollout_that_pushed(1.0))


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def steps_of(run_of, workflow):
    """What an evaluator sees of a rollout: event and name of each step."""
    seen = []

    def reward(item):
        seen.append(item.trajectory)
        return 1.0

    epoch = await run_of(workflow, reward, dataset=sums(1), generations=1).next_epoch()
    assert epoch.metrics.failures == 0, epoch.reason
    (steps,) = seen
    return steps


async def test_an_evaluator_sees_the_steps_where_they_happened_between_the_model_calls(run_of):
    steps = await steps_of(run_of, two_moves)
    kinds = [(step.event_type.value, step.name) for step in steps if step.event_state == "END"]
    called = ("LLM_END", "policy")
    assert kinds == [called, ("CUSTOM_END", "move"), called, ("CUSTOM_END", "move"), ("CUSTOM_END", "note")]
    worth = float(sums(1)[0]["question"].split("+")[0])
    ends = [step.metadata for step in steps if step.event_type == Type.CUSTOM_END]
    assert ends == [{"value": worth, "board": "x.."}, {"value": 2 * worth}, {"about": "the end"}]
    assert {step.function_ancestry.function_name for step in steps} == {"<workflow>"}
    times = [step.event_timestamp for step in steps]
    assert times == sorted(times)


async def test_the_toolkits_way_of_pushing_works_too_and_open_steps_are_parents(run_of):
    async def workflow(question, llm):
        manager = ft.Context.get().intermediate_step_manager
        push = manager.push_intermediate_step
        await ask(llm, question)
        outer, inner = ({"name": name, "UUID": name} for name in ("outer", "inner"))
        push(ft.IntermediateStepPayload(event_type=Type.CUSTOM_START, **outer))
        push(ft.IntermediateStepPayload(event_type=Type.CUSTOM_START, **inner))
        push(ft.IntermediateStepPayload(event_type=Type.CUSTOM_END, **inner))
        await asyncio.to_thread(push, ft.IntermediateStepPayload(event_type=Type.CUSTOM_END, **outer))
        push(ft.IntermediateStepPayload(event_type=Type.CUSTOM_END, name="alone"))
        with pytest.raises(TypeError, match="takes an IntermediateStepPayload; found dict"):
            push({"event_type": "CUSTOM_END"})
        return "done"

    steps = await steps_of(run_of, workflow)
    assert [(step.name, step.event_state.value, step.parent_id) for step in steps[1:]] == [
        ("outer", "START", "root"),
        ("inner", "START", "outer"),
        ("inner", "END", "outer"),
        ("outer", "END", "root"),
        ("alone", "END", "root"),
    ]


async def test_a_candidate_of_test_time_compute_keeps_its_score_also_in_a_file(run_of):
    async def workflow(question, llm):
        await ask(llm, question)
        data = ft.TTCEventData(turn_id="t", turn_index=0, candidate_index=1, score=0.5, input=question, output="a")
        payload = ft.IntermediateStepPayload(event_type=Type.TTC_END, name="candidate", data=data)
        ft.Context.get().intermediate_step_manager.push_intermediate_step(payload)
        return "done"

    steps = await steps_of(run_of, workflow)
    (again,) = decode_steps(encode_steps(steps[1:]))
    for step in (steps[1], again):
        assert isinstance(step.data, ft.TTCEventData)
        assert (step.data.turn_id, step.data.candidate_index, step.data.score) == ("t", 1, 0.5)
        assert step.event_category == "TTC"
    assert ft.IntermediateStep.model_validate(steps[1].model_dump()) == steps[1]


async def test_a_step_that_no_rollout_takes_is_an_error():
    with pytest.raises(ft.RunError, match="step 'move' was pushed where no rollout is running"):
        ft.push_step("move", value=1.0)
    recorder = CallRecorder(EpisodeKey("train", 0, 0, 0))
    with recorder.recording():
        ft.push_step("move", value=1.0)
    with recorder.current(), pytest.raises(ft.RunError, match="has ended"):
        ft.push_step("move", value=1.0)
    assert len(recorder.steps()) == 2


async def test_what_an_attempt_pushed_that_failed_is_forgotten(run_of):
    attempts = []

    async def flaky(question, llm):
        attempts.append(question)
        await ask(llm, question)
        ft.push_step("move", value=1.0)
        if len(attempts) == 1:
            raise ConnectionError("the line is busy")
        return "done"

    epoch = await run_of(flaky, dataset=sums(1), generations=1, retries=1).next_epoch()
    assert len(attempts) == 2
    assert epoch.collection.trajectories[0][0].shaped_rewards == [1.0]


# ── components ───────────────────────────────────────────────────────────────────────────────────────────────────────


class OwnBuilder(ft.TrajectoryBuilder):
    """As the guide of the harness has it: evaluates in start_run, and makes the episodes in finalize."""

    async def start_run(self, run_id, meta=None):
        self.evaluating = asyncio.create_task(self.run_eval())

    async def finalize(self, run_id, meta=None):
        output = await self.evaluating
        ((_, verdicts),) = output.evaluation_results
        groups = []
        for item, verdict in zip(output.eval_input.eval_input_items, verdicts.eval_output_items, strict=True):
            episode, version = ft.episode_from_steps(item.trajectory)
            metadata = {"id": item.id, "generation": 0, "policy_version": version}
            reward = await self.compute_reward(verdict)
            groups.append([ft.Trajectory(episode=episode, reward=reward, metadata=metadata)])
        return ft.TrajectoryCollection(trajectories=groups, run_id=run_id)

    def log_progress(self, run_id, metrics, output_dir=None):
        pass


async def test_a_builder_of_ones_own_makes_its_episodes_of_the_steps(run_of):
    builder = OwnBuilder(ft.TrajectoryBuilderConfig())
    epoch = await run_of(two_moves, builder=builder, curriculum={"enabled": False}).next_epoch()
    (first,), _ = epoch.collection.trajectories
    assert [item.role.value for item in first.episode] == ["user", "assistant"] * 2
    assert first.metadata["policy_version"] == 0
    assert all(len(first.episode[turn].logprobs) > 0 for turn in sampled_turns(first))
    assert first.reward == 3 * float(first.episode[0].content.split("+")[0])


def test_steps_without_a_model_call_make_no_episode():
    with pytest.raises(ValueError, match="the workflow made no model call to 'actor': there is nothing to train on"):
        ft.episode_from_steps([], target_model="actor")
