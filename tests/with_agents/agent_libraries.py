"""The same five tasks in the words of each agent library, with the settings that the library has by default."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

QUESTION = "What is 3+4?"
WITH_TOOL = "What is 3+4? use the tool"
AGAIN = "And once more?"


class Answer(BaseModel):
    value: int


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}


class Library:
    """One library. Each method returns the text of the last reply; `structured` an Answer, `stream` the pieces."""

    package = ""
    """The distribution whose version is pinned."""
    environment: str = "agents"
    """Not all libraries go together: the environment that has it."""
    without: tuple[str, ...] = ()
    """Tasks that the library has no words for."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.package)

    @property
    def url(self) -> str:
        return self.llm.base_url

    @property
    def key(self) -> str:
        return self.llm.api_key


class OpenAI(Library):
    package = "openai"

    def client(self):
        import openai

        return openai.AsyncOpenAI(base_url=self.url, api_key=self.key)

    async def _loop(self, questions, tools=()):
        client, messages = self.client(), []
        options = {"tools": list(tools)} if tools else {}
        for question in questions:
            messages.append({"role": "user", "content": question})
            while True:
                answer = await client.chat.completions.create(model="policy", messages=messages, **options)
                turn = answer.choices[0].message
                messages.append(turn)
                if not turn.tool_calls:
                    break
                for call in turn.tool_calls:
                    result = add(**json.loads(call.function.arguments))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        return messages[-1].content

    async def plain(self):
        return await self._loop([QUESTION])

    async def tools(self):
        function = {"name": "add", "description": "Add two numbers.", "parameters": PARAMETERS}
        return await self._loop([WITH_TOOL], [{"type": "function", "function": function}])

    async def stream(self):
        messages = [{"role": "user", "content": QUESTION}]
        stream = await self.client().chat.completions.create(model="policy", messages=messages, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]

    async def structured(self):
        messages = [{"role": "user", "content": QUESTION}]
        answer = await self.client().chat.completions.parse(model="policy", messages=messages, response_format=Answer)
        return answer.choices[0].message.parsed

    async def turns(self):
        return await self._loop([QUESTION, AGAIN])


class OpenAIResponses(OpenAI):
    """The client's other API."""

    async def _respond(self, **options):
        return await self.client().responses.create(model="policy", **options)

    async def plain(self):
        return (await self._respond(input=QUESTION)).output_text

    async def tools(self):
        tools = [{"type": "function", "name": "add", "description": "Add.", "parameters": PARAMETERS}]
        said: list[Any] = [{"role": "user", "content": WITH_TOOL}]
        while True:
            answer = await self._respond(input=said, tools=tools)
            said += answer.output
            calls = [item for item in answer.output if item.type == "function_call"]
            if not calls:
                return answer.output_text
            for call in calls:
                result = str(add(**json.loads(call.arguments)))
                said.append({"type": "function_call_output", "call_id": call.call_id, "output": result})

    async def stream(self):
        stream = await self._respond(input=QUESTION, stream=True)
        return [event.delta async for event in stream if event.type == "response.output_text.delta"]

    async def structured(self):
        answer = await self.client().responses.parse(model="policy", input=QUESTION, text_format=Answer)
        return answer.output_parsed

    async def turns(self):
        first = await self._respond(input=QUESTION)
        return (await self._respond(input=AGAIN, previous_response_id=first.id)).output_text


class Anthropic(Library):
    package = "anthropic"

    def client(self):
        import anthropic

        return anthropic.AsyncAnthropic(base_url=self.url.removesuffix("/v1"), api_key=self.key)

    async def _loop(self, questions, **options):
        client, messages = self.client(), []
        for question in questions:
            messages.append({"role": "user", "content": question})
            while True:
                answer = await client.messages.create(model="policy", max_tokens=200, messages=messages, **options)
                messages.append({"role": "assistant", "content": answer.content})
                calls = [block for block in answer.content if block.type == "tool_use"]
                if not calls:
                    break
                results = []
                for call in calls:
                    results.append({"type": "tool_result", "tool_use_id": call.id, "content": str(add(**call.input))})
                messages.append({"role": "user", "content": results})
        return "".join(block.text for block in answer.content if block.type == "text")

    async def plain(self):
        return await self._loop([QUESTION])

    async def tools(self):
        return await self._loop([WITH_TOOL], tools=[{"name": "add", "description": "Add.", "input_schema": PARAMETERS}])

    async def stream(self):
        messages = [{"role": "user", "content": QUESTION}]
        async with self.client().messages.stream(model="policy", max_tokens=200, messages=messages) as stream:
            return [text async for text in stream.text_stream]

    async def structured(self):
        tool = {"name": "answer", "description": "The answer.", "input_schema": Answer.model_json_schema()}
        messages = [{"role": "user", "content": QUESTION}]
        answer = await self.client().messages.create(
            model="policy",
            max_tokens=200,
            messages=messages,
            tools=[tool],
            tool_choice={"type": "tool", "name": "answer"},
        )
        return Answer(**next(block for block in answer.content if block.type == "tool_use").input)

    async def turns(self):
        return await self._loop([QUESTION, AGAIN])


class OpenAIAgents(Library):
    package = "openai-agents"

    def agent(self, **options):
        import agents
        import openai

        agents.set_tracing_disabled(True)
        client = openai.AsyncOpenAI(base_url=self.url, api_key=self.key)
        model = agents.OpenAIResponsesModel("policy", client)
        return agents.Agent("helper", instructions="Be brief.", model=model, **options)

    async def plain(self):
        import agents

        return (await agents.Runner.run(self.agent(), QUESTION)).final_output

    async def tools(self):
        import agents

        agent = self.agent(tools=[agents.function_tool(add)])
        return (await agents.Runner.run(agent, WITH_TOOL)).final_output

    async def stream(self):
        import agents

        pieces = []
        async for event in agents.Runner.run_streamed(self.agent(), QUESTION).stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                pieces.append(event.data.delta)
        return pieces

    async def structured(self):
        import agents

        return (await agents.Runner.run(self.agent(output_type=Answer), QUESTION)).final_output

    async def turns(self):
        import agents

        agent = self.agent()
        first = await agents.Runner.run(agent, QUESTION)
        said = [*first.to_input_list(), {"role": "user", "content": AGAIN}]
        return (await agents.Runner.run(agent, said)).final_output


class LangChain(Library):
    package = "langchain"

    def model(self):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model="policy", base_url=self.url, api_key=self.key)

    def agent(self, tools):
        from langchain.agents import create_agent

        return create_agent(self.model(), tools)

    async def plain(self):
        return (await self.model().ainvoke(QUESTION)).text

    async def tools(self):
        found = await self.agent([add]).ainvoke({"messages": [("user", WITH_TOOL)]})
        return found["messages"][-1].text

    async def stream(self):
        return [chunk.text async for chunk in self.model().astream(QUESTION)]

    async def structured(self):
        return await self.model().with_structured_output(Answer).ainvoke(QUESTION)

    async def turns(self):
        first = await self.agent([]).ainvoke({"messages": [("user", QUESTION)]})
        second = await self.agent([]).ainvoke({"messages": [*first["messages"], ("user", AGAIN)]})
        return second["messages"][-1].text


class LangGraph(LangChain):
    package = "langgraph"

    def agent(self, tools):
        from langgraph.graph import START, MessagesState, StateGraph
        from langgraph.prebuilt import ToolNode, tools_condition

        model = self.model().bind_tools(tools) if tools else self.model()

        async def call(state: MessagesState):
            return {"messages": [await model.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("model", call)
        graph.add_edge(START, "model")
        if tools:
            graph.add_node("tools", ToolNode(tools))
            graph.add_conditional_edges("model", tools_condition)
            graph.add_edge("tools", "model")
        return graph.compile()


class PydanticAI(Library):
    package = "pydantic-ai-slim"

    def agent(self, **options):
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        model = OpenAIChatModel("policy", provider=OpenAIProvider(base_url=self.url, api_key=self.key))
        return Agent(model, **options)

    async def plain(self):
        return (await self.agent().run(QUESTION)).output

    async def tools(self):
        return (await self.agent(tools=[add]).run(WITH_TOOL)).output

    async def stream(self):
        async with self.agent().run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True)]

    async def structured(self):
        return (await self.agent(output_type=Answer).run(QUESTION)).output

    async def turns(self):
        agent = self.agent()
        first = await agent.run(QUESTION)
        return (await agent.run(AGAIN, message_history=first.all_messages())).output


class Smolagents(Library):
    package = "smolagents"

    def model(self):
        from smolagents import OpenAIModel

        return OpenAIModel(model_id="policy", api_base=self.url, api_key=self.key)

    def agent(self):
        from smolagents import ToolCallingAgent, tool

        return ToolCallingAgent(tools=[tool(add)], model=self.model(), max_steps=4, verbosity_level=0)

    async def plain(self):
        return str(await asyncio.to_thread(self.agent().run, QUESTION))

    async def tools(self):
        return str(await asyncio.to_thread(self.agent().run, WITH_TOOL))

    async def stream(self):
        def pieces():
            messages = [{"role": "user", "content": QUESTION}]
            return [delta.content or "" for delta in self.model().generate_stream(messages)]

        return await asyncio.to_thread(pieces)

    async def structured(self):
        schema = {"name": "answer", "schema": Answer.model_json_schema()}
        form = {"type": "json_schema", "json_schema": schema}
        messages = [{"role": "user", "content": QUESTION}]
        reply = await asyncio.to_thread(self.model().generate, messages, response_format=form)
        return Answer.model_validate_json(reply.content)

    async def turns(self):
        agent = self.agent()
        await asyncio.to_thread(agent.run, QUESTION)
        return str(await asyncio.to_thread(lambda: agent.run(AGAIN, reset=False)))


class SmolagentsCode(Smolagents):
    """Its agent that writes code."""

    def agent(self):
        from smolagents import CodeAgent, tool

        return CodeAgent(tools=[tool(add)], model=self.model(), max_steps=4, verbosity_level=0)


class DSPy(Library):
    package = "dspy"
    without = ("stream",)  # its listener needs a token at a time

    def lm(self):
        import dspy

        return dspy.LM("openai/policy", api_base=self.url, api_key=self.key, cache=False)

    async def plain(self):
        import dspy

        with dspy.context(lm=self.lm()):
            return (await dspy.Predict("question -> answer").acall(question=QUESTION)).answer

    async def tools(self):
        import dspy

        with dspy.context(lm=self.lm()):
            found = await dspy.ReAct("question -> answer", tools=[add], max_iters=3).acall(question=WITH_TOOL)
            return found.answer

    async def structured(self):
        import dspy

        class Sum(dspy.Signature):
            question: str = dspy.InputField()
            answer: Answer = dspy.OutputField()

        with dspy.context(lm=self.lm(), adapter=dspy.JSONAdapter()):
            return (await dspy.Predict(Sum).acall(question=QUESTION)).answer

    async def turns(self):
        import dspy

        class Chat(dspy.Signature):
            question: str = dspy.InputField()
            history: dspy.History = dspy.InputField()
            answer: str = dspy.OutputField()

        predict, history = dspy.Predict(Chat), dspy.History(messages=[])
        with dspy.context(lm=self.lm()):
            for question in (QUESTION, AGAIN):
                found = await predict.acall(question=question, history=history)
                history.messages.append({"question": question, "answer": found.answer})
        return found.answer


class Haystack(Library):
    package = "haystack-ai"

    def generator(self, **options):
        from haystack.components.generators.chat import OpenAIChatGenerator
        from haystack.utils import Secret

        key = Secret.from_token(self.key)
        return OpenAIChatGenerator(api_key=key, model="policy", api_base_url=self.url, **options)

    async def _agent(self, question, tools):
        from haystack.components.agents import Agent
        from haystack.dataclasses import ChatMessage

        agent = Agent(chat_generator=self.generator(), tools=tools)
        agent.warm_up()
        found = await agent.run_async(messages=[ChatMessage.from_user(question)])
        return found["messages"][-1].text

    async def plain(self):
        from haystack.dataclasses import ChatMessage

        found = await self.generator().run_async([ChatMessage.from_user(QUESTION)])
        return found["replies"][0].text

    async def tools(self):
        from haystack.tools import create_tool_from_function

        return await self._agent(WITH_TOOL, [create_tool_from_function(add)])

    async def stream(self):
        from haystack.dataclasses import ChatMessage

        pieces = []

        async def take(chunk):
            pieces.append(chunk.content)

        await self.generator(streaming_callback=take).run_async([ChatMessage.from_user(QUESTION)])
        return pieces

    async def structured(self):
        from haystack.dataclasses import ChatMessage

        generator = self.generator(generation_kwargs={"response_format": Answer})
        found = await generator.run_async([ChatMessage.from_user(QUESTION)])
        return Answer.model_validate_json(found["replies"][0].text)

    async def turns(self):
        from haystack.dataclasses import ChatMessage

        messages = []
        for question in (QUESTION, AGAIN):
            messages.append(ChatMessage.from_user(question))
            messages += (await self.generator().run_async(messages))["replies"]
        return messages[-1].text


class AutoGen(Library):
    package = "autogen-agentchat"

    def client(self):
        from autogen_ext.models.openai import OpenAIChatCompletionClient

        info = {
            "vision": False, "function_calling": True, "json_output": True, "family": "unknown", "structured_output": True
        }  # fmt: skip
        return OpenAIChatCompletionClient(model="policy", base_url=self.url, api_key=self.key, model_info=info)

    def agent(self, **options):
        from autogen_agentchat.agents import AssistantAgent

        return AssistantAgent("helper", self.client(), system_message="Be brief.", **options)

    async def plain(self):
        return (await self.agent().run(task=QUESTION)).messages[-1].content

    async def tools(self):
        agent = self.agent(tools=[add], max_tool_iterations=3)
        return (await agent.run(task=WITH_TOOL)).messages[-1].content

    async def stream(self):
        agent = self.agent(model_client_stream=True)
        pieces = []
        async for event in agent.run_stream(task=QUESTION):
            if type(event).__name__ == "ModelClientStreamingChunkEvent":
                pieces.append(event.content)
        return pieces

    async def structured(self):
        agent = self.agent(output_content_type=Answer)
        return (await agent.run(task=QUESTION)).messages[-1].content

    async def turns(self):
        agent = self.agent()
        await agent.run(task=QUESTION)
        return (await agent.run(task=AGAIN)).messages[-1].content


class LiteLLM(Library):
    package = "litellm"

    async def _ask(self, messages, **options):
        import litellm

        return await litellm.acompletion(
            model="openai/policy", api_base=self.url, api_key=self.key, messages=messages, **options
        )

    async def _loop(self, questions, **options):
        messages: list[Any] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            while True:
                turn = (await self._ask(messages, **options)).choices[0].message
                messages.append(turn)
                if not turn.tool_calls:
                    break
                for call in turn.tool_calls:
                    result = str(add(**json.loads(call.function.arguments)))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        return turn.content

    async def plain(self):
        return await self._loop([QUESTION])

    async def tools(self):
        function = {"name": "add", "description": "Add two numbers.", "parameters": PARAMETERS}
        return await self._loop([WITH_TOOL], tools=[{"type": "function", "function": function}])

    async def stream(self):
        stream = await self._ask([{"role": "user", "content": QUESTION}], stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream]

    async def structured(self):
        answer = await self._ask([{"role": "user", "content": QUESTION}], response_format=Answer)
        return Answer.model_validate_json(answer.choices[0].message.content)

    async def turns(self):
        return await self._loop([QUESTION, AGAIN])


class Instructor(OpenAI):
    package = "instructor"

    def patched(self):
        import instructor

        return instructor.from_openai(super().client())

    async def structured(self):
        messages = [{"role": "user", "content": QUESTION}]
        return await self.patched().chat.completions.create(model="policy", messages=messages, response_model=Answer)

    async def stream(self):
        import instructor

        messages = [{"role": "user", "content": QUESTION}]
        partial = self.patched().chat.completions.create_partial(
            model="policy", messages=messages, response_model=instructor.Partial[Answer]
        )
        return [str(each.value) async for each in partial if each.value is not None]


class Strands(Library):
    package = "strands-agents"
    environment = "agents_strands"

    def agent(self, **options):
        from strands import Agent
        from strands.models.openai import OpenAIModel

        model = OpenAIModel(client_args={"base_url": self.url, "api_key": self.key}, model_id="policy")
        return Agent(model=model, callback_handler=None, **options)

    async def plain(self):
        return str(await self.agent().invoke_async(QUESTION)).strip()

    async def tools(self):
        from strands import tool

        return str(await self.agent(tools=[tool(add)]).invoke_async(WITH_TOOL)).strip()

    async def stream(self):
        return [event["data"] async for event in self.agent().stream_async(QUESTION) if "data" in event]

    async def structured(self):
        return await self.agent().structured_output_async(Answer, QUESTION)

    async def turns(self):
        agent = self.agent()
        await agent.invoke_async(QUESTION)
        return str(await agent.invoke_async(AGAIN)).strip()


class InspectAI(Library):
    package = "inspect-ai"
    environment = "agents_inspect"
    without = ("stream",)

    def model(self):
        from inspect_ai.model import get_model

        return get_model("openai-api/local/policy", base_url=self.url, api_key=self.key, memoize=False)

    async def _loop(self, questions, tools=(), **config):
        from inspect_ai.model import ChatMessageUser, GenerateConfig, execute_tools

        model, messages = self.model(), []
        for question in questions:
            messages.append(ChatMessageUser(content=question))
            while True:
                output = await model.generate(messages, tools=list(tools), config=GenerateConfig(**config))
                messages.append(output.message)
                if not output.message.tool_calls:
                    break
                messages += (await execute_tools(messages, list(tools))).messages
        return output.completion

    async def plain(self):
        return await self._loop([QUESTION])

    async def tools(self):
        from inspect_ai.tool import tool

        @tool
        def addition():
            async def execute(a: int, b: int):
                """Add two numbers.

                Args:
                    a: The first number.
                    b: The second number.
                """
                return str(a + b)

            return execute

        return await self._loop([WITH_TOOL], [addition()])

    async def structured(self):
        from inspect_ai.model import ResponseSchema
        from inspect_ai.util import json_schema

        schema = ResponseSchema(name="answer", json_schema=json_schema(Answer))
        return Answer.model_validate_json(await self._loop([QUESTION], response_schema=schema))

    async def turns(self):
        return await self._loop([QUESTION, AGAIN])


class LlamaIndex(Library):
    package = "llama-index-core"
    environment = "agents_strands"

    def model(self):
        from llama_index.llms.openai_like import OpenAILike

        return OpenAILike(
            model="policy", api_base=self.url, api_key=self.key, is_chat_model=True, is_function_calling_model=True
        )

    async def plain(self):
        return str(await self.model().acomplete(QUESTION))

    async def tools(self):
        from llama_index.core.agent.workflow import FunctionAgent

        agent = FunctionAgent(tools=[add], llm=self.model(), streaming=False)
        return str(await agent.run(WITH_TOOL))

    async def stream(self):
        return [piece.delta or "" async for piece in await self.model().astream_complete(QUESTION)]

    async def structured(self):
        from llama_index.core.llms import ChatMessage

        answer = await self.model().as_structured_llm(Answer).achat([ChatMessage(content=QUESTION)])
        return answer.raw

    async def turns(self):
        from llama_index.core.llms import ChatMessage

        messages, model = [], self.model()
        for question in (QUESTION, AGAIN):
            messages.append(ChatMessage(content=question))
            messages.append((await model.achat(messages)).message)
        return messages[-1].content


class VercelAI(Library):
    """In TypeScript's world: node/tasks.mjs does the tasks in a process of its own."""

    package = "ai"
    environment = "agents_node"
    provider = "openai"

    @classmethod
    def version(cls) -> str:
        pinned = json.loads((Path(__file__).parent / "node/package.json").read_text(encoding="utf-8"))
        return pinned["dependencies"][cls.package]

    async def _do(self, task, question):
        modules = importlib.util.find_spec("agents_node").submodule_search_locations[0]
        script = Path(__file__).parent / "node/tasks.mjs"
        own = {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": self.key, "AI_SDK_LOG_WARNINGS": "false"}
        process = await asyncio.create_subprocess_exec(
            "node", script, modules, self.provider, task, question, AGAIN,
            env={**os.environ, **own}, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(said)

    async def plain(self):
        return await self._do("plain", QUESTION)

    async def tools(self):
        return await self._do("tools", WITH_TOOL)

    async def stream(self):
        return await self._do("stream", QUESTION)

    async def structured(self):
        return Answer(**await self._do("structured", QUESTION))

    async def turns(self):
        return await self._do("turns", QUESTION)


class VercelAICompatible(VercelAI):
    provider = "compatible"


LIBRARIES = {
    "openai": OpenAI,
    "openai, Responses": OpenAIResponses,
    "anthropic": Anthropic,
    "openai-agents": OpenAIAgents,
    "LangChain": LangChain,
    "LangGraph": LangGraph,
    "pydantic-ai": PydanticAI,
    "smolagents, tool calls": Smolagents,
    "smolagents, code": SmolagentsCode,
    "DSPy": DSPy,
    "Haystack": Haystack,
    "AutoGen": AutoGen,
    "LiteLLM": LiteLLM,
    "instructor": Instructor,
    "Strands": Strands,
    "Inspect": InspectAI,
    "LlamaIndex": LlamaIndex,
    "Vercel AI SDK": VercelAI,
    "Vercel AI SDK, compatible": VercelAICompatible,
}
TASKS = ("plain", "tools", "stream", "structured", "turns")
