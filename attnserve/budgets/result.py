"""What a search gave, and its budgets beside other ways of evicting, as one file a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from attn_kernels import get_variant
from attn_kernels.pruning import slot_bytes
from attnserve.budgets.model import Budgets, Measured
from attnserve.budgets.search import Target
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.files import CHECKOUT, json_lines, json_list, json_parts, replacing, write_text

FOLDER = CHECKOUT / "training" / "results" / "budgets"
ACCUMULATOR_BYTES = 4
"""Bytes that H2O keeps for each token and KV head: a float32 sum of attention weights."""


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
        """Return the row as `from_json` takes it."""
        fields = dataclasses.asdict(self) | {"factor": round(self.factor, 3)}
        over = None if self.over_reference is None else self.over_reference.json()
        return fields | {"loss": self.loss.json(), "over_reference": over}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        """Return the row that `json` gave."""
        over = fields["over_reference"]
        over = None if over is None else Estimate.from_json(over)
        return cls(**fields | {"loss": Estimate.from_json(fields["loss"]), "over_reference": over})


@dataclass(frozen=True)
class Found:
    """All of it.

    Attributes:
        about: checkpoint, texts, settings, machine.
        unpruned: the model's loss on the judged sequences of the validation text.
        allowance: by how much the reference's is above it, sequence by sequence; None: there is no
            reference.
        targets: what was searched for, the main one first.
        path: budgets on the way, with the rise of the loss over the unpruned model's on the
            sequences that the search looks at.
        rows: the comparison on the test text.
    """

    about: dict[str, Any]
    unpruned: Estimate
    allowance: Estimate | None
    targets: list[Target]
    path: list[tuple[Budgets, float]]
    rows: list[Row]

    @property
    def length(self) -> int:
        """Return the tokens of a sequence."""
        return int(self.about["length"])

    def factor(self, budgets: Sequence[int]) -> float:
        """Return the memory of the unpruned cache over that of these budgets."""
        return self.length * len(budgets) / sum(budgets)

    def factor_within(self, rise: float) -> float:
        """Return the largest factor on the path with at most this rise of the loss, or 1."""
        return max((self.factor(budgets) for budgets, own in self.path if own <= rise), default=1.0)

    def lines(self) -> list[str]:
        """Return sentences for people: the unpruned loss, and each target."""
        judged = self.about["sequences"]["judged"]
        first = f"Validation, {judged} sequences: unpruned {self.unpruned.shown(4)} nats per token"
        if self.allowance is not None:
            first += f"; {self.about['reference']} is {self.allowance.shown(4)} above it"
        lines = [first + "."]
        if self.allowance is not None and self.about["text_from"] == "own":
            lines.append(
                "It wrote the text: another model cannot reach its loss there, whatever it is "
                "worth."
            )
        for target in self.targets:
            missed = "" if target.reached else " (not reached: the unpruned model is above it)"
            lines.append(
                f"{target.name}: at most {target.max_loss:.4f} nats with budgets "
                f"{', '.join(map(str, target.budgets))}, "
                f"{self.factor(target.budgets):.1f} times less memory{missed}"
            )
        return lines

    def write(self, folder: Path = FOLDER) -> Path:
        """Write the result and return its file."""
        path = folder / f"{self.about['checkpoint']}.json"
        allowance = None if self.allowance is None else self.allowance.json()
        parts = {
            "about": json.dumps(self.about, indent=1),
            "validation": json_lines({"unpruned": self.unpruned.json(), "allowance": allowance}),
            "targets": json_list([vars(target) for target in self.targets]),
            "path": json_list([[list(budgets), rise] for budgets, rise in self.path]),
            "rows": json_list([row.json() for row in self.rows]),
        }
        write_text(path, json_parts(parts))
        return path

    @classmethod
    def read(cls, path: Path) -> Found:
        """Return what `write` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            allowance = fields["validation"]["allowance"]
            return cls(
                fields["about"],
                Estimate.from_json(fields["validation"]["unpruned"]),
                None if allowance is None else Estimate.from_json(allowance),
                [Target(**target) for target in fields["targets"]],
                [(tuple(budgets), rise) for budgets, rise in fields["path"]],
                [Row.from_json(row) for row in fields["rows"]],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of attnserve budgets: {error!r}") from error


def write_checkpoint(source: Path, budgets: Sequence[int], out: Path) -> None:
    """Copy a checkpoint and give its `attention_variant` these `kv_budgets`; the copy is there
    whole or not at all."""
    with replacing(out) as new:
        shutil.copytree(source, new)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config["attention_variant"]["kv_budgets"] = list(budgets)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def slots(checkpoint: Checkpoint, rule: str) -> int:
    """Return the bytes of one token in one layer of a bfloat16 cache, with what the rule remembers
    of it."""
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
    """Yield everything that is compared: model, rule, how the budgets were chosen, and they."""
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
    """Measure every way of keeping the cache small.

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
    """Return the rows for people, with a column for the reference if there is one."""
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
