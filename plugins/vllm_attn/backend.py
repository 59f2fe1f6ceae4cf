"""The attention backend of every variant: what vLLM asks of it, metadata, and the impl on CPU.

One backend class a variant, made from the registry. The KV cache is vLLM's logical
`[num_blocks, num_kv_heads, block_size, content]`, laid out inside each block as
`attn_kernels.cpu` (or, where it cannot be built, `attn_kernels.paged`) likes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from attn_kernels import Variant, cpu, get_variant, variant_from_config, variant_names
from attn_kernels.batch import Batch
from attn_kernels.paged import STATE_BYTES, TorchLayer
from vllm_attn import names
from vllm_attn.preflight import KV_CACHE_DTYPES
from vllm_attn.report import StartupError


class VariantBackend(AttentionBackend):
    """What vLLM asks of an attention backend; subclasses below name the variant."""

    variant_name: ClassVar[str]

    # One custom operator a layer rather than two: on a CPU each costs as much as attention to a
    # short context.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_CACHE_DTYPES)

    @classmethod
    def get_name(cls) -> str:
        return cls.variant_name.upper()

    @staticmethod
    def get_impl_cls() -> type[VariantImpl]:
        return VariantImpl

    @staticmethod
    def get_builder_cls() -> type[VariantMetadataBuilder]:
        return VariantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if not get_variant(cls.variant_name).stateful:
            return spec
        return replace(spec, state_content_bytes=spec.state_content_size_bytes + STATE_BYTES)


class VariantMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """Reads vLLM's batch once a step; all layers share the result."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("attention variants are causal only")
        return Batch(
            common_attn_metadata.block_table_tensor,
            common_attn_metadata.query_start_loc_cpu,
            common_attn_metadata.seq_lens,
            common_attn_metadata.slot_mapping,
        )


class VariantImpl(AttentionImpl[Batch]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        vllm_config = get_current_vllm_config()
        name = names.variant_of(vllm_config.attention_config.backend)
        if name is None:
            raise StartupError("an attnserve backend was made without --attention-backend")
        declared = variant_from_config(vllm_config.model_config.hf_config)
        self.variant: Variant = declared or get_variant(name)
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a soft cap on the scores": bool(logits_soft_cap),
            "KV sharing between layers": kv_sharing_target_layer_name is not None
            and self.variant.stateful,
        }
        for what, present in unsupported.items():
            if present:
                raise StartupError(f"{name} attention does not support {what}, which the model has")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.owns_cache = kv_sharing_target_layer_name is None
        self.learned: dict[str, Tensor] = {}
        """The variant's per-head tensors, `[num_heads]` each; the model class fills it."""
        self.layer: cpu.CPULayer | TorchLayer | None = None
        """Attention bound to the layer's cache, which exists only when vLLM has sized it."""
        cpu.load(self.variant)  # builds the kernels now rather than in the first request

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        for name in self.variant.learned:
            if name not in self.learned:
                raise StartupError(
                    f"this model class has no {name}, which {self.variant.name} attention learns: "
                    "serve a checkpoint trained with it, or fix its parameters with --hf-overrides "
                    '\'{"attention_variant": {"name": "%s", ...}}\'' % self.variant.name
                )

    def bound(self, kv_cache: Tensor) -> cpu.CPULayer | TorchLayer:
        """`layer`, bound to this cache."""
        if self.layer is None or self.layer.kv_cache is not kv_cache:
            self.layer = cpu.bind(
                self.variant,
                kv_cache,
                num_heads=self.num_heads,
                scale=self.scale,
                window=self.sliding_window,
                learned=self.learned,
            )
        return self.layer

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the step's keys and values, then attention of every request against its own.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            key, value: `[num_tokens, num_kv_heads, head_size]`; None, or not to be stored, where
                the cache is another layer's.
            kv_cache: `[num_blocks, num_kv_heads, block_size, content]`.
            attn_metadata: the step's batch; None while vLLM profiles its memory.
            output: `[num_tokens, num_heads, head_size]`, written in place.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported")
        if attn_metadata is None:
            return output.zero_()
        bound = self.bound(kv_cache)
        if self.owns_cache:
            bound.write_cache(key, value, attn_metadata.slot_mapping)
        bound.attend(query, attn_metadata, output)
        return output


for _name in variant_names():
    _class = names.class_name(_name)
    globals()[_class] = type(
        _class, (VariantBackend,), {"variant_name": _name, "__module__": __name__}
    )
