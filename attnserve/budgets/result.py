"""What a search and its comparison gave, as one file a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve.budgets.measured import Budgets
from attnserve.budgets.table import Row
from attnserve.budgets.targets import Target
from attnserve.evaluation.intervals import Estimate
from attnserve.files import CHECKOUT, json_lines

FOLDER = CHECKOUT / "training" / "results" / "budgets"


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
        """Tokens of a sequence."""
        return int(self.about["length"])

    def factor(self, budgets: Sequence[int]) -> float:
        """Memory of the unpruned cache over that of these budgets."""
        return self.length * len(budgets) / sum(budgets)

    def factor_within(self, rise: float) -> float:
        """The largest factor on the path with at most this rise of the loss; 1 if there is none."""
        return max((self.factor(budgets) for budgets, own in self.path if own <= rise), default=1.0)

    def write(self, folder: Path = FOLDER) -> Path:
        """Write it, whole or not at all; returns the file."""
        path = folder / f"{self.about['checkpoint']}.json"
        allowance = None if self.allowance is None else self.allowance.json()
        parts = {
            "about": json.dumps(self.about, indent=1),
            "validation": json_lines({"unpruned": self.unpruned.json(), "allowance": allowance}),
            "targets": json_list([vars(target) for target in self.targets]),
            "path": json_list([[list(budgets), rise] for budgets, rise in self.path]),
            "rows": json_list([row.json() for row in self.rows]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        text = ",\n".join(f'"{name}": {part}' for name, part in parts.items())
        temporary.write_text("{\n" + text + "\n}\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def read(cls, path: Path) -> Found:
        """What `write` wrote.

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
            raise ValueError(f"{path} is not a result of attnserve.budgets: {error!r}") from error


def json_list(values: Sequence[Any]) -> str:
    """A JSON array with one line an entry."""
    return "[\n" + ",\n".join(f" {json.dumps(value)}" for value in values) + "\n]"


def write_checkpoint(source: Path, budgets: Sequence[int], out: Path) -> None:
    """Copy a checkpoint and give its `attention_variant` these `kv_budgets`; the copy is there
    whole or not at all."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
    config["attention_variant"]["kv_budgets"] = list(budgets)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.rename(out)
