"""One cell of the sweep: what of a checkpoint is quantized, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnserve.errors import UserError
from quant.schemes.registry import get_scheme
from quant_kernels.weight import BITS, Grid

PARTS = ("weights", "activations", "kv")


@dataclass(frozen=True)
class Cell:
    """Widths of what is quantized, None for what is not; all None is the unquantized model.

    Args:
        weights, activations, kv: bits of weights, of the linear layers' inputs, of the cache.
        scheme: how weights are quantized; None without weights.
        group: columns that share a scale; None: a whole row, or no weights.
        symmetric: of weights, else of the cache; activations always are.
        act_order: of `gptq`.
        lm_head: the head's weights too.
        static: activations have calibrated scales, else one a token.
    """

    weights: int | None = None
    activations: int | None = None
    kv: int | None = None
    scheme: str | None = None
    group: int | None = None
    symmetric: bool = False
    act_order: bool = False
    lm_head: bool = False
    static: bool = False

    @property
    def what(self) -> str:
        """For example `weights+kv`."""
        return "+".join(part for part in PARTS if getattr(self, part)) or "unquantized"

    @property
    def bits(self) -> int | None:
        """The width that the sweep varies: of the first part that is quantized."""
        return self.weights or self.activations or self.kv

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.what]
        if self.weights:
            parts += [f"{self.scheme}", f"w{self.weights}", f"g{self.group or 'channel'}"]
        if self.activations:
            parts.append(f"a{self.activations}" + "static" * self.static)
        if self.kv:
            parts.append(f"kv{self.kv}")
        flags = {"sym": self.symmetric, "actorder": self.act_order, "head": self.lm_head}
        return "-".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])

    @property
    def grid(self) -> Grid:
        """Of the weights."""
        assert self.weights is not None
        return Grid(self.weights, self.group, self.symmetric)

    @property
    def calibrated(self) -> bool:
        """It needs calibration texts."""
        scheme = self.scheme is not None and get_scheme(self.scheme).calibrated
        return scheme or (self.activations is not None and self.static)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Cell:
        """What `dataclasses.asdict` gave."""
        return cls(**fields)


def cells(
    whats: Sequence[str],
    schemes: Sequence[str],
    bits: Sequence[int],
    groups: Sequence[int | None],
    symmetric: bool,
    act_order: bool,
    lm_head: bool,
    static: bool,
    activation_bits: int,
    kv_bits: int,
) -> list[Cell]:
    """The cells of a sweep, each once, without the unquantized one.

    `bits` are those of the first part of a `what`; activations and the cache beside weights have
    `activation_bits` and `kv_bits`. Without weights there are no schemes and groups.

    Raises:
        UserError: a name or width that there is not.
    """
    for width in (*bits, activation_bits, kv_bits):
        if width not in BITS:
            raise UserError(f"{width} bits: use a width from {BITS[0]} to {BITS[-1]}")
    for name in schemes:
        get_scheme(name)
    found: dict[Cell, None] = {}
    for what in whats:
        parts = what.split("+")
        if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
            raise UserError(
                f"unknown --what {what!r}: use one or several of {', '.join(PARTS)}, joined by +"
            )
        for width in bits:
            cell = Cell(
                activations=activation_bits if "activations" in parts else None,
                kv=kv_bits if "kv" in parts else None,
                static=static and "activations" in parts,
                symmetric=symmetric and parts != ["activations"],
            )
            if "weights" not in parts:
                if "activations" in parts:
                    cell = dataclasses.replace(cell, activations=width)
                else:
                    cell = dataclasses.replace(cell, kv=width)
                found[cell] = None
                continue
            for scheme in schemes:
                for group in groups:
                    weights = dataclasses.replace(
                        cell,
                        weights=width,
                        scheme=scheme,
                        group=group,
                        lm_head=lm_head,
                        act_order=act_order and scheme == "gptq",
                    )
                    found[weights] = None
    return list(found)
