"""Programs that end what they have started: servers, above all."""

import signal
import subprocess
from collections.abc import Sequence
from typing import TextIO


def run(command: Sequence[str], output: TextIO | int) -> int:
    """Run a program to its end, which Ctrl-C and SIGTERM ask for, and return its exit code.

    Args:
        command: the program and its arguments.
        output: where its standard output goes: a file, or subprocess.DEVNULL.

    Raises:
        KeyboardInterrupt: a signal came; the program has ended.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, start_new_session=True, stdout=output)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
