"""What the reports share: templates, Markdown tables, figures, and when a claim agrees."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from attnserve.evaluation.intervals import Estimate
from attnserve.files import replacing

COLORS = {
    "softmax": "black",
    "softpick": "tab:orange",
    "ssmax": "tab:blue",
    "lssa": "tab:green",
    "lssar": "tab:red",
    "selective": "tab:purple",
    "sigmoid": "tab:brown",
    "sinks": "tab:olive",
    "softmax1": "tab:pink",
}
"""A variant's color in every figure; others are grey."""


def color(variant: str) -> str:
    """Return the color of a variant, or of the reference checkpoint that has its name."""
    return COLORS.get(variant, "tab:gray")


def templates(folder: Path) -> Environment:
    """Return the Jinja environment of a folder's templates, which may call `table`.

    Values in `*.html` are escaped, others are not.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["table"] = table
    return environment


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table, all of whose columns but the first `left` are aligned to the
    right; a `|` in a cell, as a folder's name may have it, does not end the cell."""
    # pandas' `to_markdown` needs another package, tabulate.
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = ([cell.replace("|", r"\|") for cell in cells] for cells in (header, rule, *rows))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file that is the same for the same results."""
    with replacing(path) as temporary:
        # Without the version of matplotlib, which would change the file.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


class Verdict(StrEnum):
    """A judgement of a claim by measurements."""

    AGREES = "agrees"
    DISAGREES = "does not agree"
    UNDECIDED = "cannot be shown here"
    MISSING = "not measured"


@dataclass(frozen=True)
class Range:
    """The range in which a figure lies if a claim is right, both ends included."""

    low: float = -math.inf
    high: float = math.inf

    def judge(self, estimate: Estimate) -> Verdict:
        """Return the verdict: a 95 % interval inside the range agrees, outside disagrees, and
        astride decides nothing."""
        if estimate.low >= self.low and estimate.high <= self.high:
            return Verdict.AGREES
        if estimate.high < self.low or estimate.low > self.high:
            return Verdict.DISAGREES
        return Verdict.UNDECIDED

    def __str__(self) -> str:
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"
