"""reasoning-gym: procedural tasks with a scorer each.

    run = ft.Run(env="reasoning_gym:chain_sum", env_options={"size": 200, "max_digits": 1})

The metadata of a task are columns of its row, so that an agent or a reward takes them by name.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, MissingExtra, did_you_mean
from ..interfaces import Environment
from ..text import text_of
from ..types import EvalInputItem

__all__ = [
    "ReasoningGym",
]

VALIDATION_SEED = 1_000_003
"""Added to the seed of the tasks for those that are held out."""


class ReasoningGym(Environment):
    """One data set of reasoning-gym.

    Args:
        given: Its name, "composite" of several included, or an object that `reasoning_gym.create_dataset` made.
        options: `size` (tasks, default 200), `seed` (default 0), `level` (the difficulty, from 0, of the data set's own
            curriculum), `validation` (tasks that are held out, default 0), `system` (a system prompt, or the name of one of
            reasoning-gym's, such as "default"), and any field of the data set's own config. An object takes `validation` and
            `system` alone.

    Raises:
        ConfigError: There is no such data set or option, or a value that its config refuses.
        MissingExtra: The package is not installed.
    """

    package = "reasoning-gym"

    @classmethod
    def takes(cls, given: Any) -> bool:
        module = sys.modules.get("reasoning_gym.dataset")
        return module is not None and isinstance(given, module.ProceduralDataset)

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            from reasoning_gym.factory import DATASETS  # type: ignore[import-not-found]
            from reasoning_gym.utils import SYSTEM_PROMPTS  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("reasoning-gym's tasks", "", self.package) from error

        rest = dict(options)
        self._held_out = _whole_number(rest.pop("validation", 0), "validation", 0)
        system = rest.pop("system", None)
        self._system = SYSTEM_PROMPTS.get(system, system)
        if isinstance(given, str):
            if given not in DATASETS:
                raise ConfigError(f"reasoning-gym has no data set {given!r}. {did_you_mean(given, DATASETS)}")
            self.name = given
            self._tasks = _create(given, rest)
        else:
            if rest:
                raise ConfigError(
                    f"env_options has {next(iter(rest))!r}, and env is a data set that is made already: pass that to "
                    "reasoning_gym.create_dataset."
                )
            self.name, self._tasks = _name_of(given, DATASETS), given

    def rows(self, role: str) -> list[dict[str, Any]]:
        """The tasks; held-out ones are of another seed, and of none that is in the training set."""
        if role == "train":
            return [_row(place, entry) for place, entry in enumerate(self._entries(self._tasks, len(self._tasks)))]
        if not self._held_out:
            return []
        known = {text_of(entry["question"]) for entry in self._entries(self._tasks, len(self._tasks))}
        size = 4 * self._held_out + 100
        config = dataclasses.replace(self._tasks.config, seed=_seed_of(self._tasks) + VALIDATION_SEED, size=size)
        found: list[dict[str, Any]] = []
        for entry in self._entries(type(self._tasks)(config), size):
            if text_of(entry["question"]) not in known:
                known.add(text_of(entry["question"]))
                found.append(_row(f"held-out-{len(found)}", entry))
                if len(found) == self._held_out:
                    return found
        raise ConfigError(
            f"reasoning-gym's {self.name!r} has only {len(found)} tasks that are not in the training set; validation is "
            f"{self._held_out}. Lower it, or size."
        )

    def _entries(self, tasks: Any, size: int) -> Any:
        for place in range(size):
            try:
                yield tasks[place]
            except Exception as error:
                raise ConfigError(
                    f"reasoning-gym's {self.name!r} could not make task {place}: {type(error).__name__}: {error}"
                ) from error

    @property
    def workflow(self) -> Any:
        return AskOnce(self._system)

    @property
    def reward(self) -> Any:
        return Score(self._tasks)

    @property
    def fingerprint(self) -> str:
        version = importlib.metadata.version("reasoning-gym")
        return f"reasoning-gym {version} {self.name} {self._tasks.config!r} {self._system!r}"


class AskOnce:
    """An agent that puts the question to the model, and takes what is in <answer> tags, or else the whole reply.

    Args:
        system: A system prompt. None: none.
    """

    def __init__(self, system: str | None) -> None:
        self.system = system

    async def __call__(self, question: str, llm: Any) -> str:
        messages = [{"role": "user", "content": question}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return answer_in((await llm.chat(messages)).content)


class Score:
    """The data set's own scorer, from 0 to 1.

    Args:
        tasks: The data set.
    """

    def __init__(self, tasks: Any) -> None:
        self.tasks = tasks

    def __call__(self, item: EvalInputItem, output: Any) -> float:
        entry = item.full_dataset_entry["entry"]
        answer = output if isinstance(output, str) else text_of(output)
        return float(self.tasks.score_answer(answer, entry))


def answer_in(reply: str) -> str:
    """What a reply has between its last <answer> tags; without them all of it."""
    found = re.findall(r"<answer>(.*?)</answer>", reply, flags=re.DOTALL)
    return (found[-1] if found else reply).strip()


def _create(name: str, options: Mapping[str, Any]) -> Any:
    from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum  # type: ignore[import-not-found]

    dataset_class, config_class = DATASETS[name]
    rest = {"size": 200, "seed": 0, **options}
    rest["size"] = _whole_number(rest["size"], "size", 1)
    rest["seed"] = _whole_number(rest["seed"], "seed", 0)
    level = rest.pop("level", None)
    known = [each.name for each in dataclasses.fields(config_class)]
    if unknown := [each for each in rest if each not in known]:
        raise ConfigError(
            f"env_options has {unknown[0]!r}, which is no option of reasoning-gym's {name!r}. "
            f"{did_you_mean(unknown[0], ['level', 'validation', 'system', *known])}"
        )
    try:
        if level is None:
            config = config_class(**rest)
        elif not has_curriculum(name):
            raise ConfigError(f"reasoning-gym's {name!r} has no levels. Leave level out.")
        else:
            curriculum = create_curriculum(name)
            curriculum.set_global_level(_whole_number(level, "level", 0))
            config = dataclasses.replace(curriculum.generate_configuration(), **rest)
        if hasattr(config, "validate"):
            config.validate()
        return dataset_class(config=config)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"reasoning-gym refuses these options of {name!r}: {type(error).__name__}: {error}. Its fields: {', '.join(known)}."
        ) from error


def _whole_number(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"env_options has {name}={value!r}; expected a whole number, at least {least}.")
    return value


def _seed_of(tasks: Any) -> int:
    seed = getattr(tasks, "seed", None)
    return seed if isinstance(seed, int) else 0


def _name_of(tasks: Any, known: Mapping[str, Any]) -> str:
    return next((name for name, (kind, _) in known.items() if type(tasks) is kind), type(tasks).__name__)


def _row(name: int | str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A task as a row: what its scorer needs is in `entry`, and each of its metadata is a column."""
    row = {"id": str(name), "question": entry["question"], "answer": entry["answer"], "entry": dict(entry)}
    for key, value in (entry.get("metadata") or {}).items():
        row.setdefault(str(key), value)
    return row
