"""What of a checkpoint is quantized, and how."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from attnserve.errors import UserError
from quant import options
from quant.schemes.registry import SCHEMES, Scheme, get_scheme

if TYPE_CHECKING:
    from quant_kernels.weight import QuantSpec

SCHEME_TITLES = "; ".join(f"{name}: {scheme.title}" for name, scheme in SCHEMES.items())

TENSORS = ("weights", "activations", "kv")
"""What can be quantized: weights, inputs of linear layers, keys and values in the cache."""

FP8 = "fp8"
"""Keys and values in e4m3: a target of its own, `kv-fp8`, because it has no bits to choose."""

SERVED = {8: "int8_per_token_head", 4: "int4_per_token_head"}
"""Formats of keys and values that servers have (`attn_kernels.kv_quant`), by their bits."""


@dataclass(frozen=True)
class QuantConfig:
    """How one model is quantized. All defaults together are the unquantized model."""

    # weights, activations, kv: bits of each; None: it is not quantized.
    weights: int | None = None
    activations: int | None = None
    kv: int | None = None
    scheme: str | None = None  # how weights are quantized; None without weights
    # Columns that share a scale; None: all columns of a row, or no weights.
    group_size: int | None = None
    # No zero points in the weights, else in the cache; activations never have any.
    symmetric: bool = False
    # act_order, search: of `gptq`.
    act_order: bool = False
    lm_head: bool = False  # the weights of the head are quantized too
    static: bool = False  # activations have calibrated scales instead of one for each token
    # How keys and values are rounded: as servers do it, or FP8; None: simulated, one scale and zero
    # point a token.
    kv_format: str | None = None
    search: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What a result depends on. Results that are older than a field lack it, so its default
        is left out."""
        fields = dataclasses.asdict(self)
        later = ("kv_format", "search")
        return {name: value for name, value in fields.items() if name not in later or value}

    @property
    def cache_symmetric(self) -> bool:
        """Whether simulated keys and values have no zero points."""
        return self.symmetric and self.weights is None

    @property
    def options(self) -> dict[str, bool]:
        """What schemes are told besides the spec."""
        return {"act_order": self.act_order, "search": self.search}

    @property
    def target(self) -> str:
        """What is quantized, for example `weights+kv`."""
        return "+".join(name for name in TENSORS if getattr(self, name)) or "unquantized"

    @property
    def bits(self) -> int | None:
        """The bits that the sweep varies: those of the first tensor of the target."""
        return self.weights or self.activations or self.kv

    @property
    def name(self) -> str:
        """The name of its file."""
        parts = [self.target]
        if self.weights:
            parts += [f"{self.scheme}", f"w{self.weights}", f"g{self.group_size or 'channel'}"]
        if self.activations:
            parts.append(f"a{self.activations}" + "static" * self.static)
        if self.kv:
            parts.append("kvfp8" if self.kv_format == FP8 else f"kv{self.kv}")
        flags = {
            "sym": self.symmetric,
            "actorder": self.act_order,
            "search": self.search,
            "head": self.lm_head,
        }
        return "-".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])

    @property
    def spec(self) -> QuantSpec:
        """How the weights are quantized, for a scheme."""
        from quant_kernels.weight import QuantSpec  # with torch

        assert self.weights is not None
        return QuantSpec(self.weights, self.group_size, self.symmetric)


UNQUANTIZED = QuantConfig()


def sized(group_size: int | None, scheme: Scheme, bits: int) -> int | None:
    """Return the columns of a group, the scheme's own where they are `AUTO`."""
    return scheme.group_size(bits) if group_size == options.AUTO else group_size


@dataclass(frozen=True)
class SearchSpace:
    """The configs of a sweep: every combination of targets, bits, schemes and group sizes. The
    fields are options of the command."""

    targets: Annotated[
        list[str],
        Option(
            "--targets",
            "--what",
            metavar="TARGET",
            help="What is quantized: weights, activations (the inputs of linear layers), kv (the "
            "cache), or several joined by +; kv-fp8, alone: the cache in float8 (e4m3).",
        ),
    ] = field(default_factory=lambda: ["weights", "weights+activations", "kv", "kv-fp8"])
    bits: Annotated[
        list[int], Option(min=2, max=8, help="Bits of the first tensor of each target.")
    ] = field(default_factory=lambda: [2, 3, 4, 8])
    schemes: Annotated[
        list[str], Option(metavar="SCHEME", help=f"How weights are quantized. {SCHEME_TITLES}.")
    ] = field(default_factory=lambda: ["rtn", "hqq", "gptq", "two-level"])
    group_sizes: Annotated[
        list[int],
        Option(
            "--group-sizes", "--groups", parser=options.columns, metavar="N", help=options.COLUMNS
        ),
    ] = field(default_factory=lambda: [options.AUTO])
    symmetric: options.Symmetric = False
    act_order: options.ActOrder = True
    search: options.Search = True
    lm_head: options.LmHead = False
    static: Annotated[
        bool, Option("--static", help="Calibrate scales of activations; else one for each token.")
    ] = False
    activation_bits: Annotated[
        int, Option(min=2, max=8, help="Bits of activations beside weights.")
    ] = 8
    kv_bits: Annotated[
        int, Option(min=2, max=8, help="Bits of the cache beside other tensors.")
    ] = 8

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            get_scheme(scheme)
        for target in self.targets:
            tensors = target.split("+")
            if target == "kv-fp8":
                continue
            if not set(tensors) <= set(TENSORS) or len(set(tensors)) < len(tensors):
                raise UserError(
                    f"unknown target {target!r}: use one or several of {', '.join(TENSORS)}, "
                    "joined by +, or kv-fp8"
                )

    def configs(self) -> list[QuantConfig]:
        """Return the configs, each once, without the unquantized one."""
        each = itertools.product(self.targets, self.bits, self.schemes, self.group_sizes)
        return list(dict.fromkeys(self._config(*values) for values in each))

    def _config(self, target: str, bits: int, scheme: str, group_size: int | None) -> QuantConfig:
        if target == "kv-fp8":
            return QuantConfig(kv=8, kv_format=FP8)
        named = get_scheme(scheme)
        weights, activations, kv = (name in target.split("+") for name in TENSORS)
        kv_bits = (self.kv_bits if weights or activations else bits) if kv else None
        kv_format = SERVED.get(kv_bits) if kv_bits else None
        return QuantConfig(
            weights=bits if weights else None,
            activations=(self.activation_bits if weights else bits) if activations else None,
            kv=kv_bits,
            kv_format=kv_format,
            scheme=scheme if weights else None,
            group_size=sized(group_size, named, bits) if weights else None,
            symmetric=self.symmetric and (weights or (kv and kv_format is None)),
            act_order=self.act_order and weights and named.has_options,
            search=self.search and weights and named.has_options,
            lm_head=self.lm_head and weights,
            static=self.static and activations,
        )


@dataclass(frozen=True)
class Samples:
    """How much is measured. The fields are options of the command."""

    sequences: Annotated[
        int, Option(min=1, help="Sequences of each text, for perplexity and KL divergence.")
    ] = 16
    length: options.Length = 512
    pairs: Annotated[int, Option(min=1, help="Pairs of each BLiMP set, with --eval.")] = 50
    passages: Annotated[int, Option(min=1, help="Passages of LAMBADA, with --eval.")] = 100
    calibration: options.Calibration = 16
    seed: options.Seed = 0


@dataclass(frozen=True)
class LayerSettings:
    """What single layers are measured with. The fields are options of the command."""

    bits: Annotated[list[int], Option(min=2, max=8, help="Bits of a layer.")] = field(
        default_factory=lambda: [2, 3, 4, 8]
    )
    scheme: Annotated[str, Option(help=f"One of {', '.join(SCHEMES)}.")] = "two-level"
    group_size: options.GroupSize = options.AUTO
    symmetric: options.Symmetric = False
    act_order: options.ActOrder = True
    search: options.Search = True
    lm_head: options.LmHead = False
    sequences: Annotated[int, Option(min=1, help="Sequences of each text.")] = 8
    length: options.Length = 512
    calibration: options.Calibration = 16
    seed: options.Seed = 0

    @property
    def columns(self) -> int | str | None:
        """Columns of a group; `auto` where they go with the bits."""
        named = get_scheme(self.scheme)
        if named.two_level and self.group_size == options.AUTO:
            return "auto"
        return sized(self.group_size, named, self.bits[0])

    @property
    def specs(self) -> list[QuantSpec]:
        """How a layer is quantized, with fewer bits first."""
        from quant_kernels.weight import QuantSpec  # with torch

        named = get_scheme(self.scheme)
        return [
            QuantSpec(bits, sized(self.group_size, named, bits), self.symmetric)
            for bits in sorted(set(self.bits))
        ]
