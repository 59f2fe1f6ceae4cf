"""Where vLLM asks which attention backend to run: the variant's, or start-up stops.

`VariantCpuPlatform` is the normal way in. Only one out-of-tree platform can be active, vLLM skips
them all when `VLLM_TARGET_DEVICE=cpu`, and a GPU keeps its own platform; there the class in use
gets the same methods.
"""

from __future__ import annotations

from typing import Any, TypeVar

from vllm.platforms.interface import Platform

P = TypeVar("P", bound=type[Platform])


def honour_variants(platform: P) -> P:
    """Class decorator: check the configuration at start-up, select the variants' backends, and
    check the loaded model."""
    stock_check = platform.check_and_update_config
    stock_select = platform.get_attn_backend_cls
    stock_update = platform.update_block_size_for_backend

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        from vllm_attn import preflight

        preflight.check(vllm_config)
        stock_check(vllm_config)

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm_attn import names, preflight, weights

        if names.variant_of(selected_backend) is None:
            return stock_select(selected_backend, attn_selector_config, num_heads=num_heads)
        weights.check_every_load()
        preflight.check_layer(selected_backend, attn_selector_config, cls.get_device_capability())
        return selected_backend.get_path()

    def update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
        """vLLM calls it in each worker, as soon as the model is loaded."""
        if vllm_config.model_config is not None:
            from vllm_attn import loaded

            loaded.check_layers(vllm_config)
        stock_update(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform.update_block_size_for_backend = classmethod(update_block_size_for_backend)
    platform.honours_variants = True
    return platform


def ensure_active() -> None:
    """Make the platform in use honour variants if it is not ours."""
    from vllm.platforms import current_platform

    if not getattr(current_platform, "honours_variants", False):
        honour_variants(type(current_platform))
