"""The configuration of a Llama that is trained with an attention variant."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from attn_kernels import Variant, VariantError, variant_from_config


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
