"""Packed checkpoints behind a real `vllm serve`: log-probabilities are those of the model that the
sweep measures, which computes with dequantized weights in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import APIStatusError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from quant.budget import candidates, spend
from quant.checkpoint import Recipe, quantize_checkpoint
from quant.schemes.registry import get_scheme
from quant.texts import Sources, calibration_text
from quant_kernels.weight import QuantSpec
from tests.servers import failed_start, vllm_server
from tests.tiny import tiny_checkpoint
from tests.training.texts import write_texts
from tests.vllm_attn.client import Client

SERVE = ("--max-num-batched-tokens=64", "--max-model-len=256")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Books to calibrate on."""
    return Data(*write_texts(tmp_path_factory.mktemp("texts")))


def quantized(
    tmp_path: Path, data: Data, recipe: Recipe, variant: str = "softpick", **overrides: Any
) -> tuple[Path, PreTrainedModel]:
    """Return a tiny quantized checkpoint, and the model that the sweep would measure.

    176 columns are no whole number of groups.
    """
    fields = {"intermediate_size": 176, "initializer_range": 0.08} | overrides
    source = tiny_checkpoint(tmp_path / "source", variant, **fields)
    sources = Sources(books=data.books)
    text = (
        calibration_text(sources, Checkpoint(source, longest=512), 4, seed=0)
        if recipe.calibrated
        else None
    )
    specs: dict[str, QuantSpec] = {}
    if recipe.bits_per_weight is not None:
        assert text is not None
        scheme, budget = get_scheme(recipe.scheme), recipe.bits_per_weight
        widths = candidates(scheme, budget, recipe.group_size)
        specs = spend(source, scheme, recipe.options, widths, budget, text, text)
        assert len(set(specs.values())) > 1, "all layers have the same width"
    model, sizes = quantize_checkpoint(source, tmp_path / "out", recipe, text, "a test", specs)
    assert sizes.loc["linear", "after"] < sizes.loc["linear", "before"]
    return tmp_path / "out", model


def log_probabilities(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """Of every token of the prompt but the first."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1]
    return logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]


def said_of(out: Path) -> tuple[str, str]:
    """Bits of linear layers, and the method."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = [
        group for group in config["config_groups"].values() if "lm_head" not in group["targets"]
    ]
    bits = sorted({group["weights"]["num_bits"] for group in groups})
    return ",".join(map(str, bits)), config["quant_method"]


def differences(
    out: Path,
    model: PreTrainedModel,
    *arguments: str,
    dtype: str = "float32",
    logged: str = "attnserve's CPU kernels",
) -> Tensor:
    """Of served log-probabilities from the model's, in units of their spread. The prompt goes
    through the kernel for many rows and, its last chunk, through the one for few."""
    prompt = torch.randint(2, 256, (130,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = log_probabilities(model, prompt)
    assert expected.std() > 0.1, "the log-probabilities hardly vary: the comparison means nothing"
    with vllm_server(out, *SERVE, f"--dtype={dtype}", *arguments) as server:
        client = Client(server)
        info = client.server_info()
        assert (info.weight_bits, info.weight_method) == said_of(out)
        served = torch.tensor(client.prompt_logprobs(prompt))
        assert logged in server.log()
        # A decoding step goes through the kernel for one row.
        answer = client.greedy(prompt, 8)
        again = torch.tensor(client.prompt_logprobs(prompt + answer))[len(prompt) - 1 :]
    with torch.inference_mode():
        for i, token in enumerate(answer):
            logits = model(input_ids=torch.tensor([prompt + answer[:i]])).logits[0, -1]
            assert logits[token] >= logits.max() - 0.05 * logits.std()
    expected_again = log_probabilities(model, prompt + answer)[len(prompt) - 1 :]
    return torch.cat([served - expected, again - expected_again]).abs() / expected.std()


def test_mixed_bits(tmp_path: Path, data: Data) -> None:
    """Linear layers of several widths with two-level scales, some in groups of 16, and one 8-bit
    matrix for tied embeddings and head."""
    recipe = Recipe(2, "two-level", embeddings=8, bits_per_weight=2.6)
    out, model = quantized(tmp_path, data, recipe, tie_word_embeddings=True)
    assert differences(out, model).max() < 1e-4


@pytest.mark.parametrize("embeddings", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_ids_beyond_the_table(embeddings: int | None, tmp_path: Path) -> None:
    """Are the client's error; whoever sent them, the server answers the next request."""
    source = tiny_checkpoint(tmp_path / "source", "softpick")
    rows = AutoConfig.from_pretrained(source).vocab_size
    recipe = Recipe(4, "rtn", embeddings=embeddings)
    quantize_checkpoint(source, tmp_path / "out", recipe, None, "a test")
    with vllm_server(tmp_path / "out", *SERVE, "--dtype=float32") as server:
        client = Client(server)
        answer = client.greedy([5, rows - 1], 4)
        for token in (rows, 200_000, 2**31, -1):
            with pytest.raises(APIStatusError) as error:
                client.greedy([5, token], 4)
            assert error.value.status_code == 400, error.value
        assert client.greedy([5, rows - 1], 4) == answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "variant"),
    [
        (Recipe(2, "gptq"), "softpick"),
        (Recipe(3, "hqq", embeddings=3), "softmax"),
        (Recipe(3, "two-level"), "selective"),
        (Recipe(4, "rtn", embeddings=8), "lssa"),
        (Recipe(4, "gptq", 32, symmetric=True), "ssmax"),
        (Recipe(5, "rtn", 128), "lssa"),
        (Recipe(6, "rtn", None), "lssar"),
        (Recipe(7, "rtn", None, symmetric=True), "selective"),
        (Recipe(8, "rtn", embeddings=8), "softpick"),
    ],
)
def test_all_bits(recipe: Recipe, variant: str, tmp_path: Path, data: Data) -> None:
    """All bits, schemes and variants; embeddings and heads that are not tied."""
    out, model = quantized(tmp_path, data, recipe, variant)
    assert differences(out, model).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bfloat16(bits: int, tmp_path: Path, data: Data) -> None:
    """Activations are rounded to bfloat16 between layers."""
    recipe = Recipe(bits, "hqq", embeddings=8)
    out, model = quantized(tmp_path, data, recipe, tie_word_embeddings=True, dtype="bfloat16")
    found = differences(out, model, dtype="bfloat16")
    assert found.mean() < 0.02
    assert found.max() < 0.1


@pytest.mark.slow
def test_int8_of_vllm(tmp_path: Path, data: Data) -> None:
    """The control: 8 bits of weights and inputs in vLLM's own format and kernel. An input that is
    rounded to bfloat16 first often gets the next of 256 values, which is a larger step."""
    recipe = Recipe(8, "rtn", None, symmetric=True, activations=True)
    out, model = quantized(tmp_path, data, recipe, dtype="bfloat16")
    found = differences(out, model, dtype="bfloat16", logged="CPUInt8ScaledMMLinearKernel")
    assert found.mean() < 0.05
    assert found.max() < 0.25


@pytest.mark.slow
def test_compiled(tmp_path: Path, data: Data) -> None:
    """In a compiled model (what `vllm serve` does by default) the kernels are operators."""
    out, model = quantized(tmp_path, data, Recipe(4, "rtn", embeddings=4))
    assert differences(out, model, "--no-enforce-eager").max() < 1e-4


@pytest.mark.slow
def test_groups_that_the_kernels_do_not_take(tmp_path: Path, data: Data) -> None:
    """One line, before anything is loaded."""
    out, _ = quantized(tmp_path, data, Recipe(4, "rtn"))
    config = out / "config.json"
    config.write_text(config.read_text().replace('"group_size": 64', '"group_size": 16'))
    code, log = failed_start(out, *SERVE)
    assert code != 0
    assert "groups of 16 columns: the CPU kernels take multiples of 32" in log
