"""What a request may ask for beside its messages: what sampling honours, what changes nothing, what is refused, and how to
switch that off.

Options have the names of the chat completions API here. A parameter that changes what is sampled is never dropped in silence:
training would not know of it. A run may say that some are to be ignored; those are recorded with the call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...types import ReplyFormat, SamplingParams

__all__ = [
    "KNOWN_OPTIONS",
    "NO_NAMES",
    "Abilities",
    "Options",
    "Refused",
    "how_to_ignore",
    "is_neutral",
    "plain_tools",
    "without_ignored",
]


class Refused(Exception):
    """A request that is answered with an error. `code` and `param` as in the OpenAI API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True, slots=True)
class Abilities:
    """What can be done for a request: by the model that is asked, and by what the run says."""

    sampling: SamplingParams
    """For parameters that a request does not give."""
    takes_options: bool = False
    """Whether parameters beyond SamplingParams are passed on, and messages left as they are."""
    constrains: bool = False
    """Whether replies can be held to a form."""
    ignore: frozenset[str] = frozenset()
    """Parameters that the run says to ignore."""
    tool_parser: str | None = None
    """The format of tool calls, where the run names one."""
    template: str = ""
    """The source of the chat template, where a call may set its variables."""
    library: str = ""
    """The client library, as its User-Agent names it."""


NO_NAMES: Mapping[str, Any] = MappingProxyType({})
_WITHOUT_EFFECT = {
    "model",  # the address says which model
    "seed",  # every call has one of its own; a fixed one would make all rollouts of a group alike
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "safety_identifier",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "add_special_tokens": (False,),
    "chat_template_kwargs": ({},),
}
"""Parameters that change nothing at these values, whoever is asked."""
_NEUTRAL_HERE: dict[str, tuple[Any, ...]] = {
    "reasoning_effort": ("medium",),  # the API's default: the model as it is
    "verbosity": ("medium",),
    "function_call": ("auto", "none"),
}
"""The same for a policy."""
_FASTER = {"prediction"}
"""Parameters that a policy may leave out of account: they make an answer faster, and no other."""
_HONOURED = {"tool_choice", "parallel_tool_calls", "response_format", "top_logprobs"}
KNOWN_OPTIONS = {*_NEUTRAL, *_NEUTRAL_HERE, *_FASTER, *_HONOURED, "web_search_options", "audio", "moderation"}
MOST_ALTERNATIVES = 20

_CURES: dict[str, dict[str, str]] = {
    "reasoning_effort": {
        "openai-agents": "ModelSettings(reasoning=None)",
        "pydantic-ai": "no openai_reasoning_effort and no thinking in model_settings",
        "LangChain": "ChatOpenAI(reasoning_effort=None, reasoning=None)",
        "Vercel AI SDK": "no providerOptions.openai.reasoningEffort",
        "anthropic": "no thinking and no output_config.effort",
    },
    "verbosity": {
        "openai-agents": "ModelSettings(verbosity=None)",
        "pydantic-ai": "no openai_text_verbosity in model_settings",
        "LangChain": "ChatOpenAI(verbosity=None)",
        "Vercel AI SDK": "no providerOptions.openai.textVerbosity",
    },
    "top_p": {
        "openai-agents": "ModelSettings(top_p=None)",
        "pydantic-ai": "no top_p in model_settings",
        "LangChain": "ChatOpenAI(top_p=None)",
        "Vercel AI SDK": "no topP",
    },
    "tool_choice": {
        "openai-agents": 'ModelSettings(tool_choice="auto")',
        "pydantic-ai": "output_type=str or PromptedOutput(...)",
        "LangChain": 'bind_tools(tools, tool_choice="auto")',
        "Vercel AI SDK": "toolChoice: 'auto'",
        "anthropic": 'tool_choice={"type": "auto"}',
    },
    "response_format": {
        "openai-agents": "Agent(output_type=None)",
        "pydantic-ai": "output_type=str or PromptedOutput(...)",
        "LangChain": "invoke in place of with_structured_output, and PydanticOutputParser",
        "Vercel AI SDK": "generateText in place of generateObject",
        "anthropic": "no output_config.format",
    },
    "functions": {"LangChain": "bind_tools in place of bind_functions", "openai": "tools in place of functions"},
}
"""How a parameter is switched off, in the words of each library."""
_USER_AGENTS = {
    "pydantic-ai": re.compile(r"pydantic-ai"),
    "openai-agents": re.compile(r"agents/"),
    "LangChain": re.compile(r"langchain"),
    "Vercel AI SDK": re.compile(r"\bai-sdk/|^ai/"),
    "anthropic": re.compile(r"anthropic/"),
}
"""How a library names itself. Others, such as LangChain's models, name the OpenAI client."""


def without_ignored(
    given: dict[str, Any], abilities: Abilities, names: Mapping[str, str] = NO_NAMES
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is left of a request's fields, and the names of those that the run says to ignore.

    names: what the client calls a field where it has another name there. Either name may be ignored; the client's is returned.
    """
    if not abilities.ignore:
        return given, ()
    ignored = {name for name in given if name in abilities.ignore or names.get(name) in abilities.ignore}
    left = {name: value for name, value in given.items() if name not in ignored}
    return left, tuple(names.get(name, name) for name in given if name in ignored)


def plain_tools(tools: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]] | None, bool]:
    """Tools as a chat template shows them, without `strict`, which is an order to the sampler; and whether any was strict."""
    if not any(isinstance(tool.get("function"), dict) and "strict" in tool["function"] for tool in tools or ()):
        return tools, False
    strict, plain = False, []
    for tool in tools or ():
        function = dict(tool["function"]) if isinstance(tool.get("function"), dict) else None
        if function is not None:
            strict = bool(function.pop("strict", False)) or strict
            tool = {**tool, "function": function}
        plain.append(tool)
    return plain, strict


@dataclass(frozen=True, slots=True)
class Options:
    """What a request's options come to, for a model of this process."""

    reply_format: ReplyFormat | None = None
    top_logprobs: int = 0
    calls_tools: bool = True
    """Whether what the model writes as a tool call is one; otherwise it is text."""
    parallel: bool = True
    """Whether a reply may have more than one tool call."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template by which the prompt says how much is to be thought."""
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any],
        tools: list[dict[str, Any]] | None,
        strict: bool,
        abilities: Abilities,
        names: Mapping[str, str],
    ) -> Options:
        """Reads options.

        Args:
            given: Their values by name.
            tools: The request's.
            strict: Whether any of them asks that its arguments fit its schema.
            abilities: Of the model.
            names: What the client calls an option where it has another name there.

        Raises:
            Refused: 400 for one that cannot be honoured, with how to switch it off.
        """
        given = {name: value for name, value in given.items() if name not in _FASTER}
        if not given and not strict:
            return _NONE
        return _Reader(abilities, names).read(given, tools, strict)


_NONE = Options()


@dataclass(frozen=True, slots=True)
class _Reader:
    abilities: Abilities
    names: Mapping[str, str] = field(default_factory=dict)

    def read(self, given: Mapping[str, Any], tools: list[dict[str, Any]] | None, strict: bool) -> Options:
        template_kwargs = self.thinking(given.get("reasoning_effort"))
        for name, value in given.items():
            if name == "reasoning_effort" and template_kwargs is not None:
                continue
            if name not in _HONOURED and not any(value == neutral for neutral in _NEUTRAL_HERE.get(name, ())):
                raise self.refusal(name, value)
        parallel = given.get("parallel_tool_calls", True)
        if not isinstance(parallel, bool):
            raise self.malformed("parallel_tool_calls", parallel, "true or false")
        choice = given.get("tool_choice", "auto")
        if choice not in ("none", "auto"):
            self.require_forms("tool_choice", given)
        mode, callable_tools = self.tool_choice(choice, tools)
        schema = self.schema(given.get("response_format"))
        reply_format = None
        if mode == "required":
            parallel = parallel and choice in ("required", "any")  # a named tool is called once
            reply_format = ReplyFormat(None, as_json(callable_tools), True, parallel, self.abilities.tool_parser)
        elif schema is not None:
            callable_now = as_json(tools) if tools and mode == "auto" else None
            reply_format = ReplyFormat(schema, callable_now, False, parallel, self.abilities.tool_parser)
        if reply_format is not None:
            self.require_forms("response_format", given)
            if reply_format.tools and not all(isinstance(name_of(tool), str) for tool in tools or ()):
                raise Refused(400, "a tool has no name; expected a function with its name.", None, "tools")
        # Where any reply is taken, a call may have other arguments than its schema says.
        ignored = ("strict",) if strict and (reply_format is None or not reply_format.tools) else ()
        return Options(reply_format, self.alternatives(given), mode != "none", parallel, template_kwargs or {}, ignored)

    def thinking(self, effort: Any) -> dict[str, Any] | None:
        """Variables of the chat template that say an effort; None where the template has none for it."""
        template = self.abilities.template
        if not isinstance(effort, str) or not template:
            return None
        if "reasoning_effort" in template:
            return {"reasoning_effort": effort}
        if effort == "none" and "enable_thinking" in template:
            return {"enable_thinking": False}
        if effort == "none" and "think" not in template:
            return {}  # it does not think anyway
        return None

    def require_forms(self, name: str, given: Mapping[str, Any]) -> None:
        """Raises Refused where the policy holds no reply to a form."""
        if not self.abilities.constrains:
            raise self.refusal(name, given[name], " It holds no reply to a form; the policy of local_grpo does.")

    def alternatives(self, given: Mapping[str, Any]) -> int:
        count = given.get("top_logprobs", 0)
        if type(count) is not int or not 0 <= count <= MOST_ALTERNATIVES:
            raise self.malformed("top_logprobs", count, f"a whole number from 0 to {MOST_ALTERNATIVES}")
        return count

    def schema(self, response_format: Any) -> str | None:
        """The JSON schema that a text must fit, as JSON; None for any text."""
        kind = response_format.get("type") if isinstance(response_format, dict) else None
        if response_format is None or kind == "text":
            return None
        if kind == "json_object":
            return '{"type": "object"}'
        described = response_format.get("json_schema") if kind == "json_schema" else None
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise self.malformed(
                "response_format", response_format, "text, json_object, or json_schema with its schema"
            )
        return as_json(schema)

    def tool_choice(self, choice: Any, tools: list[dict[str, Any]] | None) -> tuple[str, list[dict[str, Any]]]:
        """ "none", "auto" or "required", and the tools among which is chosen."""
        available = {name_of(tool): tool for tool in tools or ()}
        if choice in ("none", "auto"):
            return choice, list(available.values())
        if choice in ("required", "any"):
            named: Collection[Any] = available
        elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools")
            allowed = allowed if isinstance(allowed, dict) else {}
            named = [name_of(tool) for tool in allowed.get("tools") or () if isinstance(tool, dict)]
            if allowed.get("mode") == "auto" and available.keys() <= set(named):
                return "auto", list(available.values())
            if allowed.get("mode") != "required":
                raise self.refusal(
                    "tool_choice", choice, " A free choice among some of the tools cannot be held to them."
                )
        elif isinstance(choice, dict) and name_of(choice) is not None:
            named = [name_of(choice)]
        else:
            raise self.malformed("tool_choice", choice, '"none", "auto", "required" or the name of a tool')
        chosen = [tool for name, tool in available.items() if name in named]
        if not chosen or len(chosen) < len(named):
            known = ", ".join(map(str, available)) or "none"
            raise self.malformed("tool_choice", choice, f"a tool of the request (it has: {known})")
        return "required", chosen

    def refusal(self, name: str, value: Any, why: str = "") -> Refused:
        """An option that the policy cannot honour, and how to switch it off."""
        shown = self.names.get(name, name)
        problem = f"the policy cannot honour {shown}={json.dumps(value)[:80]}.{why} Leave it out"
        return Refused(
            400,
            f"{problem}{self.in_its_own_words(name)}. {how_to_ignore(shown)}",
            "unsupported_parameter",
            shown,
        )

    def in_its_own_words(self, name: str) -> str:
        """How it is left out in the client's library, or in each where it cannot be told which one asks."""
        cures = _CURES.get(name, {})
        agent = self.abilities.library.lower()
        for library, pattern in _USER_AGENTS.items():
            if library in cures and pattern.search(agent):
                return f" ({library}: {cures[library]})"
        each = "; ".join(f"{library}: {cure}" for library, cure in cures.items())
        return f" ({each})" if each else ""

    def malformed(self, name: str, value: Any, expected: str) -> Refused:
        shown = self.names.get(name, name)
        return Refused(400, f"{shown} is {json.dumps(value)[:80]}; expected {expected}.", None, shown)


def how_to_ignore(name: str) -> str:
    """How a run takes requests with a parameter that it does not honour."""
    return f'To ignore it in a run: ft.Run(..., gateway={{"ignore": ["{name}"]}}), in YAML run.gateway.ignore.'


def is_neutral(name: str, value: Any) -> bool:
    """Whether a parameter changes nothing at this value, whoever is asked."""
    return name in _WITHOUT_EFFECT or any(value == neutral for neutral in _NEUTRAL.get(name, ()))


def name_of(tool: Mapping[str, Any]) -> Any:
    """A tool's name, by its schema or by how it is chosen."""
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else tool.get("name")


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
