"""The softpick paper's table of quantization (arXiv 2504.20966, 340M parameters), beside ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.reports import Range
from quant.config import UNQUANTIZED
from quant.report.compare import paired_rise
from quant.report.frame import text_of
from quant.store import SweepResult


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper: softmax, then softpick."""

    name: str  # the paper's
    # scheme, bits: what it is here, if there is such a scheme; None for the unquantized model.
    scheme: str | None
    bits: int | None
    wikitext: tuple[float, float]  # perplexity per word
    lambada: tuple[float, float] | None  # accuracy in %; None where the table at hand has none

    @property
    def advantage(self) -> float:
        """How much more the loss of softmax rises than softpick's, in nats per word."""
        (soft, pick), (soft_before, pick_before) = self.wikitext, ROWS[0].wikitext
        return math.log(soft / soft_before) - math.log(pick / pick_before)


ROWS = (
    PaperRow("unquantized", None, None, (23.85, 24.32), (36.25, 36.21)),
    PaperRow("HQQ-2", "hqq", 2, (127870.0, 2139.9), (0.0, 5.76)),
    PaperRow("HQQ-3", "hqq", 3, (35.52, 30.24), (26.18, 32.14)),
    PaperRow("GPTQ-2", "gptq", 2, (4081.8, 893.4), (0.04, 0.43)),
    PaperRow("GPTQ-3", "gptq", 3, (34.57, 31.53), (23.71, 29.07)),
    PaperRow("GPTQ-4", "gptq", 4, (25.69, 25.53), (33.55, 34.97)),
    PaperRow("BNB-4", "bnb-nf4", 4, (26.38, 26.47), (33.63, 31.73)),
    PaperRow("BNB-8", "bnb-int8", 8, (23.95, 24.40), None),
)


def find(results: Sequence[SweepResult], variant: str, row: PaperRow) -> SweepResult | None:
    """Return our result for a row: weights alone, with zero points, by the smallest groups; int8
    has neither."""
    rows = row.scheme == "bnb-int8"
    fitting = []
    for result in results:
        config = result.config
        comparable = config == UNQUANTIZED or (
            config.target == "weights"
            and (config.group_size is None) == config.symmetric == rows
            and not config.act_order
        )
        same = (result.variant, config.scheme, config.bits) == (variant, row.scheme, row.bits)
        if comparable and same:
            fitting.append(result)
    return min(fitting, key=lambda result: result.config.group_size or 0, default=None)


def our_advantage(results: Sequence[SweepResult], row: PaperRow, text: str) -> Estimate | None:
    """Return our advantage in nats per token, sequence by sequence of the same text; None if a
    config is missing or the texts differ."""
    pairs = []
    for variant in ("softmax", "softpick"):
        after, before = find(results, variant, row), find(results, variant, ROWS[0])
        if after is None or before is None:
            return None
        pairs.append((after, before))
    rises = paired_rise(pairs, text)
    return None if rises is None else mean_interval(rises)


def verdict(row: PaperRow, ours: Estimate) -> str:
    """Return whether ours has the paper's sign."""
    return str((Range(low=0) if row.advantage > 0 else Range(high=0)).judge(ours))


def table(results: Sequence[SweepResult]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the paper's table beside ours."""

    def arrow(pair: Sequence[float] | None) -> str:
        return "" if pair is None else " -> ".join(f"{value:.2f}" for value in pair)

    rows = []
    for row in ROWS:
        pairs = [find(results, variant, row) for variant in ("softmax", "softpick")]
        cells = [row.name, arrow(row.wikitext), arrow(row.lambada)]
        for figure in ("perplexity: test per token", "perplexity: wikitext2 per word"):
            values = [r.summary[figure].value for r in pairs if r and figure in r.summary]
            cells.append(arrow(values) if len(values) == 2 else "not measured")
        ours = our_advantage(results, row, "test") if row.scheme else None
        cells.append(f"{row.advantage:+.3f}" if row.scheme else "")
        cells += [ours.shown(4), f"**{verdict(row, ours)}**"] if ours else ["", ""]
        rows.append(cells)
    found = [find(results, variant, ROWS[0]) for variant in ("softmax", "softpick")]
    header = [
        " -> ".join(one.checkpoint if one else "none" for one in found),
        "paper: Wikitext, word",
        "paper: LAMBADA, %",
        f"here: {text_of(results)}, token",
        "here: WikiText-2, word",
        "paper: softpick's advantage",
        "here",
        "the paper's sign",
    ]
    return header, rows
