"""Attention variants inside transformers.

Importing this package registers

- every variant as an attention function of its own name, so that
  `AutoModelForCausalLM.from_pretrained(path, attn_implementation="softpick")` runs a stock Llama,
  Mistral or Qwen with it,
- the models `variant_llama` (ours), `transformer` (flash-linear-attention's, with softpick) and
  `forgetting_transformer` (its FoX) with the Auto classes, so that checkpoints of these
  `model_type`s load without remote code, and
- packed checkpoints of any model, as `quant.quantize` writes them (`quantized`).

Every other model with an `attention_variant` in its configuration is refused from then on, unless
that is the `attn_implementation`: transformers would run softmax.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hf_attn import fla
from hf_attn.attention import register_attention_functions
from hf_attn.configuration import VariantLlamaConfig
from hf_attn.fla import TransformerConfig, TransformerForCausalLM, TransformerModel
from hf_attn.fla_forgetting import (
    ForgettingTransformerConfig,
    ForgettingTransformerForCausalLM,
    ForgettingTransformerModel,
)
from hf_attn.modeling import VariantLlamaForCausalLM, VariantLlamaModel
from hf_attn.quantized import register_packed_checkpoints
from hf_attn.unread import refuse_unread_variants

register_attention_functions()
refuse_unread_variants()
register_packed_checkpoints()
for format in (TransformerConfig, ForgettingTransformerConfig):
    register_checkpoint_conversion_mapping(format.model_type, fla.RENAMINGS, overwrite=True)
for config, model, causal_lm in (
    (VariantLlamaConfig, VariantLlamaModel, VariantLlamaForCausalLM),
    (TransformerConfig, TransformerModel, TransformerForCausalLM),
    (
        ForgettingTransformerConfig,
        ForgettingTransformerModel,
        ForgettingTransformerForCausalLM,
    ),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)

__all__ = [
    "ForgettingTransformerConfig",
    "ForgettingTransformerForCausalLM",
    "ForgettingTransformerModel",
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerModel",
    "VariantLlamaConfig",
    "VariantLlamaForCausalLM",
    "VariantLlamaModel",
    "register_attention_functions",
]
