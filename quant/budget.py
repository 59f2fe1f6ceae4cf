"""Bits for each layer of a checkpoint within a number of bits a weight, by measured sensitivity.

Layers that vLLM fuses into one matrix (queries, keys and values; gate and up) are one unit, with
one width. Each unit alone is quantized with few bits and the divergence measured on a text. What
other widths would cost follows from the squared error of the unit's outputs on the calibration
text, which its divergence is proportional to as long as that is small. So a unit is measured
once, however many widths there are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attnserve.errors import UserError
from attnserve.evaluation.scorers import load
from attnserve.evaluation.texts import Text
from quant.divergence import Divergence
from quant.mixed import Price, within
from quant.model import linears, put
from quant.options import AUTO
from quant.schemes.hessian import layer_by_layer
from quant.schemes.registry import Scheme
from quant_kernels.weight import QuantizedWeight, QuantSpec, TwoLevelWeight

FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
REACH = 2.5  # widths are tried that are at most so many bits from the budget
MEASURED = 8  # sequences of the text


def candidates(scheme: Scheme, bits_per_weight: float, group_size: int | None) -> list[QuantSpec]:
    """Return the widths to choose from; `AUTO` is the scheme's own group size, and of two-level
    scales others beside it."""
    sizes = {2: (16, 32, 64), 3: (16, 32)} if scheme.two_level else {}

    def of_bits(bits: int) -> tuple[int | None, ...]:
        own = (scheme.group_size(bits),)
        return sizes.get(bits, own) if group_size == AUTO else (group_size,)

    return [
        QuantSpec(bits, size)
        for bits in scheme.bits
        if abs(bits - bits_per_weight) <= REACH
        for size in of_bits(bits)
    ]


def check_reach(
    scheme: Scheme, specs: Sequence[QuantSpec], bits_per_weight: float, model: nn.Module
) -> None:
    """Check before any work that a model's linear layers fit into a number of bits a weight.

    Raises:
        UserError: not even the fewest bits fit.
    """
    layers = linears(model).values()
    numbers = sum(layer.weight.numel() for layer in layers)
    least = min(sum(packed_bytes(scheme, spec, layer) for layer in layers) for spec in specs)
    if least > int(bits_per_weight * numbers / 8):
        possible = math.ceil(800 * least / numbers) / 100
        raise UserError(f"--bits-per-weight {bits_per_weight}: the least possible is {possible}")


def packed_bytes(scheme: Scheme, spec: QuantSpec, layer: nn.Linear) -> int:
    """Return the bytes of a layer's weight once it is quantized, by its shape alone."""
    rows, columns = layer.weight.shape
    groups = spec.groups(columns)
    meta = partial(torch.empty, device="meta")
    values, of_groups = meta(rows, columns), meta(rows, groups, dtype=torch.uint8)
    if scheme.two_level:
        row_scales = meta(rows, 1, dtype=torch.bfloat16)
        return TwoLevelWeight(values, row_scales, None, spec, levels=of_groups).packed_bytes
    return QuantizedWeight(values, of_groups.bfloat16(), of_groups, spec).packed_bytes


def units_of(layers: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of layers that have one width, by the name of the first of them."""
    found: dict[tuple[str, object], list[str]] = {}
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        fused = next((place for place, names in enumerate(FUSED) if name in names), name)
        found.setdefault((parent, fused), []).append(layer)
    return {names[0]: names for names in found.values()}


def spend(
    folder: Path,
    scheme: Scheme,
    options: Mapping[str, bool],
    specs: Sequence[QuantSpec],
    bits_per_weight: float,
    calibration: Text,
    measured: Text,
) -> dict[str, QuantSpec]:
    """Return how each linear layer is to be quantized.

    Args:
        folder: the checkpoint.
        scheme, options: how layers are quantized.
        specs: the widths to choose from.
        bits_per_weight: of all linear layers together, scales and zero points included.
        calibration: text that the scheme is calibrated on.
        measured: another one, that divergences are measured on.

    Raises:
        UserError: not even the fewest bits fit.
    """
    return choose(
        sensitivities(folder, scheme, options, specs, calibration, measured), specs, bits_per_weight
    )


@dataclass(frozen=True)
class Unit:
    """Layers with one width, and what each width costs."""

    layers: list[str]
    numbers: int  # weights
    prices: dict[QuantSpec, Price]


def sensitivities(
    folder: Path,
    scheme: Scheme,
    options: Mapping[str, bool],
    specs: Sequence[QuantSpec],
    calibration: Text,
    measured: Text,
) -> list[Unit]:
    """Return what each width costs in each unit. The arguments are those of `spend`."""
    model = load(folder)
    layers = linears(model)
    errors: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    probes: dict[str, QuantizedWeight] = {}
    with tqdm(total=len(layers), desc="quantize", unit="layer") as bar:

        def try_all(name: str, hessian: Tensor) -> None:
            weight = layers[name].weight.data
            made = [scheme(weight, spec, hessian, **options) for spec in specs]
            errors[name] = [output_error(weight, each, hessian) for each in made]
            sizes[name] = [each.packed_bytes for each in made]
            probes[name] = made[0]
            bar.update()

        layer_by_layer(model, layers, calibration.rows, try_all)
    divergence = Divergence(model, measured)
    found = []
    for names in tqdm(units_of(list(layers)).values(), desc="measure", unit="unit"):
        cost = measure({name: (layers[name], probes[name]) for name in names}, divergence)
        error, size = (np.sum([of[name] for name in names], axis=0) for of in (errors, sizes))
        ratios = error / max(error[0], 1e-30)
        prices = {
            spec: Price(cost * float(ratio), int(total))
            for spec, ratio, total in zip(specs, ratios, size, strict=True)
        }
        found.append(Unit(names, sum(layers[name].weight.numel() for name in names), prices))
    return found


def choose(
    units: Sequence[Unit], specs: Sequence[QuantSpec], bits_per_weight: float
) -> dict[str, QuantSpec]:
    """Return one of the widths for each layer, so that all together cost little and fit."""

    def size(spec: QuantSpec) -> int:
        return sum(unit.prices[spec].size for unit in units)

    order = sorted(specs, key=size)
    prices = {
        unit.layers[0]: {rank: unit.prices[spec] for rank, spec in enumerate(order)}
        for unit in units
    }
    chosen = within(prices, int(bits_per_weight * sum(unit.numbers for unit in units) / 8))
    return {name: order[chosen[unit.layers[0]]] for unit in units for name in unit.layers}


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Return the squared error of a layer's outputs on what its Hessian is of, over all rows."""
    error = quantized.dequantize() - weight
    return float((error @ hessian * error).sum())


def measure(
    layers: Mapping[str, tuple[nn.Linear, QuantizedWeight]], divergence: Divergence
) -> float:
    """Return the mean divergence with only these layers quantized, in nats a token."""
    before = {name: layer.weight for name, (layer, _) in layers.items()}
    for layer, quantized in layers.values():
        put(layer, quantized)
    try:
        return float(torch.tensor(divergence()).mean())
    finally:
        for name, (layer, _) in layers.items():
            layer.weight = before[name]
