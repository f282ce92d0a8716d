"""What several tests of the store share."""

import json
import subprocess
import sys

import killed
import pytest


@pytest.fixture(scope="module")
def killer():
    """Runs a task in a child process; says how that ended."""
    command = [sys.executable, killed.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def run(**task):
            process.stdin.write(json.dumps({"backend": "local", **task}, default=str) + "\n")
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()
