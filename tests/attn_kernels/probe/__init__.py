"""A variant of no paper that uses all that a variant may know of a row; `test_probe.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.variant import Rows, Variant
from attn_kernels.variants.sinks import softmax_with_sink


@dataclass(frozen=True)
class Probe(Variant):
    """`w_ij = n_i / (n_i + 1) * exp(y_ij) / (exp(sink_h) + sum_j exp(y_ij))`, with
    `y_ij = x_ij (1 + ln(1 + i)) / (1 + |q_i|) - slope_h sqrt(i - j)`."""

    name: ClassVar[str] = "probe"
    paper: ClassVar[str] = "none"

    @property
    def learned(self) -> tuple[str, ...]:
        return "probe_slope", "probe_sink"

    def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return q * (1 + (1 + rows.position).log()) / (1 + q.norm(dim=-1, keepdim=True)), k

    def score_bias(self, rows: Rows) -> Tensor:
        return -rows.learned["probe_slope"] * rows.distance.sqrt()

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        weights = softmax_with_sink(scores, rows.mask, rows.learned["probe_sink"])
        return weights * rows.n / (rows.n + 1)
