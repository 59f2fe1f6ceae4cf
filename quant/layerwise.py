"""Measure single layers, choose bits for each of them, and measure what the choices cost."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attnserve import machine
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.scorers import load
from attnserve.evaluation.texts import Text, fingerprint
from attnserve.files import Journal, write_text
from quant.checks import check_no_experts, check_values
from quant.config import LayerSettings
from quant.divergence import Divergence
from quant.measure import NUMERICS
from quant.mixed import LayerBits, Price, Prices, spread, total, within
from quant.model import columns, empty_model, linears, put
from quant.schemes.hessian import watched
from quant.schemes.registry import get_scheme
from quant.texts import Sources, calibration_text, text_for
from quant.write import check_unquantized
from quant_kernels.weight import QuantizedWeight

CHOICES = 9  # of the greedy path that are measured, at even distances in bytes, both ends included


@dataclass(frozen=True)
class Choice:
    """Bits for each layer, measured."""

    kind: str  # `uniform`, `mixed` or `budget`
    size: int  # bytes of the quantized layers
    bits: float  # mean stored bits of a weight
    divergence: Estimate  # nats per token
    layer_bits: LayerBits  # the bits of each layer


@dataclass(frozen=True)
class Sensitivity:
    """What was found for a checkpoint."""

    checkpoint: str  # its name
    key: dict[str, Any]  # what the figures depend on
    # chosen, measured, calibration: titles of the texts that bits were chosen on, that
    # choices were measured on, and that schemes were calibrated on.
    chosen: str
    measured: str
    calibration: str
    prices: Prices  # of single layers
    choices: list[Choice]  # by kind, with the most bytes first

    @property
    def name(self) -> str:
        group_size = self.key["group_size"] or "channel"
        return f"{self.checkpoint}-{self.key['scheme']}-g{group_size}"

    def write(self, folder: Path) -> Path:
        """Write `folder/NAME.json`; return its path."""
        fields = dataclasses.asdict(self) | {"machine": machine.summary()}
        for choice, known in zip(fields["choices"], self.choices, strict=True):
            choice["divergence"] = known.divergence.json()
        write_text(folder / f"{self.name}.json", json.dumps(fields, indent=1) + "\n")
        return folder / f"{self.name}.json"


class MixedModel:
    """A model whose layers can each be set to some bits.

    Calibrated schemes see the unquantized model's inputs in every layer, so that each layer's
    weights are the same in any mixture.
    """

    def __init__(self, folder: Path, settings: LayerSettings, calibration: Text) -> None:
        self.model = load(folder)
        self.layers: Mapping[str, nn.Linear] = linears(self.model, settings.lm_head)
        self.original = {name: layer.weight for name, layer in self.layers.items()}
        scheme, hessians = get_scheme(settings.scheme), dict[str, Tensor]()
        if scheme.calibrated:
            with torch.inference_mode(), watched(self.layers) as hessians:
                for text in calibration.rows:
                    self.model(input_ids=text[None], use_cache=False)
        self.quantized: dict[str, dict[int, QuantizedWeight]] = {
            name: {
                spec.bits: scheme(
                    layer.weight.data,
                    spec,
                    hessians.get(name),
                    act_order=settings.act_order,
                    search=settings.search,
                )
                for spec in settings.specs
            }
            for name, layer in tqdm(self.layers.items(), desc="quantize", unit="layer")
        }

    def measure(self, choice: LayerBits, divergence: Divergence) -> list[float]:
        """Return the divergence with these layers quantized and all others not."""
        for name, bits in choice.items():
            put(self.layers[name], self.quantized[name][bits])
        try:
            return divergence()
        finally:
            for name in choice:
                self.layers[name].weight = self.original[name]


def analyze(
    folder: Path,
    settings: LayerSettings,
    sources: Sources,
    budget: int | None,
    out: Path,
    force: bool,
) -> Sensitivity:
    """Measure a checkpoint's layers and choices of their bits. What has been measured is in a
    journal under `out` and is not measured again."""
    scheme = get_scheme(settings.scheme)
    shapes = empty_model(folder)
    check_unquantized(folder)
    check_no_experts(folder, shapes)
    check_values(folder, shapes)
    planned = columns(shapes, settings.lm_head)
    for spec in settings.specs:
        scheme.check(spec, planned)
    checkpoint = Checkpoint(folder, longest=settings.length)
    sources = sources.for_checkpoints([folder])[folder]
    count = (sources, checkpoint, settings.sequences, checkpoint.context - 1)
    chosen, measured = text_for("validation", *count), text_for("evaluation", *count)
    calibration = calibration_text(sources, checkpoint, settings.calibration, settings.seed)
    key = {
        "checkpoint": checkpoint.digest,
        "texts": fingerprint([chosen, measured, calibration]),
        "numerics": NUMERICS,
        **{k: value for k, value in vars(settings).items() if k != "bits"},
        "group_size": settings.columns,
    }
    titles = (chosen.title, measured.title, calibration.title)
    found = Sensitivity(checkpoint.name, key, *titles, prices={}, choices=[])
    journal = Journal(out / f"{found.name}.jsonl", key, force)
    model = MixedModel(folder, settings, calibration)

    def values(what: str, choice: LayerBits, divergence: Divergence) -> list[float]:
        name = f"{what} " + "".join(str(choice.get(layer, "-")) for layer in model.layers)
        found: list[float] = journal.get(name, lambda: model.measure(choice, divergence))
        return found

    divergence = Divergence(model.model, chosen)
    prices: dict[str, dict[int, Price]] = {}
    for layer, weights in tqdm(model.quantized.items(), desc="layers"):
        prices[layer] = {
            bits: Price(
                float(np.mean(values("layers", {layer: bits}, divergence))), weight.packed_bytes
            )
            for bits, weight in weights.items()
        }
    divergence = Divergence(model.model, measured)
    numbers = sum(weight.numel() for weight in model.original.values())
    choices = []
    for kind, choice in tqdm(choices_of(prices, settings, budget), desc="mixtures"):
        size = total(prices, choice)
        estimate = mean_interval(values("mixtures", choice, divergence))
        choices.append(Choice(kind, size, 8 * size / numbers, estimate, choice))
    return dataclasses.replace(found, prices=prices, choices=choices)


def choices_of(
    prices: Prices, settings: LayerSettings, budget: int | None
) -> list[tuple[str, LayerBits]]:
    """Return the choices to measure and their kinds: uniform ones, beside each what mixing gives in
    no more bytes, some of the greedy path, and what fits into the budget."""
    uniform = [dict.fromkeys(prices, spec.bits) for spec in settings.specs]
    beside = [within(prices, total(prices, choice)) for choice in uniform]
    mixed = {total(prices, choice): choice for choice in (*spread(prices, CHOICES), *beside)}
    found = [("uniform", choice) for choice in uniform]
    found += [("mixed", mixed[size]) for size in sorted(mixed, reverse=True)]
    if budget is not None:
        found.append(("budget", within(prices, budget)))
    return found
