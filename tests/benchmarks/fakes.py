"""Kernels for the benchmark's own tests: the torch path, and wrong ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_kernels import Variant
from attn_kernels.batch import Batch
from attn_kernels.paged import TorchLayer


class TorchKernel:
    """The torch path with a kernel's interface."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.isa = "torch"

    def spoil(self, out: Tensor, kv_cache: Tensor, before: Tensor) -> None:
        """Return what a wrong kernel does; `before` is the cache before the call."""

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        return None

    def layer(self, kv_cache: Tensor, **options: Any) -> SpoiledLayer:
        return SpoiledLayer(self, kv_cache, **options)


class SpoiledLayer(TorchLayer):
    """The torch path, spoiled by its kernel."""

    def __init__(self, kernel: TorchKernel, kv_cache: Tensor, **options: Any) -> None:
        super().__init__(kernel.variant, kv_cache, **options)
        self.kernel = kernel

    def attend(
        self, query: Tensor, batch: Batch, out: Tensor, selecting: Tensor | None = None
    ) -> None:
        before = self.kv_cache.clone()
        super().attend(query, batch, out, selecting)
        self.kernel.spoil(out, self.kv_cache, before)


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
