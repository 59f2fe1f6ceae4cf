"""The section on quantization of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnserve.evaluation.intervals import Estimate
from attnserve.reports import table
from quant import store
from quant.config import QuantConfig
from quant.report import explain, frontier, paper
from quant.report.frame import setting, shown, text_of
from quant.report.plots import draw
from quant.scorer import CHANGES, DIVERGENCES
from quant.store import Stored

METRICS = {
    "test KL": "KL divergence to the unquantized model, nats per token",
    "test loss change": "Perplexity, as a multiple of the unquantized model's",
    "test top-1": "Tokens with the same likeliest token as the unquantized model, %",
}
SPREAD = ("weights", "gptq", 64)
"""Target, scheme and group size of the configs whose spread over tokens is shown; all are
in `configs.csv`."""


def write_section(folder: Path, figures: Path, plot_folder: str) -> str:
    """Draw the plots and return the section; a line that says so if there are no results.

    Args:
        folder: of results (`quant.store`), with those of `quant.sensitivity` in `sensitivity/`.
        figures: folder for the PNG files.
        plot_folder: the same, as seen from the document.

    Raises:
        ValueError: a file of results is none.
    """
    if not any(folder.glob("configs/*/*.json")):
        return "## Quantization\n\nNot measured: `python -m quant.sweep checkpoints/*`."
    results, mixed = store.read_all(folder), frontier.read_all(folder)
    plots = draw(results, figures, mixed, prefix="quantization-")
    return section(results, [path.stem for path in plots.values()], plot_folder, mixed)


def section(
    results: Sequence[Stored],
    plots: Sequence[str] = (),
    plot_folder: str = "",
    mixed: Sequence[frontier.Frontier] = (),
) -> str:
    """Markdown from the results of a sweep.

    Args:
        results: what `quant.store.read_all` gives.
        plots: names of the PNG files that were drawn.
        plot_folder: where they lie, as seen from the document.
        mixed: what `quant.sensitivity` found.
    """
    images = [f"![{name}]({plot_folder}/{name}.png)" for name in plots]
    parts = [
        "## Quantization",
        "Weights, inputs of linear layers and the cache on specs of few bits, computed in float32 "
        "(`python -m quant.sweep`; docs/QUANT.md). Embeddings and the tied head stay as they are. "
        "95 % intervals are over texts; changes are against the unquantized model on the same "
        "texts. Each variant was trained once.",
        "### Softmax against softpick, as in the softpick paper\n\n" + against_the_paper(results),
        *(
            f"### {title}, {text_of(results)}\n\n{by_variant(results, metric)}"
            for metric, title in METRICS.items()
        ),
        "### Spread over tokens\n\n" + spread(results),
        *images,
        "### Do outliers explain it?\n\n" + outliers(results),
        "### A width for each layer\n\n" + frontier.text(mixed),
        provenance(results),
    ]
    return "\n\n".join(parts)


def against_the_paper(results: Sequence[Stored]) -> str:
    """The paper's rows beside ours."""
    rows = []
    for row in paper.ROWS:
        pairs = [paper.find(results, variant, row) for variant in ("softmax", "softpick")]
        cells = [row.name, arrow(row.wikitext, 2), arrow(row.lambada, 2) if row.lambada else ""]
        for figure in ("perplexity: test per token", "perplexity: wikitext2 per word"):
            values = [s.summary[figure].value for s in pairs if s and figure in s.summary]
            cells.append(arrow(values, 2) if len(values) == 2 else "not measured")
        ours = paper.our_advantage(results, row, "test") if row.scheme else None
        cells.append(f"{paper.advantage(row):+.3f}" if row.scheme else "")
        cells.append(ours.shown(4) if ours else "")
        cells.append(f"**{paper.verdict(row, ours)}**" if ours else "")
        rows.append(cells)
    header = [
        "softmax -> softpick",
        "paper: Wikitext, word",
        "paper: LAMBADA, %",
        f"here: {text_of(results)}, token",
        "here: WikiText-2, word",
        "paper: softpick's advantage",
        "here",
        "the paper's sign",
    ]
    return (
        "The paper's models have 340M parameters and a context of 4096. Advantage: how much more "
        "softmax's loss rises than softpick's, in nats (the paper's per word of Wikitext, ours per "
        f"token, {text_of(results)}, in pairs). HQQ and GPTQ are this repository's, by groups; "
        "BNB-4 is bitsandbytes' NF4, BNB-8 its int8, weights only. What is not measured is not "
        "replaced by another method.\n\n" + table(header, rows)
    )


def arrow(pair: Sequence[float], digits: int) -> str:
    """`1.00 -> 2.00`."""
    return " -> ".join(f"{value:.{digits}f}" for value in pair)


def by_variant(results: Sequence[Stored], metric: str) -> str:
    """A row a config, a column a checkpoint."""

    def text(estimate: Estimate | None) -> str:
        if estimate is None or metric == "test KL":
            return shown(estimate)
        if metric == "test top-1":
            return shown(estimate, 1, 100.0)
        # Of large changes the digits behind the point say nothing.
        ratio = estimate.exp()
        return ratio.shown(4 if ratio.value < 2 else 1)

    names = list(dict.fromkeys(stored.checkpoint for stored in results))
    found = {(s.config, s.checkpoint): s.summary[metric] for s in results if metric in s.summary}
    chosen = dict.fromkeys(stored.config for stored in results if stored.config != QuantConfig())
    rows = []
    for config in sorted(chosen, key=lambda c: (c.target, setting(c), c.bits or 0)):
        cells = [found.get((config, name)) for name in names]
        rows.append([config.target, setting(config), str(config.bits), *map(text, cells)])
    return table(["target", "how", "bits", *names], rows, left=3)


def spread(results: Sequence[Stored]) -> str:
    """How far single tokens are off, as llama.cpp's perplexity tool shows it."""
    rows = []
    for stored in results:
        config, details = stored.config, stored.details
        if (
            config.target,
            config.scheme,
            config.group_size,
        ) != SPREAD or "p change over tokens" not in details:
            continue
        divergence, change = (details[f"{of} over tokens"]["test"] for of in ("KL", "p change"))
        rows.append(
            [
                stored.checkpoint,
                str(config.bits),
                *(f"{divergence[name]:.2g}" for name in DIVERGENCES),
                *(f"{100 * change[name]:+.2f}" for name in CHANGES),
                stored.summary["test p change, RMS"].shown(2, 100.0),
            ]
        )
    if not rows:
        return "Not measured."
    names = [*(f"KL, {name}" for name in DIVERGENCES), *(f"p, {name}" for name in CHANGES)]
    return (
        f"Weights alone, GPTQ, groups of 64, {text_of(results)}. KL in nats; p is the change of "
        "the right token's probability in percentage points: quantiles over tokens, and the root "
        "of its mean square.\n\n" + table(["", "bits", *names, "p, RMS"], rows)
    )


def outliers(results: Sequence[Stored]) -> str:
    """Statistics of outliers, and whether they go with the cost."""
    own = [stored for stored in results if stored.config == QuantConfig()]
    values, found = explain.statistics(own), explain.explanations(results)
    rows = [
        [stored.checkpoint, *(f"{column[place]:.2f}" for column in values.values())]
        for place, stored in enumerate(own)
    ]
    tests = [
        [e.target, e.statistic, f"{e.correlation:+.2f}", f"{e.chance:.3f}", f"**{e.verdict}**"]
        for e in found
    ]
    return (
        f"{explain.in_short(found)}\n\n"
        "Means over the linear layers of the unquantized models; kurtosis is 3 for a normal "
        "distribution.\n\n"
        + table(["", *values], rows)
        + "\n\nRank correlation, over the checkpoints, with their mean rank of divergence over all "
        "settings and widths; chance is the share of all orders of the checkpoints that give one "
        f"as high. A statistic explains it if that is below {explain.LEVEL:g}. With "
        f"{len(tests)} rows, some will be by chance alone.\n\n"
        + table(["quantized", "outliers", "correlation", "chance", ""], tests, left=2)
    )


def explanations(results: Sequence[Stored]) -> list[str]:
    """The same as sentences."""
    return [
        f"{e.target}: {e.statistic} (mean of the layers) has rank correlation {e.correlation:+.2f} "
        f"with the cost over {e.checkpoints} checkpoints, chance {e.chance:.3f}: {e.verdict}."
        for e in explain.explanations(results)
    ]


def provenance(results: Sequence[Stored]) -> str:
    """Samples, hashes and machine."""
    hashes = {stored.checkpoint: stored.key["checkpoint"] for stored in results}
    samples = sorted({str(stored.key["samples"]) for stored in results})
    minutes = sum(stored.seconds for stored in results) / 60
    machines = "; ".join(sorted({stored.machine for stored in results}))
    return (
        f"Samples: {'; '.join(samples)}. Checkpoints: "
        + ", ".join(f"{name} {value}" for name, value in hashes.items())
        + f". {len(results)} cells in {minutes:.0f} minutes of one process. On: {machines}."
    )
