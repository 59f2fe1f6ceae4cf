"""A small part of `make conformance`'s attack: hostile requests and hostile answers at random."""

from pathlib import Path

import pytest

from tests.conformance.hostile import ANSWERS, REQUESTS, hostile

pytestmark = pytest.mark.integration


def test_nothing_hostile_makes_the_gateway_fail(tmp_path: Path) -> None:
    found = hostile(800, tmp_path / "log")
    assert not found.wrong
    assert found.sent > 3 * max(len(REQUESTS), len(ANSWERS))
    assert {200, 400, 401, 431, 502} <= found.statuses.keys()
