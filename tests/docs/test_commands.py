"""The commands of the texts, typed in a fresh clone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.docs.clone import Clone
from tests.docs.rules import NotHere, Run
from tests.docs.table import RULES

pytestmark = pytest.mark.integration


def cases() -> list[object]:
    """Return the rules that are run here, each with its marks."""
    return [
        pytest.param(command, rule, id=command, marks=[pytest.mark.slow] if slow else [])
        for command, rule in RULES.items()
        if isinstance(rule, Run | NotHere)
        for slow in (isinstance(rule, Run) and rule.slow,)
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("command", "rule"), cases())
def test_command(
    command: str,
    rule: Run | NotHere,
    clone: Clone,
    record_property: Callable[[str, object], None],
) -> None:
    if isinstance(rule, NotHere):
        pytest.skip(f"not run: it needs {rule.missing}")
    record_property("command", rule.command or command)
    done = clone.run(rule.command or command)
    assert done.returncode == rule.code, done.stdout[-3000:]
    assert re.search(rule.prints, done.stdout), done.stdout[-3000:]
    assert "Traceback" not in done.stdout
