"""Attention variants inside transformers.

Importing this package registers

- every variant as an attention function of its own name, so that
  `AutoModelForCausalLM.from_pretrained(path, attn_implementation="softpick")` runs a stock Llama,
  Mistral or Qwen with it, and
- `VariantLlamaConfig` and `VariantLlamaForCausalLM` with the Auto classes, so that a checkpoint
  whose `config.json` says `"model_type": "variant_llama"` loads without remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_attn.attention import register_attention_functions
from hf_attn.configuration import VariantLlamaConfig
from hf_attn.modeling import VariantLlamaForCausalLM, VariantLlamaModel

register_attention_functions()
AutoConfig.register(VariantLlamaConfig.model_type, VariantLlamaConfig, exist_ok=True)
AutoModel.register(VariantLlamaConfig, VariantLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(VariantLlamaConfig, VariantLlamaForCausalLM, exist_ok=True)

__all__ = [
    "VariantLlamaConfig",
    "VariantLlamaForCausalLM",
    "VariantLlamaModel",
    "register_attention_functions",
]
