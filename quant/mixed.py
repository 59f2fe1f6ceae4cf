"""Bits for each layer: the least divergence for a number of bytes, greedily.

All layers start at the most bits. Again and again the step is taken that costs the least divergence
for a byte saved: one layer to fewer bits. What a step costs is the divergence that was measured
with only that layer quantized, as if divergences added up; what a choice of bits really costs is
measured afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from attnserve.errors import UserError


@dataclass(frozen=True)
class Price:
    """One layer with some bits."""

    divergence: float  # nats per token with only this layer quantized
    size: int  # bytes of the layer, packed


Prices = Mapping[str, Mapping[int, Price]]  # prices by layer and bits
LayerBits = dict[str, int]


def total(prices: Prices, choice: LayerBits) -> int:
    """Return the bytes of all layers."""
    return sum(prices[layer][bits].size for layer, bits in choice.items())


def path(prices: Prices) -> list[LayerBits]:
    """Return the choice after each step, from the most bits everywhere to the fewest; each is
    smaller in bytes than the one before."""
    choice = {layer: max(own) for layer, own in prices.items()}
    found = [dict(choice)]
    while steps := [
        ((price.divergence - own[now].divergence) / (own[now].size - price.size), layer, bits)
        for layer, now in choice.items()
        for own in (prices[layer],)
        for bits, price in own.items()
        if bits < now and price.size < own[now].size
    ]:
        _, layer, bits = min(steps)
        choice[layer] = bits
        found.append(dict(choice))
    return found


def within(prices: Prices, budget: int) -> LayerBits:
    """Return the first choice of the path that fits into a number of bytes."""
    steps = path(prices)
    for choice in steps:
        if total(prices, choice) <= budget:
            return choice
    least = total(prices, steps[-1])
    raise UserError(f"a budget of {budget} bytes is too small: the least possible is {least}")


def spread(prices: Prices, count: int) -> list[LayerBits]:
    """Return at most `count` choices of the path, at even distances in bytes, with both ends."""
    steps = path(prices)
    sizes = [total(prices, choice) for choice in steps]
    chosen = set()
    for place in range(count):
        wanted = sizes[0] + (sizes[-1] - sizes[0]) * place / (count - 1)
        chosen.add(min(range(len(steps)), key=lambda step: abs(sizes[step] - wanted)))
    return [steps[step] for step in sorted(chosen)]
