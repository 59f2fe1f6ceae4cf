"""What a search gave, and its budgets beside other ways of evicting, as one file a checkpoint."""

import dataclasses
import json
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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
    """One way of keeping a cache small, on the test text."""

    model: str  # the checkpoint's name
    rule: str  # of eviction (`attnserve.budgets.eviction`); "none" keeps everything
    # "uniform", "searched", or the name of the target that the budgets were searched for.
    choice: str
    budgets: list[int]  # tokens that each layer keeps
    factor: float  # memory of the unpruned cache over this one's, in tokens
    bytes: int  # of a request that has the whole length, in a bfloat16 cache
    loss: Estimate  # nats per token
    # Nats per token more than the reference, sequence by sequence; None: there is no reference.
    over_reference: Estimate | None

    def json(self) -> dict[str, Any]:
        """Return the row as `from_json` takes it."""
        fields = dataclasses.asdict(self) | {"factor": round(self.factor, 3)}
        over = self.over_reference and self.over_reference.json()
        return fields | {"loss": self.loss.json(), "over_reference": over}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        over = fields["over_reference"]
        estimates = {"loss": Estimate.from_json(fields["loss"])}
        return cls(**fields | estimates | {"over_reference": over and Estimate.from_json(over)})


@dataclass(frozen=True)
class Found:
    """All of it."""

    about: dict[str, Any]  # checkpoint, texts, settings, machine
    unpruned: Estimate  # the model's loss on the judged sequences of the validation text
    # By how much the reference's is above it, sequence by sequence; None: there is no reference.
    allowance: Estimate | None
    targets: list[Target]  # what was searched for, the main one first
    # Budgets on the way, with the rise of the loss over the unpruned model's: of a greedy search on
    # the sequences that it looks at, else on the judged ones.
    path: list[tuple[Budgets, float]]
    rows: list[Row]  # the comparison on the test text

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
        allowance = self.allowance and self.allowance.json()
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
    def read(cls, path: Path) -> Self:
        """Return what `write` wrote."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            allowance = fields["validation"]["allowance"]
            return cls(
                fields["about"],
                Estimate.from_json(fields["validation"]["unpruned"]),
                allowance and Estimate.from_json(allowance),
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


def compare(
    selective: Measured,
    softmax: Measured | None,
    uniform: Collection[int],
    searched: dict[Budgets, str],
) -> list[Row]:
    """Measure every way of keeping the cache small: uniform budgets, those that were searched
    (with how they were chosen), and none; of the model and its reference, on the same sequences."""
    rules = [(selective, rule) for rule in ("selective", "recent", "random")]
    ways = [(selective, "none", "unpruned", selective.full)]
    if softmax is not None:
        rules += [(softmax, rule) for rule in ("streaming", "heavy hitters")]
        ways.insert(0, (softmax, "none", "unpruned", softmax.full))
    ways += [(selective, "selective", choice, budgets) for budgets, choice in searched.items()]
    ways += [
        (measured, rule, "uniform", (budget,) * measured.forward.layers)
        for measured, rule in rules
        for budget in uniform
    ]
    reference = None if softmax is None else np.array(softmax.losses("none", softmax.full))
    rows = []
    for measured, rule, choice, budgets in tqdm(ways, desc="table", unit="row"):
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
