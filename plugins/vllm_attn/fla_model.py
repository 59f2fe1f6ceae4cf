"""TransformerForCausalLM for vLLM: flash-linear-attention's `transformer` (`hf_attn.fla`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from hf_attn.fla import DERIVED, QK_NORM_EPS, RENAMINGS
from vllm_attn.model import VariantLlamaAttention, VariantLlamaForCausalLM, per_head_parameter
from vllm_attn.weights import noted

TO_LLAMA = WeightsMapper(
    orig_to_new_renaming=RENAMINGS, orig_to_new_suffix={f".{name}": None for name in DERIVED}
)
"""From the format's tensor names to those of vLLM's Llama."""


class TransformerAttention(VariantLlamaAttention):
    """Llama attention with QK-norm and a learned scale of the queries, where configured."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=QK_NORM_EPS)
            self.k_norm = RMSNorm(self.head_dim, eps=QK_NORM_EPS)
        self.scaled = config.implementation.scaled
        if self.scaled:
            self.s = per_head_parameter(self.num_heads)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend with `hidden_states [num_tokens, hidden_size]` at `positions [num_tokens]`."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        if self.scaled:
            factor = self.s * (positions + 2).float().log()[:, None]  # [num_tokens, num_heads]
            heads = q.unflatten(-1, (-1, self.head_dim))
            q = (heads * factor[..., None]).to(q.dtype).flatten(-2)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class TransformerForCausalLM(VariantLlamaForCausalLM):
    """Model class of checkpoints with `"architectures": ["TransformerForCausalLM"]`."""

    attention_class = TransformerAttention
    hf_to_vllm_mapper = TO_LLAMA | LlamaForCausalLM.hf_to_vllm_mapper

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        names: dict[str, None] = {}
        loaded = super().load_weights(TO_LLAMA.apply(noted(weights, names)))
        self.config.check_tensors(set(names))
        return loaded
