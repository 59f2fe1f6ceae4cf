"""Which layers can do with few bits? One layer at a time, then a width for each within a budget.

    python -m quant.sensitivity checkpoints/softpick --budget 1200000

Divergences of single layers are measured on one text; the frontier of mixed widths, and the uniform
widths beside it, on another. Where no text is named, the unquantized checkpoint writes both.
Calibrated schemes see the unquantized model's inputs in every layer, so that each layer's weights
are the same in any mixture. What has been measured is in JOURNAL.jsonl under --out, and is not
measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from attn_kernels import VariantError
from attnserve import machine
from attnserve.errors import UserError
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.scorers import load
from attnserve.options import positive
from attnserve.reports import table
from quant.measure import NUMERICS
from quant.mixed import Price, Prices, Widths, path, total, within
from quant.model import empty_model, linears, put
from quant.options import add_text_options, columns_of_group, sources_of
from quant.samples import Samples, Subject
from quant.schemes.hessian import watched
from quant.schemes.registry import SCHEMES, Scheme, get_scheme
from quant.store import OUT
from quant.store import put as put_file
from quant.texts import calibration_text, explained, fingerprint, held_out_texts
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec

POINTS = 9
"""Of the frontier, at even distances in bytes, both ends included."""

Quantized = dict[str, dict[int, QuantizedWeight]]


def quantize_all(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    scheme: Scheme,
    specs: Sequence[QuantSpec],
    texts: Tensor,
) -> Quantized:
    """Every layer at every width."""
    hessians: dict[str, Tensor] = {}
    if scheme.calibrated:
        with torch.inference_mode(), watched(layers) as hessians:
            for text in texts:
                model(input_ids=text[None], use_cache=False)
    return {
        name: {spec.bits: scheme(layer.weight.data, spec, hessians.get(name)) for spec in specs}
        for name, layer in tqdm(layers.items(), desc="quantize", unit="layer")
    }


class Divergence:
    """KL divergence of a changed model from what it was, on texts `[sequences, tokens]`."""

    def __init__(self, model: PreTrainedModel, texts: Tensor) -> None:
        self.model, self.texts = model, texts
        self.reference = [self._logprobs(text) for text in texts]

    def __call__(self) -> list[float]:
        """Mean over tokens of each sequence, in nats."""
        found = []
        for text, reference in zip(self.texts, self.reference, strict=True):
            each = reference.exp() * (reference - self._logprobs(text))
            found.append(float(each.sum(-1).mean()))
        return found

    @torch.inference_mode()
    def _logprobs(self, text: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=text[None], use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


class Journal:
    """Measured values by name, a JSON line each, after a line that says what they depend on.

    Raises:
        UserError: the file has values of something else.
    """

    def __init__(self, file: Path, key: dict[str, Any], force: bool) -> None:
        self.file, self.values = file, dict[str, list[float]]()
        lines = [] if force or not file.exists() else file.read_text().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if whole and whole[0] != key:
            differing = ", ".join(name for name in key if key[name] != whole[0].get(name))
            raise UserError(
                f"{file} has values that differ in {differing}: --force measures again, --out DIR "
                "writes elsewhere"
            )
        for name, value in whole[1:]:
            self.values[name] = value
        # A line that a kill cut short is left out.
        texts = [key, *self.values.items()]
        put_file(file, "".join(json.dumps(text) + "\n" for text in texts))

    def add(self, name: str, value: list[float]) -> None:
        """Keep a value."""
        self.values[name] = value
        with self.file.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")


class Mixtures:
    """A model whose layers can each be set to a width, with what that costs."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], quantized: Quantized
    ) -> None:
        self.layers, self.quantized = layers, quantized
        self.original = {name: layer.weight for name, layer in layers.items()}

    def set(self, widths: Widths) -> None:
        """These layers quantized, all others not."""
        for name, layer in self.layers.items():
            if name in widths:
                put(layer, self.quantized[name][widths[name]])
            elif layer.weight is not self.original[name]:
                layer.weight = self.original[name]

    def measure(
        self, journal: Journal, divergence: Divergence, label: str, wanted: dict[str, Widths]
    ) -> dict[str, list[float]]:
        """The divergence of each choice of widths, a value a sequence."""
        found = {}
        for name, widths in tqdm(wanted.items(), desc=label):
            # A digit a layer: a step of another path may have the same bytes.
            entry = f"{label} " + "".join(str(widths.get(layer, "-")) for layer in self.layers)
            if entry not in journal.values:
                self.set(widths)
                journal.add(entry, divergence())
            found[name] = journal.values[entry]
        self.set({})
        return found


def frontier(prices: Prices) -> list[Widths]:
    """Some steps of the greedy path, at even distances in bytes."""
    steps = path(prices)
    sizes = [total(prices, widths) for widths in steps]
    chosen = []
    for point in range(POINTS):
        wanted = sizes[0] + (sizes[-1] - sizes[0]) * point / (POINTS - 1)
        chosen.append(min(range(len(steps)), key=lambda step: abs(sizes[step] - wanted)))
    return [steps[step] for step in sorted(set(chosen))]


@dataclasses.dataclass(frozen=True)
class Point:
    """A choice of widths, measured.

    Args:
        kind: `uniform`, `mixed` or `budget`.
        widths: by layer.
        size: bytes of the quantized layers.
        bits: mean stored bits of a weight.
        divergence: nats per token.
    """

    kind: str
    widths: Widths
    size: int
    bits: float
    divergence: Estimate


def plot(title: str, prices: Prices, points: Sequence[Point], file: Path) -> None:
    """The layers' divergences, and the frontier beside the uniform widths."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for bits in next(iter(prices.values())):
            left.plot([own[bits].divergence for own in prices.values()], label=f"{bits} bits")
        left.set(yscale="log", xlabel="linear layer", ylabel="KL with only this one, nats")
        for kind, style in (("uniform", "s"), ("mixed", ".-"), ("budget", "*")):
            own = sorted((p for p in points if p.kind == kind), key=lambda p: p.size)
            if own:
                values = [p.divergence.value for p in own]
                right.plot([p.size / 1e6 for p in own], values, style, label=kind)
        right.set(yscale="log", xlabel="MB of the quantized layers", ylabel="KL, nats")
        left.legend()
        right.legend()
        figure.suptitle(title)
        figure.savefig(file, dpi=110, metadata={"Software": None})


def analyze(options: argparse.Namespace) -> dict[str, Any]:
    """Everything for one checkpoint, printed and written; returns the summary.

    Raises:
        UserError, ValueError, OSError, VariantError: something will not do.
    """
    for bits in options.bits:
        if bits not in BITS:
            raise UserError(f"{bits} bits: use {BITS[0]} to {BITS[-1]}")
    scheme = get_scheme(options.scheme)
    specs = [
        QuantSpec(bits, options.group, options.symmetric) for bits in sorted(set(options.bits))
    ]
    checkpoint = Subject(options.checkpoint, options.length)
    planned = linears(empty_model(options.checkpoint), options.lm_head)
    for spec in specs:
        scheme.check(spec, {layer.in_features for layer in planned.values()})
    sources = sources_of(options, [options.checkpoint])[options.checkpoint]
    held_out = held_out_texts(sources, checkpoint, options.sequences)
    calibration = calibration_text(sources, checkpoint, options.calibration, options.seed)
    titles = {"measured": held_out[1].title, "calibration": calibration.title}
    chosen_on, measured_on = (text.rows(checkpoint.bos) for text in held_out)
    print(f"Chosen on: {held_out[0].title}. {explained(**titles)}")
    model = load(options.checkpoint)
    layers = linears(model, options.lm_head)
    key = {
        "checkpoint": checkpoint.digest,
        "texts": fingerprint([*held_out, calibration]),
        "numerics": NUMERICS,
    }
    settings = ("scheme", "group", "symmetric", "lm_head", "sequences", "length", "calibration")
    key |= {name: getattr(options, name) for name in (*settings, "seed")}
    name = f"{checkpoint.name}-{scheme.name}-g{options.group or 'channel'}"
    journal = Journal(options.out / f"{name}.jsonl", key, options.force)
    quantized = quantize_all(model, layers, scheme, specs, calibration.rows(checkpoint.bos))
    mixtures = Mixtures(model, layers, quantized)
    choose = Divergence(model, chosen_on)
    single = {f"{layer} {spec.bits}": {layer: spec.bits} for layer in layers for spec in specs}
    measured = mixtures.measure(journal, choose, "layers", single)
    prices: Prices = {
        layer: {
            bits: Price(float(np.mean(measured[f"{layer} {bits}"])), weight.packed_bytes)
            for bits, weight in own.items()
        }
        for layer, own in quantized.items()
    }
    wanted = {f"uniform {spec.bits}": dict.fromkeys(layers, spec.bits) for spec in specs}
    # Beside each uniform width, what mixing gives in no more bytes.
    same = [within(prices, total(prices, widths)) for widths in wanted.values()]
    chosen = sorted((*frontier(prices), *same), key=lambda widths: -total(prices, widths))
    wanted |= {f"mixed {total(prices, widths)}": widths for widths in chosen}
    if options.budget is not None:
        wanted[f"budget {options.budget}"] = within(prices, options.budget)
    report = Divergence(model, measured_on)
    found = mixtures.measure(journal, report, "mixtures", wanted)
    numbers = sum(layer.weight.numel() for layer in layers.values())
    points = []
    for label, widths in wanted.items():
        size = total(prices, widths)
        kind = label.partition(" ")[0]
        points.append(Point(kind, widths, size, 8 * size / numbers, mean_interval(found[label])))
    title = f"{checkpoint.name}, measured on: {titles['measured']}"
    plot(title, prices, points, options.out / f"{name}.png")
    print(tables(prices, points))
    summary = {
        "checkpoint": checkpoint.name,
        "key": key,
        "texts": titles | {"chosen": held_out[0].title},
        "machine": machine.summary(),
        "layers": {
            layer: {bits: dataclasses.astuple(price) for bits, price in own.items()}
            for layer, own in prices.items()
        },
        "points": [
            dataclasses.asdict(point) | {"divergence": point.divergence.json()} for point in points
        ],
    }
    put_file(options.out / f"{name}.json", json.dumps(summary, indent=1) + "\n")
    return {
        "out": str(options.out / f"{name}.json"),
        "plot": str(options.out / f"{name}.png"),
        "points": [[p.kind, p.size, round(p.bits, 3), *p.divergence.json()] for p in points],
    }


def tables(prices: Prices, points: Sequence[Point]) -> str:
    """The layers' divergences, and the choices of widths, with 95 % intervals."""
    widths = list(next(iter(prices.values())))
    rows = [
        [layer, *(f"{own[bits].divergence:.6f}" for bits in widths)]
        for layer, own in prices.items()
    ]
    single = table(["KL of one layer, nats", *(f"{bits} bits" for bits in widths)], rows)
    lines = [
        [p.kind, f"{p.bits:.3f}", f"{p.size}", p.divergence.shown(5)]
        for p in sorted(points, key=lambda p: p.size)
    ]
    return f"{single}\n\n{table(['', 'bits/weight', 'bytes', 'KL, nats'], lines)}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    samples = Samples()
    parser = argparse.ArgumentParser(
        prog="python -m quant.sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a Hugging Face folder")
    add("--bits", nargs="+", type=int, default=[2, 3, 4, 8], help="widths (default: 2 3 4 8)")
    add("--scheme", default="gptq", help=f"one of {', '.join(SCHEMES)} (default: %(default)s)")
    add(
        "--group",
        type=columns_of_group,
        default=64,
        help="columns, or channel (default: %(default)s)",
    )
    add("--symmetric", action="store_true", help="no zero points (default: with)")
    add("--lm-head", action="store_true", help="the head too")
    add("--budget", type=positive, help="bytes of the quantized layers (default: none)")
    add("--sequences", type=positive, default=8, help="of each text (default: %(default)s)")
    add(
        "--length",
        type=positive,
        default=samples.length,
        help="tokens of a sequence; the training length at most (default: %(default)s)",
    )
    add(
        "--calibration",
        type=positive,
        default=samples.calibration,
        help="sequences to calibrate on (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the calibration text (default: %(default)s)")
    add_text_options(parser)
    add("--out", type=Path, default=OUT / "sensitivity", help="folder (default: %(default)s)")
    add("--force", action="store_true", help="measure again what is there")
    options = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        summary = analyze(options)
    except (UserError, ValueError, OSError, VariantError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
