"""Agent libraries as they are installed, with what they send by default: each call is recorded with the ids that were sampled,
and a conversation that is carried on keeps them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from agent_libraries import AGAIN, LIBRARIES, TASKS, Answer

from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.chat_messages import content_text
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.rollouts.episodes import drift, episode_from_steps
from finetune_nb.testing import ScriptedPolicy
from finetune_nb.types import EpisodeKey, EvalInputItem, Trajectory

pytestmark = pytest.mark.slow


class Helper(ScriptedPolicy):
    """Answers 7 in the form that is asked for: as a text, as a call of a tool, as JSON, as code."""

    constrains = True

    def __init__(self):
        super().__init__(None)
        self.sampled = []
        self._tools = {}

    def render(self, messages, tools=None, previous_ids=None, **options):
        ids = super().render(messages, tools, previous_ids)
        self._tools[tuple(ids)] = tools or []
        return ids

    async def sample(self, ids, params, seed):
        messages = self._rendered[tuple(ids)]
        self.script = lambda messages_, seed_: self.reply(messages, self._tools[tuple(ids)], params)
        sample = await super().sample(ids, params, seed)
        self.sampled.append((list(ids), list(sample.ids)))
        return sample

    def reply(self, messages, tools, params):
        said = "\n".join(content_text(message.get("content")) for message in messages)
        last = content_text(messages[-1].get("content"))
        names = {tool["function"]["name"]: tool["function"] for tool in tools}
        answered = messages[-1]["role"] == "tool"
        adder = next((name for name in names if name.startswith("add")), None)
        if "[[ ## " in said and (params.reply_format is not None or "JSON object" in said):
            return json.dumps({"answer": {"value": 7}})
        if "[[ ## " in said:  # DSPy's own form
            return dspy_reply(said, last)
        if "<code>" in said:  # smolagents' agent that writes code
            return "Thought: I add.\n<code>\nfinal_answer(add(3, 4))\n</code>"
        if "final_answer" in names:
            if "use the tool" in said and "7" not in said.partition("use the tool")[2]:
                return 'call add {"a": 3, "b": 4}'
            return 'call final_answer {"answer": "It is 7."}'
        others = [name for name in names if name != adder]
        if others and not answered:  # an answer that is asked for as a call
            schema = names[others[0]].get("parameters") or {}
            return f"call {others[0]} {json.dumps(filled(schema))}"
        if adder and "use the tool" in last:
            return f'call {adder} {{"a": 3, "b": 4}}'
        if params.reply_format is not None:
            return json.dumps({"value": 7})
        return "It is 7."

    def parse(self, ids, tools=None, tool_parser=None):
        message = super().parse(ids)
        found = re.fullmatch(r"call (\S+) (.*)", message["content"], re.DOTALL)
        if found is None:
            return message
        function = {"name": found[1], "arguments": found[2]}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def filled(schema):
    """A value for an answer's schema."""
    if "value" in schema.get("properties", {}):
        return {"value": 7}
    return {name: {"value": 7} for name in schema.get("properties", {})}


def dspy_reply(said, last):
    if "next_thought" in last or "next_tool_name" in said.rpartition("Respond with")[2]:
        tool = "finish" if "observation_0" in last else "add"
        arguments = "{}" if tool == "finish" else '{"a": 3, "b": 4}'
        return (
            f"[[ ## next_thought ## ]]\nI add.\n\n[[ ## next_tool_name ## ]]\n{tool}\n\n"
            f"[[ ## next_tool_args ## ]]\n{arguments}\n\n[[ ## completed ## ]]"
        )
    reasoning = "[[ ## reasoning ## ]]\nI add.\n\n" if "reasoning" in said else ""
    return f"{reasoning}[[ ## answer ## ]]\nIt is 7.\n\n[[ ## completed ## ]]"


@pytest.fixture(autouse=True)
async def close_clients():
    yield
    await gateway().close_clients()


def environment():
    """The one that these tests run in, by a library that only it has."""
    own = {"strands": "agents_strands", "inspect_ai": "agents_inspect", "agents_node": "agents_node"}
    return next((name for library, name in own.items() if importlib.util.find_spec(library)), "agents")


HERE = [library for library, kind in LIBRARIES.items() if kind.environment == environment()]
CASES = [(library, task) for library in HERE for task in TASKS if task not in LIBRARIES[library].without]


@pytest.mark.parametrize(("library", "task"), CASES)
async def test_a_librarys_calls_are_recorded_as_sampled(library, task):
    policy = Helper()
    llm = PolicyLLM(policy, "policy")
    with CallRecorder(EpisodeKey("train", 0, 0, 0), seed=1).recording([policy]) as episode:
        found = await getattr(LIBRARIES[library](llm), task)()

    # What the agent got.
    if task == "structured":
        assert isinstance(found, Answer) and found.value == 7
    elif task == "stream":
        assert "7" in "".join(found)
    else:
        assert "7" in found

    # What is recorded.
    assert episode.calls
    assert [(call.prompt_ids, call.response_ids) for call in episode.calls] == policy.sampled
    if task in ("turns", "tools"):
        assert len(episode.calls) >= (2 if library != "smolagents, code" or task == "turns" else 1)
        item = EvalInputItem(
            id="a", input_obj=AGAIN, expected_output_obj=None, full_dataset_entry={}, trajectory=episode.steps()
        )
        turns, _ = episode_from_steps(item.trajectory)
        _, drifted = drift([Trajectory(episode=turns, reward=0.0)])
        assert drifted == 0


@pytest.mark.parametrize("library", HERE)
def test_the_readme_has_a_row_for_the_library_with_its_version(library):
    version = LIBRARIES[library].version()
    cells = ["" if task in LIBRARIES[library].without else "yes" for task in TASKS]
    row = f"| {library} | {version} | {' | '.join(cells)} |"
    assert row in (Path(__file__).parents[2] / "notebooks/reference/agents.md").read_text(encoding="utf-8")
