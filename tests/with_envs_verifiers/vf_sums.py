"""Sums with a calculator, as a taskset of verifiers. Its harness runs in this process, so that an episode takes no time; its
environment may ask a second question, and have a second agent ask it."""

from __future__ import annotations

import json
import random

import httpx
import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire

from finetune_nb.examples.calculator.task import TOOLS, calculate, make_question

__all__ = ["SumsEnv", "SumsHarness", "SumsTaskset"]


class SumsData(vf.TaskData):
    answer: str
    broken: str | None = None
    """What raises: "setup", "harness", "reward" or "finalize"; or "no reward"."""


class SumsTask(vf.Task[SumsData]):
    async def setup(self, trace, runtime):
        self._break("setup")

    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        self._break("reward")
        return float(trace.last_reply.removeprefix("=") == self.data.answer) / 2

    @vf.reward
    async def bonuses(self, trace: vf.Trace) -> dict[str, float]:
        return {"bonus": 0.0}

    @vf.metric
    async def calls(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))

    def _break(self, where: str) -> None:
        if self.data.broken == where:
            raise LookupError(f"broken in {where}")


class SumsConfig(vf.TasksetConfig):
    size: int = 100
    broken: list[str | None] = [None]
    """What is broken in the first task, in the second, and so on, over and over."""


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self):
        rng = random.Random(0)
        if self.config.size < 1:
            raise OSError("the data set is gone")
        for place in range(self.config.size):
            question = make_question(rng, 2)
            data = SumsData(
                prompt=question,
                answer=calculate(question, question) or "",
                broken=self.config.broken[place % len(self.config.broken)],
            )
            yield SumsTask(data, self.config.task)


class SumsHarnessConfig(vf.HarnessConfig):
    tools: bool = True


class SumsHarness(vf.Harness[SumsHarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        if getattr(data, "broken", None) == "harness":
            return vf.ProgramResult(exit_code=3, stdout="", stderr="the program died")
        _, prompt = self.resolve_prompt(data)
        given = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else prompt
        messages = [message_to_wire(each) for each in given]
        remaining = messages[-1]["content"]
        tools = {"tools": TOOLS} if self.config.tools else {}
        async with httpx.AsyncClient(trust_env=False, timeout=None, verify=False) as http:
            client = AsyncOpenAI(base_url=endpoint, api_key=secret, http_client=http, max_retries=0)
            while remaining is not None:
                asked = await client.chat.completions.create(model=ctx.model, messages=messages, **tools)
                reply = asked.choices[0].message
                messages.append(reply.model_dump(exclude_none=True))
                if not reply.tool_calls:
                    break
                call = reply.tool_calls[0]
                remaining = calculate(_expression(call.function.arguments), remaining)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": remaining or "error"})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


def _expression(arguments: str) -> str:
    try:
        return str(json.loads(arguments)["expression"])
    except (ValueError, LookupError, TypeError):
        return ""


class SumsEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()
    asker: vf.AgentConfig = vf.AgentConfig()
    rounds: int = 1
    asked_by_model: bool = False
    trained: int = 1


class SumsEnv(vf.Env[SumsEnvConfig]):
    async def setup(self, agents):
        agents.asker.trainable = False

    async def run(self, task, agents):
        for _ in range(self.config.trained - 1):
            await agents.agent.run(task)
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()
            for number in range(1, self.config.rounds):
                if segment.terminated:
                    break
                question = f"{number}+{number}"
                if self.config.asked_by_model:
                    asked = await agents.asker.run(vf.Task(vf.TaskData(prompt=question)))
                    interaction.trace.info["asked"] = asked.last_reply
                segment = await interaction.turn(question)

    async def finalize(self, task, episode):
        if task.data.broken == "finalize":
            raise LookupError("broken in finalize")
