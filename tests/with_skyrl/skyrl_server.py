"""Starts SkyRL's Tinker server (JAX backend, on the CPU) with a tiny Qwen3 of random weights."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

__all__ = ["SkyRLServer", "write_model"]

FOLDER, PYTHON = "FINETUNE_NB_SKYRL", "FINETUNE_NB_SKYRL_PYTHON"
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def write_model(directory: Path) -> Path:
    """Writes a Qwen3 of two layers, of random weights, with the byte tokenizer, and returns its directory. An older one stays."""
    import torch
    from byte_tokenizer import byte_tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if (directory / "tokenizer.json").exists():
        return directory
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen3Config(vocab_size=262, initializer_range=0.08, **sizes, **heads, **ends)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


class SkyRLServer:
    """A server that runs. What it saves lies in `folder`; compiled functions are kept in `cache` for the next one.

    `with SkyRLServer(...) as server:` answers at `server.url`. `kill` and `start` are a crash and a restart.
    """

    def __init__(self, folder: Path, model: Path, cache: Path, slots: int = 8, session_seconds: int = 30) -> None:
        self.folder, self.model, self.cache = folder, model, cache
        self.slots, self.session_seconds = slots, session_seconds
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SkyRLServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once the server answers, which is before its engine has loaded the model."""
        python = Path(os.environ[PYTHON])
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TINKER"))},
            "VIRTUAL_ENV": str(python.parent.parent),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            **{"UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        # Fixed sizes of batches: each other size would be compiled anew. Slot 0 is the base model's.
        backend = {
            "max_lora_adapters": self.slots + 1,
            "max_lora_rank": 8,
            "sample_max_num_sequences": 32,
            "train_micro_batch_size": 8,
        }
        # The server starts its engine by the flags of the `uv run` that it is a child of.
        command = ["uv", "run", "--active", "--no-sync", "-m", "skyrl.tinker.api"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--base-model", str(self.model)]
        command += ["--backend", "jax", "--backend-config", json.dumps(backend)]
        command += ["--checkpoints-base", str(self.folder / "checkpoints")]
        command += ["--database-url", f"sqlite:///{self.folder / 'tinker.db'}"]
        command += ["--session-timeout-sec", str(self.session_seconds), "--session-cleanup-interval-sec", "5"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=os.environ[FOLDER], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=5):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"SkyRL's server has not started:\n{self.log()[-4000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends server and engine."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kills all of its processes, as a power failure does."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):  # a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def states(self) -> list[str]:
        """The names of the saved states that lie on its disk."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*/*.tar.gz"))

    def archives(self) -> list[str]:
        """The names of the sampler's archives that lie on its disk."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*/sampler_weights/*.tar.gz"))
