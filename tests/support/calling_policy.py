"""A scripted policy that thinks and calls tools, for tests of the APIs that the gateway speaks."""

from __future__ import annotations

from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.testing import ScriptedPolicy
from finetune_nb.types import EpisodeKey


class Caller(ScriptedPolicy):
    """A reply of the script may have a thought before a bar; what begins with "call " calls the tool `add`, once a line."""

    def __init__(self, script=None):
        super().__init__(script)
        self.sampled = []

    async def sample(self, ids, params, seed):
        sample = await super().sample(ids, params, seed)
        self.sampled.append((list(ids), sample.ids))
        return sample

    def parse(self, ids):
        thought, _, text = super().parse(ids)["content"].rpartition("|")
        message = {"role": "assistant", "content": text}
        if text.startswith("call "):
            made = [line.removeprefix("call ") for line in text.splitlines()]
            calls = [{"type": "function", "function": {"name": "add", "arguments": each}} for each in made]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        return message | ({"reasoning_content": thought} if thought else {})


def episode(n=0):
    return CallRecorder(EpisodeKey("train", 0, 0, n), seed=1)


def says(text):
    return PolicyLLM(Caller(lambda messages, seed: text), "tiny")
