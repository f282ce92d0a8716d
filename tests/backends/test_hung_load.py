"""A model that never finishes loading must not hold the interpreter when it exits."""

import subprocess
import sys
import textwrap

import pytest

HANGS = """
import asyncio, time
import finetune_nb as ft
from finetune_nb.backends.{module} import {adapter}, {config}

class Hangs({adapter}):
    def _make_policy(self):
        print("loading", flush=True)
        time.sleep(600)

async def main():
    try:
        await asyncio.wait_for(Hangs({config}({settings})).is_healthy(), 0.2)
    except TimeoutError:
        print("gave up", flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    ("module", "adapter", "config", "settings"),
    [
        ("local.adapter", "LocalGRPOAdapter", "LocalGRPOConfig", ""),
        ("tinker.adapter", "TinkerAdapter", "TinkerConfig", "model='some/model'"),
        ("trl.adapter", "TRLAdapter", "TRLSFTConfig", "model='some/model'"),
    ],
)
def test_a_load_that_hangs_does_not_hold_the_interpreter_at_exit(module, adapter, config, settings):
    script = textwrap.dedent(HANGS.format(module=module, adapter=adapter, config=config, settings=settings))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.stdout.split("\n")[:2] == ["loading", "gave up"], done.stderr
    assert done.returncode == 0
