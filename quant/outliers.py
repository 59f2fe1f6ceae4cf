"""Outliers of weights and of the inputs of linear layers: what may explain the cost of few bits.

Quantized values must reach to the largest one, so a few outliers make the steps coarse for all.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnserve.evaluation.intervals import Estimate, mean_interval
from quant.model import observe

FIGURES = ("kurtosis", "largest over median")


def figures(values: Tensor) -> tuple[float, float]:
    """Return kurtosis (3 for a normal distribution) and `max |x| / median |x|` of all values."""
    x = values.double()
    centred = x - x.mean()
    variance = centred.pow(2).mean().clamp(min=1e-300)
    size = x.abs()
    ratio = size.max() / size.median().clamp(min=1e-30)
    return float(centred.pow(4).mean() / variance.pow(2)), float(ratio)


def weight_outliers(layers: Mapping[str, nn.Linear]) -> dict[str, list[float]]:
    """Return `figures` of each layer's weights."""
    return {name: list(figures(layer.weight.data)) for name, layer in layers.items()}


def input_outliers(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], texts: Tensor
) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Measure the outliers of the inputs of linear layers.

    Returns:
        Means over layers with an interval over texts, and each layer's means over texts.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    observe(model, layers, texts, lambda name, inputs: found[name].append(figures(inputs)))
    table = np.array(list(found.values()))  # [layers, texts, figures]
    over_layers = {"": table.mean(0), ", largest of the layers": table.max(0)}
    summary = {
        f"inputs, {figure}{which}": mean_interval(values[:, place])
        for which, values in over_layers.items()
        for place, figure in enumerate(FIGURES)
    }
    return summary, dict(zip(found, table.mean(1).round(4).tolist(), strict=True))
