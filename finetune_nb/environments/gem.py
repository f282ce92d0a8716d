"""GEM's environments.

run = ft.Run(env="gem:game:GuessTheNumber-v0-easy", env_options={"examples": 16})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, MissingExtra, did_you_mean
from .text import Game, GymGame, NamedEnvironment, Step, TextOptions, options_of

__all__ = [
    "Gem",
]


class Gem(NamedEnvironment):
    """One environment of GEM.

    Args:
        given: Its id, such as "game:Sudoku-v0-easy".
        options: See TextOptions; `make` has its arguments.

    Raises:
        ConfigError: There is no such environment or option.
        MissingExtra: The package is not installed.
    """

    package = "gem-llm"
    own_random = True  # its seeds are those of the global generators

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            from gem.envs.registration import ENV_REGISTRY  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("GEM's environments", "", self.package) from error

        self.options = options_of(TextOptions, options)
        if given not in ENV_REGISTRY:
            raise ConfigError(f"GEM has no environment {given!r}. {did_you_mean(given, ENV_REGISTRY)}")
        self.given = self.name = given

    @staticmethod
    def game(name: str, arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Game:
        from gem import make  # type: ignore

        return GemGame(make(name, **arguments))


class GemGame(GymGame):
    """An environment that says in its info what is to be shown after each observation."""

    def reset(self, seed: int, row: Mapping[str, Any]) -> str:
        observation, info = self.env.reset(seed=seed)
        return _with_suffix(observation, info)

    def step(self, action: str) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        shown = observation if terminated or truncated else _with_suffix(observation, info)
        return Step(shown, reward, terminated, truncated, info)


def _with_suffix(observation: Any, info: Mapping[str, Any]) -> str:
    suffix = info.get("suffix")
    return f"{observation}\n{suffix}" if suffix else str(observation)
