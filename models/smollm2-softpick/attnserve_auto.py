"""Where `import hf_attn` was forgotten, trust_remote_code=True leads here."""

try:
    from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM, VariantLlamaModel
except ImportError as error:
    raise ImportError("this model needs the package attnserve: pip install attnserve") from error

__all__ = ["VariantLlamaConfig", "VariantLlamaForCausalLM", "VariantLlamaModel"]
