"""The papers' claims, from `claims.yaml`, and what tests each of them here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from attnserve.reports import Verdict
from training.report import figures
from training.report.evidence import Evidence, Missing
from training.report.figures import Finding


class Claim(NamedTuple):
    """What a paper claims, the figure that it reports, and the function of `figures` that tests it
    with its arguments, the evidence and the checkpoint's name apart."""

    text: str
    reported: str
    figure: str
    args: Mapping[str, Any] = MappingProxyType({})

    def judge(self, evidence: Evidence, name: str) -> Finding:
        """Return what the evidence says of a checkpoint; `MISSING` where there is none."""
        try:
            finding: Finding = getattr(figures, self.figure)(evidence, name, **self.args)
            return finding
        except Missing as why:
            return Finding(str(why), "", Verdict.MISSING)


class Paper(NamedTuple):
    """A paper's claims about a variant."""

    variant: str
    title: str
    setting: str
    claims: list[Claim]


PAPERS = [
    Paper(
        paper["variant"],
        paper["title"],
        paper["setting"],
        [Claim(*claim) for claim in paper["claims"]],
    )
    for paper in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
]
