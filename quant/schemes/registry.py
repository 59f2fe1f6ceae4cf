"""The schemes by name, and what each can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnserve.errors import UserError
from quant.schemes import bitsandbytes, hqq_library, quanto
from quant.schemes.compressed_tensors import compressed_tensors
from quant.schemes.gptq import gptq
from quant.schemes.hqq import hqq
from quant.schemes.rtn import rtn
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec


@dataclass(frozen=True)
class Scheme:
    """A way to choose codes, scales and zero points.

    Args:
        name: on the command line and in results.
        title: one line for people.
        run: `(weight, spec)`, or `(weight, spec, hessian, act_order)` if calibrated.
        calibrated: it wants the Hessian of the layer's inputs.
        symmetric: it has a symmetric form.
        short_groups: it takes groups that do not divide the columns.
        bits: widths it can do.
        wants: what else it asks of a spec: why it cannot do one and what to do, or None.
        library: the import package that it needs.
        requirement: what pip calls it, with the version that it was tried with.
    """

    name: str
    title: str
    run: Callable[..., QuantizedWeight]
    calibrated: bool = False
    symmetric: bool = True
    short_groups: bool = True
    bits: Sequence[int] = BITS
    wants: Callable[[QuantSpec], str | None] | None = None
    library: str | None = None
    requirement: str | None = None

    def check(self, spec: QuantSpec, columns: set[int]) -> None:
        """Say before any work that something will not do.

        Args:
            spec: what is asked for.
            columns: the widths of all matrices.

        Raises:
            UserError: the scheme cannot do this, or its library is missing.
        """
        if spec.bits not in self.bits:
            widths = ", ".join(map(str, self.bits))
            raise UserError(f"scheme {self.name} cannot do {spec.bits} bits: it has {widths}")
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
                f"{spec.group_size}: use --groups channel or a divisor"
            )

    def __call__(
        self,
        weight: Tensor,
        spec: QuantSpec,
        hessian: Tensor | None = None,
        act_order: bool = False,
    ) -> QuantizedWeight:
        """Quantize float32 `[rows, columns]`; the Hessian only if `calibrated`."""
        if self.calibrated:
            return self.run(weight, spec, hessian, act_order)
        return self.run(weight, spec)


BITSANDBYTES = "bitsandbytes==0.50.2"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("rtn", "round to nearest", rtn),
        Scheme("hqq", "HQQ, zero points optimised without data", hqq, symmetric=False),
        Scheme("gptq", "GPTQ, calibrated on training text", gptq, calibrated=True),
        Scheme(
            "compressed-tensors",
            "the library's own round to nearest",
            compressed_tensors,
            short_groups=False,
            library="compressed_tensors",
            requirement="compressed-tensors==0.17.0",
        ),
        Scheme(
            "quanto",
            "optimum-quanto, 2 and 4 bits by groups, 8 bits by rows",
            quanto.quanto,
            short_groups=False,
            bits=quanto.BITS,
            wants=quanto.wants,
            library="optimum.quanto",
            requirement="optimum-quanto==0.2.7",
        ),
        Scheme(
            "hqq-library",
            "HQQ by its authors' library",
            hqq_library.hqq_library,
            symmetric=False,
            bits=hqq_library.BITS,
            library="hqq",
            requirement="hqq==0.2.8.post1",
        ),
        Scheme(
            "bnb-nf4",
            "bitsandbytes' NF4, weights only",
            bitsandbytes.nf4,
            bits=(4,),
            wants=bitsandbytes.wants_blocks,
            library="bitsandbytes",
            requirement=BITSANDBYTES,
        ),
        Scheme(
            "bnb-fp4",
            "bitsandbytes' FP4, weights only",
            bitsandbytes.fp4,
            bits=(4,),
            wants=bitsandbytes.wants_blocks,
            library="bitsandbytes",
            requirement=BITSANDBYTES,
        ),
        Scheme(
            "bnb-int8",
            "bitsandbytes' int8, weights only",
            bitsandbytes.int8,
            bits=(8,),
            wants=bitsandbytes.wants_rows,
            library="bitsandbytes",
            requirement=BITSANDBYTES,
        ),
    )
}


def get_scheme(name: str) -> Scheme:
    """A scheme by name.

    Raises:
        UserError: there is none.
    """
    if name not in SCHEMES:
        raise UserError(f"unknown scheme {name!r}: use one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def installed(library: str) -> bool:
    """Whether an import package is there, without importing it."""
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
