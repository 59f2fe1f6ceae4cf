"""A softmax Llama's weights under another attention variant, and the record of how."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from attn_kernels import Variant, get_variant, variant_from_config
from attnserve import machine
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint, read_config
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM
from training.data import data_tokens
from training.finetune import FineTune
from training.recipe import Conversion, FineTuning
from training.tokenizer import complete

RECORD = "conversion.json"


def initial_scale(train_length: int) -> float:
    """Return 1 / mean(ln n over n = 1 ... train_length), the scale that replaces softmax."""
    if train_length < 2:
        raise UserError(f"a training length of {train_length} is too short: at least 2 tokens")
    return train_length / math.lgamma(train_length + 1)  # lgamma(n + 1) = ln n!


def convertible_config(source: Path, target: Variant | None) -> PreTrainedConfig:
    """Return the configuration of a folder that can be converted."""
    config = read_config(source)
    variant = variant_from_config(config)
    if config.model_type not in ("llama", "variant_llama"):
        raise UserError(f"{source} is a {config.model_type}: only Llamas can be converted")
    if variant not in (None, get_variant("softmax"), target):
        raise UserError(
            f"{source} has {variant.name} attention already: convert the softmax checkpoint"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"{source} is quantized: convert the original, then quantize")
    return config


def read_record(source: Path) -> dict[str, Any]:
    """Return what conversion.json says of a converted folder; empty for others."""
    file = source / RECORD
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def trained_length(source: Path, config: PreTrainedConfig) -> int:
    """Return the tokens of the sequences that a checkpoint was trained on, as its folder says."""
    return int(read_record(source).get("train_length") or config.max_position_embeddings)


def convert(source: Path, variant: dict[str, Any], change: Conversion) -> VariantLlamaForCausalLM:
    """Return a checkpoint's weights, in its dtype, under another attention variant (`{"name":
    "ssmax", **parameters}`).

    The source is a Hugging Face folder of a softmax Llama, or of one with that variant already: it
    keeps its learned tensors, and only `change` changes anything.
    """
    config = convertible_config(source, variant_from_config({"attention_variant": variant}))
    length = change.train_length or trained_length(source, config)
    scale = initial_scale(length)
    rope = dict(config.rope_parameters)
    rope["rope_theta"] = float(change.rope_theta or rope["rope_theta"])
    rope["rope_theta"] *= change.rope_theta_factor
    values = config.to_dict()
    for name in ("model_type", "architectures", "_name_or_path"):
        values.pop(name, None)
    values |= {"attention_variant": variant, "rope_parameters": rope}
    values["max_position_embeddings"] = change.positions or config.max_position_embeddings
    trained = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = VariantLlamaForCausalLM(VariantLlamaConfig(**values)).to(trained.dtype)
    result = model.load_state_dict(trained.state_dict(), strict=False)
    tensors = model.config.variant.tensors
    if wrong := [
        *(name for name in result.missing_keys if name.partition(".self_attn.")[2] not in tensors),
        *result.unexpected_keys,
    ]:
        raise UserError(f"{source} is no plain Llama: {wrong[0]} does not fit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".ssmax_scale") and name in result.missing_keys:
                parameter.fill_(scale)
            if name.endswith(".f_proj.weight") and name in result.missing_keys:
                parameter.zero_()
            if name.endswith(".f_proj.bias") and name in result.missing_keys:
                # As near to softmax as a gate that can still learn: over a sequence of this length
                # a token fades to 1 / e.
                parameter.fill_(math.log(length))
    return model.eval()


def learned_summary(model: VariantLlamaForCausalLM) -> dict[str, dict[str, float]]:
    """Return mean, least and greatest value of each of the variant's learned per-head tensors."""
    summary = {}
    for learned in model.config.variant.learned:
        parameters = [p for n, p in model.named_parameters() if n.endswith(f".{learned}")]
        values = torch.cat([p.detach().double().flatten() for p in parameters])
        spread = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        summary[learned] = {name: round(value.item(), 6) for name, value in spread.items()}
    return summary


def write(
    model: VariantLlamaForCausalLM,
    source: Path,
    out: Path,
    train_length: int | None,
    tuning: FineTuning,
    data: Sequence[Path],
    compiled: bool,
    device: str,
) -> dict[str, Any]:
    """Fine-tune what `convert` gives on a device, if `tuning` says so, write its folder and
    return what conversion.json holds.

    The folder is there whole or not at all; meanwhile there is `out.part`. `train_length` is that
    of the `Conversion`.
    """
    part = out.with_name(out.name + ".part")
    tokenizer = AutoTokenizer.from_pretrained(source)
    complete(tokenizer)
    config, dtype = model.config, model.dtype
    record = {
        "source": source.name,
        "source_conversion": read_record(source) or None,
        "attention_variant": config.attention_variant,
        "train_length": train_length or trained_length(source, read_config(source)),
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "initial": learned_summary(model),
    }
    if tuning.tunes:
        tokens = data_tokens(data, tokenizer)
        bos = Checkpoint(source).bos
        teacher = teacher_of(source, tuning.precision, device) if tuning.distill else None
        model = model.float().to(device)
        tune = FineTune(model, tuning, tokens, bos, part, record, teacher=teacher)
        tune.run(compiled)
        record["finetuning"] = tuned_record(tune, data)
    record["machine"] = machine.cpu_model()
    record["versions"] = {name: machine.package(name) for name in ("torch", "transformers")}
    record["commit"] = machine.commit()
    folder = part / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.to("cpu", dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    folder.rename(out)
    shutil.rmtree(part)
    return record


def teacher_of(source: Path, precision: str, device: str) -> PreTrainedModel:
    """Return the model whose predictions a conversion may follow: the source, in the precision of
    the training."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return teacher.eval().requires_grad_(False).to(device)


def tuned_record(tune: FineTune, data: Sequence[Path]) -> dict[str, Any]:
    """Return what the record holds of a fine-tuning."""
    fifth = max(1, tune.step // 5)
    on_gpu = tune.model.device.type == "cuda"
    memory = {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if on_gpu else {}
    shares = [round(share, 5) for share in tune.terms.get("memory", [])]
    return (
        asdict(tune.settings)
        | memory
        | ({"memory": shares} if shares else {})
        | {
            "steps": tune.step,
            "data": [file.name for file in data],
            "seconds": round(tune.seconds, 1),
            "loss_first_fifth": round(sum(tune.losses[:fifth]) / fifth, 4),
            "loss_last_fifth": round(sum(tune.losses[-fifth:]) / fifth, 4),
            "losses": [round(loss, 4) for loss in tune.losses],
            "divergences": [round(each, 5) for each in tune.terms.get("divergence", [])],
            "learned": learned_summary(tune.model),
        }
    )
