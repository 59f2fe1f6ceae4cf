"""flash-linear-attention's `transformer` and `forgetting_transformer` for vLLM (`hf_attn.fla`,
`hf_attn.fla_forgetting`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

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


class HeadRMSNorm(nn.Module):
    """RMS norm of each head, with a weight for each element of each of this rank's heads."""

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.weight = nn.Parameter(torch.ones(num_heads * head_size), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, param: nn.Parameter, loaded: Tensor) -> None:
        """Copy this rank's heads, which ranks share where there are fewer heads than ranks."""
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        first = rank * (loaded.numel() // self.head_size) // ranks
        param.data.copy_(loaded[first * self.head_size :][: param.numel()])

    def forward(self, x: Tensor) -> Tensor:
        """Return `x [num_tokens, num_heads * head_size]` normalised."""
        heads = x.float().unflatten(-1, (-1, self.head_size))
        heads = heads * (heads.square().mean(-1, keepdim=True) + QK_NORM_EPS).rsqrt()
        return (heads.flatten(-2) * self.weight).to(x.dtype)


class ForgettingTransformerAttention(VariantLlamaAttention):
    """Forgetting attention without positions, with the norms and the gate that are configured."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        self.qk_norm, self.use_output_gate = config.qk_norm, config.use_output_gate
        if self.qk_norm:
            self.q_norm = HeadRMSNorm(self.num_heads, self.head_dim)
            self.k_norm = HeadRMSNorm(self.num_kv_heads, self.head_dim)
        if self.use_output_gate:
            self.g_proj = ColumnParallelLinear(
                self.hidden_size,
                self.total_num_heads * self.head_dim,
                bias=False,
                quant_config=kwargs["quant_config"],
                prefix=f"{prefix}.g_proj",
            )

    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def project(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        if self.use_output_gate:
            gate, _ = self.g_proj(hidden_states)
            output = output * gate.sigmoid()
        return super().project(output, hidden_states)


class ForgettingTransformerForCausalLM(TransformerForCausalLM):
    """Model class of checkpoints with `"architectures": ["ForgettingTransformerForCausalLM"]`."""

    attention_class = ForgettingTransformerAttention
