"""Checkpoints of flash-linear-attention's `forgetting_transformer`: forgetting attention (FoX).

It is the format of `hf_attn.fla` without RoPE, with a projection `f_proj` for the forget gates and,
where the configuration says so, norms of queries and keys with weights of each head's own and an
output gate. (The authors' own code has another format, `forgetting_transformer-project_fox`, with
shifted keys and values; nobody reads that here.)
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from attn_kernels import VariantError
from hf_attn.fla import (
    QK_NORM_EPS,
    Implementation,
    TransformerAttention,
    TransformerConfig,
    TransformerPreTrainedModel,
)
from hf_attn.modeling import Pair, VariantLlamaForCausalLM, VariantLlamaModel

FORGETTING = Implementation({"name": "forgetting"})


@strict
class ForgettingTransformerConfig(TransformerConfig):
    """The configuration, with the fields of `TransformerConfig` but `attn_impl`.

    Args:
        use_output_gate: what the heads give is multiplied by `sigmoid(g_proj(input))`.

    Raises:
        VariantError: a field has a value that is not supported.
    """

    model_type = "forgetting_transformer"

    attn_impl: Any = "forgetting"
    use_output_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.window_size is not None:
            raise VariantError(
                f"window_size {self.window_size} in config.json is not supported: "
                "flash-linear-attention trains forgetting attention without a window, and cuts off "
                "its cache at it"
            )

    @property
    def implementation(self) -> Implementation:
        return FORGETTING

    @property
    def choices(self) -> str:
        fields = ("qk_norm", "qkv_bias", "use_output_gate")
        return ", ".join(f"{field} {getattr(self, field)}" for field in fields)

    def attention_tensors(self) -> dict[str, bool]:
        has = {"f_proj.weight": True, "f_proj.bias": True}
        if getattr(self, "quantization_config", None) is None:
            has["g_proj.weight"] = self.use_output_gate
        return super().attention_tensors() | has


class HeadRMSNorm(nn.Module):
    """RMS norm of each head, with a weight for each element of each head."""

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x [batch, num_heads, num_tokens, head_size]` normalised."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * (wide.square().mean(-1, keepdim=True) + QK_NORM_EPS).rsqrt()
        return (wide * self.weight.view(x.shape[1], 1, -1)).to(x.dtype)


class ForgettingTransformerAttention(TransformerAttention):
    """Forgetting attention without positions, with the norms and the gate that are configured."""

    def __init__(self, config: ForgettingTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.qk_norm:
            self.q_norm = HeadRMSNorm(config.num_attention_heads, self.head_dim)
            self.k_norm = HeadRMSNorm(config.num_key_value_heads, self.head_dim)
        if config.use_output_gate:
            size = config.num_attention_heads * self.head_dim
            self.g_proj = nn.Linear(config.hidden_size, size, bias=False)

    def rotate(self, query: Tensor, key: Tensor, cos_sin: Pair, position_ids: Tensor) -> Pair:
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key

    def project(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        if self.config.use_output_gate:
            output = output * self.g_proj(hidden_states).sigmoid()
        return super().project(output, hidden_states)


class ForgettingTransformerPreTrainedModel(TransformerPreTrainedModel):
    """What the model without and the model with a language-model head have in common."""

    config_class = ForgettingTransformerConfig
    attention_class = ForgettingTransformerAttention


class ForgettingTransformerModel(ForgettingTransformerPreTrainedModel, VariantLlamaModel):
    """The model without a head."""


class ForgettingTransformerForCausalLM(
    ForgettingTransformerPreTrainedModel, VariantLlamaForCausalLM
):
    """The model with a language-model head."""

    model_class = ForgettingTransformerModel
