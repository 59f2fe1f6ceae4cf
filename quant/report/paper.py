"""The softpick paper's table of quantization (arXiv 2504.20966, 340M parameters), beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.reports import Range
from quant.config import QuantConfig
from quant.store import Stored


@dataclass(frozen=True)
class Row:
    """A row of the paper: softmax, then softpick.

    Args:
        name: the paper's.
        scheme, bits: what it is here, if there is such a scheme; None for the unquantized model.
        wikitext: perplexity per word.
        lambada: accuracy in %; None where the table at hand has none.
    """

    name: str
    scheme: str | None
    bits: int | None
    wikitext: tuple[float, float]
    lambada: tuple[float, float] | None


ROWS = (
    Row("unquantized", None, None, (23.85, 24.32), (36.25, 36.21)),
    Row("HQQ-2", "hqq", 2, (127870.0, 2139.9), (0.0, 5.76)),
    Row("HQQ-3", "hqq", 3, (35.52, 30.24), (26.18, 32.14)),
    Row("GPTQ-2", "gptq", 2, (4081.8, 893.4), (0.04, 0.43)),
    Row("GPTQ-3", "gptq", 3, (34.57, 31.53), (23.71, 29.07)),
    Row("GPTQ-4", "gptq", 4, (25.69, 25.53), (33.55, 34.97)),
    Row("BNB-4", "bnb-nf4", 4, (26.38, 26.47), (33.63, 31.73)),
    Row("BNB-8", "bnb-int8", 8, (23.95, 24.40), None),
)


def advantage(row: Row) -> float:
    """The paper's: how much more the loss of softmax rises than softpick's, nats per word."""
    (soft, pick), (soft_before, pick_before) = row.wikitext, ROWS[0].wikitext
    return math.log(soft / soft_before) - math.log(pick / pick_before)


def find(results: Sequence[Stored], variant: str, row: Row) -> Stored | None:
    """Our config for a row: weights alone, with zero points, by the smallest groups; int8
    has neither."""
    rows = row.scheme == "bnb-int8"
    fitting = [
        stored
        for stored in results
        if stored.variant == variant and stored.config.scheme == row.scheme
        if stored.config == QuantConfig() or stored.config.target == "weights"
        if stored.config == QuantConfig()
        or (stored.config.group_size is None) == stored.config.symmetric == rows
        if stored.config.bits == row.bits and not stored.config.act_order
    ]
    return min(fitting, key=lambda stored: stored.config.group_size or 0, default=None)


def our_advantage(results: Sequence[Stored], row: Row, text: str) -> Estimate | None:
    """Ours: the same in nats per token, sequence by sequence of the same text; None if a config is
    missing or the texts differ."""
    rises = []
    for variant in ("softmax", "softpick"):
        after, before = find(results, variant, row), find(results, variant, ROWS[0])
        if after is None or before is None:
            return None
        losses = [s.units["perplexity"][text]["sequence_losses"] for s in (after, before)]
        rises.append((np.subtract(*losses), before.key["texts"], before.key["samples"]))
    (soft, *soft_key), (pick, *pick_key) = rises
    return mean_interval(soft - pick) if soft_key == pick_key else None


def verdict(row: Row, ours: Estimate) -> str:
    """Whether ours has the paper's sign."""
    return str((Range(low=0) if advantage(row) > 0 else Range(high=0)).judge(ours))
