"""SkyRL-gym's environments, which are made for one row of a dataset each.

run = ft.Run(env="skyrl_gym:gsm8k", dataset=rows)  # rows with `prompt`, and what the environment reads, such as `reward_spec`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, MissingExtra, did_you_mean
from .text import Game, GymGame, NamedEnvironment, TextOptions, options_of

__all__ = [
    "SkyRLGym",
]


class SkyRLGym(NamedEnvironment):
    """One environment of skyrl-gym.

    Args:
        given: Its id, such as "gsm8k".
        options: See TextOptions; `make` is what the environment gets as `env_config`. The dataset is given to Run.

    Raises:
        ConfigError: There is no such environment or option.
        MissingExtra: The package is not installed.
    """

    package = "skyrl-gym"

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            from skyrl_gym.envs.registration import registry  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("skyrl-gym's environments", "", self.package) from error

        self.options = options_of(TextOptions, options)
        if given not in registry:
            raise ConfigError(f"skyrl-gym has no environment {given!r}. {did_you_mean(given, registry)}")
        self.given = self.name = given

    def rows(self, role: str) -> list[dict[str, Any]]:
        if role == "validation":
            return []
        raise ConfigError(
            f"skyrl-gym's {self.name!r} has no tasks of its own: give dataset=, rows with a column `prompt` and what the "
            "environment reads, such as `reward_spec`."
        )

    @staticmethod
    def game(name: str, arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Game:
        from skyrl_gym import make  # type: ignore

        return SkyRLGame(make(name, env_config=dict(arguments), extras=dict(row)))


class SkyRLGame(GymGame):
    """An environment that begins with the row's prompt."""

    def reset(self, seed: int, row: Mapping[str, Any]) -> Any:
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            raise ConfigError("the row has no prompt; expected a text or OpenAI messages in the column `prompt`.")
        messages, _ = self.env.init(list(prompt))
        return messages
