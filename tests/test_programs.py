"""A program that another one runs ends with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnserve.programs import run

CHILD = """
try:
    print("started", flush=True)
    while True:
        pass
except KeyboardInterrupt:
    print("ended", flush=True)
"""
PARENT = (
    "import signal, sys; signal.signal(signal.SIGINT, getattr(signal, sys.argv[1])); "
    "from attnserve.programs import run; "
    f"run([sys.executable, '-c', {CHILD!r}], sys.stdout)"
)


@pytest.mark.parametrize(
    ("number", "interrupt"),
    [
        (signal.SIGTERM, "default_int_handler"),
        (signal.SIGTERM, "SIG_IGN"),  # as of a shell script's job behind "&"
        (signal.SIGHUP, "default_int_handler"),
        (signal.SIGINT, "default_int_handler"),
    ],
    ids=str,
)
def test_a_signal_ends_both(number: signal.Signals, interrupt: str) -> None:
    command = [sys.executable, "-c", PARENT, interrupt]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "started\n"
        one.send_signal(number)
        assert one.stdout.read() == "ended\n"
    assert one.returncode


def test_exit_code_and_output(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (tmp_path / "said").open("w+", encoding="utf-8") as said:
        assert run([sys.executable, "-c", "print('said'); raise SystemExit(3)"], said) == 3
        said.seek(0)
        assert said.read() == "said\n"
    assert signal.getsignal(signal.SIGTERM) is before
