"""Softmax kernels of others on the data of a timing case, each on its own copy of keys and values.

They are made on torch's default device (`with torch.device("cuda")`).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_kernels import Variant, get_variant
from benchmarks.gpu_check.checks import SkippedError, require_vllm
from benchmarks.kernels.case import Inputs, Paging


class Peer(ABC):
    """What `benchmarks.kernels.gate.Checked` is."""

    def __init__(self, inputs: Inputs) -> None:
        self.variant: Variant = get_variant("softmax")
        self.learned: dict[str, Tensor] = {}
        self.inputs = inputs
        self.result = torch.zeros_like(inputs.query)

    @property
    def out(self) -> Tensor:
        """Output of the last `run`, on the CPU."""
        return self.result.cpu()

    @abstractmethod
    def run(self) -> None:
        """Attend."""

    def paged(self, paging: Paging) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_blocks, block_size, num_kv_heads, head_dim]` of the first copy."""
        case = self.inputs.case
        shape = (paging.num_blocks * case.block_size, case.num_kv_heads, case.head_dim)
        found = []
        for x in (self.inputs.key, self.inputs.value):
            cache = torch.zeros(shape, dtype=x.dtype)
            cache[paging.slots(0, 0)] = x.flatten(0, 1)
            found.append(cache.view(paging.num_blocks, case.block_size, *shape[1:]))
        return found[0], found[1]


class FlashAttention(Peer):
    """`flash_attn_with_kvcache`, on keys and values that are side by side."""

    def __init__(self, inputs: Inputs, paging: Paging) -> None:
        super().__init__(inputs)
        try:
            module = importlib.import_module("flash_attn")
        except ImportError as error:
            raise SkippedError(f"flash_attn is not installed ({error})") from None
        self.call: Callable[..., Tensor] = module.flash_attn_with_kvcache

    def run(self) -> None:
        inputs = self.inputs
        query = inputs.query.unflatten(0, (inputs.case.batch, -1))
        self.result = self.call(
            query,
            inputs.key,
            inputs.value,
            cache_seqlens=inputs.seq_lens,
            softmax_scale=inputs.scale,
            causal=True,
        ).flatten(0, 1)


class VllmFlashAttention(Peer):
    """The FlashAttention that vLLM's CUDA build brings with it, paged."""

    def __init__(self, inputs: Inputs, paging: Paging) -> None:
        super().__init__(inputs)
        require_vllm(inputs.query.device.type)
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise SkippedError(f"vLLM's FlashAttention is not installed ({error})") from None
        self.call: Callable[..., Any] = flash_attn_varlen_func
        self.keys, self.values = self.paged(paging)
        self.table = paging.tables[0]

    def run(self) -> None:
        inputs = self.inputs
        self.call(
            inputs.query,
            self.keys,
            self.values,
            max_seqlen_q=inputs.case.new_tokens,
            cu_seqlens_q=inputs.query_start_loc,
            max_seqlen_k=inputs.case.seq_len,
            seqused_k=inputs.seq_lens,
            softmax_scale=inputs.scale,
            causal=True,
            block_table=self.table,
            out=self.result,
        )


SEGMENTS, SMALLEST_GRID = 16, 128
"""How vLLM 0.32 cuts contexts for its Triton kernel (v1/attention/backends/triton_attn.py)."""


class UnifiedAttention(Peer):
    """vLLM's Triton kernel, with the scratch memory that makes it cut long contexts in decode."""

    def __init__(self, inputs: Inputs, paging: Paging) -> None:
        super().__init__(inputs)
        require_vllm(inputs.query.device.type)
        try:
            from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        except ImportError as error:
            raise SkippedError(f"vLLM's Triton kernel is not installed ({error})") from None
        self.call: Callable[..., Any] = unified_attention
        self.keys, self.values = self.paged(paging)
        self.table = paging.tables[0]
        case = inputs.case
        self.threshold = SMALLEST_GRID // case.num_kv_heads
        shape = (max(self.threshold, case.batch), case.num_heads, SEGMENTS)
        dims = 1 << (case.head_dim - 1).bit_length()
        self.parts = torch.empty(*shape, dims, dtype=torch.float32)
        self.tops, self.sums = (torch.empty(shape, dtype=torch.float32) for _ in range(2))

    def run(self) -> None:
        inputs = self.inputs
        self.call(
            q=inputs.query,
            k=self.keys,
            v=self.values,
            out=self.result,
            cu_seqlens_q=inputs.query_start_loc,
            max_seqlen_q=inputs.case.new_tokens,
            seqused_k=inputs.seq_lens,
            max_seqlen_k=inputs.case.seq_len,
            softmax_scale=inputs.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=self.table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=self.threshold,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=self.parts,
            softmax_segm_max=self.tops,
            softmax_segm_expsum=self.sums,
        )


class FlexAttention(Peer):
    """torch's compiled `flex_attention` with a causal block mask."""

    def __init__(self, inputs: Inputs, paging: Paging) -> None:
        super().__init__(inputs)
        if inputs.query.device.type != "cuda":
            raise SkippedError("FlexAttention is timed on a GPU only")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case = inputs.case
        before = case.seq_len - case.new_tokens

        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query + before >= key

        self.mask = create_block_mask(
            causal, None, None, case.new_tokens, case.seq_len, device=inputs.query.device
        )
        self.call: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        self.query = inputs.query.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous()
        self.key, self.value = (x.transpose(1, 2).contiguous() for x in (inputs.key, inputs.value))

    def run(self) -> None:
        output = self.call(
            self.query,
            self.key,
            self.value,
            block_mask=self.mask,
            scale=self.inputs.scale,
            enable_gqa=True,
        )
        self.result = output.transpose(1, 2).flatten(0, 1)


PEERS: dict[str, Callable[[Inputs, Paging], Peer]] = {
    "FlashAttention": FlashAttention,
    "vLLM FlashAttention": VllmFlashAttention,
    "vLLM Triton": UnifiedAttention,
    "FlexAttention": FlexAttention,
}
