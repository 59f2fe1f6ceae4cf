"""Single layers, and bits for each within a budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnserve.errors import UserError
from attnserve.evaluation.measures import Data
from attnserve.files import Journal
from quant.divergence import Divergence
from quant.mixed import Price, path, total, within
from quant.sensitivity import sensitivity
from tests.conftest import Commands

PRICES = {
    "a": {2: Price(1.0, 20), 4: Price(0.10, 40), 8: Price(0.01, 80)},
    "b": {2: Price(0.1, 20), 4: Price(0.05, 40), 8: Price(0.02, 80)},
    "c": {2: Price(9.0, 10), 4: Price(0.02, 20), 8: Price(0.00, 40)},
}


def test_path_goes_from_the_largest_to_the_smallest() -> None:
    steps = path(PRICES)
    assert steps[0] == dict.fromkeys("abc", 8) and steps[-1] == dict.fromkeys("abc", 2)
    sizes = [total(PRICES, choice) for choice in steps]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    # The cheapest step for a byte comes first: b to 4 bits costs 0.03 / 40.
    assert steps[1] == {"a": 8, "b": 4, "c": 8}


def test_path_takes_the_cheapest_byte() -> None:
    """Convex prices: every step of the greedy path is as good as any choice of its size."""
    for choice in path(PRICES)[:4]:
        size = total(PRICES, choice)
        cost = sum(PRICES[layer][bits].divergence for layer, bits in choice.items())
        for bits in itertools.product((2, 4, 8), repeat=3):
            other = dict(zip("abc", bits, strict=True))
            if total(PRICES, other) <= size:
                assert cost <= 1e-9 + sum(PRICES[k][b].divergence for k, b in other.items())


def test_budget() -> None:
    assert within(PRICES, 200) == dict.fromkeys("abc", 8)
    found = within(PRICES, 100)
    assert total(PRICES, found) <= 100 and found == dict.fromkeys("abc", 4)
    with pytest.raises(ValueError, match="49 bytes is too small: the least possible is 50"):
        within(PRICES, 49)


def test_more_bits_that_are_worse_are_left_first() -> None:
    prices = {
        "a": {4: Price(0.1, 40), 8: Price(0.2, 80)},
        "b": {4: Price(0.1, 40), 8: Price(0, 80)},
    }
    assert path(prices)[1] == {"a": 4, "b": 8}


@pytest.mark.integration
def test_command(softpick: Path, data: Data, tmp_path: Path, commands: Commands) -> None:
    argv = [str(softpick), f"--books={data.books}", f"--out={tmp_path}", "--length=48"]
    argv += ["--sequences=2", "--calibration=2", "--group=32", "--bits", "2", "4", "8"]

    def run(*more: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(commands.run(sensitivity, *argv, *more, "--json"))
        return found

    found = run()
    assert Path(found["plot"]).stat().st_size > 1000
    summary = json.loads(Path(found["out"]).read_text())
    assert len(summary["prices"]) == 14
    # Layers cost more at fewer bits, and the whole model more than any of its layers.
    prices = summary["prices"].values()
    singles = {bits: [own[bits]["divergence"] for own in prices] for bits in "248"}
    means = [float(np.mean(singles[bits])) for bits in "248"]
    assert means[0] > means[1] > means[2] > 0
    uniform = {p[2]: p[3] for p in found["points"] if p[0] == "uniform"}
    assert len(uniform) == 3 and max(uniform.values()) > max(singles["2"])
    mixed = [p for p in found["points"] if p[0] == "mixed"]
    sizes = [p[1] for p in mixed]
    assert len(set(sizes)) == len(sizes) > 3
    # The ends of the frontier are the uniform choice: the same weights, the same divergence.
    ends = {p[1]: p[3] for p in mixed}
    for point in found["points"]:
        if point[0] == "uniform" and point[1] in (min(sizes), max(sizes)):
            assert ends[point[1]] == point[3]

    # What is measured is not measured again, also after a line that was cut short.
    (journal,) = tmp_path.glob("*.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:5])
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        original = Divergence.__call__

        def counted(divergence: Divergence) -> list[float]:
            calls.append(1)
            return original(divergence)

        patch.setattr(Divergence, "__call__", counted)
        again = run("--budget", str(sizes[2]))
    assert again["points"][: len(found["points"])] == found["points"] and len(calls) <= 2
    (budget,) = [p for p in again["points"] if p[0] == "budget"]
    assert budget[1] <= sizes[2]


def test_without_text_the_checkpoint_writes_it(
    softpick: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder in which there is nothing, and where results go by default."""
    monkeypatch.chdir(tmp_path)
    argv = [str(softpick), "--length=48", "--sequences=2", "--calibration=2", "--bits", "2", "8"]
    output = commands.run(sensitivity, *argv, "--scheme=gptq").splitlines()
    assert output[0].startswith("Chosen on: text sampled from softpick. Measured on: text sampled")
    out = tmp_path / "runs" / "quant" / "sensitivity" / "softpick-gptq-g64.json"
    assert output[-1].startswith(f"Written: {out.relative_to(tmp_path)}, ")
    found = json.loads(out.read_text())
    assert found["measured"] == found["chosen"] == "text sampled from softpick"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--bits 1", "greater than or equal to 2"),
        ("--scheme awq", "unknown scheme 'awq'"),
        ("--scheme hqq --symmetric", "hqq has no symmetric form"),
        ("--scheme quanto --bits 3", "scheme quanto cannot do 3 bits: it has 2, 4, 8"),
        ("--books nowhere", "emma.txt is not there"),
        ("--budget 5", "a budget of 5 bytes is too small: the least possible is"),
    ],
)
def test_refusals(
    change: str, message: str, softpick: Path, data: Data, tmp_path: Path, commands: Commands
) -> None:
    argv = [str(softpick), f"--books={data.books}", f"--out={tmp_path}", "--length=48"]
    argv += ["--sequences=2", "--calibration=2", "--scheme=rtn", *change.split()]
    assert message in commands.refused(sensitivity, *argv)


def test_another_checkpoints_values_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"

    def journal(checkpoint: str, force: bool = False) -> Journal:
        return Journal(file, {"checkpoint": checkpoint, "seed": 0}, force)

    assert journal("1").get("a", lambda: [0.5]) == [0.5]
    assert journal("1").values == {"a": [0.5]}
    with pytest.raises(UserError, match="has values that differ in checkpoint: --force"):
        journal("2")
    assert not journal("2", force=True).values
