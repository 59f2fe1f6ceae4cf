"""Kernels for the benchmark's own tests: the torch path, and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_kernels import Variant, paged


class TorchKernel:
    """The torch path with a kernel's interface."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.isa = "torch"

    def spoil(self, out: Tensor, kv_cache: Tensor, before: Tensor) -> None:
        """What a wrong kernel does; `before` is the cache before the call."""

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        return None

    def write_cache(
        self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        paged.write_cache(self.variant, key, value, kv_cache, slot_mapping)

    def paged_attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
        out: Tensor,
    ) -> None:
        before = kv_cache.clone()
        paged.paged_attention(
            self.variant,
            query,
            kv_cache,
            block_table,
            query_start_loc.tolist(),
            seq_lens.tolist(),
            scale=scale,
            window=window,
            learned=learned,
            out=out,
        )
        self.spoil(out, kv_cache, before)


class NotQuite(TorchKernel):
    """Wrong by one part in ten thousand."""

    def spoil(self, out: Tensor, kv_cache: Tensor, before: Tensor) -> None:
        out *= 1.0001


class NotANumber(TorchKernel):
    """Writes NaN into one element."""

    def spoil(self, out: Tensor, kv_cache: Tensor, before: Tensor) -> None:
        out[-1, -1, -1] = torch.nan


class Forgetful(TorchKernel):
    """Does not advance a stateful variant's accumulators."""

    def spoil(self, out: Tensor, kv_cache: Tensor, before: Tensor) -> None:
        kv_cache.copy_(before)


class Refusing(TorchKernel):
    """Serves nothing."""

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        return f"head size {head_size}"
