"""The settings of a vLLM server that samples for `local_grpo`. Without torch and aiohttp this module can be imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

__all__ = ["VLLMConfig"]

OWN = ("python", "args", "env", "gpu_memory", "startup_seconds")
"""Settings of a server that is started here, and of no other."""


class VLLMConfig(BaseModel):
    """A vLLM server that samples what is trained here: one that is started and ended with the run, or one that runs.

    It gets token ids, and gives token ids and log probabilities. After each training job the trained weights are written to a
    folder, which the server reads: with `lora` the adapter alone, under a name of its own.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    url: str | None = None
    """Of a server that runs, such as "http://host:8000/v1". None: one of our own is started on a free port of this machine."""
    api_key: SecretStr | None = None
    """What a server that runs was started with as --api-key."""
    folder: Path | None = None
    """Where trained weights are written for the server to read: for one on another machine, a folder that both have under this
    name. None: "vllm" in the run's folder."""
    python: str | None = None
    """The Python of the environment in which vLLM is installed. None: $FINETUNE_NB_VLLM_PYTHON, else the one that runs this."""
    args: list[str] = []
    """Further options of `vllm serve`, such as ["--tensor-parallel-size", "2"]; they go before ours."""
    env: dict[str, str] = {}
    """Further environment variables of the server, such as {"CUDA_VISIBLE_DEVICES": "1"}."""
    gpu_memory: float | None = Field(default=0.4, gt=0, le=1)
    """The part of the GPU's memory that the server takes; training has the rest. None: vLLM's own default, for a GPU of its
    own."""
    sleep: bool = False
    """The server gives its GPU memory back while a job trains. `gpu_memory` can then be about 0.8."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the server computes in, where that is not the dtype of what is trained: one that is started here is started so, and
    one that runs was. Log probabilities then differ by more than rounding, which `importance_cap` corrects for."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens that prompt and reply may have together. None: as many as the model holds, which may not fit into the memory."""
    startup_seconds: float = Field(default=900.0, gt=0)
    """How long the server may take to start."""
    patience: float = Field(default=120.0, ge=0)
    """Seconds that a request waits for a server that cannot be reached, or whose queue is full, before the rollout fails."""
    request_timeout: float | None = Field(default=600.0, gt=0)
    """Seconds that a reply may take. None: any time."""

    @model_validator(mode="before")
    @classmethod
    def take_text(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given == "vllm":
            return {}
        if "://" in given:
            return {"url": given}
        raise ValueError(
            f'found {given!r}; expected "vllm", the address of a vLLM server such as "http://host:8000/v1", or a mapping of '
            "settings"
        )

    @field_validator("url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/@]+(/[^\s]*)?", url):
            raise ValueError("expected an address such as http://host:8000/v1, without a user name or a password in it")
        return url

    @field_validator("folder")
    @classmethod
    def check_folder(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_absolute():
            raise ValueError(f"found {str(folder)!r}; expected an absolute path, as the server reads it too")
        return folder

    @model_validator(mode="after")
    def check_together(self) -> VLLMConfig:
        # Not what was set: a stored config has all fields.
        given = [name for name in OWN if getattr(self, name) != type(self).model_fields[name].default]
        if self.url is not None and given:
            raise ValueError(
                f"{given[0]} is for a server that is started here, and url names one that runs. Leave one of the two out."
            )
        if self.url is None and self.api_key is not None:
            raise ValueError("api_key is for a server that runs. Give its url, too, or leave api_key out.")
        return self

    @property
    def root(self) -> str | None:
        """The server's address without /v1."""
        return None if self.url is None else self.url.rstrip("/").removesuffix("/v1")
