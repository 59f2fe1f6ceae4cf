"""VariantLlamaForCausalLM for vLLM: a Llama whose attention may have learned per-head tensors, or a
projection for gates."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from attn_kernels import get_variant, variant_from_config
from vllm_attn import pruned
from vllm_attn.backend import VariantImpl
from vllm_attn.gated import GatedAttention
from vllm_attn.report import StartupError


class VariantLlamaAttention(LlamaAttention):
    """Llama attention, computed by the variant that the checkpoint names."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        self.variant = variant = variant_from_config(config) or get_variant("softmax")
        layer: dict[str, Any] = {
            "num_heads": self.num_heads,
            "head_size": self.head_dim,
            "scale": self.scaling,
            "num_kv_heads": self.num_kv_heads,
            "cache_config": kwargs["cache_config"],
            "quant_config": kwargs["quant_config"],
            "prefix": f"{prefix}.attn",
        }
        if variant.kv_budgets:
            budget = variant.kv_budgets[extract_layer_index(prefix)]
            self.attn = pruned.PrunedAttention(budget, **layer)
        if variant.gated:
            self.attn = GatedAttention(**layer)
            # Each rank has the gates of its heads. Never quantized: an error of a gate adds up.
            self.f_proj = ColumnParallelLinear(
                self.hidden_size, self.total_num_heads, prefix=f"{prefix}.f_proj"
            )
        impl = self.attn.impl
        if isinstance(impl, VariantImpl) and impl.variant == variant:
            for name in variant.learned:
                impl.learned[name] = per_head_parameter(self.num_heads)
                self.register_parameter(name, impl.learned[name])
        elif variant.name != "softmax":
            raise StartupError(
                f"layer {extract_layer_index(prefix)} would run {type(impl).__name__} instead of "
                f"{variant.name} attention: is the attnserve plugin active in every process "
                "(VLLM_PLUGINS)?"
            )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend with `hidden_states [num_tokens, hidden_size]` at `positions [num_tokens]`."""
        if not self.variant.gated:
            return super().forward(positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotate(positions, q, k)
        projected, _ = self.f_proj(hidden_states)
        return self.project(self.attn(q, k, v, self.variant.gate(projected)), hidden_states)

    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, `[num_tokens, heads * head_size]` each, with RoPE."""
        q, k = self.rotary_emb(positions, q, k)
        return q, k

    def project(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the layer's output of what this rank's heads give, `[num_tokens, num_heads *
        head_size]`, and its input."""
        projected, _ = self.o_proj(output)
        return projected


def per_head_parameter(num_heads: int) -> nn.Parameter:
    """Return a learned tensor of this rank's heads, `[num_heads]`.

    Float32 whatever the model's dtype: it multiplies every score.
    """
    parameter = nn.Parameter(torch.empty(num_heads, dtype=torch.float32), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": load_this_rank})
    return parameter


def load_this_rank(param: nn.Parameter, loaded: Tensor) -> None:
    """Copy this tensor-parallel rank's heads of a per-head tensor `[num_heads]` (or `[.., 1]`).

    Raises:
        StartupError: the tensor is of another number of heads.
    """
    heads = param.shape[0] * get_tensor_model_parallel_world_size()
    if loaded.numel() != heads:
        raise StartupError(
            f"the checkpoint has a per-head tensor {list(loaded.shape)}, and config.json {heads} "
            "heads: it describes another model"
        )
    start = get_tensor_model_parallel_rank() * param.shape[0]
    param.data.copy_(loaded.flatten()[start : start + param.shape[0]])


class VariantLlamaForCausalLM(LlamaForCausalLM):
    """Model class of checkpoints with `"architectures": ["VariantLlamaForCausalLM"]`."""

    attention_class: ClassVar[type[VariantLlamaAttention]] = VariantLlamaAttention

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer_type = functools.partial(LlamaDecoderLayer, attn_layer_type=self.attention_class)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
