"""The Markdown section: the paper beside ours, and whether outliers explain the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from attnserve.evaluation.intervals import Estimate, mean_interval
from quant import store
from quant.config import QuantConfig
from quant.report import paper
from quant.report.explain import explanations, in_short, spearman
from quant.report.figures import by_setting
from quant.report.frame import frame, setting, table
from quant.report.section import section, write_section
from quant.scorer import CHANGES, DIVERGENCES
from quant.store import SweepResult

BEFORE = np.array([3.0, 4.0, 5.0])


def result(
    variant: str,
    config: QuantConfig,
    rise: Sequence[float] | NDArray[np.float64],
    outliers: float = 3.0,
    before: NDArray[np.float64] = BEFORE,
) -> SweepResult:
    """Return a result whose losses rose by `rise` from `before`, and whose divergence is its
    mean."""
    losses = before + np.asarray(rise)
    summary = {
        "perplexity: test per token": mean_interval(losses).exp(),
        "perplexity: wikitext2 per word": mean_interval(losses).exp(),
    }
    details: dict[str, Any] = {}
    if config == QuantConfig():
        layers = {"a": [outliers, 10.0], "b": [outliers + 1, 20.0]}
        details = {"weight outliers": layers, "input outliers": layers}
    else:
        summary |= {"test loss change": mean_interval(rise), "test KL": mean_interval(rise)}
        summary |= {"test top-1": Estimate(0.9, 0.8, 1), "test p change, RMS": Estimate(0.02, 0, 1)}
        details = {
            "KL over tokens": {"test": dict.fromkeys(DIVERGENCES, 0.25)},
            "p change over tokens": {"test": dict.fromkeys(CHANGES, -0.125)},
        }
    return SweepResult(
        checkpoint=variant,
        variant=variant,
        context=64,
        key={"checkpoint": "0", "config": vars(config), "samples": {}, "texts": "1"},
        texts=store.TITLES,
        machine="here",
        seconds=60.0,
        size={
            "bytes": 1000,
            "quantized_bytes": 500,
            "quantized_numbers": 1000,
            "cache_bytes_per_token": 8,
        },
        details=details,
        summary=summary,
        units={"perplexity": {"test": {"sequence_losses": losses.tolist()}}},
    )


GPTQ3 = QuantConfig(weights=3, scheme="gptq", group_size=64)


def pair(soft: Sequence[float], pick: Sequence[float]) -> list[SweepResult]:
    nothing = [0.0, 0.0, 0.0]
    return [
        result("softmax", QuantConfig(), nothing),
        result("softmax", GPTQ3, soft),
        result("softpick", QuantConfig(), nothing),
        result("softpick", GPTQ3, pick),
    ]


def test_the_papers_advantage() -> None:
    rows = {row.name: row for row in paper.ROWS}
    exact = math.log(34.57 / 23.85) - math.log(31.53 / 24.32)
    assert rows["GPTQ-3"].advantage == pytest.approx(exact)
    assert all(row.advantage > 0 for row in rows.values() if row.scheme)


@pytest.mark.parametrize(
    ("soft", "pick", "verdict"),
    [
        ([0.30, 0.31, 0.32], [0.1, 0.11, 0.12], "agrees"),
        ([0.1, 0.11, 0.12], [0.30, 0.31, 0.32], "does not agree"),
        ([0.1, 0.3, 0.2], [0.3, 0.1, 0.2], "cannot be shown here"),
    ],
)
def test_ours_beside_the_papers(soft: list[float], pick: list[float], verdict: str) -> None:
    results = pair(soft, pick)
    row = next(row for row in paper.ROWS if row.name == "GPTQ-3")
    ours = paper.our_advantage(results, row, "test")
    assert ours is not None
    assert ours == pytest.approx(mean_interval(np.subtract(soft, pick)))
    assert paper.verdict(row, ours) == verdict
    text = section(results, {"Do outliers explain it?": "plots/outliers.png"})
    (line,) = [line for line in text.splitlines() if line.startswith("| GPTQ-3")]
    assert f"**{verdict}**" in line and "34.57 -> 31.53" in line and "23.71 -> 29.07" in line
    (hqq,) = [line for line in text.splitlines() if line.startswith("| HQQ-2")]
    assert hqq.count("not measured") == 2
    assert "![Do outliers explain it?](plots/outliers.png)" in text


def test_other_texts_are_not_compared() -> None:
    results = pair([0.1] * 3, [0.1] * 3)
    results[2].key["texts"] = "2"
    assert paper.our_advantage(results, paper.ROWS[4], "test") is None
    assert paper.our_advantage(results[:2], paper.ROWS[4], "test") is None


def test_rank_correlation() -> None:
    same, chance = spearman(np.arange(5.0), np.arange(5.0) ** 3)
    assert (same, chance) == pytest.approx((1, 1 / 120))
    other, chance = spearman(np.arange(5.0), -np.arange(5.0))
    assert (other, chance) == pytest.approx((-1, 1))
    # 1 - 6 * sum d^2 / (n (n^2 - 1))
    assert spearman([1.0, 2, 3, 4], [2.0, 1, 4, 3])[0] == pytest.approx(0.6)
    assert spearman(np.ones(4), np.arange(4.0)) == (0.0, 1.0)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "explains it"), (-1, "does not explain it")])
def test_whether_outliers_explain(sign: int, verdict: str) -> None:
    results = []
    for place, variant in enumerate(("softmax", "softpick", "ssmax", "lssa")):
        results.append(result(variant, QuantConfig(), [0.0] * 3, 10.0 + sign * place))
        results.append(result(variant, GPTQ3, [0.1 + place] * 3))
    found = {e.statistic: e for e in explanations(results)}
    assert found["inputs: kurtosis"].verdict == verdict
    assert found["inputs: kurtosis"].correlation == pytest.approx(sign)
    assert found["weights: largest over median"].verdict == "does not explain it"  # all are equal
    short = in_short(explanations(results))
    assert ("goes with weights: kurtosis" in short) == (sign > 0)
    assert ("goes with none of the outliers" in short) == (sign < 0)
    few = explanations(results[:6])
    assert in_short(few) == "This cannot be told with fewer than 4 checkpoints."
    assert {e.verdict for e in few} == {"cannot be told with fewer than 4 checkpoints"}


def test_tables() -> None:
    results = pair([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])
    lines = table(results).splitlines()
    assert len(lines) == 5 and "gptq, groups of 64" in lines[2] and "0.2 [" in lines[2]
    rows = frame(results)
    assert rows["bits"].tolist()[1::2] == [3, 3] and rows["bits"].isna().tolist()[::2] == [True] * 2
    assert rows["bits per weight"].iloc[1] == 4.0
    channel = QuantConfig(weights=4, scheme="rtn", activations=8, static=True, symmetric=True)
    assert setting(channel) == "rtn, a row a group, 8-bit activations, symmetric, static"
    assert setting(QuantConfig(kv=3)) == "simulated, one scale a token"
    assert setting(QuantConfig(kv=8, kv_format="fp8")) == "fp8"
    assert setting(QuantConfig(kv=4, activations=8)) == "4-bit cache"


def test_one_line_of_a_figure_has_all_widths_of_a_cache() -> None:
    """Which format it is follows from the bits, but for fp8."""
    kinds = [(2, None), (4, "int4_per_token_head"), (8, "int8_per_token_head"), (8, "fp8")]
    made = [result("softmax", QuantConfig(kv=b, kv_format=kind), [0.1] * 3) for b, kind in kinds]
    assert [[r.config.bits for r in own] for own in by_setting(made).values()] == [[2, 4, 8], [8]]


def test_library_rows_of_the_paper() -> None:
    """NF4 has blocks, int8 has rows; other schemes count with groups and zero points only."""
    nothing = [0.0] * 3
    results = [result(v, QuantConfig(), nothing) for v in ("softmax", "softpick")]
    nf4 = QuantConfig(weights=4, scheme="bnb-nf4", group_size=64)
    int8 = QuantConfig(weights=8, scheme="bnb-int8", symmetric=True)
    rows = QuantConfig(weights=4, scheme="gptq", symmetric=True)
    results += [result("softmax", config, nothing) for config in (nf4, int8, rows)]
    found = {row.name: paper.find(results, "softmax", row) for row in paper.ROWS}
    cells = {name: stored.config for name, stored in found.items() if stored is not None}
    assert cells == {"unquantized": QuantConfig(), "BNB-4": nf4, "BNB-8": int8}


def test_metrics_as_people_read_them() -> None:
    text = section(pair([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]), {})
    _, after = text.split("### Perplexity, as a multiple")
    ratio, rest = after.split("### Tokens with the same likeliest token")
    assert "| 1.2214 [" in ratio and "90.0 [80.0, 100.0]" in rest
    assert "| softmax | 3 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 | -12.50 |" in rest
    assert "2.00 [0.00, 100.00]" in rest


def test_the_section_of_a_folder(tmp_path: Path) -> None:
    """With its plots, for docs/RESULTS.md."""
    assert "Not measured" in write_section(tmp_path, tmp_path / "figures", "figures")
    assert not (tmp_path / "figures").exists()
    for result in pair([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]):
        store.write(store.path_of(tmp_path, result.checkpoint, result.config), result)
    text = write_section(tmp_path, tmp_path / "figures", "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    kinds = ("weights", "differences")  # whether outliers explain it, two checkpoints cannot tell
    assert names == {f"quantization-{kind}.png" for kind in kinds}
    assert all(f"](figures/{name})" in text for name in names)
