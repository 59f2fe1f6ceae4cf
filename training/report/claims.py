"""The papers' claims, from `claims.yaml`, and what tests each of them here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from attnserve.reports import Verdict
from training.report import figures
from training.report.evidence import Evidence, Missing
from training.report.figures import Finding


@dataclass(frozen=True)
class Claim:
    """One row of the report.

    Attributes:
        text: what the paper claims.
        reported: the paper's figure.
        figure: the function of `figures` that tests it.
        args: the function's arguments.
    """

    text: str
    reported: str
    figure: str
    args: dict[str, Any] = field(default_factory=dict)

    def judge(self, evidence: Evidence) -> Finding:
        """Return what the evidence says; `MISSING` where there is none."""
        try:
            finding: Finding = getattr(figures, self.figure)(evidence, **self.args)
            return finding
        except Missing as why:
            return Finding(str(why), "", Verdict.MISSING)


@dataclass(frozen=True)
class Paper:
    """A paper's claims."""

    title: str
    setting: str
    claims: Sequence[Claim]


def papers() -> list[Paper]:
    """Return the papers of `claims.yaml`."""
    content = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return [
        Paper(paper["title"], paper["setting"], [Claim(**claim) for claim in paper["claims"]])
        for paper in content
    ]


PAPERS = papers()
