"""Shapes, variants and inputs that the tests of this folder share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attn_kernels import Variant, get_variant, reference, selectable_mask, variant_names
from tests.attn_kernels import paper_formulas

# Parameters to try beside the defaults.
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in variant_names()),
    ("softpick", {"eps": 0.25}),
    ("ssmax", {"scale": 0.43}),
    ("ssmax", {"bias": True}),
    ("ssmax", {"scale": 0.168, "bias": True}),
    ("lssar", {"power": 3.0}),
    ("sigmoid", {"bias": -1.5}),
]
CONFIGURATION_IDS = ["-".join([n, *(f"{k}={v}" for k, v in p.items())]) for n, p in CONFIGURATIONS]
VARIANTS = [get_variant(name, **parameters) for name, parameters in CONFIGURATIONS]


def with_file(file: str) -> list[str]:
    """Return the variants whose folder has this file: a kernel is tested where there is one."""
    return [name for name in variant_names() if (get_variant(name).folder() / file).exists()]


CPU_KERNELS, GPU_KERNELS = with_file("kernel.hpp"), with_file("kernel.py")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A chunk of queries `start:stop` of a sequence of `length` keys."""

    heads: int
    kv_heads: int
    start: int
    stop: int
    length: int
    head_size: int
    value_size: int
    window: int | None = None

    def __str__(self) -> str:
        return (
            f"h{self.heads}kv{self.kv_heads}_q{self.start}to{self.stop}of{self.length}"
            f"_d{self.head_size}v{self.value_size}_w{self.window}"
        )


SHAPES = [
    Shape(1, 1, 0, 1, 1, 4, 4),
    Shape(1, 1, 0, 9, 9, 1, 1),
    Shape(2, 2, 0, 5, 5, 4, 4),
    Shape(4, 2, 0, 13, 13, 8, 8),
    Shape(6, 1, 0, 7, 7, 3, 5),
    Shape(3, 3, 0, 12, 12, 5, 2, window=1),
    Shape(4, 2, 0, 11, 11, 4, 4, window=3),
    Shape(6, 3, 0, 17, 17, 2, 3, window=7),
    Shape(4, 1, 0, 6, 6, 4, 4, window=40),
    Shape(4, 2, 9, 13, 13, 8, 8),
    Shape(2, 1, 16, 17, 17, 16, 4),
    Shape(4, 2, 3, 7, 13, 4, 4),
    Shape(2, 2, 10, 15, 19, 4, 4, window=3),
    Shape(8, 2, 14, 15, 15, 4, 4, window=5),
]


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A whole sequence: q `[heads, length, d]`, k and v `[kv_heads, length, ...]`, float64; gates
    `[heads, length]` of a gated variant."""

    q: Tensor
    k: Tensor
    v: Tensor
    learned: dict[str, Tensor]
    gates: Tensor | None = None

    def given(self, keys: slice = slice(None)) -> dict[str, Any]:
        """Return what `attend` and the reference are given of these keys, beside q, k and v."""
        gates = None if self.gates is None else self.gates[..., keys]
        return {"learned": self.learned, "gates": gates}

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make_inputs(variant: Variant, shape: Shape, seed: int = 0, spread: float = 1.0) -> Inputs:
    """Return normal random inputs; `spread` multiplies the queries and so the raw scores."""
    g = seeded(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    return Inputs(
        normal(shape.heads, shape.length, shape.head_size) * spread,
        normal(shape.kv_heads, shape.length, shape.head_size),
        normal(shape.kv_heads, shape.length, shape.value_size),
        make_learned(variant, shape.heads, g),
        make_gates(variant, shape.heads, shape.length, g),
    )


def make_learned(variant: Variant, heads: int, g: torch.Generator) -> dict[str, Tensor]:
    """Return a tensor for each one that the variant learns, different in every head."""
    return {
        name: torch.rand(heads, generator=g, dtype=torch.float64) + 0.2 for name in variant.learned
    }


def make_gates(variant: Variant, heads: int, length: int, g: torch.Generator) -> Tensor | None:
    """Return gates `[heads, length]` of a gated variant: some near 0, some far below."""
    if not variant.gated:
        return None
    return variant.gate(torch.randn(heads, length, generator=g, dtype=torch.float64) * 3 + 1)


def make_given(variant: Variant, heads: int, length: int, seed: int) -> dict[str, Any]:
    """Return what `attend` and the reference are given beside queries, keys and values."""
    g = seeded(seed)
    learned = make_learned(variant, heads, g)
    return {"learned": learned, "gates": make_gates(variant, heads, length, g)}


def by_paper_formula(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: range | None = None,
    scale: float | None = None,
    window: int | None = None,
    learned: Mapping[str, Tensor] | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(weights, outputs)` of the paper formula for whole sequences of queries, keys and values."""
    weights, outputs = paper_formulas.attention(
        variant.name,
        dataclasses.asdict(variant),
        q.tolist(),
        k.tolist(),
        v.tolist(),
        rows=range(q.shape[-2]) if rows is None else rows,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        learned={name: tensor.tolist() for name, tensor in (learned or {}).items()},
        gates=None if gates is None else gates.tolist(),
    )
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(outputs, dtype=torch.float64)


def causal(length: int) -> Tensor:
    """Return the plain causal mask `[length, length]`."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def penalties(
    variant: Variant, q: Tensor, k: Tensor, scale: float, window: int | None = None
) -> Tensor | None:
    """Return what a stateful variant subtracts for a whole sequence, `[..., length, length]`."""
    if not variant.stateful:
        return None
    positions = torch.arange(q.shape[-2])
    zero = q.new_zeros((*q.shape[:-3], q.shape[-2]))
    return variant.select(q, k, selectable_mask(positions, positions, window), scale, zero)[0]


def decode(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention one token at a time, each against the keys before it and its own.

    Shapes are those of `reference.attention`, with as many queries as keys; `options` are its
    `window`, `scale` and `learned`.
    """
    state: Tensor | None = None
    outputs = []
    for i in range(q.shape[-2]):
        output, state = reference.attention(
            variant,
            q[..., i : i + 1, :],
            k[..., : i + 1, :],
            v[..., : i + 1, :],
            state=state,
            gates=None if gates is None else gates[..., : i + 1],
            **options,
        )
        outputs.append(output)
    return torch.cat(outputs, -2), state
