"""What all benchmarks write: rows of a CSV file, and cells of a table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from attnserve.errors import UserError
from benchmarks.results import append_csv, checked, shown, table


def test_csv_keeps_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.csv"
    assert checked(path, False) == path and checked(path, True) is None
    path.write_text("variant,retired,ratio\nsoftpick,1.50,\nlssa,007,0.4000\n")
    checked(path, False)
    append_csv(path, {"commit": "abc"}, [{"variant": "ssmax", "ratio": 0.5}])
    append_csv(path, {"commit": "def"}, [{"variant": "ssmax", "ratio": None, "note": "a, b"}])
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    assert [row["variant"] for row in rows] == ["softpick", "lssa", "ssmax", "ssmax"]
    assert [row["retired"] for row in rows] == ["1.50", "007", "", ""]
    assert [row["ratio"] for row in rows] == ["", "0.4000", "0.5", ""]
    assert [row["commit"] for row in rows] == ["", "", "abc", "def"]
    assert rows[3]["note"] == "a, b"


def test_csv_that_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe,")
    for wrong in (path, tmp_path):
        with pytest.raises(UserError, match="results cannot be written"):
            checked(wrong, False)


def test_cells() -> None:
    row = {"ms_p20": 1.0, "ms_median": 2.25, "ms_p80": 3.0}
    assert shown(row, "ms", 1) == "2.2 (1.0-3.0)"
    assert shown(dict.fromkeys(row), "ms", 1) == "-"
    assert table([]) == "nothing was measured"
    assert table([{"a": 1, "b": "x"}]).split() == ["a", "b", "1", "x"]
