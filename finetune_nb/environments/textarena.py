"""TextArena's single-player games.

    run = ft.Run(env="textarena:TowerOfHanoi-v0", env_options={"examples": 16, "max_turns": 12})

A game's reward is known when it is over, and is that of the last step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, MissingExtra, did_you_mean
from .text import Game, NamedEnvironment, Step, TextOptions, options_of

__all__ = [
    "TextArena",
]


class TextArena(NamedEnvironment):
    """One game of TextArena.

    Args:
        given: Its id, such as "Mastermind-v0".
        options: See TextOptions; `make` has arguments of the game, such as {"num_disks": 2}.

    Raises:
        ConfigError: There is no such game or option.
        MissingExtra: The package is not installed.
    """

    package = "textarena"
    own_random = True  # every game draws from the global generator

    @classmethod
    def takes(cls, given: Any) -> bool:
        module = sys.modules.get("textarena.core")
        return module is not None and isinstance(given, module.Env)

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            from textarena.envs.registration import ENV_REGISTRY  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("TextArena's games", "", self.package) from error

        self.options = options_of(TextOptions, options)
        name = given if isinstance(given, str) else getattr(given, "env_id", None)
        if name not in ENV_REGISTRY:
            if not isinstance(given, str):
                raise ConfigError(
                    f"env is a game of {type(given).__name__} that textarena.make did not make. Give its id: "
                    'env="textarena:TowerOfHanoi-v0".'
                )
            raise ConfigError(f"TextArena has no game {name!r}. {did_you_mean(str(name), ENV_REGISTRY)}")
        self.given = self.name = str(name)

    @staticmethod
    def game(name: str, arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Game:
        from textarena import make  # type: ignore

        return ArenaGame(make(name, **arguments))


class ArenaGame(Game):
    """A game, of which only what is new is shown: most observations repeat the whole game so far."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self._shown = ""
        self._over = False
        self._end: Any = None

    def reset(self, seed: int, row: Mapping[str, Any]) -> str:
        self.env.reset(num_players=1, seed=seed)
        return self._new()

    def step(self, action: str) -> Step:
        done, info = self.env.step(action)
        if done:
            # What is shown after the last step is not asked for by the game's own loop, and not every game bears it.
            return Step("", self.final_reward(), done, info=info)
        return Step(self._new(), None, done, info=info)

    def final_reward(self) -> float | None:
        rewards, _ = self._closed()
        return None if not rewards else rewards.get(0)

    def close(self) -> None:
        self._closed()

    def _closed(self) -> tuple[Any, Any]:
        if not self._over:
            self._over = True
            self._end = self.env.close()
        return self._end if isinstance(self._end, tuple) else (self._end, None)

    def _new(self) -> str:
        _, observation = self.env.get_observation()
        text = observation if isinstance(observation, str) else _joined(observation)
        known, self._shown = self._shown, text
        return text[len(known) :].strip("\n") if known and text.startswith(known) else text.strip("\n")


def _joined(messages: Any) -> str:
    """What a game without wrappers shows: (sender, text, kind) each."""
    return "\n".join(str(message[1]) for message in messages or ())
