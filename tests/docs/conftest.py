"""The clone that these tests share, and the table of what its commands took."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.clone import Clone, make_clone


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A fresh clone without a folder beside it, and with an empty home."""
    yield make_clone(tmp_path_factory.mktemp("stranger"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each command of the texts that was run, with its time in seconds."""
    reports = [
        report
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        if report.when == "call"
        and "tests/docs/" in report.nodeid
        and dict(report.user_properties).get("command")
    ]
    if not reports:
        return
    terminalreporter.section("commands of the texts")
    for report in reports:
        command = dict(report.user_properties)["command"]
        terminalreporter.line(f"{report.duration:7.1f} s  {report.outcome:6}  {command}")
