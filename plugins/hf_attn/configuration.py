"""The configuration of a Llama that is trained with an attention variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from attn_kernels import Variant, VariantError, variant_from_config

AUTO_FILE = "attnserve_auto.py"
"""Beside `config.json`: what transformers runs with `trust_remote_code=True` where nobody has
imported `hf_attn`."""

AUTO_CODE = '''"""Where `import hf_attn` was forgotten, trust_remote_code=True leads here."""

try:
    from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM, VariantLlamaModel
except ImportError as error:
    raise ImportError("this model needs the package attnserve: pip install attnserve") from error

__all__ = ["VariantLlamaConfig", "VariantLlamaForCausalLM", "VariantLlamaModel"]
'''

AUTO_MAP = {
    "AutoConfig": "attnserve_auto.VariantLlamaConfig",
    "AutoModel": "attnserve_auto.VariantLlamaModel",
    "AutoModelForCausalLM": "attnserve_auto.VariantLlamaForCausalLM",
}


class VariantLlamaConfig(LlamaConfig):
    """A Llama's configuration with two fields more.

    Args:
        attention_variant: `{"name": "softpick", **parameters}`. A model cannot be built without it;
            the default None only lets transformers make an empty configuration.
        sliding_window: every layer sees this many tokens, the query's own included (at least 2);
            None means all.

    Raises:
        VariantError: the variant's name or one of its parameters is wrong.
    """

    model_type = "variant_llama"

    attention_variant: dict[str, Any] | None = None
    sliding_window: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        variant_from_config(self)
        # transformers' sliding cache keeps `keys[-window + 1:]`, which is everything for 1.
        if self.sliding_window is not None and self.sliding_window < 2:
            raise ValueError(f"sliding_window must be at least 2, not {self.sliding_window}")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedConfig.save_pretrained` does, with the way to this package for those
        who have not imported it (`AUTO_FILE`)."""
        if type(self) is VariantLlamaConfig:
            self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        if type(self) is VariantLlamaConfig:
            (Path(save_directory) / AUTO_FILE).write_text(AUTO_CODE, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: transformers would copy this package's files into every folder it saves."""

    @property
    def variant(self) -> Variant:
        """The attention function that `attention_variant` names.

        Raises:
            VariantError: it names none.
        """
        variant = variant_from_config(self)
        if variant is None:
            raise VariantError(
                "config.json of a variant_llama must name its attention function, for example "
                '"attention_variant": {"name": "softpick"}'
            )
        return variant
