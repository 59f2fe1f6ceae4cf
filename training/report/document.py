"""The text of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence

from attn_kernels import variant_names
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.perplexity import TEXTS
from attnserve.reports import Verdict, table
from training.analyze.length import multiples
from training.analyze.store import Stored
from training.report.claims import PAPERS
from training.report.evidence import Evidence
from training.report.pruning import pruning
from training.report.rules import SEED_NOISE, Finding
from training.report.swapping import swapping

RULES = f"""\
Each claim is tested by one figure, and stands in one range. The rule is the same for all:

- **{Verdict.AGREES}**: the figure's 95 % interval lies inside the range;
- **{Verdict.DISAGREES}**: it lies outside;
- **{Verdict.UNDECIDED}**: the interval crosses an end of the range, or a condition does not hold
  (softmax itself has no sinks here, say, so that nothing can be seen to go);
- **{Verdict.MISSING}**: a checkpoint or a result is not there.

Intervals are over the texts (t intervals over sequences or windows, Wilson's for shares; two models
are compared in pairs on the same texts). Each variant was trained once, so nothing here measures
what another seed would change. Where losses of two models are compared, the interval is made
{SEED_NOISE:g} nats wider on both sides for that; this number is an assumption."""


def document(
    evidence: Evidence, plots: Sequence[str], plot_folder: str, quantization: str = ""
) -> str:
    """The whole text.

    Args:
        evidence: everything measured.
        plots: names of the PNG files that were drawn.
        plot_folder: where they lie, as seen from the document.
        quantization: the section of `quant.report`.
    """

    def plot(name: str, text: str) -> str:
        return f"![{text}]({plot_folder}/{name}.png)" if name in plots else ""

    parts = [
        "<!-- Written by `python -m training.report`; do not edit by hand. -->\n# Results",
        opening(evidence),
        "## The papers' claims\n\n" + RULES,
        *claims(evidence),
        "## Training\n\n" + plot("training", "Training loss"),
        learning_rates(evidence),
        "## Held-out text",
        held_out(evidence),
        blimp(evidence),
        "## Attention maps and hidden states",
        attention(evidence),
        plot("attention", "Sink rate, kurtosis and zeros"),
        "## Beyond the training length",
        lengths(evidence),
        plot("length", "Loss against position"),
        "## Passkey",
        passkeys(evidence),
        plot("passkey", "Gain and accuracy against length"),
        "## Context pruning",
        pruning(evidence),
        plot("pruning", "Perplexity against memory"),
        "## Swapping softmax for SSMax",
        swapping(evidence.long_context),
        "## vLLM beside transformers",
        engines(evidence),
        quantization,
        "## How it was measured",
        provenance(evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def opening(evidence: Evidence) -> str:
    """What is compared, and what is not there."""
    there = ", ".join(evidence.names) or "none"
    missing = [name for name in variant_names() if name not in evidence.names]
    unmeasured = [
        name
        for name in evidence.names
        if name in evidence.curves and not any(key[0] == name for key in evidence.results)
    ]
    text = (
        "What the variants' papers claim, beside what the small reference checkpoints of this "
        "repository show. They have a few million parameters and were trained for an hour each on "
        "novels; the papers' models are 30 to 500 times larger and saw thousands of times more "
        f"text.\n\nCheckpoints: {there}."
    )
    if missing:
        text += f" Not there: {', '.join(missing)}."
    if unmeasured:
        text += f" Trained but not analyzed: {', '.join(unmeasured)}."
    return text


def claims(evidence: Evidence) -> list[str]:
    """One section a paper."""
    sections = []
    for paper in PAPERS:
        rows = []
        for claim in paper.claims:
            finding: Finding = claim.judge(evidence)
            verdict = f"**{finding.verdict}**"
            rows.append([claim.text, claim.reported, finding.ours, finding.rule, verdict])
        header = ["claim", "the paper's figure", "here [95 % interval]", "agrees if", "verdict"]
        sections.append(f"### {paper.title}\n\n{paper.setting}\n\n{table(header, rows, left=5)}")
    return sections


def learning_rates(evidence: Evidence) -> str:
    """Is one learning rate fair to every variant?"""
    rates = evidence.rates
    if rates is None or rates.empty:
        return "No table of learning rates (`python -m training.learning_rate`)."
    columns = sorted(rates["learning_rate"].unique())
    rows = []
    for name, own in rates.groupby("variant", sort=True):
        losses = {row.learning_rate: row for row in own.itertuples()}
        best = min(losses.values(), key=lambda row: row.validation_loss).learning_rate
        cells = [
            f"{losses[rate].validation_loss:.3f}" if rate in losses else "" for rate in columns
        ]
        rows.append([str(name), *cells, f"{best:g}"])
    steps = ", ".join(str(count) for count in sorted(rates["steps"].unique()))
    return (
        f"Validation loss (nats per token, standard error about "
        f"{rates['standard_error'].median():.3f}) after {steps} steps at several peak learning "
        "rates, from `python -m training.learning_rate`: is one rate fair to every variant?\n\n"
        + table(["", *(f"{rate:g}" for rate in columns), "best"], rows)
    )


def figures(evidence: Evidence, measure: str, wanted: dict[str, tuple[str, int, float]]) -> str:
    """A table of figures of a measure: `{summary's name: (heading, decimals, factor)}`."""
    rows = []
    for name in evidence.names:
        found = evidence.find(name, measure)
        if found is not None:
            cells = [
                cell(found.result.summary.get(key), digits, factor)
                for key, (_, digits, factor) in wanted.items()
            ]
            rows.append([name, *cells])
    if not rows:
        return f"No results of `{measure}`."
    return table(["", *(heading for heading, _, _ in wanted.values())], rows)


def cell(estimate: Estimate | None, digits: int, factor: float = 1.0) -> str:
    """An estimate in a table; empty if there is none."""
    return "" if estimate is None else estimate.shown(digits, factor)


def held_out(evidence: Evidence) -> str:
    """Perplexities and LAMBADA."""
    per = {
        f"{text} per {unit}": (f"{text}, {unit}", digits, 1.0)
        for text in TEXTS
        for unit, digits in (("token", 2), ("word", 0), ("byte", 3))
    }
    return (
        "Perplexity per token, word (split by white space) and byte. Validation is *Emma*, test "
        "*Great Expectations*, each from its beginning; WikiText-2 is the test text. Sequences "
        "have the training length and start anew.\n\n"
        + figures(evidence, "perplexity", per)
        + "\n\nLAMBADA, the last word of a passage:\n\n"
        + figures(
            evidence,
            "lambada",
            {
                "accuracy": ("accuracy, %", 2, 100.0),
                "perplexity per word": ("perplexity per word", 0, 1.0),
            },
        )
    )


def blimp(evidence: Evidence) -> str:
    """BLiMP, a column a checkpoint."""
    found = {name: evidence.find(name, "blimp") for name in evidence.names}
    columns = {name: stored for name, stored in found.items() if stored is not None}
    if not columns:
        return "No results of `blimp`."
    sets = list(next(iter(columns.values())).result.summary)
    rows = [
        [
            f"**{name}**" if name == "mean" else name.replace("_", " "),
            *(cell(stored.result.summary.get(name), 1, 100.0) for stored in columns.values()),
        ]
        for name in sets
    ]
    return (
        "BLiMP, % of pairs whose grammatical sentence is the more likely one (chance: 50):\n\n"
        + table(["", *columns], rows)
    )


def attention(evidence: Evidence) -> str:
    """Sinks, outliers, zeros, dead heads."""
    wanted = {
        "sink rate at 0.2": ("sink rate 0.2, %", 1, 100.0),
        "sink rate at 0.3": ("sink rate 0.3, %", 1, 100.0),
        "kurtosis": ("kurtosis", 2, 1.0),
        "kurtosis, largest of the layers": ("largest layer's", 1, 1.0),
        "largest |x|": ("largest value", 1, 1.0),
        "largest over median |x|": ("largest over median", 0, 1.0),
        "zeros": ("exact zeros, %", 1, 100.0),
        "silent": ("silent, %", 1, 100.0),
    }
    dead = [
        f"{name} {stored.result.units['dead_heads']} of {stored.result.units['heads']}"
        for name in evidence.names
        if (stored := evidence.find(name, "attention"))
    ]
    text = (
        "On sequences of the test book that start with the begin-of-text token. Sink rate: share "
        "of (layer, head) whose attention map's first column has a mean above eps. Kurtosis (3 for "
        "a normal distribution) of the residual stream over tokens and channels, mean of the "
        "layers. "
        "Zeros: share of exact zeros among the visible keys' weights, in float32. Silent: share of "
        "(layer, head, token) whose head output is exactly 0. Dead: a head whose output is shorter "
        "than 1 % of its layer's median at 99 % of all tokens.\n\n"
    )
    return (
        text
        + figures(evidence, "attention", wanted)
        + (f"\n\nDead heads: {', '.join(dead)}." if dead else "")
    )


def by_length(evidence: Evidence, measure: str, columns: dict[str, tuple[str, int, float]]) -> str:
    """A table with one row a checkpoint, factor of theta and length. `{}` in a figure's name
    stands for the length."""
    rows = []
    for name in evidence.names:
        for factor in sorted({key[2] for key in evidence.results if key[:2] == (name, measure)}):
            found = evidence.get(name, measure, factor)
            for m in multiples(found.key["settings"]["multiple"]):
                cells = [
                    cell(found.result.summary.get(key.format(m)), digits, times)
                    for key, (_, digits, times) in columns.items()
                ]
                if any(cells):
                    tokens = f"{m}x = {m * found.context}"
                    rows.append([name, f"x{factor:g}", tokens, *cells])
    if not rows:
        return f"No results of `{measure}`."
    header = ["", "theta", "length, tokens", *(heading for heading, _, _ in columns.values())]
    return table(header, rows)


def lengths(evidence: Evidence) -> str:
    """Loss by length of window."""
    columns = {
        "loss of windows of {}x": ("loss", 3, 1.0),
        "rise of windows of {}x over pieces": ("more than in pieces of 1x", 3, 1.0),
    }
    return (
        "Loss in nats per token on windows of the test book, read as one, without retraining; and "
        "how much more that is than for the same tokens in pieces of the training length. The "
        "windows of different lengths are beginnings of the same ones.\n\n"
        + by_length(evidence, "length", columns)
    )


def passkeys(evidence: Evidence) -> str:
    """Retrieval by length."""
    columns = {
        "accuracy at {}x": ("accuracy, %", 1, 100.0),
        "gain at {}x": ("gain, nats", 3, 1.0),
        "log-probability at {}x": ("log-probability, nats", 1, 1.0),
    }
    return (
        "A key of five digits at a random depth of filler text. Gain: log-probability of the key "
        "after its prompt, less that after the same prompt with another key in its place; 0 for a "
        "model that does not see the key.\n\n" + by_length(evidence, "passkey", columns)
    )


def engines(evidence: Evidence) -> str:
    """Where both engines measured the same, by how much they differ."""
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
    if not rows:
        return "Nothing was measured through both."
    return (
        "The same figures through vLLM's `prompt_logprobs`: largest difference over the figures of "
        "a measure, absolute up to 1 and relative above.\n\n"
        + table(["", "measure", "theta", "figures", "largest difference"], rows, left=3)
    )


def provenance(evidence: Evidence) -> str:
    """Commands, machine, and what the results are good for."""
    stored = list(evidence.results.values())
    if not stored:
        return "Nothing was measured: `python -m training.analyze checkpoints/*`."
    machines = sorted({s.machine for s in stored})
    rows = []
    for name in evidence.names:
        own = [s for s in stored if s.checkpoint == name]
        hashes = sorted({str(s.key["checkpoint"]) for s in own})
        if own:
            minutes = sum(s.seconds for s in own) / 60
            rows.append([name, ", ".join(hashes), str(own[0].context), f"{minutes:.0f}"])
    return (
        "`python -m training.analyze checkpoints/*`, and once more with `--rope-theta-factor 50 "
        "--measures length passkey` and with `--engine vllm`; then `python -m training.report`. "
        "They read the thirteen novels, which `attnserve books` fetches or --books names, "
        "and with --eval a folder of evaluation sets: `lambada_test.jsonl` (LAMBADA's test set), "
        "`blimp/*.jsonl` (twelve sets of BLiMP) and `wikitext2_test_raw.txt` (WikiText-2's test "
        "text, raw). Models run in float32. Sample sizes:\n\n"
        + "\n".join(f"- {line}" for line in sizes(stored))
        + "\n\n"
        + table(["", "hash of the checkpoint", "training length", "minutes"], rows)
        + "\n\nOn: "
        + "; ".join(machines)
        + "."
    )


def sizes(stored: Sequence[Stored]) -> list[str]:
    """The settings of each measure; several where they differ."""
    found: dict[str, set[str]] = {}
    for s in stored:
        settings = ", ".join(f"{name} {value}" for name, value in s.key["settings"].items())
        found.setdefault(s.measure, set()).add(settings)
    return [f"{measure}: {' or '.join(sorted(found[measure]))}" for measure in sorted(found)]
