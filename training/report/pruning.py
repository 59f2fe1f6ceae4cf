"""The section about context pruning."""

from __future__ import annotations

from attnserve.budgets.eviction import SINKS
from attnserve.budgets.result import Found
from attnserve.reports import table
from training.report.evidence import Evidence


def pruning(evidence: Evidence) -> str:
    """What budgets cost, and what other ways of evicting do."""
    if not evidence.pruning:
        return "No results of `attnserve budgets`."
    return "\n\n".join(budgets(name, found) for name, found in evidence.pruning.items())


def budgets(name: str, found: Found) -> str:
    """One checkpoint's targets and table."""
    about = found.about
    counts = about["sequences"]
    reference = about["reference"]
    allowed = others = ""
    header = ["", "eviction", "budgets", "tokens a layer", "less memory, times", "perplexity"]
    if found.allowance is not None:
        allowed = f" and {reference} {found.allowance.shown(4)} more (below 0: fewer)"
        others = (
            f"; on {reference} StreamingLLM keeps {SINKS} sinks and the most recent ones, "
            "heavy hitters is H2O"
        )
        header.append(f"nats over {reference}")
    targets = [
        [
            target.name,
            f"{target.max_loss:.4f}",
            ", ".join(map(str, target.budgets)) if target.reached else "not reached",
            f"{found.factor(target.budgets):.1f}" if target.reached else "",
        ]
        for target in found.targets
    ]
    rows = [
        [
            row.model,
            row.rule,
            row.choice,
            f"{sum(row.budgets) / len(row.budgets):.1f}",
            f"{row.factor:.1f}",
            row.loss.exp().shown(2),
            *([] if row.over_reference is None else [row.over_reference.shown(4)]),
        ]
        for row in found.rows
    ]
    return (
        f"`attnserve budgets` on {name}, {about['length']} tokens: the tokens that each "
        f"layer keeps, searched on {counts['search']} sequences of *Emma* and judged on "
        f"{counts['judged']}, on which the unpruned model has {found.unpruned.shown(4)} nats per "
        f"token{allowed}. The smallest budgets found within a loss:\n\n"
        + table(["target", "nats at most", "tokens by layer", "less memory, times"], targets, 3)
        + f"\n\nOn {counts['test']} sequences of *Great Expectations*: selective evicts the most "
        "masked token; recent keeps the first and the most recent ones, random any and the first"
        f"{others}. Memory is in tokens; intervals over sequences, those of differences in pairs."
        "\n\n" + table(header, rows, 3)
    )
