"""The schemes by name, and what each can do. Nothing heavy is imported before one is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnserve.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from quant_kernels.weight import QuantizedWeight, QuantSpec

BLOCKS = tuple(2**power for power in range(5, 13))  # block sizes of bitsandbytes


def wants_rows(spec: QuantSpec) -> str | None:
    """Return why a scheme with one scale a row cannot do what is asked, and what to do."""
    if spec.group_size is not None or not spec.symmetric:
        return "has a scale a row and no zero points: use --group-sizes channel --symmetric"
    return None


def wants_blocks(spec: QuantSpec) -> str | None:
    """Return why bitsandbytes' 4 bits cannot do what is asked, and what to do."""
    if spec.group_size not in BLOCKS:
        return f"has blocks of {', '.join(map(str, BLOCKS))}: use one of them for --group-sizes"
    if spec.symmetric:
        return "has a table of its own, with 0 in it: leave out --symmetric"
    return None


def wants_of_quanto(spec: QuantSpec) -> str | None:
    """Return why quanto cannot do what is asked, and what to do."""
    if spec.bits == 8:
        return wants_rows(spec)
    return "has 2 and 4 bits with zero points only: leave out --symmetric" * spec.symmetric or None


def wants_small_groups(spec: QuantSpec) -> str | None:
    """Return why two-level scales cannot do what is asked, and what to do."""
    if spec.group_size != 16 and (spec.group_size is None or spec.group_size % 32):
        return "has groups of 16 or of a multiple of 32 columns: use one for --group-size"
    return None


@dataclass(frozen=True)
class Scheme:
    """A way to choose quantized values, scales and zero points."""

    name: str  # on the command line and in results
    title: str  # one line for people
    # `module:name` of `(weight, spec)`, or of `(weight, spec, hessian)` if calibrated.
    function: str
    calibrated: bool = False  # it needs the Hessian of the layer's inputs
    has_options: bool = False  # its function takes `act_order` and `search`, too
    symmetric: bool = True  # it has a symmetric form
    short_groups: bool = True  # it takes groups that do not divide the columns
    bits: Sequence[int] = range(2, 9)  # those that it can do
    two_level: bool = False  # what it makes has two-level scales (`TwoLevelWeight`)
    # Returns why it cannot do a spec and what to do, or None.
    wants: Callable[[QuantSpec], str | None] | None = None
    library: str | None = None  # the import package that it needs
    requirement: str | None = None  # what pip calls it, with the version that it was tried with

    def group_size(self, bits: int) -> int:
        """Return the columns of a group where nobody asks for others."""
        if not self.two_level:
            return 64
        return 16 if bits == 2 else 32

    def check(self, spec: QuantSpec, columns: set[int]) -> None:
        """Check before any work that a scheme can do what is asked of matrices with these
        columns."""
        if spec.bits not in self.bits:
            possible = ", ".join(map(str, self.bits))
            raise UserError(f"scheme {self.name} cannot do {spec.bits} bits: it has {possible}")
        if spec.symmetric and not self.symmetric:
            raise UserError(f"scheme {self.name} has no symmetric form: leave out --symmetric")
        if self.wants is not None and (why := self.wants(spec)) is not None:
            raise UserError(f"scheme {self.name} {why}")
        if self.library is not None and not installed(self.library):
            raise UserError(
                f"scheme {self.name} needs the library {self.library}, which is not installed: "
                f"pip install {self.requirement or self.library}, or leave the scheme out"
            )
        short = sorted(c for c in columns if c % spec.size(c))
        if short and not self.short_groups:
            raise UserError(
                f"scheme {self.name} cannot cut {short[0]} columns into groups of "
                f"{spec.group_size}: use --group-sizes channel or a divisor"
            )

    def __call__(
        self,
        weight: Tensor,
        spec: QuantSpec,
        hessian: Tensor | None = None,
        **options: bool,
    ) -> QuantizedWeight:
        """Quantize float32 `[rows, columns]`; the Hessian is needed only if `calibrated`, and
        options only matter if it `has_options`."""
        module, _, name = self.function.partition(":")
        run = getattr(importlib.import_module(module), name)
        result: QuantizedWeight
        needed = (hessian,) if self.calibrated else ()
        result = run(weight, spec, *needed, **(options if self.has_options else {}))
        return result


OWN, LIBRARIES = "quant.schemes", "quant.schemes.libraries"
BITSANDBYTES: dict[str, Any] = {"library": "bitsandbytes", "requirement": "bitsandbytes==0.50.2"}
BLOCKWISE = BITSANDBYTES | {"bits": (4,), "wants": wants_blocks}
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("rtn", "round to nearest", f"{OWN}.rtn:rtn"),
        Scheme("hqq", "HQQ, zero points optimised without data", f"{OWN}.hqq:hqq", symmetric=False),
        Scheme(
            "gptq",
            "GPTQ, calibrated on text",
            f"{OWN}.gptq:gptq",
            calibrated=True,
            has_options=True,
        ),
        Scheme(
            "two-level",
            "GPTQ with small groups, whose scales and zero points have 4 bits each",
            f"{OWN}.two_level:two_level",
            calibrated=True,
            symmetric=False,
            two_level=True,
            wants=wants_small_groups,
        ),
        Scheme(
            "compressed-tensors",
            "the library's own round to nearest",
            f"{LIBRARIES}:compressed_tensors",
            short_groups=False,
            library="compressed_tensors",
            requirement="compressed-tensors==0.17.0",
        ),
        Scheme(
            "quanto",
            "optimum-quanto, 2 and 4 bits by groups, 8 bits by rows",
            f"{LIBRARIES}:quanto",
            short_groups=False,
            bits=(2, 4, 8),
            wants=wants_of_quanto,
            library="optimum.quanto",
            requirement="optimum-quanto==0.2.7",
        ),
        Scheme(
            "hqq-library",
            "HQQ by its authors' library",
            f"{LIBRARIES}:hqq",
            symmetric=False,
            bits=(2, 3, 4, 5, 6, 8),
            library="hqq",
            requirement="hqq==0.2.8.post1",
        ),
        Scheme("bnb-nf4", "bitsandbytes' NF4, weights only", f"{LIBRARIES}:nf4", **BLOCKWISE),
        Scheme("bnb-fp4", "bitsandbytes' FP4, weights only", f"{LIBRARIES}:fp4", **BLOCKWISE),
        Scheme(
            "bnb-int8",
            "bitsandbytes' int8, weights only",
            f"{LIBRARIES}:int8",
            bits=(8,),
            wants=wants_rows,
            **BITSANDBYTES,
        ),
    )
}
SERVED = ("two-level", "gptq", "hqq", "rtn", "compressed-tensors")
"""Schemes that a checkpoint can be written with."""


def get_scheme(name: str) -> Scheme:
    """Return a scheme by name."""
    if name not in SCHEMES:
        raise UserError(f"unknown scheme {name!r}: use one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def installed(library: str) -> bool:
    """Return whether an import package is there, without importing it."""
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
