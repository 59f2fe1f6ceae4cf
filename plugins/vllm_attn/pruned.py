"""Layers that keep a budget of tokens (`attn_kernels.pruning`): one page a request, of a size of
its own in every layer.

vLLM's `CircularBufferSpec` is one block a request for its whole life, without prefix caching; a
subclass says how large it is. Layers of different sizes share one block table
(`UniformTypeKVCacheSpecs`), so that memory holds exactly the budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import CircularBufferSpec

from attn_kernels import Variant, cpu, variant_from_config
from attn_kernels.paged import STATE_BYTES
from attn_kernels.pruning import PageShape, PrunedLayer, TorchPrunedLayer, slot_bytes
from vllm_attn import head_0

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, kw_only=True)
class PageSpec(CircularBufferSpec):
    """A page of `slots` tokens a request.

    `block_size`, in tokens, is only what positions are divided by to index the block table, which
    has one column: no request is longer.
    """

    slots: int

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return self.slots


class PrunedAttention(Attention):
    """vLLM's attention layer with a page instead of paged blocks.

    Args:
        budget: tokens of a request that the layer keeps.
        layer: the arguments of vLLM's layer; the one of the same prefix gives way.
    """

    def __init__(self, budget: int, **layer: Any) -> None:
        vllm_config = get_current_vllm_config()
        # Llama's attention makes its layer itself, and takes no class for it.
        vllm_config.compilation_config.static_forward_context.pop(layer["prefix"])
        super().__init__(**layer)
        self.impl.budget = min(budget, vllm_config.model_config.max_model_len)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PageSpec:
        dtype = self.kv_cache_torch_dtype
        max_model_len = vllm_config.model_config.max_model_len
        return PageSpec(
            block_size=-(-max_model_len // 16) * 16,  # kernel blocks are multiples of 16
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=dtype,
            slots=self.impl.budget,
            num_head_slots=1,
            state_content_bytes=slot_bytes(
                self.num_kv_heads, self.head_size, dtype, self.impl.selector
            ),
        )


def announce(vllm_config: VllmConfig, spec: PageSpec) -> None:
    """Log in one line what a request costs and how many fit, against unpruned."""
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    variant = variant_from_config(model_config.hf_config)
    assert variant is not None
    length = model_config.max_model_len
    slots = sum(min(budget, length) for budget in variant.kv_budgets)
    pruned = slots * spec.state_content_size_bytes
    vector = spec.head_size * spec.dtype.itemsize
    token = spec.num_kv_heads * (2 * vector + STATE_BYTES) + vector * head_0.is_remote(variant)
    whole = len(variant.kv_budgets) * length * token
    num_pages = cache_config.num_gpu_blocks or 0
    logger.info_once(
        "Pruned to kv_budgets: %s bytes of KV cache a request%s, %.1f times less than the %s of an "
        "unpruned one of %d tokens; %d requests fit (unpruned: %d). --max-num-seqs %d and "
        "--max-num-batched-tokens %d are the other limits.",
        f"{pruned:,}",
        " on each tensor-parallel rank" if head_0.is_remote(variant) else "",
        whole / pruned,
        f"{whole:,}",
        length,
        max(0, num_pages - 1),  # vLLM keeps one for padding
        num_pages * pruned // whole,
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens,
    )


def pages_of(kv_cache: Tensor) -> Tensor:
    """Return the pages, bytes `[num_pages, num_bytes]`, of a cache `[num_pages, 1, budget,
    content]`."""
    return kv_cache.flatten(1).view(torch.uint8)


def bind(variant: Variant, kv_cache: Tensor, shape: PageShape, **options: Any) -> PrunedLayer:
    """Bind one layer's pages to the fastest kernels for CPUs that this machine has.

    Args:
        kv_cache: `[num_pages, 1, budget, content]`.
        shape: of each page.
        options: those of `PrunedLayer`.
    """
    pages, kernel = pages_of(kv_cache), cpu.load(variant)
    if kernel is not None and kernel.unsupported(shape.head_size, 16, shape.dtype) is None:
        return cpu.PrunedCPULayer(kernel, pages, shape, **options)
    return TorchPrunedLayer(variant, pages, shape, **options)
