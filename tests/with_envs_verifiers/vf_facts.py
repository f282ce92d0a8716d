"""A taskset whose tool is served by a program of its own: one a rollout, or one for all of them."""

from __future__ import annotations

from typing import Literal

import verifiers.v1 as vf

__all__ = ["FactsTaskset"]
FACTS = {"ada": "the first program", "grace": "the first compiler"}


class Facts(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "facts"

    @vf.tool
    def lookup(self, name: str) -> str:
        """Look up what a person is known for."""
        return FACTS.get(name, "nothing is known")


class FactsTaskConfig(vf.TaskConfig):
    served: Literal["task", "taskset"] = "task"


class FactsData(vf.TaskData):
    answer: str


class FactsTask(vf.Task[FactsData, vf.State, FactsTaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Facts(vf.ToolsetConfig())] if config.served == "task" else []

    @vf.reward
    async def looked_up(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)


class FactsConfig(vf.TasksetConfig):
    task: FactsTaskConfig = FactsTaskConfig()


class FactsTaskset(vf.Taskset[FactsTask, FactsConfig]):
    INFINITE = True

    @classmethod
    def toolsets(cls, config):
        return [Facts(vf.ToolsetConfig())] if config.task.served == "taskset" else []

    def load(self):
        while True:
            for name, fact in FACTS.items():
                yield FactsTask(FactsData(name=name, prompt=f"Who was {name}?", answer=fact), self.config.task)


if __name__ == "__main__":
    Facts.run()
