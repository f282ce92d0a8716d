"""An Ollama Modelfile beside a GGUF: the chat template in Ollama's language, the texts that end a reply, how it was sampled.

Ollama's templates are Go's, and a model's is Jinja. What the Jinja does is found out by rendering small conversations. Where that
is the same text before and after each turn, whatever the turns are, it is written down; otherwise no template is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..types import SamplingParams

__all__ = [
    "TEMPLATE_NOTE",
    "Turns",
    "modelfile",
    "turns_of",
]

ROLES = ("system", "user", "assistant")
PROBE = "finetunenbprobe"
"""A text that no template treats specially."""
TEMPLATE_NOTE = (
    "the chat template cannot be written in Ollama's language (it does more than put a text before and after each turn): the "
    "Modelfile has none, and Ollama takes one that it knows by the GGUF's own template, or else sends prompts without any. Look "
    "at `ollama show --template`."
)
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "Probes.", "parameters": {"type": "object", "properties": {}}},
}
Message = Mapping[str, str]


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around turns."""

    start: str
    """Before the first turn."""
    around: Mapping[str, tuple[str, str]]
    """Role -> the texts before and after what it says; roles that the template refuses are missing."""
    reply: str
    """Before a reply."""
    system: str | None
    """What the system says where a conversation has no such turn; None: nothing."""

    def render(self, messages: Sequence[Message]) -> str:
        """Messages as the text of a prompt, as Ollama would make it of `template`."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        said = [f"{before}{m['content']}{after}" for m in messages for before, after in [self.around[m["role"]]]]
        return self.start + "".join(said) + self.reply

    def template(self) -> str:
        """The same in Go's language of templates."""
        branches = []
        for role, (before, after) in self.around.items():
            word = "else if" if branches else "if"
            branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
        return f"{self.start}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.reply}"


def turns_of(tokenizer: Any) -> Turns | None:
    """What a tokenizer's chat template puts around turns.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        That; None where it does more: other text by place, tools, thoughts that are taken out.
    """
    render = _Renderer(tokenizer)
    user, assistant, system = (_says(role, role) for role in ("user", "assistant", "system"))
    alone = render([user])
    reply = _rest(render([user], reply=True), alone)
    answered = render([user, assistant])
    again = render([user, assistant, _says("user", "again")])

    # What a turn adds after another one is its texts before and after.
    of_user = _parted(_rest(again, answered), "again")
    of_assistant = _parted(_rest(answered, alone), "assistant")
    if alone is None or reply is None or of_user is None or of_assistant is None:
        return None
    around = {"user": of_user, "assistant": of_assistant}
    first = f"{of_user[0]}{user['content']}{of_user[1]}"
    if not alone.endswith(first):
        return None
    start, said = alone.removesuffix(first), None

    instructed = render([system, user])
    if instructed is not None:
        parts = _parted(instructed.removesuffix(first), "system") if instructed.endswith(first) else None
        if parts is None:
            return None
        before, after = parts
        if start and len(start) > len(before + after) and start.startswith(before) and start.endswith(after):
            # Where a conversation has no such turn, the template says something itself.
            start, said = "", start[len(before) : len(start) - len(after)]
        elif not before.startswith(start):
            return None
        around = {"system": (before.removeprefix(start), after), **around}
    turns = Turns(start, around, reply, said)
    return turns if _is_like(turns, render) and _is_writable(turns) else None


class _Renderer:
    """Renders messages with a tokenizer's chat template; None for what it refuses."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer("a")["input_ids"]
        puts_one = bool(ids) and tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id
        self._beginning = tokenizer.bos_token if puts_one else ""
        """The token that begins a text, where who tokenizes it puts it there."""

    def __call__(self, messages: Sequence[Message], reply: bool = False, **options: Any) -> str | None:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=reply, **options
            )
        except Exception:  # a template is a program that comes with the model
            return None
        return text.removeprefix(self._beginning)


def _says(role: str, word: str) -> dict[str, str]:
    return {"role": role, "content": f"{PROBE}{word}"}


def _rest(text: str | None, beginning: str | None) -> str | None:
    """What follows the beginning; None where the text does not begin so."""
    if text is None or beginning is None or not text.startswith(beginning):
        return None
    return text.removeprefix(beginning)


def _parted(text: str | None, word: str) -> tuple[str, str] | None:
    """The texts before and after a turn's words, which stand there once."""
    parts = [] if text is None else text.split(f"{PROBE}{word}")
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _is_like(turns: Turns, render: _Renderer) -> bool:
    """Whether both make the same of conversations that templates like to change."""
    user, assistant, system = (_says(role, role) for role in ("user", "assistant", "system"))
    thought = {"role": "assistant", "content": f"<think>\n{PROBE}\n</think>\n\n{PROBE}"}
    talks = [[user], [user, assistant, user], [user, thought, user], [user, thought, user, assistant, user]]
    if "system" in turns.around:
        talks += [[system, *talk] for talk in talks]
    if any(render(talk, reply=True) != turns.render(talk) for talk in talks):
        return False
    # Ollama has tools only where its template has them.
    return render([user], reply=True, tools=[_PROBE_TOOL]) in (None, render([user], reply=True))


def _is_writable(turns: Turns) -> bool:
    texts = [turns.start, turns.reply, turns.system or "", *(text for pair in turns.around.values() for text in pair)]
    quotes = (turns.start.startswith('"'), turns.reply.endswith('"'), (turns.system or "").endswith('"'))
    return not any(quotes) and not any(mark in text for text in texts for mark in ("{{", "}}", '"""'))


def modelfile(
    gguf: str, tokenizer: Any, ends: Collection[str], sampling: SamplingParams | None
) -> tuple[str, list[str]]:
    """The Modelfile for a GGUF.

    Args:
        gguf: The file's name, beside the Modelfile.
        tokenizer: The model's.
        ends: Texts of the tokens that end a reply.
        sampling: How the model was sampled; None: not known.

    Returns:
        The text, and what could not be taken over, in sentences.
    """
    lines, notes = [f"FROM ./{gguf}"], []
    turns = turns_of(tokenizer)
    if turns is None:
        notes.append(TEMPLATE_NOTE)
    else:
        lines.append(f'TEMPLATE """{turns.template()}"""')
        if turns.system is not None:
            lines.append(f'SYSTEM """{turns.system}"""')
    for stop in dict.fromkeys([*ends, *(sampling.stop if sampling else ())]):
        if '"' in stop or "\n" in stop:
            notes.append(f"the Modelfile cannot name the text {stop!r}, which ends a reply.")
        else:
            lines.append(f'PARAMETER stop "{stop}"')
    if sampling is not None:
        # Ollama would leave unlikely tokens out, and make repeated ones unlikely.
        lines += [f"PARAMETER temperature {sampling.temperature:g}", "PARAMETER top_p 1", "PARAMETER top_k 0"]
        lines.append("PARAMETER repeat_penalty 1")
    return "\n".join(lines) + "\n", notes
