"""The attention layer of a gated variant: what it needs of a token beside query, key and value goes
through a buffer that all layers share, as vLLM's own layers do it (`topk_indices_buffer`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_attn import kv_dtypes


class GatedAttention(Attention):
    """vLLM's attention layer, with a gate for each token and query head.

    Args:
        layer: the arguments of vLLM's layer; the one of the same prefix gives way.
    """

    def __init__(self, **layer: Any) -> None:
        vllm_config = get_current_vllm_config()
        layers = vllm_config.compilation_config.static_forward_context
        # Llama's attention makes its layer itself, and takes no class for it.
        layers.pop(layer["prefix"])
        others = [other for other in layers.values() if isinstance(other, GatedAttention)]
        super().__init__(**layer)
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        shared: Tensor | None = others[0].gates if others else None
        if shared is None:  # float32 whatever the model's dtype: errors of gates add up
            shared = torch.empty(num_tokens, self.num_heads, dtype=torch.float32)
        self.gates: Tensor = shared
        self.impl.gates = shared

    def forward(self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
        """Attend with `gates [num_tokens, num_heads]` float32; the others as in vLLM's layer."""
        self.gates[: gates.shape[0]].copy_(gates)
        output: Tensor = super().forward(query, key, value)
        return output

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        group = self.num_heads // self.num_kv_heads
        return kv_dtypes.packed(spec, self.impl.variant, group)
