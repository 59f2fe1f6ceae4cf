"""Checkpoints of flash-linear-attention's `transformer`: `model_type` "transformer".

The softpick paper's checkpoints have this format, from the authors' own fork of
flash-linear-attention. It is a Llama with other names, plus what its `attn_impl` asks for. The
"scaled" implementations multiply the query at position i (from 0) by `s * ln(i + 2)` after RoPE,
with a learned `s` for each head; then the ordinary formula follows. (SSMax has ln(i + 1), so it is
not the same.)

Importing `hf_attn` registers it all; a saved model has the format's tensor names again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

from attn_kernels import VariantError
from hf_attn.configuration import VariantLlamaConfig
from hf_attn.modeling import (
    Pair,
    VariantLlamaAttention,
    VariantLlamaForCausalLM,
    VariantLlamaModel,
    VariantLlamaPreTrainedModel,
)

logger = logging.get_logger(__name__)


class Implementation(NamedTuple):
    """What a value of `attn_impl` computes: a variant, with or without the scale `s ln(i + 2)`."""

    variant: dict[str, Any]
    scaled: bool = False


SOFTMAX = {"name": "softmax"}
SOFTPICK = {"name": "softpick", "eps": 1e-6}
SOFTPICK_NAIVE = {"name": "softpick", "eps": 1e-8}
IMPLEMENTATIONS = {
    "flash_attn": Implementation(SOFTMAX),
    "parallel_attn": Implementation(SOFTMAX),
    "naive_attn": Implementation(SOFTMAX),
    "parallel_scaled_attn": Implementation(SOFTMAX, scaled=True),
    "naive_scaled_attn": Implementation(SOFTMAX, scaled=True),
    "parallel_softpick_attn": Implementation(SOFTPICK),
    "naive_softpick_attn": Implementation(SOFTPICK_NAIVE),
    "parallel_scaled_softpick_attn": Implementation(SOFTPICK, scaled=True),
    "naive_scaled_softpick_attn": Implementation(SOFTPICK_NAIVE, scaled=True),
}

UNSUPPORTED = ("attn", "attnres_block_size", "scale_base")
"""Fields of other models or forks that change what is computed."""

RENAMINGS = [
    WeightRenaming("embeddings", "embed_tokens"),
    WeightRenaming("attn_norm", "input_layernorm"),
    WeightRenaming("mlp_norm", "post_attention_layernorm"),
    WeightRenaming(r"\.attn\.", ".self_attn."),
]
"""From the format's tensor names to Llama's."""

DERIVED = ("logn", "inv_freq")
"""Last parts of the names of tensors that a checkpoint may carry and nobody needs: logarithms of
the positions, and RoPE's frequencies."""

QK_NORM_EPS = 1e-5
"""The format's QK-norm takes no eps from the configuration."""


@strict
class TransformerConfig(VariantLlamaConfig):
    """The configuration, with the format's fields and defaults and Llama's names beside them.

    Args:
        num_heads, num_kv_heads: heads; `num_kv_heads` None means as many as `num_heads`.
        qkv_bias: the projections of queries, keys and values have a bias. (`attention_bias`, which
            published files have too, means nothing in this format.)
        qk_norm: queries and keys are RMS-normalised over `head_size` before RoPE.
        window_size: every token sees this many, itself included; None means all.
        hidden_ratio, intermediate_size: without `intermediate_size` it is `2/3 hidden_ratio
            hidden_size`, rounded up to a multiple of 256.
        norm_eps: of every RMS norm but `qk_norm`'s.
        attn_impl: a key of `IMPLEMENTATIONS`.

    Raises:
        VariantError: a field has a value that is not supported.
    """

    model_type = "transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "rms_norm_eps": "norm_eps",
        "sliding_window": "window_size",
    }

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    attn_impl: Any = "flash_attn"

    def __post_init__(self, **kwargs: Any) -> None:
        for field in UNSUPPORTED:
            if kwargs.get(field) is not None:
                raise VariantError(
                    f"{field} {kwargs[field]!r} in config.json is not supported: only a "
                    "transformer without it (or with null) is"
                )
        if self.hidden_act not in ("swish", "silu"):
            raise VariantError(
                f"hidden_act {self.hidden_act!r} in config.json is not supported: use swish or silu"
            )
        variant = self.implementation.variant
        if self.attention_variant not in (None, variant):
            raise VariantError(
                f"attention_variant {self.attention_variant} in config.json contradicts attn_impl "
                f"{self.attn_impl!r}: leave it out"
            )
        self.attention_variant = variant
        self.hidden_act = "silu"
        self.attention_bias = False
        if self.intermediate_size is None:
            wide = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = 256 * math.ceil(wide / 256)
        super().__post_init__(**kwargs)
        if self.window_size is not None and self.attn_impl != "flash_attn":
            logger.warning_once(
                f"every token sees {self.window_size} tokens, as window_size says, although "
                f"flash-linear-attention trains {self.attn_impl} without a window"
            )

    @property
    def implementation(self) -> Implementation:
        """What `attn_impl` computes.

        Raises:
            VariantError: it is unknown.
        """
        if self.attn_impl not in tuple(IMPLEMENTATIONS):
            raise VariantError(
                f"attn_impl {self.attn_impl!r} in config.json is not supported: use one of "
                f"{', '.join(IMPLEMENTATIONS)}"
            )
        return IMPLEMENTATIONS[self.attn_impl]

    @property
    def choices(self) -> str:
        """The fields that decide about `attention_tensors`, for people."""
        return f"attn_impl {self.attn_impl}, qk_norm {self.qk_norm}, qkv_bias {self.qkv_bias}"

    def attention_tensors(self) -> dict[str, bool]:
        """Return whether a layer's attention has each of the tensors that depend on the
        configuration, by their names behind `attn.`."""
        has = {"s": self.implementation.scaled}
        has |= {f"{part}_norm.weight": self.qk_norm for part in "qk"}
        if getattr(self, "quantization_config", None) is None:  # GPTQ writes biases of zeros
            has |= {f"{part}_proj.bias": self.qkv_bias for part in "qkv"}
        return has

    def check_tensors(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint whose attention this configuration does not describe.

        Loaders are lenient here: vLLM ignores a bias, and transformers anything, that they have no
        place for, and every answer would be wrong.

        Args:
            names: of all its tensors.

        Raises:
            VariantError: one of those that depend on the configuration is missing, or has no place.
        """
        present = {name.removeprefix("model.") for name in names}
        for layer in range(self.num_hidden_layers):
            for part, wanted in self.attention_tensors().items():
                name = f"layers.{layer}.attn.{part}"
                if wanted != (name in present):
                    raise VariantError(
                        f"the checkpoint {'lacks' if wanted else 'has'} {name}, which does not fit "
                        f"its config.json ({self.choices}): restore the config.json that it was "
                        "trained with"
                    )


class TransformerAttention(VariantLlamaAttention):
    """Attention with a bias, QK-norm and a learned scale of the queries, where configured."""

    def __init__(self, config: TransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features))
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=QK_NORM_EPS)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=QK_NORM_EPS)
        if config.implementation.scaled:
            self.s = nn.Parameter(torch.empty(config.num_attention_heads, 1))

    def rotate(self, query: Tensor, key: Tensor, cos_sin: Pair, position_ids: Tensor) -> Pair:
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = super().rotate(query, key, cos_sin, position_ids)
        if self.config.implementation.scaled:
            # In float32, like the scores: `[batch, num_heads, num_queries, 1]`.
            factor = self.s.float()[:, None] * (position_ids + 2).float().log()[:, None, :, None]
            query = (query * factor).to(query.dtype)
        return query, key


class TransformerPreTrainedModel(VariantLlamaPreTrainedModel):
    """What the model without and the model with a language-model head have in common."""

    config_class = TransformerConfig
    attention_class = TransformerAttention
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [rf"\.{name}$" for name in DERIVED]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TransformerAttention) and module.config.implementation.scaled:
            init.constant_(module.s, 0.3)

    def check_loaded(self, info: dict[str, Any]) -> None:
        super().check_loaded(info)
        names = self.state_dict().keys() - info["missing_keys"] | info["unexpected_keys"]
        self.config.check_tensors(name.replace(".self_attn.", ".attn.") for name in names)


class TransformerModel(TransformerPreTrainedModel, VariantLlamaModel):
    """The model without a head."""


class TransformerForCausalLM(TransformerPreTrainedModel, VariantLlamaForCausalLM):
    """The model with a language-model head."""

    model_class = TransformerModel
