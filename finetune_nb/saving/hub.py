"""Puts a saved model on the Hugging Face hub, with the hub's own client."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import BackendError, MissingExtra
from ..redaction import error_text, remember_secret
from ..text import beginning, plain
from .card import is_ours
from .saved_model import ADAPTER_CONFIG

__all__ = [
    "CARD",
    "push",
    "write_card",
]

CARD = "README.md"
OLDER = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "adapter_model*", "adapter_config.json",
    "config.json", "generation_config.json", "model-*.gguf", "Modelfile",
)  # fmt: skip
"""Files of a model. Those in the repository that the new model has not are deleted, or they would be loaded with it."""


def write_card(directory: Path, card: str) -> None:
    """Writes a model card, unless there is one that somebody wrote by hand."""
    place = directory / CARD
    if place.is_symlink() or (place.exists() and not is_ours(place.read_text(encoding="utf-8", errors="replace"))):
        return
    place.write_text(card, encoding="utf-8")


def push(directory: Path, files: Sequence[str], repository: str, private: bool | None) -> str:
    """Upload files of a folder.

    Args:
        directory: The folder.
        files: Which of its files. A card that somebody wrote by hand on the hub stays there.
        repository: "name" or "me/name"; it is made where it is not there yet.
        private: Whether a new repository is private. None: as the hub has it, which is public unless an organization says
            otherwise. One that is there stays as it is.

    Returns:
        The address of the model's page.

    Raises:
        BackendError: The hub cannot be reached, has no token, or refuses. Everything is still in the folder.
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError as error:
        raise MissingExtra("the hub", "local") from error
    kept = f"The model is saved in {directory}."
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise BackendError(
            f"{kept} It was not pushed: HF_HUB_OFFLINE is set, and expected is a connection to the hub. Unset it, restart the "
            "kernel, and make the same call again; or run `hf upload` elsewhere."
        )
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise BackendError(
            f"{kept} It was not pushed: {plain(error)} Expected a name such as 'me/my-model'. Make the call again with "
            "another one."
        ) from error
    try:
        token = huggingface_hub.get_token()
        if token is None:
            raise BackendError(
                f"{kept} It was not pushed: there is no token for the hub. Expected the login of huggingface_hub, or HF_TOKEN. "
                "Run huggingface_hub.login(), with a token that may write, and make the same call again."
            )
        remember_secret(token)  # no error and no log shows it
        # Read now: the package itself has read it when it was imported.
        api = huggingface_hub.HfApi(
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            token=token,
            library_name="finetune_nb",
            library_version=__version__,
        )
        page = api.create_repo(repository, private=private, exist_ok=True)
        names = [name for name in files if name != CARD or _may_replace_card(api, page.repo_id)]
        api.upload_folder(
            repo_id=page.repo_id,
            folder_path=directory,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=list(OLDER),
            commit_message=f"{'Adapter' if ADAPTER_CONFIG in names else 'Model'} trained with finetune_nb",
        )
    except BackendError:
        raise
    except Exception as error:  # the client lets through those of HTTP, of files and of answers that it cannot read
        raise BackendError(f"{kept} It was not pushed to {repository}: {_told(error)}") from error
    return str(page)


def _may_replace_card(api: Any, repository: str) -> bool:
    """Whether the repository has no card, or one that nobody wrote by hand."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        place = api.hf_hub_download(repository, CARD, force_download=True)
    except EntryNotFoundError:
        return True
    finally:
        hub_logging.set_verbosity(level)
    return is_ours(Path(place).read_text(encoding="utf-8", errors="replace"))


def _told(error: BaseException) -> str:
    """What went wrong, and the next step."""
    cause = error.__cause__ or error  # the client puts "Error while uploading" around some
    status = getattr(getattr(cause, "response", None), "status_code", None)
    said = beginning(error_text(error) if cause is error else f"{error_text(error)} {error_text(cause)}", 600)
    if status == 401:
        return f"the hub does not take the token. {said} Log in again with huggingface_hub.login(), and make the same call again."
    if status == 403:
        return (
            f"the token may not write there. {said} Take a token with the right to write, or a name of your own, and make the "
            "call again."
        )
    return f"{said} Expected an upload that the hub takes. Make the same call again; what it has is not sent twice."
