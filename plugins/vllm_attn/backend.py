"""The attention backend of every variant: paged KV cache, metadata, and the torch path on CPU.

One backend class a variant, made from the registry. The KV cache is vLLM's logical
`[num_blocks, num_kv_heads, block_size, 2 * head_size]` (keys, then values); a stateful variant
appends one float32 accumulator to every slot, of which KV head 0's is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from attn_kernels import (
    Variant,
    attend,
    causal_mask,
    get_variant,
    selectable_mask,
    variant_from_config,
    variant_names,
)
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

from vllm_attn import names
from vllm_attn.preflight import KV_CACHE_DTYPES
from vllm_attn.report import StartupError

QUERY_TILE = 256
"""Queries whose scores are materialised at once, which bounds the memory of a long prefill."""

STATE_BYTES = 4
"""A stateful variant's accumulator: one float32 a slot."""


class VariantBackend(AttentionBackend):
    """What vLLM asks of an attention backend; subclasses below name the variant."""

    variant_name: ClassVar[str]

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_CACHE_DTYPES)

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override]
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


@dataclass
class VariantMetadata:
    """One step's batch. Request `r` owns queries `query_start_loc[r] : query_start_loc[r + 1]`."""

    query_start_loc: list[int]
    """`num_reqs + 1` offsets into the step's tokens."""
    seq_lens: list[int]
    """Tokens of each request in the cache, this step's included."""
    block_table: Tensor
    """`[num_reqs, max_blocks]` int32: each request's cache blocks in order."""


class VariantMetadataBuilder(AttentionMetadataBuilder[VariantMetadata]):
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
    ) -> VariantMetadata:
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("attention variants are causal only")
        return VariantMetadata(
            query_start_loc=common_attn_metadata.query_start_loc_cpu.tolist(),
            seq_lens=common_attn_metadata.seq_lens.tolist(),
            block_table=common_attn_metadata.block_table_tensor,
        )


class VariantImpl(AttentionImpl[VariantMetadata]):
    """Attention of one layer with torch operations, scores and sums in float32."""

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
        self.learned: dict[str, Tensor] = {}
        """The variant's per-head tensors, `[num_heads]` each; the model class fills it."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        for name in self.variant.learned:
            if name not in self.learned:
                raise StartupError(
                    f"this model class has no {name}, which {self.variant.name} attention learns: "
                    "serve a checkpoint trained with it, or fix its parameters with --hf-overrides "
                    '\'{"attention_variant": {"name": "%s", ...}}\'' % self.variant.name
                )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store this step's keys and values; accumulators of new tokens start at 0.

        Args:
            key, value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: `[num_blocks, num_kv_heads, block_size, content]`.
            slot_mapping: `[num_tokens]`, slot `block * block_size + offset`, -1 for padding.
        """
        num_tokens = slot_mapping.shape[0]
        slots, keep = slot_mapping, slice(num_tokens)
        if num_tokens and int(slot_mapping.min()) < 0:
            keep = slot_mapping >= 0
            slots = slot_mapping[keep]
        block_size = kv_cache.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        content = torch.cat([key[:num_tokens][keep], value[:num_tokens][keep]], -1)
        kv_cache[blocks, :, offsets, : 2 * self.head_size] = content.to(kv_cache.dtype)
        if self.variant.stateful:
            accumulators(kv_cache, self.head_size)[blocks, offsets] = 0.0

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: VariantMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of every request of the step against its cached keys and values.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            key, value: unused, they are in the cache already.
            kv_cache: `[num_blocks, num_kv_heads, block_size, content]`.
            attn_metadata: the step's batch; None while vLLM profiles its memory.
            output: `[num_tokens, num_heads, head_size]`, written in place.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported")
        if attn_metadata is None:
            return output.zero_()
        starts = attn_metadata.query_start_loc
        for request, seq_len in enumerate(attn_metadata.seq_lens):
            start, end = starts[request], starts[request + 1]
            block_ids = attn_metadata.block_table[request]
            for tile in range(start, end, QUERY_TILE):
                tile_end = min(tile + QUERY_TILE, end)
                output[tile:tile_end] = self.attend_tile(
                    query[tile:tile_end], kv_cache, block_ids, seq_len - (end - tile)
                )
        return output

    def attend_tile(
        self, query: Tensor, kv_cache: Tensor, block_ids: Tensor, query_start: int
    ) -> Tensor:
        """Attention of consecutive queries of one request.

        Only slots that a query sees are read: others may hold anything, and the block table may
        name recycled blocks outside the sliding window.

        Args:
            query: `[num_queries, num_heads, head_size]`, the first at position `query_start`.
            block_ids: `[max_blocks]`, the request's blocks in order.

        Returns:
            `[num_queries, num_heads, head_size]` float32.
        """
        block_size, d = kv_cache.shape[2], self.head_size
        num_keys = query_start + query.shape[0]
        window = self.sliding_window
        first_key = 0 if window is None else max(0, query_start - window + 1)
        queries = torch.arange(query_start, num_keys)
        keys = torch.arange(first_key, num_keys)
        blocks, offsets = block_ids[keys // block_size].long(), keys % block_size
        # Advanced indices around a slice put the tokens first: [num_keys, num_kv_heads, content].
        kv = kv_cache[blocks, :, offsets, : 2 * d].float().transpose(0, 1)
        q, k, v = query.float().transpose(0, 1), kv[..., :d], kv[..., d:]
        penalty = None
        if self.variant.stateful:
            state = accumulators(kv_cache, d)
            selectable = selectable_mask(queries, keys, window)
            penalty, state[blocks, offsets] = self.variant.select(
                q, k, selectable, self.scale, state[blocks, offsets]
            )
        mask = causal_mask(queries, keys, window)[None]
        out, _ = attend(
            self.variant, q, k, v, mask, scale=self.scale, learned=self.learned, penalty=penalty
        )
        return out.transpose(0, 1)


def accumulators(kv_cache: Tensor, head_size: int) -> Tensor:
    """View `[num_blocks, block_size]` float32 of a stateful variant's accumulators."""
    return kv_cache[:, 0, :, 2 * head_size :].view(torch.float32)[..., 0]


for _name in variant_names():
    _class = names.class_name(_name)
    globals()[_class] = type(_class, (VariantBackend,), {"variant_name": _name, "__module__": __name__})
