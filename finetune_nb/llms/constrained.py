"""Holds replies to a form: JSON that fits a schema, a call of a tool that must be made.

A reply format becomes a grammar, and the grammar says before each token which ones fit. How a model writes a tool call is read
from its chat template, which is given calls with known names and arguments. The grammars are those of llguidance.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from ..errors import BackendError, ConfigError, MissingExtra
from ..redaction import redacting_logger
from ..types import ReplyFormat
from .call_recorder import arguments_of
from .chat_tokenizer import ChatTokenizer

__all__ = [
    "Guide",
    "ReplyGuides",
    "grammar_of",
]

logger = redacting_logger(__name__)

MOST_FORMATS = 256
"""Compiled reply formats that are kept."""
LONGEST_OPENING = 16
"""Tokens at a prompt's end among which the beginning of a thought is."""
TEXT_SPACING = {"whitespace_pattern": r"[ \n\t]{0,16}"}
"""White space in JSON that is a text: models write it in one line or in many. Without a bound, a model that knows no better
writes nothing else."""


class Guide:
    """Which tokens fit one reply, from its beginning on."""

    def __init__(self, matcher: Any, end_ids: Collection[int]) -> None:
        self._matcher, self._ends = matcher, np.array(sorted(end_ids), dtype=np.int64)

    def mark(self, fitting_V: np.ndarray) -> None:
        """Clears the entries of tokens that do not fit next. Where the reply is complete its end fits, and always does
        where nothing else would."""
        matcher = self._matcher
        complete = matcher.is_accepting()
        if matcher.is_stopped():
            bits = np.zeros(0, dtype=np.uint8)
            complete = True
        else:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        known = min(len(bits), len(fitting_V))
        fitting_V[:known] &= bits[:known].astype(bool)
        fitting_V[known:] = False
        ends = self._ends[self._ends < len(fitting_V)]
        fitting_V[ends] = complete or not fitting_V.any()

    def take(self, token: int) -> None:
        """The reply has this token next."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            logger.warning("a reply cannot be held to its form any more: %s", self._matcher.get_error())


class ReplyGuides:
    """The guides of one model.

    tokenizer: its tokenizer and chat template. vocabulary: ids are below it. end_ids: the tokens that end a turn.
    """

    def __init__(self, tokenizer: ChatTokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, frozenset(end_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._compiled: dict[tuple[ReplyFormat, bool], Any] = {}

    def prepare(self, wanted: ReplyFormat, prompt: Sequence[int]) -> None:
        """Compiles a format.

        Args:
            wanted: The format.
            prompt: Token ids of the prompt: a thought that it opens comes before the form.

        Raises:
            MissingExtra: llguidance is not installed.
            ConfigError: The format cannot be kept: the schema has something that is not known, or the chat template writes
                no tool calls that can be recognised.
        """
        key = (wanted, self._opens_thought(prompt))
        with self._lock:
            if key not in self._compiled:
                matcher = self._matcher(*key)
                if len(self._compiled) >= MOST_FORMATS:
                    self._compiled.clear()
                self._compiled[key] = matcher

    def guide(self, wanted: ReplyFormat | None, prompt: Sequence[int]) -> Guide | None:
        """A guide for a reply of that format to that prompt; None for any reply."""
        if wanted is None:
            return None
        self.prepare(wanted, prompt)
        with self._lock:
            matcher = self._compiled[wanted, self._opens_thought(prompt)].deep_copy()
        return Guide(matcher, self._end_ids)

    def grammar(self, wanted: ReplyFormat, prompt: Sequence[int]) -> str:
        """A format as a grammar, for a server that holds replies to one.

        Args:
            wanted: The format.
            prompt: As in `prepare`.

        Returns:
            The grammar, in Lark's syntax as llguidance has it.

        Raises:
            MissingExtra: llguidance is not installed.
            ConfigError: The format cannot be kept.
        """
        self.prepare(wanted, prompt)
        return self._grammar(wanted, self._opens_thought(prompt))

    def _opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends within a thought."""
        end = self._tokenizer.tokenizer.decode(list(prompt[-LONGEST_OPENING:]), skip_special_tokens=False)
        return end.rstrip().endswith("<think>")

    def _matcher(self, wanted: ReplyFormat, thinking: bool) -> Any:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingExtra("Holding replies to a form (response_format, tool_choice)", "structured") from error
        if self._tokens is None:
            tokenizer = self._tokenizer.tokenizer
            size = max(self._vocabulary, len(tokenizer))
            try:
                self._tokens = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(self._end_ids))
            except ValueError as error:
                raise ConfigError(
                    f"replies cannot be held to a form (response_format, tool_choice) with a {type(tokenizer).__name__}: "
                    f"{error}. Use a model whose tokenizer has a tokenizer.json."
                ) from error
        grammar = LLMatcher.grammar_from_lark(self._grammar(wanted, thinking))
        problem = LLMatcher.validate_grammar(grammar, self._tokens)
        if problem:
            raise ConfigError(
                f"replies cannot be held to this form (response_format, tool_choice): {problem}. Leave what it names out of the "
                "schema."
            )
        return LLMatcher(self._tokens, grammar)

    def _grammar(self, wanted: ReplyFormat, thinking: bool) -> str:
        return grammar_of(wanted, self._tokenizer, self._end_ids, thinking, self._tokens.is_special_token)


# ── grammars ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def grammar_of(
    wanted: ReplyFormat,
    tokenizer: ChatTokenizer,
    end_ids: Collection[int],
    thinking: bool = False,
    is_special: Callable[[int], bool] = lambda token: False,
) -> str:
    """A format as a grammar of llguidance.

    Args:
        wanted: The format.
        tokenizer: Of the model, with its chat template.
        end_ids: The tokens that end a turn.
        thinking: Whether the reply begins within a thought.
        is_special: Whether a token is one that no text has.

    Returns:
        The grammar, in Lark's syntax.

    Raises:
        ConfigError: The chat template writes no tool calls that can be recognised.
    """
    writer = _GrammarWriter(_CallSyntaxes(tokenizer, end_ids, wanted.tool_parser), is_special)
    choices = []
    if wanted.tools is not None:
        choices.append(writer.calls(json.loads(wanted.tools), wanted.parallel))
    if wanted.schema is not None and not wanted.required:
        choices.append(writer.add("text", writer.json(json.loads(wanted.schema), TEXT_SPACING)))
    thought = writer.any_text("thought", "</think>") + r" /[ \n]*/" if thinking else ""
    writer.add("start", f"{thought} ({' | '.join(choices)})")
    return writer.text()


class _GrammarWriter:
    def __init__(self, template: _CallSyntaxes, is_special: Callable[[int], bool]) -> None:
        self._template = template
        self._rules: dict[str, str] = {}
        added = getattr(template.tokenizer.tokenizer, "added_tokens_decoder", None) or {}
        self._special = {str(token): i for i, token in added.items() if is_special(i)}

    def text(self) -> str:
        return "\n".join(["%llguidance {}", *(f"{name}: {body}" for name, body in self._rules.items())])

    def add(self, name: str, body: str) -> str:
        """Adds a rule; returns its name."""
        self._rules[name] = body
        return name.partition("[")[0]

    def literal(self, text: str) -> str:
        """This text and no other."""
        return " ".join(self.pieces(text))

    def pieces(self, text: str) -> list[str]:
        """A text in pieces. Special tokens in it are tokens: no text is what they are."""
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        parts = re.split(f"({'|'.join(names)})", text) if names else [text]
        return [
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        ]

    def json(self, schema: Mapping[str, Any], spacing: Mapping[str, Any]) -> str:
        """A JSON value that fits."""
        return f"%json {json.dumps({**schema, 'x-guidance': spacing})}"

    def any_text(self, name: str, until: str) -> str:
        """Any text that does not have this one in it, and this one."""
        self._rules.setdefault("ANY_TEXT", r"/(.|\n)*/")
        end, rest = self.pieces(until)[:1], self.pieces(until)[1:]
        if not end or end[0].startswith("<["):
            return " ".join(["ANY_TEXT", *end, *rest])
        return " ".join([self.add(f"{name}[lazy]", f"ANY_TEXT {end[0]}"), *rest])

    def calls(self, tools: Sequence[dict[str, Any]], parallel: bool) -> str:
        """A call of one of the tools; parallel: or of several."""
        syntaxes = [self._template.syntax_of(tool) for tool in tools]
        arguments = [
            self.arguments(i, tool, syntax) for i, (tool, syntax) in enumerate(zip(tools, syntaxes, strict=True))
        ]
        calls = [
            self.add(f"call_{i}", f"{self.literal(syntax.before)} {body}")
            for i, (syntax, body) in enumerate(zip(syntaxes, arguments, strict=True))
        ]
        ends = {syntax.after for syntax in syntaxes}
        between = [self._template.between_calls(tools[0], tool) for tool in tools] if parallel else [None]
        if len(ends) > 1 or None in between:
            each = [f"{call} {self.literal(syntax.after)}" for call, syntax in zip(calls, syntaxes, strict=True)]
            return self.add("calls", " | ".join(each))
        more = [f"{self.literal(str(joint))} {body}" for joint, body in zip(between, arguments, strict=True)]
        self.add("more", " | ".join(more))
        return self.add("calls", f"({' | '.join(calls)}) more* {self.literal(ends.pop())}")

    def arguments(self, index: int, tool: Mapping[str, Any], syntax: _CallSyntax) -> str:
        """The arguments of the tool of that index, as its syntax has them."""
        schema = _parameters(tool)
        if syntax.spacing is not None:
            return self.add(f"arguments_{index}", self.json(schema, syntax.spacing))
        bodies = []
        for n, form in enumerate(syntax.forms):
            parts = []
            for m, (name, until) in enumerate(form):
                parts.append(self.value(f"value_{index}_{n}_{m}", schema["properties"][name], until))
            bodies.append(" ".join(parts))
        return self.add(f"arguments_{index}", " | ".join(bodies))

    def value(self, name: str, schema: Any, until: str) -> str:
        """An argument that is written as it is, and what comes after it."""
        kind = schema.get("type") if isinstance(schema, dict) else None
        choices = schema.get("enum") if isinstance(schema, dict) else None
        if kind == "string" and choices and all(isinstance(choice, str) for choice in choices):
            return f"({' | '.join(map(self.literal, choices))}) {self.literal(until)}"
        if kind in _JSON_KINDS:
            return f"{self.add(name, self.json(schema, TEXT_SPACING))} {self.literal(until)}"
        return self.any_text(name, until)


# ── how a chat template writes calls ─────────────────────────────────────────────────────────────────────────────────

_MARKS = {"fnb_first": "fnb_one", "fnb_second": "fnb_two"}
_JSON_MARKS = re.compile(r'\{\s*"fnb_first"(\s*:\s*)"fnb_one"(\s*,\s*)"fnb_second"\s*:\s*"fnb_two"\s*\}')
_JSON_KINDS = ("integer", "number", "boolean", "array", "object", "null")
"""Types of arguments that are written as JSON, also where each argument is written by itself."""
_ID = "fnb000000"
_THOUGHT = re.compile(r"(?s)\A.*</think>\s*")


@dataclass(frozen=True)
class _CallSyntax:
    """How a call of one tool is written."""

    before: str
    """With the tool's name; up to the arguments."""
    after: str
    """Up to the end of the turn."""
    spacing: Mapping[str, Any] | None
    """The separators of arguments that are JSON; None for arguments that are written one by one."""
    forms: tuple[tuple[tuple[str, str], ...], ...] = ()
    """Of arguments that are written one by one: which of them there may be, each with the text after it."""


class _CallSyntaxes:
    """What a chat template is found to write."""

    def __init__(self, tokenizer: ChatTokenizer, end_ids: Collection[int], tool_parser: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._reading: dict[str, Any] = {} if tool_parser is None else {"tool_parser": tool_parser}
        self._ends = [text for end in sorted(end_ids) if (text := tokenizer.tokenizer.decode([end]))]
        self._end = ""
        """How the turn that was written last ends."""

    def syntax_of(self, tool: dict[str, Any]) -> _CallSyntax:
        """How a call of that tool is written. Raises ConfigError where none is written that could be read again."""
        name = tool["function"]["name"]
        text = self._written([tool], [(name, _MARKS)])
        found = _JSON_MARKS.search(text)
        if found is not None and self._is_read(text, [(name, _MARKS)]):
            spacing = {"whitespace_flexible": False, "key_separator": found[1], "item_separator": found[2]}
            return _CallSyntax(text[: found.start()], text[found.end() :], spacing)
        syntax = self._written_one_by_one(tool)
        if syntax is None:
            raise ConfigError(
                f"the model's chat template writes no call of the tool {name!r} that could be read again, so the model cannot be "
                'held to one. Use tool_choice "auto", and no response_format beside tools.'
            )
        return syntax

    def _written_one_by_one(self, tool: dict[str, Any]) -> _CallSyntax | None:
        """The syntax of a template that writes each argument as it is; None where it does not."""
        name, schema = tool["function"]["name"], _parameters(tool)
        every = list(schema["properties"])
        required = [each for each in every if each in schema.get("required", ())]
        if not every:
            text = self._written([tool], [(name, {})])
            return _CallSyntax(text, "", None, ((),)) if text and self._is_read(text, [(name, {})]) else None
        before, forms = None, []
        for names in (every, required) if required and required != every else (every,):
            marks = {each: _mark(i, schema["properties"][each]) for i, each in enumerate(names)}
            text = self._written([tool], [(name, marks)])
            places = [text.find(str(mark)) for mark in marks.values()]
            if -1 in places or places != sorted(places) or not self._is_read(text, [(name, marks)]):
                return None
            if before is not None and text[: places[0]] != before:
                continue
            before = text[: places[0]]
            ends = [place + len(str(mark)) for place, mark in zip(places, marks.values(), strict=True)]
            # The text after the last argument is part of the form: it ends what is written as it is.
            untils = [text[end:start] for end, start in zip(ends, [*places[1:], len(text)], strict=True)]
            forms.append(tuple(zip(names, untils, strict=True)))
        return _CallSyntax(before or "", "", None, tuple(forms))

    def between_calls(self, first: dict[str, Any], second: dict[str, Any]) -> str | None:
        """What is between the arguments of two calls in one turn, the second one's name included; None where there are not
        two."""
        calls = [(tool["function"]["name"], _MARKS) for tool in (first, second)]
        text = self._written([first, second], calls)
        places = list(_JSON_MARKS.finditer(text))
        if len(places) != 2 or not self._is_read(text, calls):
            return None
        return text[places[0].end() : places[1].start()]

    def _written(self, tools: list[Any], calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """A turn with these calls: from the end of the prompt to the end of the turn, without thoughts. Empty where the
        template refuses them, as it may refuse two, or other arguments than it knows."""
        made = [
            {"id": _ID, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
            for name, arguments in calls
        ]
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": made}]
        prompt, whole = self._render(messages[:1], tools, True), self._render(messages, tools, False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        text = _THOUGHT.sub("", whole[common:])
        last = max((text.rfind(str(mark)) for _, marks in calls for mark in marks.values()), default=0)
        ends = [(place, end) for end in self._ends if (place := text.find(end, max(last, 0))) >= 0]
        place, self._end = min(ends, default=(len(text.rstrip()), ""))
        return text[:place]

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        """A conversation as text, with the beginning of a reply where it is a prompt; empty where the template refuses it."""
        try:
            return self.tokenizer.template.render(messages, tools, prompt)
        except BackendError:
            return ""

    def _is_read(self, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
        """Whether the calls in a turn are read as those that were written."""
        reply = self.tokenizer.parse(self.tokenizer.encode(text + self._end), **self._reading)
        made = [call["function"] for call in reply.get("tool_calls") or ()]
        read = [(function["name"], _as_texts(arguments_of(function))) for function in made]
        return read == [(name, _as_texts(arguments)) for name, arguments in calls]


def _as_texts(arguments: Any) -> Any:
    """Arguments without their types, which a reader that is not told of the tools may not know."""
    if not isinstance(arguments, Mapping):
        return arguments
    return {name: str(value) for name, value in arguments.items()}


def _mark(index: int, schema: Any) -> str | int:
    """A value of an argument that is found again in a text. Templates quote texts, and nothing else."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    return 700_000_000 + 1_000_003 * index if kind in _JSON_KINDS else f"fnb_value_{index}_"


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object."""
    given = tool["function"].get("parameters")
    schema = dict(given) if isinstance(given, dict) else {}
    schema.setdefault("type", "object")
    schema.setdefault("properties", {})
    return schema
