"""Programs that end what they have started: servers, above all."""

import signal
import subprocess
from collections.abc import Sequence
from typing import TextIO


def run(command: Sequence[str], output: TextIO | int) -> int:
    """Run a program to its end, which Ctrl-C, SIGTERM and SIGHUP ask for, and return its exit code.

    Args:
        command: the program and its arguments.
        output: where its standard output goes: a file, or subprocess.DEVNULL.

    Raises:
        KeyboardInterrupt: a signal came; the program has ended.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    # A program of one that ignores it, as a shell script's job behind "&" does, would do so, too.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, start_new_session=True, stdout=output)
    signal.signal(signal.SIGINT, interrupt)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
