"""`vllm serve` on a GPU with CUDA graphs: its greedy tokens are those of the float64 reference,
which the CPU gives, too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnserve import machine
from attnserve.files import CHECKOUT
from quant_kernels.pack import unpack
from quant_kernels.weight import QuantizedWeight, QuantSpec
from tests.reference_model import reference_greedy
from tests.servers import vllm_server
from tests.vllm_attn.client import Client

PROMPT_TOKENS, NEW_TOKENS = (5, 17, 33, 40, 64, 90, 120, 150), 24
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.25}
"""Distance of the reference's two best logits below which a token may come out the other way."""


def checkpoint(name: str) -> Callable[[Path], tuple[Path, Path]]:
    """Return what gives the folder that is served and the one that the reference reads."""
    folder = CHECKOUT / "checkpoints" / name
    return lambda _: (folder, folder)


def three_bits(scratch: Path) -> tuple[Path, Path]:
    """Quantize checkpoints/softpick to 3 bits; the reference reads the dequantized weights."""
    packed, plain = scratch / "packed", scratch / "plain"
    command = [sys.executable, "-m", "quant.quantize", str(CHECKOUT / "checkpoints/softpick")]
    command += [str(packed), "--bits=3", "--scheme=rtn"]
    subprocess.run(command, check=True, cwd=CHECKOUT)
    dequantize(packed, plain)
    return packed, plain


def dequantize(packed: Path, plain: Path) -> None:
    """Write a packed checkpoint's weights and config.json as those of an unquantized one."""
    config = json.loads((packed / "config.json").read_text())
    weights = config.pop("quantization_config")["config_groups"]["group_0"]["weights"]
    spec = QuantSpec(weights["num_bits"], weights["group_size"], weights["symmetric"])
    stored: dict[str, torch.Tensor] = {}
    for file in packed.glob("*.safetensors"):
        stored |= load_file(file)
    tensors = {name: t for name, t in stored.items() if ".weight_" not in name}
    for name, words in stored.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            rows, columns = stored[f"{layer}.weight_shape"].tolist()
            zeros = stored.get(f"{layer}.weight_zero_point")
            if zeros is not None:
                # Packed along the rows: a column of zero points is consecutive.
                zeros = unpack(zeros.T.contiguous(), spec.bits, rows).T.contiguous()
            values = unpack(words, spec.bits, columns)
            weight = QuantizedWeight(values, stored[f"{layer}.weight_scale"], zeros, spec)
            tensors[f"{layer}.weight"] = weight.dequantize()
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class ServedCase:
    """A server.

    Attributes:
        folders: gives the folder that is served and the reference's, from a scratch folder.
        dtype: of the model.
        graphs: vLLM's `cudagraph_mode`; with "FULL" the model is not compiled. None: on the CPU.
        variant: replaces the `attention_variant` of config.json.
    """

    name: str
    folders: Callable[[Path], tuple[Path, Path]]
    dtype: str
    graphs: str | None
    variant: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.graphs or 'on the CPU'}"

    def arguments(self) -> list[str]:
        """Return those of `vllm serve`."""
        found = [f"--dtype={self.dtype}", "--max-model-len=256"]
        if self.variant:
            found.append(f"--hf-overrides={json.dumps({'attention_variant': self.variant})}")
        if self.graphs:
            mode = {"mode": 0} if self.graphs == "FULL" else {}
            compilation = json.dumps({**mode, "cudagraph_mode": self.graphs})
            found += ["--no-enforce-eager", "--gpu-memory-utilization=0.1"]
            found += [f"--compilation-config={compilation}"]
        return found


BUDGETS = {"name": "selective", "kv_budgets": [8, 8, 12, 16]}
GPU_CASES = [
    *(
        ServedCase(name, checkpoint(name), "float32", "FULL")
        for name in ("softpick", "selective", "lssar", "lssa", "ssmax", "softmax")
    ),
    ServedCase("selective within budgets", checkpoint("selective"), "float32", "FULL", BUDGETS),
    ServedCase("softpick in 3 bits", three_bits, "float32", "FULL"),
    ServedCase("softpick", checkpoint("softpick"), "float32", "FULL_AND_PIECEWISE"),
    ServedCase("softpick", checkpoint("softpick"), "bfloat16", "FULL_AND_PIECEWISE"),
]


def compare(
    answer: Sequence[int], expected: Sequence[int], margins: Sequence[float], tie: float
) -> int:
    """Return how many tokens agree; a difference at a near tie ends the comparison.

    Args:
        answer, expected: tokens.
        margins: distances of the reference's two best logits.
        tie: largest margin that is a near tie.

    Raises:
        AssertionError: they differ elsewhere.
    """
    for index, (found, wanted, margin) in enumerate(zip(answer, expected, margins, strict=True)):
        if found != wanted:
            assert margin <= tie, f"token {index} is {found}, not {wanted} (margin {margin:.2g})"
            return index
    return len(answer)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            ServedCase("softpick in 3 bits", three_bits, "float32", None), marks=pytest.mark.slow
        ),
        *(
            pytest.param(case, marks=[pytest.mark.gpu, pytest.mark.xdist_group(f"served {n % 5}")])
            for n, case in enumerate(GPU_CASES)
        ),
    ],
    ids=str,
)
def test_same_tokens_as_the_reference(case: ServedCase, tmp_path: Path) -> None:
    version = machine.package("vllm")
    if case.graphs and (not version or version.endswith("+cpu")):
        pytest.skip(f"vLLM for CUDA is not installed (found {version or 'none'})")
    served, plain = case.folders(tmp_path)
    vocabulary = json.loads((plain / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_TOKENS
    ]
    with vllm_server(served, *case.arguments()) as server:
        answers = Client(server).greedy_batch(prompts, NEW_TOKENS)
        log = server.log()
    agreed = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        greedy = reference_greedy(plain, prompt, NEW_TOKENS, case.variant)
        tie = NEAR_TIE[case.dtype]
        agreed += compare(answer, greedy.tokens, greedy.margins, tie)
    assert agreed > 0.5 * NEW_TOKENS * len(prompts), "too many near ties to compare"
    if case.graphs:
        assert "Graph capturing finished" in log


def test_compare() -> None:
    assert compare([1, 2, 3], [1, 2, 3], [9.0, 9.0, 9.0], 0.1) == 3
    assert compare([1, 5, 6], [1, 2, 3], [9.0, 0.05, 9.0], 0.1) == 1
    with pytest.raises(AssertionError, match="token 1 is 5, not 2"):
        compare([1, 5, 6], [1, 2, 3], [9.0, 0.2, 9.0], 0.1)
