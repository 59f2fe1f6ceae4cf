"""A width for each layer: the least divergence for a number of bytes, greedily.

All layers start at the largest width. Again and again the step is taken that costs the least
divergence for a byte saved: one layer to any smaller width. What a step costs is the divergence
that was measured with only that layer quantized, as if divergences added up; what a choice of
widths really costs is measured afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Price:
    """One layer at one width.

    Args:
        divergence: nats per token with only this layer quantized.
        size: bytes of the layer, packed.
    """

    divergence: float
    size: int


Prices = Mapping[str, Mapping[int, Price]]
"""By layer and width."""
Widths = dict[str, int]


def total(prices: Prices, widths: Widths) -> int:
    """Bytes of all layers."""
    return sum(prices[layer][bits].size for layer, bits in widths.items())


def path(prices: Prices) -> list[Widths]:
    """The widths after each step, from the largest width everywhere to the smallest; each is
    smaller in bytes than the one before."""
    widths = {layer: max(own) for layer, own in prices.items()}
    found = [dict(widths)]
    while True:
        best: tuple[float, str, int] | None = None
        for layer, now in widths.items():
            own = prices[layer]
            for bits, price in own.items():
                saved = own[now].size - price.size
                if bits >= now or saved <= 0:
                    continue
                rate = (price.divergence - own[now].divergence) / saved
                if best is None or (rate, layer, bits) < best:
                    best = (rate, layer, bits)
        if best is None:
            return found
        widths[best[1]] = best[2]
        found.append(dict(widths))


def within(prices: Prices, budget: int) -> Widths:
    """The first widths of the path that fit.

    Raises:
        ValueError: not even the smallest do.
    """
    steps = path(prices)
    for widths in steps:
        if total(prices, widths) <= budget:
            return widths
    least = total(prices, steps[-1])
    raise ValueError(f"a budget of {budget} bytes is too small: the least possible is {least}")
