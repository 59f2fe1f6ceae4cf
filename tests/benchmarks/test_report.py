"""What a run leaves behind."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kernels.case import Case
from benchmarks.kernels.measure import Row, Timing
from benchmarks.kernels.report import append_csv, check_csv, json_row, plot, table

CASE = Case("prefill", "fp32", 64, 4096, 1, 512, 8, 2, 128)
GOOD = Timing(1e-7, "", np.array([0.001, 0.002, 0.003]))
PEER = Timing(1e-6, "", np.array([0.004, 0.004, 0.004]))
RED = Timing(0.5, "error 5e-01", np.empty(0))


def row(ours: Timing = GOOD, vllm: Timing = PEER, sdpa: Timing = PEER) -> Row:
    return Row("softpick", CASE, ours, vllm, sdpa, "vec", 100.0, "GFLOP/s")


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_keeps_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("variant,retired,ratio_vllm\nsoftpick,1.50,\nlssa,007,0.4000\n")
    check_csv(path)
    append_csv(path, {"commit": "abc"}, [row()])
    append_csv(path, {"commit": "def"}, [row(ours=RED)])
    old, older, first, second = cells(path)
    assert (old["variant"], old["retired"], old["ratio_vllm"]) == ("softpick", "1.50", "")
    assert (older["retired"], older["ratio_vllm"], older["commit"]) == ("007", "0.4000", "")
    assert (first["commit"], first["retired"], float(first["ratio_vllm"])) == ("abc", "", 0.5)
    assert float(first["ms_median"]) == 2.0 and float(first["vllm_ms_p80"]) == 4.0
    assert (second["ratio_vllm"], second["ms_median"], second["note"]) == ("", "", "error 5e-01")


def test_csv_that_cannot_be_read_is_found_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe,")
    with pytest.raises(ValueError):
        check_csv(path)


def test_numbers_of_a_row() -> None:
    shown = json_row(row())
    assert shown["ratio_vllm"] == shown["ratio_sdpa"] == 0.5
    assert shown["fraction_of_limit"] == round(CASE.flops / 0.002 / 1e9 / 100.0, 4)
    assert shown["new_tokens"] == 512 and "note" not in shown


@pytest.mark.parametrize(
    ("red", "null"),
    [
        (row(ours=RED), {"ratio_vllm", "ratio_sdpa", "fraction_of_limit"}),
        (row(vllm=RED), {"ratio_vllm"}),
        (row(sdpa=RED), {"ratio_sdpa"}),
    ],
    ids=["ours", "vllm", "sdpa"],
)
def test_red_gives_no_ratio_and_says_why(red: Row, null: set[str]) -> None:
    shown = json_row(red)
    assert {name for name, value in shown.items() if value is None} == null
    assert "error 5e-01" in str(shown["note"]) and "error 5e-01" in table([red])


def test_plot(tmp_path: Path) -> None:
    plot(tmp_path / "plot.png", "title", [row(), row(ours=RED)])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
