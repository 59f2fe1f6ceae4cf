"""The tables of docs/RESULTS.md, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from attnserve.budgets.result import Found
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.perplexity import TEXTS, UNITS
from attnserve.reports import table
from training.analyze.length import multiples
from training.positions import FIRST_BIN, against, octaves
from training.report.changes import changes
from training.report.claims import Paper
from training.report.evidence import Evidence

BASELINE = "smollm2-softmax"

Columns = dict[str, tuple[str, int, float]]
"""`{figure's name: (heading, decimals, factor)}`; `{}` in a name stands for a length."""

FIGURES: dict[str, Columns] = {
    "perplexity": {
        f"{text} per {unit}": (f"{text}, {unit}", digits, 1.0)
        for text in TEXTS
        for unit, digits in zip(UNITS, (2, 0, 3), strict=True)
    },
    "lambada": {
        "accuracy": ("accuracy, %", 2, 100.0),
        "perplexity per word": ("perplexity per word", 0, 1.0),
    },
    "attention": {
        "sink rate at 0.2": ("sink rate 0.2, %", 1, 100.0),
        "sink rate at 0.3": ("sink rate 0.3, %", 1, 100.0),
        "kurtosis": ("kurtosis", 2, 1.0),
        "kurtosis, largest of the layers": ("largest layer's", 1, 1.0),
        "largest |x|": ("largest value", 1, 1.0),
        "largest over median |x|": ("largest over median", 0, 1.0),
        "zeros": ("exact zeros, %", 1, 100.0),
        "silent": ("silent, %", 1, 100.0),
    },
    "length": {
        "loss of windows of {}x": ("loss", 3, 1.0),
        "rise of windows of {}x over pieces": ("more than in pieces of 1x", 3, 1.0),
    },
    "passkey": {
        "accuracy at {}x": ("accuracy, %", 1, 100.0),
        "gain at {}x": ("gain, nats", 3, 1.0),
        "log-probability at {}x": ("log-probability, nats", 1, 1.0),
    },
}


def cells(summary: dict[str, Estimate], measure: str, length: int = 1) -> list[str]:
    """Return a result's figures; empty where there is none."""
    return [
        summary[name].shown(digits, factor) if (name := key.format(length)) in summary else ""
        for key, (_, digits, factor) in FIGURES[measure].items()
    ]


def headings(measure: str) -> list[str]:
    """Return the headings of a measure's figures."""
    return [heading for heading, _, _ in FIGURES[measure].values()]


def claims(paper: Paper, evidence: Evidence, name: str) -> str:
    """Return a paper's claims, each with its verdict on a checkpoint."""
    rows = []
    for claim in paper.claims:
        finding = claim.judge(evidence, name)
        verdict = f"**{finding.verdict}**"
        rows.append([claim.text, claim.reported, finding.ours, finding.rule, verdict])
    header = ["claim", "the paper's figure", "here [95 % interval]", "agrees if", "verdict"]
    return table(header, rows, left=5)


def learning_rates(rates: pd.DataFrame) -> str:
    """Return the validation loss of every variant at every learning rate."""
    losses = rates.pivot(index="variant", columns="learning_rate", values="validation_loss")
    rows = [
        [str(name), *("" if pd.isna(x) else f"{x:.3f}" for x in own), f"{own.idxmin():g}"]
        for name, own in losses.iterrows()
    ]
    return table(["", *(f"{rate:g}" for rate in losses.columns), "best"], rows)


def figures(evidence: Evidence, measure: str) -> str:
    """Return the figures of a measure, a row a checkpoint."""
    rows = [
        [name, *cells(found.result.summary, measure)]
        for name, found in evidence.of(measure).items()
    ]
    if not rows:
        return f"No results of `{measure}`."
    columns = zip(["", *headings(measure)], *rows, strict=True)
    header, *lines = zip(*(column for column in columns if any(column[1:])), strict=True)
    return table(header, lines)


def blimp(evidence: Evidence) -> str:
    """Return the shares of each set of BLiMP, a column a checkpoint; empty without results."""
    columns = {name: found.result.summary for name, found in evidence.of("blimp").items()}
    if not columns:
        return ""
    rows = [
        [
            "**mean**" if name == "mean" else name.replace("_", " "),
            *(own[name].shown(1, 100.0) if name in own else "" for own in columns.values()),
        ]
        for name in next(iter(columns.values()))
    ]
    return table(["", *columns], rows)


def by_length(evidence: Evidence, measure: str) -> str:
    """Return the figures of a measure, a row a checkpoint, factor of theta and length."""
    rows = []
    for name in evidence.names:
        for factor in evidence.factors(measure):
            if (found := evidence.of(measure, factor).get(name)) is None:
                continue
            for m in multiples(found.key["settings"]["multiple"]):
                own = cells(found.result.summary, measure, m)
                if any(own):
                    rows.append([name, f"x{factor:g}", f"{m}x = {m * found.context}", *own])
    if not rows:
        return f"No results of `{measure}`."
    return table(["", "theta", "length, tokens", *headings(measure)], rows)


def budgets(tokens: Sequence[int]) -> str:
    """Return the tokens that each layer keeps; those of a deep model in short if they are equal."""
    if len(tokens) > 8 and len(set(tokens)) == 1:
        return f"{tokens[0]} in each of {len(tokens)}"
    return ", ".join(map(str, tokens))


def changed(evidence: Evidence, name: str) -> str:
    """Return what differs between a converted model and its original."""
    rows = []
    for one in changes(evidence, name):
        shown = [each.shown(one.digits) for each in (*one.values, one.change)]
        rows.append([one.what, *shown, f"**{one.verdict}**"])
    header = ["", evidence.control, name, "change [95 % interval]", "verdict"]
    return table(header, rows) if rows else "Nothing was measured of both."


def targets(found: Found) -> str:
    """Return the budgets that a search found."""
    rows = [
        [
            target.name,
            f"{target.max_loss:.4f}",
            budgets(target.budgets) if target.reached else "not reached",
            f"{found.factor(target.budgets):.1f}" if target.reached else "",
        ]
        for target in found.targets
    ]
    return table(["target", "nats at most", "tokens by layer", "less memory, times"], rows, 3)


def evictions(found: Found) -> str:
    """Return perplexity and memory of every way of evicting."""
    header = ["", "eviction", "budgets", "tokens a layer", "less memory, times", "perplexity"]
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
    if found.allowance is not None:
        header.append(f"nats over {found.about['reference']}")
    return table(header, rows, 3)


def swapped_windows(measured: pd.DataFrame | None) -> int:
    """Return how many windows the swapped models were measured on; 0 without the baseline's."""
    if measured is None or BASELINE not in set(measured["model"]):
        return 0
    return len(measured.drop_duplicates(["text", "start"]))


def swapped_length(measured: pd.DataFrame) -> int:
    """Return the tokens that the baseline was trained on."""
    return int(measured.set_index("model").loc[[BASELINE], "train_length"].iloc[0])


def swapping(measured: pd.DataFrame) -> str:
    """Return the loss of SmolLM2-135M by position in long texts, softmax swapped for SSMax."""
    rows = octaves(measured)
    rows = rows[rows["octave"] >= swapped_length(measured) // 8]
    summary = against(rows, "octave", BASELINE).set_index(["model", "octave"])
    columns = sorted(rows["octave"].unique())
    lines = []
    for model, about in measured.drop_duplicates("model").set_index("model").iterrows():
        found = [summary.loc[(model, octave)] for octave in columns]
        own = [
            f"{row.loss:.3f}" + ("" if model == BASELINE else f" ({row.change:+.3f})")
            for row in found
        ]
        lines.append([str(model), f"{about.rope_theta:g}", str(about.finetuning or "no"), *own])
    heads = [f"{1 if octave == FIRST_BIN else octave // 2 + 1} to {octave}" for octave in columns]
    return table(["", "theta", "fine-tuning", *heads], lines, 3)


def engines(evidence: Evidence) -> str:
    """Return by how much the engines differ where both measured the same; empty without that."""
    rows = []
    for (name, measure, factor, engine), stored in sorted(evidence.results.items()):
        other = evidence.results.get((name, measure, factor, "transformers"))
        if engine == "transformers" or other is None or other.key != stored.key:
            continue
        pairs = [
            (stored.result.summary[key].value, estimate.value)
            for key, estimate in other.result.summary.items()
        ]
        worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
        rows.append([name, measure, f"x{factor:g}", str(len(pairs)), f"{worst:.1e}"])
    header = ["", "measure", "theta", "figures", "largest difference"]
    return table(header, rows, left=3) if rows else ""


def checkpoints(evidence: Evidence) -> str:
    """Return the checkpoints' hashes, and how long they were measured."""
    rows = []
    for name in evidence.names:
        if own := [stored for stored in evidence.results.values() if stored.checkpoint == name]:
            hashes = sorted({str(stored.key["checkpoint"]) for stored in own})
            minutes = sum(stored.seconds for stored in own) / 60
            rows.append(
                [name, ", ".join(hashes), str(max(one.context for one in own)), f"{minutes:.0f}"]
            )
    return table(["", "hash of the checkpoint", "training length", "minutes"], rows)
