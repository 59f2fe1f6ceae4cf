"""Turn a softmax Llama into a checkpoint of another attention variant.

    python -m training.convert SRC OUT --variant ssmax

As in the SSMax paper (arXiv 2501.19399), every layer and head starts from the scale
1 / mean(ln n over n = 1 ... train length), with which the scores keep their size on average over
the lengths that the model was trained on (0.168 for 1,024). A few steps of fine-tuning may follow
(--steps). Variants without learned tensors can be named as well: softpick and the like, on weights
that were trained with softmax, are experiments.

OUT is a Hugging Face folder that `vllm serve OUT` runs; its conversion.json says how it was made. A
chat template or pad token that SRC lacks is added (`training.tokenizer.complete`).
An interrupted fine-tuning is kept in OUT.part: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from attn_kernels import Variant, VariantError, get_variant, variant_from_config
from attnserve import machine
from attnserve.evaluation.checkpoint import read_config
from attnserve.evaluation.tokens import read_tokens, text_file
from attnserve.options import positive
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM
from training.finetune import FineTune, FineTuneError, Settings
from training.recipe import parse_variant
from training.tokenizer import complete

RECORD = "conversion.json"
LEARNING_RATES = {"scale": 2e-3, "all": 2e-5}


class ConvertError(ValueError):
    """A conversion that makes no sense; the message says what to do."""


def initial_scale(train_length: int) -> float:
    """1 / mean(ln n over n = 1 ... train_length), the scale that replaces softmax.

    Raises:
        ConvertError: a length below 2, of which the mean is 0.
    """
    if train_length < 2:
        raise ConvertError(f"a training length of {train_length} is too short: at least 2 tokens")
    return train_length / math.lgamma(train_length + 1)  # lgamma(n + 1) = ln n!


def convertible_config(source: Path, target: Variant | None) -> PreTrainedConfig:
    """The configuration of a folder that can be converted.

    Raises:
        ConvertError: it is no Llama of softmax or of `target` itself.
    """
    try:
        config = read_config(source)
        variant = variant_from_config(config)
    except ValueError as error:
        raise ConvertError(str(error)) from None
    if config.model_type not in ("llama", "variant_llama"):
        raise ConvertError(f"{source} is a {config.model_type}: only Llamas can be converted")
    if variant not in (None, get_variant("softmax"), target):
        raise ConvertError(
            f"{source} has {variant.name} attention already: convert the softmax checkpoint"
        )
    if getattr(config, "quantization_config", None):
        raise ConvertError(f"{source} is quantized: convert the original, then quantize")
    return config


def read_record(source: Path) -> dict[str, Any]:
    """What conversion.json says of a converted folder; empty for others."""
    file = source / RECORD
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def trained_length(source: Path, config: PreTrainedConfig) -> int:
    """Tokens of the sequences that a checkpoint was trained on, as far as its folder says."""
    return int(read_record(source).get("train_length") or config.max_position_embeddings)


def convert(
    source: Path,
    variant: dict[str, Any],
    *,
    train_length: int | None = None,
    rope_theta: float | None = None,
    rope_theta_factor: float = 1.0,
    positions: int | None = None,
) -> VariantLlamaForCausalLM:
    """A softmax checkpoint's weights, in its dtype, under another attention variant.

    Args:
        source: a Hugging Face folder of a softmax Llama, or of one with that variant already: it
            keeps its learned tensors, and only the other arguments change anything.
        variant: `{"name": "ssmax", **parameters}`.
        train_length: tokens of the sequences that it was trained on; None: its
            `max_position_embeddings`.
        rope_theta: base of the rotary embedding's wavelengths; None: the source's.
        rope_theta_factor: multiplies it.
        positions: the result's `max_position_embeddings`; None: the source's.

    Raises:
        ConvertError: the source is no such Llama, or a number makes no sense.
    """
    config = convertible_config(source, variant_from_config({"attention_variant": variant}))
    scale = initial_scale(train_length or trained_length(source, config))
    rope = dict(config.rope_parameters)
    rope["rope_theta"] = float(rope_theta or rope["rope_theta"]) * rope_theta_factor
    values = config.to_dict()
    for name in ("model_type", "architectures", "_name_or_path"):
        values.pop(name, None)
    values |= {"attention_variant": variant, "rope_parameters": rope}
    values["max_position_embeddings"] = positions or config.max_position_embeddings
    trained = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = VariantLlamaForCausalLM(VariantLlamaConfig(**values)).to(trained.dtype)
    result = model.load_state_dict(trained.state_dict(), strict=False)
    learned = model.config.variant.learned
    if wrong := [
        *(name for name in result.missing_keys if name.rpartition(".")[2] not in learned),
        *result.unexpected_keys,
    ]:
        raise ConvertError(f"{source} is no plain Llama: {wrong[0]} does not fit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".ssmax_scale") and name in result.missing_keys:
                parameter.fill_(scale)
    return model.eval()


def learned_summary(model: VariantLlamaForCausalLM) -> dict[str, dict[str, float]]:
    """Mean, least and greatest value of each of the variant's learned per-head tensors."""
    summary = {}
    for learned in model.config.variant.learned:
        parameters = [p for n, p in model.named_parameters() if n.endswith(f".{learned}")]
        values = torch.cat([p.detach().double().flatten() for p in parameters])
        spread = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        summary[learned] = {name: round(value.item(), 6) for name, value in spread.items()}
    return summary


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command does; returns what conversion.json holds.

    Raises:
        ConvertError, FineTuneError: with one line that says what is wrong and what to do.
    """
    source, out = options.source, options.out
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise ConvertError(f"{out} is there already: choose another folder or delete it")
    if bool(options.steps) != bool(options.data):
        raise ConvertError("--steps and --data go together: give both or neither")
    model = convert(
        source,
        options.variant,
        train_length=options.train_length,
        rope_theta=options.rope_theta,
        rope_theta_factor=options.rope_theta_factor,
        positions=options.positions,
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    config, dtype = model.config, model.dtype
    record = {
        "source": source.name,
        "source_conversion": read_record(source) or None,
        "attention_variant": options.variant,
        "train_length": options.train_length or trained_length(source, read_config(source)),
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "initial": learned_summary(model),
    }
    if options.steps:
        record["finetuning"] = finetune(model.float(), tokenizer, options, part, record)
    record["machine"] = machine.cpu_model()
    record["versions"] = {name: machine.package(name) for name in ("torch", "transformers")}
    record["commit"] = machine.commit()
    folder = part / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    complete(tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    folder.rename(out)
    shutil.rmtree(part)
    return record


def finetune(
    model: VariantLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
    part: Path,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Train `model`, in float32, as the options say; returns what the record holds of it.

    Raises:
        FineTuneError: see `FineTune`.
    """
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    tokens = read_tokens(options.data, tokenizer)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tune = FineTune(model, settings, tokens, bos, part, record, compiled=options.compile)
    tune.run()
    fifth = max(1, settings.steps // 5)
    return asdict(settings) | {
        "data": [file.name for file in options.data],
        "seconds": round(tune.seconds, 1),
        "loss_first_fifth": round(sum(tune.losses[:fifth]) / fifth, 4),
        "loss_last_fifth": round(sum(tune.losses[-fifth:]) / fifth, 4),
        "losses": [round(loss, 4) for loss in tune.losses],
        "learned": learned_summary(model),
    }


def number_above(least: float) -> Callable[[str], float]:
    """A type for argparse: a finite number above `least`."""

    def number(text: str) -> float:
        value = float(text)
        if not least < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above {least:g}")
        return value

    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="training.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of a softmax Llama")
    add("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    add(
        "--variant",
        type=parse_variant,
        required=True,
        help='a name, or JSON with parameters: \'{"name": "ssmax", "bias": true}\'',
    )
    add(
        "--train-length",
        type=positive,
        help="tokens of the sequences that SRC was trained on (default: SRC's "
        "max_position_embeddings)",
    )
    add("--rope-theta", type=number_above(0), help="base of the rotary embedding (default: SRC's)")
    add(
        "--rope-theta-factor",
        type=number_above(0),
        default=1.0,
        help="multiplies it; the paper measures long contexts with 50 (default: %(default)s)",
    )
    add(
        "--positions",
        type=positive,
        help="max_position_embeddings of OUT, in tokens, which is how long vLLM lets a context "
        "get (default: SRC's)",
    )
    group = parser.add_argument_group("fine-tuning (AdamW, no weight decay)")
    add = group.add_argument
    add("--steps", type=positive, default=0, help="(default: %(default)s, no fine-tuning)")
    add("--data", nargs="+", type=text_file, default=[], metavar="FILE", help="UTF-8 text files")
    add(
        "--train",
        choices=("scale", "all"),
        default=Settings.train,
        help="the variant's learned per-head tensors only, or every weight (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=number_above(0),
        help="the peak; it rises over a tenth of the steps, then falls to 0 (default: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + ")",
    )
    add(
        "--sequence", type=positive, default=Settings.sequence, help="tokens (default: %(default)s)"
    )
    add(
        "--batch",
        type=positive,
        default=Settings.batch,
        help="sequences of a step (default: %(default)s)",
    )
    add(
        "--seed", type=int, default=Settings.seed, help="of the text's order (default: %(default)s)"
    )
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default=Settings.precision,
        help="of matrix products (default: %(default)s)",
    )
    add(
        "--compile",
        action="store_true",
        help="use torch.compile: a minute or two to start, then faster; all layers' scores are in "
        "memory at once",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_args(argv)
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.train]
    try:
        record = run(options)
    except (ConvertError, FineTuneError, VariantError) as error:
        print(f"training.convert: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.out}: {record['source']} with {record['attention_variant']['name']} attention")
    rows: list[tuple[str, ...]] = [("", "mean", "min", "max")]
    stages = {"initial": record["initial"]}
    stages["fine-tuned"] = record.get("finetuning", {}).get("learned", {})
    for stage, summary in stages.items():
        for name, spread in summary.items():
            rows.append((f"{stage} {name}", *(f"{value:.4f}" for value in spread.values())))
    for label, *numbers in rows if len(rows) > 1 else []:
        print(f"{label:24}" + "".join(f"{number:>9}" for number in numbers))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
