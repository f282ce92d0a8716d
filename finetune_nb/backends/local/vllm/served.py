"""ServedPolicy: the trained weights, as a vLLM server has them."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....errors import BackendError
from .client import VLLMClient
from .under_way import UnderWay

__all__ = ["ServedPolicy"]


class ServedPolicy(ABC):
    """What of the trained weights is on a server, and by which name it is asked for.

    A state of the weights has an id. Each goes this way: `load` writes it to a folder and has the server read it; whoever called
    compares it with the model, and then calls `take`, or `drop`. From `take` on `name_of` has a name for it, which requests use
    inside `under_way.asking(name)`. When the server has lost it, `forget` or `forget_name` is called, and it is loaded again.
    After each `take`, `clean` deletes what nobody needs any more, and `close` deletes everything at the end.

    `load`, `drop`, `clean` and `close` are called by one thread at a time; all others by any thread.

    Args:
        parent: A folder that the server reads, under the same name if it is on another machine.
        name: Of the folder in there that is made for this object alone.
    """

    what: str
    """What is written, in words."""

    def __init__(self, parent: Path, name: str) -> None:
        self.parent, self.folder = parent, parent / name
        self.under_way = UnderWay()
        """Requests for these weights."""

    @abstractmethod
    def name_of(self, weights_id: Any) -> str | None:
        """What the server calls these weights; None where it does not have them, and `load` has to come first."""

    @property
    @abstractmethod
    def names(self) -> set[str]:
        """What the server should know: one that knows none of them was started anew."""

    @abstractmethod
    def load(
        self,
        client: VLLMClient,
        base: str,
        weights_id: Any,
        save: Callable[[Path], object],
        given_up: Callable[[], bool],
    ) -> str:
        """Writes the weights, and has the server read them. They are not used before `take`.

        Args:
            client: Of the server.
            base: What it calls the base model.
            weights_id: Of the weights.
            save: Writes them to the directory that it is given.
            given_up: Asked while something has to be waited for; True ends the waiting.

        Returns:
            What the server calls them.

        Raises:
            ConfigError: The server was started without what this needs.
            BackendError: They cannot be written, or the server does not take them.
            ServerGone: Nobody answers any more.
        """

    @abstractmethod
    def take(self, weights_id: Any, name: str) -> None:
        """Requests for these weights use that name from now on."""

    @abstractmethod
    def drop(self, client: VLLMClient, name: str) -> None:
        """Gives up what was loaded under that name and shall not be used."""

    @abstractmethod
    def forget(self) -> None:
        """The server has lost everything: it was started anew."""

    @abstractmethod
    def forget_name(self, name: str) -> bool:
        """The server does not know that name any more. Returns whether that is news."""

    @abstractmethod
    def clean(self, client: VLLMClient | None) -> None:
        """Takes what nobody needs off the server and the disk. client: None if the server is gone."""

    def close(self, client: VLLMClient | None) -> None:
        """Deletes what is left. client: None if the server is gone, or is about to be."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.parent.rmdir()  # unless there is a log in it

    def _write(self, place: Path, save: Callable[[Path], object]) -> None:
        """Raises BackendError where it fails, and leaves nothing."""
        try:
            place.mkdir(parents=True)
            save(place)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            raise BackendError(
                f"{self.what} cannot be written to {place}: {error}. Expected a folder with room for it; nothing was sampled "
                "with older weights. Make room, or name another one as sampler.folder."
            ) from error
