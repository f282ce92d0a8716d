"""Environments that are registered with gymnasium and take a text as their action.

run = ft.Run(env="gymnasium:my_package/MyGame-v0")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, MissingExtra
from .text import Game, GymGame, NamedEnvironment, TextOptions, options_of

__all__ = [
    "Gymnasium",
]


class Gymnasium(NamedEnvironment):
    """One environment of gymnasium's registry, whose actions are texts.

    Args:
        given: Its id; "module:id" imports the module first, as `gymnasium.make` does.
        options: See TextOptions; `make` has arguments of `gymnasium.make`.

    Raises:
        ConfigError: It cannot be made, its actions are no texts, or there is no such option.
        MissingExtra: The package is not installed.
    """

    package = "gymnasium"

    @classmethod
    def takes(cls, given: Any) -> bool:
        return False  # a class has the gym's interface, whoever made it

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            from gymnasium import make, spaces  # type: ignore
        except ImportError as error:
            raise MissingExtra("gymnasium's environments", "", self.package) from error

        self.options = options_of(TextOptions, options)
        try:
            env = make(given, **self.options.make)
        except Exception as error:
            raise ConfigError(f"gymnasium cannot make {given!r}: {type(error).__name__}: {error}") from error
        actions = env.action_space
        env.close()
        if not isinstance(actions, spaces.Text):
            raise ConfigError(
                f"gymnasium's {given!r} takes actions of {actions}; expected texts (gymnasium.spaces.Text). Wrap it: a class "
                "with reset() and step(text) that turns the model's words into its actions is taken as env, too."
            )
        self.given = self.name = given

    @staticmethod
    def game(name: str, arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Game:
        from gymnasium import make  # type: ignore

        return GymGame(make(name, **arguments))

    @property
    def fingerprint(self) -> str:
        return f"gymnasium {self.name} {self.options!r}"
