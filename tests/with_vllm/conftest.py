"""These tests start real vLLM servers, whose environment is named by FINETUNE_NB_VLLM_PYTHON: .ci/all makes it and runs them.

.ci/all vllm
"""

import copy
import os
from contextlib import suppress

import pytest

collect_ignore_glob = [] if os.environ.get("FINETUNE_NB_VLLM_PYTHON") else ["test_*.py"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama."""
    from served_models import write_model

    return write_model(tmp_path_factory.mktemp("model"))


class Server:
    """A server that runs, as somebody starts one by hand. It takes requests for its own end and for aborting others."""

    def __init__(self, folder, model_folder):
        from finetune_nb.backends.local.vllm.config import VLLMConfig
        from finetune_nb.backends.local.vllm.process import VLLMProcess

        config = VLLMConfig(env={"VLLM_SERVER_DEV_MODE": "1"}, args=["--max-num-seqs", "64"])
        self.process = VLLMProcess(config, str(model_folder), 8, "float32", folder)
        self.client = self.process.start()
        try:
            self.process.wait(self.client)
        except BaseException:
            self.process.stop()
            raise

    @property
    def sampler(self):
        """The settings with which a run samples there."""
        key = self.client._headers["Authorization"].removeprefix("Bearer ")
        return {"url": f"{self.client.root}/v1", "api_key": key}

    def adapters(self):
        return {model["id"]: model["root"] for model in self.client.models() if model["parent"]}

    def read_weights(self, folder):
        """Puts the weights of that folder into the base model."""
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        assert self.client.ask("POST", "/collective_rpc", asked)[0] == 200
        assert self.client.ask("POST", "/reset_prefix_cache")[0] == 200

    def unload(self, name):
        status, answer = self.client.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        assert status == 200, answer


@pytest.fixture(scope="session")
def server(tmp_path_factory, model_folder):
    server = Server(tmp_path_factory.mktemp("server"), model_folder)
    yield server
    server.process.stop()


@pytest.fixture
async def make(server, model_folder, tmp_path):
    """Makes adapters of that model, sampled by the server that runs. rank: None trains all weights."""
    from finetune_nb.backends.local.adapter import LocalGRPOAdapter
    from finetune_nb.backends.local.config import LocalGRPOConfig

    made = []

    def make(rank=8, **settings):
        settings = {"learning_rate": 0.02, "sampler": server.sampler, **settings}
        lora = None if rank is None else {"rank": rank}
        config = LocalGRPOConfig(model=str(model_folder), lora=lora, **copy.deepcopy(settings))
        made.append(LocalGRPOAdapter(config, folder=tmp_path / "run"))
        return made[-1]

    yield make
    for adapter in made:
        with suppress(Exception):  # one that never had a policy
            await adapter.aclose()
