"""The attention layer of a gated variant: what it needs of a token beside query, key and value goes
through a buffer that all layers share, as vLLM's own layers do it (`topk_indices_buffer`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_attn import kv_dtypes

LIBRARY = torch.library.Library("attnserve", "FRAGMENT")


def keep_gates(query: Tensor, gates: Tensor, layer_name: str) -> None:
    """Copy a step's gates into the buffer from which the attention operator reads them.

    The operator says that it changes `query`, which it does not. Compilers know nothing of what
    attention reads beside its arguments: a plain copy would move behind the last layer. This way
    they keep the order, since attention takes the query.
    """
    layer: GatedAttention = get_forward_context().no_compile_layers[layer_name]
    layer.gates[: gates.shape[0]].copy_(gates)


def _keep_gates_fake(query: Tensor, gates: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(
    "keep_gates",
    keep_gates,
    mutates_args=["query"],
    fake_impl=_keep_gates_fake,
    target_lib=LIBRARY,
)


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
        torch.ops.attnserve.keep_gates(query, gates, self.layer_name)
        output: Tensor = super().forward(query, key, value)
        return output

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        group = self.num_heads // self.num_kv_heads
        return kv_dtypes.packed(spec, self.impl.variant, group)
