"""Perplexity against memory: selective attention's budgets beside other ways of evicting."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from attn_kernels import get_variant
from attn_kernels.pruning import slot_bytes
from attnserve.budgets.measured import Budgets, Measured
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, mean_interval

ACCUMULATOR_BYTES = 4
"""Of what H2O keeps for each token and KV head: a float32 sum of attention weights."""


@dataclass(frozen=True)
class Row:
    """One way of keeping a cache small, on the test text.

    Attributes:
        model: the checkpoint's name.
        rule: of eviction (`attnserve.budgets.eviction`); "none" keeps everything.
        choice: "uniform", "searched", or the name of the target that the budgets were searched for.
        budgets: tokens that each layer keeps.
        factor: memory of the unpruned cache over this one's, in tokens.
        bytes: of a request that has the whole length, in a bfloat16 cache.
        loss: nats per token.
        over_reference: nats per token more than the reference, sequence by sequence; None: there
            is no reference.
    """

    model: str
    rule: str
    choice: str
    budgets: list[int]
    factor: float
    bytes: int
    loss: Estimate
    over_reference: Estimate | None

    def json(self) -> dict[str, Any]:
        """The row as `from_json` takes it."""
        fields = dataclasses.asdict(self) | {"factor": round(self.factor, 3)}
        over = None if self.over_reference is None else self.over_reference.json()
        return fields | {"loss": self.loss.json(), "over_reference": over}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        """What `json` gave."""
        over = fields["over_reference"]
        over = None if over is None else Estimate.from_json(over)
        return cls(**fields | {"loss": Estimate.from_json(fields["loss"]), "over_reference": over})


def slots(checkpoint: Checkpoint, rule: str) -> int:
    """Bytes of one token in one layer of a bfloat16 cache, with what the rule remembers of it."""
    config = checkpoint.config
    size = (config.num_key_value_heads, config.head_dim, torch.bfloat16)
    if get_variant(checkpoint.variant).prunable:
        return slot_bytes(*size)
    numbers = ACCUMULATOR_BYTES * config.num_key_value_heads if rule == "heavy hitters" else 0
    return 2 * math.prod(size[:2]) * torch.bfloat16.itemsize + numbers


def ways(
    selective: Measured,
    softmax: Measured | None,
    uniform: Iterable[int],
    searched: dict[Budgets, str],
) -> Iterator[tuple[Measured, str, str, Budgets]]:
    """Everything that is compared: model, rule, how the budgets were chosen, and they."""
    if softmax is not None:
        yield softmax, "none", "unpruned", softmax.full
    yield selective, "none", "unpruned", selective.full
    for budgets, choice in searched.items():
        yield selective, "selective", choice, budgets
    rules = [(selective, rule) for rule in ("selective", "recent", "random")]
    if softmax is not None:
        rules += [(softmax, rule) for rule in ("streaming", "heavy hitters")]
    for (measured, rule), budget in itertools.product(rules, uniform):
        yield measured, rule, "uniform", (budget,) * measured.forward.layers


def compare(
    selective: Measured,
    softmax: Measured | None,
    uniform: Iterable[int],
    searched: dict[Budgets, str],
) -> list[Row]:
    """Measure all of it.

    Args:
        selective, softmax: the model and its reference, if any, on the same sequences.
        uniform: budgets that every layer gets.
        searched: budgets with how they were chosen.
    """
    reference = None if softmax is None else np.array(softmax.losses("none", softmax.full))
    rows = []
    for measured, rule, choice, budgets in tqdm(
        list(ways(selective, softmax, uniform, searched)), desc="table", unit="row"
    ):
        losses = np.array(measured.losses(rule, budgets))
        tokens = sum(budgets)
        rows.append(
            Row(
                measured.checkpoint.name,
                rule,
                choice,
                list(budgets),
                sum(measured.full) / tokens,
                tokens * slots(measured.checkpoint, rule),
                mean_interval(losses),
                None if reference is None else mean_interval(losses - reference),
            )
        )
    return rows


def text_table(rows: Sequence[Row]) -> str:
    """The rows for people, with a column for the reference if there is one."""
    lines = [
        {
            "model": row.model,
            "eviction": row.rule,
            "budgets": row.choice,
            "tokens a layer": f"{np.mean(row.budgets):.1f}",
            "KiB a request": f"{row.bytes / 1024:.1f}",
            "factor": f"{row.factor:.1f}",
            "perplexity": row.loss.exp().shown(2),
            "nats over the reference": row.over_reference and row.over_reference.shown(4),
        }
        for row in rows
    ]
    return pd.DataFrame(lines).dropna(axis="columns").to_string(index=False)
