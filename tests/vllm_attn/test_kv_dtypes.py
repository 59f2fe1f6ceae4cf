"""KV caches of 8 and 4 bits from a real `vllm serve`: log-probabilities are those of the reference
that quantizes keys and values in the same way, and vLLM counts the tokens that fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from attn_kernels import get_variant, variant_names
from attn_kernels.kv_quant import KV_FORMATS, KVFormat
from tests.quantized import quantize
from tests.reference_model import ReferenceModel
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.client import Client
from tests.vllm_attn.test_refusals import make_config
from vllm_attn import register
from vllm_attn.report import StartupError

pytestmark = pytest.mark.integration

register()

KV_BYTES = 1 << 20
SERVE = (
    "--dtype=float32",
    "--block-size=16",
    "--max-num-batched-tokens=64",  # prefill in chunks
    "--max-model-len=256",
    f"--kv-cache-memory-bytes={KV_BYTES}",
)


def logprobs(ckpt: Path, tokens: list[int], kv_format: KVFormat | None) -> Tensor:
    """Of every token but the first, by the reference."""
    model = ReferenceModel(ckpt, kv_format=kv_format)
    rows = torch.stack([model.read(token).log_softmax(-1) for token in tokens[:-1]])
    return rows[range(len(rows)), tokens[1:]]


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_of_a_slot", "window"),
    [
        # Of a head of 32 float32 keys and values: what is quantized, parameters, an accumulator.
        ("softpick", "int8_per_token_head", 2 * (32 + 4), None),
        ("selective", "int4_per_token_head", 2 * (16 + 4) + 4, None),
        *(
            pytest.param(name, dtype, None, window, marks=pytest.mark.slow)
            for name in variant_names()
            for dtype, window in (("int8_per_token_head", 24), ("int4_per_token_head", None))
        ),
    ],
)
def test_served(
    name: str, dtype: str, bytes_of_a_slot: int | None, window: int | None, tmp_path: Path
) -> None:
    ckpt = tiny_checkpoint(tmp_path, name, initializer_range=0.08, sliding_window=window)
    prompt = torch.randint(2, 256, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    with vllm_server(ckpt, *SERVE, f"--kv-cache-dtype={dtype}") as server:
        client = Client(server)
        assert client.server_info().kv_cache_dtype == dtype
        answer = client.greedy(prompt, 12)  # decoded against the cache
        tokens = prompt + answer
        served = torch.tensor(client.prompt_logprobs(tokens), dtype=torch.float64)
        log = server.log()
    exact = logprobs(ckpt, tokens, None)
    expected = logprobs(ckpt, tokens, KV_FORMATS[dtype])
    error, effect = (served - expected).abs(), (exact - expected).abs()
    assert expected.std() > 0.1, "the log-probabilities hardly vary: the comparison means nothing"
    # A float32 key may be rounded to another value than a float64 one, which every query that sees
    # it then differs by.
    assert error.max() < 0.1 * effect.max()
    assert error.mean() < 0.03 * effect.mean()
    assert error.median() < 0.01 * effect.median()
    model = ReferenceModel(ckpt, kv_format=KV_FORMATS[dtype])
    rows = [model.read(token) for token in tokens[:-1]][len(prompt) - 1 :]
    for row, token in zip(rows, answer, strict=True):
        assert row[token] >= row.max() - 0.01 * row.std()
    if bytes_of_a_slot is not None:
        blocks = KV_BYTES // (3 * 2 * 16 * bytes_of_a_slot)  # 3 layers of 2 KV heads
        (fits,) = re.findall(r"KV cache size: ([\d,]+) tokens", log)
        assert int(fits.replace(",", "")) == 16 * blocks


@pytest.mark.parametrize("name", variant_names())
@pytest.mark.parametrize(
    ("dtype", "size", "times"),
    [
        ("int8_per_token_head", 64, 256 / 136),
        ("int8_per_token_head", 128, 512 / 264),
        ("int4_per_token_head", 64, 256 / 72),
        ("int4_per_token_head", 128, 512 / 136),
    ],
)
def test_pages_are_smaller(name: str, dtype: str, size: int, times: float) -> None:
    """Than those of bfloat16; accumulators and sums of gates stay what they are."""
    backend = AttentionBackendEnum[name.upper()].get_class()
    mode = get_kv_quant_mode(dtype)
    shape: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": size}
    low = FullAttentionSpec(**shape, dtype=torch.uint8, kv_quant_mode=mode)
    plain = FullAttentionSpec(**shape, dtype=torch.bfloat16)
    variant = get_variant(name)
    state = 2 * 16 * (4 * variant.stateful + 8 * variant.gated)
    few, many = (backend.customize_spec(s).page_size_bytes - state for s in (low, plain))
    assert many / few == pytest.approx(times)


def test_the_checkpoint_names_it(tmp_path: Path) -> None:
    """As `quant.quantize` writes it. A flag comes first, and what is no dtype is refused."""
    plain, ckpt = tiny_checkpoint(tmp_path / "plain", "softpick"), tmp_path / "a"
    quantize([str(plain), str(ckpt), "--kv-cache-dtype=int4_per_token_head"])
    assert make_config(ckpt).cache_config.cache_dtype == "int4_per_token_head"
    other = make_config(ckpt, kv_cache_dtype="int8_per_token_head")
    assert other.cache_config.cache_dtype == "int8_per_token_head"
    ckpt = tiny_checkpoint(tmp_path / "b", "softpick", kv_cache_dtype="int3")
    with pytest.raises(StartupError, match=r"names the kv_cache_dtype 'int3'.*int8_per_token_head"):
        make_config(ckpt)


def test_budgets_refuse_it(tmp_path: Path) -> None:
    ckpt = tiny_checkpoint(tmp_path, {"name": "selective", "kv_budgets": [8, 4, 12]})
    with pytest.raises(StartupError, match="kv_budgets do not go with a KV cache of int8_per_"):
        make_config(ckpt, kv_cache_dtype="int8_per_token_head")
