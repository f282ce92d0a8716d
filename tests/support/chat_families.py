"""The chat templates that the installed TRL ships, each with a small tokenizer of bytes that has its special tokens."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.chat_tokenizer import ChatTokenizer
from finetune_nb.rollouts.episodes import drift, episode_from_steps
from finetune_nb.types import EpisodeKey, EvalInputItem, Sample, SamplingParams, Trajectory

ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek_r1_distill": ["<｜end▁of▁sentence｜>"],
    "deepseekv3": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "gemma3": ["<end_of_turn>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gemma4_v2": ["<turn|>", "<|tool_response>"],
    "gemma4_v3": ["<turn|>", "<|tool_response>"],
    "gemma4_v4": ["<turn|>", "<|tool_response>"],
    "gemma4_v5": ["<turn|>", "<|tool_response>"],
    "glm4moe": ["<|user|>", "<|observation|>", "<|endoftext|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "lfm2_v2": ["<|im_end|>"],
    "lfm2_2_5": ["<|im_end|>"],
    "lfm2_2_5_v2": ["<|im_end|>"],
    "lfm2_2_5_vl": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "llama3_1": ["<|eot_id|>"],
    "llama3_2": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>"],
    "nemotron_3_nano": ["<|im_end|>"],
    "nemotron_3_super": ["<|im_end|>"],
    "nemotron_3_ultra": ["<|im_end|>"],
    "nemotron_3_5_lightning": ["<|im_end|>"],
    "phi3": ["<|end|>", "<|endoftext|>"],
    "phi3_5": ["<|end|>", "<|endoftext|>"],
    "qwen2_5": ["<|im_end|>", "<|endoftext|>"],
    "qwen2_5_vl": ["<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_vl": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_instruct_2507": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_5_think": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_5_nothink": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_6": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_8": ["<|im_end|>", "<|endoftext|>"],
    "smolvlm": ["<end_of_utterance>"],
}
"""The tokens that end a reply, the usual one first, by the name of the template."""
CALL_ENDS = {
    "glm4moe": "<|observation|>",
    "gptoss": "<|call|>",
    "diffusion_gemma": "<|tool_response>",
    "gemma4": "<|tool_response>",
    "gemma4_v3": "<|tool_response>",
    "gemma4_v4": "<|tool_response>",
    "gemma4_v5": "<|tool_response>",
}
"""Those that end a reply with a call, where it is another one."""
_SPECIAL = (
    r"<\|\w+\|>|<\|\w+>|<\w+\|>|<[a-z]+_of_[a-z]+>|<｜[^｜]+｜>|\[/?[A-Z_]+\]|</?s>|</?think>|</?tool_call>|<\|\"\|>"
)
_TAG = re.compile(r"</?(?:think|tool_call)>")
MERGES = [("t", "o"), ("to", "o"), ("a", "r"), ("ar", "g"), ("3", "+"), ("3+", "4")]
"""So that one text has many spellings in tokens."""


def folder() -> Path | None:
    """Where TRL keeps its templates; None without TRL. It is not imported."""
    spec = importlib.util.find_spec("trl")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "chat_templates"


def template_of(name: str) -> str:
    """The text of a template. Skips the test where there is no TRL."""
    found = folder()
    if found is None:
        pytest.skip("could not import 'trl', which ships the templates")
    return (found / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(template: str, ends: list[str], begin: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few longer tokens, with that chat template.

    Args:
        template: The chat template. What looks like a special token in it is one; tags are added tokens that are not special.
        ends: Tokens that end a reply, the usual one first.
        begin: The token that begins texts.
    """
    added = sorted({*re.findall(_SPECIAL, template), *ends, "<|pad|>", *([begin] if begin else [])})
    words = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    bpe = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added if not _TAG.fullmatch(t)])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in added if _TAG.fullmatch(t)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token=ends[0], bos_token=begin, chat_template=template
    )


def spelled(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a text in another spelling than the tokenizer's: single bytes, but for added tokens."""
    pieces = re.split(f"({_SPECIAL})", text)
    ids: list[int] = []
    for piece in pieces:
        known = tokenizer.get_added_vocab().get(piece)
        if known is not None:
            ids.append(known)
            continue
        for character in piece:
            ids += tokenizer(character, add_special_tokens=False)["input_ids"]
    return ids


class ScriptedModel(ChatTokenizer):
    """A policy with a real tokenizer and chat template, whose replies come from a script.

    Args:
        tokenizer: The tokenizer.
        ends: Ids that end a reply.
        script: Ids of the replies, in order.
    """

    version = 0

    def __init__(self, tokenizer: PreTrainedTokenizerFast, ends: list[int], script: list[list[int]]) -> None:
        super().__init__(tokenizer, ends, "scripted")
        self.script = list(script)
        self.sampled: list[tuple[list[int], list[int]]] = []

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int) -> Sample:
        reply = self.script[len(self.sampled)]
        self.sampled.append((list(ids), reply))
        ended = bool(reply) and reply[-1] in self._end_ids
        return Sample(list(reply), [-1.0] * len(reply), "stop" if ended else "length")

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        return nullcontext()


def drift_of(episode: CallRecorder) -> tuple[int, int]:
    """How many turns of an episode carry a conversation on, and how many of these have drifted."""
    item = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={})
    item.trajectory = episode.steps()
    return drift([Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=0.0)])
