"""What few bits cost at equal bits a weight: this project's schemes beside other libraries'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.files import CHECKOUT
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.gguf_types import Ggml

if TYPE_CHECKING:
    from torch import Tensor

    from attnserve.evaluation.checkpoint import Checkpoint
    from attnserve.evaluation.texts import Text


Scheme = tuple[str, int, int, dict[str, bool]]
Method = Callable[[], tuple[float, Any]]
"""Returns bits of a weight and the quantized model."""

CSV = RESULTS / "quantization.csv"
CHECKPOINTS = [CHECKOUT / "checkpoints" / name for name in ("softmax", "softpick")]
CALIBRATION, LENGTH = 16, 512

OURS: Sequence[Scheme] = [
    ("rtn", 4, 64, {}),
    ("hqq", 4, 64, {}),
    ("gptq", 4, 64, {}),
    ("gptq", 4, 64, {"act_order": True, "search": True}),
    ("two-level", 4, 32, {}),
    ("rtn", 3, 64, {}),
    ("gptq", 3, 64, {}),
    ("gptq", 3, 64, {"act_order": True, "search": True}),
    ("two-level", 3, 32, {}),
    ("rtn", 2, 64, {}),
    ("hqq", 2, 64, {}),
    ("gptq", 2, 64, {}),
    ("gptq", 2, 64, {"act_order": True, "search": True}),
    ("gptq", 2, 32, {}),
    ("two-level", 2, 32, {}),
    ("two-level", 2, 16, {}),
]
"""Scheme, bits, columns of a group, options."""
BUDGETS = (2.5, 2.554, 3, 3.31, 4, 4.305)
"""Bits a weight to spend; some are exactly those of two-level scales with 2, 3 and 4 bits."""
LIBRARY: Sequence[Scheme] = [("hqq-library", bits, 64, {}) for bits in (4, 3, 2)]
GPTQMODEL: Sequence[Scheme] = [
    ("gptqmodel", bits, 64, options)
    for bits in (4, 3, 2)
    for options in ({}, {"desc_act": True, "static_groups": True})
]
AUTO_ROUND: Sequence[Scheme] = [("auto-round", bits, 64, {}) for bits in (4, 3, 2)]
TYPES = ("Q4_0", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS")
WITHOUT_DATA = ("Q4_0", "Q4_K", "Q3_K", "Q2_K")
"""Types that llama.cpp makes without an importance matrix, too."""


def quantization(
    books: Annotated[Path, opt.option("The novels of the reference checkpoints.", metavar="DIR")],
    checkpoints: Annotated[
        list[Path] | None, opt.option("Default: softmax and softpick.", metavar="DIR")
    ] = None,
    sampled: Annotated[
        bool, opt.option("Calibrate on text that each checkpoint writes, not on the novels.")
    ] = False,
    sequences: Annotated[int, opt.count("Sequences of 512 tokens to measure on.")] = 40,
    llama_cpp: Annotated[
        Path | None,
        opt.option("The folder of the package llama_cpp, if it is not installed.", metavar="DIR"),
    ] = None,
    iterations: Annotated[int, opt.count("Iterations of AutoRound, whose default it is.")] = 200,
    only: Annotated[
        list[str] | None,
        opt.option("Only methods whose name has one of these in it.", metavar="TEXT"),
    ] = None,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> None:
    """Measure the KL divergence of quantized linear layers at equal bits a weight.

      python -m benchmarks.quantization --books DIR

    The checkpoint without quantization is what is compared with, in float32, on *Great
    Expectations*, which nobody was trained or calibrated on. Whatever needs data is calibrated on
    the same 16 sequences of 512 tokens. Scales and zero points count. llama.cpp's types have
    llama.cpp's own arithmetic; --only two-level leaves them and all other schemes out.
    """
    from attnserve.evaluation.checkpoint import Checkpoint
    from quant.budget import MEASURED
    from quant.texts import Sources, calibration_text, text_for

    save = results.checked(csv, no_save)
    about = {
        **machine.described(),
        "calibrated_on": f"{CALIBRATION} x {LENGTH} tokens of "
        + ("its own text" if sampled else "eleven novels"),
        "measured_on": f"{sequences} x {LENGTH} tokens of great_expectations.txt",
    }
    rows: list[results.Row] = []
    for folder in checkpoints or CHECKPOINTS:
        checkpoint = Checkpoint(folder, longest=LENGTH)
        given = Sources(books=books)
        by = Sources(writer=folder) if sampled else given
        calibration = calibration_text(by, checkpoint, CALIBRATION, 0)
        measured = text_for("evaluation", given, checkpoint, sequences, LENGTH)
        validation = text_for("validation", given, checkpoint, MEASURED, LENGTH - 1)
        of_one = Measurement(checkpoint, calibration, validation, measured, iterations)
        for method, run in methods(of_one, llama_cpp).items():
            if any(text in method for text in only or [""]):
                rows.append({"checkpoint": checkpoint.name, "method": method, **of_one.row(*run())})
                print(rows[-1], file=sys.stderr, flush=True)
                if save is not None:
                    results.append_csv(save, about, rows[-1:])
    results.report(about, rows, results.table(rows), csv=None, as_json=as_json)


class Measurement:
    """One checkpoint, and what it is calibrated, chosen and measured on."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Text,
        validation: Text,
        measured: Text,
        iterations: int,
    ) -> None:
        from attnserve.evaluation.scorers import load
        from quant.divergence import Divergence

        self.folder, self.tokenizer = checkpoint.folder, checkpoint.tokenizer
        self.calibration, self.validation = calibration, validation
        self.iterations = iterations
        self.divergence = Divergence(load(checkpoint.folder), measured)

    def row(self, bits: float, model: Any) -> results.Row:
        """Return what a quantized model costs."""
        from attnserve.evaluation.intervals import mean_interval

        self.divergence.model = model
        kl = mean_interval(self.divergence())
        return {
            "bits_per_weight": round(bits, 3),
            "kl": float(f"{kl.value:.4g}"),
            "kl_low": float(f"{kl.low:.4g}"),
            "kl_high": float(f"{kl.high:.4g}"),
        }

    def quantized(self, name: str, spec: Any, options: Any, specs: Any) -> tuple[float, Any]:
        """Return bits of a weight and the model: a scheme, with widths for all layers or each."""
        from attnserve.evaluation.scorers import load
        from quant.model import quantize
        from quant.schemes.registry import get_scheme

        model, texts = load(self.folder), self.calibration.rows
        made = quantize(model, get_scheme(name), spec, texts, options=options, specs=specs)
        numbers = sum(weight.values.numel() for weight in made.values())
        stored = sum(weight.packed_bytes for weight in made.values())
        return 8 * stored / numbers, model

    def within(self, budget: float) -> tuple[float, Any]:
        """Return the same of two-level scales within a number of bits a weight, which is spent by
        sensitivity on the validation book."""
        from quant.budget import choose

        widths, units = self.widths_of(budget), self.sensitivities
        return self.quantized("two-level", widths[0], {}, choose(units, widths, budget))

    def widths_of(self, budget: float) -> Any:
        """Return the widths that `quant.quantize --bits-per-weight` chooses from."""
        from quant.budget import candidates
        from quant.options import AUTO
        from quant.schemes.registry import get_scheme

        return candidates(get_scheme("two-level"), budget, AUTO)

    @cached_property
    def sensitivities(self) -> Any:
        """Return what all these widths cost in each unit of layers."""
        from quant.budget import sensitivities
        from quant.schemes.registry import get_scheme

        widths = list(dict.fromkeys(spec for b in BUDGETS for spec in self.widths_of(b)))
        scheme = get_scheme("two-level")
        return sensitivities(self.folder, scheme, {}, widths, self.calibration, self.validation)

    def by_gptqmodel(self, spec: Any, options: Any) -> tuple[float, Any]:
        """Return the same of GPTQModel, one decoder layer after another as by this project."""
        from attnserve.evaluation.scorers import load
        from benchmarks.calibrated_peers import gptqmodel
        from quant.model import linears
        from quant.schemes.hessian import layer_by_layer

        model = load(self.folder)
        layers = linears(model)

        def replace(name: str, hessian: Tensor) -> None:
            weight = layers[name].weight.data
            layers[name].weight.data = gptqmodel(weight, spec, hessian, **options)

        layer_by_layer(model, layers, self.calibration.rows, replace)
        return self.bits_of_groups(spec), model

    def by_auto_round(self, spec: Any) -> tuple[float, Any]:
        """Return the same of AutoRound."""
        from attnserve.evaluation.scorers import load
        from benchmarks.calibrated_peers import auto_round

        model, rows = load(self.folder), self.calibration.rows
        auto_round(model, self.tokenizer, spec, rows, self.iterations)
        return self.bits_of_groups(spec), model

    def bits_of_groups(self, spec: Any) -> float:
        """Return bits of a weight in groups with a scale of 16 bits and a zero point of as many
        bits as a value."""
        return self.quantized("rtn", spec, {}, {})[0]

    def of_type(self, llama_cpp: Path | None, kind: str, calibrated: bool) -> tuple[float, Any]:
        """Return the same of one of llama.cpp's types, with an importance matrix or without."""
        from attnserve.evaluation.scorers import load
        from quant.model import linears

        ggml, importance = Ggml(llama_cpp), self.importance if calibrated else {}
        model, bits = load(self.folder), 0.0
        for name, layer in linears(model).items():
            layer.weight.data, bits = ggml(layer.weight.data, kind, importance.get(name))
        return bits, model

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """Return the mean square of each column's inputs, by layer: an importance matrix."""
        from attnserve.evaluation.scorers import load
        from quant.model import linears, observe
        from quant.schemes.hessian import watched

        model = load(self.folder)
        with watched(linears(model)) as hessians:
            observe(model, {}, self.calibration.rows, lambda name, inputs: None)
        return {name: hessian.diagonal().clone() for name, hessian in hessians.items()}


def methods(of_one: Measurement, llama_cpp: Path | None) -> dict[str, Method]:
    """Return what is measured, by name: this project's schemes, the libraries hqq, GPTQModel and
    AutoRound where they are installed, and llama.cpp's types."""
    from quant.schemes.registry import installed
    from quant_kernels.weight import QuantSpec

    found: dict[str, Method] = {}
    theirs = {"hqq": LIBRARY, "gptqmodel": GPTQMODEL, "auto_round": AUTO_ROUND}
    libraries = [scheme for name, own in theirs.items() if installed(name) for scheme in own]
    for name, bits, size, options in [*OURS, *libraries]:
        flags = "".join(f", {option.replace('_', '-')}" for option in options)
        spec = QuantSpec(bits, size)
        run: Method = partial(of_one.quantized, name, spec, options, {})
        if name == "gptqmodel":
            run = partial(of_one.by_gptqmodel, spec, options)
        elif name == "auto-round":
            run = partial(of_one.by_auto_round, spec)
            flags = f", {of_one.iterations} iterations"
        found[f"{name}, {bits} bits, groups of {size}{flags}"] = run
    for budget in BUDGETS:
        found[f"two-level, --bits-per-weight {budget}"] = partial(of_one.within, budget)
    for kind in WITHOUT_DATA:
        found[f"llama.cpp {kind}"] = partial(of_one.of_type, llama_cpp, kind, False)
    for kind in TYPES:
        found[f"llama.cpp {kind}, imatrix"] = partial(of_one.of_type, llama_cpp, kind, True)
    return found


if __name__ == "__main__":
    main(quantization, "python -m benchmarks.quantization")
