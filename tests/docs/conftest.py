"""The clone that these tests share, and the table of what its commands took."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.clone import Clone, make_clone


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """Return a fresh clone without a folder beside it, and with an empty home."""
    yield make_clone(tmp_path_factory.mktemp("stranger"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each command of the texts that was run, with its time in seconds."""
    rows = [
        (properties.get("seconds", report.duration), report.outcome, properties["command"])
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        for properties in (dict(report.user_properties),)
        if report.when == "call" and "command" in properties
    ]
    if rows:
        terminalreporter.section("commands of the texts, seconds (of a server: until it answers)")
    for seconds, outcome, command in rows:
        terminalreporter.line(f"{seconds:7.1f}  {outcome}  {command}")
