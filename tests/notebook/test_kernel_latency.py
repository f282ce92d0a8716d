"""A notebook stays at hand while a run trains: a real kernel, asked for 1+1 again and again."""

import statistics
import time

import pytest

pytest.importorskip("torch")

pytestmark = [pytest.mark.slow, pytest.mark.proof, pytest.mark.measures]

BEGIN = """
import finetune_nb as ft

async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content

dataset = [{"id": i, "question": f"{i}+7", "answer": ""} for i in range(40)]
run = ft.Run(solve, lambda item: float(len(item.output_obj) % 2), dataset=dataset, generations=8, max_concurrency=320,
             sampling={"max_tokens": 10}, training={"optimizer_steps": 32, "inner_epochs": 10}, output_dir="runs")
await run.next_epoch()
"""
PROBES = 60


def test_a_cell_answers_at_once_while_a_run_trains(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path), extra_arguments=["--IPKernelApp.log_level=40"])

    def ask(code, timeout=300):
        started = time.perf_counter()
        reply = client.execute_interactive(code, timeout=timeout, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"].get("traceback")
        return time.perf_counter() - started

    def probe():
        times = []
        for _ in range(PROBES):
            times.append(ask("1+1"))
            time.sleep(0.05)
        return statistics.quantiles(times, n=20)[-1], statistics.median(times)

    try:
        ask(BEGIN)
        idle, _ = probe()
        ask("run.start(epochs=1000)")
        busy, middle = probe()
        ask("assert run.state == 'running' and len(run) < 1000, run.state; run.abort()")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    print(
        f"\n1+1 while a run trains: {1e3 * middle:.0f} ms, 95th percentile {1e3 * busy:.0f} ms; idle {1e3 * idle:.0f} ms"
    )
    assert busy < max(0.150, 5 * idle)  # on a machine that others use, too, an idle kernel is the measure
