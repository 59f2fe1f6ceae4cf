"""Quantize a checkpoint and write it packed, so that `vllm serve` serves it.

    python -m quant.quantize checkpoints/softpick softpick-4bit --bits 4 --scheme gptq

Linear layers are quantized as `python -m quant.sweep` does it, with the same settings. Without
--calibration-text, gptq is calibrated on text that the checkpoint writes itself. What is written is
compressed-tensors' format; docs/QUANT.md says who can read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from attn_kernels import VariantError
from attnserve.errors import UserError
from attnserve.evaluation.scorers import load
from attnserve.options import positive
from quant.model import HEAD, empty_model, linears, quantize
from quant.options import add_text_options, columns_of_group, sources_of
from quant.quantize_files import Part, checkpoint_tensors, write_checkpoint, written_format
from quant.samples import Samples, Subject
from quant.schemes.registry import SCHEMES, Scheme, get_scheme
from quant.schemes.rtn import rtn
from quant.texts import calibration_text
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec

SERVED = ("rtn", "hqq", "gptq", "compressed-tensors")
"""Schemes whose specs are codes, scales and zero points of the written format."""
CHUNK = 32
"""Groups are multiples of it, so that one starts with a 32-bit word at every width."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done, checked.

    Args:
        scheme, spec: of the linear layers.
        embeddings: spec of the token embeddings and the head; None: they stay as they are.
        layers: the linear layers' names.
        tables: the names of embeddings and head, if they are quantized; tied ones are one.
        activations: those of linear layers are rounded to 8 bits when served.
    """

    scheme: Scheme
    spec: QuantSpec
    embeddings: QuantSpec | None
    layers: list[str]
    tables: list[str]
    activations: bool


def plan(options: argparse.Namespace) -> Plan:
    """Check everything that can be checked before the weights are read.

    Raises:
        UserError, ValueError, FileNotFoundError, VariantError: something will not do.
    """
    for bits in (options.bits, options.embeddings):
        if bits is not None and bits not in BITS:
            raise UserError(f"{bits} bits: use {BITS[0]} to {BITS[-1]}")
    scheme = get_scheme(options.scheme)
    if scheme.name not in SERVED:
        raise UserError(f"scheme {scheme.name} cannot be served: use one of {', '.join(SERVED)}")
    if options.act_order and scheme.name != "gptq":
        raise UserError("--act-order is of the scheme gptq: leave it out")
    if options.group is not None and options.group % CHUNK:
        raise UserError(f"--group {options.group}: use a multiple of {CHUNK}, or channel")
    int8 = options.bits == 8 and options.symmetric and options.group is None
    if options.activations and (not int8 or options.embeddings is not None):
        raise UserError(
            "--activations needs --bits 8 --symmetric --group channel and no --embeddings: vLLM's "
            "int8 kernel takes nothing else"
        )
    folder: Path = options.checkpoint
    check_out(folder, options.out, options.overwrite)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: name a checkpoint's folder")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise UserError(f"{folder} is quantized already: name the checkpoint that it was made from")
    stored = checkpoint_tensors(folder)
    if not stored:
        raise UserError(f"{folder} has no *.safetensors: save the checkpoint in that format first")
    model = empty_model(folder)
    layers = linears(model)
    spec = QuantSpec(options.bits, options.group, options.symmetric)
    scheme.check(spec, {layer.in_features for layer in layers.values()})
    tables, embeddings = [], None
    if options.embeddings is not None:
        embeddings = QuantSpec(options.embeddings, options.group, options.symmetric)
        tables = ["model.embed_tokens"]
        tables += [] if model.config.tie_word_embeddings else [HEAD]
    for name in (*layers, *tables):
        if f"{name}.weight" not in stored:
            raise UserError(
                f"{folder} has no tensor {name}.weight: checkpoints with other names than "
                "transformers' Llama cannot be quantized yet"
            )
    return Plan(scheme, spec, embeddings, list(layers), tables, options.activations)


def check_out(folder: Path, out: Path, overwrite: bool) -> None:
    """Refuse to overwrite what was not asked to be overwritten, or was not made here.

    Raises:
        UserError: it would be.
    """
    if not out.exists():
        return
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the checkpoint itself: name another folder")
    if not overwrite:
        raise UserError(f"{out} is there already: --overwrite replaces it")
    config = out / "config.json"
    ours = config.exists() and "quantization_config" in json.loads(config.read_text("utf-8"))
    if not (out.is_dir() and (ours or not any(out.iterdir()))):
        raise UserError(f"{out} is no quantized checkpoint: remove it yourself, or name another")


def quantize_model(
    model: PreTrainedModel, chosen: Plan, texts: torch.Tensor, act_order: bool
) -> dict[str, QuantizedWeight]:
    """Quantize a float32 model in place: embeddings first, so that calibrated schemes see them.

    Returns:
        What is stored, by layer.
    """
    found: dict[str, QuantizedWeight] = {}
    with tqdm(total=len(chosen.tables) + len(chosen.layers), unit="layer") as bar:
        if chosen.embeddings is not None:
            for name in chosen.tables:
                weight = model.get_submodule(name).weight
                found[name] = rtn(weight.data, chosen.embeddings)
                weight.data = found[name].dequantize()  # a tied head has the same parameter
                bar.update()

        def run(*args: object) -> QuantizedWeight:
            result: QuantizedWeight = chosen.scheme.run(*args)
            bar.update()
            return result

        counted = dataclasses.replace(chosen.scheme, run=run)
        return found | quantize(model, counted, chosen.spec, texts, act_order=act_order)


def calibration(options: argparse.Namespace) -> tuple[str, torch.Tensor]:
    """Return what is calibrated on: its title, and token ids int64 `[sequences, tokens]`.

    Raises:
        UserError, ValueError, FileNotFoundError: a text is missing or too short.
    """
    sources = sources_of(options, [options.checkpoint])[options.checkpoint]
    subject = Subject(options.checkpoint, options.length)
    text = calibration_text(sources, subject, options.calibration, options.seed)
    return text.title, text.rows(subject.bos)


def run(options: argparse.Namespace) -> tuple[list[Part], str | None]:
    """Do it all; the folder appears when it is complete.

    Returns:
        What became of each part, and what was calibrated on; None if nothing was.

    Raises:
        UserError, ValueError, OSError, VariantError: something will not do.
    """
    chosen = plan(options)
    title, texts = None, torch.empty(0, dtype=torch.long)
    if chosen.scheme.calibrated:
        title, texts = calibration(options)
    torch.manual_seed(options.seed)
    model = load(options.checkpoint)
    quantized = quantize_model(model, chosen, texts, options.act_order)
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        new = Path(temporary) / "new"
        card = f"`python -m quant.quantize {settings(options)}`"
        card += f", calibrated on: {title}" if title else ""
        written = written_format(chosen.activations)
        parts = write_checkpoint(options.checkpoint, new, quantized, chosen.tables, written, card)
        if out.exists():
            shutil.move(out, Path(temporary) / "old")
        os.replace(new, out)
    return parts, title


def settings(options: argparse.Namespace) -> str:
    """The command's settings, for the card."""
    parts = [f"--bits {options.bits}", f"--scheme {options.scheme}"]
    parts += [f"--group {options.group or 'channel'}"]
    parts += ["--symmetric"] * options.symmetric + ["--act-order"] * options.act_order
    parts += ["--activations"] * options.activations
    parts += [f"--embeddings {options.embeddings}"] * (options.embeddings is not None)
    if get_scheme(options.scheme).calibrated:
        parts += [
            f"--{name} {getattr(options, name)}" for name in ("calibration", "length", "seed")
        ]
    return " ".join(parts)


def table(parts: Sequence[Part]) -> str:
    """For people."""
    lines = [f"{'':12}{'numbers':>14}{'MB before':>12}{'MB after':>12}{'bits a number':>16}"]
    for part in parts:
        bits = 8 * part.after / part.numbers
        lines.append(
            f"{part.name:12}{part.numbers:14,}{part.before / 1e6:12.2f}{part.after / 1e6:12.2f}"
            f"{bits:16.3f}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m quant.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("checkpoint", type=Path, help="a Hugging Face folder")
    add("out", type=Path, help="the folder to write")
    add("--bits", type=int, required=True, help=f"of a weight, {BITS[0]} to {BITS[-1]}")
    titles = "; ".join(f"{name}: {SCHEMES[name].title}" for name in SERVED)
    add("--scheme", required=True, metavar="SCHEME", help=titles)
    add(
        "--group",
        type=columns_of_group,
        default=64,
        help=f"columns that share a scale, a multiple of {CHUNK}, or channel (default: 64)",
    )
    add("--symmetric", action="store_true", help="no zero points (default: with)")
    add("--act-order", action="store_true", help="gptq takes columns by their Hessian")
    add(
        "--embeddings",
        type=int,
        metavar="BITS",
        help="quantize the token embeddings and the head too, to this width, by round to nearest "
        "(default: they stay as they are)",
    )
    add(
        "--activations",
        action="store_true",
        help="inputs of linear layers in 8 bits too, one scale a token, through vLLM's own int8 "
        "kernel (default: as they are); with --bits 8 --symmetric --group channel",
    )
    samples = Samples()
    texts = "sequences of text that gptq is calibrated on (default: %(default)s)"
    add("--calibration", type=positive, default=samples.calibration, help=texts)
    length = "tokens of such a sequence; the training length at most (default: %(default)s)"
    add("--length", type=positive, default=samples.length, help=length)
    add("--seed", type=int, default=0, help="of the calibration text (default: %(default)s)")
    add_text_options(made, measured=False)
    add("--overwrite", action="store_true", help="replace OUT if it is a quantized checkpoint")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = parser()
    options = command.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        parts, title = run(options)
    except (UserError, ValueError, OSError, VariantError) as error:
        print(f"{command.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(table(parts))
    if title:
        print(f"Calibrated on: {title}")
    line = {
        "out": str(options.out),
        "settings": settings(options),
        "calibrated_on": title,
        "parts": {part.name: dataclasses.asdict(part) for part in parts},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
