"""How the line of a worker reaches the end of the API server's output, and no other error does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

import vllm_attn
from vllm_attn import report
from vllm_attn.report import StartupError

CONSEQUENCE = RuntimeError("Engine core initialization failed. See root cause above.")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process: torch puts the rank before lines where it was distributed."""
    vllm_attn.register()
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    report.install_excepthook()
    report.forget()
    yield
    report.forget()


def log(error: Exception) -> None:
    """As an engine core or worker does with the error that ends it."""
    try:
        raise error
    except Exception:
        logging.getLogger(report.ENGINE_LOGGERS[0]).exception("EngineCore failed to start.")


def test_the_processes_above_repeat_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        log(StartupError("no tensor x"))
    with pytest.raises(SystemExit):
        log(Exception("WorkerProc initialization failed"))
    sys.excepthook(RuntimeError, CONSEQUENCE, None)
    assert capsys.readouterr().err == "attnserve: no tensor x\n" * 2


def test_other_errors_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    log(KeyError("x"))
    sys.excepthook(RuntimeError, CONSEQUENCE, None)
    assert "Engine core initialization failed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        log(StartupError("no tensor x"))
    capsys.readouterr()
    sys.excepthook(KeyError, KeyError("later"), None)
    assert capsys.readouterr().err == "KeyError: 'later'\n"
    report.forget()  # the next start
    log(KeyError("x"))
