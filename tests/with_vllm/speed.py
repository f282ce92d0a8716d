"""What sampling costs in this process and on a vLLM server of its own, in turns, with a fresh adapter: tokens a second, and CPU
time, which means something on a busy machine too. For anybody to repeat:

FINETUNE_NB_VLLM_PYTHON=~/vllm/bin/python python tests/with_vllm/speed.py embedded --concurrency 1 --concurrency 32
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from finetune_nb.backends.local.config import LoRAConfig
from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.backends.local.vllm.config import VLLMConfig
from finetune_nb.backends.local.vllm.sampler import VLLMSampler
from finetune_nb.examples import json_tools
from finetune_nb.types import EpisodeKey, SamplingParams

TURNS, GENERATIONS = 3, 8


async def sample(
    policy: LocalPolicy, prompts: list[list[int]], rollouts: int, tokens: int, turn: int
) -> tuple[float, int]:
    """All at once, in groups with one prompt. Tokens a second, and tokens."""

    async def one(i: int) -> int:
        with policy.episode(EpisodeKey("train", turn, i // GENERATIONS, i % GENERATIONS)):
            found = await policy.sample(prompts[i // GENERATIONS], SamplingParams(1.0, tokens), 1000 * turn + i)
        return len(found.ids)

    started = time.perf_counter()
    sampled = sum(await asyncio.gather(*(one(i) for i in range(rollouts))))
    return sampled / (time.perf_counter() - started), sampled


def cpu_seconds(group: int) -> float:
    """Of this process, and of those of a group."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(told[2]) == group:
            ticks += int(told[11]) + int(told[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='"embedded", or a Hugging Face directory')
    parser.add_argument("--concurrency", type=int, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=16, help="of a reply, at most")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0: none, and all weights are trained")
    arguments = parser.parse_args()
    lora = LoRAConfig(rank=arguments.rank) if arguments.rank else None
    here, there = (LocalPolicy.load(arguments.model, device="auto", lora=lora) for _ in range(2))
    questions = [row["question"] for row in json_tools.rows(max(arguments.concurrency), 0)]
    prompts = [
        here.encode(f"Reply with a JSON call of one tool: calc, weather or time. {asked}") for asked in questions
    ]
    with tempfile.TemporaryDirectory() as folder:
        sampler = VLLMSampler.of(there, VLLMConfig(max_model_len=512), Path(folder))
        try:
            sampler.prepare()
            for policy in (here, there):
                await sample(policy, prompts, 2, 2, 99)
            assert sampler.process is not None and sampler.process.pid is not None
            group = sampler.process.pid
            for rollouts in arguments.concurrency:
                speed: dict[str, list[float]] = {"here": [], "vLLM": []}
                cost: dict[str, list[float]] = {"here": [], "vLLM": []}
                for turn in range(TURNS):
                    for side, policy in (("here", here), ("vLLM", there)):
                        before = cpu_seconds(group)
                        per_second, sampled = await sample(policy, prompts, rollouts, arguments.tokens, turn)
                        speed[side].append(per_second)
                        cost[side].append((cpu_seconds(group) - before) / sampled * 1000)
                told = [
                    f"{side} {statistics.median(speed[side]):.1f} tokens/s, {statistics.median(cost[side]):.1f} ms CPU a token"
                    for side in speed
                ]
                print(f"{rollouts} at once: {'; '.join(told)}; load {os.getloadavg()[0]:.0f}", flush=True)
        finally:
            await sampler.aclose()


if __name__ == "__main__":
    asyncio.run(main())
