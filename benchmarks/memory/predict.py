"""What a server's memory must be, by its checkpoint's config.json and the shapes of its tensors."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from attn_kernels import get_variant
from attn_kernels.paged import STATE_BYTES
from attn_kernels.pruning import slot_bytes
from benchmarks.cases import Case
from benchmarks.quantized import weight_bytes
from benchmarks.servers import config_of

BLOCK_SIZE = 128
"""Tokens of vLLM's blocks on a CPU."""

QUANTITIES = {
    "kv_bytes_per_token": "KV bytes a token",
    "kv_bytes_per_request": "KV bytes a request",
    "requests_in_flight": "requests in flight",
    "kv_cache_bytes": "bytes of KV cache resident",
    "weight_bytes": "bytes of weights",
}
"""What is predicted and measured, and how people call it."""


def heads_of(config: dict[str, Any]) -> tuple[int, int]:
    """`(KV heads, head size)` of a layer."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    return config.get("num_key_value_heads") or heads, head_size


def request_bytes(case: Case, config: dict[str, Any], dtype: torch.dtype, length: int) -> int:
    """Bytes that a request of `length` tokens takes in all layers: whole blocks, where a slot of a
    stateful variant also has an accumulator for each KV head; or a page within budgets."""
    kv_heads, head_size = heads_of(config)
    if case.kv_budgets:
        slots = sum(min(budget, length) for budget in case.kv_budgets)
        return slots * slot_bytes(kv_heads, head_size, dtype)
    state = STATE_BYTES if get_variant(case.variant).stateful else 0
    token = config["num_hidden_layers"] * kv_heads * (2 * head_size * dtype.itemsize + state)
    return -(-length // BLOCK_SIZE) * BLOCK_SIZE * int(token)


def embedding_copies(config: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes that vLLM 0.32 takes on a CPU beside the tensors: it packs unquantized embeddings and
    the head for oneDNN, each of them, tied or not, and keeps what it has packed."""
    groups = config.get("quantization_config", {}).get("config_groups", {})
    if len(groups) > 1:  # quant.quantize's second group are the embeddings
        return 0
    return int(2 * config["vocab_size"] * config["hidden_size"] * dtype.itemsize)


def predict(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """All quantities of `QUANTITIES`, for requests of `prompt_len + new_tokens` tokens.

    Per token is per request by the request's tokens. The cache has as many whole blocks as fit; one
    of them is vLLM's own.
    """
    config, dtype = config_of(case.ckpt), getattr(torch, options.dtype)
    length = options.prompt_len + options.new_tokens
    request = request_bytes(case, config, dtype, length)
    blocks_of_request = 1 if case.kv_budgets else -(-length // BLOCK_SIZE)
    block = request // blocks_of_request
    blocks = options.kv_cache_memory_bytes // block
    return {
        "kv_bytes_per_token": request / length,
        "kv_bytes_per_request": request,
        "requests_in_flight": max(0, blocks - 1) // blocks_of_request,
        "kv_cache_bytes": blocks * block,
        "weight_bytes": weight_bytes(case.ckpt, options.dtype) + embedding_copies(config, dtype),
    }
