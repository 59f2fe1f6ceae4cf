"""What a server says that it runs, from configurations that vLLM has settled. What real servers say
in their /metrics is looked at where there are some: test_serve.py, test_pruned.py, test_stock.py,
test_bf16.py, tests/vllm_quant/test_served.py."""

from __future__ import annotations

import json
import logging
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from transformers import MambaConfig

from attn_kernels import variant_names
from serving.upstream.vllm_metrics import FIELDS
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint, tiny_tokenizer
from tests.vllm_attn.client import Client
from vllm_attn.server_info import NAME, ServerInfoLogger, server_info

PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}
BUDGETS = {"name": "selective", "kv_budgets": [8, 4, 12]}


def make_config(checkpoint: Path, **options: Any) -> Any:
    """Return what vLLM does before it starts an engine."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "float32", "max_model_len": 256, "served_model_name": "m", **options}
    return EngineArgs(str(checkpoint), **options).create_engine_config()


def quantized(folder: Path, entry: dict[str, Any], **fields: Any) -> Path:
    """Return a checkpoint whose config.json says it is quantized; nothing loads its weights."""
    tiny_checkpoint(folder, "softpick", **fields)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    return folder


def group(bits: int, *targets: str) -> dict[str, Any]:
    """Return a group of compressed-tensors."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 64}
    return {"targets": list(targets), "weights": weights | {"symmetric": True, "dynamic": False}}


@pytest.mark.parametrize("name", variant_names())
def test_variant_and_dtypes(name: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, name)
    assert server_info(make_config(tmp_path)) == {
        "model_name": "m",
        "variant": name,
        "kv_budgets": "",
        "weight_bits": "32",
        "embedding_bits": "32",
        "weight_method": "none",
        "kv_cache_dtype": "float32",
    }
    cache = "int8_per_token_head"
    info = server_info(make_config(tmp_path, dtype="bfloat16", kv_cache_dtype=cache))
    assert (info["weight_bits"], info["kv_cache_dtype"]) == ("16", cache)


def test_gateway_reads_every_field(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "softmax")
    assert set(server_info(make_config(tmp_path))) == set(FIELDS)


def test_budgets(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, BUDGETS)
    assert server_info(make_config(tmp_path))["kv_budgets"] == "8,4,12"


def test_vllms_own_attention_is_softmax(tiny_llama: Path) -> None:
    info = server_info(make_config(tiny_llama, kv_cache_dtype="fp8"))
    assert (info["variant"], info["kv_cache_dtype"]) == ("softmax", "fp8")
    assert server_info(make_config(tiny_llama, attention_backend="LSSA"))["variant"] == "lssa"


def test_model_without_attention(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(512)
    tokenizer.save_pretrained(tmp_path)
    MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        architectures=["MambaForCausalLM"],
    ).save_pretrained(tmp_path)
    assert server_info(make_config(tmp_path))["variant"] == "none"


@pytest.mark.parametrize(
    ("entry", "linear", "embeddings", "method"),
    [
        ({**PACKED, "config_groups": {"a": group(3, "Linear")}}, "3", "16", "compressed-tensors"),
        (
            {
                **PACKED,
                "config_groups": {
                    "a": group(8, "re:.*layers.0.*"),
                    "b": group(2, "Linear"),
                    "c": group(4, "Embedding", "lm_head"),
                },
            },
            "2,8",
            "4",
            "compressed-tensors",
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "sym": True},
            "8",
            "16",
            "gptq",
        ),
    ],
    ids=["packed", "mixed", "gptq"],
)
def test_quantized(
    entry: dict[str, Any], linear: str, embeddings: str, method: str, tmp_path: Path
) -> None:
    info = server_info(make_config(quantized(tmp_path, entry), dtype="bfloat16"))
    assert (info["weight_bits"], info["embedding_bits"]) == (linear, embeddings)
    assert method in info["weight_method"]


def test_second_server_of_a_process_replaces_the_first(tmp_path: Path) -> None:
    for name in ("softpick", "softmax"):
        tiny_checkpoint(tmp_path / name, name)
        ServerInfoLogger(make_config(tmp_path / name), [0]).log_engine_initialized()
        samples = [s for f in REGISTRY.collect() if f.name == NAME for s in f.samples]
        assert [(s.labels["variant"], s.value) for s in samples] == [(name, 1.0)]


def test_server_that_cannot_be_described_starts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says in its log what its /metrics lack, and why."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    ServerInfoLogger(None, [0]).log_engine_initialized()
    record = caplog.records[0]  # twice where another logger of vLLM's propagates, too
    assert record.levelname == "ERROR"
    assert record.getMessage() == f"{NAME} is not published"
    assert record.exc_info and record.exc_info[0] is AttributeError


@pytest.mark.slow
def test_several_api_servers_say_it_once(tiny_llama: Path) -> None:
    """Each is a process of its own; vLLM gathers their metrics."""
    args = ("--api-server-count=2", "--dtype=float32", "--served-model-name=m")
    with vllm_server(tiny_llama, *args) as server:
        page = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        info = Client(server).server_info()
    assert len(re.findall(f"^{NAME}{{", page, re.MULTILINE)) == 1
    assert (info.model_name, info.variant, info.weight_bits) == ("m", "softmax", "32")
