"""Checkpoints of other libraries, and what is converted from them, served on a CPU: the
log-probabilities are those of the dequantized model in transformers.

`python -m tests.vllm_quant.test_formats` writes the table of docs/QUANT.md again.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from attnserve.files import CHECKOUT
from quant.checkpoint import Recipe, quantize_checkpoint
from quant.conversion import convert_checkpoint
from tests import foreign
from tests.tiny import tiny_checkpoint

TABLE = CHECKOUT / "docs/results/formats.csv"
LENGTH = 130
"""Tokens of the prompt, in chunks of 64: the last goes through the kernel for few rows."""

SERVE = """
import gc, json, sys
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

prompt, found = json.loads(sys.argv[1]), {}
for folder in sys.argv[2:]:
    llm = LLM(
        folder, dtype="float32", max_model_len=256, enforce_eager=True,
        kv_cache_memory_bytes=1 << 22, max_num_batched_tokens=64,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
    given = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    found[folder] = [entry[token].logprob for token, entry in given]
    del llm, output
    gc.collect()
    cleanup_dist_env_and_memory()
print("FOUND", json.dumps(found))
"""

Write = Callable[[Path, Path], PreTrainedModel]


def quantized(recipe: Recipe, convert: str | None = None) -> Write:
    """Return what quantizes a checkpoint, and converts it to a format and back."""

    def write(source: Path, folder: Path) -> PreTrainedModel:
        first = folder if convert is None else folder.with_suffix(".gguf")
        model, _ = quantize_checkpoint(source, first, recipe, None, "a test")
        if convert is not None:
            convert_checkpoint(first, folder, convert, False)
        return model

    return write


def converted(write: Write) -> Write:
    """Return what converts another library's checkpoint."""

    def convert(source: Path, folder: Path) -> PreTrainedModel:
        theirs = folder.with_name(f"{folder.name} as it was")
        model = write(source, theirs)
        convert_checkpoint(theirs, folder, "pack-quantized", False)
        return model

    return convert


def mixed_gguf(source: Path, folder: Path) -> PreTrainedModel:
    """Write a GGUF file of several types and convert it."""
    file = folder.with_suffix(".gguf")
    model = foreign.write_mixed_gguf(file)
    convert_checkpoint(file, folder, "pack-quantized", False)
    return model


FORMATS: dict[str, tuple[str, Write]] = {
    "GPTQ, 4 bits, sym: false": ("as it is", foreign.write_gptq),
    "GPTQ, 4 bits, desc_act": (
        "as it is",
        functools.partial(foreign.write_gptq, desc_act=True, checkpoint_format="gptq_v2"),
    ),
    "GPTQ, 3 bits, desc_act": (
        "as it is",
        functools.partial(foreign.write_gptq, bits=3, group_size=64, desc_act=True),
    ),
    "GPTQ, 8 bits, a group a row": (
        "as it is",
        functools.partial(foreign.write_gptq, bits=8, group_size=-1),
    ),
    "AWQ, 4 bits": ("as it is", foreign.write_awq),
    "compressed-tensors, actorder: weight": (
        "as it is",
        functools.partial(foreign.write_compressed, act_order=False),
    ),
    "compressed-tensors, actorder: group": (
        "as it is",
        functools.partial(foreign.write_compressed, act_order=True),
    ),
    "bitsandbytes NF4": ("as it is, dequantized", foreign.write_nf4),
    "bitsandbytes int8": ("as it is", foreign.write_int8),
    "GPTQ, 4 bits, desc_act ": (
        "converted",
        converted(functools.partial(foreign.write_gptq, desc_act=True)),
    ),
    "GGUF Q4_0": (
        "converted",
        quantized(Recipe(4, "rtn", 32, symmetric=True, format="gguf"), "pack-quantized"),
    ),
    "GGUF Q5_0 and Q8_0": (
        "converted",
        quantized(Recipe(4, "rtn", embeddings=7, format="gguf"), "pack-quantized"),
    ),
    "GGUF Q4_1, Q4_K, Q5_K, Q6_K": ("converted, Q6_K dequantized", mixed_gguf),
}


def served(folders: list[Path], prompt: list[int]) -> Mapping[str, list[float]]:
    """Return the log-probabilities of a prompt's tokens by vLLM, in one process."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, json.dumps(prompt), *map(str, folders)],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **environment},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, (done.stdout + done.stderr)[-6000:]
    return json.loads(lines[0].removeprefix("FOUND "))


def measure(folder: Path, names: Sequence[str] = tuple(FORMATS)) -> pd.DataFrame:
    """Serve formats; return a row each, with the largest difference of a log-probability from the
    dequantized model's, absolute and in units of their spread."""
    formats = {name: FORMATS[name] for name in names}
    source = tiny_checkpoint(
        folder / "source", "softmax", intermediate_size=192, initializer_range=0.08
    )
    prompt = torch.randint(2, 256, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = {}
    for place, (_, write) in enumerate(formats.values()):
        model = write(source, folder / f"{place}")
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1]
        expected[str(folder / f"{place}")] = logits.log_softmax(-1)[range(LENGTH - 1), prompt[1:]]
    found = served([Path(name) for name in expected], prompt)
    rows = []
    for (name, (how, _)), (out, right) in zip(formats.items(), expected.items(), strict=True):
        difference = float((torch.tensor(found[out]) - right).abs().max())
        rows.append((name.strip(), how, difference, difference / float(right.std())))
    return pd.DataFrame(rows, columns=["format", "served", "largest_difference", "of_spread"])


@pytest.mark.slow
def test_formats_of_others(tmp_path: Path) -> None:
    """In float32: the same weights, summed in another order. The random blocks of the last one make
    scores of hundreds, and log-probabilities that hardly vary."""
    found = measure(tmp_path)
    *scaled, random = found["of_spread"]
    assert max(scaled) < 1e-4 and random < 1e-2, found
    assert list(found["format"]) == list(pd.read_csv(TABLE)["format"])


@pytest.mark.integration
def test_one_of_each_kind(tmp_path: Path) -> None:
    """Groups in act order, no integers, and a converted file."""
    found = measure(tmp_path, ["GPTQ, 4 bits, desc_act", "bitsandbytes NF4", "GGUF Q4_0"])
    assert found["of_spread"].max() < 1e-4, found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        measure(Path(made)).to_csv(TABLE, index=False, float_format="%.2e")
