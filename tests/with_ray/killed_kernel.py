"""A kernel whose trainer is in an actor: `python killed_kernel.py FOLDER ADDRESS job|rollouts|exit`. It is killed with SIGKILL
while a job trains, or while rollouts of its second epoch go on, or comes to its end without closing its run.
"""

import asyncio
import os
import signal
import sys
import time

import finetune_nb as ft
from finetune_nb.examples import calculator


def make(folder, address):
    overrides = {"run__deterministic": False, "run__engine": f"ray:{address}"}
    overrides |= {"run__ray": {"workers": 1, "worker_cpus": 0.25, "trainer": True, "trainer_cpus": 0.25}}
    overrides |= {"finetuning__run_configuration__validation_dataset": None, "finetuning__output_dir": folder}
    overrides |= {"trajectory_builders__my_builder__examples_per_epoch": 16}
    overrides |= {"trainer_adapters__my_adapter__inner_epochs": 6}
    return ft.Run.from_config(calculator.CONFIG, name="run", **overrides)


def main(folder, address, until):
    run = make(folder, address)
    if until == "exit":
        asyncio.run(run.chat("what is 3 + 4 ?"))
        print("talked", flush=True)
        return
    run.start(epochs=2)
    while not (run._driver.progress.trained if until == "job" else len(run)):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
