"""A Llama whose attention is a variant: `model_type` "variant_llama".

Everything but the attention module is transformers' Llama. The learned per-head tensors of a
variant are parameters of the attention modules: `model.layers.N.self_attn.ssmax_scale`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from attn_kernels import VariantError
from hf_attn import kernels
from hf_attn.attention import attention_forward, pruned_penalty, selecting_head, selection_penalty
from hf_attn.configuration import VariantLlamaConfig

Pair = tuple[Tensor, Tensor]


class VariantLlamaAttention(LlamaAttention):
    """Llama's attention with a variant's formula and learned tensors.

    For a stateful variant the cache holds one more head than the model has KV heads: its key is
    head 0's key and its value head 0's query (`hf_attn.attention.selecting_head`), from which the
    penalty is computed. For a gated one its keys are longer: behind each is what `f_proj` gives its
    token for the heads that share it. So whatever crops, reorders or repeats the cache keeps them
    in step.
    """

    def __init__(self, config: VariantLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.variant = config.variant
        budgets = self.variant.kv_budgets
        if budgets and len(budgets) != config.num_hidden_layers:
            raise VariantError(
                f"kv_budgets has {len(budgets)} entries and the model {config.num_hidden_layers} "
                "layers: give one budget a layer"
            )
        self.budget = budgets[layer_idx] if budgets else None
        for name in self.variant.learned:
            setattr(self, name, nn.Parameter(torch.empty(config.num_attention_heads)))
        if self.variant.gated:
            self.f_proj = nn.Linear(config.hidden_size, config.num_attention_heads)

    def rotate(self, query: Tensor, key: Tensor, cos_sin: Pair, position_ids: Tensor) -> Pair:
        """Return queries and keys, `[batch, heads, num_queries, head_size]` each, with RoPE."""
        query, key = apply_rotary_pos_emb(query, key, *cos_sin)
        return query, key

    def project(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the layer's output of what its heads give, `[batch, num_queries, num_heads *
        head_size]`, and its input."""
        projected: Tensor = self.o_proj(output)
        return projected

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Pair,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
        penalties: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with `hidden_states [batch, num_queries, hidden_size]`.

        Args:
            hidden_states: the layer's normalised input.
            position_embeddings: cosines and sines `[batch, num_queries, head_size]`.
            attention_mask: bool `[batch, 1, num_queries, num_keys]`.
            position_ids: `[batch or 1, num_queries]`.
            past_key_values: the cache, which takes up these tokens.
            penalties: a list to which the layer adds what a stateful variant subtracts from its
                scores, `[batch, num_queries, num_keys]`; a model passes it on to every layer.
            kwargs: passed on to `attention_forward`.

        Returns:
            `(output [batch, num_queries, hidden_size],
            weights [batch, num_heads, num_queries, num_keys] or None)`, as `attention_forward`.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q, k, position_embeddings, position_ids)

        # Kernels compute a stateful variant's penalties themselves; a cache is for later tokens.
        fused = penalties is None and kernels.usable(self.variant, self, q, k, v, **kwargs)
        selects = self.variant.stateful and not (fused and past_key_values is None)
        own_key = torch.arange(q.shape[-2], device=q.device)
        if past_key_values is not None:
            _, first_key = past_key_values.get_mask_sizes(q.shape[-2], self.layer_idx)
            own_key = own_key + past_key_values.get_query_offset(self.layer_idx) - first_key
        if selects:
            q0, k0 = selecting_head(q, k, attention_mask, own_key)
            k, v = torch.cat((k, k0), 1), torch.cat((v, q0), 1)
        if self.variant.gated:  # `[batch, num_kv_heads, num_keys, group]`
            projected = self.f_proj(hidden_states).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        if past_key_values is not None:
            if self.variant.gated:
                k = torch.cat((k, projected), -1)
            k, v = past_key_values.update(k, v, self.layer_idx)
            if self.variant.gated:
                k, projected = k[..., : self.head_dim], k[..., self.head_dim :]
        gates = None
        if self.variant.gated:  # one row a query head
            gates = self.variant.gate(projected.transpose(-2, -1).flatten(1, 2))
        penalty = None
        if selects:
            k, k0 = k[:, :-1], k[:, -1:]
            v, q0 = v[:, :-1], v[:, -1:]
            selects = not (fused and k.shape[-2] == q.shape[-2])
        if selects:
            dtype = torch.promote_types(q.dtype, torch.float32)
            with torch.autocast(q.device.type, enabled=False):
                q0, k0 = q0.to(dtype), k0.to(dtype)
                if self.budget is None:
                    penalty = selection_penalty(self.variant, q0, k0, own_key, self.scaling)
                else:
                    penalty, attention_mask = pruned_penalty(
                        self.variant, q0, k0, attention_mask, own_key, self.scaling, self.budget
                    )
            if penalties is not None:
                penalties.append(penalty)
        output, weights = attention_forward(
            self.variant.name,
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            penalty=penalty,
            gates=gates,
            position_ids=position_ids,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1)
        return self.project(output, hidden_states), weights


class VariantLlamaPreTrainedModel(PreTrainedModel):
    """What the model without and the model with a language-model head have in common."""

    config_class: ClassVar[type[VariantLlamaConfig]] = VariantLlamaConfig
    attention_class: ClassVar[type[VariantLlamaAttention]] = VariantLlamaAttention

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Return the variant of the configuration, which is the only implementation there is.

        Raises:
            ValueError: another one was asked for.
        """
        name: str = self.config.variant.name
        if requested_attention not in (None, name):
            raise ValueError(
                f'attn_implementation="{requested_attention}" does not fit a checkpoint of '
                f"{name} attention: leave it out"
            )
        return name

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing, as `VariantLlamaConfig.register_for_auto_class`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VariantLlamaAttention):
            for name in module.variant.learned:
                init.constant_(getattr(module, name), module.variant.initial(name))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does.

        Raises:
            ValueError: the checkpoint does not fit its configuration (`check_loaded`).
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model.check_loaded(info)
        return (model, info) if output_loading_info else model

    def check_loaded(self, info: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks a tensor of its variant, which transformers would fill
        with its initial value.

        Args:
            info: what transformers says of the loading: its missing and unexpected tensors.
        """
        variant = self.config.variant
        missing = info["missing_keys"]
        lacking = [key for key in missing if key.partition(".self_attn.")[2] in variant.tensors]
        if lacking:
            raise ValueError(
                f"the checkpoint lacks {min(lacking)} (of {len(lacking)} missing), which "
                f"{variant.name} attention learns: it was not trained with it"
            )


class VariantLlamaModel(VariantLlamaPreTrainedModel, LlamaModel):
    """Llama without a head. Builds a `LlamaModel` and replaces its attention modules."""

    def __init__(self, config: VariantLlamaConfig) -> None:
        super().__init__(config)
        variant = config.variant
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, index)
            layer.self_attn.variant = variant  # one object: a compiled layer serves all of them
        self.post_init()


class VariantLlamaForCausalLM(VariantLlamaPreTrainedModel, LlamaForCausalLM):
    """Llama with a language-model head over `VariantLlamaModel`."""

    model_class: ClassVar[type[VariantLlamaModel]] = VariantLlamaModel

    def __init__(self, config: VariantLlamaConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()
