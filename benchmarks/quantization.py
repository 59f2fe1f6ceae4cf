"""What few bits cost at equal bits a weight: this project's schemes beside other libraries'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.files import CHECKOUT
from benchmarks import RESULTS, results
from benchmarks import options as opt

if TYPE_CHECKING:
    from torch import Tensor

    from attnserve.evaluation.checkpoint import Checkpoint
    from attnserve.evaluation.texts import Text

    Layer = Callable[[Tensor, Tensor], tuple[Tensor, float]]

CSV = RESULTS / "quantization.csv"
CHECKPOINTS = [CHECKOUT / "checkpoints" / name for name in ("softmax", "softpick")]
CALIBRATION, LENGTH = 16, 512

OURS: list[tuple[str, int, int, dict[str, bool]]] = [
    ("rtn", 4, 64, {}),
    ("hqq", 4, 64, {}),
    ("gptq", 4, 64, {}),
    ("gptq", 4, 64, {"act_order": True, "search": True}),
    ("two-level", 4, 32, {}),
    ("rtn", 3, 64, {}),
    ("gptq", 3, 64, {}),
    ("gptq", 3, 64, {"act_order": True, "search": True}),
    ("gptq", 3, 32, {}),
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
BUDGETS = (2.3, 2.55, 3.3, 4.3)
LIBRARY = [("hqq-library", bits, 64) for bits in (4, 3, 2)]
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
    no_peers: Annotated[bool, opt.option("Only this project's schemes.")] = False,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> None:
    """Measure the KL divergence of quantized linear layers at equal bits a weight.

      python -m benchmarks.quantization --books DIR

    The checkpoint without quantization is what is compared with, in float32, on *Great
    Expectations*, which nobody was trained or calibrated on. Whatever needs data is calibrated on
    the same 16 sequences of 512 tokens. Scales and zero points count. llama.cpp's types have
    llama.cpp's own arithmetic; --no-peers leaves them and the library hqq out.
    """
    from attnserve.evaluation.checkpoint import Checkpoint
    from quant.texts import Sources, calibration_text, text_for

    save = results.checked(csv, no_save)
    rows: list[results.Row] = []
    for folder in checkpoints or CHECKPOINTS:
        checkpoint = Checkpoint(folder, longest=LENGTH)
        given = Sources(books=books)
        by = Sources(writer=folder) if sampled else given
        calibration = calibration_text(by, checkpoint, CALIBRATION, 0)
        measured = text_for("evaluation", given, checkpoint, sequences, LENGTH)
        validation = text_for("validation", given, checkpoint, 8, LENGTH - 1)
        of_one = Measurement(checkpoint, calibration, measured)
        found = [*ours(of_one, validation), *([] if no_peers else peers(of_one, llama_cpp))]
        rows += [{"checkpoint": checkpoint.name, **row} for row in found]
    about = {
        **machine.described(),
        "calibrated_on": f"{CALIBRATION} x {LENGTH} tokens of "
        + ("its own text" if sampled else "eleven novels"),
        "measured_on": f"{sequences} x {LENGTH} tokens of great_expectations.txt",
    }
    results.report(about, rows, results.table(rows), csv=save, as_json=as_json)


class Measurement:
    """One checkpoint, and what it is calibrated and measured on."""

    def __init__(self, checkpoint: Checkpoint, calibration: Text, measured: Text) -> None:
        from attnserve.evaluation.scorers import load
        from quant.divergence import Divergence

        self.folder, self.calibration = checkpoint.folder, calibration
        self.divergence = Divergence(load(checkpoint.folder), measured)

    def row(self, method: str, bits: float, model: Any) -> results.Row:
        """Return what a quantized model costs."""
        from attnserve.evaluation.intervals import mean_interval

        self.divergence.model = model
        kl = mean_interval(self.divergence())
        return {
            "method": method,
            "bits_per_weight": round(bits, 3),
            "kl": float(f"{kl.value:.4g}"),
            "kl_low": float(f"{kl.low:.4g}"),
            "kl_high": float(f"{kl.high:.4g}"),
        }


def ours(of_one: Measurement, validation: Text) -> Iterator[results.Row]:
    """Measure this project's schemes, then two-level scales within budgets, which are spent by
    sensitivity on the validation book."""
    from quant.budget import candidates, spend
    from quant.options import AUTO
    from quant.schemes.registry import get_scheme

    for name, bits, size, options in OURS:
        flags = "".join(f", {option}" for option in options)
        yield scheme_row(of_one, f"{name}, groups of {size}{flags}", name, bits, size, options)
    scheme = get_scheme("two-level")
    for budget in BUDGETS:
        widths = candidates(scheme, budget, AUTO)
        texts = of_one.calibration, validation
        specs = spend(of_one.folder, scheme, {}, widths, budget, *texts)
        yield quantized_row(
            of_one, f"two-level, --bits-per-weight {budget}", "two-level", widths[0], {}, specs
        )


def scheme_row(
    of_one: Measurement, title: str, name: str, bits: int, size: int, options: dict[str, bool]
) -> results.Row:
    """Measure a scheme with one width."""
    from quant_kernels.weight import QuantSpec

    return quantized_row(of_one, title, name, QuantSpec(bits, size), options, {})


def quantized_row(
    of_one: Measurement, title: str, name: str, spec: Any, options: Any, specs: Any
) -> results.Row:
    """Measure a scheme with widths for layers."""
    from attnserve.evaluation.scorers import load
    from quant.model import quantize
    from quant.schemes.registry import get_scheme

    model, texts = load(of_one.folder), of_one.calibration.rows
    made = quantize(model, get_scheme(name), spec, texts, options=options, specs=specs)
    numbers = sum(weight.values.numel() for weight in made.values())
    stored = sum(weight.packed_bytes for weight in made.values())
    return of_one.row(title, 8 * stored / numbers, model)


def peers(of_one: Measurement, llama_cpp: Path | None) -> Iterator[results.Row]:
    """Measure the library hqq where it is installed, and llama.cpp's types."""
    from benchmarks.gguf_types import Ggml
    from quant.schemes.registry import installed

    if installed("hqq"):
        for name, bits, size in LIBRARY:
            yield scheme_row(of_one, f"{name} 0.2.8, groups of {size}", name, bits, size, {})
    ggml = Ggml(llama_cpp)
    for kind in WITHOUT_DATA:
        yield type_row(of_one, ggml, kind, None)
    importance = mean_squares(of_one)
    for kind in TYPES:
        yield type_row(of_one, ggml, kind, importance)


def mean_squares(of_one: Measurement) -> dict[str, Tensor]:
    """Return the mean square of each column's inputs, by layer: an importance matrix."""
    from attnserve.evaluation.scorers import load
    from quant.model import linears, observe
    from quant.schemes.hessian import watched

    model = load(of_one.folder)
    with watched(linears(model)) as hessians:
        observe(model, {}, of_one.calibration.rows, lambda name, inputs: None)
    return {name: hessian.diagonal().clone() for name, hessian in hessians.items()}


def type_row(
    of_one: Measurement, ggml: Any, kind: str, importance: dict[str, Tensor] | None
) -> results.Row:
    """Measure one of llama.cpp's types."""
    from attnserve.evaluation.scorers import load
    from quant.model import linears

    model, bits = load(of_one.folder), 0.0
    for name, layer in linears(model).items():
        own = None if importance is None else importance[name]
        layer.weight.data, bits = ggml(layer.weight.data, kind, own)
    return of_one.row(f"llama.cpp {kind}" + ", imatrix" * (importance is not None), bits, model)


if __name__ == "__main__":
    main(quantization, "python -m benchmarks.quantization")
