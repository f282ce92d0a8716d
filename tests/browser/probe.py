"""What a kernel under test tells the tests: `probe.note("moved", value=3)` is a line that `lab.events("moved")` reads."""

import json
import os
import threading
import time


def note(event: str, **values) -> None:
    line = {"event": event, "time": time.time(), "thread": threading.current_thread().name, **values}
    with open(os.environ["FINETUNE_NB_TEST_NOTES"], "a") as file:
        file.write(json.dumps(line, default=str) + "\n")
