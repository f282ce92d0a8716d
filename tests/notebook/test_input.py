"""`input()` in a real kernel: refused to the code that a run runs, answered in a cell as ever."""

import pytest
from jupyter_client.manager import start_new_kernel

SETUP = """
import getpass
import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, sums

def solve(question, llm):
    return input("?")

def secretive(question, llm):
    return getpass.getpass("?")

def errors(workflow, name):
    run = ft.Run(workflow, lambda item: 1.0, sums(4), generations=4, adapter=FakeAdapter(), output_dir={folder!r}, name=name)
    ft.run_sync(run.next_epoch())
    return set(run.trajectories().error)
"""


@pytest.mark.slow
@pytest.mark.proof
def test_a_question_in_a_rollout_is_refused_and_a_cell_may_still_ask(tmp_path):
    manager, client = start_new_kernel()
    said: list[str] = []

    def show(message):
        content = message["content"]
        said.append(content.get("text") or content.get("data", {}).get("text/plain") or content.get("evalue") or "")

    try:
        for code in (
            SETUP.format(folder=str(tmp_path)),
            "errors(solve, 'a')",
            "errors(secretive, 'b')",
            "input('name? ')",
        ):
            reply = client.execute_interactive(
                code, output_hook=show, stdin_hook=lambda message: client.input("Ada"), allow_stdin=True, timeout=50
            )
            assert reply["content"]["status"] == "ok", said
        assert manager.is_alive()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    text = " ".join(said)
    assert text.count("nobody can be asked") == 2  # one error for each workflow, told once by a set
    assert "'Ada'" in text
