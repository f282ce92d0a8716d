"""A scripted policy that calls tools by their names."""

from __future__ import annotations

import json
from typing import Any

from finetune_nb.testing import ScriptedPolicy


class Calling(ScriptedPolicy):
    """A reply such as 'guess {"number": 3}' calls the tool."""

    def parse(self, ids: Any) -> dict[str, Any]:
        message = super().parse(ids)
        name, brace, arguments = message["content"].partition("{")
        if not brace:
            return message
        function = {"name": name.strip(), "arguments": brace + arguments}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tries(*numbers: int) -> Any:
    """A script that guesses one number after the other, and then says that it is done."""

    def script(messages, seed):
        turn = sum(message["role"] == "assistant" for message in messages)
        return "guess " + json.dumps({"number": numbers[turn]}) if turn < len(numbers) else "done"

    return script
